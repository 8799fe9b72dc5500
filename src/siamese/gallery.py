"""Enrolled references, held in memory and searched exactly: all that a new class needs is one of them."""

import math
from typing import NamedTuple

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor
from torch.nn import Module

from siamese.distances import pair_scores, scores

RULES = ("nearest", "prototype")
_BLOCK = 2**14  # references in one tensor: what is added or removed copies no more than its own blocks
_COLUMNS = 2**11  # that are compared at a time: their scores stay in the processor's cache
_QUERIES = 256
_TEXT = np.dtypes.StringDType()
_ROWS = 2048
_SPARE = 4  # candidates beyond those asked for: single precision may put them in another order


class Match(NamedTuple):
    """A class, the score of a query with it (higher is more alike), and the id of the reference that gave it; "" of a prototype."""

    label: str
    score: float
    reference: str


def enrolment(labels: list[str], embeddings: Tensor, ids: list[str], embedding_size: int) -> tuple[list[str], Tensor, list[str]]:
    """What a gallery is to add, once each: of two references with the same class and id the later counts.

    Raises:
        ValueError: see `Gallery.add`.
    """
    if embeddings.dim() != 2 or embeddings.shape[1] != embedding_size or not len(labels) == len(ids) == len(embeddings):
        raise ValueError(
            f"embeddings are {list(embeddings.shape)}, with {len(labels)} labels and {len(ids)} ids: the gallery's are "
            f"[{len(ids)}, {embedding_size}]"
        )
    if broken := [name for name, fine in zip(ids, embeddings.isfinite().all(1).tolist(), strict=True) if not fine]:
        raise ValueError(f"embeddings of {len(broken)} references are NaN or infinite, among them {broken[0]}")
    if not all(labels):
        raise ValueError(f"{ids[labels.index('')]} has no class")
    last = {key: place for place, key in enumerate(zip(labels, ids, strict=True))}  # of two equal ones the later counts
    kept = sorted(last.values())
    if len(kept) == len(ids):
        return labels, embeddings, ids
    return [labels[i] for i in kept], embeddings[kept], [ids[i] for i in kept]


def check_search(queries: Tensor, k: int, rule: str, gallery) -> None:
    """Raises ValueError where `Gallery.search` does."""
    if rule not in RULES or k < 1:
        raise ValueError(f"the rule is one of {', '.join(RULES)}, not {rule!r}, and k at least 1, not {k}")
    if not len(gallery):
        raise ValueError("nothing is enrolled in this gallery yet")
    if queries.dim() != 2 or queries.shape[1] != gallery.embedding_size:
        raise ValueError(f"queries are {list(queries.shape)}, the gallery's embeddings have {gallery.embedding_size} numbers")


