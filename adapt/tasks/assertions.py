"""Judge code by `assert` statements without letting the code take part in the comparison.

An assertion is cut in two. The calls to the code under test run in its confined child and come back as plain values;
what is done with those values runs elsewhere:

    assert f(3) == [1, 2]                      child: f(3)      parent: value == [1, 2]
    assert abs(f(3) - 2.5) < 1e-6              child: f(3)      a second, clean child: abs(_values[0] - 2.5) < 1e-6
    assert set(f(3)) == set((4, 5))            child: f(3)      a second, clean child: set(_values[0]) == set((4, 5))
    assert f(3).startswith("a")                child: f(3)      a second, clean child: _values[0].startswith("a")
    assert Shape(3).count() == 2               child: the whole call, for the class is under test
    assert all(f(x) > 0 for x in range(3))     child: [f(x) for x in range(3)]      a second, clean child: all(_0 > 0
                                               for (x), _0 in zip([x for x in range(3)], _values[0], strict=True))
    assert all(x > 0 for x in f(3))            child: f(3)      a second, clean child: all(x > 0 for x in _values[0])

What is nested deeper, and a lambda, still runs whole in the child.

Equality is Python's own between plain built-ins, as MBPP means it: 240.0 equals 240, a list never equals a tuple.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..sandbox import process as sandbox
from ..sandbox.plain import Opaque, source
from .reward import RIGHT, Reward, wrong

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PLAIN_TYPES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range)
_METHODS_OF_VALUES = frozenset(name for kind in _PLAIN_TYPES for name in dir(kind) if not name.startswith("_"))
"""What a test asks of a value that came back (`startswith`, `issubset`), so never asked where an object could lie."""
_LOOPS = (ast.ListComp, ast.SetComp, ast.GeneratorExp)
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr)


@dataclass(frozen=True, slots=True)
class Program:
    """Code under test, the code that prepares the tests (run after it), and the tests, one `assert` each.

    `patience` times the usual second of CPU time is allowed.
    """

    setup: str
    code: str
    tests: tuple[str, ...]
    patience: int = 1


@dataclass(frozen=True, slots=True)
class _Check:
    """One assertion: expressions for the code's child, then a literal to equal or an expression over `_values`."""

    calls: tuple[str, ...]
    expected: object = None
    rest: str | None = None
    modules: tuple[str, ...] = ()


def judge(programs: Sequence[Program]) -> list[Reward]:
    """Run every program against its tests: right when all hold, "failed" when the sandbox or a test is broken."""
    jobs = [sandbox.Job(program.setup, program.code, _calls(program), program.patience) for program in programs]
    outcomes = sandbox.run_functions(jobs)
    rest_jobs = [
        job for program, outcome in zip(programs, outcomes, strict=True) for job in _rest_jobs(program, outcome)
    ]
    rests = dict(zip(rest_jobs, sandbox.run_functions(rest_jobs), strict=True))
    return [_verdict(program, outcome, rests) for program, outcome in zip(programs, outcomes, strict=True)]


def _calls(program: Program) -> tuple[str, ...]:
    return tuple(call for test in program.tests if (check := _check(test)) for call in check.calls)


def _results(program: Program, outcome: sandbox.Outcome) -> Iterator[tuple[str, _Check, tuple[Any, ...]]]:
    """Each test that is an assertion, with the values of its calls."""
    values = iter(outcome.values)
    for test in program.tests:
        if (check := _check(test)) is not None:
            yield test, check, tuple(itertools.islice(values, len(check.calls)))


def _rest_jobs(program: Program, outcome: sandbox.Outcome) -> list[sandbox.Job]:
    if outcome.status != "ok":
        return []
    jobs = [_rest_job(check, values) for _, check, values in _results(program, outcome) if check.rest is not None]
    return [job for job in jobs if job is not None]


def _verdict(program: Program, outcome: sandbox.Outcome, rests: dict[sandbox.Job, sandbox.Outcome]) -> Reward:
    for test in program.tests:
        if _check(test) is None:
            return Reward(0.0, "failed", f"the test is not one assert statement: {test}")
    if outcome.status == "infra":
        return Reward(0.0, "failed", outcome.reason)
    if outcome.status != "ok":
        return wrong(f"{outcome.status}: {outcome.reason}")
    for test, check, values in _results(program, outcome):
        rest = _rest_of(check, values, rests)
        if rest.status == "infra":
            return Reward(0.0, "failed", rest.reason)
        if rest.values != (True,):
            return wrong(f"{test} gave {', '.join(map(source, values))[:200]}")
    return RIGHT


def _rest_of(check: _Check, values: tuple[Any, ...], rests: dict[sandbox.Job, sandbox.Outcome]) -> sandbox.Outcome:
    """Finish one assertion: compare here, or look up what the clean child said."""
    if check.rest is None:
        return sandbox.Outcome("ok", (values[0] == check.expected,))
    job = _rest_job(check, values)
    return rests[job] if job else sandbox.Outcome("error")


def _rest_job(check: _Check, values: tuple[Any, ...]) -> sandbox.Job | None:
    """The job that finishes an assertion over plain values in a clean child; None when a value is not plain."""
    if any(_holds_opaque(value) for value in values):
        return None
    imports = "\n".join(f"import {name}" for name in check.modules)
    code = f"{imports}\nfrom math import inf, nan\n_values = {source(values)}"
    return sandbox.Job("", code, (f"bool({check.rest})",))


