"""The exported graph against PyTorch, on every way the graph is used.

    B batch, T tokens, V vocab

The reference is one full forward pass of torch over a few left-padded sequences; prefill, empty past, single steps,
chunked prefill and padded batches of the exported model must all give its logits at their positions. The reference
computes with the weights as they are stored (dequantized), so a limit speaks about the graph; how far the format
itself moves the logits from the fp32 fold is reported beside it, as drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import MeasurementError
from ..model.blocks import RotaryEmbedding, TransformerBlock
from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD, VISION_PROJECTION, module_name
from ..progress import SILENT, Progress
from .probe import Probe, make_probe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .past import Past
    from .session import DecoderSession

CHUNKS = (7, 1, 9)
"""Lengths of the first chunks of the chunked prefill; a last one takes the rest."""


class Reference(Protocol):
    """Logits fp32 [B, T, V] of ids and mask [B, T], patches [R, patch_dim]. A `HavocModel` is one."""

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, patches: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of every position."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What may lie between torch and the runtime: largest difference, or mean in units of the logits' spread.

    `max_abs` holds for logits of an ordinary spread; where `max_relative` of the spread is more, that is allowed.
    """

    max_abs: float | None = None
    max_relative: float = 0.0
    mean_relative: float | None = None
    top1_share: float = 0.0


