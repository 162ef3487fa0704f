"""Two ways to read a prompt faster, each against the way before it: edge-135m, random weights, one thread."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from havoc_core.export.package import export_artifact
from havoc_core.export.runtime import providers
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.structure import Structure
from tests.perf.turns import best_times_s

CONTEXT = 512


def opened(name: str, folder: Path) -> DecoderSession:
    artifact = export_artifact("edge-135m", folder / name, structure=Structure.named(name))
    return DecoderSession.open(artifact, num_threads=1)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 49_152, (1, CONTEXT))


def test_products_of_integers(benchmark, row, ids: np.ndarray, tmp_path: Path) -> None:
    """W8A8 against int8 in blocks of 32: a prompt of 512 tokens, and a step behind it."""
    ways = [opened(name, tmp_path) for name in ("int8-cw8a8", "int8")]
    ours_s, blocks_s = best_times_s(*(lambda way=way: way.prefill(ids) for way in ways), num_rounds=5)
    detail = f"{ours_s * 1e3:.0f} ms, {blocks_s * 1e3:.0f} ms"
    row("W8A8 against int8 in blocks, one thread: prefill of 512", blocks_s / ours_s, goal=2, detail=detail)
    pasts = [way.prefill(ids)[1] for way in ways]
    steps = (
        lambda way=way, past=past: way.decode(ids[:, :1], None, past) for way, past in zip(ways, pasts, strict=True)
    )
    ours_s, blocks_s = best_times_s(*steps, num_rounds=50)
    detail = f"{ours_s * 1e3:.2f} ms, {blocks_s * 1e3:.2f} ms"
    row("W8A8 against int8 in blocks, one thread: step at context 512", blocks_s / ours_s, goal=1, detail=detail)
    benchmark.pedantic(ways[0].prefill, args=(ids,), rounds=2)


@pytest.mark.parametrize("name", ["fp32", "int8-cw8a8"])
def test_denormals_as_zero(
    benchmark, row, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A prompt of 512 tokens with denormal numbers as zero against the same session with them as they are."""
    session = opened(name, tmp_path)

    def as_they_are() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(providers, "FlushedDenormals", contextlib.nullcontext)
            session.prefill(ids)

    ours_s, before_s = best_times_s(lambda: session.prefill(ids), as_they_are, num_rounds=5)
    detail = f"{ours_s * 1e3:.0f} ms, {before_s * 1e3:.0f} ms"
    what = f"denormals as zero against as they are, {name}, one thread: prefill of 512"
    row(what, before_s / ours_s, goal=1.1, detail=detail)
    benchmark.pedantic(session.prefill, args=(ids,), rounds=2)
