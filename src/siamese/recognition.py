"""What a trained network is for: enrol one example of a class, identify others, verify pairs, refuse strangers.

people = Recognizer.load("logs/train/runs/<stamp>/checkpoints/best.ckpt")   # or a bundle, or a gallery
people.enrol("Ada", ["ada.png"])                                            # paths, bytes, images, texts, rows or a tensor
people.identify(["who.png"])[0].label                                       # "Ada", or None for a stranger
people.verify("one.png", "other.png").same
people.save("people.gallery")                                               # references, and the model that made them
"""

import collections
import copy
import hashlib
import itertools
import json
import os
import queue
import threading
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from siamese.bundle import Bundle, write_safetensors
from siamese.data.reading import ImageReader
from siamese.distances import pair_scores, scores
from siamese.gallery import Gallery, Match

_CHUNK, _NUMBERS = 512, 2**24  # inputs that are read and embedded together, of at most so many numbers
_ROUNDING = 2**-20  # of a score: what the same input differs by when it is embedded among others
_LONG = 200  # letters of a name
_DAMAGED = (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Identification:
    """Who a query is.

    label: its class; None for a stranger.
    reason: why it counts as one: no class reaches the threshold, or another class is within the margin.
    matches: the classes most alike, best first.
    """

    label: str | None
    reason: str
    matches: list[Match]


@dataclass(frozen=True)
class Verification:
    """Whether two inputs are the same.

    same: whether the score reaches the threshold.
    far, frr: of that threshold, the share of different pairs accepted and of same pairs refused on validation; None where unknown.
    probability: that they are the same, if before the look both were equally likely; None where unknown.
    """

    same: bool
    score: float
    threshold: float
    far: float | None
    frr: float | None
    probability: float | None


@dataclass(frozen=True)
class Triage:
    """What is wrong with the references themselves.

    close: (class, other class, score), most alike first: a reference of one would be taken for the other.
    odd: (class, id, score with the nearest other of its class, most alike other class, score with that; "" and None where there is no
        other), worst first: nearer to another class than to its own, or below the model's threshold with all others of its own.
    """

    close: list[tuple[str, str, float]]
    odd: list[tuple[str, str, float, str, float | None]]


class Recognizer:
    """A model and the references it has made.

    Args:
        model: embeds and decides. It is moved to the GPUs, where there are any; each gets a copy.
        gallery: holds the references: a `siamese.gallery.Gallery`, or `siamese.qdrant.QdrantGallery`; one in memory by default.

    Raises:
        ValueError: the gallery is of another embedding size, or holds what another model has made.
    """

    def __init__(self, model: Bundle, gallery=None):
        devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
        self.models = [copy.deepcopy(model).to(device) for device in devices[1:]]
        self.models.insert(0, model.to(devices[0]).eval())
        self.model = model
        self.gallery = Gallery(copy.deepcopy(model.distance).cpu(), model.encoder.embedding_size) if gallery is None else gallery
        self.fingerprint = model.fingerprint()
        # Of large images fewer at a time: a first layer's features take fifty times the memory of its inputs.
        pixels = model.reader.channels * model.reader.size**2 if isinstance(model.reader, ImageReader) else 1
        self.chunk = max(1, min(_CHUNK, _NUMBERS // pixels))
        if self.gallery.embedding_size != model.encoder.embedding_size:
            raise ValueError(f"embeddings have {model.encoder.embedding_size} numbers, the gallery's {self.gallery.embedding_size}")
        if not isinstance(self.gallery, Gallery):
            self.gallery.claim(self.fingerprint)
        self.path: Path | None = None
        self._stamp: tuple | None = None
        self._changing = threading.RLock()  # a service may enrol while it identifies

    @classmethod
    def load(cls, path: str | os.PathLike, trust: tuple[str, ...] = (), gallery=None, references: bool = True) -> "Recognizer":
        """A gallery with its model, or the model of a bundle or checkpoint with nothing enrolled. Nothing is unpickled.

        Args:
            trust: packages, besides this one and pytorch-metric-learning, whose classes the file may name.
            gallery: makes what holds the references of a file that has none of its own, from distance and embedding size:
                `siamese.qdrant.QdrantGallery` with its place.
            references: False takes of a gallery the model alone.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, something else, or names a class that is not trusted; its references are not where `gallery`
                looks for them, or another model has made what is there.
            OSError: the file, or the place of its references, cannot be read.
        """
        described = _described(path)
        if described is None:
            model = Bundle.load(path, trust)
            return cls(model, gallery and gallery(model.distance, model.encoder.embedding_size))
        stamp = _stamp_of(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if references or name.startswith("model.")]  # noqa: SIM118 (no mapping)
                tensors = {name: file.get_tensor(name) for name in names}
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        state = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
        model = Bundle.restore(described, state, path, trust, remembers=False)
        if model.fingerprint() != described.get("model"):  # of the references
            raise ValueError(f"{path} is damaged: its model is not the one that made its references")
        if not references:
            return cls(model, gallery and gallery(model.distance, model.encoder.embedding_size))
        if described.get("elsewhere") and gallery is None:
            raise ValueError(f"the references of {path} are in Qdrant: say where, with --qdrant PLACE")
        if not described.get("elsewhere") and gallery is not None:
            raise ValueError(f"{path} holds its references itself: leave --qdrant away, or enrol them anew into another gallery")
        if described.get("elsewhere"):
            recognizer = cls(model, gallery(model.distance, model.encoder.embedding_size))
            if not (held := recognizer.gallery).exists:
                raise ValueError(f"{held.place} has no collection {held.collection}: the references of {path} are in another place")
        else:
            recognizer = cls(model)
            try:
                _fill(recognizer.gallery, tensors, described)
            except _DAMAGED as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        recognizer.path, recognizer._stamp = Path(path), stamp
        return recognizer

    def save(self, path: str | os.PathLike | None = None) -> None:
        """Write the model and, where they are in memory, the references to one file, atomically.

        Of references in Qdrant the collection is made first: where there is a file there is one. Then the file never changes.

        Args:
            path: where it was loaded from, by default.

        Raises:
            ValueError: there is no path, or another process has changed the file since it was loaded.
            OSError: it cannot be written.
        """
        with self._changing:
            path = self.path if path is None else Path(path)
            if path is None:
                raise ValueError("this gallery has no file yet: name one")
            if not isinstance(self.gallery, Gallery):
                self.gallery.prepare()
                if path == self.path and path.exists():
                    return
            if path == self.path and _stamp_of(path) != self._stamp:
                raise ValueError(f"{path} was changed by somebody else meanwhile, and is left as it is: do it again")
            described = {**self.model.described(), "version": 1, "model": self.fingerprint}
            tensors = {f"model.{name}": value.cpu().contiguous() for name, value in self.model.state_dict().items()}
            if isinstance(self.gallery, Gallery):
                own = {f"references.{place}": block.contiguous() for place, block in enumerate(self.gallery.blocks)}
                ends = np.cumsum([0, *map(len, self.gallery.blocks)]).tolist()
                own |= {f"ids.{place}": _packed(self.gallery.ids[a:b].tolist()) for place, (a, b) in enumerate(itertools.pairwise(ends))}
                own |= {"labels": self.gallery.labels, "names": _packed(self.gallery.names)}
                described["crc32"] = _crc32(own)
                tensors |= own
            else:
                described["elsewhere"] = True
            write_safetensors(tensors, path, {"gallery": json.dumps(described)})
            self.path, self._stamp = path, _stamp_of(path)

    # What is embedded

    def embed(self, inputs) -> Tensor:
        """Inputs -> float32 [N, D] embeddings.

        Args:
            inputs: a tensor as the encoder was trained on; or one, or a list, of what the model's reader takes: paths, bytes or
                `PIL.Image`s of images, texts, or rows (entries by the names of their columns).

        Raises:
            ValueError: one of them cannot be read (names it), or the model does not know how.
        """
        if isinstance(inputs, Tensor):
            return self.model.embed(inputs, self.chunk)
        items, parts = _listed(inputs), []
        for start, embeddings, failed in self.stream(items):
            if failed:
                place, why = next(iter(failed.items()))
                raise ValueError(f"{name_of(items[start + place])}: {why}")
            parts.append(embeddings)
        return torch.cat(parts) if parts else torch.empty(0, self.model.encoder.embedding_size)

    def stream(self, items: Sequence, done: Container[int] = ()) -> Iterator[tuple[int, Tensor, dict[int, str]]]:
        """Embed many items, a chunk at a time; while one is embedded the next is read. Several GPUs take turns.

        Args:
            items: what the model's reader takes.
            done: places of chunks' first items that are left out.

        Yields:
            the place of the chunk's first item, the embeddings of all of its items that can be read, and {place in the chunk: why} of
            the others.

        Raises:
            ValueError: the model does not know how to read anything.
        """
        if self.model.reader is None:
            raise ValueError("this model's data set does not say how a file becomes an input: hand over tensors, from Python")
        free: queue.SimpleQueue[Bundle] = queue.SimpleQueue()
        for model in self.models:
            free.put(model)

        def embedded(read) -> tuple[Tensor, dict[int, str]]:
            inputs, failed = read.result()
            model = free.get()
            try:
                return (model.embed(inputs, self.chunk) if len(inputs) else torch.empty(0, model.encoder.embedding_size)), failed
            finally:
                free.put(model)

        waiting: collections.deque = collections.deque()
        reading, embedding = ThreadPoolExecutor(1), ThreadPoolExecutor(len(self.models))
        try:
            for start in (start for start in range(0, len(items), self.chunk) if start not in done):
                read = reading.submit(self.model.reader.read, items[start : start + self.chunk])
                waiting.append((start, embedding.submit(embedded, read)))
                if len(waiting) > len(self.models) + 1:
                    first, result = waiting.popleft()
                    yield first, *result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, *result.result()
        finally:
            for pool in (reading, embedding):
                pool.shutdown(cancel_futures=True)

    # What is decided

    def enrol(self, label: str | list[str], inputs, ids: list[str] | None = None) -> None:
        """Add references: a class needs one.

        Args:
            label: the class of all of them, or of each.
            inputs: see `embed`.
            ids: names of the references; paths and texts are named by themselves. An id that its class has already is replaced.

        Raises:
            ValueError: an input cannot be read, or numbers do not agree.
        """
        embeddings = self.embed(inputs)
        ids = [name_of(item) for item in (inputs if isinstance(inputs, Tensor) else _listed(inputs))] if ids is None else ids
        with self._changing:
            self.gallery.add([label] * len(ids) if isinstance(label, str) else list(label), embeddings, ids)

    def remove(self, label: str) -> int:
        """Forget a class; gives back how many references it had. Raises KeyError if there is no such class."""
        with self._changing:
            return self.gallery.remove(label)

    def identify(
        self,
        inputs,
        k: int = 5,
        threshold: float | None = None,
        false_alarms: float = 0.01,
        margin: float = 0.0,
        rule: str = "nearest",
    ) -> list[Identification]:
        """Which class each input is of, or none.

        Args:
            inputs: see `embed`; a float [N, D] tensor of embeddings too.
            k: so many classes are told.
            threshold: the least score; None takes that of `threshold_for`, and refuses nobody where the model has no decision.
            false_alarms: the share of strangers that may be taken for somebody.
            margin: a query counts as unknown, too, where another class is as alike as the best one, or less than this behind it.
            rule: see `siamese.gallery.Gallery.search`.

        Raises:
            ValueError: nothing is enrolled, an input cannot be read, or an argument is out of range.
        """
        if k < 1:
            raise ValueError(f"k={k} classes cannot be told: at least 1")
        embedded = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.shape[1:] == (self.gallery.embedding_size,)
        embeddings = inputs if embedded else self.embed(inputs)
        if threshold is None:
            threshold = self.threshold_for(false_alarms, rule)
        answers = []
        with self._changing:
            found = self.gallery.search(embeddings, max(k, 2), rule)
        for matches in found:
            best, second = matches[0], matches[1] if len(matches) > 1 else None
            if best.score < threshold:
                reason = "below the threshold"
            elif second is not None and best.score - second.score <= margin + _ROUNDING * max(abs(best.score), 1):
                reason = "too close to call"
            else:
                reason = ""
            answers.append(Identification(None if reason else best.label, reason, matches[:k]))
        return answers

    def threshold_for(self, false_alarms: float = 0.01, rule: str = "nearest") -> float:
        """The least score of an identification: of strangers like those of validation, at most this share is taken for somebody.

        One stranger is compared with n references, so its false accepts add up to at most n times those of one pair: the threshold is
        that of a false-accept rate of `false_alarms` / n. Below the rate that validation can tell (`Decision.finest`) it goes no further.
        -inf where the model has no decision.

        Raises:
            ValueError: false_alarms is not above 0 and below 1.
        """
        if not 0 < false_alarms < 1:
            raise ValueError(f"false alarms are a share of strangers above 0 and below 1, not {false_alarms}")
        if self.model.decision is None:
            return -torch.inf
        return self.model.decision.at_far(false_alarms / self._compared(rule))[0]

    def false_alarms_at(self, threshold: float, rule: str = "nearest") -> float | None:
        """The share of strangers that such a threshold takes for somebody is at most this; None where the model has no decision."""
        if self.model.decision is None:
            return None
        far = max(self.model.decision.rates_at(threshold)[0], self.model.decision.finest)
        return min(far * self._compared(rule), 1.0)

    def _compared(self, rule: str) -> int:
        return max(len(self.gallery.classes()) if rule == "prototype" else len(self.gallery), 1)

    def verify(self, one, other, threshold: float | None = None) -> Verification:
        """Are two inputs the same?

        Args:
            one, other: one input each, see `embed`.
            threshold: the least score; None takes the model's own.

        Raises:
            ValueError: an input cannot be read, or there is no threshold.
        """
        decision = self.model.decision
        if threshold is None and decision is None:
            raise ValueError("this model was saved without a threshold: give one")
        left, right = (self.embed(item) for item in (one, other))
        if len(left) != 1 or len(right) != 1:
            raise ValueError(f"verification is of one input and another, these are {len(left)} and {len(right)}")
        score = pair_scores(self.gallery.distance, left, right).item()
        if decision is None:
            return Verification(score >= threshold, score, threshold, None, None, None)
        far, frr = (decision.far, decision.frr) if threshold is None else decision.rates_at(threshold)
        threshold = decision.threshold if threshold is None else threshold
        return Verification(score >= threshold, score, threshold, far, frr, float(decision.probability(torch.tensor(score))))

    def triage(
        self,
        labels: Sequence[str] | None = None,
        threshold: float | None = None,
        false_alarms: float = 0.01,
        advance: Callable[[int], None] = lambda number: None,
    ) -> Triage:
        """Which classes are too close to tell apart, and which references look wrong.

        Args:
            labels: the classes to look at; None for all, each reference of which is then searched for.
            threshold, false_alarms: see `identify`: what one class's reference must not reach with another class.
            advance: is told how many more references are done.
        """
        threshold = self.threshold_for(false_alarms) if threshold is None else threshold
        alike = -torch.inf if self.model.threshold is None else self.model.threshold
        close: dict[tuple[str, str], float] = {}
        odd = []
        for some in self._references(self.gallery.classes() if labels is None else dict.fromkeys(labels)):
            found = self.gallery.search(torch.stack([reference for *_, reference in some]), 2)
            for (label, name, mine, few, _), matches in zip(some, found, strict=True):
                other = next((match for match in matches if match.label != label), None)
                if other is not None and other.score >= threshold > -torch.inf:
                    pair = tuple(sorted((label, other.label)))
                    close[pair] = max(close.get(pair, -torch.inf), other.score)
                if mine is not None and mine < max(-torch.inf if few else alike, other.score if other else -torch.inf):
                    odd.append((label, name, mine, other.label if other else "", other.score if other else None))
            advance(len(some))
        return Triage(
            sorted(((*pair, score) for pair, score in close.items()), key=lambda found: -found[2]),
            sorted(odd, key=lambda found: found[2] - (alike if found[4] is None else found[4])),
        )

    @torch.no_grad()
    def _references(self, labels: Iterable[str]) -> Iterator[list[tuple[str, str, float | None, bool, Tensor]]]:
        """Class, id, score with the nearest other of the class (None if there is no other), whether those are few, and embedding of
        the references of these classes, many at a time."""
        waiting = []
        for label in labels:
            references, ids = self.gallery.of(label)
            for start in range(0, len(ids), _CHUNK):
                part = references[start : start + _CHUNK]
                among = scores(self.gallery.distance, part, references)
                among[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf
                own = among.amax(1).tolist() if len(ids) > 1 else [None]
                waiting += zip([label] * len(part), ids[start : start + _CHUNK], own, [len(ids) < 3] * len(part), part, strict=True)
                if len(waiting) >= _CHUNK:
                    yield waiting
                    waiting = []
        if waiting:
            yield waiting


def name_of(item: Any) -> str:
    """What stands for an input: its path, its text, of a long one the beginning and a digest, else a digest of what it holds."""
    if isinstance(item, str | os.PathLike):
        name = written_out(os.fspath(item))
        return name if len(name) <= _LONG else f"{name[: _LONG - 20]}... {hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
    if isinstance(item, Tensor):
        content = item.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    else:
        content = item if isinstance(item, bytes) else item.tobytes() if hasattr(item, "tobytes") else repr(item).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def written_out(text: str) -> str:
    """A text as it is; bytes of a file's name that are none, which Python keeps as halves of letters, as \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(inputs) -> list:
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]


def _described(path: str | os.PathLike) -> dict | None:
    """What a gallery says of itself; None for another kind of file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("gallery")
    except safetensors.SafetensorError:
        return None
    if text is None:
        return None
    try:
        described = json.loads(text)
        if not isinstance(described, dict) or described["version"] != 1:
            raise ValueError("it is of another version")
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no gallery that can be read: {error}") from None
    return described


def _fill(gallery: Gallery, tensors: dict[str, Tensor], described: dict) -> None:
    """Put what a file holds into an empty gallery, after a look at all of it."""
    count = (len(tensors) - 2) // 2
    expected = {"labels", "names", *(f"{kind}.{place}" for place in range(count) for kind in ("references", "ids"))}
    if tensors.keys() != expected:
        raise ValueError("its tensors are not those of a gallery")
    blocks, labels, names = [tensors[f"references.{place}"] for place in range(count)], tensors["labels"], _unpacked(tensors["names"])
    sizes = {(block.dtype, *block.shape[1:]) for block in blocks}
    if sizes - {(torch.float32, gallery.embedding_size)} or labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError("its references, or labels, have another size or type")
    parts = [np.array(_unpacked(tensors[f"ids.{place}"]), gallery.ids.dtype) for place in range(count)]
    if [*map(len, parts)] != [*map(len, blocks)] or sum(map(len, blocks)) != len(labels):
        raise ValueError("it has not as many labels, ids and references")
    if len(set(names)) < len(names) or not all(names):
        raise ValueError("two of its classes have the same name, or one has none")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError("a label has no class")
    if (torch.bincount(labels, minlength=len(names)) == 0).any():
        raise ValueError("a class has no reference")
    if not all(block.isfinite().all() for block in blocks):
        raise ValueError("a reference is NaN or infinite")
    if _crc32(tensors) != described.get("crc32"):
        raise ValueError("its checksum is another")
    gallery.restore(blocks, labels, names, np.concatenate([gallery.ids, *parts]))


def _packed(texts: list[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)


def _unpacked(tensor: Tensor) -> list[str]:
    texts = json.loads(tensor.numpy().tobytes())
    if tensor.dtype != torch.uint8 or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its names are no texts")
    return texts


def _crc32(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().reshape(-1).view("uint8").data, zlib.crc32(name.encode(), crc))
    return crc


def _stamp_of(path: str | os.PathLike) -> tuple | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
