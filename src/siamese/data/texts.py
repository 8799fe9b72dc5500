"""Texts of one's own, as tensors: the rows of a table with a text and its label."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siamese.data.listing import Listed, ListedSource, rows, split_name
from siamese.data.samples import Finding, Samples


def as_bytes(texts: list[str], most: int | None = None) -> Tensor:
    """Texts -> uint8 [N, L], their UTF-8 with zeros behind it; L is the length of the longest, or `most` bytes: what is beyond is cut."""
    coded = [text.replace("\0", "").encode("utf-8", "replace")[:most] for text in texts]
    length = max(map(len, coded), default=0)
    joined = np.frombuffer(b"".join(text.ljust(length, b"\0") for text in coded), dtype=np.uint8)
    return torch.from_numpy(joined.reshape(len(coded), length).copy())


def as_texts(inputs: Tensor) -> list[str]:
    """uint8 [N, L] -> the N texts; a letter that was cut in two is left out."""
    return [row.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for row in inputs.cpu().numpy()]


class Texts(ListedSource):
    """Texts as uint8 [L], see `as_bytes`, so that whatever holds tensors holds texts; encoders cut them into tokens themselves.

    A table (.csv, .tsv, .jsonl, .parquet) has a column of texts, one of labels and, if wanted, `split` (train, val, test) and `group`:
    what must stay on one side of the split. An id is the file and the row. Empty texts are left out and are among `findings`.

    Args:
        path: the table.
        text, label: the columns.
        max_bytes: longer texts are cut.
        val, test: a share of the classes, or a list of them, for a split that no row names.
        split_seed: another one shares the classes out in another way.

    Raises:
        ValueError: for values out of their range, a table that is broken, classes that cannot be shared out.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        text: str = "text",
        label: str = "label",
        max_bytes: int = 1024,
        val: float | list[str] = 0.15,
        test: float | list[str] = 0.25,
        split_seed: int = 0,
    ):
        if max_bytes < 4:
            raise ValueError(f"max_bytes={max_bytes} must be at least 4, which one letter may take")
        super().__init__(val, test, split_seed)
        self.path, self.text, self.label, self.max_bytes = Path(path), text, label, max_bytes

    def reading(self) -> dict:
        return {"_target_": "siamese.data.reading.TextReader", "max_bytes": self.max_bytes}

    def listed(self) -> list[Listed]:
        found, others = rows(self.path, (self.label,), ("split", "group"))
        if self.text not in others:
            there = ", ".join(map(repr, [self.label, *others]))
            raise ValueError(f"{self.path} has no column {self.text!r}: it has {there}. Another name is given by dataset.text=")
        unused = [name for name in others if name != self.text]
        self._findings[""] = [Finding(False, "columns that are not used", unused, f"used are {self.text}, {self.label}, split and group")]
        listed = []
        for row, entries in found:
            where = f"{self.path.name}, row {row}"
            split = split_name(entries["split"], where)
            listed.append(Listed(entries.get(self.text, ""), entries[self.label], where, split, entries["group"]))
        return listed

    def read(self, listed: list[Listed], name: str) -> tuple[Samples, list[Finding]]:
        kept = [sample for sample in listed if sample.what]
        long = [sample.where for sample in kept if len(sample.what.encode()) > self.max_bytes]
        findings = [
            Finding(True, f"texts of {name} that are empty", [s.where for s in listed if not s.what], "fill or delete the rows"),
            Finding(False, f"texts of {name} that are cut after {self.max_bytes} bytes", long, "raise dataset.max_bytes, if they matter"),
        ]
        names, labels = np.unique([sample.label for sample in kept], return_inverse=True)
        inputs = as_bytes([sample.what for sample in kept], self.max_bytes)
        return Samples(inputs, torch.from_numpy(labels), names.tolist(), [sample.where for sample in kept]), findings
