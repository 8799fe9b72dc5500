"""Every figure against an independent reference: pytorch-metric-learning, scikit-learn, or loops over all pairs."""

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch.nn.functional import normalize

from siamese import _walk, intervals
from siamese.distances import LearnedDistance
from siamese.evaluation import FIGURES, EvaluationResult, evaluate, evaluate_tuples, higher_is_better
from siamese.intervals import mean_interval

COSINE, SPHERE, PLAIN = CosineSimilarity(), LpDistance(), LpDistance(normalize_embeddings=False)
LEARNED = LearnedDistance(6).requires_grad_(False)
LEARNED.weight.data = torch.tensor([1.5, -0.7, 1.0, 0.4, 2.0, 0.9])
EVERY, NAMES = [COSINE, SPHERE, PLAIN, LEARNED], ["cosine", "sphere", "plain", "learned"]
DISTANCES = pytest.mark.parametrize("distance", EVERY, ids=NAMES)
RETRIEVAL = ("recall_at_1", "recall_at_5", "recall_at_10", "map_at_r", "r_precision", "mrr")
ROUNDING = 2.0**-20


def clusters(samples: int, classes: int, noise: float = 1.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping Gaussian classes of unequal size, each with two samples at least, in random order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes).repeat(2), torch.randint(classes, (samples - 2 * classes,), generator=generator)])
    labels = labels[torch.randperm(samples, generator=generator)]
    return torch.randn(classes, 6, generator=generator)[labels] + noise * torch.randn(samples, 6, generator=generator), labels


def true_scores(embeddings: torch.Tensor, distance) -> np.ndarray:
    """Scores of all with all in double precision, by the formula in the textbook."""
    x = embeddings.double()
    if distance.normalize_embeddings:
        x = x / x.norm(dim=1, keepdim=True)
    if distance.is_inverted:
        return (x[:, None] * x).sum(2).numpy()
    if distance is LEARNED:
        return -((x[:, None] - x).abs() * distance.weight.abs()).mean(2).numpy()
    return -(x[:, None] - x).square().sum(2).sqrt().numpy()


