"""Compose a configuration, check it before anything heavy is imported, and build what it names.

The only file besides the entry points and Hydra's own plugins that knows Hydra: everything below is given plain values.
"""

import contextlib
import difflib
import functools
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import CompactHydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
os.environ.setdefault("SIAMESE_DATA_DIR", str(ROOT / "data"))
# Before torch is imported: threads that wait spin briefly, then sleep. With another process on one of two cores, libgomp's
# own way made a training step take ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# As the user set it: `launch` sets it for Hydra.
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
# What a node of a cluster is asked for when cluster.gpus is not said.
OmegaConf.register_new_resolver("gpus", lambda trainer: trainer.devices if trainer and trainer.accelerator in ("gpu", "cuda") else None)

# Keys of a group's YAML that tell us something and are no arguments of its `_target_`.
NO_ARGUMENTS = {
    "encoder": ("lr",),
    "loss": ("goes_with", "lr"),
    "miner": ("goes_with",),
    "distance": ("name",),
    "optimizer": ("lr_factors",),
}
# May be a word, or a list, where the default is a number: devices=auto, dataset.test=[cats,dogs], dataset.validation=others.
_ANY_TYPE = ("trainer.devices", "dataset.val", "dataset.test", "dataset.validation")
# Several values in one place, of which null means none.
_NONE_OF_IT = ("augmentation.classwise",)
# A number by default, and null means something too: no head, the optimizer's rate, no crop.
_MAY_BE_NULL = re.compile(r"encoder\.embedding_size|(encoder|loss)\.(.*\.)?lr|augmentation\.crop")
_CHECKED_JOBS = 100

log = logging.getLogger(__name__)


class InputError(Exception):
    """What the user gave cannot be used: one or two lines that name the key or file, and the remedy."""


def launch(task: Callable[[dict], dict], config_name: str) -> None:
    """Run `task(config)` under Hydra; bad input ends in one or two lines and exit code 1, with HYDRA_FULL_ERROR=1 in a traceback."""
    returned = os.environ.pop("SIAMESE_RETURN", None)  # of the launcher `processes`, to this process and none that it starts
    scratch, first = None, None
    if rank_from_outside():  # the first rank speaks and writes for all, whatever the others write is thrown away
        first = next((arg for arg in reversed(sys.argv) if arg.startswith("hydra.run.dir=")), None)
        first = OverridesParser.create().parse_override(first).value() if first else None
        scratch = tempfile.TemporaryDirectory(prefix="siamese-")
        sys.argv += [f"hydra.run.dir={scratch.name}", "hydra.output_subdir=null", "hydra/job_logging=none"]

    def job(cfg: DictConfig) -> float | None:
        runtime, rank = HydraConfig.get(), rank_from_outside()  # a launcher may have brought this to another process
        if rank:
            logging.disable(logging.ERROR)
        single = runtime.mode is None or runtime.mode.name == "RUN"
        sweep = not OmegaConf.is_missing(runtime.job, "num")  # single too, where the launcher gives each job a process
        try:
            config = check(cfg, dict(runtime.runtime.choices), list(runtime.overrides.task), config_name)
            if not single and _in_its_process(runtime.launcher) and (why := starts_processes(config)):
                raise InputError(f"{why} starts processes, each of which would run the whole sweep again: say cluster=processes")
            place = (first or config["paths"]["output_dir"]) if scratch else runtime.runtime.output_dir
            if config_name == "train" and config["resume"] and (found := newest_checkpoint(Path(place, "checkpoints"))):
                config["ckpt"], config["init_from"] = found, None
            config["sweep"] = Path(runtime.sweep.dir).name if sweep else None
            with tempfile.TemporaryDirectory(prefix="siamese-") as elsewhere:
                config["paths"]["output_dir"] = elsewhere if rank else place
                figures = task(config)
        except InputError as error:
            if sweep:
                log.error("job failed: %s", error)
            if single and (rank or not FULL_ERROR):
                where = f" (rank {rank})" if rank else ""
                sys.exit(1 if sweep else f"error{where}: {error}")  # not through Hydra, which would print all overrides above it
            raise
        except Exception:
            if "SUBMITIT_EXECUTOR" in os.environ:  # what comes back from there has no traceback
                log.exception("job failed")
            raise
        value = figures.get(config.get("optimized_metric"))
        if returned:
            Path(f"{returned}.part").write_text(json.dumps(value))
            os.replace(f"{returned}.part", returned)
        return value

    sys.unraisablehook = interrupt_again
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing them
    try:
        sys.argv += preflight(sys.argv[1:], config_name)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except BrokenPipeError:  # the reader of --help | head has gone
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        known = isinstance(error, InputError) or type(error).__module__.startswith("submitit.")  # what sbatch says, or a job's end
        hydras = isinstance(error, (CompactHydraException, OmegaConfBaseException, OSError, ValueError)) and not _raised_by_job(error)
        if FULL_ERROR or not (known or hydras):
            raise
        sys.exit(1 if scratch else f"error: {explain(error, sys.argv[1:], config_name)}")
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")


