"""How pairs and triplets are formed, which decides more than the encoder does.

`balanced` draws P classes x K samples and leaves the tuples to the miner and the loss; `pairs` and `triplets` draw the
tuples themselves. Every draw follows from (seed, epoch) alone: nothing is stored, so a resumed run, or another rank,
knows any epoch's batches.
"""

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from siamese.data.samples import Batch, Samples

log = logging.getLogger(__name__)


def balanced(samples: Samples, seed: int, classes: int = 32, samples_per_class: int = 4) -> DataLoader:
    """Batches of `classes` x `samples_per_class` samples; see `BalancedBatchSampler`."""
    sampler = BalancedBatchSampler(samples.labels, classes, samples_per_class, seed)
    return DataLoader(samples, sampler=sampler, batch_size=None)


def pairs(samples: Samples, seed: int, batch_size: int = 64, positive_fraction: float = 0.5) -> DataLoader:
    """Batches of `batch_size` pairs, so twice as many samples; see `PairDataset`."""
    dataset = PairDataset(samples, positive_fraction, seed)
    return DataLoader(dataset, sampler=_InOrder(dataset, batch_size), batch_size=None)


def triplets(samples: Samples, seed: int, batch_size: int = 42) -> DataLoader:
    """Batches of `batch_size` triplets, so three times as many samples; see `TripletDataset`."""
    dataset = TripletDataset(samples, seed)
    return DataLoader(dataset, sampler=_InOrder(dataset, batch_size), batch_size=None)


