"""One pass over the scores between queries and a gallery, block by block, in memory that does not grow with their number.

Scores become levels: whole numbers of steps, 2^-20 on the unit sphere, so that scores that differ by rounding alone are equal.
The samples are taken in the order of their classes. So the positives (pairs of a class) lie in a narrow band, which is walked
first: it gives each query's best positives. Then all blocks are walked for the negatives. From each, while it is in the
processor's cache, come

- the histogram of levels: of it and the positives' all of verification is made. Up to 2^25 pairs, and beyond for the 1/512 of
  the scores that are highest, each level has a bin; the rest is counted in bins of 2^-13, between whose ends the ROC is a line;
- for each query its most alike negatives, as many as it has positives and at least ten: of them and the positives map_at_r,
  r_precision, precision and the neighbours are made. Only what is above a level that few scores reach is looked at;
- how many negatives are as alike as the best positive, which is its rank: counted in the lists where they reach that far.

Where queries and gallery are one set, each score serves both its samples and is computed once, unless classes are so large that
such lists would not fit: then rows of whole scores are finished one group of queries after the other.

Over several processes, each holds a part of the samples. Parts travel around the ring, and each pair of parts meets once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import normalize, pad

from siamese.distances import LearnedDistance, scores

NEIGHBOURS = 10
_COARSE = 128  # levels in one bin of the histogram where it need not be fine
_ROWS, _COLUMNS = 2048, 2048  # of a block, the smallest for which a matrix product takes no longer than a large one
_HOT = 64  # rows of a block that are gone through together, so that they stay in a processor's cache
_BAND, _FIRST, _SAMPLE = 64, 1024, 512
_PRECISE = 2**24  # so many scores are computed in double precision: it takes no time, and no block size can make a difference
_LISTED = 2**24  # entries of all lists together
_JUDGED = 2**19  # of those that are judged together


@dataclass(frozen=True)
class Part:
    """Samples that one process holds.

    embeddings: [N, D], in any order; inverse: [N] what they are multiplied by (1 / length, or 1).
    labels: int64 [N], ascending; order: int64 [N], the rows in the order of their labels.
    start: the position of the first among the samples of all processes.
    """

    embeddings: Tensor
    inverse: Tensor
    labels: Tensor
    order: Tensor
    start: int

    def __len__(self) -> int:
        return len(self.labels)


class Ranks:
    """The processes that share the work: those of torch.distributed if `together`, else this one alone."""

    def __init__(self, together: bool = False):
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)

    def reduce(self, tensor: Tensor, how: str = "SUM") -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Each process's [N_r, ...] tensor, on all of them."""
        if self.size == 1:
            return [tensor]
        lengths = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        self.reduce(lengths)
        padded = tensor.new_zeros(int(lengths.max()), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [one[:length] for one, length in zip(found, lengths.tolist(), strict=True)]

    def ring(self, part: Part, lengths: list[int], steps: int) -> Iterator[tuple[int, Part]]:
        """(owner, part), beginning with one's own; all processes must go around together."""
        held, to, source = part, (self.rank - 1) % self.size, (self.rank + 1) % self.size
        for step in range(steps):
            owner = (self.rank + step) % self.size
            yield owner, held
            if step + 1 < steps:
                following = (owner + 1) % self.size
                tensors = (held.embeddings, held.inverse, held.labels, held.order)
                taken = [tensor.new_empty(lengths[following], *tensor.shape[1:]) for tensor in tensors]
                sent = [dist.P2POp(dist.isend, tensor.contiguous(), to) for tensor in tensors]
                work = dist.batch_isend_irecv(sent + [dist.P2POp(dist.irecv, tensor, source) for tensor in taken])
                for one in work:
                    one.wait()
                held = Part(*taken, sum(lengths[:following]))


class Levels:
    """Scores between blocks of samples, in steps, as float32.

    `step` is 2^-20 on the unit sphere. Elsewhere the range that scores can have is cut into 2^20 to 2^21.
    """

    def __init__(self, distance: Module, sides: list[Tensor], ranks: Ranks):
        self.distance = distance
        euclidean = type(distance) is LpDistance and distance.p == 2 and distance.power == 1
        inner = type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1
        self.kind = "euclidean" if euclidean else "product" if inner else "other"
        self.normalized = distance.normalize_embeddings and self.kind != "other"
        total = [int(ranks.reduce(torch.tensor(len(side), device=side.device))) for side in sides]
        precise = total[0] * total[-1] <= _PRECISE
        # A Euclidean distance is the root of a rounded difference: between copies 3e-4 instead of 0 in single precision.
        self.dtype = torch.float64 if (precise or not (distance.is_inverted or distance.p == 1)) else torch.float32
        self.centre = None
        if self.normalized:
            low, high = (-2.0, 0.0) if euclidean else (-1.0, 1.0)
            self.step = 2.0**-20
        else:
            low, high = self._range(sides, ranks)
            self.step = step_of(max(high - low, -low, high))
        self.empty = float(round(low / self.step) - 2 * _COARSE)  # the level of what is no pair, below all others
        self.count = round(high / self.step) + _COARSE - int(self.empty)
        self.scale = 1 / self.step if self.kind == "product" else 1.0  # of one side of a product
        self.rooms = [torch.empty(0, dtype=self.dtype, device=sides[0].device) for _ in range(3)]

    def _range(self, sides: list[Tensor], ranks: Ranks) -> tuple[float, float]:
        """Ends between which all scores lie, found without comparing samples, but for a distance that nothing is known of."""
        if isinstance(self.distance, LearnedDistance):
            top = sides[0].new_full(sides[0].shape[1:], -torch.inf, dtype=self.dtype)
            bottom = -top
            for block in (block for side in sides if len(side) for block in side.split(_ROWS)):
                block = self.distance.maybe_normalize(block.to(self.dtype))
                top, bottom = torch.maximum(top, block.amax(0)), torch.minimum(bottom, block.amin(0))
            top, bottom = ranks.reduce(top, "MAX"), ranks.reduce(bottom, "MIN")
            return -self.distance.bound(top - bottom), 0.0
        if self.kind == "other":
            low, high = torch.inf, -torch.inf
            for held in ranks.gather(sides[-1]):
                for rows, columns in product(sides[0].split(_ROWS), held.split(_COLUMNS)):
                    if len(rows) and len(columns):
                        block = scores(self.distance, rows.to(self.dtype), columns.to(self.dtype))
                        low, high = min(low, block.min().item()), max(high, block.max().item())
            ends = ranks.reduce(torch.tensor([-low, high], dtype=torch.float64, device=sides[0].device), "MAX").tolist()
            return -ends[0], ends[1]
        if self.kind == "euclidean":
            count = ranks.reduce(torch.tensor(float(sum(map(len, sides))), device=sides[0].device))
            self.centre = ranks.reduce(sum(side.sum(0, dtype=torch.float64) for side in sides)) / count
        far = [0.0] * 2
        for place, side in enumerate(sides):
            for block in side.split(_ROWS) if len(side) else ():
                block = block.double() if self.centre is None else block.double() - self.centre
                far[place] = max(far[place], block.norm(dim=1).max().item())
        far = ranks.reduce(torch.tensor(far, device=sides[0].device, dtype=torch.float64), "MAX").tolist()
        if self.kind == "euclidean":
            return -2 * max(far), 0.0
        bound = far[0] * (far[1] if len(sides) > 1 else far[0])
        return -bound, bound

    def inverse_lengths(self, embeddings: Tensor) -> Tensor:
        if not self.normalized:
            return embeddings.new_ones(len(embeddings), dtype=self.dtype)
        blocks = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in embeddings.split(_ROWS)]
        return (1 / torch.cat(blocks).clamp_(min=1e-12)).to(self.dtype)

    def left(self, part: Part, first: int, last: int) -> Tensor:
        """The samples at these places in the order of classes, ready to be compared; overwritten by the next call."""
        return self._take(0, part, first, last, self.scale)

    def right(self, part: Part, first: int, last: int) -> Tensor:
        return self._take(1, part, first, last, 1.0)

    def _take(self, side: int, part: Part, first: int, last: int, scale: float) -> Tensor:
        rows = part.order[first:last]
        block = self._room(side, len(rows), part.embeddings.shape[1])
        if part.embeddings.dtype == self.dtype:
            torch.index_select(part.embeddings, 0, rows, out=block)
        else:
            block.copy_(part.embeddings[rows])
        if self.centre is not None:
            block -= self.centre
        return block.mul_(part.inverse[rows, None] * scale) if self.normalized or scale != 1 else block

    def _room(self, which: int, *shape: int) -> Tensor:
        """Memory that is used again: to get it afresh from the system costs more than what is computed in it."""
        size = shape[0] * shape[1]
        if self.rooms[which].numel() < size:
            self.rooms[which] = torch.empty(size, dtype=self.dtype, device=self.rooms[which].device)
        return self.rooms[which][:size].view(shape)

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """[R, D] and [C, D] -> [R, C] levels; they are overwritten by the next call."""
        if self.kind == "product":
            level = torch.mm(left, right.T, out=self._room(2, len(left), len(right)))
        else:
            score = -torch.cdist(left, right) if self.kind == "euclidean" else scores(self.distance, left, right)
            level = score.div_(self.step)
        return level if level.dtype == torch.float32 else level.round_().float()

    def each(self, queries: Tensor, sets: Tensor) -> Tensor:
        """[E, D] queries, each with a set of its own, [E, S, D] -> [E, S] scores, not in steps."""
        if self.kind == "other":
            return torch.cat([scores(self.distance, query[None], rows) for query, rows in zip(queries, sets, strict=True)])
        if self.normalized:
            queries, sets = normalize(queries, dim=1), normalize(sets, dim=2)
        if self.kind == "euclidean":
            return -torch.cdist(queries[:, None], sets)[:, 0]
        return torch.bmm(sets, queries[..., None])[..., 0]

    def score(self, level: Tensor) -> Tensor:
        """Levels back to scores; -inf for what is no pair."""
        return torch.where(level > self.empty, level.double() * self.step, -torch.inf)


