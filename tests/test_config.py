"""Every choice of every group composes, fits what it names, and matters; what cannot work together is refused."""

import copy
import functools
import itertools
import operator
import re
import sys
import time
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from siamese.config import CONF, NO_ARGUMENTS, InputError, accepted, available, build, compose, construct, interrupt_again, partial
from siamese.data.samples import Samples

OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
GROUPS = sorted({group for group, _ in OPTIONS})
# What must be said too, for all options of a group to be possible.
ALSO = {"sampling": ["loss=contrastive"]}


@pytest.fixture(autouse=True)
def data_is_at_hand(drawings, monkeypatch):
    """As far as the check looks: the folder is there."""
    for name in ("omniglot", "abt_buy", "cub200", "clinc150"):
        (drawings.parent / name).mkdir(exist_ok=True)
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(drawings.parent))


@functools.cache
def plain(overrides: str) -> dict:
    """The configuration of these overrides, to be read only: a composition takes a tenth of a second."""
    return compose(overrides.split())


def composed(group: str, option: str) -> dict:
    own = [f"dataset.path={CONF}"] if group == "dataset" and "path" in list(OmegaConf.load(CONF / group / f"{option}.yaml")) else []
    return plain(" ".join([f"{group}={option}", *ALSO.get(group, []), *own]))


def targets(node: dict, name: str):
    """All `{"_target_": ...}` below a group's node."""
    if "_target_" in node:
        yield name, node
    for key, value in node.items():
        if isinstance(value, dict):
            yield from targets(value, f"{name}.{key}")


# --- the groups and keys that others rely on


def test_the_groups_of_the_contract_are_there():
    contract = (
        "dataset sampling augmentation encoder distance loss miner optimizer scheduler trainer logger callbacks experiment cluster "
        "debug paths"
    )
    assert set(contract.split()) <= set(plain("")["choices"])


@pytest.mark.parametrize(
    "override",
    [
        *("seed=7", "test=false", "optimized_metric=val/eer", "sampling.classes=12", "sampling.samples_per_class=3"),
        *("trainer.max_epochs=3", "trainer.devices=2", "trainer.devices=auto", "paths.output_dir=/there"),
        *("dataset=omniglot dataset.size=20", "dataset=omniglot dataset.path=conf"),
    ],
)
def test_the_keys_of_the_contract_can_be_set(override):
    config = compose(override.split())
    key, _, value = override.split()[-1].partition("=")
    for part in key.split("."):
        config = config[part]
    assert str(config).lower() == value


@pytest.mark.parametrize("key", ["ckpt", "init_from"])
def test_a_checkpoint_can_be_given(key, tmp_path):
    (tmp_path / "last.ckpt").touch()
    assert plain("")[key] is None
    assert compose([f"{key}={tmp_path}/last.ckpt"])[key] == f"{tmp_path}/last.ckpt"


def test_all_that_may_be_left_out_has_a_none():
    for group in ("augmentation", "miner", "scheduler", "logger", "callbacks", "experiment", "cluster", "debug"):
        assert "none" in available(group)
        assert composed(group, "none")["choices"][group] == "none"


# --- every option of every group


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_fits_what_it_names(group, option):
    config = composed(group, option)
    assert config["choices"][group] == option
    node = config.get(group, {})
    for _, part in targets(node, group):
        takes = accepted(hydra.utils.get_object(part["_target_"]))
        assert takes is None or part.keys() - {"_target_"} - set(NO_ARGUMENTS.get(group, ())) <= takes
    if "_target_" not in node and option != "none":
        assert OmegaConf.load(CONF / group / f"{option}.yaml"), f"{group}={option} says nothing: it should be called none"


@pytest.mark.parametrize("group", GROUPS)
def test_no_two_options_of_a_group_come_to_the_same(group):
    def built(option: str) -> dict:
        config = composed(group, option)
        return {key: value for key, value in config.items() if key not in ("choices", "overrides", "paths")}

    for one, other in itertools.combinations(available(group), 2):
        assert built(one) != built(other), f"{group}={one} and {group}={other} are the same"


