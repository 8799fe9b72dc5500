"""Compose a configuration, check it before anything heavy is imported, and build what it names.

The only file besides the entry points that knows Hydra: everything below is given plain values.
"""

import contextlib
import difflib
import functools
import inspect
import itertools
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import CompactHydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
os.environ.setdefault("SIAMESE_DATA_DIR", str(ROOT / "data"))
# Before torch is imported: threads that wait spin briefly, then sleep. With another process on one of two cores, libgomp's
# own way made a training step take ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Keys of a group's YAML that tell us something and are no arguments of its `_target_`.
NO_ARGUMENTS = {
    "encoder": ("lr",),
    "loss": ("goes_with", "lr"),
    "miner": ("goes_with",),
    "distance": ("name",),
    "optimizer": ("lr_factors",),
}
# May be a word, or a list, where the default is a number: devices=auto, dataset.test=[cats,dogs].
_ANY_TYPE = ("trainer.devices", "dataset.val", "dataset.test")
# A number by default, and null means something too: no head, the optimizer's rate, no crop.
_MAY_BE_NULL = re.compile(r"encoder\.embedding_size|(encoder|loss)\.(.*\.)?lr|augmentation\.crop")
_CHECKED_JOBS = 100

log = logging.getLogger(__name__)


class InputError(Exception):
    """What the user gave cannot be used: one or two lines that name the key or file, and the remedy."""


def launch(task: Callable[[dict], dict], config_name: str) -> None:
    """Run `task(config)` under Hydra; bad input ends in one or two lines and exit code 1, with HYDRA_FULL_ERROR=1 in a traceback."""
    full = os.environ.pop("HYDRA_FULL_ERROR", "0") == "1"

    def job(cfg: DictConfig) -> float | None:
        runtime = HydraConfig.get()
        sweep = runtime.mode is not None and runtime.mode.name == "MULTIRUN"
        try:
            config = check(cfg, dict(runtime.runtime.choices), list(runtime.overrides.task), config_name)
            config["paths"]["output_dir"] = runtime.runtime.output_dir
            config["sweep"] = Path(runtime.sweep.dir).name if sweep else None
            figures = task(config)
        except InputError as error:
            if sweep:
                log.error("job failed: %s", error)
            elif not full:
                sys.exit(f"error: {error}")  # not through Hydra, which would print all overrides above it
            raise
        return figures.get(config.get("optimized_metric"))

    sys.unraisablehook = interrupt_again
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing them
    try:
        preflight(sys.argv[1:], config_name)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except BrokenPipeError:  # the reader of --help | head has gone
        sys.stderr.close()
        sys.exit(1)
    except (InputError, CompactHydraException, OmegaConfBaseException, OSError, ValueError) as error:
        known = isinstance(error, InputError) or not _raised_by_job(error)
        if full or not known:
            raise
        sys.exit(f"error: {explain(error, sys.argv[1:], config_name)}")
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")


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


