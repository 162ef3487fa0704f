"""Judge code by `assert` statements; the comparison runs apart from the code.

An assertion is cut in two. The calls to the code under test run in its confined child and return plain values; the rest
of the assertion runs elsewhere on those values:

    assert f(3) == [1, 2]                      child: f(3)      parent: value == [1, 2]
    assert abs(f(3) - 2.5) < 1e-6              child: f(3)      a second, clean child: abs(_values[0] - 2.5) < 1e-6
    assert set(f(3)) == set((4, 5))            child: f(3)      a second, clean child: set(_values[0]) == set((4, 5))
    assert f(3).startswith("a")                child: f(3)      a second, clean child: _values[0].startswith("a")
    assert Shape(3).count() == 2               child: the whole call, for the class is under test
    assert all(f(x) > 0 for x in range(3))     child: [f(x) for x in range(3)]      a second, clean child: all(_0 > 0
                                               for (x), _0 in zip([x for x in range(3)], _values[0], strict=True))
    assert all(f(x) == y for x, y in CASES)    child: [f(x) for x, y in CASES]; the clean child makes CASES again if
                                               the setup can make it without the code, else it gets the value
    assert all(x > 0 for x in f(3))            child: [x for x in f(3)]         the same, over that value
    assert all(map(f, (1, 2)))                 judged as all(f(x) for x in (1, 2)); `filter` and a lambda likewise

Loops may be nested. An assertion that cannot be cut (a lambda that calls the code, except in `map`, `filter` and a
`key`) is not used as a test: it would have to run beside the code, where an object may have a false `>`.

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
"""Methods that a test calls on a returned value (`startswith`, `issubset`); they run only in the clean child."""
_Loop = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SORTERS = frozenset({"sorted", "min", "max"})


@dataclass(frozen=True, slots=True)
class Program:
    """Code under test, the code that prepares the tests (run after it), and the tests, one `assert` each.

    The limit of CPU time is `patience` times the usual second.
    """

    setup: str
    code: str
    tests: tuple[str, ...]
    patience: int = 1


@dataclass(frozen=True, slots=True)
class _Check:
    """One assertion: expressions for the code's child, then a literal to equal or an expression over `_values`.

    `before` is run before that expression: imports, and lines of the setup. `is_cut` is False if it cannot be cut.
    """

    calls: tuple[str, ...]
    expected: object = None
    rest: str | None = None
    before: str = ""
    is_cut: bool = True


def judge(programs: Sequence[Program]) -> list[Reward]:
    """Run every program against its tests: right if all hold, "failed" if the sandbox or a test is broken."""
    jobs = [sandbox.Job(program.setup, program.code, _calls(program), program.patience) for program in programs]
    outcomes = sandbox.run_functions(jobs)
    rest_jobs = [
        job for program, outcome in zip(programs, outcomes, strict=True) for job in _rest_jobs(program, outcome)
    ]
    rests = dict(zip(rest_jobs, sandbox.run_functions(rest_jobs), strict=True))
    return [_verdict(program, outcome, rests) for program, outcome in zip(programs, outcomes, strict=True)]


def _calls(program: Program) -> tuple[str, ...]:
    return tuple(call for test in program.tests if (check := _check(test, program.setup)) for call in check.calls)


def _results(program: Program, outcome: sandbox.Outcome) -> Iterator[tuple[str, _Check, tuple[Any, ...]]]:
    """Each test that is an assertion, with the values of its calls."""
    values = iter(outcome.values)
    for test in program.tests:
        if (check := _check(test, program.setup)) is not None:
            yield test, check, tuple(itertools.islice(values, len(check.calls)))


def _rest_jobs(program: Program, outcome: sandbox.Outcome) -> list[sandbox.Job]:
    if outcome.status != "ok":
        return []
    jobs = [_rest_job(check, values) for _, check, values in _results(program, outcome) if check.rest is not None]
    return [job for job in jobs if job is not None]


def _verdict(program: Program, outcome: sandbox.Outcome, rests: dict[sandbox.Job, sandbox.Outcome]) -> Reward:
    for test in program.tests:
        check = _check(test, program.setup)
        if check is None:
            return Reward(0.0, "failed", f"the test is not one assert statement: {test}")
        if not check.is_cut:
            return Reward(0.0, "failed", f"the test cannot be separated from the code under test: {test}")
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
    """Finish one assertion: compare here, or look up the result of the clean child."""
    if check.rest is None:
        return sandbox.Outcome("ok", (values[0] == check.expected,))
    job = _rest_job(check, values)
    return rests[job] if job else sandbox.Outcome("error")


def _rest_job(check: _Check, values: tuple[Any, ...]) -> sandbox.Job | None:
    """The job that finishes an assertion over plain values in a clean child; None if a value is not plain."""
    if any(_holds_opaque(value) for value in values):
        return None
    code = f"{check.before}\nfrom math import inf, nan\n_values = {source(values)}"
    return sandbox.Job("", code, (f"bool({check.rest})",))


def _holds_opaque(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_opaque(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_opaque(part) for part in value)
    return isinstance(value, Opaque)


@functools.lru_cache(maxsize=65_536)
def _check(test: str, setup: str = "") -> _Check | None:
    """Cut one assertion in two; None if the text is not one assertion."""
    try:
        statements = ast.parse(test.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        return None
    claim = statements[0].test
    match claim:
        case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[right]) if not (
            _compares(call) or not _Cutter(_alone(setup)[1], may_be_builtin=False).is_under_test(call)
        ):
            with contextlib.suppress(ValueError, TypeError):  # the right side is not a literal
                return _Check((ast.unparse(call),), expected=ast.literal_eval(right))
    return _cut(claim, setup)


def _cut(claim: ast.expr, setup: str) -> _Check:
    whole = ast.unparse(claim)
    modules = sorted(_modules_of(claim))
    lines, names = _alone(setup)
    before = "\n".join((*lines, *(f"import {name}" for name in modules)))
    for may_be_builtin in (False, True):
        cutter = _Cutter(frozenset(names), may_be_builtin=may_be_builtin)
        rest = cutter.visit(ast.parse(whole, mode="eval"))
        if cutter.is_stuck:
            return _Check((), is_cut=False)
        if cutter.calls:
            return _Check(tuple(cutter.calls), rest=ast.unparse(rest), before=before)
    return _Check((), rest=whole, before=before)


@functools.lru_cache(maxsize=4096)
def _alone(setup: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Lines of the setup that do not need the code under test, and the names that only they define."""
    try:
        statements = ast.parse(setup).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return (), frozenset()
    lines: list[str] = []
    known: set[str] = set()
    for statement in statements:
        made = _made(statement)
        if made and _needs(statement) <= known:
            lines.append(ast.unparse(statement))
            known |= made
        else:
            known -= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return tuple(lines), frozenset(known)


