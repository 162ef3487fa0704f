"""A candidate session is the export of the same mixture, without exporting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from havoc_core.adapt.expert import Expert
from havoc_core.adapt.svf import Basis
from havoc_core.adapt.tasks.task import Prompt
from havoc_core.export.candidates import CandidateSessions
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source, open_source
from havoc_core.model.structure import Structure

NAMES = (
    "fp32",
    "fp16",
    "int8",
    "int4",
    "fp16-fp16",
    "int4a-k_quant-b64",
    "int8a-b16",
    "int4a-hqq-fp16",
    "int4a-gptq",
    "int4-gptq-mix5.5",
    "int8-cw8a8",
)
STRUCTURES = [Structure.named(name) for name in NAMES]
IDS = np.arange(4, 40)[None]


@pytest.fixture(scope="module")
def sessions(base_directory: Path, basis: Basis, experts: list[Expert]) -> CandidateSessions:
    return CandidateSessions(base_directory, basis, experts, num_threads=1)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_difference_to_a_fresh_export_is_zero(
    sessions: CandidateSessions, source: Source, tmp_path: Path, structure: Structure
) -> None:
    """The same folded weights written, loaded from disk and run give the same logits, every bit, for every format."""
    alpha = (1.3, 0.6)
    written = Source("folded", source.config, sessions.folded(alpha), source.directory)
    fresh = DecoderSession.open(export_artifact(written, tmp_path / "a", structure=structure), num_threads=1)
    live = sessions.open(alpha, structure)
    patches = np.random.default_rng(0).uniform(-1, 1, (2, 192)).astype(np.float32)
    for ids, images in ((IDS, None), (np.array([[5, 3, 3, 9]]), patches)):
        ours, our_past = live.prefill(ids, None, images)
        theirs, their_past = fresh.prefill(ids, None, images)
        assert np.array_equal(ours, theirs)
        ours, _ = live.decode(ids[:, :1], None, our_past)
        theirs, _ = fresh.decode(ids[:, :1], None, their_past)
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("options", [GraphOptions(cache="static"), GraphOptions(dialect="contrib")], ids=str)
def test_candidates_are_written_as_the_export_is(
    base_directory: Path, basis: Basis, experts: list[Expert], tmp_path: Path, options: GraphOptions
) -> None:
    """A candidate in another dialect or over a static cache is the export of the same, every bit."""
    sessions = CandidateSessions(base_directory, basis, experts, options=options, num_threads=1)
    written = Source("folded", open_source(base_directory).config, sessions.folded((1.3, 0.6)), base_directory)
    fresh = DecoderSession.open(export_artifact(written, tmp_path / "a", options=options), num_threads=1)
    live = sessions.open((1.3, 0.6), Structure())
    assert live.options == fresh.options
    assert np.array_equal(live.prefill(IDS)[0], fresh.prefill(IDS)[0])


def test_the_mixture_is_that_of_an_export_of_the_experts(
    sessions: CandidateSessions, source: Source, experts: list[Expert], tmp_path: Path
) -> None:
    """Summing dense deltas and folding through the basis differ by rounding alone."""
    alpha = (1.3, 0.6)
    fresh = DecoderSession.open(export_artifact(source, tmp_path / "a", experts=experts, alpha=alpha))
    ours, theirs = (session.prefill(IDS)[0] for session in (sessions.open(alpha, Structure()), fresh))
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_session_outlives_the_next_candidate(sessions: CandidateSessions) -> None:
    """Opening another mixture does not change one that is open: its weights are its own."""
    first = sessions.open((1.0, 0.0), Structure())
    before, _ = first.prefill(IDS)
    second = sessions.open((0.0, 2.0), Structure())
    assert np.abs(second.prefill(IDS)[0] - before).max() > 0.01
    after, _ = first.prefill(IDS)
    assert np.array_equal(before, after)


def test_a_candidate_writes_text(sessions: CandidateSessions, source: Source, tmp_path: Path) -> None:
    """The base's tokenizer comes along: the text is that of the exported mixture."""
    structure, asked = Structure("int8"), [Prompt("What is 12 + 30?")]
    written = Source("folded", source.config, sessions.folded((0.5, 0.5)), source.directory)
    fresh = DecoderSession.open(export_artifact(written, tmp_path / "a", structure=structure), num_threads=1)
    (text,) = sessions.open((0.5, 0.5), structure).generate_text(asked, max_new_tokens=5)
    assert text != ""
    assert [text] == fresh.generate_text(asked, max_new_tokens=5)
