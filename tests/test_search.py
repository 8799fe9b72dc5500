"""`search=optuna` on a stand-in for training: what is run, what is stored, and what is left when the search is killed."""

import csv
import json
import shlex
import statistics
from pathlib import Path

import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from hydra_plugins.search_sweeper import _locked, distribution
from siamese.config import ROOT, InputError, compose
from siamese.evaluation import higher_is_better

# Best is triplet with a margin of 0.2. Job 2 fails; where a file `kill` lies, job 4 takes it away and all of the search with it.
STAND_IN = """
import os, pathlib, signal, sys
from siamese.config import launch

def task(config):
    out = pathlib.Path(config["paths"]["output_dir"])
    assert config["test"] is False
    if out.name == "4" and (kill := out.parents[1] / "kill").exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if out.name == "2":
        raise RuntimeError("out of luck")
    error = (config["loss"]["margin"] - 0.2) ** 2 if config["choices"]["loss"] == "triplet" else 0.5
    return {"val/eer": error + config["seed"] / 1000, "val/map_at_r": 1 - error}

launch(task, "train")
"""
SPACE = ("loss=choice(triplet,supcon)", "miner=none", "optimizer.lr=0.01", "loss.margin=interval(0.05,0.5)")


@pytest.fixture(scope="module")
def search(command, tmp_path_factory):
    """search(directory, "search.n_trials=3") -> Done"""
    script = tmp_path_factory.mktemp("stand_in") / "task.py"
    script.write_text(STAND_IN)
    return lambda folder, *words: command(str(script), "-m", "search=optuna", f"hydra.sweep.dir={folder}", *words)


def stored(folder: Path) -> list:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}").trials


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as lines:
        return list(csv.DictReader(lines))


MINIMISED = (*SPACE, "optimized_metric=val/eer", "search.n_trials=6", "search.seeds=2")


@pytest.fixture(scope="module")
def whole(search, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "search"
    done = search(folder, *MINIMISED)
    assert done.code == 0, done.err
    return folder


def test_all_trials_are_stored_none_twice_and_one_that_fails_is_one_of_them(whole):
    trials = stored(whole)
    assert [trial.state for trial in trials] == [TrialState.FAIL if n == 2 else TrialState.COMPLETE for n in range(6)]
    assert len({tuple(trial.user_attrs["overrides"]) for trial in trials}) == 6
    assert trials[2].user_attrs["error"] == "RuntimeError: out of luck"
    for trial in trials:
        assert ("loss.margin" in trial.params) == (trial.params["loss"] == "triplet"), "a key is suggested where the choices have it"
        assert yaml.safe_load((whole / str(trial.number) / ".hydra" / "overrides.yaml").read_text()) == trial.user_attrs["overrides"]


def test_the_metric_says_which_way_is_better_and_the_best_is_told_with_other_seeds(whole):
    values = {trial.number: trial.value for trial in stored(whole) if trial.value is not None}
    best = json.loads((whole / "best.json").read_text())
    assert (best["trial"], best["value"]) == min(values.items(), key=lambda item: item[1])
    assert best["seeds"] == pytest.approx({"1": best["value"] + 0.001, "2": best["value"] + 0.002})
    assert best["mean"] == pytest.approx(statistics.mean(best["seeds"].values()))
    assert best["sd"] == pytest.approx(statistics.stdev(best["seeds"].values()))
    assert (whole / f"best-{best['trial']}" / "seed-2" / ".hydra").is_dir()
    config = compose(shlex.split(best["command"])[2:])
    assert (config["choices"]["loss"], config["loss"]["margin"]) == ("triplet", best["params"]["loss.margin"])
    assert config["test"] is True


def test_the_table_has_the_best_first_and_what_failed_last(whole):
    table = rows(whole)
    values = [float(row["val/eer"]) for row in table[:-1]]
    assert values == sorted(values)
    assert (table[-1]["trial"], table[-1]["state"], table[-1]["error"]) == ("2", "fail", "RuntimeError: out of luck")


def test_a_search_that_was_killed_goes_on_and_makes_the_trials_it_would_have_made(search, whole, tmp_path):
    folder = tmp_path / "search"
    (tmp_path / "kill").touch()
    assert search(folder, *MINIMISED).code == -9
    assert len(stored(folder)) == 4
    assert len(rows(folder)) == 4
    done = search(folder, *MINIMISED)
    assert done.code == 0, done.err
    assert "holds 4 trials of 6" in done.out
    assert done.out.count("#") == 2 + 2, "those left and two seeds, nothing again"
    assert [t.params for t in stored(folder)] == [t.params for t in stored(whole)]
    assert (folder / "best.json").read_text() == (whole / "best.json").read_text()


def test_what_another_program_left_running_is_closed_and_another_search_is_refused(search, whole, tmp_path):
    (tmp_path / "study.db").write_bytes((whole / "study.db").read_bytes())
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.ask()
    words = [word.replace("=6", "=7") for word in MINIMISED]
    done = search(tmp_path, *words)
    assert done.code == 0, done.err
    assert [trial.state for trial in stored(tmp_path)][6:] == [TrialState.FAIL]
    assert "#" not in done.out, "seven of seven, and the seeds of the best are known"
    done = search(tmp_path, *words, "trainer.max_epochs=3")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "holds a search with another value of trainer" in done.err


def test_two_searches_do_not_share_a_directory(tmp_path):
    with _locked(tmp_path), pytest.raises(InputError, match="a search is running in"), _locked(tmp_path):
        pass


def test_points_that_go_with_nothing_are_not_run_and_a_small_space_ends_the_search(search, tmp_path):
    done = search(tmp_path, "loss=supcon,ranked_list", "miner=none,hard", "optimizer.lr=1e-3", "search.n_jobs=4", "search.seeds=0")
    assert done.code == 0, done.err
    assert "1 of 4 combinations are not searched over, such as: loss=ranked_list" in done.out
    assert "Launching 3 jobs" in done.out
    assert "no other point: the search ends with 3 of 20" in done.out
    found = {(trial.params["loss"], trial.params["miner"]) for trial in stored(tmp_path)}
    assert found == {("supcon", "none"), ("supcon", "hard"), ("ranked_list", "none")}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["search.n_trials=0"], "search.n_trials=0 must be a whole number, 1 or more"),
        (["optimizer.lr=interval(1e-2"], "interval(1e-2"),
        (["search.params={loss:choise(a)}"], "choise"),
        (["loss=supcon", "miner=none", "optimizer.lrr=interval(0,1)"], "optimizer.lrr is not a key of this configuration: did you mean"),
        (["loss=choice(supcon,tripplet)"], "loss=tripplet is not a choice: did you mean triplet?"),
        (["loss=supcon", "miner=none", "trainer.max_epochs=choice(3,few)"], "trainer.max_epochs=few must be a whole number"),
        (["optimized_metric=val/loss"], "optimized_metric=val/loss is not computed"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence_before_anything_is_run(search, tmp_path, words, says):
    done = search(tmp_path / "search", *words)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert says in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "search").exists()


