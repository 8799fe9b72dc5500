"""Losses against pytorch-metric-learning's where they are to be equal, against the papers' formulas where they are not."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer
from torch import Tensor, nn

from siamese import losses
from siamese.distances import LearnedDistance
from siamese.losses import CrossBatchMemory, PairBCELoss
from siamese.miners import NegativePerPairMiner

DISTANCES = {
    "cosine": CosineSimilarity(),
    "euclidean": LpDistance(normalize_embeddings=False),
    "unit euclidean": LpDistance(),
    "learned": LearnedDistance(5).double(),
}
SAME = {"NTXentLoss": {"temperature": 0.3}, "LiftedStructureLoss": {"neg_margin": 0.9, "pos_margin": 0.1}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def ours_and_pml(name: str, **options) -> tuple[nn.Module, nn.Module]:
    return getattr(losses, name)(**SAME[name], **options), getattr(pml, name)(**SAME[name], **options)


def value_and_gradients(loss: nn.Module, embeddings: Tensor, labels=None, tuples=None, ref=None, ref_labels=None) -> list[Tensor]:
    inputs = [part.detach().clone().requires_grad_() for part in (embeddings, ref) if part is not None]
    with torch.autograd.set_detect_anomaly(True):
        value = loss(inputs[0], labels, tuples, *([inputs[1], ref_labels] if len(inputs) > 1 else []))
        return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]


def assert_same(name: str, distance: nn.Module, *batch, **options) -> Tensor:
    mine, theirs = (value_and_gradients(loss, *batch) for loss in ours_and_pml(name, distance=distance, **options))
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return mine[0]


def batch(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# NTXent and lifted structure, in less memory


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradients_are_pmls_over_all_pairs(name, distance):
    assert assert_same(name, DISTANCES[distance], batch(15), torch.tensor([0] * 5 + [1] * 2 + [2] * 7 + [3])) > 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradients_are_pmls_with_a_reference_set(name, distance):
    assert assert_same(name, DISTANCES[distance], batch(8), torch.arange(8) % 3, None, batch(13, 1), torch.arange(13) % 4) > 0


@pytest.mark.parametrize("miner", [MultiSimilarityMiner(epsilon=0.5), TripletMarginMiner(margin=1), NegativePerPairMiner(margin=1)])
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradients_are_pmls_over_mined_tuples(name, miner):
    embeddings, labels = batch(16), torch.arange(16) % 4
    tuples = miner(embeddings, labels)
    assert len(tuples[0]) > 1
    assert assert_same(name, CosineSimilarity(), embeddings, labels, tuples) > 0


indices = st.lists(st.integers(0, 5), min_size=2, max_size=12)


@settings(max_examples=40, deadline=None)
@given(*[st.sampled_from(list(SAME)), st.sampled_from(list(DISTANCES)), st.booleans(), indices, indices, st.data()])
def test_loss_and_gradients_are_pmls_over_any_pairs(name, distance, with_reference, a1, a2, data):
    p, n = (data.draw(st.lists(st.integers(0, 5), min_size=len(part), max_size=len(part))) for part in (a1, a2))
    tuples = tuple(map(torch.tensor, (a1, p, a2, n)))
    if distance.endswith("euclidean"):  # the gradient of a root at 0 is whatever cdist makes of it
        keep = [torch.tensor(a) != torch.tensor(b) for a, b in ((a1, p), (a2, n))]
        tuples = tuple(part[keep[i // 2]] for i, part in enumerate(tuples))
    assert_same(name, DISTANCES[distance], batch(6), None, tuples, *([batch(6, 1)] if with_reference else []))


@pytest.mark.parametrize("name", SAME)
def test_an_anchor_without_negatives_counts_as_in_pml(name):
    tuples = tuple(map(torch.tensor, ([0, 2, 4], [1, 3, 5], [2, 2, 3], [0, 5, 1])))
    assert_same(name, CosineSimilarity(), batch(6), None, tuples)


@pytest.mark.parametrize("name", SAME)
def test_a_pair_of_an_input_with_itself_counts_its_negatives_once(name):
    tuples = tuple(map(torch.tensor, ([0, 1], [0, 2], [0, 0, 1], [3, 4, 3])))
    assert_same(name, CosineSimilarity(), batch(6), None, tuples)


@pytest.mark.parametrize("name", SAME)
def test_a_reducer_of_the_callers_choice_is_used(name):
    assert_same(name, CosineSimilarity(), batch(12), torch.arange(12) % 3, reducer=AvgNonZeroReducer())


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6)], ids=["one class", "singletons"])
def test_without_positives_or_negatives_the_loss_is_zero_and_has_a_gradient(name, labels):
    embeddings = batch(6).requires_grad_()
    loss = ours_and_pml(name)[0](embeddings, labels)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_where_pmls_ntxent_has_no_gradient_left_ours_still_has():
    embeddings, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.1], [-1.0, 0.0]]), torch.tensor([0, 0, 1, 1])
    mine, theirs = (value_and_gradients(kind(temperature=0.01), embeddings, labels) for kind in (losses.NTXentLoss, pml.NTXentLoss))
    assert theirs[0] < 88
    assert not theirs[1].any()
    assert mine[0] == pytest.approx(199, abs=1)
    assert mine[1].abs().max() > 1


PEAK = """
import sys
from pathlib import Path
import torch
from siamese import losses

