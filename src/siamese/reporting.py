"""`report.html` of a run: what the space looks like, where it fails, and whether it was worth training; one file, no network.

All of it is a view of `results.npz`, `metrics.json` and what else lies in the run's directory: nothing is computed again, and the data is
not needed. `keep` chooses, while the samples are at hand, those that are looked at later, and puts them into the results.
"""

import base64
import csv
import html
import io
import json
import logging
import math
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn.functional import interpolate

from siamese.data.samples import Samples
from siamese.data.texts import as_texts
from siamese.evaluation import EvaluationResult, higher_is_better

log = logging.getLogger(__name__)
QUERIES, NEIGHBOURS, SIDE, LETTERS = 8, 5, 64, 300
MAPPED, COLOURED = 400, 8  # samples of the map, and its classes that have a colour
# The figures to look at first, in a table, on the page and beside an artifact.
HEADLINE = ("recall_at_1", "map_at_r", "auc", "eer", "accuracy", "oneshot_20way", "omniglot_error", "average_precision", "f1")
HEADLINE += ("triplet_accuracy",)
ROWS = {"raw": "raw input", "untrained": "untrained", "val": "validation", "test": "test"}
# Stand-ins: on the page each is a variable, so that it suits light and dark.
INK, FAINT, LINE, SAME, DIFFERENT = "#010101", "#020202", "#030303", "#040404", "#050505"
THEMED = {SAME: "var(--same)", DIFFERENT: "var(--different)", INK: "var(--ink)", FAINT: "var(--faint)", LINE: "var(--line)"}
# Okabe and Ito 2008: told apart by colour-blind eyes too.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f7f7f")
MARKERS = "osD^vP*X"


def headline(figures: Iterable[str]) -> list[str]:
    """Those of HEADLINE that there are; the average precision only of listed pairs, which have no retrieval."""
    there = set(figures)
    return [name for name in HEADLINE if name in there and (name != "average_precision" or "map_at_r" not in there)]


# --- what is looked at later, chosen while the samples are at hand


