"""Several ranks train as one process that holds the whole batch, and leave what one process leaves."""

import csv
import json
import re
import socket
import subprocess
import sys

import pytest
import torch
from ddp_gradients import CASES, OVERRIDES, STEPS

from siamese.config import ROOT, compose


@pytest.fixture(scope="session")
def ranks(start):
    """ranks(2, "train.py", "trainer=ddp_cpu") -> how each of two processes ended that were started as torchrun starts them."""

    def run(count: int, script: str, *arguments: str) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        started = [start(script, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
        return [command.wait() for command in started]

    return run


@pytest.fixture(scope="session")
def gradients(start, ranks, tmp_path_factory):
    """gradients(ranks) -> for each case what each rank found."""
    cases = json.dumps({name: compose([*case, *OVERRIDES]) for name, case in CASES.items()})

    def run(count: int) -> list[dict]:
        folder = tmp_path_factory.mktemp("gradients")
        (folder / "cases.json").write_text(cases)
        arguments = ("tests/ddp_gradients.py", str(folder))
        for done in [start(*arguments).wait()] if count == 1 else ranks(count, *arguments):
            assert done.code == 0, done.err
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]

    return run


@pytest.fixture(scope="session")
def alone(gradients) -> dict:
    return gradients(1)[0]


def test_gradients_losses_and_memories_are_those_of_one_process(gradients, alone):
    for count in (2, 3):
        found = gradients(count)
        for case in CASES:
            expected = alone[case]
            assert len(expected["gradients"]) == len(expected["losses"]) == STEPS
            assert expected["losses"].min() > 0, case
            for rank in found:
                torch.testing.assert_close(rank[case]["losses"], expected["losses"], rtol=0, atol=1e-10)
                for one, other in zip(rank[case]["gradients"], expected["gradients"], strict=True):
                    assert one.keys() == other.keys()
                    assert max(gradient.abs().max() for gradient in other.values()) > 1e-3, case
                    for name, gradient in other.items():
                        torch.testing.assert_close(one[name], gradient, rtol=0, atol=1e-10, msg=f"{case}, {count} ranks: {name}")
                for name, memory in expected["memory"].items():
                    torch.testing.assert_close(rank[case]["memory"][name], memory, rtol=0, atol=1e-10)
                    assert torch.equal(rank[case]["memory"][name], found[0][case]["memory"][name]), "ranks differ"


def test_the_cases_have_losses_with_weights_of_their_own_and_a_memory_that_is_used(alone):
    assert "loss.W" in alone["arcface"]["gradients"][0]
    assert "loss.proxies" in alone["proxy_anchor"]["gradients"][0]
    assert "loss.log_scale" in alone["pairs, bce, learned distance"]["gradients"][0]
    assert len(alone["cross-batch memory"]["memory"]["label_memory"].unique()) > 5


def curve(run, name: str) -> list[float]:
    with (run / "metrics.csv").open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def test_ranks_started_from_outside_leave_one_run(ranks, tiny, tmp_path):
    run = tmp_path / "runs" / "one"
    frozen = ("callbacks=freeze", "callbacks.freeze.parts=[layers.0]")  # weights without a gradient, which DDP has to be told of
    # In bfloat16, which a processor may have, epochs are validated; in the end it is in single precision.
    logged = [*(override for override in tiny if override != "logger=none"), "logger=wandb", "trainer.precision=32-true"]
    several = ("trainer=cpu", "trainer.devices=2")  # without a word of DDP, which two devices mean
    done = ranks(2, "train.py", *several, *logged, *frozen, f"paths.output_dir={run}", "resume=auto")
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    assert (done[1].out + done[1].err).strip() == "", "the first rank speaks for all"
    assert list((tmp_path / "runs").iterdir()) == [run]
    expected = {".hydra", "train.log", "checkpoints", "bundle.safetensors", "metrics.csv", "metrics.json", "results.npz", "provenance.json"}
    assert {path.name for path in run.iterdir()} == {*expected, "wandb"}
    assert len(list(tmp_path.rglob("run-*.wandb"))) == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    figures = json.loads((run / "metrics.json").read_text())
    # What ranks that share the samples found while training is what one process finds that has all of them.
    assert max(curve(run, "val/map_at_r")) == pytest.approx(figures["val/map_at_r"], abs=1e-4)
    assert len(curve(run, "val/map_at_r")) == 2


def test_ranks_share_the_judging_of_a_list_too(ranks, drawings, tiny, tmp_path):
    lines = ["left,right,same,split"]
    for split, (archive, alphabets) in {"train": ("background_small1", (0, 1, 2)), "val": ("evaluation", (5, 6, 7))}.items():
        files = [sorted((drawings / f"images_{archive}" / f"Alphabet{alphabet}").rglob("*.png")) for alphabet in alphabets]
        for near, far in zip(files, [*files[1:], files[0]], strict=True):
            for row in range(0, len(near) - 1, 2):
                lines += [f"{near[row]},{near[row + 1]},1,{split}", f"{near[row]},{far[row]},0,{split}"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    data = ("experiment=matching", "dataset=pairs", f"dataset.path={tmp_path / 'pairs.csv'}", "dataset.holds=images", "dataset.size=16")
    encoder = ("dataset.cache=false", "encoder=conv4", *(override for override in tiny if not override.startswith("dataset")))
    sizes = ("sampling.batch_size=32", "trainer.precision=32-true", "test=false", "check=warn", "leakage=off")
    done = ranks(2, "train.py", *data, *encoder, *sizes, "trainer=ddp_cpu", f"paths.output_dir={tmp_path / 'run'}")
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert max(curve(tmp_path / "run", "val/average_precision")) == pytest.approx(figures["val/average_precision"], abs=1e-4)
    assert all(value > 0 for value in curve(tmp_path / "run", "val/loss"))


def test_a_typing_error_is_said_once(ranks):
    done = ranks(2, "train.py", "trainer=ddp_cpu", "loss=tripplet")
    assert [one.code for one in done] == [1, 1]
    assert "did you mean triplet?" in done[0].err
    assert done[1].err.strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "lightning"])
def test_torchrun_and_lightning_itself_start_the_ranks(by, tiny, environment, tmp_path):
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(torchrun if by == "torchrun" else []), "train.py", "trainer=ddp_cpu", *tiny, f"paths.output_dir={run}"]
    done = subprocess.run(command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("figures, checkpoints and the bundle are in", done.stdout + done.stderr)) == 1
    assert json.loads((run / "metrics.json").read_text())["test/recall_at_1"] > 0.3
    assert not list(tmp_path.glob("*ddp_process*"))
    assert "train_ddp_process_1.log" not in {path.name for path in run.iterdir()}
