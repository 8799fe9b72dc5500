"""The walk against loops over the whole matrix of scores, in double precision, in every mode it has and over processes."""

import functools
import itertools
import multiprocessing
import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from siamese import _walk
from siamese._walk import Found, walk
from siamese.distances import LearnedDistance
from siamese.evaluation import figures_of


class Unknown(LpDistance):
    """One of which the walk knows nothing; it is 1, not 0, between copies."""

    def compute_mat(self, query, gallery):
        return 1 + 0.7123456789 * super().compute_mat(query, gallery).square()

    def pairwise_distance(self, left, right):
        return 1 + 0.7123456789 * super().pairwise_distance(left, right).square()


def learned(**options) -> LearnedDistance:
    distance = LearnedDistance(4, **options).requires_grad_(False)
    distance.weight.data = torch.tensor([1.0, -0.5, 2.0, 0.25])
    return distance


COSINE, SPHERE, PLAIN, LEARNED = CosineSimilarity(), LpDistance(), LpDistance(normalize_embeddings=False), learned()
DOT, UNKNOWN = DotProductSimilarity(normalize_embeddings=False), Unknown(normalize_embeddings=False)
EVERY = {
    "cosine": COSINE,
    "sphere": SPHERE,
    "plain": PLAIN,
    "learned": LEARNED,
    "learned-normalised": learned(normalize_embeddings=True),
    "dot": DOT,
    "dot-normalised": DotProductSimilarity(),
    "unknown": UNKNOWN,
}
DISTANCES = pytest.mark.parametrize("distance", EVERY.values(), ids=EVERY)
SMALL = {"_ROWS": 48, "_COLUMNS": 40, "_HOT": 7, "_BAND": 13, "_FIRST": 10, "_SAMPLE": 50}
PER_QUERY = ("matches", "rank", "map_at_r", "r_precision", "hits", "neighbour_scores")
PAIRS = ("score", "same", "different", "width")


def true_scores(queries: Tensor, gallery: Tensor, distance) -> np.ndarray:
    """[Q, G] in double precision, by the formula in the textbook."""
    q, g = queries.double().numpy(), gallery.double().numpy()
    if distance.normalize_embeddings:
        q, g = (x / np.linalg.norm(x, ord=distance.p, axis=1, keepdims=True) for x in (q, g))
    if distance.is_inverted:
        return (q[:, None] * g).sum(2)
    if isinstance(distance, LearnedDistance):
        return -(np.abs(q[:, None] - g) * np.abs(distance.weight.double().numpy())).mean(2)
    squared = ((q[:, None] - g) ** 2).sum(2)
    return -1 - 0.7123456789 * squared if isinstance(distance, Unknown) else -np.sqrt(squared)


@dataclass
class Case:
    """Queries [Q, 4] and their labels; gallery: the same of what they are compared with, or None."""

    queries: Tensor
    labels: Tensor
    gallery: tuple[Tensor, Tensor] | None = None

    def walk(self, distance, **options) -> Found:
        return walk(self.queries, self.labels, distance, self.gallery, **options)

    def scores(self, distance) -> np.ndarray:
        return true_scores(self.queries, self.gallery[0] if self.gallery else self.queries, distance)