def figure(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) / 1024

def step(size):
    embeddings = torch.randn(size, 128, requires_grad=True)
    getattr(losses, sys.argv[1])()(embeddings, torch.arange(size) // 4).backward()

torch.set_num_threads(1)
step(16)
before = figure("VmRSS")
step(1024)
print(figure("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("name", [*SAME, "AngularLoss"])
def test_a_batch_of_1024_takes_at_most_200_mib(name):
    done = subprocess.run([sys.executable, "-c", PEAK, name], capture_output=True, text=True, check=True)
    assert 4 < float(done.stdout) <= 200  # its matrix of similarities alone is 4


# Angular


def test_the_angular_loss_is_pmls_on_unit_vectors():
    e, ref = nn.functional.normalize(batch(12)), nn.functional.normalize(batch(9, 1))
    labels, ref_labels = torch.arange(12) % 3, torch.arange(9) % 4
    for more in ((), (None, ref, ref_labels), (TripletMarginMiner(margin=1)(e, labels),)):
        mine, theirs = (kind(alpha=35)(e, labels, *more) for kind in (losses.AngularLoss, pml.AngularLoss))
        assert mine > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)


def test_the_angular_loss_does_not_depend_on_the_length_of_embeddings():
    e, ref, labels, ref_labels = batch(12), batch(9, 1), torch.arange(12) % 3, torch.arange(9) % 4
    lengths = torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None]
    loss = losses.AngularLoss()
    torch.testing.assert_close(loss(e * lengths, labels), loss(e, labels))
    torch.testing.assert_close(loss(e, labels, None, ref * lengths[:9], ref_labels), loss(e, labels, None, ref, ref_labels))


def test_the_angular_loss_is_the_papers():
    e, labels, tangent = nn.functional.normalize(batch(8)), torch.arange(8) % 3, math.tan(math.radians(40)) ** 2
    expected = []
    for a in range(8):
        for p in range(8):
            if a != p and labels[a] == labels[p]:
                terms = [4 * tangent * (e[a] + e[p]) @ e[n] - 2 * (1 + tangent) * e[a] @ e[p] for n in range(8) if labels[n] != labels[a]]
                expected.append(math.log(1 + sum(math.exp(term) for term in terms)))
    assert losses.AngularLoss()(batch(8), labels).item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)


# Binary cross-entropy on pairs


@pytest.mark.parametrize("distance", DISTANCES)
def test_pair_bce_is_the_cross_entropy_of_the_two_kinds_each_averaged(distance):
    e, labels, scale, bias = batch(9), torch.tensor([0] * 5 + [1] * 3 + [2]), 3.0, 0.7
    matrix = DISTANCES[distance](e)
    p = torch.sigmoid(scale * (matrix if DISTANCES[distance].is_inverted else -matrix) + bias)
    same, itself = labels[:, None] == labels, torch.eye(9, dtype=torch.bool)
    expected = -p[same & ~itself].log().mean() - (1 - p[~same]).log().mean()
    loss = PairBCELoss(scale, bias, distance=DISTANCES[distance])(e, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_pair_bce_trains_its_scale_its_bias_and_the_distance():
    distance = LearnedDistance(5)
    loss = PairBCELoss(distance=distance)
    e = torch.randn(8, 5, requires_grad=True)
    loss(e, torch.arange(8) % 2).backward()
    for part in (loss.log_scale, loss.bias, distance.weight, e):
        assert part.grad.abs().sum() > 0


def test_pair_bce_learns_where_to_put_its_threshold():
    # Pairs of one class are 1 apart, the others 9 to 11: the scale starts too small and the threshold too low.
    e, labels = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 0, 1, 1])
    loss = PairBCELoss(scale=0.1, bias=0, distance=LpDistance(normalize_embeddings=False))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(e, labels).backward()
        optimizer.step()
    assert 1 < loss.bias / loss.log_scale.exp() < 9
    assert loss(e, labels) < 0.1


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]], ids=["positives", "negatives"])
def test_pair_bce_takes_a_batch_of_one_kind_of_pair(labels):
    e = batch(3).requires_grad_()
    loss = PairBCELoss(2.0, 0.5, distance=CosineSimilarity())
    value = loss(e, torch.tensor(labels))
    value.backward()
    sign = 1 if labels[1] == 0 else -1
    logits = 2 * CosineSimilarity()(e)[~torch.eye(3, dtype=torch.bool)] + 0.5
    torch.testing.assert_close(value, -torch.sigmoid(sign * logits).log().mean(), rtol=1e-6, atol=0)
    assert e.grad.abs().sum() > 0


