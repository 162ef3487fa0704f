"""The report: complete, offline, safe, the same bytes for the same folder, and right in a real browser."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.history import history_of, past_record
from havoc_core.bench.judge.record import load_record
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.report import charts, page
from havoc_core.bench.report.folder import WRITTEN, write_report
from havoc_core.bench.report.history import entry, write_index
from havoc_core.bench.report.search_files import Front, artifact_hash, read_front, read_scores
from havoc_core.bench.report.search_table import MOST_ROWS, candidate_table
from havoc_core.bounds import share_bounds
from havoc_core.cli import main
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.runtime.verification import Verified, save_verified
from tests.bench import sample_records as samples

HOSTILE = "<script>alert(1)</script> | *x* `y`"


def scores() -> dict[str, Any]:
    """Return a score table as the pipeline writes it."""

    def row(name: str, kind: str, num_right: int) -> dict[str, Any]:
        share = share_bounds(num_right, 1000, confidence=0.975)
        cell = {"num_right": num_right, "num_rows": 1000, "low": share.low, "high": share.high}
        return {"name": name, "kind": kind, "accuracy": dict.fromkeys(samples.DOMAINS, cell)}

    return {"rows": [row("base", "base", 741), row("math expert", "expert", 823), row("mixture", "mixture", 900)]}


def front() -> dict[str, Any]:
    """Return a front as the search writes it."""

    def candidate(key: str, weights: str, share: float, again: float | None) -> dict[str, Any]:
        return {
            "key": key,
            "alpha": [1.0] * 4,
            "structure": {"weight_format": weights, "activation_dtype": "fp32", "block_size": 32},
            "cost": {"prefill_ms": 17.0, "peak_bytes": 1e8 if weights == "fp32" else 8e7, "decode_tok_per_s": 600.0},
            "search_accuracy": dict.fromkeys(samples.DOMAINS, share),
            "rescored_accuracy": None if again is None else dict.fromkeys(samples.DOMAINS, again),
            "is_feasible": True,
            "origin": {
                "kind": "bred" if key == "b" else "seeded",
                "generation": int(key == "b"),
                "label": "" if key == "b" else "all experts at 1 in fp32",
                "parents": ["a", "c"] if key == "b" else [],
                "is_repaired": False,
            },
        }

    return {
        "evaluations": 3,
        "evidence": "measured_target",
        "disturbance": "",
        "convergence": {"hypervolume": [0.8, 0.9], "stable_since": 1, "is_converged": False},
        "bred_against_seeded": {
            "bred": "b",
            "seeded": "a",
            "margin": 0.01,
            "low": -0.02,
            "high": 0.04,
            "is_proven": False,
        },
        "noise_floor": {},
        "frozen": ["prefill_ms"],
        "chosen": "b",
        "candidates": [
            candidate("a", "fp32", 0.9, None),
            candidate("b", "int8", 0.93, 0.91),
            candidate("c", "int8", 0.8, None),
        ],
        "front": ["a", "b"],
        "failed": [{"key": "d", "reason": "out of memory"}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A measured folder of this machine's CPU, with scores and a front."""
    out = tmp_path / "run"
    cpu = identify_cpu().model_dump(mode="json")
    record = samples.record("cpu", device__cpu=cpu, device__name=cpu["name"])
    record.save(out / "record.json")
    link = {"artifact_sha256": artifact_hash(record.subject.files)}
    (out / "scores.json").write_text(json.dumps(scores() | link))
    (out / "front.json").write_text(json.dumps(front() | link))
    return out


