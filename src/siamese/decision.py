"""From a score to a decision: the threshold, how often it errs, and how likely two inputs of this score are the same.

All of it is fitted on validation classes, and goes with the model wherever it goes.
"""

import math
import re
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

GOALS = "equal_error, best_f1, or far_1e-3 and the like"
_POINTS = 100  # of the curve that is kept
_BINS = 15


def goal_rate(goal: str) -> float | None:
    """The false-accept rate of a goal such as "far_1e-3" (or "far=1e-3"); None of "equal_error" and "best_f1".

    Raises:
        ValueError: there is no such goal, or its rate is not above 0 and below 1.
    """
    if goal in ("equal_error", "best_f1"):
        return None
    found = re.fullmatch(r"far[=_](\S+)", str(goal))
    try:
        rate = float(found[1]) if found else math.nan
    except ValueError:
        rate = math.nan
    if not 0 < rate < 1:
        raise ValueError(f"{goal} is no goal of a threshold: take {GOALS}, a false-accept rate above 0 and below 1")
    return rate


def rounded_up(rate: float) -> str:
    """A rate in two digits, and not below it."""
    return f"{1.05 * rate:.1e}"


@dataclass(frozen=True)
class Decision:
    """Two inputs count as the same if their score reaches `threshold`. Rates are of validation pairs, in 0..1.

    goal: what the threshold was chosen for, see `goal_rate`.
    far, frr: the share of different pairs accepted, and of same pairs refused; far_ci95, frr_ci95: [low, high], where they are known.
    same, different: how many pairs of each they were measured on.
    slope, intercept: of the logistic calibration.
    curve: [score, far, frr] of other thresholds, from strict to lenient.
    """

    goal: str
    threshold: float
    far: float
    frr: float
    same: int
    different: int
    slope: float
    intercept: float
    curve: list[list[float]]
    far_ci95: list[float] | None = None
    frr_ci95: list[float] | None = None

    def __post_init__(self):
        numbers = [self.threshold, self.far, self.frr, self.same, self.different, self.slope, self.intercept]
        try:
            curve = np.asarray(self.curve, dtype=np.float64)
            fine = np.isfinite(np.asarray(numbers, dtype=np.float64)).all() and np.isfinite(curve).all()
        except (TypeError, ValueError):
            fine = False
        if not fine or curve.ndim != 2 or curve.shape[1] != 3 or len(curve) < 1:
            raise ValueError("its decision holds what is no finite number, or no curve")

    @classmethod
    def of(cls, goal: str, result) -> "Decision":
        """Of the `siamese.evaluation.EvaluationResult` of validation, judged with this goal."""
        far, tar, thresholds = result.far[1:], result.tar[1:], result.thresholds[1:]  # the first is of a threshold of infinity
        kept = np.unique(np.searchsorted(far, [0.0, *np.logspace(-7, 0, _POINTS - 1)], side="right").clip(1) - 1)
        return cls(
            goal=goal,
            threshold=result.figures["threshold"],
            **{name: result.figures[name] for name in ("far", "frr")},
            **{f"{name}_ci95": result.intervals.get(name) for name in ("far", "frr")},
            **dict(zip(("same", "different"), map(int, result.pairs), strict=True)),
            **dict(zip(("slope", "intercept"), result.calibration, strict=True)),
            curve=np.stack([thresholds[kept], far[kept], 1 - tar[kept]], 1).tolist(),
        )

    def plain(self) -> dict:
        """Itself as plain values, of which `Decision(**values)` makes it again."""
        return asdict(self)

    def probability(self, scores: Tensor) -> Tensor:
        """How likely two inputs with these scores are the same, in 0..1, if before the look both were equally likely.

        Where only one pair in n is the same, add log(1 / (n - 1)) to its logit.
        """
        return torch.sigmoid(self.slope * scores.double() + self.intercept)

    def at_far(self, rate: float) -> tuple[float, float, float]:
        """(threshold, far, frr) of the most lenient threshold that accepts at most this share of different pairs.

        Of less than ten pairs nothing is said: below a rate of ten pairs the threshold is the one that accepts ten of them at most.
        """
        inside = [point for point in self.curve if point[1] <= max(rate, self.finest)]
        return tuple(inside[-1] if inside else [float(np.nextafter(self.curve[0][0], np.inf)), 0.0, 1.0])

    def rates_at(self, score: float) -> tuple[float, float]:
        """(far, frr) of the nearest known threshold that is not above this score: rates that a threshold of `score` does not exceed."""
        lenient = next((point for point in self.curve if point[0] <= score), self.curve[-1])
        strict = [point for point in self.curve if point[0] >= score]
        return lenient[1], strict[-1][2] if strict else 1.0

    @property
    def finest(self) -> float:
        """The lowest false-accept rate that so many pairs can tell: ten of them."""
        return 10 / max(self.different, 10)


def calibrate(scores: np.ndarray, same: np.ndarray, different: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of P(same | score) = sigmoid(slope score + intercept), both kinds of pairs weighing the same.

    Platt 1999, "Probabilistic outputs for support vector machines", with his targets, which keep it finite where the scores
    tell all pairs apart.

    Args:
        scores: float64 [B]; same, different: [B] how many pairs of each kind have them.
    """
    positives, negatives = same.sum(), different.sum()
    weight = np.stack([same / positives, different / negatives]) / 2
    target = np.array([(positives + 1) / (positives + 2), 1 / (negatives + 2)])
    middle = (weight.sum(0) * scores).sum()
    spread = max(math.sqrt((weight.sum(0) * (scores - middle) ** 2).sum()), 1e-12)
    inputs = np.stack([(scores - middle) / spread, np.ones_like(scores)])
    wanted = (weight * target[:, None]).sum(0)
    total, line = weight.sum(0), np.zeros(2)

    def loss(line: np.ndarray) -> float:
        logit = line @ inputs
        return float((total * np.logaddexp(0, logit) - wanted * logit).sum())

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(line @ inputs, -700, 700)))
        gradient = inputs @ (total * chance - wanted)
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = (inputs * (total * chance * (1 - chance))) @ inputs.T + 1e-12 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(line - size * step) > loss(line) and size > 1e-6:
            size /= 2
        line = line - size * step
    return float(line[0] / spread), float(line[1] - line[0] * middle / spread)


def calibration_error(scores: np.ndarray, same: np.ndarray, different: np.ndarray, slope: float, intercept: float) -> float:
    """The expected calibration error in 0..1, over 15 bins of equal width, both kinds of pairs weighing the same.

    Guo, Pleiss, Sun and Weinberger 2017, arXiv:1706.04599.
    """
    weight = np.stack([same / same.sum(), different / different.sum()]) / 2
    chance = 1 / (1 + np.exp(-np.clip(slope * scores + intercept, -700, 700)))
    place = np.minimum((chance * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(place, weight[0] - weight.sum(0) * chance, _BINS)
    return float(np.abs(gap).sum())
