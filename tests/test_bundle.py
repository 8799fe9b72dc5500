"""A Bundle: what goes in comes out again, and a file can neither run code nor fail without saying why."""

import json
import os
import pickle
import re
import sys

import lightning.pytorch as L
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from torch.utils.data import DataLoader

from siamese.bundle import Bundle, Standardize, construct_trusted, load_checkpoint
from siamese.data.augmentation import Augment
from siamese.data.samples import Samples, Source
from siamese.data.sampling import balanced
from siamese.decision import Decision
from siamese.module import SiameseModule

COSINE = {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"}
EUCLIDEAN = {"_target_": "pytorch_metric_learning.distances.LpDistance", "normalize_embeddings": False}
PARTS = {
    "encoder": {"_target_": "siamese.encoders.Conv4", "input_shape": [1, 16, 16], "widths": [4, 4, 8, 8], "embedding_size": 6},
    "distance": COSINE,
    "preprocessing": {"_target_": "siamese.bundle.Standardize", "mean": [0.2], "std": [0.4]},
}
DECISION = Decision("equal_error", 0.625, 0.02, 0.03, 40, 900, 8.0, -5.0, [[0.9, 0.001, 0.2], [0.625, 0.02, 0.03]], [0.01, 0.04])
TABLE = {**PARTS, "encoder": {"_target_": "siamese.encoders.MLP", "input_shape": [4], "hidden": [8], "embedding_size": 3}}


@pytest.fixture
def bundle() -> Bundle:
    torch.manual_seed(0)
    bundle = Bundle(PARTS, DECISION, config={"seed": 3, "loss": {"margin": 0.2}, "choices": ["a", None]})
    with torch.no_grad():
        bundle(images(32))  # so that the statistics of the batch-norm are not those it was born with
    return bundle


def images(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def trained(path) -> SiameseModule:
    """A module after three steps, its checkpoint in `path`."""
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(6)
    samples = Samples(images(24), labels, list("abcd"), [str(i) for i in range(24)])
    module = SiameseModule(Bundle(PARTS), ArcFaceLoss(4, 6), config={"seed": 5, "paths": {"data_dir": "/data"}})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=3, use_distributed_sampler=False, **quiet)
    trainer.fit(module, balanced(samples, 0, classes=4, samples_per_class=2))
    trainer.save_checkpoint(path)
    return module


# Round trips


def test_a_bundle_survives_its_file(bundle, tmp_path):
    bundle.save(tmp_path / "bundle.safetensors")
    read = Bundle.load(tmp_path / "bundle.safetensors")
    assert torch.equal(read.embed(images(9)), bundle.embed(images(9)))
    assert (read.decision, read.config, read.parts) == (bundle.decision, bundle.config, bundle.parts)
    assert read.threshold == 0.625
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.safetensors"]


def test_a_bundle_without_threshold_survives_too(tmp_path):
    Bundle(TABLE).save(tmp_path / "b.safetensors")
    assert Bundle.load(str(tmp_path / "b.safetensors")).threshold is None


def test_a_bundle_is_read_from_a_checkpoint_of_training(tmp_path):
    module = trained(tmp_path / "last.ckpt")
    read = Bundle.load(tmp_path / "last.ckpt")
    assert torch.equal(read.embed(images(9)), module.model.embed(images(9)))
    assert read.config == {"seed": 5, "paths": {"data_dir": "/data"}}
    assert read.parts == PARTS
    read.save(tmp_path / "b.safetensors")
    assert torch.equal(Bundle.load(tmp_path / "b.safetensors").embed(images(9)), module.model.embed(images(9)))
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert load_checkpoint(tmp_path / "last.ckpt")["state_dict"].keys() == weights.keys() > {"loss.W"}


def test_a_failed_write_leaves_the_old_file(bundle, tmp_path, monkeypatch):
    path = tmp_path / "bundle.safetensors"
    bundle.save(path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        bundle.save(path)
    assert path.read_bytes() == before


def test_weights_in_a_file_are_not_downloaded_again(tmp_path, monkeypatch):
    encoder = {"_target_": "siamese.encoders.Timm", "input_shape": [3, 32, 32], "model": "test_resnet", "pretrained": False}
    bundle = Bundle({**PARTS, "encoder": encoder})
    bundle.parts = {**PARTS, "encoder": {**encoder, "pretrained": True}}  # as if it had been
    bundle.save(tmp_path / "b.safetensors")
    asked, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: asked.append(kwargs["pretrained"]) or create(*args, **kwargs))
    inputs = torch.rand(2, 3, 32, 32)
    assert torch.equal(Bundle.load(tmp_path / "b.safetensors").embed(inputs), bundle.embed(inputs))
    assert asked == [False]


# Embedding


def test_embeddings_do_not_depend_on_the_batch_size(bundle):
    whole = bundle.embed(images(20))
    assert whole.shape == (20, 6)
    assert whole.dtype == torch.float32
    for size in (1, 7, 20, 100):
        assert torch.allclose(bundle.embed(images(20), batch_size=size), whole, atol=1e-5)
    assert whole.std(0).min() > 1e-3, "different images, different embeddings"


VIEWS = {"_target_": "siamese.data.augmentation.Augment", "rotation": 20.0, "shift": 0.2, "classwise": {"flip": 0.5}}


@pytest.mark.parametrize("distance", [COSINE, EUCLIDEAN])
def test_embeddings_are_averaged_over_views(bundle, distance):
    bundle = Bundle({**PARTS, "distance": distance})
    inputs, augment = images(9), Augment(rotation=20, shift=0.2)
    alone = bundle.embed(inputs)
    bundle.look(3, VIEWS)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(3):  # of each view what is drawn is drawn once, and done to image after image
        state = generator.get_state()
        seen = []
        for one in inputs.split(1):
            generator.set_state(state)
            seen.append(augment(one, generator))
        found.append(bundle.eval()(torch.cat(seen)))
    looks = torch.stack([alone, *found])
    expected = (torch.nn.functional.normalize(looks, dim=2) if distance == COSINE else looks).mean(0)
    torch.testing.assert_close(bundle.embed(inputs), expected)
    torch.testing.assert_close(bundle.embed(inputs[4:5]), expected[4:5])
    torch.testing.assert_close(bundle.eval()(inputs), alone)
    bundle.look(0, {})
    torch.testing.assert_close(bundle.embed(inputs), alone)


def test_views_survive_the_file(bundle, tmp_path):
    bundle.look(2, VIEWS)
    bundle.save(tmp_path / "bundle.safetensors")
    loaded = Bundle.load(tmp_path / "bundle.safetensors")
    assert loaded.views.count == 2
    assert torch.equal(loaded.embed(images(5)), bundle.embed(images(5)))
    assert loaded.fingerprint() == bundle.fingerprint()
    bundle.look(0, {})
    assert loaded.fingerprint() != bundle.fingerprint()


@pytest.mark.parametrize(("views", "augmentation", "message"), [(2, {}, "has none"), (-1, VIEWS, "views=-1"), (0.5, VIEWS, "views=0.5")])
def test_views_that_cannot_be(bundle, views, augmentation, message):
    with pytest.raises(ValueError, match=message):
        bundle.look(views, augmentation)


def test_embedding_neither_trains_nor_leaves_a_trace(bundle):
    before = {name: value.clone() for name, value in bundle.state_dict().items()}
    for training in (True, False):
        bundle.train(training)
        embeddings = bundle.embed(images(5))
        assert not embeddings.requires_grad
        assert all(module.training == training for module in bundle.modules())
    assert all(torch.equal(value, before[name]) for name, value in bundle.state_dict().items())


def test_a_part_frozen_in_evaluation_mode_stays_so(bundle):
    bundle.train()
    frozen = bundle.encoder.layers[1].eval()  # the usual way to freeze a batch-norm
    bundle.embed(images(5))
    assert bundle.training
    assert not frozen.training


def test_one_sample_is_embedded_like_many(bundle):
    assert torch.allclose(bundle.embed(images(8)[3:4]), bundle.embed(images(8))[3:4], atol=1e-5)


@pytest.mark.parametrize("distance", [COSINE, EUCLIDEAN, {**EUCLIDEAN, "normalize_embeddings": True}], ids=["cosine", "plain", "sphere"])
def test_scores_grow_with_likeness(distance):
    bundle = Bundle({**TABLE, "distance": distance})
    query, gallery = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.5, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 3.0, 0.0], [-3.0, 0.0, 0.0]])
    scores = bundle.scores(query, gallery)[0].tolist()
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4


