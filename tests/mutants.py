"""Change the code in one place at a time, and see that its tests find it: the runner of `make mutants`.

    python tests/mutants.py [MODULE ...]        all modules of tests/mutants.toml, or those named (adapt/svf.py, bench)

tests/mutants.toml names the modules, the test files that must find every change, and the reason for each change that
no test can find. A module is changed in a copy of the checkout, never in the checkout itself. pytest collects the
tests of a module once; then each mutant gets a forked child of its own, in which the functions have the changed code.
The child runs the tests, those first that killed others, and stops at the first failure. What was found stands in
build/mutants.jsonl, so a run that was stopped goes on: a mutant stays killed while the module and the test that killed
it are unchanged. A survivor is tried again when one of its files changes.

Writes reports/mutants.json and from it docs/mutants.md. Ends with 1 where fewer than 90 % are killed, or a survivor
has no reason, or a reason has no mutant.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants.toml"
JOURNAL = ROOT / "build" / "mutants.jsonl"
FIGURES = ROOT / "reports" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"
MOST_MUTANTS = 400
"""Of a module that has more, so many are drawn."""
SEED = 0
LEAST_KILLED = 0.9
LONGEST_S = 600.0
"""The longest that the tests of one module may take."""
MOST_BETWEEN_LOOKS_S = 1.0
FAILED = 70  # the exit code of a child whose work failed
MARKS = "not alone and not gpu"
"""Tests that measure need a machine for themselves, which mutants never have."""
ALL_TESTS, NOTE = "all tests", "note_that_it_was_called"
LIBRARIES = "numpy torch onnx onnx_ir onnxruntime scipy.stats pymoo.core.problem pydantic rich safetensors"
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "demo", "reports", "*.egg-info", "__pycache__")

mutation = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("mutation.py"))))


@dataclass(frozen=True)
class Result:
    """What came of one mutant: `killer` is the test that failed, "time", "import" or "crash"; None where all passed."""

    module: str
    mutant: str
    killer: str | None
    module_sha256: str
    tests_sha256: str


def read_table(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """Read `tests` and `survivors` of each module."""
    return dict(tomllib.loads(path.read_text()))


@dataclass(frozen=True)
class Mutant:
    """A changed module: its source, and the code of each of its functions by name and first line."""

    name: str
    source: str
    codes: dict[tuple[str, int], CodeType]

    @property
    def function(self) -> str:
        return self.name.partition(":")[0]

    @property
    def needs_import(self) -> bool:
        """Whether more than functions changed, so that the module must be imported anew."""
        return self.name.startswith(("declared:", "table:"))


def mutants_of(path: Path, *, most: int = MOST_MUTANTS) -> list[Mutant]:
    """Give the mutants of a module; a fixed draw of `most` where it has more. A larger draw holds the smaller."""
    tree = ast.parse(path.read_text())
    names = list(mutation.mutants(tree))
    if len(names) > most:
        random.Random(SEED).shuffle(names)
    drawn = set(names[:most])
    return [mutant_of(tree, name) for name in mutation.mutants(tree) if name in drawn]


def mutant_of(tree: ast.Module, name: str) -> Mutant:
    code = compile(ast.fix_missing_locations(tree), name, "exec")
    return Mutant(name, ast.unparse(tree), {key_of(inner): inner for inner in codes_in(code)})


def noting(source: str) -> Mutant:
    """The unchanged module, of which each function begins by noting that it was called."""
    tree = ast.parse(source)
    for part in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for function in (node for node in part.body if isinstance(node, ast.FunctionDef)):
            name = function.name if part is tree else f"{part.name}.{function.name}"
            function.body.insert(0, ast.parse(f"{NOTE}({name!r})").body[0])
    return dataclasses.replace(mutant_of(tree, ""), source=source)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_in(constant)


def key_of(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def source_of_test(node_id: str, root: Path = ROOT) -> str:
    """The source of the test that a pytest name stands for; the whole file's where it is no function of the file."""
    file, _, name = node_id.partition("::")
    if not (root / file).is_file():
        return ""
    text = (root / file).read_text()
    wanted = name.partition("[")[0]
    return next(
        (
            ast.unparse(node)
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef) and node.name == wanted
        ),
        text,
    )


