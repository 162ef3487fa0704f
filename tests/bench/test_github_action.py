"""The composite action's own script, run as a runner runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from havoc_core.bench.device import identify_cpu
from tests.bench import sample_records as samples

yaml = pytest.importorskip("yaml")
GITHUB = Path(__file__).parents[2] / ".github"


def judge_step(folder: Path, record: Path, target: str, artifact: str = "", verified: str = "") -> tuple[int, str, str]:
    """Run the action's step `judge`; return its exit code, outputs and summary."""
    action = yaml.safe_load((GITHUB / "actions" / "gate" / "action.yml").read_text())
    script = next(step["run"] for step in action["runs"]["steps"] if step.get("id") == "judge")
    installed = folder / "havoc"  # where the step before puts HAVOC
    installed.mkdir()
    (installed / "bin").symlink_to(Path(sys.executable).parent)
    environment = os.environ | {
        "RUNNER_TEMP": str(folder),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "RECORD": str(record),
        "TARGET": target,
        "ARTIFACT": artifact,
        "VERIFIED": verified,
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


def test_the_pages_say_what_the_gate_said(own_artifact: Path, tmp_path: Path) -> None:
    """Of another artifact: red everywhere. The summary, badge and JUnit said PASS while the gate ended in 5."""
    cpu = identify_cpu().model_dump(mode="json")
    record = tmp_path / "record.json"
    here = {"device__cpu": cpu, "device__name": cpu["name"]}
    for name, changes, code, word in (
        ("right", samples.made_from(own_artifact), 0, "Pass"),
        ("other", {}, 5, "Invalid"),
    ):
        samples.record("cpu", **here, **changes).save(record)
        folder = tmp_path / name
        folder.mkdir()
        found, outputs, summary = judge_step(folder, record, "host", str(own_artifact))
        assert found == code
        assert f"**{word}** on `host`" in summary
        assert "artifact not checked" not in summary
        badge = json.loads((folder / "havoc-report" / "badge.json").read_text())
        assert (badge["message"] == "pass") is (code == 0)
        suite = ET.parse(folder / "havoc-report" / "junit.xml").getroot()[0]
        assert (int(suite.get("errors", "0")) == 0) is (code == 0)
        assert f"verdict={'pass' if code == 0 else 'invalid'}" in outputs


def test_what_was_built_must_have_been_made_again(own_artifact: Path, tmp_path: Path) -> None:
    """The workflow's own lines build and verify nano; a target that asks for it passes with the result alone."""
    build = yaml.safe_load((GITHUB / "workflows" / "build.yml").read_text())["jobs"]["build"]
    script = next(step["run"] for step in build["steps"] if step.get("name") == "Build")
    uploaded = {step["with"]["name"] for step in build["steps"] if "upload-artifact" in step.get("uses", "")}
    measure = yaml.safe_load((GITHUB / "workflows" / "measure.yml").read_text())["jobs"]["measure"]
    assert {s["with"]["name"] for s in measure["steps"] if "download-artifact" in s.get("uses", "")} == uploaded
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "havoc").mkdir()
    (tmp_path / "havoc" / "bin").symlink_to(Path(sys.executable).parent)
    environment = os.environ | {"RUNNER_TEMP": str(tmp_path), "BASE": "nano", "WEIGHTS": "int8"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], env=environment, cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "strict.toml").write_text('[strict]\nextends = "host"\nrequires_verification = true\n')
    cpu = identify_cpu().model_dump(mode="json")
    built, verified = work / "artifact", work / "verified.json"
    record = tmp_path / "record.json"
    samples.record("cpu", device__cpu=cpu, device__name=cpu["name"], **samples.made_from(built)).save(record)
    for name, given, code in (("with", str(verified), 0), ("without", "", 5)):
        (tmp_path / name).mkdir()
        found, _, summary = judge_step(tmp_path / name, record, str(tmp_path / "strict.toml"), str(built), given)
        assert found == code, summary
    other = tmp_path / "other.json"
    samples.record("cpu", device__cpu=cpu, device__name=cpu["name"], **samples.made_from(own_artifact)).save(other)
    (tmp_path / "other").mkdir()
    found, _, summary = judge_step(tmp_path / "other", other, "host", str(own_artifact), str(verified))
    assert found == 5
    assert "the verified artifact is not the measured one" in summary


def test_a_pass_without_an_artifact_says_so(tmp_path: Path) -> None:
    """On the terminal, in every page, in the badge: nobody takes it for a verdict on an artifact."""
    cpu = identify_cpu().model_dump(mode="json")
    record = tmp_path / "record.json"
    samples.record("cpu", device__cpu=cpu, device__name=cpu["name"]).save(record)
    found, _, summary = judge_step(tmp_path, record, "host")
    assert found == 0
    pages = tmp_path / "havoc-report"
    for text in (summary, *((pages / name).read_text() for name in ("report.html", "junit.xml", "badge.json"))):
        assert "artifact not checked" in text


