"""The field's image benchmarks, in their authors' layouts and by their standard splits; each class says where its files come from.

The test split is as published. Validation is a share of the training classes, drawn by a hash of their names.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_metric_learning import datasets
from torch import Tensor

from siamese.data.images import Images
from siamese.data.listing import Listed
from siamese.data.samples import Finding, Samples, Tuples

_FACES = ("lfw", "lfw_funneled", "lfw-deepfunneled")


class Benchmark(Images):
    """Images of a published data set, see `Images`. A subclass lists all of train and test.

    Args:
        path: the folder that what was downloaded is unpacked in.
        size, channels, fit, cache: as of `Images`.
        val: a share of the training classes, or a list of them, for validation.

    Raises:
        ValueError: values out of their range; a list of the data set that is broken (names it).
        OSError: a list of the data set that is missing (names it).
    """

    site: str
    published: tuple[tuple[int, int], ...] = ()  # classes and images of train and of test

    def __init__(
        self, path: str | Path, size: int = 64, channels: int = 3, fit: str = "crop", val: float | list[str] = 0.1, cache: bool = True
    ):
        super().__init__(path, size, channels, fit, val, cache=cache)

    def entries(self) -> Iterator[Listed]:
        """All images of train and test. Raises ValueError, with the name of the file, for a list that is broken."""
        raise NotImplementedError

    def listed(self) -> list[Listed]:
        try:
            os.listdir(self.path)
            listed = list(self.entries())
        except OSError as error:
            raise type(error)(f"{error.filename} cannot be read ({error.strerror}): unpack there what {self.site} offers") from None
        except ValueError as error:
            raise ValueError(f"{error}: unpack anew what {self.site} offers") from None
        other = []
        for split, (classes, images) in zip(("train", "test"), self.published, strict=False):
            mine = [sample.label for sample in listed if sample.split == split]
            if (len(set(mine)), len(mine)) != (classes, images):
                other.append(f"{split}: {len(set(mine)):,} classes and {len(mine):,} images, not {classes:,} and {images:,}")
        what = "splits that are not as published, so that their figures are no benchmark's"
        self._findings[""] = [Finding(True, what, other, f"unpack anew what {self.site} offers")] if other else []
        return listed


class _Known(Benchmark):
    """One that pytorch-metric-learning has the splits of. Its lists pass over what they cannot place: the images are counted here."""

    known: type
    lists: tuple[str, ...]

    def entries(self) -> Iterator[Listed]:
        lists = " or ".join(str(self.path / name) for name in self.lists)
        for split in ("train", "test"):
            try:
                known = self.known(str(self.path), split)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{lists} is broken ({error})") from None
            if not known.paths:
                raise ValueError(f"{lists} is broken (no image of {split} is listed)")
            for path, label in zip(known.paths, known.labels, strict=True):
                what = Path(path).relative_to(self.path)
                yield Listed(what.as_posix(), self.class_name(what, label), what.as_posix(), split)

    def class_name(self, path: Path, label: int) -> str:
        return path.parent.name


class CUB200(_Known):
    """Caltech-UCSD Birds 200-2011: the first 100 species to train, the last 100 to test. Below `path` lies CUB_200_2011/images.txt.

    Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", CNS-TR-2011-001; split: Song et al. 2016, arXiv:1511.06452.
    """

    known, site = datasets.CUB, "https://www.vision.caltech.edu/datasets/cub_200_2011"
    lists = ("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt")
    published = (100, 5864), (100, 5924)


class Cars196(_Known):
    """Stanford Cars: the first 98 models to train, the last 98 to test, of both the authors' folders of images.

    The authors' site is gone; below `path` lie names.csv, anno_train.csv, anno_test.csv and car_data/ of the copy at `site`.

    Krause et al., "3D Object Representations for Fine-Grained Categorization", 3dRR 2013; split: Song et al. 2016, arXiv:1511.06452.
    """

    known, site = datasets.Cars196, "https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder"
    lists = ("names.csv", "anno_train.csv", "anno_test.csv")
    published = (98, 8054), (98, 8131)


class StanfordOnlineProducts(_Known):
    """Stanford Online Products: 11,318 products to train, 11,316 others to test. Below `path` lies
    Stanford_Online_Products/Ebay_train.txt. Classes are named "bicycle/1".

    Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, arXiv:1511.06452.
    """

    known, site = datasets.StanfordOnlineProducts, "https://cvgl.stanford.edu/projects/lifted_struct"
    lists = ("Stanford_Online_Products/Ebay_train.txt", "Stanford_Online_Products/Ebay_test.txt")
    published = (11318, 59551), (11316, 60502)

    def class_name(self, path: Path, label: int) -> str:
        return f"{path.parent.name.removesuffix('_final')}/{label}"


class InShop(Benchmark):
    """DeepFashion In-shop Clothes Retrieval: 3,997 items to train, 3,985 others to test, where queries are compared with a gallery.

    Below `path` lie Eval/list_eval_partition.txt and Img/img, or list_eval_partition.txt and img. Classes are named
    "WOMEN/Dresses/id_00000002".

    Liu et al., "DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich Annotations", CVPR 2016.
    """

    site = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html"
    published = (3997, 25882), (3985, 26830)

    def entries(self) -> Iterator[Listed]:
        lists, images = (folder if (self.path / folder).is_dir() else "" for folder in ("Eval", "Img"))
        file = self.path / lists / "list_eval_partition.txt"
        lines = [(number, line) for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
        count = lines[0][1].strip() if lines else ""
        if count != str(len(lines) - 2):  # it and the header
            raise ValueError(f"{file} lists {max(len(lines) - 2, 0)} images, but in line 1 says {count!r}")
        names: dict[str, str] = {}
        for number, line in lines[2:]:
            image, item, status = line.split() if len(line.split()) == 3 else ("", "", "")
            if status not in ("train", "query", "gallery"):
                raise ValueError(f"{file}, line {number} must be an image, an item and train, query or gallery: it is {line.strip()!r}")
            name = names.setdefault(item, "/".join([*Path(image).parts[1:-2], item]))
            what = (Path(images) / image).as_posix()
            split, role = ("train", "") if status == "train" else ("test", status)
            yield Listed(what, name, f"{file.name}, line {number}: {what}", split, role=role)


class LFWPairs(NamedTuple):
    """The pairs of Labeled Faces in the Wild.

    images: "Name/Name_0001.jpg", each once, in order; left, right: int64 [P], places among them.
    same: bool [P], of one person; fold: int64 [P], from 0.
    """

    images: list[str]
    left: Tensor
    right: Tensor
    same: Tensor
    fold: Tensor


def lfw_pairs(file: str | Path) -> LFWPairs:
    """Read pairs.txt: "10 300", folds and pairs of each kind; then in each fold the same, "Name 1 2", then the different, "Name 1 Other 2".

    Raises:
        ValueError: another line stands where one of these belongs (names file and line), or there are more or fewer.
        OSError: the file cannot be read.
    """
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    first = lines[0].split() if lines else []
    if len(first) != 2 or not all(word.isdecimal() for word in first) or 0 in map(int, first):
        raise ValueError(f"{file}, line 1 must be the number of folds and of pairs of each kind in them, as in 10 300")
    folds, each = map(int, first)
    pairs = [(number, line.split()) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if len(pairs) != 2 * folds * each:
        raise ValueError(f"{file} has {len(pairs)} pairs, not {folds} folds x 2 x {each}")
    place: dict[str, int] = {}
    found = []
    for row, (number, words) in enumerate(pairs):
        fold, within = divmod(row, 2 * each)
        same = within < each
        if same and len(words) == 3:
            words = [*words[:2], words[0], words[2]]
        elif same or len(words) != 4:
            words = ["", "", "", ""]
        sides = [f"{name}/{name}_{int(image):04d}.jpg" for name, image in (words[:2], words[2:]) if image.isdecimal()]
        if len(sides) != 2:
            expected = "a name and two numbers, of the same" if same else "two names, each with a number, of different"
            raise ValueError(f"{file}, line {number} must be {expected}: it is {lines[number - 1].strip()!r}")
        found.append((*(place.setdefault(side, len(place)) for side in sides), same, fold))
    left, right, same, fold = torch.tensor(found).T
    return LFWPairs(list(place), left, right, same.bool(), fold)


class LFW(Benchmark):
    """Labeled Faces in the Wild: people in none of the pairs of View 2 to train and validate; these pairs, in ten folds, to test.

    Below `path` lie pairs.txt and lfw, lfw_funneled or lfw-deepfunneled. Pairs of an image that cannot be read are left out.

    Huang et al., "Labeled Faces in the Wild", UMass Amherst Technical Report 07-49, 2007.
    """

    site = "http://vis-www.cs.umass.edu/lfw"

    def split(self, name: str) -> Samples:
        samples = super().split(name)
        if name != "test":
            return samples
        pairs = lfw_pairs(self.path / "pairs.txt")
        place = {what.partition("/")[2]: row for row, what in enumerate(samples.ids)}
        rows = torch.tensor([place.get(image, -1) for image in pairs.images])[torch.stack([pairs.left, pairs.right], 1)]
        read = (rows >= 0).all(1)
        where = [f"pairs.txt, pair {row + 1}" for row in read.nonzero().flatten().tolist()]
        tuples = Tuples(rows[read], pairs.same[read], where, folds=pairs.fold[read])
        return Samples(samples.inputs, None, [], samples.ids, tuples=tuples)

    def entries(self) -> Iterator[Listed]:
        folder = next((self.path / name for name in _FACES if (self.path / name).is_dir()), self.path / _FACES[0])
        images = lfw_pairs(self.path / "pairs.txt").images
        tested = {image.partition("/")[0] for image in images}
        files = [file.relative_to(folder).as_posix() for person in sorted(folder.iterdir()) for file in sorted(person.glob("*.jpg"))]
        for image in [*images, *(file for file in files if file.partition("/")[0] not in tested)]:
            person, what = image.partition("/")[0], f"{folder.name}/{image}"
            yield Listed(what, person, what, "test" if person in tested else "train")
