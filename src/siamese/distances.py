"""Distances are pytorch-metric-learning's; here are the two things it lacks.

A score that says the same of all of them: a cosine similarity grows when two inputs are more alike, a Euclidean distance
shrinks, a score always grows. And a distance that is learned.
"""

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor, nn
from torch.nn import Module

_CHUNK, _PAIRS = 256, 128


def scores(distance: Module, query: Tensor, gallery: Tensor) -> Tensor:
    """[Q, D] and [G, D] embeddings -> [Q, G] scores; higher is more alike."""
    matrix = distance(query, gallery)
    return matrix if distance.is_inverted else -matrix


def pair_scores(distance: Module, left: Tensor, right: Tensor) -> Tensor:
    """[P, D] and [P, D] embeddings -> float64 [P] (float32 on mps), the score of each with its own; higher is more alike."""
    # By the call that all distances have: pytorch-metric-learning's `pairwise_distance` neither normalises nor is exact.
    wide = torch.float32 if left.device.type == "mps" else torch.float64  # all that it has
    parts = zip(left.to(wide).split(_PAIRS), right.to(wide).split(_PAIRS), strict=True)
    return torch.cat([scores(distance, *pair).diagonal() for pair in parts] or [left.new_zeros(0, dtype=wide)])


class LearnedDistance(BaseDistance):
    """d(a, b) = mean over j of |w_j| |a_j - b_j|: the weighted L1 distance of Koch, Zemel and Salakhutdinov (2015), "Siamese
    neural networks for one-shot image recognition".

    `LearnedDistance(...)(query, reference)`: [Q, D] and [R, D] float embeddings -> [Q, R] distances from 0 up, in
    the wider of their type and float32, in O(Q R) memory. `weight`, float32 [D], starts at 1 and is trained.

    Unlike in the paper, weights count by their absolute value, so that this is a distance: never negative, 0 between equal
    inputs, and no way round is shorter; and the sum is a mean, so that margins and learning rates suit any D. The paper's
    bias and sigmoid are the loss's: `siamese.losses.PairBCELoss`.

    Args:
        embedding_size: D.
        normalize_embeddings: first divide every embedding by its L1 norm.

    Raises:
        ValueError: embeddings are not [N, D].
    """

    def __init__(self, embedding_size: int, normalize_embeddings: bool = False):
        super().__init__(normalize_embeddings=normalize_embeddings, p=1)
        self.weight = nn.Parameter(torch.ones(embedding_size))

    def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
        super().check_shapes(query_emb, ref_emb)
        for embeddings in (query_emb,) if ref_emb is None else (query_emb, ref_emb):
            if embeddings.shape[1] != len(self.weight):
                raise ValueError(f"this distance is of embeddings of size {len(self.weight)}, these have {embeddings.shape[1]}")

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        # |w| |a - b| = |wa - wb|, which needs no [Q, R, D]; a few hundred dimensions at a time stay in a processor's cache.
        weight = self.weight / len(self.weight)
        parts = zip((query_emb * weight).split(_CHUNK, 1), (ref_emb * weight).split(_CHUNK, 1), strict=True)
        return sum(torch.cdist(query, reference, p=1) for query, reference in parts)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return ((query_emb - ref_emb) * self.weight).abs().mean(1)

    @torch.no_grad()
    def bound(self, extent: Tensor) -> float:
        """No two embeddings are farther apart that differ by at most `extent`, [D], once normalised where the distance does that."""
        return (extent * self.weight).abs().mean().item()
