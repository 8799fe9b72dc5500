"""The report: what it shows is what was found, of every kind of data, and a browser has nothing to complain about."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.request

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance

from scripts import draw
from siamese import reporting
from siamese.config import ROOT
from siamese.data.samples import Samples, Tuples
from siamese.data.texts import as_bytes
from siamese.evaluation import EvaluationResult, evaluate, evaluate_tuples
from siamese.record import write

COSINE = CosineSimilarity()
EVIL = "<script>alert('name')</script>"


def space(classes: int = 6, each: int = 5, noise: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    return torch.randn(classes, 8, generator=generator)[labels] + noise * torch.randn(len(labels), 8, generator=generator), labels


def judged(samples: Samples, **options) -> EvaluationResult:
    embeddings, labels = space()
    if samples.tuples is not None:
        return evaluate_tuples(embeddings, *samples.tuples[:2], COSINE, ids=samples.ids, **options)
    if samples.gallery is None:
        return evaluate(embeddings, labels, COSINE, ids=samples.ids, class_names=samples.class_names, **options)
    rows, held = samples.roles()
    ids = [[samples.ids[row] for row in some.tolist()] for some in (rows, held)]
    gallery = (embeddings[held], labels[held])
    options |= {"gallery": gallery, "gallery_ids": ids[1], "class_names": samples.class_names}
    return evaluate(embeddings[rows], labels[rows], COSINE, ids=ids[0], **options)


def samples(kind: str) -> Samples:
    _, labels = space()
    names, ids = [EVIL, *(f"class {c}" for c in range(1, 6))], [f"sample {i}" for i in range(30)]
    images = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 3, 100, 80).contiguous()
    texts = as_bytes([f"text {i} & {EVIL}" for i in range(30)])
    gallery = torch.arange(30) % 5 < 2 if kind == "gallery" else None
    if kind == "pairs":
        rows = torch.tensor([(left, right) for left in range(30) for right in range(left)])
        return Samples(
            texts, None, [], ids, tuples=Tuples(rows, labels[rows[:, 0]] == labels[rows[:, 1]], [f"row {i}" for i in range(len(rows))])
        )
    inputs = texts if kind == "texts" else torch.arange(60.0).view(30, 2) if kind == "rows" else images
    return Samples(inputs, labels, names, ids, gallery)


KINDS = ["images", "texts", "rows", "gallery", "pairs"]


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    """(samples, result, page) of a run that left no more than its figures."""
    those = samples(request.param)
    result = judged(those)
    reporting.keep(result, those)
    write(tmp_path, {"test": result}, {"evaluate": 1.0})
    return those, EvaluationResult.load(tmp_path / "results.npz")["test"], reporting.write(tmp_path).read_text()


def test_every_sample_that_is_shown_is_kept_as_it_is(case):
    those, result, _ = case
    shown = [*reporting.grids(result).values()]
    shown = {int(query) for some in shown for query in some} | {int(row) for row in result.hardest[:, :2].ravel()}
    assert shown <= set(result.shown.tolist())
    rows, held = those.roles()
    every = torch.cat([rows, held]) if result.gallery_ids else rows
    for place, row in enumerate(result.shown.tolist()):
        if those.kind == "images":  # each is of one value, its row
            assert result.pictures[place].shape == (3, 64, 51)
            assert np.all(result.pictures[place] == int(every[row]))
        else:
            expected = f"text {row} & {EVIL}" if those.kind == "texts" else f"{2 * row}, {2 * row + 1}"
            assert result.said[place] == expected


def test_the_page_escapes_what_comes_from_the_data(case):
    those, _, page = case
    assert EVIL not in page
    assert those.kind == "rows" or those.tuples is not None or "&lt;script&gt;" in page


def test_the_page_needs_nothing_but_itself(case):
    page = case[2]
    assert len(page) < 3e6
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "url(http" not in page
    assert "@import" not in page


def test_the_neighbours_on_the_page_are_the_nearest():
    those = samples("images")
    embeddings, labels = space()
    result = judged(those)
    reporting.keep(result, those)
    unit = torch.nn.functional.normalize(embeddings)
    score = (unit @ unit.T).fill_diagonal_(-9)
    for _, lines in reporting.neighbours(result):
        for query, *near in lines:
            row = those.ids.index(query["id"])
            best = score[row].topk(reporting.NEIGHBOURS)
            assert [cell["id"] for cell in near] == [those.ids[other] for other in best.indices]
            assert [cell["score"] for cell in near] == pytest.approx(best.values.tolist(), abs=1e-5)
            assert [cell["same"] for cell in near] == [bool(labels[other] == labels[row]) for other in best.indices]


def test_the_grids_hold_the_worst_and_the_most_confident_mistakes():
    result = judged(samples("images"))
    embeddings, labels = space()
    unit = torch.nn.functional.normalize(embeddings)
    score = (unit @ unit.T).fill_diagonal_(-9)
    wrong, share = {}, {}
    for row in range(30):
        near = score[row].argsort(descending=True)[:10]
        share[row] = float((labels[near] == labels[row]).sum()) / 4
        if labels[near[0]] != labels[row]:
            wrong[row] = float(score[row, near[0]])
    grids = reporting.grids(result)
    assert grids["the most confident mistakes"].tolist() == sorted(wrong, key=wrong.get, reverse=True)[: reporting.QUERIES]
    worst = [share[row] for row in grids["the worst queries"].tolist()]
    assert worst == sorted(share.values())[: len(worst)]
    assert max(worst) < 1
    assert len(set(grids["random queries"].tolist())) == reporting.QUERIES


def test_a_perfect_space_has_no_mistakes_to_show(tmp_path):
    labels = torch.arange(4).repeat_interleave(3)
    embeddings = torch.eye(4)[labels] + 0.01 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    result = evaluate(embeddings, labels, COSINE)
    assert list(reporting.grids(result)) == ["random queries"]
    write(tmp_path, {"val": result}, {})
    assert "mistakes" not in reporting.write(tmp_path).read_text()


@pytest.mark.parametrize(
    "embeddings", [torch.ones(12, 4), torch.randn(12, 1, generator=torch.Generator().manual_seed(0))], ids=["point", "line"]
)
def test_a_collapsed_space_has_a_page_without_a_map(tmp_path, embeddings):
    result = evaluate(embeddings, torch.arange(4).repeat_interleave(3), COSINE)
    write(tmp_path, {"test": result}, {})
    page = reporting.write(tmp_path).read_text()
    assert "t-SNE" not in page
    assert "ROC of test" in page


def test_other_data_sets_judged_too_are_columns_of_the_figures(tmp_path):
    embeddings, labels = space()
    other = evaluate(embeddings.flip(1) ** 3, labels, COSINE)
    write(tmp_path, {"test": evaluate(embeddings, labels, COSINE), "omniglot/test": other}, {})
    page = reporting.write(tmp_path).read_text()
    assert "omniglot test" in page
    assert "omniglot test: tar_at_far_1e3 is left out" in page
    assert f"{other.figures['map_at_r']:.4f}" in page


def test_a_run_without_held_out_classes_has_a_page_without_a_threshold(fit, tmp_path, caplog):
    fit(tmp_path / "run", "dataset.validation=0", "report=html")
    assert "Traceback" not in caplog.text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "ROC of test" in page
    assert "the threshold is" not in page
    assert "where the threshold lies" not in page


@pytest.mark.filterwarnings("error")
def test_names_are_no_formulas_and_in_any_script(tmp_path):
    embeddings, labels = space()
    names = ["$\\frac{1$", "_hidden", "5 $", "\u6f22\u5b57", "\U0001f600", "plain"]
    result = evaluate(embeddings, labels, COSINE, class_names=names)
    write(tmp_path, {"test": result}, {})
    chart = reporting.write(tmp_path).read_text().partition('id="space"')[2].partition("<figcaption>")[0]
    legend = re.findall(r"<text[^>]*>(.*?)</text>", chart)
    assert [html.unescape(text).lstrip("\u200b") for text in legend] == names


def test_the_command_is_the_one_that_was_typed(tiny_run, tmp_path):
    for name in ("results.npz", "metrics.json"):
        shutil.copy(tiny_run / name, tmp_path)
    (tmp_path / ".hydra").mkdir()
    typed = ["dataset.path=" + "my photos " * 20, "dataset.test=[cat,dog]", "note='it''s'", "loss=triplet"]
    OmegaConf.save(OmegaConf.create(typed), tmp_path / ".hydra" / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"task": "evaluate"}), tmp_path / ".hydra" / "config.yaml")
    command = re.search(r"<pre tabindex=\"0\"><code>(.*?)</code>", reporting.write(tmp_path).read_text(), re.DOTALL).group(1)
    assert shlex.split(html.unescape(command)) == ["python", "evaluate.py", *typed]


def test_the_hardest_pairs_are_those_that_a_loop_finds():
    those = samples("pairs")
    result = judged(those)
    embeddings, _ = space()
    unit = torch.nn.functional.normalize(embeddings)
    pairs = [
        (float(unit[a] @ unit[b]), a, b, bool(same)) for (a, b), same in zip(those.tuples.rows.tolist(), those.tuples.same, strict=True)
    ]
    same, different = sorted(pair for pair in pairs if pair[3])[:8], sorted((pair for pair in pairs if not pair[3]), reverse=True)[:8]
    for (left, right, score, flag), (expected, a, b, truth) in zip(result.hardest.tolist(), same + different, strict=True):
        assert (int(left), int(right), bool(flag)) == (a, b, truth)
        assert score == pytest.approx(expected, abs=1e-5)


def test_the_histogram_has_the_shares_of_all_pairs():
    result = judged(samples("pairs"))
    embeddings, labels = space()
    unit = torch.nn.functional.normalize(embeddings)
    rows = torch.tril_indices(30, 30, -1)
    score, same = (unit @ unit.T)[rows[0], rows[1]].numpy(), (labels[rows[0]] == labels[rows[1]]).numpy()
    edges, *found = reporting.score_shares(result)
    for shares, kind in zip(found, (same, ~same), strict=True):
        expected = np.histogram(score[kind].clip(edges[0], edges[-1]), edges)[0] / kind.sum()
        assert shares.sum() == pytest.approx(1)
        assert np.abs(shares.cumsum() - expected.cumsum()).max() < 0.05  # where the ROC's points lie between the edges


def test_recall_at_k_is_that_of_the_figures():
    for kind in ("images", "gallery"):
        result = judged(samples(kind))
        ranks, shares = reporting.recall_at(result)
        found = dict(zip(ranks.tolist(), shares.tolist(), strict=True))
        for k in (1, 5, 10):
            assert found[k] == pytest.approx(result.figures[f"recall_at_{k}"])


def test_oneshot_accuracy_falls_with_the_ways_and_meets_the_figures():
    result = judged(samples("images"))
    curve = dict(result.oneshot.tolist())
    assert list(curve) == [2, 5]
    assert curve[5] == result.figures["oneshot_5way"]
    assert 1 >= curve[2] > curve[5] > 1 / 5


def test_the_map_colours_the_largest_classes_and_has_room_for_few():
    labels = np.repeat(np.arange(40), 50)
    result = judged(samples("images"))
    result.labels, result.sampled, result.class_names = labels, np.arange(2000), [str(c) for c in range(40)]
    places, classes = reporting.mapped(result)
    assert len(places) == reporting.MAPPED
    assert len(classes) == reporting.COLOURED
    assert np.isin(np.flatnonzero(np.isin(labels, classes)), places).all()


@pytest.mark.parametrize(("classes", "each"), [(2, 450), (5, 100), (30, 20)])
def test_every_coloured_class_is_on_the_map_however_rows_are_sorted(tmp_path, classes, each):
    embeddings, labels = space(classes, each)
    result = evaluate(embeddings, labels, COSINE)
    places, coloured = reporting.mapped(result)
    counts = np.bincount(result.labels[result.sampled[places]], minlength=classes)
    assert len(places) == reporting.MAPPED
    assert len(coloured) == min(classes, reporting.COLOURED)
    assert counts[coloured].min() == min(each, reporting.MAPPED // len(coloured))
    write(tmp_path, {"test": result}, {})
    assert f"Map of {reporting.MAPPED} embeddings" in reporting.write(tmp_path).read_text()


def test_what_no_file_can_hold_costs_no_more_than_itself(tmp_path):
    embeddings, labels = space()
    plain = LpDistance(normalize_embeddings=False)
    result = evaluate(embeddings * 1e5, labels, plain, ids=["\udcff.png", *(f"{row}.png" for row in range(1, 30))])  # beyond 16 bits
    write(tmp_path, {"test": result}, {})
    page = reporting.write(tmp_path).read_text()
    assert "?.png" in page
    assert "t-SNE" not in page


def test_colours_that_follow_the_theme_are_none_of_the_palette():
    assert not set(reporting.THEMED) & set(reporting.PALETTE)
    assert len(set(reporting.THEMED.values())) == len(reporting.THEMED)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"task": "evaluate"}, ["training has, or nearly has: not looked for", "looking the data over found: not looked for"]),
        ({"leakage": "warn", "check": "error"}, ["training has, or nearly has: none", "looking the data over found: none"]),
        ({"leakage": "off", "check": "warn"}, ["training has, or nearly has: not looked for", "looking the data over found: none"]),
        ({"leakage": "drop", "check": "off"}, ["Left out of training, as judged samples are or nearly are these: none"]),
    ],
)
def test_what_was_not_looked_for_is_not_said_to_be_absent(tiny_run, tmp_path, config, said):
    for name in ("results.npz", "metrics.json"):
        shutil.copy(tiny_run / name, tmp_path)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), tmp_path / ".hydra" / "config.yaml")
    page = reporting.write(tmp_path).read_text()
    assert [words for words in said if words not in page] == []


def test_an_untrained_encoder_is_said_to_be_judged_on_test(tmp_path):
    write(tmp_path, {"untrained": judged(samples("images"))}, {})
    assert "30 queries of 6 classes, test split, untrained" in reporting.write(tmp_path).read_text()


def test_the_figures_on_the_page_are_those_of_metrics_json(tiny_run):
    page, metrics = reporting.write(tiny_run).read_text(), json.loads((tiny_run / "metrics.json").read_text())
    table = re.search(r'aria-label="all figures">(.*?)</table>', page, re.DOTALL).group(1)
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", table)
    named = {name: [cell for cell in re.findall(r'<td class="n">(.*?)</td>', cells)] for name, cells in rows}
    rows = ("raw", "untrained", "val", "test")
    shown = {key.partition("/")[2] for key in metrics if key.startswith(rows) and not key.endswith("_ci95")}
    assert named.keys() == shown
    for name, (*cells, interval) in named.items():
        for prefix, cell in zip(rows, cells, strict=True):
            value = metrics.get(f"{prefix}/{name}")
            assert cell == "" if value is None else float(cell.replace(",", "")) == pytest.approx(value, abs=0.006)
        bounds = metrics.get(f"test/{name}_ci95")
        assert bounds is None or [float(end) for end in interval.split(" to ")] == pytest.approx(bounds, abs=6e-5)
    command = html.unescape(re.search(r"<pre tabindex=\"0\"><code>(python .*?)</code>", page).group(1))
    assert command.startswith("python train.py")


def test_a_run_without_a_report_leaves_none_and_another_word_is_refused(fit, tiny_run, tmp_path):
    assert (tiny_run / "report.html").is_file()
    fit(tmp_path / "run", "report=none")
    assert not (tmp_path / "run" / "report.html").exists()
    with pytest.raises(Exception, match="report=pdf is neither html nor none"):
        fit(tmp_path / "other", "report=pdf")


def test_a_report_that_fails_costs_nothing_but_itself(fit, tmp_path, caplog, monkeypatch):
    def fails(run):
        raise OSError("no space left on device")

    monkeypatch.setattr(reporting, "write", fails)
    figures = fit(tmp_path / "run", "report=html")
    assert "test/map_at_r" in figures
    assert "python scripts/report.py" in caplog.text


@pytest.mark.parametrize("missing", ["results.npz", "metrics.json"])
def test_what_is_no_finished_run_is_refused(tiny_run, tmp_path, missing):
    for name in ("results.npz", "metrics.json"):
        if name != missing:
            shutil.copy(tiny_run / name, tmp_path)
    with pytest.raises(ValueError, match=f"holds no {missing}"):
        reporting.write(tmp_path)
    (tmp_path / missing).write_text("broken")
    with pytest.raises(ValueError, match="damaged"):
        reporting.write(tmp_path)


def test_results_of_an_earlier_version_still_have_a_page(tiny_run, tmp_path):
    later = ("oneshot", "hardest", "shown", "pictures")
    with np.load(tiny_run / "results.npz") as archive:
        np.savez(tmp_path / "results.npz", **{name: archive[name] for name in archive if name.rpartition("/")[2] not in later})
    shutil.copy(tiny_run / "metrics.json", tmp_path)
    assert "recall_at_1" in reporting.write(tmp_path).read_text()


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver: Debian's chromium-driver brings it and Chromium")
def test_a_browser_shows_the_page_whole(tiny_run, tmp_path):
    page = reporting.write(tiny_run).resolve().as_uri()
    with Browser(tmp_path) as browser:
        browser("url", url=page)
        assert browser.script("document.title").endswith(": report")
        assert browser.script("document.images.length") > 30
        assert browser.script("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert browser.script("[...document.querySelectorAll('figure svg')].every(one => one.clientWidth > 100 && one.ariaLabel)")
        named = browser.script("[...document.querySelectorAll('[id]')].map(one => one.id)")
        assert len(named) == len(set(named))
        for width in (390, 1280):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.devtools("Emulation.setDeviceMetricsOverride", **size)
            assert browser.script("document.documentElement.scrollWidth") <= width
        reached = set()
        for _ in range(40):
            browser.devtools("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
            reached.add(browser.script("document.activeElement.tagName + (document.activeElement.hash || '')"))
        assert {"A#neighbours", "A#repeat", "SUMMARY", "DIV", "PRE"} <= reached
        assert browser("se/log", type="browser") == []


@pytest.mark.skipif(not any(map(shutil.which, draw.BROWSERS)), reason="no Chromium")
def test_a_picture_is_of_what_stands_under_a_heading(tmp_path):
    page = "<head></head><body><h1>above</h1><div style='height: 900px; background: red'></div><h2 id='x'>below</h2>"
    page += "<p style='height: 100px; background: rgb(0, 0, 255)'></p>"
    draw.photograph(draw.cut(page, "<h2 id='x'"), tmp_path / "picture.png", 300, 200)
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert picture.shape == (200, 300, 3)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert (0, 0, 255) in colours
    assert (255, 0, 0) not in colours
    assert list(tmp_path.iterdir()) == [tmp_path / "picture.png"]


def test_pictures_are_of_runs_that_are_there_or_made_first(tmp_path, monkeypatch):
    def train(command, cwd):
        made.append([word for word in command[1:] if "logger" not in word])
        for job in range(made[-1][0] == "train.py" and 4):
            (tmp_path / str(job)).mkdir(exist_ok=True)
            (tmp_path / str(job) / "metrics.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    made, place = [], os.path.relpath(tmp_path, ROOT)
    monkeypatch.setattr(subprocess, "run", train)
    sweep = ["-m", "miner=none,hard", "seed=0,1"]
    compared = ["scripts/compare.py", place, "--html", str(tmp_path / "comparison.html")]
    assert draw.page_of(tmp_path, sweep) == tmp_path / "comparison.html"
    assert made == [["train.py", *sweep, f"hydra.sweep.dir={place}"], compared]
    draw.page_of(tmp_path, sweep)  # the runs are there, and the page may be of earlier code
    assert made[2:] == [compared]


def test_a_picture_that_cannot_be_taken_says_why(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no '<h3>beside'"):
        draw.cut("<body><h2>below</h2>", "<h3>beside")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="chromium"):
        draw.photograph("<body></body>", tmp_path / "picture.png", 300, 200)


class Browser:
    """Headless Chromium by the WebDriver protocol: browser("url", url=...) posts to its session."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True, cwd=self.folder)
        line = next(line for line in self.driver.stdout if "started successfully" in line)
        port = re.search(r"port (\d+)", line).group(1)
        self.address = f"http://127.0.0.1:{port}/session"
        switches = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
        switches += ["disable-component-update", "disable-sync", f"user-data-dir={self.folder}/profile"]
        wanted = {"goog:chromeOptions": {"args": [f"--{one}" for one in switches]}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post(self.address, capabilities={"alwaysMatch": wanted})
        self.address = f"{self.address}/{session['sessionId']}"
        return self

    def post(self, address: str, **content):
        request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def __call__(self, what: str, **content):
        return self.post(f"{self.address}/{what}", **content)

    def script(self, expression: str):
        return self("execute/sync", script=f"return {expression}", args=[])

    def devtools(self, command: str, **parameters):
        return self("goog/cdp/execute", cmd=command, params=parameters)

    def __exit__(self, *_):
        try:
            urllib.request.urlopen(urllib.request.Request(self.address, method="DELETE"), timeout=60).close()
        finally:
            self.driver.terminate()
            self.driver.wait(30)
