"""The report on the data, and the guard against leakage: what they say, write, refuse and leave out."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siamese.data.checking import check, guard
from siamese.data.glyphs import Glyphs
from siamese.data.module import SiameseData
from siamese.data.samples import Finding, Samples, Source
from siamese.data.texts import as_bytes


def samples(inputs: torch.Tensor, classes: str, prefix: str = "") -> Samples:
    names = sorted(set(classes))
    return Samples(inputs, torch.tensor([names.index(c) for c in classes]), names, [f"{prefix}{row}" for row in range(len(inputs))])


def random(count: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_is_said_of_data_in_order(tmp_path, caplog):
    check({"train": samples(random(6), "aabbcc"), "val": samples(random(4, 1), "ddee")}, [], tmp_path, "error")
    assert caplog.messages == []
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_said_once_the_serious_first(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    inputs = random(8)
    inputs[1], inputs[4], inputs[6] = inputs[0], inputs[2], 7
    splits = {"train": samples(inputs, "aabbccdd", "t"), "val": samples(random(3, 1), "aae", "v")}
    found = [Finding(True, "images that cannot be read", ["x.png (it is empty)"], "delete them"), Finding(False, "nothings", [], "-")]
    check(splits, found, tmp_path, "warn")
    assert [message.partition(", such as ")[0] for message in caplog.messages] == [
        "check: images that cannot be read: 1",
        "check: classes that train and val share: 1",
        "check: inputs of train that are of one value and show nothing: 1",
        "check: inputs of train that occur in two classes: 1",
        "check: inputs of train that occur twice: 1",
        "check: classes of val that have one sample: 1",
        f"check: all of it is in {caplog.messages[-1].rpartition(' ')[2]}",
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2 + ["INFO"] * 5
    rows = table(tmp_path / "check.csv")
    assert [row["where"] for row in rows] == ["x.png (it is empty)", "a", "t6", "t4 (c) = t2 (b)", "t1 = t0", "v2"]
    assert [row["serious"] for row in rows] == ["True"] * 2 + ["False"] * 4
    assert all(row["remedy"] for row in rows)
    with pytest.raises(ValueError, match=r"images that cannot be read: 1, such as x.png .* \(and 1 more, see above\): delete them, or say"):
        check(splits, found, tmp_path, "error")


def test_only_what_is_serious_stops_a_run(tmp_path):
    check({"train": samples(random(3), "aab")}, [], tmp_path, "error")
    assert (tmp_path / "check.csv").is_file()


def test_off_looks_at_nothing_but_tells_what_was_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    check({"train": samples(random(3), "aab")}, [Finding(True, "broken", ["x"], "mend")], tmp_path, "off")
    assert [message.partition(",")[0] for message in caplog.messages[:-1]] == ["check: broken: 1"]
    check({"train": samples(random(3), "aab")}, [], tmp_path / "nowhere", "off")


def test_tables_with_holes_are_named(tmp_path):
    values = torch.randn(4, 3)
    values[2, 1] = torch.nan
    with pytest.raises(ValueError, match="inputs of train with NaN or infinite values: 1, such as r2: mend or leave them out, or say"):
        check({"train": samples(values, "aabb", "r")}, [], tmp_path, "error")


def test_a_table_of_one_column_shows_what_it_has_to(tmp_path):
    check({"train": samples(torch.rand(6, 1), "aabbcc")}, [], tmp_path, "error")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [lambda out: check({}, [], out, "loud"), lambda out: guard(samples(random(1), "a"), {}, out, "loud")])
def test_another_mode_is_refused(tmp_path, call):
    with pytest.raises(ValueError, match="loud must be one of error, warn"):
        call(tmp_path)


@pytest.fixture
def leaking() -> tuple[Samples, dict[str, Samples]]:
    training, val, test = random(20), random(10, 1), random(10, 2)
    val[3], test[0], test[1] = training[5], training[5], (training[7].float() * 0.8).to(torch.uint8)
    return samples(training, "aabb" * 5, "t"), {"val": samples(val, "cd" * 5, "v"), "test": samples(test, "ef" * 5, "w")}


def test_leakage_is_told_listed_and_drawn(leaking, tmp_path, caplog):
    assert guard(*leaking, tmp_path, "warn").tolist() == []
    (message,) = caplog.messages
    assert message.startswith(
        "leakage: judged samples that training has, or nearly has: 3 (equal pairs: 2), such as v3 of val, which is t5: see "
    )
    rows = table(tmp_path / "leakage.csv")
    assert [(row["split"], row["training_sample"], row["sample"], row["training_class"], row["class"]) for row in rows] == [
        ("val", "t5", "v3", "a", "d"),
        ("test", "t5", "w0", "a", "e"),
        ("test", "t7", "w1", "b", "f"),
    ]
    assert [float(row["alike"]) for row in rows[:2]] == [1, 1]
    assert 0.9 < float(rows[2]["alike"]) <= 1
    drawn = np.asarray(Image.open(tmp_path / "leakage.png").convert("L"))
    assert min(drawn.shape) > 100
    assert drawn.std() > 10
    assert not list(tmp_path.glob("*.part"))


def test_leakage_can_stop_the_run_be_dropped_or_be_ignored(leaking, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"training has, or nearly has: 3 .*leakage=drop does so"):
        guard(*leaking, tmp_path, "error")
    assert guard(*leaking, tmp_path, "drop").tolist() == [5, 7]
    assert caplog.messages[-1].endswith("Training goes without its 2")
    (tmp_path / "leakage.csv").unlink()
    assert guard(*leaking, tmp_path, "off").tolist() == []
    assert not (tmp_path / "leakage.csv").exists()


def test_all_that_leaks_is_dropped_not_the_first_of_each_alone(tmp_path):
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    training = Samples(rows, torch.tensor([0, 0, 1, 1]), ["a", "b"], list("tuvw"))
    judged = Samples(rows[[1, 2, 1]], torch.tensor([0, 1, 1]), ["c", "d"], list("xyz"))
    assert guard(training, {"val": judged}, tmp_path, "drop").tolist() == [0, 1, 2]


def test_a_split_that_leaves_nothing_to_compare_is_named():
    class Lonely(Source):
        def split(self, name):
            return samples(random(3), "abc")

    data = SiameseData(Lonely(), None)
    with pytest.raises(ValueError, match=r"the val split has 3 samples of 3 classes.*: judging needs two classes, one of them with two"):
        _ = data.val


def test_without_leakage_nothing_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert guard(samples(random(20), "ab" * 10), {"val": samples(random(9, 1), "c" * 9)}, tmp_path, "error").tolist() == []
    assert caplog.messages == []
    assert not list(tmp_path.iterdir())


def test_leakage_of_texts_is_listed_with_both_texts(tmp_path):
    def texts(*those: str) -> Samples:
        return Samples(as_bytes(those), torch.arange(len(those)), list(those), [f"row {row}" for row in range(len(those))])

    training = texts("how much is left on my account", "set a timer", "play some music by the sea please")
    judged = texts("How much is left on my account?!", "turn the lights off in every room", "set a timer")
    assert guard(training, {"test": judged}, tmp_path, "drop").tolist() == [0, 1]
    assert [(row["training_sample"], row["sample"], row["training_text"], row["text"]) for row in table(tmp_path / "leakage.csv")] == [
        ("row 1", "row 2", "set a timer", "set a timer"),
        ("row 0", "row 0", "how much is left on my account", "How much is left on my account?!"),
    ]
    assert not (tmp_path / "leakage.png").exists()


class Letters(Source):
    def split(self, name):
        return samples(random(8), "aabbbccc")


def test_what_is_left_out_is_gone_from_training_with_classes_that_become_empty():
    data = SiameseData(Letters(), None)
    before = data.train
    data.leave_out(torch.tensor([], dtype=torch.int64))
    assert data.train is before
    data.leave_out(torch.tensor([0, 1, 4]))
    assert data.train.class_names == ["b", "c"]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.train.ids == ["2", "3", "5", "6", "7"]
    assert torch.equal(data.train.inputs, random(8)[[2, 3, 5, 6, 7]])


def test_a_list_of_tuples_would_name_other_rows():
    import functools

    data = SiameseData(Letters(), functools.partial(print, file="pairs.csv"))
    with pytest.raises(ValueError, match=r"where sampling\.file lists them"):
        data.leave_out(torch.tensor([0]))


def test_the_mean_of_the_training_inputs_is_taken_in_parts():
    inputs = torch.randint(0, 256, (500, 3, 65, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = SiameseData(Letters(), None)
    data.train = Samples(inputs, torch.zeros(500, dtype=torch.int64), ["a"], [str(row) for row in range(500)])
    found, flat = data.standardization(), inputs.transpose(0, 1).flatten(1).double() / 255
    assert found["mean"] == pytest.approx(flat.mean(1).tolist(), rel=1e-12)
    assert found["std"] == pytest.approx(flat.std(1).tolist(), rel=1e-12)


# --- whole runs


def test_a_run_on_a_folder_of_ones_own(command, drawings, tmp_path):
    """As a newcomer would; with a broken file, and with a test image that was put into training too, under another label."""
    mine = tmp_path / "mine"
    for place, path in enumerate(sorted((drawings / "images_background_small1").rglob("*.png"))):
        (mine / f"class{place // 6:02d}").mkdir(parents=True, exist_ok=True)
        (mine / f"class{place // 6:02d}" / path.name).write_bytes(path.read_bytes())
    (mine / "class05" / "broken.png").write_text("no picture")
    (mine / "class05" / "leak.png").write_bytes((mine / "class39" / "01.png").read_bytes())
    short = ["dataset=images", f"dataset.path={mine}", "dataset.size=16", "dataset.channels=1", "dataset.test=[class38,class39]"]
    short += ["dataset.val=[class36,class37]", "encoder.widths=[8,8,8]", "sampling.classes=8", "debug=fast", "logger=none"]
    environment = {"SIAMESE_DATA_DIR": str(tmp_path / "data")}

    done = command("train.py", *short, f"paths.output_dir={tmp_path}/stopped", **environment)
    assert done.code == 1
    message = done.err.strip().splitlines()[-1]
    assert message.startswith("error: check: images of train that cannot be read: 1, such as class05/broken.png (it is no image)")
    assert message.endswith("replace or delete them, or say check=warn")

    dropped = ("check=warn", "leakage=drop", f"paths.output_dir={tmp_path}/run")
    done = command("train.py", *short, *dropped, **environment)
    assert done.code == 0, done.err
    assert [(row["split"], row["training_sample"], row["sample"]) for row in table(tmp_path / "run" / "leakage.csv")] == [
        ("test", "class05/leak.png", "class39/01.png")
    ]
    assert "train on 217 samples of 36 classes" in done.out + done.err
    judged = ("report=none", f"paths.output_dir={tmp_path}/judged")
    done = command("evaluate.py", f"ckpt={tmp_path}/run/bundle.safetensors", *judged, **environment)
    assert done.code == 0, done.err


def test_a_data_set_without_its_path_says_so(command, tmp_path):
    done = command("train.py", "dataset=images", f"paths.output_dir={tmp_path}/run")
    assert (done.code, done.err) == (1, "error: dataset.path has no value: say dataset.path=...\n")
    assert not (tmp_path / "run").exists()


def test_no_letter_that_the_default_run_judges_is_one_that_it_trains_on(tmp_path):
    glyphs = Glyphs()
    guard(glyphs.split("train"), {"test": glyphs.split("test")}, tmp_path, "error")
    assert list(tmp_path.iterdir()) == []
