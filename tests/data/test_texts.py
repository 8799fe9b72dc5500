"""Texts as tensors: nothing is lost on the way but what is cut, and what is empty is told."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siamese.data.clinc150 import Clinc150
from siamese.data.texts import Texts, as_bytes, as_texts


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_texts_come_back_as_they_were(texts):
    assert as_texts(as_bytes(texts)) == texts


def test_a_letter_that_is_cut_in_two_is_left_out():
    assert as_texts(as_bytes(["añb", "", "日本"], most=4)) == ["añb", "", "日"]
    assert as_bytes(["añb"], most=2).shape == (1, 2)
    assert as_texts(as_bytes(["añb"], most=2)) == ["a"]
    assert as_bytes([]).shape == (0, 0)


def write(tmp_path, rows: list[dict]):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def rows(classes: int = 8, each: int = 3) -> list[dict]:
    return [{"text": f"text {row} of {row // each}", "label": row // each} for row in range(classes * each)]


def test_splits_have_classes_of_their_own_and_every_text_is_in_one(tmp_path):
    source = Texts(write(tmp_path, rows()), val=["3", "4"], test=["0", "7"])
    splits = {name: source.split(name) for name in ("train", "val", "test")}
    assert (splits["val"].class_names, splits["test"].class_names) == (["3", "4"], ["0", "7"])
    assert splits["train"].kind == "texts"
    for samples in splits.values():
        assert samples.inputs.dtype == torch.uint8
        for text, label, where in zip(as_texts(samples.inputs), samples.labels.tolist(), samples.ids, strict=True):
            row = int(text.split()[1])
            assert samples.class_names[label] == str(row // 3)
            assert where == f"t.jsonl, row {row + 1}"
    assert sum(map(len, splits.values())) == 24
    assert not [finding for finding in source.findings() if finding.where]


def test_empty_long_and_unused_is_told_and_only_of_what_is_asked_for(tmp_path):
    table = rows()
    table[4] |= {"text": "  ", "note": "!"}
    table[5]["text"] = "long" * 9
    table[0]["text"] = None
    source = Texts(write(tmp_path, table), max_bytes=20, val=["3", "4"], test=["0", "7"])
    train = source.split("train")
    assert len(train) == 11
    assert as_texts(train.inputs)[1] == "long" * 5
    told = {finding.what: (finding.serious, finding.where) for finding in source.findings() if finding.where}
    assert told == {
        "texts of train that are empty": (True, ["t.jsonl, row 5"]),
        "texts of train that are cut after 20 bytes": (False, ["t.jsonl, row 6"]),
        "columns that are not used": (False, ["note"]),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"text": "question"}, r"no column 'question': it has 'label', 'text'"),
        ({"label": "intent"}, r"no column 'intent'"),
        ({"max_bytes": 3}, r"max_bytes=3 must be at least 4"),
        ({"val": ["9"]}, r"no class '9'"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        Texts(write(tmp_path, rows()), **arguments).split("train")


def test_half_a_letter_and_a_long_field_are_read(tmp_path):
    (tmp_path / "h.jsonl").write_text("".join(f'{{"text": "hi \\ud83d {row}", "label": {row // 3}}}\n' for row in range(24)))
    assert as_texts(Texts(tmp_path / "h.jsonl").split("train").inputs)[0].startswith("hi ?")
    (tmp_path / "l.csv").write_text("text,label\n" + "".join(f"{'x' * 200_000},{row // 3}\n" for row in range(24)))
    assert Texts(tmp_path / "l.csv").split("train").inputs.shape[1] == 1024


def test_a_split_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="no split 'trian'"):
        Texts(write(tmp_path, rows())).split("trian")


# --- CLINC150


def clinc(folder: Path, intents: int = 150) -> Path:
    """Four training questions, one for validation and two to test of each intent, one of none."""
    each = {"train": 4, "val": 1, "test": 2}
    content = {name: [[f"{name} {row} of {i}", f"intent {i}"] for i in range(intents) for row in range(n)] for name, n in each.items()}
    (folder / "data_full.json").write_text(json.dumps({**content, "oos_test": [["who am i", "oos"]]}))
    return folder


def test_intents_are_shared_out_and_training_has_the_authors_training_questions_alone(tmp_path):
    source = Clinc150(clinc(tmp_path))
    found = {name: source.split(name) for name in ("train", "val", "test")}
    assert {name: len(samples.class_names) for name, samples in found.items()} == {"train": 80, "val": 20, "test": 50}
    assert len({name for samples in found.values() for name in samples.class_names}) == 150
    assert {name: len(samples) for name, samples in found.items()} == {"train": 80 * 4, "val": 20 * 7, "test": 50 * 7}
    assert all(text.startswith("train ") for text in as_texts(found["train"].inputs))
    assert found["train"].ids[0].startswith("data_full.json, train ")
    other = Clinc150(tmp_path, split_seed=1)
    assert other.split("test").class_names != found["test"].class_names


def test_the_authors_own_splits_have_all_intents(tmp_path):
    source = Clinc150(clinc(tmp_path))
    assert (len(source.official("test")), len(source.official("test").class_names)) == (300, 150)
    assert as_texts(source.official("oos_test").inputs) == ["who am i"]
    with pytest.raises(ValueError, match="no split 'oos'"):
        source.official("oos")


@pytest.mark.parametrize("content", ["{", "[]", '{"train": []}', '{"test": [["one"]]}', '{"test": [[1, 2]]}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "data_full.json").write_text(content)
    with pytest.raises(ValueError, match=r"data_full.json is damaged or another file"):
        Clinc150(tmp_path).split("train")
    (tmp_path / "data_full.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_full.json is missing: run `python scripts/download.py clinc150`"):
        Clinc150(tmp_path).split("train")


def test_the_published_counts():
    folder = Path(os.environ.get("SIAMESE_DATA_DIR", "data")) / "clinc150"
    if not folder.is_dir():
        pytest.skip("no CLINC150: run `python scripts/download.py clinc150`, or set SIAMESE_DATA_DIR")
    source = Clinc150(folder)
    assert [len(source.official(name)) for name in ("train", "val", "test", "oos_test")] == [15000, 3000, 4500, 1000]
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [80 * 100, 20 * 150, 50 * 150]
