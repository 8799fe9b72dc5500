"""Train every loss, and every miner, alike: a small equal budget on glyphs, judged on validation, several seeds; written as a page.

    python scripts/study_losses.py                     # run what has not been run yet, then write docs/losses.md and docs/losses.png
    python scripts/study_losses.py --only loss=triplet miner=hard --seeds 0     # some of it
    python scripts/study_losses.py --page              # only write the page: of what has been run, or again from docs/losses.json

Each run is `python train.py loss=... seed=... test=false` by itself, in a directory of its own below --runs: what is finished there
is not run again, so the study can be stopped and resumed at any time. A run of this study with other settings needs other --runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from siamese.config import ROOT, InputError, available, compose
from siamese.record import write_json

EPOCHS = 8
BUDGET = ["test=false", "logger=none", "report=none", f"trainer.max_epochs={EPOCHS}", f"trainer.check_val_every_n_epoch={EPOCHS}"]
FIGURES = ("recall_at_1", "map_at_r", "auc", "eer", "oneshot_20way")

# What the tables do not say by themselves.
EXPLAINED = """`miner=hard` and `miner=batch_hard` give the triplet loss hardly anything but negatives nearer than the positive: from random
weights on, the shortest way out is to draw all embeddings together (FaceNet, section 3.2, tells of the same collapse), and this
budget does not suffice to get out of it again. With `miner=scheduled` the same hard negatives come after the semi-hard ones.
`miner=easy` keeps the triplets that are solved already, of which the loss is 0 as its margin is the miner's: nothing is learned,
and weight decay and batch-norm statistics alone leave less than the untrained encoder has; it is for losses with another
margin. Losses with weights for each class (arcface, proxy_anchor, soft_triple, ...) spend a part of the small budget on these, and
`smooth_ap` and `sphereface` are known to want longer training.
"""


def variants() -> dict[str, list[str]]:
    """Name -> overrides: each loss by itself, and the triplet loss with each miner."""
    every = {f"loss={loss}": [f"loss={loss}"] for loss in available("loss")}
    every |= {f"miner={miner}": ["loss=triplet", f"miner={miner}"] for miner in available("miner")}
    # Half of the epochs each, or the second stage would never start.
    every["miner=scheduled"] = [*every["miner=scheduled"], f"miner.start_epoch.late={EPOCHS // 2}"]
    return every


def compatible(every: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those that go with the defaults; of the others it says why not."""
    fitting = {}
    for name, overrides in every.items():
        try:
            compose(overrides)
        except InputError as error:
            print(f"left out: {error}")
        else:
            fitting[name] = overrides
    return fitting


def run(folder: Path, overrides: list[str]) -> None:
    """One training in a process of its own, on one thread; its peak memory and CPU seconds are left beside its figures."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as file:
        command = [sys.executable, "train.py", *overrides, f"paths.output_dir={folder}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(overrides)} ended with {process.returncode}: see {log}")
    write_json(folder / "peak.json", {"MiB": usage.ru_maxrss // 1024, "seconds": round(usage.ru_utime + usage.ru_stime, 1)})
    log.unlink()


def place(runs: Path, name: str, seed: int | str) -> Path:
    return runs / name.replace("=", "-").replace(",", "") / str(seed)  # both would have to be quoted in an override


def study(runs: Path, chosen: dict[str, list[str]], seeds: list[int], jobs: int) -> list[str]:
    """Run what is missing of name -> overrides, `jobs` at a time, with a progress bar; gives back what failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    todo = [(place(runs, name, seed), [*overrides, f"seed={seed}"]) for seed in seeds for name, overrides in chosen.items()]
    missing = [(folder, overrides) for folder, overrides in todo if not (folder / "peak.json").is_file()]
    failed: list[str] = []
    stop = threading.Event()
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("runs", total=len(todo), completed=len(todo) - len(missing))

        def one(folder: Path, overrides: list[str]) -> None:
            if stop.is_set():
                return
            try:
                run(folder, overrides)
            except RuntimeError as error:
                failed.append(str(error))
            bar.advance(task)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in [pool.submit(one, *arguments) for arguments in missing]:
                    done.result()
            except KeyboardInterrupt:
                stop.set()
                raise
    return failed


