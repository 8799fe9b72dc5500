"""Augmentation of whole batches on the training device, every item with parameters of its own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Affine:
    """Rotate, scale, shear and shift each image by its own draw; what comes in from outside is black.

    uint8 or 0..1 float [B, C, H, W] -> float [B, C, H, W] in 0..1.

    Args:
        rotation: at most this many degrees either way.
        scale: at most this share larger or smaller, for each axis.
        shear: at most this, as a tangent.
        shift: at most this share of the image, for each axis.
    """

    def __init__(self, rotation: float = 11.5, scale: float = 0.2, shear: float = 0.2, shift: float = 0.12):
        self.rotation, self.scale, self.shear, self.shift = math.radians(rotation), scale, shear, shift

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The generator, on the CPU, decides everything: equal states give equal images on any device."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        draw = torch.rand(len(images), 6, generator=generator).to(images.device) * 2 - 1
        angle, shear = draw[:, 0] * self.rotation, draw[:, 1] * self.shear
        scale_x, scale_y = 1 + draw[:, 2] * self.scale, 1 + draw[:, 3] * self.scale
        shift_x, shift_y = 2 * draw[:, 4] * self.shift, 2 * draw[:, 5] * self.shift  # the grid runs from -1 to 1
        cos, sin = angle.cos(), angle.sin()
        rows = [cos / scale_x, (cos * shear - sin) / scale_x, shift_x, sin / scale_y, (sin * shear + cos) / scale_y, shift_y]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