def grids(result: EvaluationResult, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of the queries whose neighbours are shown, int64 [<= QUERIES] each: drawn at random, the worst, the most confident mistakes."""
    of = np.asarray(result.gallery_labels) if result.gallery_ids else result.labels
    answered = result.neighbours[:, 0] >= 0 if result.neighbours.shape[1] else np.zeros(len(result.labels), dtype=bool)
    answered &= np.isin(result.labels, np.flatnonzero(result.class_queries))
    rows = answered.nonzero()[0]
    if not len(rows):
        return {}
    near = np.where(result.neighbours[rows] >= 0, of[result.neighbours[rows]], -1)
    right = near == result.labels[rows, None]
    sizes = np.bincount(of[of >= 0], minlength=len(result.class_names))[result.labels[rows]] - (not result.gallery_ids)
    found = right.sum(1) / np.minimum(np.maximum(sizes, 1), near.shape[1])
    score = result.neighbour_scores[rows, 0]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:QUERIES])
    wrong = (~right[:, 0]).nonzero()[0]
    worst = np.lexsort((-score, found))
    chosen = {
        "random queries": drawn,
        "the worst queries": worst[found[worst] < 1][:QUERIES],
        "the most confident mistakes": wrong[np.argsort(-score[wrong], kind="stable")[:QUERIES]],
    }
    return {name: rows[some] for name, some in chosen.items() if len(some)}


def mapped(result: EvaluationResult) -> tuple[np.ndarray, np.ndarray]:
    """Places among `sampled` of the samples on the map, and the classes in colour: those with most samples on it, int64 [<= COLOURED]."""
    labels = result.labels[result.sampled]
    counts = np.bincount(labels[labels >= 0], minlength=1)
    classes = np.argsort(-counts, kind="stable")[:COLOURED]
    classes = np.sort(classes[counts[classes] > 1])
    members = [(labels == one).nonzero()[0] for one in classes]
    kept = [rows[thinned(rows, MAPPED // len(classes))] for rows in members]  # of each some, however the rows are sorted
    others = (~np.isin(labels, classes)).nonzero()[0]
    kept.append(others[thinned(others, MAPPED - sum(map(len, kept)))])
    return np.sort(np.concatenate(kept)), classes


def keep(result: EvaluationResult, samples: Samples, describe: Callable[[torch.Tensor], str] | None = None) -> None:
    """Put into the result the samples that its views show: pictures of at most SIDE x SIDE, or what there is to read.

    Args:
        samples: those that were judged.
        describe: a row of a table, [D] -> its entries in words; numbers where there is none.
    """
    queries, gallery = (rows.numpy() for rows in samples.roles())
    rows = list(grids(result).values())
    apart = len(queries) if result.gallery_ids else 0
    near = [result.neighbours[chosen, :NEIGHBOURS].ravel() for chosen in rows]
    places, classes = mapped(result)
    labels = result.labels[result.sampled[places]]
    on_map = [result.sampled[places][(labels == one).nonzero()[0][:1]] for one in classes]
    shown = np.concatenate([*rows, *(some[some >= 0] + apart for some in near), *on_map, result.hardest[:, :2].ravel()]).astype(np.int64)
    result.shown = np.unique(shown)
    if not len(result.shown):
        return
    every = np.concatenate([queries, gallery]) if apart else queries
    inputs = samples.inputs[torch.from_numpy(every[result.shown])]
    if samples.kind == "images":
        result.pictures = _small(inputs)
    elif samples.kind == "texts":
        result.said = [_cut(text, LETTERS) for text in as_texts(inputs)]
    else:
        result.said = [_cut((describe or _numbers)(row), LETTERS) for row in inputs]


def _numbers(row: torch.Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in row.flatten().tolist())


def _small(images: torch.Tensor) -> np.ndarray:
    """[N, C, H, W] -> uint8 [N, 1 or 3, h, w], h and w of at most SIDE."""
    images = images[:, : 1 if images.shape[1] in (1, 2) else 3]
    if images.dtype != torch.uint8:
        low, high = images.amin(), images.amax()
        images = (images.float() - low) / (high - low).clamp(min=1e-6) * 255
    scale = min(SIDE / max(images.shape[2:]), 1)
    if scale < 1:
        size = [max(round(side * scale), 1) for side in images.shape[2:]]
        images = interpolate(images.float(), size, mode="area")
    return images.round().clamp(0, 255).to(torch.uint8).numpy() if images.is_floating_point() else images.numpy()


# --- drawing: matplotlib's SVG, its colours made variables of the page


def _svg(figure, label: str) -> str:
    """The figure as an element of the page, with what it shows in words."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has a font that has it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if f"#{found[1]}" in text else "", text)  # the others are alike in all figures
    for colour, variable in THEMED.items():
        text = text.replace(colour, variable)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _axes(width: float = 4.6, height: float = 3.4, **settings):
    """(figure, axes) in the page's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, which="both", labelsize=9)
    for side, spine in axes.spines.items():
        spine.set(color=LINE, visible=side in ("left", "bottom"))
    axes.set(**settings)
    axes.xaxis.label.set(color=FAINT, size=9)
    axes.yaxis.label.set(color=FAINT, size=9)
    axes.yaxis.labelpad = 8  # a browser's digits may be wider than matplotlib's
    return figure, axes


def _legend(axes, place: str = "outside lower center", columns: int = 2) -> None:
    axes.figure.legend(loc=place, ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


STYLES = {"raw": (":", FAINT), "untrained": ("--", FAINT), "val": ("-.", DIFFERENT), "test": ("-", SAME)}


def judged_rows(results: dict[str, EvaluationResult]) -> tuple[str, list[str]]:
    """The prefix of what the page is about, and the rows beside it, from the lowest to it."""
    main = next(prefix for prefix in ("test", "val", "untrained", "raw") if prefix in results)
    return main, [prefix for prefix in ("raw", "untrained") if prefix in results and prefix != main] + [main]


def roc(results: dict[str, EvaluationResult]) -> str:
    main, rows = judged_rows(results)
    figure, axes = _axes(xscale="log", xlabel="false-accept rate", ylabel="true-accept rate", ylim=(0, 1.02))
    least = _least_far(results[main])
    axes.set_xlim(least, 1)
    for prefix in rows:
        result, (style, colour) = results[prefix], STYLES[prefix]
        some = thinned(result.far)
        axes.plot(
            result.far[some].clip(least / 10),
            result.tar[some],
            style,
            color=colour,
            label=f"{ROWS[prefix]}, AUC {result.figures['auc']:.4f}",
        )
    figures = results[main].figures
    label = f"ROC of {ROWS[main]}, area {figures['auc']:.4f}"
    if "far" in figures:
        point = (max(figures["far"], least), 1 - figures["frr"])
        axes.plot(*point, "o", color=DIFFERENT, markersize=8, fillstyle="none", markeredgewidth=2, label="threshold")
        label += f"; by the threshold {figures['far']:.2%} of different pairs are accepted and {figures['frr']:.2%} of same ones refused"
    _legend(axes)
    return _svg(figure, label)


def _least_far(result: EvaluationResult) -> float:
    """The left end of a ROC: one different pair, or a ten-millionth."""
    return max(1 / max(result.pairs[1], 1), 1e-7) if result.pairs else 1e-5


def thinned(curve: np.ndarray, most: int = 300) -> np.ndarray:
    """At most so many rows of a curve, evenly spread, its ends among them."""
    return np.unique(np.linspace(0, len(curve) - 1, min(len(curve), most)).astype(int))


def score_shares(result: EvaluationResult, bins: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of bins of the score, [bins + 1], and the shares of same and of different pairs in each, [bins], from the ROC's thresholds."""
    value, far, tar = result.thresholds[1:][::-1], result.far[1:][::-1], result.tar[1:][::-1]  # lowest first
    edges = np.linspace(value[0], value[-1], bins + 1)
    # Accepted at a score is what reaches it: at the lowest edge all of them, above the highest none.
    same, different = (np.append(np.interp(edges[:-1], value, reached), 0) for reached in (tar, far))
    return edges, -np.diff(same), -np.diff(different)


def histogram(result: EvaluationResult) -> str:
    """Scores of same and of different pairs, and the threshold."""
    edges, same, different = score_shares(result)
    figure, axes = _axes(xlabel="score, higher is more alike", ylabel="share of pairs, in each its own", yticks=[])
    for mass, colour, name in ((different, DIFFERENT, "different"), (same, SAME, "same")):
        axes.stairs(mass / max(mass.max(), 1e-12), edges, fill=True, color=colour, alpha=0.35, label=name)
        axes.stairs(mass / max(mass.max(), 1e-12), edges, color=colour)
    label = "Scores of same and of different pairs, each scaled to its highest bin"
    if (threshold := result.figures.get("threshold")) is not None:  # none where the validation classes are trained on
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3f}")
        label += f"; the threshold is {threshold:.3f}"
    _legend(axes)
    return _svg(figure, label)


