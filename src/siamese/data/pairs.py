"""Pairs and triplets of one's own, of texts or images, with no classes at all: duplicate questions, products, signatures."""

from pathlib import Path

import torch

from siamese.data.images import Images
from siamese.data.listing import SPLITS, Listed, rows, share_out, split_name
from siamese.data.samples import Finding, Samples, Source, Tuples
from siamese.data.texts import Texts

_SAME = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


class Pairs(Source):
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
        self.path = Path(path)
        self.reader = Texts(path, max_bytes=max_bytes) if holds == "texts" else Images(path, size, channels, fit, cache=cache)
        self._shares = {"val": val, "test": test, "seed": split_seed}
        self._splits: dict[str, Samples] = {}
        self._findings: dict[str, list[Finding]] = {}
        self._lists: dict[str, list[dict[str, str]]] | None = None

    def listed(self) -> list[dict[str, str]]:
        """Each pair's entries by column: `self.columns`, `same` of pairs, `split`, `kind`, and `where`, the file and row."""
        needed = (*self.columns, *(("same",) if len(self.columns) == 2 else ()))
        found, others = rows(self.path, (), (*needed, "split", "kind"))
        if missing := [name for name in needed if not any(entries[name] for _, entries in found)]:
            raise ValueError(f"{self.path} has no column {missing[0]!r}, or nothing in it: needed are {', '.join(needed)}")
        self._findings[""] = [Finding(False, "columns that are not used", others, f"used are {', '.join(needed)}, split and kind")]
        return [{**entries, "where": f"{self.path.name}, row {row}"} for row, entries in found]

    def split(self, name: str) -> Samples:
        """Read at the first call, the same object afterwards."""
        if name not in SPLITS:
            raise ValueError(f"there is no split {name!r}: choose one of {', '.join(SPLITS)}")
        if self._lists is None:
            self._lists = self._shared_out()
        if name not in self._splits:
            self._splits[name] = self._read(name)
            for other in self._splits.keys() - {name}:
                self._findings[f"{name} {other}"] = [self._in_both(name, other)]
        return self._splits[name]

    def findings(self) -> list[Finding]:
        return [finding for found in self._findings.values() for finding in found]

    def _shared_out(self) -> dict[str, list[dict[str, str]]]:
        lines, listed = self.listed(), []
        for row, line in enumerate(lines):
            line["split"] = split_name(line["split"], line["where"])
            if all(line[column] for column in self.columns):
                listed += [Listed(line[column], line[column], line["where"], line["split"], str(row)) for column in self.columns]
        without = [sample.where for sample in listed if not sample.split]
        if without and any(sample.split for sample in listed):  # placed by us, their samples would be in two splits
            raise ValueError(f"{without[0]} names no split, but other rows do: fill its column split, or leave the whole column away")
        try:
            listed = share_out(listed, **self._shares)
        except ValueError as error:
            why = f"{self.path} cannot be shared out so that no sample is in two splits, give it a column split"
            raise ValueError(f"{why}: {error}") from None
        lists: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
        placed = {sample.group: sample.split for sample in listed}
        for row, line in enumerate(lines):
            lists[placed.get(str(row), line["split"] or "train")].append(line)
        return lists

    def _read(self, name: str) -> Samples:
        empty, alone, again, contradicting, kept, pairs = [], [], [], {}, [], len(self.columns) == 2
        seen: dict[tuple, tuple[str, bool]] = {}
        for line in self._lists[name]:
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
        samples, findings = self.reader.read([Listed(item, str(n), where) for n, (item, where) in enumerate(first.items())], name)
        what = "pairs" if pairs else "triplets"
        place = {items_of[int(samples.class_names[label])]: row for row, label in enumerate(samples.labels.tolist())}
        read = [(line, items, same) for line, items, same in kept if all(item in place for item in items)]
        self._findings[name] = [
            Finding(
                self.serious, f"{what} of {name} that are called the same and different", [*contradicting.values()], "keep one of them"
            ),
            Finding(True, f"{what} of {name} in which something is empty", empty, "fill or delete the rows"),
            *findings,
            Finding(False, f"{what} of {name} in which one sample stands twice", alone, "delete the rows, they teach nothing"),
            Finding(False, f"{what} of {name} that are listed more than once", again, "list each once"),
        ]
        if not read:
            told = [f"{f.what}: {len(f.where)}, such as {f.where[0]}" for f in self._findings[name] if f.where]
            raise ValueError(f"{self.path} lists no {what} for {name} that can be used" + (f" ({'; '.join(told)})" if told else ""))
        kinds = [line["kind"] for line, _, _ in read]
        tuples = Tuples(
            torch.tensor([[place[item] for item in items] for _, items, _ in read], dtype=torch.int64).view(-1, len(self.columns)),
            torch.tensor([same for _, _, same in read], dtype=torch.bool) if pairs else None,
            [line["where"] for line, _, _ in read],
            kinds if any(kinds) else None,
        )
        return Samples(samples.inputs, None, [], samples.ids, tuples=tuples)

    def _in_both(self, one: str, other: str) -> Finding:
        keys = {tuple(sorted(line[column] for column in self.columns)): line["where"] for line in self._lists[one]}
        both = [keys[key] for line in self._lists[other] if (key := tuple(sorted(line[c] for c in self.columns))) in keys]
        return Finding(self.serious, f"rows of {one} that {other} lists too", both, "keep each in one split: what was trained on is known")


class Triplets(Pairs):
    """Likewise of triplets: the columns `anchor`, `positive` and `negative`, and, if wanted, `split`.

    They are judged as the pairs that they hold, and by the share of them whose positive is the nearer one.
    """

    columns = ("anchor", "positive", "negative")