def _made(statement: ast.stmt) -> set[str]:
    """Names that an import, an assignment or a function definition defines; empty for other statements."""
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(name.asname or name.name).partition(".")[0] for name in names}
        case ast.FunctionDef(name=name):
            return {name}
        case ast.Assign(targets=targets) if all(isinstance(target, ast.Name | ast.Tuple) for target in targets):
            return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def _needs(node: ast.AST) -> set[str]:
    """Names that are read but neither defined inside nor built in."""
    own = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    own |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    own |= {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    read = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    return {name for name in read - own if not hasattr(builtins, name)}


class _Cutter(ast.NodeTransformer):
    """Replaces the outermost calls to the code under test, and the names that it defined, by `_values[i]`.

    `known` names are those of the setup or of loops around this one: the clean child has them too.
    """

    def __init__(self, known: frozenset[str], *, may_be_builtin: bool, numbers: Iterator[int] | None = None) -> None:
        self.calls: list[str] = []
        self.is_stuck = False
        self._known = known
        self._may_be_builtin = may_be_builtin
        self._numbers = itertools.count() if numbers is None else numbers

    def visit(self, node: ast.AST) -> ast.AST:
        node = self._as_loop(node)
        if isinstance(node, _LOOPS) and self._has_calls(node):
            return self._cut_loop(node)
        if self.is_under_test(node) or self._sorts_by_it(node):
            return self._value_of(node)
        if isinstance(node, (*_LOOPS, ast.Lambda, ast.NamedExpr)):
            self.is_stuck |= self._has_calls(node)
            return node
        return super().visit(node)  # type: ignore[no-any-return]

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._value_of(node) if self._is_the_codes(node) else node

    def _value_of(self, node: ast.AST) -> ast.AST:
        self.calls.append(ast.unparse(node))
        return ast.parse(f"_values[{len(self.calls) - 1}]", mode="eval").body

    def _has_calls(self, node: ast.AST) -> bool:
        return any(map(self.is_under_test, ast.walk(node))) or not _needs(node) - _modules_of(node) <= self._known

    def _is_the_codes(self, node: ast.AST) -> bool:
        """Whether the name comes from the code under test, not from Python, the setup or a loop."""
        return isinstance(node, ast.Name) and not (
            node.id in self._known or hasattr(builtins, node.id) or node.id in sys.stdlib_module_names
        )

    def _as_loop(self, node: ast.AST) -> ast.AST:
        """`map` and `filter` of the code under test, or of a lambda that calls it, as an equivalent loop."""
        match node:
            case ast.Call(func=ast.Name(id="map" | "filter" as word), args=[asked, *values], keywords=[]) if values:
                pass
            case _:
                return node
        if isinstance(asked, ast.Lambda) and self._has_calls(asked):
            arguments = [part.arg for part in asked.args.args]
            element = ast.unparse(asked.body)
        elif self._is_the_codes(asked):
            arguments = [f"_{next(self._numbers)}" for _ in values]
            element = f"{ast.unparse(asked)}({', '.join(arguments)})"
        else:
            return node
        each = ", ".join(arguments)
        over = ast.unparse(values[0]) if len(values) == 1 else f"zip({', '.join(map(ast.unparse, values))})"
        loop = f"({element} for {each} in {over})" if word == "map" else f"({each} for {each} in {over} if {element})"
        return ast.parse(loop, mode="eval").body

    def _sorts_by_it(self, node: ast.AST) -> bool:
        """Whether the code under test is only the sort key: then the returned value is judged."""
        match node:
            case ast.Call(func=ast.Name(id=word), keywords=[ast.keyword(arg="key", value=key)]) if word in _SORTERS:
                return self._is_the_codes(key) or (isinstance(key, ast.Lambda) and self._has_calls(key))
        return False

    def _cut_loop(self, node: _Loop) -> ast.AST:
        """The same loop over the returned values, together with its own sequence.

        The clean child makes the sequence if that does not need the code; otherwise its values are returned too. A
        condition that calls the code is judged on its value; in the code's child it only selects which calls are made.
        """
        loops = node.generators
        asked: list[ast.expr] = []
        for loop in loops:
            tests = [part for test in loop.ifs for part in _parts(test)]
            asked += [test for test in tests if any(map(self.is_under_test, ast.walk(test)))]
            loop.ifs = [test for test in tests if test not in asked]
            self.is_stuck |= bool(loop.is_async)
        target = ", ".join(ast.unparse(loop.target) for loop in loops)
        every = "".join(map(ast.unparse, loops)).strip()
        own = {part.id for loop in loops for part in ast.walk(loop.target) if isinstance(part, ast.Name)}
        inner = _Cutter(self._known | own, may_be_builtin=self._may_be_builtin, numbers=self._numbers)
        guard = f" if {' and '.join(f'({ast.unparse(test)})' for test in asked)} else None" if asked else ""
        conditions = [inner.visit(test) for test in asked]
        num_asked = len(inner.calls)
        parts = ("key", "value") if isinstance(node, ast.DictComp) else ("elt",)
        elements = [inner.visit(getattr(node, part)) for part in parts]
        self.is_stuck |= inner.is_stuck
        first = len(self.calls)
        goes_over = f"[({target},) {every}]"
        if self._has_calls(ast.parse(goes_over)):
            self.calls.append(goes_over)
            goes_over = f"_values[{first}]"
        names = [f"_{next(self._numbers)}" for _ in inner.calls]
        values = [f"_values[{len(self.calls) + place}]" for place in range(len(inner.calls))]
        self.calls += [f"[{call} {every}]" for call in inner.calls[:num_asked]]
        self.calls += [f"[{call}{guard} {every}]" for call in inner.calls[num_asked:]]
        heads = "".join(f"{name}, " for name in (f"({target},)", *names))
        sources = ", ".join([goes_over, *values])
        rename = _Renamed(names)
        for part, element in zip(parts, elements, strict=True):
            setattr(node, part, rename.visit(element))
        node.generators = ast.parse(f"[0 for {heads} in zip({sources}, strict=True)]", mode="eval").body.generators  # type: ignore[attr-defined]
        node.generators[0].ifs = [rename.visit(test) for test in conditions]
        return node

    def is_under_test(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or _asks_a_value(node):
            return False
        root: ast.AST = node
        while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
            if _is_in_module(root):
                return False
            root = root.func if isinstance(root, ast.Call) else root.value
        if not isinstance(root, ast.Name) or root.id in self._known:
            return False
        return self._may_be_builtin or not hasattr(builtins, root.id)


class _Renamed(ast.NodeTransformer):
    """Replaces `_values[i]` by the i-th name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(value=ast.Name(id="_values"), slice=ast.Constant(value=int() as place)):
                return ast.Name(id=self._names[place], ctx=ast.Load())
        return self.generic_visit(node)


def _modules_of(node: ast.AST) -> set[str]:
    """Names of the standard library's modules that the node uses."""
    return {part.value.id for part in ast.walk(node) if _is_in_module(part)}  # type: ignore[attr-defined]


def _is_in_module(node: ast.AST) -> bool:
    """Whether the node is an attribute of a module of the standard library, such as `math.isclose`."""
    match node:
        case ast.Attribute(value=ast.Name(id=name)):
            return name in sys.stdlib_module_names
    return False


def _asks_a_value(node: ast.AST) -> bool:
    """Whether the call is a method of a plain value that a function under test returned.

    Names of functions are in lower case, those of classes are capitalized (PEP 8): methods of a class are under test.
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


def _parts(test: ast.expr) -> list[ast.expr]:
    """The conditions that a condition joins with `and`."""
    return test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]


def _compares(node: ast.AST) -> bool:
    return any(isinstance(part, (ast.Compare, ast.BoolOp)) for part in ast.walk(node))
