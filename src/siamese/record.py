"""What a run leaves behind: figures, results, where it came from, and the table at the end."""

import csv
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from siamese.evaluation import EvaluationResult
from siamese.judging import figures
from siamese.reporting import ROWS, headline

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "pytorch-metric-learning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "pillow",
    "matplotlib",
    "wandb",
    "scipy",
    "transformers",
    "tokenizers",
)


def write_json(path: Path, content) -> None:
    """Atomically: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def write(directory: Path, results: dict[str, EvaluationResult], seconds: dict[str, float]) -> dict[str, float]:
    """`metrics.json` (flat, final figures) and `results.npz` (all that judging found); gives back the figures."""
    flat = {**dict(figures(results)), **{f"seconds/{name}": round(value, 2) for name, value in seconds.items()}}
    EvaluationResult.save(results, directory / "results.npz")
    write_json(directory / "metrics.json", flat)
    return flat


def fingerprint(path: str | Path) -> str:
    """16 hex digits that change when the file does."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def provenance(repository: Path, fingerprints: dict[str, str]) -> dict:
    """Git commit, whether the tree was dirty, package versions, and a fingerprint of the data."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "data": fingerprints,
    }


def _version(package: str) -> str | None:
    """None where it is not installed: some are extras."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(results: dict[str, EvaluationResult]):
    """The final figures as a rich table that fits 80 columns: a row for each judged model, the untrained ones above; and intervals."""
    from rich import box
    from rich.table import Table

    shown = headline(name for result in results.values() for name in result.figures)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ["", *shown]:
        table.add_column(heading.replace("_", "_\n", 1), justify="right" if heading else "left")
    others = {prefix: " ".join([prefix.partition("/")[0], ROWS[prefix.partition("/")[2]]]) for prefix in results if "/" in prefix}
    for prefix, label in {**ROWS, **others}.items():
        if prefix in results:
            values = results[prefix].figures
            cells = [f"{values[name]:.{2 if name == 'omniglot_error' else 4}f}" if name in values else "" for name in shown]
            table.add_row(label, *cells, style="bold" if prefix.endswith("test") else "")
            if prefix == "test" or (prefix == "val" and "test" not in results):
                bounds = [results[prefix].intervals.get(name) for name in shown]
                for row, end in enumerate(("  95 % from", "  to") if any(bounds) else ()):
                    table.add_row(end, *(f"{bound[row]:.4f}" if bound else "" for bound in bounds), style="dim")
    return table


def hardest(result: EvaluationResult, most: int = 3) -> list[str]:
    """Two sentences: the classes that are recognised worst, and those most often taken for another; none of listed pairs."""
    if not len(result.class_queries):
        return []
    names, worst = result.class_names, np.argsort(result.class_map_at_r, kind="stable")[:most]  # NaN come last
    classes = [f"{names[c]} ({result.class_map_at_r[c]:.2f})" for c in worst if result.class_queries[c]]
    pairs = [f"{names[a]} for {names[b]} ({count} of {result.class_queries[a]})" for a, b, count in result.confusions[:most]]
    return [f"lowest map_at_r: {', '.join(classes)}"] + [f"nearest is another class: {', '.join(pairs)}"] * bool(pairs)


def curves(path: Path, steps: int) -> list[dict[str, str]]:
    """The rows of an earlier metrics.csv up to `steps`; none if there is no file."""
    if not path.is_file():
        return []
    with path.open() as lines:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines) if int(row["step"]) < steps]
