"""evaluate.py gives the figures of training again, and refuses what would not be the model that was trained."""

import json
import shutil

import pytest
import torch

import evaluate
from siamese.bundle import Bundle
from siamese.config import InputError, compose
from siamese.evaluation import EvaluationResult


def figures(directory) -> dict[str, float]:
    found = json.loads((directory / "metrics.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("seconds/")}


@pytest.fixture
def judge(tmp_path):
    """judge("ckpt=best.ckpt") -> the directory of an evaluation in this process."""

    def run(*overrides: str):
        config = compose(["report=none", *overrides], "evaluate")
        config["paths"]["output_dir"] = str(tmp_path)
        evaluate.evaluate(config)
        return tmp_path

    return run


@pytest.fixture
def data(tiny) -> list[str]:
    return [override for override in tiny if override.startswith("dataset")]


def trained(tiny_run) -> dict[str, float]:
    """What training found, but for the row of the untrained encoder."""
    return {key: value for key, value in figures(tiny_run).items() if not key.startswith("untrained/")}


def test_the_best_checkpoint_gives_the_figures_of_training_again(command, tiny_run, tmp_path):
    done = command("evaluate.py", f"ckpt={tiny_run}/checkpoints/best.ckpt", f"paths.output_dir={tmp_path}/run")
    assert done.code == 0, done.err
    assert figures(tmp_path / "run") == trained(tiny_run)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".hydra", "evaluate.log", "metrics.json", "results.npz", "provenance.json", "report.html"}
    assert "test" in done.out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gpu", "device: gpu is not known: take auto, cpu, cuda, or cuda:1"),
        ("'cuda:'", "device: cuda: is not known"),
        ("cuda", "device: cuda is not there, of GPUs that torch can use this machine has none: say device=cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(judge, tiny_run, monkeypatch, word, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=said):
        judge(f"ckpt={tiny_run}/bundle.safetensors", f"device={word}")


def test_a_gpu_that_is_too_small_is_told_of(judge, tiny_run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Bundle, "embed", full)
    with pytest.raises(InputError, match="the memory of this GPU does not suffice: say device=cpu"):
        judge(f"ckpt={tiny_run}/bundle.safetensors", "device=cpu")


def test_so_does_the_bundle(judge, tiny_run):
    assert figures(judge(f"ckpt={tiny_run}/bundle.safetensors")) == trained(tiny_run)


def test_so_does_the_bundle_wherever_it_is(judge, tiny_run, tmp_path):
    shutil.copy(tiny_run / "bundle.safetensors", tmp_path / "copy.safetensors")
    found = figures(judge(f"ckpt={tmp_path}/copy.safetensors", "seed=5"))  # the model is there: a seed has nothing to decide
    assert found == trained(tiny_run)


def test_views_are_judged_by_training_as_by_evaluation(judge, fit, tiny_run, tmp_path):
    fit(tmp_path / "run", "augmentation=strong", "views=2")
    theirs = trained(tmp_path / "run")
    assert figures(judge(f"ckpt={tmp_path}/run/bundle.safetensors")) == theirs
    assert figures(judge(f"ckpt={tmp_path}/run/checkpoints/best.ckpt", "views=2")) == theirs
    assert figures(judge(f"ckpt={tmp_path}/run/checkpoints/best.ckpt", "views=0"))["test/auc"] != theirs["test/auc"]


def test_a_model_of_known_validation_classes_has_no_threshold_elsewhere_and_its_inputs_are_made_as_its_own(judge, fit, data, tmp_path):
    fit(tmp_path / "run", "dataset.validation=0", "dataset.moments=true")
    theirs, bundle = trained(tmp_path / "run"), f"ckpt={tmp_path}/run/bundle.safetensors"
    assert figures(judge(bundle)) == theirs
    with pytest.raises(InputError, match=r"the model was trained with moments=True: say dataset.moments=true"):
        judge(bundle, *data)
    found = figures(judge(bundle, *data, "dataset.moments=true"))
    assert found == theirs, "validation classes that are held out now were trained on all the same"
    path = next(override for override in data if override.startswith("dataset.path="))
    link = tmp_path / "data" / "omniglot"
    link.parent.mkdir()
    link.symlink_to(path.partition("=")[2])
    found = figures(judge(bundle, "also=[omniglot]", f"paths.data_dir={link.parent}"))
    assert {
        f"omniglot/{key}": value for key, value in theirs.items() if key.startswith("test/") and "error" not in key
    }.items() <= found.items()
    assert "omniglot/test/accuracy" not in found


def test_a_data_set_that_is_said_stands_for_one_that_cannot_be_made_any_more(judge, tiny_run, data, tmp_path):
    bundle = Bundle.load(tiny_run / "bundle.safetensors")
    bundle.config["dataset"]["called_otherwise"] = 1
    bundle.save(tmp_path / "old.safetensors")
    assert figures(judge(f"ckpt={tmp_path}/old.safetensors", *data)) == trained(tiny_run)


def test_the_results_are_those_of_training(judge, tiny_run):
    one = EvaluationResult.load(judge(f"ckpt={tiny_run}/checkpoints/best.ckpt") / "results.npz")
    other = EvaluationResult.load(tiny_run / "results.npz")
    assert set(one) == {"raw", "val", "test"}
    for split in one:
        assert (one[split].neighbours == other[split].neighbours).all()
        assert one[split].ids == other[split].ids


def test_without_a_checkpoint_the_rows_before_training_are_given(judge, tiny, tiny_run):
    said = [override for override in tiny if override.startswith(("dataset", "encoder"))]
    expected = {key: value for key, value in figures(tiny_run).items() if key.startswith(("untrained/", "raw/"))}
    assert figures(judge(*said)) == expected


def test_another_seed_is_another_untrained_encoder(judge, tiny, tiny_run):
    said = [override for override in tiny if override.startswith(("dataset", "encoder"))]
    assert figures(judge(*said, "seed=1"))["untrained/map_at_r"] != figures(tiny_run)["untrained/map_at_r"]


def test_a_model_can_be_judged_on_another_data_set(judge, data, drawings, tiny_run, tmp_path):
    """Here the same one with half of its test alphabets."""
    other = tmp_path / "other"
    shutil.copytree(drawings, other)
    shutil.rmtree(other / "images_evaluation" / "Alphabet5")
    found = figures(judge(f"ckpt={tiny_run}/bundle.safetensors", *data, f"dataset.path={other}"))
    mine = trained(tiny_run)
    assert {key: value for key, value in found.items() if key.startswith("val/")} == {k: v for k, v in mine.items() if k.startswith("val/")}
    assert found["test/map_at_r"] > mine["test/map_at_r"]  # fewer classes to mistake a letter for
    assert found["test/threshold"] == mine["test/threshold"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("encoder=mlp", ["encoder", "ckpt="]),
        ("encoder.widths=[4,4]", ["encoder", "ckpt="]),
        ("distance=euclidean", ["distance", "ckpt="]),
        ("+dataset.size=20", ["dataset=NAME"]),
    ],
)
def test_what_the_checkpoint_decides_cannot_be_said_again(judge, tiny_run, override, parts):
    with pytest.raises(InputError) as error:
        judge(f"ckpt={tiny_run}/checkpoints/best.ckpt", override)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("said", ["dataset=glyphs", "dataset.size=20"])
def test_a_data_set_of_another_shape_is_refused_in_a_sentence(judge, data, tiny_run, said):
    given = [said] if said.startswith("dataset=") else [*data, said]
    with pytest.raises(InputError) as error:
        judge(f"ckpt={tiny_run}/checkpoints/best.ckpt", *given)
    message = str(error.value)
    assert "[1, 16, 16]" in message
    assert ("[1, 32, 32]" if said == "dataset=glyphs" else "[1, 20, 20]") in message
    assert "\n" not in message


def test_a_remedy_names_only_keys_that_there_are(judge, tiny_run):
    with pytest.raises(InputError) as error:
        judge(f"ckpt={tiny_run}/checkpoints/best.ckpt", "dataset=glyphs")
    assert "dataset.size" not in str(error.value), "glyphs has no dataset.size"


def test_a_checkpoint_whose_data_has_gone_says_where_it_looked(judge, tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["config"]["dataset"]["path"] = "/gone/omniglot"
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.raises(InputError) as error:
        judge(f"ckpt={tmp_path}/moved.ckpt")
    assert "/gone/omniglot" in str(error.value)
    assert "\n" not in str(error.value)


def test_several_test_sets_are_judged_at_once_by_the_same_threshold(judge, data, drawings, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path))
    (tmp_path / "omniglot").symlink_to(drawings)
    found = figures(judge(f"ckpt={tiny_run}/bundle.safetensors", "also=[omniglot]"))
    mine = trained(tiny_run)
    assert {key: value for key, value in found.items() if not key.startswith("omniglot/")} == mine
    # It is the same data set here, in the size that the encoder takes, so all but the official runs must come out the same.
    also = {key.removeprefix("omniglot/"): value for key, value in found.items() if key.startswith("omniglot/test/")}
    assert also == {key: value for key, value in mine.items() if key.startswith("test/") and "omniglot_error" not in key}
    assert found["omniglot/raw/recall_at_1"] == mine["raw/recall_at_1"]


@pytest.mark.parametrize(("also", "parts"), [("[omniglo]", ["omniglo", "glyphs"]), ("[glyphs]", ["glyphs", "[1, 32, 32]", "[1, 16, 16]"])])
def test_another_test_set_that_does_not_fit_is_refused(judge, tiny_run, also, parts):
    with pytest.raises(InputError) as error:
        judge(f"ckpt={tiny_run}/bundle.safetensors", f"also={also}")
    assert all(part in str(error.value) for part in ["also", *parts]), error.value
    assert "\n" not in str(error.value)
