from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from havoc_core.errors import HavocError
from havoc_core.model.config import VisionConfig
from havoc_core.model.picture import fitted_png, open_picture
from havoc_core.model.vision import patchify

RED, BLUE = (220, 0, 0), (0, 0, 220)
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves() -> Image.Image:
    """Red above blue."""
    image = Image.new("RGB", (64, 48))
    image.paste(RED, (0, 0, 64, 24))
    image.paste(BLUE, (0, 24, 64, 48))
    return image


def near(pixel: tuple[int, ...], colour: tuple[int, ...]) -> bool:
    return all(abs(a - b) < 12 for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("tag", "stored"),
    [
        (1, halves()),
        (3, halves().transpose(Image.Transpose.ROTATE_180)),
        (6, halves().transpose(Image.Transpose.ROTATE_90)),
        (8, halves().transpose(Image.Transpose.ROTATE_270)),
        (4, halves().transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
    ],
)
def test_a_picture_is_turned_upright(kind: str, tag: int, stored: Image.Image) -> None:
    """The tag that a camera writes is applied: red is above blue, and the size is that of the turned picture."""
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    image = open_picture(encoded(stored, kind, exif=exif))
    assert image.size == (64, 48)
    assert near(image.getpixel((32, 4)), RED)
    assert near(image.getpixel((32, 44)), BLUE)


@pytest.mark.parametrize(
    ("values", "kind", "dark", "light"),
    [
        (np.array([12_000, 50_000], np.uint16), "PNG", 47, 195),
        (np.array([0, 65_535], np.uint16), "TIFF", 0, 255),
        (np.array([0.25, 0.75], np.float32), "TIFF", 64, 191),
        (np.array([10, 200], np.float32), "TIFF", 10, 200),
        (np.array([-5.0, 5.0], np.float32), "TIFF", 0, 255),
        (np.array([0, 1 << 20], np.int32), "TIFF", 0, 255),
        (np.array([0, 65_535], np.int32), "TIFF", 0, 255),
    ],
)
def test_wide_grey_keeps_its_range(values: np.ndarray, kind: str, dark: int, light: int) -> None:
    """16 bits, 32 bits and floats are scaled, not clipped to white or black."""
    image = open_picture(encoded(Image.fromarray(np.repeat(values, 32).reshape(8, 8)), kind))
    assert image.mode == "RGB"
    assert image.getextrema() == ((dark, light),) * 3


def test_cmyk_has_its_colours() -> None:
    """A printer's JPEG is not shown as its negative."""
    image = open_picture(encoded(halves().convert("CMYK"), "JPEG", quality=95))
    assert near(image.getpixel((32, 4)), RED)
    assert near(image.getpixel((32, 44)), BLUE)


@pytest.mark.parametrize(
    "image",
    [
        Image.merge("LA", (Image.new("L", (8, 8)), Image.linear_gradient("L").resize((8, 8)))),
        Image.fromarray(np.array([[1, 2], [3, 4]], np.uint16)),
    ],
    ids=["drawn in transparency", "16 bits, all but black"],
)
def test_a_picture_that_would_show_nothing_is_refused(image: Image.Image) -> None:
    """One colour after the conversion, several before: the model would be asked about an empty sheet."""
    with pytest.raises(HavocError, match="converted to RGB"):
        open_picture(encoded(image, "PNG"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F"])
def test_a_picture_of_one_colour_is_no_mistake(mode: str) -> None:
    """A sheet that is blank from the start is what it is."""
    image = Image.new("L", (8, 8), 0).convert(mode) if mode != "I;16" else Image.new("I;16", (8, 8), 0)
    assert open_picture(encoded(image, "TIFF" if mode == "F" else "PNG")).size == (8, 8)


def test_values_that_are_no_numbers_are_refused() -> None:
    """NaN is neither black nor white."""
    with pytest.raises(HavocError, match="NaN"):
        open_picture(encoded(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF"))


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(halves(), "JPEG")[:-400], b"GIF89a"])
def test_a_broken_picture_is_one_line(data: bytes) -> None:
    """Bytes that are no picture, or a part of one."""
    with pytest.raises(HavocError, match="a picture cannot be decoded") as caught:
        open_picture(data)
    assert "\n" not in str(caught.value)


def test_patches_are_those_of_the_upright_picture() -> None:
    """`generate --image` and a task's row show the model the same."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = encoded(halves().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    vision = VisionConfig(image_token_id=3)
    np.testing.assert_array_equal(patchify(stored, vision), patchify(encoded(halves(), "PNG"), vision))
    assert Image.open(io.BytesIO(fitted_png(open_picture(stored), 32))).size == (32, 32)
