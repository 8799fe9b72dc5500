"""What several test files share: command lines in processes of their own, a tiny data set, and one whole default run."""

import fcntl
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from siamese.config import ROOT, compose
from siamese.module import SiameseModule

# The heavy imports are made once, in a server that each command line is then forked from: 1 s for it instead of 8.
_HEAVY = ["torch", "lightning.pytorch", "wandb", "pytorch_metric_learning.losses", "pytorch_metric_learning.miners", "timm", "matplotlib"]
_HEAVY += ["optuna", "alembic.command", "sqlalchemy.dialects.sqlite"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(_HEAVY)

_IN_THE_FORK = """
import os, runpy, sys
for number, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.clear()
os.environ.update(environment)
os.chdir(root)
sys.argv, sys.path[:1] = [script, *arguments], [os.path.dirname(os.path.join(root, script)), f"{root}/src"]
runpy.run_path(script, run_name="__main__")
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str
    cpu_seconds: float = float("nan")


class Command:
    """`python SCRIPT ARGUMENTS`, as from a shell in the root of the repository, or of a copy; `wait` for how it ended."""

    def __init__(self, folder: Path, script: str, arguments: tuple[str, ...], environment: dict[str, str], root: Path):
        self.out, self.err = folder / "stdout", folder / "stderr"
        names = {"root": str(root), "script": script, "arguments": list(arguments), "environment": environment}
        names |= {"out": str(self.out), "err": str(self.err)}
        self.process = _SERVER.Process(target=exec, args=(_IN_THE_FORK, names), daemon=False)
        self.process.start()

    def wait(self, seconds: float = 300) -> Done:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.out.read_text()}\n{self.err.read_text()}")
        return Done(self.process.exitcode, self.out.read_text(), self.err.read_text())


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The home of every command line, to see what is left there; it holds no key of W&B."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def environment(home) -> dict[str, str]:
    """Of every command line: this one, but for what the machine's user has set up for W&B and Hydra."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_", "HYDRA_"))}
    return {**mine, "HOME": str(home), "COLUMNS": "80"}


@pytest.fixture(scope="session")
def start(tmp_path_factory, environment):
    """start("train.py", "loss=triplet", HYDRA_FULL_ERROR="1") -> Command"""

    def run(script: str, *arguments: str, root: Path = ROOT, **extra: str) -> Command:
        return Command(tmp_path_factory.mktemp("command"), script, arguments, {**environment, **extra}, root)

    return run


@pytest.fixture(scope="session")
def command(start):
    """command("train.py", "loss=triplet") -> Done"""
    return lambda script, *arguments, **extra: start(script, *arguments, **extra).wait()


@pytest.fixture(scope="session")
def python(environment):
    """python("train.py", "--help") -> Done, from a fresh interpreter, with the CPU seconds of it and its children."""

    def run(*arguments: str, **extra: str) -> Done:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env={**environment, **extra}, capture_output=True, text=True, timeout=120
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return Done(done.returncode, done.stdout, done.stderr, seconds)

    return run


@pytest.fixture(scope="session")
def wandb_run(environment):
    """wandb_run(directory of a run) -> the summary and all records of its one offline W&B run."""

    def read(directory: Path) -> tuple[dict, list[dict]]:
        (folder,) = directory.glob("wandb/offline-run-*")
        inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        summary, records = (
            subprocess.run([*inspect, *more, str(folder)], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
            for more in (["--summary"], [])
        )
        return json.loads(summary), [json.loads(line) for line in records.splitlines()]

    return read


@pytest.fixture(scope="session")
def drawings(tmp_path_factory) -> Path:
    """A data set laid out as Omniglot: 40 characters of 5 alphabets to train and validate, 24 of 3 to test, 2 one-shot runs."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    templates = rng.random((64, 7, 7)) < 0.4

    def draw(character: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = templates[character] ^ (rng.random((7, 7)) < 0.12)
        Image.fromarray(~np.kron(cells, np.ones((15, 15), bool))).save(path)

    for character in range(64):
        archive, alphabet = ("images_background_small1", "images_evaluation")[character >= 40], f"Alphabet{character // 8}"
        for number in range(6):
            draw(character, folder / archive / alphabet / f"character{character % 8 + 1:02d}" / f"{number + 1:02d}.png")
    for run, first in (("run01", 40), ("run02", 52)):
        lines = []
        for item in range(8):
            test, training = f"{run}/test/item{item + 1:02d}.png", f"{run}/training/class{item + 1:02d}.png"
            for path in (test, training):
                draw(first + item, folder / "all_runs" / path)
            lines.append(f"{test} {training}\n")
        (folder / "all_runs" / run / "class_labels.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def transformer(tmp_path_factory) -> Path:
    """A folder with a Hugging Face model as `save_pretrained` leaves it: random, of two narrow layers, its tokens words and letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder, letters = tmp_path_factory.mktemp("transformer"), "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "##s", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(tokens), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A table of texts: 24 classes of 6, each with two words of its own among many of no meaning."""
    path, rng = tmp_path_factory.mktemp("questions") / "questions.csv", np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(90)]
    lines = ["text,label"]
    for label in range(24):
        for _ in range(6):
            lines.append(" ".join(rng.permutation([*rng.choice(words[48:], 4), *words[2 * label : 2 * label + 2]])) + f",topic {label}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(drawings) -> list[str]:
    """Overrides of a run that takes a second: the drawings, a narrow encoder, two epochs of two steps, each validated."""
    return [
        *("dataset=omniglot", f"dataset.path={drawings}", "dataset.background=small1", "dataset.size=16"),
        *("encoder.widths=[8,8,8]", "encoder.embedding_size=16", "logger=none", "report=none"),
        *("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1"),
    ]


@pytest.fixture(scope="session")
def fit(tiny):
    """fit(folder, "loss=triplet") -> the figures of a tiny run in this process, on the drawings unless a dataset= is given."""
    import train

    def run(folder: Path, *overrides: str) -> dict[str, float]:
        other = any(override.startswith("dataset=") for override in overrides)
        config = compose([*(given for given in tiny if not (other and given.startswith("dataset"))), *overrides])
        folder.mkdir(parents=True, exist_ok=True)
        config["paths"]["output_dir"] = str(folder)
        return train.train(config)

    return run


@pytest.fixture
def gets_worse(monkeypatch) -> None:
    """From its third epoch on, the encoder of every run of `fit` maps all to one point."""
    start = SiameseModule.on_validation_epoch_start

    def ruin(module):
        if module.current_epoch >= 2:
            with torch.no_grad():
                for weight in module.model.encoder.parameters():
                    weight.zero_()
        start(module)

    monkeypatch.setattr(SiameseModule, "on_validation_epoch_start", ruin)


@pytest.fixture(scope="session")
def tiny_run(fit, tmp_path_factory) -> Path:
    """The directory of one tiny run, to be read only."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    fit(folder, "report=html")
    return folder


@pytest.fixture(scope="session")
def default_run(command, tmp_path_factory) -> Path:
    """The directory of `python train.py` with its defaults, cut to two short epochs; to be read only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # one run for all workers
    folder = base / "default_run"
    short = ("trainer.max_epochs=2", "+trainer.limit_train_batches=6", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=2")
    with open(base / "default_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "metrics.json").exists():
            done = command("train.py", *short, f"paths.output_dir={folder}")
            assert done.code == 0, done.err
    return folder
