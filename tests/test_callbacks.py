"""What steps into training: parts that are frozen, and the average of the weights."""

import functools
import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pytorch_metric_learning.losses import ArcFaceLoss, ContrastiveLoss
from torch import Tensor, nn

from siamese.bundle import Bundle, load_checkpoint
from siamese.callbacks import EMA, Freeze, ProgressBar
from siamese.config import InputError, compose
from siamese.data.module import SiameseData
from siamese.data.samples import Samples, Source
from siamese.data.sampling import balanced
from siamese.evaluation import evaluate
from siamese.module import SiameseModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
ARCFACE = functools.partial(ArcFaceLoss, 8, 8)


class Noise(Source):
    """Eight classes of twelve noisy images each, other ones in each split."""

    def split(self, name: str) -> Samples:
        generator = torch.Generator().manual_seed(len(name))
        labels = torch.arange(8).repeat_interleave(12)
        means = 256 * torch.rand(8, 1, 16, 16, generator=generator)
        inputs = (means[labels] + 90 * torch.randn(96, 1, 16, 16, generator=generator)).clamp(0, 255).to(torch.uint8)
        return Samples(inputs, labels, [str(n) for n in range(8)], [""] * 96)


def data() -> SiameseData:
    return SiameseData(Noise(), functools.partial(balanced, classes=8, samples_per_class=4))  # three steps an epoch


def module_of(loss: Callable[[], nn.Module] = ContrastiveLoss, distance: dict | None = None, **options) -> SiameseModule:
    torch.manual_seed(0)
    parts = {
        "encoder": {"_target_": "siamese.encoders.Conv4", "input_shape": [1, 16, 16], "widths": [4, 4, 4, 4], "embedding_size": 8},
        "distance": distance or {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"},
        "preprocessing": {"_target_": "siamese.bundle.Standardize", "mean": [0.5], "std": [0.3]},
    }
    options = {"optimizer": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), **options}
    return SiameseModule(Bundle(parts), loss(), **options)


def fitted(module: SiameseModule, callbacks: list[Callback], epochs: int, ckpt: str | None = None, **options) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", num_sanity_val_steps=0, max_epochs=epochs, callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(module, data(), ckpt_path=ckpt, weights_only=True)
    return trainer


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


class States(Callback):
    """The encoder's state at the end of each epoch."""

    def __init__(self):
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer, module):
        self.seen.append(copied(module.model.encoder))


# Freezing. The encoder's blocks are layers.0 to layers.3 (convolution, batch-norm, ReLU, pooling) and so on.


def frozen_run(parts: list[str], epochs: int = 4, **options) -> tuple[list[dict[str, Tensor]], SiameseModule]:
    """The encoder before, and after each epoch."""
    module, states = module_of(), States()
    before = copied(module.model.encoder)
    fitted(module, [Freeze(module.model.encoder, parts, **options), states], epochs)
    return [before, *states.seen], module


def test_what_is_frozen_for_good_never_moves_and_the_rest_does():
    states, _ = frozen_run(["layers.0", "layers.1", "layers.4"])
    frozen = {name for name in states[0] if name.startswith(("layers.0.", "layers.1.", "layers.4."))}
    assert len(frozen) == 1 + 5 + 1
    assert moved(states[0], states[-1]) == states[0].keys() - frozen


def test_one_part_may_stand_without_a_list():
    encoder = module_of().model.encoder
    assert Freeze(encoder, "layers.4").parameters == Freeze(encoder, ["layers.4"]).parameters != []


def test_frozen_weights_have_no_state_in_the_optimizer_that_holds_them():
    module = module_of()
    trainer = fitted(module, [Freeze(module.model.encoder, ["layers.4"])], 1)
    (optimizer,) = trainer.optimizers
    frozen = module.model.encoder.layers[4].weight
    assert any(frozen is parameter for group in optimizer.param_groups for parameter in group["params"])
    assert frozen not in optimizer.state
    assert module.model.encoder.layers[0].weight in optimizer.state


@pytest.mark.parametrize("until", [1, 3])
def test_what_is_frozen_until_an_epoch_moves_from_that_epoch_on(until):
    states, _ = frozen_run(["layers.4"], until_epoch=until)
    weights = [state["layers.4.weight"] for state in states]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [epoch < until for epoch in range(4)]


