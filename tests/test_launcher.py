"""The launcher `processes`: each job of a sweep is a single run in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_plugins.processes_launcher import RANKS
from siamese.config import ROOT, InputError, places, preflight, starts_processes

# `launch` as the entry points call it, and what the launcher gives the sweeper.
SCRIPT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from hydra.core.plugins import Plugins
from siamese.config import InputError, launch

Plugins.instance()
from hydra_plugins.processes_launcher import ProcessesLauncher
launch_jobs = ProcessesLauncher.launch

def recorded(self, jobs, initial_job_idx):
    returns = launch_jobs(self, jobs, initial_job_idx)
    found = [[job.status.name, job._return_value if job.status.name == "COMPLETED" else str(job._return_value)] for job in returns]
    Path(self.config.hydra.sweep.dir, "returns.json").write_text(json.dumps(found))
    return returns

ProcessesLauncher.launch = recorded
"""
# In place of training: what happens is in the seed.
STAND_IN = """
def task(config):
    out, seed = Path(config["paths"]["output_dir"]), config["seed"]
    seen = {"environment": dict(os.environ), "folder": os.getcwd(), **{key: config[key] for key in ("sweep", "overrides", "choices")}}
    (out / "seen.json").write_text(json.dumps(seen))
    print("this is job", seed, flush=True)
    if seed == 1:
        raise InputError("seed=1 is not to be had")
    if seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed in (3, 4):  # only together do they come to an end
        other = out.parent / str(4 - seed) / "seen.json"
        while not other.exists():
            time.sleep(0.05)
    if seed >= 8:
        rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        if seed == 9:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        (out / "pids.part").write_text(f"{os.getpid()} {rank.pid}")
        os.rename(out / "pids.part", out / "pids")
        try:
            time.sleep(300)
        finally:
            (out / "finished").touch()
    return {config["optimized_metric"]: seed / 7 + config["trainer"]["max_epochs"]}

launch(task, "train")
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("stand_in") / "script.py"
    path.write_text(SCRIPT + STAND_IN)
    return str(path)


def returns(sweep: Path) -> list[list]:
    return json.loads((sweep / "returns.json").read_text())


def seen(directory: Path) -> dict:
    return json.loads((directory / "seen.json").read_text())


@pytest.fixture(scope="module")
def broken(python, stand_in, tmp_path_factory):
    """A sweep whose middle jobs fail, started as a rank of something else, and a directory whose name must be quoted."""
    folder = tmp_path_factory.mktemp("broken") / "a b,c=d"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1", "WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    overrides = ("cluster=processes", "seed=1,2,5", "trainer.max_epochs=3", f"hydra.sweep.dir='{folder}'")
    return python(stand_in, "-m", *overrides, **ranks), folder


def test_jobs_that_fail_take_no_other_with_them_and_are_named(broken):
    done, folder = broken
    failed = "2 of 3 jobs failed"
    found = returns(folder)
    assert [status for status, _ in found] == ["FAILED", "FAILED", "COMPLETED"]
    assert [failed in value for _, value in found[:2]] == [True, True]
    assert found[2][1] == 5 / 7 + 3
    assert done.code == 1
    assert failed in done.err
    assert "Traceback" not in done.out + done.err
    for number, overrides, how in ((0, "seed=1 trainer.max_epochs=3", "exit status 1"), (1, "seed=2 trainer.max_epochs=3", "signal 9")):
        (line,) = (line for line in done.out.splitlines() if f"#{number} failed" in line)
        assert how in line
        assert overrides in line
        assert os.path.relpath(folder / str(number) / "train.log", ROOT) in line
    assert "seed=1 is not to be had" in (folder / "0" / "train.log").read_text()


def test_one_job_after_another_is_seen_as_it_runs(broken):
    lines = broken[0].out.splitlines()
    assert [line for line in lines if line.startswith("this is job")] == ["this is job 1", "this is job 2", "this is job 5"]
    assert lines.index("this is job 2") < lines.index("\t#2 : seed=5 trainer.max_epochs=3") < lines.index("this is job 5")


def test_a_job_is_a_single_run_that_knows_its_sweep(broken):
    job = seen(broken[1] / "2")
    assert job["sweep"] == broken[1].name
    assert job["overrides"] == ["seed=5", "trainer.max_epochs=3"]
    assert job["folder"] == str(ROOT)
    assert (broken[1] / "2" / ".hydra" / "overrides.yaml").read_text().split("\n") == ["- seed=5", "- trainer.max_epochs=3", ""]


def test_a_job_is_no_rank_of_what_started_the_sweep(broken):
    environment = seen(broken[1] / "2")["environment"]
    assert not [name for name in environment if RANKS.fullmatch(name)]
    assert environment["SLURM_JOB_ID"] == "7"
    assert "SIAMESE_RETURN" not in environment  # nor are the ranks that it starts the job


def test_a_job_gives_the_value_of_the_same_command_by_itself(python, broken, stand_in, tmp_path):
    result = tmp_path / "result"
    done = python(stand_in, "seed=5", "trainer.max_epochs=3", f"paths.output_dir={tmp_path}/run", SIAMESE_RETURN=str(result))
    assert done.code == 0
    assert ["COMPLETED", json.loads(result.read_text())] == returns(broken[1])[2]


def test_several_run_at_once_each_on_a_device_of_its_own_and_into_a_file(python, stand_in, tmp_path):
    done = python(stand_in, "-m", "cluster=processes", "cluster.devices=[6,GPU-7a]", "seed=4,3", f"hydra.sweep.dir={tmp_path}")
    assert done.code == 0, done.err
    assert [seen(tmp_path / number)["environment"]["CUDA_VISIBLE_DEVICES"] for number in "01"] == ["6", "GPU-7a"]
    assert [(tmp_path / number / "output.log").read_text() for number in "01"] == ["this is job 4\n", "this is job 3\n"]
    assert "this is job" not in done.out
    assert len(done.out.splitlines()) == 5


def test_ctrl_c_reaches_all_that_the_jobs_have_started_and_the_deaf_are_killed_at_the_second(stand_in, environment, tmp_path):
    overrides = ("cluster=processes", "cluster.jobs=2", "seed=8,9,10", f"hydra.sweep.dir={tmp_path}")
    sweep = subprocess.Popen([sys.executable, stand_in, "-m", *overrides], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: all((tmp_path / number / "pids").exists() for number in "01"))
    polite, deaf = ([int(pid) for pid in (tmp_path / number / "pids").read_text().split()] for number in "01")
    sweep.send_signal(signal.SIGINT)
    wait_for(lambda: not any(map(running, polite)))
    assert (tmp_path / "0" / "finished").exists()
    assert running(deaf[0])
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 130
    assert "stopped: 0 of 3 jobs" in out
    assert not (tmp_path / "2").exists()
    wait_for(lambda: not any(map(running, deaf)))


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


CHOSEN = "hydra/launcher=processes"


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ("-m trainer.devices=1,2", [CHOSEN]),
        ("-m optimizer.lr=interval(0.1,1) +trainer.strategy=ddp", [CHOSEN]),
        ("-m seed=1", []),
        ("-m trainer.devices=2 cluster=processes", []),
        ("-m trainer.devices=2 hydra/launcher=basic", []),
        ("trainer.devices=2", []),
    ],
)
def test_a_sweep_whose_jobs_start_processes_gets_the_launcher_by_itself(arguments, added, capsys):
    assert preflight(arguments.split(), "train") == added
    assert [CHOSEN in line for line in capsys.readouterr().out.splitlines()] == [True] * len(added)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"devices": 2}, "trainer.devices=2"),
        ({"devices": [0, 1]}, "trainer.devices=[0, 1]"),
        ({"devices": "auto"}, "trainer.devices=auto"),
        ({"devices": 1, "strategy": "fsdp"}, "trainer.strategy=fsdp"),
        ({"num_nodes": 2}, "trainer.num_nodes=2"),
        *(({"devices": one, "strategy": "auto", "num_nodes": 1}, None) for one in (1, "1", [3])),
        ({}, None),
    ],
)
def test_what_makes_lightning_start_processes(trainer, said):
    assert starts_processes({"trainer": trainer}) == said


def test_jobs_that_start_processes_are_refused_by_a_launcher_that_would_run_the_sweep_in_each(python, stand_in, tmp_path):
    done = python(stand_in, "-m", "cluster=none", "trainer.devices=2", f"hydra.sweep.dir={tmp_path}")
    assert done.code == 1
    assert "error: trainer.devices=2 starts processes" in done.err
    assert not (tmp_path / "0" / "seen.json").exists()


@pytest.mark.parametrize(
    ("cluster", "devices", "expected"),
    [
        ({}, 4, 0),
        ({"devices": [0, 1, 2]}, 2, 2),
        ({"devices": [0, 1, 2]}, "auto", 3),
        ({"devices": [0]}, 2, "trainer.devices=2 is more than the 1 of cluster.devices"),
        ({"devices": [0, 1]}, [0, 1], "say trainer.devices=2"),
        ({"devices": 2}, 1, "must be a list"),
        ({"devices": []}, 1, "must be a list"),
        ({"jobs": 0}, 1, "cluster.jobs=0"),
    ],
)
def test_devices_are_shared_out_or_the_reason_why_not_is_said(cluster, devices, expected):
    config = {"cluster": cluster, "trainer": {"devices": devices}}
    if isinstance(expected, int):
        assert places(config) == expected
    else:
        with pytest.raises(InputError, match=expected):
            places(config)


@pytest.mark.slow
def test_training_in_processes_gives_the_figures_of_single_runs(python, tiny, fit, wandb_run, tmp_path):
    script, sweep = tmp_path / "script.py", tmp_path / "letters"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}\nfrom train import train\nlaunch(train, 'train')\n")
    overrides = ("debug=fast", "test=false")
    done = python(
        *(str(script), "-m", "loss=triplet,contrastive", *overrides, *tiny),
        *("logger=wandb", "cluster=processes", "cluster.jobs=2", f"hydra.sweep.dir={sweep}"),
    )
    assert done.code == 0, done.err
    for number, loss in enumerate(("triplet", "contrastive")):
        directory = sweep / str(number)
        alone, together = fit(tmp_path / loss, f"loss={loss}", *overrides), json.loads((directory / "metrics.json").read_text())
        assert {k: v for k, v in together.items() if "seconds" not in k} == {k: v for k, v in alone.items() if "seconds" not in k}
        assert returns(sweep)[number] == ["COMPLETED", alone["val/map_at_r"]]
        assert {".hydra", "train.log", "output.log", "checkpoints", "bundle.safetensors"} <= {path.name for path in directory.iterdir()}
        summary, records = wandb_run(directory)
        assert (summary["state"], summary["exit_code"]) == ("finished", 0)
        assert next(record["run"] for record in records if record["type"] == "run")["run_group"] == "letters"
