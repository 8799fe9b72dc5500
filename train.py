"""Train a Siamese network, and judge it on classes it has never seen.

    python train.py                                                      # letters of known scripts, judged on unknown ones
    python train.py loss=triplet miner=semihard                          # swap a choice of any group in conf/
    python train.py loss=triplet loss.margin=0.1 trainer.max_epochs=50   # or a value
    python train.py -m loss=triplet,contrastive,supcon miner=semihard,hard   # a sweep: every combination, one run each
    python train.py -m search=optuna 'optimizer.lr=tag(log,interval(1e-4,1e-2))'  # Optuna; the same command goes on where it was
    python train.py dataset=omniglot encoder=conv4 loss=triplet miner=semihard
    python train.py sampling=pairs loss=contrastive distance=euclidean
    python train.py sampling=triplets loss=triplet
    python train.py loss=triplet miner=scheduled miner.start_epoch.late=5    # semi-hard early, hard later
    python train.py loss=xbm loss@loss.loss=multi_similarity                 # a choice within a choice
    python train.py distance=learned loss=bce sampling=pairs
    python train.py callbacks=[early_stopping,ema] scheduler=warmup
    python train.py dataset=images dataset.path=photos                   # photos/cat/1.jpg, or a table with path,label
    python train.py ckpt=logs/train/runs/<stamp>/checkpoints/last.ckpt   # resume everything
    python train.py resume=auto paths.output_dir=DIR                     # goes on with what is in DIR, whatever stopped it
    python train.py trainer=ddp trainer.devices=4                        # or torchrun --nproc-per-node 4 train.py trainer=ddp
    python train.py -m cluster=slurm trainer=gpu loss=triplet,supcon     # each a SLURM job; one run: sbatch scripts/slurm.sh
    python train.py init_from=logs/train/runs/<stamp>/checkpoints/best.ckpt  # take only the weights

A run's directory, logs/train/runs/<stamp>/, holds metrics.json, results.npz, checkpoints/, bundle.safetensors and more.
"""

import sys

from siamese.config import (
    ROOT,
    InputError,
    as_input_error,
    build,
    bundle_arguments,
    construct,
    first_difference,
    launch,
    partial,
    rates,
    starts_processes,
)