class Page(HTMLParser):
    """Collects what a page would load, its text, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [values[key] or "" for key in ("src", "href", "xlink:href", "data") if key in values]
        self.ids += [values["id"] or ""] if "id" in values else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_everything_is_written(folder: Path) -> None:
    """Seven files, each of its form and size, under checksums that `sha256sum --check` accepts."""
    written, judgements = write_report(folder, command="havoc run --out run")
    assert written == folder / "report.html"
    assert [judgement.verdict for judgement in judgements] == ["pass", "not_measured"]
    assert {path.name for path in folder.iterdir()} == {
        *WRITTEN,
        "record.json",
        "scores.json",
        "front.json",
        "SHA256SUMS",
    }
    assert (folder / "report.md").stat().st_size < 60_000
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_same_folder_gives_the_same_bytes(folder: Path) -> None:
    """No date, no random id: a report can be rebuilt and compared."""
    write_report(folder)
    first = {name: (folder / name).read_bytes() for name in WRITTEN}
    write_report(folder)
    assert {name: (folder / name).read_bytes() for name in WRITTEN} == first


def test_the_page_is_one_file_without_script(folder: Path) -> None:
    """Nothing is loaded from anywhere, nothing runs, every id is there once, and the policy forbids the rest."""
    write_report(folder)
    text = (folder / "report.html").read_text()
    shown = Page(text)
    assert "script" not in shown.tags
    assert [load for load in shown.loads if not load.startswith("#")] == []
    assert len(shown.ids) == len(set(shown.ids))
    assert {load[1:] for load in shown.loads} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(shown.ids)
    assert "default-src 'none'" in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert shown.tags.count("svg") == 5


def test_the_page_says_what_it_must(folder: Path) -> None:
    """Verdicts, limits, scores with intervals, the search's frozen objective, the commands, the caveats."""
    write_report(folder, command="havoc run --out run")
    words = " ".join(" ".join(Page((folder / "report.html").read_text()).words).split())
    for said in (
        "Pass on this machine's CPU",
        "Not measured on NVIDIA GeForce GTX 1660",
        "must be < 100 ms",
        "must be > 50 tok/s",
        "82.3 %",
        "math expert",
        "frozen",
        "out of memory",
        "havoc run --out run",
        "havoc bench ARTIFACT --profile standard",
        "--task math --task code --task reasoning --task vision",
        "havoc gate DIR/record.json --target gtx1660",
        "not a determined forger",
        "no previous record",
    ):
        assert said in words


def put(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def counted(num_right: int) -> list[dict[str, Any]]:
    """Return score rows whose mixture has other counts than the record."""
    share = share_bounds(num_right, 1000, confidence=0.975)
    cell = {"num_right": num_right, "num_rows": 1000, "low": share.low, "high": share.high}
    return [{"name": "mixture", "kind": "mixture", "accuracy": {"math": cell}}]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("scores.json", {"artifact_sha256": "9" * 64}, "they belong to another artifact"),
        ("scores.json", {"rows": counted(1000)}, "they count 1000 of 1000 right in math"),
        ("scores.json", {"artifact_sha256": None, "rows": counted(1000)}, "they count 1000 of 1000"),
        ("scores.json", {"artifact_sha256": None, "rows": scores()["rows"][:2]}, "it is not proven"),
        ("front.json", {"artifact_sha256": "9" * 64}, "it led to another artifact"),
        ("front.json", {"artifact_sha256": None}, "it is not proven that it led"),
    ],
)
def test_what_belongs_to_another_artifact_is_left_out(folder: Path, name: str, changes: Any, said: str) -> None:
    """Scores and a search that are not the record's are not shown beside it, and the caveats say so."""
    put(folder / name, **changes)
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert ("math expert" in text, "evaluated" in text) == (name != "scores.json", name != "front.json")
    assert said in text.split("## Caveats")[1]


@pytest.mark.parametrize(("proof", "is_doubted"), [("its own", False), ("another artifact's", True), ("none", True)])
def test_a_verification_ends_the_doubt_about_the_graphs(folder: Path, proof: str, is_doubted: bool) -> None:
    """Where the bench did not build the graphs anew, the page says so, unless a verification of the artifact did."""
    record = load_record(folder / "record.json")
    subject = record.subject.model_copy(update={"is_graph_rebuilt": None})
    record.model_copy(update={"subject": subject}).sealed().save(folder / "record.json")
    path = folder / "verified.json"
    manifest_sha256 = subject.manifest_sha256 if proof == "its own" else "9" * 64
    save_verified(path, Verified(manifest_sha256, is_folded=False, is_rebuilt=True), [])
    write_report(folder, verified=None if proof == "none" else path)
    assert ("did not build the graphs again" in (folder / "report.md").read_text()) is is_doubted


