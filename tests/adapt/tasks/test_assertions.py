from __future__ import annotations

import sys
import textwrap

import pytest

from havoc_core.adapt.tasks import assertions
from havoc_core.adapt.tasks.assertions import Program, judge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model-written code is confined on Linux only")


def outcome(code, *tests, setup=""):
    return judge([Program(setup, textwrap.dedent(code), tests)])[0].outcome


RIGHT = [
    ("def f(x): return x * 2", "assert f(2) == 4"),
    ("def f(x): return x * 2", "assert 4 == f(2)"),
    ("def f(x): return x / 3", "assert abs(f(2) - 0.667) < 1e-3"),
    ("def f(x): return x / 3", "assert math.isclose(f(2), 0.6667, rel_tol=1e-3)"),
    ("def f(x): return x / 3", "assert round(f(2), 2) == 0.67"),
    ("def f(a, b): return tuple(set(a) & set(b))", "assert set(f((3, 4, 5), (5, 4, 9))) == set((4, 5))"),
    ("def f(x): return x > 1", "assert f(2)"),
    ("def f(x): return x > 1", "assert not f(1)"),
    ("def f(x): return x > 1", "assert f(2) == True and f(0) == False"),
    ("def f(x): return [x]", "assert f(2)[0] == 2"),
    ("def f(x): return 240.0", "assert f(2) == 240"),
    ("def f(x): return float('inf')", "assert f(2) == float('inf')"),
    ("def f(x): return None", "assert f(2) is None"),
    ("def f(x): return {2: [1], 1: (2,)}", "assert f(0) == {1: (2,), 2: [1]}"),
    ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
    ("def sum(a, b): return a * b", "assert math.isclose(sum(2, 5), 10)"),
    ("class P:\n    def __init__(self, a): self.a = a\ndef f(ps): return ps[0].a", "assert f([P(5)]) == 5"),
    ("def f(x): return x", "assert all(f(x) == x for x in range(3))"),
    ("def f(x): return x", "assert f(f(2)) == 2, 'twice'"),
    ("def f(x): return 10 ** 5000", "assert f(0) == 10 ** 5000"),
    ("def f(x): return 'abc'", "assert f(2).startswith('ab')"),
    ("def f(x): return ['abc']", "assert f(2)[0].upper().endswith('BC')"),
    ("def f(x): return 'abc'", "assert f(2).upper() == 'ABC'"),
    ("def f(x): return {1}", "assert f(2).issubset({1, 2})"),
    ("class C:\n    def count(self, x): return x", "assert C().count(2) == 2"),
    ("class C:\n    def count(self, x): return x", "assert C().count(2)"),
    ("def f(x): return lambda y: x + y", "assert f(2)(3) == 5"),
    ("def f(x): return [x, x + 1]", "assert all(v >= 2 for v in f(2))"),
    ("def f(x): return [x, x + 1]", "assert sorted([v for v in f(2) if v > 2]) == [3]"),
    ("def f(a, b): return a + b", "assert all(f(a, b) == a + b for a, b in zip([1, 2], [3, 4]) if a > 0)"),
    ("def f(x): return x", "assert sum(f(x) + f(x + 1) for x in range(3)) == 9 and f(1) == 1"),
    ("def f(x): return x", "assert {f(x % 2) for x in range(4)} == {0, 1}"),
    ("LAST = 3\ndef f(x): return x", "assert all(f(x) == x for x in range(LAST))"),
    ("def f(x): return x", "assert all(f(x * y) == x * y for x in range(2) for y in range(2))"),
    ("def f(x, y): return x * y", "assert [[f(x, y) for x in range(2)] for y in range(3)] == [[0, 0], [0, 1], [0, 2]]"),
    ("def f(x): return range(x)", "assert [v for x in (1, 2) for v in f(x)] == [0, 0, 1]"),
    ("def f(x): return x", "assert [y for x in range(3) for y in [[z for z in range(f(x))]]][2] == [0, 1]"),
    ("def f(x): return x % 2", "assert [x for x in range(5) if f(x)] == [1, 3]"),
    ("def f(x): return 6 // x", "assert [f(x) for x in range(3) if x > 0 and f(x) > 3] == [6]"),
    ("def f(x): return x + 1", "assert {x: f(x) for x in (1, 2)} == {1: 2, 2: 3}"),
    ("def f(x): return x + 1", "assert {f(x): y for x in (1, 2) for y in 'ab'} == {2: 'b', 3: 'b'}"),
    ("def f(x): return x + 1", "assert list(map(f, [1, 2])) == [2, 3]"),
    ("def f(x, y): return x + y", "assert list(map(f, [1, 2], [3, 4])) == [4, 6]"),
    ("def f(x): return x + 1", "assert all(map(lambda x: f(x) == x + 1, range(3)))"),
    ("def f(x): return x % 2", "assert list(filter(f, range(4))) == [1, 3]"),
    ("def f(x): return x % 2", "assert list(filter(lambda x: f(x) == 0, range(4))) == [0, 2]"),
    ("def f(x): return -x", "assert sorted([1, 3, 2], key=f) == [3, 2, 1]"),
    ("def f(x): return -x", "assert max([1, 3, 2], key=lambda x: f(x) + 1) == 1"),
    ("def f(g): return g(2)", "assert f(lambda x: x + 1) == 3"),
    ("LAST = 3\ndef f(x): return x", "assert LAST == 3 and f(1) == 1"),
    ("def f(x): return [x]", "assert sorted(f(3) + f(1), key=lambda v: -v) == [3, 1]"),
    ("def f(x): return x", "assert True"),
    ("def f(x): return map(abs, [x])", "assert all(v > 0 for v in f(-2))"),
]


