"""What there is to read: the samples of a folder or of a table, with their labels, and how classes are shared out to the splits."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from siamese.data.samples import Finding, Samples, Source

SPLITS = ("train", "val", "test")
ROLES = ("query", "gallery")
_ALSO_CALLED = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


@dataclass(frozen=True)
class Listed:
    """One sample that is still to be read.

    what: the sample, or where it is; label: its class; where: the file and row that say so, for errors and reports.
    split: one of SPLITS, "" where none is given; group: what must stay on one side of the split, "" for none.
    role: one of ROLES, "" for both.
    """

    what: str
    label: str
    where: str
    split: str = ""
    group: str = ""
    role: str = ""


class ListedSource(Source):
    """A source that lists all there is, shares it out to the splits once, and reads a split when it is first asked for.

    Args:
        val, test: a share of the classes, or a list of them, for a split that nothing listed names.
        split_seed: another one shares the classes out in another way.
    """

    def __init__(self, val: float | list[str], test: float | list[str], split_seed: int = 0):
        self._shares = {"val": val, "test": test, "seed": split_seed}
        self._listed: list[Listed] | None = None
        self._splits: dict[str, Samples] = {}
        self._findings: dict[str, list[Finding]] = {}

    def listed(self) -> list[Listed]:
        """All samples, those that name no split too. What is to be told of them goes to `self._findings[""]`."""
        raise NotImplementedError

    def read(self, listed: list[Listed], name: str) -> tuple[Samples, list[Finding]]:
        """The samples of one split, but for those that cannot be read, and what is to be told of them."""
        raise NotImplementedError

    def shared_out(self) -> list[Listed]:
        """All samples, each with its split."""
        if self._listed is None:
            listed = share_out(self.listed(), **self._shares)
            check_roles(listed)
            self._listed = listed
        return self._listed

    def split(self, name: str) -> Samples:
        """Read at the first call, the same object afterwards.

        Raises:
            ValueError: there is no such split; what listing and reading raise.
        """
        if name not in SPLITS:
            raise ValueError(f"there is no split {name!r}: choose one of {', '.join(SPLITS)}")
        if name not in self._splits:
            mine = [sample for sample in self.shared_out() if sample.split == name]
            self._splits[name], self._findings[name] = self.read(mine, name)
        return self._splits[name]

    def findings(self) -> list[Finding]:
        return [finding for found in self._findings.values() for finding in found]


def rows(path: str | Path, needed: tuple[str, ...], also: tuple[str, ...] = ()) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """(line or row, its entries by column) of a table, and which columns there are besides those named.

    Args:
        path: .csv, .tsv (UTF-8, a header in the first line), .jsonl (an object a line) or .parquet, which needs pyarrow.
        needed: columns that every row must fill; also: columns that may be missing, or empty, and then are "". All others are
            given too, as they are.

    Raises:
        ValueError: a column is missing, a row is broken or lacks an entry, another kind of file, pyarrow is missing.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, here a table is needed: a file whose name ends in .csv, .tsv, .jsonl or .parquet")
    kinds = {".csv": _delimited, ".tsv": _delimited, ".jsonl": _objects, ".parquet": _parquet}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path} is no table: its name must end in {', '.join(kinds)}")
    found, others = [], {}
    for row, entries in kinds[path.suffix.lower()](path):
        if missing := [name for name in needed if name not in entries]:
            raise ValueError(f"{path} has no column {missing[0]!r}: it has {', '.join(map(repr, entries)) or 'none'}")
        if odd := [name for name, value in entries.items() if isinstance(value, (list, dict))]:
            raise ValueError(f"{path}, row {row}: {odd[0]} is a list or an object, it must be a text or a number")
        # A lone half of a surrogate pair, which JSON can write, is no text.
        entries = {str(n): "" if v is None else str(v).encode("utf-8", "replace").decode().strip() for n, v in entries.items()}
        if empty := [name for name in needed if entries[name].lower() in ("", "nan")]:  # nan is how pandas writes that there is none
            raise ValueError(f"{path}, row {row}: {empty[0]} is {entries[empty[0]] or 'empty'}: fill it, or delete the row")
        others |= dict.fromkeys(name for name in entries if name not in needed + also)
        found.append((row, dict.fromkeys(also, "") | entries))
    if not found:
        raise ValueError(f"{path} has no rows")
    if wrong := [name for name in others if name.lower() in needed + also]:
        raise ValueError(f"{path} has a column {wrong[0]!r}: write {wrong[0].lower()!r}, in small letters")
    return found, list(others)