def all_pairs(matrix: np.ndarray, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(same, score) of every pair, once."""
    left, right = np.triu_indices(len(labels), 1)
    return (labels[left] == labels[right]).numpy(), matrix[left, right]


@st.composite
def tied(draw):
    """Points of which every score is exact in floating point, so that many are exactly equal: (embeddings, labels, distance, exact)."""
    distance = draw(st.sampled_from([COSINE, SPHERE, PLAIN]))
    total = draw(st.integers(3, 30))
    if distance is PLAIN:
        points = draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=total, max_size=total))
    else:  # all of length 2, so that normalising and inner products are exact
        points = draw(st.lists(st.tuples(*[st.sampled_from([-1, 1])] * 4), min_size=total, max_size=total))
    labels = draw(st.lists(st.integers(0, draw(st.integers(1, 8))), min_size=total, max_size=total))
    labels[:3] = [0, 0, 1]  # the least that can be judged
    x = np.array(points)
    exact = x @ x.T if distance is not PLAIN else -((x[:, None] - x) ** 2).sum(2)
    return torch.tensor(points).float(), torch.tensor(labels), distance, exact


@pytest.fixture(scope="module", params=EVERY, ids=NAMES)
def judged(request):
    """One evaluation of 170 points, and what it is compared with: (result, embeddings, labels, distance, scores)."""
    embeddings, labels = clusters(170, 12)
    return evaluate(embeddings, labels, request.param), embeddings, labels, request.param, true_scores(embeddings, request.param)


# Retrieval


@DISTANCES
@pytest.mark.parametrize("seed", [0, 19])
def test_retrieval_is_pytorch_metric_learnings(distance, seed):
    embeddings, labels = clusters(70, 9, seed=seed)
    closest = np.diff(np.sort(true_scores(embeddings, distance), axis=1), axis=1).min()
    assert closest > 2 * ROUNDING, "the data must be free of ties: pytorch-metric-learning breaks them at random"
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"),
        k="max_bin_count",
        knn_func=CustomKNN(distance),
        kmeans_func=lambda *_: None,  # the default asks for faiss
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(embeddings.double(), labels)
    ours = evaluate(embeddings, labels, distance, ways=()).figures
    assert 0.1 < ours["recall_at_1"] < 0.9, "too easy or too hard to tell right from wrong"
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-9)
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"], abs=1e-9)


@DISTANCES
def test_recall_and_reciprocal_rank_are_those_of_a_loop(distance):
    embeddings, labels = clusters(70, 9)
    matrix = true_scores(embeddings, distance)
    ranks = []
    for query in range(70):
        order = sorted((i for i in range(70) if i != query), key=lambda i: -matrix[query, i])
        ranks.append(1 + next(place for place, i in enumerate(order) if labels[i] == labels[query]))
    figures = evaluate(embeddings, labels, distance, ways=()).figures
    assert figures["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-9)
    for k in (1, 5, 10):
        assert figures[f"recall_at_{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]), abs=1e-9)


def retrieval_by_loops(exact: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Of equal scores, the different class ranks first."""
    sums, answered = dict.fromkeys(RETRIEVAL, 0.0), 0
    for query, label in enumerate(labels):
        others = [i for i in range(len(labels)) if i != query]
        others.sort(key=lambda i: (-exact[query, i], labels[i] == label))
        hits = [labels[i] == label for i in others]
        if relevant := sum(hits):
            answered += 1
            for k in (1, 5, 10):
                sums[f"recall_at_{k}"] += any(hits[:k])
            sums["r_precision"] += sum(hits[:relevant]) / relevant
            sums["map_at_r"] += sum(sum(hits[: i + 1]) / (i + 1) for i in range(relevant) if hits[i]) / relevant
            sums["mrr"] += 1 / (hits.index(True) + 1)
    return {**{name: value / answered for name, value in sums.items()}, "queries_without_match": len(labels) - answered}


def verification_by_loops(exact: np.ndarray, labels: list[int]) -> dict[str, float]:
    pairs = [(exact[i, j], labels[i] == labels[j]) for i, j in itertools.combinations(range(len(labels)), 2)]
    same, different = [s for s, alike in pairs if alike], [s for s, alike in pairs if not alike]
    wins = sum((a > b) + (a == b) / 2 for a in same for b in different)
    precision_sum, best_f1, balances = 0.0, 0.0, []
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        accepted, false = sum(s >= threshold for s in same), sum(s >= threshold for s in different)
        precision, recall = accepted / (accepted + false), accepted / len(same)
        precision_sum += precision * same.count(threshold) / len(same)
        best_f1 = max(best_f1, 2 * precision * recall / max(precision + recall, 1e-12))
        gap = abs(false / len(different) - (1 - recall))
        balances.append((gap, (recall + 1 - false / len(different)) / 2))
    least = min(gap for gap, _ in balances)
    return {
        "auc": wins / (len(same) * len(different)),
        "average_precision": precision_sum,
        "best_f1": best_f1,
        "accuracy": {balance for gap, balance in balances if gap < least + 1e-12},
    }


@settings(max_examples=20, deadline=None)
@given(tied())
def test_ties_rank_the_different_class_first(case):
    embeddings, labels, distance, exact = case
    figures = evaluate(embeddings, labels, distance, ways=()).figures
    for name, value in retrieval_by_loops(exact, labels.tolist()).items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


@settings(max_examples=20, deadline=None)
@given(tied())
def test_verification_counts_every_pair_once(case):
    embeddings, labels, distance, exact = case
    figures = evaluate(embeddings, labels, distance, ways=()).figures
    reference = verification_by_loops(exact, labels.tolist())
    assert min(abs(figures["accuracy"] - balance) for balance in reference.pop("accuracy")) < 1e-12
    for name, value in reference.items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


@settings(max_examples=10, deadline=None)
@given(tied(), st.randoms(use_true_random=False))
def test_the_order_of_the_items_does_not_matter(case, random):
    embeddings, labels, distance, _ = case
    order = list(range(len(labels)))
    random.shuffle(order)
    figures = evaluate(embeddings, labels, distance, ways=()).figures
    assert evaluate(embeddings[order], labels[order], distance, ways=()).figures == pytest.approx(figures, abs=1e-12)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tied(), st.integers(2, 40))
def test_the_size_of_a_block_does_not_matter(monkeypatch, case, block):
    embeddings, labels, distance, _ = case
    whole = evaluate(embeddings, labels, distance, ways=())
    with monkeypatch.context() as patch:
        for name in ("_ROWS", "_COLUMNS", "_HOT", "_BAND", "_FIRST"):
            patch.setattr(_walk, name, block)
        parts = evaluate(embeddings, labels, distance, ways=())
    assert parts.figures == pytest.approx(whole.figures, abs=1e-12)
    assert (parts.neighbour_scores == whole.neighbour_scores).all()
    assert (parts.far == whole.far).all()
    assert (parts.tar == whole.tar).all()


@pytest.mark.parametrize(
    "distance", [COSINE, SPHERE, PLAIN, DotProductSimilarity(normalize_embeddings=False)], ids=["cosine", "sphere", "plain", "dot"]
)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_a_collapsed_space_scores_nothing(distance, value):
    labels = torch.arange(8).repeat(4)
    figures = evaluate(torch.full((32, 5), value), labels, distance).figures
    assert [figures[f"recall_at_{k}"] for k in (1, 5, 10)] == [0, 0, 0]
    assert figures["map_at_r"] == figures["r_precision"] == figures["oneshot_5way"] == 0
    assert figures["mrr"] == pytest.approx(1 / 29)  # behind all 28 of other classes
    assert figures["auc"] == figures["eer"] == figures["accuracy"] == 0.5


