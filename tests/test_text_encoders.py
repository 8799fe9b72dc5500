"""Encoders of texts: as the library they come from computes it, complete in one file, and trained by whole runs."""

import functools
import json
import shutil
import socket

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss

import evaluate
from siamese.bundle import Bundle
from siamese.config import InputError, compose
from siamese.data.texts import as_bytes
from siamese.module import SiameseModule
from siamese.text_encoders import NGrams, Transformer

TEXTS = ["the cat", "a cat sat on the mat and on the other mat", "Über 9000 dogs!", "dogs", "x" * 300, "y"] * 15


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_embeddings_are_those_of_the_library(transformer, pool):
    from transformers import AutoModel, AutoTokenizer

    encoder = Transformer(str(transformer), pool=pool, max_length=32).eval()
    tokenizer, model = AutoTokenizer.from_pretrained(transformer), AutoModel.from_pretrained(transformer).eval()
    with torch.no_grad():
        found = encoder(as_bytes(TEXTS))
        for text, embedding in zip(TEXTS[:6], found, strict=False):
            states = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).last_hidden_state[0]
            wanted = states.mean(0) if pool == "mean" else states[0]
            assert torch.allclose(embedding, wanted, atol=1e-5)
    assert torch.allclose(found[:6], found[-6:], atol=1e-5), "whatever it is embedded with"
    assert found.shape == (90, encoder.embedding_size) == (90, 16)


