"""A Bundle's encoder as one file that needs nothing of this project: .onnx for ONNX Runtime, .pt2 for PyTorch alone.

model = Bundle.load("logs/train/runs/<stamp>/bundle.safetensors")
print(*export(model, "encoder.onnx", images).lines, sep="\\n")  # some real samples, which the file is checked on

session = onnxruntime.InferenceSession("encoder.onnx")
embeddings = session.run(None, {"inputs": images})[0]          # uint8 [B, C, H, W] -> float32 [B, D], whatever B
metadata = session.get_modelmeta().custom_metadata_map         # how to compare them, and what the inputs must be

metadata = {"compare": ""}                                     # is filled with all that there is
encoder = torch.export.load("encoder.pt2", extra_files=metadata).module()

A .pt2 is unpickled, so load none that you do not trust, and torch promises to read it only in the version that wrote it (`made_with`).
"""

import copy
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor, nn

from siamese import __version__
from siamese.bundle import Bundle, Standardize
from siamese.data.texts import as_texts
from siamese.distances import LearnedDistance
from siamese.frozen import Frozen
from siamese.text_encoders import Transformer

_NEEDS = ("onnx", "onnxruntime", "onnxscript")
_MOST = 2_000_000_000  # bytes: an .onnx file is one protobuf message, which ends at 2 GiB; beyond it weights go to a second file
_BATCH = 512
_SAID = ("inputs", "preparation", "embeddings", "compare", "threshold")
_ABSENT = {"compare": "by a distance that the file cannot say, only name", "threshold": "none was fitted"}
_TRACED = (5, 3)  # batch and tokens: not what is checked, and not the same, which tracing takes for one size


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        difference: the largest |difference| between its embeddings and the Bundle's.
        metadata: what the file says of itself, in ONNX's `metadata_props` or torch.export's `extra_files`; all values are texts.
            `inputs` and `embeddings`: what goes in and comes out.
            `compare`: Python, with numpy as `np`, for the `score` of two embeddings `a` and `b`; not of a distance of one's own.
            `weight`: of a learned distance, in JSON.
            `threshold`: the score from which two inputs count as the same, where one was fitted.
            `preparation`: how a file, text or row becomes an input, in JSON.
            `tokenizer`: for texts, the tokenizer.json of Hugging Face's tokenizers, which cuts and pads as it must be.
            `encoder`, `distance`, `preprocessing`: their classes, the last two with arguments, in JSON.
            `model`, `made_with`: the Bundle's `fingerprint`, and versions.
        lines: the same for people.
    """

    path: Path
    difference: float
    metadata: dict[str, str]
    lines: list[str]


def export(model: Bundle, path: str | os.PathLike, inputs: Tensor, preparation: dict | None = None, tolerance: float = 1e-4) -> Exported:
    """Write the encoder and its preprocessing, for batches of any size, and check what was written; the model stays as it is.

    Embeddings are those of `Bundle.embed`, not yet normalised, so that a gallery of the one goes with the other: what the distance does
    before it compares is part of `compare`. Of a `Transformer` the graph begins with tokens, since none can cut a text; its tokenizer
    is among the metadata, as a second file might be lost, or be another model's.

    Args:
        path: its ending, .onnx or .pt2, says which.
        inputs: [N, ...], real samples as `Bundle.embed` takes them; the file takes others of their shape and type, and holds none of them.
        preparation: how a file becomes one of these inputs, in plain values, {"size": 64, "fit": "pad"}; None takes the Bundle's reader.
        tolerance: the largest difference, as a share of the largest number in the embeddings.

    Raises:
        ValueError: another ending, no samples, a package is missing, more weights than the format holds, an encoder that is no graph, or
            embeddings that are not the Bundle's. Nothing is written then; a file that was there before stays.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: the ending says what to write, .onnx for ONNX Runtime or .pt2 for PyTorch")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not len(inputs):
        raise ValueError(f"{path} is checked on real samples: give at least one")
    if model.views is not None:
        raise ValueError(
            f"{path} would hold the encoder alone, this model averages over {model.views.count} views besides: leave them away first, in "
            "Python by model.look(0, {})"
        )
    if path.suffix == ".onnx":
        if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
            raise ValueError(f"an .onnx file needs {', '.join(missing)}: run `pip install -e '.[export]'`")
        if (size := sum(tensor.nbytes for tensor in (*model.encoder.parameters(), *model.encoder.buffers()))) > _MOST:
            raise ValueError(f"an .onnx file holds at most 2 GB, these weights are {size / 1e9:.1f} GB: write a .pt2 file")
    # A copy, in the layout that torch writes, without what is for training.
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    for part in model.modules():
        if isinstance(part, Frozen):
            part.remembers = False
    wanted = model.embed(inputs)
    scale = wanted.abs().max().item()
    graph = _OfTokens(model.encoder) if isinstance(model.encoder, Transformer) else _OfInputs(model, inputs)
    metadata = {**graph.metadata, **_metadata(model, wanted.shape[1])}
    if preparation := preparation or model.parts.get("reader"):
        metadata["preparation"] = json.dumps(preparation)
    sizes = sorted({1, min(2, len(inputs)), len(inputs)})
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        try:
            run = _FORMATS[path.suffix](partial, graph, _traced(graph), metadata)
            found = [torch.cat([run(*graph.feed(rows)) for rows in inputs[:size].split(_BATCH)]) for size in sizes]
        except OSError:
            raise
        except Exception as error:  # torch's tracing and the runtimes raise a dozen things
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{type(model.encoder).__name__} cannot be written as a graph for batches of any size: {reason}") from error
        difference = torch.stack([(some - wanted[: len(some)]).abs().max() for some in found]).max().item()
        if not difference <= tolerance * scale:  # nor nan
            raise ValueError(
                f"{path.name} would not be the model: its embeddings differ by {difference:.2g}, where the largest number is {scale:.2g}"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    *some, last = (str(min(size, _BATCH)) for size in sizes)
    batches = f"batches of {', '.join(some)} and {last}" if some else "a batch of 1"
    checked = f"checked on {len(inputs):,} samples in {batches}: off by at most {difference:.1g}, where the largest number is {scale:.2g}"
    lines = [f"{path}, {path.stat().st_size / 1e6:.1f} MB, {checked}"]
    for key in _SAID:
        if key in metadata:
            lines.append(f"{key}: {'; '.join(metadata[key].splitlines())}")
        elif key in _ABSENT:
            lines.append(f"{key}: {_ABSENT[key]}")
    return Exported(path, difference, metadata, [*lines, f"in its metadata: {', '.join(metadata)}"])


class _OfInputs(nn.Module):
    """Inputs -> embeddings."""

    names, axes = ("inputs",), {0: torch.export.Dim("batch")}

    def __init__(self, model: Bundle, inputs: Tensor):
        super().__init__()
        self.model = model
        self.example = (torch.zeros(_TRACED[0], *inputs.shape[1:], dtype=inputs.dtype),)
        kind = str(inputs.dtype).removeprefix("torch.")
        said = f"{kind} [{', '.join(['batch', *map(str, inputs.shape[1:])])}]"
        if inputs.dim() == 4:
            channels = {1: " (grey)", 3: " (red, green, blue)"}.get(inputs.shape[1], "")
            said += f": batch, channels{channels}, height, width" + (", from 0 to 255" if kind == "uint8" else "")
        if isinstance(model.preprocessing, Standardize):
            said += "; divided by 255 and standardised within" if kind == "uint8" else "; standardised within"
        self.metadata = {"inputs": said}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def feed(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs.cpu(),)


class _OfTokens(nn.Module):
    """Tokens of texts -> embeddings."""

    names = ("input_ids", "attention_mask")

    def __init__(self, encoder: Transformer):
        super().__init__()
        frozen = isinstance(encoder.backbone, Frozen)
        self.backbone, self.head = encoder.backbone.module if frozen else encoder.backbone, encoder.head
        self.tokenizer = copy.deepcopy(self.backbone.tokenizer)
        padding = self.backbone.padding
        self.tokenizer.enable_padding(pad_id=padding, pad_token=self.tokenizer.id_to_token(padding) or "[PAD]")
        self.axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=self.backbone.max_length)}
        self.example = tuple(torch.ones(_TRACED, dtype=torch.int64) for _ in self.names)  # one tensor would become one input
        self.metadata = {
            "inputs": f"input_ids and attention_mask, int64 [batch, length], of at most {self.backbone.max_length} tokens, as "
            "tokenizers.Tokenizer.from_str(metadata['tokenizer']).encode_batch(texts) gives them: ids and attention_mask of each text",
            "tokenizer": self.tokenizer.to_str(),
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.backbone.pooled(input_ids, attention_mask)).float()

    def feed(self, inputs: Tensor) -> tuple[Tensor, ...]:
        coded = self.tokenizer.encode_batch(as_texts(inputs))
        return torch.tensor([one.ids for one in coded]), torch.tensor([one.attention_mask for one in coded])


