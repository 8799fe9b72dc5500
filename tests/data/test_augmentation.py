"""Augmentation: each parameter against torchvision, against loops over pixels, or against the moments of a blob that it moves."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from siamese.data.augmentation import Augment

AFFINE = {"rotation": 11.5, "scale": 0.2, "shear": 0.2, "shift": 0.12}
EVERYTHING = {**AFFINE, "elastic": 0.06, "crop": 0.3, "flip": 0.5, "erasing": 0.5}


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
    assert torch.equal(Augment()(images, generator()), images.float() / 255)


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (4, 3, 20, 28)])
def test_shape_and_range_are_kept(shape):
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator())
    result = Augment(**EVERYTHING)(images, generator())
    assert result.shape == shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1


def test_bytes_and_fractions_agree():
    images = letters()
    assert torch.equal(Augment(**EVERYTHING)(images, generator(3)), Augment(**EVERYTHING)(images.float() / 255, generator(3)))


def test_the_generator_decides_everything():
    images = letters()
    torch.manual_seed(1)
    first = Augment(**EVERYTHING)(images, generator(3))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(Augment(**EVERYTHING)(images, generator(3)), first)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not used"
    assert not torch.equal(Augment(**EVERYTHING)(images, generator(4)), first)
    used = generator(3)
    Augment(**EVERYTHING)(images, used)
    assert not torch.equal(Augment(**EVERYTHING)(images, used), first)


def test_every_item_has_its_own_draw():
    results = Augment(**EVERYTHING)(letters(1).expand(20, -1, -1, -1), generator())
    distances = torch.cdist(results.flatten(1), results.flatten(1)) + torch.eye(20) * 100
    assert distances.min() > 0.1


def test_the_input_is_left_alone():
    images = letters().float() / 255
    before = images.clone()
    Augment(**EVERYTHING)(images, generator())
    assert torch.equal(images, before)


def test_what_comes_in_from_outside_is_black():
    results = Augment(shift=0.25)(torch.ones(200, 1, 32, 32), generator())
    area = results.mean((1, 2, 3))
    assert area.min() < 0.7  # a quarter gone along both axes leaves 9 / 16
    assert area.max() > 0.9


def test_rotation_is_torchvisions():
    limit, image = 20, blob(spread=(6, 2)) + blob(spread=(2, 2)).roll(6, 1)
    results = Augment(rotation=limit)(image.expand(150, -1, -1, -1), generator())
    angles = torch.arange(-limit - 3, limit + 3.5, 0.5)
    turned = torch.stack([affine(image, float(a), [0, 0], 1.0, [0.0], InterpolationMode.BILINEAR) for a in angles])
    errors = (results[:, None] - turned[None]).abs().amax((2, 3, 4))
    assert errors.min(1).values.max() < 0.04, "every result is a turn of the image"
    reaches(angles[errors.argmin(1)], limit)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_shift_is_a_share_of_the_image(height, width):
    results = Augment(shift=0.1)(blob(height, width, (1.5, 1.5)).expand(200, -1, -1, -1), generator())
    x, y, *_ = moments(results)
    reaches(x, 0.1 * width)
    reaches(y, 0.1 * height)
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.3, "both axes by themselves"


def test_scale_is_a_share_of_the_size():
    image = blob()
    results = Augment(scale=0.2)(image.expand(200, -1, -1, -1), generator())
    x, y, variance_x, variance_y, covariance = moments(results)
    _, _, before_x, before_y, _ = moments(image[None])
    factors = [(variance_x / before_x).sqrt() - 1, (variance_y / before_y).sqrt() - 1]
    for factor in factors:
        reaches(factor, 0.2)
    assert torch.corrcoef(torch.stack(factors))[0, 1].abs() < 0.3
    assert max(x.abs().max(), y.abs().max(), covariance.abs().max()) < 1e-2, "nothing else happens"


def test_shear_is_a_tangent():
    results = Augment(shear=0.3)(blob().expand(200, -1, -1, -1), generator())
    x, y, _, variance_y, covariance = moments(results)
    reaches(covariance / variance_y, 0.3)  # x grows by so much for each pixel of y
    assert max(x.abs().max(), y.abs().max()) < 1e-2
    assert variance_y == pytest.approx(moments(blob()[None])[3].item(), rel=0.02), "rows stay where they are"


def pixel(image: Tensor, row: float, column: float) -> float:
    """Bilinear between the four pixels around a place, black outside."""
    height, width = image.shape
    value, top, left = 0.0, math.floor(row), math.floor(column)
    for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= r < height and 0 <= c < width:
            value += image[r, c].item() * (1 - abs(row - r)) * (1 - abs(column - c))
    return value


def moved(image: Tensor, draw: list[float], rotation: float, scale: float, shear: float, shift: float) -> Tensor:
    """An image of one channel, pixel by pixel: where does each come from?"""
    (height, width), result = image.shape, torch.zeros_like(image)
    turn, slant, grow_x, grow_y, by_x, by_y = (2 * number - 1 for number in draw)
    angle = math.radians(rotation) * turn
    for row in range(height):
        for column in range(width):
            x, y = 2 * (column + 0.5) / width - 1, 2 * (row + 0.5) / height - 1
            x += slant * shear * y
            x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
            x, y = x / (1 + grow_x * scale) + 2 * by_x * shift, y / (1 + grow_y * scale) + 2 * by_y * shift
            result[row, column] = pixel(image, (y + 1) / 2 * height - 0.5, (x + 1) / 2 * width - 0.5)
    return result


@pytest.mark.parametrize("size", [(32, 32), (12, 20)])
def test_affine_is_what_a_loop_over_pixels_gives(size):
    images = torch.rand(5, 1, *size, generator=generator(8))
    draws = torch.rand(5, 6, generator=generator(2)).tolist()
    expected = torch.stack([moved(image[0], draw, **AFFINE) for image, draw in zip(images, draws, strict=True)])
    assert (Augment(**AFFINE)(images, generator(2))[:, 0] - expected).abs().max() < 1e-4


def test_the_grid_keeps_its_precision_in_a_run_of_reduced_precision():
    images = torch.rand(3, 1, 105, 105, generator=generator(8))
    with torch.autocast("cpu", torch.bfloat16):
        reduced = Augment(**EVERYTHING)(images, generator(1))
    assert torch.equal(reduced, Augment(**EVERYTHING)(images, generator(1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_changes_nothing():
    images = letters(16)
    here, there = (Augment(**EVERYTHING)(images.to(device), generator(3)).cpu() for device in ("cpu", "cuda"))
    assert (here - there).abs().max() < 1e-3


def test_elastic_moves_every_node_by_its_own_draw():
    """A picture of its own coordinates shows where each pixel came from."""
    size, strength, count = 65, 0.05, 300
    at = (2 * torch.arange(size) + 1) / size - 1
    ramps = torch.stack(torch.meshgrid(at, at, indexing="xy")).expand(count, -1, -1, -1)  # x and y, as two channels
    displaced = Augment(elastic=strength)(ramps, generator()) - ramps
    nodes = displaced[:, :, 16:-1:16, 16:-1:16]  # the inner ones: at the border, black comes in
    assert nodes.shape[2:] == (3, 3)
    torch.rand(count, 16, generator=(same := generator()))
    drawn = torch.randn(count, 2, 5, 5, generator=same)[:, :, 1:4, 1:4] * strength
    assert (nodes - drawn).abs().max() < 1e-4
    assert nodes.std() == pytest.approx(strength, rel=0.05)
    flat = nodes.flatten(1) - nodes.flatten(1).mean(0)
    assert torch.corrcoef(flat.T).fill_diagonal_(0).abs().max() < 0.25, "no node, and no axis, follows another"


def test_elastic_is_smooth():
    size, at = 64, (2 * torch.arange(64) + 1) / 64 - 1
    ramps = torch.stack(torch.meshgrid(at, at, indexing="xy")).expand(100, -1, -1, -1)
    displaced = (Augment(elastic=0.02)(ramps, generator()) - ramps)[:, :, 6:-6, 6:-6]
    pixels = displaced * size / 2
    assert pixels.abs().mean() > 0.3, "it is there"
    assert pixels.diff(dim=3).abs().max() < 0.35 * pixels.abs().max(), "neighbours go the same way"
    assert pixels.diff(n=2, dim=3).abs().max() < 0.1 * pixels.abs().max(), "without a crease"


def corners(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of pictures of their own coordinates in -1..1, cut out and enlarged: left, right, top and bottom of the cut."""
    x, y = images[:, 0], images[:, 1]
    half = (x[:, 16, 40] - x[:, 16, 20]) / 20 / 2, (y[:, 40, 16] - y[:, 20, 16]) / 20 / 2  # half a pixel of the result
    left, top = x[:, 30, 30] - half[0] * 61, y[:, 30, 30] - half[1] * 61
    return left, left + half[0] * 128, top, top + half[1] * 128


