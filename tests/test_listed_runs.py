"""Whole runs on listed pairs and triplets: trained and judged by the list, with thresholds from validation."""

import csv
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

import evaluate
import train
from scripts import compare
from siamese.bundle import Bundle
from siamese.config import InputError, compose
from siamese.data.pairs import Pairs

SPLITS = {"train": (0, 60), "val": (60, 90), "test": (90, 120)}


@pytest.fixture(scope="module")
def signatures(tmp_path_factory):
    """Three tables of images: 120 patterns drawn three times, as pairs with kinds and as triplets, and pairs of training alone."""
    folder, rng = tmp_path_factory.mktemp("signatures"), np.random.default_rng(0)
    for pattern in range(120):
        cells = rng.integers(0, 2, (4, 4))
        for copy in range(3):
            noisy = np.kron(cells, np.ones((4, 4))) * 80 + rng.integers(0, 175, (16, 16))
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{pattern}_{copy}.png")
    pairs, triplets = [("left", "right", "same", "split", "kind")], [("anchor", "positive", "negative", "split")]
    for split, (first, last) in SPLITS.items():
        for pattern in range(first, last):
            other = first + (pattern + 1 - first) % (last - first)
            pairs += [(f"{pattern}_0.png", f"{pattern}_{copy}.png", 1, split, "") for copy in (1, 2)]
            pairs.append((f"{pattern}_0.png", f"{other}_0.png", 0, split, ("random", "skilled")[pattern % 2]))
            triplets.append((f"{pattern}_0.png", f"{pattern}_1.png", f"{other}_2.png", split))
    for name, lines in (("pairs", pairs), ("triplets", triplets)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(lines)
    return folder


def run(folder, table, *overrides: str) -> dict[str, float]:
    kind = table.stem
    sizes = (
        "dataset.holds=images",
        "dataset.size=16",
        "dataset.channels=1",
        "dataset.cache=false",
        "encoder=conv4",
        "encoder.widths=[8,8,8]",
    )
    short = ("logger=none", "report=none", "trainer.max_epochs=8", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1")
    config = compose(["experiment=matching", f"dataset={kind}", f"dataset.path={table}", *sizes, *short, *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    config["paths"]["output_dir"] = str(folder)
    return train.train(config)


@pytest.fixture(scope="module")
def pair_run(signatures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair run")
    return run(folder, signatures / "pairs.csv"), folder


def test_the_figures_are_those_of_the_list_by_thresholds_from_validation(signatures, pair_run):
    figures, folder = pair_run
    model = Bundle.load(folder / "bundle.safetensors")
    source = Pairs(signatures / "pairs.csv", "images", size=16, channels=1, cache=False)
    scores, same = {}, {}
    for split in ("val", "test"):
        samples = source.split(split)
        matrix = model.scores(embeddings := model.embed(samples.inputs), embeddings)
        scores[split] = np.array([matrix[a, b].item() for a, b in samples.tuples.rows.tolist()])
        same[split] = samples.tuples.same.numpy()
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(same["val"], scores["val"])
    best = thresholds[(2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1].argmax()]
    assert figures["val/f1_threshold"] == figures["test/f1_threshold"] == pytest.approx(best, abs=1e-5)
    assert figures["test/f1"] == pytest.approx(sklearn.metrics.f1_score(same["test"], scores["test"] >= best - 1e-6))
    assert figures["test/threshold"] == figures["val/threshold"]
    accepted = scores["test"] >= figures["val/threshold"] - 1e-6
    assert figures["test/accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(same["test"], accepted))
    assert figures["test/auc"] == pytest.approx(sklearn.metrics.roc_auc_score(same["test"], scores["test"]), abs=1e-5)
    skilled = [row for row, kind in enumerate(samples.tuples.kinds) if kind != "random"]
    assert figures["test/skilled/auc"] == pytest.approx(
        sklearn.metrics.roc_auc_score(same["test"][skilled], scores["test"][skilled]), abs=1e-5
    )
    assert {"raw/f1", "untrained/f1", "test/random/eer", "test/tar_at_far_1e2"} - figures.keys() == {"test/tar_at_far_1e2"}, "30 pairs"
    assert figures["test/auc"] > figures["untrained/auc"]


def test_the_best_checkpoint_is_the_one_that_the_curves_say(pair_run):
    figures, folder = pair_run
    with open(folder / "metrics.csv") as lines:
        curve = [float(row["val/average_precision"]) for row in csv.DictReader(lines) if row["val/average_precision"]]
    assert len(curve) == 8
    assert figures["val/average_precision"] == pytest.approx(max(curve), abs=1e-5)


def test_a_bundle_is_judged_again_with_the_same_figures(pair_run, tmp_path):
    figures, folder = pair_run
    config = compose([f"ckpt={folder / 'bundle.safetensors'}", "report=none"], "evaluate")
    config["paths"]["output_dir"] = str(tmp_path)
    again = evaluate.evaluate(config)
    assert {k: v for k, v in again.items() if k.startswith(("val", "test", "raw"))} == {
        k: v for k, v in figures.items() if k.startswith(("val", "test", "raw"))
    }


def test_runs_are_compared(pair_run, tmp_path):
    _, folder = pair_run
    for seed, loss in enumerate(("contrastive", "contrastive", "bce", "bce")):
        shutil.copytree(folder, tmp_path / str(seed))
        (tmp_path / str(seed) / ".hydra").mkdir()
        (tmp_path / str(seed) / ".hydra" / "config.yaml").write_text(json.dumps({"seed": seed % 2, "paths": {}}))
        hydra = {"hydra": {"runtime": {"choices": {"loss": loss}}}}
        (tmp_path / str(seed) / ".hydra" / "hydra.yaml").write_text(json.dumps(hydra))
    (found,), _ = compare.tables([str(tmp_path)], ["map_at_r", "f1"])
    assert found.figures == ["test/f1"]
    assert len(found.rows) == 2


def test_triplets_are_trained_and_judged(signatures, tmp_path):
    figures = run(tmp_path, signatures / "triplets.csv", "sampling=triplets", "loss=triplet")
    assert figures["test/triplet_accuracy"] > figures["untrained/triplet_accuracy"]
    assert figures["test/triplet_accuracy"] > 0.7
    run(tmp_path, signatures / "triplets.csv")
    assert "test/triplet_accuracy" in json.loads((tmp_path / "metrics.json").read_text())


def test_texts_are_trained_by_pairs(transformer, tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    lines = ["left,right,same,split"]
    for split in ("train", "val", "test"):
        for row in range(48):
            one, other = rng.choice(words, (2, 3))
            lines.append(f"{' '.join(one)},{' '.join([*one[:2], other[0]] if row % 2 else other)},{row % 2},{split}")
    (tmp_path / "p.csv").write_text("\n".join(lines))
    sizes = ("encoder.max_length=32", "encoder.lr=0.003", "sampling.batch_size=16", "trainer.max_epochs=8")
    short = (*sizes, "trainer.check_val_every_n_epoch=1", "logger=none", "report=none", "check=warn", "leakage=off")
    config = compose(["experiment=matching", "dataset=pairs", f"dataset.path={tmp_path / 'p.csv'}", f"encoder.model={transformer}", *short])
    config["paths"]["output_dir"] = str(tmp_path)
    figures = train.train(config)
    with open(tmp_path / "metrics.csv") as lines:
        curve = [float(row["val/loss"]) for row in csv.DictReader(lines) if row.get("val/loss")]
    assert len(curve) == 8
    assert min(curve) < 0.9 * curve[0]
    assert figures["test/auc"] > 0.6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optimized_metric=val/map_at_r"],
            r"val/map_at_r is not computed of .* pairs.*: say experiment=matching, or take one of val/auc",
        ),
        (["sampling=balanced", "loss=supcon"], r"sampling=balanced goes by labels. Say sampling=pairs"),
        (["sampling=triplets", "loss=triplet"], r"these are pairs, say sampling=pairs"),
        (["val_classes=3"], r"lists pairs and has no classes: say val_classes=null"),
    ],
)
def test_what_does_not_go_with_a_list_is_refused(signatures, tmp_path, overrides, said):
    with pytest.raises(InputError, match=said):
        run(tmp_path, signatures / "pairs.csv", *overrides)


def test_training_pairs_that_leak_are_dropped_with_their_samples(signatures, tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text((signatures / "pairs.csv").read_text() + "0_0.png,90_0.png,0,test,\n")
    for image in signatures.glob("*.png"):
        (tmp_path / image.name).symlink_to(image)
    config = compose(
        [
            *(
                "experiment=matching",
                "dataset=pairs",
                f"dataset.path={table}",
                "dataset.holds=images",
                "dataset.size=16",
                "dataset.cache=false",
            ),
            *("encoder=conv4", "encoder.widths=[8,8]", "leakage=drop"),
        ]
    )
    config["paths"]["output_dir"] = str(tmp_path)
    data, _, _ = train.assemble(config)
    assert "0_0.png" not in data.train.ids
    assert len(data.train.tuples.rows) <= 180 - 3
