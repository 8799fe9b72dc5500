"""Images of one's own: a folder or a table, decoded once, with what cannot be read named and left out."""

import csv
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from siamese.data import images
from siamese.data.images import Images, decode
from siamese.data.samples import Samples
from siamese.evaluation import EvaluationResult


def picture(seed: int, width: int = 40, height: int = 40, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height)).convert(mode)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path):
    """Ten classes of three images, of several formats."""
    for label in range(10):
        for number, ending in enumerate(("png", "jpg", "webp")):
            path = tmp_path / "mine" / f"class{label}" / f"{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(10 * label + number).save(path)
    return tmp_path / "mine"


def where(source: Images) -> dict[str, list[str]]:
    return {finding.what: finding.where for finding in source.findings()}


def test_folders_are_classes_and_each_split_has_its_own(folder):
    source = Images(folder, size=16, val=0.2, test=0.3)
    splits = {name: source.split(name) for name in ("train", "val", "test")}
    assert {name: len(samples.class_names) for name, samples in splits.items()} == {"train": 5, "val": 2, "test": 3}
    seen = [name for samples in splits.values() for name in samples.class_names]
    assert sorted(seen) == [f"class{label}" for label in range(10)]
    assert source.findings() == []
    for samples in splits.values():
        assert samples.inputs.shape == (3 * len(samples.class_names), 3, 16, 16)
        assert samples.inputs.dtype == torch.uint8
        for row, name in enumerate(samples.ids):
            assert name.startswith(samples.class_names[samples.labels[row]] + "/")
            expected, _ = decode(folder / name, 16, 3, "pad")
            assert (samples.inputs[row].numpy() == expected).all()
    assert source.split("val") is splits["val"]
    with pytest.raises(ValueError, match="no split 'dev'"):
        source.split("dev")


def test_folders_of_folders_and_folders_named_as_splits(tmp_path):
    for path in ("train/a/x/1.png", "train/b/1.png", "valid/c/1.png", "test/d/1.png", "test/d/2.PNG", "train/b/.hidden.png"):
        (tmp_path / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        picture(len(path)).save(tmp_path / "mine" / path)
    source = Images(tmp_path / "mine", size=8)
    assert source.split("train").ids == ["train/a/x/1.png", "train/b/1.png"]
    assert [source.split(name).class_names for name in ("train", "val", "test")] == [["a/x", "b"], ["c"], ["d"]]


def test_a_class_may_lie_elsewhere_and_be_linked(folder, tmp_path):
    os.rename(folder / "class0", tmp_path / "elsewhere")
    (folder / "class0").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    source = Images(folder, size=8)
    assert sum(len(source.split(name)) for name in ("train", "val", "test")) == 30


def test_a_table_names_label_split_and_group(folder, tmp_path):
    lines = ["path,label,group,colour"]
    for label in range(10):  # of each two neighbours one image was taken by the same camera
        lines += [f"mine/class{label}/{n}.{e},L{label},{f'camera{label // 2}' if n == 0 else ''},x" for n, e in enumerate(("png", "jpg"))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    source = Images(tmp_path / "table.csv", size=8, val=0.2, test=0.2)
    splits = {name: source.split(name) for name in ("train", "val", "test")}
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 12, "val": 4, "test": 4}
    for samples in splits.values():
        numbers = {int(name[1:]) for name in samples.class_names}
        assert {number ^ 1 for number in numbers} == numbers, "neighbours stay together"
    assert where(source) == {"columns that are not used": ["colour"]}


def test_a_split_of_which_more_than_half_cannot_be_read_stops_the_run(folder, tmp_path):
    lines = ["path,label,split", *(f"mine/class{label}/{n}.png,L{label},train" for label in range(10) for n in range(5))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"\d+ of 30 images of train cannot be read, such as table.csv, row \d+: .*no such file"):
        Images(tmp_path / "table.csv", size=8, val=0.2, test=0.2).split("train")


def test_what_cannot_be_read_is_named_and_left_out(folder):
    broken = folder / "class3"
    (broken / "empty.png").touch()
    (broken / "text.png").write_text("this is no picture")
    whole = (broken / "0.png").read_bytes()
    (broken / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("hello")
    picture(0).save(folder / "loose.png")
    picture(1, 3, 3).save(broken / "tiny.png")
    source = Images(folder, size=16, val=["class0", "class1"], test=["class2", "class9"])
    train = source.split("train")
    assert [name for name in train.ids if name.startswith("class3/")] == [f"class3/{n}" for n in ("0.png", "1.jpg", "2.webp", "tiny.png")]
    assert len(train) == 19
    expected, _ = decode(folder / train.ids[-1], 16, 3, "pad")
    assert (train.inputs[-1].numpy() == expected).all(), "those after a broken one keep their places"
    found = where(source)
    assert found["images that lie in no folder of a class"] == ["loose.png"]
    assert found["files that are no images"] == ["notes.txt"]
    assert found["images of train that are enlarged more than four times, to 16 x 16"] == ["class3/tiny.png (3 x 3)"]
    cut, empty, text = sorted(found["images of train that cannot be read"])
    assert empty == "class3/empty.png (it is empty)"
    assert re.fullmatch(r"class3/cut.png \(.*truncated.*\)", cut)
    assert text == "class3/text.png (it is no image)"
    assert [finding.serious for finding in source.findings()] == [True, False, True, False]
    again = Images(folder, size=16, val=["class0", "class1"], test=["class2", "class9"])
    assert torch.equal(again.split("train").inputs, train.inputs)
    assert where(again) == found, "what the cache left out is told again"


def test_a_table_tells_of_missing_and_repeated_files(folder, tmp_path):
    lines = [f"mine/class{label}/{n}" for label in range(10) for n in ("0.png", "1.jpg")]
    rows = [f"{line},{line[5:11]},{'train' if label < 8 else 'val' if label < 14 else 'test'}" for label, line in enumerate(lines)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows, "mine/no.png,class0,train", f"{lines[0]},class1,train"]))
    source = Images(tmp_path / "t.csv", size=8, cache=False)
    assert len(source.split("train")) == 9
    assert where(source) == {
        "files that are listed more than once": ["t.csv, row 23: mine/class0/0.png, as in row 2"],
        "images of train that cannot be read": ["t.csv, row 22: mine/no.png (there is no such file)"],
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label,split", "a.png,x,holdout"], "row 2: split is 'holdout'"),
        (["path,name", "a.png,x"], "no column 'label'"),
        (["path,label,role", "a.png,x,query", "b.png,x,probe"], r"t\.csv, row 3: role is 'probe', it must be query or gallery"),
    ],
)
def test_a_broken_table_stops_it(tmp_path, lines, message):
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        Images(tmp_path / "t.csv").split("train")


