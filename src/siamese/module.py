"""The LightningModule: one pass of the shared encoder, a miner, a loss, and a look at the health of the space."""

import copy
import inspect
import logging
from collections.abc import Callable

import lightning.pytorch as L
import numpy as np
import torch
from pytorch_metric_learning.reducers import ThresholdReducer
from torch import Tensor, nn

from siamese._walk import Ranks
from siamese.bundle import Bundle
from siamese.data.samples import Batch
from siamese.encoders import part_of
from siamese.evaluation import evaluate_tuples
from siamese.frozen import frozen_tensors
from siamese.losses import CrossBatchMemory
from siamese.metrics import EmbeddingMetrics
from siamese.miners import ScheduledMiner

log = logging.getLogger(__name__)


class SiameseModule(L.LightningModule):
    """Trains a `Bundle` with pytorch-metric-learning's losses and miners.

    A batch that brings its tuples (pairs, triplets) uses them; otherwise the miner, if there is one, chooses tuples among
    all that the labels allow. All end in the same call, `loss(embeddings, labels, tuples)`.

    Several ranks share each batch: every one embeds its part, the embeddings are gathered with their gradient, and each rank mines
    and computes the loss of the whole, so that gradients, of the loss's own weights too, are those of one process with the batch.
    But for batch-norm, whose statistics are of a rank's part unless `trainer.sync_batchnorm`, and dropout, which draws by rank.

    Args:
        model: encoder, distance and preprocessing.
        loss: a pytorch-metric-learning loss; its own weights, if it has any, are trained and saved too.
        miner: a pytorch-metric-learning miner, or None.
        augmentation: `augmentation(inputs, generator)` on each training batch, or None; where several ranks share a batch,
            `augmentation(inputs, generator, places, batch)`; if it has something `classwise`, with `labels=` besides. All as
            `siamese.data.augmentation.Augment` has it.
        optimizer: makes the optimizer from parameter groups.
        scheduler: makes the schedule, stepped after every batch, from the optimizer and those of `total_steps`, `T_max` and
            `max_lr` that it takes; or None.
        rates: learning rates other than the optimizer's: of "loss" (its own weights), of "model.encoder" (of its `pretrained_part`
            alone, if it names one), or of a module within.
        lr_factors: for parts of the encoder, by their dotted names, what its learning rate is multiplied by; of a part within
            another its own factor counts. They go before those that the encoder has itself, as `encoder.lr_factors`.
        seed: with the epoch and the batch it decides all that is drawn in a step: augmentation, dropout, miners that sample.
        config: plain values, kept in every checkpoint.
    """

    def __init__(
        self,
        model: Bundle,
        loss: nn.Module,
        miner: nn.Module | None = None,
        augmentation: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        optimizer: Callable = torch.optim.AdamW,
        scheduler: Callable | None = None,
        rates: dict[str, float] | None = None,
        lr_factors: dict[str, float] | None = None,
        seed: int = 0,
        config: dict | None = None,
    ):
        super().__init__()
        self.model, self.loss, self.miner, self.augmentation = model, loss, miner, augmentation
        self.make_optimizer, self.make_scheduler, self.rates, self.lr_factors = optimizer, scheduler, rates or {}, lr_factors or {}
        self.seed, self.config = seed, config or {}
        self.metrics = EmbeddingMetrics(model.distance, prefix="val/")
        self._validated: list[tuple[Tensor, Tensor]] = []
        self._told = False

    def grouped_optimizer(self) -> torch.optim.Optimizer:
        """All weights but those that are `Frozen`, each once, in groups by their learning rate.

        Raises:
            ValueError: `lr_factors` names a part that the encoder lacks or never trains, or what is no factor.
        """
        if not isinstance(self.lr_factors, dict):
            raise ValueError(f"lr_factors={self.lr_factors} must name parts of the encoder, as in 'optimizer.lr_factors={{backbone:0.1}}'")
        factors, frozen = {}, frozen_tensors(self)
        for part, factor in {**getattr(self.model.encoder, "lr_factors", {}), **self.lr_factors}.items():
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 0:
                raise ValueError(f"lr_factors.{part}={factor} must be a number that multiplies the learning rate, such as 0.1")
            if {*part_of(self.model.encoder, part).parameters()} <= frozen:
                raise ValueError(f"lr_factors.{part}={factor}: encoder.frozen=true never trains this part, so leave its factor away")
            factors[f"model.encoder.{part}"] = factor
        pretrained = getattr(self.model.encoder, "pretrained_part", None)
        own = {f"{name}.{pretrained}" if pretrained and name == "model.encoder" else name: rate for name, rate in self.rates.items()}
        groups: dict[tuple[str | None, str | None], list[nn.Parameter]] = {}
        for name, weight in self.named_parameters():
            if weight in frozen:
                continue
            inside = [max((part for part in parts if name.startswith(f"{part}.")), key=len, default=None) for parts in (own, factors)]
            groups.setdefault(tuple(inside), []).append(weight)
        rates = [{} if part is None else {"lr": own[part]} for part, _ in groups]
        optimizer = self.make_optimizer([{"params": weights, **rate} for weights, rate in zip(groups.values(), rates, strict=True)])
        for group, (_, part) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] *= factors.get(part, 1)
        return optimizer

    def configure_optimizers(self):
        optimizer = self.grouped_optimizer()
        if self.make_scheduler is None:
            return optimizer
        schedule = self.scheduled(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def scheduled(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        # What a schedule cannot know by itself, under the names that torch's schedules have for it.
        offered = {"total_steps": steps, "T_max": steps, "max_lr": [group["lr"] for group in optimizer.param_groups]}
        takes, given = inspect.signature(self.make_scheduler).parameters, getattr(self.make_scheduler, "keywords", {})
        return self.make_scheduler(optimizer, **{name: value for name, value in offered.items() if name in takes and name not in given})

    def tuples(self, batch: Batch, embeddings: Tensor) -> tuple[Tensor, ...] | None:
        if batch.tuples is not None or self.miner is None:
            return batch.tuples
        return self.miner(embeddings, batch.labels)

    def rehearse(self, batch: Batch) -> None:
        """Call miner and loss once on random embeddings: what they cannot compute comes to light before anything long begins.

        Raises:
            ValueError: the loss, or its gradient, is not finite; whatever miner and loss raise.
        """
        loss, miner = copy.deepcopy((self.loss, self.miner))  # a memory stays empty
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            embeddings = torch.randn(len(batch.inputs), self.model.encoder.embedding_size, requires_grad=True)
            tuples = miner(embeddings, batch.labels) if batch.tuples is None and miner is not None else batch.tuples
            value = loss(embeddings, batch.labels, tuples)
        value.backward()
        if not (value.isfinite() and embeddings.grad.isfinite().all()):
            raise ValueError(
                f"on random embeddings it is {value.item()}, or its gradient is not finite: one of its values does not suit it"
            )

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # a run that is resumed in the middle of an epoch has no other start of it
        for name, start in ((name, start) for miner in self._scheduled() for name, start in miner.starts.items()):
            if 0 <= (self.trainer.max_epochs or -1) <= start:
                log.warning("miner stage %s starts at epoch %d, the run ends before it: it is never used", name, start)

    def on_train_epoch_start(self) -> None:
        for miner in self._scheduled():
            miner.set_epoch(self.current_epoch)

    def _scheduled(self) -> list[ScheduledMiner]:
        return [module for module in self.modules() if isinstance(module, ScheduledMiner)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # What draws from torch's global generator in a step follows from (seed, epoch, batch) alone, so that a resumed run draws the
        # same; miners that sample draw the same on every rank, dropout does not.
        shared = self._entropy(batch_idx)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._seed(self._entropy(batch_idx, self.global_rank))
            embeddings = self._embedded(batch, torch.Generator().manual_seed(shared))
            self._seed(shared)
            return self._step(batch, embeddings)

    def _seed(self, number: int) -> None:
        # `torch.manual_seed` does the same for every kind of device, and writes down the call's stack for those that are not there: 1.5 ms.
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def _entropy(self, *numbers: int) -> int:
        return int(np.random.SeedSequence([self.seed, self.current_epoch, *numbers]).generate_state(1, np.uint64)[0] >> 1)

    def augmented(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The batch's inputs as training sees them."""
        if self.augmentation is None:
            return batch.inputs
        shared = () if batch.places is None else (batch.places, len(batch.labels))
        classes = {"labels": batch.labels} if getattr(self.augmentation, "classwise", None) else {}
        return self.augmentation(batch.inputs, generator, *shared, **classes)

    def _embedded(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """[B, D] of the whole batch, whoever embeds its parts."""
        embeddings = self.model(self.augmented(batch, generator))
        if batch.places is None:
            return embeddings
        return self.all_gather(embeddings, sync_grads=True).transpose(0, 1).flatten(0, 1)[: len(batch.labels)]  # they took turns

    def _step(self, batch: Batch, embeddings: Tensor) -> Tensor:
        logged = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        filters = [m for m in self.loss.modules() if isinstance(m, ThresholdReducer)]
        for reducer in filters:
            reducer.collect_stats = logged
            reducer.losses_size = reducer.num_past_filter = 0  # without tuples it is not asked
        # Distances between embeddings in bfloat16 keep two digits: mining and loss stay in single precision.
        with torch.autocast(self.device.type, enabled=False):
            tuples = self.tuples(batch, embeddings)
            loss = self.loss(embeddings, batch.labels, tuples)
            figures = health(embeddings.detach(), batch.labels, tuples, self.model.distance) if logged else {}
        if logged and filters:
            counted = sum(reducer.losses_size for reducer in filters)
            figures["train/active_fraction"] = sum(reducer.num_past_filter for reducer in filters) / max(counted, 1)
        if logged:
            if isinstance(self.loss, CrossBatchMemory):  # what reaches the loss is of the batch and the memory
                figures.pop("train/mined_fraction")
                figures["train/mined_tuples"] = float(self.loss.used)
            for miner in self._scheduled():
                figures["train/miner_stage"] = float(list(miner.starts).index(miner.stage))
            if not self._told and not (loss.isfinite() and embeddings.isfinite().all()):
                self._tell_of(loss, embeddings, batch)
        last = self.trainer.is_last_batch or self.global_step + 1 == self.trainer.max_steps
        if logged or last:  # to log takes Lightning a millisecond
            self.log_dict({"train/loss": loss, **figures}, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def _tell_of(self, loss: Tensor, embeddings: Tensor, batch: Batch) -> None:
        """Once: which samples a loss, or embeddings, come from that are no numbers."""
        self._told = True
        broken = (~embeddings.isfinite().all(1)).nonzero().flatten()
        why = "all embeddings are finite, so the loss itself overflows: try a smaller optimizer.lr"
        if len(broken):
            data = getattr(self.trainer, "datamodule", None)
            rows = (broken if batch.rows is None else batch.rows[broken])[:5].tolist()
            names = rows if data is None else [data.train.ids[row] for row in rows]
            why = f"embeddings of {len(broken)} of {len(embeddings)} samples are not finite, such as {', '.join(map(str, names))}"
        log.warning("step %d: training cannot recover from this, the loss is %s: %s", self.global_step, loss.item(), why)

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()  # what an interrupted validation has left
        self._validated.clear()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        embeddings = self.model(batch.inputs)
        if dataloader_idx == 0 and (batch.labels < 0).any():  # listed pairs or triplets, judged when all are embedded
            self._validated.append((batch.rows, embeddings))
            return
        if dataloader_idx == 0:
            self.metrics.update(embeddings, batch.labels, batch.rows, batch.gallery)
            return
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(embeddings, batch.labels, batch.tuples)
        self.log("val/loss", loss, batch_size=len(batch.inputs), add_dataloader_idx=False, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if self._validated:
            listed = self.trainer.datamodule.watched.tuples._asdict()
            rows, embeddings = (
                torch.cat(Ranks(self.trainer.world_size > 1).gather(torch.cat(part))) for part in zip(*self._validated, strict=True)
            )
            result = evaluate_tuples(embeddings[rows.argsort()], distance=self.model.distance, **listed)
            self._validated.clear()
            self.log_dict({f"val/{name}": float(value) for name, value in result.figures.items()})
            return
        figures = self.metrics.compute()
        self.metrics.reset()
        self.log_dict({name: value.float() for name, value in figures.items()})

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        epoch, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
        if epoch["started"] > epoch["processed"] and self.trainer.datamodule is not None:
            self.trainer.datamodule.begin_at(batches["processed"])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["parts"], checkpoint["config"] = self.model.parts, self.config


@torch.no_grad()
def health(embeddings: Tensor, labels: Tensor, tuples: tuple[Tensor, ...] | None, distance: nn.Module) -> dict[str, float]:
    """What a falling loss does not tell: a collapsed space has loss 0 as a perfect one has, but no spread.

    train/positive_distance, train/negative_distance: means over the pairs of the batch by the run's distance (of a
        similarity such as cosine: 1 - similarity).
    train/spread: 1 - the length of the mean unit embedding; 0 when all inputs land on one point, near 1 when they fill the sphere.
    train/mined_tuples: how many triplets, or pairs, reached the loss.
    train/mined_fraction: those as a share of all that the batch's labels allow.

    Samples without labels are in the tuples that somebody has listed: these are then all pairs, and all that is allowed. A batch
    without positive, or without negative, pairs has no mean of them.
    """
    matrix = distance(embeddings)
    matrix = 1 - matrix if distance.is_inverted else matrix
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives, negatives = same.sum(1) - 1, (~same).sum(1)
    possible = int((positives * negatives).sum() if tuples is not None and len(tuples) == 3 else (positives + negatives).sum())
    mined = possible if tuples is None else sum(len(part) for part in tuples[::2]) if len(tuples) == 4 else len(tuples[0])
    near, far = matrix[same & ~itself], matrix[~same]
    if tuples is not None and (labels < 0).any():
        other, negative = tuples[2:] if len(tuples) == 4 else tuples[::2]
        near, far, possible = matrix[tuples[0], tuples[1]], matrix[other, negative], mined
    means = {f"train/{kind}_distance": pairs.mean().item() for kind, pairs in (("positive", near), ("negative", far)) if len(pairs)}
    return {
        **means,
        "train/spread": 1 - nn.functional.normalize(embeddings).mean(0).norm().item(),
        "train/mined_tuples": float(mined),
        "train/mined_fraction": mined / max(possible, 1),
    }
