"""The command line of recognition: what a user types, what is printed, and with what code it ends."""

import csv
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from test_recognition import DECISION, ROWS, TEXTS, model, pictures, written

import recognize
import siamese.archive
import siamese.recognition
from siamese.recognition import Recognizer


@pytest.fixture
def run(capsys):
    """run(arguments) -> (exit code, what was printed, what was said); errors are one line."""

    def run(*arguments):
        try:
            code = recognize.main(list(map(str, arguments)))
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capsys.readouterr()
        if code == 2 and "usage:" not in err:
            assert sum("error: " in line for line in err.splitlines()) <= 1
            assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def told(run):
    """told(arguments) -> (exit code, what was printed as JSON)."""

    def told(*arguments):
        code, out, _ = run(*arguments, "--json")
        return code, json.loads(out)

    return told


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, six people to enrol and pictures of them and of others."""
    monkeypatch.chdir(tmp_path)
    model().save("model.safetensors")
    for n, image in enumerate(pictures(6)):
        folder = tmp_path / "enrolment" / f"person {n}"
        folder.mkdir(parents=True)
        Image.fromarray(image[0].numpy()).save(folder / "1 (copy).png")
    written(tmp_path / "new", 4)
    written(tmp_path / "strangers", 3, seed=40)
    return tmp_path


@pytest.fixture
def gallery(here, run):
    assert run("enrol", "people.gallery", "--model", "model.safetensors", "enrolment")[0] == 0
    return here / "people.gallery"


def test_from_a_model_to_decisions(here, run, told):
    code, out, _ = run("enrol", "people.gallery", "--model", "model.safetensors", "enrolment/")
    assert (code, out) == (0, "6 enrolled: people.gallery has 6 references of 6 classes\n")
    code, found = told("identify", "people.gallery", "new", "-k", "3", "--threshold", "0.99")
    assert code == 0
    assert [answer["label"] for answer in found["answers"]] == [f"person {n}" for n in range(4)]
    assert [answer["sample"] for answer in found["answers"]] == [f"new/my photo ({n}).png" for n in range(4)]
    assert all(len(answer["matches"]) == 3 for answer in found["answers"])
    assert found["answers"][0]["matches"][0]["reference"] == "enrolment/person 0/1 (copy).png"
    code, found = told("identify", "people.gallery", "strangers/my photo (0).png", "--threshold", "0.999")
    assert code == 1, "somebody is unknown"
    assert (found["answers"][0]["label"], found["answers"][0]["reason"]) == (None, "below the threshold")


def test_what_is_printed_for_people(gallery, run):
    code, out, err = run("identify", "people.gallery", "new/my photo (1).png", "strangers")
    assert code == 1
    assert re.search(r"new/my photo \(1\)\.png +person 1 ", out)
    assert "unknown (" in out
    assert f"threshold {DECISION.at_far(0.01 / 6)[0]:.4f}: at most" in err
    code, out, _ = run("show", "people.gallery")
    assert code == 0
    assert all(f"person {n}" in out for n in range(6))


def test_strangers_that_cannot_be_kept_out_as_wanted_are_told(gallery, run):
    err = run("identify", "people.gallery", "new", "--false-alarms", "1e-6")[2]
    assert "at most 0.07% of strangers reach it, not 0.00%: validation's 90,000 different pairs tell no lower rate" in err


def test_a_model_without_a_threshold_says_that_it_refuses_nobody(here, run):
    model(decision=None).save("without.safetensors")
    assert run("enrol", "open.gallery", "--model", "without.safetensors", "enrolment")[0] == 0
    code, _, err = run("identify", "open.gallery", "new")
    assert code == 0
    assert "this model was saved without a threshold: nobody is refused. To tell strangers say --threshold SCORE" in err
    assert "without a threshold" not in run("identify", "open.gallery", "new", "--threshold", "0.5")[2]


def test_triage_is_told_with_the_answers(gallery, run, told):
    run("enrol", "people.gallery", "--as", "twin", "enrolment/person 3/1 (copy).png")
    run("enrol", "people.gallery", "--as", "person 5", "enrolment/person 4/1 (copy).png")
    _, out, err = run("identify", "people.gallery", "new/my photo (3).png", "--threshold", "0.9999")
    assert "too close to call" in out
    assert "too close to tell apart: person 3 and twin (score 1.0000)" in err
    err = run("show", "people.gallery")[2]
    assert "looks wrong: enrolment/person 4/1 (copy).png of person 5 is nearer to person 4 (1.0000)" in err
    found = told("show", "people.gallery")[1]
    assert found["classes"]["person 5"] == 2
    assert {tuple(pair[:2]) for pair in found["close"]} >= {("person 3", "twin"), ("person 4", "person 5")}


def test_verification_and_its_exit_code(here, run, told):
    code, out, _ = run("verify", "--model", "model.safetensors", "new/my photo (1).png", "enrolment/person 1/1 (copy).png")
    assert code == 0
    assert out.startswith("same: score 1.0000, threshold 0.9000, where 5.00% of different pairs are accepted and 4.00% of same pairs")
    code, found = told("verify", "--model", "model.safetensors", "new/my photo (1).png", "new/my photo (2).png")
    assert code == 1
    assert found["same"] is False
    code, found = told("verify", "--model", "model.safetensors", "--far", "0.002", "new/my photo (1).png", "new/my photo (1).png")
    assert (found["threshold"], found["far"], found["frr"]) == (0.99, 0.001, 0.3)
    code, _, err = run("verify", "--model", "model.safetensors", "--far", "1e-6", "new/my photo (1).png", "new/my photo (1).png")
    assert code == 2
    assert "less than validation's pairs can tell: say 1.2e-04 or more" in err
    code, _, err = run("verify", "--model", "model.safetensors", "new", "new/my photo (1).png")
    assert code == 2
    assert "new holds 4 inputs" in err


def test_enrolling_again_replaces_and_removing_removes(gallery, run, told):
    Image.fromarray(pictures(1, seed=50)[0, 0].numpy()).save("enrolment/person 0/1 (copy).png")
    code, found = told("enrol", "people.gallery", "enrolment/", "--model", "model.safetensors")
    assert (code, found) == (0, {"enrolled": 6, "replaced": 6, "references": 6, "classes": 6})
    code, out, _ = run("remove", "people.gallery", "person 1", "person 2")
    assert (code, out) == (0, "2 references removed: 4 of 4 classes are left\n")
    before = gallery.read_bytes()
    code, _, err = run("remove", "people.gallery", "person 3", "nobody")
    assert (code, err) == (2, "error: people.gallery has no class 'nobody': nothing is removed\n")
    assert gallery.read_bytes() == before


def test_a_table_says_the_classes(here, run, told):
    rows = [f"new/my photo ({n}).png,Ада {n}" for n in range(3)]
    (here / "list.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    assert told("enrol", "people.gallery", "--model", "model.safetensors", "list.csv")[1]["classes"] == 3
    found = told("identify", "people.gallery", "list.csv", "--threshold", ".99")[1]
    assert [answer["label"] for answer in found["answers"]] == ["Ада 0", "Ада 1", "Ада 2"]


def test_texts_and_rows_are_recognised_too(here, run, told):
    model(TEXTS).save("texts.safetensors")
    (here / "asked.csv").write_text("text,label\nhow do I pay my bill,pay\nwhere is my parcel,where\n")
    assert told("enrol", "q.gallery", "--model", "texts.safetensors", "asked.csv")[1]["classes"] == 2
    found = told("identify", "q.gallery", "how do i pay the bill", "--threshold", "0.5")[1]
    assert found["answers"][0]["label"] == "pay"
    assert found["answers"][0]["matches"][0]["reference"] == "asked.csv, row 2"
    (here / "lines.txt").write_text("where is the parcel\n\nhow do I pay my bill\n")
    found = told("identify", "q.gallery", "lines.txt", "--threshold", "0.5")[1]["answers"]
    assert [(answer["sample"], answer["label"]) for answer in found] == [
        ("lines.txt, line 1", "where"),
        ("lines.txt, line 3", "pay"),
    ]
    assert run("verify", "--model", "texts.safetensors", "one text", "one text")[0] == 0
    model(ROWS, decision=None).save("rows.safetensors")
    (here / "rows.csv").write_text("weight,colour,label\n1,red,a\n-9,blue,b\n")
    assert told("enrol", "r.gallery", "--model", "rows.safetensors", "rows.csv")[1]["classes"] == 2
    found = told("identify", "r.gallery", '{"weight": 1.1, "colour": "red"}', "rows.csv")[1]
    assert [answer["label"] for answer in found["answers"]] == ["a", "a", "b"]


def test_every_pair_above_the_threshold_is_listed(here, run):
    names = written(here / "catalogue", 5) + written(here / "catalogue" / "more", 2)
    code, out, _ = run("duplicates", "--model", "model.safetensors", "catalogue", "-o", "pairs.csv", "--threshold", "0.99999")
    assert code == 0
    assert out.startswith("2 of 21 pairs reach 1.0000: pairs.csv")
    with open("pairs.csv", newline="") as file:
        found = list(csv.DictReader(file))
    same = {(os.path.relpath(names[5 + n], here), os.path.relpath(names[n], here)) for n in range(2)}
    assert {(row["left"], row["right"]) for row in found} == same
    assert all(float(row["score"]) == pytest.approx(1) and float(row["probability"]) > 0.9 for row in found)
    assert run("duplicates", "--model", "model.safetensors", "catalogue", "-o", "pairs.txt")[0] == 2


def test_any_file_name_will_do(here, run, told):
    """Also one that is no UTF-8, in a folder that is none; and long paths that differ at their ends."""
    folder = os.fsdecode(b"enrolment/ol\xe9")
    os.mkdir(folder)
    Image.fromarray(pictures(1, seed=70)[0, 0].numpy()).save(f"{folder}/" + os.fsdecode(b"\xff.png"))
    deep = here / "enrolment" / "deep" / ("x" * 120) / ("y" * 120)
    written(deep, 2, seed=71)
    code, found = told("enrol", "people.gallery", "--model", "model.safetensors", "enrolment")
    assert (code, found["references"]) == (0, 9)
    for output in ("pairs.csv", "a.npz", "a.parquet"):
        assert run("duplicates" if output == "pairs.csv" else "embed", "--model", "model.safetensors", "enrolment", "-o", output)[0] == 0
    found = told("identify", "people.gallery", folder, "--threshold", "0.99")[1]["answers"][0]
    assert (found["label"], found["sample"]) == ("ol\\udce9", "enrolment/ol\\udce9/\\udcff.png")
    assert run("show", "people.gallery")[0] == 0
    assert told("remove", "people.gallery", "ol\\udce9")[1]["references"] == 8


def test_texts_that_begin_alike_are_told_apart(here, run, told):
    model(TEXTS).save("texts.safetensors")
    long = "the same beginning " * 20
    told("enrol", "q.gallery", "--model", "texts.safetensors", "--as", "one", f"{long} pay", f"{long} parcel")
    assert told("show", "q.gallery")[1]["classes"] == {"one": 2}
    code, found = told("identify", "q.gallery", "x" * 1_000_000, "x" * 300, "--threshold", "-1")
    assert (code, len(found["answers"]), len(found["unreadable"])) == (2, 1, 1)
    pathlib.Path("latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is no UTF-8" in run("identify", "q.gallery", "latin.txt")[2]


def test_a_gallery_brings_its_own_model(gallery, run):
    for command in (["identify", "people.gallery", "new"], ["show", "people.gallery"], ["remove", "people.gallery", "person 1"]):
        code, _, err = run(*command, "--model", "model.safetensors")
        assert code == 2
        assert "unrecognized arguments: --model" in err


# Archives


def archived(path) -> tuple[list[str], np.ndarray]:
    if path.endswith(".npz"):
        with np.load(path) as arrays:
            return arrays["samples"].tolist(), arrays["embeddings"]
    table = parquet.read_table(path)
    return table["sample"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_an_archive_that_was_interrupted_goes_on_and_is_the_same_file(here, run, monkeypatch, ending):
    monkeypatch.setattr(siamese.recognition, "_CHUNK", 4)
    written(here / "archive", 18)
    (here / "archive" / "broken.png").write_text("nothing")
    code, out, err = run("embed", "--model", "model.safetensors", "archive", "-o", f"whole{ending}")
    assert code == 2, "one of them cannot be read"
    assert out == f"18 embeddings are in whole{ending}\n"
    assert err == "archive/broken.png: it is no image\n"
    names, embeddings = archived(f"whole{ending}")
    images = [np.asarray(Image.open(name)) for name in names]
    assert np.allclose(embeddings, Recognizer(model()).model.embed(torch.from_numpy(np.stack(images))[:, None]), atol=1e-6)

    save, left = siamese.archive.write_safetensors, [2]

    def cut(*given):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(*given)

    monkeypatch.setattr(siamese.archive, "write_safetensors", cut)
    code, _, err = run("embed", "--model", "model.safetensors", "archive", "-o", f"part{ending}")
    assert (code, err) == (130, "interrupted: the same command goes on where it was\n")
    assert not os.path.exists(f"part{ending}")
    monkeypatch.setattr(siamese.archive, "write_safetensors", save)
    (here / f"part{ending}.parts" / "4.safetensors").write_bytes(b"torn")
    code, _, err = run("embed", "--model", "model.safetensors", "archive", "-o", f"part{ending}")
    assert "4 of 19 are embedded already" in err
    assert pathlib.Path(f"part{ending}").read_bytes() == pathlib.Path(f"whole{ending}").read_bytes()
    assert not os.path.exists(f"part{ending}.parts")


def test_parts_that_nobody_says_the_model_of_are_not_taken(here, run, monkeypatch):
    """As a command leaves them that is killed while it removes them."""
    monkeypatch.setattr(siamese.recognition, "_CHUNK", 2)
    parts = here / "a.npz.parts"
    parts.mkdir()
    siamese.archive.write_safetensors({"embeddings": torch.zeros(2, 6)}, parts / "0.safetensors", {"failed": "{}"})
    assert "it is begun anew" in run("embed", "--model", "model.safetensors", "new", "-o", "a.npz")[2]
    assert np.allclose(archived("a.npz")[1], Recognizer(model()).model.embed(pictures(4)), atol=1e-6)


def test_parts_of_other_files_are_not_taken(here, run, monkeypatch):
    monkeypatch.setattr(siamese.recognition, "_CHUNK", 2)
    save = siamese.archive.write_safetensors
    monkeypatch.setattr(siamese.archive, "_write_npz", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "a.npz")))
    code, _, err = run("embed", "--model", "model.safetensors", "new", "-o", "a.npz")
    assert (code, err) == (2, "error: a.npz: No space left on device\n")
    assert os.path.isdir("a.npz.parts")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert siamese.archive.write_safetensors is save
    written(here / "new", 4, seed=60)
    err = run("embed", "--model", "model.safetensors", "new", "-o", "a.npz")[2]
    assert "a.npz.parts is of another model, or of other files: it is begun anew" in err
    assert np.allclose(archived("a.npz")[1], Recognizer(model()).model.embed(pictures(4, seed=60)), atol=1e-6)


@pytest.mark.slow
def test_an_archive_that_was_killed_goes_on_and_is_the_same_file(here):
    from siamese.data.glyphs import Glyphs

    letters = Glyphs().split("train").inputs
    (here / "archive").mkdir()
    for n in range(6000):
        Image.fromarray(letters[n % len(letters), 0].numpy()).resize((200, 200)).save(here / "archive" / f"{n}.png")
    command = [sys.executable, recognize.__file__, "embed", "--model", "model.safetensors", "archive", "-o"]
    subprocess.run([*command, "whole.npz"], check=True)
    started = subprocess.Popen([*command, "part.npz"])
    while not list(pathlib.Path("part.npz.parts").glob("*.safetensors")):
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not os.path.exists("part.npz")
    done = subprocess.run([*command, "part.npz"], check=True, capture_output=True, text=True)
    assert "are embedded already" in done.stderr
    assert pathlib.Path("part.npz").read_bytes() == pathlib.Path("whole.npz").read_bytes()


# What is refused


def test_a_gallery_and_its_model_belong_together(gallery, run):
    model(seed=1).save("other.safetensors")
    before = gallery.read_bytes()
    code, _, err = run("enrol", "people.gallery", "--model", "other.safetensors", "new", "--as", "x")
    assert code == 2
    assert "people.gallery was made by another model than other.safetensors" in err
    assert gallery.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["enrol", "new.gallery", "enrolment"], "there is no gallery new.gallery yet: say --model CHECKPOINT"),
        (["enrol", "new.gallery", "--model", "none.ckpt", "enrolment"], "there is no file none.ckpt"),
        (["enrol", "new.gallery", "--model", "model.safetensors", "new"], "it must look like new/cat/1.jpg"),
        (["enrol", "new.gallery", "--model", "model.safetensors", "new/my photo (1).png"], "has no class: say --as CLASS"),
        (["enrol", "new.gallery", "--model", "model.safetensors", "nowhere"], "nowhere: there is no such file"),
        (["enrol", "new.gallery", "--model", "model.safetensors", "--as", "x", "bad/cut.png"], "bad/cut.png: "),
        (["enrol", "new.gallery", "--model", "model.safetensors", "--as", "x", "bad"], "(and 2 more). Nothing is enrolled"),
        (["enrol", "nowhere/new.gallery", "--model", "model.safetensors", "enrolment"], "there is no such folder"),
        (["enrol", "new.gallery", "--model", "bomb.ckpt", "enrolment"], "bomb.ckpt is damaged or not a checkpoint of this project"),
        (["enrol", "new.gallery", "--model", "foreign.safetensors", "enrolment"], "trust"),
        (["identify", "none.gallery", "new"], "there is no file none.gallery"),
        (["identify", "model.safetensors", "new"], "nothing is enrolled"),
        (["identify", "people.gallery", "empty"], "empty: there is nothing to read"),
        (["identify", "people.gallery", "new", "--false-alarms", "2"], "false alarms are a share"),
        (["identify", "people.gallery", "new", "-k", "0"], "k=0 classes cannot be told"),
        (["embed", "--model", "model.safetensors", "new", "-o", "x.txt"], "must end in one of .parquet, .npz"),
        (["embed", "--model", "model.safetensors", "new", "-o", "nowhere/x.npz"], "there is no folder"),
        (["embed", "--model", "model.safetensors", "bad", "-o", "x.npz"], "none of 3 inputs can be read"),
        (["verify", "--model", "model.safetensors", "bad/huge.png", "bad/huge.png"], "it has 100,000,000 pixels, more than 89,478,485"),
        (["verify", "--model", "model.safetensors", "--far", "2", "new", "new"], "above 0 and below 1"),
        (["verify", "--model", "texts.safetensors", "a", "x" * 1_000_000], "it has 1,000,000 letters"),
        (["verify", "--model", "without.safetensors", "new/my photo (1).png", "new/my photo (1).png"], "say --threshold SCORE"),
        (["enrol", "q.gallery", "--model", "texts.safetensors", "gone.csv"], "gone.csv"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line_and_leaves_nothing(gallery, run, arguments, why):
    from test_bundle import Bomb

    (gallery.parent / "bad").mkdir()
    (gallery.parent / "empty").mkdir()
    whole = (gallery.parent / "new" / "my photo (1).png").read_bytes()
    pathlib.Path("bad/cut.png").write_bytes(whole[: len(whole) // 2])
    pathlib.Path("bad/text.png").write_text("no image")
    Image.new("1", (10_000, 10_000)).save("bad/huge.png")
    torch.save({"parts": {}, "state_dict": {}, "config": {}, "more": Bomb(gallery.parent / "victim")}, "bomb.ckpt")
    model(TEXTS).save("texts.safetensors")
    model(decision=None).save("without.safetensors")
    foreign = model()
    foreign.parts = {**foreign.parts, "encoder": {"_target_": "subprocess.Popen", "args": ["touch", "victim"]}}
    foreign.save("foreign.safetensors")
    before = {path: path.stat().st_mtime_ns for path in gallery.parent.rglob("*")}
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert why in err
    assert {path: path.stat().st_mtime_ns for path in gallery.parent.rglob("*")} == before


def test_what_cannot_be_read_is_said_and_the_others_are_answered(gallery, run, told):
    pathlib.Path("new/cut.png").write_bytes(b"\x89PNG\r\n")
    code, found = told("identify", "people.gallery", "new", "--threshold", "0.9")
    assert code == 2
    assert len(found["answers"]) == 4
    assert found["unreadable"] == [["new/cut.png", "it is no image"]]
    code, _, err = run("identify", "people.gallery", "new/cut.png")
    assert code == 2
    assert "new/cut.png: it is no image" in err


def test_names_cannot_move_the_terminals_cursor(here, run):
    Image.fromarray(pictures(1)[0, 0].numpy()).save("red \x1b[31m\nname.png")
    run("enrol", "people.gallery", "--model", "model.safetensors", "--as", "a\x1b[2Jb", "red \x1b[31m\nname.png")
    for arguments in (("show", "people.gallery"), ("identify", "people.gallery", "red \x1b[31m\nname.png")):
        _, out, err = run(*arguments)
        assert "\x1b" not in out + err
        assert "a\\x1b[2Jb" in out


@pytest.mark.parametrize("command", ["", "enrol", "identify", "verify", "embed", "duplicates", "show", "remove", "export"])
def test_help_is_quick_and_says_what_there_is(command):
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, recognize.__file__, *command.split(), "--help"], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
    if not command:
        assert "people.gallery" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 1, "torch alone takes longer"
