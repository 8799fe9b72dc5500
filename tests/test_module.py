"""Training: every combination that the configuration allows learns, and what watches over it speaks up when it should."""

import functools
import logging
import math
import re

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss, ContrastiveLoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn

from siamese import judging
from siamese.bundle import Bundle
from siamese.callbacks import Health, ValidateLastEpoch
from siamese.config import InputError, build, compose, partial, rates, resolve
from siamese.data.augmentation import Augment
from siamese.data.glyphs import Glyphs
from siamese.data.module import SiameseData
from siamese.data.samples import Batch, Samples, Source
from siamese.data.sampling import balanced, pairs, triplets
from siamese.evaluation import evaluate
from siamese.miners import ScheduledMiner
from siamese.module import SiameseModule, health

MLP = {"_target_": "siamese.encoders.MLP", "input_shape": [1, 32, 32], "hidden": [64], "embedding_size": 16}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class SomeGlyphs(Source):
    """The first forty letters of each split, so that a test takes half a second."""

    def split(self, name: str) -> Samples:
        samples = Glyphs().split(name)
        few = samples.labels < 40
        ids = [i for i, kept in zip(samples.ids, few.tolist(), strict=True) if kept]
        return Samples(samples.inputs[few], samples.labels[few], samples.class_names[:40], ids)


@pytest.fixture(scope="module")
def source() -> SomeGlyphs:
    return SomeGlyphs()


def assembled(source: Source, *overrides: str) -> tuple[SiameseModule, SiameseData, dict]:
    """What train.py builds of a configuration, with a small encoder."""
    config = compose(["sampling.classes=16", *overrides])
    torch.manual_seed(0)
    data = SiameseData(source, partial(config, "sampling"), config["seed"])
    preprocessing = {"_target_": "siamese.bundle.Standardize", **data.standardization()}
    model = Bundle({"encoder": MLP, "distance": resolve(config, "distance"), "preprocessing": preprocessing})
    miner = build(config, "miner", distance=model.distance)
    loss = build(config, "loss", num_classes=40, embedding_size=16, distance=model.distance, miner=miner)
    options = {"optimizer": partial(config, "optimizer"), "rates": rates(config)}
    return SiameseModule(model, loss, miner, **options), data, config


def module_of(loss: nn.Module, distance: dict | None = None, **options) -> SiameseModule:
    torch.manual_seed(0)
    distance = distance or {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"}
    parts = {"encoder": MLP, "distance": distance, "preprocessing": {"_target_": "siamese.bundle.Standardize"}}
    return SiameseModule(Bundle(parts), loss, **options)


def trainer(**options) -> L.Trainer:
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, use_distributed_sampler=False, **{**QUIET, **options})


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "learned"])
def test_loss_and_miner_measure_with_the_runs_distance(source, distance):
    for loss in ("contrastive", "triplet"):
        module, *_ = assembled(source, f"loss={loss}", f"distance={distance}", "miner=hard")
        assert module.loss.distance is module.model.distance is module.miner.distance


def test_tuples_of_a_batch_come_before_those_of_the_miner(source):
    module = module_of(TripletMarginLoss(), miner=TripletMarginMiner())
    batch = next(iter(triplets(source.split("train"), 0, batch_size=8)))
    embedded = torch.randn(24, 16)
    assert module.tuples(batch, embedded) is batch.tuples
    mined = module.tuples(Batch(batch.inputs, batch.labels), embedded)
    assert all(torch.equal(a, b) for a, b in zip(mined, module.miner(embedded, batch.labels), strict=True))
    assert module_of(TripletMarginLoss()).tuples(Batch(batch.inputs, batch.labels), embedded) is None


# Optimizer and schedule


