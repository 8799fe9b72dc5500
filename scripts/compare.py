"""Put runs side by side: what differed between them, and the figures, mean ± standard deviation over seeds.

    python scripts/compare.py logs/train/multiruns/<stamp> --plot comparison.png --html comparison.html
    python scripts/compare.py logs/train/runs/<one> logs/train/runs/<other> --figures recall_at_1 eer --csv table.csv --markdown table.md

Takes run directories, and directories that hold some (a sweep, a search, or logs/ itself). Runs whose configuration differs in
nothing but `seed` are one row. The best row by the first figure comes first, and a figure is marked where a paired test does not
support that it differs from the first row's. Runs that were judged on other data are in a table of their own.
"""

import argparse
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import statistics
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

FIGURES = ["map_at_r", "recall_at_1", "auc", "eer", "oneshot_20way", "omniglot_error"]
PER_CLASS = ("recall_at_1", "map_at_r")  # results.npz holds their means over the queries of each class
LEVEL = 0.05
UNCOMPARED = ("paths", "search", "cluster", "report", "baselines")  # how and where a run was made
PICTURES, DRAWN = (".png", ".pdf", ".svg"), 40  # and the rows of a table that have room in one


class Table(NamedTuple):
    """What is shown of the runs that were judged on one set of data: the choice of it, and the fingerprint of what they were judged on.

    Each row is a dict: runs (names), said (what differed), figures {name: (mean, sd)}, values {name: of each seed}, seconds, and
    tests {name: Tested}.
    """

    dataset: str
    fingerprint: str
    differ: list[str]
    figures: list[str]
    rows: list[dict]


class Tested(NamedTuple):
    """How a row differs from the best: the two-sided p, None where it cannot be tested; how many pairs; other seeds, not paired."""

    p: float | None
    classes: int = 0
    seeds: int = 0
    unpaired: bool = False


def find_runs(places: list[str]) -> list[Path]:
    """Every directory with a `.hydra` folder at or below the places, in order of name, numbers by value."""
    runs = {folder.parent.resolve() for place in places for folder in Path(place).rglob(".hydra") if folder.is_dir()}
    return sorted(runs, key=lambda run: [(not part.isdigit(), int(part) if part.isdigit() else part) for part in run.parts])


def read_run(run: Path) -> dict:
    """Choices and values of the configuration of a finished run as flat strings, the fingerprints of its data, and its figures.

    Raises whatever a damaged file leads to.
    """
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra
    # `experiment/loss` follows from the experiment and the loss, and may be the name of nothing: what it says is among the values.
    left_out = ("hydra", "experiment/", *UNCOMPARED)
    choices = {group: str(choice) for group, choice in hydra.runtime.choices.items() if not group.startswith(left_out)}
    config = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "config.yaml"), resolve=False)
    values = dict(_leaves({key: value for key, value in config.items() if key not in UNCOMPARED}))
    metrics = json.loads((run / "metrics.json").read_text())
    figures = {name: value for name, value in metrics.items() if not name.endswith("_ci95") and math.isfinite(value)}
    provenance = run / "provenance.json"
    data = json.loads(provenance.read_text())["data"] if provenance.is_file() else {}
    values |= {"data.train": data["train"]} if "train" in data else {}  # beside what differs of the configuration
    return {"path": run, "choices": choices, "values": values, "figures": figures, "data": data}


def _leaves(node, prefix: str = ""):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(node)


def differences(runs: list[dict]) -> list[str]:
    """Groups whose choice differs, then keys whose value does where the group's choice is the same in all runs."""
    groups = [group for group in runs[0]["choices"] if len({run["choices"].get(group) for run in runs}) > 1]
    keys = dict.fromkeys(key for run in runs for key in run["values"])
    keys = [key for key in keys if key.partition(".")[0] not in groups and len({run["values"].get(key) for run in runs}) > 1]
    return groups + keys


