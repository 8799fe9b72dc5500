"""Encoders: one input in, one embedding out. Twins share their weights by being the same encoder, called on one batch.

To add one, write a `torch.nn.Module` here that takes `input_shape` (without the batch) and has `embedding_size`, and name
it in a YAML of `conf/encoder`.
"""

import math

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from siamese.frozen import Frozen


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch-norm, ReLU and 2x2 max-pooling (Vinyals et al. 2016, arXiv:1606.04080).

    Float [B, C, H, W] -> [B, embedding_size]; H and W of at least 16.

    Args:
        input_shape: (C, H, W).
        widths: channels of each block.
        embedding_size: a linear layer maps the last feature map to this.
    """

    def __init__(self, input_shape: tuple[int, int, int], widths: tuple[int, ...] = (32, 64, 64, 64), embedding_size: int = 64):
        super().__init__()
        channels, height, width = _of_images(input_shape)
        if min(height, width) < 2 ** len(widths):
            raise ValueError(
                f"{len(widths)} halvings need inputs of at least {2 ** len(widths)} x {2 ** len(widths)}, these are {height} x {width}"
            )
        self.embedding_size = embedding_size
        blocks = []
        for before, after in zip([channels, *widths[:-1]], widths, strict=True):
            # The ReLU last: it commutes with the maximum, and there a quarter of the numbers are left.
            blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.MaxPool2d(2), nn.ReLU()]
        features = widths[-1] * (height >> len(widths)) * (width >> len(widths))
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(features, embedding_size))
        self.to(memory_format=torch.channels_last)  # 2 to 3 times as fast on a CPU, and on a GPU in bf16

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs.to(memory_format=torch.channels_last))


class Residual(nn.Module):
    """A small residual network: a 5x5 convolution of stride 2, then stages of two 3x3 convolutions beside a shortcut (He et al. 2016,
    arXiv:1512.03385), of which all but the first halve the sides. Float [B, C, H, W] -> [B, embedding_size].

    On a CPU it errs less than `Conv4` for the same time: no layer with many channels runs at the full size of the image.

    Args:
        input_shape: (C, H, W).
        widths: channels of each stage.
        pool: the last map is averaged to so many by so many cells, all of which are the embedding where there is no head.
        embedding_size: of a linear head; None leaves the cells as they are, widths[-1] * pool^2 numbers.

    Raises:
        ValueError: the last map would have fewer cells, or none.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], widths: tuple[int, ...] = (32, 64, 128), pool: int = 2, embedding_size: int | None = None
    ):
        super().__init__()
        channels, *sides = _of_images(input_shape)
        if not widths or pool < 1 or (embedding_size is not None and embedding_size < 1):
            raise ValueError(
                f"widths={list(widths)}, pool={pool}, embedding_size={embedding_size}: one width at least, and numbers above 0"
            )
        if min(sides) < pool * 2 ** len(widths):
            least = pool * 2 ** len(widths)
            raise ValueError(
                f"to end in {pool} x {pool} cells it takes images of at least {least} x {least}, these are {sides[0]} x {sides[1]}"
            )
        layers = [_normed(channels, widths[0], 5, stride=2), nn.ReLU()]
        for before, after in zip([widths[0], *widths[:-1]], widths, strict=True):
            layers.append(_Stage(before, after, halves=len(layers) > 2))
        layers += [nn.AdaptiveAvgPool2d(pool), nn.Flatten()]
        features = widths[-1] * pool**2
        self.embedding_size = embedding_size or features
        self.layers = nn.Sequential(*layers, *([nn.Linear(features, embedding_size)] if embedding_size else []))
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs.to(memory_format=torch.channels_last))


class _Stage(nn.Module):
    def __init__(self, before: int, after: int, halves: bool):
        super().__init__()
        self.way = nn.Sequential(_normed(before, after, 3, 2 if halves else 1), nn.ReLU(), _normed(after, after, 3))
        joined = [_normed(before, after, 1)] if halves or before != after else []
        self.shortcut = nn.Sequential(*[nn.AvgPool2d(2, ceil_mode=True)] * halves, *joined)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.way(maps) + self.shortcut(maps))


