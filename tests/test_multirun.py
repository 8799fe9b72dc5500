"""Sweeps: each job is a run of its own, and one that fails takes no other with it."""

import json
from pathlib import Path

import pytest


def figures(directory: Path) -> dict[str, float]:
    found = json.loads((directory / "metrics.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("seconds/")}


@pytest.fixture(scope="module")
def sweep(command, tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "letters"
    done = command("train.py", "-m", "loss=triplet,contrastive", "debug=fast", *tiny, "logger=wandb", f"hydra.sweep.dir={folder}")
    assert done.code == 0, done.err
    return folder


def test_each_job_has_a_whole_directory_of_its_own(sweep):
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1"]
    for number in ("0", "1"):
        names = {path.name for path in (sweep / number).iterdir()}
        assert {".hydra", "train.log", "checkpoints", "bundle.safetensors", "metrics.csv", "metrics.json", "results.npz", "wandb"} <= names
        assert "figures, checkpoints and the bundle are in" in (sweep / number / "train.log").read_text()


@pytest.mark.parametrize(("number", "loss"), [("0", "triplet"), ("1", "contrastive")])
def test_a_job_gives_the_figures_of_the_same_command_by_itself(sweep, fit, tmp_path, number, loss):
    fit(tmp_path, f"loss={loss}", "debug=fast")
    assert figures(sweep / number) == figures(tmp_path)


def test_each_job_is_a_finished_wandb_run_in_the_group_of_the_sweep(sweep, wandb_run):
    runs = [wandb_run(sweep / number) for number in ("0", "1")]
    assert [(summary["state"], summary["exit_code"]) for summary, _ in runs] == [("finished", 0)] * 2
    assert [summary["config"]["choices"]["loss"] for summary, _ in runs] == ["triplet", "contrastive"]
    started = [next(record["run"] for record in records if record["type"] == "run") for _, records in runs]
    assert started[0]["run_id"] != started[1]["run_id"]
    assert started[0]["display_name"] != started[1]["display_name"]
    assert started[0]["run_group"] == started[1]["run_group"] == sweep.name
    for (summary, _), number in zip(runs, ("0", "1"), strict=True):
        assert summary["summary"]["val/threshold"] == figures(sweep / number)["val/threshold"]


def test_a_job_that_fails_leaves_the_others_whole_and_the_sweep_says_so(command, tiny, tmp_path):
    done = command(
        "train.py", "-m", "sampling.samples_per_class=1,4", "debug=fast", *tiny, "test=false", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert done.code == 1
    assert "Traceback" not in done.out + done.err
    assert "sampling.samples_per_class=1" in done.err
    assert not (tmp_path / "sweep" / "0" / "metrics.json").exists()
    assert figures(tmp_path / "sweep" / "1")["val/map_at_r"] > 0
    assert "sampling.samples_per_class=1" in (tmp_path / "sweep" / "0" / "train.log").read_text()


def test_all_jobs_that_fail_are_named(command, tiny, tmp_path):
    done = command("train.py", "-m", "sampling.samples_per_class=0,1", *tiny, f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.code == 1
    assert "sampling.samples_per_class=0" in done.out + done.err
    assert "sampling.samples_per_class=1" in done.out + done.err
    assert len(done.err.splitlines()) <= 2
