"""What the default run reaches on letters never seen, how long it takes from command to prompt, and how much of that is its report.

    python scripts/benchmark_default.py --check                      # seeds 0, 1, 2; exit code 1 when a target is missed
    python scripts/benchmark_default.py --full --json docs/default.json   # Omniglot's 20 official one-shot runs too

Every seed is a run of `python train.py` by itself. Memory is read from /proc, on Linux only. `docs/default.json` is what README.md
shows (scripts/readme.py).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
# What the mean of the seeds must reach, and in which direction.
TARGETS = {"recall_at_1": 0.98, "oneshot_20way": 0.955, "eer": 0.031}
SHOWN = ("recall_at_1", "map_at_r", "auc", "eer", "oneshot_20way")
SECONDS = 60.0
REPORT = {"s": 5.0, "share": 0.1}  # of a default run
LARGE = {"embeddings": (60_502, 512), "s": 20.0, "MiB": 1024.0}
OMNIGLOT_TARGET = 8.0  # percent: Koch, Zemel and Salakhutdinov 2015


def run(*overrides: str) -> tuple[dict[str, float], float, float]:
    """The figures of one `python train.py`, its wall seconds, and those of its report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"paths.output_dir={folder}/run", "logger.tags=[benchmark]", *overrides]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        report = re.search(r"report: .*, ([\d.]+) s", done.stdout + done.stderr)
        if report is None:
            sys.exit(f"error: {' '.join(command)} made no report:\n{done.stderr[-2000:]}")
        return json.loads(Path(folder, "run", "metrics.json").read_text()), seconds, float(report[1])


def print_report(samples: int, size: int) -> None:
    """Seconds and MiB that the report of so many embeddings takes, on top of what this process has judged and holds."""
    import torch
    from benchmark_evaluation import COSINE, data, held

    from siamese import reporting
    from siamese.data.samples import Samples
    from siamese.evaluation import evaluate
    from siamese.record import write

    embeddings, labels = data(samples, size)
    result = evaluate(embeddings, labels, COSINE)
    images = torch.randint(256, (samples, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown = Samples(images, labels, result.class_names, result.ids)
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, started = held("VmRSS"), time.perf_counter()
        reporting.keep(result, shown)
        chosen = time.perf_counter() - started
        write(Path(folder), {"raw": result, "untrained": result, "test": result}, {})
        started = time.perf_counter()
        reporting.write(folder)
        print(json.dumps({"s": chosen + time.perf_counter() - started, "MiB": held("VmHWM") - before}))


def row(name: str, value: float, target: float | None = None, unit: str = "") -> dict:
    print(f"{name:44}{value:10.4f} {unit:4}" + (f"  target {target}" if target is not None else ""), flush=True)
    return {"name": name, "value": round(value, 4), "target": target, "unit": unit}


def measure(full: bool) -> list[dict]:
    rows, runs = [], []
    for seed in SEEDS:
        figures, seconds, report = run(f"seed={seed}")
        runs.append((figures, seconds, report))
        rows += [row(f"glyphs seed {seed} {name}", figures[f"test/{name}"]) for name in SHOWN]
        rows.append(row(f"glyphs seed {seed} command to prompt", seconds, unit="s"))
    for prefix in ("raw", "untrained", "test"):
        for name in SHOWN:
            values = [figures[f"{prefix}/{name}"] for figures, *_ in runs]
            rows.append(row(f"glyphs {prefix} {name}", statistics.mean(values), TARGETS.get(name) if prefix == "test" else None))
    rows.append(row("glyphs command to prompt", statistics.median(seconds for _, seconds, _ in runs), SECONDS, "s"))
    rows.append(row("glyphs report", statistics.median(report for *_, report in runs), REPORT["s"], "s"))
    rows.append(row("glyphs report's share", statistics.median(report / seconds for _, seconds, report in runs), REPORT["share"], "rate"))
    command = [sys.executable, __file__, "--report", *map(str, LARGE["embeddings"])]
    cost = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    rows += [row("report of {:,} x {} in {}".format(*LARGE["embeddings"], unit), cost[unit], LARGE[unit], unit) for unit in ("s", "MiB")]
    if full:
        figures, seconds, _ = run("experiment=omniglot_semihard")
        rows.append(row("omniglot conv4 semihard omniglot_error", figures["test/omniglot_error"], OMNIGLOT_TARGET, "%"))
        rows.append(row("omniglot conv4 semihard oneshot_20way", figures["test/oneshot_20way"]))
        rows.append(row("omniglot conv4 semihard command to prompt", seconds, unit="s"))
    return rows


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target; of an error rate, a percentage of errors and of what it costs less is better."""
    from siamese.evaluation import higher_is_better

    out = []
    for entry in rows:
        figure = entry["name"].rpartition(" ")[2]
        more = higher_is_better(figure) and entry["unit"] in ("", "%")
        if entry["target"] is not None and (entry["value"] < entry["target"] if more else entry["value"] > entry["target"]):
            out.append(f"{entry['name']}: {entry['value']} misses {entry['target']} {entry['unit']}")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="Omniglot too, some minutes more")
    parser.add_argument("--report", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        sys.exit(print_report(*arguments.report))
    measured = measure(arguments.full)
    if arguments.json:
        from siamese.record import write_json

        write_json(Path(arguments.json), measured)
    for line in (failures := missed(measured)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