def _normed(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after))


class Koch(nn.Module):
    """Four large convolutions, each with ReLU and all but the last with 2x2 max-pooling, and a fully connected layer with sigmoid.

    Koch, Zemel and Salakhutdinov, "Siamese neural networks for one-shot image recognition", ICML deep learning workshop 2015,
    whose inputs are 105 x 105. Float [B, C, H, W] -> [B, embedding_size] in 0..1; H and W of at least 65.
    Weights start as torch has them: the paper's wider start saturates the sigmoid, and AdamW learns little from there.

    Args:
        input_shape: (C, H, W).
        embedding_size: of the fully connected layer.

    Raises:
        ValueError: the input is too small for the convolutions.
    """

    def __init__(self, input_shape: tuple[int, int, int], embedding_size: int = 4096):
        super().__init__()
        before, *sides = _of_images(input_shape)
        self.embedding_size = embedding_size
        blocks = []
        for after, kernel in ((64, 10), (128, 7), (128, 4), (256, 4)):
            if blocks:
                blocks.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
            sides = [side - kernel + 1 for side in sides]
            blocks += [nn.Conv2d(before, after, kernel), nn.ReLU()]
            before = after
        if min(sides) < 1:
            height, width = input_shape[1:]
            raise ValueError(f"its convolutions need inputs of at least 65 x 65, these are {height} x {width}: say dataset.size=105")
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(before * math.prod(sides), embedding_size))
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor) -> Tensor:
        # In bfloat16 a sigmoid near 1 has steps of 0.004, as large as the differences that tell two inputs apart.
        return self.layers(inputs.to(memory_format=torch.channels_last)).float().sigmoid()