def test_a_folder_from_before_the_link_shows_what_agrees(folder: Path) -> None:
    """Without a link, the mixture's counts and the chosen weights that the record has too are believed."""
    alpha = json.loads((folder / "record.json").read_text())["subject"]["alpha"]
    candidates = [row | {"alpha": [alpha[domain] for domain in samples.DOMAINS]} for row in front()["candidates"]]
    put(folder / "scores.json", artifact_sha256=None)
    put(folder / "front.json", artifact_sha256=None, candidates=candidates)
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "math expert" in text
    assert "3 candidates evaluated" in text
    assert "left out" not in text


def test_numbers_in_markdown_are_those_of_the_verdict(folder: Path) -> None:
    """The table of a pull request holds the same verdicts, limits and figures."""
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "**Pass** on `host`" in text
    assert "**Not measured** on `gtx1660`" in text
    assert "| prefill, 512 tokens, p90 | \\< 100 ms | 20.1 ms |" in text
    assert text.count("| **Pass** |") == 9
    assert "0 processes" not in text


def test_junit_counts_the_undecided_as_errors(folder: Path) -> None:
    """A limit that was not measured is an error in CI, never skipped and never green."""
    write_report(folder)
    suites = {suite.get("name"): suite for suite in ET.parse(folder / "junit.xml").getroot()}
    assert [suites["host"].get(key) for key in ("tests", "failures", "errors", "skipped")] == ["9", "0", "0", "0"]
    assert [suites["gtx1660"].get(key) for key in ("tests", "failures", "errors", "skipped")] == ["9", "0", "9", "0"]
    assert suites["gtx1660"].find("testcase/error") is not None
    assert suites["host"].find("testcase/skipped") is None


def test_junit_tells_a_miss_from_doubt(folder: Path) -> None:
    """A missed limit is a failure, an undecided one an error."""
    cpu = identify_cpu().model_dump(mode="json")
    changes = {"accuracy__math__num_right": 700, "accuracy__code__num_right": 850}
    samples.record("cpu", device__cpu=cpu, device__name=cpu["name"], **changes).save(folder / "record.json")
    write_report(folder, targets=["host"])
    suite = ET.parse(folder / "junit.xml").getroot()[0]
    assert [suite.get(key) for key in ("failures", "errors")] == ["1", "1"]
    assert json.loads((folder / "badge.json").read_text()) == {
        "schemaVersion": 1,
        "label": "havoc host",
        "message": "fail",
        "color": "red",
    }


def properties(element: ET.Element | None) -> dict[str, str]:
    assert element is not None
    return {str(item.get("name")): str(item.get("value")) for item in element.iterfind("properties/property")}


def test_junit_carries_every_figure(folder: Path) -> None:
    """Value, interval, limit, statistic and unit of each case; what has no limit too; the verdict before all else."""
    write_report(folder, targets=["host"])
    suite = ET.parse(folder / "junit.xml").getroot()[0]
    assert suite[0].tag == "properties"
    said = properties(suite)
    assert list(said)[:4] == ["verdict", "reason", "exit_code", "evidence"]
    assert (said["verdict"], said["exit_code"]) == ("pass", "0")
    assert float(said["ttft_ms, median, ms"]) == pytest.approx(650.06, abs=0.01)
    cases = {case.get("name"): properties(case) for case in suite.iterfind("testcase")}
    assert cases["prefill_ms"]["statistic"] == "p90"
    assert cases["decode_tok_per_s"]["statistic"] == "mean rate"
    assert cases["peak_rss_bytes"]["statistic"] == "worst process"
    assert cases["accuracy/math"]["statistic"] == "share right"
    for case in cases.values():
        assert float(case["low"]) <= float(case["value"]) <= float(case["high"])
        assert {"unit", "sign", "limit", "num_samples", "num_processes", "num_disturbed"} <= case.keys()


