"""Batches, pairs and triplets: what they promise, over sizes that hypothesis draws."""

import logging
import math
import threading
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, TripletMarginLoss
from torch.utils.data import DataLoader

from siamese.data.module import Ahead, SiameseData
from siamese.data.samples import Samples
from siamese.data.sampling import BalancedBatchSampler, PairDataset, TripletDataset, balanced, pairs, triplets


def labelled(sizes: list[int]) -> torch.Tensor:
    """Labels of classes of these sizes, in an order that has nothing to do with them."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(len(labels)))]


def numbered(sizes: list[int]) -> Samples:
    """Samples whose input is their own index, so that a batch tells what is in it."""
    labels = labelled(sizes)
    inputs = torch.arange(len(labels)).float().view(-1, 1)
    return Samples(inputs, labels, [f"class {c}" for c in range(len(sizes))], [str(i) for i in range(len(labels))])


@st.composite
def samplers(draw):
    """(labels, P, K, a sampler of them)."""
    sizes = draw(st.lists(st.integers(1, 11), min_size=2, max_size=12))
    classes, per_class = draw(st.integers(2, len(sizes))), draw(st.integers(2, 5))
    labels = labelled(sizes) * 3 + 4  # labels need not be consecutive
    return labels, classes, per_class, BalancedBatchSampler(labels, classes, per_class, draw(st.integers(0, 5)))


def draws(sampler: BalancedBatchSampler, epochs: int) -> np.ndarray:
    """[draws, K] indices, one row for each class of each batch."""
    return np.concatenate([sampler.batches(epoch) for epoch in range(epochs)]).reshape(-1, sampler.samples_per_class)


# Balanced batches


@given(samplers())
@settings(deadline=None)
def test_a_batch_has_p_different_classes_of_k_samples(case):
    labels, classes, per_class, sampler = case
    for epoch in range(4):
        for batch in sampler.batches(epoch):
            found, counts = labels[batch].unique(return_counts=True)
            assert len(found) == classes
            assert (counts == per_class).all()


@given(samplers())
@settings(deadline=None)
def test_a_draw_is_of_one_class_and_repeats_only_in_small_classes(case):
    labels, _, per_class, sampler = case
    for draw in draws(sampler, 6):
        size = int((labels == labels[draw[0]]).sum())
        assert (labels[draw] == labels[draw[0]]).all()
        assert len(set(draw.tolist())) == min(size, per_class)


@given(samplers())
@settings(deadline=None)
def test_an_epoch_has_as_many_batches_as_cover_the_samples(case):
    labels, classes, per_class, sampler = case
    assert len(sampler) == len(list(sampler)) == math.ceil(len(labels) / (classes * per_class))


@given(samplers())
@settings(deadline=None)
def test_classes_come_equally_often(case):
    labels, _, _, sampler = case
    drawn = dict.fromkeys(labels.tolist(), 0)
    for epoch in range(8):
        for first in sampler.batches(epoch).reshape(-1, sampler.samples_per_class)[:, 0]:
            drawn[int(labels[first])] += 1
        assert max(drawn.values()) - min(drawn.values()) <= 1, f"after epoch {epoch}"


@given(samplers())
@settings(deadline=None)
def test_every_sample_comes_within_the_draws_that_a_class_needs(case):
    """Of each ceil(size / K) draws of a class that follow each other, from its first on, every sample is in one, and no sample in two
    unless the last draw had to be filled up."""
    labels, _, per_class, sampler = case
    by_class: dict[int, list[np.ndarray]] = {}
    for draw in draws(sampler, 12):
        by_class.setdefault(int(labels[draw[0]]), []).append(draw)
    for label, rows in by_class.items():
        members = set((labels == label).nonzero().flatten().tolist())
        cycle = math.ceil(len(members) / per_class)
        for start in range(0, len(rows) - cycle + 1, cycle):
            handed_out = np.concatenate(rows[start : start + cycle]).tolist()
            assert set(handed_out) == members
            assert len(set(handed_out[: len(members)])) == len(members), "some came again before all had come"


@given(samplers())
@settings(deadline=None)
def test_every_sample_comes_within_so_many_epochs(case):
    labels, classes, per_class, sampler = case
    sizes = labels.unique(return_counts=True)[1]
    # The largest class needs so many draws; all classes have as many when all together have had that many each.
    needed = math.ceil(int(sizes.max()) / per_class) * len(sizes)
    epochs = math.ceil(needed / (len(sampler) * classes))
    assert set(draws(sampler, epochs).flatten().tolist()) == set(range(len(labels)))


@given(samplers(), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_nothing_is_stored_between_epochs(case, epoch):
    labels, classes, per_class, worn = case
    for earlier in range(epoch):
        worn.set_epoch(earlier)
        list(worn)
    worn.set_epoch(epoch)
    fresh = BalancedBatchSampler(labels, classes, per_class, worn.seed)
    fresh.set_epoch(epoch)
    assert list(fresh) == list(worn) == list(worn) == worn.batches(epoch).tolist()


def test_seed_and_epoch_decide_the_batches():
    labels = labelled([6, 7, 8, 9, 6, 7, 8, 9])
    seen = [BalancedBatchSampler(labels, 4, 3, seed).batches(epoch).tolist() for seed in (0, 1, 2) for epoch in (0, 1, 7)]
    assert len({str(batches) for batches in seen}) == len(seen)
    assert BalancedBatchSampler(labels, 4, 3, 2).batches(7).tolist() == seen[-1]


def test_samples_are_grouped_anew_each_time():
    """Drawn with the same K - 1 others again and again, a sample would see few of its class."""
    sampler = BalancedBatchSampler(labelled([8, 8, 8]), 3, 2)
    together = {frozenset(draw.tolist()) for draw in draws(sampler, 200)}
    assert len(together) == 3 * math.comb(8, 2)


def test_classes_of_a_batch_are_mixed_anew_each_time():
    labels = labelled([4] * 6)
    sampler = BalancedBatchSampler(labels, 2, 2)
    met = {frozenset(labels[batch].tolist()) for epoch in range(60) for batch in sampler.batches(epoch)}
    assert len(met) == math.comb(6, 2)


def test_small_classes_are_said_once(caplog):
    with caplog.at_level(logging.INFO):
        sampler = BalancedBatchSampler(labelled([2, 3, 4, 9]), 2, 4)
        draws(sampler, 3)
    assert [r.getMessage() for r in caplog.records] == ["2 of 4 classes have fewer than 4 samples: they repeat samples"]


def test_nothing_is_said_without_small_classes(caplog):
    with caplog.at_level(logging.INFO):
        draws(BalancedBatchSampler(labelled([4, 4, 9]), 2, 4), 3)
    assert not caplog.records


@pytest.mark.parametrize(("classes", "per_class", "key"), [(6, 2, "classes=6"), (1, 2, "classes=1"), (2, 1, "samples_per_class=1")])
def test_impossible_batches_are_refused(classes, per_class, key):
    with pytest.raises(ValueError, match=rf"sampling\.{key}"):
        BalancedBatchSampler(labelled([3] * 5), classes, per_class)


# Pairs and triplets


sizes_for_tuples = st.lists(st.integers(1, 9), min_size=2, max_size=8).filter(lambda sizes: max(sizes) > 1)


@given(sizes_for_tuples, st.floats(0, 1), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_pairs_are_what_they_say(sizes, fraction, seed, epoch):
    samples = numbered(sizes)
    dataset = PairDataset(samples, fraction, seed)
    dataset.set_epoch(epoch)
    assert len(dataset) == len(samples)
    for index in range(len(dataset)):
        (left, right), same = dataset[index]
        assert left != right
        assert same == (samples.labels[int(left)] == samples.labels[int(right)])
    inputs, labels, tuples, *_ = dataset[torch.arange(len(dataset))]
    count = len(dataset)
    assert inputs[:count].tolist() == [dataset[i][0][0].tolist() for i in range(count)]
    assert inputs[count:].tolist() == [dataset[i][0][1].tolist() for i in range(count)]
    assert (labels == samples.labels[inputs.flatten().long()]).all()
    anchor, positive, other, negative = tuples
    assert (labels[anchor] == labels[positive]).all()
    assert (labels[other] != labels[negative]).all()
    pairing = torch.cat([torch.stack([anchor, positive]), torch.stack([other, negative])], 1)
    assert pairing[0].sort().values.tolist() == list(range(count)), "every pair is in the tuples, once"
    assert (pairing[1] == pairing[0] + count).all()


@given(sizes_for_tuples, st.floats(0, 1))
@settings(deadline=None)
def test_the_positive_fraction_holds_in_every_stretch(sizes, fraction):
    dataset = PairDataset(numbered(sizes), fraction)
    same = np.array([dataset[i][1] for i in range(len(dataset))])
    assert abs(same.sum() - fraction * len(same)) <= 0.5 + 1e-9
    ahead = np.concatenate([[0.0], np.cumsum(same - fraction)])
    assert ahead.max() - ahead.min() <= 1 + 1e-9  # the largest deviation of any stretch


def test_a_quarter_of_positive_pairs_is_exactly_a_quarter():
    for fraction, expected in ((0, 0), (0.25, 30), (0.5, 60), (1, 120)):
        dataset = PairDataset(numbered([10] * 12), fraction)
        assert sum(dataset[i][1] for i in range(120)) == expected


def contents(dataset) -> list:
    return dataset[torch.arange(len(dataset))].inputs.flatten().tolist()


@pytest.mark.parametrize("kind", [PairDataset, TripletDataset])
def test_tuples_are_fresh_each_epoch_and_follow_from_seed_and_epoch(kind):
    samples = numbered([5, 6, 7, 8])
    dataset = kind(samples, seed=3)
    first = contents(dataset)
    assert contents(dataset) == first, "without set_epoch they stay"
    epochs = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        epochs.append(contents(dataset))
    assert epochs[0] == first
    assert len({str(epoch) for epoch in epochs}) == 4
    dataset.set_epoch(1)
    assert contents(dataset) == epochs[1]
    fresh = kind(samples, seed=3)
    fresh.set_epoch(3)
    assert contents(fresh) == epochs[3]
    assert contents(kind(samples, seed=4)) != first


def too_uneven(counts: np.ndarray) -> bool:
    """Pearson's chi-square beyond six standard deviations of what equally likely outcomes give."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() > freedom + 6 * math.sqrt(2 * freedom)


