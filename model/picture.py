"""Open a picture as people store it and give back 8-bit RGB: turned upright, its range kept, nothing guessed.

A camera's orientation tag is applied. Grey pictures of 16 bits are scaled from 0 ... 65535, of 32 bits and of floats
from the range they hold (0 ... 1 and 0 ... 255 are taken as such), because a plain conversion would clip them to white
or black. A picture that has only one colour afterwards although it had more is refused: a model would see nothing.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from ..errors import HavocError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def open_picture(data: bytes | Image, *, formats: tuple[str, ...] | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode a picture to upright RGB; `formats` are those that Pillow may try, by default all.

    Broken bytes, more than `max_pixels` pixels, values that are not finite, and a picture that would lose its whole
    content are a `HavocError`. An animation gives its first frame; transparency is dropped.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are checked below, and of damaged tags
            image = _opened(data, formats) if isinstance(data, bytes) else data
            if image.width * image.height > max_pixels:
                raise HavocError(f"a picture of {image.width} x {image.height} pixels is larger than {max_pixels}")
            upright = ImageOps.exif_transpose(image)
            seen = _scaled(upright) if upright.mode in _WIDE_MODES else upright.convert("RGB")
            if _is_constant(seen) and not _is_constant(upright):
                raise HavocError(
                    f"a picture of mode {upright.mode} becomes a single colour when it is converted to RGB"
                )
    except Image.DecompressionBombError as error:
        raise HavocError(f"a picture of more than {max_pixels} pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise HavocError("a picture cannot be decoded (its format is unknown, or it is not a picture)") from error
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise HavocError(f"a picture cannot be decoded ({error})") from error
    return seen


def _opened(data: bytes, formats: tuple[str, ...] | None) -> Image:
    from PIL import Image

    Image.init()
    known = None if formats is None else [name for name in formats if name in Image.OPEN]  # WebP is not everywhere
    return Image.open(io.BytesIO(data), formats=known)


def _scaled(image: Image) -> Image:
    """RGB of a grey picture with more than 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise HavocError("a picture holds NaN or infinite values")
    low, high = _range(values, image.mode)
    grey = np.rint((values - low) * (255.0 / (high - low))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey, "L").convert("RGB")


def _range(values: NDArray[np.float64], mode: str) -> tuple[float, float]:
    """What becomes black and what white."""
    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16"):
        return 0.0, 65535.0
    if mode == "F" and low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and high <= 255:  # noqa: PLR2004 - 8 bits in a wider type
        return 0.0, 255.0
    if mode == "I" and low >= 0 and high <= 65535:  # noqa: PLR2004 - 16 bits in a wider type
        return 0.0, 65535.0
    return (low, high) if high > low else (low, low + 1.0)


def _is_constant(image: Image) -> bool:
    """Whether all pixels are equal, by their colours if there is a palette."""
    if image.mode in {"P", "PA"}:
        image = image.convert("RGBA")
    extrema = image.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


def fitted_png(image: Image, side: int) -> bytes:
    """PNG bytes of `image` fitted into `side` x `side` pixels, proportions kept, the rest black."""
    from PIL import Image, ImageOps

    if image.size != (side, side):
        image = ImageOps.pad(image, (side, side), method=Image.Resampling.BICUBIC)
    return png_of(image)


def png_of(image: Image) -> bytes:
    """PNG bytes of a picture."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
