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
    """

    inputs: Tensor
    labels: Tensor
    tuples: tuple[Tensor, ...] | None = None


class Samples(Dataset):
    """One split, held in memory.

    Args:
        inputs: [N, C, H, W] uint8 images, or any [N, ...] tensor.
        labels: [N] int64 in 0..len(class_names)-1; None for samples without labels, which have -1 in every place.
        class_names: the name of each class.
        ids: [N] where each sample came from (file, or face and letter), for errors and reports.

    An index gives `(input, label)`; a list or tensor of indices gives a `Batch`, in one gather.

    Raises:
        ValueError: if lengths disagree or a label has no name.
    """

    def __init__(self, inputs: Tensor, labels: Tensor | None, class_names: list[str], ids: list[str]):
        self.labelled = labels is not None
        if labels is None:
            labels = torch.full((len(inputs),), -1)
        if not len(inputs) == len(labels) == len(ids):
            raise ValueError(f"{len(inputs)} inputs, {len(labels)} labels and {len(ids)} ids: they must be as many")
        if self.labelled and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but {len(class_names)} classes have a name")
        self.inputs, self.labels, self.class_names, self.ids = inputs, labels.long(), class_names, ids

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(index, int):
            return self.inputs[index], int(self.labels[index])
        index = torch.as_tensor(index)
        return Batch(self.inputs[index], self.labels[index])

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.inputs.shape[1:]))
        return f"{len(self):,} samples {f'of {len(self.class_names):,} classes' if self.labelled else 'without labels'}, {shape}"

    def subset(self, rows: Tensor, renumber: bool = False) -> "Samples":
        """The samples in these rows, with all class names or, if `renumber`, only those of their own classes."""
        labels, names = self.labels[rows] if self.labelled else None, self.class_names
        if renumber and self.labelled:
            found, labels = labels.unique(return_inverse=True)
            names = [names[label] for label in found.tolist()]
        return Samples(self.inputs[rows], labels, names, [self.ids[row] for row in rows.tolist()])

    def fingerprint(self) -> str:
        """16 hex digits that change when an input, its order or its label does."""
        digest = hashlib.sha256(repr((tuple(self.inputs.shape), self.class_names)).encode())
        digest.update(self.inputs.contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
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
    """A data set: gives its splits by name, each with classes of its own. Subclass it, write `split`, name it in a YAML."""

    def split(self, name: str) -> Samples:
        """`name` is "train", "val" or "test"; only what is asked for is read."""
        raise NotImplementedError

    def findings(self) -> list[Finding]:
        """What came to light while splits were read; none by default."""
        return []

    def oneshot_runs(self) -> list[tuple[Samples, Samples]]:
        """Official one-shot tasks of the test split, as (queries, supports) with equal labels; none by default."""
        return []
