"""The page of a comparison says what its document holds, and ranks nothing that an interval does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from havoc_core.bench.report.baselines import (
    WRITTEN,
    content,
    html,
    lines,
    markdown,
    notes,
    picture,
    read_baselines,
    write_baselines,
    write_docs,
)
from havoc_core.errors import HavocError

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def run(num_right: int, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """One seed of an arm on 100 rows, undisturbed, its rate the middle one of three."""
    share = num_right / 100
    return {
        "seed": seed,
        "num_right": num_right,
        "num_rows": 100,
        "num_failed": 0,
        "low": share - 0.1,
        "high": min(share + 0.1, 1.0),
        "num_parameters": 320,
        "rate": 0.01,
        "validation": {"num_right": 40, "num_rows": 50, "step": 10},
        "validation_by_rate": [[0.001, 30], [0.01, 40], [0.1, 35]],
        "train_step_s": 10.0,
        "train_cpu_s": 10.0,
        "train_involuntary_switches": 30,
        **changes,
    }


def arm(name: str, shares: list[int], *, low: float, high: float, size: int = 320, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": name.upper(),
        "method": "next-token",
        "matrices": ["q_proj", "v_proj"],
        "num_parameters": size,
        "mean": sum(shares) / len(shares) / 100,
        "difference": {"margin": (low + high) / 2, "low": low, "high": high},
        "runs": [run(share, seed=seed, **changes) for seed, share in enumerate(shares)],
    }


def document(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "format": "havoc-baselines/1",
        "model": "tiny",
        "command": "havoc baselines tiny",
        "task": {"name": "quiz", "metric": "number"},
        "base": {"num_parameters": 1000, "num_right": 50, "num_rows": 100, "low": 0.4, "high": 0.6},
        "training": {"num_steps": 4, "prompts_per_step": 8, "samples_per_prompt": 8},
        "num_training_prompts": 32,
        "rows": {"gate": {"num_rows": 100}, "search": {"num_rows": 50}},
        "seeds": [0, 1],
        "arms": list(arms),
        "pairs": [],
        "lora_over_svf": 32.0,
        **changes,
    }


PROVEN = arm("svf", [60, 70], low=0.05, high=0.25)
OPEN = arm("lora", [55, 52], low=-0.05, high=0.12, size=10_240)
WORSE = arm("kind", [30, 32], low=-0.3, high=-0.08, size=64)


@pytest.mark.parametrize(("one", "word"), [(PROVEN, "better"), (OPEN, "not shown to differ"), (WORSE, "worse")])
def test_better_and_worse_are_said_where_the_interval_says_so(one: dict[str, Any], word: str) -> None:
    """An interval that holds 0 ranks nothing, in every page."""
    (row,) = content(document(one))["arms"]
    assert row["word"] == word
    for page in (markdown(document(one)), html(document(one)), lines(document(one))):
        assert row["interval"] in page
        assert word in page
        assert [other for other in ("is better", "is worse", "beats", "wins") if other in page] == []


def test_pairs_of_arms_are_ranked_by_their_intervals_too() -> None:
    """Two arms with intervals that overlap their base may still differ from each other, or not."""
    pair = {"ours": "svf", "theirs": "lora", "margin": 0.03, "low": -0.01, "high": 0.07}
    both = document(PROVEN, OPEN, pairs=[pair])
    (row,) = content(both)["pairs"]
    assert row == {
        "ours": "SVF",
        "theirs": "LORA",
        "points": "+3.0",
        "interval": "-1.0 to +7.0",
        "word": "not shown to differ",
    }
    assert "| SVF | LORA | +3.0 | -1.0 to +7.0 | not shown to differ |" in markdown(
        document(PROVEN, OPEN, pairs=[pair])
    )


def test_every_figure_of_the_document_is_on_the_pages() -> None:
    """Budget, seeds, ratio, trained values, and each run with its exact interval."""
    for page in (markdown(document(PROVEN, OPEN)), html(document(PROVEN, OPEN))):
        plain = re.sub(r"<[^>]+>|\\", " ", page)
        for word in ("32 prompts: 4 steps of 8 prompts", "0, 1", "32.0 times", "10,240", "65.0 %", "60 of 100"):
            assert word in plain
        assert "60.0 – 80.0 %" in plain  # noqa: RUF001 - the dash of figures.py
        assert "0.001: 30, 0.01: 40, 0.1: 35 of 50" in plain


def test_seconds_of_a_disturbed_training_are_not_shown() -> None:
    """More than 20 involuntary switches in a CPU second: another process had the core in between."""
    (calm,) = content(document(PROVEN))["arms"]
    assert calm["seconds"] == "10 s"
    disturbed = arm("svf", [60, 70], low=0.05, high=0.25, train_involuntary_switches=300)
    (row,) = content(document(disturbed))["arms"]
    assert row["seconds"] == "disturbed"
    assert "training, CPU" not in markdown(document(PROVEN), has_seconds=False)


def test_notes_say_what_limits_the_figures() -> None:
    """One seed, a rate at the end of those tried, a base that nothing beat, answers that could not be judged."""
    assert notes(document(PROVEN)) == []
    assert any("one seed" in note for note in notes(document(PROVEN, seeds=[0])))
    edge = arm("svf", [60], low=0.0, high=0.1, rate=0.1, num_failed=2)
    said = notes(document(edge))
    assert any("better: SVF, seed 0" in note for note in said)
    assert any("the judge failed on 2 answers" in note for note in said)
    unmoved = arm("svf", [50], low=-0.1, high=0.1, rate=0.001, validation={"num_right": 1, "num_rows": 50, "step": 0})
    (note,) = notes(document(unmoved))
    assert "no step beat the base" in note
    sampled = document(PROVEN | {"method": "reinforce"})
    assert notes(sampled) == ["reinforce samples 8 answers to each of its prompts; next-token reads one reference"]


def test_the_picture_has_a_dot_for_every_run() -> None:
    """At its trained values on a logarithmic axis; arms of one size stand side by side, each in its colour."""
    twin = arm("twin", [61, 62], low=0.0, high=0.2)
    svg = picture(document(PROVEN, twin, OPEN))
    root = ET.fromstring(svg)
    places: dict[str, list[float]] = {}
    for mark in root.iter(f"{SVG}use"):
        style = mark.get("style") or ""
        for index in range(3):
            if f"fill: var(--series-{index})" in style:
                places.setdefault(f"series-{index}", []).append(float(mark.get("x") or 0))
    assert [len(found) for found in places.values()] == [2, 2, 2]
    assert max(places["series-0"]) < min(places["series-1"]) < max(places["series-1"]) < min(places["series-2"])
    words = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    assert {"SVF", "TWIN", "LORA", "base", "trained values, logarithmic"} <= set(words)


def test_names_from_outside_stay_text() -> None:
    """A model's folder or a task may be called anything."""
    hostile = document(PROVEN, model="<script>x</script>|`rm`")
    assert "<script>" not in html(hostile)
    assert "\\|" in markdown(hostile)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Three files, the same bytes for the same document; another JSON file is refused."""
    write_baselines(document(PROVEN), tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in WRITTEN}
    assert read_baselines(tmp_path / "baselines.json") == json.loads(json.dumps(document(PROVEN)))
    write_baselines(document(PROVEN), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in WRITTEN} == first
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(HavocError, match=r"other.json: .*havoc-baselines/1"):
        read_baselines(tmp_path / "other.json")


def test_the_kept_page_is_what_the_records_give(tmp_path: Path) -> None:
    """docs/baselines.md is never written by hand: the command writes the same bytes from reports/."""
    write_docs(ROOT / "reports", tmp_path / "baselines.md")
    assert (tmp_path / "baselines.md").read_text() == (ROOT / "docs" / "baselines.md").read_text()


def test_the_kept_pages_are_what_their_documents_give(tmp_path: Path) -> None:
    """The text beside a kept document was not touched since; the look of an HTML page may have changed."""
    for kept in sorted((ROOT / "reports").rglob("baselines.json")):
        write_baselines(read_baselines(kept), tmp_path)
        assert (tmp_path / "baselines.md").read_bytes() == (kept.parent / "baselines.md").read_bytes()


def test_docs_need_a_record(tmp_path: Path) -> None:
    """A page without its records would be a claim."""
    with pytest.raises(HavocError, match=r"no baselines.json; `havoc baselines`"):
        write_docs(tmp_path, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
