"""Texts: intents never trained on, ten examples of each of 150, questions of none, and product matching, before and after fine-tuning.

    python scripts/benchmark_texts.py --check                        # with the encoder of conf/encoder/transformer.yaml, a download
    python scripts/benchmark_texts.py --model FOLDER --full --json docs/texts.json   # with one that is at hand; all, for half an hour

CLINC150 (Larson et al. 2019) and Abt-Buy (Mudgal et al. 2018) lie in SIAMESE_DATA_DIR. Published: of ten examples each of all 150 intents
94.18 % (Zhang et al. 2021, arXiv:2109.06349); F1 on Abt-Buy 62.8 (DeepMatcher, Mudgal et al. 2018) and 89.3 (Ditto, Li et al. 2020,
arXiv:2004.00584), both of which compare the two texts word by word and cannot look one up among many.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmark_default import ROOT, missed, row

from siamese.data.texts import as_texts

SHOTS, DRAWS = 10, 5


def trained(*overrides: str):
    """(bundle, figures) of one `python train.py`, whose log is shown."""
    from siamese.bundle import Bundle

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "logger=none", f"paths.output_dir={folder}/run", *overrides]
        if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
            sys.exit(f"error: {' '.join(command)} failed, see above")
        figures = json.loads(Path(folder, "run", "metrics.json").read_text())
        return Bundle.load(Path(folder, "run", "bundle.safetensors")), figures


def examples(source, draw: int) -> torch.Tensor:
    """Rows of the authors' training questions: SHOTS of each intent, drawn by a number."""
    labels, generator = source.official("train").labels, torch.Generator().manual_seed(draw)
    members = [(labels == label).nonzero().flatten() for label in range(int(labels.max()) + 1)]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:SHOTS]] for rows in members])


def ten_shot(model, source, draws: int = DRAWS) -> tuple[float, float]:
    """Accuracy on the authors' test questions by the nearest of SHOTS examples of each intent, and the AUC of telling these questions from
    those of no intent by their best score; means over draws of the examples."""
    from siamese.evaluation import evaluate_pairs
    from siamese.protocols import identify

    support, query, strangers = (source.official(name) for name in ("train", "test", "oos_test"))
    known, asked, others = (model.embed(samples.inputs) for samples in (support, query, strangers))
    probes, labels = torch.cat([asked, others]), torch.cat([query.labels, torch.full((len(strangers),), -1)])
    accuracy, auc = [], []
    for rows in (examples(source, draw) for draw in range(draws)):
        accuracy.append(identify(probes, labels, known[rows], support.labels[rows], model.distance)[0]["rank_1_identification"])
        best = torch.cat([model.scores(some, known[rows]).amax(1) for some in probes.split(512)])
        auc.append(evaluate_pairs(best, labels >= 0)[0]["auc"])
    return sum(accuracy) / draws, sum(auc) / draws


def ten_of_each(source, folder: Path) -> Path:
    """A table of the first draw of examples to train on, and the authors' own validation and test questions, all of 150 intents."""
    table = folder / "ten.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for split in ("train", "val", "test"):
            samples = source.official(split)
            samples = samples.subset(examples(source, 0)) if split == "train" else samples
            names = [samples.class_names[label] for label in samples.labels.tolist()]
            writer.writerows(zip(as_texts(samples.inputs), names, [split] * len(names), strict=True))
    return table


def measure(model: str | None, full: bool) -> list[dict]:
    from siamese.bundle import Bundle
    from siamese.config import build, bundle_arguments, compose

    mine = [f"encoder.model={model}"] if model else []
    text = ["encoder=transformer", "augmentation=none", "encoder.max_length=48", *mine]
    config = compose(["dataset=clinc150", *text])
    source = build(config, "dataset")
    frozen = Bundle(**bundle_arguments(config, (), {"_target_": "siamese.bundle.Unchanged"}))
    accuracy, auc = ten_shot(frozen, source)
    rows = [row("clinc150 frozen, 150 intents, 10-shot accuracy", accuracy, 0.8), row("clinc150 frozen, out-of-scope auc", auc, 0.85)]
    tuned, figures = trained("dataset=clinc150", *text, f"trainer.max_epochs={3 if full else 1}")
    for prefix, name, target in (("raw", "raw", None), ("untrained", "frozen", None), ("test", "tuned on 80 others", 0.98)):
        rows.append(row(f"clinc150 {name}, 50 intents, recall_at_1", figures[f"{prefix}/recall_at_1"], target))
        rows.append(row(f"clinc150 {name}, 50 intents, map_at_r", figures[f"{prefix}/map_at_r"]))
    accuracy, auc = ten_shot(tuned, source)
    rows.append(row("clinc150 tuned on 80 in full, 150 intents, accuracy", accuracy))
    rows.append(row("clinc150 tuned on 80 in full, out-of-scope auc", auc, 0.9))
    if not full:
        return rows
    with tempfile.TemporaryDirectory() as folder:
        own = ["dataset=texts", f"dataset.path={ten_of_each(source, Path(folder))}", "check=warn", "leakage=off"]
        tuned, _ = trained("experiment=intents", *own, *mine, "test=false", "baselines=false")
    accuracy, auc = ten_shot(tuned, source, draws=1)
    rows.append(row("clinc150 tuned on ten of each, 10-shot accuracy", accuracy, 0.948))
    rows.append(row("clinc150 tuned on ten of each, out-of-scope auc", auc, 0.9))
    _, figures = trained("experiment=matching", *mine, "leakage=off")
    for prefix, name, target in (("raw", "raw", None), ("untrained", "frozen", None), ("test", "tuned", 0.893)):
        rows.append(row(f"abt-buy {name}, threshold of validation, f1", figures[f"{prefix}/f1"], target))
        rows.append(row(f"abt-buy {name}, average_precision", figures[f"{prefix}/average_precision"]))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face encoder, by its folder or name")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument(
        "--full", action="store_true", help="three epochs instead of one, ten examples of each intent, and Abt-Buy: an hour on a CPU"
    )
    arguments = parser.parse_args()
    if arguments.model and os.path.exists(arguments.model):
        arguments.model = os.path.abspath(arguments.model)
    measured = measure(arguments.model, arguments.full)
    if arguments.json:
        from siamese.record import write_json

        write_json(Path(arguments.json), measured)
    for line in (failures := missed(measured)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
