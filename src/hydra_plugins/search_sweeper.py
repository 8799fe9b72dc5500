"""Hydra's sweeper `search`: Optuna proposes the jobs of a sweep, any launcher runs them, `study.db` in the sweep's directory remembers.

A trial is stored when it has ended, and what is proposed next follows from the seed and what is stored. So a search that was
interrupted, started again, makes the very trials it would have made, and one that was cut off is run again under its number.
"""

import contextlib
import csv
import functools
import importlib.util
import itertools
import logging
import math
import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:  # every command of every Hydra application here imports this file
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

ConfigStore.instance().store(group="hydra/sweeper", name="search", node={"_target_": f"{__name__}.SearchSweeper"}, provider=__name__)

# How and where the jobs run, and what they report to: a search may go on with other ones.
_NOT_OF_THE_SEARCH = ("search", "cluster", "logger", "paths")
_TPE_DRAWS, _DRAWS = 30, 2000  # of points that were tried already, or go with nothing: then at random, then there seem to be no others
_CHECKED = 60  # combinations of choices that are looked at before the search begins

log = logging.getLogger(__name__)


class SearchSweeper(Sweeper):
    """`search.n_trials` jobs in all over the space of `search.params` and the command line, then the best with other seeds."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir).absolute()
        quoted = str(self.folder).replace("'", r"\'")
        with open_dict(config):  # jobs are composed without `search=`, which says where the sweep is
            of_hydra = [line for line in config.hydra.overrides.hydra if not line.startswith("hydra.sweep.dir=")]
            config.hydra.overrides.hydra = [*of_hydra, f"hydra.sweep.dir='{quoted}'"]
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(config=config, hydra_context=hydra_context, task_function=task_function)

    def sweep(self, arguments: list[str]) -> None:
        """Run what is missing.

        Raises:
            InputError: the search cannot be what was asked for, before anything is run; or none of its trials has finished.
        """
        from siamese.config import InputError, first_difference

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        settings, self.metric = self.config.search, self.config.optimized_metric
        for key, least in (("n_trials", 1), ("n_jobs", 1), ("seeds", 0)):
            if not isinstance(settings[key], int) or isinstance(settings[key], bool) or settings[key] < least:
                raise InputError(f"search.{key}={settings[key]} must be a whole number, {least} or more")
        if importlib.util.find_spec("optuna") is None:
            raise InputError("search=optuna needs the package optuna: pip install -e '.[sweep]'")
        import optuna

        from siamese.evaluation import FIGURES, PAIR_FIGURES, higher_is_better

        figures = [f"val/{name}" for name in dict.fromkeys((*FIGURES, *PAIR_FIGURES))]
        if self.metric not in figures:
            raise InputError(f"optimized_metric={self.metric} is not computed: take one of {', '.join(figures)}")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.read_space(arguments)
        self.check_space()

        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            self.direction = "maximize" if higher_is_better(self.metric) else "minimize"
            self.study = self.load()
            kept = {key: value for key, value in self.fixed.items() if key.lstrip("+~").partition(".")[0] not in _NOT_OF_THE_SEARCH}
            asked = {"optimized_metric": self.metric, "space": {k: str(d) for k, d in self.space.items()}, "value": kept}
            if difference := first_difference(self.study.user_attrs.get("search", asked), asked, ""):
                key, old, new = difference
                what = f"another {key[1:].replace('.', ' of ', 1)}, {old} instead of {new}"
                remedy = "repeat its command, or say hydra.sweep.dir=DIR for a new search"
                raise InputError(f"{os.path.relpath(self.folder)} holds a search with {what}: {remedy}")
            self.study.set_user_attr("search", asked)
            OmegaConf.save(self.config, self.folder / "multirun.yaml")
            self.search(settings.n_trials, settings.n_jobs)
            self.report(settings.seeds)

    # --- the space

    def read_space(self, arguments: list[str]) -> None:
        """`fixed`, key -> the override as it was given, and `space`, key -> distribution, groups first."""
        from siamese.config import CONF, InputError

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = {override.get_key_element(): override for override in parser.parse_overrides(arguments)}
        said = dict(parsed)
        for key, value in self.config.search.params.items():
            if value is None or key in said:
                continue
            if key.partition(".")[0] in said:  # the margins of one loss are not another's
                log.info("%s of search.params is left alone: it was for the %s there", key, key.partition(".")[0])
                continue
            try:
                (override,) = parser.parse_overrides([f"{key}={value}"])
            except HydraException as error:
                raise InputError(f"search.params: {key}={value} is no override of Hydra's grammar, as {key}=choice(a, b)") from error
            parsed[key] = override
        self.fixed = {
            key: override.input_line
            for key, override in parsed.items()
            if not override.is_sweep_override() and override.key_or_group.partition(".")[0] != "search"
        }
        if "test" not in self.fixed:
            self.fixed["test"] = f"test={str(self.config.test).lower()}"
        space = {key: distribution(override) for key, override in parsed.items() if override.is_sweep_override()}
        if not space:
            raise InputError("nothing is searched over: give a key several values, 'loss=choice(triplet,supcon)', or search.params some")
        if "seed" in space:
            raise InputError("seed is not searched over: search.seeds=N runs the best trial with N other seeds")
        self.groups = [key for key in space if (CONF / key.partition("@")[0]).is_dir()]
        self.space = {key: space[key] for key in (*self.groups, *(key for key in space if key not in self.groups))}

    def check_space(self) -> None:
        """Refuse what no trial could use: a misspelt choice or key, a value of the wrong type, choices that do not go together."""
        from siamese.config import InputError, available, compose, first_difference

        name = self.config.hydra.job.config_name
        for key in self.groups:
            for choice in self.space[key].choices:
                if choice not in available(key.partition("@")[0]):
                    compose([f"{key}={choice}"], name)
        offered = [[f"{key}={choice}" for choice in self.space[key].choices] for key in self.groups]
        verdicts = {choices: self.keys(choices) for choices in itertools.islice(itertools.product(*offered), _CHECKED)}
        accepted = [choices for choices, keys in verdicts.items() if not isinstance(keys, InputError)]
        refused = [verdict for verdict in verdicts.values() if isinstance(verdict, InputError)]
        if not accepted:
            raise refused[0]
        if refused:
            why = str(refused[0]).splitlines()[0]
            log.info("%d of %d combinations are not searched over, such as: %s", len(refused), len(verdicts), why)
        for key, over in self.space.items():
            if key in self.groups:
                continue
            having = [choices for choices in accepted if self.has(choices, key)] or accepted[:1]
            for value in over.choices if hasattr(over, "choices") else (over.low, over.high):
                errors = (_refusal([*self.fixed.values(), *choices, f"{key}={value}"], name) for choices in having)
                first = next(errors)
                if first is not None and all(error is not None for error in errors):
                    raise first
        # A job is its overrides, without search=: what else that sets would be lost.
        apart, difference = ("search", "paths", "test"), None
        own = OmegaConf.to_container(OmegaConf.masked_copy(self.config, [key for key in self.config if key != "hydra"]), resolve=True)
        with contextlib.suppress(InputError):  # where the defaults do not go with what is fixed
            without = compose(list(self.fixed.values()), name)
            along = [key for key in own if key not in apart]
            difference = first_difference({key: own[key] for key in along}, {key: without.get(key) for key in along}, "")
        if difference:
            raise InputError(f"{difference[0][1:]} is set by search=, which is for `search` and `test` alone: say it elsewhere")

    @functools.cache  # noqa: B019  # one sweeper a process
    def keys(self, choices: tuple[str, ...]):
        """The keys of the configuration with these choices, or the InputError that says why there is none."""
        from siamese.config import InputError, compose

        try:
            return set(_keys(compose([*self.fixed.values(), *choices], self.config.hydra.job.config_name)))
        except InputError as error:
            return error

    def has(self, choices: tuple[str, ...], key: str) -> bool:
        return key.startswith(("+", "~")) or key in self.keys(choices)

    # --- trials

    def load(self) -> "Study":
        """The study of this directory, a new one where there is none; trials that another program left running are closed."""
        import optuna

        from siamese.config import as_input_error

        with as_input_error(str(self.folder / "study.db")):
            study = optuna.create_study(
                storage=f"sqlite:///{self.folder / 'study.db'}", study_name="search", direction=self.direction, load_if_exists=True
            )
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study

    def search(self, n_trials: int, n_jobs: int) -> None:
        from optuna.trial import TrialState, create_trial

        before = len(self.ended())
        if before:
            log.info("%s holds %d trials of %d", os.path.relpath(self.folder), before, n_trials)
        while (number := len(self.ended())) < n_trials:
            drawn = list(itertools.islice(self.draw(number), min(n_jobs, n_trials - number)))
            if not drawn:
                log.info("the space has no other point: the search ends with %d of %d trials", number, n_trials)
                break
            outcomes, cut_off = self.launch([overrides for _, _, overrides in drawn], number)
            for (params, distributions, overrides), (value, error) in zip(drawn, outcomes, strict=True):
                state = TrialState.FAIL if value is None else TrialState.COMPLETE
                attributes = {"overrides": overrides, **({"error": error} if error else {})}
                trial = create_trial(state=state, value=value, params=params, distributions=distributions, user_attrs=attributes)
                self.study.add_trial(trial)
            self.write_table()
            if cut_off and not any(trial.value is not None for trial in self.ended()):
                raise cut_off  # nothing has ever worked: it is not the job

    def ended(self) -> list["FrozenTrial"]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def draw(self, number: int) -> "Iterator[tuple[dict, dict[str, BaseDistribution], list[str]]]":
        """Points that are accepted and were not tried, as parameters, distributions and overrides, until there seem to be no others.

        They are asked of a copy of the study in memory: the one that is stored holds what was run and nothing else.
        """
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
        trials = self.ended()
        tried = {frozenset(trial.params.items()) for trial in trials}
        scratch = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction=self.direction)
        scratch.add_trials(trials)
        size = math.prod(_size(over) for over in self.space.values())
        for draw in range(_TPE_DRAWS + int(min(20 * size, _DRAWS))):  # of so many, one in `size` is missed with a probability of e^-20
            if draw == _TPE_DRAWS:
                scratch.sampler = optuna.samplers.RandomSampler(seed=seed)
            trial = scratch.ask()
            if self.suggest(trial):
                params = {key: _readable(value, trial.distributions[key]) for key, value in trial.params.items()}
                point, overrides = frozenset(params.items()), [f"{key}={value}" for key, value in params.items()]
                fixed = list(self.fixed.values())
                if point not in tried and _refusal([*fixed, *overrides], self.config.hydra.job.config_name) is None:
                    tried.add(point)
                    yield params, trial.distributions, [*fixed, *overrides]
            scratch.tell(trial, state=optuna.trial.TrialState.PRUNED)  # worse than all that ended: go elsewhere

    def suggest(self, trial: "Trial") -> bool:
        """Fill in a trial: the groups, then the keys that these choices have; False where they do not go together."""
        choices = tuple(f"{key}={_suggest(trial, key, self.space[key])}" for key in self.groups)
        if isinstance(self.keys(choices), Exception):
            return False
        for key, over in self.space.items():
            if key not in self.groups and self.has(choices, key):
                _suggest(trial, key, over)
        return True

    def launch(self, jobs: list[list[str]], number: int) -> tuple[list[tuple[float | None, str]], Exception | None]:
        """The value of each job, None where it failed, and what it said; and the error of a launcher that gave up."""
        from siamese.config import InputError

        try:
            returns = self.launcher.launch(jobs, initial_job_idx=number)
        except InputError:  # it cannot do what it is asked for
            raise
        except Exception as error:
            log.error("the launcher failed: %s: %s", type(error).__name__, error)
            return [(None, f"{type(error).__name__}: {error}")] * len(jobs), error
        return [self.value(job, number + place) for place, job in enumerate(returns)], None

    def value(self, job: JobReturn, number: int) -> tuple[float | None, str]:
        from siamese.config import InputError

        try:
            value = float(job.return_value)
            if not math.isfinite(value):
                raise ValueError(f"{self.metric} is {value}")
        except Exception as error:
            log.error("job %d failed, the search goes on: %s: %s", number, type(error).__name__, error)
            log.debug("", exc_info=error)
            return None, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        return value, ""

    # --- what is left of it

    def write_table(self) -> None:
        """trials.csv: a row a trial, best first, those that failed last."""
        sign = -1 if self.direction == "maximize" else 1
        rows = sorted(self.ended(), key=lambda trial: (trial.value is None, sign * (trial.value or 0), trial.number))
        partial = self.folder / "trials.csv.part"
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", "state", self.metric, *self.space, "error"])
            for trial in rows:
                params = [trial.params.get(key) for key in self.space]
                writer.writerow([trial.number, trial.state.name.lower(), trial.value, *params, trial.user_attrs.get("error")])
        os.replace(partial, self.folder / "trials.csv")

    def report(self, seeds: int) -> None:
        """Say which trial is best, run it with other seeds, and leave that in best.json."""
        from siamese.config import InputError
        from siamese.record import write_json

        self.write_table()
        ended = self.ended()
        finished = [trial for trial in ended if trial.value is not None]
        if not finished:
            said = next((trial.user_attrs["error"] for trial in ended if "error" in trial.user_attrs), "")
            raise InputError(
                f"none of the {len(ended)} trials in {os.path.relpath(self.folder)} has finished: {said.partition(chr(10))[0]}"
            )
        best = self.study.best_trial
        command = shlex.join(
            ["python", "train.py", *(line for line in best.user_attrs["overrides"] if not line.startswith(("test=", "cluster")))]
        )
        found = {"trial": best.number, "metric": self.metric, "value": best.value, "params": best.params, "command": command}
        write_json(self.folder / "best.json", found)
        values = self.repeat(best, seeds) if seeds else {}

        log.info("%d trials, %d of them failed: %s", len(ended), len(ended) - len(finished), os.path.relpath(self.folder / "trials.csv"))
        log.info("best is trial %d, %s %.4f, judged on test too by\n    %s", best.number, self.metric, best.value, command)
        if values:
            moments = {"mean": statistics.mean(values.values()), "sd": statistics.stdev(values.values()) if len(values) > 1 else None}
            write_json(self.folder / "best.json", {**found, "seeds": values, **moments})
            spread = "" if moments["sd"] is None else f" ± {moments['sd']:.4f}"
            log.info("with the seeds %s, which did not choose it: %.4f%s", ", ".join(values), moments["mean"], spread)

    def repeat(self, best: "FrozenTrial", seeds: int) -> dict[str, float]:
        """The values of the best trial with other seeds than the search's, run where they are not known yet."""
        known = dict(self.study.user_attrs.get(f"seeds of {best.number}", {}))
        wanted = [str(self.config.seed + 1 + place) for place in range(seeds)]
        missing = [seed for seed in wanted if seed not in known]
        overrides = [line for line in best.user_attrs["overrides"] if not line.startswith("seed=")]
        size, number = self.config.search.n_jobs, len(self.ended())
        for first in range(0, len(missing), size):
            some = missing[first : first + size]
            jobs = [[*overrides, f"seed={seed}", f"hydra.sweep.subdir=best-{best.number}/seed-{seed}"] for seed in some]
            outcomes, _ = self.launch(jobs, number + first)
            known |= {seed: value for seed, (value, _) in zip(some, outcomes, strict=True) if value is not None}
            self.study.set_user_attr(f"seeds of {best.number}", known)
        return {seed: known[seed] for seed in wanted if seed in known}