def test_the_directions_of_arcface_are_trained_at_a_rate_of_their_own(source, tmp_path):
    module, data, config = assembled(source, "loss=arcface")
    assert config["loss"]["lr"] != config["optimizer"]["lr"]
    before = module.loss.W.detach().clone()
    fitted = trainer(max_steps=4, limit_val_batches=0)
    fitted.fit(module, data)
    rates = {id(p): group["lr"] for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert rates[id(module.loss.W)] == config["loss"]["lr"]
    assert all(rates[id(p)] == config["optimizer"]["lr"] for p in module.model.parameters())
    assert len(rates) == len(list(module.parameters())), "every weight is trained, once"
    assert not torch.equal(module.loss.W, before)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["loss.W"], module.loss.W)


def test_without_a_rate_of_its_own_the_loss_takes_the_optimizers():
    module = module_of(ArcFaceLoss(40, 16), optimizer=functools.partial(torch.optim.SGD, lr=0.25))
    assert set(rates_of(module).values()) == {0.25}


def test_a_loss_without_weights_adds_no_group():
    assert len(module_of(TripletMarginLoss()).configure_optimizers().param_groups) == 1


class Rates(Callback):
    """The learning rate of each group at each step."""

    def __init__(self):
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "warmup"])
def test_a_schedule_gets_its_length_and_peaks_from_the_run(source, schedule):
    config = compose([f"scheduler={schedule}"])
    module = module_of(
        ArcFaceLoss(40, 16),
        optimizer=functools.partial(torch.optim.SGD, lr=0.01),
        scheduler=partial(config, "scheduler"),
        rates={"loss": 0.04},
    )
    data, rates = SiameseData(source, lambda samples, seed: balanced(samples, seed, 16, 4)), Rates()
    trainer(max_epochs=3, limit_val_batches=0, callbacks=[rates]).fit(module, data)
    first, second = torch.tensor(rates.seen).T
    assert len(first) == 3 * len(data.train_dataloader())
    assert second.tolist() == pytest.approx((4 * first).tolist(), rel=1e-3), "each group by its own peak"
    assert first.max() == pytest.approx(0.01, rel=0.02)
    assert first[-1] < 0.05 * first.max(), "it ends when the run does"
    assert (schedule != "cosine") == (first.argmax() > 0)


def rates_of(module: SiameseModule) -> dict[str, float]:
    """Parameter name -> learning rate."""
    names = {id(p): name for name, p in module.named_parameters()}
    groups = module.configure_optimizers().param_groups
    found = [(names[id(p)], group["lr"]) for group in groups for p in group["params"]]
    assert len(found) == len(names) == len(dict(found)), "every weight is trained, once"
    return dict(found)


# The encoder's layers: 0 flattens; 1, 2 and 3 are linear, batch-norm and ReLU; 4 is linear.
@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"layers.4": 10}, {"layers.4": 2.5}),
        ({"layers.1": 0.1, "layers.4": 0}, {"layers.1": 0.025, "layers.4": 0.0}),
        ({"layers.1": 2, "layers": 0.5}, {"layers": 0.125, "layers.1": 0.5}),
        ({"layers": 0.5, "layers.1": 2}, {"layers": 0.125, "layers.1": 0.5}),
    ],
)
def test_parts_of_the_encoder_have_rates_of_their_own(factors, expected):
    module = module_of(ArcFaceLoss(40, 16), optimizer=functools.partial(torch.optim.SGD, lr=0.25), rates={"loss": 0.75}, lr_factors=factors)
    for name, rate in rates_of(module).items():
        name = name.removeprefix("model.encoder.")
        inside = [part for part in expected if name.startswith(f"{part}.")]
        assert rate == (0.75 if name.startswith("loss.") else expected[max(inside, key=len)] if inside else 0.25), name


def test_the_encoder_and_a_loss_within_a_loss_have_rates_of_their_own(source):
    module, *_ = assembled(source, "loss=sum", "+loss.losses.second.lr=0.5", "distance=learned", "loss@loss.losses.second=bce")
    module.rates["model.encoder"] = 0.001
    found = rates_of(module)
    assert found["loss.losses.second.bias"] == 0.5
    assert found["model.distance.weight"] == 0.003
    assert {rate for name, rate in found.items() if name.startswith("model.encoder.")} == {0.001}


