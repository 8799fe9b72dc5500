"""Whole runs: what they leave behind, that their figures are true, and that a seed decides all of them."""

import csv
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from siamese.bundle import Bundle, load_checkpoint
from siamese.config import ROOT, available, compose
from siamese.data.glyphs import Glyphs
from siamese.data.omniglot import Omniglot
from siamese.evaluation import EvaluationResult, evaluate
from siamese.judging import figures

# The contract's names, from DESIGN and not from the code.
ALWAYS = [
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "map_at_r",
    "r_precision",
    "mrr",
    "auc",
    "eer",
    "average_precision",
    "best_f1",
    "threshold",
    "accuracy",
]


def metrics(run) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def without_seconds(run) -> dict[str, float]:
    return {key: value for key, value in metrics(run).items() if not key.startswith("seconds/")}


def rows(run) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def column(run, name: str) -> list[float]:
    return [float(row[name]) for row in rows(run) if row.get(name)]


# --- what a default run leaves behind


def test_a_run_leaves_the_files_of_the_contract(default_run):
    files = [".hydra/config.yaml", ".hydra/overrides.yaml", "train.log", "checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    files += ["bundle.safetensors", "metrics.csv", "metrics.json", "results.npz", "provenance.json", "report.html"]
    assert [name for name in files if not (default_run / name).is_file()] == []
    assert (default_run / "wandb").is_dir()
    assert list(default_run.rglob("*.part")) == []


def test_a_run_leaves_nothing_else(default_run):
    known = {
        ".hydra",
        "train.log",
        "checkpoints",
        "bundle.safetensors",
        "metrics.csv",
        "metrics.json",
        "results.npz",
        "provenance.json",
        "report.html",
        "wandb",
        "check.csv",  # some drawings of a letter occur twice
    }
    assert {path.name for path in default_run.iterdir()} - known == set()
    assert {path.name for path in (default_run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_the_final_figures_are_flat_and_have_the_names_of_the_contract(default_run):
    found = metrics(default_run)
    intervals = {key: found.pop(key) for key in list(found) if key.endswith("_ci95")}
    assert all(low <= found[key.removesuffix("_ci95")] <= high for key, (low, high) in intervals.items())
    assert "test/map_at_r_ci95" in intervals
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in found.values())
    assert {key.partition("/")[0] for key in found} == {"val", "test", "untrained", "raw", "seconds"}
    for prefix in ("val", "test", "untrained", "raw"):
        names = {key.partition("/")[2] for key in found if key.startswith(f"{prefix}/")}
        assert {*ALWAYS, "tar_at_far_1e2", "oneshot_5way", "oneshot_20way"} <= names
    assert {key for key in found if key.startswith("seconds/")} == {"seconds/fit", "seconds/evaluate"}


def test_without_baselines_a_run_finds_the_same_of_its_model_and_has_a_page(fit, tiny_run, tmp_path):
    fit(tmp_path / "run", "baselines=false", "report=html")
    left_out = ("raw/", "untrained/", "seconds/")
    assert metrics(tmp_path / "run").items() >= {k: v for k, v in metrics(tiny_run).items() if not k.startswith(left_out)}.items()
    assert not any(key.startswith(left_out[:2]) for key in metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_figure_that_cannot_be_computed_is_absent_and_the_log_says_why(default_run):
    assert "test/tar_at_far_1e6" not in metrics(default_run)
    assert "tar_at_far_1e6 is left out" in (default_run / "train.log").read_text()


def test_the_figures_are_those_of_the_best_checkpoint_and_the_threshold_is_vals(default_run):
    model = Bundle.load(default_run / "checkpoints" / "best.ckpt")
    found = metrics(default_run)

    def judged(split: str, **fitted):
        samples = Glyphs().split(split)
        return evaluate(model.embed(samples.inputs), samples.labels, model.distance, **fitted)

    val = judged("val")
    assert {key.partition("/")[2]: value for key, value in found.items() if key.startswith("val/") and "_ci95" not in key} == val.figures
    test = judged("test", threshold=val.figures["threshold"], calibration=val.calibration).figures
    assert {key.partition("/")[2]: value for key, value in found.items() if key.startswith("test/") and "_ci95" not in key} == test


def test_the_best_checkpoint_is_that_of_the_best_validation(default_run):
    curve, steps = column(default_run, "val/map_at_r"), [int(row["step"]) for row in rows(default_run) if row["val/map_at_r"]]
    best = torch.load(default_run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == steps[int(np.argmax(curve))] + 1
    # Validation while training runs in reduced precision where the processor has it; the final figure does not.
    assert metrics(default_run)["val/map_at_r"] == pytest.approx(max(curve), abs=0.01)


def test_the_bundle_is_the_best_checkpoint_with_a_threshold(default_run):
    bundle, best = Bundle.load(default_run / "bundle.safetensors"), Bundle.load(default_run / "checkpoints" / "best.ckpt")
    assert bundle.threshold == metrics(default_run)["val/threshold"]
    assert best.decision == bundle.decision, "recognition may begin with either"
    assert bundle.config["choices"]["loss"] == "supcon"
    inputs = Glyphs().split("val").inputs[:64]
    assert torch.equal(bundle.embed(inputs), best.embed(inputs))


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_hold_only_tensors_and_plain_values(default_run, name):
    checkpoint = torch.load(default_run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    assert checkpoint["config"]["choices"]["dataset"] == "glyphs"
    assert checkpoint["parts"]["encoder"]["_target_"] == "siamese.encoders.Conv4"
    json.dumps([checkpoint["config"], checkpoint["parts"]])


def test_the_results_agree_with_the_figures(default_run):
    results = EvaluationResult.load(default_run / "results.npz")
    found = without_seconds(default_run)
    assert dict(figures(results)) == found
    for prefix, result in results.items():
        first = result.labels[result.neighbours[:, 0]] == result.labels
        # Of equal scores `neighbours` and `recall_at_1` both take the different class first.
        assert first.mean() == pytest.approx(found[f"{prefix}/recall_at_1"], abs=1e-9)
        at_threshold = np.searchsorted(-result.thresholds, -found[f"{prefix}/threshold"], side="right") - 1
        accuracy = (result.tar[at_threshold] + 1 - result.far[at_threshold]) / 2
        assert accuracy == pytest.approx(found[f"{prefix}/accuracy"], abs=0.005)  # the curve keeps 1,000 of its points
        assert len(result.ids) == len(result.labels)
    assert results["test"].ids == Glyphs().split("test").ids


def test_the_curves_have_the_loss_the_health_of_the_space_and_validation(default_run):
    assert len(column(default_run, "train/loss")) == 6  # 2 epochs of 6 steps, each second one logged
    assert len(column(default_run, "val/map_at_r")) == 2
    assert len(column(default_run, "val/eer")) == 2
    for name in ("positive_distance", "negative_distance", "spread", "mined_tuples", "mined_fraction"):
        values = column(default_run, f"train/{name}")
        assert len(values) == 6, name
        assert all(value > 0 for value in values), name
    assert column(default_run, "train/negative_distance")[-1] > column(default_run, "train/positive_distance")[-1]


def test_the_log_names_data_and_directory(default_run):
    log = (default_run / "train.log").read_text()
    samples = Glyphs().split("train")
    assert f"{len(samples):,} samples of {len(samples.class_names)} classes" in log
    assert os.path.relpath(default_run, ROOT) in log
    assert [line for line in log.splitlines() if "WARNING" in line] == []


def test_provenance_names_commit_versions_and_data(default_run, tiny_run):
    found = json.loads((default_run / "provenance.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert isinstance(found["dirty"], bool)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["data"]["train"] == Glyphs().split("train").fingerprint()
    assert found["data"]["val"] == Glyphs().split("val").fingerprint()
    other = json.loads((tiny_run / "provenance.json").read_text())
    assert not set(found["data"].values()) & set(other["data"].values())


def test_provenance_names_the_test_data_that_was_judged(default_run):
    found = json.loads((default_run / "provenance.json").read_text())
    assert found["data"].get("test") == Glyphs().split("test").fingerprint()


# --- a seed decides everything


def test_the_same_command_gives_the_same_figures_and_weights(fit, tiny_run, tmp_path):
    fit(tmp_path)
    assert without_seconds(tmp_path) == without_seconds(tiny_run)
    one, other = (load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (tmp_path, tiny_run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_figures(fit, tiny_run, tmp_path):
    fit(tmp_path, "seed=1")
    one, other = without_seconds(tmp_path), without_seconds(tiny_run)
    assert one["val/map_at_r"] != other["val/map_at_r"]
    assert one["untrained/map_at_r"] != other["untrained/map_at_r"]
    assert {k: v for k, v in one.items() if k.startswith("raw/")} == {k: v for k, v in other.items() if k.startswith("raw/")}


def test_a_seed_decides_all_whatever_else_ran_before(fit, tiny_run, tmp_path):
    torch.rand(17)
    np.random.rand(17)
    fit(tmp_path, "callbacks=none", "logger=none")
    assert without_seconds(tmp_path) == without_seconds(tiny_run)


# --- what a run may be told


def test_without_test_the_test_split_is_never_read(fit, tmp_path, monkeypatch):
    asked = []
    split = Omniglot.split
    monkeypatch.setattr(Omniglot, "split", lambda self, name: asked.append(name) or split(self, name))
    runs = Omniglot.oneshot_runs
    monkeypatch.setattr(Omniglot, "oneshot_runs", lambda self, split="test": asked.append(f"runs of {split}") or runs(self, split))
    fit(tmp_path, "test=false")
    assert set(asked) == {"train", "val", "runs of val"}
    prefixes = {key.partition("/")[0] for key in metrics(tmp_path)}
    assert prefixes == {"val", "untrained", "raw", "seconds"}
    assert set(EvaluationResult.load(tmp_path / "results.npz")) == {"val", "untrained", "raw"}


def test_a_run_on_all_alphabets_tells_nothing_of_validation(fit, tmp_path, caplog):
    found = fit(tmp_path, "dataset.validation=0", "augmentation=handwriting", "augmentation.classwise={rotation: 180}")
    assert {key.partition("/")[0] for key in found} == {"test", "untrained", "raw", "seconds"}
    assert "test/map_at_r" in found
    assert not {f"test/{name}" for name in ("threshold", "accuracy", "far", "frr", "calibration_error")} & found.keys()
    assert Bundle.load(tmp_path / "bundle.safetensors").threshold is None
    assert Bundle.load(tmp_path / "checkpoints" / "best.ckpt").threshold is None
    assert "the validation classes are trained on too" in caplog.text


def test_official_oneshot_runs_are_judged(tiny_run):
    found = metrics(tiny_run)
    assert 0 <= found["test/omniglot_error"] <= 100
    assert "val/omniglot_error" not in found


@pytest.mark.parametrize(
    "overrides", ["sampling=pairs loss=contrastive", "sampling=pairs loss=contrastive distance=euclidean", "sampling=triplets loss=triplet"]
)
def test_a_batch_that_brings_its_tuples_needs_no_miner(fit, tmp_path, caplog, overrides):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, *overrides.split(), "miner=semihard", "test=false")
    said = [record.message for record in caplog.records if "miner=" in record.message]
    assert len(said) == 1
    assert "miner=semihard is not used" in said[0]
    size = {"pairs": 64, "triplets": 42}[overrides.partition("sampling=")[2].partition(" ")[0]]
    assert column(tmp_path, "train/mined_tuples")[0] == size
    assert column(tmp_path, "val/loss")


def test_without_a_miner_nothing_is_said_of_one(fit, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, "sampling=triplets", "loss=triplet", "test=false", "trainer.max_epochs=1")
    assert caplog.records
    assert not [record for record in caplog.records if "miner=" in record.message]


def test_a_miner_chooses_among_the_tuples_of_a_balanced_batch(fit, tmp_path):
    fit(tmp_path, "loss=triplet", "miner=semihard", "test=false", "trainer.max_epochs=1")
    assert all(0 < fraction < 1 for fraction in column(tmp_path, "train/mined_fraction"))


def test_arcface_trains_its_class_directions_at_their_own_rate(fit, tmp_path):
    fit(tmp_path, "loss=arcface", "distance=euclidean", "loss.lr=0.06", "optimizer.lr=0.002", "test=false", "trainer.max_epochs=4")
    last = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert last["state_dict"]["loss.W"].shape == (16, 32)
    model, directions = last["optimizer_states"][0]["param_groups"]
    assert directions["initial_lr"] == pytest.approx(30 * model["initial_lr"])
    assert Bundle.load(tmp_path / "bundle.safetensors").threshold <= 0  # a Euclidean score is a negative distance


def test_early_stopping_ends_the_run(fit, tmp_path):
    fit(
        tmp_path, "callbacks=early_stopping", "callbacks.early_stopping.patience=2", "trainer.max_epochs=30", "optimizer.lr=0", "test=false"
    )
    assert 3 <= len(column(tmp_path, "val/map_at_r")) < 15
    assert (tmp_path / "metrics.json").is_file()


def test_the_final_figures_are_those_of_the_best_epoch_not_of_the_last(fit, gets_worse, drawings, tmp_path):
    fit(tmp_path, "trainer.max_epochs=4", "test=false")
    best = load_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["epoch"]
    assert best == int(np.argmax(column(tmp_path, "val/map_at_r"))) < 2
    samples = Omniglot(drawings, "small1", 16).split("val")
    model = Bundle.load(tmp_path / "checkpoints" / "best.ckpt")
    figure = evaluate(model.embed(samples.inputs), samples.labels, model.distance).figures["map_at_r"]
    assert metrics(tmp_path)["val/map_at_r"] == figure
    bundle = Bundle.load(tmp_path / "bundle.safetensors")
    assert torch.equal(bundle.embed(samples.inputs), model.embed(samples.inputs))


def test_the_last_checkpoint_is_that_of_the_last_validation(fit, gets_worse, tmp_path):
    """Also when it is not the best: from there a run is resumed."""
    fit(tmp_path, "trainer.max_epochs=3", "test=false")
    curve = column(tmp_path, "val/map_at_r")
    assert np.argmax(curve) < 2
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["epoch"] == 2


def test_the_metric_decides_which_checkpoint_is_best(fit, tmp_path):
    figure = fit(tmp_path, "optimized_metric=val/eer", "trainer.max_epochs=4", "test=false")["val/eer"]
    curve = column(tmp_path, "val/eer")
    assert len(set(curve)) > 1
    assert figure == pytest.approx(min(curve), abs=0.02)  # the curve may be of reduced precision
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 2 * (int(np.argmin(curve)) + 1)


def test_the_last_epoch_is_validated_whatever_the_interval(fit, tmp_path):
    fit(tmp_path, "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", "test=false")
    assert [int(row["epoch"]) for row in rows(tmp_path) if row["val/map_at_r"]] == [1, 2]


def test_weights_can_be_taken_from_another_run_and_nothing_else(fit, tiny_run, tmp_path):
    fit(tmp_path, f"init_from={tiny_run}/checkpoints/best.ckpt", "optimizer.lr=1e-12", "augmentation=none", "trainer.max_epochs=1")
    found, given = without_seconds(tmp_path), without_seconds(tiny_run)
    assert found["untrained/map_at_r"] == given["test/map_at_r"], "the row before training is that of the weights taken"
    assert int(rows(tmp_path)[0]["step"]) == 0
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (0, 2)


def test_weights_can_be_taken_from_a_bundle(fit, tiny_run, tmp_path):
    fit(tmp_path, f"init_from={tiny_run}/bundle.safetensors", "trainer.max_epochs=1")
    assert without_seconds(tmp_path)["untrained/map_at_r"] == without_seconds(tiny_run)["test/map_at_r"]


# Those of photos are in tests/test_photos.py, the quick one is run by tests/test_readme.py.
EXPERIMENTS = [name for name in available("experiment") if name not in ("none", "omniglot_quick") and not name.startswith("photos")]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_shipped_experiment_runs(command, drawings, transformer, questions, tmp_path, experiment):
    dataset, quick = compose([f"experiment={experiment}", f"dataset.path={tmp_path}"])["choices"]["dataset"], []
    if experiment == "koch":  # the least size that its encoder takes; 38 million weights of its 39 are of the last layer
        quick = ["dataset.size=65", "encoder.embedding_size=128", "sampling.batch_size=8", f"dataset.path={drawings}"]
    elif experiment == "matching":
        for name in ("train", "valid", "test"):
            rows = [f"COL n VAL {name} {row // 2}\tCOL n VAL {name} {row // 2 + row % 2} !\t{1 - row % 2}\n" for row in range(20)]
            (tmp_path / f"{name}.txt").write_text("".join(rows))
        quick = [f"dataset.path={tmp_path}", f"encoder.model={transformer}", "encoder.max_length=32", "sampling.batch_size=4", "test=false"]
    elif experiment == "intents":
        quick = ["dataset=texts", f"dataset.path={questions}", f"encoder.model={transformer}", "encoder.max_length=32", "test=false"]
    elif dataset == "omniglot":
        quick = [f"dataset.path={drawings}", "sampling.classes=16"]
    quick += ["dataset.background=small1", "dataset.validation=1", "test=false"] if dataset == "omniglot" else []
    done = command("train.py", f"experiment={experiment}", "debug=fast", "logger=none", *quick, f"paths.output_dir={tmp_path}/run")
    assert done.code == 0, done.err
    assert metrics(tmp_path / "run")["val/average_precision"] > 0
    assert len(column(tmp_path / "run", "train/loss")) == 3


# --- a run that is stopped


def test_a_run_that_is_interrupted_keeps_its_last_checkpoint_and_finishes_in_wandb(start, tiny, wandb_run, tmp_path):
    run, long = tmp_path / "run", [override for override in tiny if not override.startswith("trainer.max_epochs")]
    running = start("train.py", *long, "trainer.max_epochs=5000", "logger=wandb", "test=false", f"paths.output_dir={run}")
    last = run / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 60
    while running.process.is_alive() and not last.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(running.process.pid, signal.SIGINT)
    done = running.wait(60)
    assert done.code != 0
    assert load_checkpoint(last)["global_step"] >= 2
    assert not (run / "metrics.json").exists()
    assert "Traceback" not in done.err
    summary, records = wandb_run(run)
    assert records[-1]["type"] == "exit"
    assert summary["exit_code"] == 1
    assert summary["state"] != "running"


@pytest.mark.slow
def test_a_compiled_encoder_trains_to_the_same_and_is_saved_as_any_other(fit, tmp_path):
    figures = [fit(tmp_path / str(switch), f"compile={switch}", "test=false") for switch in (True, False)]
    assert figures[0]["val/map_at_r"] == pytest.approx(figures[1]["val/map_at_r"], abs=0.02)
    states = [Bundle.load(tmp_path / str(switch) / "checkpoints" / "best.ckpt").state_dict().keys() for switch in (True, False)]
    assert states[0] == states[1]


def test_arrays_that_are_freed_stay_with_the_process():
    """Each step asks for as much again: on Linux a page that comes back from the system is a fault, and is cleared first."""
    code = """
import platform, resource, torch, train

def faults(rounds=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        arrays = [torch.ones(4 << 20) for _ in range(6)]  # of 16 MB
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

train.keep_memory()
faults(3)
print(faults() if platform.libc_ver()[0] == "glibc" else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # without it, all 120,000 pages of 4 KB again and again