def test_pair_bce_without_pairs_is_zero():
    assert PairBCELoss()(batch(1), torch.tensor([0])) == 0


def test_pair_bce_of_far_apart_pairs_neither_overflows_nor_stops_learning():
    e = torch.tensor([[0.0], [1e6], [1e6], [0.0]], requires_grad=True)
    value = PairBCELoss(distance=LpDistance(normalize_embeddings=False))(e, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == pytest.approx(1e6, rel=1e-3)
    assert e.grad.isfinite().all()
    assert e.grad.abs().max() > 0


@pytest.mark.parametrize("scale", [0, -1.0])
def test_pair_bce_refuses_a_scale_that_turns_likeness_round(scale):
    with pytest.raises(ValueError, match="scale must be above 0"):
        PairBCELoss(scale)


# The memory


def stream(seed: int = 0, size: int = 12):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def memory_of(size: int = 40, loss: nn.Module | None = None, **options) -> CrossBatchMemory:
    return CrossBatchMemory(loss or pml.ContrastiveLoss(), 8, memory_size=size, **options)


@pytest.mark.parametrize("steps", [2, 4, 9], ids=["filling", "just filled", "full"])
def test_a_memory_that_is_saved_and_loaded_goes_on_as_if_nothing_had_been(tmp_path, steps):
    batches = stream()
    going_on = memory_of(miner=NegativePerPairMiner(margin=1))
    for _ in range(steps):
        going_on(*next(batches))
    torch.save(going_on.state_dict(), tmp_path / "state.pt")
    loaded, forgetful = (memory_of(miner=NegativePerPairMiner(margin=1)) for _ in range(2))
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    forgetful.load_state_dict({**going_on.state_dict(), "_extra_state": forgetful.get_extra_state()})
    expected, after, forgotten = [], [], []
    for _ in range(6):
        e, labels = next(batches)
        for memory, into in ((going_on, expected), (loaded, after), (forgetful, forgotten)):
            into.append(memory(e, labels).item())
    assert after == expected
    assert forgotten != expected, "this test does not see where the queue stands"


def test_without_a_stop_the_memory_is_pmls():
    ours, theirs, batches = memory_of(), pml.CrossBatchMemory(pml.ContrastiveLoss(), 8, memory_size=40), stream()
    for _ in range(8):
        e, labels = next(batches)
        assert ours(e, labels) == theirs(e, labels)
        mask = torch.arange(12) < 6
        assert ours(e, labels, enqueue_mask=mask) == theirs(e, labels, enqueue_mask=mask)


def test_tuples_of_the_caller_are_pairs_of_the_batch_wherever_it_lies_in_the_memory():
    class Seen(pml.ContrastiveLoss):
        def forward(self, embeddings, labels, tuples, ref, ref_labels):
            seen.append((tuples, labels, ref, ref_labels))
            return super().forward(embeddings, labels, tuples, ref, ref_labels)

    Seen.__name__, seen, batches = "ContrastiveLoss", [], stream()
    memories = memory_of(loss=Seen()), memory_of(loss=Seen(), miner=TripletMarginMiner(margin=1))
    for _ in range(7):
        e, labels = next(batches)
        for memory in memories:
            for mine in (MultiSimilarityMiner(epsilon=0.5), NegativePerPairMiner(margin=1)):
                tuples = mine(e, labels)
                memory(e, labels, tuples)
                used, labels, ref, ref_labels = seen[-1]
                a, p, a2, n = used if len(used) == 4 else (used[0], used[1], used[0], used[2])
                assert (labels[a] == ref_labels[p]).all()
                assert (labels[a2] != ref_labels[n]).all()
                if len(used) == len(tuples):  # else they were converted
                    assert torch.equal(ref[p[-len(tuples[1]) :]], e[tuples[1]])


def test_evaluation_neither_reads_nor_writes_the_memory():
    memory, batches = memory_of(), stream()
    memory(*next(batches))
    before, (e, labels) = copy.deepcopy(memory.state_dict()), next(batches)
    assert memory.eval()(e, labels) == pml.ContrastiveLoss()(e, labels)
    after = memory.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v for k, v in before.items())


