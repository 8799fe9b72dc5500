"""How a file, a text or a row of a table becomes an encoder's input. A reader goes with the trained model, so that what comes later is
read as its training was."""

import io
import math
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike, cpu_count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FITS = ("pad", "crop", "stretch")
EMPTY = ("", "na", "n/a", "nan", "null", "none")  # in a column of numbers, in any case
_SPREAD, _FAINT = 0.38, 32  # of the ink, see `by_moments`; what is fainter is noise of a scanner and has no weight
_LONGEST = 100_000  # letters; what is longer is no text that anybody compares, and to cut it into tokens takes minutes

# What is too large is refused below, in a sentence.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Reader:
    """Turns what a model is given into its inputs. `kind` is what `siamese.data.samples.Samples.kind` calls them."""

    kind = ""

    def read(self, items: list) -> tuple[Tensor, dict[int, str]]:
        """The inputs of all items that can be read, [N, ...] in their order, and {place: why} of those that cannot."""
        raise NotImplementedError


class ImageReader(Reader):
    """Paths, bytes of image files, or `PIL.Image`s -> uint8 [N, channels, size, size], decoded in as many threads as there are processors.

    Args:
        size: height and width, in pixels.
        channels: 3 for colour, 1 for grey.
        fit: an image that is not square is padded with the colour of its border ("pad"), cut to its middle ("crop"), or stretched.
        ink: drawings, ink high on black whatever their ground is; padded, and reduced by area averaging.
        moments: drawings, moved and scaled by their ink instead, see `by_moments`.
    """

    kind = "images"

    def __init__(self, size: int, channels: int = 3, fit: str = "pad", ink: bool = False, moments: bool = False):
        known = isinstance(size, int) and 0 < size <= 4096 and channels in (1, 3) and fit in FITS
        if not known or (ink and channels != 1) or (moments and not ink):
            raise ValueError(f"size={size}, channels={channels}, fit={fit}, ink={ink}, moments={moments} are no way to read images")
        self.size, self.channels, self.fit, self.ink, self.moments = size, channels, fit, bool(ink), bool(moments)

    def read(self, items: list) -> tuple[Tensor, dict[int, str]]:
        one = partial(decode, size=self.size, channels=self.channels, fit=self.fit, ink=self.ink, moments=self.moments)
        if len(items) > 1:
            with ThreadPoolExecutor(cpu_count()) as pool:
                done = list(pool.map(one, items))
        else:
            done = list(map(one, items))
        pixels = [image for image, _ in done if image is not None]
        shape = (len(pixels), self.channels, self.size, self.size)
        inputs = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(shape, dtype=torch.uint8)
        return inputs, {place: told for place, (image, told) in enumerate(done) if image is None}


class TextReader(Reader):
    """Texts -> uint8 [N, L], see `siamese.data.texts.as_bytes`; what is beyond `max_bytes` is cut."""

    kind = "texts"

    def __init__(self, max_bytes: int):
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} is no length of a text")
        self.max_bytes = max_bytes

    def read(self, items: list[str]) -> tuple[Tensor, dict[int, str]]:
        from siamese.data.texts import as_bytes

        failed = {}
        for place, text in enumerate(items):
            if not isinstance(text, str):
                failed[place] = f"it is no text but {type(text).__name__}"
            elif not text.strip():
                failed[place] = "it is empty"
            elif len(text) > _LONGEST:
                failed[place] = f"it has {len(text):,} letters, more than {_LONGEST:,}"
        return as_bytes([text.strip() for place, text in enumerate(items) if place not in failed], self.max_bytes), failed


class RowReader(Reader):
    """Rows of a table, entries by the names of their columns -> float32 [N, columns]. What is missing is empty.

    Args:
        columns: of numbers their mean, which stands for an empty entry; of categories all that there are: an entry becomes a one
            among zeros, another one, or none, zeros alone.
    """

    kind = "rows"

    def __init__(self, columns: dict[str, float | list[str]]):
        good = isinstance(columns, dict) and all(
            isinstance(known, (int, float)) or (isinstance(known, list) and all(isinstance(text, str) for text in known))
            for known in columns.values()
        )
        if not good or not columns:
            raise ValueError("columns must give each column's mean, or its categories")
        self.columns = columns

    def read(self, items: list[dict]) -> tuple[Tensor, dict[int, str]]:
        kept, failed = [], {}
        for place, row in enumerate(items):
            try:
                kept.append(self._numbers(row))
            except ValueError as error:
                failed[place] = str(error)
        width = sum(1 if isinstance(known, (int, float)) else len(known) for known in self.columns.values())
        return torch.tensor(kept, dtype=torch.float32).view(len(kept), width), failed

    def entries(self, row: Tensor) -> str:
        """The entries of a row as it was read, float [columns], in words: `weight 1.5, colour red`."""
        numbers, said = iter(row.tolist()), []
        for name, known in self.columns.items():
            if isinstance(known, (int, float)):
                said.append(f"{name} {next(numbers):.4g}")
            else:
                ones = [next(numbers) for _ in known]
                said.append(f"{name} {known[ones.index(1)] if 1 in ones else 'unknown'}")
        return ", ".join(said)

    def _numbers(self, row: dict) -> list[float]:
        if not isinstance(row, dict):
            raise ValueError("it is no row: a row is its entries by the names of their columns")
        numbers = []
        for name, known in self.columns.items():
            text = "" if row.get(name) is None else str(row[name]).strip()
            if isinstance(known, (int, float)):
                numbers.append(_number(text, name, known))
            else:
                numbers += [float(text == one) for one in known]
        return numbers


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, name: str, mean: float) -> float:
    if text.lower() in EMPTY:
        return mean
    if not is_number(text):
        raise ValueError(f"{name} is a column of numbers in training, but has {text!r}: mend it, or train with dataset.categories=[{name}]")
    return float(text)


