"""Fixed inputs that every check of an exported model reads, and the fingerprint of the answers. No torch.

B batch, T tokens, R image patches
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .completion import left_padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from ...model.config import HavocConfig
    from .sample import Sample
    from .session import DecoderSession

NUM_TOKENS = 24
NUM_ROWS = 3
NUM_FINGERPRINT_LOGITS = 16


@dataclass(frozen=True)
class Probe:
    """The sequences all cases read: left-padded ids and mask [B, T], and the patches of each row's image."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    images: tuple[NDArray[np.float32] | None, ...]

    @property
    def patches(self) -> NDArray[np.float32] | None:
        """The patches of all images in row order, [R, patch_dim]."""
        present = [image for image in self.images if image is not None]
        return np.concatenate(present) if present else None

    def row(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """One row alone and unpadded: ids [1, T], its patches."""
        return self.ids[index : index + 1, self.mask[index] == 1], self.images[index]


def make_probe(config: HavocConfig, *, num_tokens: int = NUM_TOKENS, seed: int = 20) -> Probe:
    """Random sequences of three lengths; in vision configurations the first and the last carry an image."""
    rng = np.random.default_rng(seed)
    num_tokens = min(num_tokens, config.max_seq_len)
    forbidden = -1 if config.vision is None else config.vision.image_token_id

    def drawn(length: int) -> NDArray[np.int64]:
        ids = rng.integers(0, config.vocab_size, length)
        ids[ids == forbidden] = (forbidden + 1) % config.vocab_size
        return ids

    return _with_images(config, map(drawn, _lengths(num_tokens)), rng)


def text_probe(config: HavocConfig, sample: Sample, *, num_tokens: int) -> Probe:
    """Three pieces of a text, of three lengths; in vision configurations the first and the last carry an image."""
    pieces = sample.windows(length=min(num_tokens, config.max_seq_len), num_windows=NUM_ROWS)
    num_tokens = pieces.shape[1]
    rows = (pieces[index % len(pieces)][:length].copy() for index, length in enumerate(_lengths(num_tokens)))
    return _with_images(config, rows, np.random.default_rng(20))


def _lengths(num_tokens: int) -> list[int]:
    return [num_tokens, max(num_tokens - 5, 1), max(num_tokens // 2, 1)]


def _with_images(config: HavocConfig, pieces: Iterable[NDArray[np.int64]], rng: np.random.Generator) -> Probe:
    """Give rows their images, drawn in turn with the rows where those are drawn too."""
    rows, images = [], []
    for index, ids in enumerate(pieces):
        image = None
        if config.vision is not None and index != 1:
            num_patches = min(4, len(ids) - 1)
            ids[1 : 1 + num_patches] = config.vision.image_token_id
            image = rng.uniform(-1, 1, (num_patches, config.vision.patch_dim)).astype(np.float32)
        rows.append(ids.tolist())
        images.append(image)
    is_first_image = config.vision is not None and config.vision.image_token_id == 0
    ids_BT, mask_BT = left_padded(rows, pad_id=1 if is_first_image else 0)
    return Probe(ids_BT, mask_BT, tuple(images))


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A few logits of a fixed input, by token id, and the spread of all of them."""

    token_ids: tuple[int, ...]
    num_patches: int
    logits: dict[str, float]
    spread: float


def fingerprint(session: DecoderSession) -> Fingerprint:
    """Read a fixed input; the manifest keeps the answer, so that a later load can detect another model."""
    probe = make_probe(session.config, num_tokens=12, seed=7)
    ids, image = probe.row(0)
    logits, _ = session.prefill(ids, None, image)
    where = np.linspace(0, session.config.vocab_size - 1, NUM_FINGERPRINT_LOGITS).astype(int)
    return Fingerprint(
        token_ids=tuple(ids[0].tolist()),
        num_patches=0 if image is None else len(image),
        logits={str(index): float(logits[0, index]) for index in where},
        spread=float(logits.std()),
    )


def fingerprint_distance(stored: Mapping[str, Any], found: Fingerprint) -> float:
    """Largest difference between two fingerprints' logits in units of their spread; infinite for another input."""
    same_input = (stored.get("token_ids"), stored.get("num_patches")) == ([*found.token_ids], found.num_patches)
    logits = stored.get("logits")
    if not same_input or not isinstance(logits, dict) or logits.keys() != found.logits.keys():
        return float("inf")
    try:
        largest = max(abs(float(logits[index]) - value) for index, value in found.logits.items())
    except (TypeError, ValueError, OverflowError):  # the stored value is not a number
        return float("inf")
    return float(largest / max(found.spread, 1e-6))
