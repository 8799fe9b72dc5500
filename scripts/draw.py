"""Take the README's pictures: pages of real runs, as Chromium shows them.

    python scripts/draw.py                  # trains what is not below --runs yet, a quarter of an hour, and writes them into docs/
    python scripts/draw.py --model FOLDER   # with an encoder of texts that is at hand; the default is a download

The questions of CLINC150 lie in SIAMESE_DATA_DIR (`python scripts/download.py clinc150`).
"""

import argparse
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["dataset=clinc150", "encoder=transformer", "encoder.frozen=true", "encoder.embedding_size=128", "augmentation=none"]
# Run -> its overrides; a comparison is of the runs of a sweep.
RUNS = {
    "letters": ["seed=0"],
    "texts": [*TEXTS, "seed=0", "leakage=off", "trainer.max_epochs=5"],
    "comparison": ["-m", "loss=triplet", "miner=all,semihard,hard,batch_hard", "seed=0,1"],
}
# Picture -> run, the element it begins with (none: the top of the page), width and height in pixels of a page.
PICTURES = {
    "report": ("letters", None, 1160, 1110),
    "gallery_letters": ("letters", "<h3>The most confident mistakes", 620, 490),
    "gallery_texts": ("texts", "<h3>The most confident mistakes", 620, 490),
    "gallery_comparison": ("comparison", '<h2 id="table-1"', 960, 690),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def cut(page: str, start: str | None) -> str:
    """The page from some element of it on, without what is above that; all of it where none is given.

    Raises ValueError when it has no such element.
    """
    if start is None:
        return page
    head, _, content = page.partition("<body>")
    if start not in content:
        raise ValueError(f"the page has no {start!r}")
    return f"{head}<body><main>{content[content.index(start) :]}"


def find_browser() -> str:
    """The path of a Chromium. Raises ValueError when there is none."""
    if (browser := next(filter(None, map(shutil.which, BROWSERS)), None)) is None:
        raise ValueError(f"none of {', '.join(BROWSERS)} is on the PATH: pictures of pages are taken with Chromium")
    return browser


def photograph(page: str, to: Path, width: int, height: int) -> None:
    """Write what a browser shows of a page, [height, width] pixels of at most 256 colours, as a PNG; atomically.

    Raises ValueError when there is no Chromium.
    """
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "page.html"), Path(folder, "picture.png")
        file.write_text(page, encoding="utf-8")
        switches = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "hide-scrollbars"]
        switches += [f"user-data-dir={folder}/profile", f"window-size={width},{height}"]
        command = [find_browser(), *(f"--{one}" for one in switches), f"--screenshot={picture}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        buffer = io.BytesIO()
        Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    partial = to.with_name(f"{to.name}.part")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, to)


def page_of(run: Path, overrides: list[str]) -> Path:
    """The report of a run, or the comparison of a sweep, made anew; the runs only where they are not there."""
    place = os.path.relpath(run, ROOT)  # the page tells the command
    swept = overrides[0] == "-m"
    page, commands = run / ("comparison.html" if swept else "report.html"), []
    if len(list(run.rglob("metrics.json"))) < math.prod(len(override.split(",")) for override in overrides):
        commands.append(["train.py", *overrides, "logger=none", f"{'hydra.sweep.dir' if swept else 'paths.output_dir'}={place}"])
    commands.append(["scripts/compare.py", place, "--html", str(page)] if swept else ["scripts/report.py", place])
    for one in commands:
        if subprocess.run([sys.executable, *one], cwd=ROOT).returncode:
            sys.exit(f"error: {' '.join(one)} failed, see above")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "logs" / "pictures", metavar="DIR", help="where the runs are kept")
    parser.add_argument("--to", type=Path, default=ROOT / "docs", metavar="DIR", help="where the pictures go")
    parser.add_argument("--model", metavar="FOLDER", help="an encoder of texts, by its folder or name")
    arguments = parser.parse_args()
    if arguments.model:
        model = os.path.abspath(arguments.model) if os.path.isdir(arguments.model) else arguments.model
        RUNS["texts"].append(f"encoder.model={model}")
    try:
        find_browser()
        arguments.to.mkdir(parents=True, exist_ok=True)
        for name, (run, start, width, height) in PICTURES.items():
            page = page_of((arguments.runs / run).resolve(), RUNS[run])
            photograph(cut(page.read_text(encoding="utf-8"), start), arguments.to / f"{name}.png", width, height)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