def _traced(graph: nn.Module) -> torch.export.ExportedProgram:
    """The graph, traced on inputs that are made up, since a .pt2 file holds them, and without the paths of this machine's files."""
    with torch.no_grad():
        program = torch.export.export(graph.eval(), graph.example, dynamic_shapes=(graph.axes,) * len(graph.names))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _write_onnx(path: Path, graph: nn.Module, program: torch.export.ExportedProgram, metadata: dict[str, str]) -> Callable[..., Tensor]:
    import onnxruntime

    # An axis is named once: torch warns of the same name at another input.
    axes = (graph.axes, *[dict.fromkeys(graph.axes)] * (len(graph.names) - 1))
    names = {"input_names": graph.names, "output_names": ["embeddings"]}
    written = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=axes, **names)
    written.model.metadata_props.update(metadata)
    path.write_bytes(written.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: rows.numpy() for name, rows in zip(graph.names, inputs, strict=True)})[0])

    return run


def _write_torch(path: Path, graph: nn.Module, program: torch.export.ExportedProgram, metadata: dict[str, str]) -> Callable[..., Tensor]:
    with open(path, "wb") as file:  # given a path, torch raises no OSError
        torch.export.save(program, file, extra_files=metadata)
    return torch.export.load(path).module()


_FORMATS = {".onnx": _write_onnx, ".pt2": _write_torch}


