"""What watches a run while it trains, and what steps in."""

import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn
from torch import Tensor, nn

from siamese.encoders import part_of
from siamese.frozen import frozen_tensors

log = logging.getLogger(__name__)


class Health(Callback):
    """Warns once when the embeddings collapse, and once when the miner finds nothing: the loss alone reports both as success.

    Args:
        spread: below this `train/spread` the space counts as collapsed.
        patience: so many steps are left to an encoder to unfold its first, narrow space.
    """

    def __init__(self, spread: float = 0.01, patience: int = 50):
        self.spread, self.patience, self.warned, self.warned_of_none = spread, patience, False, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.accumulate_grad_batches > 1:
            log.warning(
                "trainer.accumulate_grad_batches=%d adds up gradients, it does not enlarge the pool of negatives: "
                "for harder tuples raise sampling.classes or sampling.batch_size",
                trainer.accumulate_grad_batches,
            )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.global_step % trainer.log_every_n_steps:  # there are no newer figures, and to look at one is to wait for the GPU
            return
        if not self.warned_of_none and trainer.global_step >= self.patience and trainer.callback_metrics.get("train/mined_tuples") == 0:
            self.warned_of_none = True
            log.warning(
                "step %d: the miner found no tuples in a batch, which then teaches nothing. Early in a run its margins do not suit "
                "the embeddings: try miner=none or miner=all; later it means that such batches are solved: raise sampling.classes",
                trainer.global_step,
            )
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
            if rank_zero_only.rank == 0:
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(old, new)
            own = {"best_model_path": str(new), "kth_best_model_path": str(new), "best_k_models": {str(new): state["best_model_score"]}}
            state = {**state, **own, "dirpath": self.dirpath}
        super().load_state_dict(state)


