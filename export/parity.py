"""Check that the exported graph computes the model of its stored weights, in every way the graph is used.

    N real positions, B batch, T tokens, V vocab

The reference is the forward pass over the stored weights in float64. No device is that exact, so the unit is torch's
own error against it: in fp32, or with the rounding of the format (`reference`). A graph passes if its error is within a
small multiple of torch's; no figure here depends on width, depth or the size of logits. `format_cost` measures the cost
of the format.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import MeasurementError
from ..progress import SILENT, Progress
from .reference import EXACT, FP32, Arithmetic, Batch, StreamedModel, logits_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from .runtime.past import Past
    from .runtime.probe import Probe
    from .runtime.session import DecoderSession

CHUNKS = (7, 1, 9)
"""Lengths of the first chunks of the chunked prefill; a last one takes the rest."""
NUM_STEPS = 24
"""Tokens that are read one by one."""

MAX_RATIO = 5.0
"""How many times torch's error a graph's may be: root mean square over a case's positions, and its worst position."""
FLOOR = 2.0**-22
"""Errors below this share of the logits' spread are ignored: torch's own error counts as at least this much."""


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """How one way of running the graph compares with float64, over `num_positions` rows of logits.

    `error` and `torch_error` are root mean squares over positions and vocabulary, `worst_error` that of the worst
    position, all in units of the logits' spread. `ratio` is what is limited.
    """

    name: str
    measure: str
    num_positions: int
    error: float
    worst_error: float
    torch_error: float
    torch_worst_error: float
    max_abs_diff: float
    top1_share: float

    @property
    def ratio(self) -> float:
        """The graph's error in units of torch's: the larger of root mean square and worst position."""
        return max(self.error / max(self.torch_error, FLOOR), self.worst_error / max(self.torch_worst_error, FLOOR))

    def to_json(self) -> dict[str, Any]:
        """The document kept in the manifest."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All cases, each within the limit."""

    cases: tuple[ParityCase, ...]

    @property
    def max_ratio(self) -> float:
        """The largest ratio of any case."""
        return max(case.ratio for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """The document kept in the manifest."""
        return {"max_ratio": MAX_RATIO, "cases": [case.to_json() for case in self.cases]}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The float64 logits of a probe, and torch's error against them.

    `logits_NV` float64 of the real positions, row by row; `place_BT` the index of each position's row of logits (-1:
    padding); `errors` by arithmetic: root mean square over the vocabulary at each position [N], in units of `spread`.
    """

    probe: Probe
    logits_NV: NDArray[np.float64]  # noqa: N815 - a shape suffix
    place_BT: NDArray[np.int64]  # noqa: N815
    spread: float
    errors: Mapping[str, NDArray[np.float64]]


def read_reference(model: StreamedModel, probe: Probe, arithmetics: Sequence[Arithmetic] = (FP32,)) -> Reference:
    """Run a probe through the layers once, in float64 and in each of `arithmetics`."""
    patches = None if probe.patches is None else torch.from_numpy(probe.patches)
    batch = Batch(torch.from_numpy(probe.ids), torch.from_numpy(probe.mask), patches)
    exact_BTD, *others = model.hidden(batch, [EXACT, *arithmetics])
    real_BT = batch.mask == 1
    head_VD = model.head()
    exact_NV = logits_of(exact_BTD[real_BT], head_VD, EXACT).numpy()
    spread = float(np.sqrt(np.mean([row.var() for row in exact_NV]))) or 1.0
    errors = {}
    for arithmetic, hidden_BTD in zip(arithmetics, others, strict=True):
        logits_NV = logits_of(hidden_BTD[real_BT], head_VD, arithmetic).numpy()
        errors[arithmetic.name] = _errors(logits_NV, exact_NV) / spread
    place_BT = np.where(probe.mask == 1, np.cumsum(probe.mask).reshape(probe.mask.shape) - 1, -1)
    return Reference(probe=probe, logits_NV=exact_NV, place_BT=place_BT, spread=spread, errors=errors)


def _errors(actual_NV: NDArray[Any], exact_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square difference of each row; one row at a time, for a large vocabulary."""
    pairs = zip(actual_NV, exact_NV, strict=True)
    return np.array([np.sqrt(np.mean(np.square(ours.astype(np.float64) - theirs))) for ours, theirs in pairs])


def compare(
    reference: Reference, session: DecoderSession, measure: Arithmetic, *, label: str = "", progress: Progress = SILENT
) -> list[ParityCase]:
    """Run the probe in every way the graph is used; an error beyond the limit, or not finite, is a `MeasurementError`.

    The graph's error is compared with that of the arithmetic `measure`, one of the reference's; `label` begins the
    names of the cases.
    """
    cases = []
    with progress.stage(f"compare {label or 'the graph'} with float64", None) as stage:
        for name, actual_NV, places_N in _runs(session, reference):
            case = _compared(f"{label}{', ' if label else ''}{name}", reference, measure, actual_NV, places_N)
            _require(case)
            cases.append(case)
            stage.advance(note=f"{name}: {case.ratio:.2g} times torch's error")
    return cases