@pytest.mark.parametrize("power", [1, 2])
def test_a_score_is_minus_the_distance_to_its_power(power):
    bundle = Bundle({**TABLE, "distance": {**EUCLIDEAN, "power": power}})
    left, right = (torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = -((left[:, None] - right).square().sum(2) ** (power / 2))
    assert torch.allclose(bundle.scores(left, right), expected, atol=1e-4)


def test_standardizing_is_by_channel():
    inputs = torch.randint(256, (50, 3, 4, 5), dtype=torch.uint8)
    fractions = inputs.float() / 255
    mean, std = fractions.mean((0, 2, 3)), fractions.std((0, 2, 3))
    for given in (inputs, fractions):
        result = Standardize(mean.tolist(), std.tolist())(given)
        assert result.mean((0, 2, 3)) == pytest.approx([0] * 3, abs=1e-5)
        assert result.std((0, 2, 3)) == pytest.approx([1] * 3, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int16])
def test_a_table_of_any_numbers_is_embedded(dtype):
    table = torch.randint(-9, 9, (6, 4), generator=torch.Generator().manual_seed(0))
    bundle = Bundle(TABLE)
    assert torch.allclose(bundle.embed(table.to(dtype)), bundle.embed(table.float()), atol=1e-4)


def test_a_bundle_is_a_module_like_any_other(bundle):
    loader = DataLoader(images(10), batch_size=4)
    assert torch.allclose(torch.cat([bundle.eval()(batch) for batch in loader]), bundle.embed(images(10)), atol=1e-5)


