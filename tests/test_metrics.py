"""The torchmetrics are the figures of `evaluate`, however the samples come: in batches, merged, or over processes."""

import copy
import datetime
import multiprocessing
import os
import pickle
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from sklearn.metrics import average_precision_score, roc_auc_score
from test_evaluation import clusters
from torch.nn.functional import normalize
from torchmetrics.classification import BinaryAUROC

from siamese.bundle import Bundle
from siamese.data.samples import Batch
from siamese.distances import LearnedDistance
from siamese.evaluation import evaluate, evaluate_pairs
from siamese.metrics import EmbeddingMetrics, PairMetrics
from siamese.module import SiameseModule


def plain(figures: dict) -> dict[str, float]:
    """Without the calibration, which is fitted when all is over."""
    return {name: float(value) for name, value in figures.items() if name.rpartition("/")[2] != "calibration_error"}


@pytest.fixture
def expected():
    embeddings, labels = clusters(170, 12)
    return embeddings, labels, plain(evaluate(embeddings, labels, CosineSimilarity(), ways=(), certainty=False).figures)


def against_gallery(embeddings, labels, gallery) -> dict[str, float]:
    sides = [(embeddings[rows], labels[rows]) for rows in (~gallery, gallery)]
    return plain(evaluate(*sides[0], CosineSimilarity(), gallery=sides[1], certainty=False).figures)


def fed(embeddings, labels, size: int = 50, **options) -> EmbeddingMetrics:
    metrics = EmbeddingMetrics(CosineSimilarity(), **options)
    for rows in torch.arange(len(labels)).split(size):
        metrics.update(embeddings[rows], labels[rows])
    return metrics


def test_batches_give_the_figures_of_the_whole(expected):
    embeddings, labels, figures = expected
    metrics = fed(embeddings, labels)
    assert plain(metrics.compute()) == pytest.approx(figures, abs=1e-12)
    metrics.reset()
    metrics.update(embeddings[:60], labels[:60])
    half = plain(evaluate(embeddings[:60], labels[:60], CosineSimilarity(), ways=(), certainty=False).figures)
    assert plain(metrics.compute()) == pytest.approx(half, abs=1e-12)


def test_copies_and_merged_halves_give_the_figures_of_the_whole(expected):
    embeddings, labels, figures = expected
    whole = fed(embeddings, labels)
    for copied in (whole.clone(), copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert plain(copied.compute()) == pytest.approx(figures, abs=1e-12)
    one, other = fed(embeddings[:80], labels[:80]), fed(embeddings[80:], labels[80:])
    assert plain(one.compute()) != figures
    one.merge_state(other)
    assert plain(one.compute()) == pytest.approx(figures, abs=1e-12)
    assert torch.equal(torch.cat(one.labels), labels)


def test_a_clone_shares_the_distance_and_a_copy_of_a_model_has_its_own():
    model, (embeddings, labels) = Model(), clusters(60, 6)
    pair = torch.nn.ModuleDict({"metrics": model.metrics, "distance": model.distance})
    cloned, copied = model.metrics.clone(), copy.deepcopy(pair)
    torch.nn.init.constant_(copied["distance"].weight[1:].detach(), 0.0)
    every = (model.metrics, cloned, copied["metrics"])
    before, same, without = (one.update(embeddings, labels) or plain(one.compute()) for one in every)
    assert before == same
    assert before != without
    torch.nn.init.constant_(model.distance.weight[1:].detach(), 0.0)
    assert plain(model.metrics.compute()) == plain(cloned.compute()) == without


def test_any_k_may_be_asked(expected):
    embeddings, labels, figures = expected
    found = plain(fed(embeddings, labels, recall_at=(1, 3, 40)).compute())
    assert found["recall_at_1"] == pytest.approx(figures["recall_at_1"])
    assert found["recall_at_1"] < found["recall_at_3"] < found["recall_at_40"]
    assert "precision_at_3" in found
    assert "precision_at_40" not in found


def test_of_a_sample_that_comes_again_the_first_counts(expected):
    embeddings, labels, figures = expected
    metrics = EmbeddingMetrics(CosineSimilarity())
    metrics.update(embeddings, labels, torch.arange(170))
    metrics.update(-embeddings[:7], labels[:7], torch.arange(7))
    assert plain(metrics.compute()) == pytest.approx(figures, abs=1e-12)


def test_queries_are_compared_with_the_gallery_alone(expected):
    embeddings, labels, figures = expected
    metrics, gallery = EmbeddingMetrics(CosineSimilarity()), labels % 5 + torch.arange(170) % 4 > 3
    for rows in torch.arange(170).split(50):
        metrics.update(embeddings[rows], labels[rows], gallery=gallery[rows])
    found = plain(metrics.compute())
    assert found == pytest.approx(against_gallery(embeddings, labels, gallery), abs=1e-12)
    assert found != pytest.approx(figures, abs=1e-3)
    for gallery in (torch.ones(170, dtype=torch.bool), torch.zeros(170, dtype=torch.bool)):
        metrics.reset()
        metrics.update(embeddings, labels, gallery=gallery)
        with pytest.raises(ValueError, match="judging needs a query with a sample of its class, and one of another, in the gallery"):
            metrics.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_what_cannot_be_judged_is_named():
    metrics = EmbeddingMetrics(CosineSimilarity())
    metrics.update(torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]), torch.tensor([0, 0]), torch.tensor([30, 41]))
    with pytest.raises(ValueError, match=r"1 of 2 .* 41$"):
        metrics.compute()
    metrics.reset()
    metrics.update(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="two samples"):
        metrics.compute()
    metrics.update(torch.eye(3), torch.arange(3), torch.tensor([5, 5, 5]))
    metrics.update(torch.full((2, 3), torch.inf), torch.tensor([7, 7]), torch.tensor([5, -1]))
    with pytest.raises(ValueError, match=r"1 of 5 .* 7$"):  # three without numbers, one of number 5, and the eighth
        metrics.compute()
    for numbers in (None, torch.arange(2)):
        with pytest.raises(ValueError, match=r"\[3, 3\], \[2\]"):
            metrics.update(torch.eye(3), torch.arange(2), numbers)
    with pytest.raises(ValueError, match="0 samples of 0 classes"):
        EmbeddingMetrics(CosineSimilarity()).compute()
    pairs = PairMetrics()
    with pytest.raises(ValueError, match="0 pairs"):
        pairs.compute()
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        pairs.update(torch.rand(2), torch.tensor([True, False, True]))


