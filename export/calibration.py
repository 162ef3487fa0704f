"""The calibration text, which decides how weights are stored: a bundled page, or the user's file. No torch.

The cost of a format is never measured on the text that the format was fitted to. The bundled calibration page is not
the bundled sample that measures the cost. Of a user's file the first three quarters calibrate and the rest measures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HavocError
from .runtime.sample import MIN_TOKENS, Sample, read_sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.tokenizer import Tokenizer

BUNDLED = Path(__file__).with_name("calibration.txt")
WINDOW, MAX_WINDOWS = 256, 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows of token ids [W, T], and the SHA-256 of the whole text; None if the ids are random."""

    windows: NDArray[np.int64]
    text: str
    text_sha256: str | None

    def to_json(self) -> dict[str, Any]:
        """The part for the manifest."""
        return {"text": self.text, "text_sha256": self.text_sha256, "num_tokens": int(self.windows.size)}


def read_calibration(config: HavocConfig, tokenizer: Tokenizer | None, *, file: Path | None = None) -> Calibration:
    """Encode the bundled page or the first three quarters of `file`; random ids without a tokenizer.

    A file that cannot be read, or holds too little text to calibrate and to measure, is a `HavocError`.
    """
    sample = read_sample(config, tokenizer, file=file or (None if tokenizer is None else BUNDLED))
    ids = sample.token_ids if file is None else sample.token_ids[: _cut(sample)]
    if file is not None and len(ids) < 3 * MIN_TOKENS:
        raise HavocError(
            f"{file}: {len(sample.token_ids)} tokens of text; calibration and measurement need {4 * MIN_TOKENS}"
        )
    length = min(WINDOW, config.max_seq_len, len(ids))
    windows = replace(sample, token_ids=ids).windows(length=length, num_windows=MAX_WINDOWS)
    is_bundled = file is None and tokenizer is not None  # to `read_sample` the bundled page is a file like any other
    text = "bundled text" if is_bundled else sample.name
    return Calibration(windows=windows, text=text, text_sha256=sample.text_sha256)


def held_out(sample: Sample) -> Sample:
    """The part of a user's file that did not calibrate."""
    return replace(sample, token_ids=sample.token_ids[_cut(sample) :])


def _cut(sample: Sample) -> int:
    return len(sample.token_ids) * 3 // 4
