"""Thresholds for a stated goal, the rates that they promise, and probabilities: against naive counts and scikit-learn."""

import dataclasses

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from test_evaluation import clusters

from siamese.decision import Decision, calibrate, calibration_error, goal_rate
from siamese.evaluation import EvaluationResult, evaluate, evaluate_pairs


@pytest.fixture(scope="module")
def scored():
    """Scores of 300 same and 5,000 different pairs, in steps of which many are equal, and which are the same."""
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(0.7, 0.2, 300), generator.normal(0.1, 0.2, 5000)]).clip(-1, 1)
    return np.round(scores * 1024) / 1024, np.arange(5300) < 300


@pytest.mark.parametrize("rate", [0.3, 0.01, 0.002])
@pytest.mark.parametrize("written", ["far_{}", "far={}"])
def test_a_threshold_for_a_rate_is_the_most_lenient_that_keeps_it(scored, rate, written):
    scores, same = scored
    figures, _, _ = evaluate_pairs(torch.tensor(scores), torch.tensor(same), goal=written.format(rate))
    kept = [one for one in np.unique(scores) if (scores[~same] >= one).mean() <= rate]
    assert figures["threshold"] == min(kept)
    assert figures["far"] == (scores[~same] >= min(kept)).mean() <= rate
    assert figures["frr"] == pytest.approx((scores[same] < min(kept)).mean(), abs=1e-12)
    assert figures["accuracy"] == pytest.approx(1 - (figures["far"] + figures["frr"]) / 2)


def test_thresholds_of_the_other_goals(scored):
    scores, same = scored
    cuts = np.unique(scores)
    f1 = [2 * (same & (scores >= cut)).sum() / (same.sum() + (scores >= cut).sum()) for cut in cuts]
    gap = [abs((scores[~same] >= cut).mean() - (scores[same] < cut).mean()) for cut in cuts]
    found = {goal: evaluate_pairs(torch.tensor(scores), torch.tensor(same), goal=goal)[0] for goal in ("best_f1", "equal_error")}
    assert found["best_f1"]["threshold"] == cuts[int(np.argmax(f1))]
    assert found["best_f1"]["best_f1"] == pytest.approx(max(f1))
    assert found["equal_error"]["threshold"] == cuts[int(np.argmin(gap))]


def test_where_no_score_keeps_the_rate_none_is_accepted():
    figures, _, _ = evaluate_pairs(torch.tensor([0.5, 0.4, 0.5]), torch.tensor([True, True, False]), goal="far_0.1")
    assert (figures["far"], figures["frr"]) == (0, 1)
    assert figures["threshold"] > 0.5


@pytest.mark.parametrize("goal", ["far_0", "far_1", "far_x", "far", "best", "far_-1e-3", None, 0.5])
def test_what_is_no_goal_is_refused_with_those_that_are(goal):
    with pytest.raises(ValueError, match="take equal_error, best_f1, or far_1e-3"):
        goal_rate(goal)


# Probabilities


def weighted(scores, same):
    """Each kind of pair weighs one half."""
    return np.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())


def test_the_calibration_is_the_balanced_logistic_regression(scored):
    scores, same = scored
    reference = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000)
    target = np.where(same, 301 / 302, 1 / 5002)  # Platt's: each pair is a little of both kinds
    weight = np.concatenate([target, 1 - target]) * np.tile(weighted(scores, same), 2) * len(scores)
    reference.fit(np.tile(scores, 2)[:, None], np.repeat([1, 0], len(scores)), sample_weight=weight)
    found = calibrate(scores, same.astype(float), (~same).astype(float))
    assert found == pytest.approx((reference.coef_[0, 0], reference.intercept_[0]), rel=1e-4)


def test_counts_of_equal_scores_are_as_good_as_the_pairs(scored):
    scores, same = scored
    cuts, place = np.unique(scores, return_inverse=True)
    counts = [np.bincount(place, kind, len(cuts)) for kind in (same, ~same)]
    one, other = calibrate(scores, same.astype(float), (~same).astype(float)), calibrate(cuts, *counts)
    assert one == pytest.approx(other, rel=1e-6)
    plain = calibration_error(scores, same.astype(float), (~same).astype(float), *one)
    assert calibration_error(cuts, *counts, *one) == pytest.approx(plain, abs=1e-12)


