"""The final recipes on Omniglot's published measures: the authors' twenty one-shot runs, and 423 characters after 1,200.

    python scripts/benchmark_omniglot.py --check                                  # omniglot_quick, one seed
    python scripts/benchmark_omniglot.py --full --json docs/omniglot.json         # hours: all recipes, what is not yet run of them
    python scripts/benchmark_omniglot.py --full --only small1 small2 --json docs/omniglot.json

Each seed is a `python train.py` on one thread, kept in --runs and not run again: another recipe needs other --runs. It is judged
once: a single view of each drawing by the plain distance, then 16 views averaged, then all seeds together, their embeddings side by side.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import study_losses
from benchmark_default import ROOT, row

# Background -> overrides of the run, published figures beside which it stands.
LONG = "trainer.max_epochs={0} trainer.check_val_every_n_epoch={0}".format
REDUCED = f"experiment=omniglot_record dataset.validation=others {LONG(180)}"
RECIPES = {
    "small1": f"{REDUCED} dataset.background=small1",
    "small2": f"{REDUCED} dataset.background=small2",
    "full": "experiment=omniglot_record",
    "characters": f"experiment=omniglot_record dataset.background=characters dataset.size=32 {LONG(20)}",
    "quick": "experiment=omniglot_quick",
}
SEEDS = {"quick": (0, 1, 2), "characters": (0, 1, 2)}
TARGETS = {"small": 5.5, "full": 2.5, "quick": 6.5}  # percent of errors, a single view
BETWEEN = {"oneshot_5way": 99.3, "fewshot_5way_5shot": 99.8, "oneshot_20way": 97.6, "fewshot_20way_5shot": 99.2}
VIEWS = 16
ALONE = ("logger=none", "report=none", "baselines=false", "check=off", "leakage=off")  # what is not measured here


def embedded(folder: Path, views: int) -> list[tuple]:
    """The authors' runs as a finished run's encoder embeds them, of unit length."""
    import torch

    from siamese.bundle import Bundle, construct_trusted
    from siamese.data.samples import Source

    model = Bundle.load(folder / "bundle.safetensors")
    model.look(views, model.config["augmentation"])
    runs = construct_trusted(model.config["dataset"], Source).oneshot_runs()
    unit = lambda samples: torch.nn.functional.normalize(model.embed(samples.inputs))  # noqa: E731
    return [(unit(queries), unit(supports), queries.labels) for queries, supports in runs]


def together(runs: list[list[tuple]]) -> float:
    """The error in percent of several encoders' embeddings side by side, by the cosine."""
    import torch
    from pytorch_metric_learning.distances import CosineSimilarity

    from siamese.protocols import oneshot_error

    joined = []
    for same in zip(*runs, strict=True):  # one of the twenty, by every encoder
        queries, supports, answers = zip(*same, strict=True)
        joined.append((torch.cat(queries, 1), torch.cat(supports, 1), answers[0]))
    return oneshot_error(joined, CosineSimilarity())


def official(name: str, folders: list[Path]) -> tuple[list[dict], list[float]]:
    """Rows of one recipe, and the single-view error of each seed."""
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    rows = [row(f"{name}: minutes of training, one thread", statistics.median(found["seconds/fit"] for found in metrics) / 60, unit="min")]
    if name == "characters":
        for figure, target in BETWEEN.items():
            values = [100 * found[f"test/{figure}"] for found in metrics]
            rows.append(row(f"{name}: {figure}", statistics.mean(values), target, "%"))
        return rows, []
    errors = [found["test/omniglot_error"] for found in metrics]
    rows += [row(f"{name}: error of seed {folder.name}", error, unit="%") for folder, error in zip(folders, errors, strict=True)]
    rows.append(row(f"{name}: error", statistics.mean(errors), TARGETS.get(name), "%"))
    rows.append(row(f"{name}: deviation over seeds", statistics.stdev(errors) if len(errors) > 1 else 0.0, unit="%"))
    single, several = ([embedded(folder, views) for folder in folders] for views in (0, VIEWS))
    rows.append(row(f"{name}: error, {VIEWS} views", statistics.mean(together([runs]) for runs in several), unit="%"))
    rows.append(row(f"{name}: error, {len(folders)} seeds together", together(single), unit="%"))
    rows.append(row(f"{name}: error, {len(folders)} seeds together, {VIEWS} views", together(several), unit="%"))
    return rows, errors


def missed(rows: list[dict]) -> list[str]:
    """Rows that miss their target: at most that of errors, at least that of the others."""
    wrong = lambda entry: (entry["value"] - entry["target"]) * (1 if "error" in entry["name"] else -1) > 0  # noqa: E731
    late = [entry for entry in rows if entry["target"] is not None and wrong(entry)]
    return [f"{entry['name']}: {entry['value']:g} misses {entry['target']:g} {entry['unit']}" for entry in late]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="all recipes and seeds: hours, in parts")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), help="run only these; all that was ever run is told of")
    parser.add_argument("--runs", type=Path, default=ROOT / "logs" / "records", metavar="DIR", help="where the runs are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    arguments = parser.parse_args()
    if not arguments.full:
        fresh = tempfile.TemporaryDirectory()
        arguments.runs = Path(fresh.name)
    wanted = {name: SEEDS.get(name, range(5)) for name in arguments.only or RECIPES} if arguments.full else {"quick": (0,)}
    failed, rows, reduced = [], [], []
    for name, seeds in wanted.items():
        failed += study_losses.study(
            arguments.runs.resolve(), {name: [*RECIPES[name].split(), *ALONE]}, list(seeds), max(arguments.jobs, 1)
        )
    for line in failed:
        print(line, file=sys.stderr)
    for name in RECIPES if arguments.full else wanted:
        finished = sorted(file.parent for file in arguments.runs.glob(f"{name}/*/peak.json"))
        if finished:
            told, errors = official(name, finished)
            rows += told
            reduced += errors if name.startswith("small") else []
    if reduced:
        rows.append(row("small1 and small2: error", statistics.mean(reduced), TARGETS["small"], "%"))
    if arguments.json:
        from siamese.record import write_json

        write_json(Path(arguments.json), rows)
    for line in (failures := missed(rows)):
        print(line, file=sys.stderr)
    sys.exit(1 if failed or (arguments.check and failures) else 0)


if __name__ == "__main__":
    main()
