"""Records of many nights become one history: cuts, alarms with record and commit, or one line of what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from havoc_core.bench.judge.history import RecordHistory, history_of, past_record
from havoc_core.bench.judge.levels import readings
from havoc_core.bench.judge.metrics import METRICS, Trend
from havoc_core.bench.judge.record import Record
from havoc_core.bench.past_records import read_history
from havoc_core.bench.report.history_text import history_markdown, history_text
from havoc_core.cli import main
from tests.bench import sample_records as samples

COMMITS = [f"{place:040x}" for place in range(100)]


def nightly(place: int, *, slower: float = 1.0, decodes: float = 1.0, **changes: Any) -> Record:
    """Return the record of one night, a little its own; prefills and decode steps take so many times as long."""
    generator = random.Random(place)
    values = samples.document("cpu")
    for process in values["samples"]:
        own = math.exp(generator.gauss(0, 0.004))
        process["prefill"]["duration_ns"] = [round(ns * own * slower) for ns in process["prefill"]["duration_ns"]]
        for run in process["decode"]:
            run["step_ns"] = [round(ns * own * decodes) for ns in run["step_ns"]]
    stamp = f"2026-{10 + place // 28:02d}-{1 + place % 28:02d}T03:00:00Z"
    about = {"tool": {"version": "0.1.0", "git_commit": COMMITS[place], "is_git_dirty": False}, "created_utc": stamp}
    return samples.sealed(samples.changed(values, **{"run_id": f"night-{place}"} | about | changes))


def nights(num: int, *, from_night: int = 0, **changes: Any) -> list[Record]:
    return [nightly(place, **changes) for place in range(from_night, from_night + num)]


def told(records: list[Record], **options: Any) -> RecordHistory:
    return history_of(
        [past_record(f"n{record.run_id}", record) for record in records], [], **{"margin": 0.01} | options
    )


def folder(path: Path, records: list[Record]) -> Path:
    for place, record in enumerate(records):
        record.save(path / f"n{place:02d}" / "record.json")
    return path


def test_a_slower_night_is_an_alarm_with_its_commit(tmp_path: Path) -> None:
    """First bad record, its commit, the step with its interval, and the direction that the metric itself has."""
    records = [*nights(16), *nights(5, from_night=16, slower=1.05, decodes=1.08)]
    (work,) = read_history(folder(tmp_path, records), target=None, margin=0.01).works
    prefill, decode = ((item, *item.changes) for item in work.metrics[:2])
    for (item, change), name, ratio in ((prefill, "prefill_ms", 1.05), (decode, "decode_tok_per_s", 1 / 1.08)):
        assert (item.metric, change.metric) == (name, name)
        assert (change.direction, change.stands) == ("worse", True)
        assert (change.first, change.last_before, change.seen) == ("n16", "n15", "n18")
        assert (change.commit, change.first_run_id) == (COMMITS[16], "night-16")
        assert change.low < ratio < change.high
        assert change.ratio == pytest.approx(ratio, rel=0.01)
    assert [item.changes for item in work.metrics[2:]] == [()] * 5  # memory and accuracy stayed


def test_the_names_of_folders_do_not_matter(tmp_path: Path) -> None:
    """Records are put in order by when they were made; the same history comes of any names."""
    records = [*nights(14), *nights(4, from_night=14, slower=1.1)]
    plain = read_history(folder(tmp_path / "plain", records), target=None, margin=0.01)
    shuffled = records.copy()
    random.Random(1).shuffle(shuffled)
    mixed = read_history(folder(tmp_path / "mixed", shuffled), target=None, margin=0.01)
    found = [[(alarm.first_run_id, alarm.ratio, alarm.low) for alarm in history.alarms] for history in (plain, mixed)]
    assert found[0] == found[1] != []
    assert plain.works[0].records != mixed.works[0].records


def test_steady_nights_are_no_alarm() -> None:
    """The known-good twin."""
    history = told(nights(24), margin=0.001)
    assert history.alarms == ()
    least = {item.metric: item.least_step for item in history.works[0].metrics}
    assert 0.002 < least["prefill_ms"] < 0.02
    assert least["peak_rss_bytes"] == 0.001  # it does not scatter at all, and less than the margin is no change


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"host__kernel": "6.1.9"}, "kernel Linux 6.1.0 -> Linux 6.1.9"),
        (
            {"host__versions": {"onnxruntime-gpu": "1.32.0", "python": "3.11.7"}},
            "onnxruntime-gpu version 1.31.1 -> 1.32.0",
        ),
        ({"device__fingerprint": "9" * 64}, "device fingerprint cccccccccccc -> 999999999999"),
        ({"protocol__provider_options": {"use_tf32": "0"}}, "provider option use_tf32 none -> 0"),
    ],
)
def test_another_environment_is_a_cut_and_no_alarm(changes: dict[str, Any], said: str) -> None:
    """What a new kernel or runtime did is not laid at the model's door; the cut says what it was and what it is."""
    (work,) = told([*nights(16), *nights(6, from_night=16, slower=1.2, **changes)]).works
    assert [(cut.record, cut.changes) for cut in work.cuts] == [("nnight-16", (said,))]
    assert work.alarms == ()
    assert re.search("too few .* 6 .* 13 are needed", work.metrics[0].note)