def coordinates(count: int) -> Tensor:
    at = (2 * torch.arange(64) + 1) / 64 - 1
    return torch.stack(torch.meshgrid(at, at, indexing="xy")).expand(count, -1, -1, -1)


def test_a_crop_lies_within_the_image_and_has_the_area_and_the_ratio_asked_for():
    left, right, top, bottom = corners(Augment(crop=0.2)(coordinates(2_000), generator()))
    for low, high in ((left, right), (top, bottom)):
        assert low.min() > -1 - 1e-3
        assert high.max() < 1 + 1e-3
    width, height = (right - left) / 2, (bottom - top) / 2
    area, ratio = width * height, width / height
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.max() == pytest.approx(1, abs=0.01)
    assert area.mean() == pytest.approx(0.6, abs=0.02), "uniform"
    assert area.std() == pytest.approx(0.8 / 12**0.5, abs=0.02)
    assert ratio.min() == pytest.approx(3 / 4, abs=0.01)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.01)
    assert ratio.log().mean().abs() < 0.02
    small = area < 0.4
    for low, share in ((left, width), (top, height)):
        place = ((low + 1) / 2 / (1 - share))[small]
        assert place.min() < 0.02
        assert place.max() > 0.98
        assert place.mean() == pytest.approx(0.5, abs=0.05)