def test_it_is_a_sweep(command):
    assert "say python train.py -m search=optuna" in command("train.py", "search=optuna").err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("x=choice(a,'b c',1)", CategoricalDistribution(["a", r"b\ c", "1"])),
        ("x=1,2,2", CategoricalDistribution(["1", "2"])),
        ("x=range(1,8,2)", IntDistribution(1, 7, step=2)),
        ("x=range(0.5,2,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("x=interval(0,1.5)", FloatDistribution(0, 1.5)),
        ("x=int(interval(1,16))", IntDistribution(1, 16)),
        ("x=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("miner=glob([none,*hard])", CategoricalDistribution(["batch_easy_hard", "batch_hard", "hard", "none", "semihard"])),
    ],
)
def test_a_space_is_said_in_hydras_grammar(override, expected):
    assert distribution(OverridesParser.create().parse_override(override)) == expected


@pytest.mark.parametrize("override", ["x=range(3,3)", "x=interval(2,1)", "x=tag(log,interval(0,1))", "loss=glob(q*)"])
def test_an_empty_space_is_refused(override):
    with pytest.raises(InputError, match=override.partition("=")[0]):
        distribution(OverridesParser.create().parse_override(override))


def test_the_sweep_of_wandb_says_what_train_takes_and_which_way_is_better():
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = _validate_config_and_fill_distribution(yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text()))
    assert sweep["metric"]["goal"] == ("maximize" if higher_is_better(sweep["metric"]["name"]) else "minimize")
    values = {key: over["values"][-1] if "values" in over else over["max"] for key, over in sweep["parameters"].items()}
    given = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})["args_no_hyphens"]
    assert create_sweep_command(sweep["command"])[-3:] == ["${program}", "test=false", "${args_no_hyphens}"]
    assert (ROOT / sweep["program"]).is_file()
    config = compose(["test=false", *given])
    assert config["optimized_metric"] == sweep["metric"]["name"]
    assert (config["choices"]["loss"], config["optimizer"]["lr"]) == (values["loss"], values["optimizer.lr"])
