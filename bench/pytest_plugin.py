"""A release gate inside a user's pytest run.

    pytest --havoc-target gtx1660 --havoc-record reports/run1/record.json    judge existing records
    pytest --havoc-target host --havoc-artifact artifact                     measure this artifact here, then judge it

    def test_release(havoc_gate):
        havoc_gate()                  # every limit proven met, or the test fails with the table
        havoc_gate("prefill_ms")      # one limit

Undecided and not measured fail too: a gate without data is not green. Parallel workers would disturb a measurement, so
under pytest-xdist only records are judged. The GPU is added to pytest-benchmark's `machine_info`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .judge.gate import Judgement
    from .judge.limits import Line
    from .judge.record import Record


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the gate."""
    group = parser.getgroup("havoc", "HAVOC release gate")
    group.addoption("--havoc-target", metavar="NAME", default="host", help="host, gtx1660, or a TOML file (host)")
    group.addoption("--havoc-record", metavar="FILE", action="append", type=Path, default=[], help="judge this record")
    group.addoption("--havoc-artifact", metavar="DIR", type=Path, help="the artifact of the release")
    group.addoption("--havoc-verified", metavar="FILE", type=Path, help="the file of `havoc verify --out FILE`")
    profile_help = "how long to measure: quick, standard, release (quick)"
    group.addoption("--havoc-profile", metavar="NAME", default="quick", help=profile_help)
    group.addoption("--havoc-rows", metavar="N", type=int, default=1000, help="rows per domain, 0: none (1000)")


@pytest.fixture(scope="session")
def havoc_judgement(pytestconfig: pytest.Config) -> Judgement:
    """The verdict on the given records, or on a new measurement of the artifact."""
    from ..export.runtime.verification import load_verified
    from .device import identify_cpu
    from .judge.gate import hash_measured, judge
    from .judge.targets import load_target

    artifact: Path | None = pytestconfig.getoption("--havoc-artifact")
    path: Path | None = pytestconfig.getoption("--havoc-verified")
    try:
        target = load_target(pytestconfig.getoption("--havoc-target"))
        records = _records(pytestconfig, artifact)
        files = None if artifact is None else hash_measured(artifact, records[0].subject)
        verified = None if path is None else load_verified(path)
        return judge(records, target, artifact_files=files, this_cpu=identify_cpu(), verified=verified)
    except HavocError as error:
        pytest.fail(f"havoc: {error} (exit code {error.exit_code})", pytrace=False)


@pytest.fixture
def havoc_gate(havoc_judgement: Judgement, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Fail the test unless the named limit, or every limit, is proven met on the target."""
    from .judge.targets import load_target

    def check(metric: str | None = None) -> None:
        lines = [line for line in havoc_judgement.lines if metric in {None, line.metric}]
        if not lines:
            known = ", ".join(line.metric for line in havoc_judgement.lines)
            pytest.fail(f"havoc: {havoc_judgement.target} has no limit on {metric!r}, only on {known}", pytrace=False)
        if any(line.verdict != "pass" for line in lines):
            title = load_target(pytestconfig.getoption("--havoc-target")).title
            pytest.fail(_failure(havoc_judgement, lines, title, is_whole=metric is None), pytrace=False)

    return check


def _failure(judgement: Judgement, lines: Sequence[Line], title: str, *, is_whole: bool) -> str:
    """The text of a failed test: its own limit, or the whole judgement if all limits are tested or a rule fails."""
    from .judge.verdicts import spelled
    from .report.terminal import judgement_text, limits_text

    if is_whole or judgement.findings:
        return judgement_text(judgement, title)
    words = ", ".join(f"{line.title}, {line.statistic}: {spelled(line.verdict).upper()}" for line in lines)
    return f"{words} on {judgement.target} ({title})\n\n{limits_text(lines)}"


def _records(config: pytest.Config, artifact: Path | None) -> list[Record]:
    from .judge.record import load_record
    from .record_folder import record_path

    paths: list[Path] = config.getoption("--havoc-record")
    if paths:
        return [load_record(record_path(path)) for path in paths]
    if artifact is None:
        raise HavocError("nothing to judge: give --havoc-record FILE or --havoc-artifact DIR")
    if hasattr(config, "workerinput"):
        raise HavocError("parallel workers would disturb the measurement: judge records, or run without -n")
    return [_measured(config, artifact)]


def _measured(config: pytest.Config, artifact: Path) -> Record:
    from ..adapt.tasks.evaluation import Scoring
    from .accuracy import add_accuracy, run_accuracy
    from .measure import measure

    record = measure(artifact, profile=config.getoption("--havoc-profile"))
    num_rows: int = config.getoption("--havoc-rows")
    return add_accuracy(record, run_accuracy(artifact, Scoring(num_rows=num_rows))) if num_rows else record


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Add the GPU to pytest-benchmark's machine information, or the reason why there is none."""
    from ..export.runtime.devices import CUDA_PROVIDER
    from .device import identify_device

    try:
        device = identify_device(CUDA_PROVIDER)
    except HavocError as error:
        machine_info["gpu"] = {"name": None, "reason": str(error)}
        return
    gpu = device.gpu
    machine_info["gpu"] = {
        "name": device.name,
        "driver": gpu.driver_version if gpu else None,
        "fingerprint": device.fingerprint,
        "is_simulated": device.is_simulated,
    }
