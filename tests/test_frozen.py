"""Features that are computed once: the numbers are the extractor's own, are kept for later runs, and never outlive its weights."""

import copy
import functools
import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import train
from siamese import frozen
from siamese.bundle import Bundle, load_checkpoint
from siamese.callbacks import EMA, Freeze
from siamese.config import InputError, compose
from siamese.encoders import Timm
from siamese.frozen import Frozen, Memory, frozen_tensors
from siamese.module import SiameseModule
from siamese.protocols import fewshot

TINY, NHWC = "test_resnet", "test_mambaout"
PARTS = {
    "encoder": {"_target_": "siamese.encoders.Timm", "input_shape": [1, 32, 32], "model": TINY, "embedding_size": 8, "frozen": True},
    "distance": {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"},
    "preprocessing": {"_target_": "siamese.bundle.Standardize", "mean": [0.5], "std": [0.3]},
}
PLAIN = (
    *("dataset=omniglot", "dataset.background=small1", "dataset.size=32", "augmentation=none", "scheduler=none", "logger=none"),
    "report=none",
    *("encoder=timm", f"encoder.model={TINY}", "encoder.embedding_size=8"),
    *("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's own folder for each test, empty."""
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data" / "cache"


class Counting(nn.Module):
    """Two layers, one of which behaves otherwise in training; `rows` is how many inputs they were given, in all of their copies."""

    rows = 0

    def __init__(self, power: float = 1.0):
        super().__init__()
        self.layers, self.power = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout()), power

    def forward(self, inputs: Tensor) -> Tensor:
        Counting.rows += len(inputs)
        return self.layers(inputs.float()) ** self.power


class Told(Counting):
    """Has a state that is no tensor of its own, as a tokenizer is."""

    told = "nothing"

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self.told.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.told = bytes(state.tolist()).decode()


@pytest.fixture
def counted(monkeypatch):
    """counted(extractor, inputs) -> features, and how many rows were computed for them."""
    monkeypatch.setattr(Counting, "rows", 0)

    def run(extractor: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
        before = Counting.rows
        return extractor(inputs), Counting.rows - before

    return run


def of_seed(seed: int, kind: type = Counting, **options) -> nn.Module:
    torch.manual_seed(seed)
    made = kind(**options)
    with torch.no_grad():
        made.layers[2].running_mean.normal_()
    return made


def inputs_of(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 4, generator=torch.Generator().manual_seed(seed))


def another_process() -> None:
    """From here on nothing that is in memory is found again."""
    frozen._open.clear()


# The features.


@pytest.mark.parametrize(("model", "pool"), [(TINY, None), (TINY, "avg"), (TINY, "gem"), (NHWC, "gem"), (NHWC, None)])
def test_a_frozen_encoder_gives_what_the_plain_one_gives_and_takes_its_weights_by_the_same_names(model, pool):
    torch.manual_seed(0)
    plain, inputs = Timm((3, 64, 64), model, pool=pool, embedding_size=8).eval(), torch.rand(5, 3, 64, 64)
    other = Timm((3, 64, 64), model, pool=pool, embedding_size=8, frozen=True).eval()
    assert other.state_dict().keys() == plain.state_dict().keys()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(inputs)
        assert torch.allclose(other(inputs), expected, atol=1e-5)
        assert torch.allclose(other(inputs), expected, atol=1e-5), "read, not computed"
    plain.load_state_dict(other.state_dict())


def test_only_what_is_missing_is_computed_and_each_input_once(counted):
    extractor, inputs = Frozen(of_seed(0)), inputs_of(10)
    expected = of_seed(0).eval()(inputs)
    first, rows = counted(extractor, inputs[:6])
    assert (rows, first.dtype, first.requires_grad) == (6, torch.float32, False)
    again, rows = counted(extractor, inputs[[7, 2, 7, 9, 0]])
    assert rows == 2
    assert torch.allclose(again, expected[[7, 2, 7, 9, 0]], atol=1e-6)
    assert torch.equal(again[[1, 4]], first[[2, 0]])
    assert counted(extractor, inputs[[9, 7, 5]])[1] == 0


def test_features_outlive_the_growth_of_the_memory(counted):
    extractor, inputs = Frozen(of_seed(0)), inputs_of(1500)
    for batch in inputs.split(70):
        extractor(batch)
    features, rows = counted(extractor, inputs)
    assert rows == 0
    assert torch.allclose(features, of_seed(0).eval()(inputs), atol=1e-6)


def test_training_mode_autocast_and_inference_mode_change_nothing(counted):
    extractor, inputs = Frozen(of_seed(0)), inputs_of(9)
    before = copy.deepcopy(extractor.state_dict())
    extractor.train()
    extractor.module.layers.train()
    expected = of_seed(0).eval()(inputs)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.allclose(extractor(inputs[:4]), expected[:4], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        features = extractor(inputs)
    assert features.dtype == torch.float32
    assert torch.allclose(features, expected, atol=1e-6)
    nn.Linear(5, 2)(features).sum().backward()  # no inference tensor, which a gradient could not pass
    assert all(torch.equal(value, extractor.state_dict()[name]) for name, value in before.items())
    assert not any(module.training for module in extractor.train().modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_equal_bytes_of_another_type_or_shape_are_another_input(counted):
    extractor, inputs = Frozen(of_seed(0)), torch.ones(2, 3, 4)
    for other in (inputs, inputs.view(torch.int32), inputs.view(2, 4, 3)):
        features, rows = counted(extractor, other)
        assert rows == 1, "both rows are one input"
        assert torch.allclose(features, of_seed(0).eval()(other), atol=1e-2, rtol=1e-5)


def test_the_layout_in_memory_is_no_part_of_an_input(counted):
    extractor, inputs = Frozen(of_seed(0)), torch.rand(4, 3, 2, 2)
    extractor(inputs)
    assert counted(extractor, inputs.contiguous(memory_format=torch.channels_last))[1] == 0


def test_a_batch_of_none_has_no_features(counted):
    assert Frozen(of_seed(0))(inputs_of(0)).shape == (0, 5)


def test_what_is_no_vector_for_each_input_is_refused():
    with pytest.raises(ValueError, match=r"one vector for each of 2 inputs, these are \[2, 3, 4\]"):
        Frozen(nn.Identity())(inputs_of(2))


def test_nothing_is_kept_where_inputs_never_come_twice(counted, cache):
    extractor, inputs = Frozen(of_seed(0)), inputs_of(3)
    extractor.remembers = False
    assert torch.allclose(extractor(inputs), of_seed(0).eval()(inputs))
    assert counted(extractor, inputs)[1] == 3
    assert not cache.exists()


# Other weights.


def changed_in_place(extractor: Frozen) -> None:
    with torch.no_grad():
        extractor.module.layers[1].weight += 1


def changed_statistics(extractor: Frozen) -> None:
    extractor.module.layers[2].running_mean.zero_()


def exchanged(extractor: Frozen) -> None:
    extractor.module.layers[1].weight.data = torch.ones(5, 12)


def loaded(extractor: Frozen) -> None:
    extractor.load_state_dict(of_seed(1).state_dict())


def loaded_from_outside(extractor: Frozen) -> None:
    nn.Sequential(extractor).load_state_dict({f"0.{name}": value for name, value in of_seed(1).state_dict().items()})


def loaded_in_exchange(extractor: Frozen) -> None:
    extractor.load_state_dict(of_seed(1).state_dict(), assign=True)


@pytest.mark.parametrize(
    "change", [changed_in_place, changed_statistics, exchanged, loaded, loaded_from_outside, loaded_in_exchange], ids=lambda f: f.__name__
)
def test_features_of_other_weights_are_never_given(counted, change):
    extractor, inputs = Frozen(of_seed(0)), inputs_of(6)
    before = extractor(inputs)
    change(extractor)
    plain = of_seed(0)
    plain.load_state_dict(extractor.state_dict())
    features, rows = counted(extractor, inputs)
    assert rows == 6
    assert torch.allclose(features, plain.eval()(inputs), atol=1e-6)
    assert not torch.allclose(features, before, atol=1e-3)
    extractor.load_state_dict(of_seed(0).state_dict())
    again, rows = counted(extractor, inputs)
    assert rows == 0, "the old weights have their features still"
    assert torch.equal(again, before)


def test_a_state_that_is_no_weight_counts_too(counted):
    extractor, inputs = Frozen(of_seed(0, Told)), inputs_of(4)
    extractor(inputs)
    other = of_seed(0, Told)
    other.told = "something"
    extractor.load_state_dict(other.state_dict())
    assert extractor.module.told == "something"
    assert counted(extractor, inputs)[1] == 4


def test_what_a_layer_is_told_and_what_kind_it_is_count_as_its_weights_do(counted):
    wide = of_seed(0)
    wide.layers[2].eps = 1.0
    known, inputs = [Frozen(each) for each in (of_seed(0), of_seed(0, power=2.0), of_seed(0, Told), wide)], inputs_of(4)
    known.append(Frozen(of_seed(0), then=nn.ReLU()))
    for extractor in known:
        assert counted(extractor, inputs)[1] == 4
    assert counted(Frozen(of_seed(0)), inputs)[1] == 0


def test_the_key_does_not_hang_on_an_address_or_a_layout():
    encoders = [Timm((3, 32, 32), TINY, frozen=True) for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    encoders[1].to(memory_format=torch.contiguous_format)
    keys = {encoder.backbone._key(torch.device("cpu")) for encoder in encoders}
    assert len(keys) == 1
    assert keys != {encoders[0].backbone._key(torch.device("cuda"))}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda extractor: pickle.loads(pickle.dumps(extractor))])
def test_a_copy_shares_what_is_known_until_its_weights_change(counted, copied):
    extractor, inputs = Frozen(of_seed(0)), inputs_of(5)
    before = extractor(inputs)
    other = copied(extractor)
    features, rows = counted(other, inputs)
    assert rows == 0
    assert torch.equal(features, before)
    changed_in_place(other)
    assert not torch.allclose(other(inputs), before)
    assert torch.equal(extractor(inputs), before)


# The files.


def parts_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*"))


def test_another_run_reads_what_one_has_computed(counted, cache, caplog):
    inputs = inputs_of(6)
    first = Frozen(of_seed(0))
    before = first(inputs)
    assert not cache.exists(), "written when a batch brings nothing new"
    first(inputs[:2])
    (part,) = parts_of(cache)
    assert re.fullmatch(r"[0-9a-f]{24}/[0-9a-f]{32}\.npz", str(part.relative_to(cache)))
    another_process()
    with caplog.at_level(logging.INFO, "siamese.frozen"):
        features, rows = counted(Frozen(of_seed(0)), inputs)
    assert rows == 0
    assert torch.equal(features, before)
    assert caplog.messages == [f"features of 6 inputs are taken from {part.parent}"]
    with np.load(part, allow_pickle=False) as arrays:
        kinds = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    assert kinds == {"digests": ("uint8", (6, 16)), "features": ("float32", (6, 5))}


def test_what_waits_is_written_when_there_is_much_of_it(cache, monkeypatch):
    monkeypatch.setattr(frozen, "_PENDING", 100)
    extractor = Frozen(of_seed(0))
    for batch in inputs_of(250).split(30):
        extractor(batch)
    sizes = [len(np.load(part)["digests"]) for part in parts_of(cache)]
    assert sizes == [120, 120]


def test_other_weights_have_a_folder_of_their_own(cache):
    for seed in (0, 1):
        extractor = Frozen(of_seed(seed))
        extractor(inputs_of(3)), extractor(inputs_of(3))
    assert len({part.parent for part in parts_of(cache)}) == 2


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-40])


def flipped(part: Path) -> None:
    content = bytearray(part.read_bytes())
    with np.load(part) as arrays:
        place = content.index(arrays["features"].tobytes())
    content[place + 5] ^= 1
    part.write_bytes(content)


def emptied(part: Path) -> None:
    part.write_bytes(b"")


def of_other_arrays(part: Path) -> None:
    np.savez(part, digests=np.zeros((6, 16), np.uint8), features=np.zeros((5, 5), np.float32))


def of_objects(part: Path) -> None:
    np.savez(part, digests=np.zeros((6, 16), np.uint8), features=np.array([{}] * 6))


def of_one_name(part: Path) -> None:
    np.savez(part, digests=np.zeros((6, 16), np.uint8))


def of_text(part: Path) -> None:
    part.write_text("no archive")


@pytest.mark.parametrize("harm", [cut, flipped, emptied, of_other_arrays, of_objects, of_one_name, of_text], ids=lambda f: f.__name__)
def test_a_broken_part_is_said_and_computed_again(counted, cache, caplog, harm):
    inputs = inputs_of(6)
    first = Frozen(of_seed(0))
    before = first(inputs)
    first(inputs)
    (part,) = parts_of(cache)
    harm(part)
    another_process()
    second = Frozen(of_seed(0))
    features, rows = counted(second, inputs)
    assert rows == 6
    assert torch.equal(features, before)
    assert [f"{part} is broken" in message for message in caplog.messages] == [True]
    second(inputs), second(inputs_of(3, seed=1))
    assert len(caplog.messages) == 1, "said once"
    (written,) = parts_of(cache)
    assert written != part
    another_process()
    assert counted(Frozen(of_seed(0)), inputs)[1] == 0


def test_two_that_write_at_once_lose_nothing_and_the_first_number_stays(tmp_path):
    one, other, digests = Memory(tmp_path), Memory(tmp_path), [bytes([n] * 16) for n in range(6)]
    one.add(digests[:4], np.full((4, 3), 1, np.float32))
    other.add(digests[2:], np.full((4, 3), 2, np.float32))
    one.write(), other.write()
    assert len(list(tmp_path.iterdir())) == 2
    one.read(), other.read()
    values = lambda memory: [memory.features[memory.rows[digest]].tolist() for digest in digests]  # noqa: E731
    assert values(one) == [[1] * 3] * 4 + [[2] * 3] * 2
    assert values(other) == [[1] * 3] * 2 + [[2] * 3] * 4, "what a run has computed it keeps"
    for _ in range(2):
        later = Memory(tmp_path)
        later.read()
        assert values(later) == values(one), "later ones agree"


def test_a_run_takes_up_what_another_writes_meanwhile(counted, cache):
    inputs = inputs_of(8)
    one = Frozen(of_seed(0))
    one(inputs[:2]), one(inputs[:2])
    another_process()
    other = Frozen(of_seed(0))
    before = other(inputs)
    other(inputs)
    features, rows = counted(one, inputs)
    assert rows == 0
    assert torch.equal(features[2:], before[2:])


def test_without_a_folder_to_write_to_features_stay_in_memory(counted, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file, not a folder")
    extractor = Frozen(of_seed(0))
    for seed in (0, 1):
        before = extractor(inputs_of(6, seed))
        again, rows = counted(extractor, inputs_of(6, seed))
        assert rows == 0
        assert torch.equal(again, before)
    (message,) = caplog.messages
    assert "cannot be written" in message
    assert "features are kept for this run only" in message


# With the rest.


@pytest.fixture
def module() -> SiameseModule:
    torch.manual_seed(0)
    return SiameseModule(Bundle(PARTS), nn.Identity(), optimizer=functools.partial(torch.optim.AdamW, lr=0.01))


def test_the_optimizer_and_the_average_have_nothing_to_do_with_what_is_frozen(module):
    head = {*module.model.encoder.head.parameters()}
    (group,) = module.grouped_optimizer().param_groups
    assert {*group["params"]} == head
    assert len(frozen_tensors(module)) == len(list(module.model.encoder.backbone.module.state_dict()))
    assert [tensor.data_ptr() for tensor in EMA()._live(module)] == [weight.data_ptr() for weight in module.model.encoder.head.parameters()]


def test_rates_of_what_is_frozen_are_refused(module):
    module.lr_factors = {"backbone": 0.1}
    with pytest.raises(ValueError, match=r"lr_factors\.backbone=0\.1: encoder\.frozen=true never trains this part"):
        module.grouped_optimizer()
    module.lr_factors = {"head": 0.5}
    assert [group["lr"] for group in module.grouped_optimizer().param_groups] == [0.005]


def test_freezing_what_is_frozen_already_is_refused(module):
    for parts in ("backbone", ["backbone", "head"]):
        with pytest.raises(ValueError, match=r"encoder\.frozen=true never trains them: name others, or leave callbacks=freeze away"):
            Freeze(module.model.encoder, parts)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        Freeze(module.model.encoder, "head")


def test_without_a_head_there_is_nothing_to_train():
    with pytest.raises(ValueError, match="frozen=true trains the head alone, which needs an embedding_size"):
        Timm((3, 32, 32), TINY, embedding_size=None, frozen=True)


def test_a_bundle_gives_the_same_embeddings_and_remembers_none(tmp_path, cache):
    torch.manual_seed(0)
    model, images = Bundle(PARTS), torch.randint(0, 256, (7, 1, 32, 32), dtype=torch.uint8)
    before = model.embed(images)
    model.save(tmp_path / "bundle.safetensors")
    assert {"encoder.backbone.conv1.0.weight", "encoder.head.weight"} <= safetensors.torch.load_file(tmp_path / "bundle.safetensors").keys()
    files = parts_of(cache)
    other = Bundle.load(tmp_path / "bundle.safetensors")
    assert torch.allclose(other.embed(images), before, atol=1e-6)
    other.embed(images)
    assert parts_of(cache) == files
    assert other.encoder.backbone._memory is None


# Whole runs.


@pytest.fixture(scope="module")
def run(drawings, tmp_path_factory):
    """run(name, *overrides) -> the directory of a run, made once; all share a cache. run.computed[name]: how many inputs it computed."""
    base, computed = tmp_path_factory.mktemp("frozen"), {}

    def made(name: str, *overrides: str) -> Path:
        if name in computed:
            return base / name
        config, compute, rows = compose([*PLAIN, f"dataset.path={drawings}", *overrides]), Frozen._compute, []
        (base / name).mkdir()
        config["paths"]["output_dir"] = str(base / name)
        another_process()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SIAMESE_DATA_DIR", str(base / "data"))
            patch.setattr("siamese.evaluation.fewshot", functools.partial(fewshot, episodes=20))  # 4,000 take a second each
            patch.setattr(Frozen, "_compute", lambda extractor, inputs: rows.append(len(inputs)) or compute(extractor, inputs))
            train.train(config)
        computed[name] = sum(rows)
        return base / name

    made.computed = computed
    return made


def figures(run: Path) -> dict[str, float]:
    return {name: value for name, value in json.loads((run / "metrics.json").read_text()).items() if not name.startswith("seconds/")}


def encoder_of(run: Path, name: str = "last") -> dict[str, Tensor]:
    state = load_checkpoint(run / "checkpoints" / f"{name}.ckpt")["state_dict"]
    return {name.removeprefix("model.encoder."): value for name, value in state.items() if name.startswith("model.encoder.")}


def test_the_same_command_twice_gives_the_same_figures_the_second_time_from_the_cache(run):
    first, second = run("first", "encoder.frozen=true"), run("second", "encoder.frozen=true")
    inputs = 40 * 6 + 24 * 6 + 2 * 16  # all splits, and the one-shot runs
    assert 0.9 * inputs < run.computed["first"] <= inputs, "each input once: drawings may be equal"
    assert run.computed["second"] == 0
    assert figures(first) == figures(second)
    ends = [load_checkpoint(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (first, second)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_sweep_of_losses_computes_nothing_again(run):
    run("first", "encoder.frozen=true")
    run("triplet", "encoder.frozen=true", "loss=triplet", "miner=semihard", "encoder.hidden=[12]", "seed=0", "callbacks=ema")
    assert run.computed["triplet"] == 0


def test_a_run_trains_the_head_alone_and_may_start_from_a_run_that_trained_all(run):
    plain = run("plain", "trainer.max_epochs=1")
    before = encoder_of(plain, "best")
    after = encoder_of(run("head", "encoder.frozen=true", f"init_from={plain}/checkpoints/best.ckpt"))
    assert run.computed["plain"] == 0 < run.computed["head"]
    assert after.keys() == before.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


def test_the_bundle_of_a_run_embeds_as_its_weights_say(run):
    folder = run("first", "encoder.frozen=true")
    bundle, images = Bundle.load(folder / "bundle.safetensors"), torch.randint(0, 256, (9, 1, 32, 32), dtype=torch.uint8)
    plain = Timm((1, 32, 32), TINY, embedding_size=8).eval()
    plain.load_state_dict(encoder_of(folder, "best"))
    with torch.no_grad():
        assert torch.allclose(bundle.embed(images), plain(bundle.preprocessing(images)), atol=1e-5)
    assert torch.equal(Bundle.load(folder / "checkpoints" / "best.ckpt").embed(images), bundle.embed(images))


def test_a_resumed_run_ends_as_one_that_was_never_cut_off_and_its_average_is_of_the_head(run):
    options = ("encoder.frozen=true", "callbacks=ema")
    whole, half = run("ema", *options), run("half ema", *options, "trainer.max_epochs=1")
    resumed = run("resumed ema", *options, f"ckpt='{half}/checkpoints/last.ckpt'")
    assert figures(whole)["val/map_at_r"] == figures(resumed)["val/map_at_r"]
    ends = [load_checkpoint(each / "checkpoints" / "last.ckpt") for each in (whole, resumed)]
    for state in ("state_dict", "training_state_dict"):
        assert all(torch.equal(value, ends[1][state][name]) for name, value in ends[0][state].items())
    moved = {name for name, value in ends[0]["state_dict"].items() if not torch.equal(value, ends[0]["training_state_dict"][name])}
    assert moved == {"model.encoder.head.weight", "model.encoder.head.bias"}


@pytest.mark.parametrize("augmentation", ["light", "strong"])
def test_an_augmentation_is_refused_before_training(run, augmentation):
    why = f"computes the features of each input once, augmentation={augmentation} makes other inputs at every step: say augmentation=none"
    with pytest.raises(InputError, match=why):
        run(augmentation, "encoder.frozen=true", f"augmentation={augmentation}")


def test_a_run_that_trained_all_is_not_resumed_as_a_frozen_one(run):
    with pytest.raises(InputError, match="holds another encoder"):
        run("mixed", "encoder.frozen=true", f"ckpt={run('plain', 'trainer.max_epochs=1')}/checkpoints/last.ckpt")