def _holds_opaque(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_opaque(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_opaque(part) for part in value)
    return isinstance(value, Opaque)


@functools.lru_cache(maxsize=65_536)
def _check(test: str) -> _Check | None:
    """Cut one assertion in two; None when the text is not one assertion."""
    try:
        statements = ast.parse(test.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        return None
    claim = statements[0].test
    match claim:
        case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[right]) if not (
            _compares(call) or _asks_a_value(call)
        ):
            with contextlib.suppress(ValueError, TypeError):  # the right side is no literal
                return _Check((ast.unparse(call),), expected=ast.literal_eval(right))
    return _cut(claim)


def _cut(claim: ast.expr) -> _Check:
    whole = ast.unparse(claim)
    modules = tuple(sorted({node.value.id for node in ast.walk(claim) if _is_in_module(node)}))  # type: ignore[attr-defined]
    for may_be_builtin in (False, True):
        cutter = _Cutter(may_be_builtin=may_be_builtin)
        rest = cutter.visit(ast.parse(whole, mode="eval"))
        if cutter.is_stuck:
            break
        if cutter.calls:
            return _Check(tuple(cutter.calls), rest=ast.unparse(rest), modules=modules)
    return _Check((f"bool({whole})",), expected=True)


class _Cutter(ast.NodeTransformer):
    """Replaces the outermost calls to the code under test by `_values[i]`."""

    def __init__(self, *, may_be_builtin: bool) -> None:
        self.calls: list[str] = []
        self.is_stuck = False
        self._may_be_builtin = may_be_builtin

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _SCOPES) and self._has_calls(node):
            rest = self._cut_loop(node) if isinstance(node, _LOOPS) else None
            self.is_stuck |= rest is None
            return rest or node
        if self._is_under_test(node):
            self.calls.append(ast.unparse(node))
            return ast.parse(f"_values[{len(self.calls) - 1}]", mode="eval").body
        return super().visit(node)  # type: ignore[no-any-return]

    def _has_calls(self, node: ast.AST) -> bool:
        return any(self._is_under_test(part) for part in ast.walk(node))

    def _cut_loop(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> ast.AST | None:
        """The loop over values that came back, or over values beside them; None where neither can be."""
        (loop, *others) = node.generators
        if others or loop.is_async or any(map(self._has_calls, loop.ifs)):
            return None
        if self._has_calls(loop.iter):
            if self._has_calls(node.elt):
                return None
            loop.iter = self.visit(loop.iter)  # type: ignore[assignment]  # an expression stays one
            return node
        target, every = ast.unparse(loop.target), ast.unparse(loop)
        if not _is_plain(f"[{target}{every}]"):
            return None
        cutter = _Cutter(may_be_builtin=self._may_be_builtin)
        element = cutter.visit(node.elt)
        if cutter.is_stuck:
            return None
        names = [f"_{len(self.calls) + place}" for place in range(len(cutter.calls))]
        values = [f"_values[{len(self.calls) + place}]" for place in range(len(cutter.calls))]
        self.calls += [f"[{call}{every}]" for call in cutter.calls]
        node.elt = _Renamed(names).visit(element)
        heads, sources = ", ".join([f"({target})", *names]), ", ".join([f"[{target}{every}]", *values])
        node.generators = ast.parse(f"[0 for {heads} in zip({sources}, strict=True)]", mode="eval").body.generators  # type: ignore[attr-defined]
        return node

    def _is_under_test(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or _asks_a_value(node):
            return False
        root: ast.AST = node
        while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
            if _is_in_module(root):
                return False
            root = root.func if isinstance(root, ast.Call) else root.value
        return isinstance(root, ast.Name) and (self._may_be_builtin or not hasattr(builtins, root.id))


class _Renamed(ast.NodeTransformer):
    """Replaces `_values[i]` by the i-th name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(value=ast.Name(id="_values"), slice=ast.Constant(value=int() as place)):
                return ast.Name(id=self._names[place], ctx=ast.Load())
        return self.generic_visit(node)


def _is_plain(loop: str) -> bool:
    """Whether a loop needs no name but built-in ones and its own, so that it runs anywhere."""
    names = [node for node in ast.walk(ast.parse(loop)) if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return all(node.id in own or hasattr(builtins, node.id) for node in names)


def _is_in_module(node: ast.AST) -> bool:
    """Whether the node is a name looked up in a module of the standard library, such as `math.isclose`."""
    match node:
        case ast.Attribute(value=ast.Name(id=name)):
            return name in sys.stdlib_module_names
    return False


def _asks_a_value(node: ast.AST) -> bool:
    """Whether the call is a method that plain values have, of something that a function under test gave.

    Tests call functions in lower case and classes in capitals (PEP 8): methods of a class are under test themselves.
    """
    asks, part = False, node
    while isinstance(part, (ast.Call, ast.Attribute, ast.Subscript)):
        match part:
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                asks |= name in _METHODS_OF_VALUES and isinstance(value, (ast.Call, ast.Subscript))
            case ast.Call(func=ast.Name(id=name)):
                return asks and not name[:1].isupper()
        part = part.func if isinstance(part, ast.Call) else part.value
    return False


def _compares(node: ast.AST) -> bool:
    return any(isinstance(part, (ast.Compare, ast.BoolOp)) for part in ast.walk(node))
