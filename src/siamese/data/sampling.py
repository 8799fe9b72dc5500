"""How pairs and triplets are formed.

`balanced` draws P classes x K samples and leaves the tuples to the miner and the loss; `pairs` and `triplets` draw the
tuples themselves, or hand out those that a file lists. Every draw follows from (seed, epoch) alone: nothing is stored, so
a resumed run knows any epoch's batches, and so does every rank, which takes its part of each.
"""

import csv
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from siamese.data import listed
from siamese.data.samples import Samples

log = logging.getLogger(__name__)
_AHEAD = 64  # batches whose samples are chosen together
_WITHOUT_LABELS = "Without labels, list the pairs or triplets in a file: sampling=pairs sampling.file=PAIRS.csv"


def balanced(samples: Samples, seed: int, classes: int = 32, samples_per_class: int = 4) -> DataLoader:
    """Batches of `classes` x `samples_per_class` samples; see `BalancedBatchSampler`."""
    if not samples.labelled:
        listed = samples.tuples is not None
        kind = "pairs" if listed and samples.tuples.same is not None else "triplets"
        remedy = f"Say sampling={kind}, and a loss of {kind}" if listed else _WITHOUT_LABELS
        raise ValueError(f"{samples}: sampling=balanced goes by labels. {remedy}")
    if classes > (there := len(samples.labels.unique())) > 1:
        log.warning("sampling.classes=%d, but there are %d training classes: batches have these %d", classes, there, there)
        classes = there
    sampler = BalancedBatchSampler(samples.labels, classes, samples_per_class, seed)
    return DataLoader(samples, sampler=sampler, batch_size=None)


def pairs(samples: Samples, seed: int, batch_size: int = 64, positive_fraction: float = 0.5, file: str | None = None) -> DataLoader:
    """Batches of `batch_size` pairs, so twice as many samples; see `PairDataset`.

    A `file` lists them instead, see `ListedPairs`: a CSV with the header `left,right,same`, as `listed.read` takes it.

    Raises:
        ValueError: fewer than 3 pairs a batch; what the data sets refuse.
    """
    if batch_size < 3:  # to pytorch-metric-learning one positive and one negative pair are no batch: its loss of them is 0
        raise ValueError(f"sampling.batch_size={batch_size} must be at least 3 pairs: of fewer nothing is learned")
    if file is None and samples.tuples is not None:
        dataset = ListedPairs.of(samples, seed)
    elif file is None:
        dataset = PairDataset(samples, positive_fraction, seed)
    else:
        dataset = _read(ListedPairs, file, listed.PAIRS, samples, seed)
        share = f"{100 * dataset.positive_fraction:.3g} % of them of the same"
        log.info("sampling.file=%s lists %d pairs, %s: sampling.positive_fraction is not used", file, len(dataset), share)
    return DataLoader(dataset, sampler=InOrder(dataset, batch_size), batch_size=None)


def triplets(samples: Samples, seed: int, batch_size: int = 42, file: str | None = None) -> DataLoader:
    """Batches of `batch_size` triplets, so three times as many samples; see `TripletDataset`.

    A `file` lists them instead, see `ListedTriplets`: a CSV with the header `anchor,positive,negative`, as `listed.read` takes it.
    """
    if file is None and samples.tuples is not None:
        dataset = ListedTriplets.of(samples, seed)
    elif file is None:
        dataset = TripletDataset(samples, seed)
    else:
        dataset = _read(ListedTriplets, file, listed.TRIPLETS, samples, seed)
        log.info("sampling.file=%s lists %d triplets", file, len(dataset))
    return DataLoader(dataset, sampler=InOrder(dataset, batch_size), batch_size=None)