class MidEpochCheckpoint(ModelCheckpoint):
    """Lightning's of every so many steps, but for an epoch's last, which the end of the epoch saves, and while gradients are added up."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)


class CarefulCheckpointIO(TorchCheckpointIO):
    """A checkpoint takes its name when it is whole and on the disk; then the `last.ckpt` before it is still there as `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.ckpt" and path.exists():
            os.replace(path, path.with_name("previous.ckpt"))
        os.replace(partial, path)


class Requeue(Checkpoint):
    """Saves a SLURM job that is about to be stopped after the batch at hand, and puts it back in the queue when its time is over.

    SIGUSR1 announces the time limit, where sbatch was given `--signal=USR1@SECONDS`. SIGTERM comes half a minute before the end of
    a job that is cancelled, preempted, or put back in the queue by others. Before and after training there is nothing to save.

    Lightning saves within the signal's handler, where each rank is somewhere else in its step: of two that train together, each
    may then wait for another word of the other, for ever.

    Args:
        path: the checkpoint to write, the one from which the run goes on.
    """

    def __init__(self, path: str):
        self.path, self.received, self.training = path, 0, False
        signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = 2 if number == signal.SIGUSR1 else max(self.received, 1)
        if not self.training:
            self._requeue()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.training = True
        signal.signal(signal.SIGTERM, self._note)  # in place of Lightning's, in which ranks speak to each other too

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_train_epoch_end(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1:  # another rank may have received it a step earlier
            mine = torch.tensor(self.received, device=module.device)
            self.received = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if self.received:
            trainer.save_checkpoint(self.path)
            log.warning("step %d: this job is being stopped, it can go on from %s", trainer.global_step, os.path.relpath(self.path))
            self._requeue()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.training = False
        if self.received:
            self._requeue()

    def _requeue(self) -> None:
        """End this process, and where the time limit is the reason, start the job again."""
        if self.received == 2 and int(os.environ["SLURM_PROCID"]) == 0:
            # Of an array, this one job: SLURM_JOB_ID is for one of them the number of the whole array.
            job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}" if "SLURM_ARRAY_JOB_ID" in os.environ else "{SLURM_JOB_ID}"
            subprocess.run(["scontrol", "requeue", job.format_map(os.environ)], check=True)
        raise SystemExit(0)


class ValidateLastEpoch(Callback):
    """Validates after the last epoch too, whatever `check_val_every_n_epoch` says: a schedule's last weights are its best."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # a run that is resumed in the middle of an epoch has no other start of it

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1:
            trainer.check_val_every_n_epoch = 1


class Freeze(Callback):
    """Keeps parts of the encoder as they are, up to an epoch or for good: for fine-tuning.

    Their weights take no gradient, so the optimizer, which has them from the start, skips them, weight decay and all. Everything
    follows from the number of the epoch, so a resumed run goes on as it would have. With DDP, which has to be told that some weights
    get no gradient, it needs the strategy `ddp_find_unused_parameters_true`, which train.py chooses then.

    Args:
        encoder: comes from the run.
        parts: its submodules to freeze, by their dotted names.
        until_epoch: trained from this epoch on, the first being 0; None never trains them.
        batch_norm: batch-norm layers in these parts keep their running statistics for good, not only while frozen: small
            batches of other data would spoil them.

    Raises:
        ValueError: no parts, one that the encoder has not or never trains, or all of it; an `until_epoch` that is not a whole
            number from 1.
    """

    def __init__(self, encoder: nn.Module, parts: list[str] | str, until_epoch: int | None = None, batch_norm: bool = True):
        if not parts:
            raise ValueError(f"parts={parts} freezes nothing: name submodules of the encoder, as in [backbone]")
        if until_epoch is not None and (not isinstance(until_epoch, int) or until_epoch < 1):
            raise ValueError(f"until_epoch={until_epoch} must be a whole number from 1, or null for good")
        frozen = [part_of(encoder, name) for name in ([parts] if isinstance(parts, str) else parts)]
        self.parameters = [parameter for part in frozen for parameter in part.parameters()]
        never = frozen_tensors(encoder)
        if never & {*self.parameters}:
            raise ValueError(f"parts={parts}: encoder.frozen=true never trains them: name others, or leave callbacks=freeze away")
        if {*self.parameters} >= {*encoder.parameters()} - never:
            raise ValueError(f"parts={parts} are all of the encoder, which leaves nothing to train: name fewer")
        self.norms = [layer for part in frozen for layer in part.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self.until_epoch, self.batch_norm = until_epoch, batch_norm

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # a run that is resumed in the middle of an epoch has no other start of it

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        frozen = self.until_epoch is None or trainer.current_epoch < self.until_epoch
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
        for layer in self.norms:  # after a validation Lightning gives each layer back the mode that it had
            layer.train(not (frozen or self.batch_norm))


class EMA(Callback):
    """Exponential moving average of the weights: it is validated, and it is what checkpoints, `Bundle.load` and the figures have.

    After each optimizer step average = d average + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)), so that a short run
    is not held back by its random start. Batch-norm statistics are averaged in the same way, counters copied. Training goes on with
    the weights themselves, which a checkpoint keeps as `training_state_dict`.

    Lightning's own EMAWeightAveraging puts the training weights back before `SiameseModule` computes its figures, so that a learned
    distance would be judged as it is and not as its average; and keeps its average on the CPU when the run is on a GPU.

    Raises:
        ValueError: `decay` is not within 0..1; or a run is resumed that had no average.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is the share that is kept at each step: at least 0 and less than 1")
        self.decay, self.step, self.average = decay, 0, None

    def _live(self, module: L.LightningModule) -> list[Tensor]:
        """Each weight once, of the loss too, and the encoder's statistics; a loss's own buffers are memories, not to be averaged.

        What is frozen is its own average.
        """
        frozen = frozen_tensors(module)
        return [tensor.detach() for tensor in (*module.parameters(), *module.model.buffers()) if tensor not in frozen]

    def _swap(self, module: L.LightningModule) -> None:
        for live, average in zip(self._live(module), self.average or [], strict=self.average is not None):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        live = self._live(module)
        self.average = [average.to(tensor.device) for average, tensor in zip(self.average or map(torch.clone, live), live, strict=True)]
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for average, live in zip(self.average, self._live(module), strict=True):
            if average.is_floating_point():
                average.lerp_(live, 1 - decay)
            else:
                average.copy_(live)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._swap(module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._swap(module)  # before a ModelCheckpoint saves: Lightning puts these last

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for live, average in zip(self._live(module), self.average, strict=True):
            live.copy_(average)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        checkpoint["training_state_dict"] = _copy(checkpoint["state_dict"])
        self._swap(module)
        checkpoint["state_dict"] = _copy(module.state_dict())
        self._swap(module)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        if "training_state_dict" not in checkpoint:
            raise ValueError("this run had no average of its weights: resume it without callbacks=ema")
        self.average = [tensor.clone() for tensor in self._live(module)]  # what Lightning has just loaded
        module.load_state_dict(checkpoint["training_state_dict"])


def _copy(state: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


class ProgressBar(RichProgressBar):
    """Lightning's, with the loss, the share of tuples that the miner kept, and the last validation, on a line of 80 columns.

    Within an epoch they are read once a second: to read a loss is to wait for the GPU, which meanwhile is given no work.
    """

    def __init__(self):
        super().__init__()
        self._shown, self._due = {}, 0.0

    def configure_columns(self, trainer: L.Trainer) -> list:
        columns = [column for column in super().configure_columns(trainer) if not isinstance(column, ProcessingSpeedColumn)]
        for bar in (column for column in columns if isinstance(column, BarColumn)):
            bar.bar_width = 40 if Console().width >= 120 else 5  # else the figures would be broken into lines
        return columns

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict:
        if time.monotonic() < self._due and trainer.training and not trainer.is_last_batch:
            return self._shown
        known = {**trainer.callback_metrics, **super().get_metrics(trainer, module)}
        names = {"train/loss": "loss", "train/mined_fraction": "mined", "val/recall_at_1": "R@1", "val/average_precision": "AP"}
        shown = {name: float(known[key]) for key, name in names.items() if key in known}
        if module.miner is None:
            shown.pop("mined", None)
        if "R@1" in shown:  # of classes; the average precision alone is of listed pairs
            shown.pop("AP", None)
        self._shown, self._due = shown, time.monotonic() + 1
        return shown