def test_what_makes_a_record_invalid_is_said_first(folder: Path) -> None:
    """Beside other work: before any figure in the page and in Markdown, in the badge, and in every case of JUnit."""
    cpu = identify_cpu().model_dump(mode="json")
    here = {"device__cpu": cpu, "device__name": cpu["name"]}
    samples.record("cpu", **here, samples__2__foreign_cpu_share=0.9).save(folder / "record.json")
    write_report(folder, targets=["host"])
    reason = "other processes used 90% of the CPU"
    words = Page((folder / "report.html").read_text()).words
    text = " ".join(" ".join(words).split())
    assert text.index("Invalid") < text.index(reason) < text.index("Parameters")
    markdown = (folder / "report.md").read_text().splitlines()
    assert markdown[2].startswith("**Invalid** on `host`")
    assert reason in markdown[2]
    suite = ET.parse(folder / "junit.xml").getroot()[0]
    assert properties(suite)["verdict"] == "invalid"
    assert reason in properties(suite)["reason"]
    assert all(reason in str(case[1].get("message")) for case in suite.iterfind("testcase"))
    assert json.loads((folder / "badge.json").read_text())["message"] == "invalid"


def test_what_has_no_limit_is_shown_too(folder: Path) -> None:
    """The first token has no limit on the host: it is on the page and in Markdown, and said to prove nothing."""
    write_report(folder, targets=["host"])
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text().replace("\\", "")
        assert "Figures without a limit" in text
        assert "ttft_ms, median" in text
        assert "prefill_ms, median" not in text


def test_bars_have_a_scale(folder: Path) -> None:
    """Both ends of a bar are named, so that its length means something."""
    write_report(folder, targets=["host"])
    text = (folder / "report.html").read_text()
    assert '<div class="scale number"><span>0</span><span>150 ms</span></div>' in re.sub(r"\s*\n\s*", "", text)
    assert "<span>50.0 %</span><span>100.0 %</span>" in text


def test_telemetry_is_a_table(folder: Path) -> None:
    """One row a reading; what the device does not offer is empty, not 0."""
    write_report(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "telemetry.csv").read_text())))
    assert len(rows) == 20
    assert rows[3]["temperature_c"] == "60.3"
    assert rows[3]["sm_clock_mhz"] == ""


def test_hostile_names_stay_text(folder: Path) -> None:
    """Names come from files of others: no markup of theirs reaches a page or a table."""
    samples.record("cpu", subject__name=HOSTILE, device__name=HOSTILE).save(folder / "record.json")
    write_report(folder)
    assert "script" not in Page((folder / "report.html").read_text()).tags
    assert re.search(r"(?<!\\)[<>]", (folder / "report.md").read_text()) is None
    ET.parse(folder / "junit.xml")


def test_a_bare_record_is_enough(tmp_path: Path) -> None:
    """Without scores, search, telemetry or even samples there is a page, and it claims nothing."""
    bare = {
        "samples": [],
        "memory": {},
        "telemetry": [],
        "accuracy": {},
        "subject__alpha": None,
        "subject__num_parameters": None,
    }
    samples.record("cpu", **bare).save(tmp_path / "record.json")
    _, judgements = write_report(tmp_path, targets=["host"])
    assert judgements[0].verdict != "pass"
    assert Page((tmp_path / "report.html").read_text()).tags.count("svg") == 0


def test_a_record_that_nobody_judges_still_shows_its_figures(tmp_path: Path) -> None:
    """On another device no limit is judged, yet what was measured is on the page, and said to prove nothing."""
    samples.record("cpu").save(tmp_path / "record.json")
    write_report(tmp_path, targets=["gtx1660"])
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "Figures without a verdict" in text
        assert "499 tok/s" in text
    write_report(tmp_path, targets=["gtx1660", "host"])


def test_control_characters_break_no_page(tmp_path: Path) -> None:
    """A bell or an escape in a name is shown as replaced; every page stays well-formed."""
    name = "GTX\x00\x07\x1b[31m 1660\nfake: line"
    samples.record("cpu", device__name=name, subject__name=name, host__kernel=name).save(tmp_path / "record.json")
    write_report(tmp_path, targets=["gtx1660"])
    ET.parse(tmp_path / "junit.xml")
    for written in ("report.html", "report.md", "junit.xml"):
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", (tmp_path / written).read_text())


def test_a_gpu_record_shows_its_clocks(tmp_path: Path) -> None:
    """Device memory, clock and temperature of a card are drawn."""
    samples.record("cuda").save(tmp_path / "record.json")
    write_report(tmp_path, targets=["gtx1660"])
    text = (tmp_path / "report.html").read_text()
    assert "VRAM, MB" in text
    assert "core, MHz" in text
    assert "°C" in text


