"""Use a trained network: enrol one example of each class, identify others, verify pairs, refuse strangers.

    python recognize.py enrol people.gallery --model best.ckpt enrolment/     # enrolment/Ada/1.png, or a table with path,label
    python recognize.py enrol people.gallery --as Ada "my photo (1).png"      # one more; the gallery knows its model
    python recognize.py identify people.gallery new/ -k 5                     # the best class of each, or unknown
    python recognize.py verify --model best.ckpt one.png other.png            # same or different, and how often that errs
    python recognize.py embed --model best.ckpt archive/ -o archive.parquet   # interrupted, the same command goes on; or .npz
    python recognize.py duplicates --model best.ckpt catalogue/ -o pairs.csv  # every pair above the threshold
    python recognize.py show people.gallery                                   # who is enrolled, and what looks wrong
    python recognize.py remove people.gallery Ada
    python recognize.py show people.gallery --qdrant http://localhost:6333    # if it was begun so: the references are there, or in a folder
    python recognize.py export --model best.ckpt samples/ -o encoder.onnx     # or .pt2; checked on the samples

Inputs are files, folders or tables of images; texts, or tables (column text), or .txt files with one a line; tables of rows, or
'{"column": value}': what the model was trained on. A model is a run's checkpoint or bundle, or a gallery.
Exit code: 0; 1 when verify says different, or identify meets somebody unknown; 2 when something cannot be read or done.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SAMPLES = 512  # that an exported encoder is checked on


class Refused(Exception):
    """What was asked for cannot be done: one line that says why, and the remedy."""


class Items(NamedTuple):
    """What a reader takes, with a name and, where they are wanted, a class for each."""

    items: list
    names: list[str]
    labels: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Do what a command line says; gives back the exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader of ... | head has gone
        sys.stderr.close()
        return 2
    except KeyboardInterrupt:
        say("interrupted" + (": the same command goes on where it was" if options.run is embed else ""))
        return 130
    except (Refused, ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        say("error: " + " ".join(reason.split()))
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(run, text: str, *places: tuple[str, str | None], model: bool = False) -> argparse.ArgumentParser:
        """Of a model, or of a gallery, which brings its own."""
        one = commands.add_parser(run.__name__, help=text, description=text)
        for place, number in places:
            one.add_argument(place, nargs=number, metavar=place.upper())
        if model or run is enrol:
            one.add_argument("--model", required=model, help="a checkpoint, a bundle or a gallery")
        if not model:
            one.add_argument("--qdrant", metavar="PLACE", help="where the references are: the URL of a server, or a folder")
        one.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="its classes may be named by the files")
        one.add_argument("--json", action="store_true", help="print JSON")
        one.set_defaults(run=run)
        return one

    def limits(one: argparse.ArgumentParser, rate: str, default: float | None, text: str) -> None:
        either = one.add_mutually_exclusive_group()
        either.add_argument(f"--{rate}", type=float, default=default, metavar="RATE", help=text)
        either.add_argument("--threshold", type=float, metavar="SCORE", help="the least score, instead")

    alarms = "share of strangers that may be taken for somebody (default .01)"
    one = command(enrol, "add references to a gallery, which is made if it is not there", ("gallery", None), ("inputs", "+"))
    one.add_argument("--as", dest="label", metavar="CLASS", help="the class of all inputs, instead of their folders' or their table's")
    one = command(identify, "the best class of each input, or unknown", ("gallery", None), ("inputs", "+"))
    one.add_argument("-k", type=int, default=5, help="so many classes are told (default 5)")
    limits(one, "false-alarms", 0.01, alarms)
    one.add_argument("--margin", type=float, default=0.0, help="how far the best class must be ahead of the next one (default 0)")
    one.add_argument("--rule", default="nearest", choices=("nearest", "prototype"), help="a class is its nearest reference, or their mean")
    one = command(verify, "are two inputs the same?", ("one", None), ("other", None), model=True)
    limits(one, "far", None, "share of different pairs that may be accepted, instead of what the model was trained for")
    one = command(embed, "write the embeddings of many inputs to a file", ("inputs", "+"), model=True)
    one.add_argument("-o", dest="output", required=True, metavar="FILE", help=".parquet or .npz")
    one = command(duplicates, "write every pair above the threshold to a file, the most alike first", ("inputs", "+"), model=True)
    one.add_argument("-o", dest="output", required=True, metavar="FILE", help=".csv")
    limits(one, "far", None, "share of different pairs that may be accepted, instead of what the model was trained for")
    one = command(show, "who is enrolled, classes too close to tell apart, references that look wrong", ("gallery", None))
    limits(one, "false-alarms", 0.01, alarms)
    command(remove, "forget classes", ("gallery", None), ("classes", "+"))
    one = command(export, "write the encoder for use elsewhere, checked on samples", ("inputs", "+"), model=True)
    one.add_argument("-o", dest="output", required=True, metavar="FILE", help=".onnx or .pt2")
    return top


# Commands


def enrol(options) -> int:
    anew = not os.path.exists(options.gallery)
    if not anew:
        people = opened(options)
        if options.model and loaded(options, options.model).fingerprint != people.fingerprint:
            raise Refused(f"{options.gallery} was made by another model than {options.model}: their embeddings cannot be compared")
    elif options.model:
        people = opened(options, options.model)
    else:
        raise Refused(f"there is no gallery {options.gallery} yet: say --model CHECKPOINT to begin one")
    if not Path(options.gallery).absolute().parent.is_dir():
        raise Refused(f"{options.gallery}: there is no such folder")
    found = collect(people, options.inputs, options.label or True)
    embeddings, names, unreadable = embedded(people, found)
    if unreadable:
        name, why = unreadable[0]
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise Refused(f"{name}: {why}{more}. Nothing is enrolled: mend or leave them out")
    before = len(people.gallery)
    if anew and before:
        say(f"{options.qdrant} holds {before:,} references of this model for {Path(options.gallery).stem} already: they stay")
    if options.qdrant:  # first: so that whatever stops it, the same command goes on
        people.save(options.gallery)
    people.gallery.add(found.labels, embeddings, names)
    people.save(options.gallery)
    classes = people.gallery.classes()
    told = {"enrolled": len(found.items), "replaced": before + len(found.items) - len(people.gallery), "references": len(people.gallery)}
    told["classes"] = len(classes)
    text = f"{told['enrolled']:,} enrolled" + (f", of which {told['replaced']:,} took another's place" if told["replaced"] else "")
    tell(options, told, f"{text}: {options.gallery} has {told['references']:,} references of {told['classes']:,} classes")
    return 0


def identify(options) -> int:
    people = opened(options)
    found = collect(people, options.inputs)
    embeddings, names, unreadable = embedded(people, found)
    limit = {"threshold": options.threshold, "false_alarms": options.false_alarms}
    answers = people.identify(embeddings, options.k, margin=options.margin, rule=options.rule, **limit) if len(embeddings) else []
    threshold = people.threshold_for(options.false_alarms, options.rule) if options.threshold is None else options.threshold
    expected = people.false_alarms_at(threshold, options.rule)
    seen = {match.label for answer in answers for match in answer.matches[:2]}
    triage = people.triage(sorted(seen), threshold)
    lines = [
        {"sample": name, "label": answer.label, "reason": answer.reason, "matches": [match._asdict() for match in answer.matches]}
        for name, answer in zip(names, answers, strict=True)
    ]
    told = {
        "threshold": threshold if math.isfinite(threshold) else None,
        "false_alarms": expected,
        "answers": lines,
        **asdict(triage),
        "unreadable": unreadable,
    }
    if options.json:
        tell(options, told)
    else:
        if answers:
            heads = ["sample", "class", "score", "runner-up", "score", ""]
            print_table(heads, [_line(name, answer) for name, answer in zip(names, answers, strict=True)])
        if answers and expected is not None:
            rate = f"at most {expected:.2%} of strangers reach it" if expected < 1 else "any number of strangers may reach it"
            say(f"threshold {threshold:.4f}: {rate}" + _why_not(people, options, expected))
        elif answers and options.threshold is None:
            say("this model was saved without a threshold: nobody is refused. To tell strangers say --threshold SCORE")
        say_triage(triage)
        say_unreadable(unreadable)
    return 2 if unreadable else int(any(answer.label is None for answer in answers))


def _line(name: str, answer) -> list[str]:
    best, second = answer.matches[0], answer.matches[1] if len(answer.matches) > 1 else None
    label = best.label if answer.label is not None else f"unknown ({best.label}?)"
    return [name, label, f"{best.score:.4f}", *([second.label, f"{second.score:.4f}"] if second else ["", ""]), answer.reason]


def _why_not(people, options, expected: float) -> str:
    if options.threshold is not None or expected <= options.false_alarms * 1.001:
        return ""
    pairs = people.model.decision.different
    return f", not {options.false_alarms:.2%}: validation's {pairs:,} different pairs tell no lower rate"


def verify(options) -> int:
    people = loaded(options, options.model)
    threshold, pair = _threshold(people, options), []
    for place in (options.one, options.other):
        found = collect(people, [place])
        if len(found.items) != 1:
            raise Refused(f"{place} holds {len(found.items)} inputs: verification is of one and another")
        pair.append(found.items[0])
    answer = people.verify(*pair, threshold)
    text = f"{'same' if answer.same else 'different'}: score {answer.score:.4f}, threshold {answer.threshold:.4f}"
    if answer.far is not None:
        text += f", where {answer.far:.2%} of different pairs are accepted and {answer.frr:.2%} of same pairs refused"
        text += f"; {answer.probability:.1%} likely the same, if both were equally likely"
    tell(options, asdict(answer), text)
    return 0 if answer.same else 1


def embed(options) -> int:
    from siamese import archive

    archive.check(options.output)
    people = loaded(options, options.model)
    found = collect(people, options.inputs)
    with progress(len(found.items), "embedding") as advance:
        unreadable = archive.write(people, found.items, found.names, options.output, advance, say)
    say_unreadable(unreadable)
    told = {"embedded": len(found.items) - len(unreadable), "unreadable": unreadable, "output": options.output}
    tell(options, told, f"{told['embedded']:,} embeddings are in {options.output}")
    return 2 if unreadable else 0


def duplicates(options) -> int:
    from siamese.gallery import pairs_above

    if not options.output.lower().endswith(".csv"):
        raise Refused(f"{options.output} must end in .csv")
    people = loaded(options, options.model)
    threshold = _threshold(people, options)
    decision = people.model.decision
    threshold = decision.threshold if threshold is None else threshold
    found = collect(people, options.inputs)
    embeddings, names, unreadable = embedded(people, found)
    rows, score = pairs_above(people.gallery.distance, embeddings, threshold)
    probable = decision.probability(score).tolist() if decision else [None] * len(score)
    partial = Path(f"{options.output}.{os.getpid()}.part")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("left", "right", "score", "probability"))
            for (left, right), one, chance in zip(rows.tolist(), score.tolist(), probable, strict=True):
                writer.writerow((names[left], names[right], f"{one:.6f}", "" if chance is None else f"{chance:.4f}"))
        os.replace(partial, options.output)
    finally:
        partial.unlink(missing_ok=True)
    compared = len(names) * (len(names) - 1) // 2
    text = f"{len(rows):,} of {compared:,} pairs reach {threshold:.4f}: {options.output}"
    by_chance = None
    if decision is not None:
        by_chance = decision.rates_at(threshold)[0] * compared
        text += f". At validation's rate of false accepts {by_chance:,.0f} would by chance: --far RATE asks for fewer"
    say_unreadable(unreadable)
    told = {"pairs": len(rows), "compared": compared, "threshold": threshold, "expected_by_chance": by_chance, "unreadable": unreadable}
    tell(options, told, text)
    return 2 if unreadable else 0


def show(options) -> int:
    people = opened(options)
    classes = people.gallery.classes()
    with progress(len(people.gallery), "comparing") as advance:
        triage = people.triage(None, options.threshold, options.false_alarms, advance)
    if options.json:
        tell(options, {"model": people.fingerprint, "classes": classes, **asdict(triage)})
        return 0
    print_table(["class", "references"], [[name, str(count)] for name, count in sorted(classes.items())])
    say(f"{len(people.gallery):,} references of {len(classes):,} classes, made by the model {people.fingerprint}")
    say_triage(triage)
    return 0


def remove(options) -> int:
    people = opened(options)
    known = people.gallery.classes()
    if missing := [name for name in options.classes if name not in known]:
        raise Refused(f"{options.gallery} has no class {missing[0]!r}: nothing is removed")
    gone = sum(people.remove(name) for name in dict.fromkeys(options.classes))
    people.save(options.gallery)
    told = {"removed": gone, "references": len(people.gallery), "classes": len(people.gallery.classes())}
    tell(options, told, f"{gone:,} references removed: {told['references']:,} of {told['classes']:,} classes are left")
    return 0


def export(options) -> int:
    from siamese.export import export as write

    people = loaded(options, options.model)
    found = collect(people, options.inputs)
    inputs, failed = people.model.reader.read(found.items[:SAMPLES])
    if failed:
        place, why = next(iter(failed.items()))
        raise Refused(f"{found.names[place]}: {why}")
    done = write(people.model, options.output, inputs)
    told = {"output": options.output, "samples": len(inputs), "difference": done.difference, **done.metadata}
    tell(options, told, "\n".join(done.lines))
    return 0


# What all of them need


def loaded(options, path: str):
    """The model of a checkpoint, a bundle or a gallery, with nothing enrolled."""
    from siamese.recognition import Recognizer

    return Recognizer.load(path, tuple(options.trust), references=False)


def opened(options, model: str | None = None):
    """The gallery, with its references; or one that begins with a model."""
    from siamese.recognition import Recognizer

    gallery = None
    if options.qdrant == ":memory:":
        raise Refused("--qdrant :memory: would be forgotten at once: say a folder, or the URL of a server")
    if options.qdrant:
        from functools import partial

        from siamese.qdrant import QdrantGallery

        gallery = partial(QdrantGallery, place=options.qdrant, collection=Path(options.gallery).stem)
    return Recognizer.load(model or options.gallery, tuple(options.trust), gallery, references=model is None)


def _threshold(people, options) -> float | None:
    from siamese.decision import rounded_up

    if options.threshold is None and people.model.decision is None:
        raise Refused("this model was saved without a threshold: say --threshold SCORE")
    if options.far is None:
        return options.threshold
    if not 0 < options.far < 1:
        raise Refused(f"--far {options.far} is a share of different pairs: above 0 and below 1")
    if options.far < people.model.decision.finest:
        raise Refused(
            f"--far {options.far:g} is less than validation's pairs can tell: say {rounded_up(people.model.decision.finest)} or more"
        )
    return people.model.decision.at_far(options.far)[0]


def embedded(people, found: Items):
    """(float [N, D] of the inputs that can be read, their names, and (name, why) of the others)."""
    import torch

    parts, names, unreadable = [], [], []
    with progress(len(found.items), "embedding") as advance:
        for start, embeddings, failed in people.stream(found.items):
            parts.append(embeddings)
            chunk = found.names[start : start + len(embeddings) + len(failed)]
            names += [name for place, name in enumerate(chunk) if place not in failed]
            unreadable += [(chunk[place], why) for place, why in failed.items()]
            advance(len(chunk))
    return torch.cat(parts), names, unreadable


def collect(people, inputs: list[str], labelled: bool | str = False) -> Items:
    """What the inputs of a command line are, for a model like this; `labelled` asks for classes, or is the class of all.

    Raises:
        Refused, ValueError, OSError: there is nothing, or no class where one is needed.
    """
    if people.model.reader is None:
        raise Refused("this model's data set does not say how a file becomes an input: use siamese.recognition.Recognizer from Python")
    from siamese.recognition import name_of, written_out

    kind, columns = people.model.reader.kind, people.model.config.get("dataset")
    columns = {name: value for name, value in (columns if isinstance(columns, dict) else {}).items() if isinstance(value, str)}
    gather = {"images": _images, "texts": _texts, "rows": _rows}[kind]
    found = Items([], [], [])
    for place in inputs:
        for item, name, label in gather(place, labelled is True, columns):
            if labelled and not (label or isinstance(labelled, str)):
                raise Refused(f"{place} has no class: say --as CLASS, or give a folder of class folders or a table with a column label")
            found.items.append(item)
            found.names.append(name_of(name))
            found.labels.append(written_out(labelled if isinstance(labelled, str) else label))
    if not found.items:
        raise Refused(f"{', '.join(inputs)}: there is nothing to read")
    return found


def _images(place: str, labelled: bool, columns: dict):
    from siamese.data.images import from_folder, images_in
    from siamese.data.listing import rows

    path = Path(place)
    if path.is_dir():
        listed = [(inside.what, inside.label) for inside in from_folder(path)[0]] if labelled else [(one, "") for one in images_in(path)[0]]
        yield from ((str(path / inside), str(path / inside), label) for inside, label in listed)
    elif path.suffix.lower() in TABLES:
        for _, entries in rows(path, ("path", "label") if labelled else ("path",), ("label",))[0]:
            file = str(path.parent / entries["path"])
            yield file, file, entries["label"]
    elif path.exists():
        yield place, place, ""
    else:
        raise Refused(f"{place}: there is no such file")


def _texts(place: str, labelled: bool, columns: dict):
    from siamese.data.listing import rows

    path = Path(place)
    if path.suffix.lower() in TABLES and not any(letter.isspace() for letter in path.suffix):
        text, label = columns.get("text", "text"), columns.get("label", "label")
        for row, entries in rows(path, (text, label) if labelled else (text,), (label,))[0]:
            yield entries[text], f"{place}, row {row}", entries[label]
    elif path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise Refused(f"{place} is no UTF-8: save it as UTF-8") from None
        yield from ((line, f"{place}, line {row}", "") for row, line in enumerate(lines, 1) if line.strip())
    else:
        yield place, place, ""


def _rows(place: str, labelled: bool, columns: dict):
    from siamese.data.listing import rows

    if place.lstrip().startswith("{"):
        try:
            yield json.loads(place), place, ""
        except (ValueError, RecursionError) as error:
            raise Refused(f"{place[:80]} is no JSON object: {error}") from None
        return
    label = columns.get("label", "label")
    for row, entries in rows(place, (label,) if labelled else (), (label,))[0]:
        yield entries, f"{place}, row {row}", entries[label]


@contextlib.contextmanager
def progress(total: int, what: str):
    """A function to be told how much is done; a bar where somebody looks, and it takes long."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=total < 1000 or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.advance(task, number)


def tell(options, told: dict, text: str = "") -> None:
    print(json.dumps(told) if options.json else "\n".join(map(printable, text.split("\n"))), flush=True)


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def say_unreadable(unreadable: list[tuple[str, str]], most: int = 10) -> None:
    for name, why in unreadable[:most]:
        say(f"{name}: {why}")
    if len(unreadable) > most:
        say(f"... and {len(unreadable) - most:,} more cannot be read")


def say_triage(triage, most: int = 5) -> None:
    for one, other, score in triage.close[:most]:
        say(f"too close to tell apart: {one} and {other} (score {score:.4f})")
    for label, name, own, other, score in triage.odd[:most]:
        nearer = f"nearer to {other} ({score:.4f}) than to" if score is not None and score > own else "far from"
        say(f"looks wrong: {name} of {label} is {nearer} its own class ({own:.4f})")
    if (left := max(len(triage.close) - most, 0) + max(len(triage.odd) - most, 0)) > 0:
        say(f"... and {left:,} more: --json tells all")


def printable(text: str) -> str:
    """With what could move a terminal's cursor, in a file's name or a gallery, written out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def print_table(heads: list[str], lines: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="right" if head in ("score", "references") else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    sys.exit(main())
