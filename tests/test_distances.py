"""The learned distance against its definition, and under the losses and miners it is trained with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, MarginLoss, MultiSimilarityLoss, SupConLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from siamese.distances import LearnedDistance, scores


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def learned(weight: Tensor, **options) -> LearnedDistance:
    distance = LearnedDistance(len(weight), **options)
    distance.weight.data = weight
    return distance


def test_a_score_grows_with_likeness_for_every_distance():
    query, gallery = torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for distance in (CosineSimilarity(), LpDistance(), LearnedDistance(2)):
        near, far = scores(distance, query, gallery)[0]
        assert near > far


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_the_learned_distance_is_the_weighted_mean_of_absolute_differences(queries, references, size, seed):
    generator = torch.Generator().manual_seed(seed)
    q, r, w = (torch.randn(*shape, generator=generator) for shape in ((queries, size), (references, size), (size,)))
    distance = learned(w)
    expected = [[sum(abs(w[j].item()) * abs(a[j].item() - b[j].item()) for j in range(size)) / size for b in r] for a in q]
    assert torch.allclose(distance(q, r), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert torch.allclose(distance.pairwise_distance(q[:1].expand_as(r), r), distance(q, r)[0], rtol=1e-5, atol=1e-5)


def test_the_learned_distance_starts_as_plain_l1():
    q, r = torch.randn(4, 8), torch.randn(5, 8)
    assert torch.allclose(LearnedDistance(8)(q, r), torch.cdist(q, r, p=1) / 8)


def test_the_learned_distance_is_a_distance_though_weights_are_negative():
    points, distance = torch.randn(12, 6), learned(torch.tensor([-2.0, 1.0, -0.5, 0.0, 3.0, -1.0]))
    d = distance(points).detach()
    assert (d >= 0).all()
    assert (d.diagonal() == 0).all()
    assert (distance.pairwise_distance(points, points) == 0).all()
    assert torch.allclose(d, d.T)
    assert (d[:, None, :] <= d[:, :, None] + d.T[None, :, :] + 1e-4).all()
    assert not distance.is_inverted


def test_normalising_divides_by_the_l1_norm_first():
    q, r = torch.randn(3, 4), torch.randn(5, 4)
    distance = LearnedDistance(4, normalize_embeddings=True)
    assert torch.allclose(distance(q, r), distance(q * 7, r * 0.1), atol=1e-6)
    assert distance(q, r).max() <= 2
    assert not torch.allclose(LearnedDistance(4)(q, r), LearnedDistance(4)(q * 7, r))


def test_gradients_of_the_learned_distance_are_right_for_the_weight_and_both_sides():
    q, r, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (5, 4), (4,)))

    def measured(q, r, w):
        return torch.func.functional_call(LearnedDistance(4), {"weight": w}, (q, r))

    assert torch.autograd.gradcheck(measured, (q, r, w))


def test_equal_inputs_have_a_gradient_without_nan():
    q = torch.ones(3, 4, requires_grad=True)
    distance = LearnedDistance(4)
    (distance(q).sum() + distance.pairwise_distance(q, q.detach()).sum()).backward()
    assert (q.grad == 0).all()
    assert (distance.weight.grad == 0).all()


@pytest.mark.parametrize(
    "loss", [TripletMarginLoss, ContrastiveLoss, MarginLoss, MultiSimilarityLoss, SupConLoss], ids=lambda loss: loss.__name__
)
def test_every_loss_trains_the_weight_and_the_embeddings(loss):
    distance = LearnedDistance(4)
    options = {TripletMarginLoss: {"margin": 50}, ContrastiveLoss: {"neg_margin": 50}, MultiSimilarityLoss: {"base": 4}}
    embeddings, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) % 4
    loss(distance=distance, **options.get(loss, {}))(embeddings, labels).backward()
    for gradient in (embeddings.grad, distance.weight.grad):
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


def test_a_miner_and_a_memory_compare_with_a_reference_set():
    distance, loss = LearnedDistance(4), TripletMarginLoss(distance=LearnedDistance(4), margin=5)
    e, labels, ref, ref_labels = torch.randn(6, 4), torch.arange(6) % 2, torch.randn(9, 4), torch.arange(9) % 2
    triplets = BatchHardMiner(distance=distance)(e, labels, ref, ref_labels)
    assert len(triplets[0]) == 6
    assert loss(e, labels, triplets, ref, ref_labels) > 0


def test_double_precision_embeddings_are_compared_in_double_precision():
    q, r = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(LearnedDistance(4)(q, r), torch.cdist(q, r, p=1) / 4, rtol=1e-12)


def test_embeddings_of_another_size_are_refused():
    with pytest.raises(ValueError, match="of size 4, these have 1"):
        LearnedDistance(4)(torch.randn(3, 1))
    with pytest.raises(ValueError, match="of size 4, these have 1"):
        LearnedDistance(4)(torch.randn(3, 4), torch.randn(3, 1))


def test_no_tensor_holds_a_difference_vector_for_each_pair():
    peak = 0

    class Peak(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            peak = max([peak, *(t.numel() for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, Tensor))])
            return out

    distance, q = LearnedDistance(64), torch.randn(400, 64, requires_grad=True)
    with Peak():
        distance(q).sum().backward()
    assert peak == 400 * 400


def test_the_bound_is_reached_by_opposite_corners_and_never_passed():
    distance = learned(torch.tensor([-2.0, 1.0, 0.5]))
    assert distance.bound(torch.tensor([1.0, 2.0, 4.0])) == pytest.approx((2 + 2 + 2) / 3)
    points = torch.randn(40, 3)
    for other in (distance, learned(torch.ones(3), normalize_embeddings=True)):
        placed = other.maybe_normalize(points)
        assert other(points).max() <= other.bound(placed.amax(0) - placed.amin(0))
