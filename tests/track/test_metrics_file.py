"""`metrics.jsonl` holds every step once, whatever happens to who writes it."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core.track.metrics_file import MetricsFile, points_of

AXIS = "svf/math/step"
if sys.platform != "win32":
    import resource


def metrics_file(folder: Path) -> MetricsFile:
    return MetricsFile(folder, warn=pytest.fail)


def steps(folder: Path) -> list[int | None]:
    return [step for _, step, _ in points_of((folder / "metrics.jsonl").read_bytes())]


def test_a_line_is_plain_json(tmp_path: Path) -> None:
    """Any reader of JSON lines gets axis, step and values."""
    metrics_file(tmp_path).log(AXIS, 3, {"svf/math/loss": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"axis": AXIS, "step": 3, "values": {"svf/math/loss": 0.5}}


def test_no_step_stands_there_twice(tmp_path: Path) -> None:
    """Steps that are done again after an interruption are passed over; a new name of an old step is not."""
    for _ in range(2):
        file = metrics_file(tmp_path)
        for step in (1, 2):
            file.log(AXIS, step, {"svf/math/loss": 0.5})
    assert steps(tmp_path) == [1, 2]
    metrics_file(tmp_path).log(AXIS, 2, {"svf/math/loss": 0.6, "svf/math/reward": 0.7})
    assert list(points_of((tmp_path / "metrics.jsonl").read_bytes()))[-1] == (AXIS, 2, {"svf/math/reward": 0.7})


def test_a_value_of_the_whole_run_is_written_when_it_changes(tmp_path: Path) -> None:
    """The last line of a name without an axis is what holds."""
    for value in (0.5, 0.5, 0.6):
        metrics_file(tmp_path).log(None, None, {"final/accuracy": value})
    found = [values["final/accuracy"] for _, _, values in points_of((tmp_path / "metrics.jsonl").read_bytes())]
    assert found == [0.5, 0.6]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    """Neither null nor NaN nor infinity is in the file, which stays JSON."""
    values = {"svf/math/loss": math.nan, "svf/math/reward": None, "svf/math/kl_div": math.inf}
    metrics_file(tmp_path).log(AXIS, 1, values)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("name", "axis"), [("svf/math/lost", AXIS), ("svf/math/loss", None), ("adas/failed", AXIS)])
def test_a_name_must_be_catalogued_under_its_axis(tmp_path: Path, name: str, axis: str | None) -> None:
    """A caller that logs anything else is wrong."""
    with pytest.raises(ValueError, match=name):
        metrics_file(tmp_path).log(axis, None if axis is None else 1, {name: 1.0})


def test_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    """What a killed writer left of a line goes, the step is written again, and the rest stays."""
    file = metrics_file(tmp_path)
    for step in (1, 2):
        file.log(AXIS, step, {"svf/math/loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    metrics_file(tmp_path).log(AXIS, 2, {"svf/math/loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_is_damaged_hides_no_other(tmp_path: Path) -> None:
    """Whatever stands in the file, the whole points are read and more can be written."""
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"axis": AXIS, "step": 1, "values": {"svf/math/loss": 0.5}}).encode()
    bad = [b"", b"null", b"[1]", b'{"axis": 1, "step": 1, "values": {}}', b"\xff\x00", b'{"axis": null}', b"[" * 9999]
    path.write_bytes(b"\n".join([*bad, good, *bad, b""]))
    file = metrics_file(tmp_path)
    file.log(AXIS, 1, {"svf/math/loss": 0.5})
    file.log(AXIS, 2, {"svf/math/loss": 0.5})
    assert steps(tmp_path) == [1, 2]


def test_what_is_done_anew_is_forgotten(tmp_path: Path) -> None:
    """An expert that is trained again begins at its first step; all else stays."""
    file = metrics_file(tmp_path)
    file.log(AXIS, 1, {"svf/math/loss": 0.5})
    file.log("svf/mathe/step", 1, {"svf/mathe/loss": 0.5})
    file.forget("svf/math/")
    file.log(AXIS, 1, {"svf/math/loss": 0.25})
    found = list(points_of((tmp_path / "metrics.jsonl").read_bytes()))
    assert found == [("svf/mathe/step", 1, {"svf/mathe/loss": 0.5}), (AXIS, 1, {"svf/math/loss": 0.25})]


WRITES = """
import sys, time
from pathlib import Path
from havoc_core.track.metrics_file import MetricsFile
file = MetricsFile(Path(sys.argv[1]), warn=print)
for step in range(int(sys.argv[3])):
    file.log(f"svf/{sys.argv[2]}/step", step, {f"svf/{sys.argv[2]}/z/0/m{n}/norm": 0.1 * n for n in range(400)})
"""


def writer(folder: Path, task: str, num_steps: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITES, str(folder), task, str(num_steps)])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_processes_that_write_together_lose_nothing(tmp_path: Path) -> None:
    """Three trainings append to one file: each line is whole and each step is there."""
    processes = [writer(tmp_path, task, 60) for task in ("math", "code", "vision")]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = sorted((entry["axis"], entry["step"]) for entry in map(json.loads, lines))
    assert found == sorted((f"svf/{task}/step", step) for task in ("math", "code", "vision") for step in range(60))


def test_killed_again_and_again_it_holds_every_step_once(tmp_path: Path) -> None:
    """SIGKILL at any moment; the same work done again fills what is missing and repeats nothing."""
    wait_s, num_kills = 0.3, 0
    while True:
        process = writer(tmp_path, "math", 300)
        try:
            assert process.wait(wait_s) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills, wait_s = num_kills + 1, wait_s * 1.3
            continue
        break
    assert num_kills > 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(300))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_file_that_cannot_grow_is_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    """The work goes on, the lines wait, and they are written when there is room again."""
    told: list[str] = []
    file = MetricsFile(tmp_path, warn=told.append)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.log(AXIS, 0, {"svf/math/loss": 0.5})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        for step in range(1, 5):
            file.log(AXIS, step, {"svf/math/loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps(tmp_path) == [0]
    assert len(told) == 1
    assert "metrics.jsonl" in told[0]
    assert "the work continues" in told[0]
    assert file.num_waiting == 4
    file.log(AXIS, 5, {"svf/math/loss": 0.5})
    assert (steps(tmp_path), file.num_waiting) == ([0, 1, 2, 3, 4, 5], 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in folders")
def test_something_else_of_that_name_is_one_line(tmp_path: Path) -> None:
    """A folder in its place: said once, and the work goes on."""
    (tmp_path / "metrics.jsonl").mkdir()
    told: list[str] = []
    file = MetricsFile(tmp_path, warn=told.append)
    file.log(AXIS, 1, {"svf/math/loss": 0.5})
    assert len(told) == 1
    assert "not a regular file" in told[0]
