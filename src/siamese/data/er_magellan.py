"""Product matching and its like in the format of ER-Magellan: Konda et al. 2016, doi 10.14778/2994509.2994535; Mudgal et al. 2018."""

import re
from pathlib import Path

from siamese.data.pairs import Pairs

_FILES = {"train": "train.txt", "val": "valid.txt", "test": "test.txt"}


class ErMagellan(Pairs):
    """The pairs of `train.txt`, `valid.txt` and `test.txt`, as texts: the values of a record, in their order, joined by " | ".

    A line is `record TAB record TAB 0 or 1`, a record `COL name VAL its value COL name VAL its value`.

    Args:
        path: the folder.
        max_bytes: longer texts are cut.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is broken.
    """

    serious = False  # some of the published lists contradict themselves, and are judged as they are

    def __init__(self, path: str | Path, max_bytes: int = 1024):
        super().__init__(path, "texts", max_bytes)

    def lines(self) -> list[dict[str, str]]:
        lines = []
        for split, name in _FILES.items():
            file = self.path / name
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: a data set of ER-Magellan has {', '.join(_FILES.values())}")
            for row, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
                parts = line.split("\t")
                if len(parts) != 3 or not all(part.lstrip().startswith("COL ") for part in parts[:2]):
                    raise ValueError(f"{file}, row {row}: it must be COL name VAL ... TAB COL name VAL ... TAB 0 or 1")
                said = {"same": parts[2].strip(), "split": split, "kind": "", "where": f"{name}, row {row}"}
                lines.append({"left": record(parts[0]), "right": record(parts[1]), **said})
        return lines


def record(text: str) -> str:
    """`COL title VAL a camera COL price VAL 9` -> `a camera | 9`; values that are missing are left out."""
    values = [part.partition(" VAL")[2].strip() for part in re.split(r"(?:^|\s)COL(?=\s\S+\sVAL)", text)]
    return " | ".join(value for value in values if value)