def test_names_take_a_prefix(expected):
    embeddings, labels, figures = expected
    assert fed(embeddings, labels, prefix="val/").compute().keys() == {f"val/{name}" for name in figures}
    pairs = PairMetrics(prefix="lfw/", threshold=0.5)
    pairs(torch.rand(8).requires_grad_(), torch.arange(8) < 4)
    assert pairs.compute()["lfw/threshold"] == 0.5


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.distance, self.layer = LearnedDistance(6), torch.nn.Linear(6, 6)
        self.metrics, self.seen = EmbeddingMetrics(self.distance), []

    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean() + self.distance.weight.square().mean()

    def validation_step(self, batch, _):
        self.metrics.update(self.layer(batch[0]), batch[1])

    def on_validation_epoch_end(self):
        expected = plain(evaluate(self.layer(self.data[0]), self.data[1], self.distance, ways=(), certainty=False).figures)
        self.seen.append((plain(self.metrics.compute()), expected))
        self.metrics.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_module_of_ones_own_they_follow_the_distance_and_add_nothing_to_its_state(expected, tmp_path):
    model, (embeddings, labels, _) = Model(), expected
    model.data = embeddings, labels
    assert set(model.state_dict()) == {"distance.weight", "layer.weight", "layer.bias"}
    assert len(list(model.parameters())) == 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(embeddings, labels), batch_size=64)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 2}
    L.Trainer(**options, default_root_dir=tmp_path, enable_model_summary=False, num_sanity_val_steps=0).fit(model, loader, loader)
    assert len(model.seen) == 2
    for found, figures in model.seen:
        assert found == pytest.approx(figures, abs=1e-6)
    assert model.seen[0][0] != model.seen[1][0]


class Stops(L.Callback):
    def on_validation_batch_end(self, *_):
        raise RuntimeError("stopped")