def recall(results: dict[str, EvaluationResult]) -> str:
    _, rows = judged_rows(results)
    figure, axes = _axes(xlabel="K", ylabel="Recall@K", ylim=(0, 1.02), xticks=range(1, 11))
    label = []
    for prefix in rows:
        ranks, shares = recall_at(results[prefix])
        style, colour = STYLES[prefix]
        axes.plot(ranks, shares, style, color=colour, marker=".", label=f"{ROWS[prefix]}, {shares[0]:.3f} at 1")
        label.append(f"{ROWS[prefix]} from {shares[0]:.3f} at 1 to {shares[-1]:.3f} at {ranks[-1]}")
    _legend(axes)
    return _svg(figure, f"Recall at K: {'; '.join(label)}")


def recall_at(result: EvaluationResult) -> tuple[np.ndarray, np.ndarray]:
    """K, and the share of queries with one of their class among the K nearest, of those that have any to find."""
    of = np.asarray(result.gallery_labels) if result.gallery_ids else result.labels
    there = np.isin(result.labels, of) if result.gallery_ids else np.bincount(of)[result.labels] > 1
    near = np.where(result.neighbours >= 0, of[result.neighbours], -1)[there]
    hit = np.maximum.accumulate(near == result.labels[there, None], axis=1)
    return np.arange(1, hit.shape[1] + 1), hit.mean(0)


