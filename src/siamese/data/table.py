"""Rows of a table as samples: numbers and categories, a class to each row."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siamese.data.listing import Listed, ListedSource, rows, split_name
from siamese.data.reading import EMPTY, RowReader, is_number
from siamese.data.samples import Finding, Samples

_CATEGORIES = 1000


class Table(ListedSource):
    """Rows as float32 [columns]: a number as it is, a category as a one among zeros.

    A table (.csv, .tsv, .jsonl, .parquet) has a column `label` and, if wanted, `split` (train, val, test) and `group`: what must stay
    on one side of the split. All other columns are features: numbers where every entry that training has is one, else categories.
    A word in one of ten entries or fewer is taken for a mistake.
    What a column is, and what stands for an empty entry (training's mean; for a category, none), is learned from training alone.
    An id is the row's number in the file.

    Args:
        path: the table.
        label: the column of the classes.
        ignore: columns to leave out: names, ids, what gives the class away.
        categories: columns whose numbers are mere names, as a postal code's are.
        val, test: a share of the classes, or a list of them, for a split that no row names.
        split_seed: another one shares the classes out in another way.

    Raises:
        ValueError: a table that is broken, columns that are not there or of which none is left, classes that cannot be shared out.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        label: str = "label",
        ignore: list[str] = (),
        categories: list[str] = (),
        val: float | list[str] = 0.15,
        test: float | list[str] = 0.25,
        split_seed: int = 0,
    ):
        super().__init__(val, test, split_seed)
        self.path, self.label, self.ignore, self.categories = Path(path), label, tuple(ignore), tuple(categories)

    def read(self, listed: list[Listed], name: str) -> tuple[Samples, list[Finding]]:
        names, labels = np.unique([sample.label for sample in listed], return_inverse=True)
        entries = [self._rows[sample.what] for sample in listed]
        samples = Samples(self.features(entries), torch.from_numpy(labels), names.tolist(), [sample.where for sample in listed])
        return samples, list(self._found(name, listed, entries))

    def _found(self, split: str, mine: list[Listed], entries: list[dict[str, str]]) -> Iterator[Finding]:
        holes, unknown = [], []
        for name, known in self.columns.items():
            known = known if isinstance(known, float) else set(known)
            for sample, text in zip(mine, (row.get(name, "") for row in entries), strict=True):
                if isinstance(known, float) and text.lower() in EMPTY:
                    holes.append(f"{sample.where}: {name}")
                elif not isinstance(known, float) and text and text not in known:
                    unknown.append(f"{sample.where}: {name} is {text!r}")
        yield Finding(False, f"empty entries of {split}, for which training's mean stands", holes, "fill them, or leave the column out")
        yield Finding(False, f"entries of {split} that training never has, which count as none", unknown, "nothing, if they are few")

    def features(self, entries: list[dict[str, str]]) -> Tensor:
        """Rows by column name -> float32 [N, columns], as an encoder trained on this table wants them. What is missing is empty.

        Raises:
            ValueError: an entry of a column of numbers is none.
        """
        inputs, failed = RowReader(self.reading()["columns"]).read(entries)
        if failed:
            raise ValueError(next(iter(failed.values())))
        return inputs

    def reading(self) -> dict:
        self.shared_out()
        return {"_target_": "siamese.data.reading.RowReader", "columns": self.columns}

    def listed(self) -> list[Listed]:
        found, others = rows(self.path, (self.label,))
        self._names = names = [self.label, *others]
        if missing := [name for name in (*self.ignore, *self.categories) if name not in names]:
            raise ValueError(f"{self.path} has no column {missing[0]!r}: it has {', '.join(map(repr, names))}")
        listed = []
        for row, entries in found:
            where = f"{self.path.name}, row {row}"
            split = split_name(entries.get("split", ""), where)
            listed.append(Listed(str(row), entries[self.label], where, split, entries.get("group", "")))
        self._rows = {str(row): entries for row, entries in found}
        return listed

    def shared_out(self) -> list[Listed]:
        if self._listed is None:
            self._learn([sample for sample in super().shared_out() if sample.split == "train"])
        return self._listed

    def _learn(self, training: list[Listed]) -> None:
        """What each column is, and what stands for an empty entry, from training alone."""
        self.columns: dict[str, float | list[str]] = {}
        alone = []
        for name in (name for name in self._names if name not in (self.label, "split", "group", *self.ignore)):
            texts = [self._rows[sample.what].get(name, "") for sample in training]
            values = {text for text in texts if text}
            if len(values) < 2:
                alone.append(name)
                continue
            known = [text for text in texts if text.lower() not in EMPTY]
            odd = [row for row, text in enumerate(texts) if not is_number(text) and text.lower() not in EMPTY]
            if name not in self.categories and 0 < len(odd) <= len(known) / 10:
                where, text = training[odd[0]].where, texts[odd[0]]
                raise ValueError(f"{where}: {name} is {text!r} among numbers: mend it, or say dataset.categories=[{name}]")
            if name not in self.categories and known and all(map(is_number, known)):
                self.columns[name] = math.fsum(map(float, known)) / len(known)
            elif len(values) > _CATEGORIES:
                raise ValueError(
                    f"{self.path}: {name} has {len(values):,} different entries, too many to be categories. Such as {min(values)!r}: "
                    f"if they are names or ids say dataset.ignore=[{name}]"
                )
            else:
                self.columns[name] = sorted(values)
        if not self.columns:
            raise ValueError(f"{self.path} has no column to learn from, besides {', '.join([self.label, *self.ignore, *alone])}")
        self._findings[""] = [Finding(False, "columns of one value in training, which are left out", alone, "name them in dataset.ignore")]
