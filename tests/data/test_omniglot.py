"""Omniglot: on a made-up tree of a few drawings, and on the authors' files where they are at hand."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siamese.data.omniglot import _HELD_OUT, Omniglot
from siamese.data.samples import Samples

ALPHABETS = ["Aleph", "Bet", "Gimel", "Dalet", "He", "Vav"]
DRAWINGS = 3


def drawing(seed: int) -> Image.Image:
    """Black ink on white, one bit a pixel, as the authors' files are."""
    return Image.fromarray(np.random.default_rng(seed).random((105, 105)) > 0.1).convert("1")


def write(folder: Path, alphabets: list[str], seed: int) -> None:
    for alphabet in alphabets:
        for character in ("character01", "character02"):
            (folder / alphabet / character).mkdir(parents=True)
            for number in range(DRAWINGS):
                seed += 1
                drawing(seed).save(folder / alphabet / character / f"{seed:04d}_{number + 1:02d}.png")


def pack(folder: Path, top: str) -> None:
    """folder.zip instead of the folder, with the rubbish that archives pick up on their way."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        archive.mkdir(folder.name)
        for path in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(path, top + path.relative_to(folder).as_posix())
        archive.writestr(f"{top}.DS_Store", b"rubbish")
        archive.writestr(f"{top}Aleph/character01/._0001_01.png", b"rubbish")
        archive.writestr("__MACOSX/character01/0001_01.png", b"rubbish")
        archive.writestr("__MACOSX/class_labels.txt", b"rubbish")
        archive.writestr(f"{top}overview.png", b"rubbish")
    shutil.rmtree(folder)


@pytest.fixture(params=["zips", "folders"])
def tree(request, tmp_path):
    """A background of six alphabets, a reduced one of two, an evaluation set of two and two runs of three classes."""
    write(tmp_path / "images_background", ALPHABETS, 0)
    write(tmp_path / "images_background_small1", ["Bet", "He"], 1000)
    write(tmp_path / "images_evaluation", ["Zayin", "Het"], 2000)
    for run, answers in (("run01", [2, 0, 1]), ("run02", [1, 2, 0])):
        for kind in ("test", "training"):
            (tmp_path / "all_runs" / run / kind).mkdir(parents=True)
        lines = []
        for item, answer in enumerate(answers):
            test, training = f"{run}/test/item{item + 1:02d}.png", f"{run}/training/class{answer + 1:02d}.png"
            for path in (test, training):
                drawing(answer).save(tmp_path / "all_runs" / path)
            lines.append(f"{test} {training}\n")
        (tmp_path / "all_runs" / run / "class_labels.txt").write_text("".join(lines))
    if request.param == "zips":
        for name in ("images_background", "images_background_small1", "images_evaluation"):
            pack(tmp_path / name, f"{name}/")
        pack(tmp_path / "all_runs", "")  # the authors' has no top folder
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: a second thread only waits for its turn where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alphabets(samples) -> set[str]:
    return {name.split("/")[0] for name in samples.class_names}


def test_splits(tree):
    source = Omniglot(tree, validation=2)
    train, val, test = (source.split(name) for name in ("train", "val", "test"))
    assert [len(samples) for samples in (train, val, test)] == [4 * 2 * DRAWINGS, 2 * 2 * DRAWINGS, 2 * 2 * DRAWINGS]
    assert alphabets(train) | alphabets(val) == set(ALPHABETS)
    assert not alphabets(train) & alphabets(val)
    assert test.class_names == ["Het/character01", "Het/character02", "Zayin/character01", "Zayin/character02"]
    assert test.ids[0] == "images_evaluation/Het/character01/2007_01.png"
    for samples in (train, val, test):
        assert samples.inputs.shape == (len(samples), 1, 32, 32)
        assert samples.inputs.dtype == torch.uint8
        assert samples.labels.bincount().tolist() == [DRAWINGS] * len(samples.class_names)
        assert all(samples.class_names[label] in name for label, name in zip(samples.labels, samples.ids, strict=True))
        assert samples.ids == sorted(samples.ids)


def test_pixels_belong_to_their_id(tree):
    samples = Omniglot(tree, size=105, validation=2).split("train")
    for image, name in zip(samples.inputs, samples.ids, strict=True):
        ink = ~np.asarray(drawing(int(Path(name).stem.split("_")[0])))
        assert np.array_equal(image[0].numpy(), 255 * ink)


def area_means(ink: np.ndarray, size: int) -> np.ndarray:
    """[105, 105] to [size, size], the mean of every pixel that an output pixel touches, taken one by one."""
    means = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            rows = slice(row * 105 // size, -(-(row + 1) * 105 // size))
            means[row, column] = ink[rows, column * 105 // size : -(-(column + 1) * 105 // size)].mean()
    return means


@pytest.mark.parametrize("size", [28, 32])
def test_reduced_by_area(tree, size):
    samples = Omniglot(tree, size=size).split("test")
    ink = 255.0 * ~np.asarray(drawing(2007))
    assert samples.ids[0].endswith("2007_01.png")
    assert np.array_equal(samples.inputs[0, 0].numpy(), np.round(area_means(ink, size)))


def test_the_same_split_whatever_the_seed_and_the_packing(tree):
    torch.manual_seed(1)
    first = Omniglot(tree, validation=2).split("val")
    torch.manual_seed(2)
    assert Omniglot(tree, validation=2).split("val").fingerprint() == first.fingerprint()
    assert alphabets(first) == {"Dalet", "Vav"}  # written down, so that no change moves the split unseen


def test_default_validation(tree):
    assert len(alphabets(Omniglot(tree).split("val"))) == 5
    assert len(alphabets(Omniglot(tree, background="small1").split("val"))) == 1


def test_rotated_classes_in_training_only(tree):
    plain, source = Omniglot(tree), Omniglot(tree, rotated_classes=True)
    samples, rotated = plain.split("train"), source.split("train")
    count, classes = len(samples), len(samples.class_names)
    assert len(rotated) == 4 * count == len(set(rotated.ids))
    assert len(set(rotated.class_names)) == 4 * classes
    for turn, suffix in enumerate(["", " rotated 90", " rotated 180", " rotated 270"]):
        part = slice(turn * count, (turn + 1) * count)
        assert torch.equal(rotated.inputs[part], samples.inputs.rot90(turn, (2, 3)))
        assert torch.equal(rotated.labels[part], samples.labels + turn * classes)
        assert rotated.class_names[turn * classes : (turn + 1) * classes] == [name + suffix for name in samples.class_names]
    for name in ("val", "test"):
        assert source.split(name).fingerprint() == plain.split(name).fingerprint()


def test_a_split_is_decoded_once_and_alone(tree, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(1) or original(*args, **kwargs))
    source = Omniglot(tree, validation=2)
    for name, drawings in (("val", 2 * 2 * DRAWINGS), ("train", 6 * 2 * DRAWINGS), ("val", 6 * 2 * DRAWINGS)):
        source.split(name)
        assert len(opened) == drawings


def test_oneshot_runs(tree):
    runs = Omniglot(tree, size=105).oneshot_runs()
    assert [queries.labels.tolist() for queries, _ in runs] == [[2, 0, 1], [1, 2, 0]]
    for queries, supports in runs:
        assert supports.labels.tolist() == [0, 1, 2]
        assert torch.equal(queries.inputs, supports.inputs[queries.labels])  # each query was made equal to its answer
    assert runs[1][0].ids[0] == "run02/test/item01.png"
    assert runs[1][1].ids[0] == "run02/training/class01.png"


def test_windows_separators_and_line_ends(tree):
    folder = tree / "all_runs"
    if not folder.is_dir():
        with zipfile.ZipFile(tree / "all_runs.zip") as archive:
            archive.extractall(folder)
        (tree / "all_runs.zip").unlink()
    for path in folder.rglob("class_labels.txt"):
        path.write_bytes(path.read_bytes().replace(b"/", b"\\").replace(b"\n", b"\r\n") + b"\r\n")
    assert [queries.labels.tolist() for queries, _ in Omniglot(tree).oneshot_runs()] == [[2, 0, 1], [1, 2, 0]]
    with zipfile.ZipFile(tree / "all_runs.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            name = "all_runs\\" + str(path.relative_to(folder)).replace("/", "\\")
            info = zipfile.ZipInfo()
            info.filename = name  # set afterwards, as on Windows the constructor would turn the separators
            archive.writestr(info, path.read_bytes())
    shutil.rmtree(folder)
    assert [queries.labels.tolist() for queries, _ in Omniglot(tree).oneshot_runs()] == [[2, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize("number", [6, 7])
def test_validation_leaves_neither_side_empty(tree, number):
    with pytest.raises(ValueError, match=f"validation={number}: .* 6 alphabets"):
        Omniglot(tree, validation=number).split("train")


@pytest.mark.parametrize(("background", "given"), [("full", -1), ("full", True), ("full", 0.5), ("full", "others"), ("small1", "other")])
def test_a_validation_that_is_none(tmp_path, background, given):
    with pytest.raises(ValueError, match=f"validation={given}: .* takes a number"):
        Omniglot(tmp_path, background=background, validation=given)


def test_all_alphabets_are_trained_on_for_a_last_run(tree):
    source = Omniglot(tree, validation=0)
    train, val = source.split("train"), source.split("val")
    assert alphabets(train) == set(ALPHABETS)
    assert val.class_names == Omniglot(tree).split("val").class_names
    assert source.trained_on == ("val",)
    assert source.oneshot_runs("val") == []
    assert Omniglot(tree).trained_on == ()


def test_validation_by_the_alphabets_that_a_reduced_background_lacks(tree):
    source = Omniglot(tree, background="small1", validation="others")
    assert alphabets(source.split("train")) == {"Bet", "He"}
    assert alphabets(source.split("val")) == {"Aleph", "Gimel", "Dalet", "Vav"}
    assert alphabets(source.split("test")) == {"Het", "Zayin"}


def test_a_split_without_drawings_is_named(tree):
    with pytest.raises(ValueError, match="background=characters, validation=3 leave no drawings for test"):
        Omniglot(tree, background="characters", validation=3).split("test")  # fewer than 1,200 characters, all of them trained on


def test_characters_of_all_alphabets(tree, monkeypatch):
    monkeypatch.setattr("siamese.data.omniglot._TRAINED_ON", 11)
    monkeypatch.setitem(_HELD_OUT, "characters", 3)
    source = Omniglot(tree, background="characters", validation=3)
    names = [set(source.split(split).class_names) for split in ("train", "val", "test")]
    assert [len(part) for part in names] == [8, 3, 5]
    assert len(set.union(*names)) == 16, "each character is in one split"
    assert [len(source.split(split)) for split in ("train", "val", "test")] == [8 * DRAWINGS, 3 * DRAWINGS, 5 * DRAWINGS]
    everything = Omniglot(tree, background="characters", validation=0).split("train")
    assert set(everything.class_names) == names[0] | names[1]
    assert source.oneshot_runs() == [], "their alphabets are trained on"
    for name in ("train", "test"):
        samples = source.split(name)
        for image, where in zip(samples.inputs, samples.ids, strict=True):
            ink = torch.from_numpy(255.0 * ~np.asarray(drawing(int(Path(where).stem.split("_")[0]))))
            assert torch.equal(image[0], torch.nn.functional.interpolate(ink[None, None], (32, 32), mode="area")[0, 0].round().byte())
    with pytest.raises(ValueError, match=r"validation=11: .* 11 characters"):
        Omniglot(tree, background="characters", validation=11).split("train")


def test_runs_of_validation_are_made_as_the_official_ones():
    people = [f"{person:02d}" for person in range(1, 5)]
    names = [f"{alphabet}/character{number:02d}" for alphabet, count in (("Big", 23), ("Small", 19)) for number in range(1, count + 1)]
    ids = [f"images_background/{name}/{7 * row:04d}_{person}.png" for row, name in enumerate(names) for person in people]
    inputs = torch.arange(len(ids)).view(-1, 1, 1, 1)
    samples = Samples(inputs, torch.arange(len(names)).repeat_interleave(4), names, ids)
    runs = list(Omniglot._drawn_runs(samples))
    assert len(runs) == 10, "of the alphabet that has twenty characters"
    pairs = set()
    for queries, supports in runs:
        assert queries.labels.tolist() == supports.labels.tolist() == list(range(20))
        assert len(set(queries.class_names)) == 20
        for side in (queries, supports):
            assert [samples.class_names[samples.labels[row]] for row in side.inputs.flatten()] == queries.class_names
            assert [samples.ids[row] for row in side.inputs.flatten()] == side.ids
        of = [{name[-6:-4] for name in side.ids} for side in (queries, supports)]
        assert len(of[0]) == len(of[1]) == 1, "a side is of one person"
        assert of[0] != of[1]
        pairs.add((*of[0], *of[1]))
    assert len(pairs) > 3
    again = list(Omniglot._drawn_runs(samples))
    assert all(torch.equal(one[0].inputs, other[0].inputs) for one, other in zip(runs, again, strict=True))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"'medium'.* full, small1, small2"):
        Omniglot(tmp_path, background="medium")
    with pytest.raises(ValueError, match=r"'dev'.* train, val, test"):
        Omniglot(tmp_path).split("dev")


def test_only_a_missing_file_that_is_needed_is_an_error(tree):
    for path in tree.iterdir():
        if "evaluation" not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    source = Omniglot(tree)
    assert len(source.split("test")) == 2 * 2 * DRAWINGS
    with pytest.raises(FileNotFoundError, match=r"images_background.zip is missing: .*python scripts/download.py omniglot"):
        source.split("val")
    with pytest.raises(FileNotFoundError, match=r"images_background_small2.zip is missing"):
        Omniglot(tree, background="small2").split("train")
    with pytest.raises(FileNotFoundError, match=r"all_runs.zip is missing"):
        source.oneshot_runs()


def test_damaged_zips(tmp_path):
    path = tmp_path / "images_evaluation.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"images_evaluation.zip cannot be read .*scripts/download.py omniglot"):
        Omniglot(tmp_path).split("test")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no drawings")
    with pytest.raises(ValueError, match=r"images_evaluation.zip holds no alphabet/character/drawing.png"):
        Omniglot(tmp_path).split("test")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images_evaluation/A/character01/0001_01.png", b"bytes that a CRC guards")
    path.write_bytes(path.read_bytes().replace(b"guards", b"misses"))
    with pytest.raises(ValueError, match=r"images_evaluation.zip: A/character01/0001_01.png cannot be read .*CRC"):
        Omniglot(tmp_path).split("test")
    with zipfile.ZipFile(tmp_path / "all_runs.zip", "w") as archive:
        archive.writestr("run01/class_labels.txt", "run01/test/item01.png run01/training/class01.png\n")
    with pytest.raises(ValueError, match=r"all_runs.zip lacks run01/test/item01.png"):
        Omniglot(tmp_path).oneshot_runs()


def test_damaged_drawings(tmp_path):
    write(tmp_path / "images_evaluation", ["A"], 0)
    path = tmp_path / "images_evaluation" / "A" / "character02" / "0005_02.png"
    whole = path.read_bytes()
    for damaged in (b"", b"no png", whole[:40], whole[:200], whole[:100] + b"damage" + whole[106:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"A/character02/0005_02.png is no readable PNG"):
            Omniglot(tmp_path).split("test")
    Image.new("1", (28, 28)).save(path)
    with pytest.raises(ValueError, match=r"A/character02/0005_02.png is 28 x 28 pixels, not 105 x 105"):
        Omniglot(tmp_path).split("test")


# On the authors' files.


@pytest.fixture(scope="module")
def folder() -> Path:
    path = Path(os.environ.get("SIAMESE_DATA_DIR", "data")) / "omniglot"
    if not path.is_dir():
        pytest.skip("no Omniglot: run `python scripts/download.py omniglot`, or set SIAMESE_DATA_DIR to the folder that has omniglot/")
    return path


@pytest.fixture(scope="module")
def full(folder):
    return Omniglot(folder)


def test_real_full(full):
    train, val, test = (full.split(name) for name in ("train", "val", "test"))
    assert len(train.class_names) + len(val.class_names) == 964
    assert len(test.class_names) == 659
    assert [len(alphabets(samples)) for samples in (train, val, test)] == [25, 5, 20]
    assert len(alphabets(train) | alphabets(val) | alphabets(test)) == 50
    for samples in (train, val, test):
        assert set(samples.labels.bincount().tolist()) == {20}
        assert (samples.inputs.amax((1, 2, 3)) > 100).all()
        assert 10 < samples.inputs.float().mean() < 30  # ink is the lesser part
    assert alphabets(val) == {"Grantha", "Greek", "Mkhedruli_(Georgian)", "Syriac_(Estrangelo)", "Tifinagh"}


@pytest.mark.parametrize(("background", "classes"), [("small1", 136), ("small2", 156)])
def test_real_small(folder, background, classes):
    source = Omniglot(folder, background=background)
    train, val = source.split("train"), source.split("val")
    assert len(train.class_names) + len(val.class_names) == classes
    assert len(train) + len(val) == 20 * classes
    assert [len(alphabets(samples)) for samples in (train, val)] == [4, 1]
    assert not alphabets(train) & alphabets(val)


def test_real_characters(folder):
    source = Omniglot(folder, background="characters")
    assert [len(source.split(name).class_names) for name in ("train", "val", "test")] == [1100, 100, 423]
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [22_000, 2_000, 8_460]


def test_real_runs_of_validation(folder):
    runs = Omniglot(folder, background="small1", validation="others").oneshot_runs("val")
    assert len(runs) == 210  # 21 of the 25 alphabets have twenty characters
    for queries, supports in runs:
        assert (queries.inputs != supports.inputs).flatten(1).any(1).all()


def test_real_pixels(folder, full):
    """Against Pillow's own reading and area means taken one by one."""
    samples = full.split("train")
    with zipfile.ZipFile(folder / "images_background.zip") as archive:
        for place in (0, 300, len(samples) - 1):  # 300: not in the first strip
            with archive.open(samples.ids[place]) as file:
                ink = 255.0 * ~np.array(Image.open(file))
            assert np.array_equal(samples.inputs[place, 0].numpy(), np.round(area_means(ink, 32)))