def check(found: Found, case: Case, truth: np.ndarray, exact: np.ndarray | None = None) -> None:
    """All that was found, against loops. `exact` [Q, G] are whole numbers by which scores are ordered; by default their levels."""
    labels, itself = case.labels.numpy(), case.gallery is None
    others = labels if itself else case.gallery[1].numpy()
    exact = np.round(truth / found.step).astype(np.int64) if exact is None else exact
    alike = labels[:, None] == others
    near, scores = found.neighbours.numpy(), found.neighbour_scores.double().numpy()
    ours = {name: getattr(found, name).tolist() for name in ("matches", "rank", "map_at_r", "r_precision", "hits")}
    theirs = {name: [] for name in ours}
    for query in range(len(labels)):
        order = np.lexsort([alike[query], -exact[query]])  # of equal scores, the different class ranks first
        order = order[order != query] if itself else order
        hits = alike[query, order].astype(int)
        relevant = int(hits.sum())
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        theirs["matches"].append(relevant)
        theirs["rank"].append(hits.tolist().index(1) + 1 if relevant else 0)
        theirs["map_at_r"].append((precision * hits)[:relevant].sum() / max(relevant, 1))
        theirs["r_precision"].append(hits[:relevant].sum() / max(relevant, 1))
        theirs["hits"].append(np.pad(hits[:10], (0, max(10 - len(hits), 0))).cumsum().tolist())

        count = min(10, len(order))
        mine = near[query, :count]
        assert (near[query, count:] == -1).all()
        assert (scores[query, count:] == -np.inf).all()
        assert len(set(mine)) == count
        assert set(mine) <= set(order)
        assert (exact[query, mine] == exact[query, order[:count]]).all()
        assert (alike[query, mine] == hits[:count]).all()
        assert (np.abs(scores[query, :count] - truth[query, mine]) < 0.51 * found.step + 1e-7 * np.abs(truth[query]).max()).all()
    for name in ("matches", "rank", "hits"):
        assert ours[name] == theirs[name], name
    for name in ("map_at_r", "r_precision"):
        assert np.abs(np.array(ours[name]) - theirs[name]).max() < 1e-12, name

    counted = np.triu(np.ones_like(alike), 1) if itself else np.ones_like(alike)  # each pair once
    steps, place, which = np.unique(-exact[counted], return_index=True, return_inverse=True)
    assert found.same.tolist() == np.bincount(which, alike[counted], len(steps)).tolist()
    assert found.different.tolist() == np.bincount(which, ~alike[counted], len(steps)).tolist()
    assert (np.abs(found.score.numpy() - truth[counted][place]) < 0.51 * found.step).all()
    assert (found.width == found.step).all()
    assert found.score.dtype == found.same.dtype == found.different.dtype == found.map_at_r.dtype == torch.float64
    assert found.matches.dtype == found.rank.dtype == found.neighbours.dtype == torch.int64
    assert found.hits.dtype == torch.uint8


def equal(found: Found, other: Found, pairs: bool = True, numbers: bool = False) -> None:
    for name in (*PER_QUERY, *PAIRS * pairs, *["neighbours"] * numbers):
        left, right = getattr(found, name), getattr(other, name)
        if name in ("map_at_r", "r_precision"):
            assert torch.allclose(left, right, rtol=0, atol=1e-12), name
        else:
            assert torch.equal(left, right), name