def test_partners_are_drawn_uniformly():
    samples = numbered([2, 4, 6, 1])
    labels, total, met = samples.labels, len(samples), np.zeros((len(samples), len(samples)), dtype=int)
    dataset = PairDataset(samples)
    for epoch in range(1_500):
        dataset.set_epoch(epoch)
        np.add.at(met, (dataset.left.numpy(), dataset.right.numpy()), 1)
    for left in range(total):
        same = (labels == labels[left]).numpy()
        assert (met[left, ~same] > 0).all(), "every sample of another class is reached"
        assert not too_uneven(met[left, ~same])
        partners = np.delete(met[left], left)[np.delete(same, left)]
        assert (partners > 0).all()
        if len(partners) > 1:
            assert not too_uneven(partners)


def test_triplets_draw_their_partners_uniformly():
    samples = numbered([2, 4, 6, 1])
    labels, total = samples.labels, len(samples)
    positives, negatives = np.zeros((total, total), dtype=int), np.zeros((total, total), dtype=int)
    dataset = TripletDataset(samples)
    for epoch in range(1_000):
        dataset.set_epoch(epoch)
        np.add.at(positives, (dataset.anchor.numpy(), dataset.positive.numpy()), 1)
        np.add.at(negatives, (dataset.anchor.numpy(), dataset.negative.numpy()), 1)
    for anchor in range(total):
        same = (labels == labels[anchor]).numpy()
        if same.sum() == 1:
            assert positives[anchor].sum() == negatives[anchor].sum() == 0
            continue
        assert not too_uneven(negatives[anchor, ~same])
        assert positives[anchor, anchor] == positives[anchor, ~same].sum() == negatives[anchor, same].sum() == 0
        if same.sum() > 2:
            assert not too_uneven(np.delete(positives[anchor], anchor)[np.delete(same, anchor)])