def part_of(embeddings: Tensor, labels: Tensor, levels: Levels, start: int = 0) -> Part:
    order = labels.argsort(stable=True)
    return Part(embeddings, levels.inverse_lengths(embeddings), labels[order], order, start)


def step_of(width: float) -> float:
    """The power of two that cuts this width into 2^20 to 2^21 steps."""
    return 2.0 ** (int(torch.tensor(max(width, 1e-30), dtype=torch.float64).log2().ceil()) - 21)


@dataclass
class Found:
    """What the walk found, of the queries of this process in their own order, and of all pairs.

    matches: int64 [Q] how many samples of its class the gallery has; rank: int64 [Q] of the first of them, 0 where there is none.
    map_at_r, r_precision: float64 [Q], 0 where there is no match; hits: uint8 [Q, 10] matches among the first 1, 2 ... 10.
    neighbours: int64 [Q, 10] numbers of gallery samples, -1 where there are fewer; neighbour_scores: float32 [Q, 10].
    score: float64 [B], descending; same, different: float64 [B] pairs from this score up to the one before.
    width: float64 [B] the range of scores that such a bin covers, `step` where it is of one level.
    """

    matches: Tensor
    rank: Tensor
    map_at_r: Tensor
    r_precision: Tensor
    hits: Tensor
    neighbours: Tensor
    neighbour_scores: Tensor
    score: Tensor
    same: Tensor
    different: Tensor
    width: Tensor
    step: float


