"""`scripts/compare.py` on runs made up on the spot: what is a row, its mean and spread, and which differences are supported."""

import csv
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning.distances import CosineSimilarity
from scipy.stats import t, ttest_ind, ttest_rel

from scripts import compare
from siamese.config import ROOT
from siamese.evaluation import EvaluationResult, evaluate
from siamese.reporting import OVERLAID

RECALL, MAP, AUC = "test/recall_at_1", "test/map_at_r", "test/auc"


def made_up(folder, loss, seed, results=None, **figures):
    (folder / ".hydra").mkdir(parents=True)
    margin = {"loss": {"margin": 0.1}} if loss == "triplet" else {"loss": {"temperature": 0.5}}
    (folder / ".hydra" / "config.yaml").write_text(json.dumps({"seed": seed, **margin, "paths": {"output_dir": str(folder)}}))
    choices = {"loss": loss, "miner": "hard", "hydra/launcher": "basic"}
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    if results:
        figures |= {f"{split}/{name}": value for split, result in results.items() for name, value in result.figures.items()}
        EvaluationResult.save(results, folder / "results.npz")
    if figures:
        (folder / "metrics.json").write_text(json.dumps({**figures, "seconds/fit": 12.3}))


def printed(capsys, monkeypatch, *arguments):
    """What the script says, lines as they are in a pipe."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.main()
    return capsys.readouterr().out


def only(places, figures, **how):
    """The one table of these places."""
    (found,), _ = compare.tables(places, figures, **how)
    return found


def left_out(places):
    return compare.tables(places, ["map_at_r"])[1]


@pytest.fixture
def sweep(tmp_path):
    made_up(tmp_path / "0", "triplet", 0, **{MAP: 0.65, "test/eer": 0.2, "val/map_at_r": 0.9, "test/map_at_r_ci95": [0.4, 0.6]})
    made_up(tmp_path / "1", "supcon", 0, **{MAP: 0.7, "test/eer": 0.3, "val/map_at_r": 0.4})
    made_up(tmp_path / "2", "supcon", 1, **{MAP: 0.5, "test/eer": 0.1, "val/map_at_r": 0.5})
    made_up(tmp_path / "10", "supcon", 2)
    return tmp_path


# --- rows


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_and_spread(sweep):
    found = only([str(sweep)], ["map_at_r", "eer"])
    assert (found.differ, found.figures) == (["loss"], [MAP, "test/eer"])
    assert [(row["runs"], row["said"]) for row in found.rows] == [(["0"], ["triplet"]), (["1", "2"], ["supcon"])]
    assert found.rows[0]["figures"][MAP] == (0.65, None)
    assert found.rows[1]["figures"][MAP] == pytest.approx((0.6, math.sqrt(0.02)))
    assert found.rows[1]["seconds"] == pytest.approx(12.3)
    assert left_out([str(sweep)]) == [f"unfinished, left out: {sweep / '10'}"]


def test_the_lowest_error_comes_first_and_who_lacks_the_figure_last(sweep):
    made_up(sweep / "3", "arcface", 0, **{MAP: 0.9})
    rows = only([str(sweep)], ["eer"], each=True).rows
    assert [row["runs"] for row in rows] == [["2"], ["0"], ["1"], ["3"]]


def test_each_shows_a_row_for_each_run_and_tests_none(sweep):
    found = only([str(sweep)], ["map_at_r", "eer"], each=True)
    assert found.differ == ["loss", "seed"]
    assert [row["said"] for row in found.rows] == [["supcon", "0"], ["triplet", "0"], ["supcon", "1"]]
    assert not any(row["tests"] for row in found.rows)
    header, first, *_ = compare.csv_lines([found], each=True)
    assert header == ["dataset", "data", "run", "loss", "seed", MAP, "test/eer", "seconds/fit"]
    assert first == ["", "", "1", "supcon", "0", 0.7, 0.3, 12.3]


def test_validation_is_compared_where_a_run_has_not_looked_at_test(sweep):
    made_up(sweep / "3", "supcon", 3, **{"val/map_at_r": 0.95})
    found = only([str(sweep)], ["map_at_r"])
    assert found.figures == ["val/map_at_r"]
    assert found.rows[1]["runs"] == ["1", "2", "3"]


def test_a_seed_run_twice_counts_once_and_the_later_run_stands(sweep):
    made_up(sweep / "11", "supcon", 1, **{MAP: 0.8, "test/eer": 0.1})
    found = only([str(sweep)], ["map_at_r"])
    assert found.rows[0]["runs"] == ["1", "11"]
    assert found.rows[0]["figures"][MAP][0] == pytest.approx(0.75)
    assert f"run again later with the same seed, left out: {sweep / '2'}" in left_out([str(sweep)])


def test_a_difference_beside_the_seed_makes_another_row(sweep):
    config = sweep / "2" / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("0.5", "0.25"))
    found = only([str(sweep)], ["map_at_r"])
    assert [row["runs"] for row in found.rows] == [["1"], ["0"], ["2"]]


# --- what is written and printed


def test_what_follows_from_other_choices_makes_no_row_of_its_own(sweep):
    hydra = sweep / "2" / ".hydra" / "hydra.yaml"
    said = json.loads(hydra.read_text())
    said["hydra"]["runtime"]["choices"]["experiment/loss@loss"] = "record_supcon"
    hydra.write_text(json.dumps(said))
    assert [row["runs"] for row in only([str(sweep)], ["map_at_r"]).rows] == [["0"], ["1", "2"]]


def test_the_csv_holds_means_and_spreads_in_full(sweep, tmp_path):
    file = tmp_path / "table.csv"
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", str(sweep), "--csv", str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "supcon" in done.stdout
    assert "unfinished" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 160
    with file.open() as lines:
        written = list(csv.DictReader(lines))
    assert list(written[0]) == ["dataset", "data", "run", "loss", "seeds", MAP, f"{MAP}_sd", "test/eer", "test/eer_sd", "seconds/fit"]
    assert [row["seeds"] for row in written] == ["1", "2"]
    assert (float(written[0][MAP]), written[0][f"{MAP}_sd"]) == (0.65, "")
    assert float(written[1][f"{MAP}_sd"]) == statistics.stdev([0.7, 0.5])


@pytest.mark.parametrize(("arguments", "says"), [(["nowhere"], "is no directory"), (["tests"], "no run")])
def test_it_says_what_is_wrong_in_a_line(arguments, says):
    done = subprocess.run([sys.executable, "scripts/compare.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_sweep_of_which_nothing_is_finished_is_said_in_a_line(tmp_path):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)  # starting: Hydra has not written into it yet
    with pytest.raises(SystemExit, match="none of the 1 runs has a"):
        only([str(tmp_path)], ["map_at_r"])
    made_up(tmp_path / "1", "supcon", 0, **{MAP: 0.5})
    assert [row["runs"] for row in only([str(tmp_path)], ["map_at_r"]).rows] == [["1"]]


def test_six_figures_with_their_spread_stay_within_160_columns_and_whole(tmp_path, capsys, monkeypatch):
    for number in range(4):
        values = {f"test/{name}": 0.8253 + number / 100 for name in compare.FIGURES[:-1]}
        loss = ["threshold_consistent", "triplet"][number // 2]
        made_up(tmp_path / str(number), loss, number % 2, **values, **{"test/omniglot_error": 12.25 + number})
    shown = printed(capsys, monkeypatch, tmp_path)
    assert max(map(len, shown.splitlines())) <= 160
    (line,) = (line for line in shown.splitlines() if "triplet" in line)
    assert line.count("0.8503 ± 0.0071") == 5
    assert "14.75 ± 0.71" in line


def test_an_interval_is_no_figure(sweep):
    assert f"{MAP}_ci95" in json.loads((sweep / "0" / "metrics.json").read_text())
    with pytest.raises(SystemExit, match="no run has a figure test/map_at_r_ci95"):
        only([str(sweep)], ["map_at_r_ci95"])


# --- other data, other damage


def of(folder, dataset, fingerprint):
    """Say what the run was judged on."""
    file = folder / ".hydra" / "hydra.yaml"
    hydra = json.loads(file.read_text())
    hydra["hydra"]["runtime"]["choices"] |= {"dataset": dataset, "search": "none", "cluster": folder.name}
    file.write_text(json.dumps(hydra))
    (folder / "provenance.json").write_text(json.dumps({"data": {"train": "aa", "val": "bb", "test": fingerprint}}))


@pytest.fixture
def three_sets(tmp_path):
    """Two runs of glyphs, two of omniglot of which one on fewer images, and one of omniglot that has looked at validation alone."""
    for number, (loss, dataset, data, value) in enumerate(
        [("supcon", "glyphs", "a" * 16, 0.4), ("triplet", "glyphs", "a" * 16, 0.5), ("supcon", "omniglot", "b" * 16, 0.6)]
    ):
        made_up(tmp_path / str(number), loss, 0, **{MAP: value})
        of(tmp_path / str(number), dataset, data)
    made_up(tmp_path / "3", "triplet", 0, **{MAP: 0.9})
    of(tmp_path / "3", "omniglot", "c" * 16)
    return tmp_path


def test_runs_judged_on_other_data_are_in_tables_of_their_own(three_sets, tmp_path, capsys, monkeypatch):
    found, _ = compare.tables([str(three_sets)], ["map_at_r"])
    assert [(one.dataset, one.fingerprint[:1], [row["runs"] for row in one.rows]) for one in found] == [
        ("glyphs", "a", [["1"], ["0"]]), ("omniglot", "b", [["2"]]), ("omniglot", "c", [["3"]])
    ]  # fmt: skip
    shown = printed(capsys, monkeypatch, three_sets, "--csv", tmp_path / "all.csv", "--markdown", tmp_path / "all.md")
    assert all(said in shown for said in ("glyphs, figures of the test split", "omniglot (bbbbbbbb), figures", "omniglot (cccccccc), "))
    with (tmp_path / "all.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["dataset"], row["loss"], float(row[MAP])) for row in rows[:2]] == [("glyphs", "triplet", 0.5), ("glyphs", "supcon", 0.4)]
    assert [row["data"] for row in rows[2:]] == ["b" * 16, "c" * 16]
    text = (tmp_path / "all.md").read_text()
    assert text.count("### ") == 3
    assert "| loss | seeds | map_at_r |\n| --- | ---: | ---: |\n| triplet | 1 | 0.5000 |" in text


def test_seeds_that_were_trained_on_other_data_are_not_one_row(three_sets):
    made_up(three_sets / "4", "triplet", 1, **{MAP: 0.6})
    of(three_sets / "4", "glyphs", "a" * 16)
    assert compare.tables([str(three_sets)], ["map_at_r"])[0][0].rows[0]["runs"] == ["1", "4"]
    (three_sets / "4" / "provenance.json").write_text(json.dumps({"data": {"train": "other", "test": "a" * 16}}))
    glyphs = compare.tables([str(three_sets)], ["map_at_r"])[0][0]
    assert (glyphs.differ, [row["runs"] for row in glyphs.rows]) == (["loss", "data.train"], [["4"], ["1"], ["0"]])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", '{"test/map'),
        ("metrics.json", "[]"),
        (".hydra/config.yaml", "{"),
        (".hydra/hydra.yaml", ""),
        ("provenance.json", ""),
    ],
)
def test_a_damaged_run_is_named_and_left_out(sweep, file, text):
    (sweep / "0" / file).write_text(text)
    assert [row["runs"] for row in only([str(sweep)], ["map_at_r"]).rows] == [["1", "2"]]
    (line,) = (line for line in left_out([str(sweep)]) if line.startswith("damaged"))
    assert line.startswith(f"damaged, left out: {sweep / '0'} (")


def test_a_figure_that_is_no_number_is_none_and_damaged_results_are_not_tested(sweep):
    made_up(sweep / "3", "arcface", 0, **{MAP: math.nan, "test/eer": 0.5})
    (sweep / "3" / "results.npz").write_bytes(b"PK\x03\x04 cut off")
    found = only([str(sweep)], ["map_at_r", "eer"])
    assert found.rows[-1]["said"] == ["arcface"]
    assert MAP not in found.rows[-1]["figures"]


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--plot", "x.bmp"], "must end in one of"), (["--csv", "no/where.csv"], "cannot be written")]
)
def test_a_file_that_cannot_be_is_said_in_a_line(sweep, monkeypatch, arguments, says):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(sweep), *arguments])
    with pytest.raises(SystemExit, match=says):
        compare.main()


def test_the_picture_has_a_panel_for_each_table_with_the_mean_and_spread_of_its_rows(three_sets, tmp_path, monkeypatch):
    made_up(three_sets / "4", "triplet", 1, **{MAP: 0.6})
    of(three_sets / "4", "glyphs", "a" * 16)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format: (drawn.append(figure), Path(file).write_bytes(b"")))
    found, _ = compare.tables([str(three_sets)], ["map_at_r"])
    compare.draw(found, False, tmp_path / "plot.png")
    (figure,) = drawn
    assert len(figure.axes) == 3
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["triplet", "supcon"]
    bars = figure.axes[0].containers[0]
    (low, high), (seeds, *_) = bars[2][0].get_segments()[0][:, 0], figure.axes[0].lines
    assert (low, high) == pytest.approx((0.55 - math.sqrt(0.005), 0.55 + math.sqrt(0.005)))
    assert list(seeds.get_xdata()) == [0.5, 0.6]
    assert (tmp_path / "plot.png").exists()
    assert not (tmp_path / "plot.png.part").exists()


# --- the test over seeds alone


def rows_of(values, others, figure=AUC):
    """Two rows of runs that left no results.npz: seed -> run."""
    return ({seed: {"path": Path("nowhere"), "figures": {figure: x}} for seed, x in one.items()} for one in (values, others))


@pytest.mark.parametrize("figure", [AUC, MAP])
def test_shared_seeds_are_tested_in_pairs(figure):
    rng = np.random.default_rng(0)
    values, others = rng.random(5), rng.random(5)
    tested = compare.compare(*rows_of(dict(zip("01234", values, strict=True)), dict(zip("01234", others, strict=True)), figure), figure)
    assert tested == (pytest.approx(ttest_rel(values, others).pvalue), 0, 5, False)


def test_seeds_of_one_row_alone_are_not_in_the_test():
    tested = compare.compare(*rows_of({"7": 9.0, "1": 0.3, "0": 0.1}, {"0": 0.4, "1": 0.5, "2": 7.0}), AUC)
    assert tested.p == pytest.approx(ttest_rel([0.1, 0.3], [0.4, 0.5]).pvalue)
    assert tested.seeds == 2


@pytest.mark.parametrize("others", [{"0": 0.5}, {"1": 0.5, "2": 0.6}, {"0": 0.5, "3": 0.6}, {}])
def test_fewer_than_two_shared_seeds_and_no_classes_cannot_be_tested(others):
    assert compare.compare(*rows_of({"0": 0.3, "4": 0.4}, others), AUC).p is None
    assert compare.compare(*rows_of({"0": 0.3, "4": 0.4}, others, MAP), MAP).p is None


def test_equal_figures_do_not_differ():
    assert compare.compare(*rows_of({"0": 0.1, "1": 0.7}, {"0": 0.1, "1": 0.7}), AUC).p == 1
    assert compare.compare(*rows_of({"0": 0.5, "1": 0.75}, {"0": 0.25, "1": 0.5}), AUC).p == 0


# --- the test over classes


@pytest.fixture
def judged(monkeypatch):
    """judged([{seed: means of classes}, ...], queries) -> rows of runs whose results.npz would say so, figures to fit."""
    means: dict[Path, dict] = {}
    monkeypatch.setattr(compare, "class_means", lambda path, split: means[path])

    def rows(sides, queries, names=None):
        made = []
        for side in sides:
            made.append({})
            for seed, values in side.items():
                path = Path(str(len(means)))
                means[path] = {"names": names or [*range(len(queries))], "queries": np.asarray(queries), "map_at_r": np.asarray(values)}
                made[-1][seed] = {"path": path, "figures": {MAP: np.average(np.nan_to_num(values), weights=queries)}}
        return made

    return rows


def test_classes_with_equal_queries_are_tested_in_pairs(judged):
    values, others = np.random.default_rng(0).random((2, 30))
    tested = compare.compare(*judged([{"0": values}, {"1": others}], [7] * 30), MAP)
    assert tested == (pytest.approx(ttest_rel(values, others).pvalue), 30, 0, False)


def test_classes_are_weighted_by_their_queries(judged):
    # By hand: the mean is (1 * 0.4 + 3 * 0) / 4 = 0.1, its variance 2 * ((1/4 * 0.3)^2 + (3/4 * 0.1)^2) = 0.15^2; t(1) is Cauchy's.
    tested = compare.compare(*judged([{"0": [0.9, 0.5]}, {"0": [0.5, 0.5]}], [1, 3]), MAP)
    assert tested.p == pytest.approx(1 - 2 / math.pi * math.atan(0.1 / 0.15))


def test_classes_without_an_answerable_query_are_left_out(judged):
    tested = compare.compare(*judged([{"0": [0.9, math.nan, 0.5]}, {"0": [0.5, math.nan, 0.5]}], [1, 0, 3]), MAP)
    assert tested == (pytest.approx(1 - 2 / math.pi * math.atan(0.1 / 0.15)), 2, 0, False)


def test_other_classes_or_other_queries_are_not_paired(judged):
    (row,), (best,) = judged([{"0": [0.1, 0.9]}], [2, 2], ["a", "b"]), judged([{"0": [0.1, 0.8]}], [2, 2], ["a", "c"])
    assert compare.compare(row, best, MAP).p is None
    (other,) = judged([{"0": [0.1, 0.8]}], [2, 3], ["a", "b"])
    assert compare.compare(row, other, MAP).p is None
    assert compare.compare(row, judged([{"0": [0.1, 0.8]}], [2, 2], ["a", "b"])[0], MAP).p is not None


@pytest.mark.parametrize(("others", "shared"), [("012", 3), ("345", 0), ("045", 0)])
def test_seeds_are_paired_where_two_are_shared_and_else_their_spreads_are_added(judged, others, shared):
    # The classes agree, so that nothing but the seeds is left: Student's paired test or Welch's.
    values = [0.5, 0.6, 0.9], [0.4, 0.7, 0.55]
    sides = [{seed: np.full(20, x) for seed, x in zip(*side, strict=True)} for side in zip(("012", others), values, strict=True)]
    rows = judged(sides, [4] * 20)
    known = ttest_rel(*values) if shared else ttest_ind(*values, equal_var=False)
    assert compare.compare(*rows, MAP) == (pytest.approx(known.pvalue), 20, shared, not shared)


def test_the_variances_over_classes_and_over_seeds_are_added(judged):
    # By hand: the classes differ by 0.2 and 0.4, the seeds too, so each part is the square of their half distance, of 1 degree.
    rows = judged([{"0": [0.5, 0.7], "1": [0.7, 0.9]}, {"0": [0.4, 0.4], "1": [0.4, 0.4]}], [3, 3])
    assert compare.compare(*rows, MAP).p == pytest.approx(2 * t.sf(0.3 / math.sqrt(0.1**2 + 0.1**2), 2))


@pytest.mark.parametrize(
    ("seeds", "others", "by_seed"),
    [("0", "0", 0.0), ("0123", "0123", 0.0), ("0123", "0123", 0.02), ("0123", "4567", 0.02), ("01", "01", 0.01)],
)
def test_without_a_difference_one_in_twenty_is_called_one(judged, seeds, others, by_seed):
    """Each class prefers one row or the other at random, seeds shift all classes.

    Of 2,000 tests 0.05 ± 0.005 (one sigma) are to be below 0.05; 0.03 to 0.07 are allowed, for the weights and for the
    freedoms of the sum of two variances are approximations.
    """
    rng = np.random.default_rng(1)
    queries = rng.integers(5, 20, 50)
    supported = 0
    for _ in range(2000):
        likes = rng.normal(0, 0.1, (2, 50))
        sides = [
            {seed: likes[side] + rng.normal(0, by_seed) + rng.normal(0, 0.01, 50) for seed in names}
            for side, names in enumerate((seeds, others))
        ]
        supported += compare.compare(*judged(sides, queries), MAP).p < 0.05
    assert 0.03 <= supported / 2000 <= 0.07


# --- marks, from real results


def results(noise, seed, classes=40):
    """What judging made of points around centres that are the same in all runs."""
    labels = torch.arange(classes).repeat_interleave(6)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(0))
    points = centres[labels] + noise * torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    return {"test": evaluate(points, labels, CosineSimilarity(), ways=())}


def test_a_mark_says_which_differences_are_not_supported(tmp_path, capsys, monkeypatch):
    for number, (loss, noise) in enumerate([("supcon", 0.6), ("ntxent", 0.603), ("triplet", 1.2)]):
        for seed in range(3):
            made_up(tmp_path / f"{number}{seed}", loss, seed, results(noise, 10 * number + seed))
    made_up(tmp_path / "99", "arcface", 9, **{MAP: 0.1, RECALL: 0.2, AUC: 0.4})
    found = only([str(tmp_path)], ["map_at_r", "recall_at_1", "auc"])
    marks = {row["said"][0]: [compare.cell(row, name)[-1] for name in found.figures] for row in found.rows}
    best, second = (row["said"][0] for row in found.rows[:2])
    assert {best, second} == {"supcon", "ntxent"}
    assert marks.pop(second) == ["~"] * 3
    assert marks.pop("arcface") == ["?"] * 3
    assert "~" not in str(marks)
    assert "?" not in str(marks)
    assert found.rows[1]["tests"][MAP][1:] == (40, 3, False)

    shown = " ".join(printed(capsys, monkeypatch, tmp_path, "--figures", "map_at_r", "recall_at_1", "auc").split())
    assert "paired t-test, two-sided, p >= 0.05; pairs of map_at_r, recall_at_1: 40 classes and 3 seeds; auc: 3 seeds" in shown
    assert "6 comparisons, not corrected" in shown
    assert "? not tested: no two seeds in common" in shown
    assert "the seeds' own spread" not in shown


def test_with_one_seed_each_the_line_says_what_is_not_in_the_test(tmp_path, capsys, monkeypatch):
    made_up(tmp_path / "0", "supcon", 0, results(0.6, 0))
    made_up(tmp_path / "1", "triplet", 0, results(0.9, 1))
    shown = " ".join(printed(capsys, monkeypatch, tmp_path, "--figures", "map_at_r").split())
    assert "pairs of map_at_r: 40 classes)" in shown
    assert "Where a row has one seed, the seeds' own spread is not in the test" in shown
    assert "not tested" not in shown


def test_one_row_is_compared_with_nothing(sweep, capsys, monkeypatch):
    assert "~" not in printed(capsys, monkeypatch, sweep / "1", sweep / "2")


def test_results_are_read_for_the_figures_that_need_them_and_once(tmp_path, monkeypatch):
    for number, loss in enumerate(("supcon", "supcon", "triplet", "triplet")):
        made_up(tmp_path / str(number), loss, number % 2, results(0.9, number))
    read, load = [], EvaluationResult.load
    monkeypatch.setattr(EvaluationResult, "load", staticmethod(lambda path: read.append(path) or load(path)))
    only([str(tmp_path)], ["auc", "eer"])
    only([str(tmp_path)], ["map_at_r"], each=True)
    assert read == []
    only([str(tmp_path)], ["map_at_r", "recall_at_1"])
    assert len(read) == len(set(read)) == 4


def test_results_of_before_there_were_means_of_classes_leave_the_seeds(tmp_path):
    for number, loss in enumerate(("supcon", "supcon", "triplet", "triplet")):
        made_up(tmp_path / str(number), loss, number % 2, results(0.9, number))
        with np.load(tmp_path / str(number) / "results.npz") as archive:
            arrays = {name: archive[name] for name in archive.files if "/class_" not in name}
        np.savez_compressed(tmp_path / str(number) / "results.npz", **arrays)
    assert only([str(tmp_path)], ["map_at_r"]).rows[1]["tests"][MAP][1:] == (0, 2, False)


def test_the_page_has_the_tables_with_intervals_and_the_curves_of_each_row(tmp_path, capsys, monkeypatch):
    for number, (loss, noise) in enumerate((("triplet", 0.5), ("<b>supcon</b>", 1.0))):
        generator = torch.Generator().manual_seed(number)
        labels = torch.arange(8).repeat_interleave(5)
        embeddings = torch.randn(8, 6, generator=generator)[labels] + noise * torch.randn(40, 6, generator=generator)
        results = {"test": evaluate(embeddings, labels, CosineSimilarity())}
        made_up(tmp_path / str(number), loss, 0, results, **{"test/map_at_r_ci95": [0.25, 0.75]})
        lines = ["step,val/map_at_r", "1,0.5", "2,0.6"]
        (tmp_path / str(number) / "metrics.csv").write_text("\n".join(lines))
    (tmp_path / "2" / ".hydra").mkdir(parents=True)
    printed(capsys, monkeypatch, tmp_path, "--figures", "map_at_r", "auc", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for row in only([str(tmp_path)], ["map_at_r", "auc"]).rows:
        assert compare.cell(row, MAP) in page
        assert compare.cell(row, AUC) in page
    assert page.count("0.2500 to 0.7500") == 2
    assert page.count("<svg") == 3  # ROC, Recall@K, validation
    assert "&lt;b&gt;supcon" in page
    assert "<b>supcon" not in page
    assert "unfinished, left out" in page


def test_a_curve_has_the_colour_of_its_row_where_another_row_has_none(tmp_path, capsys, monkeypatch):
    for number, (loss, quality) in enumerate((("supcon", 0.9), ("triplet", 0.5))):
        made_up(tmp_path / str(number), loss, 0, **{MAP: quality})
        steps = 1 if loss == "supcon" else 3  # the best row has no curve of validation
        (tmp_path / str(number) / "metrics.csv").write_text("\n".join(["step,val/map_at_r", *(f"{step},0.5" for step in range(steps))]))
    printed(capsys, monkeypatch, tmp_path, "--figures", "map_at_r", "--html", tmp_path / "page.html")
    table, chart = (tmp_path / "page.html").read_text().split("<svg")
    first, second = (colour for colour, _ in OVERLAID[:2])
    assert first in table.partition("triplet")[0]
    assert second in table.partition("supcon</td>")[2]
    assert second in chart
    assert first not in chart


def test_the_page_does_without_curves_where_runs_left_none(sweep, tmp_path, capsys, monkeypatch):
    printed(capsys, monkeypatch, sweep, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "0.6000 ± 0.1414" in page
    assert "<svg" not in page