def test_the_previous_record_is_compared(tmp_path: Path) -> None:
    """What changed in the environment since the record before is shown beside what is."""
    before = samples.record("cpu", run_id="before", host__kernel="5.15.0", host__container="docker")
    before.save(tmp_path / "one" / "record.json")
    samples.record("cpu", provenance__previous_record_sha256=before.sha256).save(tmp_path / "two" / "record.json")
    write_report(tmp_path / "two", targets=["host"])
    text = (tmp_path / "two" / "report.html").read_text()
    assert "<del>Linux 5.15.0</del>" in text
    assert "<del>docker</del>" in text  # and now there is none
    assert text.count("<del>") == 2


def test_bad_folders_are_one_line(tmp_path: Path, folder: Path) -> None:
    """No record, an edited one, broken scores: a reason, an exit code, and no page half-written."""
    with pytest.raises(HavocError, match="no record.json"):
        write_report(tmp_path / "nothing")
    bad_score = json.dumps(scores()).replace("741", "1741")
    for name, text in (
        ("scores.json", "[1]"),
        ("scores.json", '{"rows": [{}]}'),
        ("scores.json", bad_score),
        ("front.json", '{"candidates": 3}'),
        ("front.json", json.dumps(front()).replace('"prefill_ms": 17.0', '"prefill_ms": 0.0')),
        ("front.json", json.dumps(front()).replace('"prefill_ms": 17.0, ', "", 1)),
        ("front.json", "{"),
    ):
        kept = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(HavocError, match=name):
            write_report(folder)
        (folder / name).write_text(kept)
    (folder / "record.json").write_text(
        (folder / "record.json").read_text().replace('"name": "sample"', '"name": "simple"')
    )
    with pytest.raises(IdentityError):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_history_of_a_folder(tmp_path: Path) -> None:
    """Every run is a line and a row, oldest first; an unreadable record is named; building twice changes nothing."""
    for place in (2, 1):
        record = samples.record("cpu", run_id=f"run-{place}", created_utc=f"2026-11-2{place}T06:00:00Z")
        record.save(tmp_path / f"run{place}" / "record.json")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text("{")
    broken = {"id": "cpu_contention", "status": "invalid", "detail": "others used 80 %"}
    samples.record("cpu", run_id="run-3", created_utc="2026-11-23T06:00:00Z", checks=[broken]).save(
        tmp_path / "busy" / "record.json"
    )
    index = write_index(tmp_path, targets=["host"])
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["run_id"] for line in lines] == ["run-1", "run-2", "run-3"]
    assert lines[0]["metrics"]["peak_vram_bytes"] is None
    shown = Page(index.read_text())
    assert {"run1/report.html", "run2/report.html"} <= set(shown.loads)
    assert "broken" in shown.words
    assert "busy" in shown.words  # invalid: a row of its own, and no part of the history
    words = " ".join(shown.words)
    assert re.search("too few .* 2 on the newest level, 13 are needed", words)
    assert "limit host: < 100 ms" in words
    before = index.read_bytes()
    assert write_index(tmp_path, targets=["host"]).read_bytes() == before


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), document=st.sampled_from([scores, front]))
def test_no_companion_of_a_record_surprises(tmp_path: Path, data: st.DataObject, document: Any) -> None:
    """Scores or a front with any value replaced by any other are drawn, or refused in one line."""
    content: dict[str, Any] = document()
    node: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else 0
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(_values)
            break
        node = node[key]
    path = tmp_path / "fuzzed.json"
    path.write_text(json.dumps(content))
    try:
        found = read_scores(path) if document is scores else read_front(path)
        if document is scores:
            page.score_cells(found)
        elif found is not None:
            charts.pareto_front(found, 90.0)
            found.notes()
            candidate_table(found)
    except HavocError as error:
        assert "\n" not in str(error)


def test_every_candidate_stands_on_the_page_with_its_origin(folder: Path) -> None:
    """Generation, how it was made, and its parents by number; the chosen one is marked."""
    write_report(folder)
    text = re.sub(r"<[^>]*>", " ", (folder / "report.html").read_text().split("<h2>Search</h2>")[1])
    words = " ".join(text.split())
    assert "1 seeded: all experts at 1 in fp32 on the front" in words
    assert "2 bred in generation 1 from 1 and 3 chosen" in words