def collect(runs: Path, names: list[str]) -> dict[str, list[dict[str, float]]]:
    """Name -> figures of each finished seed; `raw` and `untrained` stand beside the losses."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in names:
        finished = [file.parent for file in place(runs, name, "*").parent.glob("*/peak.json")]
        for folder in sorted(finished, key=lambda path: int(path.name)):
            metrics = json.loads((folder / "metrics.json").read_text())
            peak = json.loads((folder / "peak.json").read_text())["MiB"]
            trained = {figure: metrics[f"val/{figure}"] for figure in FIGURES} | {"seconds": metrics["seconds/fit"], "MiB": peak}
            found.setdefault(name, []).append(trained)
            if name == "loss=supcon":
                for row in ("raw", "untrained"):
                    found.setdefault(row, []).append({figure: metrics[f"{row}/{figure}"] for figure in FIGURES})
    return found


def mean(rows: list[dict[str, float]], figure: str) -> float:
    return statistics.mean(row[figure] for row in rows)


def spread(rows: list[dict[str, float]], figure: str) -> float:
    return statistics.stdev(row[figure] for row in rows) if len(rows) > 1 else 0.0


def ranked(found: dict[str, list[dict[str, float]]], group: str) -> list[str]:
    return sorted((name for name in found if name.startswith(f"{group}=")), key=lambda name: -mean(found[name], "map_at_r"))


def table(found: dict[str, list[dict[str, float]]], group: str) -> str:
    rows = [f"| `{group}=` | {' | '.join(FIGURES)} | seconds | MiB |", "| --- |" + " ---: |" * (len(FIGURES) + 2)]
    for name in [*ranked(found, group), "untrained", "raw"]:
        cells = [f"{mean(found[name], figure):.3f} ± {spread(found[name], figure):.3f}" for figure in FIGURES]
        costs = [[row[cell] for row in found[name] if cell in row] for cell in ("seconds", "MiB")]
        cost = [f"{statistics.median(values):.0f}" if values else "" for values in costs]
        rows.append(f"| {name.removeprefix(f'{group}=')} | {' | '.join([*cells, *cost])} |")
    return "\n".join(rows)


def page(found: dict[str, list[dict[str, float]]]) -> str:
    leading = max(mean(found[name], "recall_at_1") for name in ranked(found, "loss"))
    near = [name for name in ranked(found, "loss") if mean(found[name], "recall_at_1") >= leading - 0.05]
    seeds = max(len(rows) for rows in found.values())
    return f"""# Losses and miners on equal terms

Every loss of `conf/loss` with the other defaults (32 classes x 4 letters a batch, no miner), and `loss=triplet` with every
miner: {EPOCHS} epochs on the Latin letters of glyphs, judged on the Cyrillic ones (validation; the test scripts are not touched),
mean ± standard deviation over {seeds} seeds. Each loss has the values of its YAML, found by short
sweeps on validation with one seed, such as
`python train.py -m loss=arcface loss.lr=0.03,0.3,1 trainer.max_epochs={EPOCHS} test=false`.
Best by `map_at_r` first; seconds, a median, are of training on one thread, on a machine that was busy with other work;
MiB is the peak of the whole process, most of which is libraries.

![map_at_r and recall_at_1 of every loss and miner](losses.png)

{len(near)} of {len(ranked(found, "loss"))} losses are within five points of the best `recall_at_1`, {leading:.3f}.

## Losses

{table(found, "loss")}

## Miners, with the triplet loss

{table(found, "miner")}