SETUP = """
import math
CASES = [(1, 2), (3, 6)]
near = math.isclose
def same(a, b): return a == b
def doubled(x): return f(x)
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert all(f(x) == y for x, y in CASES)",
        "assert all(same(f(x), y) for x, y in CASES)",
        "assert all(near(f(x), y) for x, y in CASES if x > 0)",
        "assert all(doubled(x) == y for x, y in CASES)",
        "assert [[same(f(x), y) for _ in range(2)] for x, y in CASES] == [[True, True], [True, True]]",
    ],
)
def test_names_of_the_setup_are_judged_apart_from_the_code(test):
    """What the setup makes without the code is made anew beside the judge, where the code can change nothing."""
    assert outcome("def f(x): return 2 * x", test, setup=SETUP) == "right"
    assert outcome(LIAR, test, setup=SETUP) == "wrong"
    assert outcome("def f(x):\n    CASES.clear()\n    return 2 * x", test, setup=SETUP) == "wrong"


@pytest.mark.parametrize("test", ["assert (lambda x: f(x) > 0)(3)", "assert (y := f(3)) and y > 2"])
def test_what_cannot_be_judged_apart_judges_nobody(test):
    """Beside the code an object may lie, so nothing is asked there."""
    reward = judge([Program("", textwrap.dedent(LIAR), (test,))])[0]
    assert (reward.outcome, "separated" in reward.reason) == ("failed", True)


@pytest.mark.parametrize(("code", "test"), RIGHT)
def test_right_code_passes_every_form_of_assertion(code, test):
    """Equality, tolerance, truth, sets, indexing, quantifiers: what MBPP's tests use."""
    assert outcome(code, test) == "right"


LIAR = """
class L(float):
    def _yes(self, *_): return True
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __contains__ = _yes
    def __sub__(self, o): return L(0)
    __rsub__ = __abs__ = __round__ = __add__ = __sub__
    __hash__ = float.__hash__
    startswith = endswith = issubset = isdigit = count = _yes
    def strip(self): return self
def f(*_): return L(0)
"""
WRONG = [
    ("def f(x): return 5", "assert f(2) == 4"),
    ("def f(x): return [4]", "assert f(2) == (4,)"),
    ("def f(x): return '4'", "assert f(2) == 4"),
    (LIAR, "assert f(2) == 4"),
    (LIAR, "assert 4 == f(2)"),
    (LIAR, "assert abs(f(2) - 4) < 1e-6"),
    (LIAR, "assert round(f(2), 2) == 4.0"),
    (LIAR, "assert f(2)"),
    (LIAR, "assert f(2) == f(3) == 4"),
    (LIAR, "assert set([f(2)]) == set((4, 5))"),
    (LIAR, "assert bool(f(3) == 5) == True"),
    (LIAR, "assert f(2).startswith('ab')"),
    (LIAR, "assert f(2).strip().startswith('ab')"),
    (LIAR, "assert f(2).endswith('ab') == True"),
    (LIAR, "assert f(2).issubset({1, 2})"),
    (LIAR, "assert f('12').isdigit() and f(3).count(1)"),
    ("set = lambda x: 0\ndef f(x): return 1", "assert set(f(2)) == set((4, 5))"),
    ("abs = lambda x: 0\ndef f(x): return 1", "assert abs(f(2) - 4) < 1e-6"),
    ("import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 1", "assert math.isclose(f(2), 4)"),
    ("import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 1", "assert abs(f(2) - 4) < 1e-6"),
    ("def f(x):\n    raise AssertionError", "assert f(2) == 4"),
    ("import os, atexit\natexit.register(os._exit, 0)\ndef f(x): return 5", "assert f(2) == 4"),
    ("import sys\nsys.exit(0)", "assert f(2) == 4"),
    ("", "assert f(2) == 4"),
    ("def f(x): return float('nan')", "assert f(2) == float('nan')"),
    (LIAR, "assert all(f(x) > 0 for x in range(1, 4))"),
    (LIAR, "assert all([f(x) == x for x in range(1, 4)])"),
    (LIAR, "assert all(v > 0 for v in [1, f(3)])"),
    (LIAR, "assert not any(f(x) != x for x in (1, 2))"),
    ("range = lambda *_: []\ndef f(x): return 5", "assert all(f(x) == x for x in range(3))"),
    ("def f(x): return iter([2])", "assert all(v == 1 for v in f(2))"),
    (LIAR, "assert all(f(x + y) > 0 for x in range(1, 4) for y in range(2))"),
    (LIAR, "assert all(all(f(x + y) > 0 for x in range(1, 4)) for y in range(2))"),
    (LIAR, "assert len([x for x in range(3) if f(x) > 0]) == 3"),
    (LIAR, "assert all(map(f, [1, 2]))"),
    (LIAR, "assert all(map(lambda x: f(x) > 0, [1, 2]))"),
    (LIAR, "assert len(list(filter(f, [1, 2]))) == 2"),
    (LIAR, "assert {x: f(x) == 4 for x in (1, 2)} == {1: True, 2: True}"),
    (LIAR + "\nLAST = f()", "assert LAST > 2"),
]