def test_a_long_search_shows_what_the_outcome_rests_on() -> None:
    """The front, the chosen one and those scored again, under their own numbers; how many are left out is said."""
    document = front()
    first, chosen, other = document["candidates"]
    others = [{**other, "key": f"o{number}"} for number in range(MOST_ROWS + 1)]
    found = candidate_table(Front.model_validate({**document, "candidates": [first, *others, chosen]}))
    assert found is not None
    assert [row["number"] for row in found["rows"]] == [1, MOST_ROWS + 3]
    assert [row["is_chosen"] for row in found["rows"]] == [False, True]
    assert found["rows"][1]["origin"] == "bred in generation 1 from 1 and a failed one"
    assert found["note"].startswith(f"{MOST_ROWS + 1} candidates")
    plain = {**document, "candidates": [{**one, "origin": None} for one in document["candidates"]]}
    assert candidate_table(Front.model_validate(plain)) is None


def test_a_search_says_which_card_answered() -> None:
    """The CPU is what is expected, and a front of an older program does not say."""

    def notes(**fields: object) -> str:
        return " ".join(Front.model_validate(front() | fields).notes())

    assert "come from a card (cuda)" in notes(answered_on={"device": "cuda", "name": "a card"})
    assert notes(answered_on={"device": "cpu", "name": "a processor"}) == notes()


def test_the_search_is_told_in_sentences() -> None:
    """Where the chosen one came from, whether breeding found anything, whether it settled, what played no part."""
    notes = Front.model_validate(front()).notes()
    assert any("bred in generation 1" in note for note in notes)
    assert any("first generation: +1.0 points" in note for note in notes)
    assert any(note.startswith("not settled") for note in notes)
    other = Front.model_validate(
        {**front(), "chosen": "a", "evidence": "measured_other_device", "disturbance": "a neighbour took the CPU"}
    ).notes()
    assert any("first generation (all experts at 1 in fp32)" in note for note in other)
    assert any("another device" in note for note in other)
    assert any(note.endswith(": a neighbour took the CPU") for note in other)
    assert not any(note.startswith("frozen") for note in other)


LOOK = """<script>onload=()=>{const w=document.documentElement,count=q=>document.querySelectorAll(q).length;
document.title=[w.scrollWidth<=innerWidth,count('svg'),count('.limit'),getComputedStyle(document.body).backgroundColor]
.join(';')}</script></body>"""


def seen(page: Path, profile: Path, *, width: int, is_dark: bool = False) -> list[str]:
    """Lay a page out in a real browser without network; return whether it fits, its pictures, limits and background."""
    text = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    probe = page.with_name("probe.html")
    probe.write_text(text.replace("</body>", LOOK))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--blink-settings=preferredColorScheme=0"] if is_dark else []
    command += [f"--user-data-dir={profile}", f"--window-size={width},1600", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return title[1].split(";")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "is_dark"), [(1200, True), (390, False)], ids=["desk-dark", "phone"])
def test_a_browser_shows_it(folder: Path, tmp_path: Path, width: int, *, is_dark: bool) -> None:
    """On desk and phone nothing is wider than the window, every picture is there, and dark is dark."""
    write_report(folder)
    fits, num_pictures, num_limits, background = seen(
        folder / "report.html", tmp_path / "profile", width=width, is_dark=is_dark
    )
    assert (fits, num_pictures, num_limits) == ("true", "5", "9")
    assert background == ("rgb(15, 17, 21)" if is_dark else "rgb(246, 246, 243)")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_hash_in_a_reason_wraps(folder: Path, tmp_path: Path) -> None:
    """A reason may hold a hash of 64 letters, which no browser breaks unless it is told to."""
    write_report(folder)
    page = folder / "report.html"
    text = page.read_text()
    page.write_text(text.replace('<div class="said"><b>', f'<div class="said"><small>{"5" * 80}</small><b>'))
    assert page.read_text().count("5" * 80) == 9
    assert seen(page, tmp_path / "profile", width=1000)[0] == "true"


