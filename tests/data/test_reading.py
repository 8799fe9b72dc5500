"""What comes later is read as training's data was, and what cannot be read is named."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from siamese.data.glyphs import Glyphs
from siamese.data.images import Images
from siamese.data.omniglot import Omniglot
from siamese.data.pairs import Pairs
from siamese.data.reading import ImageReader, RowReader, TextReader, by_moments
from siamese.data.table import Table
from siamese.data.texts import Texts, as_texts


def reader_of(source):
    """As a file would make it: of plain values."""
    part = json.loads(json.dumps(source.reading()))
    kind = {"ImageReader": ImageReader, "TextReader": TextReader, "RowReader": RowReader}[part.pop("_target_").rpartition(".")[2]]
    return kind(**part)


def test_drawings_are_read_as_those_of_omniglot(tmp_path):
    generator = np.random.default_rng(0)
    drawings = [Image.fromarray(np.where(generator.random((105, 105)) < 0.1, 0, 255).astype(np.uint8)).convert("1") for _ in range(4)]
    with zipfile.ZipFile(tmp_path / "images_evaluation.zip", "w") as archive:
        for number, drawing in enumerate(drawings):
            file = io.BytesIO()
            drawing.save(file, "PNG")
            archive.writestr(f"images_evaluation/A/character{number // 2:02d}/{number}.png", file.getvalue())
    for moments in (False, True):
        source = Omniglot(tmp_path, size=28, moments=moments)
        found, failed = reader_of(source).read(drawings)
        assert not failed
        assert torch.equal(found, source.split("test").inputs)


def moments_of(image) -> tuple[float, float, float]:
    """Centre along x and y, and the spread of the ink, in half sides: pixel by pixel."""
    side, pixels = len(image), [(x, y, float(v)) for y, row in enumerate(image) for x, v in enumerate(row) if v]
    total = sum(v for _, _, v in pixels)
    x, y = (sum(pixel[axis] * pixel[2] for pixel in pixels) / total for axis in (0, 1))
    spread = sum(((px - x) ** 2 + (py - y) ** 2) / 2 * v for px, py, v in pixels) / total
    return (2 * x + 1) / side - 1, (2 * y + 1) / side - 1, 2 * spread**0.5 / side


def test_by_moments_drawings_have_their_ink_in_one_place_and_are_of_one_size():
    drawings = torch.zeros(4, 1, 105, 105)
    drawings[0, 0, 20:60, 30:34], drawings[0, 0, 20:24, 30:60] = 255, 255
    drawings[1] = drawings[0].roll((25, 17), (1, 2))  # elsewhere
    drawings[2, 0, 40:60, 50:52], drawings[2, 0, 40:42, 50:65] = 255, 255  # half as large
    drawings[3, 0, 50:52, 10:95] = 128  # flat: its proportions stay
    done = by_moments(drawings, 32)
    assert done.dtype == torch.uint8
    for image in done:
        x, y, spread = moments_of(image[0])
        assert abs(x) < 0.02
        assert abs(y) < 0.02
        assert spread == pytest.approx(0.38, abs=0.02)
    assert (done[0].int() - done[1].int()).abs().float().mean() < 2
    assert (done[0].int() - done[2].int()).abs().float().mean() < 8
    assert int((done[3] > 60).any(2).sum()) <= 3, "a line stays a line"
    assert torch.equal(by_moments(torch.zeros(1, 1, 20, 20), 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    dot = torch.zeros(1, 1, 105, 105)
    dot[0, 0, 3, 4] = 255
    assert 0 < by_moments(dot, 32).count_nonzero() < 30, "a dot is not blown up to fill the image"


def test_drawings_of_white_on_black_are_the_same_as_of_black_on_white():
    letters = Glyphs().split("test").inputs[:20]
    reader = reader_of(Glyphs())
    white = reader.read([Image.fromarray(letter[0].numpy()) for letter in letters])[0]
    black = reader.read([Image.fromarray(255 - letter[0].numpy()) for letter in letters])[0]
    assert torch.equal(white, letters)
    assert torch.equal(black, letters)
    wide = Image.new("L", (64, 32), 255)
    wide.paste(Image.fromarray(255 - letters[0][0].numpy()), (16, 0))
    found = reader.read([wide])[0]
    assert found.shape == (1, 1, 32, 32)
    assert float(found.float().mean()) == pytest.approx(float(letters[:1].float().mean()) / 4, rel=0.05), "padded, and half as large"


def test_images_are_read_as_their_data_set_reads_them(tmp_path):
    generator, files = np.random.default_rng(0), []
    for number in range(12):
        files.append(tmp_path / "photos" / f"class{number // 2}" / f"{number}.png")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)).save(files[-1])
    source = Images(tmp_path / "photos", size=24, channels=1, fit="crop", cache=False)
    train = source.split("train")
    paths = [tmp_path / "photos" / name for name in train.ids]
    for items in (paths, [str(path) for path in paths], [path.read_bytes() for path in paths], [Image.open(path) for path in paths]):
        assert torch.equal(reader_of(source).read(items)[0], train.inputs)


def test_what_is_no_image_is_named_and_the_others_are_read(tmp_path):
    good = tmp_path / "my photo (1).png"
    Image.new("RGB", (20, 20), "red").save(good)
    cut, empty, huge = tmp_path / "cut.png", tmp_path / "empty.png", tmp_path / "huge.png"
    cut.write_bytes(good.read_bytes()[:60])
    empty.write_bytes(b"")
    Image.new("1", (10_000, 10_000)).save(huge)
    inputs, failed = ImageReader(16).read([cut, good, tmp_path / "none.png", empty, huge, b"text", good, 7])
    assert inputs.shape == (2, 3, 16, 16)
    assert sorted(failed) == [0, 2, 3, 4, 5, 7]
    assert failed[2] == "there is no such file"
    assert failed[3] == "it is empty"
    assert failed[4] == "it has 100,000,000 pixels, more than 89,478,485"
    assert failed[5] == "it is no image"
    assert all("\n" not in why for why in failed.values())
    assert ImageReader(16).read([])[0].shape == (0, 3, 16, 16)


def test_texts_are_read_as_their_data_set_reads_them(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"question {n} Ж,{n // 2}\n" for n in range(16)))
    source = Texts(tmp_path / "t.csv", max_bytes=12)
    train = source.split("train")
    texts = [f"question {n} Ж" for n in range(16) if f"t.csv, row {n + 2}" in train.ids]
    assert torch.equal(reader_of(source).read(texts)[0], train.inputs)
    inputs, failed = reader_of(source).read(["a", "", " \n", "x" * 1_000_000, 5, "b"])
    assert as_texts(inputs) == ["a", "b"]
    assert failed[1] == failed[2] == "it is empty"
    assert failed[3] == "it has 1,000,000 letters, more than 100,000"
    assert "no text" in failed[4]


def test_pairs_read_as_what_they_hold(tmp_path):
    assert reader_of(Pairs(tmp_path / "p.csv", max_bytes=99)).max_bytes == 99
    reader = reader_of(Pairs(tmp_path / "p.csv", holds="images", size=20, channels=1))
    assert (reader.size, reader.channels) == (20, 1)


def test_rows_are_read_as_their_table(tmp_path):
    lines = [f"{n / 7},{'red' if n % 3 else 'blue'},{n // 3}" for n in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["weight,colour,label", *lines]))
    source = Table(tmp_path / "t.csv")
    train = source.split("train")
    numbers = [int(name.rpartition(" ")[2]) - 2 for name in train.ids]
    rows = [{"weight": n / 7, "colour": "red" if n % 3 else "blue", "label": "not used"} for n in numbers]
    reader = reader_of(source)
    assert torch.allclose(reader.read(rows)[0], train.inputs)
    inputs, failed = reader.read([{"weight": None}, {"weight": "much"}, {"colour": "green", "weight": "3"}, "weight"])
    assert inputs.tolist() == [pytest.approx([source.columns["weight"], 0, 0]), [3, 0, 0]]
    assert "weight is a column of numbers" in failed[1]
    assert "no row" in failed[3]


@pytest.mark.parametrize("moments", [False, True])
def test_ink_is_ink_on_any_ground(moments):
    strokes = np.zeros((105, 105), dtype=np.float32)
    strokes[10:50, 20:24], strokes[46:50, 20:60] = 1, 1
    reader = ImageReader(32, channels=1, ink=True, moments=moments)
    grounds = {(255, 0), (0, 255), (254, 0), (235, 0), (20, 220)}  # ground and pen
    found = {pair: reader.read([Image.fromarray((pair[0] + strokes * (pair[1] - pair[0])).astype(np.uint8))])[0] for pair in grounds}
    for pair, image in found.items():
        assert (image.int() - found[255, 0].int()).abs().max() <= (40 if pair == (20, 220) else 1), pair
    noise = np.random.default_rng(0).integers(-6, 7, strokes.shape)
    scanned = Image.fromarray((235 - 200 * strokes + noise).clip(0, 255).astype(np.uint8))
    assert torch.nn.functional.cosine_similarity(reader.read([scanned])[0].flatten().float(), found[255, 0].flatten().float(), 0) > 0.95


def test_a_large_drawing_keeps_its_thin_strokes():
    small, large = torch.zeros(1, 1, 100, 100), torch.zeros(1, 1, 1600, 1600)
    small[..., 10:60, 20:22], large[..., 160:960, 320:352] = 255, 255
    small[..., 58:60, 20:70], large[..., 928:960, 320:1120] = 255, 255
    assert (by_moments(small, 32).int() - by_moments(large, 32).int()).abs().max() < 60
    thin = torch.zeros(1, 1, 1600, 1600)
    thin[..., 160:960, 321:325] = 255
    assert int(by_moments(thin, 32).amax(3).count_nonzero()) >= 20, "unbroken"


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ImageReader, {"size": 0}),
        (ImageReader, {"size": 10**9}),
        (ImageReader, {"size": "8"}),
        (ImageReader, {"size": 8, "channels": 4}),
        (ImageReader, {"size": 8, "fit": "x"}),
        (ImageReader, {"size": 8, "channels": 3, "ink": True}),
        (ImageReader, {"size": 8, "channels": 1, "moments": True}),
        (TextReader, {"max_bytes": "9"}),
        (TextReader, {"max_bytes": 0}),
        (RowReader, {"columns": {}}),
        (RowReader, {"columns": []}),
        (RowReader, {"columns": {"a": "mean"}}),
        (RowReader, {"columns": {"a": [1]}}),
    ],
)
def test_a_reader_that_a_file_cannot_mean_is_refused(kind, arguments):
    with pytest.raises(ValueError, match=r"."):
        kind(**arguments)


def test_a_row_is_told_in_words_as_it_was_read():
    reader = RowReader({"weight": 2.5, "colour": ["blue", "red"], "age": 1.0})
    rows, _ = reader.read([{"weight": "1.25", "colour": "red", "age": "7"}, {"colour": "green"}])
    assert [reader.entries(row) for row in rows] == ["weight 1.25, colour red, age 7", "weight 2.5, colour unknown, age 1"]
