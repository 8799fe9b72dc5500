"""Weights & Biases, online when a key is configured and offline, in the run's directory, when not."""

import logging
import os
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from siamese.evaluation import EvaluationResult
from siamese.reporting import headline, neighbours, pairs, recall_at, score_shares, thinned

log = logging.getLogger(__name__)
CELLS = 2**17  # of the table of embeddings, 2,000 rows of 64: W&B looks at each, a second in all


def wandb_logger(
    directory: str, name: str, config: dict, project: str = "siamese", group: str | None = None, tags: list[str] | None = None
) -> WandbLogger:
    """A run that records the configuration. WANDB_MODE is respected; without it a missing key means offline.

    Args:
        directory: the run's; all that W&B writes stays in it, so that copying it loses nothing.
        name: of the run.
        config: plain values.
        project, group, tags: as in `wandb.init`; without a group the jobs of a sweep share its stamp.
    """
    os.environ["WANDB_DATA_DIR"] = str(Path(directory) / "wandb")  # tables would lie in the user's home otherwise
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_CACHE_DIR"] = str(Path(directory) / "wandb" / "cache")
    Path(directory, "wandb").mkdir(parents=True, exist_ok=True)
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "offline":
            log.info(
                "W&B: no key is configured, so this run is kept offline; `wandb sync %s/wandb/offline-run-*` uploads it",
                os.path.relpath(directory),
            )
    earlier = sorted(Path(directory, "wandb").glob("*run-*-*")) if config.get("ckpt") else []
    logger = WandbLogger(
        id=earlier[-1].name.rpartition("-")[2] if earlier else None,  # a run that is resumed where it was is the same run
        resume="allow" if earlier else None,
        name=name,
        save_dir=directory,
        project=project,
        group=group or config.get("sweep"),
        tags=tags,
        job_type="train",
        mode=mode,
        settings=wandb.Settings(console="off"),
    )
    run = logger.experiment
    run.config.update(config)
    for figure in ("recall_at_1", "map_at_r", "r_precision", "mrr", "auc", "average_precision"):
        run.define_metric(f"val/{figure}", step_metric="trainer/global_step", summary="max,last")
    run.define_metric("val/eer", step_metric="trainer/global_step", summary="min,last")
    return logger


def record_results(logger: WandbLogger, results: dict[str, EvaluationResult], figures: dict[str, float], checkpoint: str | Path) -> None:
    """What the report shows, as W&B's own objects, of the last split judged: curves that lie over one another in a sweep, histograms, a
    table of neighbours, embeddings for the projector; the final figures into the summary; and the checkpoint as an artifact.

    Args:
        checkpoint: the best one. A copy of it lies in the run's directory until it is uploaded.
    """
    import wandb

    run = logger.experiment
    run.summary.update(figures)
    prefix, result = [(prefix, result) for prefix, result in results.items() if prefix in ("val", "test")][-1]

    def line(name: str, x: str, y: str, points: np.ndarray, title: str) -> None:
        run.log({f"{prefix}/{name}": wandb.plot.line(wandb.Table(columns=[x, y], data=points.tolist()), x, y, title=f"{title}, {prefix}")})

    rows = thinned(result.far)
    line("roc", "far", "tar", np.stack([result.far[rows], result.tar[rows]], 1), "ROC")
    if len(result.open_set):
        line("open_set", "false_alarms", "identified", result.open_set, "open set")
    if len(result.oneshot):
        line("oneshot", "ways", "accuracy", result.oneshot, "one-shot accuracy")
    if len(result.class_queries):
        line("recall_at_k", "k", "recall", np.stack(recall_at(result), 1), "Recall@K")
    edges, same, different = score_shares(result)
    for name, shares in (("same", same), ("different", different)):
        run.log({f"{prefix}/scores_{name}": wandb.Histogram(np_histogram=(shares, edges))})
    shown = [(title, line) for title, lines in (neighbours(result) or pairs(result)) for line in lines]
    if shown:
        cells = lambda line: [_cell(cell) for cell in line] + [None] * (width - len(line))  # noqa: E731
        width = max(len(line) for _, line in shown)
        columns = ["why", "query", *(f"nearest {place}" for place in range(1, width))]
        run.log({f"{prefix}/neighbours": wandb.Table(columns=columns, data=[[title, *cells(line)] for title, line in shown])})
    kept = thinned(result.sampled, CELLS // result.embeddings.shape[1])  # evenly: rows may be sorted by class
    some = result.sampled[kept]
    named = [result.class_names[label] if label >= 0 else "" for label in result.labels[some]]
    ids = [result.ids[row] for row in some]
    vectors = result.embeddings[kept].astype(np.float64).round(4).tolist()
    columns = ["class", "id", *(f"d{place}" for place in range(result.embeddings.shape[1]))]
    data = [[name, one, *vector] for name, one, vector in zip(named, ids, vectors, strict=True)]
    run.log({f"{prefix}/embeddings": wandb.Table(columns=columns, data=data)})
    told = {f"{prefix}/{name}": result.figures[name] for name in headline(result.figures)}
    artifact = wandb.Artifact(f"checkpoint-{run.id}", "model", metadata=told)
    artifact.add_file(str(checkpoint), "best.ckpt")
    run.log_artifact(artifact, aliases=["best", f"seed-{run.config['seed']}"])


def _cell(cell: dict):
    """A sample in a table: its picture with what is said of it, or text."""
    import wandb

    mark = "" if cell["score"] is None else f"{'same' if cell['same'] else 'different'}, {cell['score']:.3f}: "
    said = f"{mark}{cell['name'] or cell['id']}"
    if cell["pixels"] is None:
        return f"{said}: {cell['text']}" if cell["text"] else said
    return wandb.Image(cell["pixels"], caption=said)
