"""Pairs and triplets of one's own, of texts or images, with no classes at all: duplicate questions, products, signatures."""

from pathlib import Path

import torch

from siamese.data.images import Images
from siamese.data.listing import Listed, ListedSource, rows, share_out, split_name
from siamese.data.samples import Finding, Samples, Tuples
from siamese.data.texts import Texts

_SAME = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


class Pairs(ListedSource):
    """Samples that a table lists in pairs; they have no labels, `Samples.tuples` says which pairs are the same.

    A table (.csv, .tsv, .jsonl, .parquet) has the columns `left` and `right`, `same` (0, 1, false, true) and, if wanted, `split` (train,
    val, test) and `kind`: what sort of pair it is, such as random and skilled forgeries, of which figures are given too. Without splits
    pairs are shared out so that no sample is in two of them.

    Among `findings` are pairs of which a sample is empty or cannot be read: they are left out; and pairs of a sample with itself, called
    the same and different, listed more than once or in two splits: training goes without the first two, judging counts them all.

    Args:
        path: the table.
        holds: "texts", or "images": paths of files, beside the table or absolute.
        max_bytes: of a text, see `Texts`.
        size, channels, fit, cache: of an image, see `Images`.
        val, test: a share of the samples, for a split that no row names.
        split_seed: another one shares them out in another way.

    Raises:
        ValueError: for values out of their range, a table that is broken, samples so bound together that they cannot be shared out.
        OSError: the file cannot be read.
    """

    columns = ("left", "right")
    serious = True  # what is wrong with the list

    def __init__(
        self,
        path: str | Path,
        holds: str = "texts",
        max_bytes: int = 1024,
        size: int = 64,
        channels: int = 3,
        fit: str = "pad",
        cache: bool = True,
        val: float = 0.15,
        test: float = 0.25,
        split_seed: int = 0,
    ):
        if holds not in ("texts", "images"):
            raise ValueError(f"holds={holds} must be texts or images")
        super().__init__(val, test, split_seed)
        self.path = Path(path)
        self._holds = Texts(path, max_bytes=max_bytes) if holds == "texts" else Images(path, size, channels, fit, cache=cache)

    def reading(self) -> dict:
        return self._holds.reading()

    def lines(self) -> list[dict[str, str]]:
        """Each pair's entries by column: `self.columns`, `same` of pairs, `split`, `kind`, and `where`, the file and row."""
        needed = (*self.columns, *(("same",) if len(self.columns) == 2 else ()))
        found, others = rows(self.path, (), (*needed, "split", "kind"))
        if missing := [name for name in needed if not any(entries[name] for _, entries in found)]:
            raise ValueError(f"{self.path} has no column {missing[0]!r}, or nothing in it: needed are {', '.join(needed)}")
        self._findings[""] = [Finding(False, "columns that are not used", others, f"used are {', '.join(needed)}, split and kind")]
        return [{**entries, "where": f"{self.path.name}, row {row}"} for row, entries in found]

    def listed(self) -> list[Listed]:
        """The samples of all pairs, each bound to those that it is paired with."""
        self._lines, listed = self.lines(), []
        for row, line in enumerate(self._lines):
            line["split"] = split_name(line["split"], line["where"])
            if all(line[column] for column in self.columns):
                listed += [Listed(line[column], line[column], line["where"], line["split"], str(row)) for column in self.columns]
        without = [sample.where for sample in listed if not sample.split]
        if without and any(sample.split for sample in listed):  # placed by us, their samples would be in two splits
            raise ValueError(f"{without[0]} names no split, but other rows do: fill its column split, or leave the whole column away")
        try:
            return share_out(listed, **self._shares)
        except ValueError as error:
            why = f"{self.path} cannot be shared out so that no sample is in two splits, give it a column split"
            raise ValueError(f"{why}: {str(error).replace('classes', 'samples')}") from None

    def shared_out(self) -> list[Listed]:
        """The pairs, by their place among the lines, each with the split of its samples."""
        if self._listed is None:
            placed = {sample.group: sample.split for sample in self.listed()}
            self._listed = [
                Listed(str(row), "", line["where"], placed.get(str(row), line["split"] or "train")) for row, line in enumerate(self._lines)
            ]
        return self._listed

    def split(self, name: str) -> Samples:
        others = [other for other in self._splits if name not in self._splits]
        samples = super().split(name)
        for other in others:
            self._findings[f"{name} {other}"] = [self._in_both(name, other)]
        return samples

    def _lines_of(self, name: str) -> list[dict[str, str]]:
        return [self._lines[int(pair.what)] for pair in self.shared_out() if pair.split == name]

    def read(self, listed: list[Listed], name: str) -> tuple[Samples, list[Finding]]:
        empty, alone, again, contradicting, kept, pairs = [], [], [], {}, [], len(self.columns) == 2
        seen: dict[tuple, tuple[str, bool]] = {}
        for line in (self._lines[int(pair.what)] for pair in listed):
            if pairs and line["same"].lower() not in _SAME:
                raise ValueError(f"{line['where']}: same is {line['same']!r}, it must be 0, 1, false or true")
            items, same = [line[column] for column in self.columns], pairs and _SAME[line["same"].lower()]
            key = tuple(sorted(items) if pairs else items)
            if not all(items):
                empty.append(line["where"])
                continue
            if len(set(items)) < len(items):
                alone.append(line["where"])
            earlier, before = seen.setdefault(key, (line["where"], same))
            if before != same:
                contradicting[key] = f"{line['where']}, and {earlier.rpartition(', ')[2]}"
            elif earlier != line["where"]:
                again.append(f"{line['where']}, as in {earlier.rpartition(', ')[2]}")
            kept.append((line, items, same))
        first: dict[str, str] = {}
        for line, items, _ in kept:
            for column, item in zip(self.columns, items, strict=True):
                first.setdefault(item, f"{line['where']}, {column}")
        items_of = list(first)
        samples, findings = self._holds.read([Listed(item, str(n), where) for n, (item, where) in enumerate(first.items())], name)
        what = "pairs" if pairs else "triplets"
        place = {items_of[int(samples.class_names[label])]: row for row, label in enumerate(samples.labels.tolist())}
        read = [(line, items, same) for line, items, same in kept if all(item in place for item in items)]
        findings = [
            Finding(
                self.serious, f"{what} of {name} that are called the same and different", [*contradicting.values()], "keep one of them"
            ),
            Finding(True, f"{what} of {name} in which something is empty", empty, "fill or delete the rows"),
            *findings,
            Finding(False, f"{what} of {name} in which one sample stands twice", alone, "delete the rows, they teach nothing"),
            Finding(False, f"{what} of {name} that are listed more than once", again, "list each once"),
        ]
        if not read:
            told = [f"{f.what}: {len(f.where)}, such as {f.where[0]}" for f in findings if f.where]
            raise ValueError(f"{self.path} lists no {what} for {name} that can be used" + (f" ({'; '.join(told)})" if told else ""))
        kinds = [line["kind"] for line, _, _ in read]
        tuples = Tuples(
            torch.tensor([[place[item] for item in items] for _, items, _ in read], dtype=torch.int64).view(-1, len(self.columns)),
            torch.tensor([same for _, _, same in read], dtype=torch.bool) if pairs else None,
            [line["where"] for line, _, _ in read],
            kinds if any(kinds) else None,
        )
        return Samples(samples.inputs, None, [], samples.ids, tuples=tuples), findings

    def _in_both(self, one: str, other: str) -> Finding:
        keys = {tuple(sorted(line[column] for column in self.columns)): line["where"] for line in self._lines_of(one)}
        both = [keys[key] for line in self._lines_of(other) if (key := tuple(sorted(line[c] for c in self.columns))) in keys]
        return Finding(self.serious, f"rows of {one} that {other} lists too", both, "keep each in one split: what was trained on is known")


class Triplets(Pairs):
    """Likewise of triplets: the columns `anchor`, `positive` and `negative`, and, if wanted, `split`.

    They are judged as the pairs that they hold, and by the share of them whose positive is the nearer one.
    """

    columns = ("anchor", "positive", "negative")