def clusters(samples: int, classes: int, noise: float = 1.0, seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian classes of unequal size in random order, with gaps between their numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    points = torch.randn(classes, size, generator=generator)[labels] + noise * torch.randn(samples, size, generator=generator)
    return points, 3 * labels + 10**6 * (labels % 2)


def some(kind: str, seed: int = 0) -> Case:
    """many: 180 samples of 30 classes, some of one sample; few: 150 of 3 classes; gallery, deep gallery: of the same kinds, with
    classes on either side that the other lacks and samples of no class."""
    queries, labels = clusters(*((180, 30) if kind in ("many", "gallery") else (150, 3)), seed=seed)
    if "gallery" not in kind:
        alone = torch.tensor([[0.1, 0.2, -0.1, 0.3], [1.0, -1.0, 0.5, 0.2]])
        return Case(
            torch.cat([queries, queries[:9], alone]), torch.cat([labels, labels[[0, 1, 2, 5, 4, 3, 8, 7, 6]], torch.tensor([7, 5])])
        )
    split = 60
    noise = torch.randn(25, 4, generator=torch.Generator().manual_seed(seed + 1))
    strange = torch.tensor([-1] * 15 + [8] * 10)
    alone = torch.tensor([[0.1, 0.2, -0.1, 0.3], [1.0, -1.0, 0.5, 0.2]])
    held = torch.cat([queries[split:], queries[:9], noise]), torch.cat([labels[split:], labels[:9].flip(0), strange])
    mixed = torch.randperm(len(held[1]), generator=torch.Generator().manual_seed(seed))
    return Case(torch.cat([queries[:split], alone]), torch.cat([labels[:split], torch.tensor([7, 5])]), (held[0][mixed], held[1][mixed]))


def small_blocks(patch, **others) -> None:
    for name, value in {**SMALL, **others}.items():
        patch.setattr(_walk, name, value)


@pytest.fixture
def modes(monkeypatch):
    """What the walks since then were: (both, groups, whole rows, type, fine), each once."""
    seen, run = set(), _walk._Walk.run

    def noting(self):
        found = run(self)
        seen.add((self.both, self.groups > 1, self.columns != _walk._COLUMNS, self.levels.dtype, self.histogram.fine > 0))
        return found

    monkeypatch.setattr(_walk._Walk, "run", noting)
    return seen


# Every figure, for every distance, in every mode of double precision


MODES = pytest.mark.parametrize(
    ("kind", "listed", "mode"),  # mode: both samples of a pair are served, in groups, whole rows
    [
        ("many", 2**24, (True, False, False)),
        ("many", 200, (False, True, False)),
        ("few", 2**24, (False, False, True)),
        ("few", 4000, (False, True, True)),
        ("gallery", 2**24, (False, False, False)),
        ("gallery", 200, (False, True, False)),
        ("deep gallery", 2**24, (False, False, True)),
        ("deep gallery", 4000, (False, True, True)),
    ],
)


@DISTANCES
@MODES
def test_all_that_is_found_is_what_loops_over_all_scores_find(monkeypatch, modes, distance, kind, listed, mode):
    small_blocks(monkeypatch, _LISTED=listed)
    case = some(kind)
    found = case.walk(distance)
    assert modes == {(*mode, torch.float64, False)}
    assert (found.matches == 0).sum() >= 2, "there were to be queries without a match"
    truth = case.scores(distance)
    assert found.step <= 2.0**-19 * max(np.ptp(truth), np.abs(truth).max()) * 4
    check(found, case, truth)


def exact_points(distance, total: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of which every score is exact in floating point, and their classes; most scores are equal to many others."""
    generator = torch.Generator().manual_seed(seed)
    if distance.normalize_embeddings:  # all of length 2, so that normalising is exact
        points = torch.randint(2, (total, 4), generator=generator) * 2.0 - 1
    else:
        points = torch.randint(4, (total, 4), generator=generator).float()
    return points, torch.randint(max(total // 5, 2), (total,), generator=generator)


def exact_scores(queries: Tensor, gallery: Tensor, distance) -> np.ndarray:
    """[Q, G] whole numbers in the order of the scores."""
    q, g = queries.long().numpy(), gallery.long().numpy()
    if distance.is_inverted:
        return q @ g.T
    if isinstance(distance, LearnedDistance):
        return -(np.abs(q[:, None] - g) * (4 * np.abs(distance.weight.numpy())).astype(int)).sum(2)
    return -((q[:, None] - g) ** 2).sum(2)


TIED = {name: distance for name, distance in EVERY.items() if name != "learned-normalised"}


@pytest.mark.parametrize("distance", TIED.values(), ids=TIED)
@pytest.mark.parametrize(("total", "listed"), [(25, 2**24), (150, 2**24), (150, 300)], ids=["whole", "both", "groups"])
def test_of_equal_scores_the_different_class_ranks_first(monkeypatch, distance, total, listed):
    small_blocks(monkeypatch, _LISTED=listed)
    case = Case(*exact_points(distance, total, seed=total))
    exact = exact_scores(case.queries, case.queries, distance)
    assert len(np.unique(exact)) < 200 < exact.size / 3, "most were to be equal"
    check(case.walk(distance), case, case.scores(distance), exact)
    split = total // 3
    case = Case(case.queries[:split], case.labels[:split], (case.queries[split:], case.labels[split:]))
    check(case.walk(distance), case, case.scores(distance), exact[:split, split:])


BLOCKS = st.fixed_dictionaries({name: st.integers(9, 70) for name in ("_ROWS", "_COLUMNS", "_HOT", "_BAND", "_FIRST", "_SAMPLE")})
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.sampled_from([COSINE, SPHERE, PLAIN, DOT, LEARNED]), st.integers(4, 160), BLOCKS, st.sampled_from([2**24, 400]), st.booleans())
def test_the_sizes_of_blocks_make_no_difference(monkeypatch, distance, total, blocks, listed, gallery):
    points, labels = exact_points(distance, total, seed=total)
    points += 0.0 if total % 2 else torch.rand(total, 4, generator=torch.Generator().manual_seed(total))
    case = Case(points, labels)
    if gallery:
        case = Case(points[: total // 2], labels[: total // 2], (points[total // 2 :], labels[total // 2 :]))
    whole = case.walk(distance)
    with monkeypatch.context() as patch:
        small_blocks(patch, **blocks, _LISTED=listed)
        equal(case.walk(distance), whole)


@QUICK
@given(st.sampled_from([COSINE, PLAIN, DOT, LEARNED]), st.integers(90, 160), BLOCKS, st.sampled_from([2**24, 400]))
def test_nor_do_they_in_single_precision_with_a_coarse_histogram(monkeypatch, distance, total, blocks, listed):
    case = Case(*exact_points(distance, total, seed=total))
    whole = case.walk(distance)
    with monkeypatch.context() as patch:
        small_blocks(patch, **blocks, _LISTED=listed, _PRECISE=0)
        parts = case.walk(distance)
    equal(parts, whole, pairs=False)
    assert parts.same.sum() == whole.same.sum()
    assert parts.different.sum() == whole.different.sum()


@QUICK
@given(st.sampled_from(list(EVERY.values())), st.sampled_from(["many", "few", "gallery", "deep gallery"]), st.integers(0, 10**6))
def test_the_order_of_the_samples_makes_no_difference(monkeypatch, distance, kind, seed):
    case, generator = some(kind), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(case.labels), generator=generator)
    gallery, turned = case.gallery, order
    if gallery:
        turned = torch.randperm(len(gallery[1]), generator=generator)
        gallery = gallery[0][turned], gallery[1][turned]
    with monkeypatch.context() as patch:
        small_blocks(patch)
        found, other = case.walk(distance), Case(case.queries[order], case.labels[order], gallery).walk(distance)
    for name in PER_QUERY:
        assert torch.allclose(getattr(other, name), getattr(found, name)[order]), name
    for name in PAIRS:
        assert torch.equal(getattr(other, name), getattr(found, name)), name
    unique = (found.neighbour_scores.diff() < 0).all(1)[order]  # equal ones may change places, and the last give way to another
    assert torch.equal(turned[other.neighbours[unique, :9]], found.neighbours[order][unique, :9])


# Single precision, and a histogram that is coarse


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    place = np.arange(len(far))
    return np.interp(np.interp(0, far - (1 - tar), place), place, far)


@pytest.mark.parametrize(
    ("distance", "noise", "samples", "bounds"),  # of auc, eer and the true accept rates
    [
        (COSINE, 0.35, 3000, (1e-6, 1e-5, 1e-4)),
        (SPHERE, 0.9, 2000, (1e-6, 1e-5, 1e-4)),
        # whose scores lie in a small part of the range that they could have, and so in fewer bins: 1e-4 is less than one same pair
        (LEARNED, 0.35, 2000, (3e-6, 2e-5, 2e-4)),
        (DOT, 0.9, 2000, (3e-6, 2e-5, 2e-4)),
    ],
    ids=["cosine", "sphere", "learned", "dot"],
)
def test_the_coarse_histogram_is_as_good_as_scikit_learn(monkeypatch, modes, distance, noise, samples, bounds):
    for name, value in {"_PRECISE": 0, "_ROWS": 512, "_COLUMNS": 512, "_FIRST": 128}.items():
        monkeypatch.setattr(_walk, name, value)
    case = Case(*clusters(samples, 300, noise))
    found = case.walk(distance)
    assert modes == {(True, False, False, torch.float64 if distance is SPHERE else torch.float32, True)}
    assert found.width.max() == _walk._COARSE * found.step
    assert found.width.min() == found.step
    assert len(found.score) < 0.2 * 2**20

    x = case.queries.double()
    if distance is LEARNED:
        truth = -torch.cdist(x * LEARNED.weight / 4, x * LEARNED.weight / 4, p=1).numpy()
    else:
        x = x / x.norm(dim=1, keepdim=True) if distance.normalize_embeddings else x
        truth = (x @ x.T if distance.is_inverted else -torch.cdist(x, x)).numpy()
    left, right = np.triu_indices(samples, 1)
    labels = case.labels.numpy()
    alike, score = labels[left] == labels[right], truth[left, right]
    assert found.same.sum() == alike.sum()
    assert found.different.sum() == (~alike).sum()
    figures, _, _ = figures_of(found)
    far, tar, _ = roc_curve(alike, score, drop_intermediate=False)
    auc, eer = roc_auc_score(alike, score), equal_error_rate(far, tar)
    assert 0.55 < auc < 0.999
    assert figures["auc"] == pytest.approx(auc, abs=bounds[0])
    assert figures["eer"] == pytest.approx(eer, abs=bounds[1])
    for exponent in (2, 3, 4):
        best = tar[far <= 10.0**-exponent].max()
        assert figures[f"tar_at_far_1e{exponent}"] == pytest.approx(best, abs=bounds[2]), exponent

    np.fill_diagonal(truth, -np.inf)
    best = np.where(labels[:, None] == labels, truth, -np.inf).max(1)
    rank = 1 + ((truth >= best[:, None] - 0.01 * found.step) & (labels[:, None] != labels)).sum(1)
    asked = np.isfinite(best)
    assert (found.rank.numpy()[asked] == rank[asked]).mean() > 0.99
    assert np.abs(found.rank.numpy()[asked] - rank[asked]).max() <= 3
    assert torch.equal(found.hits[:, 9] > 0, (found.rank <= 10) & (found.rank > 0))
    found_scores = np.take_along_axis(truth, found.neighbours.numpy(), 1)
    assert found_scores == pytest.approx(-np.sort(-truth, axis=1)[:, :10], abs=2 * found.step)
    assert found.neighbour_scores.numpy() == pytest.approx(found_scores, abs=2 * found.step)


@MODES
@DISTANCES
def test_the_bins_hold_the_pairs_whose_scores_they_cover(monkeypatch, modes, distance, kind, listed, mode):
    small_blocks(monkeypatch, _PRECISE=0, _LISTED=listed)
    case = some(kind)
    found = case.walk(distance)
    assert {(*seen[:3], seen[4]) for seen in modes} == {(*mode, True)}
    truth, itself = case.scores(distance), case.gallery is None
    alike = case.labels.numpy()[:, None] == (case.labels if itself else case.gallery[1]).numpy()
    counted = np.triu(np.ones_like(alike), 1) if itself else np.ones_like(alike)
    assert found.same.sum() == (counted & alike).sum()
    assert found.different.sum() == (counted & ~alike).sum()
    low, step = found.score.numpy(), found.step
    assert (np.diff(low) < 0).all()
    assert (low[:-1] >= (found.score + found.width).numpy()[1:]).all()
    slack = (0.6 if itself and mode[0] else 0.7) * step
    # Same pairs are where they are; different ones are known by their bin below the lowest rows that all cover one step.
    binned = (found.width > 1.5 * step).numpy()
    within = np.where(np.arange(len(low)) < (binned.argmax() if binned.any() else len(low)), 0, _walk._COARSE * step)
    assert binned.any() == (within > 0).any()
    for counts, kept, more in ((found.same, counted & alike, 0 * within), (found.different, counted & ~alike, within)):
        for upto, number, about in list(zip(low, counts.cumsum(0).numpy(), more, strict=True))[::7]:
            bounds = upto + slack + about, upto - slack - step / 2 - about
            assert (truth[kept] >= bounds[0]).sum() <= number <= (truth[kept] >= bounds[1]).sum()


@pytest.mark.parametrize("bits", [24, 64])
def test_pairs_of_equal_score_are_no_better_for_being_in_one_bin(monkeypatch, bits):
    """Binary codes have few scores: the same and the different pairs of each count alike."""
    small_blocks(monkeypatch, _PRECISE=0)
    embeddings, labels = clusters(600, 60, noise=1.5, size=bits)
    embeddings = embeddings.sign()
    found = walk(embeddings, labels, COSINE)
    assert (found.width > 1.5 * found.step).any()
    left, right = np.triu_indices(len(labels), 1)
    alike = (labels[left] == labels[right]).numpy()
    score = (embeddings.double() @ embeddings.double().T).numpy()[left, right]
    far, tar, _ = roc_curve(alike, score, drop_intermediate=False)
    figures = figures_of(found)[0]
    assert figures["auc"] == pytest.approx(roc_auc_score(alike, score), abs=1e-9)
    assert figures["eer"] == pytest.approx(equal_error_rate(far, tar), abs=1e-9)


@DISTANCES
def test_a_collapsed_space_scores_nothing_in_single_precision_either(monkeypatch, modes, distance):
    small_blocks(monkeypatch, _PRECISE=0)
    labels = torch.arange(40).repeat(5)
    size = 4 if isinstance(distance, LearnedDistance) else 256
    one = torch.full((1, size), 0.5) if distance is DOT else torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    for points in (one.expand(200, size), torch.zeros(200, size)):
        found = walk(points, labels, distance)
        assert found.rank.tolist() == [196] * 200
        assert not found.hits.any()
        assert not found.map_at_r.any()
        assert not found.r_precision.any()
        assert figures_of(found)[0]["auc"] == 0.5
        assert figures_of(found)[0]["eer"] == 0.5
        assert (labels[found.neighbours] != labels[:, None]).all()
    assert {seen[4] for seen in modes} == {True}


def test_points_on_one_ray_are_one_point_for_the_cosine_in_single_precision(monkeypatch):
    small_blocks(monkeypatch, _PRECISE=0)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 256, generator=generator) * torch.rand(200, 1, generator=generator)
    found = walk(points, torch.arange(40).repeat(5), COSINE)
    assert found.rank.tolist() == [196] * 200
    assert figures_of(found)[0]["auc"] == 0.5


# Few samples, few classes, other types


@pytest.mark.parametrize(
    ("labels", "gallery"),
    [
        ([0, 1], None),
        ([0, 0], None),
        ([0, 0, 1], None),
        ([5], [5]),
        ([5], [6]),
        ([5], [6, 5, 5, -1]),
        ([1, 0, 1], [0] * 100),
        ([0], [0] * 100 + [1]),
        ([3, 1, 2] * 5, [2]),
        (list(range(100)), None),
        ([0, 1] * 60, None),
        ([1] * 60 + [0] * 60, None),
        ([0] * 119 + [1], None),
        ([10**15, -(10**15), 7] * 8, None),
        ([4, 2**60] * 8, [2**60, -1, 4] * 30),
    ],
    ids=lambda labels: f"{len(labels)}" if isinstance(labels, list) else "",
)
@pytest.mark.parametrize("precise", [2**24, 0], ids=["double", "single"])
def test_few_samples_or_few_classes_are_no_exception(monkeypatch, labels, gallery, precise):
    small_blocks(monkeypatch, _PRECISE=precise)
    for distance in (COSINE, PLAIN, LEARNED, UNKNOWN) if precise else (COSINE, LEARNED):
        points, _ = exact_points(distance, len(labels), seed=1)
        case = Case(points, torch.tensor(labels))
        if gallery:
            case.gallery = exact_points(distance, len(gallery), seed=2)[0], torch.tensor(gallery)
        exact = exact_scores(points, case.gallery[0] if gallery else points, distance)
        found = case.walk(distance)
        if precise:
            check(found, case, case.scores(distance), exact)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(_walk, "_PRECISE", 2**24)
                equal(found, case.walk(distance), pairs=False)


@pytest.mark.parametrize("kind", ["many", "few", "gallery"])
def test_classes_may_come_in_any_order(kind):
    case = some(kind)
    order = case.labels.argsort()
    for turned in (order, order.flip(0)):
        gallery = case.gallery and tuple(side[case.gallery[1].argsort(descending=True)] for side in case.gallery)
        one = Case(case.queries[turned], case.labels[turned], gallery)
        check(one.walk(COSINE), one, one.scores(COSINE))


@DISTANCES
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_embeddings_of_any_type_are_compared_as_what_they_are(monkeypatch, distance, kind):
    small_blocks(monkeypatch)
    case = some("many")
    case.queries = case.queries.to(kind)
    before = case.queries.clone()
    check(case.walk(distance), case, case.scores(distance))
    assert torch.equal(case.queries, before)


def test_what_is_far_from_the_origin_is_compared_as_well(monkeypatch):
    """The Euclidean distance is computed about the mean of all samples, which is no coordinate's business."""
    small_blocks(monkeypatch)
    case = some("many")
    case.queries = (case.queries * 2**10).round() / 2**10  # so that it stays exact
    near = case.walk(PLAIN)
    far = Case(case.queries.double() + 2.0**12, case.labels).walk(PLAIN)
    equal(far, near)


# Memory and progress


class Peak(TorchDispatchMode):
    """elements: of the largest tensor made, but for those with one element for each level, of which there are as many for any samples."""

    def __init__(self, levels: int = 0):
        super().__init__()
        self.elements, self.levels = 0, levels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size if size != self.levels else 0)
        return out


@pytest.mark.parametrize(
    ("distance", "kind"),
    [(COSINE, "both"), (COSINE, "deep"), (COSINE, "gallery"), (PLAIN, "both"), (LEARNED, "deep"), (UNKNOWN, "gallery")],
    ids=["cosine-both", "cosine-deep", "cosine-gallery", "plain-both", "learned-deep", "unknown-gallery"],
)
def test_no_tensor_grows_with_the_number_of_pairs(monkeypatch, distance, kind):
    for name, value in {"_PRECISE": 0, "_ROWS": 256, "_COLUMNS": 256, "_FIRST": 64, "_LISTED": 2**18}.items():
        monkeypatch.setattr(_walk, name, value)
    points, labels = clusters(2500, 3 if kind == "deep" else 300)
    gallery = (points.flip(0), labels.flip(0)) if kind == "gallery" else None
    walked, peak = [], Peak()
    initial, pairs = _walk.Levels.__init__, _walk._Walk._pairs

    def begin(self, *arguments):
        initial(self, *arguments)
        peak.levels = self.count

    def end(self):
        walked.append(self)
        peak.__exit__(None, None, None)  # what is made of the histogram depends on its levels alone
        return pairs(self)

    monkeypatch.setattr(_walk.Levels, "__init__", begin)
    monkeypatch.setattr(_walk._Walk, "_pairs", end)
    peak.__enter__()
    walk(points, labels, distance, gallery)
    assert walked[0].both == (kind == "both")
    assert (walked[0].columns > 256) == (kind == "deep")
    assert 2**14 < peak.elements <= 2**19 < 2500**2 / 10  # what waits to be counted coarsely


def test_of_precise_scores_no_more_than_some_millions_wait_to_be_counted(monkeypatch):
    points, labels = clusters(4096, 300)
    with Peak() as peak:
        walk(points, labels, COSINE)
    assert peak.elements <= 2**23 + 2048**2 < 4096**2


@pytest.mark.parametrize(("kind", "listed"), [("many", 2**24), ("many", 200), ("few", 4000), ("gallery", 2**24), ("deep gallery", 4000)])
def test_progress_never_falls_and_ends_at_one(monkeypatch, kind, listed):
    small_blocks(monkeypatch, _LISTED=listed)
    shares = []
    some(kind).walk(COSINE, progress=shares.append)
    assert len(shares) > 2
    assert 0 < shares[0] < 0.5
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1, abs=0.02)