def by_seed(runs: list[dict]) -> tuple[list[dict[str, dict]], list[Path]]:
    """Rows of runs that differ in nothing but `seed`, each seed -> run; and earlier runs of the same configuration and seed."""
    rows: dict[tuple, dict[str, dict]] = {}
    repeated = []
    for run in runs:
        said = frozenset((key, value) for key, value in run["values"].items() if key != "seed")
        row = rows.setdefault((frozenset(run["choices"].items()), said), {})
        seed = run["values"].get("seed", "")
        if seed in row:  # the same numbers again would make the spread too small
            repeated.append(row[seed]["path"])
        row[seed] = run
    return list(rows.values()), repeated


@functools.cache
def class_means(run: Path, split: str) -> dict | None:
    """Names, queries and mean figures of the classes of a split; None where the run left none."""
    from siamese.evaluation import EvaluationResult

    try:
        result = EvaluationResult.load(run / "results.npz")[split]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # none, damaged, or of before there were means of classes
        return None
    found = {name: getattr(result, f"class_{name}", None) for name in ("queries", *PER_CLASS)}
    return None if any(values is None for values in found.values()) else {"names": list(result.class_names), **found}


def class_differences(row: list[dict], best: list[dict], figure: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Queries of each class, and by how much the runs of a row exceed the best ones in it; None unless all were asked the same."""
    split, _, name = figure.partition("/")
    if name not in PER_CLASS or not best:
        return None
    sides = [[class_means(run["path"], split) for run in runs] for runs in (row, best)]
    first, *others = sides[0] + sides[1]
    if first is None or any(one is None for one in others):
        return None
    if any(one["names"] != first["names"] or not np.array_equal(one["queries"], first["queries"]) for one in others):
        return None
    gap = np.mean([one[name] for one in sides[0]], 0) - np.mean([one[name] for one in sides[1]], 0)
    asked = np.isfinite(gap)  # NaN where no query of the class can be answered
    return (first["queries"][asked], gap[asked]) if asked.sum() > 1 else None


def compare(row: dict[str, dict], best: dict[str, dict], figure: str) -> Tested:
    """Test the difference of two rows, over the seeds that both have where these are two or more, else over all.

    Its variance is the sum of two: over the classes, of a mean weighted by their queries, and over the seeds.
    """
    row, best = ({seed: run for seed, run in one.items() if figure in run["figures"]} for one in (row, best))
    shared = [seed for seed in row if seed in best]
    if len(shared) > 1:
        row, best = ({seed: one[seed] for seed in shared} for one in (row, best))
    values, others = (np.array([run["figures"][figure] for run in one.values()]) for one in (row, best))
    seeds, parts = len(shared) if len(shared) > 1 else 0, []  # of the variance, each with its degrees of freedom
    classes = class_differences([*row.values()], [*best.values()], figure)
    unpaired = classes is not None and not seeds and min(len(values), len(others)) > 1
    if classes:
        share, gap = classes[0] / classes[0].sum(), classes[1]
        parts.append((len(gap) / (len(gap) - 1) * (share**2 @ (gap - share @ gap) ** 2), len(gap) - 1))
    if seeds:
        parts.append((np.var(values - others, ddof=1) / seeds, seeds - 1))
    if unpaired:
        parts += [(np.var(one, ddof=1) / len(one), len(one) - 1) for one in (values, others)]
    p = probability(values.mean() - others.mean(), parts) if parts else None
    return Tested(p, len(classes[1]) if classes else 0, seeds, unpaired)


def probability(difference: float, parts: list[tuple[float, int]]) -> float:
    """Two-sided p of Student's t, with the degrees of freedom that Welch and Satterthwaite give a sum of variances."""
    from scipy.stats import t

    variance = sum(part for part, _ in parts)
    if variance < 1e-24:  # rounding
        return float(abs(difference) < 1e-12)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(2 * t.sf(abs(difference) / variance**0.5, freedom))


def tables(places: list[str], figures: list[str], split: str | None = None, each: bool = False) -> tuple[list[Table], list[str]]:
    """A table for each set of data, and a line for each run that is in none."""
    paths = find_runs(places)
    if not paths:
        sys.exit(f"error: no run (a directory with .hydra/) in {', '.join(places)}")
    runs, left_out = [], [f"unfinished, left out: {path}" for path in paths if not (path / "metrics.json").is_file()]
    if len(left_out) == len(paths):
        sys.exit(f"error: none of the {len(paths)} runs has a metrics.json: they did not finish")
    for path in paths:
        if (path / "metrics.json").is_file():
            try:
                runs.append(read_run(path))
            except Exception as error:  # whatever a damaged file leads to
                why = next(iter(str(error).splitlines()), "")
                left_out.append(f"damaged, left out: {path} ({type(error).__name__}: {why})")
    if not runs:
        sys.exit("\n".join(["error: no run is whole", *left_out]))
    if not each:
        rows, repeated = by_seed(runs)
        runs = [run for row in rows for run in row.values()]
        left_out += [f"run again later with the same seed, left out: {path}" for path in repeated]
    found = []
    for dataset in dict.fromkeys(run["choices"].get("dataset", "") for run in runs):
        some = [run for run in runs if run["choices"].get("dataset", "") == dataset]
        judged = split or ("test" if all(any(name.startswith("test/") for name in run["figures"]) for run in some) else "val")
        shown = [f"{judged}/{name}" for name in figures]
        for fingerprint in dict.fromkeys(run["data"].get(judged, "") for run in some):
            alike = [run for run in some if run["data"].get(judged, "") == fingerprint]
            if any(name in run["figures"] for run in alike for name in shown):
                found.append(table(dataset, fingerprint, alike, shown, each))
            else:
                left_out += [f"without {' or '.join(shown)}, left out: {run['path']}" for run in alike]
    if not found:
        sys.exit(f"error: no run has a figure {shown[0]}")
    return found, left_out


def table(dataset: str, fingerprint: str, runs: list[dict], shown: list[str], each: bool) -> Table:
    """The rows of runs that were judged on the same data, best first."""
    shown = [name for name in shown if any(name in run["figures"] for run in runs)]
    groups = [{"": run} for run in runs] if each else by_seed(runs)[0]
    differ = [key for key in differences(runs) if each or key != "seed"]
    sign = -1 if higher(shown[0]) else 1
    summaries = [summary(group, differ, shown) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: sign * summaries[i]["figures"].get(shown[0], (sign * float("inf"),))[0])
    for i in [] if each else order[1:]:
        summaries[i]["tests"] = {name: compare(groups[i], groups[order[0]], name) for name in summaries[i]["figures"]}
    return Table(dataset, fingerprint, differ, shown, [summaries[i] for i in order])


def summary(group: dict[str, dict], differ: list[str], shown: list[str]) -> dict:
    """The row of the runs of a group."""
    runs = list(group.values())
    values = {name: [run["figures"][name] for run in runs if name in run["figures"]] for name in (*shown, "seconds/fit")}
    moments = {name: (statistics.mean(some), statistics.stdev(some) if len(some) > 1 else None) for name, some in values.items() if some}
    seconds = moments.pop("seconds/fit", (None,))[0]
    said = [runs[0]["choices"].get(key, runs[0]["values"].get(key, "")) for key in differ]
    names = {"runs": [run["path"].name for run in runs], "paths": [run["path"] for run in runs]}
    return {**names, "said": said, "figures": moments, "values": values, "seconds": seconds, "tests": {}}


def csv_lines(found: list[Table], each: bool) -> list[list]:
    """Header and rows of all tables in full precision, a mean and its standard deviation in columns of their own."""
    differ, figures = (list(dict.fromkeys(key for one in found for key in getattr(one, keys))) for keys in ("differ", "figures"))
    columns = [(name, i) for name in figures for i in range(1 if each else 2)]
    seeds = [] if each else ["seeds"]
    lines = [["dataset", "data", "run", *differ, *seeds, *(name + "_sd" * i for name, i in columns), "seconds/fit"]]
    for one in found:
        for row in one.rows:
            said = dict(zip(one.differ, row["said"], strict=True))
            values = [row["figures"][name][i] if name in row["figures"] else None for name, i in columns]
            names = [one.dataset, one.fingerprint, " ".join(row["runs"]), *(said.get(key) for key in differ)]
            lines.append([*names, *([len(row["runs"])] * len(seeds)), *values, row["seconds"]])
    return lines


def markdown(found: list[Table], left_out: list[str], each: bool) -> str:
    """The tables as they are shown, and the lines under them."""
    lines = []
    for one in found:
        columns = [*(one.differ or ["run"]), *([] if each else ["seeds"]), *(name.partition("/")[2] for name in one.figures)]
        words = len(columns) - len(one.figures) - (not each)
        lines += [f"### {title(one, found, each)}", "", f"| {' | '.join(columns)} |"]
        lines += ["|" + " --- |" * words + " ---: |" * (len(columns) - words)]
        for row in one.rows:
            said = [*(row["said"] or [" ".join(row["runs"])]), *([] if each else [str(len(row["runs"]))])]
            lines.append(f"| {' | '.join([*said, *(cell(row, name) for name in one.figures)])} |")
        lines += ["", *([f"{explanation(one)}.", ""] if explanation(one) else [])]
    return "\n".join([*lines, *(f"- {line}" for line in left_out)]).strip() + "\n"


def page(found: list[Table], left_out: list[str], each: bool, to: Path) -> None:
    """The tables, with the intervals of rows of one run, and the curves of each row's first run over one another."""
    from siamese import reporting

    tables = []
    for one in found:
        split, rows = one.figures[0].partition("/")[0], []
        for row, (colour, style) in itertools.zip_longest(one.rows, reporting.OVERLAID[: len(one.rows)], fillvalue=("transparent", "-")):
            bounds = intervals(row["paths"][0]) if len(row["paths"]) == 1 else {}
            cells = [{"text": cell(row, name), "interval": bounds.get(name)} for name in one.figures]
            said = {"said": row["said"] or [" ".join(row["runs"])], "name": " ".join(row["runs"]), "runs": list(map(str, row["paths"]))}
            rows.append({**said, "seeds": len(row["runs"]), "cells": cells, "colour": colour, "style": {"-": "solid"}.get(style, "dashed")})
        charts = curves(one, split)
        figures = [name.partition("/")[2] for name in one.figures]
        table = {"name": one.dataset, "title": title(one, found, each), "differ": one.differ, "figures": figures}
        tables.append({**table, "rows": rows, "explanation": explanation(one), "charts": charts})
    runs = sum(len(row["runs"]) for one in found for row in one.rows)
    reporting.render(to, "comparison", title=to.stem, tables=tables, left_out=left_out, each=each, runs=runs)


def intervals(run: Path) -> dict[str, str]:
    metrics = json.loads((run / "metrics.json").read_text())
    return {name[:-5]: "{:.4f} to {:.4f}".format(*bounds) for name, bounds in metrics.items() if name.endswith("_ci95")}


def curves(one: Table, split: str) -> list[tuple[str, str]]:
    """ROC, Recall@K and validation by step, of the first run of each row that has them; and what each says."""
    from siamese import reporting
    from siamese.evaluation import EvaluationResult

    found, logged, drawn = [], [], []
    for row, look in zip(one.rows, reporting.OVERLAID, strict=False):
        name, run = ", ".join(row["said"]) or row["runs"][0], row["paths"][0]
        with contextlib.suppress(OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            found.append((name, look, EvaluationResult.load(run / "results.npz")[split]))
        with contextlib.suppress(OSError), (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
            column = f"val/{one.figures[0].partition('/')[2]}"
            points = [(int(line["step"]), float(line[column])) for line in csv.DictReader(file) if line.get(column)]
            if len(points) > 1:
                logged.append((name, look, *np.array(points).T))
    if found:
        drawn.append((reporting.overlaid_rocs(found), "Is a pair the same? The first run of each row."))
    if found and all(len(result.class_queries) for *_, result in found):
        lines = [(name, look, *reporting.recall_at(result)) for name, look, result in found]
        drawn.append((reporting.overlaid(lines, "Recall at K", xlabel="K", ylabel="Recall@K"), "Is one of the class among the K nearest?"))
    if logged:
        figure = one.figures[0].partition("/")[2]
        drawn.append((reporting.overlaid(logged, figure, xlabel="step", ylabel=f"val/{figure}"), "On validation, while it was trained."))
    return drawn


def title(one: Table, found: list[Table], each: bool) -> str:
    """What the table is of, with the fingerprint of the data where its name does not tell it from another table's."""
    ambiguous = sum(other.dataset == one.dataset for other in found) > 1
    data = f"{one.dataset} ({one.fingerprint[:8] or 'of unknown data'})" if ambiguous else one.dataset
    split = one.figures[0].partition("/")[0]
    return f"{data + ', ' if data else ''}figures of the {split} split, best first" + ("" if each else ", mean ± sd over seeds")


def draw(found: list[Table], each: bool, to: Path) -> None:
    """The first figure of every row: its mean and standard deviation over seeds, and a dot for each seed; a panel for each table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [min(len(one.rows), DRAWN) for one in found]
    height = sum(0.3 * size + 1.1 for size in sizes)
    figure, panels = plt.subplots(
        len(found), 1, figsize=(8, height), height_ratios=[size + 0.6 for size in sizes], layout="constrained", dpi=130, squeeze=False
    )
    for axis, one, size in zip(panels[:, 0], found, sizes, strict=True):
        name, rows = one.figures[0], [row for row in one.rows[:size] if one.figures[0] in row["figures"]]
        for place, row in enumerate(rows):
            (mean, sd), values = row["figures"][name], row["values"][name]
            # Blue for what is best, and grey where a test does not tell it from that.
            colour = "#0072B2" if place == 0 else "#595959" if cell(row, name)[-1] in "~?" else "#D55E00"
            axis.plot(values, [place] * len(values), "o", color=colour, markersize=3, alpha=0.4)
            axis.errorbar(mean, place, xerr=sd, fmt="D", color=colour, markersize=5, capsize=3, linewidth=1.4)
        labels = [", ".join(row["said"]) or " ".join(row["runs"]) for row in rows]
        axis.set_yticks(range(len(rows)), [label if len(label) < 60 else f"{label[:57]}..." for label in labels], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        said = f"{', '.join(one.differ)}" + (f", the best {size} of {len(one.rows)}" if size < len(one.rows) else "")
        axis.set_title(f"{title(one, found, each)}\n{said}" if said else title(one, found, each), fontsize=9, loc="left")
        axis.set_xlabel(name.partition("/")[2] + ("" if higher(name) else ", lower is better"), fontsize=9)
        axis.tick_params("x", labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if not each:
        figure.supxlabel(
            "diamonds and bars: mean and standard deviation, dots: seeds; grey: no supported difference from the best", fontsize=8
        )
    with replacing(to) as partial:
        figure.savefig(partial, format=to.suffix[1:])
    plt.close(figure)


def higher(name: str) -> bool:
    from siamese.evaluation import higher_is_better

    return higher_is_better(name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to this one; it takes the place of the other when all is written."""
    partial = path.with_name(f"{path.name}.part")
    yield partial
    os.replace(partial, path)


def cell(row: dict, name: str, joint: str = " ± ") -> str:
    """A figure as it is shown: `0.8253 ± 0.0031`, and its mark."""
    if name not in row["figures"]:
        return ""
    decimals = 2 if name.endswith("/omniglot_error") else 4
    tested = row["tests"].get(name)
    mark = "" if tested is None else "?" if tested.p is None else "~" if tested.p >= LEVEL else ""
    return joint.join(f"{value:.{decimals}f}" for value in row["figures"][name] if value is not None) + mark


def explanation(found: Table) -> str:
    """What the marks say: the test, over how many pairs, how often it was made, and what it leaves open."""
    tests = [(name, tested) for row in found.rows for name, tested in row["tests"].items()]
    made = [(name.partition("/")[2], tested) for name, tested in tests if tested.p is not None]
    pairs: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name, _ in made):
        spans = [span((getattr(tested, what) for one, tested in made if one == name), what) for what in ("classes", "seeds")]
        pairs.setdefault(" and ".join(filter(None, spans)), []).append(name)
    said = []
    if made:
        over = "; ".join(f"{', '.join(names)}: {pairs}" for pairs, names in pairs.items())
        said.append(f"~ the difference from the first row is not supported (paired t-test, two-sided, p >= {LEVEL}; pairs of {over})")
        said.append(f"{len(made)} comparisons, not corrected for their number")
    if any(not tested.seeds and not tested.unpaired for _, tested in made):
        said.append("Where a row has one seed, the seeds' own spread is not in the test")
    if any(tested.unpaired for _, tested in made):
        said.append("Where rows do not share two seeds, the spread of each is in the test")
    if len(made) < len(tests):
        said.append(f"? not tested: no two seeds in common (nor, for {' and '.join(PER_CLASS)}, the same classes in results.npz)")
    return ". ".join(said)


def span(counts: Iterable[int], what: str) -> str:
    low, *_, high = sorted([*counts] * 2)
    return f"{high} {what}" if low == high > 0 else f"{low} to {high} {what}" if high else ""


def show(found: list[Table], left_out: list[str], each: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for one in found:
        grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title(one, found, each), title_justify="left")
        for heading in ["run", *one.differ, *([] if each else ["seeds"])]:
            grid.add_column(heading.replace(".", ".\n").replace("_", "_\n", 1), overflow="fold")
        # A figure is on one line, and names fold, where that leaves them some room.
        roomy = 28 + 7 * len(one.differ) + (8 if each else 19) * len(one.figures) <= console.width
        for name in one.figures:
            grid.add_column(name.partition("/")[2].replace("_", "_\n", 1), overflow="fold", no_wrap=roomy)
        grid.add_column("seconds/\nfit", justify="right")
        for row in one.rows:
            names = row["runs"] if len(row["runs"]) < 3 else [row["runs"][0], "…", row["runs"][-1]]
            seeds = [] if each else [str(len(row["runs"]))]
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
            cells = (cell(row, name, " ± " if roomy else "\n± ") for name in one.figures)
            grid.add_row(" ".join(names), *row["said"], *seeds, *cells, seconds)
        console.print(grid)
        if any(row["tests"] for row in one.rows):
            console.print(explanation(one), highlight=False)
    for line in left_out:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", default=["logs"], metavar="DIR", help="runs, or directories that hold some (default: logs)")
    parser.add_argument(
        "--figures", nargs="+", default=FIGURES, metavar="NAME", help=f"which, best by the first (default: {' '.join(FIGURES)})"
    )
    parser.add_argument("--split", choices=["val", "test"], help="default: test, or val when a run has not looked at test")
    parser.add_argument("--each", action="store_true", help="a row for each run, untested")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the tables there too, in full precision")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write them there as they are shown")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page there: the tables, and the curves over one another")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw the first figure there ({', '.join(PICTURES)})")
    arguments = parser.parse_args()
    for place in arguments.places:
        if not Path(place).is_dir():
            sys.exit(f"error: {place} is no directory")
    if arguments.plot and arguments.plot.suffix not in PICTURES:
        sys.exit(f"error: --plot {arguments.plot} must end in one of {', '.join(PICTURES)}")
    found, left_out = tables(arguments.places, arguments.figures, arguments.split, arguments.each)
    show(found, left_out, arguments.each)
    try:
        if arguments.csv:
            with replacing(arguments.csv) as partial, partial.open("w", newline="") as file:
                csv.writer(file).writerows(csv_lines(found, arguments.each))
        if arguments.markdown:
            with replacing(arguments.markdown) as partial:
                partial.write_text(markdown(found, left_out, arguments.each))
        if arguments.html:
            page(found, left_out, arguments.each, arguments.html)
        if arguments.plot:
            draw(found, arguments.each, arguments.plot)
    except OSError as error:
        sys.exit(f"error: {error.filename} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