@pytest.mark.parametrize("option", sorted(available("experiment")))
def test_an_experiment_leaves_the_last_word_to_the_command_line(option):
    config = compose([f"experiment={option}", "trainer.max_epochs=77", "loss=contrastive", "seed=5"])
    assert (config["trainer"]["max_epochs"], config["choices"]["loss"], config["seed"]) == (77, "contrastive", 5)


def test_what_an_experiment_says_of_its_loss_goes_with_it_when_another_is_chosen():
    assert plain("experiment=omniglot_record")["loss"]["temperature"] == 0.05
    assert plain("loss=supcon")["loss"]["temperature"] == 0.1
    assert plain("experiment=omniglot_record loss.temperature=0.3")["loss"]["temperature"] == 0.3
    assert plain("experiment=omniglot_record loss=ntxent")["loss"] == plain("loss=ntxent")["loss"]
    assert plain("experiment=omniglot_quick")["encoder"]["widths"] == [20, 40, 80]
    assert plain("experiment=omniglot_quick encoder=conv4")["encoder"] == plain("encoder=conv4")["encoder"]
    for group in ("loss", "encoder"):
        values = {path.stem for path in (CONF / "experiment" / group).iterdir()}
        assert values <= {f"{option}_{plain(f'experiment={option}')['choices'][group]}" for option in available("experiment")}


def test_an_experiments_values_may_be_a_word_or_none_of_it():
    assert plain("experiment=omniglot_record dataset.background=small1 dataset.validation=others")["dataset"]["validation"] == "others"
    assert plain("experiment=omniglot_record augmentation.classwise=null")["augmentation"]["classwise"] is None
    assert plain("experiment=omniglot_record augmentation.classwise.flip=0")["augmentation"]["classwise"]["rotation"] == 180
    with pytest.raises(InputError, match=r"augmentation.classwise=5 stands in the place of several values"):
        compose(["experiment=omniglot_record", "augmentation.classwise=5"])


def test_debug_says_more_than_the_experiment():
    assert compose(["experiment=omniglot_semihard", "debug=fast"])["trainer"]["max_epochs"] == 1


# --- every value reaches what is built