def test_a_schedule_scales_each_part_by_its_own_peak(source):
    module = module_of(
        ContrastiveLoss(),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        scheduler=partial(compose(["scheduler=warmup"]), "scheduler"),
        lr_factors={"layers.4": 0.1},
    )
    loader, rates = balanced(source.split("train"), 0, 16, 4), Rates()
    trainer(max_epochs=2, limit_val_batches=0, callbacks=[rates]).fit(module, loader)
    first, second = torch.tensor(rates.seen).T
    assert second.tolist() == pytest.approx((first / 10).tolist(), rel=1e-3)
    assert first.max() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("factor", ["small", None, -0.1, True, [1]])
def test_a_factor_that_multiplies_nothing_is_refused(factor):
    with pytest.raises(ValueError, match=r"lr_factors.layers=.* must be a number that multiplies the learning rate, such as 0.1"):
        module_of(ContrastiveLoss(), lr_factors={"layers": factor}).grouped_optimizer()


def test_a_factor_of_a_part_that_the_encoder_lacks_is_refused_before_training(fit, tmp_path):
    with pytest.raises(InputError, match=r"optimizer: the encoder has no part 'backbone' with weights: it has layers"):
        fit(tmp_path, "optimizer.lr_factors={backbone:0.1}")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheduler=warmup", "scheduler.warmup=5"], r"scheduler: warmup=5 is a share of the run's steps"),
        (["scheduler.pct_start=5.0"], r"scheduler: .*pct_start.*5"),
    ],
)
def test_values_that_a_schedule_refuses_end_before_training(fit, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, *overrides)
    assert not (tmp_path / "checkpoints").exists()