def test_duplicates_are_matches_and_a_sample_is_not_its_own():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert evaluate(embeddings, torch.tensor([0, 0, 1, 1]), COSINE, ways=()).figures["recall_at_1"] == 1
    assert evaluate(embeddings, torch.tensor([0, 1, 0, 1]), COSINE, ways=()).figures["recall_at_1"] == 0


@DISTANCES
def test_exact_duplicates_tie_whatever_their_direction(distance):
    # In single precision the distance of a vector to its copy is not 0 but up to 3e-4, which may break the ties.
    embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    labels = torch.arange(80).repeat_interleave(2)  # of four copies, two are of one class and two of another
    result = evaluate(embeddings, labels, distance, ways=())
    assert result.figures["recall_at_1"] == result.figures["map_at_r"] == 0
    assert result.figures["mrr"] == pytest.approx(1 / 3)
    assert np.abs(result.neighbour_scores[:, :3] - (1 if distance is COSINE else 0)).max() < 4 * ROUNDING


def test_queries_of_lone_classes_are_counted_and_left_out():
    embeddings, labels = clusters(40, 5)
    lone = torch.cat([embeddings, embeddings[:3] + 0.01])  # very near: they must stand in the way of the others
    labels = torch.cat([labels, torch.tensor([7, 8, 9])])
    figures = evaluate(lone, labels, COSINE, ways=()).figures
    assert figures["queries_without_match"] == 3
    matrix = true_scores(lone, COSINE)
    np.fill_diagonal(matrix, -2)
    assert figures["recall_at_1"] == pytest.approx((labels[matrix.argmax(1)] == labels).float()[:40].mean().item())


def test_a_distance_beyond_the_units_of_the_sphere_is_not_cut_off():
    class Steep(LpDistance):
        """Any distance may be named in a YAML; this one of unit vectors runs to 20 instead of to 2."""

        def compute_mat(self, query, gallery):
            return 10 * super().compute_mat(query, gallery)

        def pairwise_distance(self, left, right):
            return 10 * super().pairwise_distance(left, right)

    embeddings, labels = clusters(60, 6)
    steep, plain = (evaluate(embeddings, labels, kind(), ways=()) for kind in (Steep, LpDistance))
    names = [*RETRIEVAL, "auc", "eer", "average_precision"]
    assert {n: steep.figures[n] for n in names} == pytest.approx({n: plain.figures[n] for n in names}, abs=1e-3)
    assert steep.neighbour_scores == pytest.approx(10 * plain.neighbour_scores, abs=1e-4)


# Verification


