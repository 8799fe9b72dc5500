"""What a step costs as ranks grow: gathering embeddings, mining, and the loss of the whole batch, which every rank computes.

    python scripts/benchmark_ranks.py --check               # 1, 2 and 4 ranks on this machine's processors
    python scripts/benchmark_ranks.py --full --page         # larger batches too; writes docs/ranks.json and docs/ranks.md

128 random embeddings of size 512 a rank, 4 of each class, one thread a rank; medians. For 8 and 64 GPUs nothing is measured: the
page says by which formula it reckons.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from pytorch_metric_learning.distances import CosineSimilarity

from siamese.config import ROOT
from siamese.losses import NTXentLoss
from siamese.miners import NegativePerPairMiner
from siamese.record import write_json

BATCH, SIZE, REPEATS = 128, 512, 15
RANKS = (1, 2, 4)
SIZES, LARGER = (128, 256, 512, 1024), (2048, 4096)
# Of a GPU: what it computes and sends in a second, and what an image costs a ResNet-50, forward and backward, at 224 x 224.
FLOPS, BYTES, IMAGE = 50e12, 50e9, 3 * 4.1e9 * 2
RATIO = 6.0  # of mining and loss to the products, at 1,024, the check allows


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.nn.functional.normalize(torch.randn(size, SIZE, generator=torch.Generator().manual_seed(0)))
    return embeddings.requires_grad_(), torch.arange(size) // 4


def milliseconds(*works: Callable[[], object]) -> list[float]:
    """The median of each, all of them once in every round."""
    taken = [[] for _ in works]
    for _ in range(REPEATS + 1):
        for times, one in zip(taken, works, strict=True):
            if dist.is_initialized():
                dist.barrier()
            started = time.perf_counter()
            one()
            times.append(1000 * (time.perf_counter() - started))
    return [statistics.median(times[1:]) for times in taken]  # the first round warms up


def parts(size: int) -> dict[str, Callable[[], object]]:
    """What a rank does with the whole batch; `product` is the three products of matrices that no pair loss is without."""
    embeddings, labels = batch(size)
    miner, loss = NegativePerPairMiner("semihard", distance=CosineSimilarity()), NTXentLoss(distance=CosineSimilarity())
    return {
        "product": lambda: (embeddings @ embeddings.T).sum().backward(),
        "mining": lambda: miner(embeddings.detach(), labels),
        "loss": lambda: loss(embeddings, labels).backward(),
    }


def one_rank(out: Path) -> None:
    """Under torchrun: the same, and the gathering of the ranks' parts with its way back."""
    warnings.filterwarnings("ignore", ".*functional.all_gather.*")  # what Lightning's gathering with a gradient is
    dist.init_process_group("gloo")
    mine, _ = batch(BATCH)
    works = {
        "gather": lambda: sum(part.sum() for part in torch.distributed.nn.functional.all_gather(mine)).backward(),
        **parts(BATCH * dist.get_world_size()),
    }
    found = dict(zip(works, milliseconds(*works.values()), strict=True))
    if dist.get_rank() == 0:
        write_json(out, found)
    dist.destroy_process_group()


