"""Koch's network of 2015 on Omniglot's twenty official one-shot runs, beside the paper's figure and a public re-implementation's.

    python scripts/benchmark_koch.py --full --json docs/koch.json    # trains for hours on a CPU, in logs/benchmark_koch/
    python scripts/benchmark_koch.py --run logs/train/runs/<stamp> --json docs/koch.json   # a run of experiment=koch that is finished
    python scripts/benchmark_koch.py --check                         # minutes: does it learn at all, on five alphabets, on validation

`docs/koch.json` is what README.md shows (scripts/readme.py).
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from benchmark_default import ROOT, missed, row, run
from omegaconf import OmegaConf

# Koch, Zemel and Salakhutdinov 2015: 150,000 pairs of 30 alphabets, affine distortions; and one of the re-implementations on GitHub.
PAPER, REIMPLEMENTED = 92.0, 75.5


def official(folder: Path) -> list[dict]:
    figures = json.loads((folder / "metrics.json").read_text())
    batch = OmegaConf.load(folder / ".hydra" / "config.yaml").sampling.batch_size
    with (folder / "metrics.csv").open() as lines:
        steps = 1 + max(int(line["step"]) for line in csv.DictReader(lines))
    return [
        row("koch pairs seen", steps * batch),
        row("koch official one-shot accuracy", 100 - figures["test/omniglot_error"], unit="%"),
        row("koch untrained official one-shot accuracy", 100 - figures["untrained/omniglot_error"], unit="%"),
        row("koch paper official one-shot accuracy", PAPER, unit="%"),
        row("koch re-implementation official one-shot accuracy", REIMPLEMENTED, unit="%"),
        row("koch test oneshot_20way", figures["test/oneshot_20way"]),
    ]


def quick() -> list[dict]:
    """At 73 x 73, which a CPU trains four times as fast. Minutes teach it to tell pairs apart, not yet to name one of twenty."""
    small = ["dataset.background=small1", "dataset.size=73", "trainer.max_epochs=12", "trainer.check_val_every_n_epoch=12"]
    figures, seconds, _ = run("experiment=koch", "test=false", *small)
    return [
        row("koch small1 val auc", figures["val/auc"], round(figures["untrained/auc"] + 0.02, 4)),
        row("koch small1 command to prompt", seconds, 480.0, "s"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--full", action="store_true", help="train on all of the background set: hours on a CPU")
    parser.add_argument("--run", type=Path, metavar="DIR", help="read this finished run of experiment=koch instead of training one")
    arguments = parser.parse_args()
    if arguments.full:
        arguments.run = ROOT / "logs" / "benchmark_koch"
        subprocess.run([sys.executable, "train.py", "experiment=koch", f"paths.output_dir={arguments.run}"], cwd=ROOT, check=True)
    if arguments.run and not (arguments.run / "metrics.json").is_file():
        sys.exit(f"error: {arguments.run} holds no metrics.json: give the directory of a finished run")
    rows = official(arguments.run) if arguments.run else quick()
    if arguments.json:
        from siamese.record import write_json

        write_json(Path(arguments.json), rows)
    for line in (failures := missed(rows)):
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and failures else 0)