class BalancedBatchSampler(Sampler):
    """Batches of P different classes x K samples, as lists of P*K indices, class by class.

    An epoch has ceil(N / (P K)) batches. Classes come equally often, to within one, over any number of epochs; a class
    hands out its samples in a fresh order, each once before any comes again, except that its last group is filled up
    from its first. So every sample comes within ceil(size / K) draws of its class. A class smaller than K repeats samples.

    Args:
        labels: int64 [N].
        classes: P.
        samples_per_class: K.
        seed: with the epoch (`set_epoch`, which Lightning calls) it decides everything.

    Raises:
        ValueError: fewer than P classes, or P < 2, or K < 2.
    """

    def __init__(self, labels: Tensor, classes: int = 32, samples_per_class: int = 4, seed: int = 0):
        labels = np.asarray(labels)
        self.order = np.argsort(labels, kind="stable")  # sample indices, class by class
        _, self.sizes = np.unique(labels, return_counts=True)
        if classes < 2 or samples_per_class < 2:
            raise ValueError(f"sampling.classes={classes} x sampling.samples_per_class={samples_per_class}: both must be at least 2")
        if classes > len(self.sizes):
            raise ValueError(f"sampling.classes={classes}, but there are {len(self.sizes)} training classes: take at most that many")
        if (small := int((self.sizes < samples_per_class).sum())) > 0:
            log.warning("%d of %d classes have fewer than %d samples: they repeat samples", small, len(self.sizes), samples_per_class)
        self.first = np.cumsum(self.sizes) - self.sizes
        self.classes, self.samples_per_class, self.seed, self.epoch = classes, samples_per_class, seed, 0

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.classes * self.samples_per_class))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(self.epoch).tolist()  # lazily: Lightning sets the epoch after it has asked for the iterator

    def batches(self, epoch: int) -> np.ndarray:
        """int64 [batches, P*K]: the whole epoch."""
        total, slots, k = len(self.sizes), len(self) * self.classes, self.samples_per_class
        rng = np.random.default_rng([self.seed, epoch])
        # How often each class was drawn in earlier epochs: all of them `every` times an epoch; the `extra` draws left
        # over move through the classes in one fixed random order.
        every, extra = divmod(slots, total)
        turn = np.random.default_rng(self.seed).permutation(total)
        drawn = epoch * every + np.maximum(-(-(epoch * extra - turn) // total), 0)
        lucky = np.flatnonzero((turn - epoch * extra) % total < extra)

        # The incomplete round first: the rounds after it hold every class, so one can always be found that is not in the batch.
        rounds = [rng.permutation(lucky)] + [rng.permutation(total) for _ in range(every)]
        chosen = self._no_class_twice_in_a_batch(rounds).reshape(-1, self.classes)
        chosen = rng.permutation(chosen).ravel()
        # The n-th draw of a class within this epoch.
        by_class = np.argsort(chosen, kind="stable")
        counts = np.bincount(chosen, minlength=total)
        nth = np.empty(slots, dtype=np.int64)
        nth[by_class] = np.arange(slots) - np.repeat(np.cumsum(counts) - counts, counts)
        visit = drawn[chosen] + nth
        return self._samples(chosen, visit, k).reshape(len(self), -1)

    def _no_class_twice_in_a_batch(self, rounds: list[np.ndarray]) -> np.ndarray:
        """Join rounds of distinct classes. A batch that straddles two takes its second part from classes not in the first."""
        joined, length = [], 0
        for classes in rounds:
            tail = joined[-1][len(joined[-1]) - length % self.classes :] if length % self.classes else classes[:0]
            clash = np.isin(classes, tail)
            head = classes[~clash][: self.classes - len(tail)]
            rest = classes[~np.isin(classes, head)]
            joined.append(np.concatenate([head, rest]) if len(tail) else classes)
            length += len(classes)
        return np.concatenate(joined)

    def _samples(self, chosen: np.ndarray, visit: np.ndarray, k: int) -> np.ndarray:
        """The K samples of each draw. Every ceil(size / K) draws of a class, a cycle, its samples are put in a fresh order."""
        draws_per_cycle = -(-self.sizes[chosen] // k)
        cycle, place = np.divmod(visit, draws_per_cycle)
        # One order for each (class, cycle) that occurs: sort its samples by a hash of (seed, cycle, sample).
        pair, which = np.unique(cycle * len(self.sizes) + chosen, return_inverse=True)
        pair_cycle, pair_class = np.divmod(pair, len(self.sizes))
        sizes = self.sizes[pair_class]
        start = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(sizes)), sizes)
        sample = np.arange(len(owner)) - start[owner] + self.first[pair_class][owner]
        shuffled = sample[np.lexsort((_hash(self.seed, pair_cycle[owner], sample), owner))]
        position = (place[:, None] * k + np.arange(k)) % sizes[which][:, None]
        return self.order[shuffled[start[which][:, None] + position]]


def _hash(seed: int, cycle: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """uint64 that look random (the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    with np.errstate(over="ignore"):
        value = sample.astype(np.uint64) + cycle.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for salt in (np.uint64(seed), np.uint64(0)):
            value = (value ^ salt) + np.uint64(0x9E3779B97F4A7C15)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
    return value


class _Classes:
    """Draws partners of the same and of another class, uniformly and without trial and error."""

    def __init__(self, samples: Samples):
        self.labels = samples.labels
        self.order = self.labels.argsort(stable=True)
        self.counts = self.labels.bincount(minlength=len(samples.class_names))
        self.first = self.counts.cumsum(0) - self.counts
        self.place = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(self.order)))
        if int((self.counts > 0).sum()) < 2 or int(self.counts.max()) < 2:
            raise ValueError(f"{samples}: pairs and triplets need two classes, one of them with two samples")

    def anchors(self, how_many: int, generator: torch.Generator) -> Tensor:
        """Samples that have another of their class, each once before any comes again."""
        able = (self.counts[self.labels] > 1).nonzero().flatten()
        turns = [able[torch.randperm(len(able), generator=generator)] for _ in range(math.ceil(how_many / len(able)))]
        return torch.cat(turns)[:how_many] if turns else able[:0]

    def same(self, anchor: Tensor, generator: torch.Generator) -> Tensor:
        """Another sample of the anchor's class."""
        label = self.labels[anchor]
        step = 1 + _below(self.counts[label] - 1, generator)
        return self.order[self.first[label] + (self.place[anchor] - self.first[label] + step) % self.counts[label]]

    def different(self, anchor: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of any other class."""
        label = self.labels[anchor]
        skip = _below(len(self.labels) - self.counts[label], generator)
        return self.order[torch.where(skip < self.first[label], skip, skip + self.counts[label])]


def _below(limit: Tensor, generator: torch.Generator) -> Tensor:
    """For each limit, an integer from 0 to limit - 1."""
    return (torch.rand(len(limit), generator=generator, dtype=torch.float64) * limit).long()


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))


class PairDataset(Dataset):
    """As many pairs an epoch as there are samples, fresh ones every epoch; without `set_epoch` they stay the same.

    An index gives `((left, right), same)`; a slice or tensor of indices gives a `Batch` of all lefts, then all rights.

    Args:
        samples: labelled samples.
        positive_fraction: share of pairs of one class, 0..1, kept in every stretch of the epoch to within one pair.
        seed: with the epoch it decides everything.

    Raises:
        ValueError: `positive_fraction` out of range, or no two samples of a class, or a single class.
    """

    def __init__(self, samples: Samples, positive_fraction: float = 0.5, seed: int = 0):
        if not 0 <= positive_fraction <= 1:
            raise ValueError(f"sampling.positive_fraction={positive_fraction} must lie between 0 and 1")
        self.samples, self.positive_fraction, self.seed = samples, positive_fraction, seed
        self._classes = _Classes(samples)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        generator = _generator(self.seed, epoch)
        count = torch.arange(len(self.samples) + 1, dtype=torch.float64)
        self.same = (count * self.positive_fraction + 0.5).floor().diff() > 0
        self.left = torch.randperm(len(self.samples), generator=generator)
        self.left[self.same] = self._classes.anchors(int(self.same.sum()), generator)
        self.right = self._classes.different(self.left, generator)
        self.right[self.same] = self._classes.same(self.left[self.same], generator)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index):
        left, right, same = self.left[index], self.right[index], self.same[index]
        if left.dim() == 0:
            return (self.samples.inputs[left], self.samples.inputs[right]), bool(same)
        alike, apart = same.nonzero().flatten(), (~same).nonzero().flatten()
        both = torch.cat([left, right])
        tuples = (alike, alike + len(left), apart, apart + len(left))
        return Batch(self.samples.inputs[both], self.samples.labels[both], tuples)


class TripletDataset(Dataset):
    """As many triplets an epoch as there are samples, fresh ones every epoch; without `set_epoch` they stay the same.

    An index gives `(anchor, positive, negative)`; a slice or tensor of indices gives a `Batch` of all anchors, then all
    positives, then all negatives. Anchors are the samples whose class has another one.

    Raises:
        ValueError: no two samples of a class, or a single class.
    """

    def __init__(self, samples: Samples, seed: int = 0):
        self.samples, self.seed = samples, seed
        self._classes = _Classes(samples)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        generator = _generator(self.seed, epoch)
        self.anchor = self._classes.anchors(len(self.samples), generator)
        self.positive = self._classes.same(self.anchor, generator)
        self.negative = self._classes.different(self.anchor, generator)

    def __len__(self) -> int:
        return len(self.anchor)

    def __getitem__(self, index):
        three = self.anchor[index], self.positive[index], self.negative[index]
        if three[0].dim() == 0:
            return tuple(self.samples.inputs[i] for i in three)
        rows = torch.cat(three)
        return Batch(self.samples.inputs[rows], self.samples.labels[rows], tuple(torch.arange(len(rows)).view(3, -1)))


class _InOrder(Sampler):
    """Slices of a data set that shuffles itself; passes the epoch on to it."""

    def __init__(self, dataset: PairDataset | TripletDataset, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"sampling.batch_size={batch_size} must be at least 1")
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(len(self.dataset)).split(self.batch_size))