def newest_checkpoint(folder: Path) -> str | None:
    """The last of a run's checkpoints that is whole, or None: where `resume=auto` goes on."""
    from siamese.bundle import load_checkpoint

    for name in ("last.ckpt", "previous.ckpt"):
        try:
            load_checkpoint(folder / name)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning("%s", error)
            continue
        log.info("resumed from %s", os.path.relpath(folder / name))
        return str(folder / name)
    log.info("there is no checkpoint in %s yet: training starts anew", os.path.relpath(folder))
    return None


def rank_from_outside() -> int:
    """0 for a process by itself and for the first of those that torchrun, srun or Lightning have started; of the others not 0."""
    of_job = "SLURM_PROCID" if "SLURM_STEP_ID" in os.environ else ""
    return int(os.environ.get("RANK") or os.environ.get(of_job) or os.environ.get("LOCAL_RANK") or os.environ.get("NODE_RANK") or 0)


def stamp() -> str:
    """Names a run's directory: the number of its job step under srun, so that a requeued job finds it again, else the time."""
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


OmegaConf.register_new_resolver("stamp", stamp, replace=True, use_cache=True)


def interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python drops a Ctrl-C that falls into a weak reference's callback or a finaliser: send it once more, shortly after."""
    if unraisable.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(unraisable)
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()


def _raised_by_job(error: BaseException) -> bool:
    """Did this come out of the task itself (a bug, then: show all of it), not out of Hydra around it?"""
    trace, names = error.__traceback__, []
    while trace:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return "job" in names


def compose(overrides: list[str] | None = None, config_name: str = "train") -> dict:
    """The checked configuration as plain values, as the entry points see it.

    Raises:
        InputError: in one or two lines, what is wrong with the overrides.
    """
    overrides = overrides or []
    try:
        cfg = _compose(overrides, config_name)
        return check(cfg, dict(cfg.hydra.runtime.choices), overrides, config_name)
    except (CompactHydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(explain(error, overrides, config_name)) from error


def _compose(overrides: list[str], config_name: str) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # within a job
        return hydra.compose(config_name, overrides, return_hydra_config=True)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, overrides, return_hydra_config=True)


