"""The parts of the proof: what it reads and in which pieces, what it compares, and what it says."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from havoc_core.errors import MeasurementError
from havoc_core.export import parity
from havoc_core.export.package import export_artifact
from havoc_core.export.parity import FLOOR, MAX_RATIO, ParityCase, ParityReport, Reference, compare, read_reference
from havoc_core.export.reference import FP32, StreamedModel
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.probe import Probe, make_probe
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.config import HavocConfig

CASE = ParityCase(
    name="prefill",
    measure="torch fp32",
    num_positions=100,
    error=2e-6,
    worst_error=4e-6,
    torch_error=1e-6,
    torch_worst_error=2e-6,
    max_abs_diff=1e-4,
    top1_share=1.0,
)


def case_with(**changes: Any) -> ParityCase:
    return ParityCase(**{**vars(CASE), **changes})


class Watched:
    """A real session that keeps what it was asked: for a past (rows, capacity), for a piece (rows, tokens, ...)."""

    def __init__(self, session: DecoderSession) -> None:
        self.config, self.options = session.config, session.options
        self.asked: list[Any] = []
        self._session = session

    def empty_past(self, num_rows: int, *, capacity: int | None = None) -> Any:
        self.asked.append((num_rows, capacity))
        return self._session.empty_past(num_rows, capacity=capacity)

    def extend(self, ids_BT: np.ndarray, *rest: Any) -> Any:
        return self._asked("last", self._session.extend, ids_BT, *rest)

    def extend_all(self, ids_BT: np.ndarray, *rest: Any) -> Any:
        return self._asked("all", self._session.extend_all, ids_BT, *rest)

    def _asked(self, logits: str, work: Any, ids_BT: np.ndarray, mask: Any, past: Any, patches: Any) -> Any:
        num_patches = None if patches is None else len(patches)
        self.asked.append((*ids_BT.shape, None if mask is None else mask.shape[1], num_patches, logits))
        return work(ids_BT, mask, past, patches)


class Heard:
    """A progress that keeps the names of stages and the notes in them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[Heard]:
        self.names.append(f"{name}, {total} {unit}".strip())
        yield self

    def advance(self, n: int = 1, note: str = "") -> None:
        self.notes += [note] * n


def reference_of(source: Source) -> Reference:
    return read_reference(StreamedModel(source.config, source.tensors), make_probe(source.config))


