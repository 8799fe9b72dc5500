"""One negative per pair against pytorch-metric-learning's full list of triplets; and which miner an epoch has."""

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from torch import Tensor

from siamese import losses, miners
from siamese.distances import LearnedDistance
from siamese.miners import NegativePerPairMiner, ScheduledMiner

DISTANCES = {
    "cosine": CosineSimilarity(),
    "euclidean": LpDistance(normalize_embeddings=False),
    "unit euclidean": LpDistance(),
    "learned": LearnedDistance(8),
}
MARGINS = {"cosine": 0.3, "euclidean": 1.0, "unit euclidean": 0.3, "learned": 0.25}
EVEN, UNEVEN, SINGLETONS = [0, 1, 2, 3] * 5, [0] * 9 + [1] * 2 + [2] + [3] * 5, list(range(6))
TWINS = [0, 0, 1, 1, 2, 3]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def triplets(mined: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(part.tolist() for part in mined), strict=True))


def hardest_of_all(distance, hardness, margin, *batch) -> list[tuple[int, ...]]:
    """For each (anchor, positive) the hardest, and of equals the first, among pytorch-metric-learning's triplets."""
    listed = triplets(TripletMarginMiner(margin=margin, type_of_triplets=hardness, distance=distance)(*batch))
    matrix = distance(batch[0], batch[2] if len(batch) > 2 else None)
    nearness = matrix if distance.is_inverted else -matrix
    best = {}
    for a, p, n in sorted(listed):
        if (a, p) not in best or nearness[a, n] > nearness[a, best[a, p]]:
            best[a, p] = n
    return [(a, p, n) for (a, p), n in best.items()]


def by_loops(distance, hardness, margin, embeddings, labels) -> list[tuple[int, ...]]:
    """From the definition, pair by pair."""
    d, found = -distance(embeddings) if distance.is_inverted else distance(embeddings), []
    for a, p in itertools.permutations(range(len(labels)), 2):
        negatives = [n for n in range(len(labels)) if labels[n] != labels[a] == labels[p]]
        gaps = {n: (d[a, n] - d[a, p]).item() for n in negatives}
        fitting = [n for n, gap in gaps.items() if (gap <= 0 if hardness == "hard" else 0 < gap <= margin)]
        if fitting:
            found.append((a, p, min(fitting, key=d[a].tolist().__getitem__)))
    return found


@pytest.mark.parametrize("hardness", ["semihard", "hard"])
@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("labels", [EVEN, UNEVEN, TWINS, SINGLETONS], ids=["even", "uneven", "twins", "singletons"])
def test_each_pair_gets_the_hardest_of_the_triplets_that_pml_lists(labels, name, hardness):
    counts = []
    for seed in range(4):
        embeddings = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
        miner = NegativePerPairMiner(hardness, MARGINS[name], distance=DISTANCES[name])
        mined = triplets(miner(embeddings, torch.tensor(labels)))
        assert mined == hardest_of_all(DISTANCES[name], hardness, MARGINS[name], embeddings, torch.tensor(labels))
        assert mined == by_loops(DISTANCES[name], hardness, MARGINS[name], embeddings, torch.tensor(labels))
        counts.append(len(mined))
    assert (sum(counts) > 0) == (labels != SINGLETONS)


@pytest.mark.parametrize("hardness", ["semihard", "hard"])
@pytest.mark.parametrize("name", DISTANCES)
def test_with_a_reference_set_positives_and_negatives_are_taken_from_it(name, hardness):
    batch = torch.randn(10, 8), torch.arange(10) % 3, torch.randn(17, 8), torch.arange(17) % 4
    mined = triplets(NegativePerPairMiner(hardness, MARGINS[name], distance=DISTANCES[name])(*batch))
    assert mined == hardest_of_all(DISTANCES[name], hardness, MARGINS[name], *batch)
    assert max(max(p, n) for _, p, n in mined) >= 10  # rows that the batch does not have


def test_an_input_is_its_own_positive_only_in_a_reference_set_of_its_own():
    embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    miner = NegativePerPairMiner("semihard", 2.0, distance=LpDistance())
    assert triplets(miner(embeddings, labels, embeddings, labels)) == triplets(miner(embeddings, labels)) == []
    own = triplets(miner(embeddings, labels, embeddings.clone(), labels.clone()))
    assert own == [(0, 0, 2), (1, 1, 2), (2, 2, 0), (3, 3, 0)]


