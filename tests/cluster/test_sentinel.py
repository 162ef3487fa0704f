"""A worker that drifts is told from one that is noisy."""

from __future__ import annotations

import pytest

from havoc_core.cluster.sentinel import FACTOR, LEAST_NOISE, Sentinel


def speed(scale: float) -> dict[str, float]:
    return {"prefill_ms": 10.0 * scale, "decode_tok_per_s": 100.0 / scale, "peak_bytes": 1e6}


@pytest.mark.parametrize(
    ("scale", "is_outside"), [(1.0, False), (1.05, False), (0.95, False), (1.08, True), (0.92, True)]
)
def test_quiet_worker(scale: float, is_outside: bool) -> None:
    """Equal measurements allow what the least noise allows, 6 %; slower and faster are both another device."""
    assert pytest.approx(0.06) == FACTOR * LEAST_NOISE
    assert bool(Sentinel.of([speed(1.0), speed(1.0)]).moved(speed(scale))) == is_outside


def test_noisy_worker_is_allowed_its_noise() -> None:
    """Repeats that differ by 10 % allow 30 %; the words give both."""
    sentinel = Sentinel.of([speed(1.0), speed(1.1)])
    assert sentinel.moved(speed(1.25)) == ""
    words = sentinel.moved(speed(1.6))
    assert "prefill_ms of the sentinel moved by +52.4%" in words
    assert "noise allows 30.0%" in words


def test_later_repeats_widen_the_noise() -> None:
    """What another structure's repeats differ by is the worker's noise too; memory is no speed."""
    sentinel = Sentinel.of([speed(1.0), speed(1.0)])
    assert sentinel.moved(speed(1.2))
    sentinel.learn([speed(2.0), speed(2.2)])
    assert sentinel.moved(speed(1.2)) == ""
    assert sentinel.moved(speed(1.0) | {"peak_bytes": 9e9}) == ""
