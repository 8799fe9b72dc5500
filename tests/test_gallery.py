"""The gallery finds what a naive double loop finds, for every distance, however references came and went."""

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance

import siamese.gallery
from siamese.distances import LearnedDistance, scores
from siamese.gallery import Gallery, pairs_above

DISTANCES = {
    "cosine": CosineSimilarity,
    "euclidean": LpDistance,
    "euclidean as it is": lambda: LpDistance(normalize_embeddings=False),
    "squared": lambda: LpDistance(power=2),
    "dot product": lambda: DotProductSimilarity(normalize_embeddings=False),
    "signal to noise": SNRDistance,
}


def learned() -> LearnedDistance:
    distance = LearnedDistance(8)
    with torch.no_grad():
        distance.weight.copy_(torch.linspace(-1, 2, 8))
    return distance


DISTANCES["learned"] = learned


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few hundred references fill many of them."""
    for name, size in {"_BLOCK": 64, "_COLUMNS": 24, "_QUERIES": 7, "_ROWS": 50}.items():
        monkeypatch.setattr(siamese.gallery, name, size)


def references(seed: int = 0, count: int = 300, classes: int = 12):
    """Embeddings far from the origin, two thirds of them of one class, with labels and ids."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 8, generator=generator) + 3
    numbers = torch.randint(0, classes, (count,), generator=generator)
    numbers[: 2 * count // 3] = 0
    return embeddings, [f"class {n}" for n in numbers.tolist()], [f"photo {n}" for n in range(count)]


def filled(distance, **options) -> Gallery:
    embeddings, labels, ids = references(**options)
    gallery = Gallery(distance, 8)
    for start in range(0, len(ids), 70):
        gallery.add(*(part[start : start + 70] for part in (labels, embeddings, ids)))
    return gallery


def naive(distance, queries, embeddings, labels, ids, k: int) -> list[list[tuple[str, float, str]]]:
    matrix, answers = scores(distance, queries.double(), embeddings.double()).tolist(), []
    for row in matrix:
        best = {}
        for score, label, name in zip(row, labels, ids, strict=True):
            if label not in best or score > best[label][0]:
                best[label] = (score, name)
        answers.append(sorted(((label, *found) for label, found in best.items()), key=lambda one: -one[1])[:k])
    return answers


def assert_found(gallery, distance, kept, k: int):
    queries = references(seed=1, count=20)[0]
    found = gallery.search(queries, k)
    for mine, theirs in zip(found, naive(distance, queries, *kept, k), strict=True):
        assert [match.label for match in mine] == [label for label, _, _ in theirs]
        assert [match.reference for match in mine] == [name for _, _, name in theirs]
        assert [match.score for match in mine] == pytest.approx([score for _, score, _ in theirs], abs=2e-6)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_search_is_the_naive_one(name, k):
    distance = DISTANCES[name]()
    embeddings, labels, ids = references()
    gallery = filled(distance)
    assert len(gallery) == 300
    assert_found(gallery, distance, (embeddings, labels, ids), k)
    gone = [row for row, label in enumerate(labels) if label != "class 3"]
    assert gallery.remove("class 3") == 300 - len(gone)
    kept = embeddings[gone], [labels[row] for row in gone], [ids[row] for row in gone]
    assert_found(gallery, distance, kept, k)
    assert gallery.classes() == {label: kept[1].count(label) for label in dict.fromkeys(kept[1])}


@pytest.mark.parametrize("name", ["cosine", "euclidean as it is", "learned"])
def test_a_prototype_is_the_mean_of_its_class(name):
    distance = DISTANCES[name]()
    embeddings, labels, _ = references()
    gallery, queries = filled(distance), references(seed=1, count=20)[0]
    names = list(dict.fromkeys(labels))
    ready = distance.maybe_normalize(embeddings.double())
    means = torch.stack([ready[[label == one for label in labels]].mean(0) for one in names])
    expected = scores(distance, queries.double(), means)
    for row, matches in enumerate(gallery.search(queries, 3, "prototype")):
        best = expected[row].topk(3)
        assert [match.label for match in matches] == [names[place] for place in best.indices.tolist()]
        assert [match.score for match in matches] == pytest.approx(best.values.tolist(), abs=2e-6)
        assert all(match.reference == "" for match in matches)
    gallery.add(["new"], queries[:1], ["one"])
    assert gallery.search(queries[:1], 1, "prototype")[0][0].label == "new", "what has changed since is seen"


def test_the_same_reference_again_takes_its_place():
    distance = CosineSimilarity()
    gallery = filled(distance)
    embeddings, labels, ids = references()
    other = torch.randn(8, generator=torch.Generator().manual_seed(5))
    gallery.add([labels[4], labels[5], "new"], torch.stack([other, other, other]), [ids[4], "other photo", ids[4]])
    assert len(gallery) == 302, "one replaced, one more of its class, and one of another class with the same id"
    kept = torch.ones(300, dtype=torch.bool)
    kept[4] = False
    now = torch.cat([embeddings[kept], other.expand(3, 8)])
    rows = [row for row in range(300) if row != 4]
    names = [labels[row] for row in rows] + [labels[4], labels[5], "new"]
    assert_found(gallery, distance, (now, names, [ids[row] for row in rows] + [ids[4], "other photo", ids[4]]), 5)
    twice = Gallery(distance, 8)
    twice.add(["a", "a"], embeddings[:2], ["x", "x"])
    assert torch.allclose(twice.of("a")[0], distance.maybe_normalize(embeddings[1:2]))


def test_all_of_a_class_can_go_and_come_back():
    gallery = filled(CosineSimilarity())
    for label in list(gallery.classes()):
        gallery.remove(label)
    assert (len(gallery), gallery.classes(), gallery.blocks) == (0, {}, [])
    with pytest.raises(KeyError):
        gallery.remove("class 0")
    with pytest.raises(ValueError, match="nothing is enrolled"):
        gallery.search(torch.ones(1, 8))
    gallery.add(["back"], torch.ones(1, 8), ["x"])
    assert gallery.search(torch.ones(2, 8), 5) == [[("back", pytest.approx(1), "x")]] * 2


@pytest.mark.parametrize(
    ("labels", "embeddings", "ids", "why"),
    [
        (["a"], torch.ones(1, 7), ["x"], "7"),
        (["a"], torch.ones(2, 8), ["x", "y"], "labels"),
        (["a", "b"], torch.ones(2, 8), ["x"], "ids"),
        (["a", "b"], torch.tensor([[1.0] * 8, [float("nan")] * 8]), ["x", "y"], "NaN or infinite, among them y"),
        (["a", ""], torch.ones(2, 8), ["x", "y"], "y has no class"),
    ],
)
def test_what_cannot_be_enrolled_changes_nothing(labels, embeddings, ids, why):
    gallery = filled(CosineSimilarity())
    with pytest.raises(ValueError, match=why):
        gallery.add(labels, embeddings, ids)
    assert len(gallery) == len(gallery.labels) == sum(map(len, gallery.blocks)) == 300


@pytest.mark.parametrize("arguments", [{"k": 0}, {"rule": "mean"}])
def test_a_search_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=r"prototype"):
        filled(CosineSimilarity()).search(torch.ones(1, 8), **arguments)
    with pytest.raises(ValueError, match="queries"):
        filled(CosineSimilarity()).search(torch.ones(1, 9))


