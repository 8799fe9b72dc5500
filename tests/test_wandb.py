"""What a run tells Weights & Biases, read back from its offline file; and that all of it stays in the run's directory."""

import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity

from siamese import loggers
from siamese.config import ROOT
from siamese.evaluation import EvaluationResult, evaluate


@pytest.fixture(scope="module")
def whole(default_run, wandb_run) -> tuple[dict, list[dict]]:
    return wandb_run(default_run)


@pytest.fixture(scope="module")
def crashed_directory(command, tiny, tmp_path_factory) -> Path:
    """A run that diverges to NaN, with group and tags."""
    directory = tmp_path_factory.mktemp("crashed") / "run"
    ruin = ("loss=triplet", "optimizer.lr=1e30", "scheduler=none", "test=false", "seed=3")
    wandb = ("logger=wandb", "logger.project=letters", "logger.group=attempts", "logger.tags=[first,fast]")
    done = command("train.py", *tiny, *ruin, *wandb, f"paths.output_dir={directory}")
    assert done.code == 1
    assert "NaN" in done.err
    return directory


@pytest.fixture(scope="module")
def crashed(crashed_directory, wandb_run) -> tuple[dict, list[dict]]:
    return wandb_run(crashed_directory)


def started(records: list[dict]) -> dict:
    (run,) = (record["run"] for record in records if record["type"] == "run")
    return run