@pytest.fixture
def parts(request: pytest.FixtureRequest, configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> Any:
    """What a proof needs of a decoder: its reference and its session, which is watched."""
    kind, options = request.param
    source = source_with(configs[kind])
    artifact = export_artifact(source, tmp_path / "a", options=options)
    return reference_of(source), Watched(DecoderSession.open(artifact))


def pieces(cuts: list[int], *, num_patches: int | None = None) -> list[tuple[int, int, None, int | None, str]]:
    """One row read without a mask in pieces that end at `cuts`; its patches come with the first."""
    starts = [0, *cuts[:-1]]
    return [
        (1, stop - start, None, num_patches if start == 0 else None, "last")
        for start, stop in zip(starts, cuts, strict=True)
    ]


def padded(cuts: list[int], *, num_patches: int | None = None) -> list[tuple[int, int, int, int | None, str]]:
    """Three rows read with a mask as long as what was read."""
    starts = [0, *cuts[:-1]]
    return [
        (3, stop - start, stop, num_patches if start == 0 else None, "last")
        for start, stop in zip(starts, cuts, strict=True)
    ]


@pytest.mark.parametrize("parts", [("text", GraphOptions())], indirect=True)
def test_a_text_decoder_is_read_in_every_way(parts: tuple[Reference, Watched]) -> None:
    """Rows of 24, 19 and 12 tokens alone, with and without buffers; step by step, in chunks; padded, whole and last."""
    reference, session = parts
    heard = Heard()
    cases = compare(reference, session, FP32, progress=heard)
    alone = [((1, n), *pieces([n])) for n in (24, 19, 12)]
    new = [((1, None), *pieces([n])) for n in (24, 19, 12)]
    assert session.asked == [
        *itertools.chain(*alone, *new),
        *[(1, 24), *pieces(list(range(1, 25)))],
        *[(1, 24), *pieces([7, 8, 17, 24])],
        *[(3, 24), *padded([24])],
        *[(3, 24), *padded(list(range(12, 25)))],
    ]
    assert [case.num_positions for case in cases] == [3, 3, 24, 4, 3, 38]
    assert heard.names == ["compare the graph with float64, None"]
    assert [note.partition(":")[0] for note in heard.notes] == [case.name for case in cases]
    assert all(note.endswith(" times torch's error") for note in heard.notes)


@pytest.mark.parametrize("parts", [("vision", GraphOptions())], indirect=True)
def test_pictures_come_with_the_first_piece(parts: tuple[Reference, Watched]) -> None:
    """The row without a picture is read in pieces; padded rows are read by steps once every picture is in."""
    reference, session = parts
    heard = Heard()
    cases = compare(reference, session, FP32, label="a card", progress=heard)
    images = [4, None, 4]
    alone = [((1, n), *pieces([n], num_patches=image)) for n, image in zip((24, 19, 12), images, strict=True)]
    new = [((1, None), *read[1:]) for read in alone]
    assert session.asked == [
        *itertools.chain(*alone, *new),
        *[(1, 19), *pieces(list(range(1, 20)))],
        *[(1, 19), *pieces([7, 8, 17, 19])],
        *[(3, 24), *padded([24], num_patches=8)],
        *[(3, 24), *padded(list(range(17, 25)), num_patches=8)],
    ]
    assert [case.num_positions for case in cases] == [3, 3, 19, 4, 3, 24]
    assert heard.names == ["compare a card with float64, None"]
    assert {case.name.partition(", ")[0] for case in cases} == {"a card"}


@pytest.mark.parametrize("parts", [("text", GraphOptions(logits="all", cache="static"))], indirect=True)
def test_with_all_logits_every_real_position_counts(parts: tuple[Reference, Watched]) -> None:
    """And no padding; a static cache has no buffers to be new."""
    reference, session = parts
    cases = compare(reference, session, FP32)
    assert {case.name: case.num_positions for case in cases} == {
        "prefill": 55,
        "single steps": 24,
        "chunked prefill": 24,
        "left-padded batch": 55,
        "left-padded steps": 55,
    }
    assert {asked[-1] for asked in session.asked if len(asked) > 2} == {"all"}


def test_no_more_than_so_many_single_steps_are_read(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path
) -> None:
    """Of 30 tokens the first 23 alone, then the rest together; and a padded first row counts with its padding."""
    source = source_with(configs["text"])
    session = Watched(DecoderSession.open(export_artifact(source, tmp_path / "a")))
    model, probe = StreamedModel(source.config, source.tensors), make_probe(source.config, num_tokens=30)
    compare(read_reference(model, probe), session, FP32)
    first = session.asked.index((1, 1, None, None, "last"))
    assert session.asked[first - 1 : first + 24] == [(1, 30), *pieces([*range(1, parity.NUM_STEPS), 30])]
    session.asked.clear()
    turned = Probe(probe.ids[::-1].copy(), probe.mask[::-1].copy(), probe.images[::-1])
    parity._read(session, read_reference(model, turned), [0, 1, 2], [])
    assert session.asked == [(3, 30), *padded([30])]


@pytest.mark.parametrize("parts", [("text", GraphOptions())], indirect=True)
def test_a_cut_at_the_end_is_none(parts: tuple[Reference, Watched]) -> None:
    """No piece is empty."""
    reference, session = parts
    parity._read(session, reference, [1], [19, 30])
    assert session.asked == [(1, 19), *pieces([19])]


def test_the_last_picture_ends_with_the_shortest_row(configs: dict[str, HavocConfig]) -> None:
    """Its first real column, the begin token and four patches; without pictures the first column is enough."""
    assert parity._last_image(make_probe(configs["vision"])) == 12 + 1 + 4
    assert parity._last_image(make_probe(configs["text"])) == 1


def test_errors_are_in_units_of_the_spread(configs: dict[str, HavocConfig], source_with) -> None:
    """A head a hundred times as large changes no error; one of zeros has no spread, which then counts as 1."""
    source = source_with(configs["untied"])
    references = {}
    for scale in (1.0, 64.0, 0.0):
        head = source.tensors["lm_head.weight"] * scale
        references[scale] = reference_of(Source("t", source.config, {**source.tensors, "lm_head.weight": head}, None))
    assert references[64.0].spread == pytest.approx(64 * references[1.0].spread)
    assert references[64.0].errors["torch fp32"] == pytest.approx(references[1.0].errors["torch fp32"], rel=1e-3)
    assert references[0.0].spread == 1.0
    mask, place = references[1.0].probe.mask, references[1.0].place_BT
    assert place[mask == 1].tolist() == list(range(55))
    assert (place[mask == 0] < 0).all()


def test_a_comparison_by_hand() -> None:
    """Four positions of which two were read: errors over those, torch's over all where that is worse."""
    exact_NV = np.array([[0.0, 2.0], [4.0, 0.0], [0.0, 6.0], [8.0, 0.0]])
    reference = Reference(
        probe=make_probe(HavocConfig.pico()),
        logits_NV=exact_NV,
        place_BT=np.zeros((1, 1), np.int64),
        spread=2.0,
        errors={"torch fp32": np.array([3.0, 1.0, 5.0, 1.0])},
    )
    actual_NV = np.array([[4.0, 2.0], [0.0, 9.0]], np.float32)
    found = parity._compared("a", reference, FP32, actual_NV, np.array([1, 2]))
    assert found == ParityCase(
        name="a",
        measure="torch fp32",
        num_positions=2,
        error=pytest.approx(np.sqrt(0.8125)),
        worst_error=pytest.approx(np.sqrt(4.5) / 2),
        torch_error=pytest.approx(np.sqrt(13)),
        torch_worst_error=5.0,
        max_abs_diff=3.0,
        top1_share=1.0,
    )
    below = parity._compared("a", reference, FP32, np.array([[0.0, 1.0]], np.float32), np.array([0]))
    assert (below.torch_error, below.top1_share) == (3.0, 1.0)
    all_wrong = parity._compared("a", reference, FP32, actual_NV[::-1], np.array([1, 2]))
    assert all_wrong.top1_share == 0.0


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        ({}, 2.0),
        ({"error": 3e-6}, 3.0),
        ({"worst_error": 9e-6}, 4.5),
        ({"torch_error": 1e-9}, 2e-6 / FLOOR),
        ({"torch_worst_error": 1e-9}, 4e-6 / FLOOR),
    ],
)
def test_the_ratio_is_the_larger_of_two(changes: dict[str, float], ratio: float) -> None:
    """The mean error and the worst position's, each over torch's, which counts as at least the floor."""
    assert case_with(**changes).ratio == pytest.approx(ratio)


