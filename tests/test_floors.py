"""Who may know what: the lower floors work from a notebook, without Lightning, Hydra or W&B."""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(importlib.util.find_spec("siamese").origin).parent
HYDRA, LIGHTNING, WANDB = {"hydra", "omegaconf"}, {"lightning", "pytorch_lightning", "lightning_fabric"}, {"wandb"}
# Which module may import what besides plain PyTorch; one that is not named here stands on the lowest floor.
ALLOWED = {
    "siamese.config": HYDRA,
    "siamese.module": LIGHTNING,
    "siamese.callbacks": LIGHTNING,
    "siamese.data.module": LIGHTNING,
    "siamese.loggers": LIGHTNING | WANDB,
}
MODULES = {"siamese", *(module.name for module in pkgutil.walk_packages([str(ROOT)], "siamese."))}
LOWEST = sorted(MODULES - ALLOWED.keys())


def source(module: str) -> Path:
    return Path(importlib.util.find_spec(module).origin)


def imports(module: str) -> set[str]:
    """Top-level packages, and modules of this one, that a file imports anywhere, in a function too."""
    found = set()
    for node in ast.walk(ast.parse(source(module).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            found.add(name if name.startswith("siamese") else name.partition(".")[0])
    return found


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level packages that a fresh Python has loaded after importing these."""
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_lowest_floor_is_where_the_design_puts_it():
    data = {f"siamese.data.{name}" for name in ("samples", "sampling", "glyphs", "augmentation")}
    assert data | {f"siamese.{name}" for name in ("evaluation", "encoders", "distances", "bundle", "judging")} <= set(LOWEST)
    assert ALLOWED.keys() <= MODULES, "a module was renamed: this list is out of date"


def test_the_lowest_floor_loads_neither_lightning_nor_hydra_nor_wandb():
    loaded = loaded_by(LOWEST)
    assert "torch" in loaded
    assert not loaded & (HYDRA | LIGHTNING | WANDB | {"qdrant_client"})


def test_the_configuration_is_checked_before_torch_is_loaded():
    loaded = loaded_by(["siamese.config"])
    assert "hydra" in loaded
    assert not loaded & ({"torch", "torchvision", "pytorch_metric_learning", "timm", "matplotlib"} | LIGHTNING | WANDB)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_what_its_floor_may(module):
    forbidden = (HYDRA | LIGHTNING | WANDB) - ALLOWED.get(module, set())
    assert not imports(module) & forbidden


@pytest.mark.parametrize("module", LOWEST)
def test_the_lowest_floor_imports_none_above_it(module):
    assert not imports(module) & ALLOWED.keys()


@pytest.mark.parametrize("module", sorted(MODULES - {"siamese.config"}))
def test_only_the_configuration_knows_a_dictconfig(module):
    text = source(module).read_text()
    assert not [word for word in ("DictConfig", "ListConfig", "OmegaConf", "HydraConfig") if word in text]
    assert "siamese.config" not in imports(module)


def test_no_file_is_a_drawer_for_everything():
    words = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
    assert not [str(path) for path in files if words & set(path.stem.split("_"))]