@pytest.mark.parametrize("name", DISTANCES)
def test_pairs_above_a_threshold_are_all_there_are(name):
    distance, embeddings = DISTANCES[name](), references(count=130)[0]
    matrix = scores(distance, embeddings.double(), embeddings.double())
    threshold = matrix[torch.ones(130, 130).triu(1).bool()].quantile(0.9).item()
    rows, found = pairs_above(distance, embeddings, threshold)
    first, second = ((matrix >= threshold) & torch.ones(130, 130).triu(1).bool()).nonzero().T
    near = abs(matrix[first, second] - threshold) > 1e-6
    missing = set(zip(first[near].tolist(), second[near].tolist(), strict=True)) - set(map(tuple, rows.tolist()))
    assert not missing
    assert found.tolist() == pytest.approx(matrix[rows[:, 0], rows[:, 1]].tolist(), abs=2e-6)
    assert (found.diff() <= 0).all()
    assert (rows[:, 0] < rows[:, 1]).all()
    assert (found >= threshold).all()
    with pytest.raises(ValueError, match="more than 100 pairs"):
        pairs_above(distance, embeddings, threshold, most=100)


def test_of_few_embeddings_there_are_few_pairs():
    assert [list(part.shape) for part in pairs_above(CosineSimilarity(), torch.ones(1, 8), 0.0)] == [[0, 2], [0]]
    assert [list(part.shape) for part in pairs_above(CosineSimilarity(), torch.empty(0, 8), 0.0)] == [[0, 2], [0]]