def _delimited(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)  # a whole text may stand in a field
    with io.StringIO(_text(path), newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise ValueError(f"{path} has two columns of the same name: {', '.join(header)}")
            for entries in reader:
                if not entries:
                    continue
                if len(entries) != len(header):
                    raise ValueError(f"{path}, row {reader.line_num}: it has {len(entries)} entries, the header has {len(header)}")
                yield reader.line_num, dict(zip(header, entries, strict=True))
        except csv.Error as error:
            what = "a quotation mark is missing, here or above" if "end of data" in str(error) else error
            raise ValueError(f"{path}, row {reader.line_num + 1}: {what}") from None


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, row {row}: the byte 0x{content[error.start]:02x} is no UTF-8: save the table as UTF-8") from None


def _objects(path: Path) -> Iterator[tuple[int, dict]]:
    with io.StringIO(_text(path)) as file:
        for row, line in enumerate(file, 1):
            if line.strip():
                try:
                    entries = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, row {row} is no JSON ({error})") from None
                if not isinstance(entries, dict):
                    raise ValueError(f'{path}, row {row}: it must be an object, as in {{"text": ..., "label": ...}}')
                yield row, entries


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: to read Parquet run pip install -e '.[parquet]', or hand the table over as CSV") from None
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from None
    yield from enumerate(table.to_pylist(), 1)


def split_name(text: str, where: str) -> str:
    """One of SPLITS, for it or a word that means the same; "" for nothing.

    Raises:
        ValueError: another word.
    """
    name = _ALSO_CALLED.get(text.lower(), text.lower())
    if name and name not in SPLITS:
        raise ValueError(f"{where}: split is {text!r}, it must be train, val or test")
    return name


def role_name(text: str, where: str) -> str:
    """One of ROLES; "" for nothing.

    Raises:
        ValueError: another word.
    """
    if text and text.lower() not in ROLES:
        raise ValueError(f"{where}: role is {text!r}, it must be query or gallery")
    return text.lower()


def check_roles(listed: list[Listed]) -> None:
    """Raises ValueError if in a split that is judged only some samples have a role, or all have the same."""
    for name in SPLITS[1:]:
        first: dict[str, Listed] = {}
        for sample in listed:
            if sample.split == name:
                first.setdefault(sample.role, sample)
        if "" in first and len(first) > 1:
            raise ValueError(f"{first[''].where} has no role, but other samples of {name} have one: give it to all of them, or to none")
        for role, sample in first.items():
            if role and len(first) == 1:
                other = ROLES[role == "query"]
                raise ValueError(f"{sample.where} is a {role}, as all samples of {name} are: some must have the role {other}")


def share_out(listed: list[Listed], val: float | list[str], test: float | list[str], seed: int = 0) -> list[Listed]:
    """Give every sample a split, so that each split has classes of its own and no group is divided.

    A split that a sample names is kept. One that no sample names is taken from the classes of the samples that name none or,
    where all do, from the classes of training; what is left over is for training. Classes are drawn by a hash of their name:
    a few more of them move few of the others.

    Args:
        val, test: a share of the classes, or their names.

    Raises:
        ValueError: a share or class that cannot be, or classes so few, or so bound together by groups, that a split has none.
    """
    named = {sample.split for sample in listed}
    source = "" if "" in named else "train"
    free = [sample for sample in listed if sample.split == source]
    bound, chosen = _bound_together(free), {}
    for name, wanted in (("test", test), ("val", val)):
        if name not in named:
            left = [classes for classes in bound if classes[0] not in chosen]
            found = _named(left, name, wanted) if isinstance(wanted, list) else _drawn(left, name, wanted, bound, seed)
            chosen |= {label: name for classes in found for label in classes}
    if free and len(chosen) == len({sample.label for sample in free}) and "train" not in named - {source}:
        raise ValueError(f"val and test take all {len(chosen)} classes and leave none to train on: lower their shares, or add classes")
    return [replace(sample, split=chosen.get(sample.label, "train")) if sample.split == source else sample for sample in listed]


def _bound_together(listed: list[Listed]) -> list[list[str]]:
    """Classes in sets: those that have samples of one group are in one."""
    leader: dict[str, str] = {}

    def find(label: str) -> str:
        while leader.setdefault(label, label) != label:
            leader[label] = label = leader[leader[label]]
        return label

    first: dict[str, str] = {}
    for sample in listed:
        find(sample.label)
        if sample.group:
            leader[find(sample.label)] = find(first.setdefault(sample.group, sample.label))
    sets: dict[str, list[str]] = {}
    for label in sorted(leader):
        sets.setdefault(find(label), []).append(label)
    return list(sets.values())


def _named(bound: list[list[str]], name: str, wanted: list[str]) -> list[list[str]]:
    wanted, known = [str(label) for label in wanted], [label for classes in bound for label in classes]
    for label in wanted:
        if label not in known:
            near = difflib.get_close_matches(label, known, n=1)
            raise ValueError(f"{name}: there is no class {label!r} to take" + (f", did you mean {near[0]!r}?" if near else ""))
    found = [classes for classes in bound if not set(wanted).isdisjoint(classes)]
    if divided := [
        (label, other) for classes in found for label in classes for other in classes if label in wanted and other not in wanted
    ]:
        raise ValueError("{0}: the classes {1[0]!r} and {1[1]!r} share a group, so name both or neither".format(name, divided[0]))
    return found


def _drawn(left: list[list[str]], name: str, share: float, bound: list[list[str]], seed: int) -> list[list[str]]:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"{name}={share} must be a share of the classes, above 0 and below 1, or a list of them")
    total = sum(map(len, bound))
    wanted, found = max(round(share * total), 2), []
    for classes in sorted(left, key=lambda classes: hashlib.sha256(f"{seed}/{classes[0]}".encode()).digest()):
        if sum(map(len, found)) + len(classes) <= wanted:
            found.append(classes)
    if sum(map(len, found)) < 2:
        largest = max(map(len, left), default=0)
        why = f"groups bind {largest} of them together" if largest > wanted else "two are needed to tell one from another"
        raise ValueError(
            f"{name}={share} of {total} classes gives it fewer than two, and {why}: raise the share, name its classes, or add some"
        )
    return found
