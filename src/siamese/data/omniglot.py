"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each. `python scripts/download.py omniglot` fetches it.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015,
doi 10.1126/science.aab3050. The background set is for training and validation, the evaluation set is the test; every
split has alphabets of its own.
"""

import io
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from siamese.data.samples import Samples, Source

BACKGROUNDS = {"full": "images_background", "small1": "images_background_small1", "small2": "images_background_small2"}
_SIDE = 105  # pixels, of every drawing in the authors' files
_REMEDY = "run `python scripts/download.py omniglot`"


class Omniglot(Source):
    """Drawings as uint8 images [1, size, size], ink high on black, reduced from 105 x 105 by area averaging.

    Classes are named "Alphabet/character01"; an id is the drawing's path inside its archive.

    Args:
        path: the folder with the authors' zips, which are read in place; an unpacked folder `X` may stand for `X.zip`.
        background: "full" (30 alphabets, 964 characters), or one of the authors' reduced sets of 5 alphabets, "small1"
            (136 characters) and "small2" (156).
        size: height and width of an image, in pixels.
        validation_alphabets: how many alphabets are taken out of the background for validation, 5 of "full" and 1 of a
            reduced set if None. They are drawn with a constant seed: a run's seed never changes the split.
        rotated_classes: in the training split every class also counts, turned by 90, 180 and 270 degrees
            counter-clockwise, as three more (Santoro et al., "Meta-learning with memory-augmented neural networks", 2016).

    Raises:
        ValueError: for an unknown background or split, validation alphabets that leave a split empty, a damaged file.
        FileNotFoundError: when a split is asked for whose file is missing.
    """

    def __init__(
        self,
        path: str | Path,
        background: str = "full",
        size: int = 32,
        validation_alphabets: int | None = None,
        rotated_classes: bool = False,
    ):
        if background not in BACKGROUNDS:
            raise ValueError(f"background={background!r}: choose one of {', '.join(BACKGROUNDS)}")
        if validation_alphabets is None:
            validation_alphabets = 5 if background == "full" else 1
        self.path, self.background, self.size = Path(path), background, size
        self.validation_alphabets, self.rotated_classes = validation_alphabets, rotated_classes
        self._splits: dict[str, Samples] = {}

    def split(self, name: str) -> Samples:
        """Decoded at the first call, the same object afterwards."""
        if name not in ("train", "val", "test"):
            raise ValueError(f"Omniglot has no split {name!r}: choose one of train, val, test")
        if name not in self._splits:
            self._splits[name] = self._load(name)
        return self._splits[name]

    def reading(self) -> dict:
        return {"_target_": "siamese.data.reading.ImageReader", "size": self.size, "channels": 1, "ink": True}

    def oneshot_runs(self) -> list[tuple[Samples, Samples]]:
        """The authors' 20 runs of 20-way one-shot classification within an alphabet, as (queries, supports).

        Both have 20 images; label i is the class of the i-th training image, whose one example stands at supports[i].
        """
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

    def _load(self, name: str) -> Samples:
        archive = _Archive(self.path, "images_evaluation" if name == "test" else BACKGROUNDS[self.background])
        keys = sorted(key for key in archive.keys if key.endswith(".png") and key.count("/") == 2)
        if not keys:
            raise ValueError(f"{archive.path} holds no alphabet/character/drawing.png: delete it and {_REMEDY}")
        if name != "test":
            held_out = self._held_out(sorted({key.split("/")[0] for key in keys}))
            keys = [key for key in keys if (key.split("/")[0] in held_out) == (name == "val")]
        classes = [key.rpartition("/")[0] for key in keys]
        names, labels = np.unique(classes, return_inverse=True)
        inputs, labels, names = self._images(archive, keys), torch.from_numpy(labels), names.tolist()
        ids = [f"{archive.name}/{key}" for key in keys]
        if name == "train" and self.rotated_classes:
            turns = ["", " rotated 90", " rotated 180", " rotated 270"]
            inputs = torch.cat([inputs.rot90(turn, (2, 3)) for turn in range(4)])
            labels = torch.cat([labels + turn * len(names) for turn in range(4)])
            names, ids = ([text + turn for turn in turns for text in texts] for texts in (names, ids))
        return Samples(inputs, labels, names, ids)

    def _held_out(self, alphabets: list[str]) -> set[str]:
        if not 0 < self.validation_alphabets < len(alphabets):
            raise ValueError(
                f"validation_alphabets={self.validation_alphabets}: training and validation need at least one each "
                f"of the background's {len(alphabets)} alphabets"
            )
        order = torch.randperm(len(alphabets), generator=torch.Generator().manual_seed(0))
        return {alphabets[place] for place in order[: self.validation_alphabets]}

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
            images[start : start + 256] = interpolate(ink, size=(self.size, self.size), mode="area").round()
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
