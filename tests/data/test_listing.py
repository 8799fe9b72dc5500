"""Tables are read by row, and classes are shared out: disjoint, by group, by name, and little moved by one more."""

import json
import re
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from siamese.data.listing import Listed, rows, share_out, split_name

TABLES = {
    "table.csv": "label,path , note\ncat,1.jpg,x\n\ndog,2.jpg,\n",
    "table.tsv": "label\tpath\tnote\ncat\t1.jpg\tx\n\ndog\t2.jpg\t\n",
    "table.jsonl": '{"label": "cat", "path": "1.jpg", "note": "x"}\n\n{"label": "dog", "path": "2.jpg", "note": null}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_its_rows_with_their_numbers(tmp_path, name):
    (tmp_path / name).write_text("\ufeff" + TABLES[name], encoding="utf-8")
    found, others = rows(tmp_path / name, ("path", "label"), ("split",))
    first, second = (1, 3) if name.endswith("jsonl") else (2, 4)
    cat, dog = ({"path": "1.jpg", "label": "cat", "note": "x"}, {"path": "2.jpg", "label": "dog", "note": ""})
    assert found == [(first, {**cat, "split": ""}), (second, {**dog, "split": ""})]
    assert others == ["note"]


def test_parquet_is_read_where_pyarrow_is_and_else_says_so(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"path": ["1.jpg"], "label": [7]}), tmp_path / "table.parquet")
    assert rows(tmp_path / "table.parquet", ("path", "label"))[0] == [(1, {"path": "1.jpg", "label": "7"})]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=re.escape("pip install -e '.[parquet]'")):
        rows(tmp_path / "table.parquet", ("path",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "path,klass\n1.jpg,cat\n", "t.csv has no column 'label': it has 'path', 'klass'"),
        ("t.csv", "path,label\n1.jpg,cat\n2.jpg\n", "t.csv, row 3: it has 1 entries, the header has 2"),
        ("t.csv", "path,label\n1.jpg,cat\n2.jpg,\n", "t.csv, row 3: label is empty"),
        ("t.csv", "path,label\n", "t.csv has no rows"),
        ("t.csv", "path,label\n1.jpg,NaN\n", "t.csv, row 2: label is NaN: fill it, or delete the row"),
        ("t.csv", "path,label,Split\n1.jpg,cat,test\n", "t.csv has a column 'Split': write 'split', in small letters"),
        ("t.jsonl", '{"path": ["1.jpg"], "label": "cat"}\n', "t.jsonl, row 1: path is a list or an object"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.csv", "path,path\n1,2\n", "two columns of the same name"),
        ("t.csv", 'path,label\n"1.jpg,cat\n', "t.csv, row 3: a quotation mark is missing, here or above"),
        ("t.jsonl", '{"path": "1.jpg", "label": "cat"}\n{"path": \n', "t.jsonl, row 2 is no JSON (Expecting value"),
        ("t.jsonl", "[1, 2]\n", "t.jsonl, row 1: it must be an object"),
        ("t.txt", "path\n", "t.txt is no table: its name must end in .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_a_broken_table_is_named_with_its_row(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(tmp_path / name, ("path", "label"), ("split",))


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="is a folder, here a table is needed"):
        rows(tmp_path, ("path",))


def test_bytes_that_are_no_utf8_are_named_with_their_row(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"path,label\n1.jpg,caf\xe9\n")
    with pytest.raises(ValueError, match=r"t.csv, row 2: the byte 0xe9 is no UTF-8: save the table as UTF-8"):
        rows(tmp_path / "t.csv", ("path",))


def test_numbers_are_labels_too(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "1.jpg", "label": 7}))
    assert rows(tmp_path / "t.jsonl", ("path", "label"))[0][0][1]["label"] == "7"


def test_splits_go_by_several_names():
    assert [split_name(word, "") for word in ("", "Train", "validation", "DEV", "testing")] == ["", "train", "val", "val", "test"]
    with pytest.raises(ValueError, match="row 3: split is 'holdout', it must be train, val or test"):
        split_name("holdout", "row 3")


def listed(classes: int, each: int = 2, **more) -> list[Listed]:
    return [Listed(f"{c}/{n}", f"class{c:03d}", "", **more) for c in range(classes) for n in range(each)]


