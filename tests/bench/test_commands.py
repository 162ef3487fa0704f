"""The verbs that measure and judge, as a person or a script uses them: text, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.doctor import examine, provider_problem
from havoc_core.bench.judge.answer import envelope_path
from havoc_core.bench.judge.record import Record, load_record
from havoc_core.bench.record_folder import DERIVED, previous_record
from havoc_core.bench.report.folder import SUMS, WRITTEN
from tests.bench import sample_records as samples
from tests.commands import run_and_read as run

pytestmark = pytest.mark.alone


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A good record of this machine's CPU."""
    return saved(tmp_path, "record")


def saved(folder: Path, name: str, **changes: Any) -> Path:
    cpu = identify_cpu().model_dump(mode="json")
    path = folder / f"{name}.json"
    samples.record("cpu", run_id=name, device__cpu=cpu, device__name=cpu["name"], **changes).save(path)
    return path


def test_gate_passes_and_says_so(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, one line on top that says it all, and a row for every limit."""
    code, out, err = run(capsys, "gate", record, "--target", "host")
    assert (code, err) == (0, "")
    assert out.startswith("PASS on host (this machine's CPU): all 9 limits proven met")
    assert out.count("  pass  ") == 9
    assert "\x1b" not in out


def test_gate_names_the_missing_card(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a record of a CPU, `gtx1660` is not measured: exit code 5."""
    code, out, _ = run(capsys, "gate", record, "--target", "gtx1660")
    assert code == 5
    assert out.startswith("NOT MEASURED on gtx1660")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"accuracy__math__num_right": 700}, 1),
        ({"accuracy": {}}, 3),
        ({"purpose": "screen"}, 4),
        ({"evidence": "projected"}, 5),
    ],
    ids=["missed", "undecided", "invalid", "projected"],
)
def test_the_exit_code_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: int
) -> None:
    """One code for each verdict, the same in text and in JSON."""
    path = saved(tmp_path, "other", **changes)
    code, _, _ = run(capsys, "gate", path, "--target", "host")
    as_json, out, _ = run(capsys, "gate", path, "--target", "host", "--json")
    assert code == as_json == json.loads(out)["exit_code"] == expected