def test_the_whole_image_is_a_crop_too():
    images = letters()
    assert (Augment(crop=1.0)(images, generator()) - images / 255).abs().max() < 1e-5


def test_crop_and_affine_are_the_affine_of_the_cut():
    image = coordinates(40)
    both = Augment(rotation=20, crop=0.3)(image, generator(5))
    left, right, top, bottom = (side[:, None, None] for side in corners(Augment(crop=0.3)(image, generator(5))))
    turned = Augment(rotation=20)(image, generator(5))
    x, y = left + (turned[:, 0] + 1) / 2 * (right - left), top + (turned[:, 1] + 1) / 2 * (bottom - top)
    middle = (..., slice(16, 48), slice(16, 48))  # what does not come from outside
    assert (both[:, 0] - x)[middle].abs().max() < 2e-3
    assert (both[:, 1] - y)[middle].abs().max() < 2e-3


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_a_flip_is_a_mirror_image_of_so_many(probability):
    images = letters(400)
    results, plain = Augment(flip=probability)(images, generator()), images / 255
    same, mirrored = ((results - other).abs().amax((1, 2, 3)) < 1e-4 for other in (plain, plain.flip(3)))
    assert (same ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(probability, abs=0.07)


def test_what_is_mirrored_is_then_moved_as_any_other():
    images, rest = letters(40), {**AFFINE, "elastic": 0.05}
    mirrored = Augment(**rest)(images.flip(3), generator())
    assert (Augment(**rest, flip=1)(images, generator()) - mirrored).abs().max() < 1e-4
    cut = Augment(crop=0.3)(coordinates(40), generator())
    assert (Augment(crop=0.3, flip=1)(coordinates(40), generator()) - cut.flip(3)).abs().max() < 1e-3, "of the same cut"


def test_erasing_covers_one_rectangle_of_so_many_images():
    results = Augment(erasing=0.5)(torch.ones(2_000, 2, 40, 60), generator())
    assert set(results.unique().tolist()) == {0, 1}
    assert torch.equal(results[:, 0], results[:, 1]), "of all channels"
    black = results[:, 0] == 0
    hit = black.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.5, abs=0.05)
    black = black[hit]
    rows, columns = black.any(2).float(), black.any(1).float()
    assert torch.equal(black.float(), rows[:, :, None] * columns[:, None, :]), "rows times columns"
    for line in (rows, columns):
        edges = torch.nn.functional.pad(line, (1, 1)).diff(dim=1)
        assert (edges == 1).sum(1).eq(1).all(), "in one piece"
    height, width = rows.mean(1), columns.mean(1)
    area, ratio = height * width, width / height
    assert area.min() > 0.01
    assert area.max() < 0.45
    assert area.mean() == pytest.approx(0.21, abs=0.02)
    assert 0.3 * 0.8 < ratio.min() < 0.4
    assert 2.5 < ratio.max() < 1.25 / 0.3
    where = black.float().mean(0)
    assert where[:, :30].sum() == pytest.approx(where[:, 30:].sum().item(), rel=0.1), "anywhere"


@pytest.mark.parametrize("key", EVERYTHING)
def test_every_value_does_something(key):
    images, off = letters(40), {"crop": None}.get(key, 0)
    assert not torch.equal(Augment(**EVERYTHING)(images, generator()), Augment(**{**EVERYTHING, key: off})(images, generator()))