# Several processes

SHARES = {1: [1.0], 2: [0.3, 0.7], 3: [0.45, 0.1, 0.45], 4: [0.2, 0.35, 0.05, 0.4]}
TOGETHER = {  # distance, kind, _LISTED, whether one process has no samples
    "both": ("cosine", "many", 2**24, False),
    "both-plain": ("plain", "many", 2**24, False),
    "both-learned": ("learned", "many", 2**24, False),
    "groups": ("sphere", "many", 200, False),
    "deep": ("cosine", "few", 2**24, False),
    "deep-groups": ("dot", "few", 4000, False),
    "unknown": ("unknown", "many", 2**24, False),
    "gallery": ("learned-normalised", "gallery", 2**24, False),
    "gallery-groups": ("plain", "gallery", 200, False),
    "deep-gallery": ("dot", "deep gallery", 4000, False),
    "tied": ("cosine", "tied", 2**24, False),
    "empty-both": ("cosine", "many", 2**24, True),
    "empty-plain": ("plain", "many", 2**24, True),
    "empty-learned": ("learned", "many", 2**24, True),
    "empty-unknown": ("unknown", "many", 2**24, True),
    "empty-deep": ("dot", "few", 4000, True),
    "empty-gallery": ("cosine", "gallery", 2**24, True),
}
# With one process there is nothing to divide; of four, unlike of three, two are opposite each other in the ring and hold others between.
ASKED = {size: [name for name in TOGETHER if size in (2, 3) or name in ("both", "tied", "gallery", "empty-both")] for size in SHARES}