def test_verification_is_scikit_learns(judged):
    result, _, labels, _, matrix = judged
    same, score = all_pairs(matrix, labels)
    precision, recall, _ = precision_recall_curve(same, score)
    assert result.figures["auc"] == pytest.approx(roc_auc_score(same, score), abs=1e-5)
    assert result.figures["average_precision"] == pytest.approx(average_precision_score(same, score), abs=1e-4)
    assert result.figures["best_f1"] == pytest.approx((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(), abs=1e-4)


def test_the_equal_error_rate_lies_where_the_roc_meets_the_diagonal(judged):
    result, _, labels, _, matrix = judged
    far, tar, _ = roc_curve(*all_pairs(matrix, labels), drop_intermediate=False)
    place = np.arange(len(far))
    assert result.figures["eer"] == pytest.approx(np.interp(np.interp(0, far - (1 - tar), place), place, far), abs=1e-4)


def test_the_true_accept_rate_is_the_largest_that_the_false_accept_rate_allows(judged):
    result, _, labels, _, matrix = judged
    far, tar, _ = roc_curve(*all_pairs(matrix, labels), drop_intermediate=False)
    for exponent in (2, 3):
        assert result.figures[f"tar_at_far_1e{exponent}"] == pytest.approx(tar[far <= 10.0**-exponent].max(), abs=1e-9)


def test_rates_with_fewer_than_ten_expected_false_accepts_are_explained_instead(judged):
    result, _, labels, _, matrix = judged
    different = int((~all_pairs(matrix, labels)[0]).sum())
    for exponent in (2, 3, 4, 5, 6):
        name = f"tar_at_far_1e{exponent}"
        assert (name in result.figures) == (different * 10.0**-exponent >= 10)
        assert any(note.startswith(name) for note in result.notes) == (name not in result.figures)


def test_a_rate_that_is_just_reached_counts():
    # Of 300 + 780 same pairs 891 are at distance 0; 10 of 25 * 40 different ones follow, at 0.5, and then 150 same ones at 1.
    embeddings = torch.tensor([0.0] * 10 + [1.0] * 15 + [-0.5] + [100.0] * 39)[:, None]
    figures = evaluate(embeddings, torch.tensor([0] * 25 + [1] * 40), PLAIN, ways=()).figures
    assert figures["tar_at_far_1e2"] == pytest.approx(1041 / 1080)


@pytest.mark.parametrize(("sizes", "enough"), [((25, 40), True), ((27, 37), False)])
def test_ten_expected_false_accepts_are_enough(sizes, enough):
    labels = torch.repeat_interleave(torch.tensor(sizes))
    embeddings = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    assert ("tar_at_far_1e2" in evaluate(embeddings, labels, COSINE, ways=()).figures) == enough  # 1,000 and 999 different pairs


def test_accuracy_is_that_of_the_threshold_given(judged):
    _, embeddings, labels, distance, matrix = judged
    same, score = all_pairs(matrix, labels)
    for quantile in (0.05, 0.5, 0.9):
        threshold = float(np.quantile(score[same], quantile)) + ROUNDING / 3
        figures = evaluate(embeddings, labels, distance, threshold=threshold, ways=()).figures
        assert figures["threshold"] == threshold
        balanced = ((score[same] >= threshold).mean() + (score[~same] < threshold).mean()) / 2
        assert figures["accuracy"] == pytest.approx(balanced, abs=1 / same.sum())  # a pair may lie on it


def test_a_threshold_none_or_all_reach_is_a_coin_toss():
    embeddings, labels = clusters(40, 5)
    for threshold in (-1.5, 1.5):
        assert evaluate(embeddings, labels, COSINE, threshold=threshold, ways=()).figures["accuracy"] == 0.5


def test_a_score_equal_to_the_threshold_is_accepted():
    embeddings = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    labels = torch.tensor([0, 0, 1, 1])  # same at distance 1, different at 2, 3, 3 and 4
    for threshold, accuracy in ((-0.999, 0.5), (-1.0, 1.0), (-1.999, 1.0), (-2.0, 0.875), (-3.0, 0.625), (-4.0, 0.5)):
        assert evaluate(embeddings, labels, PLAIN, threshold=threshold, ways=()).figures["accuracy"] == accuracy


def test_without_a_threshold_the_point_of_equal_error_is_taken(judged):
    result, _, labels, _, matrix = judged
    same, score = all_pairs(matrix, labels)
    far, tar, _ = roc_curve(same, score, drop_intermediate=False)
    threshold = result.figures["threshold"]
    gap = abs((score[~same] >= threshold).mean() - (score[same] < threshold).mean())
    assert gap <= abs(far - (1 - tar)).min() + 2 / same.sum()


def test_the_roc_runs_from_corner_to_corner_through_points_of_the_true_one(judged):
    result, _, labels, _, matrix = judged
    same, score = all_pairs(matrix, labels)
    assert len(score) > 10_000 > 1_100 > len(result.far), "it was to be decimated"
    assert (result.far[0], result.tar[0], result.far[-1], result.tar[-1]) == (0, 0, 1, 1)
    assert (np.diff(result.far) >= 0).all()
    assert (np.diff(result.tar) >= 0).all()
    assert result.thresholds[0] == np.inf
    assert (np.diff(result.thresholds) < 0).all()
    for far, tar, threshold in zip(result.far, result.tar, result.thresholds, strict=True):
        nudged = threshold - ROUNDING * max(1.0, np.ptp(score))
        assert far == pytest.approx((score[~same] >= nudged).mean(), abs=5e-4)
        assert tar == pytest.approx((score[same] >= nudged).mean(), abs=3 / same.sum())


def test_a_decimated_roc_keeps_the_area():
    embeddings, labels = clusters(170, 12)
    result = evaluate(embeddings, labels, COSINE, ways=())
    assert np.trapezoid(result.tar, result.far) == pytest.approx(result.figures["auc"], abs=1e-3)


@settings(max_examples=8, deadline=None)
@given(tied())
def test_a_short_roc_has_every_point(case):
    embeddings, labels, distance, exact = case
    result = evaluate(embeddings, labels, distance, ways=())
    far, tar, _ = roc_curve(*all_pairs(exact, labels), drop_intermediate=False)
    assert result.far == pytest.approx(far)
    assert result.tar == pytest.approx(tar)


# Few-shot recognition, whose questions are tested with the protocols


def test_the_scale_of_the_embeddings_does_not_matter():
    embeddings, labels = clusters(60, 6)
    for scale in (1e-6, 1e6):
        scaled, plain = (evaluate(embeddings * factor, labels, PLAIN).figures for factor in (scale, 1.0))
        for name in (*RETRIEVAL, "auc", "eer", "average_precision", "oneshot_5way"):
            assert scaled[name] == pytest.approx(plain[name], abs=1e-3), name


def test_questions_of_more_classes_than_there_are_are_explained():
    embeddings, labels = clusters(40, 6)
    result = evaluate(embeddings, labels, COSINE)
    assert "oneshot_5way" in result.figures
    assert "oneshot_20way" not in result.figures
    assert [note for note in result.notes if "oneshot_20way" in note and "there are 6" in note]


# Certainty, and classes


def test_the_interval_of_a_mean_over_classes_is_the_textbooks():
    """With one query a class it is the textbook's: Student's, on the scale of the logit."""
    values = torch.tensor([0.2, 0.9, 0.4, 1.0, 0.0, 0.7, 0.6, 0.8, 0.3, 0.55]).double()
    low, high = mean_interval(values, torch.arange(10))
    mean, error = values.mean().item(), values.std().item() / math.sqrt(10)
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var(correction=0) ** 2
    reach = stats.t.ppf(0.975, min(9, 2 * 10 / (kurtosis - 1))) * error / (mean * (1 - mean))
    assert [low, high] == pytest.approx([1 / (1 + math.exp(-math.log(mean / (1 - mean)) + side * reach)) for side in (1, -1)], abs=1e-3)


def test_samples_that_say_the_same_are_no_more_certain_than_one():
    values, labels = torch.rand(30, generator=torch.Generator().manual_seed(0)), torch.arange(30)
    assert mean_interval(values.repeat(20), labels.repeat(20)) == pytest.approx(mean_interval(values, labels))


def test_unanimous_classes_leave_room_for_one_that_is_not():
    assert mean_interval(torch.ones(40), torch.arange(10).repeat(4)) == pytest.approx([0.025 ** (1 / 10), 1])
    assert mean_interval(torch.zeros(40), torch.arange(10).repeat(4)) == pytest.approx([0, 1 - 0.025 ** (1 / 10)])


@DISTANCES
def test_the_intervals_of_pairs_are_those_of_leaving_out_each_class(distance):
    """The infinitesimal jackknife is near the jackknife that computes each figure again without the class."""
    embeddings, labels = clusters(250, 25, noise=0.8)
    result = evaluate(embeddings, labels, distance, ways=())
    without = [evaluate(embeddings[labels != c], labels[labels != c], distance, ways=(), certainty=False).figures for c in range(25)]
    for name in ("auc", "eer"):
        left = np.array([figures[name] for figures in without])
        error = math.sqrt(24 / 25 * np.square(left - left.mean()).sum())
        low, high = result.intervals[name]
        value = result.figures[name]
        assert low < value < high
        width = (math.log(high / (1 - high)) - math.log(low / (1 - low))) * value * (1 - value) / 2
        assert 0.85 * 1.96 * error < width < 1.8 * 1.96 * error, name


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_a_sample_of_the_classes_tells_the_intervals_nearly_as_well(monkeypatch, limit):
    embeddings, labels = clusters(900, 60, noise=0.8)
    whole = evaluate(embeddings, labels, COSINE, ways=()).intervals
    monkeypatch.setattr(intervals, "_CLASSES", int(60 * limit))
    monkeypatch.setattr(intervals, "_ROWS", 300)
    part = evaluate(embeddings, labels, COSINE, ways=()).intervals
    for name in ("auc", "eer"):
        assert part[name] != whole[name]
        assert np.ptp(part[name]) == pytest.approx(np.ptp(whole[name]), rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "noise", "least"), [(40, 0.8, 0.9), (100, 0.35, 0.85), (12, 0.8, 0.9)])
