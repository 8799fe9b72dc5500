"""What feeding costs: decoding, batches, the start of an epoch, and the search for leakage, beside what cannot be done without.

    python scripts/benchmark_data.py --check               # exit code 1 when a target is missed
    python scripts/benchmark_data.py --full --json data.json   # pytorch-metric-learning's sampler too, and leakage among 60,000 images

Ours and the other in turn, medians, by the clock on the wall, as decoding uses every processor. Photos are made up: 256 x 256
JPEGs of smooth noise. A training step is that of `python train.py`: augmentation, four convolution blocks, supcon, AdamW; the
other takes the same steps on one batch that is held in memory. Omniglot is looked for in SIAMESE_DATA_DIR.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.samplers import MPerClassSampler

from siamese.bundle import Standardize
from siamese.data.augmentation import Augment
from siamese.data.glyphs import Glyphs
from siamese.data.images import Images
from siamese.data.leakage import duplicates
from siamese.data.omniglot import Omniglot
from siamese.data.samples import Samples
from siamese.data.sampling import BalancedBatchSampler, balanced
from siamese.encoders import Conv4
from siamese.record import write_json

CLASSES, ITEMS = 100_000, 500_000


def seconds(*works: Callable[[], object], repeats: int = 5) -> list[float]:
    """The median time of each, all of them once in every round."""
    taken = [[] for _ in works]
    for _ in range(repeats):
        for times, work in zip(taken, works, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def row(name: str, value: float, target: float | None = None, unit: str = "x") -> dict:
    print(f"{name:84}{value:12.4g} {unit:4}" + (f"  target {target:g}" if target is not None else ""), flush=True)
    return {"name": name, "value": value, "target": target, "unit": unit}


def noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth images of many colours, uint8 [count, 3, size, size]."""
    generator, images = torch.Generator().manual_seed(seed), torch.empty(count, 3, size, size, dtype=torch.uint8)
    for some in torch.arange(count).split(1024):
        coarse = torch.rand(len(some), 3, 6, 6, generator=generator)
        images[some] = (torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return images


def decoding(folder: Path, count: int) -> list[dict]:
    files = []
    for place, image in enumerate(noise(count, 256)):
        files.append(folder / "photos" / f"class{place // 10:04d}" / f"{place % 10}.jpg")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1], quality=90)

    def bare(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))

    def all_bare() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            np.stack(list(pool.map(bare, files)))

    def read(cache: bool = False) -> list[Samples]:
        source = Images(folder / "photos", cache=cache)
        return [source.split(name) for name in ("train", "val", "test")]

    whole = [samples.inputs.numpy() for samples in read()]
    ours, plain = seconds(read, all_bare, repeats=3)
    read(cache=True)
    again, copied = seconds(lambda: read(cache=True), lambda: [part.copy() for part in whole])
    return [
        row(f"{count:,} photos read: ours / open, convert, resize", ours / plain, 1.1),
        row("photos read", count / ours, unit="/s"),
        row("photos from the cache", count / again, unit="/s"),
        row("the same images copied in memory", count / copied, unit="/s"),
        row("reading them again: from the cache / decoding", again / ours, 0.2),
    ]


def steps(samples: Samples) -> Iterator[Callable[[], None]]:
    """A training step on a fresh batch, and one on a batch held in memory, for as many steps as an epoch has."""
    torch.manual_seed(0)
    loader = balanced(samples, seed=0)
    model = torch.nn.Sequential(Standardize([0.1], [0.3]), Conv4(tuple(samples.inputs.shape[1:])))
    loss, augment, generator = SupConLoss(), Augment(rotation=6, scale=0.05, shear=0.2, shift=0.03), torch.Generator()
    optimizer = torch.optim.AdamW(model.parameters())

    def learn(batch) -> None:
        optimizer.zero_grad()
        loss(model(augment(batch.inputs, generator)), batch.labels).backward()
        optimizer.step()

    held, batches = next(iter(loader)), iter(loader)
    for _ in range(len(loader)):
        yield lambda: learn(next(batches))
        yield lambda: learn(held)