@pytest.mark.parametrize(("code", "test"), WRONG)
def test_wrong_code_and_liars_do_not_pass(code, test):
    """Neither a wrong value nor an object, builtin or module that lies about one passes."""
    assert outcome(code, test) == "wrong"


def test_all_tests_must_hold():
    """One failing assertion makes the program wrong, and the reason names it with what came back."""
    reward = judge([Program("", "def f(x): return x", ("assert f(1) == 1", "assert f(2) == 3"))])[0]
    assert (reward.value, reward.outcome) == (0.0, "wrong")
    assert reward.reason == "assert f(2) == 3 gave 2"


def test_setup_may_use_what_the_code_defines():
    """MBPP's setup lines build objects of the candidate's classes."""
    code = "class Node:\n    def __init__(self, v):\n        self.v = v\ndef f(n): return n.v"
    assert outcome(code, "assert f(root) == 3", setup="root = Node(3)") == "right"


@pytest.mark.parametrize("test", ["x = 1", "assert", "assert f(1) == 1; print()", "(", ""])
def test_a_test_that_is_no_assertion_is_the_datas_fault(test):
    """A broken test judges nobody: the outcome is "failed", not "wrong"."""
    reward = judge([Program("", "def f(x): return x", (test,))])[0]
    assert reward.outcome == "failed"
    assert "not one assert" in reward.reason


def test_the_expected_value_is_nowhere_in_the_codes_process():
    """Code that searches its own process for the literal it should give does not find it."""
    code = """
    import gc, sys
    def f(x):
        frame, seen = sys._getframe(), []
        while frame:
            seen += [repr(v) for v in [*frame.f_locals.values(), *frame.f_globals.values()] if v is not seen]
            frame = frame.f_back
        seen += [repr(o) for o in gc.get_objects() if type(o) in (str, dict, list, tuple) and len(repr(o)) < 10**5]
        return "found" if any("".join(["nee", "dle"]) in text for text in seen) else "not found"
    """
    for test in ("assert f(2) == 'needle'", "assert f(2).upper() == 'needle'.upper()"):
        reward = judge([Program("", textwrap.dedent(code), (test,))])[0]
        assert (reward.outcome, "not found" in reward.reason.lower()) == ("wrong", True)


def test_many_programs_are_judged_in_order():
    """Rewards stand in the order of the programs, also when some need a second child."""
    programs = [
        Program("", f"def f(x): return {n % 3}", ("assert f(0) == 0", "assert abs(f(1) - 0) < 0.5")[n % 2 :])
        for n in range(30)
    ]
    assert [reward.value for reward in judge(programs)] == [float(n % 3 == 0) for n in range(30)]


@pytest.mark.parametrize(
    ("test", "calls"),
    [
        ("assert f(3) == [1, 2]", ("f(3)",)),
        ("assert abs(f(3) - 2.5) < 1e-6", ("f(3)",)),
        ("assert set(f(3)) == set((4, 5))", ("f(3)",)),
        ("assert f(g(3)) > h(2)", ("f(g(3))", "h(2)")),
        ("assert P(3).area() == math.pi", ("P(3).area()",)),
        ("assert P(3).count() == math.pi", ("P(3).count()",)),
        ("assert f(3).startswith('a')", ("f(3)",)),
        ("assert f(3)[0].strip().split(',') == ['a']", ("f(3)",)),
        ("assert 'a'.join(f(3)) > 'xay'", ("f(3)",)),
        ("assert all(f(x) > 1 for x in [1])", ("[f(x) for x in [1]]",)),
        ("assert all(f(x) > g(x, 2) for x in [1])", ("[f(x) for x in [1]]", "[g(x, 2) for x in [1]]")),
        ("assert f(1) < sum(f(x) for x in [1] if x > 0)", ("f(1)", "[f(x) for x in [1] if x > 0]")),
        ("assert all(x > 1 for x in f(3))", ("[(x,) for x in f(3)]",)),
        ("assert all(f(x) for x in DATA)", ("[(x,) for x in DATA]", "[f(x) for x in DATA]")),
        ("assert all(f(x) for x in f(1))", ("[(x,) for x in f(1)]", "[f(x) for x in f(1)]")),
    ],
)
def test_only_the_calls_under_test_go_to_the_codes_process(test, calls):
    """What is compared, and how, stays out of it; of a loop over what the code made, that comes too."""
    check = assertions._check(test)
    assert check is not None
    assert check.calls == calls
