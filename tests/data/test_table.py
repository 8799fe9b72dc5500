"""Tables: what a column is and what stands for a hole in it is learned from training alone."""

import json
import re

import pytest
import torch

from siamese.data.table import Table


def write(tmp_path, lines: list[str]):
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "t.csv"


@pytest.fixture
def wine(tmp_path):
    """Twelve classes of three rows: two numbers, one with a hole; a category; a code; a name; a column of one value."""
    lines = ["label,strength,sugar,colour,code,name,unit,split"]
    for row in range(36):
        label, split = row // 3, ("train" if row < 24 else "val" if row < 30 else "test")
        colour = "rose" if row == 33 else ("red", "white")[row % 2]
        lines.append(f"w{label},{row},{'' if row in (4, 31) else row / 2},{colour},{row % 3},name {row},%,{split}")
    return write(tmp_path, lines)


def test_columns_are_numbers_or_categories_as_training_says(wine):
    source = Table(wine, ignore=["name"], categories=["code"])
    train, test = source.split("train"), source.split("test")
    assert list(source.columns) == ["strength", "sugar", "colour", "code"]
    assert train.inputs.dtype == torch.float32
    assert train.inputs.shape == (24, 7)
    assert train.inputs[:2].tolist() == [[0, 0, 1, 0, 1, 0, 0], [1, 0.5, 0, 1, 0, 1, 0]]
    mean = sum(row / 2 for row in range(24) if row != 4) / 23
    assert train.inputs[4, 1] == pytest.approx(mean)
    assert test.inputs[1, 1] == pytest.approx(mean), "training's mean, of the test split nothing is learned"
    assert test.inputs[3].tolist() == [33, 16.5, 0, 0, 1, 0, 0], "a colour that training never has is none"
    assert (train.class_names, test.class_names) == ([f"w{label}" for label in (0, 1, 2, 3, 4, 5, 6, 7)], ["w10", "w11"])
    assert train.labels.tolist() == [row // 3 for row in range(24)]
    assert (train.ids[0], test.ids[0]) == ("t.csv, row 2", "t.csv, row 32")
    assert {finding.what.partition(",")[0]: finding.where for finding in source.findings() if finding.where} == {
        "columns of one value in training": ["unit"],
        "empty entries of train": ["t.csv, row 6: sugar"],
        "empty entries of test": ["t.csv, row 33: sugar"],
        "entries of test that training never has": ["t.csv, row 35: colour is 'rose'"],
    }
    untouched = Table(wine, ignore=["name"], categories=["code"])
    untouched.split("train")
    assert not any("test" in finding.what for finding in untouched.findings()), "of a split that is not asked for nothing is told"
    assert not any(finding.serious for finding in source.findings())


def test_what_other_programs_write_for_nothing_is_a_hole_in_a_column_of_numbers(tmp_path):
    words = ["", "NaN", "N/A", "null", "NA", "none"]
    lines = ["label,x,word,split", *(f"a{row // 2},{words[row] if row < 6 else row},{words[row]}w,train" for row in range(6))]
    lines += [f"b{row // 2},{row},w,train" for row in range(6)] + ["v,nan,w,val", "t,1,w,test"]
    source = Table(write(tmp_path, lines))
    assert source.split("train").inputs[:, 0].tolist() == [2.5] * 6 + [0, 1, 2, 3, 4, 5]
    assert source.split("val").inputs[0, 0] == 2.5
    assert source.columns["word"] == sorted({f"{word}w" for word in words}), "words are words"


def test_new_rows_become_what_the_table_s_are(wine):
    source = Table(wine, ignore=["name"], categories=["code"])
    rows = [{"strength": 3, "sugar": "1.5", "colour": "white", "code": 0}, {"colour": None}]
    found = source.features(rows)
    assert found[0].tolist() == source.split("train").inputs[3].tolist()
    assert found[1].tolist() == [pytest.approx(11.5), pytest.approx(source.columns["sugar"]), 0, 0, 0, 0, 0]
    with pytest.raises(
        ValueError, match=r"strength is a column of numbers in training, but has 'much': .*dataset\.categories=\[strength\]"
    ):
        source.features([{"strength": "much"}])
    assert source.features([]).shape == (0, 7)


def test_no_row_of_another_split_changes_what_training_is(wine, tmp_path):
    before = Table(wine, ignore=["name"]).split("train")
    lines = wine.read_text().splitlines()
    other = write(tmp_path / ".", [*lines[:25], *(line.replace("white", "grey").replace(",1,", ",7,") for line in lines[25:])])
    assert torch.equal(Table(other, ignore=["name"]).split("train").inputs, before.inputs)


def test_classes_are_shared_out_and_groups_stay_together(tmp_path):
    lines = ["kind,group,x", *(f"k{row // 2},{'g' if row in (0, 39) else ''},{row}" for row in range(40))]
    source = Table(write(tmp_path, lines), label="kind", val=0.2, test=0.2)
    splits = {name: set(source.split(name).class_names) for name in ("train", "val", "test")}
    assert {name: len(names) for name, names in splits.items()} == {"train": 12, "val": 4, "test": 4}
    assert any({"k0", "k19"} <= names for names in splits.values())
    assert list(source.columns) == ["x"], "a group is no feature"


@pytest.mark.parametrize(
    ("lines", "values", "message"),
    [
        (["label,x"] + [f"{row // 2},1" for row in range(40)], {}, "has no column to learn from, besides label, x"),
        (["label,x"] + [f"{row // 2},{row}" for row in range(40)], {"ignore": ["y"]}, "has no column 'y': it has 'label', 'x'"),
        (["klass,x", "a,1"], {}, "has no column 'label': it has 'klass', 'x'"),
        (
            ["label,x"] + [f"{row // 2},word {row}" for row in range(4000)],
            {},
            "x has 2,400 different entries, too many to be categories. Such as 'word",
        ),
        (
            ["label,x", *(f"{row // 2},{'1O' if row == 7 else row}" for row in range(40))],
            {"val": ["18"], "test": ["19"]},
            "t.csv, row 9: x is '1O' among numbers: mend it, or say dataset.categories=[x]",
        ),
        (["label,x,split", "a,1,train", "b,2,never"], {}, "row 3: split is 'never'"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(tmp_path, lines, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Table(write(tmp_path, lines), **values).split("train")


def test_a_number_that_is_none_in_another_split_is_named(tmp_path):
    lines = ["label,x,split", *(f"a{row // 2},{row},train" for row in range(8)), "v,1,val", "v,2,val", "t,much,test", "t,1,test"]
    source = Table(write(tmp_path, lines))
    assert len(source.split("train")) == 8
    with pytest.raises(ValueError, match="x is a column of numbers in training, but has 'much'"):
        source.split("test")


def test_another_split_is_refused(wine):
    with pytest.raises(ValueError, match="no split 'dev'"):
        Table(wine).split("dev")


def test_a_run_on_a_table(command, tmp_path):
    """Classes are clusters in two columns and a category; a third column, a thousand times as wide, is noise."""
    noise, lines = torch.Generator().manual_seed(0), ["label,x,y,noise,kind"]
    for label in range(40):
        centre = torch.rand(2, generator=noise)
        for _ in range(8):
            x, y, wide = (torch.randn(3, generator=noise) * torch.tensor([0.02, 0.02, 1000])).tolist()
            lines.append(f"c{label},{centre[0] + x:.4f},{centre[1] + y:.4f},{wide:.1f},{'abcd'[label % 4]}")
    path = write(tmp_path, lines)
    choices = ("dataset=table", f"dataset.path={path}", "encoder=mlp", "augmentation=none", "sampling.classes=8", "logger=none")
    done = command("train.py", *choices, "report=none", "trainer.max_epochs=4", f"paths.output_dir={tmp_path}/run")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["test/map_at_r"] > found["untrained/map_at_r"]
    done = command("train.py", *choices[:3], "sampling.classes=8", "logger=none", f"paths.output_dir={tmp_path}/augmented")
    assert done.code == 1
    assert done.err.strip().splitlines()[-1].startswith("error: augmentation: augmentation needs images [B, C, H, W]")
    assert "Traceback" not in done.err