{EXPLAINED}
Made by `python scripts/study_losses.py`; the figures of each seed are in [losses.json](losses.json).
"""


def chart(found: dict[str, list[dict[str, float]]], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {group: ranked(found, group)[::-1] for group in ("loss", "miner")}
    sizes = [len(names) for names in groups.values()]
    figure, panels = plt.subplots(2, 1, figsize=(8, 0.27 * sum(sizes) + 2), height_ratios=sizes, sharex=True, layout="constrained", dpi=110)
    for axis, (group, names) in zip(panels, groups.items(), strict=True):
        # Blue and vermilion, circle and square: told apart by colour-blind eyes too (Okabe and Ito 2008).
        for figure_name, colour, marker in (("map_at_r", "#0072B2", "o"), ("recall_at_1", "#D55E00", "s")):
            values = [mean(found[name], figure_name) for name in names]
            errors = [spread(found[name], figure_name) for name in names]
            axis.errorbar(values, range(len(names)), xerr=errors, fmt=marker, color=colour, markersize=4, capsize=2, label=figure_name)
            axis.axvline(mean(found["untrained"], figure_name), color=colour, linestyle="--", linewidth=0.8)
            axis.axvline(mean(found["raw"], figure_name), color=colour, linestyle=":", linewidth=0.8)
        axis.set_yticks(range(len(names)), [name.partition("=")[2] for name in names], fontsize=8)
        axis.set_title("every loss" if group == "loss" else "the triplet loss with every miner", fontsize=10, loc="left")
        axis.grid(alpha=0.25)
    panels[0].legend(loc="lower left", fontsize=8)
    panels[1].set_xlabel("validation, mean and standard deviation over seeds; dashed: untrained encoder, dotted: raw input", fontsize=9)
    partial = to.with_name(f"{to.name}.part")
    figure.savefig(partial, format="png")
    os.replace(partial, to)


def parsed(doc: str, name: str, kind: str) -> argparse.Namespace:
    """The command line of a study, whose page is docs/<name>.md; `kind` is what its variants are called."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "logs" / "studies" / name, metavar="DIR", help="where the runs are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="where the page goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", metavar=kind, help="run only these; the page has all that was ever run")
    parser.add_argument("--page", action="store_true", help=f"run nothing, write the page of what is below --runs, or of {name}.json")
    return parser.parse_args()


def finished(arguments: argparse.Namespace, name: str, every: dict[str, list[str]], collect: Callable[[Path, list[str]], dict]) -> dict:
    """What was found, after running what is asked for and missing; or as the last study has left it. Ends the script where that fails."""
    data = arguments.docs / f"{name}.json"
    if arguments.page and (found := collect(arguments.runs, list(every))):
        return found
    if arguments.page:
        if not data.is_file():
            sys.exit(f"error: there is no {data}: run the study first")
        return json.loads(data.read_text())
    if unknown := set(arguments.only or ()) - every.keys():
        sys.exit(f"error: {', '.join(sorted(unknown))} is not part of the study: take some of {', '.join(every)}")
    chosen = compatible({name: every[name] for name in arguments.only or every})
    arguments.failed = study(arguments.runs.resolve(), chosen, arguments.seeds, max(arguments.jobs, 1))
    for line in arguments.failed:
        print(line, file=sys.stderr)
    return collect(arguments.runs, list(every))


def publish(arguments: argparse.Namespace, name: str, found: dict, text: str, draw: Callable[[dict, Path], None]) -> None:
    """Write docs/<name>.json, .md and .png; exit code 1 if a run has failed."""
    arguments.docs.mkdir(parents=True, exist_ok=True)
    write_json(arguments.docs / f"{name}.json", found)
    partial = arguments.docs / f"{name}.md.part"
    partial.write_text(text)
    os.replace(partial, arguments.docs / f"{name}.md")
    draw(found, arguments.docs / f"{name}.png")
    sys.exit(1 if getattr(arguments, "failed", None) else 0)


def main() -> None:
    arguments = parsed(__doc__, "losses", "GROUP=CHOICE")
    every = {name: [*overrides, *BUDGET] for name, overrides in variants().items()}
    found = finished(arguments, "losses", every, collect)
    if "untrained" not in found or not ranked(found, "miner"):
        sys.exit("error: the page needs loss=supcon, for the rows before training, and a miner: run these too")
    publish(arguments, "losses", found, page(found), chart)


if __name__ == "__main__":
    main()
