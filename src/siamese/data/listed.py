"""Pairs and triplets that somebody has listed in a CSV file, by the ids of the samples or by their row numbers."""

import csv
import difflib
from pathlib import Path

from siamese.data.samples import Samples

PAIRS, TRIPLETS = ["left", "right", "same"], ["anchor", "positive", "negative"]
_SAME = {"0": 0, "1": 1, "false": 0, "true": 1}


def read(path: str | Path, header: list[str], samples: Samples) -> tuple[list[list[int]], list[int]]:
    """The columns below the header, and the number of the line in which each row stands.

    Args:
        path: UTF-8, with or without a byte order mark; empty lines count for nothing.
        header: `PAIRS` or `TRIPLETS`. The entries of `same` are 0, 1, false or true and become 0 or 1; all others become
            positions in the samples.
        samples: whose ids the entries are, or, when none is and all are whole numbers, whose rows, from 0.

    Raises:
        ValueError: another header, a row of another length, an id that no sample has or several have, another `same`.
        OSError, csv.Error: what cannot be read.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        first = next(reader, [])
        if [name.strip() for name in first] != header:
            raise ValueError(f"the first line is {','.join(first)!r}, it must be the header {','.join(header)}")
        rows = [(reader.line_num, row) for row in reader if row]
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {line} has {len(row)} entries, not {len(header)}: {','.join(header)}")
        if header == PAIRS and row[2].strip().lower() not in _SAME:
            raise ValueError(f"line {line}: same is {row[2]!r}, it must be 0, 1, false or true")

    names = 2 if header == PAIRS else 3
    given = {entry for _, row in rows for entry in row[:names]}
    place = {name: position for position, name in enumerate(samples.ids)}
    if given.isdisjoint(place) and all(entry.isdecimal() for entry in given):
        place = {entry: int(entry) for entry in given}
    elif len(place) < len(samples):
        several = {name for position, name in enumerate(samples.ids) if place[name] != position}
        for line, row in rows:
            if clash := [entry for entry in row[:names] if entry in several]:
                raise ValueError(f"line {line}: several samples have the id {clash[0]!r}. Give row numbers, from 0, instead of ids")
    for line, row in rows:
        if unknown := [entry for entry in row[:names] if entry not in place]:
            near = difflib.get_close_matches(unknown[0], samples.ids, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"ids look like {samples.ids[0]!r}"
            raise ValueError(f"line {line}: no sample of the training split has the id {unknown[0]!r}: {hint}")
    columns = [[place[row[column]] for _, row in rows] for column in range(names)]
    if header == PAIRS:
        columns.append([_SAME[row[2].strip().lower()] for _, row in rows])
    return columns, [line for line, _ in rows]
