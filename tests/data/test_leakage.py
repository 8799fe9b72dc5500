"""Duplicates and near-duplicates are found, and little else: planted ones, the one that Omniglot is known for, and homoglyphs."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from siamese.data.glyphs import Glyphs
from siamese.data.leakage import duplicates, equal
from siamese.data.omniglot import Omniglot


def shifted(image: Image.Image) -> Image.Image:
    pixels = np.pad(np.asarray(image), ((1, 0), (1, 0), (0, 0)), "edge")[:-1, :-1]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


CHANGES = {
    "re-encoded": lambda image: encoded(image, 40),
    "reduced": lambda image: image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.BICUBIC),
    "enlarged": lambda image: image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.BILINEAR),
    "shifted by a pixel": shifted,
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "darkened": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
}


def photos() -> list[Image.Image]:
    """Parts of two photographs that lie side by side, those that show next to nothing left out."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photo in load_sample_images().images:
        parts += [photo[y : y + 70, x : x + 70] for y in range(0, 350, 70) for x in range(0, 560, 70)]
    return [Image.fromarray(part) for part in parts if part.std() > 20]


def letters() -> list[Image.Image]:
    return [Image.fromarray(image[0].numpy()).convert("RGB") for image in Glyphs().split("train").inputs[::6]]


def drawings() -> list[Image.Image]:
    """As many kinds of strokes as there are images, of three lines each, at 105 x 105."""
    rng, images = np.random.default_rng(0), []
    from PIL import ImageDraw

    for _ in range(300):
        image = Image.new("RGB", (105, 105), "white")
        for _ in range(3):
            ImageDraw.Draw(image).line([tuple(point) for point in rng.integers(10, 95, (3, 2)).tolist()], "black", 3)
        images.append(image)
    return images


def inputs(images: list[Image.Image], size: int) -> torch.Tensor:
    pixels = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(("made", "size"), [(photos, 64), (letters, 32), (drawings, 64), (drawings, 128)])
def test_planted_near_duplicates_are_found_and_little_else(made, size):
    """At least 95 % of each kind, and at least 95 % of what is found, but for pairs that were alike before anything was planted."""
    images = made()
    if made is letters:
        images = [image.resize((64, 64), Image.Resampling.BICUBIC) for image in images]  # from where a reduced one is still legible
    training = inputs(images, size)
    before = duplicates(training)
    alike = set(zip(before.left.tolist(), before.right.tolist(), strict=True))
    hits = wrong = 0
    for name, change in CHANGES.items():
        found = duplicates(training, inputs([change(image) for image in images], size))
        pairs = list(zip(found.left.tolist(), found.right.tolist(), strict=True))
        hit = sum(left == right for left, right in pairs)
        assert hit >= 0.95 * len(images), name
        hits += hit
        wrong += sum(left != right and (min(left, right), max(left, right)) not in alike for left, right in pairs)
    assert wrong <= 0.05 * hits


def test_equal_inputs_are_found_by_their_bytes_whatever_they_are():
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    table[30], table[40], table[41] = table[3], table[5], table[5]
    assert equal(table).tolist() == [[3, 30], [5, 40], [5, 41]]
    assert equal(table[:10], table).tolist() == [[row, row] for row in range(10)] + [[3, 30], [5, 40], [5, 41]]
    found = duplicates(table)
    assert (found.left.tolist(), found.right.tolist(), found.alike.tolist()) == ([3, 5, 5], [30, 40, 41], [1, 1, 1])
    assert [len(part) for part in duplicates(table[:10], table[10:20])] == [0, 0, 0]


def test_the_rows_are_those_of_a_comparison_of_all_with_all():
    """Hashing finds what comparing every pair would, but for a few that are barely alike."""
    from siamese.data.leakage import _compared

    images = Glyphs(homoglyph_filter=False)
    left, right = images.split("train").inputs[::10], images.split("val").inputs[:220]
    every = torch.cartesian_prod(torch.arange(len(left)), torch.arange(len(right))).numpy()
    truth = np.concatenate([_compared(left, right, some) for some in np.array_split(every, 40)])
    found = duplicates(left, right)
    pairs = set(zip(found.left.tolist(), found.right.tolist(), strict=True))
    true = {(int(one), int(other)) for one, other, _ in truth}
    assert len(true) >= 10
    assert pairs <= true | {tuple(row) for row in equal(left, right).tolist()}
    assert len(true - pairs) <= 0.05 * len(true)
    assert found.alike.diff().max() <= 0, "the most alike come first"


def test_order_makes_no_difference():
    glyphs = Glyphs(homoglyph_filter=False)
    left, right = glyphs.split("train").inputs[::4], glyphs.split("test").inputs[::4]
    turned = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    one, other = duplicates(left, right), duplicates(left, right[turned])
    assert len(one.left) > 10
    assert set(zip(*(part.tolist() for part in one[:2]), strict=True)) == set(
        zip(other.left.tolist(), turned[other.right].tolist(), strict=True)
    )


def test_without_the_filter_of_homoglyphs_it_lights_up():
    counts = {}
    for filtered in (True, False):
        glyphs = Glyphs(filtered)
        found = duplicates(glyphs.split("train").inputs, glyphs.split("val").inputs)
        counts[filtered] = len(found.right.unique()) / len(glyphs.split("val"))
    assert counts[True] < 0.06
    assert counts[False] > 0.3


def test_images_of_one_colour_are_alike_only_when_equal():
    blank = torch.zeros(4, 1, 16, 16, dtype=torch.uint8) + torch.tensor([0, 0, 100, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    found = duplicates(blank)
    assert (found.left.tolist(), found.right.tolist()) == ([0], [1])


@pytest.mark.parametrize("count", [0, 1])
def test_few_images_have_no_duplicates(count):
    assert [len(part) for part in duplicates(torch.zeros(count, 3, 32, 32), torch.ones(1, 3, 32, 32))] == [0, 0, 0]
    assert [len(part) for part in duplicates(torch.zeros(count, 3, 32, 32))] == [0, 0, 0]


def test_floats_are_compared_as_bytes_are():
    images = Glyphs().split("val").inputs[:300]
    one, other = duplicates(images), duplicates(images.float() / 255)
    assert torch.equal(one.left, other.left)
    assert torch.equal(one.right, other.right)


OMNIGLOT = Path(os.environ.get("SIAMESE_DATA_DIR", "data"), "omniglot")


@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason=f"no Omniglot in {OMNIGLOT}")
def test_omniglots_known_duplicate_is_found():
    train = Omniglot(OMNIGLOT).split("train")
    assert [[train.ids[row] for row in pair] for pair in equal(train.inputs).tolist()] == [
        [f"images_background/Braille/character01/0192_{number}.png" for number in ("03", "19")]
    ]
