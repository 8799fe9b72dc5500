"""Judge embeddings by retrieval, by verification and by few-shot recognition, and keep what judging found.

The rules, the same for every figure:

- A sample is never its own match: it is excluded by index, not by score. Duplicates count.
- Scores (higher is more alike) are compared after rounding to 2^-20 of the unit sphere's range. Ties are resolved
  against us: of equal scores, the different class ranks first. So a collapsed space scores nothing, in any order of items.
- A query whose class has no sample in the gallery is counted in `queries_without_match` and left out of the means.
- A pair is counted once. A false-accept rate with fewer than ten expected false accepts is not printed but explained.
- The threshold of `accuracy`, `far` and `frr`, and the calibration, come from outside, from the validation classes; without them
  they are fitted here.
- Intervals (95 %) are over classes: samples of a class, and pairs that share a sample, are not independent.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from siamese._walk import NEIGHBOURS, Found, Ranks, step_of, walk
from siamese.decision import calibrate, calibration_error, goal_rate
from siamese.distances import pair_scores
from siamese.intervals import mean_interval, pair_intervals
from siamese.protocols import fewshot, oneshot_by_ways, open_set

RECALL_AT = (1, 5, 10)
FAR_EXPONENTS = (2, 3, 4, 5, 6)
WAYS, SHOTS = (5, 20), (1, 5)
WAYS_CURVE = (2, 5, 10, 20, 50, 100)
# What every evaluation computes, in any split; the rest depends on how much there is to judge.
FIGURES = (
    *(f"recall_at_{k}" for k in RECALL_AT),
    *(f"precision_at_{k}" for k in RECALL_AT[1:]),
    "map_at_r",
    "r_precision",
    "mrr",
    "median_rank",
    "auc",
    "eer",
    "average_precision",
    "best_f1",
    "accuracy",
)
# What every evaluation of listed pairs computes.
PAIR_FIGURES = ("auc", "eer", "average_precision", "best_f1", "f1", "accuracy")
_LOWER_IS_BETTER = ("eer", "far", "frr", "calibration_error", "omniglot_error", "loss", "queries_without_match", "median_rank")


def higher_is_better(figure: str) -> bool:
    """The direction of a figure, with or without its prefix: True for `val/map_at_r`, False for `eer`."""
    return figure.rpartition("/")[2] not in _LOWER_IS_BETTER


@dataclass
class EvaluationResult:
    """What judging one split found. Every view of it (table, W&B, report, threshold) reads this and computes nothing again.

    figures: name -> value; rates in 0..1, except `omniglot_error` in percent and `threshold` in units of the score.
    notes: why a figure is absent, one sentence each.
    far, tar, thresholds: [M] the ROC curve, from strict to lenient; `thresholds` are scores, accepted when reached.
    intervals: name -> [low, high], 95 %, of some of the figures.
    labels: int64 [N] and ids: [N] of the queries; class_names: [C].
    gallery_labels, gallery_ids: [G] of a gallery of its own; empty where the queries themselves are the gallery.
    neighbours: int64 [N, 10], rows of the gallery, nearest first, -1 where there are fewer; neighbour_scores: float32 [N, 10].
    class_queries: int64 [C] queries that have a match; class_recall_at_1, class_map_at_r: float64 [C], NaN where there are none.
    confusions: int64 [<= 50, 3] (class, other class, queries of the first whose nearest neighbour is of the second), most first.
    sampled: int64 [<= 2000] rows whose embeddings are kept; embeddings: float16 [<= 2000, D].
    pairs: how many same and different pairs were judged; calibration: slope and intercept, see `siamese.decision.calibrate`.
    open_set: float64 [<= 200, 2] false-alarm rate, detection and identification rate, see `siamese.protocols.open_set`.
    oneshot: float64 [W, 2] numbers of ways, and how often one-shot questions of so many were answered right.
    hardest: float64 [<= 16, 4] of listed pairs (left, right, score, 1 if the same): the lowest scores of the same, the highest of others.
    shown: int64 [S] rows of the samples that are kept to be looked at, those of a gallery of its own behind the queries; pictures: uint8
        [S, C, H, W] of images; said: [S] what there is to read of others. See `siamese.reporting.keep`.
    """

    figures: dict[str, float]
    notes: list[str]
    far: np.ndarray
    tar: np.ndarray
    thresholds: np.ndarray
    labels: np.ndarray
    ids: list[str]
    class_names: list[str]
    neighbours: np.ndarray
    neighbour_scores: np.ndarray
    class_queries: np.ndarray
    class_recall_at_1: np.ndarray
    class_map_at_r: np.ndarray
    confusions: np.ndarray
    sampled: np.ndarray = field(repr=False)
    embeddings: np.ndarray = field(repr=False)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    gallery_labels: list[int] = field(default_factory=list, repr=False)
    gallery_ids: list[str] = field(default_factory=list, repr=False)
    pairs: list[float] = field(default_factory=list)
    calibration: list[float] = field(default_factory=list)
    open_set: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)), repr=False)
    oneshot: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)), repr=False)
    hardest: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)), repr=False)
    shown: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    pictures: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 0, 0), dtype=np.uint8), repr=False)
    said: list[str] = field(default_factory=list, repr=False)

    _TEXTS = ("figures", "intervals", "notes", "ids", "class_names", "gallery_labels", "gallery_ids", "pairs", "calibration", "said")
    _CLASSES = ("class_queries", "class_recall_at_1", "class_map_at_r", "confusions")
    _ARRAYS = ("far", "tar", "thresholds", "labels", "neighbours", "neighbour_scores", *_CLASSES, "sampled", "embeddings", "open_set")
    _LATER = ("oneshot", "hardest", "shown", "pictures")  # runs of an earlier version lack them
    _ARRAYS += _LATER

    @staticmethod
    def save(results: "dict[str, EvaluationResult]", path: str | os.PathLike) -> None:
        """Write results under their prefixes ("val", "test" ...) to one .npz, atomically."""
        arrays = {f"{prefix}/{name}": getattr(result, name) for prefix, result in results.items() for name in result._ARRAYS}
        for prefix, result in results.items():
            texts = json.dumps({name: getattr(result, name) for name in result._TEXTS})
            arrays[f"{prefix}/texts"] = np.frombuffer(texts.encode(), dtype=np.uint8)
        partial = Path(f"{path}.part")
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(partial, path)

    @staticmethod
    def load(path: str | os.PathLike) -> "dict[str, EvaluationResult]":
        """The results of `save`, by prefix. Nothing is unpickled."""
        with np.load(path, allow_pickle=False) as archive:
            prefixes = dict.fromkeys(name.rpartition("/")[0] for name in archive.files)
            return {
                prefix: EvaluationResult(
                    **{
                        name: archive[f"{prefix}/{name}"]
                        for name in EvaluationResult._ARRAYS
                        if name not in EvaluationResult._LATER or f"{prefix}/{name}" in archive
                    },
                    **json.loads(archive[f"{prefix}/texts"].tobytes()),
                )
                for prefix in prefixes
            }


@torch.no_grad()
def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    distance: Module,
    *,
    gallery: tuple[Tensor, Tensor] | None = None,
    ids: list[str] | None = None,
    class_names: list[str] | None = None,
    gallery_ids: list[str] | None = None,
    threshold: float | None = None,
    goal: str = "equal_error",
    calibration: list[float] | None = None,
    recall_at: tuple[int, ...] = RECALL_AT,
    ways: tuple[int, ...] = WAYS,
    shots: tuple[int, ...] = SHOTS,
    certainty: bool = True,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> EvaluationResult:
    """Judge one split, every sample a query: against all the others, or against a gallery.

    Args:
        embeddings: float [N, D], on any device.
        labels: int64 [N], from 0 up.
        distance: a pytorch-metric-learning distance, the one the embeddings were trained with.
        gallery: (float [G, D], int64 [G]) what the queries are compared with; by default the other samples. Its samples of classes
            that no query has, or with the label -1, are distractors.
        ids, class_names, gallery_ids: names for the queries, classes and samples of the gallery; their numbers by default.
        threshold: the score from which a pair counts as the same, fitted on other classes; None fits it here, to this `goal`:
            "equal_error", "best_f1", or "far_1e-3": the most lenient that accepts at most this share of different pairs.
        calibration: slope and intercept of the probability, fitted on other classes; None fits them here.
        recall_at: each K of recall_at_K, and up to 10 of precision_at_K.
        ways, shots: of the few-shot questions, numbers of classes and of examples of each; without ways none are asked, of strangers
            neither, nor are they of a separate gallery.
        certainty: whether intervals are computed.
        seed: of the few-shot questions, of what intervals sample and of the embeddings kept. It is not the run's, so that all runs
            answer the same questions.
        progress: is told the share of the work that is done.

    Figures: recall_at_1, recall_at_5, recall_at_10; precision_at_5, precision_at_10; map_at_r, r_precision (Musgrave et al. 2020,
    arXiv:2003.08505), mrr and median_rank of the first match; auc, eer, tar_at_far_1e2 ... 1e6, average_precision, best_f1 over all
    pairs; threshold, and by it far, frr, accuracy (the mean of the rates of same pairs accepted and of different pairs refused);
    calibration_error; oneshot_5way, oneshot_20way, fewshot_5way_5shot, fewshot_20way_5shot by prototypes; rank_1_identification,
    dir_at_far_1e1 ... 1e3, see `siamese.protocols.open_set`. Intervals of recall_at_1, map_at_r, auc, eer, far, frr and few-shot.

    Raises:
        ValueError: if an embedding is not finite (names the rows), if there are no two samples of a class or only one class, or for
            an unknown goal.
    """
    labels = labels.to(embeddings.device)
    if gallery:
        gallery = tuple(side.to(embeddings.device) for side in gallery)
        check_judgeable(gallery[0], None, gallery_ids, whose="gallery ")
        check_gallery(labels, gallery[1])
    check_judgeable(embeddings, None if gallery else labels, ids)
    counts = labels.unique(return_counts=True)[1]

    found = walk(embeddings, labels, distance, gallery, progress=progress)
    figures, notes, curve = figures_of(found, recall_at, threshold, goal=goal)
    pairs = [part.cpu().numpy() for part in (found.score + (found.width - found.step) / 2, found.same, found.different)]
    calibration = calibration or calibrate(*pairs)
    figures["calibration_error"] = calibration_error(*pairs, *calibration)
    intervals = {}
    if certainty:
        answered = found.matches > 0
        for name, values in {"recall_at_1": found.rank == 1, "map_at_r": found.map_at_r}.items():
            intervals[name] = mean_interval(values[answered], labels[answered])
        if not gallery:
            intervals |= pair_intervals(found, figures, embeddings, labels, distance, seed)
    for shot in shots if not gallery else ():
        for way in ways:
            name = f"oneshot_{way}way" if shot == 1 else f"fewshot_{way}way_{shot}shot"
            able = int((counts >= shot).sum())
            if able < way or counts.max() <= shot:
                notes.append(
                    f"{name} is left out: it needs {way} classes of {shot} sample{'s' * (shot > 1)} and one more, there are {able}"
                )
                continue
            right, asked = fewshot(embeddings, labels, distance, way, shot, seed=seed)
            figures[name] = right.double().mean().item()
            if certainty:
                intervals[name] = mean_interval(right, asked)
    curve_of_strangers, oneshot = np.zeros((0, 2)), []
    asked = [way for way in WAYS_CURVE if way <= len(counts)]
    if ways and certainty and not gallery and counts.max() > 1:
        shares = oneshot_by_ways(embeddings, labels, distance, asked, seed=seed)
        oneshot = [(way, figures.get(f"oneshot_{way}way", share)) for way, share in zip(asked, shares, strict=True)]
    if ways and not gallery and int((counts > 1).sum()) > 1:
        identified, left_out, curve_of_strangers = open_set(embeddings, labels, distance, seed)
        figures |= identified
        notes += left_out
    labels = labels.cpu()
    names = class_names or [str(c) for c in range(int(labels.max()) + 1)]
    sampled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:2000].sort().values
    return EvaluationResult(
        figures=figures,
        intervals=intervals,
        notes=notes,
        far=curve[0],
        tar=curve[1],
        thresholds=curve[2],
        labels=labels.numpy(),
        ids=ids or [str(i) for i in range(len(labels))],
        class_names=names,
        neighbours=found.neighbours.cpu().numpy(),
        neighbour_scores=found.neighbour_scores.cpu().numpy(),
        **_by_class(found, labels, labels if gallery is None else gallery[1].cpu(), len(names)),
        gallery_labels=gallery[1].tolist() if gallery else [],
        gallery_ids=(gallery_ids or [str(i) for i in range(len(gallery[1]))]) if gallery else [],
        sampled=sampled.numpy(),
        embeddings=embeddings[sampled.to(embeddings.device)].half().cpu().numpy(),
        pairs=[float(kind.sum()) for kind in pairs[1:]],
        calibration=list(calibration),
        open_set=np.asarray(curve_of_strangers),
        oneshot=np.array(oneshot, dtype=np.float64).reshape(-1, 2),
    )


def check_judgeable(embeddings: Tensor, labels: Tensor | None, ids: list[str] | None = None, whose: str = "") -> None:
    """Raises ValueError if an embedding is not finite, or if labels, when given, leave nothing to compare."""
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        rows = [ids[i] if ids else str(i) for i in (~finite).nonzero().flatten()[:5].tolist()]
        raise ValueError(f"{int((~finite).sum())} of {len(finite)} {whose}embeddings are NaN or infinite, among them {', '.join(rows)}")
    if labels is not None:
        counts = labels.unique(return_counts=True)[1]
        if len(labels) == 0 or counts.max() < 2 or len(counts) < 2:
            raise ValueError(f"{len(labels)} samples of {len(counts)} classes: judging needs two classes, one of them with two samples")


def check_gallery(labels: Tensor, gallery_labels: Tensor) -> None:
    """Raises ValueError if labels of queries and gallery leave nothing to compare."""
    if not torch.isin(gallery_labels, labels).any() or len(torch.cat([labels, gallery_labels]).unique()) < 2:
        raise ValueError("judging needs a query with a sample of its class, and one of another, in the gallery")


def figures_of(
    found: Found,
    recall_at: tuple[int, ...] = RECALL_AT,
    threshold: float | None = None,
    together: bool = False,
    goal: str = "equal_error",
) -> tuple:
    """(figures, notes, ROC) of what the walk found; `together` adds up what several processes have, whose pairs already are."""
    answered = found.matches > 0
    rank = found.rank[answered]
    values = {f"recall_at_{k}": rank <= k for k in recall_at}
    values |= {f"precision_at_{k}": found.hits[answered, k - 1] / k for k in recall_at if 1 < k <= NEIGHBOURS}
    values |= {"map_at_r": found.map_at_r[answered], "r_precision": found.r_precision[answered], "mrr": 1 / rank.double()}
    ranks = Ranks(together)
    sums = torch.stack(
        [value.sum(dtype=torch.float64) for value in values.values()] + [answered.sum().double(), (~answered).sum().double()]
    )
    *sums, answered, unanswered = ranks.reduce(sums).tolist()
    figures = {name: total / answered for name, total in zip(values, sums, strict=True)}
    figures["median_rank"] = float(np.median(torch.cat(ranks.gather(rank)).cpu().numpy()))
    figures["queries_without_match"] = int(unanswered)
    notes: list[str] = []
    pairs = (part.cpu().numpy() for part in (found.score, found.same, found.different, found.width))
    return figures, notes, _verify(*pairs, found.step, threshold, goal, figures, notes)


def _by_class(found: Found, labels: Tensor, gallery_labels: Tensor, classes: int) -> dict[str, np.ndarray]:
    """Figures of each class, and which classes are taken for which."""
    answered = (found.matches > 0).cpu()
    asked = labels[answered]
    queries = torch.bincount(asked, minlength=classes)
    values = {"class_recall_at_1": found.rank == 1, "class_map_at_r": found.map_at_r}
    sums = {name: torch.bincount(asked, value.cpu()[answered].double(), classes) / queries for name, value in values.items()}
    nearest = gallery_labels[found.neighbours[:, 0].cpu().clamp(min=0)][answered]
    wrong = (nearest != asked) & (nearest >= 0)
    pairs, counts = torch.stack([asked[wrong], nearest[wrong]], 1).unique(dim=0, return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:50]
    confusions = torch.cat([pairs[most], counts[most, None]], 1)
    return {name: value.numpy() for name, value in {"class_queries": queries, **sums, "confusions": confusions}.items()}


def _verify(
    value: np.ndarray,
    new_same: np.ndarray,
    new_different: np.ndarray,
    width: np.ndarray | float,
    step: float,
    threshold: float | None,
    goal: str,
    figures: dict,
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verification figures and the ROC curve from the counts of same and different pairs at each score, highest first.

    Where a bin is wider than a step, the ROC between its ends is taken for a line, which it lies above where it is concave.
    """
    accepted = np.stack([new_same, new_different], 1).cumsum(0)  # same and different pairs with a score of at least `value`
    same, different = accepted[-1]
    tar, far = accepted[:, 0] / same, accepted[:, 1] / different

    above = accepted[:, 0] - new_same
    figures["auc"] = float((new_different * (above + new_same / 2.0)).sum() / (float(same) * different))
    figures["eer"] = _equal_error_rate(far, tar)
    for exponent in FAR_EXPONENTS:
        name, rate = f"tar_at_far_1e{exponent}", 10.0**-exponent
        if rate * different < 10:
            notes.append(
                f"{name} is left out: {different:,.0f} different pairs give {rate * different:.2g} expected false accepts, ten are needed"
            )
        else:
            last = int(np.searchsorted(far, rate, side="right"))  # how many scores can be accepted
            figures[name] = float(tar[last - 1]) if last else 0.0
            if last < len(far) and np.broadcast_to(width, far.shape)[last] > step:
                before = far[last - 1] if last else 0.0
                figures[name] += float((rate - before) / (far[last] - before) * (tar[last] - figures[name]))
    precision = accepted[:, 0] / accepted.sum(1)
    figures["average_precision"] = float((precision * new_same / same).sum())
    f1 = 2 * precision * tar / np.maximum(precision + tar, 1e-12)
    figures["best_f1"] = float(f1.max())

    if threshold is None and (rate := goal_rate(goal)) is not None:
        last = int(np.searchsorted(far, rate, side="right"))
        threshold = float(value[last - 1] if last else value[0] + step)
    elif threshold is None:
        threshold = float(value[f1.argmax() if goal == "best_f1" else np.abs(far - (1 - tar)).argmin()])
    last = int(np.searchsorted(-value, -(threshold - step / 2), side="right"))  # how many levels are accepted
    figures["threshold"] = threshold
    figures["far"], figures["frr"] = (float(far[last - 1]), float(1 - tar[last - 1])) if last else (0.0, 1.0)
    figures["accuracy"] = 1 - (figures["far"] + figures["frr"]) / 2

    shown = _decimate(far, tar)
    origin = np.zeros(1)
    return (
        np.concatenate([origin, far[shown]]),
        np.concatenate([origin, tar[shown]]),
        np.concatenate([[np.inf], value[shown]]),
    )


