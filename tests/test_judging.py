"""Judging: the threshold comes from validation, and a test split that is not wanted is never read."""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from rich.console import Console

from siamese import evaluation, judging, record
from siamese.bundle import Bundle
from siamese.data.module import SiameseData
from siamese.data.samples import Samples, Source, Tuples
from siamese.data.sampling import balanced
from siamese.evaluation import evaluate
from siamese.metrics import EmbeddingMetrics

SHAPE = (1, 8, 8)
PARTS = {
    "encoder": {"_target_": "siamese.encoders.MLP", "input_shape": list(SHAPE), "hidden": [16], "embedding_size": 8},
    "distance": {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"},
    "preprocessing": {"_target_": "siamese.bundle.Standardize", "mean": [0.5], "std": [0.3]},
}


def patterns(classes: int, each: int, seed: int) -> Samples:
    """uint8 images: a random pattern for each class, and much noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    noise = torch.randn(len(labels), *SHAPE, generator=generator)
    images = (128 + 40 * torch.randn(classes, *SHAPE, generator=generator)[labels] + 40 * noise).clamp(0, 255).to(torch.uint8)
    return Samples(images, labels, [f"pattern {c}" for c in range(classes)], [f"split {seed}, row {i}" for i in range(len(labels))])


def test_a_gpu_is_judged_on_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(judging.device(word)) for word in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match=r"cuda:2 is not there, .* has 2: say device=cpu"):
        judging.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert judging.device("auto") == torch.device("cpu")


class Patterns(Source):
    def __init__(self, tested: bool = True):
        self.tested, self.asked = tested, []

    def split(self, name: str) -> Samples:
        self.asked.append(name)
        if name == "test" and not self.tested:
            raise AssertionError("the test split was touched")
        return patterns(8, 6, ["train", "val", "test"].index(name))


class WithRuns(Patterns):
    """Supports come in another order than the labels: an answer is found by label, not by row."""

    def oneshot_runs(self, split: str = "test") -> list[tuple[Samples, Samples]]:
        if split != "test":
            return []
        if not self.tested:
            raise AssertionError("the runs of the test split were touched")
        runs = []
        for seed in (10, 11):
            supports, queries = (patterns(8, 6, seed)[list(range(start, start + 8))] for start in (0, 8))
            names = [str(c) for c in range(8)]
            order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
            runs.append((Samples(*queries[:2], names, names), Samples(supports.inputs[order], supports.labels[order], names, names)))
        return runs


PATTERNS = patterns(2, 2, 0)


def data(source: Source) -> SiameseData:
    return SiameseData(source, lambda samples, seed: balanced(samples, seed, 4, 2))


@pytest.fixture
def model() -> Bundle:
    torch.manual_seed(0)
    return Bundle(PARTS)


def test_val_and_test_are_judged_as_they_are(model):
    results = judging.judge(model, data(Patterns()))
    assert list(results) == ["val", "test"]
    fitted = {"threshold": results["val"].figures["threshold"], "calibration": results["val"].calibration}
    for seed, (name, options) in enumerate([("val", {}), ("test", fitted)], 1):
        samples = patterns(8, 6, seed)
        expected = evaluate(model.embed(samples.inputs), samples.labels, CosineSimilarity(), **options)
        assert results[name].figures == expected.figures
        assert results[name].ids == samples.ids
        assert results[name].class_names == samples.class_names


def with_roles(seed: int = 1) -> Samples:
    """Of each of 8 classes 4 queries and 2 samples in the gallery, but for the last: none."""
    given = patterns(8, 6, seed)
    gallery = (torch.arange(48) % 3 == 0) & (given.labels < 7)
    return Samples(given.inputs, given.labels, given.class_names, given.ids, gallery)


def test_queries_are_judged_against_the_gallery_alone(model):
    samples = with_roles()
    result = judging.judge_samples(model, samples, None)
    embedded, labels = torch.nn.functional.normalize(model.embed(samples.inputs).double()), samples.labels.tolist()
    first, precision, nearest, alone = [], [], [], 0
    for query in range(48):
        if samples.gallery[query]:
            continue
        ranked = sorted(((float(embedded[query] @ embedded[row]), row) for row in range(48) if samples.gallery[row]), reverse=True)
        same = [labels[row] == labels[query] for _, row in ranked]
        nearest.append((samples.ids[query], samples.ids[ranked[0][1]], labels[ranked[0][1]]))
        if matches := sum(same):
            first.append(same[0])
            precision.append(sum(sum(same[: k + 1]) / (k + 1) for k in range(matches) if same[k]) / matches)
        else:
            alone += 1
    assert len(first) == 28
    assert 0 < sum(first) < 28, "else this test tests nothing"
    assert result.figures["recall_at_1"] == pytest.approx(sum(first) / 28)
    assert result.figures["map_at_r"] == pytest.approx(sum(precision) / 28)
    assert result.figures["queries_without_match"] == alone == 6
    rows = result.neighbours[:, 0]
    assert (
        list(zip(result.ids, (result.gallery_ids[row] for row in rows), (result.gallery_labels[row] for row in rows), strict=True))
        == nearest
    )
    assert judging.judge_samples(model, patterns(8, 6, 1), None).gallery_ids == []


def test_what_is_watched_is_judged_by_its_roles_too(model):
    """The class without a gallery comes last."""
    some = data(Patterns(tested=False))
    some.__dict__["val"], some.val_classes = with_roles(), 7
    assert some.watched.labels.unique().tolist() == list(range(7))
    metrics = EmbeddingMetrics(model.distance)
    for batch in some.val_dataloader()[0]:
        metrics.update(model.embed(batch.inputs), batch.labels, gallery=batch.gallery)
    expected = judging.judge_samples(model, some.watched, None).figures
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {name: value for name, value in expected.items() if "shot" not in name and name != "calibration_error"}
    )


def test_the_threshold_of_the_test_is_that_of_validation(model):
    results = judging.judge(model, data(Patterns()))
    assert results["test"].figures["threshold"] == results["val"].figures["threshold"] == model.threshold
    samples = patterns(8, 6, 2)
    own = evaluate(model.embed(samples.inputs), samples.labels, CosineSimilarity()).figures["threshold"]
    assert own != model.threshold, "the test's own would be another"


def test_a_rate_that_validation_cannot_tell_is_refused_with_one_that_it_can():
    with_gallery = with_roles()
    queries, held = with_gallery.roles()
    between = int((with_gallery.labels[queries][:, None] != with_gallery.labels[held]).sum())
    pairs = Tuples(torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([True, False, False]), list("abc"))
    some = patterns(3, 2, 0)
    listed = Samples(some.inputs, None, [], some.ids, tuples=pairs)
    for samples, different in ((patterns(8, 6, 1), 48 * 47 // 2 - 8 * 15), (with_gallery, between), (listed, 2)):
        judging.check_goal("equal_error", samples)
        judging.check_goal("best_f1", samples)
        with pytest.raises(ValueError, match=f"validation has {different:,} different pairs") as refused:
            judging.check_goal("far_1e-4", samples)
        if found := re.search(r"Say (far_\S+) or more", str(refused.value)):
            judging.check_goal(found[1], samples)
            with pytest.raises(ValueError, match="ten are needed"):
                judging.check_goal(f"far_{float(found[1][4:]) / 1.2}", samples)
        else:
            assert different == 2
    with pytest.raises(ValueError, match="best is no goal"):
        judging.check_goal("best", PATTERNS)


@pytest.mark.parametrize("goal", ["equal_error", "best_f1", "far_0.05"])
def test_the_threshold_serves_the_goal_that_is_wanted(model, goal):
    results = judging.judge(model, data(Patterns()), goal=goal)
    assert model.decision.goal == goal
    samples = patterns(8, 6, 1)
    val = evaluate(model.embed(samples.inputs), samples.labels, CosineSimilarity(), goal=goal)
    assert model.threshold == results["test"].figures["threshold"] == val.figures["threshold"]
    assert (model.decision.far, model.decision.frr) == (val.figures["far"], val.figures["frr"])


@pytest.mark.parametrize("kind", [Patterns, WithRuns])
def test_a_test_split_that_is_not_wanted_is_never_read(model, kind):
    source = kind(tested=False)
    unwanted = data(source)
    assert list(judging.judge(model, unwanted, test=False)) == ["val"]
    assert list(judging.judge(judging.raw(model, PATTERNS), unwanted, test=False)) == ["val"]
    assert source.asked == ["val"]
    with pytest.raises(AssertionError, match="touched"):
        judging.judge(model, unwanted)


def test_official_runs_are_judged_where_the_source_has_them(model):
    source = WithRuns()
    results = judging.judge(model, data(source))
    wrong = total = 0
    for queries, supports in source.oneshot_runs():
        left, right = (torch.nn.functional.normalize(model.embed(part.inputs)) for part in (queries, supports))
        best = supports.labels[(left @ right.T).argmax(1)]
        wrong, total = wrong + int((best != queries.labels).sum()), total + len(best)
    assert 0 < wrong < total
    assert results["test"].figures["omniglot_error"] == pytest.approx(100 * wrong / total)
    assert "omniglot_error" not in results["val"].figures
    assert "omniglot_error" not in judging.judge(model, data(Patterns()))["test"].figures


def test_what_goes_by_validation_is_left_out_where_its_classes_are_trained_on(model):
    source = Patterns()
    whole = judging.judge(model, data(source))["test"].figures
    source.trained_on = ("val",)
    results = judging.judge(model, data(source))
    assert list(results) == ["test"]
    assert whole.keys() - results["test"].figures.keys() == {"threshold", "accuracy", "far", "frr", "calibration_error"}
    assert all(whole[name] == value for name, value in results["test"].figures.items())
    assert "accuracy" in results["test"].notes[-1]
    assert model.decision is None


def test_the_raw_row_is_that_of_the_pixels(model):
    samples = patterns(8, 6, 1)
    results = judging.judge(judging.raw(model, PATTERNS), data(Patterns()), test=False)
    expected = evaluate(samples.inputs.flatten(1).double() / 255, samples.labels, CosineSimilarity()).figures
    assert results["val"].figures == pytest.approx(expected, abs=1e-5)


def test_the_raw_row_uses_the_models_distance():
    euclidean = {"_target_": "pytorch_metric_learning.distances.LpDistance", "normalize_embeddings": False}
    raw = judging.raw(Bundle({**PARTS, "distance": euclidean}), PATTERNS)
    left, right = patterns(2, 1, 0).inputs
    expected = -((left.double() - right.double()) / 255).norm()
    assert raw.scores(raw.embed(left[None]), raw.embed(right[None])).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_raw_row_takes_a_distance_of_ones_own(tmp_path, monkeypatch):
    code = "from pytorch_metric_learning.distances import LpDistance\nclass Mine(LpDistance):\n    pass\n"
    (tmp_path / "my_distance.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = Bundle({**PARTS, "distance": {"_target_": "my_distance.Mine"}}, trust=("my_distance",))
    assert type(judging.raw(model, PATTERNS).distance) is type(model.distance)


def test_figures_carry_the_name_of_their_row():
    val = SimpleNamespace(figures={"auc": 0.5, "eer": 0.4}, intervals={"auc": [0.45, 0.55]})
    results = {"val": val, "test": SimpleNamespace(figures={"auc": 0.6}, intervals={})}
    assert dict(judging.figures(results)) == {"val/auc": 0.5, "val/auc_ci95": [0.45, 0.55], "val/eer": 0.4, "test/auc": 0.6}


def test_the_last_split_alone_is_the_same_as_with_the_others(model):
    both, last = judging.judge(model, data(Patterns())), judging.judge(model, data(Patterns()), last=True)
    assert list(last) == ["test"]
    assert last["test"].figures == both["test"].figures
    assert last["test"].intervals == both["test"].intervals
    alone = judging.judge(model, data(Patterns()), test=False, last=True)
    assert list(alone) == ["val"]
    assert alone["val"].figures == both["val"].figures


def test_of_a_split_that_is_not_given_no_more_is_found_out_than_its_threshold(model, monkeypatch):
    asked, own = [], evaluation.fewshot
    monkeypatch.setattr(evaluation, "fewshot", lambda *arguments, **options: asked.append(0) or own(*arguments, **options))
    judging.judge(model, data(Patterns()))
    both = len(asked)
    judging.judge(model, data(Patterns()), last=True)
    assert 0 < len(asked) - both == both // 2
    known, asked[:] = data(Patterns()), []
    known.source.trained_on = ("val",)
    results = judging.judge(model, known)
    assert list(results) == ["test"]
    assert "accuracy" not in results["test"].figures
    assert len(asked) == both // 2


@pytest.mark.parametrize("test", [True, False])
def test_what_stands_beside_a_model_is_the_raw_input_and_itself(model, test):
    given, split = data(Patterns()), "test" if test else "val"
    rows = judging.baselines(model, given, test, "equal_error")
    assert list(rows) == ["raw", "untrained"]
    assert rows["untrained"].figures == judging.judge(model, given, test)[split].figures
    assert rows["raw"].figures == judging.judge(judging.raw(model, given.val), given, test)[split].figures


def test_watched_are_all_samples_of_as_many_fixed_classes_and_none_else(model):
    source = Patterns(tested=False)
    some = SiameseData(source, lambda samples, seed: balanced(samples, seed, 4, 2), seed=5, val_classes=3)
    rows = torch.isin(some.val.labels, some.watched.labels.unique()).nonzero().flatten()
    assert len(some.watched.labels.unique()) == 3
    assert some.watched.ids == [some.val.ids[row] for row in rows]
    assert (some.watched.inputs == some.val.inputs[rows]).all()
    again = SiameseData(source, lambda samples, seed: balanced(samples, seed, 4, 2), seed=6, val_classes=3)
    assert again.watched.ids == some.watched.ids, "the same in every run"
    batches = [batch.labels for batch in some.val_dataloader()[0]]
    assert torch.cat(batches).tolist() == some.watched.labels.tolist()
    assert judging.judge(model, some, test=False)["val"].ids == some.val.ids, "the final figures are of all"
    assert data(source).watched.ids == some.val.ids


def test_watched_classes_can_be_judged(model):
    """Classes of one sample come last: three of four would leave a single pair, or none."""
    lone = patterns(8, 6, 1)[[*range(8), 8, 9]]
    samples = Samples(lone.inputs, lone.labels, [f"{c}" for c in range(8)], [f"{i}" for i in range(10)])
    some = data(Patterns(tested=False))
    some.__dict__["val"], some.val_classes = samples, 2
    assert some.watched.labels.bincount(minlength=8).tolist() == [2, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("number", [1, 9, 2.5, True])
def test_a_senseless_number_of_watched_classes_is_refused(number):
    some = data(Patterns(tested=False))
    some.val_classes = number
    with pytest.raises(ValueError, match=f"val_classes={number} must be a whole number from 2 to 8"):
        _ = some.watched


def test_the_hardest_classes_are_named():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.05], [0.0, 1.0], [0.1, 1.0], [0.9, -0.1], [0.2, 1.0]])
    result = evaluate(embeddings, torch.tensor([0, 0, 1, 2, 2, 1, 3]), CosineSimilarity(), ways=(), class_names=["a", "b", "c", "d"])
    lowest, taken = record.hardest(result, most=2)
    assert lowest.startswith("lowest map_at_r: b (0.00), a (0.00)") or lowest.startswith("lowest map_at_r: a (0.00), b (0.00)")
    assert "d" not in lowest.removeprefix("lowest map_at_r")
    assert taken == "nearest is another class: a for b (2 of 2), b for a (2 of 2)"


@pytest.mark.parametrize("test", [True, False])
def test_the_table_gives_the_interval_of_what_was_judged_last(model, test):
    results = judging.judge(model, data(Patterns()), test)
    split = "test" if test else "val"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(record.table({"untrained": list(results.values())[-1], **results}))
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    place = next(row for row, line in enumerate(lines) if line.startswith(" validation" if split == "val" else " test"))
    low, high = results[split].intervals["map_at_r"]
    assert f"{low:.4f}" in lines[place + 1]
    assert f"{high:.4f}" in lines[place + 2]
    assert sum("95 %" in line for line in lines) == 1