def test_nine_in_ten_intervals_or_more_hold_the_mean_over_test_sets(classes, noise, least):
    """Nominally 95 %. With few errors, most in a few wide classes (the second case), intervals of pairs are somewhat short."""
    values, ends, names = [], [], ["recall_at_1", "map_at_r", "auc", "eer", "oneshot_5way"]
    for trial in range(200):
        generator = torch.Generator().manual_seed(trial)
        labels = torch.arange(classes).repeat_interleave(torch.randint(2, 12, (classes,), generator=generator))
        width = noise * (0.5 + torch.rand(classes, 1, generator=generator))
        points = torch.randn(classes, 8, generator=generator)[labels] + width[labels] * torch.randn(len(labels), 8, generator=generator)
        result = evaluate(points, labels, COSINE, ways=(5,), shots=(1,), seed=trial)
        values.append([result.figures[name] for name in names])
        ends.append([result.intervals[name] for name in names])
    mean, ends = np.mean(values, axis=0), np.array(ends)
    covered = ((ends[..., 0] <= mean) & (mean <= ends[..., 1])).mean(0)
    assert (covered >= least).all(), dict(zip(names, covered, strict=True))


def test_classes_and_what_they_are_taken_for_are_those_of_a_loop():
    embeddings, labels = clusters(120, 10)
    embeddings, labels = torch.cat([embeddings, embeddings[:1] + 1]), torch.cat([labels, torch.tensor([11])])  # one alone, one empty
    result = evaluate(embeddings, labels, COSINE, ways=())
    matrix = true_scores(embeddings, COSINE)
    np.fill_diagonal(matrix, -2)
    taken = {}
    for c in range(12):
        rows = [i for i in range(121) if labels[i] == c and c < 10]
        nearest = [int(labels[matrix[i].argmax()]) for i in rows]
        assert result.class_queries[c] == len(rows)
        if rows:
            assert result.class_recall_at_1[c] == pytest.approx(np.mean([n == c for n in nearest]))
        else:
            assert np.isnan(result.class_recall_at_1[c])
            assert np.isnan(result.class_map_at_r[c])
        for other in nearest:
            if other != c:
                taken[c, other] = taken.get((c, other), 0) + 1
    assert {(a, b): count for a, b, count in result.confusions.tolist()} == taken
    assert (np.diff(result.confusions[:, 2]) <= 0).all()
    assert np.nansum(result.class_map_at_r * result.class_queries) / 120 == pytest.approx(result.figures["map_at_r"])


