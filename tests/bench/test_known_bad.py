"""The 30 ways in which a gate is commonly fooled, each as a person would meet it: a file, a command, an exit code.

Beside every bad one stands its good twin, the same command on the same file without the fault, which must pass: a gate
that refuses everything would be of no use.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.record import seal_of
from havoc_core.cli import main
from tests.bench import known_bad as known

samples = known.samples
ALL_CASES = """missing metric, no format cost, coarse format,
    empty samples, impossible latency, zero VRAM, VRAM below weight bytes, NVML None,
    PID mismatch, foreign process, throttled, clocks unsteady, CPU fallback, truncated tokens, cached outputs,
    NaN logits, wrong card, sibling card, mock NVML, faster than roofline, screening record, projected record,
    edited record, stale artifact hash, too few samples, interval straddles limit, GiB/GB mix, ms/s mix,
    unknown config key, missing baseline, schema from the future, xdist"""
OWN_TARGET = """
[own]
title = "the sample processor"
[own.device]
kind = "cpu"
names = ["Example 9000 8-Core Processor"]
[[own.limits]]
metric = "peak_rss_bytes"
below = 2
unit = "GiB"
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault in a record, in its file, or in a targets file, and what the gate must say of it."""

    exit_code: int
    word: str
    kind: str = "cpu"
    changes: dict[str, Any] | None = None
    edit: tuple[str, str] | None = None
    reseal: bool = True
    target: tuple[str, str] | None = None
    good: dict[str, Any] | None = None


def broken(rule: str, place: int, word: str) -> Fault:
    """Return the fault of a known-bad record of `known_bad.py`."""
    kind, changes = known.BAD[rule][place]
    return Fault(exit_code={"I": 5, "V": 4}[rule[0]], word=word, kind=kind, changes=changes)


def latency(text: str, word: str) -> Fault:
    return Fault(exit_code=2, word=word, edit=("20010000", text), reseal=False)


COARSE = samples.COST | {"kl_mean": 0.5, "kl_chunks": [0.4, 0.5, 0.6, 0.5]}
FAULTS: dict[str, list[Fault]] = {
    "missing metric": [Fault(exit_code=3, word="not measured: accuracy/math", changes={"accuracy": {}})],
    "no format cost": [
        Fault(exit_code=3, word="does not say what its format costs", changes={"subject__format_cost": None}),
        Fault(
            exit_code=3,
            word="measured over random ids",
            changes={"subject__format_cost__text": "random ids", "subject__format_cost__text_sha256": None},
        ),
    ],
    "coarse format": [
        Fault(exit_code=1, word="kl_mean", changes={"subject__format_cost": COARSE}),
        Fault(exit_code=1, word="top1_share", changes={"subject__format_cost__top1_share": 0.5}),
        Fault(exit_code=2, word="kl_mean is 0.01", edit=('"kl_mean": 0.02', '"kl_mean": 0.01')),
    ],
    "empty samples": [Fault(exit_code=3, word="not measured: prefill_ms", changes={"samples": []})],
    "impossible latency": [
        latency("NaN", "NaN"),
        latency("Infinity", "Infinity"),
        latency("0", "greater than 0"),
        latency("-20010000", "greater than 0"),
        latency("null", "valid integer"),
    ],
    "zero VRAM": [
        Fault(exit_code=2, word="greater than 0", kind="cuda", edit=('"peak_bytes": 400000000', '"peak_bytes": 0'))
    ],
    "VRAM below weight bytes": [broken("V14", 0, "is less than the")],
    "NVML None": [
        Fault(exit_code=3, word="NVML gives None", kind="cuda", changes={"memory": {"vram_reason": "NVML gives None"}})
    ],
    "PID mismatch": [broken("V03", 0, "memory of another process")],
    "foreign process": [broken("V11", 0, "foreign")],
    "throttled": [broken("V09", 0, "hw_thermal_slowdown"), broken("V09", 1, "hw_slowdown")],
    "clocks unsteady": [broken("V10", 0, "core clock fell")],
    "CPU fallback": [broken("V05", 0, "CPUExecutionProvider"), broken("V05", 1, "not proved")],
    "truncated tokens": [broken("V06", 0, "64 tokens"), broken("V06", 1, "63 steps")],
    "cached outputs": [broken("V08", 0, "cache")],
    "NaN logits": [broken("V07", 0, "NaN")],
    "wrong card": [
        Fault(exit_code=5, word="RTX 2060", kind="cuda", changes={"device__name": "NVIDIA GeForce RTX 2060"}),
        broken("I09", 0, "compute capability"),
    ],
    "sibling card": [broken("I04", 0, "SUPER"), broken("I04", 1, "Ti"), broken("I12", 0, "0x21c4")],
    "mock NVML": [broken("I02", 2, "test library"), broken("I07", 1, "one witness")],
    "faster than roofline": [broken("V17", 0, "the device"), broken("V17", 3, "needs at least")],
    "screening record": [broken("V01", 0, "screening")],
    "projected record": [broken("I02", 0, "projected")],
    "edited record": [Fault(exit_code=5, word="changed", edit=('"num_right": 900', '"num_right": 990'), reseal=False)],
    "too few samples": [
        Fault(exit_code=3, word="processes", changes={"samples__3__prefill": {}, "samples__4__prefill": {}})
    ],
    "interval straddles limit": [
        Fault(exit_code=3, word="within the interval", changes={"accuracy__math__num_right": 850})
    ],
    "GiB/GB mix": [
        Fault(
            exit_code=1,
            word="missed: peak_rss_bytes",
            target=('"GiB"', '"GB"'),
            good={"memory__rss__each__peak_bytes": 2_020_000_000},
        ),
        Fault(exit_code=2, word="unit", target=('unit = "GiB"', "")),
        Fault(exit_code=4, word="2 bytes is less than", changes={"memory__rss__each__peak_bytes": 2}),
    ],
    "ms/s mix": [broken("V16", 0, "not in one unit"), Fault(exit_code=2, word="no unit", target=('"GiB"', '"ms"'))],
    "unknown config key": [Fault(exit_code=2, word="belwo", target=("below", "belwo"))],
    "schema from the future": [
        Fault(exit_code=2, word="newer than this program", edit=('"schema_version": 1', '"schema_version": 2'))
    ],
    "xdist": [broken("V13", 0, "xdist")],
}


def save(path: Path, fault: Fault, *, is_good: bool) -> None:
    """Write the record of a case: of this machine's CPU, of the sample CPU for an own target, or of the card."""
    here = identify_cpu().model_dump(mode="json")
    own = {"device__cpu": here, "device__name": here["name"]} if fault.kind == "cpu" and not fault.target else {}
    changes = (fault.good or {}) | (own if is_good else own | (fault.changes or {}))
    samples.record(fault.kind, **changes).save(path)
    if fault.edit and not is_good:
        text = path.read_text()
        assert fault.edit[0] in text
        path.write_text(text.replace(*fault.edit, 1))
        if fault.reseal:
            document = json.loads(path.read_text())
            path.write_text(json.dumps(document | {"sha256": seal_of(document)}))


