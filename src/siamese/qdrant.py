"""References in Qdrant, for galleries that do not fit one machine's memory: in a server, a cluster, or a folder of this machine.

place = functools.partial(QdrantGallery, place="http://localhost:6333", collection="people")
people = Recognizer.load("logs/train/runs/<stamp>/checkpoints/best.ckpt", gallery=place)
people.save("people.gallery")                                               # the model alone
people.enrol("Ada", ["ada.png"])                                            # in Qdrant at once
people = Recognizer.load("people.gallery", gallery=place)

The collection keeps the fingerprint of the model that made its references, and no other one may use it.
"""

import copy
import json
import os
import re
import uuid
import weakref
from collections import Counter
from pathlib import Path

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor
from torch.nn import Module

from siamese.distances import LearnedDistance
from siamese.gallery import Match, check_search, enrolment

_NUMBERS = 2**19  # of embeddings, in one request: some 10 MB of JSON, where a server takes 32
_REFERENCES = 1024  # in one request, at most
_QUERIES = 64
_SECONDS = 60  # until a server counts as silent
_IDS = uuid.UUID("5f0c2f3c-6d0e-4b0c-9f0a-3c1f6a1d7e52")


class QdrantGallery:
    """References, each an embedding with a class and an id, with the calls of `siamese.gallery.Gallery`.

    What is added or removed is so at once. A server finds by an index that it builds of many references, which may miss a
    few; a folder, and ":memory:", are searched exactly, for at most some 20,000 references and by one process at a time.
    Qdrant's client reads a folder with pickle: open none of a stranger's.

    Args:
        distance: the one the embeddings were trained with: cosine, dot product, Euclidean or `siamese.distances.LearnedDistance`.
        embedding_size: of the embeddings.
        place: http://host:port or https://host:port of a server, with the key in the environment variable QDRANT_API_KEY if it
            wants one; or a folder; or ":memory:".
        collection: its name there. It is made when first something is added, or `prepare` is called.

    Raises:
        ValueError: another distance, the package qdrant-client is not installed, or the place cannot be used.
        OSError: the place cannot be reached.
    """

    def __init__(self, distance: Module, embedding_size: int, place: str, collection: str):
        self.distance, self.embedding_size = copy.deepcopy(distance).cpu(), embedding_size
        self.place, self.collection = str(place), collection
        self.fingerprint = ""
        self._measure, self._weight = _measured(self.distance)
        self._remote = self.place.startswith(("http://", "https://"))
        if not self._remote and re.search(r"://|^[\w.-]+:\d+/?$", self.place):
            raise ValueError(f"{place} is no folder, and of a server it must begin with http:// or https://")
        try:
            import qdrant_client  # noqa: F401
        except ImportError:
            raise ValueError("references in Qdrant need its client: run `pip install -e '.[qdrant]'`") from None
        self._client, self._prepared = None, False
        # To look into a folder must not make one.
        self.exists = (self._remote or self.place == ":memory:" or Path(self.place).exists()) and self._ask("collection_exists")

    def claim(self, fingerprint: str) -> None:
        """Say which model makes these references.

        Raises:
            ValueError: those that are there already are another's, or of something else.
        """
        self.fingerprint = fingerprint
        if self.exists:
            self._check()

    def prepare(self) -> None:
        """Make the collection if it is not there. Raises ValueError if what is there is something else."""
        from qdrant_client.models import VectorParams

        if self._prepared:
            return
        if not self.exists:
            vectors = VectorParams(size=self.embedding_size, distance=self._measure)
            self._ask("create_collection", vectors_config=vectors, metadata={"model": self.fingerprint})
            self.exists = True
        self._check()
        if self._remote:
            self._ask("create_payload_index", field_name="label", field_schema="keyword")
        self._prepared = True

    def _check(self) -> None:
        config = self._ask("get_collection").config
        vectors = config.params.vectors
        if (getattr(vectors, "size", None), getattr(vectors, "distance", None)) != (self.embedding_size, self._measure):
            raise ValueError(
                f"the collection {self.collection} in {self.place} does not hold {self.embedding_size} numbers with the distance "
                f"{self._measure}, as this model's embeddings need: take another name for the gallery"
            )
        if config.metadata is None or "model" not in config.metadata:
            raise ValueError(f"the collection {self.collection} in {self.place} is of something else, or Qdrant there is older than 1.16")
        if config.metadata["model"] != self.fingerprint:
            raise ValueError(
                f"the collection {self.collection} in {self.place} holds references that another model has made "
                f"({config.metadata['model']}, not {self.fingerprint}): take another name for the gallery"
            )

    def __len__(self) -> int:
        return self._ask("count", exact=True).count if self.exists else 0

    def classes(self) -> dict[str, int]:
        """How many references each class has."""
        if not self.exists:
            return {}
        if self._remote:
            return self._facet()
        # In memory all of them are anyway, and there the client's facet spells names that look like a UUID in its own way.
        points, _ = self._ask("scroll", limit=len(self) or 1, with_payload=["label"])
        return dict(Counter(point.payload["label"] for point in points))

    def _facet(self, limit: int = 10_000) -> dict[str, int]:
        while len(hits := self._ask("facet", key="label", limit=limit, exact=True).hits) == limit:
            limit *= 10
        return {hit.value: hit.count for hit in hits}

    def of(self, label: str) -> tuple[Tensor, list[str]]:
        """The references of a class, float32 [n, D], and their ids."""
        points, offset = [], None
        while self.exists:
            wanted = {"scroll_filter": _filter([label]), "limit": self._batch, "with_vectors": True}
            part, offset = self._ask("scroll", offset=offset, **wanted)
            points += part
            if offset is None:
                break
        if not points:
            raise KeyError(label)
        return torch.tensor([point.vector for point in points]) / self._weight, [point.payload["id"] for point in points]

    @property
    def _batch(self) -> int:
        return max(1, min(_REFERENCES, _NUMBERS // self.embedding_size))

    @torch.no_grad()
    def add(self, labels: list[str], embeddings: Tensor, ids: list[str]) -> None:
        """Enrol float [n, D] embeddings; one whose class has a reference of the same id takes its place.

        Raises:
            ValueError: see `siamese.gallery.Gallery.add` and `prepare`.
            OSError: the place cannot be reached. Some may have been added: adding all of them again adds the others.
        """
        from qdrant_client.models import Batch

        labels, embeddings, ids = enrolment(labels, embeddings, ids, self.embedding_size)
        self.prepare()
        keys, vectors = list(zip(labels, ids, strict=True)), self._vectors(embeddings)
        for start in range(0, len(keys), self._batch):
            part = slice(start, start + self._batch)
            payloads = [{"label": label, "id": name} for label, name in keys[part]]
            self._ask("upsert", points=Batch(ids=list(map(_id, keys[part])), vectors=vectors[part].tolist(), payloads=payloads))

    def _vectors(self, embeddings: Tensor) -> Tensor:
        return self.distance.maybe_normalize(embeddings.detach().cpu().float()) * self._weight

    def remove(self, label: str) -> int:
        """Forget a class; gives back how many references it had.

        Raises:
            KeyError: there is no such class.
        """
        number = self._ask("count", count_filter=_filter([label]), exact=True).count if self.exists else 0
        if not number:
            raise KeyError(label)
        self._ask("delete", points_selector=_filter([label]))
        return number

    @torch.no_grad()
    def search(self, queries: Tensor, k: int = 5, rule: str = "nearest") -> list[list[Match]]:
        """The k classes most alike to each of float [Q, D] queries, best first; fewer if there are no more.

        Raises:
            ValueError: see `siamese.gallery.Gallery.search`; or the rule is "prototype".
        """
        check_search(queries, k, rule, self)
        if rule == "prototype":
            raise ValueError("references in Qdrant are compared one by one: the rule prototype is for a gallery that is a file")
        vectors = self._vectors(queries).tolist()
        return [found for start in range(0, len(vectors), _QUERIES) for found in self._search(vectors[start : start + _QUERIES], k)]

    def _search(self, vectors: list[list[float]], k: int) -> list[list[Match]]:
        # As the client's `query_points_groups` does, but for many queries in one request: it has no such call, and for a folder
        # it makes an object of every reference there is, 0.06 ms each.
        from qdrant_client.models import QueryRequest

        depth, sign = 4 * k, 1 if self._measure == "Dot" else -1
        found: list[dict[str, Match]] = [{} for _ in vectors]
        left = list(range(len(vectors)))
        while left:  # where a few classes have all of the nearest references: look again, without these classes
            asked = [
                QueryRequest(query=vectors[query], filter=_filter(found[query], without=True), limit=depth, with_payload=True)
                for query in left
            ]
            more = []
            for query, answer in zip(left, self._ask("query_batch_points", requests=asked), strict=True):
                for point in answer.points:
                    label = point.payload["label"]
                    if label not in found[query] and len(found[query]) < k:
                        found[query][label] = Match(label, sign * point.score, point.payload["id"])
                if len(found[query]) < k and len(answer.points) == depth:
                    more.append(query)
            left = more
        return [list(best.values()) for best in found]

    def _ask(self, call: str, **arguments):
        """The answer of the client's method to a question about the collection; its errors, as sentences."""
        self._client = _opened(self, self.place, self._remote) if self._client is None else self._client
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            return getattr(self._client, call)(self.collection, **arguments)
        except (ResponseHandlingException, json.JSONDecodeError) as error:
            source = getattr(error, "source", error)
            reason = str(source).partition("\n")[0] or type(source).__name__
            raise ConnectionError(f"{self.place} cannot be reached as Qdrant: {reason}") from error
        except UnexpectedResponse as error:
            if error.status_code in (401, 403):
                raise ValueError(f"{self.place} wants another key: set the environment variable QDRANT_API_KEY") from error
            raise ValueError(f"{self.place} says {error.status_code} to {call}: {error.content[:200].decode(errors='replace')}") from error
        except ResourceExhaustedResponse as error:
            raise ConnectionError(f"{self.place} is overloaded, try again in {error.retry_after_s} seconds: {error}") from error


def _opened(gallery: QdrantGallery, place: str, remote: bool):
    from qdrant_client import QdrantClient

    if remote:
        # Without its look at the server's version, in a thread that warns whenever it is done.
        key = os.environ.get("QDRANT_API_KEY") or None
        client = QdrantClient(url=place, api_key=key, timeout=_SECONDS, check_compatibility=False)
    else:
        try:
            client = QdrantClient(":memory:") if place == ":memory:" else QdrantClient(path=place)
        except RuntimeError as error:
            raise ValueError(f"{place} is in use by another program, or another gallery of this one: a server lets many in") from error
        except OSError:
            raise
        except Exception as error:  # of SQLite, JSON, pickle and pydantic
            raise ValueError(f"{place} is damaged, or no folder of Qdrant: {str(error).partition(chr(10))[0]}") from error
    weakref.finalize(gallery, client.close)  # left to the client's own end, it fails where Python ends first
    return client


def _measured(distance: Module) -> tuple[str, Tensor]:
    """Qdrant's name of a distance, and what embeddings are multiplied by for it."""
    plain = getattr(distance, "p", None) == 2 and getattr(distance, "power", None) == 1
    if plain and type(distance) in (CosineSimilarity, DotProductSimilarity):
        return "Dot", torch.ones(())
    if plain and type(distance) is LpDistance:
        return "Euclid", torch.ones(())
    if type(distance) is LearnedDistance:
        weight = distance.weight.detach().abs().float() / len(distance.weight)
        return "Manhattan", weight.clamp(min=max(1e-9 * weight.max().item(), 1e-30))  # not 0, so that `of` can divide by it
    raise ValueError(f"Qdrant cannot compare by {type(distance).__name__} with these arguments: leave the gallery in its own file")


def _filter(labels, without: bool = False):
    from qdrant_client.models import FieldCondition, Filter, MatchAny

    if not labels:
        return None
    condition = [FieldCondition(key="label", match=MatchAny(any=list(labels)))]
    return Filter(must_not=condition) if without else Filter(must=condition)


def _id(key: tuple[str, str]) -> str:
    """Of a point: the same for the same class and id, so that it is replaced."""
    return str(uuid.uuid5(_IDS, json.dumps(key)))
