"""Check that timed calls did the work: compare their keys and values in the cache with the same tokens, read untimed.

    T tokens of the timed call, K tokens read again, D head dim

A model reads causally: the keys and values of the first tokens do not depend on the later tokens. So some positions of
a few timed calls are copied after the clock has stopped; nothing in a call shows that it is one of them. After all
timing, K tokens are read alone: the first K of the timed ones, or all of them and a few more. K is drawn for each call,
two of three times close to T, so a graph that knows the timed length within a few tokens is found too. A graph that
skips the model when it is timed would still have to fill the cache with the right values, which is the work.

For one decode episode, the last logits and the keys and values of some steps are compared with one call that reads the
context and all tokens of the steps at once. And a step after a few tokens must not take longer than one after many.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from ..export.runtime.past import Past
    from ..export.runtime.session import DecoderSession

NUM_CALLS = 3
NUM_POSITIONS = 8
CLOSE_SHARE = 1 / 32
NUM_SHORT_STEPS = 12
SHORT_TOKENS = 32
_NO_NUMBER = 1e6
"""Replaces an error that is not a finite number."""


@dataclass(frozen=True)
class _Kept:
    """A timed prompt [B, T], the tokens [B, K] to read, and keys and values of positions that both have.

    Each of these is [heads, positions, D].
    """

    ids: NDArray[np.int64]
    alone: NDArray[np.int64]
    positions: NDArray[np.int64]
    values: list[NDArray[Any]]


@dataclass(frozen=True)
class _KeptSteps:
    """All tokens of an episode [B, T], the last step's logits [V], and keys and values of some steps' positions."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    positions: NDArray[np.int64]
    values: list[NDArray[Any]]


class Witness:
    """Keeps the results of a few random timed calls; the random numbers are not those of the inputs."""

    def __init__(self, session: DecoderSession) -> None:
        self._session = session
        self._rng = np.random.default_rng()
        self._kept: list[_Kept] = []
        self._num_seen = 0
        self._steps: _KeptSteps | None = None
        self._num_episodes = 0

    def keep(self, ids_BT: NDArray[np.int64], past: Past) -> None:
        """Look at a timed prompt and its cache after the clock was stopped; all have equal probability."""
        self._num_seen += 1
        place = len(self._kept) if self._num_seen <= NUM_CALLS else int(self._rng.integers(self._num_seen))
        if place >= NUM_CALLS:
            return
        room = self._session.config.max_seq_len if past.buffers is None else past.buffers.capacity
        num_alone = self._draw_length(ids_BT.shape[1], room, is_close=place % 2 == 0)
        alone = np.concatenate((ids_BT, ids_BT), axis=1)[:, :num_alone]
        shared = min(ids_BT.shape[1], num_alone)
        positions = np.unique(np.append(self._rng.integers(shared, size=NUM_POSITIONS), shared - 1))
        self._kept[place : place + 1] = [_Kept(ids_BT.copy(), alone.copy(), positions, _at(past, positions))]

    def _draw_length(self, num_tokens: int, room: int, *, is_close: bool) -> int:
        """K for a call of T tokens: within `CLOSE_SHARE` of T, on either side of it, or anywhere below T."""
        if num_tokens == 1:
            return 1
        if not is_close:
            return int(self._rng.integers(max(1, num_tokens // 16), num_tokens))
        apart = int(self._rng.integers(1, max(1, round(num_tokens * CLOSE_SHARE)) + 1))
        is_longer = num_tokens + apart <= room and bool(self._rng.integers(2))
        return num_tokens + apart if is_longer else num_tokens - apart

    def keep_steps(
        self, ids_BT: NDArray[np.int64], steps: Sequence[NDArray[np.int64]], logits: NDArray[np.float32], past: Past
    ) -> None:
        """Look at an episode: its context, the ids [B, 1] that each step read, and the results of the last step.

        One episode is kept; all have equal probability.
        """
        self._num_episodes += 1
        if not steps or int(self._rng.integers(self._num_episodes)):
            return
        ids = np.concatenate((ids_BT, *steps), axis=1)
        num_context, num_tokens = ids_BT.shape[1], ids.shape[1]
        positions = np.unique(np.append(self._rng.integers(num_context, num_tokens, NUM_POSITIONS), num_tokens - 1))
        self._steps = _KeptSteps(ids, logits[0].astype(np.float32), positions, _at(past, positions))

    def testify(self, past: Past) -> dict[str, Any]:
        """Read the kept prompts untimed, shortened or lengthened, over `past`; see `schema.WorkDone`."""
        errors = [self._error(kept, past) for kept in self._kept]
        return {
            "num_calls": len(errors),
            "largest_error": max(errors, default=0.0),
            "step_error": None if self._steps is None else self._step_error(self._steps, past),
            "short_step_ns": self._short_steps(past) if self._kept else [],
        }

    def _error(self, kept: _Kept, past: Past) -> float:
        """Largest RMS difference of a tensor of keys or values, in units of its own RMS."""
        _, alone = self._session.extend(kept.alone, None, past)
        return _largest(map(_difference, kept.values, _at(alone, kept.positions)))

    def _step_error(self, kept: _KeptSteps, past: Past) -> float:
        """The same for the steps' keys and values and for the last logits, against one call that reads all tokens."""
        logits, whole = self._session.extend(kept.ids, None, past)
        errors = map(_difference, kept.values, _at(whole, kept.positions))
        centred = [array - array.mean() for array in (kept.logits, logits[0].astype(np.float32))]
        return _largest((_difference(*centred), *errors))

    def _short_steps(self, past: Past) -> list[int]:
        """Nanoseconds of single steps after a few tokens."""
        half = self._kept[0].ids.shape[1] // 2
        ids_BT = self._kept[0].ids[:, : min(SHORT_TOKENS, max(half, 1))]
        logits, past = self._session.extend(ids_BT, None, past)
        steps = []
        for _ in range(min(NUM_SHORT_STEPS, half)):
            token_ids = logits.argmax(axis=-1)[:, None]
            begin = time.perf_counter_ns()
            logits, past = self._session.decode(token_ids, None, past)
            steps.append(max(time.perf_counter_ns() - begin, 1))
        return steps


def _at(past: Past, positions: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Keys and values of some positions of the first row: each [heads, positions, D]."""
    return [array[0][:, positions].astype(np.float32) for array in past.arrays()]


def _difference(found: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """RMS difference in units of the RMS of the reference."""
    return float(np.sqrt(np.mean((found - truth) ** 2)) / max(float(np.sqrt(np.mean(truth**2))), 1e-12))


def _largest(errors: Iterable[float]) -> float:
    found = list(errors)
    return max(found) if all(np.isfinite(found)) and max(found) < _NO_NUMBER else _NO_NUMBER
