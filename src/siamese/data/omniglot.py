"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each. `python scripts/download.py omniglot` fetches it.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015,
doi 10.1126/science.aab3050. The background set is for training and validation, the evaluation set is the test; every
split has alphabets of its own, but for `background="characters"`.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from siamese.data.reading import by_area, by_moments
from siamese.data.samples import Samples, Source

BACKGROUNDS = {
    "full": ("images_background",),
    "small1": ("images_background_small1",),
    "small2": ("images_background_small2",),
    "characters": ("images_background", "images_evaluation"),
}
# Held out where `validation` is not said: alphabets, of "characters" characters.
_HELD_OUT = {"full": 5, "small1": 1, "small2": 1, "characters": 100}
_TRAINED_ON = 1_200  # characters of the 1,623
_RUNS = 10  # of each alphabet of validation
_SIDE = 105  # pixels, of every drawing in the authors' files
_REMEDY = "run `python scripts/download.py omniglot`"


class Omniglot(Source):
    """Drawings as uint8 images [1, size, size], ink high on black, reduced from 105 x 105 by area averaging.

    Classes are named "Alphabet/character01"; an id is the drawing's path inside its archive.

    Args:
        path: the folder with the authors' zips, which are read in place; an unpacked folder `X` may stand for `X.zip`.
        background: "full" (30 alphabets, 964 characters), or one of the authors' reduced sets of 5 alphabets, "small1"
            (136 characters) and "small2" (156). "characters" is another task: 1,200 characters of all 50 alphabets, drawn by a
            constant seed, are the background, the other 423 the test (Vinyals et al. 2016, arXiv:1606.04080).
        size: height and width of an image, in pixels.
        validation: how many alphabets (of "characters": characters) are taken out of the background for validation; 5 of "full",
            1 of a reduced set, 100 characters if None. They are drawn with a constant seed: a run's seed never changes the split.
            "others", of a reduced set, is all alphabets of the full background that it lacks. 0 takes none out, for a last run with
            all of them: what is called validation then are as many as usual of those that are trained on.
        moments: each drawing is moved and scaled by its ink, see `siamese.data.reading.by_moments`.
        rotated_classes: in the training split every class also counts, turned by 90, 180 and 270 degrees
            counter-clockwise, as three more (Santoro et al., "Meta-learning with memory-augmented neural networks", 2016).

    Raises:
        ValueError: for an unknown background or split, a validation that leaves a split empty, a damaged file.
        FileNotFoundError: when a split is asked for whose file is missing.
    """

    def __init__(
        self,
        path: str | Path,
        background: str = "full",
        size: int = 32,
        validation: int | str | None = None,
        rotated_classes: bool = False,
        moments: bool = False,
    ):
        if background not in BACKGROUNDS:
            raise ValueError(f"background={background!r}: choose one of {', '.join(BACKGROUNDS)}")
        if validation is None:
            validation = _HELD_OUT[background]
        reduced = background.startswith("small")
        counted = isinstance(validation, int) and not isinstance(validation, bool) and validation >= 0
        if not counted and not (reduced and validation == "others"):
            others = ", or others" if reduced else ""
            raise ValueError(f"validation={validation}: background={background} takes a number, 0 for none held out{others}")
        self.path, self.background, self.size = Path(path), background, size
        self.validation, self.rotated_classes, self.moments = validation, rotated_classes, moments
        self.trained_on = ("val",) if validation == 0 else ()
        self._splits: dict[str, Samples] = {}

    def split(self, name: str) -> Samples:
        """Decoded at the first call, the same object afterwards."""
        if name not in ("train", "val", "test"):
            raise ValueError(f"Omniglot has no split {name!r}: choose one of train, val, test")
        if name not in self._splits:
            self._splits[name] = self._load(name)
        return self._splits[name]

    def reading(self) -> dict:
        moments = {"moments": True} if self.moments else {}
        return {"_target_": "siamese.data.reading.ImageReader", "size": self.size, "channels": 1, "ink": True, **moments}

    def oneshot_runs(self, split: str = "test") -> list[tuple[Samples, Samples]]:
        """20-way one-shot classification within an alphabet, as (queries, supports): the authors' 20 runs, or such runs of validation.

        Both have 20 images; label i is the class of the i-th training image, whose one example stands at supports[i]. Validation's
        are drawn by a constant seed, 10 of each alphabet that has 20 characters: supports are drawings of one person, queries of another.
        There are none where characters, or alphabets, that are asked about are trained on.
        """
        if self.background == "characters" or split in self.trained_on:
            return []
        if split == "val":
            return list(self._drawn_runs(self.split("val")))
        archive = _Archive(self.path, "all_runs")
        runs = []
        for table in sorted(key for key in archive.keys if key.endswith("/class_labels.txt")):
            pairs = [line.split() for line in archive.read(table).decode().replace("\\", "/").splitlines() if line.strip()]
            answers = sorted(training for _, training in pairs)
            names = [PurePosixPath(key).stem for key in answers]
            queries = Samples(
                self._images(archive, [test for test, _ in pairs]),
                torch.tensor([answers.index(training) for _, training in pairs]),
                names,
                [test for test, _ in pairs],
            )
            runs.append((queries, Samples(self._images(archive, answers), torch.arange(len(answers)), names, answers)))
        if not runs:
            raise ValueError(f"{archive.path} holds no runNN/class_labels.txt: delete it and {_REMEDY}")
        return runs

    @staticmethod
    def _drawn_runs(samples: Samples) -> Iterator[tuple[Samples, Samples]]:
        draw = np.random.default_rng(0)
        people: dict[str, dict[str, int]] = {}  # of each character, who has drawn which row: people number their drawings alike
        for row, name in enumerate(samples.ids):
            people.setdefault(samples.class_names[samples.labels[row]], {})[PurePosixPath(name).stem.rpartition("_")[2]] = row
        for alphabet in sorted({name.split("/")[0] for name in people}):
            characters = [name for name in sorted(people) if name.startswith(f"{alphabet}/")]
            for _ in range(_RUNS if len(characters) >= 20 else 0):
                asked = draw.choice(characters, 20, replace=False).tolist()
                both = sorted(set.intersection(*(set(people[name]) for name in asked)))
                if len(both) < 2:
                    continue
                yield tuple(
                    Samples(samples.inputs[rows], torch.arange(20), asked, [samples.ids[row] for row in rows])
                    for rows in ([people[name][person] for name in asked] for person in draw.choice(both, 2, replace=False).tolist())
                )

    def _load(self, name: str) -> Samples:
        inputs, ids, classes = [], [], []
        for archive, keys in self._keys(name):
            inputs.append(self._images(archive, keys))
            ids += [f"{archive.name}/{key}" for key in keys]
            classes += [key.rpartition("/")[0] for key in keys]
        if not ids:
            raise ValueError(f"background={self.background}, validation={self.validation} leave no drawings for {name}")
        names, labels = np.unique(classes, return_inverse=True)
        inputs, labels, names = torch.cat(inputs), torch.from_numpy(labels), names.tolist()
        if name == "train" and self.rotated_classes:
            turns = ["", " rotated 90", " rotated 180", " rotated 270"]
            inputs = torch.cat([inputs.rot90(turn, (2, 3)) for turn in range(4)])
            labels = torch.cat([labels + turn * len(names) for turn in range(4)])
            names, ids = ([text + turn for turn in turns for text in texts] for texts in (names, ids))
        return Samples(inputs, labels, names, ids)

    def _keys(self, split: str) -> Iterator[tuple["_Archive", list[str]]]:
        """Which drawings of which archive are a split's."""
        names = BACKGROUNDS[self.background]
        if self.background != "characters" and split == "test":
            names = ("images_evaluation",)
        if split == "val" and self.validation == "others":
            names = BACKGROUNDS["full"]
        archives = [_Archive(self.path, name) for name in names]
        drawings = [[key for key in archive.keys if key.endswith(".png") and key.count("/") == 2] for archive in archives]
        for archive, keys in zip(archives, drawings, strict=True):
            if not keys:
                raise ValueError(f"{archive.path} holds no alphabet/character/drawing.png: delete it and {_REMEDY}")
        depth = 2 if self.background == "characters" else 1
        unit = lambda key: "/".join(key.split("/")[:depth])  # noqa: E731
        kept = self._units(split, sorted({unit(key) for keys in drawings for key in keys}))
        for archive, keys in zip(archives, drawings, strict=True):
            if chosen := sorted(key for key in keys if unit(key) in kept):
                yield archive, chosen

    def _units(self, split: str, units: list[str]) -> set[str]:
        """Of these alphabets, or characters, those of a split."""
        if self.background != "characters" and split == "test":
            return set(units)
        if self.validation == "others":
            if split == "train":
                return set(units)
            own = _Archive(self.path, BACKGROUNDS[self.background][0])
            return set(units) - {key.split("/")[0] for key in own.keys}
        order = [units[place] for place in torch.randperm(len(units), generator=torch.Generator().manual_seed(0))]
        if self.background == "characters":
            if split == "test":
                return set(order[_TRAINED_ON:])
            order = order[:_TRAINED_ON]
        held_out = self.validation or _HELD_OUT[self.background]
        if held_out >= len(order):
            kind = "characters" if self.background == "characters" else "alphabets"
            raise ValueError(
                f"validation={held_out}: training and validation need at least one each of the background's {len(order)} {kind}"
            )
        if split == "val":
            return set(order[:held_out])
        return set(order[self.validation :])

    def _images(self, archive: "_Archive", keys: list[str]) -> Tensor:
        """[N, 1, size, size] uint8."""
        images = torch.empty(len(keys), 1, self.size, self.size, dtype=torch.uint8)
        for start in range(0, len(keys), 256):  # so many stay in the processor's cache: averaging all at once takes six times as long
            chunk = keys[start : start + 256]
            # One strip for many drawings, as handing each one's pixels over from Pillow takes longer than decoding it.
            strip = Image.new("L", (_SIDE, _SIDE * len(chunk)))
            for row, key in enumerate(chunk):
                strip.paste(archive.drawing(key), (0, _SIDE * row))
            ink = 255 - torch.from_numpy(np.array(strip)).view(-1, 1, _SIDE, _SIDE).float()
            images[start : start + 256] = (by_moments if self.moments else by_area)(ink, self.size)
        return images


