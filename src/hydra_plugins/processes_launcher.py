"""Hydra's launcher `processes`: each job of a sweep is `python train.py ...` by itself, a single run in a fresh process.

The basic launcher runs the jobs in the sweep's own process. There a strategy that starts a process for each device would run the
whole sweep again in each of them, and a job that is killed would take the others with it.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

# What tells a process which of several ranks it is: the sweep's own place says nothing of its jobs.
RANKS = re.compile(
    r"((GLOBAL|LOCAL|NODE|GROUP|ROLE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|JSM_NAMESPACE)_.*"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|NTASKS.*|NPROCS|TASKS_PER_NODE|STEP_.*|STEPID)"
)
# How the sweep is run is no business of its jobs: what one is given gives the same figures by itself.
_OF_THE_SWEEP = re.compile(r"[+~]*(cluster[=.]|hydra\.(mode|run|sweep|sweeper|launcher)\b|hydra/(sweeper|launcher)\b)")
_PATIENCE = 30.0  # seconds between asking a job to end and ending it

log = logging.getLogger(__name__)


@dataclass
class ProcessesConf:
    _target_: str = "hydra_plugins.processes_launcher.ProcessesLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="processes_launcher")


@dataclass
class _Job:
    number: int
    name: str
    given: list[str]  # by the sweeper
    config: DictConfig
    directory: Path
    places: int  # among the devices listed for the sweep, of which it is given so many
    taken: list[int] = field(default_factory=list)
    process: subprocess.Popen | None = None

    @property
    def overrides(self) -> list[str]:
        return [override for override in self.given if not _OF_THE_SWEEP.match(override)]


class ProcessesLauncher(Launcher):
    """One job after another, its output shown as it comes; with `cluster.jobs` or `cluster.devices` several at once, each into a file."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.started, self.failed = 0, 0  # a sweeper may launch many batches

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run these jobs to their ends; one that fails has no return value, and stops no other.

        Raises:
            InputError: what `cluster` says cannot be done.
            SystemExit: Ctrl-C, or another signal to end, once no job is left running.
        """
        from siamese.config import InputError

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = [self._job(number, list(overrides)) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        devices = OmegaConf.select(self.config, "cluster.devices") or []
        at_once = OmegaConf.select(self.config, "cluster.jobs") or (len(jobs) if devices else 1)
        if devices:
            at_once = min(at_once, len(devices) // min(job.places for job in jobs))
        shown = min(at_once, len(jobs)) == 1
        returns: dict[int, JobReturn] = {}
        waiting, running, free = list(jobs), [], list(range(len(devices)))
        log.info("Launching %d jobs, %s", len(jobs), "each a process of its own" if shown else f"at most {at_once} at once")
        with tempfile.TemporaryDirectory() as folder, _noted() as signals:
            try:
                while (waiting or running) and not signals:
                    while waiting and len(running) < at_once and waiting[0].places <= len(free):
                        job = waiting.pop(0)
                        job.taken, free = free[: job.places], free[job.places :]
                        self._start(job, [devices[place] for place in job.taken], Path(folder), shown)
                        running.append(job)
                    time.sleep(0.05)
                    for job in [job for job in running if job.process.poll() is not None]:
                        _end([job.process], signal.SIGTERM, signals)  # what it has left behind: ranks of one that was killed
                        running.remove(job)
                        free = sorted(free + job.taken)
                        returns[job.number] = self._returned(job, Path(folder), shown)
            finally:
                _end([job.process for job in running], signal.SIGINT, signals)
        if signals:
            log.error("stopped: %d of %d jobs had ended", len(returns), len(jobs))
            sys.exit(128 + signals[0])
        self.started += len(jobs)
        failed = [job for job in jobs if returns[job.number].status == JobStatus.FAILED]
        self.failed += len(failed)
        for job in failed:  # the sweeper raises it
            where = os.path.relpath(self.config.hydra.sweep.dir)
            returns[job.number].return_value = InputError(f"{self.failed} of {self.started} jobs failed, their logs are in {where}")
        return [returns[job.number] for job in jobs]

    def _job(self, number: int, overrides: list[str]) -> _Job:
        from siamese.config import places

        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        directory = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
        name = config.hydra.job.name
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        return _Job(number, name, overrides, config, directory, places(OmegaConf.to_container(config, resolve=True)))

    def _start(self, job: _Job, devices: list, folder: Path, shown: bool) -> None:
        from siamese.config import FULL_ERROR

        of_hydra = [override for override in self.config.hydra.overrides.hydra if not _OF_THE_SWEEP.match(override)]
        command = [sys.executable, os.path.abspath(sys.argv[0]), *_flags(), *of_hydra, *job.overrides]
        for key, path in (("run", job.directory), ("sweep", Path(str(self.config.hydra.sweep.dir)).absolute())):
            quoted = str(path).replace("'", r"\'")
            command.append(f"hydra.{key}.dir='{quoted}'")  # a path may hold blanks, commas and equals signs
        command += [f"hydra.job.num={job.number}", f"hydra.job.id={job.number}"]
        environment = {key: value for key, value in os.environ.items() if not RANKS.fullmatch(key)}
        environment |= {"SIAMESE_RETURN": str(folder / str(job.number)), "HYDRA_FULL_ERROR": str(int(FULL_ERROR))}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        job.directory.mkdir(parents=True, exist_ok=True)
        log.info("\t#%d : %s%s", job.number, " ".join(job.overrides), "" if shown else f" -> {os.path.relpath(_log_of(job, shown))}")
        sys.stdout.flush()
        with contextlib.nullcontext() if shown else open(_log_of(job, shown), "wb") as file:
            # A session of its own: signals reach all that the job starts, and nothing else.
            job.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def _returned(self, job: _Job, folder: Path, shown: bool) -> JobReturn:
        status, file = job.process.returncode, folder / str(job.number)
        completed = status == 0 and file.exists()
        if not completed:
            said = f"exit status {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
            log.error("\t#%d failed with %s (%s): see %s", job.number, said, " ".join(job.overrides), os.path.relpath(_log_of(job, shown)))
        elif not shown:
            log.info("\t#%d has ended and returns %s", job.number, file.read_text())
        return JobReturn(
            overrides=job.given,
            cfg=job.config,
            working_dir=str(job.directory),
            task_name=job.name,
            status=JobStatus.COMPLETED if completed else JobStatus.FAILED,
            _return_value=json.loads(file.read_text()) if completed else None,
        )


def _log_of(job: _Job, shown: bool) -> Path:
    """All that it says, or, where that was shown, what the job's own logging writes."""
    return job.directory / (f"{job.name}.log" if shown else "output.log")


def _flags() -> list[str]:
    """Where the sweep's configuration comes from, when its command line says so."""
    parser = argparse.ArgumentParser(add_help=False)
    for short, flag in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, flag)
    known, _ = parser.parse_known_args(sys.argv[1:])
    return [f"--{key.replace('_', '-')}={value}" for key, value in vars(known).items() if value is not None]


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """The signals that ask for an end are noted, and heeded between two steps: no process is started and then forgotten."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: list[subprocess.Popen], how: int, signals: list[int]) -> None:
    """Ask the group of each to end, wait until nothing is left of it, and kill what takes too long, at once at a further Ctrl-C."""
    heard, deadline = len(signals), time.monotonic() + _PATIENCE
    left = [process for process in processes if _alive(process, how)]
    while left and len(signals) == heard and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if _alive(process)]
    for process in left:
        _alive(process, signal.SIGKILL)
    for process in processes:
        process.wait()


def _alive(process: subprocess.Popen, number: int = 0) -> bool:
    """Send a signal to a group; False when none is left to take it."""
    process.poll()  # one that has ended and is not waited for would count
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