def curve(records: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of every row of the history that holds `name`."""
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(item["trainer/global_step"], item[name]) for item in history if name in item]


def test_a_whole_run_is_finished(whole):
    summary, records = whole
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)
    assert records[-1]["type"] == "exit"


def test_the_configuration_is_there_with_the_choices_and_where_it_came_from(whole, default_run):
    config = whole[0]["config"]
    assert config["seed"] == 0
    assert {group: config["choices"][group] for group in ("dataset", "loss", "miner", "sampling")} == {
        "dataset": "glyphs",
        "loss": "supcon",
        "miner": "none",
        "sampling": "balanced",
    }
    assert config["trainer"]["max_epochs"] == 2
    assert config["encoder"]["widths"] == [32, 64, 64, 64]
    assert config["provenance"] == json.loads((default_run / "provenance.json").read_text())


@pytest.mark.parametrize("name", ["train/loss", "train/spread", "val/map_at_r", "val/eer"])
def test_the_curves_are_those_of_the_csv(whole, default_run, name):
    with (default_run / "metrics.csv").open() as lines:
        expected = [(int(row["step"]), float(row[name])) for row in csv.DictReader(lines) if row[name]]
    assert len(expected) >= 2
    assert curve(whole[1], name) == expected


def test_the_summary_holds_the_final_figures(whole, default_run):
    figures = json.loads((default_run / "metrics.json").read_text())
    assert whole[0]["summary"]["test/recall_at_1"] == figures["test/recall_at_1"]
    differing = {name: whole[0]["summary"].get(name) for name, value in figures.items() if whole[0]["summary"].get(name) != value}
    assert differing == {}


def test_the_roc_is_there_as_a_chart_over_a_table(whole, default_run):
    summary, records = whole
    assert any("test/roc_table.nrows" in record["history"]["item"] for record in records if record["type"] == "history")
    charts = [update for record in records if record["type"] == "config" for update in record["config"].get("update", {})]
    assert "_wandb.visualize.test/roc" in charts
    (file,) = default_run.glob("wandb/offline-run-*/files/media/table/test/roc_table*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["far", "tar"]
    far, tar = np.array(table["data"]).T
    assert (far[0], tar[0], far[-1], tar[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tar, far) == pytest.approx(summary["summary"]["test/auc"], abs=0.005)
    assert "_wandb.visualize.test/open_set" in charts


def logged_table(run: Path, name: str) -> dict:
    (file,) = run.glob(f"wandb/offline-run-*/files/media/table/{name}_*.json")
    return json.loads(file.read_text())


def artifacts(records: list[dict], word: str) -> list[dict]:
    return [record["artifact"] for record in records if record["type"] == "artifact" and word in record["artifact"]["name"]]


def test_the_neighbours_are_a_table_of_pictures_that_lie_in_the_directory_of_the_run(whole, default_run):
    (artifact,) = artifacts(whole[1], "neighbours")
    files = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert all(default_run in file.parents and file.is_file() for file in files.values())
    table = json.loads(files["test/neighbours.table.json"].read_text())
    assert table["columns"] == ["why", "query", *(f"nearest {place}" for place in range(1, 6))]
    assert 8 < len(table["data"]) <= 32
    for row in table["data"]:
        assert all(cell["path"] in files for cell in row[1:])
        assert all(cell["caption"].startswith(("same, ", "different, ")) for cell in row[2:])


def test_the_embeddings_are_those_of_the_results(default_run):
    table, result = logged_table(default_run, "test/embeddings"), EvaluationResult.load(default_run / "results.npz")["test"]
    assert len(table["data"]) == len(result.sampled) <= 2000
    vectors = np.array([row[2:] for row in table["data"]])
    np.testing.assert_allclose(vectors, result.embeddings.astype(float), atol=1e-4)
    assert [row[0] for row in table["data"]] == [result.class_names[label] for label in result.labels[result.sampled]]


def test_embeddings_that_are_too_many_are_of_all_classes(tmp_path, monkeypatch):
    labels = torch.arange(4).repeat_interleave(20)
    result = evaluate(torch.randn(80, 8, generator=torch.Generator().manual_seed(0)), labels, CosineSimilarity())
    logged = {}
    run = SimpleNamespace(id="x", config={"seed": 0}, summary={}, log=logged.update, log_artifact=lambda *_, **__: None)
    monkeypatch.setattr(loggers, "CELLS", 64)
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    loggers.record_results(SimpleNamespace(experiment=run), {"test": result}, {}, tmp_path / "best.ckpt")
    table = logged["test/embeddings"].data
    assert len(table) == 8
    assert {row[0] for row in table} == {"0", "1", "2", "3"}
    for row in table:
        assert row[2:] == pytest.approx(result.embeddings[int(row[1])].tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["recall_at_k", "oneshot"])
def test_curves_are_charts_over_tables(whole, default_run, name):
    charts = [update for record in whole[1] if record["type"] == "config" for update in record["config"].get("update", {})]
    assert f"_wandb.visualize.test/{name}" in charts
    figures = json.loads((default_run / "metrics.json").read_text())
    points = dict(logged_table(default_run, f"test/{name}_table")["data"])
    expected = {1: "recall_at_1", 10: "recall_at_10"} if name == "recall_at_k" else {5: "oneshot_5way", 20: "oneshot_20way"}
    for place, figure in expected.items():
        assert points[place] == pytest.approx(figures[f"test/{figure}"])


def test_scores_of_same_and_different_pairs_are_histograms(whole):
    for name in ("same", "different"):
        found = whole[0]["summary"][f"test/scores_{name}"]
        assert found["_type"] == "histogram"
        assert sum(found["values"]) == pytest.approx(1)


def test_the_best_checkpoint_is_an_artifact_with_its_aliases(whole, default_run):
    (artifact,) = artifacts(whole[1], "checkpoint")
    assert artifact["type"] == "model"
    assert {"best", "seed-0"} <= set(artifact["aliases"])
    (entry,) = artifact["manifest"]["contents"]
    assert entry["path"] == "best.ckpt"
    staged = Path(entry["local_path"])
    assert default_run in staged.parents
    assert staged.read_bytes() == (default_run / "checkpoints" / "best.ckpt").read_bytes()


def test_the_name_tells_the_choices_the_seed_and_the_values_given(whole, crashed):
    name = whole[0]["name"]
    for word in ("glyphs", "conv4", "cosine", "supcon", "balanced", "seed=0", "trainer.max_epochs=2"):
        assert word in name
    assert "none" not in name
    assert "output_dir" not in name
    for word in ("omniglot", "triplet", "seed=3", "optimizer.lr=1e30"):
        assert word in crashed[0]["name"]


def test_project_group_and_tags_are_those_given(crashed, whole):
    run = started(crashed[1])
    assert (run["project"], run["run_group"], run["tags"]) == ("letters", "attempts", ["first", "fast"])
    assert "run_group" not in started(whole[1])


def test_a_crash_is_marked_as_failed(crashed):
    summary, records = crashed
    assert summary["exit_code"] == 1
    assert summary["state"] not in ("finished", "running")
    assert records[-1]["type"] == "exit"
    assert curve(records, "train/loss")


def test_no_file_lies_outside_the_directory_of_the_run(default_run, crashed_directory, home):
    left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    left = [name for name in left if "onnxruntime" not in name]  # which leaves a database there when another test exports
    assert left == []
    assert not (ROOT / "wandb").exists()


def test_all_that_an_upload_needs_lies_in_the_directory_of_the_run(default_run):
    """W&B stages tables in the user's data directory unless told otherwise."""
    staged = list(default_run.glob("wandb/artifacts/staging/*"))
    assert any(b'"far"' in path.read_bytes() for path in staged)


def test_the_log_says_how_to_upload_an_offline_run(default_run):
    (line,) = [line for line in (default_run / "train.log").read_text().splitlines() if "wandb sync" in line]
    assert "no key is configured" in line


def test_without_the_logger_there_is_no_trace_of_wandb(tiny_run):
    assert not (tiny_run / "wandb").exists()
    assert (tiny_run / "metrics.csv").is_file()


SCRIPT = """
import logging, sys
from siamese import loggers

class Asked(BaseException):
    pass

def stop(**arguments):
    print("mode:", arguments["mode"])
    raise SystemExit

logging.basicConfig(level=logging.INFO)
loggers.WandbLogger = stop
loggers.wandb_logger(sys.argv[1], "name", {})
"""


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "0123456789" * 4}, "online"),
        ({"WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
    ids=["no key", "a key", "a key but WANDB_MODE=offline", "WANDB_MODE=disabled"],
)
def test_a_run_is_online_when_a_key_is_configured_and_wandb_mode_has_the_last_word(command, tmp_path, variables, mode):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = command(str(tmp_path / "script.py"), str(tmp_path), **variables)
    assert f"mode: {mode}" in done.out, done.err
    assert ("wandb sync" in done.err) == (variables == {})


def test_a_run_that_was_killed_goes_on_under_its_id(start, tiny, tmp_path):
    overrides = (*tiny, "trainer.max_epochs=20", "test=false", "logger=wandb", "resume=auto", f"paths.output_dir={tmp_path}")
    killed = start("train.py", *overrides)
    while killed.process.is_alive() and not (tmp_path / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    killed.process.kill()
    killed.wait()
    assert not (tmp_path / "metrics.json").exists()
    done = start("train.py", *overrides).wait()
    assert done.code == 0, done.err
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({name.rpartition("-")[2] for name in runs}) == 1