def test_a_batch_that_does_not_fit_the_memory_is_refused_with_the_setting_to_raise():
    with pytest.raises(ValueError, match=r"a batch of 12 is more than a memory of 11 holds: raise loss.memory_size"):
        memory_of(11)(*next(stream()))
    with pytest.raises(ValueError, match="a batch of 12"):
        memory_of(11)(*next(stream(size=14)), enqueue_mask=torch.arange(14) < 12)
    memory_of(12)(*next(stream()))


@pytest.mark.parametrize(
    "loss", [losses.NTXentLoss(), losses.LiftedStructureLoss(), losses.AngularLoss(), PairBCELoss()], ids=lambda loss: type(loss).__name__
)
def test_the_losses_of_this_module_work_with_a_memory(loss):
    memory, batches = memory_of(loss=loss), stream()
    for _ in range(5):
        e, labels = next(batches)
        value = memory(e.requires_grad_(), labels)
        value.backward()
        assert value > 0
        assert e.grad.isfinite().all()
        assert e.grad.abs().sum() > 0


def test_a_loss_without_pairs_has_no_use_for_a_memory():
    with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
        memory_of(loss=pml.ArcFaceLoss(4, 8))


# Tuplet margin, histogram, N-pairs and SphereFace


@pytest.mark.parametrize("tuples", [None, MultiSimilarityMiner(epsilon=0.5)], ids=["all pairs", "mined"])
def test_the_tuplet_margin_loss_is_pmls(tuples):
    embeddings, labels = batch(15), torch.tensor([0] * 5 + [1] * 2 + [2] * 7 + [3])
    mined = tuples and tuples(embeddings, labels)
    mine, theirs = (
        value_and_gradients(kind(scale=8), embeddings, labels, mined) for kind in (losses.TupletMarginLoss, pml.TupletMarginLoss)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert mine[0] > 0


def test_the_histogram_loss_is_pmls():
    embeddings, labels = batch(15), torch.tensor([0] * 5 + [1] * 3 + [2] * 7)
    mine, theirs = (value_and_gradients(kind(n_bins=20), embeddings, labels) for kind in (losses.HistogramLoss, pml.HistogramLoss))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert mine[0] > 0


def test_the_histogram_loss_is_the_chance_that_a_different_pair_is_more_alike():
    embeddings, labels = batch(40), torch.arange(40) % 5
    matrix, same = CosineSimilarity()(embeddings), labels[:, None] == labels
    once = torch.ones(40, 40).triu(1).bool()
    chance = (matrix[once & ~same][:, None] > matrix[once & same]).double().mean()
    assert losses.HistogramLoss(n_bins=200)(embeddings, labels).item() == pytest.approx(chance.item(), abs=0.01)


@pytest.mark.parametrize("name", ["TupletMarginLoss", "HistogramLoss"])
def test_equal_inputs_have_a_finite_loss_and_gradient(name):
    embeddings = torch.randn(4, 5).repeat(2, 1)
    for part in value_and_gradients(getattr(losses, name)(), embeddings, torch.arange(4).repeat(2)):
        assert part.isfinite().all()


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6)], ids=["one class", "singletons"])
@pytest.mark.parametrize("name", ["TupletMarginLoss", "HistogramLoss", "NPairsLoss"])
def test_the_others_too_are_zero_without_positives_or_negatives(name, labels):
    embeddings = batch(6).requires_grad_()
    loss = getattr(losses, name)()(embeddings, labels)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_n_pairs_is_the_cross_entropy_of_one_pair_a_class():
    embeddings, labels = batch(9), torch.arange(9) % 3
    unit = nn.functional.normalize(embeddings)
    pairs = [(0, 3), (1, 4), (2, 5)]  # the first two of each class
    expected = 0
    for anchor, positive in pairs:
        logits = torch.tensor([(unit[anchor] @ unit[other]).item() / 0.2 for _, other in pairs])
        expected += (torch.logsumexp(logits, 0) - (unit[anchor] @ unit[positive]) / 0.2).item() / 3
    assert losses.NPairsLoss(temperature=0.2)(embeddings, labels).item() == pytest.approx(expected, abs=1e-6)
    plain = losses.NPairsLoss(temperature=1)(embeddings, labels)
    assert plain.item() == pytest.approx(pml.NPairsLoss()(embeddings, labels).item())


def test_sphereface_does_not_depend_on_the_length_of_embeddings_and_is_pmls_on_those_of_length_scale():
    embeddings, labels = nn.functional.normalize(batch(12)), torch.arange(12) % 4
    mine, theirs = losses.SphereFaceLoss(4, 5, margin=3, scale=7.0), pml.SphereFaceLoss(4, 5, margin=3, scale=1.0)
    theirs.W.data = mine.W.data
    assert mine(embeddings, labels).item() == pytest.approx(theirs(7 * embeddings, labels).item(), rel=1e-9)
    assert mine(3 * embeddings, labels).item() == pytest.approx(mine(embeddings, labels).item(), rel=1e-9)