def test_every_sample_that_can_is_an_anchor_before_any_is_again():
    samples = numbered([2, 4, 6, 1, 1])
    able = [i for i, label in enumerate(samples.labels.tolist()) if (samples.labels == label).sum() > 1]
    dataset = TripletDataset(samples)
    assert sorted(dataset.anchor[: len(able)].tolist()) == able
    assert len(set(dataset.anchor[len(able) :].tolist())) == len(samples) - len(able)
    positives = PairDataset(samples, positive_fraction=1)
    assert sorted(positives.left[: len(able)].tolist()) == able


@given(sizes_for_tuples, st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_triplets_are_what_they_say(sizes, seed, epoch):
    samples = numbered(sizes)
    dataset = TripletDataset(samples, seed)
    dataset.set_epoch(epoch)
    count = len(dataset)
    assert count == len(samples)
    for index in range(count):
        anchor, positive, negative = (int(one) for one in dataset[index])
        assert anchor != positive
        assert samples.labels[anchor] == samples.labels[positive] != samples.labels[negative]
    inputs, labels, tuples, *_ = dataset[torch.arange(count)]
    assert [inputs[part].tolist() for part in tuples] == [[dataset[i][place].tolist() for i in range(count)] for place in range(3)]
    assert (labels == samples.labels[inputs.flatten().long()]).all()


def points(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(count))


def mean_of_positive(losses: list[float]) -> float:
    losses = [loss for loss in losses if loss > 0]
    return sum(losses) / len(losses)


def test_pairs_reach_the_contrastive_loss_as_pairs():
    dataset = PairDataset(numbered([4, 5, 6]), 0.4)
    batch = dataset[torch.arange(3, 15)]
    embeddings = points(24)
    alike = [dataset[i][1] for i in range(3, 15)]
    distances = (embeddings[:12] - embeddings[12:]).norm(dim=1).tolist()
    expected = mean_of_positive([d - 0.5 for d, same in zip(distances, alike, strict=True) if same])
    expected += mean_of_positive([3 - d for d, same in zip(distances, alike, strict=True) if not same])
    loss = ContrastiveLoss(pos_margin=0.5, neg_margin=3, distance=LpDistance(normalize_embeddings=False))
    assert loss(embeddings, batch.labels, batch.tuples).item() == pytest.approx(expected, rel=1e-4)


def test_triplets_reach_the_triplet_loss_as_triplets():
    batch = TripletDataset(numbered([4, 5, 6]))[torch.arange(2, 12)]
    anchor, positive, negative = points(30).split(10)
    violations = (anchor - positive).norm(dim=1) - (anchor - negative).norm(dim=1) + 0.3
    loss = TripletMarginLoss(margin=0.3, distance=LpDistance(normalize_embeddings=False))
    assert loss(points(30), batch.labels, batch.tuples).item() == pytest.approx(mean_of_positive(violations.tolist()), rel=1e-4)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=f"sampling.positive_fraction={fraction}"):
        PairDataset(numbered([3, 3]), fraction)