class _Archive:
    """The files of `folder/name.zip`, or of the unpacked `folder/name`, keyed by their path below the top folder `name`."""

    def __init__(self, folder: Path, name: str):
        self.name, self.path = name, folder / f"{name}.zip"
        if self.path.is_file():
            try:
                archive = zipfile.ZipFile(self.path)
            except (OSError, RuntimeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path} cannot be read ({error}): delete it and {_REMEDY}") from None
            self._read, names = archive.read, archive.namelist()
        elif (folder / name).is_dir():
            self.path = folder / name
            self._read = lambda file: (self.path / file).read_bytes()
            names = [path.relative_to(self.path).as_posix() for path in self.path.rglob("*")]
        else:
            raise FileNotFoundError(f"{self.path} is missing: {_REMEDY}")
        self.keys: dict[str, str] = {}
        for file in names:
            parts = PurePosixPath(file.replace("\\", "/")).parts
            if file.endswith((".png", ".txt")) and not any(part.startswith((".", "__MACOSX")) for part in parts):
                self.keys["/".join(parts[1:] if parts[0] == name else parts)] = file

    def read(self, key: str) -> bytes:
        try:
            return self._read(self.keys[key])
        except KeyError:
            raise ValueError(f"{self.path} lacks {key}: delete it and {_REMEDY}") from None
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path}: {key} cannot be read ({error}): delete it and {_REMEDY}") from None

    def drawing(self, key: str) -> Image.Image:
        data = self.read(key)
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG",))
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.path}: {key} is no readable PNG ({error}): delete it and {_REMEDY}") from None
        if image.size != (_SIDE, _SIDE):
            raise ValueError(f"{self.path}: {key} is {image.width} x {image.height} pixels, not {_SIDE} x {_SIDE}")
        return image
