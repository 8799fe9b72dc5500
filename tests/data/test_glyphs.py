"""Glyphs: whole, centred, and no class of validation or test that training has seen."""

import time
import unicodedata

import numpy as np
import pytest

from siamese.data import glyphs
from siamese.data.glyphs import SPLITS, Glyphs
from siamese.data.leakage import duplicates
from siamese.data.samples import Samples

NAMES = ("train", "val", "test")


@pytest.fixture(scope="module")
def splits() -> dict[str, Samples]:
    return {name: Glyphs().split(name) for name in NAMES}


@pytest.fixture(scope="module")
def leaking() -> dict[str, Samples]:
    return {name: Glyphs(homoglyph_filter=False).split(name) for name in NAMES}


def by_class(samples: Samples) -> dict[str, dict[str, bytes]]:
    """class name -> face -> drawing."""
    found: dict[str, dict[str, bytes]] = {}
    for image, label, name in zip(samples.inputs.numpy(), samples.labels.tolist(), samples.ids, strict=True):
        found.setdefault(samples.class_names[label], {})[name.partition("/")[0]] = image.tobytes()
    return found


def look_alikes(known: Samples, unknown: Samples) -> list[tuple[str, str]]:
    """Classes of `unknown` drawn as one of `known` is in at least half of the faces that both have."""
    found, references = [], by_class(known)
    for name, faces in by_class(unknown).items():
        for reference, drawn in references.items():
            shared = faces.keys() & drawn.keys()
            if shared and 2 * sum(faces[face] == drawn[face] for face in shared) >= len(shared):
                found.append((name, reference))
    return found


def ink(image: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row, first and last column that are not black."""
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_every_split_has_scripts_of_its_own(splits):
    scripts = {name: {letter.partition(" ")[0] for letter in samples.class_names} for name, samples in splits.items()}
    assert scripts == {name: set(expected) for name, expected in SPLITS.items()}
    assert len(set.union(*scripts.values())) == sum(map(len, scripts.values()))


def test_there_are_about_as_many_letters_and_images_as_promised(splits):
    assert sum(len(samples) for samples in splits.values()) == pytest.approx(7_270, rel=0.03)
    assert sum(len(samples.class_names) for samples in splits.values()) == pytest.approx(514, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_bytes_with_ink_in_them(splits, name):
    inputs = splits[name].inputs
    assert inputs.dtype.itemsize == 1
    assert not inputs.is_floating_point()
    assert inputs.shape[1:] == (1, 32, 32)
    peak = inputs.flatten(1).max(1).values
    assert (peak > 128).all(), "ink is high"
    assert (inputs == 0).float().mean() > 0.5, "on black"


@pytest.mark.parametrize("name", NAMES)
def test_every_class_has_a_dozen_faces_each_once(splits, name):
    samples = splits[name]
    assert samples.labels.unique().tolist() == list(range(len(samples.class_names)))
    assert samples.labels.bincount().min() >= 12
    assert len(set(samples.ids)) == len(samples)
    assert len(set(samples.class_names)) == len(samples.class_names)


@pytest.mark.parametrize("name", NAMES)
def test_an_id_names_face_and_letter(splits, name):
    samples = splits[name]
    for label, identity in zip(samples.labels.tolist(), samples.ids, strict=True):
        face, _, letter = identity.partition("/")
        assert letter == samples.class_names[label]
        assert face.startswith(("DejaVuSans", "DejaVuSerif", "STIXGeneral"))


@pytest.mark.parametrize("name", NAMES)
def test_letters_stand_in_the_middle(splits, name):
    off = []
    for image, identity in zip(splits[name].inputs[:, 0].numpy(), splits[name].ids, strict=True):
        top, bottom, left, right = ink(image)
        clipped = min(top, left) == 0 or max(bottom, right) == 31
        if not clipped and max(abs(top + bottom - 31), abs(left + right - 31)) > 2:  # twice the way from the middle
            off.append(identity)
    assert not off, f"{len(off)} of {len(splits[name])} are off by more than a pixel, among them {off[:5]}"


def test_no_letter_of_the_test_is_clipped(splits):
    for image, identity in zip(splits["test"].inputs[:, 0].numpy(), splits["test"].ids, strict=True):
        top, bottom, left, right = ink(image)
        assert min(top, left) > 0, identity
        assert max(bottom, right) < 31, identity


@pytest.mark.parametrize(("known", "unknown"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_no_class_is_drawn_as_one_of_another_split(splits, known, unknown):
    assert look_alikes(splits[known], splits[unknown]) == []
    near = duplicates(splits[known].inputs, splits[unknown].inputs)
    assert {splits[unknown].ids[row] for row in near.right.tolist()} == set()


def test_no_letter_is_left_out_for_nothing(leaking):
    """Each of the list is in some face nearly a letter of an earlier split."""
    twins = set()
    for known, unknown in (("train", "val"), ("train", "test"), ("val", "test")):
        rows = duplicates(leaking[known].inputs, leaking[unknown].inputs).right
        twins |= {leaking[unknown].class_names[label] for label in leaking[unknown].labels[rows].tolist()}
    assert {unicodedata.name(letter) for letter in glyphs._SEEN} <= twins


@pytest.mark.parametrize(("unknown", "twin"), [("val", "CYRILLIC CAPITAL LETTER A"), ("test", "GREEK CAPITAL LETTER ALPHA")])
def test_without_the_filter_classes_leak(leaking, unknown, twin):
    found = look_alikes(leaking["train"], leaking[unknown])
    assert len(found) > 10
    assert (twin, "LATIN CAPITAL LETTER A") in found


@pytest.mark.parametrize("name", NAMES)
def test_the_filter_only_takes_away(splits, leaking, name):
    kept, everything = by_class(splits[name]), by_class(leaking[name])
    assert kept.items() <= everything.items()
    assert len(kept) < len(everything) or name == "train"


def test_the_same_letters_come_every_time(splits):
    first = {name: samples.fingerprint() for name, samples in splits.items()}
    glyphs._letters.cache_clear()
    glyphs._font.cache_clear()
    started = time.perf_counter()
    again = {name: Glyphs().split(name) for name in NAMES}
    assert time.perf_counter() - started < 5, "seconds for all splits"
    assert {name: samples.fingerprint() for name, samples in again.items()} == first
    assert len(set(first.values())) == 3
    assert all(again[name].ids == splits[name].ids for name in NAMES)


def test_a_fingerprint_changes_with_one_pixel_one_label_or_the_order(splits):
    samples = splits["val"]
    inputs, labels = samples.inputs.clone(), samples.labels.clone()
    inputs[7, 0, 3, 3] += 1
    labels[0] = 1
    others = [
        Samples(inputs, samples.labels, samples.class_names, samples.ids),
        Samples(samples.inputs, labels, samples.class_names, samples.ids),
        Samples(samples.inputs.flip(0), samples.labels.flip(0), samples.class_names, samples.ids),
        Samples(samples.inputs[1:], samples.labels[1:], samples.class_names, samples.ids[1:]),
    ]
    assert len({samples.fingerprint(), *(other.fingerprint() for other in others)}) == 5
