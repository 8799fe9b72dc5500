"""Judge embeddings by retrieval, by verification and by one-shot recognition, and keep what judging found.

The rules, the same for every figure:

- A sample is never its own match: it is excluded by index, not by score. Duplicates count.
- Scores (higher is more alike) are compared after rounding to 2^-20 of the unit sphere's range. Ties are resolved
  against us: of equal scores, the different class ranks first. So a collapsed space scores nothing, in any order of items.
- A query whose class has no other sample is counted in `queries_without_match` and left out of the means.
- A pair is counted once. A false-accept rate with fewer than ten expected false accepts is not printed but explained.
- The threshold of `accuracy` comes from outside, from the validation classes; without one it is fitted here.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor
from torch.nn import Module

from siamese.distances import LearnedDistance, scores

RECALL_AT = (1, 5, 10)
FAR_EXPONENTS = (2, 3, 4, 5, 6)
WAYS = (5, 20)
# What every evaluation computes, in any split; the rest depends on how much there is to judge.
FIGURES = (
    *(f"recall_at_{k}" for k in RECALL_AT),
    "map_at_r",
    "r_precision",
    "mrr",
    "auc",
    "eer",
    "average_precision",
    "best_f1",
    "accuracy",
)
_LOWER_IS_BETTER = ("eer", "omniglot_error", "loss", "queries_without_match")
_BLOCK = 1024


def higher_is_better(figure: str) -> bool:
    """The direction of a figure, with or without its prefix: True for `val/map_at_r`, False for `eer`."""
    return figure.rpartition("/")[2] not in _LOWER_IS_BETTER


@dataclass
class EvaluationResult:
    """What judging one split found. Every view of it (table, W&B, report, threshold) reads this and computes nothing again.

    figures: name -> value; rates in 0..1, except `omniglot_error` in percent and `threshold` in units of the score.
    notes: why a figure is absent, one sentence each.
    far, tar, thresholds: [M] the ROC curve, from strict to lenient; `thresholds` are scores, accepted when reached.
    labels: int64 [N]; ids: [N]; class_names: [C].
    neighbours: int64 [N, 10], the nearest other samples, nearest first, -1 where there are fewer; neighbour_scores: float32 [N, 10].
    sampled: int64 [<= 2000] rows whose embeddings are kept; embeddings: float16 [<= 2000, D].
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
    sampled: np.ndarray = field(repr=False)
    embeddings: np.ndarray = field(repr=False)

    _ARRAYS = ("far", "tar", "thresholds", "labels", "neighbours", "neighbour_scores", "sampled", "embeddings")
    _TEXTS = ("figures", "notes", "ids", "class_names")

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
                    **{name: archive[f"{prefix}/{name}"] for name in EvaluationResult._ARRAYS},
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
    ids: list[str] | None = None,
    class_names: list[str] | None = None,
    threshold: float | None = None,
    ways: tuple[int, ...] = WAYS,
    seed: int = 0,
) -> EvaluationResult:
    """Judge one split, every sample a query against all the others.

    Args:
        embeddings: float [N, D].
        labels: int64 [N].
        distance: a pytorch-metric-learning distance, the one the embeddings were trained with.
        ids, class_names: names for the samples and classes; their numbers by default.
        threshold: the score from which a pair counts as the same, fitted on other classes; None fits it here, at equal error.
        ways: numbers of classes of the one-shot questions.
        seed: of the one-shot episodes and of the embeddings kept. It is not the run's, so that all runs answer the same questions.

    Figures: recall_at_1, recall_at_5, recall_at_10; map_at_r, r_precision (Musgrave et al. 2020, arXiv:2003.08505), mrr;
    auc, eer, tar_at_far_1e2 ... 1e6, average_precision, best_f1 over all pairs; threshold, accuracy (the mean of the rates
    of same pairs accepted and of different pairs refused); oneshot_5way, oneshot_20way.

    Raises:
        ValueError: if an embedding is not finite (names the rows), or if there are no two samples of a class or only one class.
    """
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        rows = [ids[i] if ids else str(i) for i in (~finite).nonzero().flatten()[:5].tolist()]
        raise ValueError(f"{int((~finite).sum())} of {len(finite)} embeddings are NaN or infinite, among them {', '.join(rows)}")
    labels = labels.to(embeddings.device)
    counts = labels.bincount()
    if len(labels) == 0 or counts.max() < 2 or (counts > 0).sum() < 2:
        raise ValueError(
            f"{len(labels)} samples of {int((counts > 0).sum())} classes: judging needs two classes, one of them with two samples"
        )
    # torch.cdist takes the square root of a rounded difference: 3e-4 instead of 0 in single precision. L1 has no root.
    embeddings = embeddings.float() if distance.is_inverted or distance.p == 1 else embeddings.double()

    figures, notes = {}, []
    pairs, low, step, neighbours, neighbour_scores = _walk(embeddings, labels, counts, distance, figures)
    far, tar, thresholds = _verify(pairs, low, step, threshold, figures, notes)
    for n in ways:
        if int((counts > 0).sum()) < n:
            notes.append(f"oneshot_{n}way is left out: it needs {n} classes, there are {int((counts > 0).sum())}")
        else:
            figures[f"oneshot_{n}way"] = oneshot_accuracy(embeddings, labels, distance, n, seed=seed)
    sampled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:2000].sort().values
    return EvaluationResult(
        figures=figures,
        notes=notes,
        far=far,
        tar=tar,
        thresholds=thresholds,
        labels=labels.cpu().numpy(),
        ids=ids or [str(i) for i in range(len(labels))],
        class_names=class_names or [str(c) for c in range(len(counts))],
        neighbours=neighbours.cpu().numpy(),
        neighbour_scores=neighbour_scores.cpu().numpy(),
        sampled=sampled.numpy(),
        embeddings=embeddings[sampled.to(embeddings.device)].half().cpu().numpy(),
    )


