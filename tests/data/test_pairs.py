"""Listed pairs and triplets: nothing is lost or judged twice in silence, and no sample is in two splits unless the list says so."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siamese.data.er_magellan import ErMagellan, record
from siamese.data.pairs import Pairs, Triplets
from siamese.data.texts import as_texts


def write(tmp_path, rows: list[dict], name: str = "p.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(left: str, right: str, same: int, **more) -> dict:
    return {"left": left, "right": right, "same": same, **more}


def shown(samples) -> list[tuple[str, ...]]:
    texts = as_texts(samples.inputs)
    same = [()] * len(samples.tuples.rows) if samples.tuples.same is None else [(bool(same),) for same in samples.tuples.same]
    return [(*(texts[row] for row in rows), *more) for rows, more in zip(samples.tuples.rows.tolist(), same, strict=True)]


def splits(source) -> dict:
    return {name: source.split(name) for name in ("train", "val", "test")}


def test_each_sample_stands_once_and_each_pair_as_it_is_listed(tmp_path):
    rows = [pair("a", "b", 1), pair("b", "c", 0, kind="hard"), pair("v", "w", 1, split="val"), pair("t", "u", 0, split="dev")]
    rows = [{"split": "train", **row} for row in rows] + [pair("x", "y", 1, split="test"), pair("y", "z", 0, split="testing")]
    found = splits(Pairs(write(tmp_path, rows)))
    assert shown(found["train"]) == [("a", "b", True), ("b", "c", False)]
    assert shown(found["val"]) == [("v", "w", True), ("t", "u", False)]
    assert shown(found["test"]) == [("x", "y", True), ("y", "z", False)]
    assert found["train"].ids == ["p.jsonl, row 1, left", "p.jsonl, row 1, right", "p.jsonl, row 2, right"]
    assert found["train"].tuples.where == ["p.jsonl, row 1", "p.jsonl, row 2"]
    assert (found["train"].tuples.kinds, found["test"].tuples.kinds) == (["", "hard"], None)
    assert not found["train"].labelled
    assert str(found["train"]) == "3 samples in 2 pairs, texts"


def test_without_splits_no_sample_is_in_two(tmp_path):
    rng = np.random.default_rng(0)
    rows = [pair(f"g{g} {a}", f"g{g} {b}", int(rng.random() < 0.5)) for g in range(40) for a, b in rng.integers(0, 5, (6, 2)) if a != b]
    found = splits(Pairs(write(tmp_path, rows)))
    texts = {name: set(as_texts(samples.inputs)) for name, samples in found.items()}
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))
    assert sorted(pair for samples in found.values() for pair in shown(samples)) == sorted(
        (row["left"], row["right"], bool(row["same"])) for row in rows
    )
    share = {name: len(some) / sum(map(len, texts.values())) for name, some in texts.items()}
    assert share["val"] == pytest.approx(0.15, abs=0.04)
    assert share["test"] == pytest.approx(0.25, abs=0.04)
    again = splits(Pairs(write(tmp_path, rows[::-1], "q.jsonl")))
    assert {name: set(as_texts(samples.inputs)) for name, samples in again.items()} == texts


def test_what_is_empty_binds_nothing_together(tmp_path):
    good = [pair(f"{row} a", f"{row} b", row % 2) for row in range(100)]
    alone = splits(Pairs(write(tmp_path, good)))
    beside = splits(Pairs(write(tmp_path, good + [pair(f"{row} c", "", 1) for row in range(200)], "q.jsonl")))
    assert {name: shown(samples) for name, samples in alone.items()} == {name: shown(samples) for name, samples in beside.items()}


def test_one_long_text_takes_no_memory_of_the_others(tmp_path):
    rows = [{**pair(f"{row}", f"{row} b", row % 2), "split": ("train", "val", "test")[row % 3]} for row in range(300)]
    rows[0]["left"] = "long" * 100_000
    tracemalloc.start()
    Pairs(write(tmp_path, rows)).split("train")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_what_is_wrong_is_told_and_only_what_cannot_be_read_is_left_out(tmp_path):
    rows = [
        pair("a", "b", 1),
        pair("b", "a", 1),
        pair("c", "d", 1),
        pair("d", "c", 0),
        pair("e", "e", 1),
        pair("", "f", 0),
        pair("h", "i", 0),
    ]
    rows = [{**row, "split": "train"} for row in rows]
    rows += [pair("v", "w", 1, split="val", note=""), pair("v", "x", 0, split="val"), pair("y", "z", 1, split="test")]
    rows += [pair("x", "v", 0, split="test")]
    source = Pairs(write(tmp_path, rows))
    found = splits(source)
    assert len(found["train"].tuples.rows) == 6
    told = {finding.what: (finding.serious, finding.where) for finding in source.findings() if finding.where}
    assert told == {
        "columns that are not used": (False, ["note"]),
        "pairs of train that are listed more than once": (False, ["p.jsonl, row 2, as in row 1"]),
        "pairs of train that are called the same and different": (True, ["p.jsonl, row 4, and row 3"]),
        "pairs of train in which one sample stands twice": (False, ["p.jsonl, row 5"]),
        "pairs of train in which something is empty": (True, ["p.jsonl, row 6"]),
        "rows of test that val lists too": (True, ["p.jsonl, row 11"]),
    }


def test_paths_of_images_are_read_beside_the_table_and_broken_ones_left_out(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    rows = [pair("a.png", "b.png", 1), pair("c.png", "d.png", 0), pair("a.png", "gone.png", 0)]
    rows = [{**row, "split": split} for split in ("train", "val", "test") for row in rows]
    source = Pairs(write(tmp_path, rows), holds="images", size=8, cache=False)
    train = source.split("train")
    assert train.inputs.shape == (4, 3, 8, 8)
    assert [tuple(train.ids[row] for row in rows) for rows in train.tuples.rows.tolist()] == [("a.png", "b.png"), ("c.png", "d.png")]
    assert [finding.where for finding in source.findings() if finding.serious and "read" in finding.what] == [
        ["p.jsonl, row 3, right (there is no such file)"]
    ]


def test_triplets_are_read_and_stand_for_two_pairs_each(tmp_path):
    rows = [{"anchor": f"{s}a", "positive": f"{s}b", "negative": f"{s}c", "split": s} for s in ("train", "val", "test")]
    rows.append({"anchor": "trainc", "positive": "trainb", "negative": "trainc", "split": "train"})
    source = Triplets(write(tmp_path, rows))
    train = source.split("train")
    assert shown(train) == [("traina", "trainb", "trainc"), ("trainc", "trainb", "trainc")]
    pairs = train.tuples.pairs()
    assert pairs.rows.tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]
    assert pairs.same.tolist() == [True, False, True, False]
    assert str(train) == "3 samples in 2 triplets, texts"
    assert [finding.what for finding in source.findings() if finding.where] == ["triplets of train in which one sample stands twice"]


def test_a_subset_keeps_the_pairs_whose_samples_it_has(tmp_path):
    rows = [pair("a", "b", 1), pair("b", "c", 0, kind="k"), pair("c", "d", 1)]
    rows = [{**row, "split": split} for split in ("train", "val", "test") for row in rows]
    some = Pairs(write(tmp_path, rows)).split("train").subset(torch.tensor([1, 2, 3]))
    assert shown(some) == [("b", "c", False), ("c", "d", True)]
    assert some.tuples.where == ["p.jsonl, row 2", "p.jsonl, row 3"]
    assert some.tuples.kinds == ["k", ""]


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([pair("a", "b", 2, split="train")], {}, r"p.jsonl, row 1: same is '2', it must be 0, 1, false or true"),
        ([{"left": "a", "right": "b"}], {}, "has no column 'same', or nothing in it: needed are left, right, same"),
        ([pair("a", "b", 1)], {"holds": "sounds"}, "holds=sounds must be texts or images"),
        ([pair("a", "b", 1), pair("b", "c", 0)], {}, "cannot be shared out so that no sample is in two splits, give it a column split"),
        ([pair("a", "b", 1, split="trian")], {}, "p.jsonl, row 1: split is 'trian'"),
        ([pair("a", "b", 1, split="train"), pair("a", "c", 1)], {}, "p.jsonl, row 2 names no split, but other rows do"),
    ],
)
def test_bad_input_is_named(tmp_path, rows, arguments, said):
    more = [pair("v", "w", 1, split="val"), pair("t", "u", 1, split="test")] if "split" in rows[0] else []
    with pytest.raises(ValueError, match=said):
        Pairs(write(tmp_path, rows + more), **arguments).split("train")


def test_a_list_without_a_split_that_is_asked_for_is_refused(tmp_path):
    rows = [pair("a", "b", 1, split="train"), pair("v", "w", 1, split="val")]
    with pytest.raises(ValueError, match=r"p.jsonl cannot be shared out .* give it a column split: val and test take all 2 samples"):
        Pairs(write(tmp_path, rows)).split("test")


# --- ER-Magellan


def test_a_record_is_its_values_in_their_order():
    text = "COL title VAL sony camera COL description VAL  COL price VAL 9.99 "
    assert record(text) == "sony camera | 9.99"
    assert record("COL name VAL a VAL b COL price VAL 1") == "a VAL b | 1"
    assert record("COL name VAL colonel COLT") == "colonel COLT"
    assert record("COL title VAL use COL blue COL price VAL 3") == "use COL blue | 3"


def test_abt_buy_has_its_published_counts():
    folder = Path(os.environ.get("SIAMESE_DATA_DIR", "data")) / "abt_buy"
    if not folder.is_dir():
        pytest.skip("no Abt-Buy: set SIAMESE_DATA_DIR to the folder that has abt_buy/")
    counts = {name: (len(s.tuples.rows), int(s.tuples.same.sum())) for name, s in splits(ErMagellan(folder)).items()}
    assert counts == {"train": (5743, 616), "val": (1916, 206), "test": (1916, 206)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("COL a VAL b\tCOL a VAL c\n", "valid.txt, row 1: it must be COL name VAL"),
        ("a\tb\t1\n", "valid.txt, row 1: it must be COL name VAL"),
        (None, "valid.txt is missing: a data set of ER-Magellan has train.txt, valid.txt, test.txt"),
    ],
)
def test_a_broken_folder_is_named(tmp_path, content, said):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("COL a VAL b\tCOL a VAL c\t1\n")
    if content is not None:
        (tmp_path / "valid.txt").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        ErMagellan(tmp_path).split("train")
