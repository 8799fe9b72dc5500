"""Put runs side by side: what differed between them, and the figures, mean ± standard deviation over seeds.

    python scripts/compare.py logs/train/multiruns/<stamp>
    python scripts/compare.py logs/train/runs/<one> logs/train/runs/<other> --figures recall_at_1 eer --csv table.csv

Takes run directories, and directories that hold some (a sweep, or logs/ itself). Runs whose configuration differs in nothing but
`seed` are one row. The best row by the first figure comes first, and a figure is marked where a paired test does not support that
it differs from the first row's.
"""

import argparse
import csv
import functools
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

FIGURES = ["map_at_r", "recall_at_1", "auc", "eer", "oneshot_20way", "omniglot_error"]
PER_CLASS = ("recall_at_1", "map_at_r")  # results.npz holds their means over the queries of each class
LEVEL = 0.05


class Table(NamedTuple):
    """What is shown. Each row is a dict: runs (names), said (what differed), figures {name: (mean, sd)}, seconds, tests {name: Tested}."""

    differ: list[str]
    figures: list[str]
    rows: list[dict]
    left_out: list[str]


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
    """Choices and values of the configuration of a finished run as flat strings, and its figures, without their intervals."""
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra
    choices = {group: str(choice) for group, choice in hydra.runtime.choices.items() if not group.startswith("hydra")}
    config = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "config.yaml"), resolve=False)
    values = dict(_leaves({key: value for key, value in config.items() if key != "paths"}))
    metrics = json.loads((run / "metrics.json").read_text())
    figures = {name: value for name, value in metrics.items() if not name.endswith("_ci95")}
    return {"path": run, "choices": choices, "values": values, "figures": figures}


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
    except (OSError, KeyError):  # no such file, or one written before there were means of classes
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


def table(places: list[str], figures: list[str], split: str | None = None, each: bool = False) -> Table:
    """The rows, best first. Figures are of `split`, by default of test, where all finished runs have it, else of val."""
    paths = find_runs(places)
    if not paths:
        sys.exit(f"error: no run (a directory with .hydra/) in {', '.join(places)}")
    runs = [read_run(path) for path in paths if (path / "metrics.json").is_file()]
    left_out = [f"unfinished, left out: {path}" for path in paths if not (path / "metrics.json").is_file()]
    if not runs:
        sys.exit(f"error: none of the {len(paths)} runs has a metrics.json: they did not finish")
    if split is None:
        split = "test" if all(any(name.startswith("test/") for name in run["figures"]) for run in runs) else "val"
    shown = [f"{split}/{name}" for name in figures if any(f"{split}/{name}" in run["figures"] for run in runs)]
    if not shown:
        sys.exit(f"error: no run has a figure {split}/{figures[0]}")

    from siamese.evaluation import higher_is_better

    groups, repeated = ([{"": run} for run in runs], []) if each else by_seed(runs)
    left_out += [f"run again later with the same seed, left out: {path}" for path in repeated]
    differ = [key for key in differences(runs) if each or key != "seed"]
    sign = -1 if higher_is_better(shown[0]) else 1
    summaries = [summary(group, differ, shown) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: sign * summaries[i]["figures"].get(shown[0], (sign * float("inf"),))[0])
    for i in [] if each else order[1:]:
        summaries[i]["tests"] = {name: compare(groups[i], groups[order[0]], name) for name in summaries[i]["figures"]}
    return Table(differ, shown, [summaries[i] for i in order], left_out)


def summary(group: dict[str, dict], differ: list[str], shown: list[str]) -> dict:
    """The row of the runs of a group."""
    runs = list(group.values())
    values = {name: [run["figures"][name] for run in runs if name in run["figures"]] for name in (*shown, "seconds/fit")}
    moments = {name: (statistics.mean(some), statistics.stdev(some) if len(some) > 1 else None) for name, some in values.items() if some}
    seconds = moments.pop("seconds/fit", (None,))[0]
    said = [runs[0]["choices"].get(key, runs[0]["values"].get(key, "")) for key in differ]
    return {"runs": [run["path"].name for run in runs], "said": said, "figures": moments, "seconds": seconds, "tests": {}}


def csv_lines(found: Table, each: bool) -> list[list]:
    """Header and rows in full precision, a mean and its standard deviation in columns of their own."""
    columns = [(name, i) for name in found.figures for i in range(1 if each else 2)]
    seeds = [] if each else ["seeds"]
    lines = [["run", *found.differ, *seeds, *(name + "_sd" * i for name, i in columns), "seconds/fit"]]
    for row in found.rows:
        values = [row["figures"][name][i] if name in row["figures"] else None for name, i in columns]
        lines.append([" ".join(row["runs"]), *row["said"], *([len(row["runs"])] * len(seeds)), *values, row["seconds"]])
    return lines


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


def show(found: Table, each: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console() if sys.stdout.isatty() else Console(width=160)
    title = f"figures of the {found.figures[0].partition('/')[0]} split, best first" + ("" if each else ", mean ± sd over seeds")
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for heading in ["run", *found.differ, *([] if each else ["seeds"])]:
        grid.add_column(heading.replace(".", ".\n").replace("_", "_\n", 1), overflow="fold")
    # A figure is on one line, and names fold, where that leaves them some room.
    roomy = 28 + 7 * len(found.differ) + (8 if each else 19) * len(found.figures) <= console.width
    for name in found.figures:
        grid.add_column(name.partition("/")[2].replace("_", "_\n", 1), overflow="fold", no_wrap=roomy)
    grid.add_column("seconds/\nfit", justify="right")
    for row in found.rows:
        names = row["runs"] if len(row["runs"]) < 3 else [row["runs"][0], "…", row["runs"][-1]]
        seeds = [] if each else [str(len(row["runs"]))]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        grid.add_row(
            " ".join(names), *row["said"], *seeds, *(cell(row, name, " ± " if roomy else "\n± ") for name in found.figures), seconds
        )
    console.print(grid)
    if any(row["tests"] for row in found.rows):
        console.print(explanation(found), highlight=False)
    for line in found.left_out:
        console.print(line, style="yellow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="DIR", help="runs, or directories that hold some")
    parser.add_argument(
        "--figures", nargs="+", default=FIGURES, metavar="NAME", help=f"which, best by the first (default: {' '.join(FIGURES)})"
    )
    parser.add_argument("--split", choices=["val", "test"], help="default: test, or val when a run has not looked at test")
    parser.add_argument("--each", action="store_true", help="a row for each run, untested")
    parser.add_argument("--csv", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    for place in arguments.places:
        if not Path(place).is_dir():
            sys.exit(f"error: {place} is no directory")
    found = table(arguments.places, arguments.figures, arguments.split, arguments.each)
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            csv.writer(file).writerows(csv_lines(found, arguments.each))
    show(found, arguments.each)


if __name__ == "__main__":
    main()
