"""CLINC150: 23,700 questions to an assistant, of 150 intents and of none. Larson et al. 2019, arXiv:1909.02027."""

import json
from dataclasses import replace
from pathlib import Path

from siamese.data.listing import Listed, share_out
from siamese.data.samples import Samples
from siamese.data.texts import Texts


class Clinc150(Texts):
    """Its questions as texts, intents as classes: 80 to train, 20 to validate, 50 to test, drawn by `split_seed`.

    Of the intents to train there are only the authors' training questions: a protocol over all 150 may ask their test questions
    (`official`). Of the others, all 150 questions each.

    Args:
        path: the folder with `data_full.json`.
        split_seed: another one draws the intents in another way.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or another file.
    """

    def __init__(self, path: str | Path, split_seed: int = 0):
        super().__init__(path, split_seed=split_seed, val=20 / 150, test=50 / 150)
        self._content: dict[str, list[list[str]]] | None = None

    def listed(self) -> list[Listed]:
        self._findings[""] = []
        every = [sample for name in ("train", "val", "test") for sample in self._rows(name)]
        shared = share_out([replace(sample, split="") for sample in every], **self._shares)
        return [sample for sample, row in zip(shared, every, strict=True) if sample.split != "train" or row.split == "train"]

    def official(self, name: str) -> Samples:
        """A split of the authors', with all 150 intents: "train", "val" or "test"; of no intent: "oos_train", "oos_val" or "oos_test"."""
        return self.read(self._rows(name), name)[0]

    def _rows(self, name: str) -> list[Listed]:
        if self._content is None:
            file = self.path / "data_full.json"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: run `python scripts/download.py clinc150`")
            try:
                self._content = json.loads(file.read_text(encoding="utf-8"))
                _ = [(text.strip(), intent.strip()) for rows in self._content.values() for text, intent in rows], self._content["test"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is damaged or another file ({error}): fetch it again") from None
        if name not in self._content:
            raise ValueError(f"CLINC150 has no split {name!r}: choose one of {', '.join(self._content)}")
        rows = enumerate(self._content[name])
        return [Listed(text.strip(), intent, f"data_full.json, {name} {row}", name) for row, (text, intent) in rows]