def test_the_validation_of_a_run_is_evaluate_even_after_one_that_was_interrupted(tmp_path):
    embeddings, labels = clusters(90, 6)
    encoder = {"_target_": "siamese.encoders.MLP", "input_shape": [embeddings.shape[1]], "hidden": [8], "embedding_size": 6}
    parts = {"distance": {"_target_": "siamese.distances.LearnedDistance"}, "preprocessing": {"_target_": "torch.nn.Identity"}}
    module = SiameseModule(Bundle({"encoder": encoder, **parts}, trust=("torch",)), torch.nn.Identity())
    keys = set(module.state_dict())
    batches = [Batch(embeddings[rows], labels[rows], None) for rows in torch.arange(90).split(40)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with pytest.raises(RuntimeError, match="stopped"):
        L.Trainer(**options, default_root_dir=tmp_path, callbacks=[Stops()]).validate(module, loader, verbose=False)
    assert sum(map(len, module.metrics.labels)) == 40, "else this test tests nothing"
    found = L.Trainer(**options, default_root_dir=tmp_path).validate(module, loader, verbose=False)[0]
    embedded = torch.cat([module.eval().model(batch.inputs) for batch in batches])
    figures = plain(evaluate(embedded, labels, module.model.distance, ways=(), certainty=False).figures)
    assert found == {f"val/{name}": float(np.float32(value)) for name, value in figures.items()}
    assert set(module.state_dict()) == keys == {f"model.{name}" for name in module.model.state_dict()}
    assert module.metrics.labels == []


def test_scores_outside_0_and_1_are_taken_as_they_are():
    """torchmetrics passes a batch with a negative score through a sigmoid, and one without not: sorted batches end in disorder."""
    embeddings, labels = clusters(150, 12, noise=0.6)
    unit = normalize(embeddings)
    left, right = np.triu_indices(150, 1)
    scores, same = (unit @ unit.T)[left, right], labels[left] == labels[right]
    order = scores.argsort()
    theirs, ours = BinaryAUROC(), PairMetrics()
    for rows in order.split(500):
        theirs.update(scores[rows], same[rows].int())
        ours.update(scores[rows], same[rows])
    auc = roc_auc_score(same, scores)
    assert abs(theirs.compute() - auc) > 0.02
    figures = plain(ours.compute())
    assert figures["auc"] == pytest.approx(auc, abs=1e-6)
    assert figures["average_precision"] == pytest.approx(average_precision_score(same, scores), abs=1e-5)
    whole = plain(evaluate(embeddings, labels, CosineSimilarity(), ways=(), certainty=False).figures)
    assert figures == pytest.approx({name: whole[name] for name in figures}, abs=1e-5)


@pytest.mark.parametrize("kind", ["ties", "no ties", "few same"])
def test_the_accuracy_over_folds_is_that_of_loops(kind):
    generator = torch.Generator().manual_seed(0)
    same, folds = torch.rand(300, generator=generator) < 0.4, torch.arange(300) % 10
    if kind == "few same":
        same = torch.arange(300) % 37 == 0
    scores = same + torch.randn(300, generator=generator)
    if kind == "ties":
        scores = scores.mul(4).round() / 4
    rates = []
    for fold in range(10):
        inside = folds == fold
        thresholds = [*scores[~inside].unique(), torch.tensor(torch.inf)]
        choices = [((scores[~inside] >= t) == same[~inside]).double().mean().item() for t in thresholds]
        threshold = thresholds[int(np.argmax(choices))]
        rates.append(((scores[inside] >= threshold) == same[inside]).double().mean().item())
    figures, notes, (far, tar, _) = evaluate_pairs(scores, same, folds)
    assert figures["accuracy_10fold"] == pytest.approx(np.mean(rates))
    assert figures["accuracy_10fold_se"] == pytest.approx(np.std(rates, ddof=1) / 10**0.5)
    assert (far[0], tar[0], far[-1], tar[-1]) == (0, 0, 1, 1)
    assert any(note.startswith("tar_at_far_1e2") for note in notes)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_scale_of_scores_does_not_matter_but_what_rounding_tells_apart_is_equal(scale):
    embeddings, labels = clusters(100, 8)
    left, right = np.triu_indices(100, 1)
    scores, same = -torch.cdist(embeddings, embeddings)[left, right], labels[left] == labels[right]
    assert evaluate_pairs(scores * scale, same)[0]["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-5)
    alike = torch.nn.Parameter(torch.where(same, 1 + 1e-7, 1.0) * scale)
    assert evaluate_pairs(alike, same)[0]["auc"] == 0.5


@pytest.mark.parametrize(
    ("scores", "same", "folds", "said"),
    [
        ([0.1, 0.2], [True, True], None, "some must be the same and some different"),
        ([0.1, float("nan")], [True, False], None, "among them 1"),
        ([0.1, 0.2, 0.3], [True, False, False], [0, 1, 1], "outside fold 0"),
        ([0.1, 0.2], [True, False], [3, 3], "0 pairs outside fold 3"),
        ([0.1, 0.2], [True, False], [0, 1, 1], "one of each"),
    ],
)
def test_pairs_that_tell_nothing_are_refused(scores, same, folds, said):
    with pytest.raises(ValueError, match=said):
        evaluate_pairs(torch.tensor(scores), torch.tensor(same), None if folds is None else torch.tensor(folds))


def worker(rank: int, world: int, folder: Path) -> None:
    """One process; what it finds it leaves in a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    patience = datetime.timedelta(seconds=20)
    torch.distributed.init_process_group("gloo", f"file://{folder}/{world}", patience, world, rank)
    embeddings, labels = clusters(170, 12)
    mine = torch.arange(170)[rank::world]
    rows = torch.cat([mine, torch.zeros(rank, dtype=torch.int64)])  # as a DistributedSampler shares them, and one sample again

    metrics, found = EmbeddingMetrics(CosineSimilarity()), {}
    for some in rows.split(30):
        metrics.update(embeddings[some] * (1 if rank == 0 else 1 - 2 * (some == 0).float()[:, None]), labels[some], some)
    metrics.sync()
    found["shared out"] = plain(metrics.compute())
    metrics.unsync()
    assert sum(map(len, metrics.embeddings)) == len(rows), "embeddings stay where they are"

    metrics.reset()
    for some in mine.split(60 if rank else 25):  # more batches on one rank than on the others, and no figures of each
        assert metrics(embeddings[some], labels[some]) is None
    found["no numbers"] = plain(metrics.compute())
    if rank == 0:
        metrics.update(embeddings[:1], labels[:1])
    found["one more"] = plain(metrics.compute())

    idle, pairs = EmbeddingMetrics(CosineSimilarity()), PairMetrics()
    if rank < world - 1 or world == 1:  # the last has nothing
        share = torch.arange(170)[rank :: max(world - 1, 1)]
        idle.update(embeddings[share].bfloat16(), labels[share])
        pairs.update(embeddings[share, 0], labels[share] < 5)
    found["idle"], found["pairs"] = plain(idle.compute()), plain(pairs.compute())
    found["pairs again"] = plain(pairs.compute())

    parted, roles = EmbeddingMetrics(CosineSimilarity()), torch.arange(170) % 3 == 0  # of three ranks the first has the gallery alone
    for some in rows.split(30):
        parted.update(embeddings[some], labels[some], some, roles[some])
    found["roles"] = plain(parted.compute())
    if rank == 0:
        parted.update(embeddings[:1], labels[:1])
    with pytest.raises(ValueError, match="gallery was given with some samples and not with others"):
        parted.compute()

    for numbers in (None, mine):
        idle.reset()
        idle.update(torch.where(mine == world - 1, torch.nan, embeddings[mine].T).T, labels[mine], numbers)
        with pytest.raises(ValueError, match="1 of 170") as raised:
            idle.compute()
        found[f"said {numbers is None}"] = str(raised.value).rpartition("among them ")[2]
    torch.save(found, folder / f"{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_over_processes_the_figures_are_those_of_one_and_all_raise_what_one_must(expected, tmp_path, world):
    embeddings, labels, figures = expected
    server = multiprocessing.get_context("forkserver")  # which conftest has made ready
    started = [server.Process(target=worker, args=(rank, world, tmp_path)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()  # one that still waits for another
        process.join()
    assert [process.exitcode for process in started] == [0] * world
    all_found = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    assert all(found == all_found[0] for found in all_found)
    found = all_found[0]
    assert found["shared out"] == pytest.approx(figures, abs=1e-12)
    assert found["no numbers"] == pytest.approx(figures, abs=1e-12)
    assert found["roles"] == pytest.approx(against_gallery(embeddings, labels, torch.arange(170) % 3 == 0), abs=1e-12)
    rows = torch.tensor([*range(170), 0])
    assert found["one more"] == pytest.approx(plain(fed(embeddings[rows], labels[rows]).compute()), abs=1e-12)
    assert found["idle"] == pytest.approx(plain(fed(embeddings.bfloat16(), labels).compute()), abs=1e-12)
    assert found["pairs"] == found["pairs again"] == pytest.approx(evaluate_pairs(embeddings[:, 0], labels < 5)[0], abs=1e-12)
    assert found["said True"] == ("0" if world == 1 else f"0 of rank {world - 1}")
    assert found["said False"] == str(world - 1)