def walk(
    queries: Tensor,
    labels: Tensor,
    distance: Module,
    gallery: tuple[Tensor, Tensor] | None = None,
    together: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> Found:
    """Compare every query with every sample of the gallery, by default with all other queries.

    Args:
        queries: float [Q, D]; of this process, where several share the work.
        labels: int64 [Q].
        gallery: (float [G, D], int64 [G]); None: the queries themselves, none of them its own match.
        together: every process of torch.distributed calls this, with its own queries and, if any, its own part of the gallery.
        progress: is told the share of the work that is done.
    """
    return _Walk(queries, labels, distance, gallery, Ranks(together), progress).run()


class _Lists:
    """For each query the levels of what is most alike, best first, and where in the gallery it is."""

    def __init__(self, queries: int, depth: int, empty: float, device: torch.device):
        self.empty = empty
        self.level = torch.full((queries, depth), empty, device=device)
        self.place = torch.full((queries, depth), -1, dtype=torch.int32, device=device)

    def merge(self, rows: Tensor | slice, level: Tensor, place: Tensor) -> None:
        """Lists [R, K] of what else there is for these queries."""
        level, place = torch.cat([self.level[rows], level], 1), torch.cat([self.place[rows], place.int()], 1)
        best, where = level.topk(self.level.shape[1])
        self.level[rows], self.place[rows] = best, place.gather(1, where)

    def insert(self, query: Tensor, place: Tensor, level: Tensor) -> None:
        """[E] finds of any queries in any order."""
        order = (query * 2**24 - (level - self.empty).long()).argsort()
        touched, counts = query[order].unique_consecutive(return_counts=True)
        row = torch.arange(len(touched), device=query.device).repeat_interleave(counts)
        column = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[row]
        kept = column < self.level.shape[1]
        row, column, order = row[kept], column[kept], order[kept]
        levels = torch.full((len(touched), int(column.max()) + 1), self.empty, device=query.device)
        places = torch.full(levels.shape, -1, dtype=torch.int32, device=query.device)
        levels[row, column], places[row, column] = level[order], place[order].int()
        self.merge(touched, levels, places)


class _Histogram:
    """Counts of levels, above `empty`: one by one from `fine` up, and below in bins of _COARSE."""

    def __init__(self, fine: int, count: int, empty: float, device: torch.device):
        self.fine, self.empty, self.device = fine, empty, device
        self.counts = torch.zeros(count, dtype=torch.int64, device=device)
        self.bins = torch.zeros(count // _COARSE + 1, dtype=torch.int64, device=device)
        self.waiting: list[Tensor] = []
        self.narrow, self.used = torch.empty(2**19, dtype=torch.int16, device=device), 0
        self.base = torch.tensor((0.5 - empty) / _COARSE, device=device)

    def see(self, levels: Tensor) -> None:
        """All levels of a block, or of some of its rows."""
        if not self.fine:
            self.add(levels)
            return
        if self.used + levels.numel() > len(self.narrow):
            self.flush()
            if levels.numel() > len(self.narrow):
                self.narrow = torch.empty(levels.numel(), dtype=torch.int16, device=self.device)
        torch.add(self.base, levels, alpha=1 / _COARSE, out=levels)
        self.narrow[self.used : self.used + levels.numel()].copy_(levels)  # rounds towards 0
        self.used += levels.numel()

    def add(self, levels: Tensor) -> None:
        """[E] levels, all of them fine."""
        self.waiting.append((levels.round() - self.empty).int())
        if sum(map(len, self.waiting)) > 2**20:
            self.flush_fine()

    def flush(self) -> None:
        if self.used:
            self.bins += torch.bincount(self.narrow[: self.used], minlength=len(self.bins))
            self.used = 0

    def flush_fine(self) -> None:
        if self.waiting:
            self.counts += torch.bincount(torch.cat(self.waiting), minlength=len(self.counts))
            self.waiting = []


class _Walk:
    def __init__(self, queries, labels, distance, gallery, ranks: Ranks, progress: Callable[[float], None]):
        self.ranks, self.itself, self.device, self.progress = ranks, gallery is None, queries.device, progress
        self.levels = Levels(distance, [queries] if self.itself else [queries, gallery[0]], ranks)
        self.mine, self.asked = self._part(queries, labels)
        self.held, self.lengths = (self.mine, self.asked) if self.itself else self._part(*gallery)
        self.numbers = torch.cat(ranks.gather(self.held.start + self.held.order))  # of the samples, by their place in the walk

        known = torch.cat(ranks.gather(self.held.labels)).sort().values
        ends = [torch.searchsorted(known, self.mine.labels, right=right) for right in (False, True)]
        self.matches = ends[1] - ends[0] - int(self.itself)
        most = self.matches.max() if len(self.matches) else torch.tensor(0, device=self.device)
        self.positives = max(int(ranks.reduce(most, "MAX")), 1)  # in a query's list
        self.negatives = max(self.positives, NEIGHBOURS)
        entries, total = self.positives + self.negatives, sum(self.lengths)
        shallow = 8 * self.negatives <= total
        self.both = self.itself and shallow and entries * total <= _LISTED  # does a score serve both its samples?
        self.group = max(len(self.mine) if self.both else _LISTED // entries, 1)
        self.groups = 1 if self.both else max(-(-asked // self.group) for asked in self.asked)
        self.columns = _COLUMNS if shallow else max(self.lengths)
        self.rows = min(_ROWS, max(2 * _ROWS * _COLUMNS // self.columns, 16))
        self.hot = _HOT if self.device.type == "cpu" else self.rows
        self.mask = np.empty(0, dtype=bool)
        self.same, self.counted = torch.zeros(self.levels.count, dtype=torch.int64, device=self.device), []
        self.compared, self.work = 0, max(len(self.mine) * total // (2 if self.both else 1), 1)

    def _part(self, embeddings: Tensor, labels: Tensor) -> tuple[Part, list[int]]:
        lengths = [len(one) for one in self.ranks.gather(labels)]
        return part_of(embeddings, labels, self.levels, sum(lengths[: self.ranks.rank])), lengths

    def run(self) -> Found:
        asked, device = len(self.mine), self.device
        figures = [torch.empty(asked, dtype=dtype, device=device) for dtype in (torch.int64, torch.float64, torch.float64)]
        nearest = [torch.empty(asked, NEIGHBOURS, dtype=dtype, device=device) for dtype in (torch.uint8, torch.int64, torch.float32)]
        for group in range(self.groups):
            first, last = (min(end * self.group, len(self.mine)) for end in (group, group + 1))
            # Where each score serves both its samples the lists are of all samples, else of the queries of the group.
            listed, self.base = (sum(self.lengths), self.mine.start) if self.both else (last - first, -first)
            self.own = _Lists(listed, self.positives, self.levels.empty, self.device)
            self.near = _Lists(listed, self.negatives, self.levels.empty, self.device)
            self.above = torch.zeros(listed, dtype=torch.int64, device=self.device)
            for owner, part in self._ring():
                self._positives(part, *self._share(owner, part, first, last))
            self._count()
            if self.both:
                self._unite(self.own)
            self.best = torch.where(self.own.level[:, 0] > self.levels.empty, self.own.level[:, 0], torch.inf)
            if group == 0:
                self.histogram = _Histogram(self._look(), self.levels.count, self.levels.empty, self.device)
            for owner, part in self._ring():
                self._negatives(part, *self._share(owner, part, first, last))
            if self.both:
                self._unite(self.near)
                self.ranks.reduce(self.above)
            size = max(_JUDGED // (self.positives + self.negatives), 1)
            for a in range(first, last, size):
                b = min(a + size, last)
                for values, of_these in zip(figures + nearest, self._judge(a, b), strict=True):
                    values[self.mine.order[a:b]] = of_these.to(values.dtype)
        del self.own, self.near, self.levels.rooms  # what holds the pairs takes as much
        matches = torch.empty_like(self.matches).scatter_(0, self.mine.order, self.matches)
        return Found(matches, *figures, *nearest, *self._pairs(), self.levels.step)

    def _ring(self) -> Iterator[tuple[int, Part]]:
        return self.ranks.ring(self.held, self.lengths, self.ranks.size // 2 + 1 if self.both else self.ranks.size)

    def _share(self, owner: int, part: Part, first: int, last: int) -> tuple[range, range, bool]:
        """Rows of one's own, columns of a part, and whether only what lies right of the diagonal is to be compared."""
        rows, columns = range(first, last), range(len(part))
        if self.both and self.ranks.size > 1 and 2 * ((owner - self.ranks.rank) % self.ranks.size) == self.ranks.size:
            if self.ranks.rank < owner:  # opposite in the ring: both hold the other's part, and each takes half of what is between them
                rows = rows[: len(rows) // 2]
            else:
                columns = columns[len(columns) // 2 :]
        return rows, columns, self.both and owner == self.ranks.rank

    def _unite(self, lists: _Lists) -> None:
        if self.ranks.size > 1:
            gathered = zip(self.ranks.gather(lists.level), self.ranks.gather(lists.place), strict=True)
            for rank, (level, place) in enumerate(gathered):
                if rank != self.ranks.rank:
                    lists.merge(slice(None), level, place)

    def _positives(self, part: Part, rows: range, columns: range, triangle: bool) -> None:
        """The band of pairs of a class."""
        for a in range(rows.start, rows.stop, _BAND):
            b = min(a + _BAND, rows.stop)
            classes, (first, last) = self.mine.labels[a:b], self._with_labels_of(a, b, part, columns)
            for c in range(max(first, a) if triangle else first, last, _ROWS * _COLUMNS // _BAND):
                d = min(c + _ROWS * _COLUMNS // _BAND, last)
                block = self.levels.between(self.levels.left(self.mine, a, b), self.levels.right(part, c, d)).round_()
                pair = classes[:, None] == part.labels[c:d]
                if self.itself:
                    row = torch.arange(a, b, device=self.device)[:, None] + self.mine.start
                    column = torch.arange(c, d, device=self.device) + part.start
                    pair &= column > row if triangle else column != row
                block.masked_fill_(~pair, self.levels.empty)
                self.counted.append((block[pair] - self.levels.empty).int())
                if sum(map(len, self.counted)) > 2**20:
                    self._count()
                sides = [(block, self.base + a, part.start + c)] + [(block.T, part.start + c, self.mine.start + a)] * self.both
                for side, query, place in sides:
                    level, where = side.topk(min(self.positives, side.shape[1]))
                    self.own.merge(slice(query, query + len(side)), level, where + place)

    def _with_labels_of(self, a: int, b: int, part: Part, columns: range) -> tuple[int, int]:
        """Ends of the columns whose labels are within those of rows a to b."""
        first = int(torch.searchsorted(part.labels, self.mine.labels[a]))
        last = int(torch.searchsorted(part.labels, self.mine.labels[b - 1], right=True))
        return max(first, columns.start), min(last, columns.stop)

    def _count(self) -> None:
        if self.counted:
            self.same += torch.bincount(torch.cat(self.counted), minlength=len(self.same))
            self.counted = []

    def _look(self) -> int:
        """Sample some scores; gives the level above `empty` from which on the histogram is to be fine."""
        rows, columns = (
            torch.linspace(0, len(part) - 1, min(len(part), _SAMPLE)).long().to(self.device) for part in (self.mine, self.held)
        )
        mine, held = replace(self.mine, order=self.mine.order[rows]), replace(self.held, order=self.held.order[columns])
        block = self.levels.between(self.levels.left(mine, 0, len(rows)), self.levels.right(held, 0, len(columns)))
        self.sample = block[self.mine.labels[rows][:, None] != self.held.labels[columns]].sort(descending=True).values
        fine = torch.tensor(self._reached_by(1 / 512) - self.levels.empty, device=self.device)
        fine = (int(self.ranks.reduce(fine, "MAX")) // _COARSE + 1) * _COARSE
        return 0 if sum(self.asked) * sum(self.lengths) <= 4 * _PRECISE else fine

    def _reached_by(self, share: float) -> float:
        """The level that this share of the sampled scores reach."""
        return self.sample[int(share * (len(self.sample) - 1))].item() if len(self.sample) else self.levels.empty

    def _negatives(self, part: Part, rows: range, columns: range, triangle: bool) -> None:
        """All blocks, less the pairs of a class."""
        a = rows.start
        while a < rows.stop:
            # The first rows, or columns, are few: they give all queries a list, whose least few of the later ones reach.
            b = min(a + (min(self.rows, max(_FIRST // 2, a - rows.start)) if self.both else self.rows), rows.stop)
            left, c = self.levels.left(self.mine, a, b), max(columns.start, a if triangle else 0)
            while c < columns.stop:
                d = min(c + (_FIRST if not self.both and c == columns.start and self.columns == _COLUMNS else self.columns), columns.stop)
                block = self.levels.between(left, self.levels.right(part, c, d))
                for e in range(a, b, _BAND):
                    f = min(e + _BAND, b)
                    first, last = self._with_labels_of(e, f, part, range(c, d))
                    if first < last:
                        same = self.mine.labels[e:f, None] == part.labels[first:last]
                        block[e - a : f - a, first - c : last - c].masked_fill_(same, self.levels.empty)
                if triangle and c < b:
                    row, column = (torch.arange(*ends, device=self.device) for ends in ((a, b), (c, d)))
                    block.masked_fill_(column <= row[:, None], self.levels.empty)
                seen = a - rows.start if self.both else c - columns.start
                self._block(block, seen, self.base + a, self.mine.start + a, part.start + c)
                self.compared += block.numel()
                self.progress(min(self.compared / self.work, 1.0))
                c = d
            a = b

    def _block(self, block: Tensor, seen: int, row: int, row_place: int, column_place: int) -> None:
        """All that is to be had of [R, C] levels of negatives, which are spoilt; `row` is where the lists of the first row's query are."""
        height, width = block.shape
        level = self._reached_by(min(max(2 * self.negatives / max(seen, 1), 1 / 512), 1 / 16))
        level = min(level, self.histogram.fine + self.levels.empty) if self.histogram.fine else level
        level = round(level) - 0.5
        least, best = self._first_look(block, 0, slice(row, row + height), column_place, level)
        if self.both:
            least_of_columns, best_of_columns = self._first_look(block, 1, slice(column_place, column_place + width), row_place, level)
        found, value = [], []
        for a in range(0, height, self.hot):
            hot = block[a : a + self.hot].view(-1)
            where = self._above(hot, level)
            value.append(hot.index_select(0, where))
            found.append(where + a * width)
            self.histogram.see(hot)
        where, value = torch.cat(found), torch.cat(value).round_()
        if self.histogram.fine:
            self.histogram.add(value[value >= self.histogram.fine + self.levels.empty])
        y = where // width
        x = where - y * width
        kept = (value > least[y]).nonzero().flatten()
        finds = [(row + y[kept], column_place + x[kept], value[kept], value[kept] >= best[y[kept]])]
        if self.both:
            kept = (value > least_of_columns[x]).nonzero().flatten()
            finds.append((column_place + x[kept], row_place + y[kept], value[kept], value[kept] >= best_of_columns[x[kept]]))
        query, place, value, ahead = (torch.cat(parts) for parts in zip(*finds, strict=True))
        if len(query):
            self.above.index_add_(0, query, ahead.long())
            self.near.insert(query, place, value)

    def _first_look(self, block: Tensor, side: int, queries: slice, place: int, level: float) -> tuple[Tensor, Tensor]:
        """For each query, which are the rows (side 0) or the columns (1) of a block: the levels above which a score is a find, and
        from which on a find is ahead of the query's best positive.

        What finds, which are above `level`, do not tell is taken here: of queries whose list reaches farther down, all; of those
        whose best positive is behind their list, how many are ahead of it.
        """
        least, best = self.near.level[queries, -1], self.best[queries]
        low = least <= level
        counted = low | (best <= least)
        behind = counted.nonzero().flatten()
        if len(behind):
            picked = block.index_select(side, behind).round_()
            picked.sub_((best[behind] - 1).view(-1, 1) if side == 0 else best[behind] - 1).clamp_(0, 1)  # 1 if at least the best
            self.above[queries.start + behind] += picked.sum(1 - side, dtype=torch.float64).long()
        taken = low.nonzero().flatten()
        if len(taken):
            picked = block.index_select(side, taken)
            value, where = (picked if side == 0 else picked.T.contiguous()).topk(min(self.negatives, block.shape[1 - side]))
            self.near.merge(queries.start + taken, value.round_(), where + place)
        return torch.where(low, torch.inf, least), torch.where(counted, torch.inf, best)

    def _above(self, levels: Tensor, level: float) -> Tensor:
        """Which of [E] levels are above this one."""
        if self.device.type != "cpu":
            return (levels > level).nonzero().flatten()
        if len(self.mask) < len(levels):
            self.mask = np.empty(len(levels), dtype=bool)
        mask = np.greater(levels.numpy(), np.float32(level), out=self.mask[: len(levels)])  # torch's takes ten times as long
        return torch.from_numpy(np.flatnonzero(mask))

    def _judge(self, a: int, b: int) -> tuple[Tensor, ...]:
        """Figures of queries a to b, from their two lists."""
        empty, device = self.levels.empty, self.device
        place, upto = (torch.arange(1, count + 1, device=device) for count in (self.positives, NEIGHBOURS))
        rows, matches = slice(self.base + a, self.base + b), self.matches[a:b]
        own, near = self.own.level[rows], self.near.level[rows]
        ahead = self.negatives - torch.searchsorted(near.flip(1).contiguous(), own.contiguous())  # of equal levels the negative is
        rank = torch.where((own > empty) & (ahead < self.negatives), place + ahead, 2**62)
        relevant = matches.clamp(min=1)
        early = rank <= relevant[:, None]
        key, where = torch.cat([2 * (own - empty), 2 * (near - empty) + (near > empty)], 1).topk(NEIGHBOURS)
        number = self.numbers[torch.cat([self.own.place[rows], self.near.place[rows]], 1).gather(1, where).clamp(min=0)]
        return (
            torch.where(matches > 0, self.above[rows] + 1, 0),
            (early * place / rank.double()).sum(1) / relevant,
            early.sum(1) / relevant.double(),
            (rank[:, :NEIGHBOURS, None] <= upto).sum(1),
            torch.where(key > 0, number, -1),
            self.levels.score((key / 2).floor() + empty),
        )

    def _pairs(self) -> tuple[Tensor, ...]:
        histogram = self.histogram
        histogram.flush()
        histogram.flush_fine()
        fine, same, counts = histogram.fine, self.ranks.reduce(self.same), self.ranks.reduce(histogram.counts)
        bins = self.ranks.reduce(histogram.bins)[: fine // _COARSE].double()
        # Same pairs are few, and of each the level is known: it has a row of its own, and parts the bin that it lies in. Not so where
        # the bin's different pairs are not spread over it: as many more than in the bins beside it are of one score.
        beside = pad(bins, (1, 1))
        spread = bins <= 0.75 * (beside[:-2] + beside[2:])
        alone = same[:fine].nonzero().flatten()
        alone = alone[spread[alone // _COARSE]]
        starts = torch.zeros(fine + 1, dtype=torch.bool, device=self.device)
        starts[torch.cat([torch.arange(0, fine + 1, _COARSE, device=self.device), alone, alone + 1])] = True
        ends = starts.nonzero().flatten()
        inside, width = ends[:-1], ends.diff().double()
        above = (same + counts)[fine:].nonzero().flatten() + fine  # of the levels themselves most are of no pair
        lowest, width = torch.cat([inside, above]), torch.cat([width, torch.ones_like(above, dtype=torch.float64)])
        different = torch.cat([bins[inside // _COARSE] * width[: len(inside)] / _COARSE, counts[above].double()])
        same = torch.cat([pad(same[:fine].cumsum(0), (1, 0))[ends].diff(), same[above]]).double()
        different[lowest < (_COARSE if fine else 1)] = 0  # no pairs
        used = (same + different).nonzero().flatten().flip(0)
        twice = 2 if self.itself and not self.both else 1  # rows that are whole hold each pair from either side
        score = (lowest[used].double() + self.levels.empty) * self.levels.step
        return score, same[used] / twice, different[used] / twice, width[used] * self.levels.step
