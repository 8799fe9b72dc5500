"""The LightningDataModule: a source's splits, and the loaders that cut them into batches."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from siamese.data import sampling
from siamese.data.samples import Batch, Samples, Source

_BATCH = 512


class Ahead:
    """A loader's batches for a GPU, each made by a thread while the one before is computed, its inputs in pinned memory.

    What is not pinned a GPU fetches only when it has done all that it was given, and stands still meanwhile.
    """

    def __init__(self, loader: DataLoader):
        self.loader, self.sampler = loader, loader.sampler  # whose epoch the trainer sets

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        # A thread begins with the first GPU, where a process that has another one would take memory too.
        mine = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else ()

        def pinned() -> Batch | None:
            batch = next(batches, None)
            return batch and batch._replace(inputs=batch.inputs.pin_memory())

        with ThreadPoolExecutor(1, "batches", *mine) as thread:
            coming = thread.submit(pinned)
            while batch := coming.result():
                coming = thread.submit(pinned)
                yield batch


class SiameseData(L.LightningDataModule):
    """Splits are read when first asked for: a run with `test=false` never touches the test split.

    A split may be without labels if it lists pairs or triplets; training's also if the loader has a list of them.

    Args:
        source: where the splits come from.
        loader: makes the training loader, `loader(samples=..., seed=...)`: one of `siamese.data.sampling`.
        seed: of the batches.
        val_classes: so many classes of `val`, the same in every run, are judged after each epoch; None for all.

    Raises:
        ValueError: when a split is asked for that judging needs the labels of, and it has none; or there are not so many classes.
    """

    def __init__(self, source: Source, loader: Callable[..., DataLoader], seed: int = 0, val_classes: int | None = None):
        super().__init__()
        self.source, self.loader, self.seed, self.val_classes = source, loader, seed, val_classes

    @cached_property
    def train(self) -> Samples:
        return self.source.split("train")

    @cached_property
    def val(self) -> Samples:
        return self._judged("val")

    @cached_property
    def test(self) -> Samples:
        return self._judged("test")

    @cached_property
    def watched(self) -> Samples:
        """What is judged after each epoch: `val`, or its samples of some classes that are the same in every run."""
        if self.val_classes is None:
            return self.val
        if not self.val.labelled:
            raise ValueError(f"val_classes={self.val_classes}, but the val split lists pairs and has no classes: say val_classes=null")
        labels, counts = self.val.labels.unique(return_counts=True)
        if isinstance(self.val_classes, bool) or not isinstance(self.val_classes, int) or not 2 <= self.val_classes <= len(labels):
            raise ValueError(f"val_classes={self.val_classes} must be a whole number from 2 to {len(labels)}, or null for all")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        alone = counts < 2
        for side in self.val.roles():
            alone |= ~torch.isin(labels, self.val.labels[side])
        chosen = labels[order[alone[order].int().argsort(stable=True)][: self.val_classes]]  # classes without a pair come last
        rows = torch.isin(self.val.labels, chosen).nonzero().flatten()
        return self.val.subset(rows)

    def leave_out(self, rows: torch.Tensor) -> None:
        """Train without these rows; classes that have no others are gone too. Only before the training loader is made.

        Raises:
            ValueError: training goes by a list, which may name them.
        """
        if not len(rows):
            return
        if getattr(self.loader, "keywords", {}).get("file"):
            raise ValueError("samples cannot be left out where sampling.file lists them: mend the list, and say leakage=warn")
        kept = torch.ones(len(self.train), dtype=torch.bool)
        kept[rows] = False
        self.train = self.train.subset(kept.nonzero().flatten(), renumber=True)

    def _judged(self, name: str) -> Samples:
        samples = self.source.split(name)
        if not samples.labelled and samples.tuples is None:
            raise ValueError(f"the {name} split has no labels, by which it is judged: only the training split may be without")
        if samples.tuples is None:
            queries, gallery = (samples.labels[rows] for rows in samples.roles())
            counts = gallery.unique(return_counts=True)[1]
            alone = samples.gallery is None and len(counts) and int(counts.max()) < 2
            if len(counts) < 2 or alone or not torch.isin(queries, gallery).any():
                raise ValueError(f"the {name} split has {samples}: judging needs two classes, one of them with two samples")
        if samples.tuples is not None and not (0 < int((same := samples.tuples.pairs().same).sum()) < len(same)):
            raise ValueError(f"the {name} split lists {len(same)} pairs, all of one sort: judging needs pairs that are the same and others")
        return samples

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])

    def preprocessing(self) -> dict:
        """What a `Bundle` does to inputs before it encodes them, as one of its parts."""
        if self.train.kind == "texts":
            return {"_target_": "siamese.bundle.Unchanged"}
        return {"_target_": "siamese.bundle.Standardize", **self.standardization()}

    def standardization(self) -> dict[str, list[float]]:
        """Mean and standard deviation per channel of the training inputs, in the units the encoder sees (0..1 for images)."""
        inputs, size = self.train.inputs, 255 if self.train.inputs.dtype == torch.uint8 else 1
        blocks = inputs.split(max(2**22 // max(inputs[:1].numel(), 1), 1))  # all of it, eight times as wide, may not fit
        flat = lambda block: block.transpose(0, 1).flatten(1).double() / size  # noqa: E731
        count = inputs.numel() / inputs.shape[1]
        mean = sum(flat(block).sum(1) for block in blocks) / count
        square = sum((flat(block) - mean[:, None]).square().sum(1) for block in blocks) / (count - 1)
        return {"mean": mean.tolist(), "std": square.sqrt().clamp(min=1e-6).tolist()}

    def begin_at(self, batch: int) -> None:
        """Leave out so many batches of the epoch that comes first: a run that was cut off has had them."""
        self._training_loader.sampler.begin = batch

    @property
    def _share(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @cached_property
    def _training_loader(self) -> DataLoader:
        return self.loader(samples=self.train, seed=self.seed)

    def setup(self, stage: str | None = None) -> None:
        """Make the training loader, so that what it refuses comes to light before the trainer starts.

        Raises:
            ValueError: nothing is left to train on; what the loader refuses.
        """
        if not len(self.train):
            raise ValueError("the training split has no samples")
        _ = self._training_loader

    def train_dataloader(self) -> "DataLoader | Ahead":
        """The same batches on every rank, each with the rank's own part of the inputs; before there is a trainer, with all of them."""
        self.train.share = self._share
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return Ahead(self._training_loader) if on_gpu else self._training_loader

    def val_dataloader(self) -> list[DataLoader]:
        """The validation samples that are watched, in order, to be embedded; where training brings its own tuples, fixed ones too.

        These are those that it lists, else drawn by the labels, in training's share of positives. Ranks take turns.
        """
        rank, ranks = self._share
        order = torch.arange(len(self.watched))[rank::ranks]
        loaders = [DataLoader(self.watched, sampler=list(order.split(_BATCH)), batch_size=None)]
        training = self._training_loader
        if isinstance(training.dataset, (sampling.PairDataset, sampling.TripletDataset)):
            fixed = training.dataset.like(self.watched)
            batches = list(sampling.InOrder(fixed, training.sampler.batch_size))
            # A rank without any would leave the others waiting for its loss.
            loaders.append(DataLoader(fixed, sampler=batches[rank::ranks] if len(batches) >= ranks else batches, batch_size=None))
        return loaders