def test_what_is_turned_on_moves_no_number_of_another():
    images = letters(60)
    without = Augment(**{**EVERYTHING, "erasing": 0})(images, generator())
    covered = Augment(**EVERYTHING)(images, generator())
    assert torch.equal(covered[covered > 0], without[covered > 0]), "but for the rectangles all is as it was"
    assert not torch.equal(covered, without)
    rectangles = Augment(erasing=0.5)(torch.ones(60, 1, 32, 32), generator())
    assert torch.equal(covered == 0, (rectangles == 0) | (without == 0)), "and the rectangles too"
    used, fresh = generator(), generator()
    Augment()(images, used)
    Augment(**EVERYTHING)(images, fresh)
    assert torch.equal(used.get_state(), fresh.get_state())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, -0.1) for key in EVERYTHING),
        *((key, float("nan")) for key in EVERYTHING),
        *(("rotation", 181), ("scale", 1), ("shear", 1.1), ("shift", 1.1), ("elastic", 1.1), ("flip", 1.1), ("erasing", 1.1)),
        *(("crop", 0), ("crop", 1.1)),
    ],
)
def test_a_value_out_of_range_is_named(key, value):
    with pytest.raises(ValueError, match=rf"augmentation\.{key}={value} must lie"):
        Augment(**{key: value})


def test_inputs_that_are_no_images_are_named():
    with pytest.raises(ValueError, match=r"\[7, 20\]: say augmentation=none"):
        Augment(rotation=5)(torch.zeros(7, 20), generator())


# --- what is drawn once for each class

WARP = {**AFFINE, "rotation": 180.0, "elastic": 0.06, "crop": 0.5, "flip": 0.5}


def test_samples_of_a_class_are_moved_alike_and_classes_apart():
    images = blob(spread=(2.0, 5.0)).expand(12, 1, 32, 32)
    labels = torch.tensor([7, 7, 3, 3, 7, 3, 9, 9, 9, 3, 7, 9])
    moved = Augment(classwise=WARP)(images, generator(), labels=labels)
    for label in (3, 7, 9):
        of = moved[labels == label]
        assert torch.equal(of, of[:1].expand_as(of))
        assert (of[0] - moved[labels != label]).abs().amax((1, 2, 3)).min() > 0.05


def test_one_sample_a_class_is_moved_as_any_sample_is():
    images = letters(40)
    other = generator(1)
    Augment()(images, other)  # what is drawn for the samples comes first
    expected = Augment(**WARP)(images, other)
    torch.testing.assert_close(Augment(classwise=WARP)(images, generator(1), labels=torch.arange(40)), expected, atol=2e-3, rtol=0)


def test_a_class_is_moved_before_its_samples_are():
    """Twice sampled and once sampled agree on what has no sharp edges; the other way around they do not."""
    images, labels = blob(64, 64, spread=(5.0, 9.0)).expand(32, 1, 64, 64), torch.arange(32)
    first, then = {"rotation": 90.0, "shear": 0.5, "elastic": 0.05}, {"rotation": 40.0, "scale": 0.4, "shift": 0.1}
    once = Augment(**then, classwise=first)(images, generator(2), labels=labels)
    alone = Augment(classwise=first)(images, generator(2), labels=labels)
    twice, reversed_ = (
        Augment(**then)(alone, generator(2)),
        Augment(classwise=first)(Augment(**then)(images, generator(2)), generator(2), labels=labels),
    )
    assert (once - twice).abs().mean() < 0.005
    assert (once - reversed_).abs().mean() > 0.02


def test_a_part_of_a_batch_is_moved_as_within_the_whole_by_class_too():
    images, labels = letters(8), torch.arange(4).repeat_interleave(2)
    whole = Augment(**EVERYTHING, classwise=WARP)(images, generator(), labels=labels)
    places = torch.tensor([1, 3, 6])
    part = Augment(**EVERYTHING, classwise=WARP)(images[places], generator(), places, 8, labels=labels)
    torch.testing.assert_close(part, whole[places])


def test_what_classwise_refuses():
    with pytest.raises(ValueError, match=r"augmentation.classwise.erasing is not known: take some of rotation, .*flip, crop"):
        Augment(classwise={"erasing": 0.5})
    with pytest.raises(ValueError, match=r"augmentation.classwise.turn is not known"):
        Augment(classwise={"turn": 0.5})
    for wrong in (5, ["rotation"], "rotation"):
        with pytest.raises(ValueError, match=r"augmentation.classwise=.* must give values by their names"):
            Augment(classwise=wrong)
    for values in ({"rotation": 400}, {"rotation": "abc"}, {"rotation": None}, {"crop": 2}):
        with pytest.raises(ValueError, match=r"^augmentation\.classwise\.\w+="):
            Augment(classwise=values)
    assert (
        Augment(classwise={"elastic": 0.1})(letters()[:, :, :1, :1], generator(), labels=torch.zeros(6, dtype=torch.int64)).isfinite().all()
    )
    for labels in (None, torch.tensor([0, -1, 0, 0, 0, 0])):
        with pytest.raises(ValueError, match="goes by labels"):
            Augment(classwise={"rotation": 5})(letters(), generator(), labels=labels)