class Copy:
    """A copy of the checkout, in which one module at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "havoc_core"
        self.output = folder / "output.txt"
        self.answer = folder / "answer"
        self.is_done = folder / "done"
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT)
        os.environ["PYTHONPATH"] = str(folder)  # for the children of tests
        sys.path.insert(0, str(folder))

    def write(self, module: str, source: str) -> None:
        """Put `source` in the place of a module; no compiled file of it stays."""
        path = self.root / module
        path.write_text(source)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def run_tests(self, tests: list[str], plugin: object) -> int:
        """Run pytest on test files of the copy, in this process; its output goes to `output.txt`."""
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.chdir(self.root)
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        options = ["-x", "-q", "-m", MARKS, "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
        return pytest.main([*options, f"--basetemp={self.folder / 'tmp'}", *tests], plugins=[plugin])


def ends_in_child(work: Callable[[], None], *, limit_s: float = math.inf) -> bool:
    """Do some work in a forked child with a process group of its own; return whether it ended in time.

    Time in which this process too was stopped does not count. Raises `RuntimeError` where the work itself failed, which
    no test may hide.
    """
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            os.setpgid(0, 0)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a child must not go on as its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    spent_s, before_s = 0.0, time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        now_s = time.monotonic()
        spent_s, before_s = spent_s + min(now_s - before_s, MOST_BETWEEN_LOOKS_S), now_s
        if spent_s > limit_s:
            kill_group(child)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)
    kill_group(child)  # what the tests left behind
    if os.waitstatus_to_exitcode(ended[1]) == FAILED:
        raise RuntimeError("the runner failed in a child; its output tells why")
    return True


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


class FirstFailure:
    """Keeps the name of the first test that fails, and how long each took."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def killer_when_imported(copy: Copy, module: str, mutant: Mutant, tests: list[str]) -> str | None:
    """Run the tests in a child that imports the changed module: the first that fails, "import", "time" or "crash"."""

    def work() -> None:
        first = FirstFailure()
        code = copy.run_tests(tests, first)
        copy.answer.write_text(json.dumps(None if code == 0 else first.failed or "import"))

    copy.write(module, mutant.source)
    copy.answer.unlink(missing_ok=True)
    ended = ends_in_child(work, limit_s=LONGEST_S)
    copy.write(module, (ROOT / module).read_text())
    if not ended:
        return "time"
    return json.loads(copy.answer.read_text()) if copy.answer.exists() else "crash"