def decode(
    file: str | PathLike | bytes | Image.Image, size: int, channels: int, fit: str, ink: bool = False, moments: bool = False
) -> tuple[np.ndarray | None, tuple[int, int] | str]:
    """uint8 [channels, size, size] and the image's own (width, height); or None and why it cannot be read. See `ImageReader`."""
    try:
        with _opened(file) as image:
            whole = image.size
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                return None, f"it has {image.width * image.height:,} pixels, more than {Image.MAX_IMAGE_PIXELS:,}"
            if not ink:
                # A JPEG can be decoded at a half, a quarter, an eighth of its size, which takes so much less time.
                image.draft("RGB" if channels == 3 else "L", (2 * size, 2 * size))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # 16 bits or more: Pillow would cut them off at 255
                image = Image.fromarray(_scaled(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
            if ink:
                return _ink(image, size, moments), whole
            if fit == "pad" and image.width != image.height:
                image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=_border(image))
            elif fit == "crop":
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            else:
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(image).reshape(size, size, channels)
    except FileNotFoundError:
        return None, "there is no such file"
    except UnidentifiedImageError:
        empty = not (file if isinstance(file, bytes) else Path(file).stat().st_size)
        return None, "it is empty" if empty else "it is no image"
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, Image.DecompressionBombError, zlib.error) as error:
        return None, str(error).partition("\n")[0][:100]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), whole


def _opened(file: str | PathLike | bytes | Image.Image) -> Image.Image:
    if isinstance(file, Image.Image):
        return file.copy()  # the caller's own is not to be closed
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def by_area(ink: Tensor, size: int) -> Tensor:
    """Drawings [N, 1, H, W] of 0..255 -> uint8 [N, 1, size, size], each pixel the mean of what it covers."""
    return interpolate(ink.float(), size=(size, size), mode="area").round().to(torch.uint8)


def by_moments(ink: Tensor, size: int) -> Tensor:
    """Drawings, ink high on black, moved and scaled so that all have their ink at the same place, and spread as far.

    Its centre is the image's, and the mean of its variances along both axes that of half an image's side of 1 and a standard deviation of
    0.38, as far as scaling up five times and down to 1 / 1.6 goes (Casey 1970, "Moment normalization of handprinted
    characters", doi:10.1147/rd.145.0548). uint8 or float [N, 1, S, S] of 0..255 -> uint8 [N, 1, size, size].
    """
    values = ink.float()
    if values.shape[-1] > 4 * size:  # else thin strokes would fall between the pixels that are looked at
        values = interpolate(values, size=(4 * size, 4 * size), mode="area")
    dark = values * (values >= _FAINT)
    along_y, along_x = dark.sum((1, 3)), dark.sum((1, 2))
    place = (2 * torch.arange(values.shape[-1]) + 1) / values.shape[-1] - 1
    total = along_x.sum(1).clamp(min=1e-6)
    centre = torch.stack([(side * place).sum(1) / total for side in (along_x, along_y)], 1)
    variance = [
        (side * (place - middle[:, None]) ** 2).sum(1) / total for side, middle in ((along_x, centre[:, 0]), (along_y, centre[:, 1]))
    ]
    scale = (((variance[0] + variance[1]) / 2).sqrt() / _SPREAD).clamp(0.2, 1.6)
    theta = torch.cat([scale[:, None, None] * torch.eye(2), centre[:, :, None]], 2)
    grid = affine_grid(theta, [len(values), 1, 2 * size, 2 * size], align_corners=False)  # twice as fine, and then averaged
    return by_area(grid_sample(values, grid, align_corners=False), size)


def _ink(image: Image.Image, size: int, moments: bool) -> np.ndarray:
    """A grey drawing as uint8 [1, size, size], ink high on black."""
    ground = _border(image)
    if image.width != image.height:
        square = Image.new("L", (max(image.size),) * 2, ground)
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        image = square
    values = torch.from_numpy(np.array(image))[None, None].float()
    # Whatever the ground is, none of it is ink.
    values = (ground - values) * (255 / ground) if ground > 127 else (values - ground) * (255 / (255 - ground))
    values = values.clamp(min=0)
    return (by_moments if moments else by_area)(values, size)[0].numpy()


def _scaled(values: np.ndarray) -> np.ndarray:
    """Grey values of any range to uint8: 16 bits keep their upper eight, others are stretched from their least to their largest."""
    if values.dtype == np.uint16 or (values.min() >= 0 and 255 < values.max() < 2**16):
        return (values / 256).astype(np.uint8)
    values = values.astype(np.float64)
    width = max(float(values.max() - values.min()), 1e-12)
    return ((values - values.min()) / width * 255).astype(np.uint8)


def _border(image: Image.Image) -> tuple[int, ...] | int:
    """The median colour along an image's border."""
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(edge, axis=0).astype(int)
    return tuple(colour.tolist()) if colour.ndim else int(colour)