def _of_images(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 3:
        raise ValueError(f"it takes images, these inputs have the shape {list(shape)}: use encoder=mlp for tables, transformer for texts")
    return shape


class MLP(nn.Module):
    """Fully connected layers with batch-norm and ReLU, for tables or small images. Float [B, ...] -> [B, embedding_size].

    Args:
        input_shape: any; it is flattened.
        hidden: widths of the hidden layers.
        embedding_size: of the last, linear layer.
    """

    def __init__(self, input_shape: tuple[int, ...], hidden: tuple[int, ...] = (512, 256), embedding_size: int = 64):
        super().__init__()
        self.embedding_size = embedding_size
        self.layers = nn.Sequential(nn.Flatten(), *_fully_connected(math.prod(input_shape), hidden, embedding_size))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def _fully_connected(before: int, hidden: tuple[int, ...], after: int) -> list[nn.Module]:
    layers = []
    for width in hidden:
        layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        before = width
    return [*layers, nn.Linear(before, after)]


class Timm(nn.Module):
    """Any image model of timm by name (`timm.list_models()`), its classifier replaced by an embedding head.

    Float [B, C, H, W] -> [B, embedding_size].

    Args:
        input_shape: (C, H, W).
        model: a name that `timm.list_models()` has.
        pretrained: start from timm's published weights (a download).
        in_chans: input channels; None takes those of the data.
        pool: of the last feature map, "avg", "max" or "gem" (`GeM`); None leaves it to timm, which knows each model's own way.
        hidden: widths of the head's hidden layers, with batch-norm and ReLU; none makes it linear.
        embedding_size: of the head; None leaves the pooled features as they are.
        normalize: embeddings of length 1.
        frozen: train the head alone: backbone and pool stay as they are, and run once for each input (`siamese.frozen.Frozen`).

    Raises:
        ValueError: timm has no such model, the model has no feature map to pool, or the arguments do not fit together.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        model: str = "resnet18",
        pretrained: bool = False,
        in_chans: int | None = None,
        pool: str | None = None,
        hidden: tuple[int, ...] = (),
        embedding_size: int | None = 128,
        normalize: bool = False,
        frozen: bool = False,
    ):
        super().__init__()
        import timm

        if not timm.is_model(model):
            near = timm.list_models(f"*{model.partition('.')[0][:6]}*")[:5]
            raise ValueError(f"timm has no model {model!r}" + (f": near are {', '.join(near)}" if near else ""))
        chans = _of_images(input_shape)[0] if in_chans is None else in_chans
        if chans != input_shape[0]:
            raise ValueError(f"in_chans={chans}, but the data has {input_shape[0]} channels")
        if pool not in _POOLS:
            raise ValueError(f"pool={pool} is not known: take one of null, {', '.join(name for name in _POOLS if name)}")
        if hidden and not embedding_size:
            raise ValueError(f"hidden={list(hidden)} makes a head, which needs an embedding_size")
        if frozen and not embedding_size:
            raise ValueError("frozen=true trains the head alone, which needs an embedding_size")
        # With an empty `global_pool` timm's models end in their feature map: through all of their weights, unlike `forward_features`.
        unpooled = {} if pool is None else {"global_pool": ""}
        self.backbone = timm.create_model(model, pretrained=pretrained, in_chans=chans, num_classes=0, **unpooled)
        self.channels_last = pool is not None and getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        # timm's own `num_features` is wrong for models whose head has a hidden layer: ask the model.
        with torch.no_grad():
            features = self.backbone.eval()(torch.zeros(2, *input_shape))
        if pool is not None and features.dim() != 4:
            raise ValueError(f"pool={pool} needs a feature map, {model} ends in {list(features.shape[1:])} for each image: say pool=null")
        self.backbone.train()
        width = features.shape[-1 if self.channels_last else 1]
        self.pool, self.frozen = _POOLS[pool](), frozen
        if frozen:
            self.backbone = Frozen(self.backbone, nn.Sequential(Permute([0, 3, 1, 2]), self.pool) if self.channels_last else self.pool)
        self.embedding_size, self.normalize = embedding_size or width, normalize
        layers = _fully_connected(width, hidden, embedding_size) if embedding_size else [nn.Identity()]
        self.head = nn.Sequential(*layers) if hidden else layers[0]
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.backbone(inputs.to(memory_format=torch.channels_last))
        if not self.frozen:
            features = self.pool(features.permute(0, 3, 1, 2) if self.channels_last else features)
        embeddings = self.head(features)
        return nn.functional.normalize(embeddings.float()) if self.normalize else embeddings


class GeM(nn.Module):
    """Generalised mean of each channel, (mean of x^p)^(1/p): p = 1 is the average, a large p the maximum; p is trained.

    Radenovic, Tolias and Chum 2018, arXiv:1711.02512. Float [B, C, H, W] -> float32 [B, C]; what is below `eps` counts as `eps`.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6):
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.tensor(p)), eps

    def forward(self, maps: Tensor) -> Tensor:
        return maps.float().clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)


_POOLS = {
    None: nn.Identity,
    "avg": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "max": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    "gem": GeM,
}


class Flatten(nn.Module):
    """The input itself as its embedding: the `raw` row that stands beside every trained one. [B, ...] -> [B, embedding_size].

    Images [B, C, H, W] that are larger are reduced by averaging, to at most 32 x 32: a photo has too many pixels to keep them all.
    """

    def __init__(self, input_shape: tuple[int, ...]):
        super().__init__()
        self.sides = tuple(min(side, 32) for side in input_shape[1:]) if len(input_shape) == 3 else ()
        self.embedding_size = math.prod((input_shape[0], *self.sides) if self.sides else input_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        return (nn.functional.adaptive_avg_pool2d(inputs, self.sides) if self.sides else inputs).flatten(1)


def part_of(encoder: nn.Module, name: str) -> nn.Module:
    """A submodule by its dotted name ("backbone", "backbone.layer1"), to be frozen or trained at a rate of its own.

    Raises:
        ValueError: there is none of this name, or it has no weights.
    """
    parts = dict(encoder.named_modules())
    if name not in parts or not list(parts[name].parameters()):
        there = ", ".join(part for part, module in encoder.named_children() if list(module.parameters()))
        raise ValueError(f"the encoder has no part {name!r} with weights: it has {there}, and what these consist of")
    return parts[name]
