"""One catalogue says what every metric means; the page is written from it, and a name means one thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from havoc_core.track.catalogue import AXES, CATALOGUE, logged_metric, markdown

ROOT = Path(__file__).parents[2]
SEED_003 = (
    *(f"svf/math/{name}" for name in ("loss", "reward", "kl_div", "accuracy")),
    *(f"adas/best_{name}" for name in ("latency_ms", "accuracy", "memory_gb", "throughput_tps")),
    "adas/generation",
    "adas/pareto_front_size",
    *(f"mixture/{name}" for name in ("math", "code", "reasoning", "vision")),
    *(f"final/{name}" for name in ("latency_ms", "accuracy", "vram_gb", "throughput_tps")),
)


def test_the_page_is_the_catalogue() -> None:
    """docs/metrics.md is not edited by hand: `make metrics` writes it."""
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown(), "docs/metrics.md is stale: make metrics"


@pytest.mark.parametrize("name", SEED_003)
def test_the_seeds_names_are_in_it(name: str) -> None:
    """A dashboard that was made for the seed's names finds them."""
    assert logged_metric(name) is not None


def test_a_name_falls_under_one_row() -> None:
    """An example of each row matches that row alone."""
    for metric in CATALOGUE:
        example = re.sub(r"\{\w+\}", "x", metric.name)
        assert [row.name for row in CATALOGUE if row.pattern.fullmatch(example)] == [metric.name]


def test_every_row_says_what_it_is() -> None:
    """Unit and meaning are there, the axis is known, and its placeholders can be filled from the name."""
    for metric in CATALOGUE:
        assert metric.unit
        assert metric.meaning
        assert metric.axis in {*AXES, ""}
        assert set(re.findall(r"\{\w+\}", metric.axis)) <= set(re.findall(r"\{\w+\}", metric.name))
        assert (ROOT / metric.source).is_file()


def test_a_name_that_nobody_catalogued_is_unknown() -> None:
    """Neither a wrong word nor a slash in the place of a word."""
    assert logged_metric("svf/math/lost") is None
    assert logged_metric("mixture/a/b") is None
    found = logged_metric("svf/math/z/3/q_proj/norm")
    assert found is not None
    assert found.axis_of("svf/math/z/3/q_proj/norm") == "svf/math/step"