def test_the_margin_and_the_positive_itself_are_bounds_as_in_pml():
    # Anchor 0 with its positive at 1; negatives at 1 (gap 0), 1.5 (the margin) and 1.75, all exact in binary.
    embeddings = torch.tensor([[0.0], [1.0], [-1.0], [1.5], [1.75]])
    labels, distance = torch.tensor([0, 0, 1, 2, 3]), LpDistance(normalize_embeddings=False)

    def of_first(hardness, margin):
        return [t for t in triplets(NegativePerPairMiner(hardness, margin, distance=distance)(embeddings, labels)) if t[:2] == (0, 1)]

    assert of_first("semihard", 0.5) == [(0, 1, 3)]
    assert of_first("semihard", 0.49) == []
    assert of_first("semihard", torch.inf) == [(0, 1, 3)]
    assert of_first("hard", 0.5) == [(0, 1, 2)]


def test_of_equally_hard_negatives_the_first_is_taken():
    embeddings = torch.tensor([[0.0], [1.0], [2.0], [2.0], [-2.0], [0.5], [0.5]])
    labels, distance = torch.tensor([0, 0, 1, 2, 1, 3, 3]), LpDistance(normalize_embeddings=False)
    assert (0, 1, 2) in triplets(NegativePerPairMiner("semihard", 2, distance=distance)(embeddings, labels))
    assert (0, 1, 5) in triplets(NegativePerPairMiner("hard", 2, distance=distance)(embeddings, labels))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.data(), st.sampled_from(["semihard", "hard"]), st.booleans())
def test_any_batch_of_any_ties_is_mined_as_by_the_definition(labels, data, hardness, cosine):
    grid = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    embeddings = torch.tensor(data.draw(st.lists(grid, min_size=len(labels), max_size=len(labels))), dtype=torch.float64)
    distance = CosineSimilarity() if cosine else LpDistance(normalize_embeddings=False, p=1)
    mined = triplets(NegativePerPairMiner(hardness, 1.0, distance=distance)(embeddings, torch.tensor(labels)))
    assert mined == by_loops(distance, hardness, 1.0, embeddings, labels)


@pytest.mark.parametrize("hardness", ["semihard", "hard"])
@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2], [0]], ids=["one class", "no pair", "one input"])
def test_where_there_is_no_triplet_three_empty_tensors_come_back(labels, hardness):
    mined = NegativePerPairMiner(hardness, margin=torch.inf)(torch.randn(len(labels), 4), torch.tensor(labels))
    assert [(len(part), part.dtype) for part in mined] == [(0, torch.int64)] * 3
    assert TripletMarginLoss()(torch.randn(len(labels), 4), torch.tensor(labels), mined) == 0


def test_the_chunks_that_a_large_batch_is_mined_in_do_not_show(monkeypatch):
    embeddings, labels, miner = torch.randn(40, 8), torch.arange(40) % 5, NegativePerPairMiner()
    whole = triplets(miner(embeddings, labels))
    monkeypatch.setattr(miners, "_CHUNK", 7 * 40)
    assert triplets(miner(embeddings, labels)) == whole
    monkeypatch.setattr(miners, "_CHUNK", 1)
    assert triplets(miner(embeddings, labels)) == whole
    assert whole


def test_a_cross_batch_memory_mines_with_it():
    memory = CrossBatchMemory(TripletMarginLoss(margin=0.3), 8, memory_size=48, miner=NegativePerPairMiner(margin=0.3))
    for _ in range(5):
        embeddings = torch.randn(16, 8, requires_grad=True)
        memory(embeddings, torch.arange(16) % 4).backward()
        assert embeddings.grad.abs().sum() > 0


def test_mining_leaves_no_trace_in_the_gradient():
    embeddings = torch.randn(12, 4, requires_grad=True)
    assert not any(part.requires_grad for part in NegativePerPairMiner()(embeddings, torch.arange(12) % 3))


def test_an_unknown_hardness_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="one of semihard, hard, not 'easy'"):
        NegativePerPairMiner("easy")


# A miner by epoch


def scheduled() -> ScheduledMiner:
    stages = {"late": BatchHardMiner(), "early": None, "middle": NegativePerPairMiner(margin=2)}
    return ScheduledMiner(stages, {"late": 8, "early": 0, "middle": 3})