def training(name: str, samples: Samples, count: int) -> dict:
    taken = [], []
    while len(taken[1]) < count:
        for place, step in enumerate(islice(steps(samples), 2 * (count - len(taken[1])))):
            started = time.perf_counter()
            step()
            taken[place % 2].append(time.perf_counter() - started)
    # Noise only adds: the lower half of the times tells what the work takes.
    fresh, held = (statistics.median(sorted(times)[: len(times) // 2]) for times in taken)
    return row(f"{name}: a training step / on a batch held in memory", fresh / held, 1.05)


def epochs(classes: int, items: int, full: bool) -> list[dict]:
    labels = torch.arange(items) % classes
    sampler = BalancedBatchSampler(labels, 32, 4, seed=0)
    (start,) = seconds(lambda: next(iter(sampler)))
    rows = [row(f"{items:,} items of {classes:,} classes: an epoch starts in", start, 0.1, "s")]
    if full:
        theirs = MPerClassSampler(labels, 4, 128, items)
        (other,) = seconds(lambda: next(iter(theirs)), repeats=1)
        rows.append(row("its start / that of pytorch-metric-learning's MPerClassSampler", start / other, 0.01))
    return rows


def leakage(sizes: tuple[int, ...]) -> list[dict]:
    """How long it takes to search these many images of training for a quarter as many, of which a tenth are darker copies."""
    rows, taken = [], []
    for count in sizes:
        left, right = noise(count, 64), noise(count // 4, 64, seed=1)
        planted = torch.arange(0, len(right), 10)
        right[planted] = (left[planted].float() * 0.9).to(torch.uint8)
        started = time.perf_counter()
        found = duplicates(left, right)
        taken.append(time.perf_counter() - started)
        hits = int((found.left == found.right).sum())
        rows.append(row(f"leakage between {count:,} and {count // 4:,} images of 64 x 64", taken[-1], unit="s"))
        rows.append(row(f"planted ones of {count // 4:,} that are missed", 1 - hits / len(planted), 0.05, ""))
        rows.append(row(f"others that are found, of {count // 4:,}", (len(found.left) - hits) / max(len(found.left), 1), 0.05, ""))
    for one, other, small, large in zip(taken, taken[1:], sizes, sizes[1:], strict=False):
        rows.append(row(f"time an image, {large:,} / {small:,}", other / large / (one / small), 2.0))
    return rows


def measure(full: bool, photos: int = 1_000, count: int = 120, items: int = ITEMS, sizes: tuple[int, ...] = (5_000, 20_000)) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        data, os.environ["SIAMESE_DATA_DIR"] = os.environ.get("SIAMESE_DATA_DIR", "data"), folder
        try:
            rows = decoding(Path(folder), photos)
        finally:
            os.environ["SIAMESE_DATA_DIR"] = data
    rows.append(training("glyphs", Glyphs().split("train"), count))
    if Path(data, "omniglot").is_dir():
        rows.append(training("Omniglot", Omniglot(Path(data, "omniglot"), background="small1").split("train"), count))
    else:
        print(f"Omniglot is not in {data}: its steps are not measured")
    return [*rows, *epochs(CLASSES * items // ITEMS, items, full), *leakage((*sizes, 60_000) if full else sizes)]


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target: less is better in all of them."""
    kept = [entry for entry in rows if entry["target"] is not None]
    return [f"{e['name']}: {e['value']:g} misses {e['target']:g} {e['unit']}" for e in kept if e["value"] > e["target"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="pytorch-metric-learning's sampler, and leakage among 60,000 images")
    arguments = parser.parse_args()
    measured = measure(arguments.full)
    if arguments.json:
        write_json(Path(arguments.json), measured)
    for line in (failures := missed(measured)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
