"""The embeddings of many inputs in one file, written so that nothing is lost when it is interrupted."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import torch

from siamese.bundle import write_safetensors
from siamese.recognition import Recognizer

ENDINGS = (".parquet", ".npz")


def check(path: str | os.PathLike) -> None:
    """Raises ValueError if such a file cannot be written."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path} must end in one of {', '.join(ENDINGS)}")
    if ending == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(f"{path}: to write Parquet run pip install -e '.[parquet]', or say .npz") from None
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {Path(path).absolute().parent}")


def write(
    recognizer: Recognizer,
    items: list,
    names: list[str],
    path: str | os.PathLike,
    advance: Callable[[int], None] = lambda number: None,
    say: Callable[[str], None] = print,
) -> list[tuple[str, str]]:
    """Embed all items that can be read into a .parquet (columns sample, embedding) or an .npz (arrays samples, embeddings).

    Each chunk is kept beside the file, in `path`.parts, until all are there: the same call, with the same model and unchanged files, goes
    on with those that are missing, and gives the same file.

    Args:
        items: what the model's reader takes; names: [N] of them.
        advance: is told how many more are done; say: what there is to say.

    Returns:
        (name, why) of those that cannot be read.

    Raises:
        ValueError, OSError: the file cannot be written, or nothing can be read.
    """
    check(path)
    path = Path(path)
    parts = path.with_name(f"{path.name}.parts")
    head = json.dumps({"model": recognizer.fingerprint, "items": _digest(items, names), "chunk": recognizer.chunk})
    if parts.is_dir() and not ((parts / "head.json").is_file() and (parts / "head.json").read_text() == head):
        say(f"{parts} is of another model, or of other files: it is begun anew")
        shutil.rmtree(parts)
    parts.mkdir(exist_ok=True)
    (parts / "head.json").write_text(head)
    size = recognizer.chunk
    starts = range(0, len(items), size)
    done = {start for start in starts if _part(parts, start) is not None}
    if done:
        say(f"{min(len(done) * size, len(items)):,} of {len(items):,} are embedded already")
        advance(min(len(done) * size, len(items)))
    for start, embeddings, failed in recognizer.stream(items, done):
        write_safetensors({"embeddings": embeddings}, parts / f"{start}.safetensors", {"failed": json.dumps(failed)})
        advance(len(embeddings) + len(failed))
    unreadable = [(names[start + place], why) for start in starts for place, why in _part(parts, start)[1].items()]
    if len(unreadable) == len(items):
        shutil.rmtree(parts)
        raise ValueError(f"none of {len(items):,} inputs can be read, such as {unreadable[0][0]}: {unreadable[0][1]}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    chunks = ((names[start : start + size], *_part(parts, start)) for start in starts)
    try:
        (_write_parquet if path.suffix.lower() == ".parquet" else _write_npz)(partial, chunks, recognizer.fingerprint)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    shutil.rmtree(parts)
    return unreadable


def _part(parts: Path, start: int) -> tuple[torch.Tensor, dict[int, str]] | None:
    """Embeddings and failures of a chunk; None where it is not there, or broken."""
    try:
        with safetensors.safe_open(parts / f"{start}.safetensors", framework="pt") as file:
            failed = json.loads(file.metadata()["failed"])
            return file.get_tensor("embeddings"), {int(place): why for place, why in failed.items()}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None


def _digest(items: list, names: list[str]) -> str:
    """Changes when an item does; of a file, its size and time."""
    digest = hashlib.blake2b(digest_size=16)
    for item, name in zip(items, names, strict=True):
        digest.update(f"{name}\0{item!r}\0".encode("utf-8", "replace"))
        try:
            stat = os.stat(item) if isinstance(item, str | os.PathLike) else None
        except (OSError, ValueError):  # a text is no file
            stat = None
        if stat is not None:
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _kept(names: list[str], failed: dict[int, str]) -> list[str]:
    return [name for place, name in enumerate(names) if place not in failed]


def _write_parquet(path: Path, chunks, fingerprint: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    for names, embeddings, failed in chunks:
        size = embeddings.shape[1]
        schema = pa.schema([("sample", pa.string()), ("embedding", pa.list_(pa.float32(), size))], {"model": fingerprint})
        if writer is None:
            writer = parquet.ParquetWriter(path, schema)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.numpy().reshape(-1)), size)
        writer.write_table(pa.table([pa.array(_kept(names, failed), pa.string()), rows], schema=schema))
    writer.close()


def _write_npz(path: Path, chunks, fingerprint: str) -> None:
    names, embeddings = [], []
    for chunk_names, chunk, failed in chunks:
        names += _kept(chunk_names, failed)
        embeddings.append(chunk.numpy())
    with open(path, "wb") as file:
        np.savez(file, samples=np.array(names), embeddings=np.concatenate(embeddings), model=np.array(fingerprint))