def test_gradients_reach_every_weight(transformer):
    encoder = Transformer(str(transformer), embedding_size=5, max_length=32)
    (encoder(as_bytes(TEXTS)) * torch.randn(5)).sum().backward()
    without = [name for name, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    # Softmax does not change with a key's bias.
    assert [name for name in without if not name.endswith("key.bias")] == []


def bundle(folder, **arguments) -> Bundle:
    parts = {
        "encoder": {"_target_": "siamese.text_encoders.Transformer", "model": str(folder), "max_length": 32, **arguments},
        "distance": {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"},
        "preprocessing": {"_target_": "siamese.bundle.Unchanged"},
    }
    return Bundle(parts)


@pytest.mark.parametrize("arguments", [{}, {"embedding_size": 4}, {"embedding_size": 4, "frozen": True}])
def test_a_bundle_needs_neither_folder_nor_network(transformer, tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path))
    folder = tmp_path / "model"
    shutil.copytree(transformer, folder)
    model = bundle(folder, **arguments)
    model.save(tmp_path / "b.safetensors")
    shutil.rmtree(folder)
    again = Bundle.load(tmp_path / "b.safetensors")
    assert torch.allclose(model.embed(as_bytes(TEXTS)), again.embed(as_bytes(TEXTS)), atol=1e-6)
    assert again.parts == model.parts


def test_lower_layers_learn_more_slowly(transformer):
    def rates(**arguments) -> dict[str, float]:
        model = bundle(transformer, embedding_size=4, layer_decay=0.5)
        module = SiameseModule(model, ContrastiveLoss(), optimizer=functools.partial(torch.optim.SGD, lr=1.0), **arguments)
        names = {weight: name.removeprefix("model.encoder.") for name, weight in module.named_parameters()}
        return {names[weight]: group["lr"] for group in module.grouped_optimizer().param_groups for weight in group["params"]}

    found, said = rates(), rates(lr_factors={"backbone.model.embeddings": 0.01})
    layer = "backbone.model.encoder.layer.{}.output.dense.weight".format
    embeddings = "backbone.model.embeddings.word_embeddings.weight"
    assert (found[embeddings], found[layer(0)], found[layer(1)], found["head.weight"]) == (0.25, 0.5, 1, 1)
    assert (said[embeddings], said[layer(0)]) == (0.01, 0.5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_new_head_learns_at_the_optimizers_rate(transformer, frozen):
    model = bundle(transformer, embedding_size=4, frozen=frozen)
    module = SiameseModule(model, ContrastiveLoss(), optimizer=functools.partial(torch.optim.SGD, lr=1.0), rates={"model.encoder": 1e-5})
    names = {weight: name.removeprefix("model.encoder.").partition(".")[0] for name, weight in module.named_parameters()}
    found = {names[weight]: group["lr"] for group in module.grouped_optimizer().param_groups for weight in group["params"]}
    assert found == ({"head": 1.0} if frozen else {"head": 1.0, "backbone": 1e-5})


def test_what_stands_above_the_layers_learns_at_the_full_rate(tmp_path, transformer):
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 78}
    ModernBertModel(ModernBertConfig(**sizes, pad_token_id=0, max_position_embeddings=64)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(transformer).save_pretrained(tmp_path)
    encoder = Transformer(str(tmp_path), max_length=32, layer_decay=0.5)
    assert encoder.lr_factors == {
        "backbone.model.embeddings": 0.125,
        **{f"backbone.model.layers.{layer}": factor for layer, factor in enumerate((0.25, 0.5, 1))},
    }
    assert encoder(as_bytes(TEXTS)).isfinite().all()


def test_dropout_is_on_in_training(transformer):
    encoder = Transformer(str(transformer), max_length=32)
    assert not torch.equal(encoder(as_bytes(TEXTS)), encoder(as_bytes(TEXTS)))


# --- a bundle is untrusted input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": None}, "its configuration is damaged"),
        ({"config": {"model_type": "bert", "hidden_size": "x"}}, "its configuration is damaged"),
        ({"config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/repo"}}, "its configuration says backbone"),
        ({"config": {"model_type": "bert", "attn_implementation": "evil/kernel"}}, "its configuration says attn_implementation"),
        ({"config": {"model_type": "clip"}}, "its configuration is damaged: it is of no encoder of texts"),
    ],
)
def test_a_bundle_cannot_make_anybody_read_files_or_the_network(transformer, tmp_path, monkeypatch, change, said):
    model = bundle(transformer)
    model.parts["encoder"] |= change
    if change["config"] is None:
        del model.parts["encoder"]["config"]
    model.save(tmp_path / "b.safetensors")

    def refuse(*_, **__):
        raise AssertionError("somebody opens a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ValueError, match=said):
        Bundle.load(tmp_path / "b.safetensors")


def test_an_architecture_without_its_weights_starts_from_random_ones(transformer):
    torch.manual_seed(1)
    one, other, there = (Transformer(str(transformer), pretrained=known, max_length=32) for known in (False, False, True))
    weights = [encoder.backbone.model.encoder.layer[0].attention.self.query.weight for encoder in (one, other, there)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], Transformer(str(transformer), max_length=32).backbone.model.encoder.layer[0].attention.self.query.weight)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "/nowhere/at/all"}, r"model=/nowhere/at/all: there is no such folder"),
        ({"pool": "max"}, r"pool=max is not known: take mean or cls"),
        ({"max_length": 65}, r"max_length=65 tokens must be from 3 to the 64 that"),
        ({"max_length": 2}, r"max_length=2 tokens must be"),
        ({"layer_decay": 0}, r"layer_decay=0 is a share of the learning rate: above 0 and at most 1"),
        ({"frozen": True, "embedding_size": 4, "layer_decay": 0.5}, r"frozen=true trains the head alone, which knows no layer_decay=0.5"),
        ({"frozen": True}, r"frozen=true trains the head alone, which needs an embedding_size"),
    ],
)
def test_bad_input_is_named(transformer, arguments, said):
    with pytest.raises(ValueError, match=said):
        Transformer(**{"model": str(transformer), "max_length": 32, **arguments})


