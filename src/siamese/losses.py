"""Losses that pytorch-metric-learning lacks, or whose own there need too much memory or leave something out.

The names are pytorch-metric-learning's where the loss is: a cross-batch memory knows the losses that it supports by name.
All are called as there: `loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)` with float [B, D], int
[B], and triplets (anchors, positives, negatives) or pairs (anchors, positives, anchors, negatives), each int64 [T] or [P] and
[N], or None for all pairs that the labels allow; with `ref_emb` [R, D], positives and negatives are rows of it. Returns a scalar.
"""

import math

import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs
from torch import Tensor, nn
from torch.nn.functional import softplus


def logsumexp_per_anchor(values: Tensor, anchors: Tensor, count: int) -> Tensor:
    """[N] values and the anchor, 0..count-1, of each -> [count] log of the sum of exp(value) per anchor; -inf for none."""
    largest = values.new_full((count,), -torch.inf).scatter_reduce(0, anchors, values.detach(), "amax")
    total = values.new_zeros(count).index_add(0, anchors, (values - largest[anchors]).exp())
    # Only an anchor without values has a total of 0: the logarithm's gradient would be NaN there, which anomaly detection stops at.
    return largest + total.masked_fill(total == 0, 1).log()


class NTXentLoss(pml.NTXentLoss):
    """pytorch-metric-learning's NTXentLoss (Sohn 2016; Chen et al. 2020, arXiv:2002.05709) in O(B^2) memory for a batch of B:

    -log(exp(s_ap / t) / (exp(s_ap / t) + sum over the anchor's negatives n of exp(s_an / t))) for each positive pair.

    The sum is made once per anchor, where pytorch-metric-learning makes a matrix of all positive by all negative pairs. The
    one difference: there the loss of a pair ends at -log of the smallest normal float, 87 in float32, and has no gradient
    from there on, which small temperatures reach; here it goes on.
    """

    def _compute_loss(self, pos_pairs, neg_pairs, indices_tuple):
        a1, p, a2, _ = indices_tuple
        if len(a1) == 0 or len(a2) == 0:
            return self.zero_losses()
        scale = (1 if self.distance.is_inverted else -1) / self.temperature
        negatives = logsumexp_per_anchor(neg_pairs * scale, a2, 1 + int(max(a1.max(), a2.max())))
        losses = softplus(negatives[a1] - pos_pairs * scale, threshold=40)  # above 20, torch's threshold, float64 would lose digits
        return {"loss": {"losses": losses, "indices": (a1, p), "reduction_type": "pos_pair"}}


class LiftedStructureLoss(pml.LiftedStructureLoss):
    """pytorch-metric-learning's LiftedStructureLoss (Oh Song et al. 2016, arXiv:1511.06452) in O(B^2) memory for a batch of B:

    max(0, log(sum over negatives n of anchor and of positive of exp(neg_margin - d_n)) + d_ap - pos_margin)^2 / 2 for each
    positive pair.

    The sums are made once per anchor, where pytorch-metric-learning makes a matrix of all positive by all negative pairs. As
    there, a positive's negatives are those that have it as their anchor, by its index: with `ref_emb`, whose rows are no
    anchors, these are the negatives of the batch's row of the same number.
    """

    def _compute_loss(self, pos_pairs, neg_pairs, indices_tuple):
        a1, p, a2, _ = indices_tuple
        if len(a1) == 0 or len(a2) == 0:
            return self.zero_losses()
        count = 1 + max(int(part.max()) for part in (a1, p, a2))
        negatives = logsumexp_per_anchor(self.distance.margin(self.neg_margin, neg_pairs), a2, count)
        of_anchor, of_positive = negatives[a1], negatives[p].masked_fill(a1 == p, -torch.inf)  # each negative once
        none = (of_anchor == -torch.inf) & (of_positive == -torch.inf)
        both = torch.logaddexp(of_anchor.masked_fill(none, 0), of_positive.masked_fill(none, 0)).masked_fill(none, 0)
        losses = torch.relu(both + self.distance.margin(pos_pairs, self.pos_margin)) ** 2 / 2  # each pair comes twice
        return {"loss": {"losses": losses, "indices": (a1, p), "reduction_type": "pos_pair"}}


