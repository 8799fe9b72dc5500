"""Features that are computed once: a feature extractor that is not trained, and a memory of what it gave for each input."""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import uuid
import weakref
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_DIGEST = 16  # bytes
_PENDING = 4096  # rows that wait to be written
_BROKEN = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_open: weakref.WeakValueDictionary[Path, "Memory"] = weakref.WeakValueDictionary()  # copies of a model share one


@atexit.register
def _write_all() -> None:
    for memory in list(_open.values()):
        memory.write()


class Frozen(nn.Module):
    """A feature extractor that is not trained, its features kept: whatever asks for an input's features again is given the same numbers.

    [B, ...] of any type -> float32 [B, F], on the inputs' device, without gradient. The features of an input must not depend on the
    batch that it comes in: the extractor is always in evaluation mode, and in single precision.

    Inputs are known by a digest of their bytes, so that all data sets, epochs and runs share what was computed, in memory and under
    SIAMESE_DATA_DIR (or `data`), in cache/<key>/. The key is a hash of the weights and of what the extractor consists of. Weights that
    are changed, by whatever torch keeps count of, give another key; what is written past torch (`weight.data[0] = 1`) goes unnoticed.
    Memory grows by F numbers for each new input: for inputs that never come twice set `remembers` to False.

    In a state dict the names are the extractor's own, as if it were not wrapped, and the features are not in it.

    Args:
        module: [B, ...] -> [B, F], or what `then` makes [B, F] of.
        then: applied to what the module gives, before that is kept; not a child of this, but of whoever owns it.
    """

    def __init__(self, module: nn.Module, then: nn.Module | None = None):
        super().__init__()
        self.module = module
        self._then = () if then is None else (then,)  # in a tuple torch does not find it
        self.remembers = True
        self._memory: Memory | None = None
        self._state: tuple | None = None  # of the weights that the memory is for
        for part in self._parts():
            part.requires_grad_(False)
        self.train()
        self.register_state_dict_post_hook(_unwrapped)
        self.register_load_state_dict_pre_hook(_wrapped)

    def _parts(self) -> tuple[nn.Module, ...]:
        return self.module, *self._then

    def tensors(self) -> list[Tensor]:
        """All weights and buffers that are not trained."""
        return [tensor for part in self._parts() for tensor in (*part.parameters(), *part.buffers())]

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        super().train(False)
        for part in self._then:
            part.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ...] -> float32 [B, F].

        Raises:
            ValueError: the extractor does not give one vector for each input.
        """
        if not self.remembers or not len(inputs):
            return self._compute(inputs)
        memory = self._memory_of(inputs.device)
        digests = _digests(inputs)
        if not memory.has(digests):
            memory.read()  # what other runs have written meanwhile
        missing = {digest: place for place, digest in enumerate(digests) if digest not in memory.rows}
        if missing:
            places = torch.tensor(list(missing.values()), device=inputs.device)
            memory.add(list(missing), self._compute(inputs[places]).cpu().numpy())
        else:
            memory.write()
        return torch.from_numpy(memory.features[[memory.rows[digest] for digest in digests]]).to(inputs.device)

    @torch.no_grad()
    def _compute(self, inputs: Tensor) -> Tensor:
        self.eval()  # whoever has called train() of a part alone
        with torch.autocast(inputs.device.type, enabled=False):
            features = inputs
            for part in self._parts():
                features = part(features)
        if features.dim() != 2 or features.shape[0] != inputs.shape[0]:  # by `len` torch.export would fix the batch
            raise ValueError(f"frozen features must be one vector for each of {len(inputs)} inputs, these are {list(features.shape)}")
        return features.float()

    def _memory_of(self, device: torch.device) -> "Memory":
        # Torch counts what is written to a tensor; of an inference tensor it does not, and nothing may write to it.
        state = (device.type, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.tensors()))
        if self._memory is None or state != self._state:
            if self._memory is not None:
                self._memory.write()
            folder = Path(os.environ.get("SIAMESE_DATA_DIR", "data"), "cache", self._key(device)).absolute()
            memory = _open.get(folder)
            if memory is None:
                memory = _open[folder] = Memory(folder)
            self._memory, self._state = memory, state
        return self._memory

    def _key(self, device: torch.device) -> str:
        """Of the weights, of every layer's type and plain values, and of the code and the machine that compute the features."""
        digest, layers, packages = hashlib.blake2b(digest_size=12), [], {"torch"}
        for part in self._parts():
            for name, layer in part.named_modules():
                kind = type(layer)
                layers.append([name, kind.__module__, kind.__qualname__, _plain(layer)])
                packages.add(kind.__module__.partition(".")[0])
                digest.update(_source(kind.__module__))
            for name, value in {**dict(part.named_buffers()), **part.state_dict()}.items():
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                    digest.update(_bytes(value.detach()[None])[0])
                else:
                    digest.update(f"{name} {value!r}".encode())
        # Other versions and devices may differ in the last bits, and nobody should find these in a run that is repeated.
        digest.update(json.dumps([1, layers, device.type, {name: _version(name) for name in sorted(packages)}]).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_memory": None, "_state": None}  # a copy, which may be given other weights, finds it again


def frozen_tensors(module: nn.Module) -> set[Tensor]:
    """The weights and buffers of all that is `Frozen` within a module: no optimizer, average or schedule has to do with them."""
    return {tensor for part in module.modules() if isinstance(part, Frozen) for tensor in part.tensors()}


class Memory:
    """Features by digest, in memory and in the part files of a folder, which several processes may write to at once.

    A part holds `digests`, uint8 [n, 16], and `features`, float32 [n, F]. What is known is never replaced: of two features of one
    input, computed by two runs at once, all later runs have the one that was written first.

    Attributes:
        rows: the row in `features` of each digest.
        features: float32, [N, F] with N at least the number of rows.
    """

    def __init__(self, folder: Path):
        self.folder, self.writable = folder, True
        self.rows: dict[bytes, int] = {}
        self.features = np.empty((0, 0), np.float32)
        self._pending: list[bytes] = []
        self._seen: set[str] = set()

    def has(self, digests: list[bytes]) -> bool:
        return all(digest in self.rows for digest in digests)

    def add(self, digests: list[bytes], features: np.ndarray) -> None:
        """Features that have just been computed, float32 [n, F]; now and then they are written."""
        self._append(digests, features)
        self._pending += digests
        if len(self._pending) >= _PENDING:
            self.write()

    def read(self) -> None:
        """Take up the parts that have come to the folder since; a broken one is said and removed, its features are computed again."""
        try:
            with os.scandir(self.folder) as entries:
                found = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if entry.name.endswith(".npz")]
        except OSError:  # there is none yet, or it cannot be read and will not be written either
            return
        before = len(self.rows)
        for _, name in sorted(found):
            if name not in self._seen:
                self._seen.add(name)
                self._read_part(self.folder / name)
        if len(self.rows) > before:
            log.info("features of %d inputs are taken from %s", len(self.rows) - before, self.folder)

    def _read_part(self, part: Path) -> None:
        try:
            with np.load(part, allow_pickle=False) as arrays:
                digests, features = arrays["digests"], arrays["features"]
            width = self.features.shape[1] if self.rows else features.shape[-1]
            shapes = ((len(digests), _DIGEST), (len(digests), width))
            if (digests.shape, features.shape) != shapes or (digests.dtype, features.dtype) != (np.uint8, np.float32):
                raise ValueError(f"digests {digests.shape} and features {features.shape} do not fit together")
        except _BROKEN as error:
            log.warning("%s is broken (%s): it is removed, and its features are computed again", part, str(error).partition("\n")[0][:100])
            _unlink(part)
        except OSError as error:  # another run has just removed it, or it may not be read
            log.warning("%s cannot be read (%s): its features are computed again", part, error.strerror or error)
        else:
            self._append([digest.tobytes() for digest in digests], features)

    def _append(self, digests: list[bytes], features: np.ndarray) -> None:
        fresh = {digest: place for place, digest in enumerate(digests) if digest not in self.rows}
        start, end = len(self.rows), len(self.rows) + len(fresh)
        if end > len(self.features):
            grown = np.empty((max(end, 2 * len(self.features), 256), features.shape[1]), np.float32)
            grown[:start] = self.features[:start] if start else 0
            self.features = grown
        self.features[start:end] = features[list(fresh.values())]
        self.rows.update(zip(fresh, range(start, end), strict=True))  # last, so that whatever interrupts leaves no row without features

    def write(self) -> None:
        """What has been computed and is not written yet, as one part."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if not self.writable:
            return
        part = self.folder / f"{uuid.uuid4().hex}.npz"
        partial = part.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as out:
                digests = np.frombuffer(b"".join(pending), np.uint8).reshape(-1, _DIGEST)
                np.savez(out, digests=digests, features=self.features[[self.rows[digest] for digest in pending]])
            os.replace(partial, part)
            self._seen.add(part.name)
        except OSError as error:
            self.writable = False
            log.warning("%s cannot be written (%s): features are kept for this run only", self.folder, error.strerror or error)
        finally:
            _unlink(partial)


def _unlink(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


def _digests(inputs: Tensor) -> list[bytes]:
    start = hashlib.blake2b(f"{inputs.dtype} {list(inputs.shape[1:])}".encode(), digest_size=_DIGEST)
    digests = []
    text = inputs.dtype == torch.uint8 and inputs.dim() == 2  # how far it is padded depends on the texts beside it
    start = hashlib.blake2b(b"text", digest_size=_DIGEST) if text else start
    for row in _bytes(inputs.detach()):
        digest = start.copy()
        digest.update(row.tobytes().rstrip(b"\0") if text else row)
        digests.append(digest.digest())
    return digests


def _bytes(tensor: Tensor) -> np.ndarray:
    """uint8 [B, bytes of a row], whatever the layout in memory."""
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return flat.view(len(tensor), len(flat) // len(tensor)).numpy()


def _plain(layer: nn.Module) -> str:
    """What a layer was told, a kernel's size or a probability, as far as these are plain values."""
    told = {}
    for name, value in vars(layer).items():
        if name.startswith("_") or name == "training":
            continue
        try:
            told[name] = json.dumps(value, sort_keys=True)
        except (TypeError, ValueError):  # torch's own, functions, other objects
            told[name] = type(value).__qualname__
    # Values that print an address would have another key in every run.
    return re.sub(r"0x[0-9a-f]+", "", f"{sorted(told.items())} {layer.extra_repr()}")


def _source(module: str) -> bytes:
    """A digest of the file that a layer's code is in: a change of one's own code must not be answered with older features."""
    try:
        return hashlib.blake2b(Path(sys.modules[module].__file__).read_bytes()).digest()
    except (KeyError, AttributeError, TypeError, OSError):
        return b""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unwrapped(frozen: Frozen, state: dict, prefix: str, _) -> None:
    inside = f"{prefix}module."
    for name in [name for name in state if name.startswith(inside)]:
        state[prefix + name.removeprefix(inside)] = state.pop(name)


def _wrapped(frozen: Frozen, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
    frozen._state = None  # a tokenizer among the state is no tensor that torch would count writes to
