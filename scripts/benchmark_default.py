"""What the default run reaches on letters never seen, and how long it takes from command to prompt.

    python scripts/benchmark_default.py --check                      # seeds 0, 1, 2; exit code 1 when a target is missed
    python scripts/benchmark_default.py --full --json docs/default.json   # Omniglot's 20 official one-shot runs too

Every seed is a run of `python train.py` by itself. `docs/default.json` is what README.md shows (scripts/readme.py).
"""

import argparse
import json
import os
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
OMNIGLOT_TARGET = 8.0  # percent: Koch, Zemel and Salakhutdinov 2015


def run(*overrides: str) -> tuple[dict[str, float], float]:
    """The figures of one `python train.py`, and its wall seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"paths.output_dir={folder}/run", "logger.tags=[benchmark]", *overrides]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(Path(folder, "run", "metrics.json").read_text()), seconds


def row(name: str, value: float, target: float | None = None, unit: str = "") -> dict:
    print(f"{name:44}{value:10.4f} {unit:4}" + (f"  target {target}" if target is not None else ""), flush=True)
    return {"name": name, "value": round(value, 4), "target": target, "unit": unit}


def measure(full: bool) -> list[dict]:
    rows, runs = [], []
    for seed in SEEDS:
        figures, seconds = run(f"seed={seed}")
        runs.append((figures, seconds))
        rows += [row(f"glyphs seed {seed} {name}", figures[f"test/{name}"]) for name in SHOWN]
        rows.append(row(f"glyphs seed {seed} command to prompt", seconds, unit="s"))
    for prefix in ("raw", "untrained", "test"):
        for name in SHOWN:
            values = [figures[f"{prefix}/{name}"] for figures, _ in runs]
            rows.append(row(f"glyphs {prefix} {name}", statistics.mean(values), TARGETS.get(name) if prefix == "test" else None))
    rows.append(row("glyphs command to prompt", statistics.median(seconds for _, seconds in runs), SECONDS, "s"))
    if full:
        figures, seconds = run("experiment=omniglot_semihard")
        rows.append(row("omniglot conv4 semihard omniglot_error", figures["test/omniglot_error"], OMNIGLOT_TARGET, "%"))
        rows.append(row("omniglot conv4 semihard oneshot_20way", figures["test/oneshot_20way"]))
        rows.append(row("omniglot conv4 semihard command to prompt", seconds, unit="s"))
    return rows


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target; of an error rate, a percentage of errors or seconds, less is better."""
    from siamese.evaluation import higher_is_better

    out = []
    for entry in rows:
        figure = entry["name"].rpartition(" ")[2]
        more = higher_is_better(figure) and entry["unit"] != "s"
        if entry["target"] is not None and (entry["value"] < entry["target"] if more else entry["value"] > entry["target"]):
            out.append(f"{entry['name']}: {entry['value']} misses {entry['target']} {entry['unit']}")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="Omniglot too, some minutes more")
    arguments = parser.parse_args()
    measured = measure(arguments.full)
    if arguments.json:
        from siamese.record import write_json

        write_json(Path(arguments.json), measured)
    for line in (failures := missed(measured)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