def test_real_runs(full):
    runs = full.oneshot_runs()
    assert len(runs) == 20
    for queries, supports in runs:
        assert queries.inputs.shape == supports.inputs.shape == (20, 1, 32, 32)
        assert sorted(queries.labels.tolist()) == supports.labels.tolist() == list(range(20))
        assert (queries.inputs != supports.inputs[queries.labels]).flatten(1).any(1).all()
        assert (queries.inputs.amax((1, 2, 3)) > 100).all()


def test_real_runs_give_the_published_baseline(folder):
    """The authors' demo: the modified Hausdorff distance between centred drawings errs on 38.8 % of the 400 queries.

    Distances are looked up in a distance transform, with the shift rounded to a pixel, which costs half a percent.
    """
    transform = pytest.importorskip("scipy.ndimage").distance_transform_edt

    def drawings(samples):
        for image in samples.inputs[:, 0].numpy():
            points = np.argwhere(image)
            centre = points.mean(0)
            yield points - centre, centre + 60, transform(np.pad(image, 60) == 0)

    def far(one, other):
        rows, columns = np.rint(one[0] + other[1]).astype(int).T
        return other[2][rows, columns].mean()

    wrong = 0
    for queries, supports in Omniglot(folder, size=105).oneshot_runs():
        candidates = list(drawings(supports))
        for query, label in zip(drawings(queries), queries.labels, strict=True):
            wrong += int(np.argmin([max(far(query, other), far(other, query)) for other in candidates])) != label
    assert 100 * int(wrong) / 400 == pytest.approx(38.8, abs=1)