def _walk(embeddings: Tensor, labels: Tensor, counts: Tensor, distance: Module, figures: dict) -> tuple:
    """Walk the score matrix by blocks of rows: retrieval figures, and [levels, 2] counts of same and different pairs."""
    total = len(labels)
    low, high, step = _score_range(embeddings, distance)
    lowest = math.floor(low / step)
    levels = math.ceil(high / step) - lowest + 1
    pairs = torch.zeros(2 * levels, dtype=torch.int64, device=embeddings.device)
    depth = min(max(*RECALL_AT, int(counts.max()) - 1), total - 1)
    columns = torch.arange(total, device=embeddings.device)
    matches = counts[labels] - 1
    sums = dict.fromkeys([*(f"recall_at_{k}" for k in RECALL_AT), "map_at_r", "r_precision", "mrr"], 0.0)
    neighbours, neighbour_scores = [], []
    for start in range(0, total, _BLOCK):
        rows = columns[start : start + _BLOCK]
        level = (scores(distance, embeddings[rows], embeddings) / step).round_().int().sub_(lowest).clamp_(0, levels - 1)
        different = labels[rows, None] != labels
        # One integer orders everything: by score, and of equal scores the different class first.
        key = level.mul_(2).add_(different)
        pairs += torch.bincount(key[:, start:][columns[start:] > rows[:, None]], minlength=2 * levels)
        key[torch.arange(len(rows)), rows] = -1
        best = torch.where(different, -1, key).amax(1)
        rank = (key > best[:, None]).sum(1) + 1
        top, indices = key.topk(depth)
        hits = (top >= 0) & (top % 2 == 0)
        answered = matches[rows] > 0
        relevant = matches[rows, None].clamp(min=1)
        position = torch.arange(1, depth + 1, device=hits.device)
        for k in RECALL_AT:
            sums[f"recall_at_{k}"] += hits[answered, :k].any(1).sum().item()
        hits_in_r = (hits & (position <= relevant)).double()
        sums["r_precision"] += (hits_in_r.sum(1) / relevant[:, 0])[answered].sum().item()
        sums["map_at_r"] += ((hits_in_r * hits_in_r.cumsum(1) / position).sum(1) / relevant[:, 0])[answered].sum().item()
        sums["mrr"] += (1 / rank[answered].double()).sum().item()
        shown = top[:, :10]
        neighbours.append(torch.nn.functional.pad(indices[:, :10], (0, 10 - shown.shape[1]), value=-1))
        value = ((shown // 2 + lowest) * step).float()
        neighbour_scores.append(torch.nn.functional.pad(value, (0, 10 - shown.shape[1]), value=float("-inf")))
    answered = int((matches > 0).sum())
    figures.update({name: value / answered for name, value in sums.items()})
    figures["queries_without_match"] = total - answered
    return pairs.view(levels, 2).cpu().numpy(), lowest * step, step, torch.cat(neighbours), torch.cat(neighbour_scores)


def _score_range(embeddings: Tensor, distance: Module) -> tuple[float, float, float]:
    """The lowest and highest score that can come, and the step to which scores are rounded: 2^-20 on the unit sphere."""
    if type(distance) in (CosineSimilarity, LpDistance) and distance.normalize_embeddings and distance.p == 2 and distance.power == 1:
        low, high = (-1.0, 1.0) if distance.is_inverted else (-2.0, 0.0)
        return low, high, 2.0**-20
    if isinstance(distance, LearnedDistance):
        low = -distance.bound(embeddings)
        return low, 0.0, _step(-low)
    blocks = (scores(distance, rows, embeddings) for rows in embeddings.split(_BLOCK))
    ends = [(block.min().item(), block.max().item()) for block in blocks]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return low, high, _step(max(high - low, -low, high))


def _step(width: float) -> float:
    """For scores over any other range, as many steps as on the unit sphere: 2^20 to 2^21."""
    return 2.0 ** (math.ceil(math.log2(max(width, 1e-30))) - 21)


def _verify(pairs: np.ndarray, low: float, step: float, threshold: float | None, figures: dict, notes: list[str]) -> tuple:
    """Verification figures and the ROC curve from the counts of same and different pairs at each score level, lowest first."""
    used = np.flatnonzero(pairs.sum(1))[::-1]
    value = low + used * step
    accepted = pairs[used].cumsum(0)  # same and different pairs with a score of at least `value`
    same, different = (int(n) for n in accepted[-1])
    tar, far = accepted[:, 0] / same, accepted[:, 1] / different

    new_same, new_different = pairs[used, 0], pairs[used, 1]
    above = accepted[:, 0] - new_same
    figures["auc"] = float((new_different * (above + new_same / 2.0)).sum() / (float(same) * different))
    figures["eer"] = _equal_error_rate(far, tar)
    for exponent in FAR_EXPONENTS:
        name, rate = f"tar_at_far_1e{exponent}", 10.0**-exponent
        if rate * different < 10:
            notes.append(
                f"{name} is left out: {different:,} different pairs give {rate * different:.2g} expected false accepts, ten are needed"
            )
        else:
            reached = far <= rate
            figures[name] = float(tar[reached].max()) if reached.any() else 0.0
    precision = accepted[:, 0] / accepted.sum(1)
    figures["average_precision"] = float((precision * new_same / same).sum())
    figures["best_f1"] = float((2 * precision * tar / np.maximum(precision + tar, 1e-12)).max())

    if threshold is None:
        threshold = float(value[np.abs(far - (1 - tar)).argmin()])
    last = int(np.searchsorted(-value, -(threshold - step / 2), side="right"))  # how many levels are accepted
    figures["threshold"] = threshold
    figures["accuracy"] = float((tar[last - 1] + 1 - far[last - 1]) / 2) if last else 0.5

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


@torch.no_grad()
def oneshot_accuracy(embeddings: Tensor, labels: Tensor, distance: Module, ways: int, episodes: int = 4_000, seed: int = 0) -> float:
    """Share of queries whose class is recognised from one example of each of `ways` classes (Lake et al. 2011).

    Each of `episodes` questions draws a query, one other sample of its class, and one sample of each of `ways - 1` other
    classes; it is answered when its own class alone has the highest score.

    Args:
        embeddings: float [N, D].
        labels: int64 [N]; at least `ways` classes, one of them with two samples.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    classes = (counts > 0).nonzero().flatten()
    able = (counts[labels] > 1).nonzero().flatten()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))

    def draw(below: Tensor) -> Tensor:
        return (torch.rand(below.shape, generator=generator, dtype=torch.float64) * below).long()

    step = _score_range(embeddings, distance)[2]
    right = 0
    for query in able[draw(torch.full((episodes,), len(able)))].split(500):
        label = labels[query]
        other = (place[query] - first[label] + 1 + draw(counts[label] - 1)) % counts[label] + first[label]
        chances = torch.rand(len(query), len(classes), generator=generator)
        chances[classes == label[:, None]] = -1
        strangers = classes[chances.topk(ways - 1).indices]
        support = torch.cat([order[other][:, None], order[first[strangers] + draw(counts[strangers])]], 1)
        asked, support = embeddings[query.to(embeddings.device)], support.to(embeddings.device)
        if isinstance(distance, LearnedDistance):
            score = torch.cat([scores(distance, one[None], embeddings[rows]) for one, rows in zip(asked, support, strict=True)])
        else:  # all scores of a query, by a matrix product, cost less than copying out twenty supports for it
            score = scores(distance, asked, embeddings).gather(1, support)
        score = (score / step).round()
        right += int((score[:, :1] > score[:, 1:]).all(1).sum())
    return right / episodes


@torch.no_grad()
def oneshot_error(runs: list[tuple[Tensor, Tensor, Tensor]], distance: Module) -> float:
    """Error in percent over official one-shot runs (Lake, Salakhutdinov and Tenenbaum 2015).

    Args:
        runs: (queries [Q, D], supports [S, D], the row of each query's own support, int64 [Q]).
    """
    wrong = total = 0
    for queries, supports, answer in runs:
        score = scores(distance, queries.double(), supports.double())
        score = (score / _step(score.abs().max().item())).round()
        own = score.gather(1, answer[:, None].to(score.device))
        wrong += int(((score >= own).sum(1) > 1).sum())
        total += len(queries)
    return 100 * wrong / total
