"""Augmentation: each parameter against torchvision, or against the moments of a blob that it moves."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from siamese.data.augmentation import Affine

NOTHING = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(height: int = 32, width: int = 32, spread: tuple[float, float] = (3.0, 3.0)) -> Tensor:
    """A Gaussian in the middle, float [1, H, W]."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return torch.exp(-((x / spread[0]) ** 2 + (y / spread[1]) ** 2) / 2)[None]


def moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each image: centre x and y, variance in x and y, covariance, in pixels."""
    weight = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    y, x = (torch.arange(n) - (n - 1) / 2 for n in images.shape[2:])
    centre_x, centre_y = (weight.sum(1) * x).sum(1), (weight.sum(2) * y).sum(1)
    dx, dy = x - centre_x[:, None], y - centre_y[:, None]
    covariance = (weight * dy[:, :, None] * dx[:, None, :]).sum((1, 2))
    return centre_x, centre_y, (weight.sum(1) * dx**2).sum(1), (weight.sum(2) * dy**2).sum(1), covariance


def letters(count: int = 6, channels: int = 1) -> Tensor:
    """uint8 images of random strokes."""
    images = torch.zeros(count, channels, 32, 32, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = torch.randint(256, (count, channels, 16, 16), dtype=torch.uint8, generator=generator(9))
    return images


def reaches(values: Tensor, limit: float) -> None:
    """The values fill the range from -limit to limit, and stay in it but for the error of measuring."""
    assert values.abs().max() < 1.06 * limit
    assert values.max() > 0.85 * limit
    assert values.min() < -0.85 * limit
    assert values.mean().abs() < 0.2 * limit


@pytest.mark.parametrize("channels", [1, 3])
def test_without_parameters_an_image_stays_as_it_is(channels):
    images = letters(channels=channels)
    assert (Affine(**NOTHING)(images, generator()) - images.float() / 255).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (4, 3, 20, 28)])
def test_shape_and_range_are_kept(shape):
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator())
    result = Affine()(images, generator())
    assert result.shape == shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1


def test_bytes_and_fractions_agree():
    images = letters()
    assert torch.equal(Affine()(images, generator(3)), Affine()(images.float() / 255, generator(3)))


def test_the_generator_decides_everything():
    images = letters()
    torch.manual_seed(1)
    first = Affine()(images, generator(3))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(Affine()(images, generator(3)), first)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not used"
    assert not torch.equal(Affine()(images, generator(4)), first)
    used = generator(3)
    Affine()(images, used)
    assert not torch.equal(Affine()(images, used), first)


def test_every_item_has_its_own_draw():
    results = Affine()(letters(1).expand(20, -1, -1, -1), generator())
    distances = torch.cdist(results.flatten(1), results.flatten(1)) + torch.eye(20) * 100
    assert distances.min() > 0.1


def test_the_input_is_left_alone():
    images = letters().float() / 255
    before = images.clone()
    Affine()(images, generator())
    assert torch.equal(images, before)


def test_what_comes_in_from_outside_is_black():
    results = Affine(**{**NOTHING, "shift": 0.25})(torch.ones(200, 1, 32, 32), generator())
    area = results.mean((1, 2, 3))
    assert area.min() < 0.7  # a quarter gone along both axes leaves 9 / 16
    assert area.max() > 0.9


def test_rotation_is_torchvisions():
    limit, image = 20, blob(spread=(6, 2)) + blob(spread=(2, 2)).roll(6, 1)
    results = Affine(**{**NOTHING, "rotation": limit})(image.expand(150, -1, -1, -1), generator())
    angles = torch.arange(-limit - 3, limit + 3.5, 0.5)
    turned = torch.stack([affine(image, float(a), [0, 0], 1.0, [0.0], InterpolationMode.BILINEAR) for a in angles])
    errors = (results[:, None] - turned[None]).abs().amax((2, 3, 4))
    assert errors.min(1).values.max() < 0.04, "every result is a turn of the image"
    reaches(angles[errors.argmin(1)], limit)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_shift_is_a_share_of_the_image(height, width):
    results = Affine(**{**NOTHING, "shift": 0.1})(blob(height, width, (1.5, 1.5)).expand(200, -1, -1, -1), generator())
    x, y, *_ = moments(results)
    reaches(x, 0.1 * width)
    reaches(y, 0.1 * height)
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.3, "both axes by themselves"


def test_scale_is_a_share_of_the_size():
    image = blob()
    results = Affine(**{**NOTHING, "scale": 0.2})(image.expand(200, -1, -1, -1), generator())
    x, y, variance_x, variance_y, covariance = moments(results)
    _, _, before_x, before_y, _ = moments(image[None])
    factors = [(variance_x / before_x).sqrt() - 1, (variance_y / before_y).sqrt() - 1]
    for factor in factors:
        reaches(factor, 0.2)
    assert torch.corrcoef(torch.stack(factors))[0, 1].abs() < 0.3
    assert max(x.abs().max(), y.abs().max(), covariance.abs().max()) < 1e-2, "nothing else happens"


def test_shear_is_a_tangent():
    results = Affine(**{**NOTHING, "shear": 0.3})(blob().expand(200, -1, -1, -1), generator())
    x, y, _, variance_y, covariance = moments(results)
    reaches(covariance / variance_y, 0.3)  # x grows by so much for each pixel of y
    assert max(x.abs().max(), y.abs().max()) < 1e-2
    assert variance_y == pytest.approx(moments(blob()[None])[3].item(), rel=0.02), "rows stay where they are"