class Gallery:
    """References, each an embedding with a class and an id. A class may have one, or many.

    Memory: 4 bytes for each number of an embedding, and 16, or some more than it is long, for each id.

    Args:
        distance: a pytorch-metric-learning distance, the one the embeddings were trained with. References are kept as it
            normalises them.
        embedding_size: of the embeddings.
    """

    def __init__(self, distance: Module, embedding_size: int):
        self.distance, self.embedding_size = distance, embedding_size
        self.blocks: list[Tensor] = []  # float32 [<= _BLOCK, D] each
        self.labels = torch.empty(0, dtype=torch.int64)  # [N], numbers of classes
        self.names: list[str] = []  # of the classes
        self.ids = np.empty(0, _TEXT)  # [N]
        self._numbers: dict[str, int] = {}
        self._prototypes: Tensor | None = None
        plain = getattr(distance, "p", None) == 2 and getattr(distance, "power", None) == 1
        self._product = plain and type(distance) in (CosineSimilarity, DotProductSimilarity)
        self._euclidean = plain and type(distance) is LpDistance

    def restore(self, blocks: list[Tensor], labels: Tensor, names: list[str], ids: np.ndarray) -> None:
        """Take over what another gallery of this kind has held, as it is: its references are normalised already."""
        self.blocks, self.labels, self.names, self.ids = blocks, labels, names, ids
        self._numbers, self._prototypes = {name: place for place, name in enumerate(names)}, None

    def __len__(self) -> int:
        return len(self.ids)

    def classes(self) -> dict[str, int]:
        """How many references each class has."""
        counts = torch.bincount(self.labels, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def of(self, label: str) -> tuple[Tensor, list[str]]:
        """The references of a class, float32 [n, D], and their ids."""
        rows = (self.labels == self._numbers[label]).nonzero().flatten()
        return self._take(rows), self.ids[rows.numpy()].tolist()

    @torch.no_grad()
    def add(self, labels: list[str], embeddings: Tensor, ids: list[str]) -> None:
        """Enrol float [n, D] embeddings; one whose class has a reference of the same id takes its place.

        Raises:
            ValueError: an embedding is not finite (names its id) or of another size; there are not as many labels and ids; a
                label is empty.
        """
        labels, embeddings, ids = enrolment(labels, embeddings, ids, self.embedding_size)
        known = [self._numbers[label] for label in dict.fromkeys(labels) if label in self._numbers]
        if known:
            keys, rows = set(zip(labels, ids, strict=True)), torch.isin(self.labels, torch.tensor(known)).nonzero().flatten().tolist()
            self._drop([row for row in rows if (self.names[self.labels[row]], self.ids[row]) in keys])
        for label in labels:
            if self._numbers.setdefault(label, len(self.names)) == len(self.names):
                self.names.append(label)
        self.labels = torch.cat([self.labels, torch.tensor([self._numbers[label] for label in labels], dtype=torch.int64)])
        self.ids = np.concatenate([self.ids, np.array(ids, _TEXT)])
        self._append(self.distance.maybe_normalize(embeddings.detach().cpu().float()))
        self._prototypes = None

    def _append(self, embeddings: Tensor) -> None:
        if self.blocks and len(self.blocks[-1]) < _BLOCK:
            embeddings = torch.cat([self.blocks.pop(), embeddings])
        self.blocks += [block if len(block) == len(embeddings) else block.clone() for block in embeddings.split(_BLOCK) if len(block)]

    def remove(self, label: str) -> int:
        """Forget a class; gives back how many references it had.

        Raises:
            KeyError: there is no such class.
        """
        number = self._numbers[label]
        rows = (self.labels == number).nonzero().flatten().tolist()
        self._drop(rows)
        self.names.pop(number)
        self._numbers = {name: place for place, name in enumerate(self.names)}
        self.labels -= (self.labels > number).long()
        return len(rows)

    def _drop(self, rows: list[int]) -> None:
        if not rows:
            return
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[rows] = False
        blocks, self.blocks = self.blocks, []
        for block, part in zip(blocks, kept.split([len(block) for block in blocks]), strict=True):
            self._append(block if part.all() else block[part])
        self.labels = self.labels[kept]
        self.ids = self.ids[kept.numpy()]
        self._prototypes = None

    @torch.no_grad()
    def search(self, queries: Tensor, k: int = 5, rule: str = "nearest") -> list[list[Match]]:
        """The k classes most alike to each of float [Q, D] queries, best first; fewer if there are no more.

        Args:
            rule: a class is as alike as its "nearest" reference, or as their mean, its "prototype" (Snell, Swersky and Zemel
                2017, arXiv:1703.05175).

        Raises:
            ValueError: another rule or size of the queries, or nothing is enrolled.
        """
        check_search(queries, k, rule, self)
        queries = self.distance.maybe_normalize(queries.detach().cpu().float())
        return [found for part in queries.split(_QUERIES) for found in self._search(part, k, rule)]

    def _search(self, queries: Tensor, k: int, rule: str) -> list[list[Match]]:
        if rule == "prototype":
            score, number = self._nearest(queries, [self._means()], min(k, len(self.names)))
            return [
                [Match(self.names[c], s, "") for s, c in zip(*both, strict=True)]
                for both in zip(score.tolist(), number.tolist(), strict=True)
            ]
        k = min(k, len(self.names))
        depth = k if len(self.names) == len(self) else 4 * k
        found: list[dict[int, Match]] = [{} for _ in queries]
        left = list(range(len(queries)))
        while left:  # where a few classes have all of the nearest references: look again, without these classes
            most = max(len(found[query]) for query in left)
            without = torch.tensor([[*found[query], *[-1] * (most - len(found[query]))] for query in left], dtype=torch.int64)
            score, row = self._nearest(queries[left], self.blocks, min(depth, len(self)), without)
            number = self.labels[row]
            for query, *both in zip(left, score.tolist(), row.tolist(), number.tolist(), strict=True):
                best = found[query]
                for s, r, c in zip(*both, strict=True):
                    if c not in best and len(best) < k and s > -math.inf:
                        best[c] = Match(self.names[c], s, self.ids[r])
            left = [query for query in left if len(found[query]) < k]
        return [list(best.values()) for best in found]

    def _nearest(self, queries: Tensor, blocks: list[Tensor], depth: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float64 scores and int64 rows, [Q, depth], of the references most alike, best first; of equal ones the first.

        Args:
            without: int64 [Q, m] numbers of classes that do not count, each query's own; their scores are -inf.
        """
        wanted = depth + _SPARE
        best, row = torch.full((len(queries), 0), -torch.inf), torch.empty(len(queries), 0, dtype=torch.int64)
        centre = torch.cat([block.mean(0, keepdim=True) for block in blocks]).mean(0) if self._centred else None
        room, mask, start = torch.empty(len(queries) * _COLUMNS), np.empty(len(queries) * _COLUMNS, bool), 0
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in (part for block in blocks for part in block.split(_COLUMNS)):
            alike = self._alike(queries, part, centre, room[: len(queries) * len(part)].view(len(queries), len(part)))
            for number in () if without is None else without.T:
                alike.masked_fill_(self.labels[start : start + len(part)] == number[:, None], -torch.inf)
            if best.shape[1] < wanted:
                value, place = alike.topk(min(wanted, len(part)))
                best, order = torch.cat([best, value], 1).topk(min(wanted, best.shape[1] + value.shape[1]))
                row = torch.cat([row, place + start], 1).gather(1, order)
            else:  # few reach what is found already; numpy finds them in a tenth of torch's time
                reached = np.greater(alike.numpy(), best[:, -1:].numpy(), out=mask[: alike.numel()].reshape(alike.shape))
                hit = torch.from_numpy(np.flatnonzero(reached))
                query = hit // len(part)
                found.append((query, alike.view(-1)[hit], hit - query * len(part) + start))
                if sum(len(one) for one, *_ in found) > 4 * len(queries):
                    best, row = _merged(best, row, found)
                    found = []
            start += len(part)
        best, row = _merged(best, row, found)
        row, order = row.sort(1)
        # In double precision, as they are told: in the order of single precision two may have changed places.
        exact = self._exact(queries, self._take(row.flatten(), blocks).view(*row.shape, -1))
        exact = exact.masked_fill(best.gather(1, order) == -torch.inf, -torch.inf)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        return exact[:, :depth], row.gather(1, order[:, :depth])

    def _exact(self, queries: Tensor, references: Tensor) -> Tensor:
        """float64 [Q, m] scores of [Q, D] queries with references of their own, [Q, m, D]."""
        if not (self._product or self._euclidean):
            pairs = queries.repeat_interleave(references.shape[1], 0), references.flatten(0, 1)
            return pair_scores(self.distance, *pairs).view(references.shape[:2])
        queries, references = queries.double(), references.double()  # normalised already, where the distance does that
        if self._product:
            return torch.bmm(references, queries[..., None])[..., 0]
        return -(references - queries[:, None]).norm(dim=2)

    @property
    def _centred(self) -> bool:
        return self._euclidean and not self.distance.normalize_embeddings

    def _alike(self, queries: Tensor, references: Tensor, centre: Tensor | None, room: Tensor) -> Tensor:
        """float32 [Q, R], in the order of the scores along each row; in this room, which the next call overwrites."""
        if self._product:
            return torch.mm(queries, references.T, out=room)
        if self._euclidean:  # |q - r|^2 is |q|^2 - 2 q r + |r|^2; near the centre little is lost to rounding
            if centre is not None:
                queries, references = queries - centre, references - centre
            return torch.addmm(references.square().sum(1), queries, references.T, beta=-1, alpha=2, out=room)
        return scores(self.distance, queries, references).contiguous()

    def _take(self, rows: Tensor, blocks: list[Tensor] | None = None) -> Tensor:
        """float32 [n, D], the references of these rows."""
        blocks = self.blocks if blocks is None else blocks
        taken, start = torch.empty(len(rows), self.embedding_size), 0
        for block in blocks:
            inside = ((rows >= start) & (rows < start + len(block))).nonzero().flatten()
            taken[inside] = block[rows[inside] - start]
            start += len(block)
        return taken

    def _means(self) -> Tensor:
        """float32 [C, D], the mean reference of each class."""
        if self._prototypes is None:
            total = torch.zeros(len(self.names), self.embedding_size, dtype=torch.float64)
            for block, labels in zip(self.blocks, self.labels.split([len(block) for block in self.blocks]), strict=True):
                total.index_add_(0, labels, block.double())
            mean = total / torch.bincount(self.labels, minlength=len(self.names))[:, None]
            self._prototypes = self.distance.maybe_normalize(mean).float()
        return self._prototypes


def _merged(best: Tensor, row: Tensor, found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The best [Q, w] scores and their rows, after a look at more of them: (query, score, row) of each that was found."""
    if not found:
        return best, row
    query, score, place = (torch.cat(parts) for parts in zip(*found, strict=True))
    query, order = query.sort(stable=True)
    counts = torch.bincount(query, minlength=len(best))
    which = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    scores = torch.full((len(best), int(counts.max())), -torch.inf)
    rows = torch.zeros_like(scores, dtype=torch.int64)
    scores[query, which], rows[query, which] = score[order], place[order]
    best, order = torch.cat([best, scores], 1).topk(best.shape[1])
    return best, torch.cat([row, rows], 1).gather(1, order)


@torch.no_grad()
def pairs_above(distance: Module, embeddings: Tensor, threshold: float, most: int = 10_000_000) -> tuple[Tensor, Tensor]:
    """All pairs of float [N, D] embeddings whose score reaches the threshold, the most alike first.

    Returns:
        int64 [P, 2] rows, the first the smaller, and float64 [P] scores. Memory is that of the pairs, and of a block of scores.

    Raises:
        ValueError: they are more than `most`.
    """
    rows, exact, count = [], [], 0
    for a in range(0, len(embeddings), _ROWS):
        for b in range(a, len(embeddings), _ROWS):
            left, right = embeddings[a : a + _ROWS], embeddings[b : b + _ROWS]
            block = scores(distance, left, right)
            near = block >= threshold - 1e-4 * max(abs(threshold), 1)  # in single precision; which of them do is seen below
            pairs = (near.triu(1) if a == b else near).nonzero()
            score = pair_scores(distance, left[pairs[:, 0]], right[pairs[:, 1]])
            kept = score >= threshold
            rows.append(pairs[kept] + torch.tensor([a, b]))
            exact.append(score[kept])
            count += len(exact[-1])
            if count > most:
                raise ValueError(f"more than {most:,} pairs reach the threshold {threshold:.4f}: ask for fewer false accepts")
    rows, exact = torch.cat(rows or [torch.empty(0, 2, dtype=torch.int64)]), torch.cat(exact or [torch.empty(0, dtype=torch.float64)])
    order = exact.argsort(descending=True, stable=True)
    return rows[order], exact[order]
