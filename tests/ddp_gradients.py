"""Run by tests/test_ddp.py, by itself and on several ranks: trains each case for three steps in float64 and writes down its gradients.

python tests/ddp_gradients.py FOLDER                              FOLDER/cases.json -> FOLDER/0.pt
torchrun --nproc-per-node 2 tests/ddp_gradients.py FOLDER         FOLDER/cases.json -> FOLDER/0.pt, FOLDER/1.pt
"""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from siamese.config import build, partial
from siamese.data.glyphs import Glyphs
from siamese.data.module import SiameseData
from siamese.data.samples import Source
from siamese.losses import CrossBatchMemory
from siamese.module import SiameseModule

BALANCED = ["sampling.classes=5", "sampling.samples_per_class=3"]  # 15 samples, which neither 2 nor 4 ranks can share evenly
CASES = {
    "triplet x semihard": ["loss=triplet", "miner=semihard", *BALANCED],
    "triplet x distance weighted, euclidean": ["loss=triplet", "miner=distance_weighted", "distance=euclidean", *BALANCED],
    "contrastive": ["loss=contrastive", *BALANCED],
    "multi_similarity with its miner": ["loss=multi_similarity", "miner=multi_similarity", *BALANCED],
    "supcon": ["loss=supcon", *BALANCED],
    "arcface": ["loss=arcface", *BALANCED],
    "proxy_anchor": ["loss=proxy_anchor", *BALANCED],
    "cross-batch memory": ["loss=xbm", "loss.memory_size=40", "miner=semihard", *BALANCED],
    "pairs": ["sampling=pairs", "sampling.batch_size=9", "loss=contrastive"],
    "pairs, bce, learned distance": ["sampling=pairs", "sampling.batch_size=9", "loss=bce", "distance=learned"],
    "triplets": ["sampling=triplets", "sampling.batch_size=7", "loss=triplet"],
    "triplets, fewer than ranks": ["sampling=triplets", "sampling.batch_size=1", "loss=triplet", "loss.margin=2"],
}
OVERRIDES = ["augmentation=strong", "optimizer=sgd", "optimizer.lr=0.05", "scheduler=none", "seed=3"]
STEPS = 3


class Letters(Source):
    """The first 20 of glyphs, in double precision."""

    def split(self, name):
        whole = Glyphs().split(name)
        letters = whole.subset((whole.labels < 20).nonzero().flatten(), renumber=True)
        letters.inputs = letters.inputs.double() / 255
        return letters


class Model(nn.Module):
    """As a `Bundle`, without batch-norm, dropout and a step to single precision."""

    def __init__(self, distance: nn.Module):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(1024, 24), nn.Tanh(), nn.Linear(24, 16))
        self.distance = distance

    def forward(self, inputs):
        return self.encoder(inputs)


class Gradients(Callback):
    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        weights = module.named_parameters()
        self.found.append({name: weight.grad.clone() for name, weight in weights if weight.grad is not None})


def run(config: dict, ranks: int) -> dict:
    L.seed_everything(3, verbose=False)
    data = SiameseData(Letters(), partial(config, "sampling"), config["seed"])
    model = Model(build(config, "distance", embedding_size=16))
    miner = build(config, "miner", distance=model.distance) if config["choices"]["sampling"] == "balanced" else None
    loss = build(config, "loss", distance=model.distance, miner=miner, num_classes=20, embedding_size=16)
    miner = None if isinstance(loss, CrossBatchMemory) else miner
    module = SiameseModule(model, loss, miner, build(config, "augmentation"), partial(config, "optimizer"), seed=3)
    losses, gradients = [], Gradients()
    step = module._step
    module._step = lambda *arguments: losses.append(step(*arguments)) or losses[-1]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="64-true",
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        log_every_n_steps=1,
        callbacks=[gradients],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    memory = {name: buffer.clone() for name, buffer in module.loss.named_buffers()}
    return {"gradients": gradients.found, "losses": torch.stack(losses).detach(), "memory": memory}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())  # composed once, for all ranks
    torch.save({name: run(config, size) for name, config in cases.items()}, folder / f"{rank}.pt")
