"""From the bytes of a PNG to the patches a model reads: no resizing, no guessing, and no bomb.

An image is cut into squares, row by row; each square is one vector (row, column, channel) in [-1, 1].
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..errors import HavocError
from .picture import open_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from .config import VisionConfig

MAX_IMAGE_BYTES = 1 << 24
MAX_IMAGE_PIXELS = 1 << 24


def patchify(png_bytes: bytes, vision: VisionConfig) -> NDArray[np.float32]:
    """Cut a PNG into patches: float32 [num_patches, patch_size**2 * num_channels] in [-1, 1], row-major.

    A broken, huge or ill-sized image is a `HavocError`; it is turned upright and converted as `open_picture` does.
    """
    with _opened(png_bytes) as image:
        _require_size(image, vision)
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise HavocError(f"image: the PNG is damaged ({error})") from error
        upright = open_picture(image, max_pixels=MAX_IMAGE_PIXELS)
    pixels = np.asarray(upright.convert("L") if vision.num_channels == 1 else upright, dtype=np.float32)
    height, width, size = upright.height, upright.width, vision.patch_size
    grid = (pixels / 127.5 - 1.0).reshape(height // size, size, width // size, size, vision.num_channels)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(-1, vision.patch_dim)


def num_patches(width: int, height: int, vision: VisionConfig) -> int:
    """Tokens an image of this size takes."""
    return (width // vision.patch_size) * (height // vision.patch_size)


def _opened(png_bytes: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    if len(png_bytes) > MAX_IMAGE_BYTES:
        raise HavocError(f"image: {len(png_bytes)} bytes; HAVOC reads at most {MAX_IMAGE_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(png_bytes), formats=("PNG",))
    except Image.DecompressionBombError as error:
        raise HavocError(f"image: more than {MAX_IMAGE_PIXELS} pixels") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise HavocError("image: not a PNG file") from error
    return image


def _require_size(image: Image, vision: VisionConfig) -> None:
    width, height, size = image.width, image.height, vision.patch_size
    if width * height > MAX_IMAGE_PIXELS:
        raise HavocError(f"image: {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} in all are decoded")
    if width % size or height % size:
        raise HavocError(
            f"image: {width} x {height} pixels is not a multiple of the patch size {size}; resize or pad it first"
        )