def _read(kind: type, file: str, header: list[str], samples: Samples, seed: int) -> "ListedPairs | ListedTriplets":
    try:
        columns, lines = listed.read(file, header, samples)
        return kind(samples, *columns, seed, where=lambda row: f"line {lines[row]}")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"sampling.file={file}: {getattr(error, 'strerror', None) or error}") from None


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
        self.begin = 0

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.classes * self.samples_per_class))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        # Lazily: Lightning sets the epoch after it has asked for the iterator; and some at a time, so that training need not wait.
        begin = _begin(self)
        chosen, visit = (draws[begin:] for draws in self._draws(self.epoch))
        for first in range(0, len(chosen), _AHEAD):
            yield from self._samples(chosen[first : first + _AHEAD], visit[first : first + _AHEAD]).tolist()

    def batches(self, epoch: int) -> np.ndarray:
        """int64 [batches, P*K]: the whole epoch."""
        return self._samples(*self._draws(epoch))

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The classes of each batch, and the how-manieth draw of the class each is since training began: int64 [batches, P]."""
        total, slots = len(self.sizes), len(self) * self.classes
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
        return chosen.reshape(-1, self.classes), (drawn[chosen] + nth).reshape(-1, self.classes)

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

    def _samples(self, chosen: np.ndarray, visit: np.ndarray) -> np.ndarray:
        """[B, P] draws -> [B, P*K] samples. Every ceil(size / K) draws of a class, a cycle, its samples are put in a fresh order."""
        batches, k = len(chosen), self.samples_per_class
        chosen, visit = chosen.ravel(), visit.ravel()
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
        return self.order[shuffled[start[which][:, None] + position]].reshape(batches, -1)


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
        if not samples.labelled:
            raise ValueError(f"{samples}: pairs and triplets are drawn by labels. {_WITHOUT_LABELS}")
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


def _evenly(count: int, share: float) -> Tensor:
    """bool [count]: this share is True, in every stretch to within one."""
    return (torch.arange(count + 1, dtype=torch.float64) * share + 0.5).floor().diff() > 0


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
        self.same = _evenly(len(self.samples), self.positive_fraction)
        self.left = torch.randperm(len(self.samples), generator=generator)
        self.left[self.same] = self._classes.anchors(int(self.same.sum()), generator)
        self.right = self._classes.different(self.left, generator)
        self.right[self.same] = self._classes.same(self.left[self.same], generator)

    def like(self, samples: Samples) -> "PairDataset":
        """Of other samples, those that they list or by their labels with this share of positives, and the same ones every time."""
        return PairDataset(samples, self.positive_fraction) if samples.tuples is None else ListedPairs.of(samples)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index):
        left, right, same = self.left[index], self.right[index], self.same[index]
        if left.dim() == 0:
            return (self.samples.inputs[left], self.samples.inputs[right]), bool(same)
        alike, apart = same.nonzero().flatten(), (~same).nonzero().flatten()
        both = torch.cat([left, right])
        tuples = (alike, alike + len(left), apart, apart + len(left))
        return self.samples.batch(both, tuples)


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

    def like(self, samples: Samples) -> "TripletDataset":
        """Of other samples, those that they list or by their labels, and the same ones every time."""
        return TripletDataset(samples) if samples.tuples is None else ListedTriplets.of(samples)

    def __len__(self) -> int:
        return len(self.anchor)

    def __getitem__(self, index):
        three = self.anchor[index], self.positive[index], self.negative[index]
        if three[0].dim() == 0:
            return tuple(self.samples.inputs[i] for i in three)
        rows = torch.cat(three)
        return self.samples.batch(rows, tuple(torch.arange(len(rows)).view(3, -1)))


class ListedPairs(PairDataset):
    """Pairs that somebody has listed: each once an epoch, in an order that follows from (seed, epoch).

    Every stretch of the epoch has the list's own share of positives, to within one pair. Batches are those of `PairDataset`.

    Args:
        samples: with labels or without. What is the same is said by the list alone.
        left, right: int [M], positions in the samples.
        same: [M] of 0 and 1.
        seed: with the epoch it decides the order.
        where: what an error calls a pair, given its number in the list.

    Raises:
        ValueError: columns of different lengths, an empty list, a position that is none, a pair of a sample with itself, a
            `same` that is neither 0 nor 1, a pair that is listed as the same and as different, no pair of the one kind.
    """

    def __init__(
        self,
        samples: Samples,
        left: Sequence[int] | Tensor,
        right: Sequence[int] | Tensor,
        same: Sequence[int] | Tensor,
        seed: int = 0,
        where: Callable[[int], str] = "pair {}".format,
    ):
        self.samples, self.seed, self._listed = samples, seed, _checked(samples, (left, right), where)
        same = torch.as_tensor(same)
        if len(same) != len(self._listed):
            raise ValueError(f"{len(self._listed)} pairs, but {len(same)} entries of same: they must be as many")
        if (wrong := ((same != 0) & (same != 1)).nonzero()).numel():
            raise ValueError(f"{where(int(wrong[0]))}: same is {same[wrong[0]].item()}, it must be 0 or 1")
        self._same = same.bool()
        said: dict[tuple[int, ...], tuple[int, bool]] = {}
        for row, (pair, alike) in enumerate(zip(self._listed.sort(1).values.tolist(), self._same.tolist(), strict=True)):
            earlier, before = said.setdefault(tuple(pair), (row, alike))
            if before != alike:
                raise ValueError(f"{where(earlier)} and {where(row)} call one pair the same and different: keep one of them")
        if self._same.all() or not self._same.any():
            missing = "different (same=0)" if self._same.all() else "the same (same=1)"
            raise ValueError(f"no pair is listed as {missing}: the loss learns from both kinds")
        first, second = samples.labels[self._listed].unbind(1)
        _warn_of(samples, (first == second) != self._same)
        self.positive_fraction = self._same.double().mean().item()
        self.set_epoch(0)

    @classmethod
    def of(cls, samples: Samples, seed: int = 0) -> "ListedPairs":
        """The pairs that these samples list, but for those that teach nothing: of a sample with itself, or called the same and different.

        Of triplets, both pairs of each.
        """
        pairs = samples.tuples.pairs()
        _, pair = pairs.rows.sort(1).values.unique(dim=0, return_inverse=True)
        said = [torch.bincount(pair, kind.double()) > 0 for kind in (pairs.same, ~pairs.same)]
        kept = ((pairs.rows[:, 0] != pairs.rows[:, 1]) & ~(said[0] & said[1])[pair]).nonzero().flatten()
        if len(kept) < len(pair):
            why = "of a sample with itself, or called the same and different"
            log.info("%d of %d listed pairs teach nothing and are left out: %s", len(pair) - len(kept), len(pair), why)
        return cls(samples, *pairs.rows[kept].T, pairs.same[kept], seed, where=lambda row: pairs.where[kept[row]])

    def set_epoch(self, epoch: int) -> None:
        generator = _generator(self.seed, epoch)
        self.same = _evenly(len(self._same), self.positive_fraction)
        order = torch.empty(len(self._same), dtype=torch.long)
        for kind in (True, False):
            rows = (self._same == kind).nonzero().flatten()
            order[self.same == kind] = rows[torch.randperm(len(rows), generator=generator)]
        self.left, self.right = self._listed[order].unbind(1)


class ListedTriplets(TripletDataset):
    """Triplets that somebody has listed: each once an epoch, in an order that follows from (seed, epoch).

    Batches are those of `TripletDataset`.

    Args:
        samples: with labels or without. What is nearer is said by the list alone.
        anchor, positive, negative: int [M], positions in the samples.
        seed: with the epoch it decides the order.
        where: what an error calls a triplet, given its number in the list.

    Raises:
        ValueError: columns of different lengths, an empty list, a position that is none, a sample twice in a triplet.
    """

    def __init__(
        self,
        samples: Samples,
        anchor: Sequence[int] | Tensor,
        positive: Sequence[int] | Tensor,
        negative: Sequence[int] | Tensor,
        seed: int = 0,
        where: Callable[[int], str] = "triplet {}".format,
    ):
        self.samples, self.seed, self._listed = samples, seed, _checked(samples, (anchor, positive, negative), where)
        labels = samples.labels[self._listed]
        _warn_of(samples, (labels[:, 0] != labels[:, 1]) | (labels[:, 0] == labels[:, 2]))
        self.set_epoch(0)

    @classmethod
    def of(cls, samples: Samples, seed: int = 0) -> "ListedTriplets":
        """The triplets that these samples list.

        Raises:
            ValueError: they list pairs.
        """
        if samples.tuples.same is not None:
            raise ValueError(f"{samples}: these are pairs, say sampling=pairs")
        rows = samples.tuples.rows
        kept = ((rows.sort(1).values.diff(dim=1) != 0).all(1)).nonzero().flatten()
        if len(kept) < len(rows):
            why = "a sample stands in them twice"
            log.info("%d of %d listed triplets teach nothing and are left out: %s", len(rows) - len(kept), len(rows), why)
        return cls(samples, *rows[kept].T, seed, where=lambda row: samples.tuples.where[kept[row]])

    def set_epoch(self, epoch: int) -> None:
        order = torch.randperm(len(self._listed), generator=_generator(self.seed, epoch))
        self.anchor, self.positive, self.negative = self._listed[order].unbind(1)


def _checked(samples: Samples, columns: tuple[Sequence[int] | Tensor, ...], where: Callable[[int], str]) -> Tensor:
    """int64 [M, columns]: positions in the samples, none twice in a row."""
    columns = [torch.as_tensor(column) for column in columns]
    if len(lengths := {len(column) for column in columns}) > 1:
        raise ValueError(f"columns of {' and '.join(map(str, sorted(lengths)))} entries: they must be as many")
    if 0 in lengths:
        raise ValueError("nothing is listed")
    table = torch.stack(columns, 1).long()
    if (outside := ((table < 0) | (table >= len(samples))).any(1).nonzero()).numel():
        row, last = int(outside[0]), len(samples) - 1
        raise ValueError(f"{where(row)}: rows of the training split are numbered 0 to {last}, here are {table[row].tolist()}")
    if (twice := (table.sort(1).values.diff(dim=1) == 0).any(1).nonzero()).numel():
        raise ValueError(f"{where(int(twice[0]))}: one sample stands in it twice, remove it")
    return table


def _warn_of(samples: Samples, contradicting: Tensor) -> None:
    if samples.labelled and (count := int(contradicting.sum())):
        log.warning("%d of %d listed tuples contradict the labels of their samples: the list is followed", count, len(contradicting))


class InOrder(Sampler):
    """Slices of `batch_size` of a data set that shuffles itself; passes the epoch on to it.

    Raises:
        ValueError: `batch_size` below 1.
    """

    def __init__(self, dataset: PairDataset | TripletDataset, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"sampling.batch_size={batch_size} must be at least 1")
        self.dataset, self.batch_size, self.begin = dataset, batch_size, 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(len(self.dataset)).split(self.batch_size)[_begin(self) :]


def _begin(sampler: BalancedBatchSampler | InOrder) -> int:
    """With which batch this epoch begins, the first unless a run was cut off in the middle of it; all others with the first."""
    begin, sampler.begin = sampler.begin, 0
    return begin
