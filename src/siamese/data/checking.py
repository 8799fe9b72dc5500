"""What is wrong with the data, told before the first step: a report, and the guard against leakage from training into what is judged."""

import csv
import logging
import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch

from siamese.data.leakage import duplicates, equal
from siamese.data.samples import Finding, Samples
from siamese.data.texts import as_texts

MODES, LEAKAGE_MODES = ("error", "warn", "off"), ("error", "warn", "drop", "off")
_PICTURED = 12

log = logging.getLogger(__name__)


def findings(splits: dict[str, Samples]) -> Iterator[Finding]:
    """What samples tell of themselves: splits that share a class, inputs that are empty or occur twice, classes of one sample."""
    for one, other in combinations(splits, 2):
        shared = sorted(set(splits[one].class_names) & set(splits[other].class_names))
        yield Finding(True, f"classes that {one} and {other} share", shared, "put each class into one split: judging is of new ones")
    for name, samples in splits.items():
        ids, inputs = samples.ids, samples.inputs
        flat = inputs.flatten(1)
        if inputs.is_floating_point():
            broken = (~flat.isfinite().all(1)).nonzero().flatten().tolist()
            yield Finding(True, f"inputs of {name} with NaN or infinite values", [ids[row] for row in broken], "mend or leave them out")
        if inputs.dim() > 2 and len(inputs):  # images
            blank = torch.cat([block.amin(1) == block.amax(1) for block in flat.split(4096)]).nonzero().flatten().tolist()
            yield Finding(False, f"inputs of {name} that are of one value and show nothing", [ids[row] for row in blank], "leave them out")
        twice = [[], []]
        for first, second in equal(inputs).tolist():
            names = [samples.class_names[samples.labels[row]] if samples.labelled else "" for row in (first, second)]
            if names[0] == names[1]:
                twice[0].append(f"{ids[second]} = {ids[first]}")
            else:
                twice[1].append(f"{ids[second]} ({names[1]}) = {ids[first]} ({names[0]})")
        yield Finding(
            False, f"inputs of {name} that occur in two classes", twice[1], "one label of each must be wrong, or the classes are one"
        )
        yield Finding(False, f"inputs of {name} that occur twice", twice[0], "leave one of each out")
        if samples.labelled:
            _, place, counts = samples.labels.unique(return_inverse=True, return_counts=True)
            lone = (counts[place] == 1).nonzero().flatten().tolist()
            yield Finding(
                False, f"classes of {name} that have one sample", [ids[row] for row in lone], "add a second one: alone they make no pair"
            )


def check(splits: dict[str, Samples], found: list[Finding], directory: Path, mode: str) -> None:
    """Log what is found, and what was found already, the serious first, and write all of it to `check.csv`.

    Raises:
        ValueError: something serious was found, and the mode is "error".
    """
    if mode not in MODES:
        raise ValueError(f"{mode} must be one of {', '.join(MODES)}")
    found = [finding for finding in [*found, *(findings(splits) if mode != "off" else ())] if finding.where]
    found.sort(key=lambda finding: not finding.serious)
    if not found:
        return
    _write_csv(
        directory / "check.csv",
        ("serious", "what", "where", "remedy"),
        [(finding.serious, finding.what, where, finding.remedy) for finding in found for where in finding.where],
    )
    for finding in found:
        level = logging.WARNING if finding.serious else logging.INFO
        log.log(level, "check: %s: %d, such as %s: %s", finding.what, len(finding.where), finding.where[0], finding.remedy)
    log.info("check: all of it is in %s", os.path.relpath(directory / "check.csv"))
    if mode == "error" and (serious := [finding for finding in found if finding.serious]):
        first, *more = serious
        others = f" (and {len(more)} more, see above)" if more else ""
        raise ValueError(f"{first.what}: {len(first.where):,}, such as {first.where[0]}{others}: {first.remedy}, or say check=warn")


def guard(training: Samples, splits: dict[str, Samples], directory: Path, mode: str) -> torch.Tensor:
    """Look for leakage, write what is found to `leakage.csv` and `leakage.png`, and give back the rows of training to leave out.

    Raises:
        ValueError: there is leakage, and the mode is "error".
    """
    if mode not in LEAKAGE_MODES:
        raise ValueError(f"{mode} must be one of {', '.join(LEAKAGE_MODES)}")
    found = {} if mode == "off" else {name: duplicates(training.inputs, samples.inputs) for name, samples in splits.items()}
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *(pairs.left for pairs in found.values())]).unique()
    if not len(rows):
        return rows
    lines, pictures = [], []
    for name, pairs in found.items():
        samples = splits[name]
        for left, right, alike in zip(*(column.tolist() for column in pairs), strict=True):
            classes = [part.class_names[part.labels[row]] if part.labelled else "" for part, row in ((training, left), (samples, right))]
            lines.append((name, training.ids[left], samples.ids[right], classes[0], classes[1], f"{alike:.4f}"))
            if training.kind == "texts":
                lines[-1] += (*as_texts(training.inputs[left : left + 1]), *as_texts(samples.inputs[right : right + 1]))
            else:
                pictures.append((training.inputs[left], samples.inputs[right], alike, name))
    header = ("split", "training_sample", "sample", "training_class", "class", "alike")
    header += ("training_text", "text") if training.kind == "texts" else ()
    _write_csv(directory / "leakage.csv", header, lines)
    if training.inputs.dim() == 4:
        _draw(directory / "leakage.png", pictures)
    judged = sum(len(pairs.right.unique()) for pairs in found.values())
    exact = sum(int((pairs.alike == 1).sum()) for pairs in found.values())
    split, one, other = lines[0][:3]
    text = (
        f"judged samples that training has, or nearly has: {judged:,} (equal pairs: {exact:,}), such as {other} of {split}, which is "
        f"{one}: see {os.path.relpath(directory / 'leakage.csv')}"
    )
    if mode == "error":
        raise ValueError(f"{text}. Leave them out (leakage=drop does so with training's), or say leakage=warn")
    log.warning("leakage: %s", f"{text}. Training goes without its {len(rows):,}" if mode == "drop" else f"{text}, or say leakage=drop")
    return rows if mode == "drop" else rows[:0]


def _write_csv(path: Path, header: tuple[str, ...], lines: list[tuple]) -> None:
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    os.replace(partial, path)


def _draw(path: Path, pairs: list[tuple]) -> None:
    """Pairs side by side, training's on the left, those that are least alike first: they are the ones to look at."""
    from matplotlib.figure import Figure

    pairs = sorted(pairs, key=lambda pair: pair[2])[:_PICTURED]
    columns = min(len(pairs), 4)
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.5 * lines), layout="constrained")
    for axes, (left, right, alike, name) in zip(figure.subplots(lines, columns, squeeze=False).flat, pairs, strict=False):
        picture = torch.cat([left, right], 2).float()
        picture = (
            picture / 255 if left.dtype == torch.uint8 else (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-6)
        )
        picture = picture.expand(3, -1, -1) if len(picture) == 1 else picture[:3]
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(f"training | {name}: {alike:.3f}", fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)