@pytest.fixture(scope="module")
def many_nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the index of 20 runs: the last five slower and on other math rows, the first on another kernel."""
    spread, runs, past = random.Random(1), [], []
    for place in range(20):
        values = samples.document("cpu")
        for process in values["samples"]:
            factor = spread.gauss(1.1 if place >= 15 else 1.0, 0.004)
            process["prefill"]["duration_ns"] = [round(factor * ns) for ns in process["prefill"]["duration_ns"]]
        changes = {"host__kernel": "5.9.9"} if place == 0 else {}
        changes |= {"accuracy__math__rows_sha256": "8" * 64} if place >= 15 else {}
        about = {"run_id": f"run-{place}", "created_utc": f"2026-11-{place + 1:02d}T06:00:00Z"}
        record = samples.sealed(samples.changed(values, **about, **changes))
        runs.append(entry(f"run{place:02d}", record, []))
        past.append(past_record(f"run{place:02d}", record))
    limits = [("host", limit) for limit in load_target("host").limits]
    index = tmp_path_factory.mktemp("nights") / "index.html"
    index.write_text(page.index(runs, [], history_of(past, [], margin=0.01), limits))
    return index


def test_the_index_tells_limits_alarms_and_cuts(many_nights: Path) -> None:
    """In words and in the pictures of the metrics that they are of."""
    index = many_nights.read_text()
    shown = " ".join(Page(index).words)
    assert "1 alarm in 20 records, 1 of them standing" in shown
    assert "from run15 on, 2026-11-16 06:00 UTC" in shown
    assert "cut before run01, 2026-11-02 06:00 UTC: kernel Linux 5.9.9 -> Linux 6.1.0" in shown
    assert "cut of accuracy/math before run15" in shown
    assert "one colour per device; limit host: < 100 ms" in shown
    assert re.search(r"five records more would show a step of \d\.\d%", shown)
    texts = [re.findall(r"<text[^>]*>([^<]*)", picture) for picture in index.split("<svg")[1:]]
    prefill, math = texts[0], next(words for words in texts[4:] if "cut" in words and "%" in words)
    assert {"alarm", "cut"} <= set(prefill)
    assert [words.count("alarm") for words in texts] == [1, 0, 0, 0, 0, 0, 0]
    assert "host: &gt; 85.0 %" in math
    assert "host: &lt; 100 ms" not in prefill  # it lies far above what was measured


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_history(many_nights: Path, tmp_path: Path) -> None:
    """On the narrowest phone: a picture for each metric that was measured, limits, alarms and cuts, in the window."""
    assert seen(many_nights, tmp_path / "profile", width=360)[:2] == ["true", "7"]


EVIL = "a<b>\x01\x1b[31m|`x` @team http://evil.example www.evil.example"
EVIL_TARGET = f"""
[{json.dumps(EVIL)}]
title = {json.dumps(EVIL)}
device = {{ kind = "cpu", is_this_machine = true }}
limits = [{{ metric = "prefill_ms", below = 1, unit = "ms" }}]
"""


def test_a_hostile_target_steers_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name and title of a target file break no junit, colour no terminal, call nobody and lead nowhere."""
    path = folder.parent / "own targets.toml"
    path.write_text(EVIL_TARGET)
    write_report(folder, targets=[str(path)])
    (suite,) = ET.parse(folder / "junit.xml").getroot()
    assert "\ufffd" in str(suite.get("name"))
    case = suite.find("testcase")
    assert case is not None
    assert "\ufffd" in str(case.get("classname"))
    text = (folder / "report.md").read_text()
    prose = re.sub(r"`[^`\n]*`|```.*?```", "", text, flags=re.DOTALL)
    assert "@team" not in prose
    assert "http://" not in prose
    assert "www.e" not in prose
    assert "--target 'own targets.toml' --artifact ARTIFACT" in text
    for words in (["gate", str(folder / "record.json")], ["plan", "nano"]):
        main([*words, "--target", str(path)])
        assert "\x1b" not in capsys.readouterr().out


