"""The figures as torchmetrics: for anyone's LightningModule or loop, and the ones that `SiameseModule` validates with.

    metrics = EmbeddingMetrics(CosineSimilarity())
    for inputs, labels in loader:
        metrics.update(encoder(inputs), labels)
    metrics.compute()["recall_at_1"]

Unlike torchmetrics' own curves, which pass anything outside 0..1 through a sigmoid batch by batch, scores are taken as they are.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from siamese._walk import Ranks, walk
from siamese.evaluation import RECALL_AT, check_judgeable, evaluate_pairs, figures_of


class EmbeddingMetrics(Metric):
    """All figures of retrieval and of verification, every sample a query against all the others.

    `update(embeddings, labels, indices=None)`: float [B, D], int64 [B], and the samples' numbers in the data set, int64 [B]. A
    `DistributedSampler` repeats samples to make the ranks' shares even: of a number that comes again, on any rank, the first counts.
    `compute()`: name -> value, float64; see `siamese.evaluation.evaluate`.

    Over several processes every rank keeps the embeddings that it was given; they compute together, so all must call `compute`.

    Args:
        distance: the one the embeddings were trained with. It is the caller's, and its weights are not in this metric's state.
        recall_at: each K of recall_at_K.

    Raises:
        ValueError: from `compute`, an embedding is not finite (names its number), or there is nothing to compare.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, distance: Module, recall_at: tuple[int, ...] = RECALL_AT):
        super().__init__(sync_on_compute=False)
        self._distance = (distance,)  # in a tuple it is no submodule: the model that it belongs to saves and moves it
        self.recall_at = recall_at
        for name in ("embeddings", "labels", "indices"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        self.embeddings.append(embeddings.detach())
        self.labels.append(labels.detach().to(embeddings.device))
        missing = torch.full_like(labels, -1) if indices is None else indices
        self.indices.append(missing.to(embeddings.device))

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        ranks = Ranks(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        embeddings, labels, indices = self._gathered(ranks)
        first = self._first_of_each(indices, ranks)
        embeddings, labels, indices = embeddings[first], labels[first], indices[first]
        names = [str(index) for index in indices.tolist()] if (indices >= 0).all() else None
        check_judgeable(embeddings, torch.cat(ranks.gather(labels)), names)
        found = walk(embeddings, labels, self._distance[0], together=ranks.size > 1)
        figures = figures_of(found, self.recall_at, together=ranks.size > 1)[0]
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}

    def _gathered(self, ranks: Ranks) -> list[Tensor]:
        """The states as one tensor each; a rank that was given nothing learns the embeddings' size from the others."""
        states = [self.embeddings, self.labels, self.indices]
        states = [torch.cat(list(state)) if isinstance(state, list) and state else state for state in states]
        size = ranks.reduce(torch.tensor(states[0].shape[1] if isinstance(states[0], Tensor) else 0, device=self.device), "MAX")
        empty = [torch.empty(0, int(size), device=self.device), *[torch.empty(0, dtype=torch.int64, device=self.device)] * 2]
        return [state if isinstance(state, Tensor) else nothing for state, nothing in zip(states, empty, strict=True)]

    @staticmethod
    def _first_of_each(indices: Tensor, ranks: Ranks) -> Tensor:
        """Which samples of this rank have a number that has not come before, on this rank or on an earlier one; or have none."""
        parts = ranks.gather(indices)
        everything = torch.cat(parts)
        order = everything.argsort(stable=True)
        again = torch.zeros(len(everything), dtype=torch.bool, device=indices.device)
        again[order[1:]] = everything[order[1:]] == everything[order[:-1]]
        start = sum(map(len, parts[: ranks.rank]))
        return ~again[start : start + len(indices)] | (indices < 0)


class PairMetrics(Metric):
    """Figures of verification of a list of pairs: auc, eer, tar_at_far_..., average_precision, best_f1, threshold, accuracy.

    `update(scores, same)`: float [B], higher is more alike, and bool [B]. `compute()`: name -> value, float64.

    Args:
        threshold: from which a pair counts as the same, fitted on other pairs; None fits it here, at equal error.

    Raises:
        ValueError: from `compute`, a score is not finite (names its place), or all pairs are the same, or different.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, threshold: float | None = None):
        super().__init__()
        self.threshold = threshold
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("same", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, same: Tensor) -> None:
        self.scores.append(scores.detach().double())
        self.same.append(same.detach().bool().to(scores.device))

    def compute(self) -> dict[str, Tensor]:
        states = [torch.cat(list(state)) if isinstance(state, list) and state else state for state in (self.scores, self.same)]
        scores, same = (state if isinstance(state, Tensor) else torch.empty(0) for state in states)
        figures = evaluate_pairs(scores, same.bool(), threshold=self.threshold)[0]
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