def test_a_report_gives_its_largest_ratio() -> None:
    """Of all its cases."""
    report = ParityReport(cases=(CASE, case_with(error=4e-6), CASE))
    assert report.max_ratio == 4.0
    assert [case["ratio"] for case in report.to_json()["cases"]] == [2.0, 4.0, 2.0]


def test_the_limit_itself_is_allowed() -> None:
    """Five times torch's error is no failure, more is, and what is not finite is told as that."""
    parity._require(case_with(error=4e-6, torch_error=8e-7, worst_error=0.0))
    assert case_with(error=4e-6, torch_error=8e-7, worst_error=0.0).ratio == MAX_RATIO
    with pytest.raises(MeasurementError) as caught:
        parity._require(case_with(error=5.2e-6))
    assert str(caught.value) == (
        "the exported graph does not compute the function of its weights, prefill: its error is 5.2 times that of "
        "torch fp32 (allowed 5): 5.2e-06 of the logits' spread on average, 4e-06 at the worst position; nothing was "
        "written"
    )
    for value in (np.nan, np.inf):
        with pytest.raises(MeasurementError, match="prefill: a logit is not finite; nothing was written"):
            parity._require(case_with(error=value))


def test_a_large_ratio_has_no_digits_behind_the_point() -> None:
    """Three digits below a thousand, all of them from there on."""
    assert [parity._times(ratio) for ratio in (5.126, 999.4, 1000.0, 12345.6)] == ["5.13", "999", "1,000", "12,346"]