def preflight(arguments: list[str], config_name: str) -> None:
    """Check every job of a command line before the first one starts, so that bad input leaves no directory behind."""
    flags = [a for a in arguments if a.startswith("-")]
    if set(flags) - {"-m", "--multirun"}:
        return  # --help, --cfg, --config-dir ...: Hydra's business
    overrides = [a for a in arguments if not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    mine = [o for o in parsed if not o.key_or_group.startswith("hydra")]
    if search := next((o.input_line for o in mine if o.key_or_group == "search" and o.value() != "none"), None):
        if not flags:
            raise InputError(f"{search} makes many runs: say python train.py -m {search}")
        return  # its sweeper draws the jobs, and checks what it draws from
    if flags and any(o.key_or_group == "paths.output_dir" for o in mine):
        raise InputError("paths.output_dir is one run's directory: for a sweep say hydra.sweep.dir=DIR")
    if not flags:
        jobs = [[o.input_line for o in mine]]
    elif all(o.is_discrete_sweep() for o in mine if o.is_sweep_override()):
        choices = [[f"{o.get_key_element()}={v}" for v in swept(o)] if o.is_sweep_override() else [o.input_line] for o in mine]
        jobs = [list(job) for job in itertools.islice(itertools.product(*choices), _CHECKED_JOBS)]
    else:
        return  # intervals: the sweeper draws the jobs, each is checked when it starts
    for job in jobs:
        compose(job, config_name)


def swept(override: Override) -> Iterable[str]:
    values = override.value()
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
    if config["ckpt"] and config.get("init_from"):
        raise InputError("ckpt= resumes a run with everything, init_from= takes weights only: give one of them")
    path = config["dataset"].get("path")
    if path is not None and not Path(path).exists():
        if not (origin := _origin(choices["dataset"])):
            raise InputError(f"dataset.path: there is no {path}: say where your data lies")
        raise InputError(
            f"dataset.path: there is no {path}. Fetch it ({origin}), or say where it lies: SIAMESE_DATA_DIR=DIR or dataset.path=DIR"
        )
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
    sampling, distance, miner = choices["sampling"], cfg.distance, choices["miner"]
    nodes = list(named(cfg, choices, "loss"))
    rows = [(said, node.get("goes_with", {})) for said, node in nodes]
    losses = [loss for loss in available("loss") if _all_go_with([_read("loss", loss).get("goes_with")], sampling, distance)]
    ways_out = {group: [f"loss={loss}" for loss in losses[:3]] for group in ("sampling", "distance")}
    ways_out["sampling"][:0] = [f"sampling={s}" for s in available("sampling") if _all_go_with([row for _, row in rows], s, None)]
    ways_out["distance"][:0] = [f"distance={d}" for d in available("distance") if _all_go_with([row for _, row in rows], None, d)]
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
            raise InputError(f"{said} does not go with sampling={sampling}: it {why}. Use {' or '.join(ways_out['sampling'])}")
        if not _all_go_with([accepts], None, distance):
            raise InputError(f"{said} is not defined for distance={_said(distance)}: use {' or '.join(ways_out['distance'])}")
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


def _all_go_with(rows: list[dict | None], sampling: str | None, distance: DictConfig | str | None) -> bool:
    """Do all these rows of the table accept both? None asks nothing; of a row that is missing nothing is known."""
    names = {distance} if isinstance(distance, str) or distance is None else {distance.name}
    if distance == "cosine" or (isinstance(distance, DictConfig) and on_the_sphere(distance)):
        names.add("sphere")
    return all(
        row is not None
        and (sampling is None or sampling in row.get("sampling", [sampling]))
        and (distance is None or not names.isdisjoint(row.get("distance", names)))
        for row in rows
    )


def _said(distance: DictConfig) -> str:
    return "euclidean without normalisation" if distance.name == "euclidean" and not distance.normalize_embeddings else distance.name


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
        if lost := [above for above in given if key.startswith(f"{above}.")]:
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
def _read(group: str, name: str) -> DictConfig:
    return OmegaConf.load(CONF / group / f"{name}.yaml")


def explain(error: Exception, arguments: list[str], config_name: str) -> str:
    """One or two lines for what Hydra says in ten, with the nearest choice or key."""
    text = str(error)
    if isinstance(error, InputError):
        return text
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
            if near := difflib.get_close_matches(name, list(_read(node, choice)), n=1, cutoff=0.7):
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


def bundle_arguments(config: dict, input_shape: tuple[int, ...], preprocessing: dict) -> dict:
    """What an untrained `Bundle` is made of, for data of this shape; the user's own configuration, so its packages are trusted."""
    encoder, distance = resolve(config, "encoder"), resolve(config, "distance")
    parts = {
        "encoder": {**encoder, **fitting(encoder, "encoder", {"input_shape": list(input_shape)})},
        "distance": distance,
        "preprocessing": preprocessing,
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