@pytest.fixture
def roles(folder, tmp_path):
    """roles(test=["query", "", ...]) -> a table of the folder with roles: six of its classes are in train, two in val, two in test."""

    def written(**words: list[str]) -> Images:
        lines, given = ["path,label,split,role"], {split: iter(some) for split, some in words.items()}
        for path in sorted(folder.rglob("*.*")):
            split = [*["train"] * 6, "val", "val", "test", "test"][int(path.parent.name[5:])]
            lines.append(f"{path},{path.parent.name},{split},{next(given.get(split, iter(())), '')}")
        (tmp_path / "roles.csv").write_text("\n".join(lines))
        return Images(tmp_path / "roles.csv", size=8)

    return written


def test_roles_part_queries_from_the_gallery_where_samples_are_judged(roles):
    words = ["Query", "gallery", "gallery", "gallery", "query", "GALLERY"]
    source = roles(test=words)
    test, plain = source.split("test"), roles().split("test")
    assert test.gallery.tolist() == [word.lower() == "gallery" for word in words]
    assert [rows.tolist() for rows in test.roles()] == [[0, 4], [1, 2, 3, 5]]
    assert (source.split("val").gallery, plain.gallery) == (None, None)
    assert [rows.tolist() for rows in plain.roles()] == [list(range(6))] * 2
    assert source.findings() == []
    assert torch.equal(test.inputs, plain.inputs)
    assert test[[1, 0]].gallery.tolist() == [True, False]
    assert plain[[1, 0]].gallery is None
    some = test.subset(torch.tensor([4, 5]))
    assert some.gallery.tolist() == [False, True]
    others = roles(test=words[::-1]).split("test")
    assert len({plain.fingerprint(), test.fingerprint(), others.fingerprint()}) == 3
    with pytest.raises(ValueError, match=r"gallery is torch.int64 \[2\]: it must be torch.bool \[6\]"):
        Samples(plain.inputs, plain.labels, plain.class_names, plain.ids, torch.tensor([0, 1]))


