"""What watches a run while it trains."""

import logging
import shutil
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar

log = logging.getLogger(__name__)


class Health(Callback):
    """Warns once when the embeddings collapse, which the loss alone reports as success.

    Args:
        spread: below this `train/spread` the space counts as collapsed.
        patience: so many steps are left to an encoder to unfold its first, narrow space.
    """

    def __init__(self, spread: float = 0.01, patience: int = 50):
        self.spread, self.patience, self.warned = spread, patience, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.accumulate_grad_batches > 1:
            log.warning(
                "trainer.accumulate_grad_batches=%d adds up gradients, it does not enlarge the pool of negatives: "
                "for harder tuples raise sampling.classes or sampling.batch_size",
                trainer.accumulate_grad_batches,
            )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        spread = trainer.callback_metrics.get("train/spread")
        if self.warned or spread is None or trainer.global_step < self.patience or spread >= self.spread:
            return
        self.warned = True
        log.warning(
            "step %d: the embeddings have collapsed (spread %.4f, loss %.4f): a small loss is no success here. "
            "Try a smaller optimizer.lr, miner=semihard, or a larger margin",
            trainer.global_step,
            spread,
            trainer.callback_metrics["train/loss"],
        )


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, but a run that is resumed in another directory takes the best checkpoint so far along."""

    def load_state_dict(self, state: dict) -> None:
        old = Path(state["best_model_path"])
        if old.is_file() and old.parent != Path(self.dirpath):
            new = Path(self.dirpath) / old.name
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(old, new)
            own = {"best_model_path": str(new), "kth_best_model_path": str(new), "best_k_models": {str(new): state["best_model_score"]}}
            state = {**state, **own, "dirpath": self.dirpath}
        super().load_state_dict(state)


class ValidateLastEpoch(Callback):
    """Validates after the last epoch too, whatever `check_val_every_n_epoch` says: a schedule's last weights are its best."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1:
            trainer.check_val_every_n_epoch = 1


class ProgressBar(RichProgressBar):
    """Lightning's, without the version number of the logger."""

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict:
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}