LIMITS: dict[tuple[str, str], Limit] = {
    ("fp32", "fp32"): Limit(max_abs=1e-4, max_relative=2.5e-5, top1_share=1.0),
    ("fp16", "fp32"): Limit(max_abs=1e-4, max_relative=2.5e-5, top1_share=1.0),
    ("int8", "fp32"): Limit(mean_relative=0.1, top1_share=0.3),
    ("int4", "fp32"): Limit(max_abs=1e-4, max_relative=2.5e-5, top1_share=1.0),
    ("fp16", "fp16"): Limit(mean_relative=0.01, top1_share=0.9),
    ("int8", "fp16"): Limit(mean_relative=0.05, top1_share=0.5),
    ("int4", "fp16"): Limit(mean_relative=0.05, top1_share=0.5),
}
"""By (weight format, activation dtype).

int8 lets the CPU quantize activations to int8 (accuracy level 4): about 2 % of the logits' spread, measured, against
1e-6 when it does not, and on random weights enough to turn a third of all top-1 choices between near-equal logits.
`max_abs` holds up to a width of 1024 and grows with it from there: 8e-6 was measured at 960, 9e-5 at 4096.
Rounding grows with what is rounded: 2e-6 to 7e-6 of the spread was measured for spreads of 1.2 to 126, so from a spread
of 4 on, `max_relative` is what holds.
"""
_MAX_ABS_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """How one way of running the exported model compares: `num_positions` rows of logits, torch's of that spread."""

    name: str
    num_positions: int
    max_abs_diff: float
    mean_abs_diff: float
    mean_relative_diff: float
    top1_share: float
    spread: float

    def to_json(self) -> dict[str, Any]:
        """The document kept in the manifest."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All cases against the limit they had to meet."""

    cases: tuple[ParityCase, ...]
    limit: Limit

    @property
    def max_abs_diff(self) -> float:
        """The largest difference of any case."""
        return max(case.max_abs_diff for case in self.cases)

    @property
    def top1_share(self) -> float:
        """The smallest top-1 agreement of any case."""
        return min(case.top1_share for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """The document kept in the manifest."""
        return {"limit": asdict(self.limit), "cases": [case.to_json() for case in self.cases]}


def compare(
    expected_BTV: NDArray[np.float32], session: DecoderSession, structure: Structure, *, progress: Progress = SILENT
) -> ParityReport:
    """Run every case and hold it against the format's limit; above it, or not finite, is a `MeasurementError`.

    `expected_BTV` are the `reference_logits` of the weights that the session computes with.
    """
    probe = make_probe(session.config)
    limit = limit_of(structure, session.config)
    cases = []
    with progress.stage("compare with torch", None) as stage:
        for name, actual, expected in _runs(session, probe, expected_BTV):
            case = _compared(name, actual, expected)
            _require(case, limit)
            cases.append(case)
            stage.advance(note=f"{name}: largest difference {case.max_abs_diff:.1e}")
    return ParityReport(cases=tuple(cases), limit=limit)


def limit_of(structure: Structure, config: HavocConfig) -> Limit:
    """What `LIMITS` allows a model of this width: sums of more products are rounded further apart."""
    limit = LIMITS[structure.weight_format, structure.activation_dtype]
    if structure.has_compute:
        limit = LIMITS["int8" if structure.compute == "int8" else "fp32", "fp32"]
    width = max(config.d_model / _MAX_ABS_WIDTH, 1.0)
    if limit.max_abs is None:
        return limit
    return replace(limit, max_abs=limit.max_abs * width, max_relative=limit.max_relative * width)


def drift(stored_BTV: NDArray[np.float32], exact_BTV: NDArray[np.float32], config: HavocConfig) -> ParityCase:
    """How far the stored weights move the `reference_logits` from those of the exact ones, in torch on both sides."""
    real = make_probe(config).mask == 1
    return _compared("drift", stored_BTV[real], exact_BTV[real])


def reference_logits(reference: Reference, config: HavocConfig) -> NDArray[np.float32]:
    """Full logits [B, T, V] of the sequences all cases read, from torch."""
    probe = make_probe(config)
    patches = None if probe.patches is None else torch.from_numpy(probe.patches)
    with torch.inference_mode():
        logits = reference(torch.from_numpy(probe.ids), torch.from_numpy(probe.mask), patches=patches)
    array: NDArray[np.float32] = logits.float().numpy()
    return array


def _runs(
    session: DecoderSession, probe: Probe, expected_BTV: NDArray[np.float32]
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Each case's name, its logits [positions, V], and torch's at the same positions."""
    num_tokens, rows = probe.ids.shape[1], range(len(probe.ids))
    alone = [_read_row(session, probe, expected_BTV, row, []) for row in rows]
    actual, expected = (np.concatenate(parts) for parts in zip(*alone, strict=True))
    yield "prefill", actual, expected
    yield "empty past", *_read(session, probe.ids[:1, :1], None, None, expected_BTV[:1], [])
    plain = 0 if session.config.vision is None else 1
    yield "single steps", *_read_row(session, probe, expected_BTV, plain, range(1, num_tokens))
    yield "chunked prefill", *_read_row(session, probe, expected_BTV, plain, np.cumsum(CHUNKS).tolist())
    yield "left-padded batch", *_read(session, probe.ids, probe.mask, probe.patches, expected_BTV, [])
    first_step = max(num_tokens // 2, _last_image(probe))
    steps = range(first_step, num_tokens)
    yield "left-padded steps", *_read(session, probe.ids, probe.mask, probe.patches, expected_BTV, steps)


def _read_row(
    session: DecoderSession, probe: Probe, expected_BTV: NDArray[np.float32], row: int, cuts: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`_read` one row alone and unpadded."""
    ids, image = probe.row(row)
    return _read(session, ids, None, image, expected_BTV[row : row + 1, probe.mask[row] == 1], cuts)


def _read(
    session: DecoderSession,
    ids_BT: NDArray[np.int64],
    mask_BT: NDArray[np.int64] | None,
    patches: NDArray[np.float32] | None,
    expected_BTV: NDArray[np.float32],
    cuts: Sequence[int],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits at every real position that the graph answers, read in pieces between `cuts`, and torch's there."""
    num_tokens = ids_BT.shape[1]
    bounds = [0, *(cut for cut in cuts if cut < num_tokens), num_tokens]
    past, actual, expected = session.empty_past(len(ids_BT)), [], []
    for start, stop in itertools.pairwise(bounds):
        seen = None if mask_BT is None else mask_BT[:, :stop]
        logits_BNV, past = _extended(session, ids_BT[:, start:stop], seen, past, patches if start == 0 else None)
        answered = slice(stop - logits_BNV.shape[1], stop)
        real_BN = np.ones(logits_BNV.shape[:2], np.bool_) if mask_BT is None else mask_BT[:, answered] == 1
        actual.append(logits_BNV[real_BN])
        expected.append(expected_BTV[:, answered][real_BN])
    return np.concatenate(actual), np.concatenate(expected)


def _extended(
    session: DecoderSession,
    ids_BT: NDArray[np.int64],
    mask_BS: NDArray[np.int64] | None,
    past: Past,
    patches: NDArray[np.float32] | None,
) -> tuple[NDArray[np.float32], Past]:
    """Logits [B, 1 or T, V], whichever the graph computes, and the past."""
    if session.options.logits == "all":
        return session.extend_all(ids_BT, mask_BS, past, patches)
    logits_BV, past = session.extend(ids_BT, mask_BS, past, patches)
    return logits_BV[:, None], past


def _last_image(probe: Probe) -> int:
    """Columns that hold every image: the shortest row's patches end last."""
    ends = [
        int(np.flatnonzero(probe.mask[row])[0]) + 1 + len(image)
        for row, image in enumerate(probe.images)
        if image is not None
    ]
    return max(ends, default=1)


def _compared(name: str, actual: NDArray[np.float32], expected: NDArray[np.float32]) -> ParityCase:
    """Compare row by row: the logits of a large vocabulary in float64 would be the most an export holds."""
    differences = (np.abs(ours.astype(np.float64) - theirs) for ours, theirs in zip(actual, expected, strict=True))
    most, mean = np.array([(row.max(), row.mean()) for row in differences]).T
    spread = float(expected.std())
    return ParityCase(
        name=name,
        num_positions=len(expected),
        max_abs_diff=float(most.max()),
        mean_abs_diff=float(mean.mean()),
        mean_relative_diff=float(mean.mean()) / (spread or 1.0),
        top1_share=float((actual.argmax(-1) == expected.argmax(-1)).mean()),
        spread=spread,
    )


def _require(case: ParityCase, limit: Limit) -> None:
    problems = []
    if not np.isfinite(case.max_abs_diff):
        problems.append("a logit is not finite")
    allowed = None if limit.max_abs is None else max(limit.max_abs, limit.max_relative * case.spread)
    if allowed is not None and case.max_abs_diff > allowed:
        problems.append(f"largest difference {case.max_abs_diff:.3g}, allowed {allowed:.3g}")
    if limit.mean_relative is not None and case.mean_relative_diff > limit.mean_relative:
        problems.append(
            f"mean difference {case.mean_relative_diff:.3g} of the logits' spread, allowed {limit.mean_relative:g}"
        )
    if case.top1_share < limit.top1_share:
        problems.append(f"top-1 agreement {case.top1_share:.3f}, required {limit.top1_share:g}")
    if problems:
        msg = f"the exported graph does not agree with torch on {case.name}: {'; '.join(problems)}; nothing was written"
        raise MeasurementError(msg)


class StreamedModel:
    """A decoder's forward pass over tensors read one layer at a time: a reference for bases of any size."""

    def __init__(
        self, config: HavocConfig, tensors: Mapping[str, Tensor], *, on_layer: Callable[[], object] = lambda: None
    ) -> None:
        """`tensors` by Hugging Face name, each asked for once a call (a tied table twice); `on_layer` ends a layer."""
        self._config, self._tensors, self._on_layer = config, tensors, on_layer

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, patches: Tensor | None = None
    ) -> Tensor:
        """Logits fp32 [B, T, V] of whole sequences."""
        config = self._config
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        rotary = RotaryEmbedding(config.attention, config.max_seq_len)(positions_BT)
        itself_TT = torch.eye(input_ids.shape[1], dtype=torch.bool)
        visible_BTT = torch.ones_like(itself_TT).tril() & (mask_BT[:, None, :].bool() | itself_TT)
        additive_B1TT = torch.zeros(visible_BTT.shape).masked_fill_(~visible_BTT, float("-inf")).unsqueeze(1)
        x_BTD = self._embed(input_ids, patches)
        for layer in range(config.num_layers):
            x_BTD, _ = self._block(layer)(x_BTD, rotary, additive_B1TT)
            self._on_layer()
        x_BTD = F.rms_norm(x_BTD, (config.d_model,), self._fp32(FINAL_NORM), config.norm_eps)
        return F.linear(x_BTD, self._fp32(EMBEDDING if config.tie_word_embeddings else HEAD))

    def _fp32(self, name: str) -> Tensor:
        return self._tensors[name].to(torch.float32)

    def _embed(self, input_ids: Tensor, patches: Tensor | None) -> Tensor:
        x_BTD = F.embedding(input_ids, self._fp32(EMBEDDING))
        if patches is None or self._config.vision is None:
            return x_BTD
        is_image = input_ids == self._config.vision.image_token_id
        return x_BTD.masked_scatter(is_image.unsqueeze(-1), F.linear(patches, self._fp32(VISION_PROJECTION)))

    def _block(self, layer: int) -> TransformerBlock:
        with torch.device("meta"):
            block = TransformerBlock(self._config)
        prefix = f"model.layers.{layer}."
        names = [name for name in self._tensors if name.startswith(prefix)]
        state = {module_name(name).removeprefix(f"layers.{layer}."): self._fp32(name) for name in names}
        block.load_state_dict(state, assign=True)
        return block.eval()