def test_a_new_driver_is_a_cut() -> None:
    """The driver of a card, from NVML."""
    values = [samples.document("cuda") for _ in range(2)]
    values[1]["device"]["gpu"]["driver_version"] = "581.10"
    records = [
        samples.sealed(samples.changed(one, run_id=f"a{place}", created_utc=f"2026-11-0{place + 1}T00:00:00Z"))
        for place, one in enumerate(values)
    ]
    (work,) = told(records).works
    assert [cut.changes for cut in work.cuts] == [("driver 580.95.05 -> 581.10",)]


def test_two_devices_in_turns_have_a_history_each() -> None:
    """Two runners that share a folder are told apart; the slower device is no alarm, a slower night on one is."""
    other = {"device__name": "Another CPU", "device__fingerprint": "7" * 64}
    records = []
    for place in range(40):
        is_other = place % 2
        slower = (1.5 if is_other else 1.0) * (1.06 if is_other and place >= 29 else 1.0)
        records.append(nightly(place, slower=slower, **(other if is_other else {})))
    (work,) = told(records).works
    (alarm,) = work.alarms
    assert (alarm.first, alarm.stands, len(work.cuts)) == ("nnight-29", True, 1)


def test_what_was_made_up_for_stands_no_longer() -> None:
    """An alarm stays in the history; it stands until the level is back, or the device has another environment."""
    bad = [*nights(14), *nights(14, from_night=14, slower=1.1)]
    assert [alarm.stands for alarm in told(bad).alarms] == [True]
    for later in (nights(5, from_night=28), nights(5, from_night=28, slower=1.1, host__kernel="7.0")):
        assert [alarm.stands for alarm in told([*bad, *later]).alarms] == [False]
    half = [*bad, *nights(5, from_night=28, slower=1.05)]
    assert [alarm.stands for alarm in told(half).alarms] == [True]


def test_other_work_is_another_history() -> None:
    """Two threads are not slower than one, they are something else; and so is another structure."""
    records = [*nights(14), *nights(5, from_night=14, slower=1.2, protocol__num_threads=1)]
    history = told(records)
    assert [len(work.records) for work in history.works] == [14, 5]
    assert history.alarms == ()


def test_accuracy_is_told_of_the_same_rows_alone() -> None:
    """Fewer right answers are an alarm; other rows are a cut of that metric."""
    worse = {"accuracy__math__num_right": 780}
    (work,) = told([*nights(12), *nights(5, from_night=12, **worse)]).works
    assert [(alarm.metric, alarm.first) for alarm in work.alarms] == [("accuracy/math", "nnight-12")]
    (work,) = told([*nights(12), *nights(5, from_night=12, **worse, accuracy__math__rows_sha256="8" * 64)]).works
    assert work.alarms == ()
    assert [cut.metric for cut in work.cuts] == ["accuracy/math"]


def test_disturbed_calls_say_nothing() -> None:
    """A level is the median of a process's undisturbed calls, and of those alone."""
    clean = readings(nightly(1))["prefill_ms"].level.log_value
    values = nightly(1).document()
    for process in values["samples"]:
        process["surroundings"] = samples.surroundings(foreign=(0.0, 0.35))
        process["prefill"]["duration_ns"] = [
            ns * (9 if start < 350_000_000 else 1)
            for start, ns in zip(process["prefill"]["start_ns"], process["prefill"]["duration_ns"], strict=True)
        ]
    assert readings(samples.sealed(values))["prefill_ms"].level.log_value == pytest.approx(clean, rel=1e-3)