def oneshot(results: dict[str, EvaluationResult]) -> str:
    main, rows = judged_rows(results)
    figure, axes = _axes(xscale="log", xlabel="number of classes to choose from", ylabel="answered right, from one example", ylim=(0, 1.02))
    for prefix in rows:
        if len(results[prefix].oneshot):
            style, colour = STYLES[prefix]
            axes.plot(*results[prefix].oneshot.T, style, color=colour, marker=".", label=ROWS[prefix])
    ways = results[main].oneshot[:, 0]
    axes.plot(ways, 1 / ways, color=FAINT, linewidth=0.8, label="guessing")
    axes.set_xticks(ways, [f"{way:g}" for way in ways])
    axes.minorticks_off()
    _legend(axes)
    told = ", ".join(f"{share:.3f} of {way:g}" for way, share in results[main].oneshot)
    return _svg(figure, f"One-shot accuracy by the number of classes: {told}")


CURVES = {  # panel -> column of metrics.csv: its name
    "loss": {"train/loss": "training loss"},
    "validation": {"val/map_at_r": "map_at_r", "val/recall_at_1": "recall_at_1", "val/average_precision": "average_precision"},
    "health": {"train/mined_fraction": "mined", "train/active_fraction": "active", "train/spread": "spread"},
}


def curves(rows: list[dict[str, str]]) -> Iterator[str]:
    for panel, columns in CURVES.items():
        drawn = []
        figure, axes = _axes(3.4, 2.5, xlabel="step", title=panel)
        axes.title.set(color=INK, size=10)
        for (column, name), colour, style in zip(columns.items(), (SAME, DIFFERENT, FAINT), ("-", "--", "-."), strict=False):
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=name, marker="." if len(points) < 30 else "")
                drawn.append(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
        if drawn:
            if len(drawn) > 1:
                _legend(axes)
            yield _svg(figure, f"{panel} by step: {', '.join(drawn)}")


# --- several runs at once


OVERLAID = [(colour, style) for style in ("-", "--") for colour in PALETTE[:7]]  # more lines are not told apart


def overlaid(lines: list[tuple[str, tuple[str, str], np.ndarray, np.ndarray]], label: str, **settings) -> str:
    """A line for each run: its name, which of OVERLAID it has, and its points."""
    figure, axes = _axes(**settings)
    for name, (colour, style), x, y in lines:
        axes.plot(x, y, style, color=colour, label=_plain(name, 40), marker="." if len(x) < 30 else "")
    _legend(axes, columns=1 if any(len(name) > 20 for name, *_ in lines) else 2)
    return _svg(figure, f"{label}: {'; '.join(name for name, *_ in lines)}")


def overlaid_rocs(results: list[tuple[str, tuple[str, str], EvaluationResult]]) -> str:
    lines = [(name, look, result.far.clip(1e-7), result.tar) for name, look, result in results]
    lines = [(name, look, far[some], tar[some]) for name, look, far, tar in lines for some in [thinned(far)]]
    least = min(_least_far(result) for *_, result in results)
    scales = {"xscale": "log", "xlim": (least, 1), "ylim": (0, 1.02)}
    return overlaid(lines, "ROC", xlabel="false-accept rate", ylabel="true-accept rate", **scales)


def space(result: EvaluationResult) -> str:
    """The embeddings of `mapped` in two dimensions by t-SNE (van der Maaten and Hinton 2008), some classes in colour."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    from sklearn.manifold import TSNE

    places, classes = mapped(result)
    points = result.embeddings[places].astype(np.float32)
    points = TSNE(init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=0, max_iter=500).fit_transform(points)
    rows, labels = result.sampled[places], result.labels[result.sampled[places]]
    figure, axes = _axes(6.4, 5.2, xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    rest = ~np.isin(labels, classes)
    axes.scatter(*points[rest].T, s=7, color=FAINT, linewidth=0, label="others" if rest.any() else None)
    pictured = dict(zip(result.shown.tolist(), result.pictures, strict=False))
    for one, colour, marker in zip(classes, PALETTE, MARKERS, strict=False):
        some = labels == one
        axes.scatter(*points[some].T, s=26, color=colour, marker=marker, linewidth=0, alpha=0.9, label=_plain(result.class_names[one], 24))
        first = some.nonzero()[0][0]
        if (picture := pictured.get(int(rows[first]))) is not None:
            picture = picture.transpose(1, 2, 0)
            image = OffsetImage(picture.repeat(3, 2) if picture.shape[2] == 1 else picture, zoom=26 / max(picture.shape[:2]))
            axes.add_artist(
                AnnotationBbox(image, points[first], xybox=(18, 18), boxcoords="offset points", pad=0.15, bboxprops={"edgecolor": colour})
            )
    _legend(axes, "outside right center", 1)
    return _svg(figure, f"Map of {len(points)} embeddings by t-SNE; in colour {', '.join(result.class_names[one] for one in classes)}")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(text: str, most: int) -> str:
    """A name in a legend, which is no formula, and is there whatever it begins with."""
    return "\u200b" * text.startswith("_") + _cut(text, most).replace("$", r"\$")


# --- the page


def _picture(pixels: np.ndarray) -> str:
    """uint8 [h, w, 1 or 3] as the address of a PNG that is part of the page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _samples(result: EvaluationResult, rows: list[int], scores: list[float | None], own: int | None) -> list[dict]:
    """What the page says of samples, numbered as `shown` is: the first is the query."""
    kept = {row: place for place, row in enumerate(result.shown.tolist())}
    apart = len(result.labels)
    told = []
    for row, score in zip(rows, scores, strict=True):
        inside = row < apart or not result.gallery_ids
        label = int(result.labels[row]) if inside else int(result.gallery_labels[row - apart])
        place = kept.get(row)
        told.append(
            {
                "id": result.ids[row] if inside else result.gallery_ids[row - apart],
                "name": result.class_names[label] if 0 <= label < len(result.class_names) else "",
                "pixels": result.pictures[place].transpose(1, 2, 0) if place is not None and place < len(result.pictures) else None,
                "text": result.said[place] if place is not None and place < len(result.said) else None,
                "score": score,
                "same": None if own is None or score is None else label == own,
            }
        )
    return told


def neighbours(result: EvaluationResult) -> list[tuple[str, list[list[dict]]]]:
    """The grids: a title, and for each query itself and its nearest neighbours."""
    apart = len(result.labels) if result.gallery_ids else 0
    found = []
    for title, queries in grids(result).items():
        lines = []
        for query in queries.tolist():
            near = [
                (row + apart, score)
                for row, score in zip(result.neighbours[query].tolist(), result.neighbour_scores[query].tolist(), strict=True)
            ]
            near = [(row, score) for row, score in near[:NEIGHBOURS] if row >= apart]
            rows, scores = zip(*near, strict=True) if near else ((), ())
            lines.append(_samples(result, [query, *rows], [None, *scores], int(result.labels[query])))
        found.append((title, lines))
    return found


def pairs(result: EvaluationResult) -> list[tuple[str, list[list[dict]]]]:
    """Likewise of listed pairs: the same that score lowest, and the different that score highest."""
    found = []
    for same, title in ((1, "the same, and least alike"), (0, "different, and most alike")):
        lines = []
        for left, right, score, _ in result.hardest[result.hardest[:, 3] == same]:
            line = _samples(result, [int(left), int(right)], [None, float(score)], None)
            line[1]["same"] = bool(same)
            lines.append(line)
        if lines:
            found.append((title, lines))
    return found


def cards(results: dict[str, EvaluationResult], metrics: dict) -> list[dict]:
    """A figure, its interval, and what it was before training, as `metrics.json` has them."""
    main, rows = judged_rows(results)
    return [
        {
            "name": name,
            "value": metrics[f"{main}/{name}"],
            "interval": metrics.get(f"{main}/{name}_ci95"),
            "higher": higher_is_better(name),
            "before": [(ROWS[prefix], metrics[f"{prefix}/{name}"]) for prefix in rows[:-1] if f"{prefix}/{name}" in metrics],
        }
        for name in headline(results[main].figures)
    ]


def confusions(result: EvaluationResult, most: int = 10) -> list[tuple[str, str, int, int]]:
    names = result.class_names
    return [(names[a], names[b], int(count), int(result.class_queries[a])) for a, b, count in result.confusions[:most]]


def _table(path: Path, most: int = 12) -> tuple[list[str], list[list[str]], int]:
    """Header, first rows and how many there are, of a CSV file of the run; nothing where there is none."""
    if not path.is_file():
        return [], [], 0
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows[:most], len(rows)


def check_mode(mode: str) -> None:
    """Raises ValueError unless the mode is "html" or "none"."""
    if mode not in ("html", "none"):
        raise ValueError(f"report={mode} is neither html nor none")


def report(run: Path, mode: str) -> None:
    """What a run does at its end: all else of it is written, so that a page that fails costs nothing but itself, and the log says so."""
    if mode == "none":
        return
    started = time.perf_counter()
    try:
        log.info("report: %s, %.1f s", os.path.relpath(write(run)), time.perf_counter() - started)
    except Exception:
        log.exception("the report failed, all else of the run is there: python scripts/report.py %s", os.path.relpath(run))


def write(run: str | os.PathLike) -> Path:
    """Write `report.html` into the directory of a finished run, and give back its path.

    Raises:
        ValueError: the directory holds no results, or they are damaged: the sentence says which.
        OSError: the page cannot be written.
    """
    run = Path(run)
    for name in ("results.npz", "metrics.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run} holds no {name}: give the directory of a run that has finished")
    try:
        results, metrics = EvaluationResult.load(run / "results.npz"), json.loads((run / "metrics.json").read_text())
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{run}: results.npz or metrics.json is damaged ({type(error).__name__}: {error})") from error
    main, _ = judged_rows(results)
    result = results[main]
    others = [prefix for prefix in results if "/" in prefix]  # of other data sets, judged too
    columns = [prefix for prefix in ROWS if prefix in results] + others
    listed = not len(result.class_queries)
    charts = {"roc": roc(results), "histogram": histogram(result)}
    if not listed:
        charts |= {"recall": recall(results)} | ({"oneshot": oneshot(results)} if len(result.oneshot) else {})
        embeddings = result.embeddings.astype(np.float32)
        # A space of one point, or on a line, has no map, nor has one that is too wide for the 16 bits of what is kept of it.
        if len(result.sampled) > 3 and len(mapped(result)[1]) and np.isfinite(embeddings).all() and (np.ptp(embeddings, 0) > 0).sum() > 1:
            charts["space"] = space(result)
    logged = []
    if (run / "metrics.csv").is_file():
        with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
            logged = list(csv.DictReader(file))
    read = lambda name: (run / name).read_text(encoding="utf-8") if (run / name).is_file() else ""  # noqa: E731
    overrides = yaml.safe_load(read(".hydra/overrides.yaml")) or []
    config = yaml.safe_load(read(".hydra/config.yaml")) or {}
    provenance = json.loads(read("provenance.json") or "{}")
    return render(
        run / "report.html",
        "report",
        title=run.resolve().name,
        split=f"{ROWS[main]} split" if main in ("val", "test") else f"test split, {ROWS[main]}",
        threshold="far" in result.figures,
        listed=listed,
        cards=cards(results, metrics),
        figures=[
            (name, [metrics.get(f"{prefix}/{name}") for prefix in columns], metrics.get(f"{main}/{name}_ci95"))
            for name in dict.fromkeys(name for prefix in (main, *columns) for name in results[prefix].figures)
        ],
        rows=[ROWS.get(prefix, prefix.replace("/", " ")) for prefix in columns],
        charts=charts,
        curves=list(curves(logged)),
        grids=pairs(result) if listed else neighbours(result),
        confusions=[] if listed else confusions(result),
        notes=[*result.notes, *(f"{prefix.replace('/', ' ')}: {note}" for prefix in others for note in results[prefix].notes)],
        looked={"leakage": config.get("leakage", "off"), "check": config.get("check", "off")},
        leakage=_table(run / "leakage.csv"),
        findings=_table(run / "check.csv"),
        command=" ".join(["python", f"{config.get('task', 'train')}.py", *(shlex.quote(word) for word in overrides)]),
        config=read(".hydra/config.yaml"),
        provenance={"commit": None, "packages": {}, "data": {}} | provenance,
        seconds={name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("seconds/")},
        queries=len(result.labels),
        classes=len(result.class_names),
        pairs=result.pairs,
    )


def render(to: Path, template: str, **values) -> Path:
    """Write a page of `pages/`, atomically; whatever is no page of ours is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = FileSystemLoader(Path(__file__).parent / "pages")
    environment = Environment(loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": figure_text, "picture": _picture}
    partial = to.with_name(f"{to.name}.part")
    partial.write_text(environment.get_template(f"{template}.html").render(values), encoding="utf-8", errors="replace")
    os.replace(partial, to)
    return to


def figure_text(value: float | None, name: str = "") -> str:
    """A figure as it is shown: whole numbers as such, rates with four places, omniglot's percents with two."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.{2 if name == 'omniglot_error' else 4}f}"