def preflight(arguments: list[str], config_name: str) -> list[str]:
    """Check every job of a command line before the first one starts, so that bad input leaves no directory behind.

    Returns: what the command line must say too, the launcher of a sweep whose jobs start processes of their own.
    """
    flags = [a for a in arguments if a.startswith("-")]
    if set(flags) - {"-m", "--multirun"}:
        return []  # --help, --cfg, --config-dir ...: Hydra's business
    overrides = [a for a in arguments if not a.startswith("-")]
    places = ("paths.output_dir=", "hydra.run.dir=", "hydra.sweep.dir=")
    if "resume=auto" in overrides and "SLURM_STEP_ID" not in os.environ and not any(o.startswith(places) for o in overrides):
        where = "hydra.sweep.dir=DIR" if flags else "paths.output_dir=DIR"
        raise InputError(f"resume=auto goes on where the same command has been before: say {where} to both")
    if flags and "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("a sweep starts the ranks of each of its jobs by itself: leave torchrun away")
    parsed = OverridesParser.create().parse_overrides(overrides)
    mine = [o for o in parsed if not o.key_or_group.startswith("hydra")]
    search = next((o.input_line for o in mine if o.key_or_group == "search" and o.value() != "none"), None)
    if search and not flags:
        raise InputError(f"{search} makes many runs: say python train.py -m {search}")
    if flags and any(o.key_or_group == "paths.output_dir" for o in mine):
        raise InputError("paths.output_dir is one run's directory: for a sweep say hydra.sweep.dir=DIR")
    fixed = [o.input_line for o in mine if not (flags and o.is_sweep_override())]
    if not flags:
        jobs = [fixed]
    elif search:  # its sweeper draws the jobs, and checks what it draws from
        jobs = [[o.input_line for o in mine if not o.is_sweep_override() and o.key_or_group.partition(".")[0] != "search"]]
    else:
        choices = [[f"{o.get_key_element()}={v}" for v in swept(o)] if o.is_sweep_override() else [o.input_line] for o in mine]
        jobs = [list(job) for job in itertools.islice(itertools.product(*choices), _CHECKED_JOBS)]
    reasons = []
    for job in jobs:
        config = compose(job, config_name)
        if config["choices"].get("cluster") == "slurm":
            _check_slurm(config, _compose(fixed, config_name), bool(flags))
        if config["choices"].get("cluster", "none") == "none" and (why := starts_processes(config)):
            reasons.append(why)
    if not flags or not reasons or any(o.key_or_group in ("cluster", "hydra/launcher") for o in parsed):
        return []
    print(f"hydra/launcher=processes is chosen, a process for each job: {reasons[0]} starts several", flush=True)
    return ["hydra/launcher=processes"]


def starts_processes(config: dict) -> str | None:
    """What makes Lightning start processes that run the same command line; None when it does not."""
    trainer = config.get("trainer", {})
    devices, nodes, strategy = trainer.get("devices", 1), trainer.get("num_nodes", 1), trainer.get("strategy", "auto")
    if str(strategy) not in ("auto", "single_device"):
        return f"trainer.strategy={strategy}"
    if str(devices) != "1" and not (isinstance(devices, list) and len(devices) == 1):
        return f"trainer.devices={devices}"
    return f"trainer.num_nodes={nodes}" if nodes != 1 else None


