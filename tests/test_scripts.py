"""The scripts that look at runs, on runs made up on the spot."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import benchmark_omniglot
import benchmark_training
import lightning.pytorch as L
import pytest
import study_losses
import study_recipe
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from scripts.benchmark_default import missed
from siamese.bundle import Bundle
from siamese.config import ROOT, available, compose
from siamese.data.omniglot import Omniglot


def metrics(folder) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def made_up(folder, choices, seed, **figures):
    (folder / ".hydra").mkdir(parents=True)
    margin = {"loss": {"margin": 0.1}} if choices["loss"] == "triplet" else {"loss": {"temperature": 0.5}}
    (folder / ".hydra" / "config.yaml").write_text(json.dumps({"seed": seed, **margin, "paths": {"output_dir": str(folder)}}))
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": {**choices, "hydra/launcher": "basic"}}}}))
    if figures:
        (folder / "metrics.json").write_text(json.dumps({**figures, "seconds/fit": 12.3}))


def test_benchmark_knows_which_way_a_target_is_missed():
    def row(name, value, target, unit=""):
        return {"name": name, "value": value, "target": target, "unit": unit}

    assert missed([row("test recall_at_1", 0.99, 0.98), row("test eer", 0.02, 0.031), row("command to prompt", 59, 60, "s")]) == []
    late = [row("test recall_at_1", 0.97, 0.98), row("test eer", 0.04, 0.031), row("command to prompt", 61, 60, "s"), row("x", 0, None)]
    assert len(missed(late)) == 3


def test_the_benchmarks_take_figures_and_times_of_whole_runs(monkeypatch):
    def run(*overrides):
        seed = int(overrides[-1].partition("=")[2])
        return {"test/omniglot_error": 3.0 + seed}, 60.0 * (seed + 1), 2.0

    monkeypatch.setattr(benchmark_training, "run", run)
    rows = {row["name"]: row["value"] for row in benchmark_training.from_command_to_prompt()}
    assert rows["omniglot_quick: error"] == 4
    assert rows["omniglot_quick: minutes"] == 2


# --- the study of losses and miners


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """finished(names, seeds) -> runs of these, made up in tmp_path / "runs"; and the list of all that were made."""
    made = []

    def run(folder, overrides):
        made.append((folder.parent.name, folder.name))
        if folder.parent.name == "loss-circle":
            raise RuntimeError("loss=circle ended with 1")
        folder.mkdir(parents=True)
        value = 0.5 + len(folder.parent.name) / 100 + int(folder.name) / 1000
        rows = [f"{row}/{figure}" for row in ("val", "raw", "untrained") for figure in study_losses.FIGURES]
        (folder / "metrics.json").write_text(json.dumps({**dict.fromkeys(rows, value), "seconds/fit": 3.0}))
        (folder / "peak.json").write_text(json.dumps({"MiB": 700}))

    monkeypatch.setattr(study_losses, "run", run)
    chosen = {name: [name] for name in ("loss=supcon", "loss=triplet", "loss=circle", "miner=hard")}
    return lambda seeds: (study_losses.study(tmp_path / "runs", chosen, seeds, 2), made)


def test_the_study_runs_what_is_missing_and_goes_on_when_a_run_fails(finished, tmp_path):
    failed, made = finished([0, 1])
    assert len(made) == 8
    assert failed == ["loss=circle ended with 1"] * 2
    failed, made = finished([0, 1, 2])
    assert sorted(made[8:]) == [("loss-circle", "0"), ("loss-circle", "1")] + [
        (name, "2") for name in ("loss-circle", "loss-supcon", "loss-triplet", "miner-hard")
    ]
    assert failed == ["loss=circle ended with 1"] * 3
    found = study_losses.collect(tmp_path / "runs", ["loss=supcon", "loss=triplet", "loss=circle", "miner=hard"])
    assert {name: len(rows) for name, rows in found.items()} == {
        "loss=supcon": 3, "raw": 3, "untrained": 3, "loss=triplet": 3, "miner=hard": 3
    }  # fmt: skip


def test_the_page_of_the_study_says_what_its_figures_are(finished, command, tmp_path):
    finished([0, 1, 2])
    found = study_losses.collect(tmp_path / "runs", ["loss=supcon", "loss=triplet", "miner=hard"])
    (tmp_path / "losses.json").write_text(json.dumps(found))
    done = command("scripts/study_losses.py", "--page", "--docs", str(tmp_path), "--runs", str(tmp_path / "none"))
    assert done.code == 0, done.err
    page = (tmp_path / "losses.md").read_text()
    values = [0.5 + len("loss=triplet") / 100 + seed / 1000 for seed in range(3)]
    assert f"| triplet | {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} |" in page
    assert page.index("| triplet |") < page.index("| supcon |") < page.index("| hard |"), "best first"
    assert "2 of 2 losses are within five points" in page
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_holds_every_loss_and_miner_and_refuses_what_it_does_not_know(command, tmp_path):
    names = {name.partition("=")[2] for name in study_losses.variants() if name.startswith("loss=")}
    assert names == set(available("loss"))
    done = command("scripts/study_losses.py", "--only", "loss=tripplet", "--runs", str(tmp_path))
    assert done.code == 1
    assert done.err.startswith("error: loss=tripplet is not part of the study")


def test_the_page_of_the_study_is_what_its_figures_say():
    found = json.loads((ROOT / "docs" / "losses.json").read_text())
    names = {f"loss={name}" for name in available("loss")} | {f"miner={name}" for name in available("miner")}
    assert names <= found.keys()
    assert all(len(found[name]) == 3 for name in names)
    assert all(study_losses.table(found, group) in (ROOT / "docs" / "losses.md").read_text() for group in ("loss", "miner"))
    explained = (ROOT / "docs" / "losses.md").read_text().partition("## Losses")[2]
    for name in names:
        assert study_losses.mean(found[name], "map_at_r") > study_losses.mean(found["untrained"], "map_at_r") or f"`{name}`" in explained


def test_the_benchmark_of_koch_reads_a_finished_run(command, tmp_path):
    made_up(
        tmp_path / "run",
        {"loss": "triplet"},
        0,
        **{"test/omniglot_error": 30.75, "untrained/omniglot_error": 66.5, "test/oneshot_20way": 0.75},
    )
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("sampling: {batch_size: 64}")
    (tmp_path / "run" / "metrics.csv").write_text("epoch,step,train/loss\n0,9,0.7\n1,19,0.6\n")
    words = ("scripts/benchmark_koch.py", "--json", str(tmp_path / "koch.json"), "--run")
    done = command(*words, str(tmp_path / "run"))
    assert done.code == 0, done.err
    values = {row["name"]: row["value"] for row in json.loads((tmp_path / "koch.json").read_text())}
    assert values["koch official one-shot accuracy"] == 69.25
    assert values["koch pairs seen"] == 20 * 64
    done = command(*words, str(tmp_path))
    assert done.code == 1
    assert done.err.startswith(f"error: {tmp_path} holds no metrics.json")


# --- the study of the recipe


@pytest.mark.parametrize("study", [study_losses, study_recipe])
def test_the_directory_of_every_variant_can_be_said_on_the_command_line(study):
    places = [str(study_losses.place(Path("runs"), name, 0)) for name in study.variants()]
    assert len(set(places)) == len(places)
    for place in places:
        override = OverridesParser.create().parse_override(f"paths.output_dir={place}")
        assert not override.is_sweep_override()
        assert override.value() == place


@pytest.mark.slow
def test_no_variant_of_the_recipe_has_more_than_600_steps_or_touches_the_test(tmp_path):
    drawings = 2_720  # of small1
    for name, overrides in study_recipe.variants().items():
        config = compose([*overrides, f"dataset.path={tmp_path}"])
        sampling = config["sampling"]
        size = sampling.get("batch_size") or sampling["classes"] * sampling["samples_per_class"]
        rows = drawings * (4 if config["dataset"]["rotated_classes"] else 1)
        assert 0 < config["trainer"]["max_epochs"] * math.ceil(rows / size) <= 600, name
        assert not config["test"]
        assert (config["dataset"]["background"], config["dataset"]["validation"]) == ("small1", "others")


def test_a_page_is_of_what_has_been_run_or_else_of_what_the_last_study_left(tmp_path):
    arguments = SimpleNamespace(page=True, runs=tmp_path / "runs", docs=tmp_path)
    collect = lambda runs, names: {name: [] for name in names if (runs / name).is_dir()}  # noqa: E731
    (tmp_path / "recipe.json").write_text('{"earlier": []}')
    assert study_losses.finished(arguments, "recipe", {"mine": []}, collect) == {"earlier": []}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert study_losses.finished(arguments, "recipe", {"mine": []}, collect) == {"mine": []}


def test_the_page_of_the_recipe_says_what_its_figures_say(command, tmp_path):
    def rows(error):
        figures = {"oneshot_20way": 0.9, "map_at_r": 0.5, "eer": 0.1, "seconds": 60.0}
        return [{"seed": seed, "omniglot_error": error + seed, **figures} for seed in range(3)]

    found = {name: rows(20.0) for name in study_recipe.variants()}
    found |= {study_recipe.RECIPE: rows(10.0), "temperature 0.1": rows(12.5), study_recipe.SEMIHARD: rows(14.0)}
    found |= {"hardest of 32 x 4": rows(80.0), "conv4 of 64": rows(13.0), "mlp": rows(33.0)}
    (tmp_path / "recipe.json").write_text(json.dumps(found))
    done = command("scripts/study_recipe.py", "--page", "--docs", str(tmp_path), "--runs", str(tmp_path / "none"))
    assert done.code == 0, done.err
    page = (tmp_path / "recipe.md").read_text()
    assert "| **the recipe** | 11.00 ± 1.00 |  |" in page
    assert "| temperature 0.1 | 13.50 ± 1.00 | +2.50 |" in page
    assert page.index("| temperature 0.1 |") < page.index("| no augmentation at all |")
    assert "from 15.0 % (semihard of 32 x 4, residual) to 81.0 % (hardest of 32 x 4)" in page
    assert "from 14.0 % (conv4 of 64) to 34.0 % (mlp)" in page
    assert "how triplets are formed changes more than the encoder" in page
    assert "0.0 points by forming triplets, 1.0 by the encoder" in page
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")
    assert study_recipe.interval(rows(1.0)) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_the_study_of_the_recipe_names_what_is_missing(command, tmp_path):
    done = command("scripts/study_recipe.py", "--only", "half the stepps", "--runs", str(tmp_path))
    assert (done.code, done.err.splitlines()[-1].startswith("error: half the stepps is not part of the study")) == (1, True)
    done = command("scripts/study_recipe.py", "--page", "--docs", str(tmp_path), "--runs", str(tmp_path / "none"))
    assert (done.code, done.err.strip()) == (1, f"error: there is no {tmp_path}/recipe.json: run the study first")


# --- the published measures


def test_the_records_are_of_a_single_view_of_several_and_of_all_seeds_together(fit, tmp_path, monkeypatch):
    folders = [tmp_path / str(seed) for seed in range(2)]
    for folder in folders:
        fit(folder, "augmentation=strong", f"seed={folder.name}")
    monkeypatch.setattr(benchmark_omniglot, "VIEWS", 2)
    rows = {entry["name"]: entry["value"] for entry in benchmark_omniglot.official("full", folders)[0]}
    singles = [metrics(folder)["test/omniglot_error"] for folder in folders]
    assert rows["full: error"] == pytest.approx(sum(singles) / 2)
    assert [rows[f"full: error of seed {seed}"] for seed in range(2)] == pytest.approx(singles)

    def errors(models, views):
        wrong = []
        for queries, supports in Omniglot(models[0].config["dataset"]["path"], background="small1", size=16).oneshot_runs():
            score = 0
            for model in models:
                model.look(views, model.config["augmentation"])
                one, other = (torch.nn.functional.normalize(model.embed(side.inputs)) for side in (queries, supports))
                score = score + one @ other.T
            wrong += (score.argmax(1) != queries.labels).tolist()
        return 100 * sum(wrong) / len(wrong)

    models = [Bundle.load(folder / "bundle.safetensors") for folder in folders]
    assert rows["full: error, 2 seeds together"] == pytest.approx(errors(models, 0), abs=0.01)
    assert rows["full: error, 2 seeds together, 2 views"] == pytest.approx(errors(models, 2), abs=0.01)
    assert rows["full: error, 2 views"] == pytest.approx(sum(errors([model], 2) for model in models) / 2, abs=0.01)


def test_the_records_know_which_way_a_target_is_missed():
    good = [{"name": "full: error", "value": 2.4, "target": 2.5, "unit": "%"}]
    good.append({"name": "characters: oneshot_5way", "value": 99.4, "target": 99.3, "unit": "%"})
    assert benchmark_omniglot.missed(good) == []
    assert benchmark_omniglot.missed([entry | {"target": entry["value"]} for entry in good]) == []
    bad = [good[0] | {"value": 2.6}, good[1] | {"value": 99.2}, good[0] | {"target": None}]
    assert len(benchmark_omniglot.missed(bad)) == 2


# --- what training costs


@pytest.mark.parametrize(("precision", "ahead"), [("32-true", False), ("bf16-mixed", False), ("32-true", True)])
def test_the_bare_loop_takes_the_steps_that_training_takes(precision, ahead, monkeypatch):
    """So that they are worth comparing: without augmentation, which each draws for itself, the weights are the same after three steps."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda inputs: inputs)
    _, other, same = benchmark_training.assembled("augmentation=none", "scheduler=none")
    loop = benchmark_training.bare(other, same, "cpu", precision == "bf16-mixed", ahead)
    for _ in range(3):
        next(loop)
    _, data, module = benchmark_training.assembled("augmentation=none", "scheduler=none")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    brief = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, "precision": precision}
    L.Trainer(accelerator="cpu", use_distributed_sampler=False, **brief, **quiet).fit(module, data)
    for name, weights in module.model.state_dict().items():
        torch.testing.assert_close(same.model.state_dict()[name], weights, msg=name)


