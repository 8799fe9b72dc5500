"""Few-shot, one-shot and open-set figures against loops over questions, and against the probability over all questions."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch.nn.functional import normalize

from siamese import protocols
from siamese.distances import LearnedDistance
from siamese.protocols import METHODS, fewshot, identify, oneshot_by_ways, oneshot_error

COSINE, SPHERE, PLAIN, CITY = CosineSimilarity(), LpDistance(), LpDistance(normalize_embeddings=False), LpDistance(p=1)
LEARNED, LEARNED_UNIT = (LearnedDistance(6, unit).requires_grad_(False) for unit in (False, True))
for learned in (LEARNED, LEARNED_UNIT):
    learned.weight.data = torch.tensor([1.5, -0.7, 1.0, 0.4, 2.0, 0.9])
DISTANCES = pytest.mark.parametrize(
    "distance", [COSINE, SPHERE, PLAIN, CITY, LEARNED, LEARNED_UNIT], ids=["cosine", "sphere", "plain", "city", "learned", "learned_unit"]
)


def clusters(samples: int, classes: int, spread: float = 1.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping Gaussian classes of unequal size, each with two samples at least, in random order, of very unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes).repeat(2), torch.randint(classes, (samples - 2 * classes,), generator=generator)])
    labels = labels[torch.randperm(samples, generator=generator)]
    embeddings = torch.randn(classes, 6, generator=generator)[labels] + spread * torch.randn(samples, 6, generator=generator)
    return embeddings * torch.rand(samples, 1, generator=generator).add(0.4), labels


def noise(samples: int, size: float) -> torch.Tensor:
    return size * torch.randn(samples, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unit(x: np.ndarray, distance) -> np.ndarray:
    return x / np.linalg.norm(x, ord=distance.p, axis=-1, keepdims=True) if distance.normalize_embeddings else x


def true_score(query: np.ndarray, other: np.ndarray, distance) -> float:
    """Of two embeddings in double precision, by the formula in the textbook."""
    query, other = unit(query, distance), unit(other, distance)
    if distance.is_inverted:
        return float(query @ other)
    if isinstance(distance, LearnedDistance):
        return -float(np.mean(np.abs(query - other) * np.abs(distance.weight.numpy())))
    return -float(np.linalg.norm(query - other, ord=distance.p))


def of_class(query: np.ndarray, supports: np.ndarray, distance, method: str) -> float:
    """How alike a query and a class are."""
    if method == "nearest":
        return max(true_score(query, support, distance) for support in supports)
    return true_score(query, unit(supports, distance).mean(0), distance)


def expected_fewshot(embeddings: torch.Tensor, labels: torch.Tensor, distance, ways: int, shots: int, method: str) -> float:
    """The probability of a right answer, over all questions there are."""
    x, labels = embeddings.double().numpy(), labels.tolist()
    rows = {c: [i for i, label in enumerate(labels) if label == c] for c in set(labels)}
    queries, total = [i for i, label in enumerate(labels) if len(rows[label]) > shots], 0.0
    for query in queries:
        others = [c for c in rows if c != labels[query] and len(rows[c]) >= shots]
        theirs = [[of_class(x[query], x[list(s)], distance, method) for s in itertools.combinations(rows[c], shots)] for c in others]
        own = [i for i in rows[labels[query]] if i != query]
        supports = list(itertools.combinations(own, shots))
        for chosen in supports:
            score = of_class(x[query], x[list(chosen)], distance, method)
            # The chance that a class loses against these own supports, whichever of its samples are drawn.
            loses = [np.mean([one < score for one in them]) for them in theirs]
            total += np.mean([math.prod(subset) for subset in itertools.combinations(loses, ways - 1)]) / len(supports)
    return total / len(queries)


# Few-shot recognition


@DISTANCES
@pytest.mark.parametrize(("ways", "shots", "method"), [(2, 1, "prototype"), (4, 1, "nearest"), (3, 2, "prototype"), (4, 3, "nearest")])
def test_the_share_of_right_answers_is_its_expectation(distance, ways, shots, method):
    embeddings, labels = clusters(26, 5, spread=1.5)
    kept = torch.arange(26) != labels.tolist().index(0)
    embeddings, labels = embeddings[kept], labels[kept]
    assert labels.bincount().tolist() == [2, 6, 4, 7, 6], "a class of two, too small for some questions"
    expected = expected_fewshot(embeddings, labels, distance, ways, shots, method)
    assert 0.2 < expected < 0.9
    found = fewshot(embeddings, labels, distance, ways, shots, method=method, episodes=3_000)[0].double().mean().item()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 3_000)


@DISTANCES
@pytest.mark.parametrize(("shots", "method"), [(1, "prototype"), (3, "nearest")])
def test_the_answers_are_the_same_whether_all_pairs_are_compared_at_once_or_those_of_each_question(monkeypatch, distance, shots, method):
    embeddings, labels = clusters(60, 8, spread=1.5)
    at_once = fewshot(embeddings, labels, distance, 5, shots, method=method, episodes=300)[0]
    monkeypatch.setattr(protocols, "_FEW", 0)
    assert torch.equal(fewshot(embeddings, labels, distance, 5, shots, method=method, episodes=300)[0], at_once)
    assert 0 < at_once.sum() < 300


@DISTANCES
@pytest.mark.parametrize("method", METHODS)
def test_each_answer_is_that_of_a_loop(distance, method):
    embeddings, labels = clusters(60, 8, spread=1.5)
    query, support = protocols._questions(labels, 5, 3, 200, torch.Generator().manual_seed(7))
    right, classes = fewshot(embeddings, labels, distance, 5, 3, method=method, episodes=200, seed=7)
    x = embeddings.double().numpy()
    answers = []
    for one, rows in zip(query.tolist(), support.numpy(), strict=True):
        own, *others = (of_class(x[one], x[row], distance, method) for row in rows)
        answers.append(own > max(others))
    assert 20 < sum(answers) < 180
    assert right.tolist() == answers
    assert (right.dtype, classes.dtype) == (torch.bool, torch.int64)
    assert classes.tolist() == labels[query].tolist()


@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (5, 1), (5, 3), (7, 4)])
def test_questions_are_drawn_as_they_should(ways, shots):
    labels = clusters(60, 9)[1] * 7 - 20  # any whole numbers are labels
    query, support = protocols._questions(labels, ways, shots, 3_000, torch.Generator().manual_seed(0))
    counts = dict(zip(*(part.tolist() for part in labels.unique(return_counts=True)), strict=True))
    assert support.shape == (3_000, ways, shots)
    for one, rows in zip(query.tolist(), support.tolist(), strict=True):
        assert len({one, *itertools.chain(*rows)}) == 1 + ways * shots, "a sample is asked for or shown twice"
        classes = [{labels[i].item() for i in row} for row in rows]
        assert all(len(of) == 1 for of in classes)
        assert len(set.union(*classes)) == ways
        assert classes[0] == {labels[one].item()}
    # All samples that may be drawn are, and queries equally often.
    able = {i for i, label in enumerate(labels.tolist()) if counts[label] > shots}
    assert set(query.tolist()) == able
    assert set(support[:, 1:].flatten().tolist()) == {i for i, label in enumerate(labels.tolist()) if counts[label] >= shots}
    asked = query.bincount(minlength=60)[sorted(able)] / 3_000
    assert (asked - 1 / len(able)).abs().max() < 5 * math.sqrt(1 / len(able) / 3_000)


def test_every_set_is_drawn_equally_often():
    below = torch.tensor([5, 6]).repeat(20_000, 1)
    drawn = protocols._draw(below, 3, torch.Generator().manual_seed(0)).sort(2).values
    for place, n in enumerate((5, 6)):
        sets = drawn[:, place].tolist()
        assert {*map(tuple, sets)} == set(itertools.combinations(range(n), 3))
        often = np.unique(sets, axis=0, return_counts=True)[1] / 20_000
        expected = 1 / math.comb(n, 3)
        assert np.abs(often - expected).max() < 5 * math.sqrt(expected / 20_000)


@DISTANCES
def test_of_one_shot_both_methods_are_the_same(distance):
    embeddings, labels = clusters(60, 8)
    prototype, nearest = (fewshot(embeddings, labels, distance, 5, method=method, episodes=500) for method in METHODS)
    assert torch.equal(prototype[0], nearest[0])
    assert torch.equal(prototype[1], nearest[1])


def test_prototypes_are_means_of_unit_embeddings_where_the_distance_normalises():
    # The query is at 30 degrees; its supports are at 0 and 90 degrees, one of them long; the other class is at -6 degrees.
    supports = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[math.cos(math.pi / 6), 0.5]])
    embeddings = torch.cat([query, supports, torch.tensor([[1.0, -0.1]] * 2)])
    labels = torch.tensor([0, 0, 0, 1, 1])
    asked = protocols._questions(labels, 2, 2, 200, torch.Generator().manual_seed(0))[0] == 0
    assert asked.any()
    for distance, answer in ((COSINE, True), (SPHERE, True), (PLAIN, False)):
        right, _ = fewshot(embeddings, labels, distance, 2, 2, episodes=200)
        assert (right[asked] == answer).all()


@DISTANCES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shots", [1, 5])
def test_a_collapsed_space_answers_nothing_and_a_perfect_one_everything(distance, method, shots):
    labels = torch.arange(6).repeat(7)
    collapsed = torch.randn(6, generator=torch.Generator().manual_seed(0)).expand(42, 6) * 1e3
    assert not fewshot(collapsed, labels, distance, 5, shots, method=method, episodes=300)[0].any()
    if distance in (COSINE, SPHERE):  # of the others the noise is all the range there is
        assert not fewshot(collapsed + noise(42, 1e-6), labels, distance, 5, shots, method=method, episodes=300)[0].any()
    assert fewshot(torch.eye(6)[labels], labels, distance, 6, shots, method=method, episodes=300)[0].all()


def test_a_tie_with_another_class_is_wrong():
    labels = torch.tensor([0, 0, 1, 2])
    embeddings = torch.tensor([[0.0], [1.0], [-1.0], [9.0]])
    right, _ = fewshot(embeddings, labels, PLAIN, 2, episodes=400)
    query, support = protocols._questions(labels, 2, 1, 400, torch.Generator().manual_seed(0))
    tied = (query == 0) & (support[:, 1, 0] == 2)
    assert 50 < tied.sum() < 350
    assert torch.equal(right, ~tied)


@DISTANCES
def test_random_embeddings_guess(distance):
    embeddings = torch.randn(1_000, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50).repeat(20)
    for ways, shots in ((5, 1), (20, 2)):
        found = fewshot(embeddings, labels, distance, ways, shots, episodes=1_000)[0].double().mean().item()
        assert abs(found - 1 / ways) < 4 * math.sqrt((1 - 1 / ways) / ways / 1_000) + 0.02


def test_the_seed_decides_the_questions():
    embeddings, labels = clusters(60, 6)
    asked = [fewshot(embeddings, labels, COSINE, 5, episodes=500, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(asked[0][0], asked[1][0])
    assert torch.equal(asked[0][1], asked[1][1])
    assert not torch.equal(asked[0][1], asked[2][1])
    others = fewshot(torch.randn(60, 3), labels, PLAIN, 5, episodes=500)
    assert torch.equal(asked[0][1], others[1]), "another model was asked something else"
    before = torch.get_rng_state()
    fewshot(embeddings, labels, COSINE, 5, episodes=10)
    assert torch.equal(before, torch.get_rng_state())


@DISTANCES
@pytest.mark.parametrize("method", METHODS)
def test_memory_is_bounded_and_the_bound_changes_nothing(distance, method, monkeypatch):
    embeddings, labels = clusters(60, 6)
    whole, _ = fewshot(embeddings, labels, distance, 4, 2, method=method, episodes=103)
    sizes = []
    ready = protocols._ready
    monkeypatch.setattr(protocols, "_ready", lambda part, *rest: sizes.append(part.numel()) or ready(part, *rest))
    for most, chunks in ((10 * 4 * 2 * 6, 11), (1, 103)):
        sizes.clear()
        monkeypatch.setattr(protocols, "_GATHERED", most)
        assert torch.equal(fewshot(embeddings, labels, distance, 4, 2, method=method, episodes=103)[0], whole)
        assert len(sizes) == 2 * chunks
        assert max(sizes) <= max(most, 4 * 2 * 6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_neither_scale_nor_place_matters_to_a_euclidean_distance(scale, offset):
    embeddings, labels = clusters(120, 6)
    plain, moved = (
        fewshot(x, labels, PLAIN, 5, 6, method="nearest", episodes=500)[0]
        for x in (embeddings.double(), (embeddings.double() + offset) * scale)
    )
    assert 50 < plain.sum() < 450
    assert (plain != moved).sum() <= 1


def test_small_distances_are_told_apart():
    # Single precision finds Euclidean distances as small as these wrong by 3e-4, where there are many.
    labels = torch.arange(6).repeat(8)
    angles = labels * 1e-4 + torch.arange(48) * 1e-7
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    assert fewshot(embeddings, labels, SPHERE, 5, 6, method="nearest", episodes=300)[0].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "method is one of prototype, nearest, not 'mean'"),
        ({"ways": 1}, "two ways, one shot and one episode at least, not 1, 1 and 4000"),
        ({"shots": 0}, "not 2, 0 and 4000"),
        ({"episodes": 0}, "not 2, 1 and 0"),
        ({"ways": 4}, "4-way 1-shot questions need 4 classes with 1 samples, .* of 3 classes 3 have 1, 2 have 2"),
        ({"shots": 2, "ways": 3}, "3-way 2-shot questions need 3 classes .* of 3 classes 2 have 2, 1 have 3"),
        ({"shots": 3}, "of 3 classes 1 have 3, 0 have 4"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fewshot(**{"embeddings": torch.randn(6, 4), "labels": torch.tensor([0, 0, 0, 1, 1, 2]), "distance": COSINE, "ways": 2, **change})


def test_classes_without_a_sample_to_spare_cannot_be_asked_about():
    with pytest.raises(ValueError, match="of 3 classes 3 have 2, 0 have 3"):
        fewshot(torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), COSINE, 3, 2)
    right, classes = fewshot(torch.randn(5, 4), torch.tensor([0, 0, 1, 2, 3]), COSINE, 4, episodes=50)
    assert len(right) == 50
    assert (classes == 0).all()


# One-shot runs


@DISTANCES
def test_accuracy_by_ways_is_its_expectation_and_of_the_most_that_of_those_questions(distance):
    embeddings, labels = clusters(60, 12)
    shares = oneshot_by_ways(embeddings, labels, distance, [2, 5, 12], episodes=20_000)
    for ways, share in zip((2, 5, 12), shares, strict=True):
        assert share == pytest.approx(expected_fewshot(embeddings, labels, distance, ways, 1, "nearest"), abs=0.015)
    assert shares[2] == fewshot(embeddings, labels, distance, 12, episodes=20_000)[0].double().mean().item()
    assert shares[0] > shares[1] > shares[2]


def test_oneshot_error_counts_wrong_answers_and_ties_in_percent():
    supports = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    right = (torch.tensor([[0.1, 0.9], [0.9, 0.1]]), supports, torch.tensor([1, 0]))
    wrong = (torch.tensor([[0.1, 0.9], [0.9, 0.1]]), supports, torch.tensor([0, 2]))
    tie = (torch.tensor([[1.0, 1.0]]), supports, torch.tensor([0]))
    for distance in (COSINE, SPHERE, PLAIN):
        assert oneshot_error([right], distance) == 0
        assert oneshot_error([wrong], distance) == 100
        assert oneshot_error([tie], distance) == 100
        assert oneshot_error([right, wrong, tie], distance) == pytest.approx(60)


@DISTANCES
def test_oneshot_error_is_that_of_a_loop(distance):
    runs, wrong = [], 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        supports = torch.randn(20, 6, generator=generator)
        answer = torch.randperm(20, generator=generator)
        queries = supports[answer] + 0.7 * torch.randn(20, 6, generator=generator)
        runs.append((queries, supports, answer))
        for query, own in zip(queries.double().numpy(), answer.tolist(), strict=True):
            found = [true_score(query, support, distance) for support in supports.double().numpy()]
            wrong += found[own] < max(found)
    assert 4 < wrong < 76
    assert oneshot_error(runs, distance) == pytest.approx(100 * wrong / 80)


@DISTANCES
def test_a_collapsed_space_gets_every_run_wrong(distance):
    one = torch.randn(6, generator=torch.Generator().manual_seed(0)).expand(30, 6)
    assert oneshot_error([(one[:7], one, torch.arange(7))], distance) == 100
    if distance in (COSINE, SPHERE):
        copies = one + noise(30, 1e-7)  # each is most like itself, by less than counts
        assert oneshot_error([(copies[:7], copies, torch.arange(7))], distance) == 100


# Open-set identification


def identify_by_loops(matrix: np.ndarray, labels: list[int], enrolled: list[int], rates: tuple[float, ...]) -> dict[str, float]:
    """From the scores [P, G]; every score that comes is tried as a threshold, and one above all."""
    own, other = [], []
    for row, label in zip(matrix, labels, strict=True):
        own.append(max((s for s, of in zip(row, enrolled, strict=True) if of == label), default=-math.inf))
        other.append(max((s for s, of in zip(row, enrolled, strict=True) if of != label), default=-math.inf))
    known, strange = ([i for i, label in enumerate(labels) if (label in enrolled) == there] for there in (True, False))
    figures = {"rank_1_identification": np.mean([own[i] > other[i] for i in known])}
    for place, rate in enumerate(rates):
        allowed = [t for t in {*matrix.flatten(), math.inf} if sum(other[i] >= t for i in strange) <= rate * len(strange) + 1e-9]
        figures[f"rate {place}"] = np.mean([own[i] > other[i] and own[i] >= min(allowed) for i in known])
    return figures


def open_set(samples: int, seed: int = 0, spread: float = 0.7) -> tuple[torch.Tensor, ...]:
    """Twelve classes of which the gallery knows seven, with three samples each: (probes, labels, gallery, its labels)."""
    embeddings, labels = clusters(samples, 12, spread, seed)
    order = torch.arange(samples)
    kept = torch.cat([order[labels == c][:3] for c in range(7)])
    probes = order[~torch.isin(order, kept)]
    return embeddings[probes], labels[probes], embeddings[kept], labels[kept]


@DISTANCES
def test_identification_is_that_of_a_loop(distance):
    probes, labels, gallery, enrolled = open_set(260, seed=1)
    rates = (0.5, 0.2, 0.1)
    matrix = np.array([[true_score(a, b, distance) for b in gallery.double().numpy()] for a in probes.double().numpy()])
    expected = identify_by_loops(matrix, labels.tolist(), enrolled.tolist(), rates)
    figures, notes = identify(probes, labels, gallery, enrolled, distance, rates)
    assert list(figures) == ["rank_1_identification", "dir_at_far_5e1", "dir_at_far_2e1", "dir_at_far_1e1"]
    assert list(figures.values()) == pytest.approx(list(expected.values()), abs=1e-12)
    assert notes == []
    first, *found = figures.values()
    assert 0.98 > first >= found[0] > found[1] > found[2] > 0.02


@pytest.mark.parametrize("seed", range(8))
def test_identification_with_many_ties_is_that_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-2, 3, (90, 1)), rng.integers(-2, 3, (9, 1))
    labels, enrolled = rng.integers(0, 6, 90), rng.integers(0, 3, 9)
    rates = (1.0, 0.7, 0.5, 0.3, 0.25)
    expected = identify_by_loops(-np.abs(x - y.T).astype(float), labels.tolist(), enrolled.tolist(), rates)
    tensors = [torch.tensor(part) for part in (x, labels, y, enrolled)]
    figures, _ = identify(tensors[0].float(), tensors[1], tensors[2].float(), tensors[3], PLAIN, rates)
    assert list(figures.values()) == pytest.approx(list(expected.values()), abs=1e-12)


def test_the_threshold_lets_exactly_the_share_of_strangers_through():
    # Strangers at distances 1, 2 ... 100 of the one gallery sample; enrolled probes at 0.5, 10.5 and 99.5.
    probes = torch.cat([torch.arange(1.0, 101.0), torch.tensor([0.5, 10.5, 99.5])])[:, None]
    labels = torch.cat([torch.arange(1, 101), torch.zeros(3, dtype=torch.int64)])
    where = (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    figures, _ = identify(probes, labels, *where, PLAIN, (0.1, 0.29, 0.99, 1.0))
    # At 0.1 the threshold is just above -11: ten strangers reach it, and so does the probe at 10.5.
    assert list(figures) == ["rank_1_identification", "dir_at_far_1e1", "dir_at_far_2.9e1", "dir_at_far_9.9e1", "dir_at_far_1e0"]
    assert list(figures.values()) == [1, 2 / 3, 2 / 3, 1, 1]
    probes[101] = 11.0  # as alike as the eleventh stranger, who must not reach it
    assert identify(probes, labels, *where, PLAIN, (0.1,))[0]["dir_at_far_1e1"] == 1 / 3
    probes[101] = 29.5  # 29 % of 100 are 29, however a computer multiplies
    assert identify(probes, labels, *where, PLAIN, (0.29,))[0]["dir_at_far_2.9e1"] == 2 / 3


@DISTANCES
def test_a_collapsed_space_identifies_nobody(distance):
    one = torch.randn(6, generator=torch.Generator().manual_seed(0)).expand(130, 6)
    labels = torch.arange(130) % 13
    figures, _ = identify(one, labels, one[:8], torch.arange(8) % 3, distance)
    assert figures == {"rank_1_identification": 0, "dir_at_far_1e1": 0}
    if distance in (COSINE, SPHERE):
        near = one + noise(130, 1e-7)  # the first three are in the gallery, and most like themselves by less than counts
        assert identify(near, labels, near[:3], labels[:3], distance)[0] == figures


def test_a_rate_with_too_few_strangers_is_explained():
    def judge(strangers: int) -> tuple[dict, list]:
        labels = torch.cat([torch.zeros(20, dtype=torch.int64), torch.arange(1, strangers + 1)])
        probes = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
        return identify(probes, labels, probes[:2] + 0.1, torch.tensor([0, 0]), COSINE)

    names = ["rank_1_identification", "dir_at_far_1e1", "dir_at_far_1e2", "dir_at_far_1e3"]
    for strangers, count in ((99, 1), (100, 2), (999, 2), (1_000, 3), (9_999, 3), (10_000, 4)):
        figures, notes = judge(strangers)
        assert list(figures) == names[:count]
        assert [note.partition(" ")[0] for note in notes] == names[count:]
    assert judge(1_500)[1] == ["dir_at_far_1e3 is left out: 1,500 strangers give 1.5 expected false alarms, ten are needed"]


@DISTANCES
def test_few_scores_are_held_at_a_time_and_the_bound_changes_nothing(distance, monkeypatch):
    args = open_set(300)
    whole = identify(*args, distance)
    sizes = []
    found = protocols.scores
    monkeypatch.setattr(protocols, "scores", lambda *given: sizes.append(len(given[1]) * len(given[2])) or found(*given))
    for most in (200, 1):
        sizes.clear()
        monkeypatch.setattr(protocols, "_SCORES", most)
        assert identify(*args, distance) == whole
        assert max(sizes) <= max(most, 21)
        assert len(sizes) > 10


def test_the_order_of_probes_and_gallery_does_not_matter():
    probes, labels, gallery, enrolled = open_set(300)
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randperm(len(part), generator=generator) for part in (probes, gallery))
    shuffled = identify(probes[one], labels[one], gallery[two], enrolled[two], COSINE)
    assert shuffled == identify(probes, labels, gallery, enrolled, COSINE)
    assert shuffled == identify(normalize(probes), labels, gallery * 3, enrolled, COSINE)


@pytest.mark.parametrize(
    ("labels", "enrolled", "message"),
    [
        ([0, 1, 0], [0, 1, 2], "of 3 probes 0 are strangers"),
        ([3, 4, 3], [0, 1, 2], "of 3 probes 3 are strangers"),
        ([], [0, 1], "of 0 probes 0 are strangers"),
        ([0, 1], [], "of 2 probes 2 are strangers"),
    ],
)
def test_identification_needs_enrolled_probes_and_strangers(labels, enrolled, message):
    labels, enrolled = (torch.tensor(part, dtype=torch.int64) for part in (labels, enrolled))
    with pytest.raises(ValueError, match=message):
        identify(torch.randn(len(labels), 4), labels, torch.randn(len(enrolled), 4), enrolled, COSINE)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5])
def test_a_false_alarm_rate_is_a_share(rate):
    with pytest.raises(ValueError, match=re.escape(f"above 0 and at most 1, not 0.1, {rate}")):
        identify(*open_set(100), COSINE, (0.1, rate))


def test_the_open_set_curve_is_that_of_the_naive_count():
    embeddings, labels = clusters(300, 30)
    figures, notes, curve = protocols.open_set(embeddings, labels, CosineSimilarity())
    assert figures.keys() == {"rank_1_identification", "dir_at_far_1e1"}
    assert len(notes) == 2
    alarm, detected = curve.T
    assert (alarm.diff() > 0).all()
    assert (detected.diff() >= 0).all()
    assert detected[-1] == pytest.approx(figures["rank_1_identification"]), "all strangers may be taken for somebody"
    near = (alarm - 0.1).abs().argmin()
    assert abs(detected[near].item() - figures["dir_at_far_1e1"]) < 0.05
    again = protocols.open_set(embeddings, labels, CosineSimilarity())
    assert again[0] == figures
    assert torch.equal(again[2], curve)
    with pytest.raises(ValueError, match="two classes with two samples"):
        protocols.open_set(embeddings[:3], torch.tensor([0, 0, 1]), CosineSimilarity())