def test_the_seed_decides_the_run(source):
    def weights(seed: int) -> Tensor:
        module = module_of(ContrastiveLoss(), augmentation=Augment(rotation=10, shift=0.1), seed=seed)  # the same weights at first
        loader = balanced(source.split("train"), 0, 16, 4)
        trainer(max_steps=4).fit(module, loader)
        return nn.utils.parameters_to_vector(module.model.parameters())

    first = weights(0)
    torch.rand(17)  # whatever else has drawn from the global generator
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_every_step_is_augmented_anew(source):
    def seeds(seed: int) -> list[int]:
        seen = []

        def augmentation(inputs: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(generator.initial_seed())
            return inputs

        trainer(max_steps=6).fit(
            module_of(ContrastiveLoss(), augmentation=augmentation, seed=seed), balanced(source.split("train"), 0, 16, 4)
        )
        return seen

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 12


# Health


def by_loops(embeddings: Tensor, labels: list[int], apart) -> tuple[float, float, float]:
    """Mean positive and negative distance, and the spread."""
    places = range(len(labels))
    positive = [apart(embeddings[i], embeddings[j]) for i in places for j in places if i != j and labels[i] == labels[j]]
    negative = [apart(embeddings[i], embeddings[j]) for i in places for j in places if labels[i] != labels[j]]
    mean = sum(one / one.norm() for one in embeddings) / len(embeddings)
    return sum(positive) / len(positive), sum(negative) / len(negative), 1 - mean.norm().item()


@pytest.mark.parametrize(
    ("distance", "apart"),
    [
        (CosineSimilarity(), lambda a, b: 1 - (a @ b / a.norm() / b.norm()).item()),
        (LpDistance(), lambda a, b: (a / a.norm() - b / b.norm()).norm().item()),
        (LpDistance(normalize_embeddings=False), lambda a, b: (a - b).norm().item()),
    ],
    ids=["cosine", "sphere", "plain"],
)
def test_health_is_what_loops_find(distance, apart):
    embeddings = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    labels = [0, 0, 0, 0, 1, 1, 1, 2, 3]
    figures = health(embeddings, torch.tensor(labels), None, distance)
    positive, negative, spread = by_loops(embeddings, labels, apart)
    assert figures["train/positive_distance"] == pytest.approx(positive, abs=1e-5)
    assert figures["train/negative_distance"] == pytest.approx(negative, abs=1e-5)
    assert figures["train/spread"] == pytest.approx(spread, abs=1e-5)


def test_health_counts_tuples():
    labels = [0, 0, 0, 1, 1, 2]
    embeddings, distance = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), CosineSimilarity()
    places = range(6)
    every_pair = [(i, j) for i in places for j in places if i != j]
    every_triplet = [(a, p, n) for a, p in every_pair for n in places if labels[a] == labels[p] != labels[n]]

    def counted(tuples) -> tuple[float, float]:
        figures = health(embeddings, torch.tensor(labels), tuples, distance)
        return figures["train/mined_tuples"], figures["train/mined_fraction"]

    assert counted(None) == (len(every_pair), 1)
    everything = torch.tensor(every_triplet).T
    assert counted(tuple(everything)) == (len(every_triplet), 1)
    assert counted(tuple(everything[:, :5])) == (5, 5 / len(every_triplet))
    assert counted(tuple(everything[:, :0])) == (0, 0)
    positive = torch.tensor([(i, j) for i, j in every_pair if labels[i] == labels[j]]).T
    negative = torch.tensor([(i, j) for i, j in every_pair if labels[i] != labels[j]]).T
    assert counted((*positive, *negative)) == (len(every_pair), 1)
    assert counted((*positive[:, :2], *negative[:, :7])) == (9, 9 / len(every_pair))


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_without_labels_the_listed_tuples_say_what_is_near(kind):
    embeddings, unknown = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.full((6,), -1)
    apart = [[1 - nn.functional.cosine_similarity(a, b, 0).item() for b in embeddings] for a in embeddings]
    anchor, positive, negative = torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([5, 2])
    tuples = (anchor, positive, negative) if kind == "triplets" else (anchor, positive, anchor[:1], negative[:1])
    figures = health(embeddings, unknown, tuples, CosineSimilarity())
    far = [apart[0][5], apart[1][2]] if kind == "triplets" else [apart[0][5]]
    assert figures["train/positive_distance"] == pytest.approx((apart[0][3] + apart[1][4]) / 2, abs=1e-5)
    assert figures["train/negative_distance"] == pytest.approx(sum(far) / len(far), abs=1e-5)
    assert (figures["train/mined_tuples"], figures["train/mined_fraction"]) == (2 if kind == "triplets" else 3, 1)


def test_the_spread_tells_a_collapsed_space_from_a_full_one():
    labels = torch.arange(50).repeat(2)
    generator = torch.Generator().manual_seed(0)
    collapsed = torch.ones(100, 32) + 1e-3 * torch.randn(100, 32, generator=generator)
    full = torch.randn(100, 32, generator=generator)
    assert health(collapsed, labels, None, CosineSimilarity())["train/spread"] < 1e-4
    assert health(full, labels, None, CosineSimilarity())["train/spread"] > 0.8