def test_a_gallery_of_its_own_is_what_queries_are_compared_with():
    embeddings, labels = clusters(150, 12)
    stranger = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))
    gallery = torch.cat([embeddings[60:], stranger]), torch.cat([labels[60:], torch.full((20,), -1)])
    result = evaluate(embeddings[:60], labels[:60], COSINE, gallery=gallery)
    score = (normalize(embeddings[:60]) @ normalize(gallery[0]).T).numpy()
    same = (labels[:60, None] == gallery[1]).numpy()
    assert result.figures["auc"] == pytest.approx(roc_auc_score(same.ravel(), score.ravel()), abs=1e-5)
    nearest = gallery[1][score.argmax(1)]
    assert result.figures["recall_at_1"] == pytest.approx((nearest == labels[:60])[same.any(1)].float().mean().item())
    assert result.figures["queries_without_match"] == int((~same.any(1)).sum())
    assert not [name for name in result.figures if "shot" in name]
    assert result.gallery_labels == gallery[1].tolist()
    assert [result.gallery_ids[row] for row in result.neighbours[:, 0]] == [str(row) for row in score.argmax(1)]
    with pytest.raises(ValueError, match="in the gallery"):
        evaluate(embeddings[:60], labels[:60], COSINE, gallery=(stranger, torch.full((20,), -1)))
    gallery[0][3, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 of 110 gallery embeddings .* 3$"):
        evaluate(embeddings[:60], labels[:60], COSINE, gallery=gallery)


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_embedding_that_is_not_finite_is_named(value):
    embeddings, labels = clusters(40, 5)
    embeddings[17, 2] = value
    with pytest.raises(ValueError, match=r"1 of 40 .* 17$"):
        evaluate(embeddings, labels, COSINE)
    with pytest.raises(ValueError, match=r"DejaVuSans/Q$"):
        evaluate(embeddings, labels, COSINE, ids=[*map(str, range(17)), "DejaVuSans/Q", *map(str, range(22))])


@pytest.mark.parametrize("labels", [[], [3], [0, 0, 0], [0, 1, 2], [5, 5]])
def test_too_few_classes_or_samples_are_refused(labels):
    with pytest.raises(ValueError, match="judging needs two classes, one of them with two samples"):
        evaluate(torch.randn(len(labels), 4), torch.tensor(labels, dtype=torch.long), COSINE)


def test_every_figure_promised_is_there_and_knows_its_direction():
    embeddings, labels = clusters(40, 5)
    assert set(FIGURES) <= evaluate(embeddings, labels, COSINE, ways=()).figures.keys()
    assert [name for name in FIGURES if not higher_is_better(name)] == ["median_rank", "eer"]
    for lower in ("val/eer", "test/omniglot_error", "omniglot_error", "val/loss", "train/loss"):
        assert not higher_is_better(lower)
    for higher in ("val/map_at_r", "test/tar_at_far_1e3", "oneshot_5way", "threshold"):
        assert higher_is_better(higher)


# The result


def test_neighbours_are_the_nearest_others(judged):
    result, _, labels, _, matrix = judged
    np.fill_diagonal(matrix := matrix.copy(), -np.inf)
    assert result.neighbours.shape == result.neighbour_scores.shape == (len(labels), 10)
    rows = np.arange(len(labels))
    precision = ROUNDING * max(1.0, np.ptp(matrix[np.isfinite(matrix)]))
    assert (result.neighbours != rows[:, None]).all()
    assert [len(set(row)) for row in result.neighbours.tolist()] == [10] * len(labels)
    # By score, not by index: two that differ by less than the rounding may change places.
    nearest = -np.sort(-matrix, axis=1)[:, :10]
    assert np.abs(matrix[rows[:, None], result.neighbours] - nearest).max() < 2 * precision
    assert np.abs(result.neighbour_scores - nearest).max() < 2 * precision


def test_missing_neighbours_are_minus_one():
    result = evaluate(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]), PLAIN, ways=())
    assert result.neighbours[:, :2].tolist() == [[1, 2], [0, 2], [1, 0]]
    assert (result.neighbours[:, 2:] == -1).all()
    assert result.neighbour_scores[:, :2] == pytest.approx(np.array([[-1, -5], [-1, -4], [-4, -5]]), abs=1e-4)


