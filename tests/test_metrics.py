"""The torchmetrics are the figures of `evaluate`, however the samples come: in batches, merged, or over processes."""

import copy
import pickle
import socket
import subprocess
import sys
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

from siamese.distances import LearnedDistance
from siamese.evaluation import evaluate, evaluate_pairs
from siamese.metrics import EmbeddingMetrics, PairMetrics


def plain(figures: dict) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


@pytest.fixture
def expected():
    embeddings, labels = clusters(170, 12)
    return embeddings, labels, evaluate(embeddings, labels, CosineSimilarity(), ways=(), certainty=False).figures


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
    half = evaluate(embeddings[:60], labels[:60], CosineSimilarity(), ways=(), certainty=False).figures
    assert plain(metrics.compute()) == pytest.approx(half, abs=1e-12)


def test_copies_and_merged_halves_give_the_figures_of_the_whole(expected):
    embeddings, labels, figures = expected
    whole = fed(embeddings, labels)
    for copied in (whole.clone(), copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert plain(copied.compute()) == pytest.approx(figures, abs=1e-12)
    one, other = fed(embeddings[:80], labels[:80]), fed(embeddings[80:], labels[80:])
    one.merge_state(other)
    assert plain(one.compute()) == pytest.approx(figures, abs=1e-12)


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


def test_what_cannot_be_judged_is_named():
    metrics = EmbeddingMetrics(CosineSimilarity())
    metrics.update(torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]), torch.tensor([0, 0]), torch.tensor([30, 41]))
    with pytest.raises(ValueError, match=r"1 of 2 .* 41$"):
        metrics.compute()
    metrics.reset()
    metrics.update(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="two samples"):
        metrics.compute()


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
        expected = evaluate(self.layer(self.data[0]), self.data[1], self.distance, ways=(), certainty=False).figures
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
    whole = evaluate(embeddings, labels, CosineSimilarity(), ways=(), certainty=False).figures
    assert figures == pytest.approx({name: whole[name] for name in figures}, abs=1e-5)


def test_the_accuracy_over_folds_is_that_of_loops():
    generator = torch.Generator().manual_seed(0)
    same, folds = torch.rand(300, generator=generator) < 0.4, torch.arange(300) % 10
    scores = (same + torch.randn(300, generator=generator)).mul(4).round() / 4  # with many ties
    rates = []
    for fold in range(10):
        inside = folds == fold
        choices = [((scores[~inside] >= t) == same[~inside]).float().mean().item() for t in scores[~inside].unique()]
        threshold = scores[~inside].unique()[int(np.argmax(choices))]
        rates.append(((scores[inside] >= threshold) == same[inside]).double().mean().item())
    figures, notes, (far, tar, _) = evaluate_pairs(scores, same, folds)
    assert figures["accuracy_10fold"] == pytest.approx(np.mean(rates))
    assert figures["accuracy_10fold_se"] == pytest.approx(np.std(rates, ddof=1) / 10**0.5)
    assert (far[0], tar[0], far[-1], tar[-1]) == (0, 0, 1, 1)
    assert any(note.startswith("tar_at_far_1e2") for note in notes)


@pytest.mark.parametrize(
    ("scores", "same", "folds", "said"),
    [
        ([0.1, 0.2], [True, True], None, "some must be the same and some different"),
        ([0.1, float("nan")], [True, False], None, "among them 1"),
        ([0.1, 0.2, 0.3], [True, False, False], [0, 1, 1], "outside fold 0"),
    ],
)
def test_pairs_that_tell_nothing_are_refused(scores, same, folds, said):
    with pytest.raises(ValueError, match=said):
        evaluate_pairs(torch.tensor(scores), torch.tensor(same), None if folds is None else torch.tensor(folds))


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[5])
from test_evaluation import clusters
from pytorch_metric_learning.distances import CosineSimilarity
from siamese.metrics import EmbeddingMetrics, PairMetrics
torch.set_num_threads(1)
rank, world, port, to = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
embeddings, labels = clusters(170, 12)
rows = [*range(rank, 170, world), *[0] * (rank > 0)]  # as a DistributedSampler shares them, and one sample again
metrics, pairs = EmbeddingMetrics(CosineSimilarity()), PairMetrics()
for some in torch.tensor(rows).split(30):
    metrics.update(embeddings[some], labels[some], some)
held = sum(map(len, metrics.embeddings))
mine = torch.arange(170)[rank::world]
pairs.update(embeddings[mine, 0], labels[mine] < 5)
figures = {**metrics.compute(), **{f"pair {name}": value for name, value in pairs.compute().items()}}
assert sum(map(len, metrics.embeddings)) == held == len(rows)
torch.save({name: float(value) for name, value in figures.items()}, f"{to}/{world}-{rank}.pt")
dist.destroy_process_group()
"""


def test_over_processes_the_figures_are_those_of_one(expected, tmp_path):
    for world in (1, 2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = [str(world), port, str(tmp_path), str(Path(__file__).parent)]
        started = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments]) for rank in range(world)]
        assert [process.wait(120) for process in started] == [0] * world
    found = {path.stem: torch.load(path) for path in tmp_path.iterdir()}
    assert len(found) == 6
    for figures in found.values():
        assert figures == pytest.approx(found["1-0"], abs=1e-12)
    assert {name: value for name, value in found["1-0"].items() if "pair" not in name} == pytest.approx(expected[2], abs=1e-12)
