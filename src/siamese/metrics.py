"""The figures as torchmetrics: for anyone's LightningModule or loop, and the ones that `SiameseModule` validates with.

    metrics = EmbeddingMetrics(CosineSimilarity())
    for inputs, labels in loader:
        metrics.update(encoder(inputs), labels)
    metrics.compute()["recall_at_1"]

Unlike torchmetrics' own curves, which pass anything outside 0..1 through a sigmoid batch by batch, scores are taken as they are.
"""

import copy
import itertools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from siamese._walk import Ranks, walk
from siamese.evaluation import RECALL_AT, check_gallery, check_judgeable, evaluate_pairs, figures_of


class _Kept(Metric):
    """Keeps all it is given, in lists, on the device it came from, and out of `state_dict`.

    Nothing is cached: a rank that had been given nothing since would not take part when the others compute again.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def __init__(self, prefix: str, *states: str):
        super().__init__(compute_with_cache=False)
        self.prefix = prefix
        for name in states:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def forward(self, *args, **kwargs) -> None:
        """`update`, and no more: one batch has other figures than the whole, or none."""
        self.update(*args, **kwargs)

    def merge_state(self, incoming_state: dict | Metric) -> None:
        """As in torchmetrics, but what is merged comes after what is here."""
        own = self.metric_state
        super().merge_state(incoming_state)
        for name, kept in own.items():
            merged = getattr(self, name)
            setattr(self, name, kept + merged[: len(merged) - len(kept)])

    def _named(self, figures: dict[str, float], device: torch.device) -> dict[str, Tensor]:
        options = {"dtype": torch.float64, "device": _precise(device)}
        return {f"{self.prefix}{name}": torch.tensor(value, **options) for name, value in figures.items()}


class EmbeddingMetrics(_Kept):
    """All figures of retrieval and of verification, every sample a query against all the others, or queries against a gallery.

    `update(embeddings, labels, indices=None, gallery=None)`: float [B, D], int64 [B]; the samples' numbers in the data set, int64
    [B]: a `DistributedSampler` repeats samples to make the ranks' shares even, and of a number that comes again, on any rank, the
    first counts; and bool [B], which are the gallery: given with all samples, the others are compared with these alone.
    `compute()`: name -> value, float64; see `siamese.evaluation.evaluate`. `clone()` shares the distance, as it may be in training;
    `copy.deepcopy` and pickle copy it.

    Over several processes every rank keeps the embeddings that it was given; they compute together, so all must call `compute`.

    Args:
        distance: the one the embeddings were trained with. It is the caller's, and its weights are not in this metric's state.
        recall_at: each K of recall_at_K.
        prefix: of the figures' names.

    Raises:
        ValueError: from `update`, shapes do not fit. From `compute`, on every rank, an embedding is not finite (names its number, or
            where it came), there is nothing to compare, or `gallery` was given with some samples and not with others.
    """

    def __init__(self, distance: Module, recall_at: tuple[int, ...] = RECALL_AT, prefix: str = ""):
        super().__init__(prefix, "embeddings", "labels", "indices", "roles")
        self._distance = (distance,)  # in a tuple it is no submodule: the model that it belongs to saves and moves it
        self.recall_at = recall_at

    def update(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, gallery: Tensor | None = None) -> None:
        none = torch.full_like(labels, -1)
        given = {"labels": labels, "indices": none if indices is None else indices, "roles": none if gallery is None else gallery.long()}
        if embeddings.ndim != 2 or any(tensor.shape != embeddings.shape[:1] for tensor in given.values()):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (embeddings, *given.values()))
            raise ValueError(f"embeddings are [B, D], labels, indices and gallery [B], not {shapes}")
        self.embeddings.append(embeddings.detach())
        for name, tensor in given.items():
            getattr(self, name).append(tensor.detach().to(embeddings.device))

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        ranks = Ranks(dist.is_available() and dist.is_initialized())
        embeddings, labels, indices, roles = self._whole(ranks)
        numbers = ranks.gather(indices)
        firsts = _first_of_each(torch.cat(numbers)).split([len(part) for part in numbers])
        if not firsts[ranks.rank].all():
            embeddings, labels, roles = (state[firsts[ranks.rank]] for state in (embeddings, labels, roles))
        # All ranks learn of what is wrong on one of them: else they would wait for it.
        flaws = torch.cat(ranks.gather(torch.where(embeddings.isfinite().all(1), 0.0, torch.nan)))
        names = _names(numbers, firsts) if flaws.isnan().any() else None
        all_labels, all_roles = (torch.cat(ranks.gather(state)) for state in (labels, roles))
        gallery = None
        check_judgeable(flaws[:, None], None if (all_roles >= 0).any() else all_labels, names)
        if (all_roles >= 0).any():
            if (all_roles < 0).any():
                raise ValueError("gallery was given with some samples and not with others: it must come with all of them, or with none")
            check_gallery(all_labels[all_roles == 0], all_labels[all_roles == 1])
            gallery = embeddings[roles == 1], labels[roles == 1]
            embeddings, labels = embeddings[roles == 0], labels[roles == 0]
        found = walk(embeddings, labels, self._distance_on(embeddings.device), gallery, together=ranks.size > 1)
        return self._named(figures_of(found, self.recall_at, together=ranks.size > 1)[0], embeddings.device)

    def sync(self, *args, **kwargs) -> None:
        """Nothing: embeddings stay on their ranks."""

    def unsync(self, *args, **kwargs) -> None:
        """Nothing either."""

    def clone(self) -> "EmbeddingMetrics":
        return copy.deepcopy(self, {id(self._distance[0]): self._distance[0]})

    def _distance_on(self, device: torch.device) -> Module:
        distance = self._distance[0]
        elsewhere = any(tensor.device != device for tensor in itertools.chain(distance.parameters(), distance.buffers()))
        return copy.deepcopy(distance).to(device) if elsewhere else distance

    def _whole(self, ranks: Ranks) -> list[Tensor]:
        """The states as one tensor each; a rank that was given nothing learns from the others what embeddings are like."""
        device = self.embeddings[0].device if self.embeddings else self.device
        size = max((part.shape[1] for part in self.embeddings), default=0)
        double = any(part.dtype == torch.float64 for part in self.embeddings)
        size, double = ranks.reduce(torch.tensor([size, double], device=device), "MAX").tolist()
        device = _precise(device)
        empty = torch.empty(0, size, device=device, dtype=torch.float64 if double else torch.float32)
        nothing = torch.empty(0, device=device, dtype=torch.int64)
        states = ((empty, self.embeddings), (nothing, self.labels), (nothing, self.indices), (nothing, self.roles))
        return [torch.cat([kind, *(part.to(kind) for part in parts)]) for kind, parts in states]


def _precise(device: torch.device) -> torch.device:
    """This one, if it has double precision."""
    return torch.device("cpu") if device.type == "mps" else device


def _first_of_each(numbers: Tensor) -> Tensor:
    """int64 [N] -> bool [N]: which have not come before, or are negative, which is none."""
    order = numbers.argsort(stable=True)
    again = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)
    again[order[1:]] = numbers[order[1:]] == numbers[order[:-1]]
    return ~again | (numbers < 0)


def _names(numbers: list[Tensor], firsts: tuple[Tensor, ...]) -> list[str]:
    """Of the samples of all ranks that count: their numbers, or, of those that have none, where they came."""
    names = []
    for rank, (part, first) in enumerate(zip(numbers, firsts, strict=True)):
        where = f" of rank {rank}" if len(numbers) > 1 else ""
        names += [f"{row}{where}" if part[row] < 0 else str(int(part[row])) for row in first.nonzero().flatten().tolist()]
    return names


class PairMetrics(_Kept):
    """Figures of verification of a list of pairs: auc, eer, tar_at_far_..., average_precision, best_f1, threshold, accuracy.

    `update(scores, same)`: float [B], higher is more alike, and bool [B]. `compute()`: name -> value, float64. Over several processes
    all pairs are gathered on each; pairs that a sampler repeated count again.

    Args:
        threshold: from which a pair counts as the same, fitted on other pairs; None fits it here, at equal error.
        prefix: of the figures' names.

    Raises:
        ValueError: from `update`, shapes do not fit. From `compute`, a score is not finite (names its place), or all pairs are the
            same, or different.
    """

    def __init__(self, threshold: float | None = None, prefix: str = ""):
        super().__init__(prefix, "scores", "same")
        self.threshold = threshold

    def update(self, scores: Tensor, same: Tensor) -> None:
        if scores.ndim != 1 or same.shape != scores.shape:
            raise ValueError(f"scores and same are [B] both, not {list(scores.shape)} and {list(same.shape)}")
        self.scores.append(scores.detach())
        self.same.append(same.detach().bool().to(scores.device))

    def compute(self) -> dict[str, Tensor]:
        scores, same = (dim_zero_cat(state) if len(state) else torch.empty(0, device=self.device) for state in (self.scores, self.same))
        return self._named(evaluate_pairs(scores, same, threshold=self.threshold)[0], scores.device)

    def sync(self, *args, **kwargs) -> None:
        if isinstance(self.scores, list) and self.distributed_available_fn():
            # What is gathered must have one type on all ranks, those without pairs too.
            empty = torch.empty(0, dtype=torch.float64, device=self.scores[0].device if self.scores else self.device)
            self.scores, self.same = [torch.cat([empty, *self.scores])], [torch.cat([empty.bool(), *self.same])]
        super().sync(*args, **kwargs)