def _check_slurm(config: dict, launched: DictConfig, sweep: bool) -> None:
    """Refuse a job that SLURM would not start, or whose ranks would never meet; `launched` is what the launcher goes by."""
    if not sweep:
        raise InputError("cluster=slurm sends the jobs of a sweep to SLURM: say -m, or for one run sbatch scripts/slurm.sh")
    if shutil.which("srun") is None:
        raise InputError("cluster=slurm: there is no srun here, so no SLURM: start the sweep where sbatch works, or leave cluster= away")
    for key in ("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "cluster.time"):
        value, group = OmegaConf.select(OmegaConf.create(config), key), key.partition(".")[0]
        if key != "trainer.accelerator" and value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{key}={value}: cluster=slurm asks for it in advance, so it must be a whole number from 1")
        if value != OmegaConf.select(launched, key):
            raise InputError(f"{key}={value} in one job of this sweep: cluster=slurm asks the same for all, so sweep nothing of {group}")


def _in_its_process(launcher: DictConfig) -> bool:
    """Does this launcher run a job in a process that has the sweep's command line?"""
    return launcher._target_.rpartition(".")[2] in ("BasicLauncher", "JoblibLauncher")


def places(config: dict) -> int:
    """How many of the devices listed in `cluster.devices` one job takes; 0 when none are listed.

    Raises:
        InputError: `cluster` asks for what cannot be.
    """
    cluster, wanted = config.get("cluster", {}), config.get("trainer", {}).get("devices", 1)
    jobs, devices = cluster.get("jobs"), cluster.get("devices")
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise InputError(f"cluster.jobs={jobs} must be a whole number from 1, or null")
    if devices is None:
        return 0
    if not isinstance(devices, list) or not devices or not all(type(device) in (int, str) for device in devices):
        raise InputError(f"cluster.devices={devices} must be a list, as in cluster.devices=[0,1]")
    if isinstance(wanted, list):
        raise InputError(f"trainer.devices={wanted} names devices, and so does cluster.devices: say trainer.devices={len(wanted)}")
    if isinstance(wanted, int) and wanted > len(devices):
        raise InputError(f"trainer.devices={wanted} is more than the {len(devices)} of cluster.devices={devices}")
    return wanted if isinstance(wanted, int) and wanted > 0 else len(devices)  # auto takes all it sees


def swept(override: Override) -> Iterable[str]:
    values = override.value()
    if isinstance(values, IntervalSweep):  # the sweeper draws the jobs, each is checked when it starts: one stands for all
        return [str(values.start)]
    if not isinstance(values, Glob):
        return override.sweep_string_iterator()
    group = override.key_or_group
    if not (found := values.filter(available(group))):
        raise InputError(f"{override.input_line} fits no choice: {group} is one of {', '.join(available(group))}")
    return found


def check(cfg: DictConfig, choices: dict[str, str], overrides: list[str], config_name: str) -> dict:
    """Refuse what cannot work, in a sentence, and resolve the rest to plain values.

    `choices` and `overrides` stand in the result beside the groups, as does `sweep`, the stamp of a multirun.
    """
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    choices = {group: choice for group, choice in choices.items() if not group.startswith("hydra")}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if value.startswith("[") and (CONF / key.partition("@")[0]).is_dir() and key != "callbacks":
            raise InputError(f"{override}: {key} is one choice, not a list")
        if key == "distance.name":
            raise InputError(f"{override}: say distance={value}, the name alone changes nothing")
    if (local := choices.get("local", "default")) not in ("default", *available("local")):  # it is optional: Hydra takes any
        raise InputError(f"local={local}: there is no {CONF.name}/local/{local}.yaml")
    if "local" in cfg:
        raise InputError(f"conf/local/{local}.yaml must begin with the line `# @package _global_`, or it says nothing of other groups")
    if "callbacks" in cfg:  # of a list, callbacks=[ema,early_stopping], Hydra keeps no choice
        choices.setdefault("callbacks", ",".join(cfg.callbacks))
    for key in choices:
        path = key.partition("@")[2]
        if path and isinstance(value := OmegaConf.select(cfg, path), str):
            raise InputError(f"{path}={value} is a word where a whole choice belongs: say {key}={value}")
    if config_name == "train":
        _check_combination(cfg, choices)
    _check_types(cfg, choices, overrides, config_name)
    config = OmegaConf.to_container(cfg, resolve=True)
    if missing := next(_missing(config), None):
        raise InputError(f"{missing} has no value: say {missing}=...")
    for key, path in (("ckpt", config["ckpt"]), ("init_from", config.get("init_from"))):
        if path is not None and not Path(str(path)).is_file():
            folder = Path(str(path)).is_dir()
            remedy = "it is a folder: name a file in it, checkpoints/last.ckpt or bundle.safetensors" if folder else "there is no such file"
            raise InputError(f"{key}={path}: {remedy}")
    if config.get("resume") not in (None, "auto"):
        raise InputError(f"resume={config['resume']} must be auto, or null: a checkpoint is named by ckpt=")
    if config["ckpt"] and config.get("init_from"):
        raise InputError("ckpt= resumes a run with everything, init_from= takes weights only: give one of them")
    path = config["dataset"].get("path")
    if path is not None and not Path(path).exists():
        if not (origin := _origin(choices["dataset"])):
            raise InputError(f"dataset.path: there is no {path}: say where your data lies")
        raise InputError(
            f"dataset.path: there is no {path}. Fetch it ({origin}), or say where it lies: SIAMESE_DATA_DIR=DIR or dataset.path=DIR"
        )
    places(config)
    return {**config, "choices": choices, "overrides": overrides, "sweep": None}


def _origin(dataset: str) -> str | None:
    """Where to get it: the command or address in the first line of its YAML; None for data of one's own."""
    file = CONF / "dataset" / f"{dataset}.yaml"
    found = re.search(r"`(python [^`]+)`|(https?://\S+)", file.read_text().partition("\n")[0]) if file.is_file() else None
    return found[1] or found[2] if found else None


def on_the_sphere(distance: dict) -> bool:
    """Cosine and normalised Euclidean distance rank alike: for what a loss accepts they are one family, `sphere`."""
    euclidean = distance["name"] == "euclidean" and distance.get("p", 2) == 2
    return distance["name"] == "cosine" or (euclidean and distance["normalize_embeddings"])


def named(cfg: DictConfig, choices: dict[str, str], group: str) -> Iterator[tuple[str, dict]]:
    """What a group names, as the user says it (`loss=triplet`), with its node, unresolved; then what is named within it."""

    def walk(path: str, node: dict) -> Iterator[tuple[str, dict]]:
        key = path if path == group else f"{group}@{path}"
        yield f"{key}={choices[key]}" if key in choices else path, node
        for name, value in node.items():
            if isinstance(value, dict) and name != "goes_with":
                yield from walk(f"{path}.{name}", value)

    return walk(group, OmegaConf.to_container(cfg[group], resolve=False))


def _check_combination(cfg: DictConfig, choices: dict[str, str]) -> None:
    """Hold the table of what goes with what, the `goes_with` of each loss and miner, against what is asked for."""
    sampling, distance, miner = choices["sampling"], OmegaConf.to_container(cfg.distance, resolve=True), choices["miner"]
    nodes = list(named(cfg, choices, "loss"))
    rows = [(said, node.get("goes_with", {})) for said, node in nodes]

    def ways_out(group: str) -> str:
        asked = ({group: choice} for choice in available(group))
        others = [f"{group}={a[group]}" for a in asked if _all_go_with([row for _, row in rows], a.get("sampling"), a.get("distance"))]
        losses = [loss for loss in available("loss") if _all_go_with([_read("loss", loss).get("goes_with")], sampling, distance)]
        return " or ".join([*others, *(f"loss={loss}" for loss in losses[:3])])

    for said, node in nodes:
        names, weights = (list(node.get(key, ())) for key in ("losses", "weights"))
        if set(names) != set(weights):
            odd = sorted(set(names) ^ set(weights))[0]
            path = said.partition("=")[0].rpartition("@")[2]
            remedy = f"say +{path}.weights.{odd}=1.0 too" if odd in names else f"there is no {path}.losses.{odd}"
            raise InputError(f"{said} has the losses {', '.join(names)} and weights for {', '.join(weights)}: {remedy}")
    for said, accepts in rows:
        if not _all_go_with([accepts], sampling, None):
            why = "needs the classes of a balanced batch" if accepts["sampling"] == ["balanced"] else "finds no tuples it can use there"
            raise InputError(f"{said} does not go with sampling={sampling}: it {why}. Use {ways_out('sampling')}")
        if not _all_go_with([accepts], None, distance):
            raise InputError(f"{said} is not defined for distance={_said(distance)}: use {ways_out('distance')}")
        if sampling == "balanced" and miner not in accepts.get("miner", [miner]):
            remedy = f"use miner={' or miner='.join(accepts['miner'])}, or loss=triplet"
            raise InputError(f"{said} forms its own tuples and takes none from miner={miner}: {remedy}")
        key = said.partition("=")[0]
        within = f"loss@{key.partition('@')[2] or key}.loss"
        if choices.get(within) not in accepts.get("loss", [choices.get(within)]):
            remedy = f"use {within}=contrastive, or another of {', '.join(accepts['loss'])}"
            raise InputError(f"{said} does not go around loss={choices[within]}: {remedy}")
    if sampling == "balanced":  # elsewhere no miner is used
        for said, node in named(cfg, choices, "miner"):
            if not _all_go_with([node.get("goes_with", {})], None, distance):
                raise InputError(f"{said} is not defined for distance={_said(distance)}: use distance=cosine or miner=semihard")


def _all_go_with(rows: list[dict | None], sampling: str | None, distance: dict | str | None) -> bool:
    """Do all these rows of the table accept both? None asks nothing; of a row that is missing nothing is known."""
    names = {distance["name"] if isinstance(distance, dict) else distance}
    if distance == "cosine" or (isinstance(distance, dict) and on_the_sphere(distance)):
        names.add("sphere")
    return all(
        row is not None
        and (sampling is None or sampling in row.get("sampling", [sampling]))
        and (distance is None or not names.isdisjoint(row.get("distance", names)))
        for row in rows
    )


def _said(distance: dict) -> str:
    plain = distance["name"] == "euclidean" and not distance["normalize_embeddings"]
    return "euclidean without normalisation" if plain else distance["name"]


@functools.lru_cache(maxsize=100)
def _shipped(choices: tuple[str, ...], config_name: str) -> DictConfig:
    """The configuration of these choices and no other override; a search asks for the same ones again and again."""
    return _compose(list(choices), config_name)


def _check_types(cfg: DictConfig, choices: dict[str, str], overrides: list[str], config_name: str) -> None:
    """A number in the YAML stays a number, a switch a switch: found here, not in the first training step."""
    values = [o for o in overrides if o.partition("=")[0].lstrip("+~") not in choices]
    if not values:
        return
    composed = _shipped(tuple(o for o in overrides if o not in values), config_name)
    if unknown := sorted(set(cfg) - set(composed)):
        raise InputError(f"{unknown[0]} is not a key of this configuration: {_near(unknown[0], sorted(composed))}")
    shipped, given = _leaves(composed), _leaves(cfg)
    for key in sorted(shipped.keys() - given.keys()):
        if lost := [above for above in given if key.startswith(f"{above}.") and not (above in _NONE_OF_IT and given[above] is None)]:
            raise InputError(f"{lost[0]}={given[lost[0]]} stands in the place of several values: say {key}={shipped[key]}")
    for key, value in given.items():
        expected = shipped.get(key)
        if key in _ANY_TYPE or not isinstance(expected, (bool, int, float)) or (value is None and _MAY_BE_NULL.fullmatch(key)):
            continue
        wanted, kinds = {bool: ("true or false", bool), int: ("a whole number", int), float: ("a number", (int, float))}[type(expected)]
        wrong = isinstance(value, bool) != isinstance(expected, bool) or (isinstance(value, float) and not math.isfinite(value))
        if not isinstance(value, kinds) or wrong:
            value = "null" if value is None else value
            raise InputError(
                f"{key}={value} must be {wanted}, as in {key}={str(expected).lower() if isinstance(expected, bool) else expected}"
            )


def _leaves(node, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value, lists as values; what cannot be resolved (Hydra's own, by day of time) is left out."""
    leaves = {}
    for key in node:
        if prefix == "" and key == "hydra":
            continue
        try:
            value = node[key]
        except OmegaConfBaseException:
            continue
        leaves.update(_leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else {f"{prefix}{key}": value})
    return leaves


def _missing(node: dict, prefix: str = "") -> Iterator[str]:
    """Keys that must be given and are not."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def available(group: str) -> list[str]:
    """The choices of a group, as after `loss=`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@functools.cache
def _read(group: str, name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=False)


def explain(error: Exception, arguments: list[str], config_name: str) -> str:
    """One or two lines for what Hydra says in ten, with the nearest choice or key."""
    text = str(error)
    if isinstance(error, InputError):
        return text
    if "hydra/launcher/submitit_slurm" in text:
        return "cluster=slurm needs a package that is not installed: pip install -e '.[cluster]'"
    if isinstance(error, MissingConfigException) and (error.missing_cfg_file or "").endswith("/"):
        group = error.missing_cfg_file.rstrip("/")
        return f"{group}= names nothing: {group} is one of {', '.join(available(group))}"
    if isinstance(error, MissingConfigException) and (missing := error.missing_cfg_file or "") and (CONF / missing).parent != CONF:
        group, _, choice = missing.rpartition("/")
        options = error.options or available(group)  # of a list Hydra names none
        return f"{group}={choice} is not a choice: {_near(choice, options)}\n{group} is one of {', '.join(options)}"
    if "Config group override must be a string or a list" in text:
        for argument in arguments:
            group, _, choice = argument.partition("=")
            if (CONF / group).is_dir() and not re.match(r"[A-Za-z]", choice.replace("null", "")):
                return (
                    f"{argument} is not a choice: say {group}=none"
                    if "none" in available(group)
                    else f"{argument}: {group} cannot be left out"
                )
    if found := re.search(r"Error parsing override '([^']*)'.*missing EQUAL", text, re.DOTALL):
        return f"{found[1]} is no override: say {found[1]}=VALUE"
    if found := re.search(r"Could not override '([^']+)'", text):
        return (_explain_choice_within if "@" in found[1] else _explain_key)(found[1], arguments, config_name)
    if found := re.search(r"Ambiguous value for argument '(([^=']+)=([^']*))'", text):
        return f"{found[1]}: for all of them at once say '{found[2]}=[{found[3]}]', for one run each say -m"
    if isinstance(error, OSError):
        return f"{error.filename or 'the output directory'} cannot be written: {error.strerror or text}. Say paths.output_dir=DIR"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:300]


def _explain_choice_within(key: str, arguments: list[str], config_name: str) -> str:
    """A choice within a choice, `loss@loss.losses.secnd`, that nothing has."""
    key, group = key.lstrip("+~"), key.lstrip("+~").partition("@")[0]
    others = [a for a in arguments if not a.startswith("-") and a.lstrip("+~").partition("=")[0] != key and "," not in a]
    within = []
    with contextlib.suppress(Exception):
        within = [choice for choice in _compose(others, config_name).hydra.runtime.choices if choice.startswith(f"{group}@")]
    if within:
        return f"{key} is not a choice of this configuration: {_near(key, within)}\nthere are {', '.join(within)}"
    having = [choice for choice in available(group) if any(f"/{group}@" in str(line) for line in _read(group, choice).get("defaults", []))]
    return f"{key}: {group} has no choice within it here: say {' or '.join(f'{group}={choice}' for choice in having)} too"


def _explain_key(key: str, arguments: list[str], config_name: str) -> str:
    """A key that nothing has: the nearest one in this configuration, or in another choice of the same group."""
    node, _, name = key.rpartition(".")
    others = [a for a in arguments if not a.startswith("-") and a.lstrip("+~").partition("=")[0] != key and "," not in a]
    keys = {path.name for path in CONF.iterdir() if path.is_dir()} if not node else set()
    with contextlib.suppress(Exception):
        keys |= set(_leaves(_compose(others, config_name)))
    keys = {k for k in keys if not k.endswith("._target_")}
    siblings = sorted(k for k in keys if k.rpartition(".")[0] == node)
    if not difflib.get_close_matches(key, siblings, n=1, cutoff=0.8) and (CONF / node).is_dir() and node:
        for choice in available(node):
            offered = _read(node, choice)
            if near := difflib.get_close_matches(name, list(offered.get(node, offered)), n=1, cutoff=0.7):
                there = f" Here there are {', '.join(siblings)}" if siblings else ""
                return f"{key} is not a key of this configuration: did you mean {node}.{near[0]}, which {node}={choice} has?{there}"
    near = _near(key, siblings or sorted(keys))
    return f"{key} is not a key of this configuration: {near}" + (f"\nthere are {', '.join(siblings)}" if siblings else "")


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "see --help for what there is"


def resolve(config: dict, group: str) -> dict | None:
    """A group's node as `{"_target_": ..., **arguments}`; None for `none`."""
    node = _arguments(config[group], group, config["distance"]["name"])
    return node if "_target_" in node else None


def _arguments(node: dict, group: str, distance: str) -> dict:
    kept = {key: value for key, value in node.items() if key not in NO_ARGUMENTS.get(group, ())}
    kept = {key: _arguments(value, group, distance) if isinstance(value, dict) else value for key, value in kept.items()}
    if distance not in node.get("goes_with", {}).get("distance", [distance]):
        kept["distance"] = None  # it keeps its own; the check has seen that the run's ranks alike
    return kept


def rates(config: dict) -> dict[str, float]:
    """Learning rates other than the optimizer's, the `lr` of an encoder and of a loss or one within it, for `SiameseModule`."""
    found = {}

    def walk(path: str, node: dict) -> None:
        if node.get("lr") is not None:
            found[path] = node["lr"]
        for name, value in node.items():
            if isinstance(value, dict):
                walk(f"{path}.{name}", value)

    walk("model.encoder", config["encoder"])
    walk("loss", config["loss"])
    return found


def first_difference(one, other, key: str) -> tuple[str, object, object] | None:
    """The first dotted key under which two plain configurations differ, with both values; None when they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        parts = [first_difference(one.get(name), other.get(name), f"{key}.{name}") for name in {**one, **other}]
        return next((part for part in parts if part is not None), None)
    return None if one == other else (key, one, other)


def fitting(node: dict, name: str, offered: dict) -> dict:
    """Those of `offered`, which come by themselves (shapes, counts, objects), that the node's target takes and the node leaves open.

    Raises:
        InputError: a key that the target does not take, with the nearest that it does.
    """
    with as_input_error(name):
        takes = accepted(hydra.utils.get_object(node["_target_"]))
    if takes is None:
        return {key: value for key, value in offered.items() if key not in node}
    for key in node.keys() - {"_target_"} - takes:
        raise InputError(f"{name}.{key}: {node['_target_']} takes no such argument: {_near(key, sorted(takes))}")
    return {key: value for key, value in offered.items() if key in takes and key not in node}


def bundle_arguments(config: dict, input_shape: tuple[int, ...], preprocessing: dict, reader: dict | None = None) -> dict:
    """What an untrained `Bundle` is made of, for data of this shape; the user's own configuration, so its packages are trusted."""
    encoder, distance = resolve(config, "encoder"), resolve(config, "distance")
    parts = {
        "encoder": {**encoder, **fitting(encoder, "encoder", {"input_shape": list(input_shape)})},
        "distance": distance,
        "preprocessing": preprocessing,
        "reader": reader,
    }
    return {"parts": parts, "trust": tuple(part["_target_"].partition(".")[0] for part in (encoder, distance))}


def construct(node: dict, name: str, /, **offered):
    """Call a node's target with its arguments and those of `offered` that fit, by reference: nothing is copied.

    Nodes among the arguments (the losses of a sum, the stages of a schedule) are constructed first, in the same way.

    Raises:
        InputError: the target refuses its arguments.
    """
    fits = fitting(node, name, offered)
    offered.pop("miner", None)  # a memory within a sum is given the sum's tuples
    within = {key: _construct_within(value, f"{name}.{key}", offered) for key, value in node.items() if isinstance(value, dict)}
    plain = {key: value for key, value in node.items() if key not in within}
    with as_input_error(name):
        return hydra.utils.instantiate({**plain, "_partial_": True}, _convert_="all")(**fits, **within)


def _construct_within(node: dict, name: str, offered: dict):
    if "_target_" in node:
        return construct(node, name, **offered)
    if not node:  # the choice `none`
        return None
    return {key: _construct_within(value, f"{name}.{key}", offered) if isinstance(value, dict) else value for key, value in node.items()}


def build(config: dict, group: str, /, **offered):
    """Construct what a group names; None for `none`."""
    node = resolve(config, group)
    return None if node is None else construct(node, group, **offered)


def partial(config: dict, group: str) -> Callable | None:
    """Like `build`, but waits for the arguments that come later (parameters, optimizer, samples)."""
    node = resolve(config, group)
    if node is None:
        return None
    fitting(node, group, {})
    with as_input_error(group):
        return hydra.utils.instantiate({**node, "_partial_": True}, _convert_="all")


@contextlib.contextmanager
def as_input_error(name: str):
    """While things are built from the configuration, what they refuse is the user's to mend."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        if not isinstance(error, (ValueError, OSError)):  # perhaps a bug in a user's own class
            text = f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)"
        raise InputError(f"{name}: {text}") from error


def accepted(target: Callable) -> set[str] | None:
    """Names of the arguments a function or class takes, through the `**kwargs` of its parents; None when it takes any."""
    if not isinstance(target, type):
        parameters = inspect.signature(target).parameters
        return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)
    names: set[str] = set()
    for parent in target.__mro__:
        if "__init__" not in vars(parent) or parent is object:
            continue
        parameters = inspect.signature(parent.__init__).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
