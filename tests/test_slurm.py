"""Sweeps and runs as SLURM jobs, on a cluster of two nodes on this machine; and what is refused before SLURM is asked."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from siamese import config
from siamese.config import ROOT, InputError, compose, preflight

TWO_NODES = ("trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2", "test=false")


def figures(directory: Path) -> dict[str, float]:
    found = json.loads((directory / "metrics.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("seconds/")}


def until(true, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


# --- before SLURM is asked


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """There is an srun, as far as the check looks."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("cluster=slurm", "say -m, or for one run sbatch scripts/slurm.sh"),
        ("-m cluster=slurm trainer.devices=auto", "trainer.devices=auto: .* a whole number from 1"),
        ("-m cluster=slurm trainer.devices=[0,1]", "a whole number from 1"),
        ("-m cluster=slurm trainer.devices='2'", "a whole number from 1"),
        ("-m cluster=slurm trainer.num_nodes=0", "trainer.num_nodes=0: .* a whole number from 1"),
        ("-m cluster=slurm trainer.devices=1,2", "trainer.devices=2 in one job of this sweep"),
        ("-m cluster=slurm trainer=cpu,gpu", "trainer.accelerator=gpu in one job of this sweep"),
        ("-m cluster=none,slurm", "in one job of this sweep"),
        ("-m cluster=slurm cluster.time=01:00:00", "cluster.time=01:00:00 must be a whole number"),
        ("-m cluster.partition=gpu", "did you mean cluster.partition, which cluster=slurm has?"),
    ],
)
def test_what_slurm_would_not_start_is_refused_in_a_sentence(login_node, arguments, said):
    with pytest.raises(InputError) as error:
        preflight(arguments.split(), "train")
    assert re.search(said, str(error.value))


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no srun here"):
        preflight(["-m", "cluster=slurm"], "train")


def test_a_missing_extra_is_one_sentence_with_the_remedy(python):
    run = (
        "import hydra_plugins, runpy, sys; hydra_plugins.__path__ = []; sys.argv = sys.argv[1:]; runpy.run_path('train.py', {}, '__main__')"
    )
    done = python("-c", run, "train.py", "-m", "cluster=slurm")
    assert done.code == 1
    assert done.err.strip() == "error: cluster=slurm needs a package that is not installed: pip install -e '.[cluster]'"


def test_slurm_is_asked_for_what_the_run_takes(login_node):
    asked = config._compose(["cluster=slurm", "trainer=gpu", "trainer.devices=4", "trainer.num_nodes=2", "cluster.memory=64"], "train")
    launcher = asked.hydra.launcher
    assert (launcher.tasks_per_node, launcher.gpus_per_node, launcher.nodes, launcher.mem_gb) == (4, 4, 2, 64)
    assert config._compose(["cluster=slurm"], "train").hydra.launcher.gpus_per_node is None
    assert config._compose(["cluster=slurm"], "evaluate").hydra.launcher.tasks_per_node == 1


def test_a_file_of_the_machines_own_is_read_after_the_choices_and_before_the_command_line(tmp_path, monkeypatch):
    shutil.copytree(config.CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    assert compose(["cluster=slurm"])["cluster"]["account"] is None
    own = tmp_path / "conf" / "local" / "default.yaml"
    own.parent.mkdir()
    own.write_text("# @package _global_\ncluster:\n  partition: big\n  account: mine\n")
    for entry in ("train", "evaluate"):
        cluster = compose(["cluster=slurm", "cluster.partition=small"], entry)["cluster"]
        assert (cluster["partition"], cluster["account"]) == ("small", "mine")
    assert compose([])["choices"]["cluster"] == "none"
    with pytest.raises(InputError, match=r"there is no conf/local/other\.yaml"):
        compose(["local=other"])
    own.write_text("cluster:\n  partition: big\n")
    with pytest.raises(InputError, match="must begin with the line `# @package _global_`"):
        compose([])


# --- with SLURM


@pytest.fixture(scope="module")
def cluster(environment, tmp_path_factory) -> Iterator[dict[str, str]]:
    """The variables with which a command finds the cluster."""
    script, folder = ROOT / "tests" / "slurm_cluster.sh", tmp_path_factory.mktemp("slurm")
    started = subprocess.run([script, "start", folder], capture_output=True, text=True)
    if started.returncode == 3:
        pytest.skip(f"no SLURM here: {started.stderr.strip()[-300:]}")
    assert started.returncode == 0, started.stderr
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    yield {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([script, "stop", folder], check=True, timeout=60)


@pytest.mark.slow
def test_jobs_of_a_sweep_train_on_two_nodes_and_go_on_after_both_ways_of_being_stopped(cluster, start, environment, tiny, tmp_path):
    from submitit.core.utils import pickle_load

    folder, at_once = tmp_path / "sweep", ("cluster.cpus_per_task=1", "trainer.max_epochs=150", "trainer.check_val_every_n_epoch=50")
    # Two jobs that train alike: each is stopped somewhere else, and both must come to the same.
    sweep = start(
        "train.py", "-m", "cluster=slurm", "leakage=warn,off", *tiny, *TWO_NODES, *at_once, f"hydra.sweep.dir={folder}", **cluster
    )
    stops = {"0": ["scontrol", "requeue"], "1": ["scancel", "--signal=USR1"]}  # by others; by SLURM when the time is nearly over
    for job, stop in stops.items():
        until(lambda job=job: (folder / job / "checkpoints" / "last.ckpt").exists())
        (number,) = (path.name for path in (folder / ".submitit").glob(f"*_{job}"))
        subprocess.run([*stop, number], env={**environment, **cluster}, check=True)
    done = sweep.wait(400)
    assert done.code == 0, done.err
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [".submitit", "0", "1"]
    for job in stops:
        log = (folder / job / "train.log").read_text()
        assert "2 ranks share each batch" in log
        stopped = re.search(r"step (\d+): this job is being stopped.*\n", log)
        assert 0 < int(stopped[1]) < 300
        assert f"{job}/checkpoints/last.ckpt" in log[stopped.end() :], "it began anew"
        (result,) = (folder / ".submitit").glob(f"*_{job}/*_0_result.pkl")
        assert pickle_load(result)[1].return_value == figures(folder / job)["val/map_at_r"]
    assert figures(folder / "0") == figures(folder / "1")


@pytest.mark.slow
def test_a_single_run_is_one_job_on_two_nodes(cluster, environment, tiny, tmp_path):
    sbatch = ["sbatch", "--wait", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path}/out", "scripts/slurm.sh"]
    command = [*sbatch, *tiny, "trainer=ddp_cpu", "test=false", f"paths.output_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env={**environment, **cluster}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + (tmp_path / "out").read_text()
    assert figures(tmp_path / "run")["val/map_at_r"] > 0
    assert "2 ranks share each batch" in (tmp_path / "run" / "train.log").read_text()