def _equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Where the ROC, its points joined by lines, meets far = 1 - tar."""
    far, miss = np.concatenate([[0.0], far]), 1 - np.concatenate([[0.0], tar])
    after = int(np.argmax(far >= miss))
    gap_before, gap_after = miss[after - 1] - far[after - 1], far[after] - miss[after]
    share = gap_before / (gap_before + gap_after)
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def _decimate(far: np.ndarray, tar: np.ndarray, points: int = 1000) -> np.ndarray:
    """Rows of at most about `points` ROC points: evenly along both axes, and along the logarithm of the false-accept rate."""
    if len(far) <= points:
        return np.arange(len(far))
    marks = [(far, np.linspace(0, 1, points // 3)), (tar, np.linspace(0, 1, points // 3)), (far, np.logspace(-7, 0, points // 3))]
    rows = [np.searchsorted(curve, grid).clip(max=len(far) - 1) for curve, grid in marks]
    return np.unique(np.concatenate([*rows, [len(far) - 1]]))


def evaluate_pairs(
    scores: Tensor, same: Tensor, folds: Tensor | None = None, threshold: float | None = None, goal: str = "equal_error"
) -> tuple[dict[str, float], list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Verification figures of a list of pairs, its notes and its ROC (far, tar, thresholds).

    Args:
        scores: float [P], higher is more alike; compared in steps of which 2^20 to 2^21 are from the lowest to the highest of them
            and 0. So scores that rounding in single precision tells apart are equal, and their scale does not matter.
        same: bool [P].
        folds: int64 [P], the fold of each pair. Adds accuracy_10fold, with as many folds as there are: the mean over folds of the
            share of right answers, by the threshold that is best on the other folds, the lowest of their scores that is, or none
            accepted; and its standard error, accuracy_10fold_se (Huang et al. 2007, Labeled Faces in the Wild).
        threshold: fitted on other pairs; None fits it here, to this `goal`, see `evaluate`.

    Raises:
        ValueError: a score is not finite (names its place); there is no same, or no different, pair, in all or outside a fold;
            shapes do not fit; or there is no such goal.
    """
    scores, same, folds = scores.detach().cpu().double(), same.bool().cpu(), None if folds is None else folds.cpu()
    if scores.ndim != 1 or not scores.shape == same.shape == (same if folds is None else folds).shape:
        raise ValueError("scores, same and folds are [P], one of each for every pair")
    if not scores.isfinite().all():
        rows = (~scores.isfinite()).nonzero().flatten()[:5].tolist()
        raise ValueError(f"scores are NaN or infinite, among them {', '.join(map(str, rows))}")
    for fold in [None] if folds is None else folds.unique().tolist():
        rest = same if fold is None else same[folds != fold]
        if not rest.any() or rest.all():
            raise ValueError(
                f"{len(rest)} pairs{'' if fold is None else f' outside fold {fold}'}: some must be the same and some different"
            )
    step = step_of(max(scores.max().item(), 0.0) - min(scores.min().item(), 0.0))
    level, place = (scores / step).round().unique(return_inverse=True)
    counts = [torch.bincount(place, kind.double(), len(level)).flip(0).numpy() for kind in (same, ~same)]
    figures, notes = {}, []
    curve = _verify(level.flip(0).numpy() * step, *counts, step, step, threshold, goal, figures, notes)
    if folds is not None:
        right = []
        for fold in folds.unique():
            inside = folds == fold
            kinds = [torch.bincount(place[~inside], kind[~inside].double(), len(level)) for kind in (same, ~same)]
            accepted = [kind.flip(0).cumsum(0).flip(0) for kind in kinds]  # from this level up
            correct = (accepted[0] + kinds[1].sum() - accepted[1]).where(kinds[0] + kinds[1] > 0, -1)  # at scores that they have
            best = torch.cat([correct, kinds[1].sum()[None]]).argmax()
            right.append(((place[inside] >= best) == same[inside]).double().mean())
        right = torch.stack(right)
        name = f"accuracy_{len(right)}fold"
        figures |= {name: right.mean().item(), f"{name}_se": right.std().item() / len(right) ** 0.5}
    return figures, notes, curve