def train(config: dict) -> dict[str, float]:
    """One run, from a checked configuration of plain values to the figures of metrics.json."""
    import logging
    import os
    import time
    from pathlib import Path

    import lightning.pytorch as L
    import torch
    from rich.console import Console

    from siamese import judging, record, reporting
    from siamese.bundle import Bundle, load_checkpoint
    from siamese.callbacks import CarefulCheckpointIO
    from siamese.evaluation import FIGURES, PAIR_FIGURES

    log, goal = logging.getLogger("train"), config["threshold"]
    out = Path(config["paths"]["output_dir"])
    figures = dict.fromkeys((*FIGURES, *PAIR_FIGURES))
    if config["optimized_metric"] not in [f"val/{name}" for name in figures]:
        raise InputError(f"optimized_metric={config['optimized_metric']} is not computed: take one of val/{', val/'.join(figures)}")
    with as_input_error("report"):
        reporting.check_mode(config["report"])
    if not 0 <= config["seed"] < 2**32:
        raise InputError(f"seed={config['seed']} must be a whole number from 0 to {2**32 - 1}")
    L.seed_everything(config["seed"], verbose=False)  # the weights; batches and augmentation have generators of their own

    data, module, trust = assemble(config)
    splits = ("train", "val", "test") if config["test"] else ("train", "val")
    fingerprints = {split: getattr(data, split).fingerprint() for split in splits}
    if config["sampling"].get("file"):
        fingerprints["sampling.file"] = record.fingerprint(config["sampling"]["file"])
    provenance = record.provenance(ROOT, fingerprints)
    record.write_json(out / "provenance.json", provenance)

    seconds, crashed = {"fit": 0.0, "evaluate": 0.0}, True
    try:
        trainer, wandb_logger = make_trainer(config, provenance, module.model.encoder)
        started = time.perf_counter()
        before, device = {}, trainer.strategy.root_device
        device = device if device.type == "cuda" else torch.device("cpu")  # judging needs double precision, which not all have
        if trainer.is_global_zero and config["baselines"]:
            before = judging.baselines(module.model.to(device), data, config["test"], goal)
        seconds["evaluate"] += time.perf_counter() - started

        started = time.perf_counter()
        if config["compile"]:
            module.model.encoder.compile()
        trainer.fit(module, data, ckpt_path=config["ckpt"], weights_only=True)
        seconds["fit"] = time.perf_counter() - started
        if not trainer.is_global_zero:
            return {}
        for leftover in ("previous.ckpt", "last.ckpt.part", "best.ckpt.part"):
            (out / "checkpoints" / leftover).unlink(missing_ok=True)

        started = time.perf_counter()
        best = trainer.checkpoint_callback.best_model_path
        model = Bundle.load(best, trust=trust).to(device)
        results = {**before, **judging.judge(model, data, config["test"], goal, shown=True)}
        model.save(out / "bundle.safetensors")
        CarefulCheckpointIO().save_checkpoint({**load_checkpoint(best), "decision": model.decision and model.decision.plain()}, best)
        seconds["evaluate"] += time.perf_counter() - started
        metrics = record.write(out, results, seconds)
        if wandb_logger is not None:
            from siamese.loggers import record_results

            record_results(wandb_logger, results, metrics, best)
        crashed = False
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=int(crashed))

    for note in [*list(results.values())[-1].notes, *record.hardest(list(results.values())[-1])]:
        log.info(note)
    console = Console()
    console.print(record.table(results))
    reporting.report(out, config["report"])
    log.info("figures, checkpoints and the bundle are in %s", os.path.relpath(out))
    return metrics


