"""The recipes for photos, on the authors' layouts in small and with the smallest models of timm: that they train as they say."""

import re
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import train
from siamese.config import ROOT, available, compose
from tests.data.test_benchmarks import LAYOUTS

RECIPES = [name for name in available("experiment") if name.startswith("photos")]
COMMANDS = [
    (recipe, (re.findall(r"dataset=(\w+)", line) or ["cub200"])[0], line.partition("#")[0].split())
    for recipe in RECIPES
    for line in re.findall(rf"python train.py experiment={recipe}(.*)", (ROOT / "conf" / "experiment" / f"{recipe}.yaml").read_text())
]
SMALL = {"photos_resnet50": ("encoder.model=test_resnet", 32), "photos_vit": ("encoder.model=test_vit", 160)}


def test_every_benchmark_has_its_command_in_every_recipe():
    wanted = {(recipe, dataset) for recipe in RECIPES for dataset in ("cub200", "cars196", "sop", "inshop")}
    assert {(recipe, dataset) for recipe, dataset, _ in COMMANDS} == wanted


@pytest.fixture
def assembled(tmp_path, monkeypatch):
    """assembled(recipe, dataset, words) -> (config, data, module), of a command of the recipe made small."""
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path / "data"))

    def make(recipe, dataset, words):
        (tmp_path / "run").mkdir()
        LAYOUTS[dataset](tmp_path / dataset)
        model, size = SMALL[recipe]
        said = [word for word in words if not word.startswith(("dataset=", "sampling.classes"))]
        small = [model, "encoder.pretrained=false", f"dataset.size={size}", f"dataset.path={tmp_path / dataset}", "sampling.classes=6"]
        short = ["trainer=cpu", "trainer.max_epochs=60", "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=0", "logger=none"]
        calm = ["check=off", "leakage=off", "test=false", f"paths.output_dir={tmp_path / 'run'}"]
        config = compose([f"experiment={recipe}", f"dataset={dataset}", *said, *small, *short, *calm])
        return (config, *train.assemble(config)[:2])

    return make


@pytest.mark.parametrize(("recipe", "dataset", "words"), COMMANDS, ids=[f"{recipe} {dataset}" for recipe, dataset, _ in COMMANDS])
def test_a_recipe_trains_its_head_first_and_then_all(assembled, recipe, dataset, words):
    config, data, module = assembled(recipe, dataset, words)
    until = config["callbacks"]["freeze"]["until_epoch"]
    config["trainer"]["max_epochs"] = until + 1
    trainer, _ = train.make_trainer(config, {}, module.model.encoder)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            backbone = next(module.model.encoder.backbone.parameters())
            seen.append((backbone.detach().clone(), module.model.encoder.head.weight.detach().clone()))

    before = next(module.model.encoder.backbone.parameters()).detach().clone()
    trainer.callbacks.append(Watch())
    trainer.fit(module, data)
    assert len(seen) == until + 1
    assert all(torch.equal(backbone, before) for backbone, _ in seen[:until])
    assert not torch.equal(seen[-1][0], before)
    assert all(not torch.equal(one[1], other[1]) for one, other in pairwise(seen))
    rates = sorted({group["initial_lr"] for group in trainer.optimizers[0].param_groups})
    assert rates == pytest.approx([config["optimizer"]["lr"], (100 if recipe == "photos_resnet50" else 10) * config["optimizer"]["lr"]])