def by_split(samples: list[Listed]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for sample in samples:
        found.setdefault(sample.split, set()).add(sample.label)
    return found


@given(
    groups=st.lists(st.tuples(st.integers(0, 39), st.sampled_from(["", "a", "b", "c", "d", "e", "f"])), min_size=60, max_size=120),
    seed=st.integers(0, 5),
)
def test_classes_and_groups_are_on_one_side(groups, seed):
    samples = [Listed(str(row), f"class{c}", "", group=group) for row, (c, group) in enumerate(groups)] + listed(20)
    found = share_out(samples, 0.2, 0.3, seed)  # the twenty without a group can always be divided
    assert [(sample.what, sample.label, sample.group) for sample in found] == [(s.what, s.label, s.group) for s in samples]
    splits = by_split(found)
    assert set(splits) == {"train", "val", "test"}
    total = len({sample.label for sample in samples})
    for name, share in (("val", 0.2), ("test", 0.3)):
        assert 2 <= len(splits[name]) <= max(round(share * total), 2)
    for value in ("label", "group"):
        of = {}
        for sample in found:
            if getattr(sample, value):
                of.setdefault(getattr(sample, value), set()).add(sample.split)
        assert all(len(names) == 1 for names in of.values())


def test_the_shares_are_met_and_one_more_class_moves_few():
    splits, more = by_split(share_out(listed(100), 0.15, 0.25)), by_split(share_out(listed(101), 0.15, 0.25))
    assert {name: len(classes) for name, classes in splits.items()} == {"train": 60, "val": 15, "test": 25}
    assert sum(len(splits[name] - more[name]) for name in splits) <= 4
    assert by_split(share_out(listed(100), 0.15, 0.25, seed=1)) != splits
    assert share_out(listed(100), 0.15, 0.25) == share_out(listed(100), 0.15, 0.25)


def test_classes_can_be_named_and_groups_not_divided():
    splits = by_split(share_out(listed(10), ["class003", "class004"], ["class000", "class001"]))
    assert splits["val"] == {"class003", "class004"}
    assert splits["test"] == {"class000", "class001"}
    with pytest.raises(ValueError, match="val: there is no class 'class03' to take, did you mean 'class003'"):
        share_out(listed(10), ["class03"], 0.2)
    together = [*listed(10), Listed("x", "class000", "", group="g"), Listed("y", "class001", "", group="g")]
    with pytest.raises(ValueError, match="test: the classes 'class000' and 'class001' share a group, so name both or neither"):
        share_out(together, 0.2, ["class000"])
    assert by_split(share_out(together, 0.2, ["class000", "class001"]))["test"] == {"class000", "class001"}


def test_what_samples_say_of_their_split_stands():
    given_all = [Listed("1", "a", "", "train"), Listed("2", "a", "", "val"), Listed("3", "b", "", "test")]
    assert share_out(given_all, 0.5, 0.5) == given_all
    some = [*listed(10), Listed("x", "other", "", "test")]
    splits = by_split(share_out(some, 0.2, 0.2))
    assert splits["test"] == {"other"}
    assert len(splits["val"]) == 2
    assert len(splits["train"]) == 8
    no_val = [*listed(10, split="train"), Listed("x", "other", "", "test")]
    splits = by_split(share_out(no_val, 0.2, 0.2))
    assert (len(splits["train"]), len(splits["val"]), splits["test"]) == (8, 2, {"other"})


@pytest.mark.parametrize(
    ("classes", "val", "test", "message"),
    [
        (10, 0.0, 0.2, "val=0.0 must be a share of the classes, above 0 and below 1"),
        (10, 0.2, 1.5, "test=1.5 must be a share"),
        (10, "many", 0.2, "val=many must be a share"),
        (3, 0.2, 0.2, "val=0.2 of 3 classes gives it fewer than two"),
        (4, 0.5, 0.5, "val and test take all 4 classes and leave none to train on"),
    ],
)
def test_shares_that_cannot_be_are_refused(classes, val, test, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        share_out(listed(classes), val, test)


def test_one_group_over_all_classes_leaves_nothing_to_divide():
    with pytest.raises(ValueError, match="groups bind 10 of them together"):
        share_out(listed(10, group="same"), 0.2, 0.2)