class Figures(Callback):
    """Everything logged, step by step."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_the_active_fraction_is_the_share_of_triplets_that_violate_the_margin(source):
    module, seen = module_of(TripletMarginLoss(margin=0.2, distance=CosineSimilarity())), Figures()
    batch = next(iter(triplets(source.split("train"), 0, batch_size=40)))
    with torch.no_grad():
        anchor, positive, negative = nn.functional.normalize(module.model.train()(batch.inputs)).split(40)
    active = ((anchor * negative).sum(1) - (anchor * positive).sum(1) + 0.2 > 0).float().mean().item()
    assert 0 < active < 1
    trainer(max_steps=1, log_every_n_steps=1, callbacks=[seen]).fit(module, triplets(source.split("train"), 0, batch_size=40))
    assert seen.steps[0]["train/active_fraction"] == pytest.approx(active, abs=1e-6)
    assert seen.steps[0]["train/mined_tuples"] == 40


def test_health_is_logged_at_the_steps_that_are_logged(source):
    module, seen = module_of(ContrastiveLoss()), Figures()
    trainer(max_steps=7, log_every_n_steps=3, callbacks=[seen]).fit(module, balanced(source.split("train"), 0, 16, 4))
    losses = [float(step.get("train/loss", -1)) for step in seen.steps]
    assert len(set(losses[2:5])) == 1, "the last one known"
    assert len({losses[0], *losses[4:]}) == 4, "and that of the last step"
    spreads = [step.get("train/spread") for step in seen.steps]
    assert spreads[:2] == [None, None]
    assert len(set(spreads[2:5])) == len(set(spreads[5:])) == 1
    assert spreads[2] != spreads[5]


# Callbacks


def collapse(module: SiameseModule) -> SiameseModule:
    """All inputs on one point, and no way out of it."""
    last = module.model.encoder.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)
    module.make_optimizer = functools.partial(torch.optim.SGD, lr=0.0)
    return module


@pytest.mark.parametrize(("collapsed", "warnings"), [(True, 1), (False, 0)])
def test_a_collapsed_space_is_said_once(source, caplog, collapsed, warnings):
    module = module_of(ContrastiveLoss())
    module = collapse(module) if collapsed else module
    with caplog.at_level(logging.WARNING):
        trainer(max_steps=20, log_every_n_steps=2, callbacks=[Health(patience=6)]).fit(module, balanced(source.split("train"), 0, 16, 4))
    messages = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert len(messages) == warnings
    assert all(message.startswith("step 6:") for message in messages), "as soon as its patience ends"


def test_an_encoder_is_given_time_to_unfold(source, caplog):
    with caplog.at_level(logging.WARNING):
        loader = balanced(source.split("train"), 0, 16, 4)
        trainer(max_steps=8, log_every_n_steps=1, callbacks=[Health(patience=9)]).fit(collapse(module_of(ContrastiveLoss())), loader)
    assert "collapsed" not in caplog.text


@pytest.mark.parametrize(("batches", "remarks"), [(1, 0), (4, 1)])
def test_accumulated_gradients_are_no_larger_pool(source, caplog, batches, remarks):
    with caplog.at_level(logging.WARNING):
        options = {"accumulate_grad_batches": batches, "max_steps": 1, "callbacks": [Health()]}
        trainer(**options).fit(module_of(ContrastiveLoss()), balanced(source.split("train"), 0, 16, 4))
    assert (
        caplog.text.count("trainer.accumulate_grad_batches=4 adds up gradients") == caplog.text.count("accumulate_grad_batches") == remarks
    )


class Validations(Callback):
    """The epochs after which there was a validation, and its figures."""

    def __init__(self):
        self.epochs: list[int] = []
        self.figures: dict[str, float] = {}

    def on_validation_end(self, trainer, *_):
        self.epochs.append(trainer.current_epoch)
        self.figures = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.parametrize(("epochs", "every", "expected"), [(4, 3, [2, 3]), (4, 2, [1, 3]), (2, 5, [1]), (3, 1, [0, 1, 2])])
def test_the_last_epoch_is_validated_too(source, epochs, every, expected):
    data, seen = SiameseData(source, lambda samples, seed: balanced(samples, seed, 16, 4)), Validations()
    short = {"max_epochs": epochs, "check_val_every_n_epoch": every, "limit_train_batches": 1}
    trainer(callbacks=[ValidateLastEpoch(), seen], **short).fit(module_of(ContrastiveLoss()), data)
    assert seen.epochs == expected


# Validation


@pytest.mark.parametrize("loader", [balanced, pairs, triplets])
def test_validation_is_judging(source, loader):
    module, seen = module_of(ContrastiveLoss(distance=CosineSimilarity(), pos_margin=1, neg_margin=0.5)), Validations()
    make = functools.partial(loader, classes=16) if loader is balanced else loader
    data = SiameseData(source, lambda samples, seed: make(samples, seed))
    trainer(max_epochs=2, limit_train_batches=2, callbacks=[seen]).fit(module, data)
    expected = judging.judge(module.model, data, test=False)["val"].figures
    embedded = module.model.embed(data.val.inputs)
    assert expected == evaluate(embedded, data.val.labels, CosineSimilarity()).figures
    logged = dict(seen.figures)
    loss = logged.pop("val/loss", None)
    at_the_end = ("oneshot", "fewshot", "rank_1", "dir_at_far", "calibration")
    shared = {f"val/{name}": value for name, value in expected.items() if not name.startswith(at_the_end)}
    assert logged == pytest.approx(shared, abs=1e-5)
    assert (loss is None) == (loader is balanced), "where training forms its tuples, validation has the same loss"
    if loss is not None:
        fixed = make(data.val, seed=0)
        sums = [(module.loss(module.model.embed(b.inputs), b.labels, b.tuples).item(), len(b.inputs)) for b in fixed]
        assert loss == pytest.approx(sum(value * count for value, count in sums) / sum(count for _, count in sums), rel=1e-3)


def test_a_run_that_is_not_tested_reads_no_test_split(source):
    class Untested(SomeGlyphs):
        def split(self, name: str) -> Samples:
            assert name != "test"
            return super().split(name)

    data = SiameseData(Untested(), lambda samples, seed: balanced(samples, seed, 16, 4))
    trainer(max_steps=2).fit(module_of(ContrastiveLoss()), data)


def test_standardization_is_that_of_the_training_inputs(source):
    data = SiameseData(source, lambda samples, seed: balanced(samples, seed, 16, 4))
    fractions = source.split("train").inputs.double() / 255
    found = data.standardization()
    assert found["mean"] == pytest.approx([fractions.mean().item()])
    assert found["std"] == pytest.approx([fractions.std().item()])


def test_a_batch_without_positive_pairs_has_no_mean_of_them():
    tuples = (*torch.empty(2, 0, dtype=torch.long), *torch.tensor([[0], [1]]))
    figures = health(torch.randn(2, 4), torch.tensor([-1, -1]), tuples, CosineSimilarity())
    assert "train/positive_distance" not in figures
    assert math.isfinite(figures["train/negative_distance"])


def test_a_miner_that_finds_nothing_is_said_once(source, caplog):
    class Nothing(nn.Module):
        def forward(self, *_):
            return tuple(torch.empty(3, 0, dtype=torch.long))

    with caplog.at_level(logging.WARNING):
        fitting = trainer(max_steps=9, log_every_n_steps=1, callbacks=[Health(patience=4)])
        fitting.fit(module_of(TripletMarginLoss(), miner=Nothing()), balanced(source.split("train"), 0, 16, 4))
    assert caplog.text.count("the miner found no tuples") == 1
    assert "step 4: the miner found no tuples" in caplog.text


def test_a_stage_that_starts_after_the_end_is_said(source, caplog):
    miner = ScheduledMiner({"early": None, "late": TripletMarginMiner()}, {"early": 0, "late": 3})
    loader = balanced(source.split("train"), 0, 16, 4)
    for epochs, remarks in ((3, 1), (4, 1)):  # of the second run nothing more
        with caplog.at_level(logging.WARNING):
            trainer(max_epochs=epochs, limit_train_batches=1).fit(module_of(TripletMarginLoss(), miner=miner), loader)
        assert caplog.text.count("miner stage late starts at epoch 3, the run ends before it") == remarks


def test_the_stage_of_a_scheduled_miner_is_that_of_the_epoch_and_logged(source):
    miner, seen = ScheduledMiner({"early": None, "late": TripletMarginMiner()}, {"early": 0, "late": 2}), Figures()
    trainer(max_epochs=3, limit_train_batches=1, log_every_n_steps=1, callbacks=[seen]).fit(
        module_of(TripletMarginLoss(), miner=miner), balanced(source.split("train"), 0, 16, 4)
    )
    assert [step["train/miner_stage"] for step in seen.steps] == [0, 0, 1]
    assert [step["train/mined_fraction"] < 1 for step in seen.steps] == [False, False, True]


def test_a_miner_that_draws_draws_by_seed_epoch_and_batch_alone(source):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, *_):
            self.seen.append(torch.rand(1).item())

    def drawn(seed: int, noise: int) -> list[float]:
        miner = Draws()
        module = module_of(ContrastiveLoss(), miner=miner, seed=seed)
        torch.rand(noise)
        trainer(max_epochs=2, limit_train_batches=2).fit(module, balanced(source.split("train"), 0, 16, 4))
        return miner.seen

    assert drawn(0, noise=0) == drawn(0, noise=7)
    assert len({*drawn(0, 0), *drawn(1, 0)}) == 8


def test_health_counts_the_tuples_that_a_memory_brings(source):
    module, data, _ = assembled(source, "loss=xbm", "loss.memory_size=640", "miner=hard")
    seen = Figures()
    module.miner = None  # the memory has it, as train.py arranges
    trainer(max_steps=3, limit_val_batches=0, log_every_n_steps=1, callbacks=[seen]).fit(module, data)
    assert all(step["train/mined_tuples"] < 64 * 63 for step in seen.steps)
    assert seen.steps[-1]["train/mined_tuples"] == module.loss.used
    assert "train/mined_fraction" not in seen.steps[-1]


def test_a_rehearsal_leaves_no_trace(source):
    module, data, _ = assembled(source, "loss=xbm", "loss.memory_size=640", "miner=distance_weighted")
    module.miner, batch = None, next(iter(data.train_dataloader()))
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in module.state_dict().items() if "extra" not in name}
    module.rehearse(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert module.loss.queue_idx == 0
    assert all(p.grad is None for p in module.parameters())


class Broken(Source):
    """Rows of numbers, one of which is none."""

    def split(self, name: str) -> Samples:
        inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        inputs[13] = torch.inf
        return Samples(inputs, torch.arange(40) // 5, list("abcdefgh"), [f"table.csv, row {row}" for row in range(40)])


@pytest.mark.parametrize("loader", [balanced, pairs])
def test_a_loss_that_is_no_number_names_the_samples_that_it_comes_from(loader, caplog):
    parts = {
        "encoder": {"_target_": "siamese.encoders.MLP", "input_shape": [5], "hidden": [], "embedding_size": 3},
        "distance": {"_target_": "pytorch_metric_learning.distances.LpDistance"},
        "preprocessing": {"_target_": "siamese.bundle.Standardize"},
    }
    data = SiameseData(Broken(), functools.partial(loader, **({"classes": 8} if loader is balanced else {})))
    module = SiameseModule(Bundle(parts), ContrastiveLoss())
    trainer(max_epochs=4, limit_val_batches=0, log_every_n_steps=1).fit(module, data)
    told = [message for message in caplog.messages if "training cannot recover from this" in message]
    assert len(told) == 1
    assert re.search(r"embeddings of [12] of \d+ samples are not finite, such as table.csv, row 13", told[0])


@pytest.mark.parametrize("loader", [balanced, pairs, triplets])
def test_a_batch_says_where_its_inputs_come_from(source, loader):
    samples = source.split("train")
    for batch in loader(samples, seed=0):
        assert torch.equal(samples.inputs[batch.rows], batch.inputs)
        assert torch.equal(samples.labels[batch.rows], batch.labels)
    assert torch.equal(samples[samples.labels == 3].rows, (samples.labels == 3).nonzero().flatten())


def test_a_step_draws_what_torch_would_draw_of_the_same_seed():
    """Figures that are published stay what they are."""
    module_of(ContrastiveLoss())._seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