@pytest.mark.parametrize(("batch_norm", "kept"), [(True, [True, True, True, True]), (False, [True, True, False, False])])
def test_batch_norm_keeps_its_statistics_while_frozen_or_for_good(batch_norm, kept):
    states, module = frozen_run(["layers.1"], until_epoch=2, batch_norm=batch_norm)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        values = [state[f"layers.1.{name}"] for state in states]
        assert [torch.equal(a, b) for a, b in itertools.pairwise(values)] == kept, name
    weights = [state["layers.1.weight"] for state in states]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [True, True, False, False]
    assert module.model.encoder.layers[1].training == (not batch_norm)
    assert module.model.encoder.layers[5].training


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_frozen_run_that_is_resumed_ends_as_one_that_never_stopped(cut, tmp_path):
    def run(epochs: int, ckpt: str | None = None) -> tuple[SiameseModule, L.Trainer]:
        module = module_of()
        return module, fitted(module, [Freeze(module.model.encoder, ["layers.0", "layers.1"], until_epoch=2)], epochs, ckpt)

    whole, _ = run(4)
    _, trainer = run(cut)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = run(4, str(tmp_path / "last.ckpt"))
    assert not moved(copied(whole), copied(resumed))


def test_a_part_that_the_encoder_lacks_is_refused_before_anything_is_trained(fit, tmp_path):
    with pytest.raises(InputError, match=r"callbacks.freeze: the encoder has no part 'backbone' with weights: it has layers"):
        fit(tmp_path, "callbacks=freeze")
    assert not (tmp_path / "checkpoints").exists()


def test_a_part_is_frozen_in_a_whole_run(fit, tmp_path, caplog):
    fit(tmp_path, "callbacks=[freeze,early_stopping]", "callbacks.freeze.parts=[layers.0]", "test=false")
    assert "what is frozen has random weights, and keeps them: say encoder.pretrained=true" in caplog.text
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["config"]["choices"]["callbacks"] == "freeze,early_stopping"
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert set(group["params"]) - set(state["optimizer_states"][0]["state"]) == {0}, "all but the first convolution are trained"


# The average of the weights


class Weights(Callback):
    """The weights after each step, as training has them, and while they are validated."""

    def __init__(self):
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.figures: list[float] = []

    def on_train_start(self, trainer, module):
        self.steps.append(copied(module))

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(copied(module))

    def on_validation_batch_end(self, trainer, module, *_):
        self.validated.append(copied(module))

    def on_validation_end(self, trainer, module):
        self.figures.append(trainer.callback_metrics["val/map_at_r"].item())