class AngularLoss(pml.AngularLoss):
    """pytorch-metric-learning's AngularLoss (Wang et al. 2017, arXiv:1708.01682), between unit vectors throughout.

    There anchors and positives are normalised and the negatives are not, so that longer embeddings count for more. On
    embeddings that are unit vectors already the two are equal.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        embeddings, ref_emb = self.distance.normalize(embeddings), self.distance.normalize(ref_emb)
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


class SphereFaceLoss(pml.SphereFaceLoss):
    """pytorch-metric-learning's SphereFaceLoss (Liu et al. 2017, arXiv:1704.08063) on embeddings of one length, as in its revision
    SphereFace-R (Liu et al. 2021, arXiv:2109.05565).

    There the logits grow with the length of the embedding: from random weights the margin is violated so far that shrinking
    all embeddings to 0 lowers the loss most, and nothing else is learned.

    Args:
        margin: a whole number m; the angle to the own class counts m times.
        scale: of the logits, in place of the length.
    """

    def scale_logits(self, logits, embeddings):
        return logits * self.scale


class TupletMarginLoss(pml.TupletMarginLoss):
    """pytorch-metric-learning's TupletMarginLoss (Yu and Tao 2019, doi:10.1109/ICCV.2019.00659) in O(B^2) memory for a batch of B:

    log(1 + sum over the anchor's negatives n of exp(scale * (cos_an - cos(angle_ap - margin)))) for each positive pair.

    There the gradient is NaN between equal inputs, as the arc cosine's at 1 is infinite; here it ends at an angle of 0.0014.
    """

    def _compute_loss(self, pos_pairs, neg_pairs, indices_tuple):
        a1, p, a2, _ = indices_tuple
        if len(a1) == 0 or len(a2) == 0:
            return self.zero_losses()
        angles = torch.acos(pos_pairs.clamp(-1 + 1e-6, 1 - 1e-6))
        negatives = logsumexp_per_anchor(neg_pairs * self.scale, a2, 1 + int(max(a1.max(), a2.max())))
        losses = softplus(negatives[a1] - torch.cos(angles - self.margin) * self.scale, threshold=40)
        return {"loss": {"losses": losses, "indices": (a1, p), "reduction_type": "pos_pair"}}


class HistogramLoss(pml.HistogramLoss):
    """pytorch-metric-learning's HistogramLoss (Ustinova and Lempitsky 2016, arXiv:1611.00822) in O(B^2) memory for a batch of B.

    There pairs are read off a list of all triplets, so that pairs of anchors without both a positive and a negative do not
    count, which a balanced batch does not have; and a similarity of 1, as between equal inputs, is an index error.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        a1, p, a2, n = convert_to_pairs(indices_tuple, labels)
        if len(a1) == 0 or len(a2) == 0:
            return self.zero_losses()
        similarities = self.distance(embeddings).clamp(-1, 1 - 1e-6)
        once = [torch.stack([left, right]).sort(0).values.unique(dim=1) for left, right in ((a1, p), (a2, n))]
        same, different = (self.compute_density(similarities[left, right]) for left, right in once)
        return {"loss": {"losses": torch.sum(different * same.cumsum(0)), "indices": None, "reduction_type": "already_reduced"}}


class NPairsLoss(pml.NPairsLoss):
    """pytorch-metric-learning's NPairsLoss (Sohn 2016, "Improved deep metric learning with multi-class N-pair loss objective") with
    a temperature.

    The paper bounds the length of the embeddings by a penalty. On the unit sphere, where they are judged here, its softmax of
    similarities between -1 and 1 is nearly flat: dividing them by a temperature gives it a gradient.

    Args:
        temperature: above 0; 1 is pytorch-metric-learning's.
    """

    def __init__(self, temperature: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.cross_entropy = _TemperedCrossEntropy(temperature)


class _TemperedCrossEntropy(nn.CrossEntropyLoss):
    def __init__(self, temperature: float):
        super().__init__(reduction="none")
        self.temperature = temperature

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(logits / self.temperature, target)


class PairBCELoss(pml.GenericPairLoss):
    """Binary cross-entropy of "same class", with p(same) = sigmoid(scale * score + bias); score = similarity, or -distance.

    With `siamese.distances.LearnedDistance` this is Koch, Zemel and Salakhutdinov's loss (2015), with a cosine similarity
    SigLIP's (Zhai et al. 2023, arXiv:2303.15343; they start at scale 10, bias -10). Positive and negative pairs are averaged by
    themselves and added (`pos_loss` + `neg_loss`), so that they weigh the same however many there are. As in all pair losses
    of pytorch-metric-learning, one positive and one negative pair, or fewer, are no batch: 0.

    `log_scale` and `bias` are trained. With a distance, bias / scale is the distance at which p(same) is 1/2.

    Args:
        scale: where it starts, above 0.
        bias: where it starts.

    Raises:
        ValueError: a scale that is not above 0.
    """

    def __init__(self, scale: float = 1.0, bias: float = 0.0, **kwargs):
        super().__init__(mat_based_loss=False, **kwargs)
        if scale <= 0:
            raise ValueError(f"scale must be above 0, not {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def _compute_loss(self, pos_pairs, neg_pairs, indices_tuple):
        pos_loss = softplus(-self.logits(pos_pairs)) if len(pos_pairs) else 0
        neg_loss = softplus(self.logits(neg_pairs)) if len(neg_pairs) else 0
        return {
            "pos_loss": {"losses": pos_loss, "indices": indices_tuple[:2], "reduction_type": "pos_pair"},
            "neg_loss": {"losses": neg_loss, "indices": indices_tuple[2:], "reduction_type": "neg_pair"},
        }

    def logits(self, pairs: Tensor) -> Tensor:
        """[P] of the distance or similarity -> [P] log-odds that the two are of one class."""
        return self.log_scale.exp() * (pairs if self.distance.is_inverted else -pairs) + self.bias

    def _sub_loss_names(self):
        return ["pos_loss", "neg_loss"]


class CrossBatchMemory(pml.CrossBatchMemory):
    """pytorch-metric-learning's CrossBatchMemory (Wang et al. 2020, arXiv:1912.06798): the batch against the last `memory_size`
    embeddings, without a gradient to these.

    Differences: where the queue stands is in the state_dict, so that a resumed run goes on with the same losses; tuples given by
    the caller are of the batch, also when the batch does not lie at the start of the memory; in evaluation mode the loss is
    of the batch alone and the memory stays as it is; `PairBCELoss` is supported; and `used` is how many tuples the last
    training batch had.

    Raises:
        ValueError: a training batch is larger than the memory.
    """

    @staticmethod
    def supported_losses():
        return [*pml.CrossBatchMemory.supported_losses(), "PairBCELoss"]

    def forward(self, embeddings, labels, indices_tuple=None, enqueue_mask=None):
        if not self.training:
            return self.loss(embeddings, labels, indices_tuple)
        size = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if size > self.memory_size:
            raise ValueError(f"a batch of {size} is more than a memory of {self.memory_size} holds: raise loss.memory_size")
        return super().forward(embeddings, labels, indices_tuple, enqueue_mask)

    def create_indices_tuple(self, embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons):
        if input_indices_tuple is not None:
            anchors = (0, 2) if len(input_indices_tuple) == 4 else (0,)
            at = self.curr_batch_idx
            input_indices_tuple = tuple(part if i in anchors else at[part] for i, part in enumerate(input_indices_tuple))
        tuples = super().create_indices_tuple(embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons)
        self.used = len(tuples[0]) if len(tuples) == 3 else len(tuples[0]) + len(tuples[2])
        return tuples

    def get_extra_state(self):
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state):
        self.queue_idx, self.has_been_filled = state["queue_idx"], state["has_been_filled"]
