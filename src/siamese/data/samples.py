"""What every data set is made of: samples with a label, and the batches cut from them."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Batch(NamedTuple):
    """What reaches the model in one step.

    inputs: [B, ...], the samples, all twins' in one tensor, so that one pass of the encoder embeds them with shared weights.
    labels: int64 [B], the class of each input; -1 where the samples have no labels.
    tuples: what the data set already knows about the batch, in pytorch-metric-learning's `indices_tuple` convention:
        pairs `(anchor, positive, anchor, negative)`, triplets `(anchor, positive, negative)`, each int64 positions in
        the batch; None where the labels are all there is and a miner, or the loss itself, forms the tuples.
    rows: int64 [B], where each input stands in its split, whose `ids` say where it came from.
    gallery: bool [B], which are the gallery that the others are compared with; None where each is compared with all others.
    places: int64 [B'], where several processes share a batch: what `inputs`, this one's part, are in it. All else is of the whole.
    """

    inputs: Tensor
    labels: Tensor
    tuples: tuple[Tensor, ...] | None = None
    rows: Tensor | None = None
    gallery: Tensor | None = None
    places: Tensor | None = None


class Tuples(NamedTuple):
    """Pairs or triplets that a data set lists, as rows of its samples.

    rows: int64 [M, 2] (left, right), or [M, 3] (anchor, positive, negative).
    same: bool [M], which pairs are the same; None of triplets.
    where: [M] the file and row that list each, for errors and reports.
    kinds: [M] what sort of pair each is, "" for none in particular; figures are given of each kind too.
    folds: int64 [M], of a protocol that has them.
    """

    rows: Tensor
    same: Tensor | None
    where: list[str]
    kinds: list[str] | None = None
    folds: Tensor | None = None

    def pairs(self) -> "Tuples":
        """Itself, or the two pairs of each triplet: anchor and positive, which are the same, then anchor and negative."""
        if self.same is not None:
            return self
        rows = self.rows[:, [0, 1, 0, 2]].view(-1, 2)
        return Tuples(rows, torch.tensor([True, False]).repeat(len(self.rows)), [where for where in self.where for _ in range(2)])

    def of(self, chosen: Tensor, total: int) -> "Tuples":
        """Those whose samples are all among these rows, int64, of so many; numbered as the rows are."""
        place = torch.full((total,), -1)
        place[chosen] = torch.arange(len(chosen))
        rows = place[self.rows]
        kept = (rows >= 0).all(1)
        texts = [None if t is None else [t[row] for row in kept.nonzero().flatten().tolist()] for t in (self.where, self.kinds)]
        same, folds = (None if t is None else t[kept] for t in (self.same, self.folds))
        return Tuples(rows[kept], same, *texts, folds)


class Samples(Dataset):
    """One split, held in memory.

    Args:
        inputs: [N, C, H, W] uint8 images, or any [N, ...] tensor.
        labels: [N] int64 in 0..len(class_names)-1; None for samples without labels, which have -1 in every place.
        class_names: the name of each class.
        ids: [N] where each sample came from (file, or face and letter), for errors and reports.
        gallery: [N] bool, which samples are the gallery: judged are the others, the queries, against it alone. None: every sample is
            a query, against all others. In training it means nothing.
        tuples: pairs or triplets that are listed, to train with and to be judged by; without labels.

    An index gives `(input, label)`; a list or tensor of indices gives a `Batch`, in one gather.

    Raises:
        ValueError: if lengths disagree or a label has no name.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        class_names: list[str],
        ids: list[str],
        gallery: Tensor | None = None,
        tuples: Tuples | None = None,
    ):
        self.labelled = labels is not None
        if labels is None:
            labels = torch.full((len(inputs),), -1)
        if not len(inputs) == len(labels) == len(ids):
            raise ValueError(f"{len(inputs)} inputs, {len(labels)} labels and {len(ids)} ids: they must be as many")
        if self.labelled and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but {len(class_names)} classes have a name")
        if gallery is not None and (gallery.dtype != torch.bool or gallery.shape != labels.shape):
            raise ValueError(f"gallery is {gallery.dtype} {list(gallery.shape)}: it must be torch.bool {list(labels.shape)}")
        self.inputs, self.labels, self.class_names, self.ids = inputs, labels.long(), class_names, ids
        self.gallery, self.tuples = gallery, tuples
        self.share = (0, 1)

    @property
    def kind(self) -> str:
        """ "images" [C, H, W], "texts" (uint8 [L], see `siamese.data.texts`), or "rows" of anything else."""
        if self.inputs.dim() == 4:
            return "images"
        return "texts" if self.inputs.dim() == 2 and self.inputs.dtype == torch.uint8 else "rows"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(index, int):
            return self.inputs[index], int(self.labels[index])
        index = torch.as_tensor(index)
        return self.batch(index.nonzero().flatten() if index.dtype == torch.bool else index)

    def batch(self, rows: Tensor, tuples: tuple[Tensor, ...] | None = None) -> Batch:
        """The samples of these rows; of several processes, by `share` (this one, how many), each takes its part of the inputs.

        Parts are of one size, at least 2, and take turns, so that each has samples of many classes. Where a batch cannot be cut so,
        some of its samples are in two parts.
        """
        rank, ranks = self.share
        places = None
        if ranks > 1:
            places = (rank + ranks * torch.arange(max(-(-len(rows) // ranks), 2))) % len(rows)
        inputs = self.inputs.index_select(0, rows if places is None else rows[places])  # a tenth of the time of [rows]
        return Batch(inputs, self.labels[rows], tuples, rows, None if self.gallery is None else self.gallery[rows], places)

    def __repr__(self) -> str:
        shape = "texts" if self.kind == "texts" else " x ".join(map(str, self.inputs.shape[1:]))
        content = f"of {len(self.class_names):,} classes" if self.labelled else "without labels"
        if self.tuples is not None:
            content = f"in {len(self.tuples.rows):,} {'triplets' if self.tuples.same is None else 'pairs'}"
        return f"{len(self):,} samples {content}, {shape}"

    def subset(self, rows: Tensor, renumber: bool = False) -> "Samples":
        """The samples in these rows, with all class names or, if `renumber`, only those of their own classes."""
        labels, names = self.labels[rows] if self.labelled else None, self.class_names
        if renumber and self.labelled:
            found, labels = labels.unique(return_inverse=True)
            names = [names[label] for label in found.tolist()]
        gallery = None if self.gallery is None else self.gallery[rows]
        tuples = None if self.tuples is None else self.tuples.of(rows, len(self))
        return Samples(self.inputs[rows], labels, names, [self.ids[row] for row in rows.tolist()], gallery, tuples)

    def roles(self) -> tuple[Tensor, Tensor]:
        """int64 [Q], [G]: the rows of the queries and of the gallery; without roles all rows are both."""
        everyone = torch.arange(len(self))
        return (everyone, everyone) if self.gallery is None else (everyone[~self.gallery], everyone[self.gallery])

    def fingerprint(self) -> str:
        """16 hex digits that change when an input, its order, its label or its role does."""
        digest = hashlib.sha256(repr((tuple(self.inputs.shape), self.class_names)).encode())
        digest.update(self.inputs.contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
        if self.gallery is not None:
            digest.update(self.gallery.numpy().data)
        if self.tuples is not None:
            for tensor in self.tuples.pairs()[:2]:
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class Finding(NamedTuple):
    """What was found about some data.

    serious: nobody can have wanted this.
    what: in words, a plural: "images that cannot be read"; where: the files or rows; remedy: what to do about it.
    """

    serious: bool
    what: str
    where: list[str]
    remedy: str


class Source:
    """A data set: gives its splits by name, each with classes of its own. Subclass it, write `split`, name it in a YAML.

    trained_on: splits that are no others than training's, on purpose. What they seem to tell of new classes is left out.
    """

    trained_on: tuple[str, ...] = ()

    def split(self, name: str) -> Samples:
        """`name` is "train", "val" or "test"; only what is asked for is read."""
        raise NotImplementedError

    def reading(self) -> dict | None:
        """How files, texts or rows that come later are read: a part of a `Bundle`, a `siamese.data.reading.Reader`; None: not at all."""
        return None

    def findings(self) -> list[Finding]:
        """What came to light while splits were read; none by default."""
        return []

    def oneshot_runs(self, split: str = "test") -> list[tuple[Samples, Samples]]:
        """One-shot tasks of a split, the official ones of "test", as (queries, supports) with equal labels; none by default."""
        return []
