"""Images to patches: order, range, colours, and files that mean harm."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from havoc_core.errors import HavocError
from havoc_core.model.config import VisionConfig
from havoc_core.model.vision import MAX_IMAGE_BYTES, num_patches, patchify

VISION = VisionConfig(patch_size=8, image_token_id=3)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format="PNG")
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header_only_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_patches_are_squares_row_by_row() -> None:
    """Patch k is the square in row k // columns, column k % columns; inside it (row, column, channel)."""
    pixels = noise(16, 24)
    patches = patchify(png(pixels), VISION)
    assert patches.shape == (6, 192)
    assert patches.dtype == np.float32
    assert num_patches(24, 16, VISION) == 6
    for index in range(6):
        top, left = 8 * (index // 3), 8 * (index % 3)
        square = pixels[top : top + 8, left : left + 8].reshape(-1).astype(np.float32)
        np.testing.assert_allclose(patches[index], square / 127.5 - 1, atol=1e-6)


def test_range_is_minus_one_to_one() -> None:
    """Black is -1, white is 1."""
    assert (patchify(png(np.zeros((8, 8, 3), np.uint8)), VISION) == -1).all()
    assert (patchify(png(np.full((8, 8, 3), 255, np.uint8)), VISION) == 1).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_colour_modes_are_converted(mode: str) -> None:
    """Grey, palette, transparent and black-and-white images become RGB as Pillow converts them."""
    data = png(noise(8, 8), mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32).reshape(1, -1) / 127.5 - 1
    np.testing.assert_allclose(patchify(data, VISION), expected, atol=1e-6)


def test_grey_models_read_one_channel() -> None:
    """num_channels = 1 gives patches of patch_size squared values."""
    assert patchify(png(noise(8, 16)), VisionConfig(num_channels=1, image_token_id=3)).shape == (2, 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PNG"),
        (b"GIF89a" + bytes(20), "not a PNG"),
        (png(noise(8, 8))[:60], "damaged"),
        (png(noise(8, 12)), "12 x 8 pixels is not a multiple of the patch size 8"),
        (bytes(MAX_IMAGE_BYTES + 1), "16777217 bytes; HAVOC reads at most 16777216"),
        (header_only_png(8192, 8192), "8192 x 8192 pixels; at most 16777216"),
        (header_only_png(65_000, 65_000), "pixels"),
        (header_only_png(16, 16), "damaged"),
    ],
    ids=["empty", "gif", "cut off", "odd size", "too many bytes", "too many pixels", "bomb", "no pixels"],
)
def test_bad_images_are_refused(data: bytes, message: str) -> None:
    """One line says what is wrong; nothing huge is decoded."""
    with pytest.raises(HavocError, match=message):
        patchify(data, VISION)