def test_the_calibration_error_is_the_naive_one(scored):
    scores, same = scored
    slope, intercept = 3.0, -1.0
    chance, weight = 1 / (1 + np.exp(-(slope * scores + intercept))), weighted(scores, same)
    naive = 0.0
    for low in range(15):
        inside = (chance >= low / 15) & (chance < (low + 1) / 15)
        naive += abs((weight[inside] * same[inside]).sum() - (weight[inside] * chance[inside]).sum())
    found = calibration_error(scores, same.astype(float), (~same).astype(float), slope, intercept)
    assert found == pytest.approx(naive, abs=1e-12)
    fitted = calibrate(scores, same.astype(float), (~same).astype(float))
    assert calibration_error(scores, same.astype(float), (~same).astype(float), *fitted) < 0.05 < found
    # With as many of both kinds it is what scikit-learn's curve says.
    even = np.r_[np.arange(300), 300 + np.arange(300)]
    share, mean = calibration_curve(same[even], chance[even], n_bins=15)
    counts = np.histogram(chance[even], np.linspace(0, 1, 16))[0]
    expected = (np.abs(share - mean) * counts[counts > 0]).sum() / 600
    assert calibration_error(scores[even], same[even] * 1.0, ~same[even] * 1.0, slope, intercept) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scores", [[0.9, 0.8, 0.1, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.1, 0.8, 0.9], [1e6, 2e6, -1e6, 0.0]])
def test_scores_that_tell_all_or_nothing_have_a_calibration_too(scores):
    same = np.array([1.0, 1, 0, 0])
    slope, intercept = calibrate(np.array(scores), same, 1 - same)
    assert np.isfinite([slope, intercept]).all()
    chance = 1 / (1 + np.exp(-(slope * np.array(scores) + intercept)))
    assert (np.sign(np.diff(chance)) * np.sign(np.diff(scores)) * np.sign(slope) >= 0).all()


# What goes with the model


@pytest.fixture(scope="module")
def judged() -> EvaluationResult:
    embeddings, labels = clusters(400, 20)
    return evaluate(embeddings, labels, CosineSimilarity(), goal="far_1e-2")


def naive_rates(threshold: float) -> tuple[float, float]:
    embeddings, labels = clusters(400, 20)
    unit = torch.nn.functional.normalize(embeddings.double())
    scores, same = (unit @ unit.T)[pairs := torch.ones(400, 400).triu(1).bool()], (labels[:, None] == labels)[pairs]
    return (scores[~same] >= threshold - 1e-6).double().mean().item(), (scores[same] < threshold - 1e-6).double().mean().item()


def test_a_decision_says_what_its_threshold_does(judged):
    decision = Decision.of("far_1e-2", judged)
    assert (decision.far, decision.frr) == pytest.approx(naive_rates(decision.threshold), abs=1e-9)
    assert decision.far <= 0.01
    assert decision.same + decision.different == 400 * 399 / 2
    assert decision.far_ci95[0] < decision.far < decision.far_ci95[1]
    assert decision.frr_ci95[0] < decision.frr < decision.frr_ci95[1]
    assert Decision(**decision.plain()) == decision


@pytest.mark.parametrize("rate", [0.5, 0.05, 1e-3, 1e-9])
def test_another_rate_has_a_threshold_that_keeps_it(judged, rate):
    decision = Decision.of("far_1e-2", judged)
    threshold, far, frr = decision.at_far(rate)
    assert (far, frr) == pytest.approx(naive_rates(threshold), abs=1e-9)
    assert far <= max(rate, decision.finest)
    assert far > 0.5 * max(rate, decision.finest), "and is not much too strict"


def test_rates_at_any_score_are_bounds(judged):
    decision = Decision.of("equal_error", judged)
    for score in np.linspace(-1.2, 1.2, 49):
        (far, frr), (said_far, said_frr) = naive_rates(score), decision.rates_at(score)
        assert far <= said_far + 1e-9
        assert frr <= said_frr + 1e-9
        assert said_far < 0.1 or said_far < 1.6 * far + 0.1


def test_probabilities_grow_with_the_score(judged):
    decision = Decision.of("equal_error", judged)
    chance = decision.probability(torch.linspace(-1, 1, 21))
    assert (chance.diff() > 0).all()
    assert 0 < chance[0] < 0.5 < chance[-1] < 1


@pytest.mark.parametrize("broken", [{"curve": []}, {"curve": [[1, 2]]}, {"threshold": None}, {"slope": float("nan")}, {"far": "much"}])
def test_a_decision_of_no_numbers_is_refused(judged, broken):
    with pytest.raises(ValueError, match="its decision"):
        dataclasses.replace(Decision.of("equal_error", judged), **broken)
