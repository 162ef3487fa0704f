"""`make gate`: a proven miss is red, a busy machine is said and is not, and it ends in time."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from havoc_core.bench.judge.targets import load_target

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
nano = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "perf" / "gate_nano.py")))


class Attempts:
    """Exit codes one after another, the last for ever, each after `took_s` seconds."""

    def __init__(self, *codes: int, took_s: float = 30.0) -> None:
        self.codes, self.took_s, self.time_s, self.given_s = list(codes), took_s, 1000.0, []

    def __call__(self, left_s: float) -> tuple[int, str]:
        self.given_s.append(left_s)
        self.time_s += self.took_s
        return (self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]), "so it is"

    def now(self) -> float:
        return self.time_s


@pytest.mark.parametrize(("codes", "last", "num"), [((0,), 0, 1), ((4, 3, 0), 0, 3), ((1,), 1, 1), ((3, 1, 0), 1, 2)])
def test_it_measures_until_there_is_a_verdict(codes: tuple[int, ...], last: int, num: int) -> None:
    """Invalid and inconclusive records are measured again; a pass or a miss ends it."""
    attempts = Attempts(*codes)
    assert nano.until_decided(attempts, now=attempts.now) == last
    assert len(attempts.given_s) == num


@pytest.mark.parametrize("code", [3, 4])
@pytest.mark.parametrize("took_s", [5.0, 30.0, 150.0])
def test_on_a_busy_machine_it_ends_in_time(code: int, took_s: float) -> None:
    """No attempt is begun that would end after the deadline, and each is told what is left of it."""
    attempts = Attempts(code, took_s=took_s)
    assert nano.until_decided(attempts, now=attempts.now) == code
    assert nano.DEADLINE_S - took_s < attempts.time_s - 1000.0 <= nano.DEADLINE_S < 240
    assert attempts.given_s == [nano.DEADLINE_S - place * took_s for place in range(len(attempts.given_s))]


@pytest.mark.parametrize("code", [2, 5])
def test_what_is_no_verdict_is_red(code: int) -> None:
    """A record that the gate refuses is a defect, however busy the machine is."""
    with pytest.raises(nano.BrokenError, match=f"gate ended with {code}"):
        nano.until_decided(Attempts(code))


@pytest.mark.parametrize(
    ("code", "status", "word"), [(0, 0, "PASSED"), (1, 1, "FAILED"), (3, 0, "NOT JUDGED"), (4, 0, "NOT JUDGED")]
)
def test_the_last_line_says_what_came_of_it(
    code: int, status: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Passed, failed, or not judged for want of a quieter machine; only failed is red."""
    monkeypatch.setitem(nano.main.__globals__, "gate_in", lambda folder: code)
    assert nano.main() == status
    assert capsys.readouterr().out.startswith(word)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A folder with a record and an artifact, and a `havoc` whose gate answers as the fixture's codes say."""
    codes = {"none.json": 2, "gtx1660": 5, "edited.json": 5, "other": 5, "impossible.toml": 1, "ci": 0}

    def havoc(*words: object, **_: object) -> tuple[int, dict[str, object], str]:
        names = [Path(str(word)).name for word in words]
        return next((code for name, code in codes.items() if name in names), 0), {}, "said"

    (tmp_path / "record").mkdir()
    (tmp_path / "artifact").mkdir()
    (tmp_path / "record" / "record.json").write_text('{"samples": [{"load_ns": 5}]}')
    monkeypatch.setitem(nano.require_ladder.__globals__, "havoc", havoc)
    return codes


@pytest.mark.parametrize("name", ["none.json", "gtx1660", "edited.json", "other", "impossible.toml"])
def test_a_wrong_exit_code_is_red_on_any_machine(name: str, measured: dict[str, int], tmp_path: Path) -> None:
    """Every rung of the ladder is asked for: a gate that says 0 to any of them is found."""
    nano.require_ladder(tmp_path)
    measured[name] = 0
    (tmp_path / "other" / "generation_config.json").unlink()
    (tmp_path / "other").rmdir()
    with pytest.raises(nano.BrokenError, match="ended with 0, not "):
        nano.require_ladder(tmp_path)


def test_the_target_leaves_room_and_is_whole() -> None:
    """Every limit of `host` but accuracy, on this machine's CPU, tighter where nano is small."""
    host, ci = load_target("host"), load_target("ci")
    assert ci.device == host.device
    values = {limit.metric: limit.value for limit in ci.limits}
    assert values.keys() == {limit.metric for limit in host.limits if not limit.metric.startswith("accuracy/")}
    assert values["peak_rss_bytes"] < 2e9
    assert f"{values['prefill_ms']:.0f} ms" in (ROOT / "docs" / "ci.md").read_text()


def test_what_a_change_must_pass_measures_too() -> None:
    """`.ci/run` gates nano, compares with the commit before where that is here, and runs the tests last."""
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index('goals="genai lint types gate"') < script.index('goals="$goals compare"')
    assert script.index('goals="$goals compare"') < script.index('goals="$goals test"')
    makefile = (ROOT / "Makefile").read_text()
    for goal, name in (
        ("gate", "gate_nano.py"),
        ("compare", "compare_commits.py"),
        ("compare-test", "compares_beside"),
        ("duel-test", "duels_beside"),
    ):
        assert name in makefile.split(f"\n{goal}: .venv/dev\n")[1].split("\n\n")[0]
