"""What training costs beside a loop that does only the arithmetic, and beside the usual recipe.

    python scripts/benchmark_training.py --check                              # a few minutes; exit code 1 when a target is missed
    python scripts/benchmark_training.py --full --json docs/training.json     # and the minutes of a whole run on Omniglot
    python scripts/benchmark_training.py --gpu --json docs/training_gpu.json  # two minutes of a GPU: ResNet-50 at 224 pixels

A step is one of `python train.py loss=triplet miner=semihard`, conv4 on letters, 32 classes x 4: batch, augmentation, encoder, miner,
loss, optimizer, schedule. Times of steps are CPU seconds of one thread, in turn with what they are compared with, and medians; all
others wall time, on a GPU until it has done what it was given.
`docs/training.json` is what README.md shows (scripts/readme.py).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_default import ROOT, row, run

ROUNDS, STEPS = 15, 10
COMMAND = ["loss=triplet", "miner=semihard", "test=false", "check=off", "leakage=off", "logger=none"]
# Percent on the authors' twenty runs, which is what people err (Lake et al. 2015), and minutes on two cores.
ERROR, MINUTES = 4.5, 3.0


def assembled(*overrides: str):
    """(config, data, module), as `train.py` makes them, ready to be trained."""
    import lightning.pytorch as L

    from siamese.config import compose
    from train import assemble

    config = compose([*COMMAND, *overrides])
    L.seed_everything(config["seed"], verbose=False)
    data, module, _ = assemble(config)
    return config, data, module


def bare(data, module, device: str = "cpu", bf16: bool = False, ahead: bool = False):
    """The same steps without Lightning, logging and the health of the space: a generator, each `next` is one of them.

    Batches are made when they are asked for; with `ahead` by a thread, in pinned memory, as those of a run on a GPU are.
    """
    import itertools

    import torch

    from siamese.data.module import Ahead

    loader = Ahead(data._training_loader) if ahead else data._training_loader
    module.to(device).train()
    optimizer = module.grouped_optimizer()
    schedule = module.scheduled(optimizer, 10**6) if module.make_scheduler else None
    generator = torch.Generator().manual_seed(0)
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            batch = data.transfer_batch_to_device(batch, torch.device(device), 0)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                embeddings = module.model(module.augmented(batch, generator))
            loss = module.loss(embeddings, batch.labels, module.miner(embeddings, batch.labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            yield


def in_turn(device: str, *overrides: str, ahead: bool = False) -> tuple[float, float]:
    """Seconds of a step of the whole system and of the bare loop, which has its batches `ahead` or not.

    In one process: after every few steps of the trainer as many of the bare loop, within a callback whose time does not count.
    """
    import torch
    from lightning.pytorch.callbacks import Callback

    from train import make_trainer

    def clock() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    class InTurn(Callback):
        def __init__(self, loop):
            self.loop, self.times, self.started, self.steps = loop, ([], []), None, 0

        def on_train_batch_start(self, trainer, *_):
            if self.started is None:
                self.started = clock()

        def on_train_batch_end(self, trainer, *_):
            self.steps += 1
            if self.steps % STEPS:
                return
            self.times[0].append(clock() - self.started)
            before = clock()
            for _ in range(STEPS):
                next(self.loop)
            self.times[1].append(clock() - before)
            self.started = clock()
            trainer.should_stop = len(self.times[0]) > ROUNDS

    _, other, same = assembled(*overrides)
    with tempfile.TemporaryDirectory() as folder:
        long = ("trainer.max_epochs=1000", "trainer.check_val_every_n_epoch=1000", f"paths.output_dir={folder}")
        config, data, module = assembled(*overrides, *long)
        trainer, _ = make_trainer(config, {}, module.model.encoder)
        watch = InTurn(bare(other, same, device, trainer.precision == "bf16-mixed", ahead))
        trainer.callbacks.append(watch)  # the last: what the others do is counted
        trainer.fit(module, data)
    ours, theirs = (statistics.median(times[1:]) / STEPS for times in watch.times)
    return ours, theirs


def beside_bare() -> list[dict]:
    import torch

    torch.set_num_threads(1)
    ours, theirs = in_turn("cpu")
    return [
        row("step of the bare loop", 1000 * theirs, unit="ms"),
        row("step of the whole system", 1000 * ours, unit="ms"),
        row("step of the whole system / of the bare loop", ours / theirs, 1.10),
    ]


def on_gpu(*overrides: str, size: int = 224, classes: int = 60, each: int = 40) -> list[dict]:
    """A large encoder on made-up photos that are held in memory, 19 batches an epoch: CUB-200 has 45."""
    import numpy as np
    import torch
    from PIL import Image

    if not torch.cuda.is_available():
        sys.exit("error: --gpu: this machine has no GPU that torch can use")
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range((classes + 4) * each):
            place = Path(folder, f"{number % (classes + 4):03}", f"{number}.jpg")
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(draw.integers(256, size=(size // 8, size // 8, 3), dtype=np.uint8)).resize((size, size)).save(place)
        photos = ["dataset=images", f"dataset.path={folder}", f"dataset.size={size}", "dataset.cache=false", "augmentation=photo"]
        photos += ["dataset.val=['000','001']", "dataset.test=['002','003']"]
        words = ["trainer=gpu", *photos, "encoder=timm", "encoder.model=resnet50", *overrides]
        (ours, theirs), (again, thread) = (in_turn("cuda", *words, ahead=ahead) for ahead in (False, True))
    batch = 32 * 4
    return [
        row("samples a second of the bare loop", batch / theirs),
        row("samples a second of the whole system", batch / ours),
        row("samples a second of the whole system / of the bare loop", theirs / ours, 0.95),
        row("samples a second of the bare loop with a thread that makes its batches", batch / thread),
        row("samples a second of the whole system beside it", batch / again),
        row("samples a second of the whole system / of the bare loop with a thread", thread / again),
    ]


def whole(seconds: float) -> float:
    """Samples a second of the whole system, after as long again of warming up."""
    from lightning.pytorch.callbacks import Callback

    from train import make_trainer

    class Watch(Callback):
        started, samples = None, 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            now = time.perf_counter()
            self.begun = getattr(self, "begun", now)
            if self.started is None:
                self.started = now if now - self.begun > seconds else None
            else:
                self.samples, self.ended = self.samples + len(batch.labels), now
                trainer.should_stop = now - self.started > seconds

    with tempfile.TemporaryDirectory() as folder:
        config, data, module = assembled("trainer.max_epochs=1000", "trainer.check_val_every_n_epoch=1000", f"paths.output_dir={folder}")
        trainer, _ = make_trainer(config, {}, module.model.encoder)
        trainer.callbacks.append(watch := Watch())
        trainer.fit(module, data)
    return watch.samples / (watch.ended - watch.started)


def naive(seconds: float) -> float:
    """Likewise of the usual recipe: images are augmented one by one, by torchvision in worker processes; all in float32, channels first."""
    import torch
    from pytorch_metric_learning import distances, losses, miners, samplers
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from siamese.data.glyphs import Glyphs

    samples = Glyphs().split("train")

    class Letters(Dataset):
        transform = v2.Compose([v2.ToPILImage(), v2.RandomAffine(6, (0.03, 0.03), (0.95, 1.05), (-11, 11, -11, 11)), v2.ToImage()])
        scaled = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.2], [0.35])])

        def __len__(self):
            return len(samples)

        def __getitem__(self, index):
            return self.scaled(self.transform(samples.inputs[index])), int(samples.labels[index])

    layers, before = [], 1
    for after in (32, 64, 64, 64):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        before = after
    encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 64))
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-3, weight_decay=5e-3)
    distance = distances.CosineSimilarity()
    miner, loss = miners.TripletMarginMiner(0.2, "semihard", distance=distance), losses.TripletMarginLoss(0.2, distance=distance)
    sampler = samplers.MPerClassSampler(samples.labels, 4, 128, length_before_new_iter=10**6)
    started, done = None, 0
    begun = time.perf_counter()
    for images, labels in DataLoader(Letters(), 128, sampler=sampler, num_workers=os.cpu_count()):
        embeddings = encoder(images)
        optimizer.zero_grad()
        loss(embeddings, labels, miner(embeddings, labels)).backward()
        optimizer.step()
        now = time.perf_counter()
        if started is None:
            started = now if now - begun > seconds else None
        else:
            done += len(labels)
            if now - started > seconds:
                return done / (now - started)


def beside_naive(rounds: int = 3, seconds: float = 8.0) -> list[dict]:
    found = {"whole": [], "naive": []}
    for _ in range(rounds):
        for name, rates in found.items():
            command = [sys.executable, __file__, "--alone", name, str(seconds)]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
            )
            if done.returncode:
                sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            rates.append(float(done.stdout.split()[-1]))
    ours, theirs = (statistics.median(rates) for rates in found.values())
    return [
        row("samples a second of the usual recipe", theirs),
        row("samples a second of the whole system", ours),
        row("samples a second of the whole system / of the usual recipe", ours / theirs, 3.0),
    ]


def validating() -> list[dict]:
    """Of a default run: what judging after epochs takes."""
    from lightning.pytorch.callbacks import Callback

    from train import make_trainer

    class Watch(Callback):
        seconds = 0.0

        def on_validation_start(self, *_):
            self.started = time.perf_counter()

        def on_validation_end(self, *_):
            self.seconds += time.perf_counter() - self.started

    with tempfile.TemporaryDirectory() as folder:
        config, data, module = assembled("loss=supcon", "miner=none", f"paths.output_dir={folder}")
        trainer, _ = make_trainer(config, {}, module.model.encoder)
        trainer.callbacks.insert(0, watch := Watch())
        started = time.perf_counter()
        trainer.fit(module, data)
        share = watch.seconds / (time.perf_counter() - started)
    return [row("validation's share of a default run's training", share, 0.10)]


def from_command_to_prompt(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict]:
    """Whole commands; the error is of the authors' twenty runs, the mean of the seeds."""
    runs = {seed: run("experiment=omniglot_quick", f"seed={seed}") for seed in seeds}
    errors = {seed: figures["test/omniglot_error"] for seed, (figures, *_) in runs.items()}
    return [
        *(row(f"omniglot_quick: error of seed {seed}", error, unit="%") for seed, error in errors.items()),
        row("omniglot_quick: error", statistics.mean(errors.values()), ERROR, "%"),
        row("omniglot_quick: minutes", statistics.median(seconds for _, seconds, _ in runs.values()) / 60, MINUTES, "min"),
    ]


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target: at least that of the samples a second, at most that of all else."""
    wrong = lambda entry: entry["value"] < entry["target"] if "samples" in entry["name"] else entry["value"] > entry["target"]  # noqa: E731
    late = [entry for entry in rows if entry["target"] is not None and wrong(entry)]
    return [f"{entry['name']}: {entry['value']:g} misses {entry['target']:g} {entry['unit']}" for entry in late]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="Omniglot too, ten minutes more")
    parser.add_argument("--gpu", action="store_true", help="only ResNet-50 on a GPU")
    parser.add_argument("--alone", nargs=2, metavar=("WHICH", "SECONDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print({"whole": whole, "naive": naive}[arguments.alone[0]](float(arguments.alone[1])))
        sys.exit()
    if arguments.gpu:
        rows = on_gpu()
    else:
        rows = [*beside_bare(), *beside_naive(), *validating(), *(from_command_to_prompt() if arguments.full else ())]
    if arguments.json:
        from siamese.record import write_json

        write_json(Path(arguments.json), rows)
    for line in (failures := missed(rows)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