def case_of(kind: str) -> Case:
    return Case(*exact_points(COSINE, 150, 0)) if kind == "tied" else some(kind)


def ends(total: int, size: int, empty: bool) -> list[int]:
    """Where each process's samples begin, and where the last one's end; if `empty`, the second to last has none."""
    shares = list(SHARES[size])
    if empty and size > 1:
        shares[-1] += shares[-2]
        shares[-2] = 0.0
    return [round(total * sum(shares[:place])) for place in range(size)] + [total]


def share(rank: int, size: int, folder: str) -> None:
    """One process: every case, with its own part of the samples."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=15))
    for name, value in SMALL.items():
        setattr(_walk, name, value)
    results = {}
    for name in ASKED[size]:
        distance, kind, listed, empty = TOGETHER[name]
        _walk._LISTED = listed
        case = case_of(kind)
        first, last = ends(len(case.labels), size, empty)[rank : rank + 2]
        mine = Case(case.queries[first:last], case.labels[first:last])
        if case.gallery:
            start, stop = ends(len(case.gallery[1]), size, empty)[::-1][size - rank - 1 : size - rank + 1][::-1]
            mine.gallery = case.gallery[0][start:stop], case.gallery[1][start:stop]
        shares = []
        found = mine.walk(EVERY[distance], together=True, progress=shares.append)
        results[name] = {**vars(found), "figures": figures_of(found, together=True)[0], "shares": shares}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """together(3) -> what each of three processes found, by the names of the cases."""

    @functools.cache
    def run(size: int) -> list[dict]:
        folder, context = tmp_path_factory.mktemp("together"), multiprocessing.get_context("forkserver")
        processes = [context.Process(target=share, args=(rank, size, str(folder))) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(40)
            if process.is_alive():
                process.kill()
        assert [process.exitcode for process in processes] == [0] * size
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]

    return run


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in ASKED.items() for name in names])
def test_several_processes_find_what_one_does(together, size, name):
    distance, kind, _, empty = TOGETHER[name]
    case, results = case_of(kind), [result[name] for result in together(size)]
    bounds = ends(len(case.labels), size, empty)
    assert [len(result["rank"]) for result in results] == np.diff(bounds).tolist()
    alone = case.walk(EVERY[distance])
    for result in results:
        for pairs in (*PAIRS, "step"):
            assert torch.equal(torch.as_tensor(result[pairs]), torch.as_tensor(getattr(alone, pairs))), pairs
        assert result["figures"] == pytest.approx(figures_of(alone)[0], abs=1e-9)
        assert all(a <= b for a, b in itertools.pairwise(result["shares"]))
    per_query = {key: torch.cat([result[key] for result in results]) for key in (*PER_QUERY, "neighbours")}
    found = Found(**per_query, **{key: results[0][key] for key in (*PAIRS, "step")})
    equal(found, alone)
    check(found, case, case.scores(EVERY[distance]), exact_scores(case.queries, case.queries, COSINE) if kind == "tied" else None)
