"""Encoders as files of their own: what ONNX Runtime and PyTorch compute from them, and what is refused and leaves nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from siamese import export as exporting
from siamese.bundle import Bundle
from siamese.data.texts import as_bytes
from siamese.decision import Decision
from siamese.export import Exported, export
from siamese.frozen import Frozen

TEXTS = ["the cat", "a cat sat on the mat and on the other mat", "Über 9000 dogs!", "dogs", "x" * 300, "y"] * 12
COSINE = {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"}
EUCLIDEAN = {"_target_": "pytorch_metric_learning.distances.LpDistance", "power": 2}
LEARNED = {"_target_": "siamese.distances.LearnedDistance", "normalize_embeddings": True}
DECISION = Decision("equal_error", 0.5, far=0.1, frr=0.1, same=100, different=100, slope=9.0, intercept=-4.0, curve=[[0.5, 0.1, 0.1]])


def bundle(encoder: str, distance: dict = COSINE, channels: int = 1, **arguments) -> Bundle:
    torch.manual_seed(0)
    target = encoder if "." in encoder else f"siamese.encoders.{encoder}"
    images = {} if encoder.endswith("Transformer") else {"mean": [0.5] * channels, "std": [0.2] * channels}
    preprocessing = {"_target_": f"siamese.bundle.{'Standardize' if images else 'Unchanged'}", **images}
    parts = {"encoder": {"_target_": target, **arguments}, "distance": distance, "preprocessing": preprocessing}
    model = Bundle(parts, trust=(__name__,))
    for name, tensor in model.named_buffers():  # what training leaves, not what it starts from
        if "running" in name:
            tensor += torch.rand_like(tensor)
    if distance is LEARNED:
        nn.init.normal_(model.distance.weight)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def scores_of(metadata: dict[str, str], embeddings: np.ndarray) -> np.ndarray:
    """Of the first embedding with each, by what the file says of itself."""
    found = []
    for other in embeddings:
        names = {"np": np, "a": embeddings[0], "b": other, "weight": np.array(json.loads(metadata.get("weight", "1")))}
        exec(metadata["compare"], names)
        found.append(names["score"])
    return np.array(found)


ALONE = """
import sys, json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = np.load(sys.argv[2])
(taken,), (given,) = session.get_inputs(), session.get_outputs()
np.savez(sys.argv[3], one=session.run(None, {"inputs": images[:1]})[0], all=session.run(["embeddings"], {"inputs": images})[0])
print(json.dumps([taken.type, taken.shape, given.shape, session.get_modelmeta().custom_metadata_map]))
assert not {"torch", "siamese"} & set(sys.modules)
"""


def test_onnx_runtime_alone_gives_the_bundles_embeddings_and_scores(tmp_path):
    model, inputs = bundle("Conv4", widths=[8, 8], input_shape=[1, 16, 16], embedding_size=8).train(), images(7, 1, 16, 16)
    model.decision, model.parts["reader"] = DECISION, {"_target_": "siamese.data.reading.ImageReader", "size": 16, "channels": 1}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = export(model, tmp_path / "encoder.onnx", inputs)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"], "no weights beside it"
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    np.save(tmp_path / "inputs.npy", inputs.numpy())
    run = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in ("encoder.onnx", "inputs.npy", "found.npz"))]
    kind, taken, given, metadata = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    found, wanted = np.load(tmp_path / "found.npz"), model.embed(inputs)
    assert np.allclose(found["all"], wanted, atol=1e-6)
    assert np.allclose(found["one"], wanted[:1], atol=1e-6)
    assert np.allclose(scores_of(metadata, found["all"]), model.scores(wanted[:1], wanted), atol=1e-5)
    assert (kind, taken, given) == ("tensor(uint8)", ["batch", 1, 16, 16], ["batch", 8])
    assert metadata == done.metadata
    assert done.difference == pytest.approx(np.abs(found["all"] - wanted.numpy()).max(), abs=1e-6)
    said = "\n".join(done.lines)
    assert "checked on 7 samples in batches of 1, 2 and 7: off by at most " in said
    assert 'preparation: {"_target_": "siamese.data.reading.ImageReader", "size": 16, "channels": 1}\n' in said
    assert "inputs: uint8 [batch, 1, 16, 16]: batch, channels (grey), height, width, from 0 to 255; divided by 255 and " in said
    assert metadata["threshold"] == "0.5"
    assert metadata["encoder"] == "siamese.encoders.Conv4"
    assert metadata["model"] == model.fingerprint()
    content = (tmp_path / "encoder.onnx").read_bytes()
    assert exporting.__file__.rpartition("/")[0].encode() not in content, "paths of the machine that it was made on"


def loaded(path) -> tuple[nn.Module, dict[str, str]]:
    metadata = {"compare": ""}
    return torch.export.load(path, extra_files=metadata).module(), metadata


@pytest.mark.parametrize("distance", [COSINE, EUCLIDEAN, LEARNED, {**EUCLIDEAN, "p": 1, "normalize_embeddings": False}])
def test_torch_gives_the_bundles_embeddings_and_scores(tmp_path, distance):
    model, rows = bundle("MLP", distance, channels=5, input_shape=[5], hidden=[8], embedding_size=6), torch.randn(9, 5)
    done = export(model, tmp_path / "encoder.pt2", rows, preparation={"columns": list("abcde")})
    encoder, metadata = loaded(tmp_path / "encoder.pt2")
    wanted = model.embed(rows)
    for size in (1, 4, 9):
        assert torch.allclose(encoder(rows[:size]), wanted[:size], atol=1e-6)
    assert np.allclose(scores_of(metadata, wanted.numpy()), model.scores(wanted[:1], wanted), atol=1e-5)
    assert metadata == done.metadata
    assert "threshold" not in metadata
    assert {"threshold: none was fitted", 'preparation: {"columns": ["a", "b", "c", "d", "e"]}'} <= set(done.lines)


def test_a_file_holds_no_samples_and_no_paths(tmp_path):
    inputs = torch.full((4, 5), 0.123456789)
    export(bundle("MLP", channels=5, input_shape=[5], hidden=[4]), tmp_path / "encoder.pt2", inputs)
    content = (tmp_path / "encoder.pt2").read_bytes()  # a zip archive that is not compressed
    assert b"MLP" in content
    assert inputs[0, :1].numpy().tobytes() not in content
    assert exporting.__file__.rpartition("/")[0].encode() not in content


def test_a_frozen_backbone_computes_within_the_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path / "data"))
    model = bundle("Timm", channels=3, input_shape=[3, 32, 32], model="test_resnet", pool="gem", frozen=True)
    export(model, tmp_path / "encoder.pt2", images(3, 3, 32, 32))
    assert not (tmp_path / "data").exists(), "nothing is remembered"
    assert all(part.remembers for part in model.modules() if isinstance(part, Frozen))
    encoder, others = loaded(tmp_path / "encoder.pt2")[0], images(11, 3, 32, 32)
    assert torch.allclose(encoder(others), model.embed(others), atol=1e-5)


def of_texts(session, metadata: dict[str, str], texts: list[str]) -> np.ndarray:
    from tokenizers import Tokenizer

    coded = Tokenizer.from_str(metadata["tokenizer"]).encode_batch(texts)
    ids, mask = (np.array([getattr(one, name) for one in coded]) for name in ("ids", "attention_mask"))
    return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def test_a_transformer_takes_tokens_and_brings_its_tokenizer(tmp_path, transformer):
    import onnxruntime

    texts = "siamese.text_encoders.Transformer"
    model = bundle(texts, model=str(transformer), max_length=24, embedding_size=4, frozen=True)
    model.encoder.backbone.remembers = False
    done = export(model, tmp_path / "encoder.onnx", as_bytes(TEXTS[:5]))
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == done.metadata
    assert [entry.shape for entry in session.get_inputs()] == [["batch", "length"]] * 2
    wanted = model.embed(as_bytes(TEXTS))
    assert np.allclose(of_texts(session, metadata, TEXTS), wanted, atol=1e-5), "longer than what it was checked on, and cut"
    assert np.allclose(of_texts(session, metadata, TEXTS[3:4]), wanted[3:4], atol=1e-5)


def test_a_transformer_in_torch(tmp_path, transformer):
    model = bundle("siamese.text_encoders.Transformer", model=str(transformer), max_length=24, pool="cls")
    done = export(model, tmp_path / "encoder.pt2", as_bytes(TEXTS))
    encoder, metadata = loaded(tmp_path / "encoder.pt2")
    assert done.difference < 1e-5
    assert encoder(torch.tensor([[2, 4, 3]]), torch.ones(1, 3, dtype=torch.int64)).shape == (1, 16)
    assert "tokenizer" in metadata


# --- what is refused, and leaves nothing


class Cheating(nn.Module):
    """Another one where it is traced."""

    def forward(self, inputs):
        return inputs.flatten(1) * (1.001 if torch.compiler.is_exporting() else 1)


class Undecided(nn.Module):
    """Does what its inputs are like, one by one in Python."""

    def forward(self, inputs):
        return torch.stack([row.flatten() * (2 if row.sum() > 0 else 1) for row in inputs])


class OfItsBatch(nn.Module):
    """Sees the others of its batch."""

    def forward(self, inputs):
        return inputs.flatten(1) - inputs.flatten(1).mean(0)


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (Cheating, r"encoder\.pt2 would not be the model: its embeddings differ by 0\.00\d+, where the largest number is 2\.5"),
        (Undecided, r"Undecided cannot be written as a graph for batches of any size: "),
        (OfItsBatch, r"encoder\.pt2 would not be the model: its embeddings differ by "),
    ],
)
def test_another_number_is_refused_and_leaves_no_file(tmp_path, encoder, said):
    model = bundle(f"{__name__}.{encoder.__name__}")
    with pytest.raises(ValueError, match=said):
        export(model, tmp_path / "encoder.pt2", images(6, 1, 4, 4))
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_stays(tmp_path):
    (tmp_path / "encoder.pt2").write_text("the last one")
    with pytest.raises(ValueError, match="would not be the model"):
        export(bundle(f"{__name__}.Cheating"), tmp_path / "encoder.pt2", images(6, 1, 4, 4))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last one"]


@pytest.mark.parametrize(
    ("name", "samples", "said"),
    [
        ("encoder.pth", 2, r"encoder\.pth: the ending says what to write, \.onnx for ONNX Runtime or \.pt2 for PyTorch"),
        ("encoder.onnx", 0, r"encoder\.onnx is checked on real samples: give at least one"),
        ("no/encoder.onnx", 2, r"there is no folder .*no$"),
        ("encoder.onnx", 2, r"an \.onnx file holds at most 2 GB, these weights are 0\.0 GB: write a \.pt2 file"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, name, samples, said):
    monkeypatch.setattr(exporting, "_MOST", 100)
    with pytest.raises(ValueError, match=said):
        export(bundle("MLP", input_shape=[1, 4, 4]), tmp_path / name, images(samples, 1, 4, 4))
    assert not list(tmp_path.iterdir())


def test_an_average_over_views_is_not_written_as_if_it_were_of_one(tmp_path):
    model = bundle("Conv4", widths=[8, 8], input_shape=[1, 16, 16], embedding_size=8)
    model.look(3, {"_target_": "siamese.data.augmentation.Augment", "shift": 0.1})
    with pytest.raises(ValueError, match=r"encoder.pt2 would hold the encoder alone, this model averages over 3 views"):
        export(model, tmp_path / "encoder.pt2", images(6, 1, 16, 16))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder here that takes no files from anybody")
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_file_that_cannot_be_written_is_an_error_of_the_system(ending):
    with pytest.raises(OSError, match=r"/proc/encoder\.part"):
        export(bundle("MLP", input_shape=[1, 4, 4], hidden=[4]), f"/proc/encoder.{ending}", images(2, 1, 4, 4))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_NEEDS", ("torch", "no_such_package"))
    with pytest.raises(ValueError, match=r"an \.onnx file needs no_such_package: run `pip install -e '\.\[export\]'`"):
        export(bundle("MLP", input_shape=[1, 4, 4]), tmp_path / "encoder.onnx", images(2, 1, 4, 4))


# --- every encoder, in both formats


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [
        ("Conv4", {"input_shape": [3, 32, 32]}),
        ("Koch", {"input_shape": [3, 65, 65], "embedding_size": 32}),
        ("MLP", {"input_shape": [3, 8, 8]}),
        *(
            ("Timm", {"input_shape": [3, 64, 64], "model": "resnet10t", "pool": pool, "frozen": frozen, "hidden": [8], "normalize": True})
            for pool in (None, "avg", "max", "gem")
            for frozen in (False, True)
        ),
        ("Timm", {"input_shape": [3, 64, 64], "model": "convnext_atto", "pool": "gem"}),
        ("Timm", {"input_shape": [3, 224, 224], "model": "vit_tiny_patch16_224"}),
        ("Timm", {"input_shape": [3, 224, 224], "model": "swin_s3_tiny_224", "pool": "gem", "frozen": True}),  # channels last
    ],
)
def test_every_encoder_of_images(tmp_path, encoder, arguments, ending):
    done = export(bundle(encoder, channels=3, **arguments), tmp_path / f"encoder.{ending}", images(5, *arguments["input_shape"]))
    assert isinstance(done, Exported)
    assert done.difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", ["ModernBert", "Roberta", "MPNet", "DebertaV2", "Qwen3"])
def test_every_kind_of_transformer(tmp_path, transformer, kind, ending):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 78}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8} if kind == "Qwen3" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, max_position_embeddings=300)
    folder = tmp_path / "model"
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(transformer)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    model = bundle("siamese.text_encoders.Transformer", model=str(folder), max_length=200)
    texts = [*TEXTS[:6], "a b c d e f g " * 30]  # longer than the windows that some have
    assert export(model, tmp_path / f"encoder.{ending}", as_bytes(texts)).difference < 1e-4