def gate(folder: Path, fault: Fault, *, is_good: bool) -> int:
    record, target = folder / "record.json", {"cpu": "host", "cuda": "gtx1660"}[fault.kind]
    save(record, fault, is_good=is_good)
    if fault.target:
        target = str(folder / "own.toml")
        Path(target).write_text(OWN_TARGET if is_good else OWN_TARGET.replace(*fault.target))
    return main(["gate", str(record), "--target", target])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=f"{name.replace(' ', '-')}-{place}")
        for name, faults in FAULTS.items()
        for place, fault in enumerate(faults)
    ],
)
def test_a_known_fault_is_found_and_its_twin_passes(
    fault: Fault, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault ends in its exit code with words that name it; without the fault the same command ends in 0."""
    assert gate(tmp_path, fault, is_good=True) == 0
    capsys.readouterr()
    assert gate(tmp_path, fault, is_good=False) == fault.exit_code
    said = capsys.readouterr()
    assert fault.word in said.out + said.err


def test_a_stale_artifact_is_found_and_its_twin_passes(
    own_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release of other files than were measured, and one with a changed byte, end in 5; the measured one passes."""
    here = identify_cpu().model_dump(mode="json")
    words = ["gate", str(tmp_path / "record.json"), "--target", "host", "--artifact", str(own_artifact)]
    for changes, expected in (({}, 0), ({"subject__files__model.onnx": "f" * 64}, 5)):
        record = {"device__cpu": here, "device__name": here["name"], **samples.made_from(own_artifact)}
        samples.record("cpu", **record, **changes).save(tmp_path / "record.json")
        assert main(words) == expected
    assert "model.onnx is not the file" in capsys.readouterr().out
    data = own_artifact / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
    assert main(words) == 5


def test_a_missing_baseline_is_no_equality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comparing with a record that is not there is an error; with one that is, the result is said."""
    samples.record("cpu").save(tmp_path / "new.json")
    words = [str(tmp_path / name) for name in ("old.json", "new.json")]
    assert main(["compare", *words]) == 2
    assert "no such file" in capsys.readouterr().err
    samples.record("cpu", run_id="old").save(tmp_path / "old.json")
    assert main(["compare", *words]) == 0


ELSEWHERE: dict[str, Callable[..., None]] = {
    "stale artifact hash": test_a_stale_artifact_is_found_and_its_twin_passes,
    "missing baseline": test_a_missing_baseline_is_no_equality,
}


def test_no_case_is_missing() -> None:
    """Every case of the list has its fault, and there is no other."""
    names = {" ".join(name.split()) for name in ALL_CASES.split(",")}
    assert len(names) == 32
    assert FAULTS.keys() | ELSEWHERE.keys() == names