def assemble(config: dict):
    """Data, model and loss, and the packages trusted: what the configuration got wrong comes to light here, before anything long begins."""
    import logging
    from pathlib import Path

    import torch
    from hydra.utils import get_object

    from siamese import judging
    from siamese.bundle import Bundle
    from siamese.data import checking
    from siamese.data.module import SiameseData
    from siamese.data.samples import Batch
    from siamese.evaluation import FIGURES, PAIR_FIGURES
    from siamese.frozen import frozen_tensors
    from siamese.losses import CrossBatchMemory
    from siamese.module import SiameseModule

    log, choices = logging.getLogger("train"), config["choices"]
    data = SiameseData(build(config, "dataset"), partial(config, "sampling"), config["seed"], config["val_classes"])
    with as_input_error("dataset"):
        log.info("train on %s, validate on %s", data.train, data.val)
        if config["test"]:
            _ = data.test, data.source.oneshot_runs()
    with as_input_error("encoder"):
        judging.check_kind(get_object(config["encoder"]["_target_"]), data.train)
    known, metric = PAIR_FIGURES if data.val.tuples is not None else FIGURES, config["optimized_metric"].removeprefix("val/")
    if metric not in known:
        remedy = "say experiment=matching, or " if data.val.tuples is not None else ""
        raise InputError(f"optimized_metric=val/{metric} is not computed of {data.val}: {remedy}take one of val/{', val/'.join(known)}")
    with as_input_error("threshold"):
        judging.check_goal(config["threshold"], data.val)
    splits, out = {"val": data.val, **({"test": data.test} if config["test"] else {})}, Path(config["paths"]["output_dir"])
    if data.source.trained_on:
        splits.pop("val")
        if not splits:
            raise InputError("dataset.validation=0 trains on the validation classes too, and test=false leaves no others to be judged")
        if choices["search"] != "none":
            raise InputError(
                f"search={choices['search']} goes by validation, whose classes dataset.validation=0 trains on: say another number"
            )
        log.warning("the validation classes are trained on too: no threshold is fitted, and the best checkpoint goes by known classes")
    with as_input_error("check"):
        checking.check({"train": data.train, **splits}, data.source.findings(), out, config["check"])
    with as_input_error("leakage"):
        data.leave_out(checking.guard(data.train, splits, out, config["leakage"]))
    with as_input_error("val_classes"):
        if data.watched is not data.val:
            log.info("after each epoch %d samples of %d classes are judged, at the end all", len(data.watched), data.val_classes)
    with as_input_error("sampling"):
        data.setup()
    made_of = bundle_arguments(config, data.input_shape, data.preprocessing(), data.source.reading())
    with as_input_error("encoder"):
        model = Bundle(**made_of)
    with as_input_error("views"):
        model.look(config["views"], config["augmentation"])
    parts, trust = model.parts, made_of["trust"]
    if frozen_tensors(model) and config["augmentation"]:
        raise InputError(
            f"encoder.frozen=true computes the features of each input once, augmentation={choices['augmentation']} makes other inputs at "
            "every step: say augmentation=none"
        )
    miner = build(config, "miner", distance=model.distance)
    if miner is not None and choices["sampling"] != "balanced":
        log.info("sampling=%s brings its own tuples: miner=%s is not used", choices["sampling"], choices["miner"])
        miner = None
    sizes = {"num_classes": len(data.train.class_names), "embedding_size": model.encoder.embedding_size}
    loss = build(config, "loss", distance=model.distance, miner=miner, **sizes)
    if isinstance(loss, CrossBatchMemory):
        miner = None  # it lets the miner choose among the memory's tuples
    first = next(iter(data.train_dataloader()))
    for memory in (part for part in loss.modules() if isinstance(part, CrossBatchMemory)):
        if len(first.inputs) > memory.memory_size:
            raise InputError(
                f"loss.memory_size={memory.memory_size} does not hold a batch of {len(first.inputs)}: raise it, best to several batches"
            )
    if config["ckpt"]:
        with as_input_error("ckpt"):
            check_resumable(config, parts)
    if config["init_from"]:
        with as_input_error("init_from"):
            other = Bundle.load(config["init_from"], trust=trust)
            # How it is to be trained is not said by its weights.
            mine, theirs = ({**of["encoder"], **dict.fromkeys(("frozen", "layer_decay", "pretrained"))} for of in (parts, other.parts))
            if mine != theirs:
                other_keys = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key) and key != "config"]
                what = ", ".join(f"{key}={theirs.get(key)}, not {mine.get(key)}" for key in sorted(other_keys)) or "another configuration"
                raise ValueError(f"{config['init_from']} holds another encoder than this command asks for: {what}")
            model.encoder.load_state_dict(other.encoder.state_dict())
            if other.parts["distance"] == parts["distance"]:
                model.distance.load_state_dict(other.distance.state_dict())
    module = SiameseModule(
        model,
        loss,
        miner,
        augmentation=build(config, "augmentation"),
        optimizer=partial(config, "optimizer"),
        scheduler=partial(config, "scheduler"),
        rates=rates(config),
        lr_factors=config["optimizer"].get("lr_factors"),
        seed=config["seed"],
        config=config,
    )
    with as_input_error("augmentation"):
        module.augmented(Batch(first.inputs[:2], first.labels[:2]), torch.Generator())  # of inputs that it is not made for
    of_distance = {*model.distance.parameters()}
    by_class = any(sizes["num_classes"] in weights.shape for weights in {*loss.parameters()} - of_distance)
    by_class |= any(getattr(part, "num_classes", 0) or isinstance(part, CrossBatchMemory) for part in loss.modules())
    if getattr(module.augmentation, "classwise", None) and by_class:
        raise InputError(
            f"augmentation.classwise makes other classes of each batch, loss={choices['loss']} remembers classes from batch to batch: "
            "say augmentation.classwise=null, or take another loss"
        )
    with as_input_error(f"loss={choices['loss']} with miner={choices['miner']}"):
        module.rehearse(first)
    with as_input_error("optimizer"):
        optimizer = module.grouped_optimizer()
    if module.make_scheduler is not None:
        with as_input_error("scheduler"):
            module.scheduled(optimizer, steps=100)  # of a length that does not matter, to see that its values are fine
    return data, module, trust


