"""Glyphs: real letters in real typefaces, drawn from the fonts that matplotlib ships. No download, half a second.

Classes are letters, samples are typefaces. Train on Latin, validate on Cyrillic, test on Armenian, Georgian and Greek:
the test judges scripts that were never seen. Letters of two scripts that look the same (Latin A, Greek Alpha) would put
a test class into training, so they are one class, kept under the script that comes first. Letters that look so in a few typefaces
alone (Greek alpha in an italic) are left out: nothing that is judged, or nearly that, occurs in training.
"""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from siamese.data.samples import Samples, Source

SPLITS = {"train": ["LATIN"], "val": ["CYRILLIC"], "test": ["ARMENIAN", "GEORGIAN", "GREEK"]}
_FACES = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
_MIN_FACES = 12
# In some typeface a near-duplicate of a letter of an earlier split, by `siamese.data.leakage`: a list, as finding them takes seconds.
_SEEN = frozenset("КУШвзикнптшћӇӏӨαηθικϽԼՍահյոպսցւօΦγπՓ")


class Glyphs(Source):
    """Letters as uint8 images [1, 32, 32], ink high on black.

    Args:
        homoglyph_filter: False leaves letters of two scripts that look alike as two classes, and so leaks classes between
            splits: only to see what the filter is worth.
    """

    def __init__(self, homoglyph_filter: bool = True):
        self.homoglyph_filter = homoglyph_filter

    def reading(self) -> dict:
        return {"_target_": "siamese.data.reading.ImageReader", "size": 32, "channels": 1, "ink": True}

    def split(self, name: str) -> Samples:
        letters = _letters(self.homoglyph_filter)
        wanted = [letter for letter in letters if _script(letter) in SPLITS[name]]
        images, labels, ids = [], [], []
        for label, letter in enumerate(wanted):
            for face, image in letters[letter].items():
                images.append(image)
                labels.append(label)
                ids.append(f"{face}/{unicodedata.name(letter)}")
        inputs = torch.from_numpy(np.stack(images)).unsqueeze(1)
        return Samples(inputs, torch.tensor(labels), [unicodedata.name(letter) for letter in wanted], ids)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _letters(homoglyph_filter: bool) -> dict[str, dict[str, np.ndarray]]:
    """Every letter kept, in the order of the splits' scripts and of Unicode, with its drawing in each face that has it."""
    scripts = [script for group in SPLITS.values() for script in group]
    covered: dict[str, list[Path]] = {}
    folder = Path(get_data_path()) / "fonts" / "ttf"
    for path in sorted(path for pattern in _FACES for path in folder.glob(pattern) if "Display" not in path.name):
        for code in FT2Font(str(path)).get_charmap():
            letter = chr(code)
            plain = unicodedata.category(letter) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(letter)
            if plain and _script(letter) in scripts:
                covered.setdefault(letter, []).append(path)
    letters = [letter for letter, paths in covered.items() if len(paths) >= _MIN_FACES]
    letters.sort(key=lambda letter: (scripts.index(_script(letter)), letter))
    drawings = {letter: {path.stem: _draw(letter, path) for path in covered[letter]} for letter in letters}
    if not homoglyph_filter:
        return drawings
    return {letter: faces for letter, faces in _without_homoglyphs(drawings).items() if letter not in _SEEN}


def _without_homoglyphs(drawings: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Drop each letter whose drawings equal an earlier letter's in at least half of the faces that both have."""
    kept: dict[str, dict[str, np.ndarray]] = {}
    owners: dict[tuple[str, bytes], list[str]] = {}  # (face, drawing) -> the letters that are drawn so
    for letter, faces in drawings.items():
        equal: dict[str, int] = {}
        for face, image in faces.items():
            for other in owners.get((face, image.tobytes()), ()):
                equal[other] = equal.get(other, 0) + 1
        if any(2 * count >= len(faces.keys() & drawings[other].keys()) for other, count in equal.items()):
            continue
        kept[letter] = faces
        for face, image in faces.items():
            owners.setdefault((face, image.tobytes()), []).append(letter)
    return kept


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), 24, layout_engine=ImageFont.Layout.BASIC)


def _draw(letter: str, path: Path) -> np.ndarray:
    """The letter at 24 px, the bounding box of its ink in the middle of 32 x 32."""
    sheet = Image.new("L", (96, 96))
    ImageDraw.Draw(sheet).text((32, 32), letter, fill=255, font=_font(path))
    ink = sheet.crop(sheet.getbbox())  # the font's own box goes by the advance, not by the ink
    canvas = Image.new("L", (32, 32))
    canvas.paste(ink, ((32 - ink.width) // 2, (32 - ink.height) // 2))
    return np.asarray(canvas)
