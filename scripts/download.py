"""Download a data set from its authors' addresses into $SIAMESE_DATA_DIR, or data/ beside train.py.

    python scripts/download.py --list
    python scripts/download.py omniglot
    python scripts/download.py omniglot --to /data            # into /data/omniglot
    python scripts/download.py omniglot --url http://mirror/omniglot/python

A file is downloaded as NAME.part, checked, and only then given its name; running again resumes what was interrupted.
`--url PREFIX` fetches the same files, with the same checksums, from a mirror that has them in the same folders.
Another data set is one more entry in DATASETS.
"""

import argparse
import hashlib
import os
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

WAITS = (1, 3, 9)  # seconds before the second, third and fourth try
TIMEOUT = 30  # seconds without an answer or a byte


class File(NamedTuple):
    path: str  # below the prefix; its last part is the name on disk
    checksum: str  # "md5:..." or "sha256:..."


class DataSet(NamedTuple):
    about: str
    files: Callable[[], tuple[str, list[File]]]  # the address before every path, and the files


def omniglot() -> tuple[str, list[File]]:
    """The files that siamese.data.omniglot reads; torchvision knows the authors' address and the two large files' MD5."""
    from torchvision.datasets import Omniglot  # here, as it takes seconds that --help should not

    return Omniglot.download_url_prefix, [
        *(File(f"{name}.zip", f"md5:{md5}") for name, md5 in Omniglot.zips_md5.items()),
        File("images_background_small1.zip", "sha256:f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"),
        File("images_background_small2.zip", "sha256:3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"),
        File("one-shot-classification/all_runs.zip", "sha256:437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325"),
    ]


def clinc150() -> tuple[str, list[File]]:
    """The file that siamese.data.clinc150 reads."""
    checksum = "sha256:36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"
    return "https://raw.githubusercontent.com/clinc/oos-eval/master", [File("data/data_full.json", checksum)]


def abt_buy() -> tuple[str, list[File]]:
    """The files that siamese.data.er_magellan reads, as they lie beside Ditto (Li et al. 2020)."""
    digests = {
        "train": "c1370966c08c246e9cf844b7cd2cf580b2559e9831f1eb3cca560fd53c1bcbb2",
        "valid": "14b2c80673434b852febacd1a741c89e2ca0aba1658f4420efe4cbb46f4ef607",
        "test": "df323df317af4ca33132e3c3a666983c5cbc69ef517f61df18f381b4d1662352",
    }
    prefix = "https://raw.githubusercontent.com/megagonlabs/ditto/master"
    folder = "data/er_magellan/Textual/Abt-Buy"
    return prefix, [File(f"{folder}/{name}.txt", f"sha256:{digest}") for name, digest in digests.items()]


DATASETS = {
    "omniglot": DataSet("1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al. 2015), MIT licence", omniglot),
    "clinc150": DataSet("23,700 questions of 150 intents and of none (Larson et al. 2019), CC BY 3.0", clinc150),
    "abt_buy": DataSet("9,575 pairs of products of two shops, 1,028 of them the same (Mudgal et al. 2018)", abt_buy),
}


def main(argv: list[str] | None = None) -> None:
    """Raises SystemExit: with one line that names the file and the remedy (exit code 1), 2 for usage, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", nargs="?", choices=list(DATASETS))
    parser.add_argument("--list", action="store_true", help="list what can be downloaded")
    default = Path(os.environ.get("SIAMESE_DATA_DIR") or Path(__file__).resolve().parents[1] / "data")
    parser.add_argument("--to", metavar="DIR", type=Path, default=default, help="the folder of all data sets (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace whole zips whose checksum is not the authors'")
    parser.add_argument("--url", metavar="PREFIX", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.list:
        print(*(f"{name}: {data.about}" for name, data in DATASETS.items()), sep="\n")
        return
    if not args.dataset:
        parser.error(f"name a data set: {', '.join(DATASETS)}")
    if args.url and not args.url.startswith(("http://", "https://")):
        parser.error(f"--url {args.url}: the prefix begins with http:// or https://")
    try:
        download(args.dataset, args.to / args.dataset, args.url, args.force)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command resumes where it stopped", file=sys.stderr)
        raise SystemExit(130) from None


def download(dataset: str, folder: Path, url: str | None, force: bool) -> None:
    """Bring every file of the data set into the folder, from below the address `url` if given."""
    prefix, files = DATASETS[dataset].files()
    for file in files:
        target = folder / Path(file.path).name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = keep(target, file.checksum, force)
            if not kept:
                fetch(f"{(url or prefix).rstrip('/')}/{file.path}", target, file.checksum)
        except OSError as error:
            reason = error.strerror or error
            raise SystemExit(f"{target} cannot be written ({reason}): make room, or choose another folder with --to") from None
        print(f"{target}: {kept or 'downloaded, checksum right'}")


def keep(target: Path, checksum: str, force: bool) -> str:
    """Why the file that lies there need not be downloaded; empty if it must be."""
    if not target.exists():
        return ""
    if has_checksum(target, checksum):
        return "there, checksum right"
    if not force and is_whole_zip(target):
        return "kept: a whole zip, though not with the authors' checksum (--force replaces it)"
    return ""


def has_checksum(path: Path, checksum: str) -> bool:
    algorithm, _, digest = checksum.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == digest


def is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged zip raises a dozen things
        return False


def fetch(url: str, target: Path, checksum: str) -> None:
    """Download to `target`.part, from where it ends if it is there, check it, and give it its name."""
    part = target.with_name(target.name + ".part")
    for wait in (*WAITS, None):
        try:
            transfer(url, part)
            break
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            status = getattr(error, "code", 0)
            if 400 <= status < 500 and status not in (408, 429):  # trying again would not help
                raise SystemExit(f"{target.name}: {url} answers {error}; if it has moved, name its new place with --url") from None
            if wait is None:
                raise SystemExit(f"{target.name}: {url} cannot be fetched ({error}); check the network and run again to resume") from None
            print(f"{target.name}: {error}; next try in {wait} s", file=sys.stderr)
            time.sleep(wait)
    if not has_checksum(part, checksum):
        part.unlink()
        raise SystemExit(f"{target.name}: what {url} sent has the wrong checksum and was deleted; run again, or try a mirror with --url")
    os.replace(part, target)


def transfer(url: str, part: Path) -> None:
    """One connection's worth of the file. Raises ConnectionError if it ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond: the last run ended between the last byte and the check
            return
        raise
    with response:
        if response.status != 206:  # the server ignores ranges and sends the file from its beginning
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with part.open("ab" if have else "wb") as file, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(part.stem, total=total, completed=have)
            while chunk := receive(response):
                file.write(chunk)
                progress.advance(task, len(chunk))
            if total is not None and file.tell() < total:
                raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def receive(response: HTTPResponse) -> bytes:
    """The next bytes. What the network does wrong becomes a ConnectionError, so that other OSErrors are the disk's."""
    try:
        return response.read(1 << 16)
    except OSError as error:
        raise ConnectionError(str(error)) from None


if __name__ == "__main__":
    main()