def check_resumable(config: dict, parts: dict) -> None:
    """Refuse to resume another run than this one: what a checkpoint restores must be what the command says.

    Raises:
        FileNotFoundError, ValueError: in a sentence, what differs.
    """
    import logging

    from siamese.bundle import load_checkpoint

    choices = config["choices"]
    saved = load_checkpoint(config["ckpt"])
    if any(saved["parts"].get(name) != parts.get(name) for name in (saved["parts"].keys() | parts.keys()) - {"views"}):
        raise ValueError(f"{config['ckpt']} holds another encoder, distance or preprocessing than this command asks for")
    for group in ("loss", "optimizer", "scheduler"):
        if saved["config"]["choices"][group] != choices[group]:
            raise ValueError(
                f"{config['ckpt']} was trained with {group}={saved['config']['choices'][group]}, this command says "
                f"{group}={choices[group]}: resume with the same, or take its weights only (init_from=)"
            )
    compared = [(group, saved["config"][group], config[group]) for group in ("loss", "optimizer", "scheduler")]
    compared.append(("encoder.lr", saved["config"]["encoder"].get("lr"), config["encoder"].get("lr")))
    if choices["scheduler"] != "none":
        compared.append(("trainer.max_epochs", saved["config"]["trainer"]["max_epochs"], config["trainer"]["max_epochs"]))
    for name, old, new in compared:
        if difference := first_difference(old, new, name):
            key, old, new = difference
            why = "its schedule was made for that" if key == "trainer.max_epochs" else "a resumed run keeps the old value"
            raise ValueError(
                f"{config['ckpt']} was trained with {key}={old}, this command says {new}: {why}. Say {key}={old}, "
                "or take its weights only (init_from=)"
            )
    if ("ema" in saved["config"]["callbacks"]) != ("ema" in config["callbacks"]):
        state = "without" if "ema" in config["callbacks"] else "with"
        raise ValueError(f"{config['ckpt']} was trained {state} callbacks=ema: resume it {state}, or take its weights (init_from=)")
    if 0 < config["trainer"]["max_epochs"] <= saved["epoch"] + 1:
        logging.getLogger("train").info("%s has trained all of its epochs: nothing is left to train, it is judged again", config["ckpt"])


def keep_memory() -> None:
    """Let the process keep what it frees: each step asks for the same arrays again, and glibc would give them to the system and back."""
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: arrays up to this, the most it takes, are of the heap
        glibc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: of which so much may be free


