"""What a GPU does is what a processor does: needs one, and is left out without."""

import csv
import json

import pytest
import torch

from siamese import judging
from siamese.bundle import Bundle
from siamese.evaluation import evaluate
from siamese.recognition import Recognizer
from tests.test_evaluation import COSINE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    """The directory of a tiny run on a GPU, in bfloat16, with a distance that has weights of its own."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    fit(folder, "trainer=gpu", "distance=learned", "loss=contrastive")
    return folder


def test_a_run_is_judged_where_it_was_trained(fit, tmp_path, monkeypatch):
    judged, judge = [], judging.judge_samples

    def noting(model, *rest, **more):
        judged.append(str(model.device))
        return judge(model, *rest, **more)

    monkeypatch.setattr(judging, "judge_samples", noting)
    fit(tmp_path / "run", "trainer=gpu")
    assert {*judged} == {"cpu", "cuda:0"}  # the raw input has no weights
    assert judged.count("cuda:0") >= 3


def test_figures_of_a_run_are_those_of_a_processor(run, fit, tmp_path):
    found = json.loads((run / "metrics.json").read_text())
    assert {"raw/recall_at_1", "untrained/recall_at_1", "test/recall_at_1", "test/omniglot_error"} <= found.keys()
    here = fit(tmp_path / "cpu", "trainer=cpu", "distance=learned", "loss=contrastive")
    for name in ("raw/map_at_r", "untrained/map_at_r", "untrained/auc"):
        assert found[name] == pytest.approx(here[name], abs=2e-3), name


def test_figures_are_those_of_a_processor():
    embeddings = torch.randn(900, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(900) % 60
    here, there = (evaluate(embeddings.to(device), labels, COSINE).figures for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    assert there == pytest.approx(here, abs=1e-4)


def test_a_run_goes_on_where_it_ended(fit, tmp_path):
    steady = ("trainer=gpu", "scheduler=none", "test=false")
    whole = fit(tmp_path / "whole", *steady, "trainer.max_epochs=4")
    fit(tmp_path / "half", *steady, "trainer.max_epochs=2")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    again = fit(tmp_path / "again", *steady, "trainer.max_epochs=4", f"ckpt={last}")
    curves = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "again")]
    losses = [[float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]][-4:] for lines in curves]
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)
    assert again.keys() == whole.keys()


@pytest.mark.parametrize("words", [["compile=true"], ["trainer=ddp", "trainer.devices=1"], ["trainer.precision=16-mixed"], ["views=2"]])
def test_trains(fit, tmp_path, words):
    found = fit(tmp_path / "run", "trainer=gpu", *words)
    assert 0 < found["test/recall_at_1"] <= 1


def test_a_gallery_made_on_a_gpu_answers_as_on_a_processor(run, tmp_path):
    model = Bundle.load(run / "bundle.safetensors")
    images = torch.randint(256, (6, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = model.scores(model.embed(images), model.embed(images))
    people = Recognizer(model)
    assert people.model.device.type == "cuda"
    people.enrol(list("abcdef"), images, [f"{name}.png" for name in "abcdef"])
    people.save(tmp_path / "gallery.safetensors")
    again = Recognizer.load(tmp_path / "gallery.safetensors")
    for one in (people, again):
        for row, found in enumerate(one.gallery.search(one.model.embed(images), 6)):
            assert {match.label: match.score for match in found} == pytest.approx(
                dict(zip("abcdef", expected[row].tolist(), strict=True)), abs=1e-3
            )
