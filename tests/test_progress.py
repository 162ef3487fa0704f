"""Long work says where it is, on a terminal and in a log, and is silent when asked."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from havoc_core.progress import SILENT, BarProgress, LineProgress, Progress, make_progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def lines_of(work: Callable[[Progress, Clock], None]) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    work(LineProgress(stream, clock=clock), clock)
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_about_every_tenth() -> None:
    """Start, one line per 10 % with what is left, end; not one per step."""

    def work(progress: Progress, clock: Clock) -> None:
        with progress.stage("train math", 100, unit="steps") as stage:
            for _ in range(100):
                clock.now_s += 1
                stage.advance(note="reward 0.5")

    lines = lines_of(work)
    assert lines[0] == "train math: 0 of 100 steps"
    assert lines[3] == "train math: 30 of 100 steps (30%), 30.0 s, about 1 min 10 s left, reward 0.5"
    assert lines[-1] == "train math: done, 100 steps in 1 min 40 s, reward 0.5"
    assert len(lines) == 11


def test_fast_work_is_two_lines() -> None:
    """Many steps within a second do not flood a log."""

    def work(progress: Progress, clock: Clock) -> None:
        with progress.stage("hash", 5_000_000, unit="bytes") as stage:
            for _ in range(50):
                clock.now_s += 0.01
                stage.advance(100_000)

    assert lines_of(work) == ["hash: 0 of 5.0 MB", "hash: done, 5.0 MB in 0.5 s"]


def test_slow_work_is_heard_of_every_ten_seconds() -> None:
    """A stage whose steps are far below 10 %, or whose total is unknown, still shows that it lives."""

    def work(progress: Progress, clock: Clock) -> None:
        for total in (1000, None):
            with progress.stage("slow", total) as stage:
                for _ in range(4):
                    clock.now_s += 5
                    stage.advance()

    assert lines_of(work) == [
        "slow: 0 of 1000",
        "slow: 2 of 1000 (0%), 10.0 s, about 1 h 23 min left",
        "slow: 4 of 1000 (0%), 20.0 s, about 1 h 23 min left",
        "slow: done, 4 in 20.0 s",
        "slow: started",
        "slow: 2, 10.0 s",
        "slow: 4, 20.0 s",
        "slow: done, 4 in 20.0 s",
    ]


def test_an_interrupted_stage_says_where() -> None:
    """Ctrl-C is not reported as done."""

    def work(progress: Progress, _clock: Clock) -> None:
        with pytest.raises(KeyboardInterrupt), progress.stage("export", 3) as stage:
            stage.advance()
            raise KeyboardInterrupt

    assert lines_of(work)[-1] == "export: stopped at 1 in 0.0 s"


def test_more_than_the_total_is_no_failure() -> None:
    """A wrong estimate of the total costs a strange line, never the work."""

    def work(progress: Progress, clock: Clock) -> None:
        with progress.stage("rows", 2) as stage:
            for _ in range(5):
                clock.now_s += 20
                stage.advance()

    assert lines_of(work)[-1].startswith("rows: done, 5")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is what a full disk looks like")
def test_a_stream_that_takes_nothing_stops_no_work() -> None:
    """Whether anybody can see how far it is decides nothing, not even where the log's disk is full."""
    num_done = 0
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it fails too
    with make_progress(full).stage("fold", 3) as stage:
        for _ in range(3):
            stage.advance(note="w")
            num_done += 1
    with contextlib.suppress(OSError):
        full.close()
    assert num_done == 3


def test_silent_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """The default argument of every long function prints nothing, and neither does --quiet."""
    for progress in (SILENT, make_progress(quiet=True)):
        with progress.stage("outer", 2) as stage, progress.stage("inner", None) as inner:
            stage.advance()
            inner.advance(5, note="x")
    assert capfd.readouterr() == ("", "")


def test_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """CI logs hold text, no cursor movements; stdout stays free for results."""
    with make_progress().stage("work", 1) as stage:
        stage.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("work: 0 of 1\nwork: done, 1 in 0.")


@pytest.mark.parametrize("terminal", ["dumb", ""])
def test_a_terminal_that_cannot_move_gets_lines(terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor's shell or a serial line is not filled with escape codes."""
    monkeypatch.setenv("TERM", terminal)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert isinstance(make_progress(stream), LineProgress)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(stream), BarProgress)


def on_terminal(script: str) -> tuple[str, str]:
    """What the script shows on a real terminal (its stderr), and what it writes to a piped stdout."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    out, _ = child.communicate(timeout=60)
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()), out


def test_a_terminal_gets_bars_with_what_is_left() -> None:
    """Outer bars stay, inner ones vanish, notes are shown as they are, and stdout is not swallowed."""
    shown, out = on_terminal("""
        import time
        from havoc_core.progress import make_progress
        progress = make_progress()
        for name in ("first", "second"):
            with progress.stage(name, 2, unit="steps") as stage:
                for _ in range(2):
                    with progress.stage("inner", 2_000_000, unit="bytes") as inner:
                        inner.advance(2_000_000)
                        time.sleep(0.3)
                    stage.advance(note="[loss] 0.5")
                print("result of", name)
    """)
    last = shown.splitlines()[-1]
    assert "second" in last
    assert "2/2 steps" in last
    assert "0:00:00 left" in last
    assert "[loss] 0.5" in last
    assert "  inner" in shown
    assert "2.0 MB/2.0 MB" in shown
    assert out == "result of first\nresult of second\n"


def test_a_stopped_bar_gives_the_cursor_back() -> None:
    """After Ctrl-C the terminal is usable and the bar says that it stopped."""
    shown, out = on_terminal("""
        from havoc_core.progress import make_progress
        try:
            with make_progress().stage("work", 2) as stage:
                stage.advance()
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print("caught")
    """)
    assert "1/2" in shown
    assert "stopped" in shown
    assert out == "caught\n"


def test_figures_stand_beneath_the_bars_of_a_terminal() -> None:
    """Name and value a row, with what is left by the work's own count; they stay when the stage has ended."""
    shown, _ = on_terminal("""
        import time
        from havoc_core.progress import make_progress
        with make_progress().stage("search", 4) as stage:
            stage.advance(note="candidates")
            stage.tell({"generation": "1 of 4", "[front]": "3"}, left_s=4000)
            time.sleep(0.3)
            stage.advance()
    """)
    assert "1 h 06 min" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["generation", "1", "of", "4"] in rows
    assert rows[-1] == ["[front]", "3"]


def test_figures_are_part_of_a_line_of_a_log() -> None:
    """In the next line that is due, and in the last one."""

    def work(progress: Progress, clock: Clock) -> None:
        with progress.stage("search", 4) as stage:
            for number in range(4):
                clock.now_s += 20
                stage.tell({"front": f"{number}"}, left_s=7200)
                stage.advance(note="candidates")

    lines = lines_of(work)
    assert lines[1] == "search: 1 of 4 (25%), 20.0 s, about 2 h 00 min left, candidates, front 0"
    assert lines[-1] == "search: done, 4 in 1 min 20 s, candidates, front 3"