def test_a_drivers_words_are_no_formula(folder: Path) -> None:
    """A spreadsheet shows a reason that begins like a formula, and no control character reaches it."""
    reasons = ["=1+1", "@x", "+1", "\x1b[31m"]
    for reason in reasons:
        telemetry = samples.document("cpu")["telemetry"]
        telemetry[0]["throttle_reasons"] = [reason]
        samples.record("cpu", telemetry=telemetry).save(folder / "record.json")
        write_report(folder, targets=["host"])
        text = (folder / "telemetry.csv").read_text()
        cell = next(csv.DictReader(io.StringIO(text)))["throttle_reasons"]
        assert cell[0] in "'\ufffd"
        assert "\x1b" not in text


def test_the_line_to_repeat_quotes_what_is_not_plain(folder: Path) -> None:
    """A profile named like a command is one word of the line that a reader pastes."""
    samples.record("cpu", protocol__profile="standard; rm -rf x").save(folder / "record.json")
    write_report(folder)
    assert "--profile 'standard; rm -rf x'" in (folder / "report.md").read_text()


def test_the_line_to_repeat_captures_steps_again(folder: Path) -> None:
    """Steps that ran as a CUDA graph are several times faster: the option is part of how it was measured."""
    samples.record("cuda", protocol__provider_options={"enable_cuda_graph": "1"}).save(folder / "record.json")
    write_report(folder)
    assert "--cuda-graph --out DIR" in (folder / "report.md").read_text()


def test_the_line_to_repeat_reads_as_many_passes(folder: Path) -> None:
    """Two passes take twice the time: the page says so, and so does the line that measures it again."""
    samples.record("cpu", workload__passes=2).save(folder / "record.json")
    write_report(folder)
    page = (folder / "report.md").read_text()
    assert " --passes 2 --out DIR" in page
    assert "tokens in, 2 passes," in page


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_a_pipe_instead_of_a_record_is_named(tmp_path: Path) -> None:
    """A folder whose record is a pipe is listed as unread, and nobody waits for it."""
    first = samples.record("cpu", run_id="first")
    first.save(tmp_path / "first" / "record.json")
    second = samples.record("cpu", run_id="second", provenance__previous_record_sha256=first.sha256)
    second.save(tmp_path / "second" / "record.json")
    (tmp_path / "a-pipe").mkdir()
    os.mkfifo(tmp_path / "a-pipe" / "record.json")
    index = write_index(tmp_path, targets=["host"])
    assert "not a file" in index.read_text()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("confidences", "said"),
    [((0.99, 0.99), "at 99 %;"), ((0.95, 0.999999), "at 95 % and 99.9999 % for ttft_ms on own;")],
)
def test_the_page_says_the_confidence_that_its_limits_ask_for(
    folder: Path, confidences: tuple[float, float], said: str
) -> None:
    """The footer speaks of the target's own confidence, and names the limits that ask for another."""
    path = folder.parent / "own.toml"
    limits = "".join(
        f'[[own.limits]]\nmetric = "{metric}"\nbelow = 100\nunit = "ms"\nconfidence = {confidence}\n'
        for metric, confidence in zip(("prefill_ms", "ttft_ms"), confidences, strict=True)
    )
    path.write_text(f'[own]\ntitle = "own"\ndevice = {{ kind = "cpu", is_this_machine = true }}\n{limits}')
    write_report(folder, targets=[str(path)])
    text = (folder / "report.md").read_text().replace("\\", "")
    assert f"Bounds are one-sided {said}" in text


def test_the_whole_structure_is_named(tmp_path: Path) -> None:
    """Half of the rank and a better quantizer stand on the page and in the history, not the weights' format alone."""
    cut = {"weight_format": "int4", "activation_dtype": "fp32", "block_size": "32"}
    cut |= {"is_symmetric": "False", "quantizer": "hqq", "rank_fraction": "0.5"}
    changes = {"subject__structure": cut, "subject__weight_format": "int4"}
    samples.record("cpu", **changes).save(tmp_path / "run" / "record.json")
    index = write_index(tmp_path, targets=["host"]).read_text()
    assert "int4a-hqq-fp32-cfp32-r0.50" in index
    text = (tmp_path / "run" / "report.md").read_text()
    assert "int4 weights (asymmetric blocks of 32, hqq), fp32 activations" in text
    assert "0.5 of the rank" in text
