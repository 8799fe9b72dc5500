"""The walk against loops over the whole matrix: every mode, any block size, one process or several."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from siamese import _walk
from siamese._walk import walk
from siamese.distances import LearnedDistance
from siamese.evaluation import figures_of


class Doubled(LpDistance):
    """A distance that the walk knows nothing of."""

    def compute_mat(self, query, gallery):
        return 2 * super().compute_mat(query, gallery)


LEARNED = LearnedDistance(6).requires_grad_(False)
LEARNED.weight.data = torch.tensor([1.5, -0.7, 1.0, 0.4, 2.0, 0.9])
EVERY = {
    "cosine": CosineSimilarity(),
    "sphere": LpDistance(),
    "plain": LpDistance(normalize_embeddings=False),
    "dot": DotProductSimilarity(normalize_embeddings=False),
    "learned": LEARNED,
    "unknown": Doubled(normalize_embeddings=False),
}
SIZES = ("_ROWS", "_COLUMNS", "_HOT", "_BAND", "_FIRST")


def clusters(samples: int, classes: int, noise: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator) * 3 + 2  # numbers of classes may have gaps
    return torch.randn(3 * classes, 6, generator=generator)[labels] + noise * torch.randn(samples, 6, generator=generator), labels


def scores_by_hand(distance, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    x, y = x.double(), y.double()
    if distance.normalize_embeddings:
        x, y = normalize(x), normalize(y)
    if distance.is_inverted:
        return (x @ y.T).numpy()
    if distance is LEARNED:
        return -((x[:, None] - y).abs() * distance.weight.abs()).mean(2).numpy()
    return -(x[:, None] - y).norm(dim=2).numpy() * (2 if isinstance(distance, Doubled) else 1)


def by_loops(score: np.ndarray, labels, gallery_labels, itself: bool) -> dict[str, list]:
    out = {name: [] for name in ("matches", "rank", "map_at_r", "r_precision", "hits", "neighbour_scores")}
    for q in range(len(score)):
        others = [i for i in range(score.shape[1]) if not (itself and i == q)]
        others.sort(key=lambda i: (-score[q, i], bool(labels[q] == gallery_labels[i])))
        hits = [bool(labels[q] == gallery_labels[i]) for i in others]
        matches = sum(hits)
        out["matches"].append(matches)
        out["rank"].append(hits.index(True) + 1 if matches else 0)
        early = [i for i in range(matches) if hits[i]]
        out["map_at_r"].append(sum(sum(hits[: i + 1]) / (i + 1) for i in early) / matches if matches else 0)
        out["r_precision"].append(len(early) / matches if matches else 0)
        out["hits"].append(np.cumsum([*hits, *[0] * 10][:10]).tolist())
        out["neighbour_scores"].append([*score[q, others[:10]], *[-np.inf] * 10][:10])
    return out


def check(found, score, labels, gallery_labels, itself: bool, tolerance: float) -> None:
    for name, values in by_loops(score, labels, gallery_labels, itself).items():
        near = tolerance if name == "neighbour_scores" else 1e-9
        assert getattr(found, name).numpy() == pytest.approx(np.array(values, dtype=float), abs=near), name
    for q, row in enumerate(found.neighbours.tolist()):
        known = [i for i in row if i >= 0]
        assert len(set(known)) == len(known)
        assert not (itself and q in known)
        assert found.neighbour_scores[q, : len(known)].numpy() == pytest.approx(score[q, known], abs=tolerance)
    same = (labels[:, None] == gallery_labels).numpy()
    pairs = np.triu(np.ones_like(same), 1) if itself else np.ones_like(same)
    assert found.same.sum() == (same & pairs).sum()
    assert found.different.sum() == (~same & pairs).sum()


@pytest.mark.parametrize("mode", ["both", "deep", "groups", "blocks"])
@pytest.mark.parametrize("name", EVERY)
def test_all_that_is_found_is_what_loops_find(monkeypatch, name, mode):
    """Also where best positives are far behind: half of the points are noise alone."""
    embeddings, labels = clusters(260, 16)
    embeddings[::2] = torch.randn(130, 6, generator=torch.Generator().manual_seed(3))
    labels[:3] = torch.tensor([100, 101, 102])  # alone in their classes
    if mode in ("deep", "groups"):
        monkeypatch.setattr(_walk, "_LISTED", 1 if mode == "deep" else 3_000)
    if mode == "blocks":
        for size, value in zip(SIZES, (37, 23, 5, 11, 16), strict=True):
            monkeypatch.setattr(_walk, size, value)
    distance = EVERY[name]
    score = scores_by_hand(distance, embeddings, embeddings)
    check(walk(embeddings, labels, distance), score, labels, labels, True, 1e-5 * max(1, np.ptp(score)))


@pytest.mark.parametrize("mode", ["rows", "deep", "blocks"])
@pytest.mark.parametrize("name", EVERY)
def test_a_gallery_with_distractors_is_what_loops_find(monkeypatch, name, mode):
    embeddings, labels = clusters(240, 12)
    queries, asked, gallery, known = embeddings[:80], labels[:80], embeddings[80:], labels[80:].clone()
    known[:40] = -1
    known[40:60] = 1_000
    if mode == "deep":
        monkeypatch.setattr(_walk, "_LISTED", 1_000)
    if mode == "blocks":
        for size, value in zip(SIZES, (37, 23, 5, 11, 16), strict=True):
            monkeypatch.setattr(_walk, size, value)
    distance = EVERY[name]
    score = scores_by_hand(distance, queries, gallery)
    check(walk(queries, asked, distance, (gallery, known)), score, asked, known, False, 1e-5 * max(1, np.ptp(score)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_ties_and_sizes_and_blocks_make_no_difference(monkeypatch, data):
    """Points of which every score is exact, so that many are equal: the different class is ahead, whatever is computed with what."""
    total, classes = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 12))
    points = torch.tensor(data.draw(st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=total, max_size=total))).float()
    labels = torch.tensor(data.draw(st.lists(st.integers(0, classes), min_size=total, max_size=total)))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    with monkeypatch.context() as patch:
        for size in SIZES:
            patch.setattr(_walk, size, data.draw(st.integers(1, 40)))
        patch.setattr(_walk, "_LISTED", data.draw(st.sampled_from([50, 2**24])))
        patch.setattr(_walk, "_PRECISE", data.draw(st.sampled_from([0, 2**24])))
        distance = EVERY[data.draw(st.sampled_from(["plain", "dot"]))]
        found = walk(points.to(dtype), labels, distance)
    check(found, scores_by_hand(distance, points, points), labels, labels, True, 1e-4)


@pytest.mark.parametrize("gallery", [False, True])
def test_many_pairs_in_single_precision_give_the_figures_of_scikit_learn(monkeypatch, gallery):
    """As for tens of thousands of samples: bins of 2^-13 but for the highest scores."""
    embeddings, labels = clusters(4_000, 300, noise=0.6)
    monkeypatch.setattr(_walk, "_PRECISE", 0)
    other = (embeddings[1500:], labels[1500:]) if gallery else None
    queries, asked = (embeddings[:1500], labels[:1500]) if gallery else (embeddings, labels)
    found = walk(queries, asked, EVERY["cosine"], other)
    assert (found.width > found.step).any(), "bins were to be coarse"
    assert (found.width == found.step).any()
    figures = figures_of(found)[0]
    score = (normalize(queries.double()) @ normalize((other or (embeddings,))[0].double()).T).numpy()
    same = (asked[:, None] == (other[1] if gallery else labels)).numpy()
    rows = np.ones_like(same) if gallery else np.triu(np.ones_like(same), 1)
    same, flat = same[rows], score[rows]
    far, tar, _ = roc_curve(same, flat, drop_intermediate=False)
    place = np.arange(len(far))
    eer = np.interp(np.interp(0, far - (1 - tar), place), place, far)
    auc = roc_auc_score(same, flat)
    assert 0 < auc - figures["auc"] + 2e-8 < 1e-6
    assert abs(figures["eer"] - eer) < 2.5e-5  # within a bin the pairs of so few samples do not lie on a line
    for exponent in (2, 3, 4, 5):
        assert 0 <= tar[far <= 10.0**-exponent].max() - figures[f"tar_at_far_1e{exponent}"] + 1 / same.sum() < 1e-4 + 1 / same.sum()
    exact = by_loops(score[:60], asked[:60], other[1] if gallery else labels, not gallery)
    assert found.rank[:60].tolist() == exact["rank"]
    assert found.map_at_r[:60].numpy() == pytest.approx(exact["map_at_r"], abs=1e-9)


@pytest.mark.parametrize("precise", [0, 2**24])
def test_collapsed_points_are_all_equal(monkeypatch, precise):
    monkeypatch.setattr(_walk, "_PRECISE", precise)
    labels = torch.arange(40).repeat(10)
    found = walk(normalize(torch.full((400, 7), 0.3)), labels, EVERY["cosine"])
    assert (found.rank == 391).all()
    assert found.map_at_r.sum() == 0
    assert len(found.score) == 1
    assert (found.same.item(), found.different.item()) == (40 * 45, 400 * 399 / 2 - 40 * 45)


def test_the_order_of_the_samples_makes_no_difference_in_single_precision(monkeypatch):
    embeddings, labels = clusters(1_500, 100)
    monkeypatch.setattr(_walk, "_PRECISE", 0)
    order = torch.randperm(1_500, generator=torch.Generator().manual_seed(1))
    one, other = (figures_of(walk(embeddings[o], labels[o], EVERY["cosine"]))[0] for o in (torch.arange(1_500), order))
    assert one == pytest.approx(other, abs=2e-6)


def test_no_tensor_grows_with_the_square_of_the_samples(monkeypatch):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out

    for name, value in zip(SIZES, (256, 256, 32, 64, 64), strict=True):
        monkeypatch.setattr(_walk, name, value)
    monkeypatch.setattr(_walk, "_PRECISE", 0)
    embeddings, labels = clusters(6_000, 1_000)
    with Watch():
        walk(embeddings, labels, EVERY["cosine"])
    assert max(sizes) <= 2 * (2**21 + 1024) < 6_000**2 / 8, "the largest is of the levels, of same and of different pairs"


def test_progress_grows_to_the_whole():
    told = []
    embeddings, labels = clusters(5_000, 900)
    walk(embeddings, labels, EVERY["cosine"], progress=told.append)
    assert told == sorted(told)
    assert len(told) > 5
    assert told[-1] == pytest.approx(1, abs=0.02)


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[6])
from test_walk import EVERY, clusters
from siamese import _walk
from siamese.evaluation import figures_of
torch.set_num_threads(1)
rank, world, port, mode, to = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
embeddings, labels = clusters(300, 20)
cuts = {1: [0, 300], 2: [0, 170, 300], 3: [0, 50, 50 if mode == "empty" else 220, 300]}[world]
if mode == "deep":
    _walk._LISTED = 3000
own, gallery = slice(cuts[rank], cuts[rank + 1]), None
if mode == "gallery":
    own = slice(cuts[rank] // 2, cuts[rank + 1] // 2)
    half = slice(150 + own.start, 150 + own.stop)
    gallery = embeddings[half], labels[half]
distance = EVERY["learned" if mode == "learned" else "unknown" if mode == "unknown" else "cosine"]
found = _walk.walk(embeddings[own], labels[own], distance, gallery, together=True)
torch.save((figures_of(found, together=True)[0], found.rank, found.neighbour_scores, found.map_at_r), f"{to}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["both", "deep", "gallery", "learned", "unknown", "empty"])
def test_processes_that_share_the_work_find_what_one_finds(tmp_path, mode):
    results = {}
    for world in (1, 2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        to = tmp_path / str(world)
        to.mkdir()
        arguments = [str(world), port, mode, str(to), str(Path(__file__).parent)]
        started = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments]) for rank in range(world)]
        assert [process.wait(120) for process in started] == [0] * world
        parts = [torch.load(to / f"{rank}.pt") for rank in range(world)]
        assert all(part[0] == parts[0][0] for part in parts), "each process has the figures of all"
        results[world] = [parts[0][0], *(torch.cat([part[i] for part in parts]) for i in (1, 2, 3))]
    for world in (2, 3):
        assert results[world][0] == pytest.approx(results[1][0], abs=1e-12)
        for one, other in zip(results[world][1:], results[1][1:], strict=True):
            assert one.numpy() == pytest.approx(other.numpy(), abs=1e-12)