def _metadata(model: Bundle, size: int) -> dict[str, str]:
    parts, distance = model.parts, model.distance
    says = {
        "embeddings": f"float32 [batch, {size}], as the encoder gives them",
        "encoder": parts["encoder"]["_target_"],
        "distance": json.dumps(parts["distance"]),
        "preprocessing": json.dumps(parts["preprocessing"]),
        "model": model.fingerprint(),
        "made_with": f"siamese-lab {__version__}, torch {torch.__version__}",
    }
    if score := _score(distance):
        norm = f"np.linalg.norm({{0}}, {getattr(distance, 'p', 2)})"
        made = [f"a, b = (e / max({norm.format('e')}, 1e-12) for e in (a, b))"] if distance.normalize_embeddings else []
        says["compare"] = "\n".join([*made, f"score = {score}"])
        says["embeddings"] += ", not normalised: compare does it" if made else ""
    if isinstance(distance, LearnedDistance):
        says["weight"] = json.dumps(distance.weight.abs().tolist())
    if model.threshold is not None:
        says["threshold"] = json.dumps(model.threshold)
    return says


def _score(distance: nn.Module) -> str | None:
    """The score of `a` and `b`, normalised if that is asked for, in numpy; None for a distance of which nothing is known here."""
    power = "" if getattr(distance, "power", 1) == 1 else f" ** {distance.power}"
    if type(distance) in (CosineSimilarity, DotProductSimilarity):
        return f"(a @ b){power}"
    if type(distance) is LpDistance:
        return f"-np.linalg.norm(a - b, {distance.p}){power}"
    if type(distance) is LearnedDistance:
        return f"-(weight * np.abs(a - b)).mean(){power}"
    return None