def test_the_steps_that_are_timed_are_the_same_for_both(monkeypatch):
    monkeypatch.setattr(benchmark_training, "ROUNDS", 2)
    monkeypatch.setattr(benchmark_training, "STEPS", 2)
    taken = []
    bare = benchmark_training.bare

    def counting(*arguments):
        for _ in bare(*arguments):
            taken.append(arguments)
            yield

    monkeypatch.setattr(benchmark_training, "bare", counting)
    ours, theirs = benchmark_training.in_turn("cpu", "trainer.precision=bf16-mixed")
    assert ours > 0 < theirs
    assert len(taken) == 3 * 2  # a round more than counts
    assert {told[2:] for told in taken} == {("cpu", True, False)}


def test_the_photos_for_a_gpu_are_held_in_memory(monkeypatch):
    held = []

    def in_turn(device, *words, ahead):
        _, data, module = benchmark_training.assembled(*("trainer=cpu" if word == "trainer=gpu" else word for word in words))
        held.append(
            (device, data.train.inputs.shape, next(iter(data.train_dataloader())).inputs.shape, type(module.model.encoder).__name__)
        )
        return (0.5, 0.25) if ahead else (0.5, 0.4)

    monkeypatch.setattr(benchmark_training, "in_turn", in_turn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: --gpu: this machine has no GPU"):
        benchmark_training.on_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = benchmark_training.on_gpu("encoder.model=test_resnet", size=32, classes=33, each=5)
    assert held == [("cuda", (165, 3, 32, 32), (128, 3, 32, 32), "Timm")] * 2
    assert [row["value"] for row in rows] == [320, 256, 0.8, 512, 256, 0.5]
    assert len(benchmark_training.missed(rows)) == 1


def test_training_knows_which_way_a_target_is_missed():
    good = [{"name": "samples a second", "value": 3.2, "target": 3.0, "unit": ""}]
    good.append({"name": "step / of the bare loop", "value": 1.05, "target": 1.1, "unit": ""})
    assert benchmark_training.missed(good) == []
    assert len(benchmark_training.missed([good[0] | {"value": 2.9}, good[1] | {"value": 1.2}, good[1] | {"value": 2, "target": None}])) == 2


def test_reports_are_written_again_of_every_run_below(command, tiny_run, tmp_path):
    for number in range(2):
        (tmp_path / "sweep" / str(number)).mkdir(parents=True)
        for name in ("results.npz", "metrics.json"):
            shutil.copy(tiny_run / name, tmp_path / "sweep" / str(number))
    (tmp_path / "sweep" / "1" / "metrics.json").write_text("broken")
    done = command("scripts/report.py", str(tmp_path / "sweep"))
    assert done.code == 1
    assert done.out.strip() == str(tmp_path / "sweep" / "0" / "report.html")
    assert re.fullmatch(r"error: .*sweep/1: results.npz or metrics.json is damaged \(.*\)\n", done.err)
    done = command("scripts/report.py", str(tmp_path / "nothing"))
    assert (done.code, done.out) == (1, "")
    assert "no finished run" in done.err
