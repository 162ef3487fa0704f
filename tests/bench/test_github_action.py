"""The composite action's own script, run as a runner runs it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from havoc_core.bench.device import identify_cpu

yaml = pytest.importorskip("yaml")
samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample_records.py"))))
GITHUB = Path(__file__).parents[2] / ".github"


def judge_step(folder: Path, record: Path, target: str) -> tuple[int, str, str]:
    """Run the action's step `judge`; return its exit code, outputs and summary."""
    action = yaml.safe_load((GITHUB / "actions" / "gate" / "action.yml").read_text())
    script = next(step["run"] for step in action["runs"]["steps"] if step.get("id") == "judge")
    commands = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "RUNNER_TEMP": str(folder),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "RECORD": str(record),
        "TARGET": target,
        "ARTIFACT": "",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (folder / "output").read_text(), (folder / "summary").read_text()


def test_the_action_passes_and_fails_with_the_gate(tmp_path: Path) -> None:
    """A pass is green with its report; another device is red; a broken record is red and says so."""
    cpu = identify_cpu().model_dump(mode="json")
    record = tmp_path / "record.json"
    samples.record("cpu", device__cpu=cpu, device__name=cpu["name"]).save(record)
    for target, code, verdict in (("host", 0, "pass"), ("gtx1660", 5, "not_measured")):
        folder = tmp_path / target
        folder.mkdir()
        found, outputs, summary = judge_step(folder, record, target)
        assert found == code
        assert f"verdict={verdict}\nexit-code={code}\n" in outputs
        assert f"`{target}`" in summary
        assert (folder / "havoc-report" / "junit.xml").is_file()
    record.write_text("{")
    (tmp_path / "broken").mkdir()
    found, outputs, summary = judge_step(tmp_path / "broken", record, "host")
    assert found == 2
    assert "verdict=invalid\nexit-code=2" in outputs
    assert "Not judged" in summary


@pytest.mark.parametrize("name", ["measure", "gate"])
def test_workflows_grant_little_and_pin_what_they_use(name: str) -> None:
    """No permission by default, every foreign action by its hash, and no input pasted into a script."""
    text = (GITHUB / "workflows" / f"{name}.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            uses = step.get("uses", "")
            assert not uses or uses.startswith("./") or len(uses.partition("@")[2]) == 40
            assert "${{" not in step.get("run", "")
