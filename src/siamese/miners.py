"""Miners that pytorch-metric-learning lacks: one negative for each pair without listing all triplets, and a miner by epoch."""

import logging

import torch
from pytorch_metric_learning import miners
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_matches_and_diffs
from torch import Tensor, nn

log = logging.getLogger(__name__)

HARDNESSES = ("semihard", "hard")
# Elements that are looked at together: few enough to stay in a processor's cache.
_CHUNK = 2**18


class NegativePerPairMiner(BaseMiner):
    """One triplet for each (anchor, positive) of a batch, as in FaceNet (Schroff, Kalenichenko and Philbin 2015, arXiv:1503.03832).

    With gap = how much further from the anchor the negative is than the positive, the negative is the one nearest to the
    anchor among those with

    - semihard: 0 < gap <= margin;
    - hard: gap <= 0.

    A pair without such a negative gives no triplet; of equally near negatives the first is taken. The triplets are thus among
    those of `TripletMarginMiner(margin, type_of_triplets=hardness)`, but for a batch of B, of which P (anchor, positive)
    pairs are of one class, they need O(B^2) memory instead of O(B^3), and O(P B) time (hard: O(B^2)).

    `miner(embeddings, labels)`: float [B, D] and int [B] -> (anchors, positives, negatives), three int64 [T], ordered by anchor,
    then positive. With `ref_emb` [R, D] and `ref_labels` [R], positives and negatives are taken from these.

    Args:
        hardness: "semihard" or "hard".
        margin: in the units of the distance; for "hard" it has no effect.
        distance: any of pytorch-metric-learning's distances or similarities; Euclidean between unit vectors if not given.

    Raises:
        ValueError: no such hardness.
    """

    def __init__(self, hardness: str = "semihard", margin: float = 0.2, **kwargs):
        super().__init__(**kwargs)
        if hardness not in HARDNESSES:
            raise ValueError(f"hardness is one of {', '.join(HARDNESSES)}, not {hardness!r}")
        self.hardness, self.margin = hardness, margin

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances = self.distance(embeddings, ref_emb)
        if self.distance.is_inverted:
            distances = -distances
        positive, negative = get_matches_and_diffs(labels, ref_labels)
        anchors, positives = positive.nonzero(as_tuple=True)
        to_positive = distances[anchors, positives]
        to_negatives = distances.masked_fill_(~negative.bool(), torch.inf)
        if self.hardness == "hard":
            nearest, negatives = (part[anchors] for part in to_negatives.min(1))
            chosen = nearest <= to_positive
        else:
            nearest, negatives = torch.empty_like(to_positive), torch.empty_like(anchors)
            size = max(1, _CHUNK // len(ref_labels))
            for start in range(0, len(anchors), size):
                part = slice(start, start + size)
                further = to_negatives[anchors[part]]
                further.masked_fill_(further <= to_positive[part, None], torch.inf)
                nearest[part], negatives[part] = further.min(1)
            chosen = nearest - to_positive <= self.margin
        chosen &= nearest < torch.inf
        return anchors[chosen], positives[chosen], negatives[chosen]


class AngularMiner(miners.AngularMiner):
    """pytorch-metric-learning's AngularMiner (Wang et al. 2017, arXiv:1708.01682), between unit vectors, where the paper has it."""

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alone = ref_emb is embeddings
        embeddings = self.distance.normalize(embeddings)
        return super().mine(embeddings, labels, embeddings if alone else self.distance.normalize(ref_emb), ref_labels)


class ScheduledMiner(nn.Module):
    """Another miner from an epoch on: `ScheduledMiner({"early": None, "late": miner}, {"early": 0, "late": 8})`.

    The stage in use follows from the epoch alone, so that a resumed run has the right one: whoever trains calls `set_epoch`
    at the start of every epoch. Until then it is epoch 0's.

    Args:
        stages: a miner for each name; None takes all tuples that the labels allow.
        start_epoch: for each name the first epoch, counted from 0, of that stage; it lasts until another starts.

    Raises:
        ValueError: the two name different stages, none starts at epoch 0, two start together, or one starts before epoch 0.
    """

    def __init__(self, stages: dict[str, nn.Module | None], start_epoch: dict[str, int]):
        super().__init__()
        if stages.keys() != start_epoch.keys():
            raise ValueError(f"every stage needs a start_epoch: the stages are {list(stages)}, start_epoch has {list(start_epoch)}")
        starts = sorted(start_epoch.values())
        if not starts or starts[0] != 0:
            raise ValueError(f"the first stage of a scheduled miner starts at epoch 0, but start_epoch is {dict(start_epoch)}")
        if len(set(starts)) < len(starts):
            raise ValueError(f"two stages of a scheduled miner start at the same epoch: start_epoch is {dict(start_epoch)}")
        names = sorted(stages, key=start_epoch.__getitem__)
        self.starts = {name: start_epoch[name] for name in names}
        self.miners = nn.ModuleList(stages[name] for name in names)
        self._current = 0

    @property
    def stage(self) -> str:
        """The name of the stage in use."""
        return list(self.starts)[self._current]

    def set_epoch(self, epoch: int) -> None:
        """Use the stage of this epoch, the last that starts at it or before."""
        before = self._current
        self._current = sum(start <= epoch for start in self.starts.values()) - 1
        if self._current != before:
            miner = self.miners[self._current]
            log.info("epoch %d: miner stage %s (%s)", epoch, self.stage, "all tuples" if miner is None else type(miner).__name__)

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, ...] | None:
        """float [B, D] and int [B] -> the tuples of the stage's miner, or None."""
        miner = self.miners[self._current]
        if miner is None:  # a memory asks for its tuples, a batch alone needs none
            return None if ref_emb is None else get_all_pairs_indices(labels, ref_labels)
        return miner(embeddings, labels, ref_emb, ref_labels)