def on_ranks(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        subprocess.run([*torchrun, __file__, "--rank", str(out)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text())


def page(rows: list[dict]) -> str:
    value = {row["name"]: row["value"] for row in rows}
    lines = ["| ranks | batch | gather | mining | loss |", "| ---: | ---: | ---: | ---: | ---: |"]
    for count in RANKS:
        cells = " | ".join(f"{value[f'{count} ranks {what}']:.1f} ms" for what in ("gather", "mining", "loss"))
        lines.append(f"| {count} | {BATCH * count} | {cells} |")
    ranks = "\n".join(lines)
    lines = ["| batch | three products | mining | loss | (mining + loss) / products |", "| ---: | ---: | ---: | ---: | ---: |"]
    for size in (*SIZES, *LARGER):
        product, mining, loss = (value[f"batch {size} {what}"] for what in ("product", "mining", "loss"))
        lines.append(f"| {size} | {product:.1f} ms | {mining:.1f} ms | {loss:.1f} ms | {(mining + loss) / product:.1f} |")
    batches, last = "\n".join(lines), LARGER[-1]
    ratio = (value[f"batch {last} mining"] + value[f"batch {last} loss"]) / value[f"batch {last} product"]
    lines = ["| GPUs | batch | sent a step | its time | mining and loss | matrix of all pairs | encoder |", "| ---: " * 7 + "|"]
    encoder = BATCH * IMAGE / FLOPS
    for count in (8, 64):
        size = BATCH * count
        sent = 3 * size * SIZE * 4  # gathered once, and twice its size summed up on the way back
        loss = ratio * 6 * size**2 * SIZE / FLOPS
        lines.append(
            f"| {count} | {size:,} | {sent / 1e6:.1f} MB | {1000 * sent / BYTES:.2f} ms | {1000 * loss:.1f} ms | "
            f"{size**2 * 4 / 2**20:,.0f} MiB | {1000 * encoder:.0f} ms |"
        )
    even = (encoder * FLOPS / (6 * ratio * SIZE)) ** 0.5
    return f"""# What a step costs as ranks grow

Every rank embeds its {BATCH} samples; the embeddings, of size {SIZE}, are gathered, and each rank mines and computes the loss of the
whole batch. That is what makes the gradients those of one process, and it is the part that does not get cheaper with more
ranks: the loss of B samples is a product of B x B. Written by `python scripts/benchmark_ranks.py --full --page`.

## Measured

On processors (gloo, {os.cpu_count()} cores for all ranks, so that four of them wait for each other), one thread a rank, semi-hard
mining and NT-Xent on batches of 4 of each class:

{ranks}

One process, larger batches; the products are the similarity matrix and its gradient, without which no loss of pairs is:

{batches}

## Reckoned

For GPUs that compute {FLOPS / 1e12:.0f} TFLOP/s and send {BYTES / 1e9:.0f} GB/s, with a ResNet-50 on 224 x 224 (4.1 G
multiply-adds an image): sent is 3 B D 4 bytes; mining and loss are {ratio:.1f} x 6 B^2 D operations, the ratio at {last:,} above.

{chr(10).join(lines)}

Mining and loss take as long as the encoder at B = sqrt({BATCH} E / (6 r D)) = {even:,.0f} samples, {even / BATCH:.0f} GPUs,
and a tenth of it at {even / 10**0.5:,.0f}, {even / 10**0.5 / BATCH:.0f} GPUs; E is what an image costs, so with a light encoder
it is sooner. From there on more ranks buy little, and a larger batch is not what is missing:

- a cross-batch memory (`loss=xbm`) gives as many negatives to a small batch, at B x memory instead of B x B;
- a loss with a weight for each class (`loss=arcface`, `proxy_anchor`) is B x classes, and needs no large batch;
- `sampling=pairs` or `triplets` mine nothing: their loss is of B tuples.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="batches of 2,048 and 4,096 too")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--page", action="store_true", help="write docs/ranks.json and docs/ranks.md; with --full")
    parser.add_argument("--rank", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank:
        one_rank(arguments.rank)
        return 0
    if arguments.page and not arguments.full:
        parser.error("--page shows the larger batches: say --full --page")
    rows = []
    for count in RANKS:
        rows += [{"name": f"{count} ranks {what}", "value": ms, "target": None, "unit": "ms"} for what, ms in on_ranks(count).items()]
    for size in (*SIZES, *(LARGER if arguments.full else ())):
        found = dict(zip(parts(size), milliseconds(*parts(size).values()), strict=True))
        rows += [{"name": f"batch {size} {what}", "value": ms, "target": None, "unit": "ms"} for what, ms in found.items()]
        if size == 1024:
            ratio = (found["mining"] + found["loss"]) / found["product"]
            rows.append({"name": "mining and loss / products", "value": ratio, "target": RATIO, "unit": "ratio"})
    missed = [row for row in rows if row["target"] is not None and row["value"] > row["target"]]
    for row in rows:
        target = "" if row["target"] is None else f"   target {row['target']}{'   MISSED' if row in missed else ''}"
        print(f"{row['name']:28} {row['value']:10.2f} {row['unit']}{target}")
    if arguments.page:
        arguments.json = arguments.json or ROOT / "docs" / "ranks.json"
        (ROOT / "docs" / "ranks.md").write_text(page(rows))
    if arguments.json:
        write_json(arguments.json, rows)
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
