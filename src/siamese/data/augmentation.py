"""Augmentation of whole batches on the training device, every item with parameters of its own."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_NODES = 5  # of the coarse grid of displacements, along each axis
_AT_MOST = {"rotation": 180, "scale": 0.9, "shear": 1, "shift": 1, "elastic": 1, "flip": 1, "erasing": 1}


class Augment:
    """Move, bend, crop, mirror and cover each image by its own draw; what comes in from outside is black.

    uint8 or 0..1 float [B, C, H, W] -> float32 (of float64 this) [B, C, H, W] in 0..1. All that moves pixels is one sampling of the image,
    so that it is blurred once. What is 0, or None, is not done, and leaves all else as it would be.

    Args:
        rotation: at most this many degrees either way.
        scale: at most this share larger or smaller, for each axis.
        shear: at most this, as a tangent.
        shift: at most this share of the image, for each axis.
        elastic: standard deviation of the displacement, as a share of half the image; 5 x 5 displacements are drawn, and
            bicubic interpolation lies between them.
        crop: the smallest share of the area that is cut out and enlarged to the whole, the largest being 1; the cut's sides
            have between 3/4 and 4/3 of the image's own ratio (Szegedy et al. 2015, arXiv:1409.4842). Only for images whose
            subject survives it: photos, not letters.
        flip: probability of a mirror image, left to right; not for letters.
        erasing: probability of a black rectangle over 0.02 to 0.4 of the area, of the sides' ratio 0.3 to 1 / 0.3 (Zhong et
            al. 2017, arXiv:1708.04896).
        classwise: what is drawn once for each class of a batch, and done before all else, by the same names but `erasing`: all samples of
            a class are turned, bent or mirrored alike, and so are of a class that has not been before. For losses that compare
            the samples of a batch with each other; one that remembers classes from batch to batch would be misled.

    Raises:
        ValueError: a value out of its range; when called, inputs that are no images.
    """

    def __init__(
        self,
        rotation: float = 0.0,
        scale: float = 0.0,
        shear: float = 0.0,
        shift: float = 0.0,
        elastic: float = 0.0,
        crop: float | None = None,
        flip: float = 0.0,
        erasing: float = 0.0,
        classwise: dict[str, float] | None = None,
    ):
        given = {"rotation": rotation, "scale": scale, "shear": shear, "shift": shift, "elastic": elastic, "flip": flip, "erasing": erasing}
        for key, value in given.items():
            if not _is_number(value) or not 0 <= value <= _AT_MOST[key]:
                raise ValueError(f"augmentation.{key}={value} must lie between 0 and {_AT_MOST[key]}")
        if crop is not None and not (_is_number(crop) and 0 < crop <= 1):
            raise ValueError(f"augmentation.crop={crop} must lie above 0 and at most at 1, or be null for no crop")
        if classwise is not None and not isinstance(classwise, dict):
            raise ValueError(f"augmentation.classwise={classwise} must give values by their names, as in {{rotation: 180}}, or be null")
        self.rotation, self.scale, self.shear, self.shift = math.radians(rotation), scale, shear, shift
        self.elastic, self.crop, self.flip, self.erasing = elastic, 1.0 if crop is None else crop, flip, erasing
        if unknown := {*(classwise or ())} - {*given, "crop"} | {*(classwise or ())} & {"erasing"}:
            raise ValueError(f"augmentation.classwise.{min(unknown)} is not known: take some of {', '.join([*given][:-1])}, crop")
        try:
            self.classwise = Augment(**classwise) if classwise else None
        except ValueError as error:
            raise ValueError(str(error).replace("augmentation.", "augmentation.classwise.", 1)) from None

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        places: Tensor | None = None,
        batch: int | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The generator, on the CPU, decides everything: equal states give equal images on any device.

        Of a `batch` of which the images are a part, at these `places`, int64 [B], each is moved as it is when all are given.
        `labels`, int64, are of the whole batch; `classwise` alone asks for them.
        """
        if images.dim() != 4:
            raise ValueError(f"augmentation needs images [B, C, H, W], these inputs are {list(images.shape)}: say augmentation=none")
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        images = images if images.dtype == torch.float64 else images.float()
        places = torch.arange(len(images)) if places is None else places.cpu()
        drawn = _draws(len(images) if batch is None else batch, places, generator)
        affine, crop, flip, erasing, nodes = (part.to(images) for part in drawn)
        # In bfloat16, which autocast would take for the grid, pixels of an image of 448 would jump by one.
        with torch.autocast(images.device.type, enabled=False):
            grid = self._grid(images.shape, affine, crop, flip, nodes) if self._moves() else None
            if self.classwise is not None and self.classwise._moves():
                if labels is None or (labels < 0).any():
                    raise ValueError("augmentation.classwise goes by labels, which these samples lack: say augmentation.classwise=null")
                if grid is None:
                    still = torch.eye(2, 3, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
                    grid = F.affine_grid(still, list(images.shape), align_corners=False)
                classes, member = labels.cpu().unique(return_inverse=True)
                drawn = _draws(len(classes), member[places], generator)
                grid = self.classwise._before(grid, *(part.to(images) for part in drawn))
            if grid is not None:
                images = F.grid_sample(images, grid, align_corners=False)
            return self._erased(images, erasing) if self.erasing else images

    def _moves(self) -> bool:
        return any((self.rotation, self.scale, self.shear, self.shift, self.elastic, self.crop < 1, self.flip))

    def _affine(self, affine: Tensor, crop: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Where a point of the result lies in the image, [B, 2, 3], and the size of the cut, [B, 2]."""
        angle, shear = affine[:, 0] * self.rotation, affine[:, 1] * self.shear
        scale_x, scale_y = 1 + affine[:, 2] * self.scale, 1 + affine[:, 3] * self.scale
        shift_x, shift_y = 2 * affine[:, 4] * self.shift, 2 * affine[:, 5] * self.shift
        cos, sin = angle.cos(), angle.sin()
        along_x = torch.stack([cos / scale_x, (cos * shear - sin) / scale_x, shift_x], 1)
        along_y = torch.stack([sin / scale_y, (sin * shear + cos) / scale_y, shift_y], 1)
        # All of this happens within the cut, read from right to left for a mirror image.
        centre, size = _rectangles(crop, self.crop, 1.0, 4 / 3)
        size = torch.stack([torch.where(flip[:, 0] < self.flip, -size[:, 0], size[:, 0]), size[:, 1]], 1)
        return torch.stack([along_x, along_y], 1) * size[:, :, None] + F.pad(centre[:, :, None], (2, 0)), size

    def _grid(self, shape: torch.Size, affine: Tensor, crop: Tensor, flip: Tensor, nodes: Tensor) -> Tensor:
        """Where each pixel of the result lies in the image: [B, H, W, 2], x and y from -1 to 1."""
        theta, size = self._affine(affine, crop, flip)
        grid = F.affine_grid(theta, list(shape), align_corners=False)
        if self.elastic:
            rows, columns = (_bicubic(length, nodes) for length in shape[2:])
            nodes = nodes * size[:, :, None, None] * self.elastic
            grid = grid + torch.einsum("yi,bcij,xj->byxc", rows, nodes, columns)
        return grid

    def _before(self, grid: Tensor, affine: Tensor, crop: Tensor, flip: Tensor, _erasing: Tensor, nodes: Tensor) -> Tensor:
        """Likewise of points of the result, [B, H, W, 2], that need not be its pixels."""
        theta, size = self._affine(affine, crop, flip)
        moved = torch.einsum("bij,byxj->byxi", theta[:, :, :2], grid) + theta[:, None, None, :, 2]
        if self.elastic:
            nodes = nodes * size[:, :, None, None] * self.elastic
            # The outermost nodes lie on the middle of the outermost pixels.
            grid = grid * grid.new_tensor([side / max(side - 1, 1) for side in (grid.shape[2], grid.shape[1])])
            moved = moved + F.grid_sample(nodes, grid, "bicubic", "border", align_corners=True).permute(0, 2, 3, 1)
        return moved

    def _erased(self, images: Tensor, draw: Tensor) -> Tensor:
        centre, size = _rectangles(draw[:, :4], 0.02, 0.4, 1 / 0.3)
        y, x = ((2 * torch.arange(length, device=images.device) + 1) / length - 1 for length in images.shape[2:])
        within_x = (x - centre[:, :1]).abs() < size[:, :1]
        within_y = (y - centre[:, 1:]).abs() < size[:, 1:]
        covered = within_y[:, :, None] & within_x[:, None, :] & (draw[:, 4] < self.erasing)[:, None, None]
        return images.masked_fill(covered[:, None], 0.0)


class Views:
    """Other views of images, the same moves for each image: what an encoder says of all of them is steadier than of one.

    Args:
        count: how many, besides the image itself.
        augmentation: arguments of `Augment`; `classwise` is left out.

    Raises:
        ValueError: `count` is no whole number above 0; what `Augment` refuses.
    """

    def __init__(self, count: int, **augmentation):
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1000:
            raise ValueError(f"views={count} must be a whole number up to 1000, 0 for none")
        self.count, self.augment = count, Augment(**{**augmentation, "classwise": None})

    def __call__(self, images: Tensor) -> Iterator[Tensor]:
        """uint8 or float [B, C, H, W] -> so many float [B, C, H, W]; what becomes of an image does not depend on the others."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            yield self.augment(images, generator, places=torch.zeros(len(images), dtype=torch.int64), batch=1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _draws(size: int, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    """What is drawn for each of so many, of these rows; always all of it, so that what is turned on or off moves no number of another."""
    draws = [torch.rand(size, 6, generator=generator), torch.rand(size, 10, generator=generator)]
    draws.append(torch.randn(size, 2, _NODES, _NODES, generator=generator))
    affine, others, nodes = (draw[rows] for draw in draws)
    return [affine * 2 - 1, *others.split([4, 1, 5], 1), nodes]


def _rectangles(draw: Tensor, smallest: float, largest: float, ratio: float) -> tuple[Tensor, Tensor]:
    """Rectangles that lie within the image, from uniform numbers [B, 4]: centres (x, y) in -1..1, sizes as shares, both [B, 2].

    The area is uniform, the ratio of the sides log-uniform from 1 / ratio to ratio as far as a rectangle of this area fits.
    """
    area = smallest + (largest - smallest) * draw[:, 0]
    narrow = (2 * draw[:, 1] - 1) * (-area.log()).clamp(max=math.log(ratio))
    size = torch.stack([narrow, -narrow], 1).div(2).exp() * area.sqrt()[:, None]
    return (2 * draw[:, 2:] - 1) * (1 - size), size


def _bicubic(length: int, like: Tensor) -> Tensor:
    """[length, 5]: the weights that enlarge the coarse grid's nodes to this many pixels."""
    weights = F.interpolate(
        torch.eye(_NODES, device=like.device, dtype=like.dtype)[None, None], (length, _NODES), mode="bicubic", align_corners=True
    )
    return weights[0, 0]
