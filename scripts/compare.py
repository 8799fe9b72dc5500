"""Put runs side by side: what differed between them, and the figures.

    python scripts/compare.py logs/train/multiruns/<stamp>
    python scripts/compare.py logs/train/runs/<one> logs/train/runs/<other> --figures recall_at_1 eer --csv table.csv

Takes run directories, and directories that hold some (a sweep, or logs/ itself). The best run by the first figure comes first.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

FIGURES = ["map_at_r", "recall_at_1", "auc", "eer", "oneshot_20way", "omniglot_error"]


def find_runs(places: list[str]) -> list[Path]:
    """Every directory with a `.hydra` folder at or below the places, in order of name, numbers by value."""
    runs = {folder.parent.resolve() for place in places for folder in Path(place).rglob(".hydra") if folder.is_dir()}
    return sorted(runs, key=lambda run: [(not part.isdigit(), int(part) if part.isdigit() else part) for part in run.parts])


def read_run(run: Path) -> dict:
    """Choices and values of the configuration as flat strings, and the figures; {} where a run has none."""
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra
    choices = {group: str(choice) for group, choice in hydra.runtime.choices.items() if not group.startswith("hydra")}
    config = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "config.yaml"), resolve=False)
    values = dict(_leaves({key: value for key, value in config.items() if key != "paths"}))
    metrics = run / "metrics.json"
    return {"choices": choices, "values": values, "figures": json.loads(metrics.read_text()) if metrics.is_file() else {}}


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


def rows(places: list[str], figures: list[str], split: str | None) -> tuple[list[str], list[list], list[str]]:
    """Header, rows and unfinished runs. Figures are of `split`, by default of test, where all finished runs have it, else of val."""
    paths = find_runs(places)
    if not paths:
        sys.exit(f"error: no run (a directory with .hydra/) in {', '.join(places)}")
    read = {path: read_run(path) for path in paths}
    finished = {path: run for path, run in read.items() if run["figures"]}
    unfinished = [str(path) for path in paths if path not in finished]
    if not finished:
        sys.exit(f"error: none of the {len(paths)} runs has a metrics.json: they did not finish")
    if split is None:
        split = "test" if all(any(k.startswith("test/") for k in run["figures"]) for run in finished.values()) else "val"

    from siamese.evaluation import higher_is_better

    shown = [f"{split}/{name}" for name in figures if any(f"{split}/{name}" in run["figures"] for run in finished.values())]
    if not shown:
        sys.exit(f"error: no run has a figure {split}/{figures[0]}")
    differ = differences(list(finished.values()))
    sign = -1 if higher_is_better(shown[0]) else 1
    order = sorted(finished, key=lambda path: sign * finished[path]["figures"].get(shown[0], -sign * float("inf")))
    table = []
    for path in order:
        run = finished[path]
        said = [run["choices"].get(key, run["values"].get(key, "")) for key in differ]
        fit = run["figures"].get("seconds/fit")
        table.append([path.name, *said, *(run["figures"].get(name) for name in shown), None if fit is None else round(fit)])
    return ["run", *differ, *shown, "seconds/fit"], table, unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="DIR", help="runs, or directories that hold some")
    parser.add_argument(
        "--figures", nargs="+", default=FIGURES, metavar="NAME", help=f"which, best by the first (default: {' '.join(FIGURES)})"
    )
    parser.add_argument("--split", choices=["val", "test"], help="default: test, or val when a run has not looked at test")
    parser.add_argument("--csv", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    for place in arguments.places:
        if not Path(place).is_dir():
            sys.exit(f"error: {place} is no directory")
    header, table, unfinished = rows(arguments.places, arguments.figures, arguments.split)

    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            csv.writer(file).writerows([header, *table])
    from rich import box
    from rich.console import Console
    from rich.table import Table

    split = header[-2].partition("/")[0]
    text = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"figures of the {split} split, best first", title_justify="left")
    for heading in header:
        name = heading.removeprefix(f"{split}/").replace("seconds/", "seconds/\n").replace(".", ".\n")
        text.add_column(name.replace("_", "_\n", 1), justify="right" if "/" in heading else "left", overflow="fold")
    for row in table:
        text.add_row(*("" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(text)
    for run in unfinished:
        console.print(f"unfinished, left out: {run}", style="yellow")


if __name__ == "__main__":
    main()
