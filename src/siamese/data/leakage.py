"""What training has already seen: samples of another split that are the same, or nearly, as one of training.

Exact duplicates are found by a hash of the input. Near-duplicates of images (re-encoded, resized, brightened, shifted by a pixel) in
two steps: candidates by locality-sensitive hashing of a small, blurred copy (Charikar 2002, "Similarity estimation techniques from
rounding algorithms"), in time that grows little faster than the number of images; then their pixels decide, at the best shift
by up to a pixel, brightness and contrast made equal: they must correlate, and no small window may differ by much. Near-duplicates of
texts: see `siamese.data.text_leakage`.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, affine_grid, avg_pool2d, grid_sample, interpolate, normalize, pad

from siamese.data.text_leakage import near_texts

_SMALL, _SIDES = 16, (64, 32)  # sides of the copies that are hashed, and at most of those that are compared
_BANDS, _BITS = 32, 16  # of the hash: two images are candidates when all bits of one band are equal
_LOOSE, _ALIKE = 0.8, 0.9  # correlations: of the small copies, and of the pixels
_WINDOWS, _APART = 10, 0.15  # in no window of a tenth of the side may the means differ by more of the image's range than this
_CHUNK = 2048


class Duplicates(NamedTuple):
    """Pairs of samples: left, right int64 [P], rows; alike float32 [P], 1 for equal inputs, else less.

    It is the correlation of the pixels of images, the Jaccard similarity of the shingles of texts.
    """

    left: Tensor
    right: Tensor
    alike: Tensor


def duplicates(left: Tensor, right: Tensor | None = None) -> Duplicates:
    """Find samples of `right` that are, or nearly are, one of `left`; without `right`, within `left` (each pair once, left < right).

    Args:
        left, right: images [N, C, H, W], uint8 or float, of one shape; or texts, uint8 [N, L], UTF-8 padded with zeros to any L; other
            inputs are compared for equality alone.
    """
    within = right is None
    right = left if within else right
    if texts := left.dim() == right.dim() == 2 and left.dtype == right.dtype == torch.uint8:
        length = max(left.shape[1], right.shape[1])  # each split is as long as its longest text
        left, right = (pad(side, (0, length - side.shape[1])) for side in (left, right))
    exact = equal(left, None if within else right)
    near = np.empty((0, 3))
    if texts:
        near = near_texts(left, None if within else right)
    elif left.dim() == 4 and min(left.shape[2:]) > 2 and len(left) and len(right):
        near = _near(left, right, within)
    known = set(map(tuple, exact.tolist()))
    found = [(*pair, 1.0) for pair in known] + [row for row in near.tolist() if (row[0], row[1]) not in known]
    found.sort(key=lambda row: (-row[2], row[1], row[0]))
    left, right, alike = zip(*found, strict=True) if found else ((), (), ())
    return Duplicates(torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64), torch.tensor(alike))


def equal(left: Tensor, right: Tensor | None = None) -> np.ndarray:
    """int64 [P, 2], rows of the same bytes: those of `right` with the first such of `left`, and the others of `left` with the first such
    of `right`; without it, within `left`, the first with the others."""
    rows: dict[bytes, list[int]] = {}
    for row, digest in enumerate(_digests(left)):
        rows.setdefault(digest, []).append(row)
    if right is None:
        found = [(first, row) for first, *others in rows.values() for row in others]
        return np.array(sorted(found, key=lambda pair: pair[1]), dtype=np.int64).reshape(-1, 2)
    found = []
    for row, digest in enumerate(_digests(right)):
        if digest in rows:
            found += [(other, row) for other in rows[digest]]
            rows[digest] = rows[digest][:1]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _digests(inputs: Tensor):
    for block in inputs.split(_CHUNK):
        for one in block.contiguous().numpy():
            yield hashlib.blake2b(one.data, digest_size=16).digest()


def _near(left: Tensor, right: Tensor, within: bool) -> np.ndarray:
    sides = [_small(left)] if within else [_small(left), _small(right)]
    centre = sides[0].mean(0)  # what all images share tells none of them apart
    sides = [normalize(side - centre) for side in sides]
    planes = torch.randn(_SMALL**2, _BANDS * _BITS, generator=torch.Generator().manual_seed(0))
    codes = [_codes(side, planes) for side in sides]
    seen: list[np.ndarray] = []
    for band in range(_BANDS):
        pair = _in_one_bucket(codes[0][:, band], codes[-1][:, band], within)
        far = np.zeros(len(pair), dtype=np.int32)
        for start in range(0, len(pair), 2**20):
            some = pair[start : start + 2**20]
            far[start : start + 2**20] = np.bitwise_count(codes[0][some[:, 0]] ^ codes[-1][some[:, 1]]).sum(1)
        seen.append(pair[far <= np.arccos(_LOOSE) / np.pi * _BANDS * _BITS])
    pairs = np.unique(np.concatenate(seen), axis=0)
    chunks = np.array_split(pairs, len(pairs) // _CHUNK + 1)
    alike = [(sides[0][one] * sides[-1][other]).sum(1).numpy() for one, other in (chunk.T for chunk in chunks)]
    pairs = pairs[np.concatenate(alike) >= _LOOSE]
    found = [_compared(left, right, pairs[start : start + _CHUNK]) for start in range(0, len(pairs), _CHUNK)]
    return np.concatenate([np.empty((0, 3)), *found])


def _grey(images: Tensor) -> Tensor:
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images.mean(1, keepdim=True)


def _unit(images: Tensor) -> Tensor:
    """[N, 1, H, W] -> [N, H * W] of mean 0 and length 1, 0 for an image of one colour: neither brightness nor contrast is left."""
    flat = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-3)


def _small(images: Tensor) -> Tensor:
    """[N, C, H, W] -> unit [N, _SMALL * _SMALL]: small copies, moved so that what stands out from their mean has its centre in theirs."""
    copies = []
    for block in images.split(_CHUNK):
        grey = adaptive_avg_pool2d(_grey(block), 2 * _SMALL)
        weight = (grey - grey.mean((1, 2, 3), keepdim=True)).square()
        weight = weight / weight.sum((1, 2, 3), keepdim=True).clamp(min=1e-6)
        place = (torch.arange(2 * _SMALL) + 0.5) / _SMALL - 1
        centre = torch.stack([(weight.sum(2)[:, 0] * place).sum(1), (weight.sum(3)[:, 0] * place).sum(1)], 1)
        grid = affine_grid(torch.cat([torch.eye(2).expand(len(grey), 2, 2), centre[..., None]], 2), list(grey.shape), align_corners=False)
        copies.append(_unit(adaptive_avg_pool2d(grid_sample(grey, grid, padding_mode="border", align_corners=False), _SMALL)))
    return torch.cat(copies)


def _codes(units: Tensor, planes: Tensor) -> np.ndarray:
    """uint16 [N, _BANDS]: on which side of each plane a sample lies."""
    weights = 2 ** torch.arange(_BITS)
    parts = [((block @ planes > 0).view(-1, _BANDS, _BITS) * weights).sum(2).numpy().astype(np.uint16) for block in units.split(_CHUNK)]
    return np.concatenate(parts)


def _in_one_bucket(left: np.ndarray, right: np.ndarray, within: bool) -> np.ndarray:
    """int64 [P, 2]: rows of equal codes."""
    order = left.argsort(kind="stable")
    code = left[order]
    first, last = np.searchsorted(code, right, "left"), np.searchsorted(code, right, "right")
    count = last - first
    start = np.repeat(first - (count.cumsum() - count), count)
    pair = np.stack([order[start + np.arange(count.sum())], np.repeat(np.arange(len(right)), count)], 1)
    return pair[pair[:, 0] < pair[:, 1]] if within else pair


def _compared(left: Tensor, right: Tensor, pairs: np.ndarray) -> np.ndarray:
    """Rows (left, right, correlation) of the pairs that are alike, at one size or the other."""
    images = [_grey(side[torch.from_numpy(rows)]) for side, rows in ((left, pairs[:, 0]), (right, pairs[:, 1]))]
    side = max(images[0].shape[2:])
    scales = {min(one / side, 1.0) for one in _SIDES}
    found = [_alike(*(interpolate(image, scale_factor=scale, mode="area") if scale < 1 else image for image in images)) for scale in scales]
    best = torch.stack(found).amax(0).clamp(max=0.9999).numpy()  # 1 says that the bytes are equal
    return np.column_stack([pairs, best])[best >= _ALIKE]


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """[N, 1, H, W] -> [N] correlations at the best shift, by half pixels where whole ones do not do; 0 where some small window differs."""
    found = _at_best(one, other, (0, 1, 2))
    undecided = ((found[0] >= _LOOSE) & ((found[0] < _ALIKE) | ~(found[1] <= _APART))).nonzero().flatten()
    if len(undecided):
        again = _at_best(one[undecided], other[undecided], (0, 0.5, 1, 1.5, 2))
        for before, after in zip(found, again, strict=True):
            before[undecided] = after
    return torch.where(found[1] <= _APART, found[0], 0.0)


def _at_best(one: Tensor, other: Tensor, shifts: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The correlation at the best of these shifts down and right, 1 being none; and there how far the means of a small window differ."""
    height, width = one.shape[2:]
    inner = one[..., 1 : height - 1, 1 : width - 1]
    unit, best, at_best = _unit(inner), torch.full((len(one),), -2.0), torch.empty_like(inner)
    for y in shifts:
        rows = other if y % 1 == 0 else (other[..., 1:, :] + other[..., :-1, :]) / 2
        rows = rows[..., int(y) : int(y) + height - 2, :]
        for x in shifts:
            shifted = rows if x % 1 == 0 else (rows[..., 1:] + rows[..., :-1]) / 2
            shifted = shifted[..., int(x) : int(x) + width - 2]
            alike = (unit * _unit(shifted)).sum(1)
            better = alike > best
            best, at_best[better] = torch.where(better, alike, best), shifted[better]
    # Letters that differ by a hook correlate as much as a drawing with itself, shifted by half a pixel: but they differ in one place.
    one, other = (_even(images) for images in (inner, at_best))
    window = max(round(max(height, width) / _WINDOWS), 2)
    apart = avg_pool2d(one - other, window, stride=1).abs().flatten(1).amax(1)
    return best, apart / (one.flatten(1).amax(1) - one.flatten(1).amin(1))


def _even(images: Tensor) -> Tensor:
    """Of mean 0 and standard deviation 1, but for what hardly differs from one colour."""
    flat = images.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=0.02)).view_as(images)
