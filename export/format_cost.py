"""The cost of a format: the artifact itself compared with the exact fold in fp32, at every token of a text.

    W windows, T tokens, D model, V vocab

At every position of the text (teacher forced) the fold gives the distribution p of the next token, and the artifact
gives q. The cost is KL(p || q) = sum p (ln p - ln q) in nats, the share of positions with the same first choice, and
the ratio of the perplexities for the token that really follows: exp(mean ln p(next) - mean ln q(next)).
There is no limit here: a coarse format is not a defect, and the target limits the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MeasurementError
from ..progress import SILENT, Progress
from .reference import FP32, Batch, logits_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from .datafile import StoredWeights
    from .layout import Layout, StoredWeight
    from .reference import StreamedModel
    from .runtime.sample import Sample
    from .runtime.session import DecoderSession

KL_LIMIT, TOP1_LIMIT = 0.15, 0.8
NUM_POSITIONS = 768
MIN_POSITIONS = 256
WINDOW = 256
_CHUNK = 64  # the most positions whose logits are in memory at a time
_MAX_FLOP = 1e12


@dataclass(frozen=True, kw_only=True)
class FormatCost:
    """The cost over `num_positions` of the text with that SHA-256; None: over random ids, which say little.

    `kl_*` in nats, `kl_chunks` the means of equal pieces of neighbouring positions; `top1_share` counts equal first
    choices.
    """

    kl_mean: float
    kl_p99: float
    kl_chunks: tuple[float, ...]
    top1_share: float
    perplexity_ratio: float
    num_positions: int
    text: str
    text_sha256: str | None

    @property
    def is_small(self) -> bool:
        """Whether the cost is within the limits of the built-in targets (docs/decisions/0017)."""
        return self.kl_mean < KL_LIMIT and self.top1_share > TOP1_LIMIT

    def to_json(self) -> dict[str, Any]:
        """The document kept in the manifest and in records."""
        return asdict(self)


def num_positions_for(num_parameters: int) -> int:
    """The number of positions to read: all, or fewer if the model is so large that they take minutes."""
    affordable = int(_MAX_FLOP / (2 * num_parameters))
    return max(min(affordable // WINDOW * WINDOW, NUM_POSITIONS), MIN_POSITIONS)


def windows_of(sample: Sample, config: HavocConfig, *, max_tokens: int, num_parameters: int) -> NDArray[np.int64]:
    """The pieces [W, T] of the sample that a model with room for `max_tokens` reads."""
    length = min(WINDOW, max_tokens, config.max_seq_len, len(sample.prefix) + len(sample.token_ids))
    length -= length % -(-length // _CHUNK)  # a whole number of equal chunks
    return sample.windows(length=length, num_windows=-(-num_positions_for(num_parameters) // length))


def read_fold(model: StreamedModel, windows_WT: NDArray[np.int64]) -> Tensor:
    """The input of the exact fold's head at every position, fp32 [W, T, D]."""
    ids = torch.from_numpy(windows_WT)
    (hidden_WTD,) = model.hidden(Batch(ids, torch.ones_like(ids)), [FP32])
    return hidden_WTD


def measure_cost(
    hidden_WTD: Tensor,
    head_VD: Tensor,
    session: DecoderSession,
    windows_WT: NDArray[np.int64],
    sample: Sample,
    *,
    progress: Progress = SILENT,
) -> FormatCost:
    """Run the artifact (all logits) over the windows and compare it with the fold's `hidden_WTD` under its head."""
    kls, equal, lost = [], [], []
    with progress.stage("measure the cost of the format", windows_WT.size, unit="tokens") as stage:
        for places, log_q_NV in _log_probabilities(session, windows_WT):
            row, columns = places
            log_p_NV = _log_softmax(logits_of(hidden_WTD[row, columns], head_VD, FP32).numpy())
            kls.append(np.maximum((np.exp(log_p_NV) * (log_p_NV - log_q_NV)).sum(-1), 0))
            equal.append(log_p_NV.argmax(-1) == log_q_NV.argmax(-1))
            following = windows_WT[row, columns.start + 1 : columns.stop + 1]
            rows = np.arange(len(following))
            lost.append(log_p_NV[rows, following] - log_q_NV[rows, following])
            stage.advance(len(log_q_NV))
    kl_N, equal_N, lost_N = (np.concatenate(parts) for parts in (kls, equal, lost))
    if not np.isfinite(kl_N).all():
        raise MeasurementError(
            "the format's cost cannot be computed: a logit of the artifact or of its fold is not finite"
        )
    return FormatCost(
        kl_mean=float(kl_N.mean()),
        kl_p99=float(np.quantile(kl_N, 0.99)),
        kl_chunks=tuple(float(piece.mean()) for piece in kls),
        top1_share=float(equal_N.mean()),
        perplexity_ratio=float(np.exp(min(lost_N.mean(), 50.0))) if len(lost_N) else 1.0,
        num_positions=len(kl_N),
        text=sample.name,
        text_sha256=sample.text_sha256,
    )