def test_gate_as_json(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One document with verdict, evidence, lines and findings."""
    _, out, _ = run(capsys, "gate", record, "--target", "host", "--json")
    document = json.loads(out)
    assert (document["verdict"], document["evidence"], document["findings"]) == ("pass", "measured_target", [])
    assert [line["metric"] for line in document["lines"]][:3] == ["prefill_ms", "peak_rss_bytes", "decode_tok_per_s"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: text.replace("0.02", "NaN"),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"num_rows": 1000', '"num_rows": -1000'),
        lambda text: text.replace('"tool"', '"tools"'),
    ],
    ids=["truncated", "empty", "deep", "nan", "newer", "negative", "unknown-key"],
)
def test_a_bad_record_is_one_line(record: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    """Usage error 2, one line on stderr that names the file, nothing on stdout."""
    record.write_text(damage(record.read_text()))
    code, out, err = run(capsys, "gate", record, "--target", "host")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "record.json" in err


def test_an_edited_record_is_another(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number changed by hand: exit code 5."""
    record.write_text(record.read_text().replace('"num_right": 900', '"num_right": 990'))
    code, _, err = run(capsys, "gate", record, "--target", "host")
    assert code == 5
    assert "changed" in err


def test_a_folder_means_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What bench wrote can be given whole; a folder without a record is one line."""
    folder = saved(tmp_path / "run", "record").parent
    assert run(capsys, "gate", folder, "--target", "host")[0] == 0
    assert run(capsys, "compare", folder, folder)[0] == 0
    code, _, err = run(capsys, "gate", tmp_path, "--target", "host")
    assert (code, err.count("\n")) == (2, 1)
    assert "no record.json" in err


def test_compare(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record equals itself; JSON gives each metric's ratio."""
    code, out, _ = run(capsys, "compare", record, record, "--json")
    metrics = {row["metric"]: row for row in json.loads(out)["metrics"]}
    assert code == 0
    assert metrics["prefill_ms"]["change"] == "equal"
    assert metrics["peak_vram_bytes"]["ratio"] is None


def test_compare_says_beside_no_change_what_would_have_shown(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the table as in JSON."""
    other = saved(tmp_path, "other")
    _, out, _ = run(capsys, "compare", record, other)
    rows = [line for line in out.splitlines() if "  equal" in line or "  undecided" in line]
    assert rows
    assert all("would show" in line for line in rows)


def test_a_broken_neighbour_does_not_keep_from_measuring(tmp_path: Path) -> None:
    """The newest sound record is the previous one; a damaged one beside it is passed over."""
    sound = saved(tmp_path / "one", "record")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "record.json").write_text("{")
    assert previous_record(tmp_path / "three") == load_record(sound)
    assert previous_record(tmp_path / "nowhere" / "deep") is None


def test_plan_is_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    """`havoc plan 7b --target gtx1660` ends with 1 and says why; a small model with 0."""
    code, out, _ = run(capsys, "plan", "7b", "--target", "gtx1660")
    assert code == 1
    assert "impossible in every format" in out
    assert "869 right" in out
    code, out, _ = run(capsys, "plan", "edge-135m", "--target", "gtx1660", "--json")
    assert (code, json.loads(out)["is_impossible"]) == (0, False)


def test_doctor_answers_by_trying(capsys: pytest.CaptureFixture[str]) -> None:
    """Every question has an answer and a reason; a CPU can always be judged for `host`."""
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)["findings"]
    assert code == 0
    assert json.loads(out)["device"]["kind"] in {"cpu", "cuda"}
    assert json.loads(out)["device"]["kind"] == "cuda" or json.loads(out)["device"]["name"] == identify_cpu().name
    assert {finding["answer"] for finding in findings} <= {"yes", "partly", "no"}
    assert all(finding["reason"] for finding in findings)
    answers = {(finding["topic"], finding["question"]): finding["answer"] for finding in findings}
    assert answers["can be judged for", "host"] == "yes"
    assert answers["can measure", "peak_rss_bytes"] == "yes"
    assert [finding.question for finding in examine()] == [finding["question"] for finding in findings]


def test_doctor_runs_a_graph_before_it_says_that_one_runs() -> None:
    """A provider is tried, not looked up: the CPU computes, one that is not there gives its reason in a line."""
    assert provider_problem("CPUExecutionProvider") is None
    reason = provider_problem("CUDAExecutionProvider")
    assert reason is None or (reason.startswith("CUDAExecutionProvider was tried: ") and "\n" not in reason)


def test_report_of_one_run_and_of_many(tmp_path: Path, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a record gets its pages, a folder of such folders the index."""
    for name in ("one", "two"):
        saved(tmp_path / "runs" / name, "record")
    code, out, _ = run(capsys, "report", tmp_path / "runs" / "one")
    assert (code, out.strip()) == (0, str(tmp_path / "runs" / "one" / "report.html"))
    code, out, _ = run(capsys, "report", tmp_path / "runs", "--json")
    assert json.loads(out) == {"index": str(tmp_path / "runs" / "index.html")}
    code, _, err = run(capsys, "report", tmp_path / "nowhere")
    assert code == 2
    assert "no record.json" in err


def test_bench_writes_a_record_that_the_gate_judges(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real thing, on random weights: measured, scored, gated; accuracy is missed, speed and memory are met."""
    out_dir = tmp_path / "run"
    code, out, _ = run(capsys, "bench", tiny_artifact, "--n", "40", "--out", out_dir, "--quiet", "--json")
    assert code in {0, 4}  # 4 where this machine is too busy to measure
    document = json.loads(out)
    assert document["metrics"]["prefill_ms"] > 0
    assert document["metrics"]["accuracy/math"] is not None
    record = load_record(out_dir / "record.json")
    assert len(record.samples) == 5
    code, out, _ = run(
        capsys, "gate", out_dir / "record.json", "--target", "host", "--artifact", tiny_artifact, "--json"
    )
    verdicts = {line["metric"]: line["verdict"] for line in json.loads(out)["lines"]}
    if code != 4:
        assert code == 1
        assert verdicts["accuracy/math"] == "fail"
        assert verdicts["peak_rss_bytes"] == verdicts["decode_tok_per_s"] == "pass"


def test_bench_refuses_before_it_measures(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds a record, and data that is not there, are one line (exit 2) before any process starts."""

    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("havoc_core.bench.measure.measure", measure)
    held = saved(tmp_path / "run", "record")
    words = ("bench", tiny_artifact, "--quiet", "--out")
    code, _, err = run(capsys, *words, held.parent)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a record already" in err
    (tmp_path / "data").mkdir()
    code, _, err = run(capsys, *words, tmp_path / "new", "--data", tmp_path / "data")
    assert (code, err.count("\n")) == (2, 1)
    assert "no such files" in err
    assert not (tmp_path / "new" / "record.json").exists()


def test_replace_takes_the_old_pages_away(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --replace no page of the old record stays beside the new one; the list is that of the report."""
    held = saved(tmp_path / "run", "record")
    record = load_record(held)
    for name in DERIVED:
        (held.parent / name).write_text("of the old record")
    monkeypatch.setattr("havoc_core.bench.measure.measure", lambda *_, **__: record)
    assert run(capsys, "bench", tiny_artifact, "--quiet", "--n", "0", "--replace", "--out", held.parent)[0] == 0
    assert [path.name for path in held.parent.iterdir()] == ["record.json"]
    assert set(DERIVED) == {*WRITTEN, SUMS, envelope_path(held).name}


def test_eval_agrees_with_the_record(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An artifact and its base are scored on the same rows, with exact intervals."""
    words = ("--domain", "math", "--n", "20", "--quiet", "--json")
    code, out, _ = run(capsys, "eval", tiny_artifact, *words)
    scored = json.loads(out)["accuracy"]["math"]
    assert (code, scored["num_rows"]) == (0, 20)
    assert 0 <= scored["low"] <= scored["num_right"] / 20 <= scored["high"] <= 1
    code, out, _ = run(capsys, "eval", tiny_artifact.parent / "base", *words)
    assert json.loads(out)["accuracy"]["math"]["num_right"] == scored["num_right"]


def test_the_gate_is_light(record: Path) -> None:
    """Judging loads neither numpy nor scipy nor torch nor the runtime, so it starts at once and runs anywhere."""
    code = (
        "import sys; from havoc_core.cli import main\n"
        f"code = main(['gate', {str(record)!r}, '--target', 'host', '--json'])\n"
        "heavy = {'numpy', 'scipy', 'torch', 'onnxruntime', 'pynvml', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_compare_fails_where_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A proven worsening ends with 1 under `--fail-if worse`, and with 0 without it; no change never fails."""
    slow = {"samples__each__decode__each__step_ns": [4_000_000] * 127, "samples__each__busy_ns": 0}
    starts = {
        f"samples__{index}__decode__{place}__start_ns": 13_700_000_000 + 600_000_000 * place
        for index in range(5)
        for place in range(3)
    }
    old, same, worse = saved(tmp_path, "old"), saved(tmp_path, "same"), saved(tmp_path, "worse", **slow, **starts)
    for words, expected in (((old, worse), 0), ((old, worse, "--fail-if", "worse"), 1), ((worse, old), 0)):
        assert run(capsys, "compare", *words)[0] == expected
    assert run(capsys, "compare", old, same, "--fail-if", "worse")[0] == 0
    assert run(capsys, "compare", old, worse, "--fail-if", "worse", "--json")[0] == 1
    assert run(capsys, "compare", old, worse, "--fail-if", "better")[0] == 2


def test_compare_warns_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was disturbed stands above the table and in the document."""
    beside = {"samples__each__surroundings": samples.surroundings(foreign=(0.2, 0.3))}
    pair = saved(tmp_path, "calm"), saved(tmp_path, "busy", **beside)
    _, out, _ = run(capsys, "compare", *pair)
    assert out.startswith("warning: the new record busy was disturbed for 1%")
    _, out, _ = run(capsys, "compare", *pair, "--json")
    assert "busy was disturbed" in json.loads(out)["warnings"][0]


SHORT = """
[short]
extends = "host"
title = "short prompts"
[short.workload]
prompt_tokens = 24
context_tokens = 24
decode_tokens = 5
passes = 2
[short.protocol]
num_threads = 1
"""


@pytest.mark.parametrize(
    ("words", "workload", "provider", "num_threads"),
    [
        ((), (1, 512, 512, 128, 1), None, None),
        (("--prompt-tokens", "64", "--decode-tokens", "9"), (1, 64, 64, 9, 1), None, None),
        (("--batch", "3", "--threads", "2"), (3, 512, 512, 128, 1), None, 2),
        (("--target", "SHORT"), (1, 24, 24, 5, 2), "CPUExecutionProvider", 1),
        (("--target", "SHORT", "--prompt-tokens", "8", "--threads", "4"), (1, 8, 8, 5, 2), "CPUExecutionProvider", 4),
        (("--passes", "2"), (1, 512, 512, 128, 2), None, None),
        (("--target", "SHORT", "--passes", "1"), (1, 24, 24, 5, 1), "CPUExecutionProvider", 1),
        (("--target", "gtx1660"), (1, 512, 512, 128, 1), "CUDAExecutionProvider", None),
    ],
)
def test_bench_measures_the_work_it_is_asked_for(
    words: tuple[str, ...],
    workload: tuple[int, ...],
    provider: str | None,
    num_threads: int | None,
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The target's workload, provider and threads, or the options', which come first."""
    (tmp_path / "own.toml").write_text(SHORT)
    asked: dict[str, Any] = {}

    def measure(*_: object, **given: object) -> Record:
        asked.update(given)
        return samples.record("cpu")

    monkeypatch.setattr("havoc_core.bench.measure.measure", measure)
    named = [str(tmp_path / "own.toml") if word == "SHORT" else word for word in words]
    code, out, _ = run(capsys, "bench", tiny_artifact, "--n", "0", "--quiet", "--out", tmp_path / "run", *named)
    assert code == 0
    fields = ("batch_size", "prompt_tokens", "context_tokens", "decode_tokens", "passes")
    assert tuple(getattr(asked["workload"], field) for field in fields) == workload
    assert (asked["provider"], asked["num_threads"], asked["wait_s"]) == (provider, num_threads, 30)
    assert f"--target {named[1] if '--target' in words else 'host'}" in out


def test_a_batch_is_measured_and_titled_by_its_work(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts at once, for real; limits are titled by the prompt's length; another target's work is refused."""
    (tmp_path / "own.toml").write_text(SHORT)
    words = ("--target", tmp_path / "own.toml", "--wait", "0", "--n", "0", "--quiet", "--batch", "2")
    assert run(capsys, "bench", tiny_artifact, "--out", tmp_path / "run", *words)[0] in {0, 4}
    record = load_record(tmp_path / "run" / "record.json")
    assert (record.workload.batch_size, record.workload.prompt_tokens, record.protocol.num_threads) == (2, 24, 1)
    assert all(len(episode.step_ns) == 4 for process in record.samples for episode in process.decode)
    _, out, _ = run(capsys, "gate", tmp_path / "run", "--target", tmp_path / "own.toml", "--json")
    judgement = json.loads(out)
    assert judgement["lines"][0]["title"] == "prefill, 24 tokens"
    assert any(finding["rule"] == "V02" for finding in judgement["findings"])
    assert run(capsys, "bench", tiny_artifact, "--out", tmp_path / "b", "--decode-tokens", "1")[0] == 2
