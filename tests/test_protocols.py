"""Questions asked of embeddings, against enumeration of all questions there are, or loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from test_evaluation import COSINE, DISTANCES, LEARNED, PLAIN, SPHERE, clusters, true_scores
from torch.nn.functional import normalize

from siamese import protocols
from siamese.distances import LearnedDistance
from siamese.protocols import fewshot, identify, oneshot_error


def accuracy(*arguments, **options) -> float:
    return fewshot(*arguments, **options)[0].double().mean().item()


# N-way K-shot


def expected_oneshot(matrix: np.ndarray, labels: list[int], ways: int) -> float:
    """The probability of a right answer, over all questions there are."""
    classes = {c: [i for i, label in enumerate(labels) if label == c] for c in set(labels)}
    queries, total = [i for i, label in enumerate(labels) if len(classes[label]) > 1], 0.0
    for query in queries:
        # The chance that a class loses against this own example, whichever of its samples is drawn.
        for own in (i for i in classes[labels[query]] if i != query):
            loses = [np.mean([matrix[query, i] < matrix[query, own] for i in rows]) for c, rows in classes.items() if c != labels[query]]
            subsets = [math.prod(chosen) for chosen in itertools.combinations(loses, ways - 1)]
            total += np.mean(subsets) / (len(classes[labels[query]]) - 1)
    return total / len(queries)


@DISTANCES
@pytest.mark.parametrize("ways", [2, 4])
def test_oneshot_accuracy_is_its_expectation(distance, ways):
    embeddings, labels = clusters(30, 5, noise=1.5)
    expected = expected_oneshot(true_scores(embeddings, distance), labels.tolist(), ways)
    assert 0.2 < expected < 0.9
    found = accuracy(embeddings, labels, distance, ways, episodes=6_000)
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 6_000)


@DISTANCES
def test_a_perfect_space_answers_every_question(distance):
    labels = torch.arange(20).repeat(3)
    distance = LearnedDistance(20) if distance is LEARNED else distance
    assert accuracy(torch.eye(20)[labels], labels, distance, 20, episodes=500) == 1


@DISTANCES
def test_random_embeddings_guess(distance):
    embeddings = torch.randn(2_000, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100).repeat(20)
    for ways in (5, 20):
        rate = 1 / ways
        found = accuracy(embeddings, labels, distance, ways)
        assert abs(found - rate) < 4 * math.sqrt(rate * (1 - rate) / 4_000)


@pytest.mark.parametrize("method", ["prototype", "nearest"])
def test_few_shots_are_answered_as_loops_answer_them(method):
    embeddings, labels = clusters(120, 8, noise=1.5)
    query, support = protocols._questions(labels, 4, 3, 200, torch.Generator().manual_seed(7))
    unit, right = normalize(embeddings.double()), []
    for asked, shown in zip(query.tolist(), support.tolist(), strict=True):
        own = labels[asked]
        classes = [labels[rows[0]].item() for rows in shown]
        assert classes[0] == own
        assert len(set(classes)) == 4
        assert all(len(set(rows)) == 3 and asked not in rows and len({labels[i].item() for i in rows}) == 1 for rows in shown)
        if method == "prototype":
            scores = [torch.nn.functional.cosine_similarity(unit[asked], unit[rows].mean(0), dim=0).item() for rows in shown]
        else:
            scores = [max((unit[asked] @ unit[i]).item() for i in rows) for rows in shown]
        right.append(scores[0] > max(scores[1:]) + 2**-21)
    found, asked = fewshot(embeddings, labels, COSINE, 4, 3, method=method, episodes=200, seed=7)
    assert (found == torch.tensor(right)).float().mean() > 0.99  # but for scores that are equal once rounded
    assert asked.tolist() == labels[query].tolist()
    assert 0.3 < found.float().mean() < 0.95


@DISTANCES
def test_more_shots_help_and_one_shot_is_the_same_by_either_method(distance):
    embeddings, labels = clusters(200, 10, noise=1.5)
    one, five = (accuracy(embeddings, labels, distance, 5, shots) for shots in (1, 5))
    assert five > one + 0.05
    both = [fewshot(embeddings, labels, distance, 5, method=method)[0] for method in ("prototype", "nearest")]
    assert (both[0] == both[1]).all()


def test_queries_and_supports_are_drawn_evenly():
    labels = torch.arange(6).repeat_interleave(torch.tensor([2, 3, 4, 5, 6, 10]))
    query, support = protocols._questions(labels, 3, 2, 20_000, torch.Generator().manual_seed(0))
    asked = query.bincount(minlength=30)[2:]  # a class of two has no query with two supports
    assert query.min() >= 2
    assert asked.float().std() / asked.float().mean() < 0.06
    strangers = labels[support[:, 1:, 0]].flatten().bincount(minlength=6)
    assert (strangers > 0).all()


def test_the_seed_decides_the_questions_and_the_room_for_them_does_not(monkeypatch):
    embeddings, labels = clusters(90, 9)
    first, second, other = (fewshot(embeddings, labels, COSINE, 5, 2, episodes=500, seed=seed)[0] for seed in (0, 0, 1))
    assert (first == second).all()
    assert (first != other).any()
    monkeypatch.setattr(protocols, "_GATHERED", 1_000)
    assert (fewshot(embeddings, labels, COSINE, 5, 2, episodes=500, seed=0)[0] == first).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ways": 9}, "9"),
        ({"ways": 1}, "two ways"),
        ({"ways": 3, "shots": 0}, "one shot"),
        ({"ways": 3, "method": "mean"}, "prototype, nearest"),
    ],
)
def test_senseless_questions_are_refused(options, said):
    embeddings, labels = clusters(40, 5)
    with pytest.raises(ValueError, match=said):
        fewshot(embeddings, labels, COSINE, **options)


# The official one-shot runs


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


# Open-set identification


def identified_by_loops(score, labels, gallery_labels, rate: float) -> tuple[float, float]:
    enrolled = [i for i in range(len(labels)) if labels[i] in gallery_labels]
    strangers = [i for i in range(len(labels)) if labels[i] not in gallery_labels]
    alarms = sorted(score[i].max() for i in strangers)
    right = {i: score[i][gallery_labels == labels[i]].max() for i in enrolled}
    right = {i: own for i, own in right.items() if own > score[i][gallery_labels != labels[i]].max()}
    best = 0.0
    for threshold in {*right.values(), np.inf}:
        if sum(alarm >= threshold for alarm in alarms) <= rate * len(strangers):
            best = max(best, sum(own >= threshold for own in right.values()) / len(enrolled))
    return best, len(right) / len(enrolled)


@DISTANCES
def test_identification_is_that_of_loops(distance, monkeypatch):
    embeddings, labels = clusters(420, 20, noise=0.9)
    gallery, probes = labels[:60] < 9, torch.arange(60, 420)
    known = labels[:60][gallery]
    monkeypatch.setattr(protocols, "_SCORES", 1_000)
    figures, notes = identify(embeddings[probes], labels[probes], embeddings[:60][gallery], known, distance)
    score = true_scores(embeddings, distance)[60:, :60][:, gallery.numpy()]
    for exponent in (1, 2):
        name, expected = f"dir_at_far_1e{exponent}", identified_by_loops(score, labels[probes].numpy(), known.numpy(), 10.0**-exponent)
        if name in figures:
            assert figures[name] == pytest.approx(expected[0], abs=1e-3)
            assert 0 < figures[name] < figures["rank_1_identification"]
        assert figures["rank_1_identification"] == pytest.approx(expected[1], abs=1e-9)
    assert "dir_at_far_1e1" in figures
    assert [note for note in notes if note.startswith("dir_at_far_1e3") and "ten are needed" in note]


def test_of_equal_scores_the_different_class_is_identified():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    probes, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], *[[-1.0, 0.0]] * 100]), torch.tensor([0, 2, *[9] * 100])
    figures, _ = identify(probes, labels, points, torch.tensor([0, 1, 2]), CosineSimilarity())
    assert figures["rank_1_identification"] == 0.5
    assert figures["dir_at_far_1e1"] == 0.5


def test_identification_needs_enrolled_probes_and_strangers():
    points, labels = clusters(40, 5)
    with pytest.raises(ValueError, match="stranger"):
        identify(points, labels, points, labels, COSINE)
    with pytest.raises(ValueError, match="enrolled"):
        identify(points, labels + 100, points, labels, COSINE)