@pytest.mark.parametrize("kind", [PairDataset, TripletDataset])
@pytest.mark.parametrize("sizes", [[5], [1, 1, 1]])
def test_samples_without_pairs_are_refused(kind, sizes):
    with pytest.raises(ValueError, match="two classes, one of them with two samples"):
        kind(numbered(sizes))


@pytest.mark.parametrize("loader", [pairs, triplets])
def test_an_empty_batch_is_refused(loader):
    with pytest.raises(ValueError, match=r"sampling\.batch_size=0"):
        loader(numbered([3, 3]), seed=0, batch_size=0)


# Loaders


def images(sizes: list[int]) -> Samples:
    labels = labelled(sizes)
    inputs = torch.randint(256, (len(labels), 1, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Samples(inputs, labels, [str(c) for c in range(len(sizes))], [str(i) for i in range(len(labels))])


def test_loaders_give_batches_of_the_shape_asked_for():
    samples = images([5, 6, 7, 8])  # 26 samples
    batches = list(balanced(samples, seed=0, classes=3, samples_per_class=2))
    assert [tuple(batch.inputs.shape) for batch in batches] == [(6, 1, 4, 6)] * 5
    assert all(batch.tuples is None for batch in batches)
    batches = list(pairs(samples, seed=0, batch_size=8))
    assert [len(batch.inputs) for batch in batches] == [16, 16, 16, 4]
    assert [sum(len(part) for part in batch.tuples) for batch in batches] == [16, 16, 16, 4]
    batches = list(triplets(samples, seed=0, batch_size=8))
    assert [tuple(batch.inputs.shape) for batch in batches] == [(24, 1, 4, 6)] * 3 + [(6, 1, 4, 6)]
    assert all(len(batch.tuples) == 3 for batch in batches)
    for batch in batches:
        assert batch.inputs.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64
        assert batch.labels.shape == batch.inputs.shape[:1]


class Recorder(L.LightningModule):
    """Trains one number, and writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), {}

    def training_step(self, batch, _):
        self.seen.setdefault(self.current_epoch, []).append(batch.inputs.flatten().tolist())
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("sampling", ["balanced", "pairs", "triplets"])
def test_lightning_says_which_epoch_it_is(sampling):
    samples = numbered([5, 6, 7, 8])
    loader = {
        "balanced": lambda: balanced(samples, 2, classes=3, samples_per_class=2),
        "pairs": lambda: pairs(samples, 2, batch_size=8),
        "triplets": lambda: triplets(samples, 2, batch_size=8),
    }[sampling]
    module = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", max_epochs=3, use_distributed_sampler=False, **quiet).fit(module, loader())
    for epoch in range(3):
        fresh = loader()
        if sampling == "balanced":
            expected = fresh.sampler.batches(epoch).tolist()
        else:
            fresh.dataset.set_epoch(epoch)
            expected = [fresh.dataset[rows].inputs.flatten().tolist() for rows in torch.arange(26).split(8)]
        assert module.seen[epoch] == expected
    assert len({str(batches) for batches in module.seen.values()}) == 3


def test_a_batch_has_no_more_classes_than_there_are_and_the_log_says_so(caplog):
    labels = torch.arange(5).repeat(4)
    loader = balanced(Samples(torch.zeros(20, 1), labels, list("abcde"), [str(row) for row in range(20)]), seed=0)
    assert all(len(batch.labels.unique()) == 5 for batch in loader)
    assert caplog.messages == ["sampling.classes=32, but there are 5 training classes: batches have these 5"]


# For a GPU


def test_batches_made_ahead_are_those_of_the_loader(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda inputs: inputs + 0.5)
    loader = balanced(numbered([5] * 9), 0, 4, 3)
    ahead = Ahead(loader)
    assert len(ahead) == len(loader) > 2
    for epoch in range(3):
        ahead.sampler.set_epoch(epoch)
        made = list(ahead)
        assert len(made) == len(loader)
        for one, other in zip(made, loader, strict=True):
            assert torch.equal(one.inputs - 0.5, other.inputs), "each pinned once"
            assert torch.equal(one.labels, other.labels)
    for _ in ahead:
        break  # as when a run ends in the middle of an epoch
    assert len(list(ahead)) == len(loader)


def test_the_thread_pins_for_the_gpu_of_its_process(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.get_ident(), device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda inputs: seen.append((threading.get_ident(), "pinned")) or inputs)
    assert len(list(Ahead(balanced(numbered([5] * 9), 0, 4, 3)))) == seen.count((seen[0][0], "pinned"))
    assert seen[0] == (seen[0][0], 3)
    assert seen[0][0] != threading.get_ident()


@pytest.mark.parametrize(("device", "made"), [("cuda", Ahead), ("cpu", DataLoader)])
def test_a_run_on_a_gpu_has_its_batches_made_ahead(device, made):
    data = SiameseData(SimpleNamespace(split=lambda name: numbered([5] * 9)), partial(balanced, classes=4, samples_per_class=3))
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    assert type(data.train_dataloader()) is made


def test_what_goes_wrong_while_a_batch_is_made_ahead_is_said(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda inputs: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(Ahead(balanced(numbered([5] * 9), 0, 4, 3)))