def _runs(
    session: DecoderSession, reference: Reference
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.int64]]]:
    """Each case's name, its logits [n, V], and the indices of the same positions in the reference [n]."""
    probe = reference.probe
    num_tokens, rows = probe.ids.shape[1], range(len(probe.ids))
    plain = 0 if session.config.vision is None else 1
    length = int(probe.mask[plain].sum())
    alone = [_read_row(session, reference, row, []) for row in rows]
    yield "prefill", *_joined(alone)
    if session.options.cache == "dynamic":
        alone = [_read_row(session, reference, row, [], is_preallocated=False) for row in rows]
        yield "prefill, new buffers at every call", *_joined(alone)
    yield "single steps", *_read_row(session, reference, plain, range(1, min(NUM_STEPS, length)))
    yield "chunked prefill", *_read_row(session, reference, plain, np.cumsum(CHUNKS).tolist())
    yield "left-padded batch", *_read(session, reference, list(rows), [])
    first_step = max(num_tokens - NUM_STEPS // 2, _last_image(probe))
    yield "left-padded steps", *_read(session, reference, list(rows), range(first_step, num_tokens))


def _joined(parts: Sequence[tuple[NDArray[Any], NDArray[np.int64]]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    logits, places = (np.concatenate(part) for part in zip(*parts, strict=True))
    return logits, places


def _read_row(
    session: DecoderSession, reference: Reference, row: int, cuts: Sequence[int], *, is_preallocated: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return _read(session, reference, [row], cuts, is_preallocated=is_preallocated)


def _read(
    session: DecoderSession,
    reference: Reference,
    rows: list[int],
    cuts: Sequence[int],
    *,
    is_preallocated: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits at every real position that the graph answers, read in pieces between `cuts`, and their places.

    One row is read without its padding.
    """
    probe, (row, *more) = reference.probe, rows
    columns = probe.mask[row] == 1 if not more else np.ones(probe.ids.shape[1], np.bool_)
    ids_BT, place_BT = probe.ids[rows][:, columns], reference.place_BT[rows][:, columns]
    mask_BT, patches = (probe.mask, probe.patches) if more else (None, probe.images[row])
    num_tokens = ids_BT.shape[1]
    bounds = [0, *(cut for cut in cuts if cut < num_tokens), num_tokens]
    past = session.empty_past(len(ids_BT), capacity=num_tokens if is_preallocated else None)
    actual, places = [], []
    for start, stop in itertools.pairwise(bounds):
        seen = None if mask_BT is None else mask_BT[:, :stop]
        logits_BnV, past = _extended(session, ids_BT[:, start:stop], seen, past, patches if start == 0 else None)
        answered_Bn = place_BT[:, stop - logits_BnV.shape[1] : stop]
        actual.append(logits_BnV[answered_Bn >= 0])
        places.append(answered_Bn[answered_Bn >= 0])
    return np.concatenate(actual), np.concatenate(places)


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


def _compared(
    name: str,
    reference: Reference,
    measure: Arithmetic,
    actual_NV: NDArray[np.float32],
    places_N: NDArray[np.int64],
) -> ParityCase:
    exact_NV, torchs = reference.logits_NV[places_N], reference.errors[measure.name]
    ours_N, torchs_N = _errors(actual_NV, exact_NV) / reference.spread, torchs[places_N]
    return ParityCase(
        name=name,
        measure=measure.name,
        num_positions=len(places_N),
        error=_rms(ours_N),
        worst_error=float(ours_N.max()),
        torch_error=max(_rms(torchs_N), _rms(torchs)),
        torch_worst_error=float(torchs.max()),
        max_abs_diff=max(float(np.abs(a - b).max()) for a, b in zip(actual_NV, exact_NV, strict=True)),
        top1_share=float((actual_NV.argmax(-1) == exact_NV.argmax(-1)).mean()),
    )


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _times(ratio: float) -> str:
    is_small = ratio < 1000  # noqa: PLR2004 - above it no digit after the point matters
    return f"{ratio:.3g}" if is_small else f"{ratio:,.0f}"


def _require(case: ParityCase) -> None:
    if np.isfinite(case.ratio) and case.ratio <= MAX_RATIO:
        return
    found = (
        f"its error is {_times(case.ratio)} times that of {case.measure} (allowed {MAX_RATIO:g}): {case.error:.3g} of "
        f"the logits' spread on average, {case.worst_error:.3g} at the worst position"
        if np.isfinite(case.ratio)
        else "a logit is not finite"
    )
    raise MeasurementError(
        f"the exported graph does not compute the function of its weights, {case.name}: {found}; nothing was written"
    )