@torch.no_grad()
def evaluate_tuples(
    embeddings: Tensor,
    rows: Tensor,
    same: Tensor | None,
    distance: Module,
    *,
    kinds: list[str] | None = None,
    folds: Tensor | None = None,
    where: list[str] | None = None,
    ids: list[str] | None = None,
    threshold: float | None = None,
    f1_threshold: float | None = None,
    goal: str = "equal_error",
    calibration: list[float] | None = None,
    seed: int = 0,
) -> EvaluationResult:
    """Judge samples by the pairs or triplets that a list has of them. They have no classes, so the fields of classes are empty.

    Args:
        embeddings: float [N, D].
        rows: int64 [P, 2] of pairs (left, right), or [T, 3] of triplets (anchor, positive, negative), which are judged as two pairs each.
        same: bool [P]; None of triplets.
        distance: a pytorch-metric-learning distance, the one the embeddings were trained with.
        kinds: [P], "" for none in particular. Each is judged by itself too, under "kind/figure": a kind that has only pairs of one
            sort, such as forgeries, with all the pairs of the other sort.
        folds: int64 [P], see `evaluate_pairs`.
        where, ids: names for the pairs and the samples; their numbers by default.
        threshold, goal, calibration: see `evaluate`.
        f1_threshold: likewise of `f1`; None fits it here, where f1 is highest, or, with a `threshold`, leaves f1 out.
        seed: of the embeddings kept.

    Figures: those of `evaluate_pairs`, calibration_error, f1 and f1_threshold, and of triplets triplet_accuracy: the share whose
    positive is nearer.

    Raises:
        ValueError: an embedding is not finite (names the rows), or there is no same, or no different, pair.
    """
    check_judgeable(embeddings, None, ids)
    triplets = same is None
    if triplets:
        rows, same = rows[:, [0, 1, 0, 2]].view(-1, 2), torch.tensor([True, False]).repeat(len(rows))
        where = where and [name for name in where for _ in range(2)]
    rows, same = rows.to(embeddings.device), same.cpu()
    scores = pair_scores(distance, embeddings[rows[:, 0]], embeddings[rows[:, 1]]).cpu()
    figures, notes, curve = evaluate_pairs(scores, same, folds, threshold, goal)
    counted = [part.double().numpy() for part in (scores, same, ~same)]
    calibration = calibration or calibrate(*counted)
    figures["calibration_error"] = calibration_error(*counted, *calibration)
    step = step_of(max(scores.max().item(), 0.0) - min(scores.min().item(), 0.0))
    level = (scores / step).round()
    if threshold is None or f1_threshold is not None:  # else one is of other pairs, and one fitted here would pass for it
        figures["f1"], best = _f1(level * step, same, None if f1_threshold is None else f1_threshold - step / 2)
        figures["f1_threshold"] = best if f1_threshold is None else f1_threshold
    if triplets:
        figures["triplet_accuracy"] = (level[::2] > level[1::2]).double().mean().item()
    for kind in sorted({*(kinds or ())} - {""}):
        chosen = torch.tensor([name == kind for name in kinds])
        for sort in (same, ~same):
            if not (chosen & sort).any():
                chosen = chosen | sort
        if not chosen.all():
            found, _, _ = evaluate_pairs(scores[chosen], same[chosen], None, figures["threshold"])
            if "f1_threshold" in figures:
                found["f1"] = _f1(level[chosen] * step, same[chosen], figures["f1_threshold"] - step / 2)[0]
            figures |= {f"{kind}/{name}": value for name, value in found.items() if name != "threshold"}
    where = where or [f"pair {row}" for row in range(len(scores))]
    hard = [scores.where(same, torch.inf).argsort()[: min(8, int(same.sum()))], scores.where(~same, -torch.inf).argsort(descending=True)]
    hard = torch.cat([hard[0], hard[1][: min(8, int((~same).sum()))]])
    extremes = {"same": scores.where(same, torch.inf).argmin(), "different": scores.where(~same, -torch.inf).argmax()}
    for text, row in extremes.items():
        notes.append(f"hardest of the {text} pairs: {where[row]}, score {scores[row]:.4f}")
    sampled = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))[:2000].sort().values
    nothing = np.zeros(0, dtype=np.int64)
    return EvaluationResult(
        figures=figures,
        notes=notes,
        far=curve[0],
        tar=curve[1],
        thresholds=curve[2],
        labels=np.full(len(embeddings), -1),
        ids=ids or [str(row) for row in range(len(embeddings))],
        class_names=[],
        neighbours=np.zeros((len(embeddings), 0), dtype=np.int64),
        neighbour_scores=np.zeros((len(embeddings), 0), dtype=np.float32),
        class_queries=nothing,
        class_recall_at_1=nothing.astype(float),
        class_map_at_r=nothing.astype(float),
        confusions=nothing.reshape(0, 3),
        sampled=sampled.numpy(),
        embeddings=embeddings[sampled.to(embeddings.device)].half().cpu().numpy(),
        pairs=[float(same.sum()), float((~same).sum())],
        calibration=list(calibration),
        hardest=torch.column_stack([rows.cpu()[hard], scores[hard], same[hard]]).double().numpy(),
    )


def _f1(value: Tensor, same: Tensor, threshold: float | None) -> tuple[float, float]:
    """F1 of accepting scores from this threshold up, None for the best one; and the threshold."""
    levels, place = value.unique(return_inverse=True)
    positives, all_pairs = (torch.bincount(place, kind, len(levels)).flip(0).cumsum(0).flip(0) for kind in (same.double(), None))
    f1 = 2 * positives / (all_pairs + same.sum())
    at = int(f1.argmax()) if threshold is None else int(torch.searchsorted(levels, threshold))
    return (f1[at].item(), levels[at].item()) if at < len(levels) else (0.0, threshold)
