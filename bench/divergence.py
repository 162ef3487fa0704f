"""How far two sides are from a reference that they should match: KL divergence of the next token at many positions.

    found = divergence(reference, old, new, num_threads=1)

All three read the same token ids of the bundled text, in pieces of `WINDOW` tokens, and give the probability of each
next token after a piece. KL(reference || side) of a piece is one number, in nats. The difference between both sides is
computed for each piece, so hard pieces are hard for both, and bounded by Student's t over pieces, which do not overlap.

    P pieces, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bounds import mean_bounds
from ..errors import HavocError
from ..export.runtime.child import run_worker
from ..export.runtime.devices import CPU_PROVIDER
from ..export.runtime.sample import read_sample
from ..model.base_tokenizer import load_tokenizer
from ..model.config_file import read_config
from ..storage import scratch_directory
from .judge.paired import CONFIDENCE
from .requests import ENGINE_LOGITS, LOGITS, LogitsRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.tokenizer import Tokenizer
    from .contender import Contender

WINDOW = 24
NUM_PIECES = 48
FEWEST_PIECES = 8
_TIMEOUT_S = 1800.0
_ENDS = 1 - (1 - CONFIDENCE) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Mean KL divergence of each side from the reference in nats, and the difference (new - old) with its interval.

    `old_top1` and `new_top1` are the shares of pieces after which a side has the same likeliest token.
    """

    reference: str
    num_pieces: int
    num_untold: int
    old_kl: float
    new_kl: float
    difference: float
    low: float
    high: float
    old_top1: float
    new_top1: float
    text_sha256: str

    def sentence(self) -> str:
        """The figures, for people."""
        untold = f"; {self.num_untold} pieces without probabilities of a side were left out" if self.num_untold else ""
        return (
            f"KL from {self.reference} over {self.num_pieces} pieces of the bundled text: old {self.old_kl:.4g} nats, "
            f"new {self.new_kl:.4g}, difference {self.difference:+.3g} ({self.low:+.3g} to {self.high:+.3g}); the same "
            f"likeliest token in {self.old_top1:.0%} and {self.new_top1:.0%}{untold}"
        )


def divergence(reference: Contender, old: Contender, new: Contender, *, num_threads: int) -> Divergence:
    """Measure both sides against the reference; each is opened once, in its own process.

    Raises `HavocError` if no side has a tokenizer that reads the text, if an engine reports no probabilities, or if
    fewer than `FEWEST_PIECES` pieces have probabilities from all.
    """
    sides = (reference, old, new)
    config, tokenizer = _tokenizer_of(sides)
    sample = read_sample(config, tokenizer)
    longest = min(side.max_tokens for side in sides if side.max_tokens is not None) - 1
    windows = sample.windows(length=min(WINDOW, longest), num_windows=NUM_PIECES)
    num_ids = min(side.num_ids for side in sides if side.num_ids is not None)
    pieces = windows[(windows < num_ids).all(axis=1)]
    logits = [next_logits(side, pieces, num_ids=num_ids, num_threads=num_threads) for side in sides]
    told = np.isfinite(np.stack(logits)).all(axis=(0, 2))
    if told.sum() < FEWEST_PIECES:
        raise HavocError(
            f"{told.sum()} pieces of text have probabilities from all sides, at least {FEWEST_PIECES} are needed"
        )
    return compared(
        *(values[told] for values in logits),
        reference=reference.shown,
        num_untold=int((~told).sum()),
        text_sha256=sample.text_sha256 or "",
    )


def compared(
    reference_PV: NDArray[np.float32],
    old_PV: NDArray[np.float32],
    new_PV: NDArray[np.float32],
    *,
    reference: str,
    num_untold: int,
    text_sha256: str,
) -> Divergence:
    """Compare logits, or log-probabilities, of the same pieces."""
    truth, before, after = (_log_softmax(values) for values in (reference_PV, old_PV, new_PV))
    old_kl, new_kl = ((np.exp(truth) * (truth - side)).sum(axis=1) for side in (before, after))
    bounds = mean_bounds((new_kl - old_kl).tolist(), confidence=_ENDS)
    first = truth.argmax(axis=1)
    return Divergence(
        reference=reference,
        num_pieces=len(truth),
        num_untold=num_untold,
        old_kl=float(old_kl.mean()),
        new_kl=float(new_kl.mean()),
        difference=bounds.value,
        low=bounds.value if bounds.low is None else bounds.low,
        high=bounds.value if bounds.high is None else bounds.high,
        old_top1=float((before.argmax(axis=1) == first).mean()),
        new_top1=float((after.argmax(axis=1) == first).mean()),
        text_sha256=text_sha256,
    )


def _log_softmax(values_PV: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = values_PV.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def next_logits(side: Contender, pieces: NDArray[np.int64], *, num_ids: int, num_threads: int) -> NDArray[np.float32]:
    """Logits, or log-probabilities, of the token after each piece [P, V], V = `num_ids`; NaN if not reported."""
    with scratch_directory("havoc-logits-") as folder:
        request = LogitsRequest(
            artifact=str(side.place.absolute() if isinstance(side.place, Path) else side.place),
            provider=CPU_PROVIDER,
            num_threads=num_threads,
            engine=side.engine,
            num_ids=num_ids,
            pieces=tuple(tuple(piece) for piece in pieces.tolist()),
            out=folder / "logits.npy",
        )
        is_own = side.engine is None
        job = LOGITS if is_own else ENGINE_LOGITS
        run_worker(job, request, timeout_s=_TIMEOUT_S, python=None if is_own else side.python)
        found: NDArray[np.float32] = np.load(request.out)
    return found


def _tokenizer_of(sides: Sequence[Contender]) -> tuple[HavocConfig, Tokenizer]:
    """The first tokenizer that a side has, with the configuration of its model."""
    for side in sides:
        if not isinstance(side.place, Path):
            continue
        try:
            config = read_config(side.place)
            tokenizer = load_tokenizer(side.place, num_rows=config.vocab_size)
        except HavocError:
            continue  # a folder of genai alone has no config.json
        if tokenizer is not None:
            return config, tokenizer
    raise HavocError("none of the models has a tokenizer that reads the text: name one that has with --reference")
