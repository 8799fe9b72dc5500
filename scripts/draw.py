"""Draw what a run found on test: nearest neighbours of random queries, and the ROC beside that of the raw input.

python scripts/draw.py logs/train/runs/<stamp> --to docs/result.png
"""

import argparse
import os
import sys
from pathlib import Path

SHOWN = 9
SAME, DIFFERENT = "#0072B2", "#D55E00"  # blue and vermilion: told apart by colour-blind eyes too (Okabe and Ito 2008)


def draw(run: Path, to: Path, seed: int = 0) -> None:
    import json

    import matplotlib
    import numpy as np
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from siamese.evaluation import EvaluationResult

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = EvaluationResult.load(run / "results.npz")
    result, figures = results["test"], json.loads((run / "metrics.json").read_text())
    samples = instantiate(OmegaConf.load(run / ".hydra" / "config.yaml").dataset).split("test")
    rows, gallery = samples.roles()
    if samples.kind != "images" or samples.tuples is not None:
        sys.exit(f"error: {run} was judged on {samples}: neighbours are drawn of images with classes")
    queries = np.random.default_rng(seed).choice(len(rows), SHOWN, replace=False)

    figure = plt.figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    axes = left.subplots(SHOWN, 7, gridspec_kw={"width_ratios": [1, 0.25, 1, 1, 1, 1, 1]})
    left.suptitle("letters never seen and their nearest neighbours\n(blue: the same letter, dashed: another)", fontsize=10)
    for row, query in enumerate(queries):
        for column, axis in enumerate(axes[row]):
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 1:
                axis.axis("off")
                continue
            item = rows[query] if column == 0 else gallery[result.neighbours[query, column - 2]]
            axis.imshow(255 - samples.inputs[item, 0].numpy(), cmap="gray", vmin=0, vmax=255)
            same = samples.labels[item] == samples.labels[rows[query]]
            for spine in axis.spines.values():
                spine.set_color("#888888" if column == 0 else SAME if same else DIFFERENT)
                spine.set_linewidth(1 if column == 0 else 2)
                spine.set_linestyle("-" if same else "--")

    axis = right.subplots()
    for prefix, label, style in (("raw", "raw input", ":"), ("untrained", "untrained encoder", "--"), ("test", "trained", "-")):
        curve = results[prefix]
        axis.plot(
            curve.far.clip(1e-6),
            curve.tar,
            style,
            label=f"{label}, AUC {figures[f'{prefix}/auc']:.3f}",
            color="#333333" if style != "-" else SAME,
        )
    axis.set(xscale="log", xlim=(1e-5, 1), ylim=(0, 1), xlabel="false-accept rate", ylabel="true-accept rate")
    pairs = len(samples) * (len(samples) - 1) // 2 if samples.gallery is None else len(rows) * len(gallery)
    axis.set_title(f"same letter or not, all {pairs:,} pairs of test", fontsize=10)
    axis.grid(alpha=0.25)
    right.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{to.name}.part")
    figure.savefig(partial, format="png")
    os.replace(partial, to)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a directory that train.py wrote, with test=true")
    parser.add_argument("--to", type=Path, default=Path("docs/result.png"))
    arguments = parser.parse_args()
    if not (arguments.run / "results.npz").is_file():
        sys.exit(f"error: {arguments.run} holds no results.npz: give the directory of a finished run")
    draw(arguments.run, arguments.to)
