"""What docs/extending.md adds as a file of data works as it stands there: a task and a target card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from havoc_core.bench.judge.targets import load_target
from havoc_core.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A folder with every file that the page shows after its name."""
    files = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for name, text in files:
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_task_is_one_file(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are scored under its name."""
    rows = [json.loads(line) for line in (example / "colours.jsonl").read_text().splitlines()]
    assert main(["eval", "nano", "--task", str(example / "colours.toml"), "--json", "--quiet"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy["colours"]["num_rows"] == len(rows)


def test_a_target_card_is_one_entry(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it says is its own, the rest is that of the entry it extends; `plan` reckons with its peaks."""
    path = example / "cards.toml"
    card, base = load_target(str(path)), load_target("gtx1660")
    assert set(card.device.model_fields_set) == set(base.device.model_fields_set)
    assert all(
        getattr(card.device, name) != getattr(base.device, name) for name in base.device.model_fields_set - {"kind"}
    )
    limits = {limit.metric: limit.value for limit in base.limits} | {"prefill_ms": 40.0}
    assert {limit.metric: limit.value for limit in card.limits} == limits
    assert card.protocol == base.protocol
    ceilings = []
    for target in (str(path), "gtx1660"):
        main(["plan", "edge-135m", "--target", target, "--json"])
        ceilings.append(json.loads(capsys.readouterr().out))
    assert ceilings[0]["target"] == "my-rtx"
    assert ceilings[0] != ceilings[1]