def test_the_gate_judges_only_what_this_repository_measured() -> None:
    """Any run of a workflow with the right name was judged: a fork's, a failed one, one that a push started."""
    gate = yaml.safe_load((GITHUB / "workflows" / "gate.yml").read_text())
    condition = gate["jobs"]["gate"]["if"]
    for asked in (
        "github.event.workflow_run.event == 'workflow_dispatch'",
        "github.event.workflow_run.conclusion == 'success'",
        "github.event.workflow_run.head_repository.full_name == github.repository",
        "github.event.workflow_run.path == '.github/workflows/measure.yml'",
    ):
        assert asked in condition
    assert "||" not in condition
    measure = yaml.safe_load((GITHUB / "workflows" / "measure.yml").read_text())
    assert list(measure[True]) == ["workflow_dispatch"]
    script = next(step["run"] for step in measure["jobs"]["measure"]["steps"] if step.get("name") == "Measure")
    assert "verify artifact --record record/record.json" in script


WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONS = sorted(GITHUB.glob("actions/*/action.yml"))


@pytest.mark.parametrize(
    ("form", "paths"),
    [("github-workflows", WORKFLOWS), ("github-actions", sorted(GITHUB.glob("actions/*/action.yml")))],
)
def test_a_runner_understands_them(form: str, paths: list[Path]) -> None:
    """Every workflow and the action are of the form that GitHub publishes."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{form}", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_grant_little_and_pin_what_they_use(path: Path) -> None:
    """No permission by default, every foreign action by its hash, and no input pasted into a script."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            uses = step.get("uses", "")
            assert not uses or uses.startswith("./") or len(uses.partition("@")[2]) == 40
            assert "${{" not in step.get("run", "")


def test_a_change_is_compared_with_its_base_on_one_machine() -> None:
    """The merge of a pull request with its first parent, which the checkout must bring; nothing makes red advisory."""
    job = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]["compare"]
    checkout = next(step["with"] for step in job["steps"] if "actions/checkout" in step.get("uses", ""))
    assert checkout["fetch-depth"] >= 2
    assert any(step.get("run", "").startswith('make compare BASE="HEAD^1"') for step in job["steps"])
    assert "continue-on-error" not in str(job)


def test_what_is_built_is_what_the_others_take() -> None:
    """`measure` downloads by name what `build` uploads, and hands on both."""
    build, measure = (
        yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text()) for name in ("build", "measure")
    )
    steps = [step for job in (build["jobs"]["build"], measure["jobs"]["measure"]) for step in job["steps"]]
    built = {step["with"]["name"] for step in steps if "upload-artifact" in step.get("uses", "")} - {"record"}
    assert built == {step["with"]["name"] for step in steps if "download-artifact" in step.get("uses", "")}


def test_what_measures_hands_over_what_the_gate_asks_for() -> None:
    """The upload of one workflow is the download of the other, and the action has every input it is given."""
    measure, gate = (yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text()) for name in ("measure", "gate"))
    action = yaml.safe_load((GITHUB / "actions/gate/action.yml").read_text())
    upload = next(step for step in measure["jobs"]["measure"]["steps"] if "upload-artifact" in step.get("uses", ""))
    steps = gate["jobs"]["gate"]["steps"]
    download = next(step for step in steps if "download-artifact" in step.get("uses", ""))["with"]
    asked = next(step for step in steps if step.get("id") == "gate")["with"]
    assert download["name"] == upload["with"]["name"]
    uploaded = [f"{download['path']}/{path}" for path in upload["with"]["path"].split()]
    assert uploaded == [asked["record"], asked["artifact"], asked["verified"]]
    assert asked.keys() <= action["inputs"].keys()
    assert gate[True]["workflow_run"]["workflows"] == [measure["name"]]  # YAML 1.1 reads `on` as true


