"""What mining and the pair losses cost, beside pytorch-metric-learning's (PML's) own, on one thread of the CPU.

    python scripts/benchmark_mining.py --check                      # exit code 1 when a target is missed
    python scripts/benchmark_mining.py --full --json docs/mining.json   # larger classes, other distances and batch sizes too

A batch has 4 inputs of each class and random unit embeddings of size 128. Times are medians, ours and PML's taken in turn in
one process; memory is the peak above what a fresh process held before, of a loss with its backward pass. PML's losses are run
at half the batch, where they need up to 9 GB already. Linux only: the peak is read from /proc.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner

from siamese import losses
from siamese.distances import LearnedDistance
from siamese.miners import HARDNESSES, NegativePerPairMiner
from siamese.record import write_json

BATCH, LARGE, HALF = 1024, 4096, 512
FASTER, SECONDS, MIB = 10.0, 1.0, 200.0
LOSSES = ("NTXentLoss", "LiftedStructureLoss")
DISTANCES = {"cosine": CosineSimilarity, "euclidean": LpDistance, "learned": lambda: LearnedDistance(128)}


def work(what: str, ours: bool, size: int, per_class: int = 4, distance: str = "cosine") -> Callable[[], object]:
    """One mining of the hardness `what`, or one forward and backward pass of the loss `what`, on a batch of its own."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(size, 128, generator=generator))
    labels, options = torch.arange(size) // per_class, {"distance": DISTANCES[distance]()}
    if what in HARDNESSES:
        miner = NegativePerPairMiner(what, **options) if ours else TripletMarginMiner(type_of_triplets=what, **options)
        return lambda: miner(embeddings, labels)
    loss = getattr(losses if ours else pml, what)(**options)
    embeddings.requires_grad_()
    return lambda: loss(embeddings, labels).backward()


def milliseconds(*works: Callable[[], object], repeats: int) -> list[float]:
    """The median of each, all of them once in every round."""
    taken = [[] for _ in works]
    for _ in range(repeats + 1):
        for times, one in zip(taken, works, strict=True):
            started = time.perf_counter()
            one()
            times.append(1000 * (time.perf_counter() - started))
    return [statistics.median(times[1:]) for times in taken]  # the first round warms up


def print_peak(what: str, ours: bool, size: int) -> None:
    """MiB that one piece of work takes on top of what this process, warmed up, holds."""

    def held(name: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

    work(what, ours, 16)()
    before, one = held("VmRSS"), work(what, ours, size)
    one()
    print(held("VmHWM") - before)


def peak(what: str, ours: bool, size: int) -> float:
    command = [sys.executable, __file__, "--peak", what, "ours" if ours else "pml", str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def row(name: str, value: float, target: float | None = None, unit: str = "") -> dict:
    print(f"{name:52}{value:10.2f} {unit:4}" + (f"  target {target}" if target is not None else ""), flush=True)
    return {"name": name, "value": round(value, 4), "target": target, "unit": unit}


def mining(per_class: int = 4, distance: str = "cosine", target: float | None = FASTER) -> list[dict]:
    rows, label = [], f"B={BATCH} K={per_class} {distance}"
    for hardness in HARDNESSES:
        both = [work(hardness, ours, BATCH, per_class, distance) for ours in (True, False)]
        ours, theirs = milliseconds(*both, repeats=3)
        rows.append(row(f"{hardness} {label} ours", ours, unit="ms"))
        rows.append(row(f"{hardness} {label} PML", theirs, unit="ms"))
        rows.append(row(f"{hardness} {label} PML / ours", theirs / ours, target, "x"))
    return rows


def measure(full: bool) -> list[dict]:
    rows = mining()
    for hardness in HARDNESSES:
        (taken,) = milliseconds(work(hardness, True, LARGE), repeats=3)
        rows.append(row(f"{hardness} B={LARGE} K=4 cosine ours", taken / 1000, SECONDS, "s"))
        rows.append(row(f"{hardness} B={BATCH} ours memory", peak(hardness, True, BATCH), unit="MiB"))
        rows.append(row(f"{hardness} B={BATCH} PML memory", peak(hardness, False, BATCH), unit="MiB"))
    for loss in LOSSES:
        for ours, size in ((True, BATCH), (True, HALF), (False, HALF)):
            name, (taken,) = f"{loss} B={size} {'ours' if ours else 'PML'}", milliseconds(work(loss, ours, size), repeats=3 if ours else 1)
            rows.append(row(name, taken, unit="ms"))
            rows.append(row(f"{name} memory", peak(loss, ours, size), MIB if size == BATCH else None, "MiB"))
    if full:
        rows += mining(distance="euclidean", target=None) + mining(distance="learned", target=None) + mining(per_class=32, target=None)
        for per_class in (16, 64):
            (taken,) = milliseconds(work("semihard", True, LARGE, per_class), repeats=1)
            rows.append(row(f"semihard B={LARGE} K={per_class} cosine ours", taken / 1000, unit="s"))
        for loss in LOSSES:
            (taken,) = milliseconds(work(loss, True, LARGE), repeats=1)
            rows.append(row(f"{loss} B={LARGE} ours", taken, unit="ms"))
            rows.append(row(f"{loss} B={LARGE} ours memory", peak(loss, True, LARGE), unit="MiB"))
    return rows


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target; of times and memory less is better, of "times as fast" more."""
    out = []
    for entry in rows:
        value, target = entry["value"], entry["target"]
        if target is not None and (value < target if entry["unit"] == "x" else value > target):
            out.append(f"{entry['name']}: {value} misses {target} {entry['unit']}")
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="more sizes and distances, some minutes more")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        what, whose, size = arguments.peak
        sys.exit(print_peak(what, whose == "ours", int(size)))
    measured = measure(arguments.full)
    if arguments.json:
        write_json(Path(arguments.json), measured)
    for line in (failures := missed(measured)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