def test_a_metric_without_samples_of_its_own_has_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry with a trend is in the history, whatever its kind: what it reads of a record is its level."""
    trend = Trend(read=lambda record: None)
    slowest = dataclasses.replace(METRICS["load_s"], trend=trend, read=lambda record: 0.25)
    monkeypatch.setattr("havoc_core.bench.judge.levels.METRICS", {"load_s": slowest})
    found = readings(nightly(0, accuracy={}))
    assert {name: (reading.level.log_value, reading.level.error) for name, reading in found.items()} == {
        "load_s": (math.log(0.25), 0.0)
    }


def test_what_does_not_count_is_named(tmp_path: Path) -> None:
    """Simulated and invalid records, copies, and files that are none: each with its reason, and the rest is judged."""
    out = folder(tmp_path / "all", nights(14))
    broken = {"id": "cpu_contention", "status": "invalid", "detail": "others used 80 %"}
    for name, changes in (("busy", {"checks": [broken]}), ("made-up", {"evidence": "simulated"})):
        nightly(20, **changes).save(out / name / "record.json")
    shutil.copytree(out / "n03", out / "zz-copy")
    (out / "torn").mkdir()
    (out / "torn" / "record.json").write_text("{")
    (out / ".hidden").mkdir()
    (out / ".hidden" / "record.json").write_text("{")
    history = read_history(out, target=None, margin=0.01)
    reasons = dict(history.left_out)
    assert set(reasons) == {"busy", "made-up", "zz-copy", "torn"}
    assert reasons["zz-copy"] == "a copy of n03"
    assert "others used 80 %" in reasons["busy"]
    assert reasons["made-up"] == "simulated, not measured"
    for text in (history_text(history), history_markdown(history)):
        assert text.startswith(("no alarm in 14 records", "**no alarm in 14 records**"))
        assert all(name in text for name in reasons)


def test_loose_files_in_git(tmp_path: Path) -> None:
    """Records may lie side by side in a repository; an alarm names the commit that added its file."""
    for place, record in enumerate([*nights(14), *nights(4, from_night=14, slower=1.1, tool={"version": "0.1.0"})]):
        record.save(tmp_path / f"night-{place:02d}.json")
        if place in (13, 17):
            git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
            for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "records"]):
                subprocess.run([*git, *words], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    (alarm,) = read_history(tmp_path, target=None, margin=0.01).alarms
    assert (alarm.first, alarm.commit, alarm.added_by) == ("night-14.json", None, head.stdout.strip())
    assert f"added by commit {head.stdout[:12]}" in history_text(read_history(tmp_path, target=None, margin=0.01))


def test_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 whatever is found, 1 where an alarm stands and was asked for; a known one is told and fails nothing."""
    out = str(folder(tmp_path, [*nights(14), *nights(4, from_night=14, slower=1.1)]))
    assert main(["history", out]) == 0
    text = capsys.readouterr().out
    assert text.startswith("1 alarm in 18 records, 1 of them standing")
    (line,) = (line for line in text.splitlines() if line.startswith("ALARM: "))
    step = r"\+\d+\.\d% \(\+\d+\.\d% to \+1\d\.\d%\)"
    commit = f"measured at commit {COMMITS[14][:12]}"
    where = f"from n14 on, 2026-10-15 03:00 UTC, {commit}; last before n13, proven by n16"
    assert re.fullmatch(f"ALARM: prefill {step} {where}", line)
    assert main(["history", out, "--fail-if", "alarm", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["num_alarms"], document["num_standing"], document["margin"]) == (1, 1, 0.01)
    assert [change["first"] for item in document["works"][0]["metrics"] for change in item["changes"]] == ["n14"]
    assert main(["history", out, "--fail-if", "alarm", "--since", "2026-10-16"]) == 0
    assert main(["history", out, "--fail-if", "alarm", "--since", "2026-10-15"]) == 1
    assert main(["history", out, "--fail-if", "alarm", "--margin", "0.2", "--markdown"]) == 0
    assert "| prefill | 18 | 0 |" in capsys.readouterr().out


def test_too_few_are_said_and_fail_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three nights are no history yet, however different."""
    out = str(folder(tmp_path, [*nights(2), nightly(2, slower=3.0)]))
    assert main(["history", out, "--fail-if", "alarm"]) == 0
    assert "too few to find a change" in capsys.readouterr().out


def test_bad_input_is_one_line_and_the_right_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder, no record, none that counts, none of the target, two forms, no day."""
    empty, torn, busy, good = (tmp_path / name for name in ("empty", "torn", "busy", "good"))
    empty.mkdir()
    torn.mkdir()
    (torn / "record.json").write_text("{")
    broken = {"id": "cpu_contention", "status": "invalid", "detail": "others used 80 %"}
    folder(busy, [nightly(0, checks=[broken])])
    folder(good, nights(1))
    for words, code, said in (
        ([tmp_path / "none"], 2, "no such folder"),
        ([empty], 2, "contains no record; `havoc bench"),
        ([torn], 2, "1 file could not be read"),
        ([busy], 4, "none of 1 record is valid"),
        ([good, "--target", "gtx1660"], 5, "none of 1 record is of the target gtx1660"),
        ([good, "--json", "--markdown"], 2, "--json and --markdown"),
    ):
        assert main(["history", *map(str, words)]) == code
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1
    assert main(["history", str(good), "--since", "yesterday"]) == 2
    assert "write it as 2026-11-20" in capsys.readouterr().err


def test_only_the_targets_records_count(tmp_path: Path) -> None:
    """`--target` leaves out other devices and other work, and names them."""
    from havoc_core.bench.judge.targets import load_target

    toml = f'[board]\ntitle = "board"\n[board.device]\nkind = "cpu"\nnames = ["{samples.CPU["name"]}"]\n'
    (tmp_path / "board.toml").write_text(f'{toml}[[board.limits]]\nmetric = "prefill_ms"\nbelow = 100\nunit = "ms"\n')
    records = [*nights(3), nightly(4, device__name="Another CPU"), nightly(5, workload__prompt_tokens=64)]
    target = load_target(str(tmp_path / "board.toml"))
    history = read_history(folder(tmp_path / "all", records), target=target, margin=0.01)
    assert [work.records for work in history.works] == [("n00", "n01", "n02")]
    assert "a similar model does not count" in dict(history.left_out)["n03"]
    assert "prompt_tokens 64 instead of 512" in dict(history.left_out)["n04"]
