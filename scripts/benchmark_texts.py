"""Texts: intents never trained on, ten examples of each of 150, questions of none, and product matching, before and after fine-tuning.

    python scripts/benchmark_texts.py --json docs/texts.json         # with the encoder of conf/encoder/transformer.yaml, a download
    python scripts/benchmark_texts.py --model FOLDER --check         # with one that is at hand; --full trains for longer

CLINC150 (Larson et al. 2019) and Abt-Buy (Mudgal et al. 2018) lie in SIAMESE_DATA_DIR. Published: of ten examples each of all 150 intents
a RoBERTa classifier 91.6 % and the best 94.8 % (Zhang et al. 2021, arXiv:2109.06349); F1 on Abt-Buy 62.8 (DeepMatcher, Mudgal et al. 2018)
and 89.3 (Ditto, Li et al. 2020, arXiv:2004.00584).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmark_default import ROOT, missed, row

SHOTS, DRAWS = 10, 5
SEEN = {"recall_at_1": "clinc150 unseen recall_at_1", "map_at_r": "clinc150 unseen map_at_r"}


def trained(*overrides: str):
    """(bundle, figures) of one `python train.py`, whose log is shown."""
    from siamese.bundle import Bundle

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "logger=none", f"paths.output_dir={folder}/run", *overrides]
        if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
            sys.exit(f"error: {' '.join(command)} failed, see above")
        figures = json.loads(Path(folder, "run", "metrics.json").read_text())
        return Bundle.load(Path(folder, "run", "bundle.safetensors")), figures


def ten_shot(model, source) -> dict[str, float]:
    """Accuracy on the authors' test questions by the nearest of ten examples of each intent, and the AUC of telling questions of none
    by their best score; means over draws of the examples."""
    from siamese.evaluation import evaluate_pairs
    from siamese.protocols import identify

    support, query, strangers = (source.official(name) for name in ("train", "test", "oos_test"))
    examples, asked, others = (model.embed(samples.inputs) for samples in (support, query, strangers))
    probes, labels = torch.cat([asked, others]), torch.cat([query.labels, torch.full((len(strangers),), -1)])
    found: dict[str, list[float]] = {"10-shot accuracy": [], "out-of-scope auc": []}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        rows = torch.cat(
            [
                (members := (support.labels == label).nonzero().flatten())[torch.randperm(len(members), generator=generator)[:SHOTS]]
                for label in range(len(support.class_names))
            ]
        )
        right, _ = identify(probes, labels, examples[rows], support.labels[rows], model.distance)
        best = torch.cat([model.scores(some, examples[rows]).amax(1) for some in probes.split(512)])
        found["10-shot accuracy"].append(right["rank_1_identification"])
        found["out-of-scope auc"].append(evaluate_pairs(best, labels >= 0)[0]["auc"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def measure(model: str | None, full: bool) -> list[dict]:
    from siamese.config import build, compose

    mine = [f"encoder.model={model}"] if model else []
    clinc = ["dataset=clinc150", "encoder=transformer", "augmentation=none", "encoder.max_length=48", *mine]
    source = build(compose(clinc), "dataset")
    rows, epochs = [], 3 if full else 1
    tuned, figures = trained(*clinc, f"trainer.max_epochs={epochs}", "trainer.check_val_every_n_epoch=1")
    frozen, _ = trained(*clinc, "trainer.max_epochs=1", "encoder.lr=0", "+trainer.limit_train_batches=1", "test=false")
    targets = {"frozen": (None, 0.85, None), "fine-tuned": (0.95, 0.9, 0.9)}
    for prefix, name, judged in (("raw", "raw", None), ("untrained", "frozen", frozen), ("test", "fine-tuned", tuned)):
        target = targets.get(name, (None,) * 3)
        rows.append(row(f"clinc150 {name}, 50 intents unseen, recall_at_1", figures[f"{prefix}/recall_at_1"], target[0]))
        rows.append(row(f"clinc150 {name}, 50 intents unseen, map_at_r", figures[f"{prefix}/map_at_r"]))
        if judged is not None:
            for (what, value), aim in zip(ten_shot(judged, source).items(), target[1:], strict=True):
                rows.append(row(f"clinc150 {name}, all 150 intents, {what}", value, aim))
    epochs = 10 if full else 1
    _, figures = trained("experiment=matching", *mine, f"trainer.max_epochs={epochs}", "trainer.check_val_every_n_epoch=1", "leakage=off")
    for prefix, name in (("raw", "raw"), ("untrained", "frozen"), ("test", "fine-tuned")):
        target = 0.628 if prefix == "test" else None
        rows.append(row(f"abt-buy {name}, threshold of validation, f1", figures[f"{prefix}/f1"], target))
        rows.append(row(f"abt-buy {name}, average_precision", figures[f"{prefix}/average_precision"]))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face encoder, by its folder or name")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="train for 3 and 10 epochs instead of one, an hour on a CPU")
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
