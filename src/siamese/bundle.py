"""A Bundle is what training is for: encoder, distance, preprocessing and threshold, in one file, without Lightning or Hydra.

model = Bundle.load("logs/train/runs/<stamp>/bundle.safetensors")      # or any checkpoint of a run
embeddings = model.embed(images)                                       # uint8 [N, C, H, W] -> float [N, D]
same = model.scores(embeddings[:1], embeddings[1:]) >= model.threshold
"""

import hashlib
import importlib
import inspect
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from siamese.data.augmentation import Views
from siamese.data.reading import Reader
from siamese.decision import Decision
from siamese.distances import scores
from siamese.frozen import Frozen

_TRUSTED = ("siamese", "pytorch_metric_learning")


class Standardize(nn.Module):
    """Inputs as the encoder wants them: uint8 becomes 0..1, then (input - mean) / std per channel (the second dimension)."""

    def __init__(self, mean: list[float] = (0.0,), std: list[float] = (1.0,)):
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        return (inputs - inputs.new_tensor(self.mean).view(shape)) / inputs.new_tensor(self.std).view(shape)


class Unchanged(nn.Module):
    """Inputs as they are, for encoders that take them so: texts."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class Bundle(nn.Module):
    """Everything needed to embed and decide.

    Args:
        parts: `encoder`, `distance`, `preprocessing`; where it is known how inputs are read, `reader`; where embeddings are averaged
            over several views of an image, `views`; each a plain `{"_target_": "module.Class", **arguments}`.
        decision: from which score two inputs count as the same, and how often that errs, fitted on validation classes.
        config: the configuration it was trained with, plain values.
        trust: packages, besides this one and pytorch-metric-learning, whose classes may be built from `parts`.
        alone: `parts`, and the weights to come, must say all: an encoder neither downloads what it is made from nor reads its files.

    Raises:
        ValueError: a part names a class that is not a torch module of a trusted package, or its arguments do not fit.
    """

    def __init__(
        self, parts: dict, decision: Decision | None = None, config: dict | None = None, trust: tuple[str, ...] = (), alone: bool = False
    ):
        super().__init__()
        offered = {"pretrained": False, "config": {}} if alone else {}
        self.encoder = construct_trusted(parts["encoder"], nn.Module, trust, **offered)
        # What an encoder has learned of itself when it was made, and needs to be made again: of a pretrained one its configuration.
        self.parts = {**parts, "encoder": {**parts["encoder"], **getattr(self.encoder, "arguments", {})}}
        self.decision, self.config = decision, config or {}
        sizes = {"embedding_size": self.encoder.embedding_size} if hasattr(self.encoder, "embedding_size") else {}
        self.distance = construct_trusted(parts["distance"], nn.Module, trust, **sizes)
        self.preprocessing = construct_trusted(parts["preprocessing"], nn.Module, trust)
        self.reader = construct_trusted(parts["reader"], Reader, trust) if parts.get("reader") else None
        self.views = construct_trusted(parts["views"], Views, trust) if parts.get("views") else None

    @property
    def threshold(self) -> float | None:
        """The score from which two inputs count as the same."""
        return None if self.decision is None else self.decision.threshold

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU if it has none."""
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    def fingerprint(self) -> str:
        """32 hex digits that change when a weight does, or a part: embeddings of models with the same one can be compared."""
        digest = hashlib.blake2b(json.dumps(self.parts, sort_keys=True).encode(), digest_size=16)
        for name, value in self.state_dict().items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def forward(self, inputs: Tensor) -> Tensor:
        """uint8 or float [B, ...] -> float32 [B, D] embeddings."""
        return self.encoder(self.preprocessing(inputs)).float()

    def look(self, views: int, augmentation: dict) -> None:
        """From now on `embed` averages over so many views besides, moved as this augmentation, a part, says; 0 for none.

        Raises:
            ValueError: it is no number, or the augmentation is none of images.
        """
        part = None
        if views:
            if augmentation.get("_target_") != "siamese.data.augmentation.Augment":
                raise ValueError(f"views={views} are made by the augmentation of images that a model is trained with, this one has none")
            part = {**augmentation, "_target_": "siamese.data.augmentation.Views", "count": views, "classwise": None}
        self.parts = {**{name: value for name, value in self.parts.items() if name != "views"}, **({"views": part} if part else {})}
        self.views = construct_trusted(part, Views) if part else None

    def _averaged(self, inputs: Tensor) -> Tensor:
        """As `forward`; of several views the mean of their embeddings, of their directions where the distance normalises."""
        if self.views is None:
            return self(inputs)
        total = self.distance.maybe_normalize(self(inputs))
        for view in self.views(inputs):
            total = total + self.distance.maybe_normalize(self(view))
        return total / (1 + self.views.count)

    @torch.no_grad()
    def embed(self, inputs: Tensor, batch_size: int = 512) -> Tensor:
        """[N, ...] -> float32 [N, D] on the CPU, in evaluation mode, batch by batch; averaged over `views`."""
        training = [module for module in self.modules() if module.training]  # some may be frozen
        self.eval()
        try:
            return torch.cat([self._averaged(batch.to(self.device)).cpu() for batch in inputs.split(batch_size)])
        finally:
            for module in training:
                module.training = True

    @torch.no_grad()
    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        """[Q, D] and [G, D] embeddings -> [Q, G] scores; higher is more alike."""
        return scores(self.distance, query, gallery)

    def described(self) -> dict:
        """All but the weights, as plain values."""
        return {"parts": self.parts, "decision": self.decision and self.decision.plain(), "config": self.config}

    def save(self, path: str | os.PathLike) -> None:
        """Write one .safetensors file, atomically."""
        write_safetensors({k: v.contiguous() for k, v in self.state_dict().items()}, path, {"bundle": json.dumps(self.described())})

    @classmethod
    def load(cls, path: str | os.PathLike, trust: tuple[str, ...] = ()) -> "Bundle":
        """Read a bundle, or the model of a training checkpoint (`best.ckpt`). Nothing is unpickled but tensors and plain values.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or no bundle; or it names a class that is not trusted.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        if Path(path).suffix == ".safetensors":
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    saved = json.loads(file.metadata()["bundle"])
                    state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
                raise ValueError(f"{path} is damaged or not a bundle: {error}") from error
        else:
            saved = load_checkpoint(path)
            state = saved["state_dict"]
            state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        return cls.restore(saved, state, path, trust, remembers=Path(path).suffix != ".safetensors")

    @classmethod
    def restore(cls, saved: dict, state: dict[str, Tensor], path: str | os.PathLike, trust: tuple[str, ...], remembers: bool) -> "Bundle":
        """From what `described` gave and the weights, both read from `path`, which errors name.

        Raises:
            ValueError: they make no model, or name a class that is not trusted.
        """
        try:
            if not isinstance(saved["config"], dict):
                raise ValueError("its configuration is none")
            parts = dict(saved["parts"])
            if "pretrained" in parts["encoder"]:
                parts["encoder"] = {**parts["encoder"], "pretrained": False}
            decision = None if saved.get("decision") is None else Decision(**saved["decision"])
            bundle = cls(parts, decision, saved["config"], trust, alone=True)
            bundle.load_state_dict(state)
            for part in bundle.modules():
                if isinstance(part, Frozen) and not remembers:  # for use, on inputs that do not come again
                    part.remembers = False
            bundle.parts = saved["parts"]
        except RuntimeError as error:
            raise ValueError(f"the weights in {path} do not fit its own encoder: {' '.join(str(error).split())[:200]}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no usable model: {str(error).strip()}") from error
        return bundle


def write_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Atomically, and for whoever may read what this process writes: the library keeps others out."""
    partial = Path(f"{path}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(tensors, partial, metadata)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """A training checkpoint of this project as plain values and tensors, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds more than tensors and plain values, or was written by something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own: zip, pickle, EOF, runtime errors all come
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error
    whole = isinstance(checkpoint, dict) and {"parts", "state_dict", "config"} <= checkpoint.keys()
    if not whole or not isinstance(checkpoint["state_dict"], dict):
        raise ValueError(f"{path} is a checkpoint, but not one that train.py wrote: it has no parts, state_dict and config")
    return checkpoint


def construct_trusted(part: dict, base: type, trust: tuple[str, ...] = (), **offered):
    """Build what a file names, if it is a class under `base`, defined in a trusted package: nothing else that Python can reach.

    Those of `offered` that its constructor names, and that the file leaves open, come by themselves.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(part, dict) or "_target_" not in part:
        raise ValueError(f"{part!r} names no _target_")
    arguments = {name: value for name, value in part.items() if name != "_target_"}
    target = str(part["_target_"])
    module, _, name = target.rpartition(".")
    package = module.partition(".")[0]
    if package not in (*_TRUSTED, *trust):
        raise ValueError(f"{target} is of the package {package!r}, which a file may not name unless you trust it: trust=[{package}]")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no class {target}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, base) and kind.__module__.partition(".")[0] == package):
        raise ValueError(f"{target} is not a {base.__name__} of the package {package!r}")
    takes = inspect.signature(kind.__init__).parameters
    arguments = {**{name: value for name, value in offered.items() if name in takes}, **arguments}
    try:
        return kind(**arguments)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{target} cannot be built from {arguments}: {error}") from error