def test_a_run_judges_by_roles_after_each_epoch_and_at_the_end(fit, roles, tmp_path):
    table = roles(val=["query", "query", "gallery"] * 2, test=["gallery"] * 5 + ["query"]).path
    run = tmp_path / "run"
    figures = fit(run, "dataset=images", f"dataset.path={table}", "dataset.size=16", "sampling.classes=4", "leakage=off")
    results = EvaluationResult.load(run / "results.npz")
    assert {name: (len(results[name].ids), len(results[name].gallery_ids)) for name in ("val", "test")} == {"val": (4, 2), "test": (1, 5)}
    assert results["val"].gallery_ids == [str(table.parent / "mine" / f"class{label}" / "2.webp") for label in (6, 7)]
    with open(run / "metrics.csv") as lines:
        watched = [row for row in csv.DictReader(lines) if row["val/map_at_r"]]
    assert len(watched) == 2
    best = max(watched, key=lambda row: float(row["val/map_at_r"]))
    for name in ("map_at_r", "recall_at_1", "auc", "eer"):
        assert float(best[f"val/{name}"]) == pytest.approx(figures[f"val/{name}"], abs=1e-6)
        assert f"raw/{name}" in figures
    assert set(results["val"].neighbours[:, 2:].ravel()) == {-1}, "there are no more than the gallery's two"


def test_in_training_roles_mean_nothing(roles):
    source = roles(train=["query", "gallery", "", "query"])
    assert source.split("train").gallery is None
    assert source.split("train").fingerprint() == roles().split("train").fingerprint()


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query", "gallery", "", "query"], r"roles\.csv, row {2}: .* has no role, but other samples of {split} have one"),
        (["", "gallery"], r"roles\.csv, row {0}: .* has no role"),
        (["query"] * 6, r"roles\.csv, row {0}: .* is a query, as all samples of {split} are: some must have the role gallery"),
        (["gallery"] * 6, r"roles\.csv, row {0}: .* is a gallery, as all samples of {split} are: some must have the role query"),
    ],
)
def test_roles_that_cannot_be_are_refused_with_their_row(roles, split, words, message):
    first = 20 if split == "val" else 26
    for asked in ("train", split):
        with pytest.raises(ValueError, match=message.format(*range(first, first + 6), split=split)):
            roles(**{split: words}).split(asked)


def test_a_folder_without_classes_says_what_it_must_look_like(tmp_path):
    picture(0).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"holds no images in folders of their classes \(1 beside, 0 other files\): it must look like"):
        Images(tmp_path).split("train")


@pytest.mark.parametrize("values", [{"size": 0}, {"channels": 4}, {"fit": "squeeze"}])
def test_senseless_values_are_refused(values):
    with pytest.raises(ValueError, match=r"size=.* must be above 0, channels=.* 1 or 3, fit=.* one of pad, crop, stretch"):
        Images("somewhere", **values)


def test_what_was_decoded_is_kept_and_is_made_anew_when_a_file_changes_or_it_is_damaged(folder, data, monkeypatch):
    calls = []
    monkeypatch.setattr(images, "decode", lambda *given: calls.append(given[0]) or decode(*given))
    first = Images(folder, size=16).split("train")
    first.inputs = first.inputs.clone()  # it is mapped from the file that is damaged below
    assert len(calls) == len(first)
    assert torch.equal(Images(folder, size=16).split("train").inputs, first.inputs)
    assert len(calls) == len(first), "nothing is decoded twice"
    (kept,) = (data / "cache").glob("*.uint8")
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert torch.equal(Images(folder, size=16).split("train").inputs, first.inputs)
    assert len(calls) == 2 * len(first), "what is damaged is made anew"
    kept.write_bytes(content[:-5])
    assert torch.equal(Images(folder, size=16).split("train").inputs, first.inputs)
    assert len(calls) == 3 * len(first)
    for change in ({"size": 8}, {"channels": 1}, {"fit": "crop"}):
        Images(folder, **{"size": 16, **change}).split("train")
    assert len(calls) == 6 * len(first)
    picture(99).save(folder / first.ids[0])
    changed = Images(folder, size=16).split("train")
    assert len(calls) == 7 * len(first)
    assert not torch.equal(changed.inputs[0], first.inputs[0])
    assert torch.equal(changed.inputs[1:], first.inputs[1:])
    assert not list((data / "cache").glob("*.part"))