def test_a_sample_of_the_embeddings_is_kept():
    embeddings, labels = clusters(2_050, 30)
    result = evaluate(embeddings, labels, COSINE, ways=())
    assert result.embeddings.shape == (2_000, 6)
    assert result.embeddings.dtype == np.float16
    assert len(set(result.sampled.tolist())) == 2_000
    assert (result.embeddings == embeddings[result.sampled].half().numpy()).all()


def test_a_result_survives_its_file(tmp_path):
    embeddings, labels = clusters(40, 5)
    ids, names = [f"Ж/{i}.png" for i in range(40)], ["alpha", "beta", "gamma", "delta", "epsilon"]
    results = {
        "val": evaluate(embeddings, labels, COSINE, ids=ids, class_names=names),
        "test": evaluate(embeddings[:30], labels[:30], PLAIN, threshold=-1.25),
        "parted": evaluate(embeddings[:30], labels[:30], COSINE, gallery=(embeddings[30:], labels[30:]), gallery_ids=ids[30:]),
    }
    EvaluationResult.save(results, tmp_path / "results.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["results.npz"]
    with np.load(tmp_path / "results.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
    read = EvaluationResult.load(tmp_path / "results.npz")
    assert list(read) == ["val", "test", "parted"]
    for prefix, result in results.items():
        for name, value in vars(result).items():
            if isinstance(value, np.ndarray):
                assert getattr(read[prefix], name).dtype == value.dtype
                assert np.array_equal(getattr(read[prefix], name), value)
            else:
                assert getattr(read[prefix], name) == value
    assert read["val"].ids == ids
    assert (read["val"].gallery_ids, read["parted"].gallery_ids) == ([], ids[30:])
    assert read["val"].class_names == names


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    embeddings, labels = clusters(40, 5)
    results = {"val": evaluate(embeddings, labels, COSINE, ways=())}
    EvaluationResult.save(results, tmp_path / "results.npz")
    before = (tmp_path / "results.npz").read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space"):
        EvaluationResult.save(results, tmp_path / "results.npz")
    assert (tmp_path / "results.npz").read_bytes() == before


def test_embeddings_of_any_length_are_judged_by_their_direction():
    embeddings, labels = clusters(40, 5)
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    long, unit = (evaluate(x, labels, COSINE, ways=()).figures for x in (embeddings * lengths, normalize(embeddings)))
    assert long == pytest.approx(unit, abs=1e-4)


# --- listed pairs and triplets


def listed(seed: int = 0, total: int = 300, size: int = 60):
    """(embeddings, rows, same): same pairs are nearer, some pairs are listed twice."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(size, 8, generator=generator)
    embeddings[size // 2 :] = embeddings[: size // 2] + 0.9 * torch.randn(size // 2, 8, generator=generator)
    left = torch.randint(size // 2, (total,), generator=generator)
    same = torch.rand(total, generator=generator) < 0.3
    other = torch.randint(size, (total,), generator=generator)
    return embeddings, torch.stack([left, torch.where(same, left + size // 2, other)], 1), same


@pytest.mark.parametrize("distance", [CosineSimilarity(), LpDistance(normalize_embeddings=False), LpDistance(p=1)])
def test_listed_pairs_are_judged_as_scikit_learn_does(distance):
    embeddings, rows, same = listed()
    result = evaluate_tuples(embeddings, rows, same, distance)
    matrix = distance(embeddings.double())
    score = torch.stack([matrix[a, b] * (1 if distance.is_inverted else -1) for a, b in rows.tolist()]).numpy()
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(same, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert result.figures["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(same, score), abs=1e-6)
    assert result.figures["average_precision"] == pytest.approx(sklearn.metrics.average_precision_score(same, score), abs=1e-6)
    assert result.figures["best_f1"] == pytest.approx(result.figures["f1"])
    assert result.figures["f1"] == pytest.approx(f1.max(), abs=1e-6)
    assert result.figures["f1_threshold"] == pytest.approx(thresholds[f1[:-1].argmax()], abs=1e-5)
    other, *listed_again = listed(seed=1)
    there = evaluate_tuples(other, *listed_again, distance, **{k: result.figures[k] for k in ("threshold", "f1_threshold")}).figures
    matrix = distance(other.double()) * (1 if distance.is_inverted else -1)
    score = np.array([matrix[a, b].item() for a, b in listed_again[0].tolist()])
    assert there["f1"] == pytest.approx(sklearn.metrics.f1_score(listed_again[1], score >= there["f1_threshold"] - 1e-6))
    assert there["f1"] < there["best_f1"]
    assert there["f1_threshold"] == result.figures["f1_threshold"]
    wanted = sklearn.metrics.balanced_accuracy_score(listed_again[1], score >= there["threshold"] - 1e-6)
    assert there["accuracy"] == pytest.approx(wanted)


def test_a_threshold_above_all_scores_accepts_none():
    assert evaluate_tuples(*listed(), CosineSimilarity(), f1_threshold=2.0).figures["f1"] == 0


def test_each_kind_of_pair_is_judged_with_the_pairs_of_the_other_sort():
    embeddings, rows, same = listed()
    kinds = ["genuine" if alike else ("random", "skilled", "")[row % 3] for row, alike in enumerate(same.tolist())]
    mixed = ["early" if row < 100 else "" for row in range(len(same))]
    result = evaluate_tuples(embeddings, rows, same, CosineSimilarity(), kinds=kinds)
    early = evaluate_tuples(embeddings, rows, same, CosineSimilarity(), kinds=mixed, threshold=result.figures["threshold"])
    score = torch.stack([torch.cosine_similarity(embeddings[a], embeddings[b], 0) for a, b in rows.tolist()]).numpy()
    for kind in ("random", "skilled"):
        chosen = np.array([name in (kind, "genuine") for name in kinds])
        assert result.figures[f"{kind}/auc"] == pytest.approx(sklearn.metrics.roc_auc_score(same[chosen], score[chosen]), abs=1e-6)
        accepted = score[chosen] >= result.figures["threshold"] - 1e-6
        assert result.figures[f"{kind}/accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(same[chosen], accepted))
    assert early.figures["early/auc"] == pytest.approx(sklearn.metrics.roc_auc_score(same[:100], score[:100]), abs=1e-6)
    assert not [name for name in result.figures if name.startswith("genuine/")], "with all the others it is the whole list"


def test_triplets_are_judged_as_their_pairs_and_by_which_is_nearer():
    generator = torch.Generator().manual_seed(0)
    embeddings, rows = torch.randn(30, 4, generator=generator), torch.randint(30, (90, 3), generator=generator)
    embeddings[10] = embeddings[11]
    rows[0] = torch.tensor([3, 10, 11])  # a tie is no success
    result = evaluate_tuples(embeddings, rows, None, CosineSimilarity())
    nearer, scores, same = 0, [], []
    for a, p, n in rows.tolist():
        near, far = (round(torch.cosine_similarity(embeddings[a].double(), embeddings[other].double(), 0).item(), 6) for other in (p, n))
        nearer += near > far
        scores, same = [*scores, near, far], [*same, 1, 0]
    assert result.figures["triplet_accuracy"] == pytest.approx(nearer / 90)
    assert result.figures["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(same, scores), abs=1e-5)


def test_a_result_of_listed_pairs_is_saved_and_names_the_hardest(tmp_path):
    embeddings, rows, same = listed()
    names = [f"p.csv, row {row}" for row in range(len(same))]
    result = evaluate_tuples(embeddings, rows, same, CosineSimilarity(), where=names)
    EvaluationResult.save({"test": result}, tmp_path / "results.npz")
    again = EvaluationResult.load(tmp_path / "results.npz")["test"]
    assert again.figures == result.figures
    score = torch.stack([torch.cosine_similarity(embeddings[a], embeddings[b], 0) for a, b in rows.tolist()])
    worst = names[int(score.where(same, torch.inf).argmin())]
    assert f"hardest of the same pairs: {worst}, " in "".join(again.notes)


def test_an_embedding_that_is_not_finite_is_named_among_listed_pairs():
    embeddings, rows, same = listed()
    embeddings[7] = torch.nan
    with pytest.raises(ValueError, match="1 of 60 embeddings are NaN or infinite, among them seven"):
        evaluate_tuples(embeddings, rows, same, CosineSimilarity(), ids=["seven" if row == 7 else "" for row in range(60)])
