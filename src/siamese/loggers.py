"""Weights & Biases, online when a key is configured and offline, in the run's directory, when not."""

import logging
import os
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from siamese.evaluation import EvaluationResult

log = logging.getLogger(__name__)


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


def record_results(logger: WandbLogger, results: dict[str, EvaluationResult], figures: dict[str, float]) -> None:
    """The final figures into the summary, and the ROC and the open-set curve of the last split judged as line plots."""
    import wandb

    run = logger.experiment
    run.summary.update(figures)
    prefix, result = [(prefix, result) for prefix, result in results.items() if prefix in ("val", "test")][-1]
    rows = np.linspace(0, len(result.far) - 1, min(len(result.far), 300)).astype(int)
    points = wandb.Table(columns=["far", "tar"], data=np.stack([result.far[rows], result.tar[rows]], 1).tolist())
    run.log({f"{prefix}/roc": wandb.plot.line(points, "far", "tar", title=f"ROC, {prefix}")})
    if len(result.open_set):
        points = wandb.Table(columns=["false_alarms", "identified"], data=result.open_set.tolist())
        run.log({f"{prefix}/open_set": wandb.plot.line(points, "false_alarms", "identified", title=f"open set, {prefix}")})