def distribution(override: Override) -> "BaseDistribution":
    """Optuna's for a sweep of Hydra's grammar; choices are texts, as they stand in an override.

    Raises:
        InputError: an interval without an inside.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from siamese.config import InputError, swept

    sweep = override.value()
    try:
        if isinstance(sweep, RangeSweep) and not sweep.shuffle:
            values = sorted(sweep.range())
            whole = all(isinstance(value, int) for value in values)
            return (IntDistribution if whole else FloatDistribution)(values[0], values[-1], step=abs(sweep.step))
        if isinstance(sweep, IntervalSweep):
            whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
            return (IntDistribution if whole else FloatDistribution)(sweep.start, sweep.end, log="log" in sweep.tags)
        return CategoricalDistribution(list(dict.fromkeys(swept(override))))
    except (ValueError, IndexError) as error:
        raise InputError(f"{override.input_line} holds nothing to search over: {error}") from error


def _suggest(trial: "Trial", key: str, over: "BaseDistribution"):
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(over, CategoricalDistribution):
        return trial.suggest_categorical(key, over.choices)
    if isinstance(over, IntDistribution):
        return trial.suggest_int(key, over.low, over.high, step=over.step, log=over.log)
    return trial.suggest_float(key, over.low, over.high, step=over.step, log=over.log)


def _size(over: "BaseDistribution") -> float:
    if hasattr(over, "choices"):
        return len(over.choices)
    return (over.high - over.low) / over.step + 1 if over.step else math.inf


def _readable(value, over: "BaseDistribution"):
    """Four digits of a number are enough, and fit a command line."""
    return min(max(float(f"{value:.4g}"), over.low), over.high) if isinstance(value, float) else value


def _refusal(overrides: Sequence[str], config_name: str) -> Exception | None:
    from siamese.config import InputError, compose

    try:
        compose(list(overrides), config_name)
    except InputError as error:
        return error
    return None


def _keys(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One search a directory; the lock goes with its process."""
    import fcntl

    from siamese.config import InputError

    with (folder / "study.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"a search is running in {os.path.relpath(folder)}: say hydra.sweep.dir=DIR for another one") from None
        yield