def make_trainer(config: dict, provenance: dict, encoder):
    """The Lightning trainer with its callbacks and loggers, and the W&B logger by itself, None when there is none."""
    import logging
    import os
    import warnings
    from pathlib import Path

    import torch
    from lightning.fabric.utilities.warnings import PossibleUserWarning
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from siamese import record
    from siamese.bundle import load_checkpoint
    from siamese.callbacks import (
        BestCheckpoint,
        CarefulCheckpointIO,
        Freeze,
        Health,
        MidEpochCheckpoint,
        ProgressBar,
        Requeue,
        ValidateLastEpoch,
    )
    from siamese.evaluation import higher_is_better
    from siamese.frozen import frozen_tensors

    log = logging.getLogger("train")
    keep_memory()
    # What Lightning says of devices, workers and directories on every start tells a user of this template nothing.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings(
        "ignore", ".*(exists and is not empty|Experiment logs directory|The dirpath has changed|LeafSpec|functional.all_gather).*"
    )

    out, metric = config["paths"]["output_dir"], config["optimized_metric"]
    mode = "max" if higher_is_better(metric) else "min"
    callbacks = [
        BestCheckpoint(f"{out}/checkpoints", "best", monitor=metric, mode=mode, enable_version_counter=False),
        ModelCheckpoint(f"{out}/checkpoints", "last", enable_version_counter=False),
        MidEpochCheckpoint(f"{out}/checkpoints", "last", every_n_train_steps=config["save_every"], enable_version_counter=False),
        ValidateLastEpoch(),
        Health(),
        LearningRateMonitor("step"),
        ProgressBar(),
    ]
    for name, node in config["callbacks"].items():
        callbacks.append(construct(node, f"callbacks.{name}", monitor=metric, mode=mode, encoder=encoder))
    for_good = any(isinstance(callback, Freeze) and callback.until_epoch is None for callback in callbacks)
    if (for_good or frozen_tensors(encoder)) and not (config["encoder"].get("pretrained") or config["init_from"] or config["ckpt"]):
        log.warning("what is frozen has random weights, and keeps them: say encoder.pretrained=true, or init_from= another run")
    node = config["trainer"]
    if node["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"trainer.accelerator={node['accelerator']}: this machine has no GPU that torch can use. Say trainer=cpu")
    if str(node.get("precision")) in ("bf16-true", "16-true", "64-true", "64"):
        raise InputError(f"trainer.precision={node['precision']}: weights are kept in 32 bits here. Say bf16-mixed, 16-mixed or 32-true")
    if node.get("precision") == "auto":
        if node["accelerator"] in ("gpu", "cuda"):
            bf16 = torch.cuda.is_bf16_supported()
        else:
            cpu = torch.cpu.get_capabilities()
            bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        node = {**node, "precision": "bf16-mixed" if bf16 else "32-true"}
    several = starts_processes(config) and str(node.get("strategy", "auto")) in ("auto", "ddp")
    if several and any(isinstance(callback, Freeze) for callback in callbacks):
        node = {**node, "strategy": "ddp_find_unused_parameters_true"}
    plugins = [CarefulCheckpointIO()]
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:
        callbacks.append(Requeue(f"{out}/checkpoints/last.ckpt"))
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = construct(
        node,
        "trainer",
        logger=False,  # until it is known which rank this is
        callbacks=callbacks,
        default_root_dir=out,
        plugins=plugins,
        use_distributed_sampler=False,  # our samplers know what every rank gets
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    earlier = record.curves(Path(out) / "metrics.csv", load_checkpoint(config["ckpt"])["global_step"]) if config["ckpt"] else []
    if trainer.world_size > 1:
        normed = any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in encoder.modules())
        of_part = "; batch-norm takes the statistics of each rank's part" if normed and not node.get("sync_batchnorm") else ""
        logging.getLogger("train").info("%d ranks share each batch%s", trainer.world_size, of_part)
    csv = CSVLogger(out, name="", version="", flush_logs_every_n_steps=1)  # of a run that is killed nothing is missing
    trainer.loggers = [csv]
    if not trainer.is_global_zero:
        return trainer, None
    csv.experiment.metrics += earlier
    csv.save()
    chosen = ("dataset", "encoder", "distance", "loss", "miner", "sampling")
    name = "-".join(config["choices"][group] for group in chosen if config["choices"][group] != "none")
    values = [o for o in config["overrides"] if "." in o.partition("=")[0] and not o.startswith("paths.")]
    wandb_logger = build(
        config,
        "logger",
        directory=out,
        name=" ".join([name, f"seed={config['seed']}", *values]),
        config={**config, "provenance": provenance},
    )
    if wandb_logger is not None:
        trainer.loggers = [csv, wandb_logger]
    return trainer, wandb_logger


if __name__ == "__main__":
    launch(train, "train")
