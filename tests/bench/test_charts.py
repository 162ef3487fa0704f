"""Pictures show every sample they claim to, mark what a reader looks for, and survive hostile names."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from havoc_core.bench.report import charts
from havoc_core.bench.report.search_files import Front
from tests.bench import sample_records as samples

SVG = "{http://www.w3.org/2000/svg}"


def words(svg: str | None) -> list[str]:
    """Return every text of a picture; it is well-formed on its own."""
    assert svg is not None
    return ["".join(text.itertext()).strip() for text in drawn(svg).iter(f"{SVG}text")]


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def num_marks(svg: str | None, colour: str) -> int:
    """Count the markers drawn in a colour of the page."""
    assert svg is not None
    uses = [mark.get("style") or "" for mark in drawn(svg).iter(f"{SVG}use")]
    return sum(f"fill: var({colour})" in style or f"stroke: var({colour})" in style for style in uses)


def candidate(key: str, share: float, *, weights: str = "fp32", again: float | None = None) -> dict[str, Any]:
    return {
        "key": key,
        "structure": {"weight_format": weights},
        "cost": {"prefill_ms": 10.0 + 10 * share, "peak_bytes": 1e8},
        "search_accuracy": {"math": share},
        "rescored_accuracy": None if again is None else {"math": again},
    }


def test_every_call_of_every_process_is_a_dot() -> None:
    """Five processes of 20 calls are 20 dots in each of five colours, and each process is named above its own."""
    svg = charts.latency_series(samples.record("cpu", telemetry=[]))
    assert [num_marks(svg, f"--series-{index}") for index in range(5)] == [20] * 5
    assert {"0", "1", "2", "3", "4", "prefill, ms"} <= set(words(svg))


def test_clocks_lie_under_the_calls_they_belong_to() -> None:
    """A card's core clock and temperature are drawn; readings after the timed calls are not."""
    record = samples.record("cuda", telemetry__each__t_ns=200_000_000)
    late = samples.record("cuda", telemetry__each__t_ns=10**12)
    assert {"core, MHz", "°C"} <= set(words(charts.latency_series(record)))
    assert num_marks(charts.latency_series(record), "--series-0") == 20 + 2 * 20
    assert num_marks(charts.latency_series(late), "--series-0") == 20 + 2  # the nearest stands for a short process


def test_the_histogram_holds_its_quantiles_and_the_limit() -> None:
    """Median, 90th percentile and a limit nearby are lines with their figures; a limit far off is not drawn."""
    record = samples.record("cpu")
    assert {"p50 = 20.1 ms", "p90 = 20.1 ms", "limit 21 ms"} <= set(words(charts.latency_histogram(record, 21.0)))
    assert not any("limit" in word for word in words(charts.latency_histogram(record, 100.0)))


def test_memory_marks_load_prefill_and_decode() -> None:
    """The timeline names the phases where they begin, and the peak; short phases do not write over one another."""
    begins = {"load": 0, "first_run": 5_000_000, "decode": 5_100_000, "steady": 10_000_000}
    svg = charts.memory_timeline(samples.record("cuda", memory__vram__each__phase_start_ns=begins), 4.1e8)
    assert {"load", "prefill", "decode", "steady", "peak 400 MB", "limit 410 MB", "VRAM, MB"} <= set(words(svg))
    places = [float(x) for x in re.findall(r'x="([\d.]+)"[^>]*>(?:load|prefill|decode|steady)<', str(svg))]
    places = places or [
        float(x) for x in re.findall(r"translate\(([\d.]+)[^>]*>(?:load|prefill|decode|steady)<", str(svg))
    ]
    assert len(places) == 4
    assert min(right - left for left, right in itertools.pairwise(places)) > 25


def test_the_front_is_joined_and_arrows_lead_to_what_was_confirmed() -> None:
    """Candidates, the line of the front, the chosen one, and an arrow for each score that was repeated."""
    rows = [candidate("a", 0.9), candidate("b", 0.95, weights="int8", again=0.93), candidate("c", 0.5)]
    front = Front.model_validate({"candidates": rows, "front": ["a", "b"], "chosen": "b"})
    plain = charts.pareto_front(front, None)
    assert {"front", "fp32", "int8", "chosen", "mean accuracy, %", "prefill, ms"} <= set(words(plain))
    assert "gate split" in words(charts.pareto_front(front, 92.0))
    assert str(charts.pareto_front(front, 92.0)).count("<path") > str(plain).count("<path")
    assert charts.pareto_front(Front(), None) is None


def test_what_was_simulated_is_hollow_in_the_history() -> None:
    """A simulated run is no point of the measured line: it has its own, named, hollow one."""

    def run(value: float, evidence: str) -> dict[str, Any]:
        about = {"folder": evidence, "device": "GTX 1660", "fingerprint": "a", "evidence": evidence}
        return about | {"metrics": {"prefill_ms": value}}

    runs = [run(20.0, "measured"), run(5.0, "simulated"), run(21.0, "measured")]
    svg = charts.history("prefill_ms", "ms", runs)
    assert {"GTX 1660", "GTX 1660, simulated"} <= set(words(svg))
    assert num_marks(svg, "--series-0") == 2 + 1  # two runs and the legend
    assert charts.history("prefill_ms", "ms", runs[:1]) is None


def test_thinning_keeps_the_highest() -> None:
    """Of more points than a page needs, the peak of each run of neighbours stays, in order."""
    values = [1] * 4000
    values[1234] = 99
    times, kept = charts._thinned(range(4000), values)
    assert len(times) <= charts._MOST_POINTS
    assert (max(kept), times[kept.index(99)]) == (99, 1234)
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["$\\frac{", "_hidden", "<script>", "bell\x07 \x1b[31m", "&amp;", "\u6e2c\u5b9a"])
def test_hostile_names_are_drawn_as_they_stand(name: str) -> None:
    """What looks like mathematics, markup or a terminal's command is text, and the picture stays well-formed."""
    svg = charts.memory_timeline(samples.record("cpu", memory__rss__each__method=name), None)
    assert any("seconds in process 1" in word for word in words(svg))
    assert "\x07" not in str(svg)
    assert "<script" not in str(svg)


def test_structures_of_one_weight_format_are_told_apart() -> None:
    """Plain int4 and int4 with half of the rank are two names and two colours; an unreadable one is its format."""
    plain = {"weight_format": "int4", "activation_dtype": "fp32", "block_size": 32}
    cut = plain | {"is_symmetric": False, "quantizer": "hqq", "rank_fraction": 0.5}
    structures = (plain, cut, {"weight_format": "int2", "rank_fraction": 10**400})
    rows = [
        candidate(key, share) | {"structure": own}
        for key, share, own in zip("abc", (0.7, 0.8, 0.9), structures, strict=True)
    ]
    front = Front.model_validate({"candidates": rows})
    assert {"int4-fp32-cfp32", "int4a-hqq-fp32-cfp32-r0.50", "int2"} <= set(words(charts.pareto_front(front, None)))