def test_the_stage_follows_from_the_epoch_alone():
    expected = ["early"] * 3 + ["middle"] * 5 + ["late"] * 4
    miner = scheduled()
    assert miner.stage == "early"
    for epochs in (range(12), reversed(range(12)), [11, 0, 8, 7, 3, 2]):
        for epoch in epochs:
            miner.set_epoch(epoch)
            assert miner.stage == expected[epoch]


def test_the_miner_of_the_stage_mines():
    miner, batch = scheduled(), (torch.randn(12, 4), torch.arange(12) % 3)
    assert miner(*batch) is None
    miner.set_epoch(3)
    assert triplets(miner(*batch)) == triplets(NegativePerPairMiner(margin=2)(*batch)) != []
    miner.set_epoch(100)
    assert triplets(miner(*batch)) == triplets(BatchHardMiner()(*batch))
    reference = torch.randn(20, 4), torch.arange(20) % 3
    assert triplets(miner(*batch, *reference)) == triplets(BatchHardMiner()(*batch, *reference))


def test_a_new_stage_is_told_once(caplog):
    caplog.set_level(logging.INFO)
    miner = scheduled()
    for epoch in range(10):
        miner.set_epoch(epoch)
    miner.set_epoch(1)
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 3: miner stage middle (NegativePerPairMiner)",
        "epoch 8: miner stage late (BatchHardMiner)",
        "epoch 1: miner stage early (all tuples)",
    ]


def test_the_weights_of_every_stage_are_the_miners_own():
    distance = LearnedDistance(4)
    miner = ScheduledMiner({"a": None, "b": BatchHardMiner(distance=distance)}, {"a": 0, "b": 1})
    assert [p is distance.weight for p in miner.parameters()] == [True]


@pytest.mark.parametrize(
    ("stages", "start_epoch", "words"),
    [
        (["a", "b"], {"a": 0}, r"every stage needs a start_epoch: the stages are \['a', 'b'\]"),
        (["a"], {"a": 0, "b": 1}, "every stage needs a start_epoch"),
        (["a", "b"], {"a": 1, "b": 2}, "starts at epoch 0"),
        (["a", "b"], {"a": 0, "b": -1}, "starts at epoch 0"),
        (["a", "b", "c"], {"a": 0, "b": 2, "c": 2}, "start at the same epoch"),
        ([], {}, "starts at epoch 0"),
    ],
)
def test_a_schedule_that_leaves_an_epoch_without_one_stage_is_refused(stages, start_epoch, words):
    with pytest.raises(ValueError, match=words):
        ScheduledMiner(dict.fromkeys(stages), start_epoch)


# Angular


def test_the_angular_miner_is_pmls_on_unit_vectors_and_does_not_depend_on_their_length():
    unit, lengths = torch.nn.functional.normalize(torch.randn(16, 5)), torch.rand(16, 1) * 5 + 0.1
    reference, labels = torch.nn.functional.normalize(torch.randn(9, 5)), torch.arange(16) % 4
    expected = miners.AngularMiner(angle=35)(unit, labels)
    theirs = pml_miners.AngularMiner(angle=35)(unit, labels)
    assert 0 < len(expected[0]) < 16 * 3 * 12
    assert triplets(expected) == triplets(theirs) == triplets(miners.AngularMiner(angle=35)(unit * lengths, labels))
    assert triplets(theirs) != triplets(pml_miners.AngularMiner(angle=35)(unit * lengths, labels))
    against = miners.AngularMiner(angle=35)(unit * lengths, labels, 3 * reference, torch.arange(9) % 4)
    assert triplets(against) == triplets(pml_miners.AngularMiner(angle=35)(unit, labels, reference, torch.arange(9) % 4))


def test_a_stage_without_a_miner_gives_a_memory_all_its_pairs():
    schedule = ScheduledMiner({"early": None, "late": TripletMarginMiner()}, {"early": 0, "late": 1})
    loss = losses.CrossBatchMemory(ContrastiveLoss(), 8, memory_size=30, miner=schedule)
    plain = losses.CrossBatchMemory(ContrastiveLoss(), 8, memory_size=30)
    for _ in range(3):
        embeddings, labels = torch.randn(10, 8), torch.arange(10) % 3
        assert loss(embeddings, labels) == plain(embeddings, labels)
    assert loss.used == plain.used == 10 * 30 - 10
    schedule.set_epoch(1)
    loss(embeddings, labels)
    assert loss.used > 0