def _log_probabilities(
    session: DecoderSession, windows_WT: NDArray[np.int64]
) -> Iterator[tuple[tuple[int, slice], NDArray[np.float64]]]:
    """The artifact's log probabilities [n, V] of every position, one chunk of a window at a time, with its place."""
    num_windows, length = windows_WT.shape
    chunk = length // -(-length // _CHUNK)
    for row in range(num_windows):
        past = session.empty_past(1, capacity=length)
        for start in range(0, length, chunk):
            columns = slice(start, start + chunk)
            logits_1nV, past = session.extend_all(windows_WT[row : row + 1, columns], None, past)
            yield (row, columns), _log_softmax(logits_1nV[0])


def _log_softmax(logits_NV: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits_NV.astype(np.float64) - logits_NV.max(-1, keepdims=True)
    log_softmax: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_softmax


_HALF_ROUNDING = 2.0**-10  # fp16, of values however small within a tensor
_QUIET_SHARE = 1e-3  # a block below this share of its tensor's size is measured by that share
_PLAIN_BLOCK = 32
_LOST = 0.9


@dataclass(frozen=True)
class BlockLimit:
    """How far a stored block of `size` neighbours of a row may be from the exact one.

    Root mean square, in units of the exact block's own.
    """

    error: float
    size: int = _PLAIN_BLOCK


def block_limit(weight: StoredWeight, quantizer: str) -> BlockLimit:
    """The largest error of a stored weight's blocks that its format can explain.

    Integers: rounding to the nearest of 2^b steps gives at most half a step everywhere, sqrt(size) / 2^b of a block
    with one large value and many small ones; quantizers that use more than one value may give twice that. gptq changes
    a block to compensate for others (.72 of a block's size was seen), so only a lost block exceeds its limit. A lost
    block has an error of 1.
    """
    if (blocks := weight.blocks) is not None:
        error = _LOST if quantizer == "gptq" else 2 * math.sqrt(blocks.block_size) / 2**blocks.num_bits
        return BlockLimit(min(error, _LOST), blocks.block_size)
    is_half = "float16" in {item.dtype for item in weight.initializers}
    return BlockLimit(_HALF_ROUNDING if is_half else 0.0)


class CheckedFold(Mapping[str, Tensor]):
    """The exact fold; each tensor is compared with its stored form when it is read."""

    def __init__(
        self, folded: Mapping[str, Tensor], stored: StoredWeights, layout: Layout, limit_of: Callable[[str], BlockLimit]
    ) -> None:
        """`limit_of` a tensor's name: what its blocks may be off by."""
        self._folded, self._stored, self._layout, self._limit_of = folded, stored, layout, limit_of
        self._seen: set[str] = set()
        self.worst = 0.0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._folded[name]
        if name not in self._seen and not self._layout[name].factors:
            self._seen.add(name)
            self._check(name, tensor)
        return tensor

    def _check(self, name: str, exact: Tensor) -> None:
        limit = self._limit_of(name)
        error = block_error(self._stored[name], exact, size=limit.size)
        if not error <= limit.error:
            raise MeasurementError(
                f"the stored weights are not those of the fold: a block of {name} is {error:.3g} of its size off "
                f"(allowed {limit.error:.3g}); nothing was written"
            )
        self.worst = max(self.worst, error)

    def __iter__(self) -> Iterator[str]:
        return iter(self._folded)

    def __len__(self) -> int:
        return len(self._folded)


def block_error(stored: Tensor, exact: Tensor, *, size: int) -> float:
    """Largest root mean square error of a block of `size` neighbours of a row, in units of the block's own."""
    worst = 0.0
    quiet = float(exact.float().square().mean().sqrt()) * _QUIET_SHARE
    rows = exact.unsqueeze(0) if exact.ndim == 1 else exact
    others = stored.unsqueeze(0) if stored.ndim == 1 else stored
    for exact_part, stored_part in zip(rows.split(1024), others.split(1024), strict=True):
        exact_NK = exact_part.float()
        error_NB = _block_sizes(stored_part - exact_NK, size)
        share = error_NB / _block_sizes(exact_NK, size).clamp(min=quiet)
        worst = max(worst, float(torch.where(error_NB == 0, 0.0, share).max()))
    return worst


def _block_sizes(x_NK: Tensor, size: int) -> Tensor:
    """Root mean square of every block [N, B]."""
    padding = -x_NK.shape[1] % size
    sizes_NB: Tensor = torch.nn.functional.pad(x_NK, (0, padding)).unflatten(1, (-1, size)).square().mean(2).sqrt()
    return sizes_NB