def average(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """By the formula, in double precision, from the weights after each step."""
    mean = {name: value.double() for name, value in steps[0].items()}
    for step, state in enumerate(steps[1:], 1):
        kept = min(decay, (1 + step) / (10 + step))
        mean = {name: kept * value + (1 - kept) * state[name].double() for name, value in mean.items()}
    return mean


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    floats = [name for name, value in one.items() if not name.endswith("num_batches_tracked")]
    return one.keys() == other.keys() and all(torch.allclose(one[n].double(), other[n].double(), atol=1e-5) for n in floats)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_average_of_the_weights_is_validated_and_training_goes_on_with_themselves(decay):
    plain, averaged = Weights(), Weights()
    fitted(module_of(ARCFACE), [plain], 3)
    module = module_of(ARCFACE)
    fitted(module, [EMA(decay), averaged], 3)
    assert all(not moved(one, other) for one, other in zip(plain.steps, averaged.steps, strict=True))
    assert len(averaged.validated) == 3
    for epoch, state in enumerate(averaged.validated, 1):
        assert close(state, average(averaged.steps[: 1 + 3 * epoch], decay))
        assert close(state, averaged.steps[3 * epoch]) == (decay == 0.0)
    assert close(copied(module), averaged.validated[-1]), "and they are what is left in memory"


def test_the_average_keeps_counters_and_a_losss_memory_as_they_are():
    module, seen = module_of(), Weights()
    module.loss.register_buffer("memory", torch.zeros(3))

    def remember(loss, inputs, output):
        loss.memory += 1

    module.loss.register_forward_hook(remember)
    fitted(module, [EMA(0.9), seen], 2)
    assert [state["loss.memory"].tolist() for state in seen.validated] == [[3.0] * 3, [6.0] * 3]
    assert [state["model.encoder.layers.1.num_batches_tracked"].item() for state in seen.validated] == [3, 6]


def test_with_gradients_that_add_up_the_average_moves_with_the_optimizer():
    module, seen = module_of(), Weights()
    fitted(module, [EMA(0.9), seen], 2, accumulate_grad_batches=3)  # one step an epoch
    expected = average(seen.steps[::3], 0.9)
    for name, _ in module.named_parameters():
        assert torch.allclose(seen.validated[-1][name].double(), expected[name], atol=1e-6), name
    assert moved(seen.steps[0], seen.steps[3]) & moved(seen.steps[3], seen.steps[6]) >= {name for name, _ in module.named_parameters()}


def test_the_figures_are_those_of_the_average_with_its_own_learned_distance():
    module = module_of(distance={"_target_": "siamese.distances.LearnedDistance", "embedding_size": 8})
    module.loss.distance = module.model.distance
    seen = Weights()
    fitted(module, [EMA(0.9), seen], 2)
    val = Noise().split("val")
    figure = evaluate(module.model.embed(val.inputs), val.labels, module.model.distance, ways=()).figures["map_at_r"]
    assert seen.figures[-1] == pytest.approx(float(figure), abs=1e-6)
    assert moved(seen.steps[-1], copied(module)) >= {"model.distance.weight"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_averaged_run_that_is_resumed_ends_as_one_that_never_stopped(tmp_path):
    def run(epochs: int, ckpt: str | None = None) -> tuple[L.Trainer, Weights]:
        seen = Weights()
        return fitted(module_of(ARCFACE), [EMA(0.9), seen], epochs, ckpt), seen

    def last(trainer: L.Trainer) -> dict:
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return torch.load(tmp_path / "end.ckpt", weights_only=True)

    whole, steps = run(4)
    checkpoints = ModelCheckpoint(tmp_path, "last")
    fitted(module_of(ARCFACE), [EMA(0.9), checkpoints], 2, enable_checkpointing=True)
    resumed, more = run(4, str(tmp_path / "last.ckpt"))
    assert not moved(last(whole)["state_dict"], last(resumed)["state_dict"])
    assert not moved(steps.steps[-1], more.steps[-1])
    assert not moved(steps.steps[6], more.steps[0])
    assert steps.figures[2:] == more.figures


@pytest.fixture(scope="module")
def averaged_run(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    for name, epochs, more in (("whole", 4, []), ("first", 2, [])):
        options = ["callbacks=ema", "callbacks.ema.decay=0.8", "scheduler=none", f"trainer.max_epochs={epochs}", "test=false", *more]
        fit(folder / name, *options)
    fit(folder / "second", *options[:3], "trainer.max_epochs=4", "test=false", f"ckpt={folder}/first/checkpoints/last.ckpt")
    return folder


def test_checkpoints_and_bundles_of_a_whole_run_hold_the_average(averaged_run):
    folder = averaged_run / "whole"
    best, last = (load_checkpoint(folder / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    for saved in (best, last):
        assert saved["state_dict"].keys() == saved["training_state_dict"].keys()
        differ = moved(saved["training_state_dict"], saved["state_dict"])
        assert {name for name in differ if name.endswith("weight")} == {name for name in differ if "weight" in name} != set()
    bundle = Bundle.load(folder / "bundle.safetensors")
    assert not moved(bundle.state_dict(), {name.removeprefix("model."): value for name, value in best["state_dict"].items()})
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    curve = [float(row[rows[0].index("val/map_at_r")]) for row in rows[1:] if row[rows[0].index("val/map_at_r")]]
    # Validation while training runs in reduced precision where the processor has it; the final figure does not.
    assert metrics["val/map_at_r"] == pytest.approx(max(curve), abs=0.02)


def test_a_resumed_whole_run_has_the_same_weights_and_the_same_average(averaged_run):
    one, other = (load_checkpoint(averaged_run / name / "checkpoints" / "last.ckpt") for name in ("whole", "second"))
    assert one["global_step"] == other["global_step"] == 2 * load_checkpoint(averaged_run / "first/checkpoints/last.ckpt")["global_step"]
    for part in ("state_dict", "training_state_dict"):
        assert not moved(one[part], other[part]), part


@pytest.mark.parametrize(("callbacks", "state"), [("none", "with"), ("[early_stopping]", "with"), ("ema", "without")])
def test_a_run_is_resumed_with_the_average_it_had_or_not_at_all(fit, averaged_run, tiny_run, tmp_path, callbacks, state):
    path = (tiny_run if state == "without" else averaged_run / "first") / "checkpoints" / "last.ckpt"
    options = [] if state == "without" else ["scheduler=none"]
    with pytest.raises(InputError, match=f"trained {state} callbacks=ema: resume it {state}"):
        fit(tmp_path, f"callbacks={callbacks}", f"ckpt={path}", f"trainer.max_epochs={2 if state == 'without' else 4}", *options)


def test_without_the_configuration_too_a_checkpoint_without_an_average_is_refused(tmp_path):
    fitted(module_of(), [], 1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="this run had no average of its weights"):
        fitted(module_of(), [EMA()], 2, str(tmp_path / "plain.ckpt"))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 99])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay} is the share"):
        EMA(decay)


# Several at once


@pytest.mark.parametrize(
    ("said", "names"),
    [("none", ""), ("ema", "ema"), ("[ema]", "ema"), ("[early_stopping,ema]", "early_stopping ema"), ("[freeze,ema,none]", "freeze ema")],
)
def test_callbacks_are_given_one_by_one_or_as_a_list(said, names):
    config = compose([f"callbacks={said}"])
    assert list(config["callbacks"]) == names.split()
    assert config["choices"]["callbacks"] == (",".join(names.split()) or "none")
    json.dumps(config)


def test_a_value_of_one_in_a_list_is_set_as_usual():
    assert compose(["callbacks=[early_stopping,ema]", "callbacks.ema.decay=0.5"])["callbacks"]["ema"]["decay"] == 0.5
    with pytest.raises(InputError, match=r"callbacks.ema.decay=much must be a number"):
        compose(["callbacks=[early_stopping,ema]", "callbacks.ema.decay=much"])


def test_an_unknown_callback_in_a_list_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"callbacks=emu is not a choice: did you mean ema\?\ncallbacks is one of early_stopping, ema,"):
        compose(["callbacks=[early_stopping,emu]"])


@pytest.mark.parametrize(
    ("miner", "metrics", "shown"),
    [
        (object(), {"train/mined_fraction": 0.25, "val/recall_at_1": 0.5, "val/average_precision": 0.3}, {"mined": 0.25, "R@1": 0.5}),
        (None, {"train/mined_fraction": 1.0}, {}),
        (None, {"val/average_precision": 0.3}, {"AP": 0.3}),
    ],
)
def test_the_progress_line_has_the_loss_what_was_mined_and_the_last_validation(miner, metrics, shown):
    trainer = SimpleNamespace(callback_metrics=metrics, progress_bar_metrics={"train/loss": 1.5}, loggers=[], training=True)
    assert ProgressBar().get_metrics(trainer, SimpleNamespace(miner=miner)) == {"loss": 1.5, **shown}


def test_the_progress_line_reads_a_loss_once_a_second_and_at_the_end_of_an_epoch(monkeypatch):
    now = 10.0
    monkeypatch.setattr("siamese.callbacks.time.monotonic", lambda: now)
    trainer = SimpleNamespace(callback_metrics={}, progress_bar_metrics={}, loggers=[], training=True, is_last_batch=False)
    bar, seen = ProgressBar(), []
    for seconds, last, training in ((0, False, True), (0.9, False, True), (0.2, False, True), (0.1, True, True), (0.1, False, False)):
        now += seconds
        trainer.is_last_batch, trainer.training = last, training
        trainer.progress_bar_metrics["train/loss"] = now
        seen.append(bar.get_metrics(trainer, SimpleNamespace(miner=None))["loss"])
    assert seen == pytest.approx([10.0, 10.0, 11.1, 11.2, 11.3])