SAMPLES = Samples(torch.zeros(60, 1, 16, 16, dtype=torch.uint8), torch.arange(60) // 6, [str(n) for n in range(10)], [""] * 60)
OFFERED = {"loss": {"num_classes": 4, "embedding_size": 8}, "encoder": {"input_shape": [1, 16, 16]}}


ENCODER = torch.nn.ModuleDict({"backbone": torch.nn.BatchNorm1d(2), "head": torch.nn.Linear(2, 3)})


def steps_up(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> int:
    """After how many of its steps the learning rate is highest."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        if len(rates) < steps:
            scheduler.step()
    return rates.index(max(rates))


def made(config: dict, group: str):
    """What a group names, constructed, with what comes by itself in a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    match group:
        case "optimizer":
            return partial(config, group)([torch.nn.Parameter(torch.zeros(2))])
        case "scheduler":
            length = {
                "OneCycleLR": {"total_steps": 100, "max_lr": 1.0},
                "CosineAnnealingLR": {"T_max": 100},
                "warmup_cosine": {"total_steps": 100},
            }
            return partial(config, group)(optimizer, **length[config[group]["_target_"].rpartition(".")[2]])
        case "sampling":
            return partial(config, group)(samples=SAMPLES, seed=0)
        case "callbacks":
            (name, node), *_ = config[group].items()
            return construct(node, name, monitor="val/map_at_r", mode="max", encoder=ENCODER)
        case "trainer":
            node = {**config[group], "precision": "32-true"} if config[group]["precision"] == "auto" else config[group]
            return construct(node, group, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        case _:
            return build(config, group, **OFFERED.get(group, {}))


def batch(loader):
    return next(iter(loader))


def learning_rate(optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def weight_decay(optimizer) -> float:
    return optimizer.param_groups[0]["weight_decay"]


# A choice -> a value to give -> where it must arrive, and as what. Every value differs, so that none can take another's place.
KNOBS = {
    "loss=triplet": {"loss.margin=0.31": lambda loss: (loss.margin, 0.31)},
    "loss=triplet distance=euclidean": {"loss.margin=0.32": lambda loss: (loss.margin, 0.32)},
    "loss=contrastive": {
        "loss.pos_margin=0.83": lambda loss: (loss.pos_margin, 0.83),
        "loss.neg_margin=0.34": lambda loss: (loss.neg_margin, 0.34),
    },
    "loss=contrastive distance=euclidean": {
        "loss.pos_margin=0.35": lambda loss: (loss.pos_margin, 0.35),
        "loss.neg_margin=0.86": lambda loss: (loss.neg_margin, 0.86),
    },
    "loss=supcon": {"loss.temperature=0.37": lambda loss: (loss.temperature, 0.37)},
    "loss=arcface": {
        "loss.margin=90": lambda loss: (loss.margin, torch.pi / 2),
        "loss.scale=38": lambda loss: (loss.scale, 38),
    },
    "miner=all": {"miner.margin=0.41": lambda miner: (miner.margin, 0.41)},
    "miner=semihard": {
        "miner.margin=0.43": lambda miner: (miner.margin, 0.43),
        "miner.hardness=hard": lambda miner: (miner.hardness, "hard"),
    },
    "optimizer=adamw": {
        "optimizer.lr=0.51": lambda optimizer: (learning_rate(optimizer), 0.51),
        "optimizer.weight_decay=0.52": lambda optimizer: (weight_decay(optimizer), 0.52),
    },
    "optimizer=sgd": {
        "optimizer.lr=0.53": lambda optimizer: (learning_rate(optimizer), 0.53),
        "optimizer.weight_decay=0.54": lambda optimizer: (weight_decay(optimizer), 0.54),
        "optimizer.momentum=0.55": lambda optimizer: (optimizer.param_groups[0]["momentum"], 0.55),
        "optimizer.nesterov=false": lambda optimizer: (optimizer.param_groups[0]["nesterov"], False),
    },
    "scheduler=onecycle": {"scheduler.pct_start=0.7": lambda scheduler: (round(steps_up(scheduler, 100), -1), 70)},
    "scheduler=warmup": {"scheduler.warmup=0.6": lambda scheduler: (steps_up(scheduler, 100), 60)},
    "scheduler=cosine": {"scheduler.eta_min=0.37": lambda scheduler: (scheduler.eta_min, 0.37)},
    "encoder=conv4": {
        "encoder.widths=[5,7]": lambda encoder: ([m.out_channels for m in encoder.modules() if hasattr(m, "out_channels")], [5, 7]),
        "encoder.embedding_size=37": lambda encoder: (encoder(torch.zeros(2, 1, 16, 16)).shape[1], 37),
    },
    "encoder=koch +encoder.input_shape=[1,65,65]": {
        "encoder.embedding_size=36": lambda encoder: (encoder.layers[-1].out_features, 36),
    },
    "encoder=mlp": {
        "encoder.hidden=[5,7,9]": lambda encoder: ([m.in_features for m in encoder.modules() if hasattr(m, "in_features")][1:], [5, 7, 9]),
        "encoder.embedding_size=38": lambda encoder: (encoder(torch.zeros(2, 1, 16, 16)).shape[1], 38),
    },
    "encoder=timm": {
        "encoder.model=resnet10t": lambda encoder: (encoder.backbone.default_cfg["architecture"], "resnet10t"),
        "encoder.embedding_size=39": lambda encoder: (encoder.head.out_features, 39),
    },
    "encoder=timm encoder.model=test_resnet": {
        "encoder.pool=gem": lambda encoder: (type(encoder.pool).__name__, "GeM"),
        "encoder.hidden=[43,44]": lambda encoder: (
            [m.in_features for m in encoder.head.modules() if hasattr(m, "in_features")][1:],
            [43, 44],
        ),
        "encoder.normalize=true": lambda encoder: (encoder.normalize, True),
    },
    "encoder=timm encoder.model=resnet10t": {"encoder.embedding_size=null": lambda encoder: (encoder.embedding_size, 512)},
    "distance=euclidean loss=triplet": {
        "distance.normalize_embeddings=false": lambda distance: (distance(torch.eye(2) * 3)[0, 1].item(), pytest.approx(18**0.5)),
    },
    "sampling=balanced": {
        "sampling.classes=5": lambda loader: (loader.sampler.classes, 5),
        "sampling.samples_per_class=3": lambda loader: (len(batch(loader).inputs) / len(batch(loader).labels.unique()), 3),
    },
    "sampling=pairs loss=contrastive": {
        "sampling.batch_size=7": lambda loader: (len(batch(loader).inputs), 2 * 7),
        "sampling.positive_fraction=0.1": lambda loader: (int(loader.dataset.same.sum()), len(SAMPLES) / 10),
    },
    "sampling=triplets": {"sampling.batch_size=8": lambda loader: (len(batch(loader).inputs), 3 * 8)},
    "augmentation=light": {
        "augmentation.rotation=90": lambda augmentation: (augmentation.rotation, torch.pi / 2),
        "augmentation.scale=0.61": lambda augmentation: (augmentation.scale, 0.61),
        "augmentation.shear=0.62": lambda augmentation: (augmentation.shear, 0.62),
        "augmentation.shift=0.63": lambda augmentation: (augmentation.shift, 0.63),
    },
    "augmentation=strong": {"augmentation.rotation=45": lambda augmentation: (augmentation.rotation, torch.pi / 4)},
    "augmentation=handwriting": {
        "augmentation.elastic=0.64": lambda augmentation: (augmentation.elastic, 0.64),
        "augmentation.shear=0.65": lambda augmentation: (augmentation.shear, 0.65),
    },
    "augmentation=photo": {
        "augmentation.crop=0.66": lambda augmentation: (augmentation.crop, 0.66),
        "augmentation.flip=0.67": lambda augmentation: (augmentation.flip, 0.67),
        "augmentation.erasing=0.68": lambda augmentation: (augmentation.erasing, 0.68),
    },
    "dataset=omniglot": {
        "dataset.path=src": lambda dataset: (dataset.path, Path("src")),
        "dataset.background=small2": lambda dataset: (dataset.background, "small2"),
        "dataset.size=37": lambda dataset: (dataset.size, 37),
        "dataset.validation=3": lambda dataset: (dataset.validation, 3),
        "dataset.rotated_classes=true": lambda dataset: (dataset.rotated_classes, True),
    },
    "dataset=cub200 dataset.path=conf": {
        "dataset.path=src": lambda dataset: (dataset.path, Path("src")),
        "dataset.size=38": lambda dataset: (dataset.size, 38),
        "dataset.channels=1": lambda dataset: (dataset.channels, 1),
        "dataset.fit=pad": lambda dataset: (dataset.fit, "pad"),
        "dataset.val=0.39": lambda dataset: (dataset._shares["val"], 0.39),
    },
    "callbacks=early_stopping": {"callbacks.early_stopping.patience=37": lambda callback: (callback.patience, 37)},
    "callbacks=ema": {"callbacks.ema.decay=0.46": lambda callback: (callback.decay, 0.46)},
    "callbacks=freeze": {
        "callbacks.freeze.parts=[head]": lambda callback: ([p.shape for p in callback.parameters], [(3, 2), (3,)]),
        "callbacks.freeze.until_epoch=47": lambda callback: (callback.until_epoch, 47),
        "callbacks.freeze.batch_norm=false": lambda callback: (callback.batch_norm, False),
    },
    "trainer=cpu": {
        "trainer.max_epochs=71": lambda trainer: (trainer.max_epochs, 71),
        "trainer.devices=3": lambda trainer: (trainer.num_devices, 3),
        "trainer.precision=bf16-mixed": lambda trainer: (trainer.precision, "bf16-mixed"),
        "trainer.check_val_every_n_epoch=72": lambda trainer: (trainer.check_val_every_n_epoch, 72),
        "trainer.log_every_n_steps=73": lambda trainer: (trainer.log_every_n_steps, 73),
        "trainer.accumulate_grad_batches=74": lambda trainer: (trainer.accumulate_grad_batches, 74),
        "trainer.gradient_clip_val=0.75": lambda trainer: (trainer.gradient_clip_val, 0.75),
    },
}


@pytest.mark.parametrize("choice", KNOBS)
def test_the_values_of_the_command_line_reach_what_is_built(choice):
    overrides, group = KNOBS[choice], next(iter(KNOBS[choice])).partition(".")[0]
    default = made(plain(f"{choice} sampling.classes=10" if choice == "sampling=balanced" else choice), group)  # as many as SAMPLES has
    changed = made(compose([*choice.split(), *overrides]), group)
    for override, look in overrides.items():
        found, expected = look(default)
        assert found != expected, f"the test would pass without {override}"
        found, expected = look(changed)
        assert found == expected, override


@pytest.mark.parametrize(
    ("sampling", "lines"), [("pairs", "left,right,same\n0,1,1\n0,9,0\n"), ("triplets", "anchor,positive,negative\n0,1,9\n3,2,59\n")]
)
def test_a_list_of_tuples_reaches_the_loader(tmp_path, sampling, lines):
    (tmp_path / "list.csv").write_text(lines)
    config = compose([f"sampling={sampling}", "loss=contrastive", f"sampling.file={tmp_path}/list.csv"])
    assert len(made(config, "sampling").dataset) == 2 != len(SAMPLES)


def test_debug_anomaly_looks_for_the_operation_that_made_a_nan():
    trainer = made(compose(["debug=anomaly"]), "trainer")
    assert (trainer._detect_anomaly, trainer.precision) == (True, "32-true")


# --- losses and miners


def numbers(module: torch.nn.Module) -> list[float]:
    """Every number that a module and those within it hold."""
    found = []
    for part in module.modules():
        values = [*part._parameters.values(), *(value for key, value in vars(part).items() if not key.startswith("_"))]
        found += [part.weights[key] for key in sorted(part.weights)] if isinstance(getattr(part, "weights", None), dict) else []
        for value in values:
            if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                found.append(float(value))
            elif isinstance(value, torch.Tensor):
                found.append(float(value.numel()))
    return found


@pytest.mark.parametrize(("group", "option"), [(group, option) for group, option in OPTIONS if group in ("loss", "miner")])
def test_every_number_of_a_loss_or_miner_reaches_it(group, option):
    def built(key: str = "", other: float = 0) -> list[float]:
        torch.manual_seed(0)
        config = copy.deepcopy(plain(f"{group}={option}"))
        if key:
            *above, last = key.split(".")
            functools.reduce(operator.getitem, above, config)[last] = other
        made = build(config, group, num_classes=4, embedding_size=8, distance=build(config, "distance"))
        starts = [float(start) for start in getattr(made, "starts", {}).values()]
        return [] if made is None else numbers(made) + starts

    def settable(node: dict, path: str):
        for key, value in node.items():
            if isinstance(value, dict) and key not in NO_ARGUMENTS[group]:
                yield from settable(value, f"{path}.{key}")
            elif type(value) in (int, float) and key not in NO_ARGUMENTS[group]:
                yield f"{path}.{key}", value

    default, tried = built(), 0
    for key, value in settable(plain(f"{group}={option}")[group], group):
        if key.endswith("start_epoch.early"):
            continue  # it must be 0
        other = value + 1 if isinstance(value, int) else value * 0.9 if value else 0.05
        assert built(key, other) != default, key
        tried += 1
    assert tried or option in ("none", "batch_hard", "batch_easy_hard", "hard")


DISTANCES = ("cosine", "euclidean", "euclidean distance.normalize_embeddings=false")


@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_margins_are_right_for_the_distance(loss, distance):
    """Two classes, each on one point, opposite to one another, cost nothing; scattered, collapsed or mixed up they do."""
    config = plain(f"loss={loss} sampling=balanced distance={distance}")
    criterion = build(config, "loss", distance=build(config, "distance"))
    right, up, left, down = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]

    def cost(*places: list[float]) -> float:
        return criterion(torch.tensor(places), torch.tensor([0, 0, 1, 1])).item()

    assert cost(right, right, left, left) == pytest.approx(0, abs=1e-3)  # cdist rounds in single precision
    assert cost(right, up, left, down) > 0.15
    assert cost(right, right, right, right) > 0.15
    assert cost(right, left, right, left) > 0.15


@pytest.fixture
def assembled(tiny, tmp_path, monkeypatch):
    """assembled("loss=arcface") -> what train.py gives the LightningModule, without a step of training."""
    import train
    from siamese import module

    class Assembled(BaseException):
        pass

    def run(*overrides: str) -> dict:
        def stop(model, loss, miner, **others):
            raise Assembled({"model": model, "loss": loss, "miner": miner, **others})

        monkeypatch.setattr(module, "SiameseModule", stop)
        config = compose([*tiny, *overrides])
        config["paths"]["output_dir"] = str(tmp_path)
        with pytest.raises(Assembled) as caught:
            train.train(config)
        return caught.value.args[0]

    return run


def test_loss_and_miner_measure_as_the_model_does(assembled):
    parts = assembled("loss=triplet", "miner=semihard", "distance=euclidean", "distance.normalize_embeddings=false")
    assert parts["loss"].distance is parts["miner"].distance is parts["model"].distance
    assert not parts["model"].distance.normalize_embeddings


def test_arcface_on_normalised_euclidean_keeps_its_own_cosine(assembled):
    parts = assembled("loss=arcface", "distance=euclidean")
    assert parts["loss"].distance.is_inverted
    assert not parts["model"].distance.is_inverted


def test_arcface_knows_the_classes_and_the_width_of_the_embedding(assembled):
    parts = assembled("loss=arcface", "encoder.embedding_size=24")
    assert tuple(parts["loss"].W.shape) == (24, 32)
    assert parts["rates"] == {"loss": 0.3}


def test_the_rates_of_the_encoders_parts_come_from_the_optimizers_yaml(assembled):
    assert assembled("optimizer.lr_factors={layers.0:0.1,layers.4:2}")["lr_factors"] == {"layers.0": 0.1, "layers.4": 2}
    assert assembled("optimizer=sgd", "optimizer.lr=0.1")["lr_factors"] is None


# --- fast, and without torch


@pytest.mark.parametrize(("flags", "limit"), [(["--help"], 1.5), (["--cfg", "job"], 0.6)])
def test_help_and_cfg_answer_at_once(python, flags, limit):
    """In CPU seconds of a machine that imports hydra in 0.19 of them; a slower or busier one is given as much more."""
    pairs = [(python("train.py", *flags), python("-c", "import hydra")) for _ in range(4)]
    assert all(done.code == 0 and "optimized_metric" in done.out for done, _ in pairs)
    least, hydra_alone = (min(done.cpu_seconds for done in column) for column in zip(*pairs, strict=True))
    assert least < limit * max(1, hydra_alone / 0.19)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_import_nothing_heavy(python, script, flags):
    done = python("-X", "importtime", script, *flags)
    imported = set(re.findall(r"\| +(\w+)$", done.err, re.MULTILINE))
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "wandb", "numpy", "pytorch_metric_learning", "timm", "matplotlib"}


def test_a_ctrl_c_that_falls_into_a_finaliser_is_not_lost(monkeypatch):
    class Dying:
        def __del__(self):
            raise KeyboardInterrupt

    def run():
        Dying()
        time.sleep(10)

    monkeypatch.setattr(sys, "unraisablehook", interrupt_again)
    with pytest.raises(KeyboardInterrupt):
        run()