def duel_step(
    folder: Path, old: Path, new: Path, *, undecided: str = "fail", max_time: int = 60, margin: str = "1"
) -> tuple[int, dict[str, str], str]:
    """Run the steps of the action `duel`; return its exit code, outputs and summary."""
    action = yaml.safe_load((GITHUB / "actions" / "duel" / "action.yml").read_text())
    folder.mkdir()
    (folder / "havoc").mkdir()
    (folder / "havoc" / "bin").symlink_to(Path(sys.executable).parent)
    given = {"old": old, "new": new, "margin": margin, "max-time": max_time, "undecided": undecided}
    given |= {"prompt-tokens": 16, "decode-tokens": 8}
    assert given.keys() == action["inputs"].keys() - {"package"}
    environment = os.environ | {"PACKAGE": "none"} | {n.upper().replace("-", "_"): str(v) for n, v in given.items()}
    files = {name: str(folder / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for step in action["runs"]["steps"]:
        assert step["env"].keys() <= environment.keys()
        done = subprocess.run(
            ["bash", "-c", step["run"]],
            env=environment | files | {"RUNNER_TEMP": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
    outputs = dict(line.split("=", 1) for line in (folder / "GITHUB_OUTPUT").read_text().splitlines())
    assert outputs.keys() == action["outputs"].keys()
    return done.returncode, outputs, (folder / "GITHUB_STEP_SUMMARY").read_text()


@pytest.mark.alone
def test_the_duel_of_a_pull_request(tiny_artifact: Path, tmp_path: Path) -> None:
    """A real duel: its comment is HAVOC's own Markdown, its exit code the answer's; undecided may pass if so asked."""
    code, outputs, summary = duel_step(tmp_path / "same", tiny_artifact, tiny_artifact)
    assert (code, outputs["verdict"], outputs["exit-code"]) == (0, "equal", "0")
    assert Path(outputs["comment"]).read_text() == summary
    assert summary.startswith("**equal**: `")
    assert "| prefill, CPU time |" in summary
    for word, code in (("fail", 3), ("pass", 0)):
        found = duel_step(tmp_path / word, tiny_artifact, tiny_artifact, undecided=word, max_time=1, margin="0.0001")
        assert (found[0], found[1]["verdict"], found[1]["exit-code"]) == (code, "undecided", "3")
    code, outputs, summary = duel_step(tmp_path / "none", tmp_path / "nowhere", tiny_artifact)
    assert (code, outputs) == (2, {"verdict": "none", "exit-code": "2", "comment": ""})
    assert "Not measured" in summary


def test_the_duels_workflow_builds_both_sides(tmp_path: Path, tiny_artifact: Path) -> None:
    """The same command in either checkout, with that side's own HAVOC; a command that `havoc` takes."""
    from havoc_core.cli import parse

    workflow = yaml.safe_load((GITHUB / "workflows" / "duel.yml").read_text())
    verb, *words = workflow["env"]["BUILD"].split()
    assert verb == "havoc"
    assert parse([*words, "x"]).verb == "export"
    job = workflow["jobs"]["duel"]
    for side in ("base", "head"):
        (tmp_path / side / "bin").mkdir(parents=True)
        tool = tmp_path / side / "bin" / "build"
        tool.write_text(f"#!/bin/sh\ncp -r {tiny_artifact} $1 && pwd > $1/{side}\n")
        tool.chmod(0o755)
    script = next(step["run"] for step in job["steps"] if step.get("name") == "Build")
    environment = os.environ | {"RUNNER_TEMP": str(tmp_path), "BUILD": "build"}
    subprocess.run(["bash", "-e", "-c", script], env=environment, cwd=tmp_path, check=True)
    asked = next(step["with"] for step in job["steps"] if step.get("id") == "duel")
    for side, given in (("base", asked["old"]), ("head", asked["new"])):
        built = Path(given.replace("${{ runner.temp }}", str(tmp_path)))
        assert (built / side).read_text().strip() == str(tmp_path / side)
    assert asked.keys() <= yaml.safe_load((GITHUB / "actions/duel/action.yml").read_text())["inputs"].keys()


def test_what_runs_the_change_may_write_nothing() -> None:
    """The job with the change's own code only reads; the one that comments runs nothing of it, and not for a fork."""
    workflow = yaml.safe_load((GITHUB / "workflows" / "duel.yml").read_text())
    duel, comment = workflow["jobs"]["duel"], workflow["jobs"]["comment"]
    assert duel["permissions"] == {"contents": "read"}
    assert "github.event.pull_request.head.repo.full_name == github.repository" in comment["if"]
    assert not any("checkout" in step.get("uses", "") for step in comment["steps"])
    upload, download = (
        next(step["with"] for step in job["steps"] if kind in step.get("uses", ""))
        for job, kind in ((duel, "upload-artifact"), (comment, "download-artifact"))
    )
    assert upload["name"] == download["name"]
    assert "--body-file havoc-duel.md" in comment["steps"][-1]["run"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_artifact: Path) -> Path:
    """A folder as the page assumes it: an artifact, a record of it that passes on `host`, own limits, a test."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "artifact").symlink_to(tiny_artifact)
    cpu = identify_cpu().model_dump(mode="json")
    record = samples.record("cpu", device__cpu=cpu, device__name=cpu["name"], **samples.made_from(tiny_artifact))
    record.save(folder / "reports" / "run1" / "record.json")
    page = (GITHUB.parent / "docs" / "ci.md").read_text()
    toml, test = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("toml", "python"))
    (folder / "our-limits.toml").write_text(toml.replace("Example 9000 8-Core Processor", cpu["name"]))
    (folder / "test_release.py").write_text(test)
    return folder


def commands_of_the_page() -> list[str]:
    page = (GITHUB.parent / "docs" / "ci.md").read_text()
    return [line for block in page.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]


MEASURES = "--havoc-rows"  # accuracy of random weights is no pass, and measuring takes a while: see test_pytest_plugin


@pytest.mark.parametrize("command", [line for line in commands_of_the_page() if MEASURES not in line])
def test_every_command_of_the_page_runs(command: str, project: Path) -> None:
    """What docs/ci.md tells people to type ends in 0 on a record that passes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {"PATH": path}
    done = subprocess.run(
        ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
