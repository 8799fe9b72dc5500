"""A run that was cut off and resumed ends as one that was never cut off, to the last bit."""

import contextlib
import csv
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from siamese.config import InputError, newest_checkpoint
from siamese.module import SiameseModule

EPOCHS = ("trainer.max_epochs=4", "test=false")
SECONDS = {"seconds/fit": None, "seconds/evaluate": None}
RUNS = {
    "the default": [],
    "a loss with weights of its own": ["loss=arcface", "scheduler=cosine"],
    "a memory, and a miner that draws in its second stage": [
        *("loss=xbm", "loss.memory_size=200"),
        *("miner=scheduled", "miner.start_epoch.late=2", "miner@miner.stages.late=distance_weighted"),
    ],
    "pairs, a learned distance and momentum": [
        *("sampling=pairs", "loss=bce", "distance=learned", "optimizer=sgd", "optimizer.lr=0.01"),
    ],
}


def rows(run) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def metrics(run) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def final(run) -> dict[str, float]:
    found = metrics(run)
    return {key: value for key, value in found.items() if key.startswith("val/")}


def checkpoint(run, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture
def cut_off(fit, monkeypatch):
    """cut_off(folder, "loss=triplet") -> a run that dies when its third epoch starts."""

    def run(folder, *overrides: str) -> None:
        start = SiameseModule.on_train_epoch_start

        def die(module):
            if module.current_epoch == 2:
                raise RuntimeError("the power went")
            start(module)

        with monkeypatch.context() as patch:
            patch.setattr(SiameseModule, "on_train_epoch_start", die)
            with pytest.raises(RuntimeError, match="the power went"):
                fit(folder, *overrides, *EPOCHS)

    return run


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """straight("loss=triplet") -> the directory of a run that never stopped, each made once and to be read only."""

    @functools.cache
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("straight") / "run"
        fit(folder, *overrides, *EPOCHS)
        return folder

    return run


@pytest.mark.parametrize("overrides", RUNS.values(), ids=list(RUNS))
def test_a_resumed_run_ends_as_one_that_never_stopped(fit, cut_off, straight, tmp_path, overrides):
    whole, first, second = straight(*overrides), tmp_path / "first", tmp_path / "second"
    cut_off(first, *overrides)
    before = checkpoint(first)
    assert before["epoch"] == 1, "last.ckpt is that of an earlier epoch"
    assert not (first / "metrics.json").exists()
    fit(second, *overrides, *EPOCHS, f"ckpt={first}/checkpoints/last.ckpt")

    one, other = checkpoint(whole), checkpoint(second)
    assert other["global_step"] == one["global_step"] == 2 * before["global_step"]
    assert not equal(before["state_dict"], other["state_dict"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(one[part], other[part]), part
    # Its curves go on where the first one's ended.
    assert int(rows(second)[0]["step"]) == before["global_step"]
    tail = [row for row in rows(whole) if int(row["step"]) >= before["global_step"]]
    for name in ("train/loss", "val/map_at_r"):
        assert [row[name] for row in rows(second) if row[name]] == [row[name] for row in tail if row[name]]


MID_EPOCH = {
    "a memory, and a miner that draws in its second stage": [
        *RUNS["a memory, and a miner that draws in its second stage"],
        "sampling.classes=4",
    ],
    "an average, frozen parts, gradients added up": [
        "callbacks=[ema,freeze]",
        "callbacks.freeze.parts=[layers.0]",
        "trainer.accumulate_grad_batches=2",
        "sampling.classes=4",
        "save_every=2",
    ],
    "pairs, a learned distance and momentum": [*RUNS["pairs, a learned distance and momentum"], "sampling.batch_size=8"],
    "triplets, judged every second epoch": [
        "sampling=triplets",
        "loss=triplet",
        "sampling.batch_size=8",
        "trainer.check_val_every_n_epoch=2",
    ],
}


@pytest.mark.parametrize("overrides", MID_EPOCH.values(), ids=list(MID_EPOCH))
def test_a_run_cut_off_in_the_middle_of_an_epoch_ends_as_one_that_never_stopped(fit, straight, monkeypatch, tmp_path, overrides):
    overrides = [*EPOCHS, "save_every=3", *overrides, "trainer.log_every_n_steps=2"]
    whole, step, steps = straight(*overrides), SiameseModule.training_step, []

    def die(module, batch, batch_idx):
        if module.current_epoch == 2 and batch_idx == 5:
            raise RuntimeError("the power went")
        steps.append(module.global_step)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SiameseModule, "training_step", die)
        with pytest.raises(RuntimeError, match="the power went"):
            fit(tmp_path, *overrides)
    before = checkpoint(tmp_path)
    in_epoch = before["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
    assert before["epoch"] == 2
    assert 0 < in_epoch <= 5
    assert (tmp_path / "checkpoints" / "previous.ckpt").exists()
    fit(tmp_path, *overrides, f"ckpt={tmp_path}/checkpoints/last.ckpt")

    one, other = checkpoint(whole), checkpoint(tmp_path)
    assert other["global_step"] == one["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(one[part], other[part]), part
    assert final(tmp_path) == final(whole)
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_run_killed_anywhere_ends_as_one_that_was_not(start, tiny, tmp_path):
    """SIGKILL at two random steps, and between them while a checkpoint is being written; the same command each time."""
    overrides = [*tiny, "trainer.max_epochs=3", "sampling.classes=4", "save_every=3", "test=false", "resume=auto"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start("train.py", *overrides, f"paths.output_dir={whole}").wait().code == 0
    steps = len(rows(whole))
    kills = sorted(np.random.default_rng(0).choice(np.arange(2, steps - 2), 2, replace=False).tolist())
    kills.insert(1, "in a save")
    for at in kills:
        command = start("train.py", *overrides, f"paths.output_dir={run}")
        partial, curves, written, killed = run / "checkpoints" / "last.ckpt.part", run / "metrics.csv", 0, False
        while command.process.is_alive() and not killed:
            with contextlib.suppress(FileNotFoundError):  # it is replaced when a column comes to it
                written = curves.read_text().count("\n")
            if partial.exists() if at == "in a save" else written > at:
                os.kill(command.process.pid, signal.SIGKILL)
                killed = True
        assert killed, command.wait()
        assert command.wait().code == -signal.SIGKILL
        assert not (run / "metrics.json").exists()
    done = start("train.py", *overrides, f"paths.output_dir={run}").wait()
    assert done.code == 0, done.err
    assert "resumed from" in done.out + done.err
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert equal(checkpoint(run)["state_dict"], checkpoint(whole)["state_dict"])
    assert {**metrics(run), **SECONDS} == {**metrics(whole), **SECONDS}


def test_of_two_checkpoints_the_newest_that_is_whole_is_taken(tiny_run, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) is None
    folder.mkdir()
    for name in ("last.ckpt", "previous.ckpt"):
        shutil.copy(tiny_run / "checkpoints" / "last.ckpt", folder / name)
    assert newest_checkpoint(folder) == str(folder / "last.ckpt")
    os.truncate(folder / "last.ckpt", 10_000)
    assert newest_checkpoint(folder) == str(folder / "previous.ckpt")
    assert f"{folder}/last.ckpt is damaged" in caplog.text
    os.truncate(folder / "previous.ckpt", 0)
    assert newest_checkpoint(folder) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["resume=auto"], "say paths.output_dir=DIR to both"),
        (["-m", "resume=auto", "seed=0,1"], "say hydra.sweep.dir=DIR to both"),
        (["resume=yes", "paths.output_dir=x"], "resume=yes must be auto"),
    ],
)
def test_a_resume_that_cannot_be_meant_is_refused(command, overrides, said):
    done = command("train.py", *overrides)
    assert done.code == 1
    assert said in done.err
    assert done.err.count("\n") <= 2


def test_the_best_checkpoint_from_before_the_cut_still_counts(fit, gets_worse, cut_off, tmp_path):
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    fit(whole, *EPOCHS)
    curve = [float(row["val/map_at_r"]) for row in rows(whole) if row["val/map_at_r"]]
    assert max(curve[:2]) > 0 == max(curve[2:])
    cut_off(first)
    fit(second, *EPOCHS, f"ckpt={first}/checkpoints/last.ckpt")
    assert final(second) == final(whole)


def test_a_run_resumed_in_its_own_directory_is_whole(fit, cut_off, straight, tmp_path):
    cut_off(tmp_path)
    fit(tmp_path, *EPOCHS, f"ckpt={tmp_path}/checkpoints/last.ckpt")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert equal(checkpoint(tmp_path)["state_dict"], checkpoint(straight())["state_dict"])
    assert final(tmp_path) == final(straight())
    one, other = ([row["train/loss"] for row in rows(run) if row["train/loss"]] for run in (tmp_path, straight()))
    assert one == other, "the curves from before the cut are gone"


def test_a_finished_run_can_go_on_for_more_epochs(fit, straight, tmp_path):
    fit(tmp_path / "first", "scheduler=none", "trainer.max_epochs=2", "test=false")
    fit(tmp_path / "second", "scheduler=none", *EPOCHS, f"ckpt={tmp_path}/first/checkpoints/last.ckpt")
    assert equal(checkpoint(tmp_path / "second")["state_dict"], checkpoint(straight("scheduler=none"))["state_dict"])


def test_a_finished_run_that_is_resumed_is_judged_again_and_the_log_says_so(fit, straight, tmp_path, caplog):
    caplog.set_level("INFO")
    last, *said = straight("scheduler=none") / "checkpoints" / "last.ckpt", "scheduler=none", *EPOCHS
    fit(tmp_path, *said, f"ckpt={last}")
    assert f"{last} has trained all of its epochs: nothing is left to train, it is judged again" in caplog.messages
    assert final(tmp_path) == final(straight("scheduler=none"))


@pytest.mark.parametrize(
    "other",
    [
        "encoder.widths=[8,8,9]",
        "encoder.embedding_size=17",
        "distance=euclidean",
        "loss=arcface",  # has weights that the checkpoint lacks
        "optimizer=sgd optimizer.lr=0.01",  # keeps another state for each weight
        "scheduler=none",
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_a_sentence(fit, tiny_run, tmp_path, other):
    path = f"{tiny_run}/checkpoints/last.ckpt"
    with pytest.raises(InputError) as error:
        fit(tmp_path, f"ckpt={path}", *other.split(), *EPOCHS)
    assert path in str(error.value)
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("optimizer.lr=0.002", "optimizer.lr=0.004", "optimizer.lr=0.002, this command says 0.004"),
        ("loss=triplet loss.margin=0.1", "loss=triplet", "loss.margin=0.1"),
        ("loss=xbm loss.memory_size=200", "loss=xbm loss.memory_size=300", "loss.memory_size=200"),
        ("loss=sum", "loss=sum loss@loss.losses.second=cosface", "loss.losses.second."),
        ("trainer.max_epochs=2", "trainer.max_epochs=3", "its schedule was made for that"),
    ],
)
def test_a_value_that_a_resumed_run_would_keep_is_not_silently_another(fit, tmp_path, first, second, said):
    fit(tmp_path / "first", *first.split(), "test=false")
    with pytest.raises(InputError) as error:
        fit(tmp_path / "second", *second.split(), "test=false", f"ckpt={tmp_path}/first/checkpoints/last.ckpt")
    assert said in str(error.value)
    assert "init_from=" in str(error.value)
