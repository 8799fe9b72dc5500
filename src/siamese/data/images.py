"""Images of one's own: a folder of class folders, or a table of paths and labels."""

import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from siamese.data.listing import Listed, ListedSource, role_name, rows, split_name
from siamese.data.reading import ENDINGS, FITS, decode
from siamese.data.samples import Finding, Samples

_CHUNK = 1024


class Images(ListedSource):
    """Images as uint8 [channels, size, size], each decoded once and kept in a file that is mapped into memory.

    A folder: an image's class is the folder that it lies in, `cats/1.jpg`. Are the first folders called train, val and test, they
    are the splits: `train/cats/1.jpg`. A table (.csv, .tsv, .jsonl, .parquet): columns `path` (beside the table, or absolute) and
    `label`, and, if wanted, `split` (train, val, test), `group`: what must stay on one side of the split, a writer or a session, and
    `role`: are samples of val or test called query and gallery, queries are compared with the gallery alone.

    An id is the path as it is listed. What cannot be read is left out and is among `findings`, up to half of a split.

    Args:
        path: the folder or the table.
        size: height and width of an image, in pixels.
        channels: 3 for colour, 1 for grey.
        fit: an image that is not square is padded with the colour of its border ("pad"), cut to its middle ("crop"), or stretched.
        val, test: a share of the classes, or a list of them, for a split that nothing else names.
        split_seed: another one shares the classes out in another way.
        cache: keep what was decoded under SIAMESE_DATA_DIR (or `data`), for the next run; else in memory, for this one.

    Raises:
        ValueError: for values out of their range, a table that is broken, a folder without images, classes that cannot be shared out, a
            split of which more than half cannot be read.
        OSError: what cannot be read, or where the cache cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 64,
        channels: int = 3,
        fit: str = "pad",
        val: float | list[str] = 0.15,
        test: float | list[str] = 0.25,
        split_seed: int = 0,
        cache: bool = True,
    ):
        if size < 1 or channels not in (1, 3) or fit not in FITS:
            raise ValueError(f"size={size} must be above 0, channels={channels} 1 or 3, fit={fit} one of {', '.join(FITS)}")
        super().__init__(val, test, split_seed)
        self.path, self.size, self.channels, self.fit, self.cache = Path(path), size, channels, fit, cache

    def reading(self) -> dict:
        return {"_target_": "siamese.data.reading.ImageReader", "size": self.size, "channels": self.channels, "fit": self.fit}

    def listed(self) -> list[Listed]:
        listed, self._findings[""] = from_folder(self.path) if self.path.is_dir() else from_table(self.path)
        return listed

    def read(self, listed: list[Listed], name: str) -> tuple[Samples, list[Finding]]:
        folder = Path(os.environ.get("SIAMESE_DATA_DIR", "data"), "cache") if self.cache else None
        pixels, failed, small = _decoded([self._file(sample) for sample in listed], self.size, self.channels, self.fit, folder, name)
        kept = [sample for place, sample in enumerate(listed) if str(place) not in failed]
        names, labels = np.unique([sample.label for sample in kept], return_inverse=True)
        findings = []
        if failed:
            where = [f"{listed[int(place)].where} ({why})" for place, why in failed.items()]
            if 2 * len(failed) > len(listed):  # then it is not a few files that are wrong
                share = f"{len(failed):,} of {len(listed):,}"
                raise ValueError(f"{share} images of {name} cannot be read, such as {where[0]}: mend the list or the folder first")
            findings.append(Finding(True, f"images of {name} that cannot be read", where, "replace or delete them"))
        if small:
            where = [f"{listed[place].where} ({width} x {height})" for place, width, height in small]
            what = f"images of {name} that are enlarged more than four times, to {self.size} x {self.size}"
            findings.append(Finding(False, what, where, "leave them out, or lower dataset.size"))
        roles = [sample.role for sample in kept] if name != "train" else []
        gallery = torch.tensor([role == "gallery" for role in roles]) if any(roles) else None
        return Samples(pixels, torch.from_numpy(labels), names.tolist(), [sample.what for sample in kept], gallery), findings

    def _file(self, sample: Listed) -> Path:
        return (self.path if self.path.is_dir() else self.path.parent) / sample.what


def images_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The images below a folder, and what else is there, but for what is hidden; both below the folder."""
    files = (Path(inside, name).relative_to(folder) for inside, _, names in os.walk(folder, followlinks=True) for name in names)
    shown = [path for path in sorted(files) if not any(part.startswith((".", "__MACOSX")) for part in path.parts)]
    images = [path for path in shown if path.suffix.lower() in ENDINGS]
    return images, [str(path) for path in shown if path.suffix.lower() not in ENDINGS]