class Calls(FirstFailure):
    """Notes too which functions of a module each test calls.

    What a fixture of more than one test calls counts for all tests, since only the first of them sees it built.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: defaultdict[str, set[str]] = defaultdict(set)
        self._test = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        before = self._test
        if fixturedef.scope != "function":
            self._test = ALL_TESTS
        try:
            return (yield)
        finally:
            self._test = before

    def note(self, function: str) -> None:
        self.called[function].add(self._test)


class Loop(Calls):
    """Stands in for pytest's loop over the tests: runs them in a child for each mutant, after one collection.

    The tests have imported the module already, so the child gives its functions the changed code; what imports it
    later, or in a process of its own, reads the changed file. Tests that did not call the changed function, when the
    unchanged code was tried, are left out.
    """

    def __init__(
        self, copy: Copy, module: str, mutants: list[Mutant], keep: Callable[[Mutant, str | None], None]
    ) -> None:
        super().__init__()
        self.copy, self.module, self.mutants, self.keep = copy, module, mutants, keep
        self.original = (ROOT / module).read_text()
        self.kills: Counter[tuple[str, str]] = Counter()
        self.functions: list[FunctionType] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try the unchanged code, the mutants, and the unchanged code again, in the order that kills fastest."""
        if session.testsfailed or not session.items:
            return True
        self.functions = functions_of(self.copy.root / self.module)
        gc.freeze()
        unchanged = noting(self.original)
        began = time.monotonic()
        if self.killer(session.items, unchanged, limit_s=LONGEST_S) is not None:
            return True
        limit_s = max(20.0, 5.0 * (time.monotonic() - began))
        for mutant in self.mutants:
            if not all(fits(function, mutant) for function in self.functions):
                continue  # it must be imported anew
            self.keep(mutant, self.killer(self.chosen(session.items, mutant), mutant, limit_s=limit_s))
        in_order = sorted(session.items, key=lambda item: self.worth("", item.nodeid), reverse=True)
        if self.killer(in_order, unchanged, limit_s=LONGEST_S) is not None:
            raise RuntimeError("the unchanged code fails when its tests run in another order")
        self.copy.is_done.touch()
        return True

    def killer(self, items: list[pytest.Item], mutant: Mutant, *, limit_s: float) -> str | None:
        """Run tests on a mutant: the first that fails, "time" or "crash"."""
        self.copy.write(self.module, mutant.source)
        self.copy.answer.unlink(missing_ok=True)

        def work() -> None:
            for function in self.functions:
                function.__code__ = mutant.codes[key_of(function.__code__)]
                function.__globals__[NOTE] = self.note
            for item, following in itertools.pairwise([*items, None]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.failed:
                    break
            called = {name: sorted(tests) for name, tests in self.called.items()}
            answer = {"failed": self.failed, "seconds": self.seconds, "called": called}
            self.copy.answer.write_text(json.dumps(answer))

        ended = ends_in_child(work, limit_s=limit_s)
        self.copy.write(self.module, self.original)
        if not ended:
            return "time"
        if not self.copy.answer.exists():
            return "crash"
        answer = json.loads(self.copy.answer.read_text())
        self.seconds.update(answer["seconds"])
        self.called.update({name: set(tests) for name, tests in answer["called"].items()})
        killer: str | None = answer["failed"]
        self.kills.update([(mutant.function, str(killer)), ("", str(killer))])
        return killer

    def chosen(self, items: list[pytest.Item], mutant: Mutant) -> list[pytest.Item]:
        """The tests that may see a mutant, in the order of what they promise."""
        callers = self.called[mutant.function]
        seeing = items if ALL_TESTS in callers or not self.functions else [i for i in items if i.nodeid in callers]
        return sorted(seeing, key=lambda item: self.worth(mutant.function, item.nodeid), reverse=True)

    def worth(self, function: str, test: str) -> float:
        """Kills a second that a test promises; those of mutants of the same function count more."""
        return (10 * self.kills[function, test] + self.kills["", test] + 1) / (self.seconds[test] + 0.01)


def functions_of(path: Path) -> list[FunctionType]:
    """Every function of a module's file that is alive, inside what decorators made of it too."""
    return [
        found for found in gc.get_objects() if type(found) is FunctionType and found.__code__.co_filename == str(path)
    ]


def fits(function: FunctionType, mutant: Mutant) -> bool:
    """Whether a function can take the mutant's code."""
    code = mutant.codes.get(key_of(function.__code__))
    return code is not None and len(code.co_freevars) == len(function.__code__.co_freevars) and not mutant.needs_import


class Journal:
    """What is known of mutants, a line each."""

    def __init__(self, path: Path = JOURNAL) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        results = [Result(**json.loads(line)) for line in lines]
        self._known = {(result.module, result.mutant): result for result in results}

    def still_true(
        self, module: str, mutant: str, *, module_sha256: str, tests: list[str], root: Path
    ) -> Result | None:
        """What is known of a mutant, if neither the module nor the tests that decided it have changed."""
        known = self._known.get((module, mutant))
        if known is None or known.module_sha256 != module_sha256:
            return None
        return known if known.tests_sha256 == sha256_of_tests(known.killer, tests, root) else None

    def keep(self, result: Result) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        self._known[result.module, result.mutant] = result


def sha256_of_tests(killer: str | None, tests: list[str], root: Path) -> str:
    """Of the test that killed a mutant; of all files where it lives, or ended without a name of a test."""
    if killer is not None and "::" in killer:
        return sha256(source_of_test(killer, root))
    return sha256(*((root / test.partition("::")[0]).read_text() for test in tests))


def run_module(copy: Copy, module: str, tests: list[str], *, most: int) -> dict[str, Any]:
    """Try every mutant of a module; return its figures."""
    text = (ROOT / module).read_text()
    wanted, journal = mutants_of(ROOT / module, most=most), Journal()

    def known(mutant: Mutant) -> Result | None:
        return journal.still_true(module, mutant.name, module_sha256=sha256(text), tests=tests, root=copy.root)

    def keep(mutant: Mutant, killer: str | None) -> None:
        journal.keep(Result(module, mutant.name, killer, sha256(text), sha256_of_tests(killer, tests, copy.root)))

    if unknown := [mutant for mutant in wanted if known(mutant) is None]:
        ends_in_child(lambda: copy.run_tests(tests, Loop(copy, module, unknown, keep)))
        if not copy.is_done.exists():
            sys.exit(f"{module}: the unchanged code fails\n{copy.output.read_text(errors='replace')[-3000:]}")
        copy.is_done.unlink()
        journal = Journal()
        for mutant in [mutant for mutant in unknown if known(mutant) is None]:
            keep(mutant, killer_when_imported(copy, module, mutant, tests))
    results = [known(mutant) for mutant in wanted]
    return {
        "mutants": sum(1 for _ in mutation.mutants(ast.parse(text))),
        "tried": len(results),
        "killed": sum(result.killer is not None for result in results),
        "by_time": sum(result.killer == "time" for result in results),
        "survivors": [result.mutant for result in results if result.killer is None],
    }


def complaints(module: str, found: dict[str, Any], reasons: dict[str, str]) -> list[str]:
    """What makes a module's figures red."""
    said = []
    if found["killed"] < LEAST_KILLED * found["tried"]:
        said.append(f"{module}: {found['killed']} of {found['tried']} killed, less than {LEAST_KILLED:.0%}")
    said += [f"{module}: no reason for {name}" for name in found["survivors"] if name not in reasons]
    return said


def idle_reasons(module: str, reasons: Iterable[str]) -> list[str]:
    """Reasons for mutants that a module no longer has."""
    names = set(mutation.mutants(ast.parse((ROOT / module).read_text())))
    return [f"{module}: a reason for what is no mutant: {name}" for name in reasons if name not in names]


HEAD = f"""# Mutants

A mutant is a module with one changed operator, constant, branch or call. The tests of the module run on each mutant. A
mutant is killed if a test fails, if the module cannot be imported, or if the tests take five times their normal time.
At least 90 % must be killed. Every survivor needs a reason in `tests/mutants.toml`, which also names the tests. Tests
that measure are not used: they need the machine for themselves.

`make mutants` tries the mutants and writes this page; `make mutants MODULES=adapt/svf.py` tries one module, and
`MODULES=bench/judge` those of a folder. If a module has more than {MOST_MUTANTS} mutants, or more than `MOST=80`, that
number is drawn with a fixed seed. Tests were added for the survivors of a draw, so a drawn share says little about the
other mutants: it is the module's share only if all mutants were tried.

Many mutants of `bench/judge` and `bounds.py` are found because an answer to a known record changes: what this code
says of several hundred records stands in `tests/bench/known_answers.json`, which `make answers` writes. Such a test
sees that an answer changed; other tests say which answer is right.

| module | mutants | tried | killed | killed, % | of these by time | survivors |
|---|---:|---:|---:|---:|---:|---:|
"""


def page_of(figures: dict[str, Any], table: dict[str, dict[str, Any]]) -> str:
    """The page: a row a module, then the survivors with their reasons."""
    lines = []
    for module in table:
        if (found := figures.get(module)) is None:
            lines.append(f"| `{module}` | | not run | | | | |")
            continue
        share = f"{100 * found['killed'] / found['tried']:.1f}"
        cells = [found["mutants"], found["tried"], found["killed"], share, found["by_time"], len(found["survivors"])]
        lines.append(f"| `{module}` | {' | '.join(map(str, cells))} |")
    lines += ["", "## Survivors", ""]
    for module, entry in table.items():
        survivors = figures.get(module, {}).get("survivors", [])
        if survivors:
            reasons = entry.get("survivors", {})
            lines += [f"### `{module}`", ""]
            lines += [f"- `` {name} `` - {reasons.get(name, 'no reason yet')}" for name in survivors]
            lines.append("")
    return HEAD + "\n".join(lines).rstrip() + "\n"


def write_page() -> None:
    PAGE.write_text(page_of(json.loads(FIGURES.read_text()), read_table()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="a module of tests/mutants.toml, or a folder")
    parser.add_argument("--most", type=int, default=MOST_MUTANTS, help="mutants of a module (default: %(default)s)")
    parser.add_argument("--preload", default=LIBRARIES, help="libraries to import once, before any mutant")
    chosen = parser.parse_args()
    table = read_table()
    wanted = {given: [module for module in table if Path(module).is_relative_to(given)] for given in chosen.modules}
    if unknown := [given for given, modules in wanted.items() if not modules]:
        parser.error(f"{unknown[0]} is not in {TABLE.name}; it names {', '.join(table)}")
    for library in chosen.preload.split():
        importlib.import_module(library)
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    said = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder))
        for module in dict.fromkeys(itertools.chain(*wanted.values())) or table:
            found = figures[module] = run_module(copy, module, table[module]["tests"], most=chosen.most)
            print(f"{module}: {found['killed']} of {found['tried']} killed ({found['mutants']} mutants)", flush=True)
            reasons = table[module].get("survivors", {})
            said += [*complaints(module, found, reasons), *idle_reasons(module, reasons)]
            FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
            write_page()
    print(*said, sep="\n")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
