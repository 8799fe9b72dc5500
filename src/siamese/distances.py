"""Distances are pytorch-metric-learning's; here is the one thing it lacks: a score that says the same of all of them.

A cosine similarity grows when two inputs are more alike, a Euclidean distance shrinks. A score always grows.
"""

from torch import Tensor
from torch.nn import Module


def scores(distance: Module, query: Tensor, gallery: Tensor) -> Tensor:
    """[Q, D] and [G, D] embeddings -> [Q, G] scores; higher is more alike."""
    matrix = distance(query, gallery)
    return matrix if distance.is_inverted else -matrix