# What is refused


class Bomb:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("place", ["parts", "state_dict", "config", "callbacks"])
def test_a_checkpoint_cannot_run_code(tmp_path, place):
    path, victim = tmp_path / "best.ckpt", tmp_path / "exploded"
    torch.save({"parts": PARTS, "state_dict": Bundle(PARTS).state_dict(), "config": {}, place: Bomb(victim)}, path)
    for load in (Bundle.load, load_checkpoint):
        with pytest.raises(ValueError, match="damaged or not a checkpoint of this project"):
            load(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the bomb was none"


def test_a_bare_pickle_cannot_run_code(tmp_path):
    path, victim = tmp_path / "best.ckpt", tmp_path / "exploded"
    path.write_bytes(pickle.dumps(Bomb(victim)))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        Bundle.load(path)
    assert not victim.exists()


TARGETS = [
    "os.system",
    "builtins.eval",
    "torch.hub.load",
    "torch.nn.Linear",
    "siamese.bundle.torch",
    "siamese.bundle.os",
    "siamese.bundle.os.system",
    "siamese.encoders.nn.Linear",
    "siamese.bundle.load_checkpoint",
    "siamese.distances.Module",  # reachable through a trusted package, but not its own
    "siamese.data.samples.Samples",
    "siamese.encoders.Conv5",
    "siamese.nowhere.Conv4",
    "pytorch_metric_learning.utils.common_functions.torch",
    "siameselab.encoders.Conv4",
    "Conv4",
    "",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("part", ["encoder", "distance", "preprocessing"])
def test_only_modules_of_trusted_packages_are_built(part, target):
    with pytest.raises(ValueError, match=r"unless you trust it|there is no class|is not a Module") as refusal:
        Bundle({**PARTS, part: {"_target_": target}})
    assert target in str(refusal.value)


def test_a_class_of_another_kind_is_refused():
    assert type(construct_trusted({"_target_": "siamese.data.glyphs.Glyphs", "homoglyph_filter": False}, Source)).__name__ == "Glyphs"
    for target in ("siamese.encoders.MLP", "siamese.data.samples.Samples", "os.system", "siamese.data.glyphs.np.load"):
        with pytest.raises(ValueError, match=re.escape(target)):
            construct_trusted({"_target_": target}, Source)


@pytest.mark.parametrize("target", ["os.system", "siamese.encoders.nn.Linear"])
def test_a_file_that_names_something_else_is_refused(bundle, tmp_path, target):
    bundle.parts = {**PARTS, "encoder": {"_target_": target, "command": f"touch {tmp_path}/exploded"}}
    bundle.save(tmp_path / "b.safetensors")
    torch.save({"parts": bundle.parts, "state_dict": {}, "config": {}}, tmp_path / "b.ckpt")
    for name in ("b.safetensors", "b.ckpt"):
        with pytest.raises(ValueError, match=target):
            Bundle.load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("part", [{"nonsense": 1}, {"hidden": "many"}, {"input_shape": None}])
def test_arguments_that_do_not_fit_are_refused(part):
    with pytest.raises(ValueError, match=r"siamese\.encoders\.MLP"):
        Bundle({**TABLE, "encoder": {**TABLE["encoder"], **part}})


def test_a_package_of_ones_own_must_be_trusted(tmp_path, monkeypatch):
    (tmp_path / "mine_for_bundle.py").write_text(
        "import torch\nclass Sum(torch.nn.Module):\n    def forward(self, inputs):\n        return inputs.sum(1, keepdim=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = {**TABLE, "encoder": {"_target_": "mine_for_bundle.Sum"}}
    with pytest.raises(ValueError, match=r"mine_for_bundle\.Sum .* trust"):
        Bundle(parts)
    assert "mine_for_bundle" not in sys.modules, "it was not even imported"
    Bundle(parts, trust=("mine_for_bundle",)).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"mine_for_bundle\.Sum .* trust"):
        Bundle.load(tmp_path / "b.safetensors")
    read = Bundle.load(tmp_path / "b.safetensors", trust=("mine_for_bundle",))
    assert read.embed(torch.ones(2, 4)).shape == (2, 1)


@pytest.mark.parametrize("name", ["nowhere.ckpt", "nowhere.safetensors", "."])
def test_a_missing_file_is_named(tmp_path, name):
    for load in (Bundle.load, load_checkpoint):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a model, but a note", b"\x80\x04", b"PK\x03\x04" + bytes(40)])
def test_a_file_of_something_else_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model{suffix} is damaged or not a"):
        Bundle.load(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(bundle, tmp_path, share):
    bundle.save(tmp_path / "whole.safetensors")
    torch.save({"parts": PARTS, "state_dict": bundle.state_dict(), "config": {}}, tmp_path / "whole.ckpt")
    for suffix in (".safetensors", ".ckpt"):
        content = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"half{suffix}").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=f"half{suffix} is damaged"):
            Bundle.load(tmp_path / f"half{suffix}")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"bundle": "no json"},
        {"bundle": "[]"},
        {"bundle": "{}"},
        {"bundle": json.dumps({"parts": PARTS})},
        {"bundle": json.dumps({"parts": {}, "config": {}})},
        {"bundle": json.dumps({"parts": {**PARTS, "encoder": {}}, "config": {}})},
        {"bundle": json.dumps({"parts": {**PARTS, "encoder": "Conv4"}, "config": {}})},
        {"bundle": json.dumps({"parts": PARTS, "config": {}, "decision": {"threshold": 0.5}})},
        {"bundle": json.dumps({"parts": PARTS, "config": {}, "decision": {**DECISION.plain(), "threshold": "high"}})},
        {"bundle": json.dumps({"parts": PARTS, "config": {}, "decision": {**DECISION.plain(), "curve": []}})},
        {"bundle": json.dumps({"parts": {**PARTS, "reader": {"_target_": "siamese.bundle.Standardize"}}, "config": {}})},
    ],
)
def test_safetensors_of_something_else_are_refused(bundle, tmp_path, metadata):
    weights = {name: value.contiguous() for name, value in bundle.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "b.safetensors", metadata)
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        Bundle.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "checkpoint",
    [
        [1, 2],
        {"epoch": 3},
        {"state_dict": {}, "config": {}},
        {"parts": {}, "state_dict": {}, "config": {}},
        {"parts": 1, "state_dict": {}, "config": {}},
        {"parts": {**PARTS, "distance": None}, "state_dict": {}, "config": {}},
        {"parts": PARTS, "state_dict": [], "config": {}},
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"b\.ckpt"):
        Bundle.load(tmp_path / "b.ckpt")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_of_another_encoder_are_refused(bundle, tmp_path, suffix):
    path = tmp_path / f"b{suffix}"
    bundle.parts = {**PARTS, "encoder": {**PARTS["encoder"], "embedding_size": 9}}
    if suffix == ".ckpt":
        torch.save({"parts": bundle.parts, "state_dict": {f"model.{k}": v for k, v in bundle.state_dict().items()}, "config": {}}, path)
    else:
        bundle.save(path)
    with pytest.raises(ValueError, match=f"the weights in .*b{suffix} do not fit its own encoder"):
        Bundle.load(path)