def test_a_folder_without_a_tokenizer_is_refused(transformer, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(transformer / name, tmp_path)
    with pytest.raises(ValueError, match=r"(tokenizer\.json is missing|cannot be loaded)"):
        Transformer(str(tmp_path), max_length=32)


def test_a_damaged_tokenizer_is_named(transformer, tmp_path):
    model = bundle(transformer)
    state = model.state_dict()
    state["encoder.backbone._extra_state"] = state["encoder.backbone._extra_state"][:100]
    with pytest.raises(ValueError, match="tokenizer is damaged"):
        model.load_state_dict(state)


# --- character n-grams


def grams(text: str) -> set[bytes]:
    coded = b"\0" + text.lower().encode() + b"\0" * 4
    every = {coded[start : start + n] for n in (3, 4, 5) for start in range(len(coded) - n + 1)}
    return {gram for gram in every if gram[1:].strip(b"\0")}


def test_ngrams_are_as_alike_as_their_counts():
    texts = ["the cat sat", "The cat sat", "a dog ran far away", "cat", "", "aaaaaa"]
    found = NGrams(2**18)(as_bytes(texts))
    assert torch.equal(found[0], found[1]), "capital letters count as small ones"
    assert not found[4].any()
    for one in (0, 2, 3):
        for other in (0, 2, 3):
            shared = (found[one].clamp(max=1) * found[other].clamp(max=1)).sum()
            assert abs(int(shared) - len(grams(texts[one]) & grams(texts[other]))) <= 1, "but for a collision"
    coded = b"\0" + b"a" * 6 + b"\0" * 4
    counts = {}
    for n in (3, 4, 5):
        for start in range(len(coded) - n + 1):
            gram = coded[start : start + n]
            counts[gram] = counts.get(gram, 0) + bool(gram[1:].strip(b"\0"))
    assert np.allclose(sorted(found[5][found[5] > 0].square().tolist()), sorted(count for count in counts.values() if count))
    assert torch.equal(NGrams()(as_bytes([*texts, "x" * 99]))[:6], NGrams()(as_bytes(texts))), "padding counts for nothing"


def test_similar_texts_are_nearer():
    one, near, far = NGrams()(as_bytes(["how much is on my account", "how much was on my account", "set a timer for eggs"]))
    score = CosineSimilarity()(torch.stack([one, near, far]))
    assert score[0, 1] > 0.7 > 0.3 > score[0, 2]


# --- whole runs


@pytest.fixture
def fit_texts(questions, transformer, tmp_path):
    """fit_texts("loss=triplet") -> (figures, the run's directory) of a tiny run on the questions."""
    import train

    def fit(*overrides: str):
        config = compose(
            [
                *("dataset=texts", f"dataset.path={questions}", "encoder=transformer", f"encoder.model={transformer}"),
                *("encoder.max_length=32", "encoder.lr=0.003", "augmentation=none", "logger=none", "report=none", "sampling.classes=8"),
                *("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1", *overrides),
            ]
        )
        config["paths"]["output_dir"] = str(tmp_path)
        return train.train(config), tmp_path

    return fit


def test_a_run_on_texts_beats_its_start_and_is_judged_again_from_its_bundle(fit_texts, questions):
    figures, folder = fit_texts("trainer.max_epochs=30", "trainer.check_val_every_n_epoch=30")
    assert figures["test/map_at_r"] > figures["untrained/map_at_r"] + 0.1
    assert figures["raw/map_at_r"] > 0.2
    config = compose([f"ckpt={folder / 'bundle.safetensors'}", "report=none"], "evaluate")
    config["paths"]["output_dir"] = str(folder / "again")
    (folder / "again").mkdir()
    again = evaluate.evaluate(config)
    assert {key: value for key, value in figures.items() if key.startswith(("test/", "val/", "raw/"))} == {
        key: value for key, value in again.items() if key.startswith(("test/", "val/", "raw/"))
    }


def test_a_run_is_resumed_and_its_weights_are_taken(fit_texts):
    _, folder = fit_texts("scheduler=none")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    figures, _ = fit_texts("trainer.max_epochs=3", "scheduler=none", f"ckpt={checkpoint}")
    assert json.loads((folder / "metrics.json").read_text()) == figures
    fit_texts(f"init_from={checkpoint}")
    with pytest.raises(InputError, match="another encoder"):
        fit_texts(f"init_from={checkpoint}", "encoder.pool=cls")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["encoder=conv4"], "the encoder does not go with 84 samples of 14 classes, texts: it takes no texts: use encoder=transformer"),
        (["encoder=mlp"], "the encoder does not go with 84 samples of 14 classes, texts: it takes no texts: use encoder=transformer"),
        (["encoder=transformer", "augmentation=light"], "say augmentation=none"),
    ],
)
def test_what_does_not_go_with_texts_is_refused(questions, transformer, tmp_path, overrides, said):
    import train

    model = [f"encoder.model={transformer}", "encoder.max_length=32"] if "encoder=transformer" in overrides else []
    config = compose(["dataset=texts", f"dataset.path={questions}", "augmentation=none", "sampling.classes=8", *overrides, *model])
    config["paths"]["output_dir"] = str(tmp_path)
    with pytest.raises(InputError, match=said):
        train.assemble(config)