def test_an_interruption_leaves_nothing_half_written(folder, data, monkeypatch):
    def interrupted(file, *given):
        if file.name == "2.webp":
            raise KeyboardInterrupt
        return decode(file, *given)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Images(folder, size=16).split("train")
    assert list((data / "cache").iterdir()) == []
    assert len(Images(folder, size=16).split("train")) > 0


def test_writing_to_an_input_does_not_change_the_cache(folder):
    first = Images(folder, size=16).split("train").inputs
    kept = first.clone()
    first.zero_()
    assert torch.equal(Images(folder, size=16).split("train").inputs, kept)


def test_without_a_cache_nothing_is_written(folder, data):
    assert torch.equal(Images(folder, size=16, cache=False).split("train").inputs, Images(folder, size=16).split("train").inputs)
    (notes,) = (data / "cache").glob("*.json")
    assert json.loads(notes.read_text())["failed"] == {}
    notes.unlink()
    (data / "cache").chmod(0o700)
    Images(folder, size=24, cache=False).split("train")
    assert len(list((data / "cache").iterdir())) == 1


# --- decoding


def save(image: Image.Image, tmp_path, name: str = "x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_square_image_of_the_size_asked_for_is_unchanged(tmp_path):
    image = picture(0, 32, 32)
    pixels, size = decode(save(image, tmp_path), 32, 3, "pad")
    assert (pixels.transpose(1, 2, 0) == np.asarray(image)).all()
    assert size == (32, 32)
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_what_becomes_of_an_oblong_image(tmp_path, fit):
    """Left half red, right half blue, of 40 x 20, within a green border."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:, 2] = 255
    pixels[[0, -1]] = pixels[:, [0, -1]] = (0, 255, 0)
    found, size = decode(save(Image.fromarray(pixels), tmp_path), 40, 3, fit)
    assert size == (40, 20)
    red, green, blue = (found[channel] > 200 for channel in range(3))
    rows = (red | blue).any(1).nonzero()[0]
    if fit == "pad":
        assert (rows.min(), rows.max()) == (11, 28)
        assert green[:10].all() and green[30:].all(), "padded in the border's colour"  # noqa: PT018
        assert red[20, 1:20].all() and blue[20, 20:39].all()  # noqa: PT018
    else:
        assert rows.max() - rows.min() > 30
        assert green[20, [0, -1]].all() == (fit == "stretch"), "the middle is cut out, or all of it stretched"


def test_a_camera_held_upright_and_see_through_and_grey_and_deep_images(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    image.paste((255, 0, 0), (0, 0, 5, 10))  # on the left
    upright = Image.Exif()
    upright[0x0112] = 6  # turned by a quarter: what is left belongs on top
    found, _ = decode(save(image, tmp_path, exif=upright), 20, 3, "stretch")
    assert found[1, :4].max() < 50 < found[1, 8:].min()
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode(save(clear, tmp_path), 8, 3, "pad")[0] == 255).all(), "on white"
    assert (decode(save(Image.new("LA", (8, 8), (0, 0)), tmp_path), 8, 1, "pad")[0] == 255).all()
    assert decode(save(picture(0, 8, 8, "L"), tmp_path), 8, 3, "pad")[0].shape == (3, 8, 8)
    assert decode(save(picture(0, 8, 8, "CMYK"), tmp_path, "x.jpg"), 8, 3, "pad")[0].shape == (3, 8, 8)
    assert decode(save(picture(0, 8, 8, "P"), tmp_path, "x.gif"), 8, 1, "pad")[0].shape == (1, 8, 8)
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000 + 700).astype(np.uint16)
    assert (decode(save(Image.fromarray(deep), tmp_path), 8, 1, "pad")[0][0] == deep // 256).all()
    real = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    found, _ = decode(save(Image.fromarray(real), tmp_path, "x.tiff"), 8, 1, "pad")
    assert np.abs(found[0] - (real + 1) * 127.5).max() <= 1


def test_a_bomb_is_refused_and_not_opened(tmp_path, monkeypatch):
    path = save(picture(0, 64, 64), tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image, reason = decode(path, 8, 3, "pad")
    assert image is None
    assert "exceeds limit" in reason


def test_a_large_photo_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(tmp_path):
    image = picture(0, 800, 800)
    small, size = decode(save(image, tmp_path, "x.jpg", quality=95), 50, 3, "pad")
    assert size == (800, 800)
    plain = np.asarray(image.resize((50, 50), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(small.astype(int) - plain).mean() < 2