def from_folder(folder: Path) -> tuple[list[Listed], list[Finding]]:
    """The images below a folder, with the folders that they lie in as their classes, and what is to be told of the others.

    Raises:
        ValueError: there are none.
    """
    images, other = images_in(folder)
    listed, loose = [], []
    for inside in images:
        first = inside.parts[0].lower()
        try:
            split = split_name(first, "") if len(inside.parts) > 2 else ""
        except ValueError:
            split = ""
        label = "/".join(inside.parts[bool(split) : -1])
        if label:
            listed.append(Listed(inside.as_posix(), label, inside.as_posix(), split))
        else:
            loose.append(str(inside))
    if not listed:
        raise ValueError(
            f"{folder} holds no images in folders of their classes ({len(loose)} beside, {len(other)} other files): "
            f"it must look like {folder.name}/cat/1.jpg. Images end in {', '.join(ENDINGS)}"
        )
    findings = [
        Finding(True, "images that lie in no folder of a class", loose, "move each into the folder of its class"),
        Finding(False, "files that are no images", other, f"images end in {', '.join(ENDINGS)}"),
    ]
    return listed, [finding for finding in findings if finding.where]


def from_table(table: Path) -> tuple[list[Listed], list[Finding]]:
    found, unused = rows(table, ("path", "label"), ("split", "group", "role"))
    listed, first, twice = [], {}, []
    for row, entries in found:
        where = f"{table.name}, row {row}: {entries['path']}"
        if entries["path"] in first:
            twice.append(f"{where}, as in row {first[entries['path']]}")
        first.setdefault(entries["path"], row)
        split = split_name(entries["split"], f"{table}, row {row}")
        role = role_name(entries["role"], f"{table}, row {row}")
        listed.append(Listed(entries["path"], entries["label"], where, split, entries["group"], role))
    findings = [
        Finding(True, "files that are listed more than once", twice, "list each once"),
        Finding(False, "columns that are not used", unused, "used are path, label, split, group and role"),
    ]
    return listed, [finding for finding in findings if finding.where]


def _decoded(files: list[Path], size: int, channels: int, fit: str, folder: Path | None, name: str):
    """uint8 [N, channels, size, size] of those that can be read, {place: reason} of those that cannot, and [place, width, height] of
    those that are small. From the cache in `folder`, where it is; else it is written, by a temporary name first."""
    shape = (-1, channels, size, size)
    if folder is None:
        pixels = np.empty((len(files), *shape[1:]), dtype=np.uint8)
        told = _write_all(files, size, channels, fit, name, lambda place, image: pixels.__setitem__(place, image))
        return torch.from_numpy(pixels[: len(files) - len(told["failed"])]), told["failed"], told["small"]
    stamps = [(str(file), *((stat.st_size, stat.st_mtime_ns) if (stat := _stat(file)) else ())) for file in files]
    key = hashlib.sha256(json.dumps([1, size, channels, fit, stamps]).encode()).hexdigest()[:24]
    data, notes = folder / f"{key}.uint8", folder / f"{key}.json"
    try:
        told = json.loads(notes.read_text())
        whole = zlib.crc32(np.memmap(data, np.uint8, "r")) == told["crc32"]
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{key}.{os.getpid()}.part"
        try:
            with open(partial, "wb") as out:
                told = _write_all(files, size, channels, fit, name, lambda place, image: out.write(image))
            os.replace(partial, data)
            partial.write_text(json.dumps(told))
            os.replace(partial, notes)
        finally:
            partial.unlink(missing_ok=True)
    kept = len(files) - len(told["failed"])
    # Copy on write: torch has no tensors that only read.
    pixels = np.memmap(data, np.uint8, "c") if kept else np.empty(0, dtype=np.uint8)
    return torch.from_numpy(pixels).view(shape), told["failed"], told["small"]


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _write_all(files: list[Path], size: int, channels: int, fit: str, name: str, write) -> dict:
    """Decode in as many threads as there are processors; `write(place, image)` is called in order, for those that can be read."""
    failed, small, crc, kept = {}, [], 0, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, _progress(len(files)) as bar:
        task = bar.add_task(f"reading {name}", total=len(files))
        for start in range(0, len(files), _CHUNK):  # so that what is decoded does not wait for what is written
            done = pool.map(lambda file: decode(file, size, channels, fit), files[start : start + _CHUNK])
            for place, (image, told) in enumerate(done, start):
                if image is None:
                    failed[str(place)] = told
                else:
                    write(kept, image)
                    crc, kept = zlib.crc32(image, crc), kept + 1
                    if 4 * max(told) < size:
                        small.append([place, *told])
                bar.advance(task)
    return {"failed": failed, "small": small, "crc32": crc}


def _progress(total: int) -> Progress:
    return Progress(transient=True, disable=total < 1000 or not Console().is_terminal)
