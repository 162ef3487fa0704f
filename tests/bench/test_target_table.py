"""Targets that take over another's, key by key and metric by metric; mistakes name the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest

from havoc_core.bench.judge.targets import load_target
from havoc_core.errors import HavocError


def loaded(tmp_path: Path, text: str, name: str = "own") -> object:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return load_target(f"{path}:{name}")


def test_a_target_of_ones_own_in_five_lines(tmp_path: Path) -> None:
    """The card's device, peaks and effort are taken over; one key of the workload and one limit are one's own."""
    own = loaded(
        tmp_path,
        """
[own]
extends = "gtx1660"
title = "short prompts"
without = ["accuracy/vision", "accuracy/code"]
[own.workload]
prompt_tokens = 128
[[own.limits]]
metric = "prefill_ms"
below = 40
unit = "ms"
[[own.limits]]
metric = "ttft_ms"
below = 50
unit = "ms"
""",
    )
    card = load_target("gtx1660")
    assert (own.device, own.roofline, own.protocol) == (card.device, card.roofline, card.protocol)
    assert (own.workload.prompt_tokens, own.workload.decode_tokens) == (128, card.workload.decode_tokens)
    limits = {limit.metric: limit.value for limit in own.limits}
    kept = {
        limit.metric: limit.value for limit in card.limits if limit.metric not in {"accuracy/vision", "accuracy/code"}
    }
    assert limits == kept | {"prefill_ms": 40.0, "ttft_ms": 50.0}
    assert (own.name, own.title) == ("own", "short prompts")


def test_an_entry_may_extend_its_neighbour(tmp_path: Path) -> None:
    """Of the same file, in whatever order and depth, and a bundled one in the end."""
    text = """
[own]
extends = "middle"
[middle]
extends = "mine"
title = "middle"
[mine]
extends = "host"
title = "my host"
[mine.protocol]
min_processes = 7
"""
    own = loaded(tmp_path, text)
    assert (own.title, own.protocol.min_processes) == ("middle", 7)
    assert own.limits == load_target("host").limits


def test_the_text_targets_are_the_others_without_vision() -> None:
    """For bases that read text only: everything else is the same."""
    for name in ("gtx1660", "host"):
        whole, text = load_target(name), load_target(f"{name}-text")
        assert [limit for limit in whole.limits if limit.metric != "accuracy/vision"] == list(text.limits)
        assert (whole.device, whole.roofline, whole.protocol) == (text.device, text.roofline, text.protocol)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[own]\nextends = "gtx1606"', ("'gtx1606'", "did you mean gtx1660?")),
        ('[own]\nextends = "own"', ("'own'", "not a target")),
        ('[own]\nextends = "b"\n[b]\nextends = "own"', ("own extends b extends own", "circle")),
        ("[own]\nextends = 3", ("name of a target",)),
        (
            '[own]\nextends = "host"\nwithout = ["accuracy/visoin"]',
            ("accuracy/visoin", "did you mean accuracy/vision?"),
        ),
        ('[own]\nextends = "host"\nwithout = "prefill_ms"', ("list of metrics",)),
        ('[own]\ntitle = "x"\nwithout = ["prefill_ms"]', ("without", "extends")),
        ('[own]\nextends = "host"\nlimits = 3', ("limits",)),
        ('[own]\nextends = "host"\nextend = "host"', ("unknown key extend", "did you mean extends?")),
        ('[own]\nextends = "host"\n[own.workload]\nprompt_token = 3', ("prompt_token", "did you mean prompt_tokens?")),
        (
            '[own]\nextends = "host"\n[[own.limits]]\nmetric = "prefill_ms"\nbelwo = 3\nunit = "ms"',
            ("unknown key limits.8.belwo", "did you mean below?"),
        ),
    ],
)
def test_a_mistake_names_the_right_word(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """One line, with the wrong word and the nearest right one."""
    with pytest.raises(HavocError) as caught:
        loaded(tmp_path, text)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
