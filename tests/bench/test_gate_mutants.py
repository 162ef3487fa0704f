"""The gate's own gate: flip every operator, constant and branch of the verdict's code, and see the change found.

A mutant is the module with one node of its syntax tree changed. It survives when all known-bad records are refused,
all good ones still pass, and every boundary of a limit lies where it did. None may survive, so nobody can weaken a
verdict without a test that says so. Run with `-k mutants -s` to see their number.
"""

from __future__ import annotations

import ast
import itertools
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havoc_core.bench import gate, identity, limits, rules, validity
from havoc_core.bench.targets import Limit, RequiredProtocol, load_target
from havoc_core.errors import HavocError

known = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("known_bad.py"))))
samples = known.samples

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
SWAPPED_CALLS = {"max": "min", "min": "max", "any": "all", "all": "any"}


def mutants(tree: ast.Module) -> Iterator[str]:
    """Change one node of the module's functions at a time; yield what was changed while it is changed."""
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for node in [node for statement in function.body for node in ast.walk(statement)]:
            for change, apply in changes_of(node):
                kept = {key: list(value) if isinstance(value, list) else value for key, value in vars(node).items()}
                apply(node)
                yield f"{function.name}: {change}: {ast.unparse(node)[:60]}"
                vars(node).update(kept)


def changes_of(node: ast.AST) -> list[tuple[str, Callable[[Any], None]]]:
    """List the ways to change one node, each with a function that does it in place."""
    found: list[tuple[str, Callable[[Any], None]]] = []
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                found.append(
                    (
                        f"{type(operator).__name__} -> {other.__name__}",
                        lambda n, p=place, o=other: n.ops.__setitem__(p, o()),
                    )
                )
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        found.append((f"{type(node.op).__name__} -> {other.__name__}", lambda n, o=other: setattr(n, "op", o())))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        other_op = ARITHMETIC[type(node.op)]
        found.append((f"{type(node.op).__name__} -> {other_op.__name__}", lambda n, o=other_op: setattr(n, "op", o())))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found.append(("drop not", lambda n: setattr(n, "op", ast.UAdd()) or setattr(n, "operand", as_bool(n.operand))))
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            found.append((f"if -> {value}", lambda n, v=value: setattr(n, "test", ast.Constant(v))))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPPED_CALLS:
        found.append(
            (
                f"{node.func.id} -> {SWAPPED_CALLS[node.func.id]}",
                lambda n: setattr(n, "func", ast.Name(SWAPPED_CALLS[n.func.id], ast.Load())),
            )
        )
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
        found.append((f"{node.value} + 1", lambda n: setattr(n, "value", n.value + 1)))
    if isinstance(node, ast.Constant) and node.value in {
        "pass",
        "fail",
        "inconclusive",
        "invalid",
        "not_measured",
        "gate",
    }:
        word = "fail" if node.value == "pass" else "pass"
        found.append((f"{node.value} -> {word}", lambda n, w=word: setattr(n, "value", w)))
    return found


def as_bool(node: ast.expr) -> ast.expr:
    return ast.Call(func=ast.Name("bool", ast.Load()), args=[node], keywords=[])


def loaded(module: types.ModuleType, tree: ast.Module) -> dict[str, Any]:
    """Return the namespace of a changed module, without touching the real one."""
    twin = types.ModuleType(module.__name__)
    twin.__dict__.update(__package__=module.__package__, __file__=module.__file__)
    sys.modules[module.__name__] = twin  # dataclasses look their module up by name
    try:
        exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), twin.__dict__)
    finally:
        sys.modules[module.__name__] = module
    return twin.__dict__


EFFORT = RequiredProtocol(min_processes=5, min_samples=64, min_busy_s=65.0)


def limit_probes() -> list[tuple[Limit, list[Any], RequiredProtocol]]:
    """Return limits with records on both sides of every boundary of `limits.py`."""
    prefill = Limit(metric="prefill_ms", below=100.0, unit="ms")
    decode = Limit(metric="decode_tok_per_s", above=50.0, unit="tok/s")
    math = Limit(metric="accuracy/math", above=85.0, unit="%")
    load = Limit(metric="load_s", below=1.0, unit="s")
    energy = Limit(metric="energy_j_per_tok", below=1.0, unit="J/tok")
    vram = Limit(metric="peak_vram_bytes", below=2.0, unit="GB")
    span = {"method": "counter", "joules": 50.0, "num_tokens": 100, "span_s": 10.0}
    probes: list[tuple[Limit, dict[str, Any]]] = [
        *((limit, {}) for limit in (prefill, decode, math, load, energy, vram)),
        *(
            (Limit(metric="peak_rss_bytes", below=size, unit="bytes"), {})
            for size in (400_000_001, 400_000_002, 412_000_001, 412_000_002)
        ),
        (
            Limit(metric="peak_rss_bytes", below=400_000_002, unit="bytes"),
            {"memory__rss__each__method": "nvml_accounting"},
        ),
        (Limit(metric="peak_rss_bytes", below=2, unit="GB"), {"memory__rss__1__method": "allocator"}),
        (Limit(metric="peak_rss_bytes", below=2, unit="GB"), {"memory": {"rss_reason": "why"}}),
        (Limit(metric="peak_rss_bytes", below=2, unit="GB"), {"memory": {}}),
        *((math, {"accuracy__math__num_right": right}) for right in (830, 831, 868, 869)),
        (math, {"accuracy__math__split": "search"}),
        (math, {"accuracy__math__num_right": 85, "accuracy__math__num_rows": 100}),
        (math, {"accuracy__math__num_right": 84, "accuracy__math__num_rows": 100}),
        *((load, {"samples__3__load_ns": ns}) for ns in (999_999_999, 1_000_000_000)),
        (load, few_processes()),
        *((energy, {"energy": span | change}) for change in ({}, {"span_s": 9.9}, {"joules": 100.0}, {"joules": 99.9})),
        *((prefill, prefills(times)) for times in prefill_sets()),
        *(
            (Limit(metric="prefill_ms", below=ms, unit="ms"), {"samples__2__warmup__classification": kind})
            for ms in (39, 41)
            for kind in ("slowdown", "no_steady_state", "warmup")
        ),
        *(
            (
                Limit(metric="decode_tok_per_s", above=rate, unit="tok/s"),
                {"samples__2__warmup__classification": "slowdown"},
            )
            for rate in (240, 260)
        ),
        *((Limit(metric="decode_tok_per_s", above=rate, unit="tok/s"), {}) for rate in (490, 510)),
        (
            Limit(metric="decode_tok_per_s", above=400, unit="tok/s"),
            {"samples__0__decode__each__step_ns": [2_600_000] * 127},
        ),
        (Limit(metric="decode_tok_per_s", above=1e9 / 2_002_905.5118110236, unit="tok/s"), {}),
        (decode, {"samples__0__decode": [], "samples__1__decode": []}),
        (decode, {"samples__each__decode": []}),
        (decode, few_processes()),
        (prefill, {"samples__0__busy_ns": 12_999_999_999}),
        (prefill, {"samples": []}),
        (load, {"samples": []}),
        (math, {"accuracy": {}}),
        (vram, {"memory": {"vram_reason": "no card"}}),
        (decode, {"samples__0__decode__each__step_ns": [20_000_000] * 127}),
        (prefill, prefills([[50.0] * 20] * 5) | {"samples__2__warmup__classification": "slowdown"}),
        (prefill, {"samples__each__prefill": {"start_ns": [], "duration_ns": []}}),
    ]
    return [(limit, [samples.record("cpu", **change)], EFFORT) for limit, change in probes] + [
        (
            math,
            [samples.record("cpu"), samples.record("cpu", run_id="b", accuracy__math__rows_sha256="f" * 64)],
            EFFORT,
        ),
        (math, [samples.record("cpu"), samples.record("cpu", run_id="b")], EFFORT),
        (vram, [samples.record("cuda")], EFFORT),
        (Limit(metric="peak_rss_bytes", below=2, unit="GB"), [samples.record("cuda")], EFFORT),
        (math, [samples.record("cpu"), samples.record("cpu", run_id="b", accuracy__math__split="train")], EFFORT),
        (
            energy,
            [samples.record("cpu", energy=span), samples.record("cpu", run_id="b", energy=span | {"span_s": 9.9})],
            EFFORT,
        ),
        (
            energy,
            [samples.record("cpu", energy=span), samples.record("cpu", run_id="b", energy=span | {"joules": 120.0})],
            EFFORT,
        ),
    ]


def few_processes() -> dict[str, Any]:
    return {"samples": samples.document("cpu")["samples"][:4], "protocol__num_processes": 4}


def prefill_sets() -> list[list[list[float]]]:
    fast, slow = [50.0] * 100, [50.0] * 85 + [150.0] * 15
    return [
        [[100.0] * 20] * 5,
        [[99.999999] * 20] * 5,
        [[50.0] * 19 + [150.0]] * 2 + [[50.0] * 18 + [150.0] * 2] * 3,
        [fast] * 7 + [slow],
        [[50.0] * 15] + [[50.0] * 12] * 4,
        [[50.0] * 13] * 4 + [[50.0] * 12],
        [[50.0] * 19 + [100.0]] * 5,
        [[50.0] * 40] * 4,
        [[150.0] * 30],
        [[150.0]],
        [[50.0] * 89 + [100.0] * 11] + [[50.0] * 100] * 9,
        [[50.0] * 90 + [100.0] * 10] + [[50.0] * 100] * 9,
    ]


def prefills(per_process: list[list[float]]) -> dict[str, Any]:
    processes = []
    for index, times_ms in enumerate(per_process):
        durations = [round(1e6 * ms) for ms in times_ms]
        starts = [sum(durations[:place]) for place in range(len(durations))]
        process = samples.process(index, "CPUExecutionProvider") | {"busy_ns": 65_000_000_000}
        processes.append(process | {"prefill": {"start_ns": starts, "duration_ns": durations}})
    return {"samples": processes, "protocol__num_processes": len(per_process)}


PROBES = limit_probes()


def answers_of_limits(namespace: dict[str, Any], _: str = "") -> Iterator[Any]:
    for probe in PROBES:
        yield str(namespace["judge_limit"](*probe))
    below, above = PROBES[0][0], Limit(metric="decode_tok_per_s", above=100.0, unit="tok/s")
    for limit, low, high in itertools.product((below, above), (None, 99.0, 100.0, 101.0), (None, 99.0, 100.0, 101.0)):
        for lacking in ("", "too little"):
            yield namespace["decide"](limit, limits.Evidence(100.0, low, high, 5, 5, lacking, 7))


CASES = [
    *[(rule, known.case_of(kind, changes)) for rule, cases in known.BAD.items() for kind, changes in cases],
    *[("", known.case_of("cuda", changes)) for changes in known.ODD],
    *[("", known.case_of(kind, {})) for kind in ("cpu", "cuda")],
]


def answers_of_rules(namespace: dict[str, Any], function: str = "") -> Iterator[Any]:
    """Ask the rule that was changed, or all where a function they share was."""
    names = {rule.check.__name__ for rule in rules.RULES} & namespace.keys()
    checks = [namespace[name] for name in sorted({function} & names or names)]
    for _, case in CASES:
        cpu = {"is_this_machine": False, "names": (samples.CPU["name"],), "features": ("avx2",)}
        plain = case.target.model_copy(update={"device": case.target.device.model_copy(update=cpu)})
        yield from (check(case) for check in checks)
        yield from (check(rules.Case(record=case.record, target=case.target)) for check in checks)
        yield from (check(rules.Case(record=case.record, target=plain)) for check in checks)
        bare = case.target.model_copy(update={"roofline": None})
        yield from (check(rules.Case(record=case.record, target=bare)) for check in checks)


def answers_of_gate(namespace: dict[str, Any], _: str = "") -> Iterator[Any]:
    groups = [[cases[0]] for cases in ([case.record for name, case in CASES if name == rule] for rule in known.BAD)]
    good = samples.record("cpu")
    groups += [
        [good, samples.record("cpu", run_id="b")],
        [good, good],
        [good, samples.record("cpu", created_utc="2026-11-22T07:00:00Z")],
        [good, samples.record("cpu", run_id="b", device__fingerprint="9" * 64)],
        [good, samples.record("cpu", run_id="b", workload__seed=3)],
        [good, samples.record("cpu", run_id="b", purpose="screen")],
        [good, samples.record("cpu", run_id="b", evidence="projected")],
        [good, samples.record("cpu", run_id="b", evidence="simulated")],
        [samples.record("cpu", accuracy={})],
        [samples.record("cpu", accuracy__math__num_right=850)],
        [samples.record("cpu", accuracy__math__num_right=700)],
        [samples.record("cpu", accuracy__math__num_right=700, accuracy__code__num_right=850)],
    ]
    target = load_target("host")
    quick = target.model_copy(
        update={"limits": tuple(limit for limit in target.limits if "decode" not in limit.metric)}
    )
    with pytest.raises(HavocError):
        namespace["judge"]([], target)
    for wanted in (quick, load_target("gtx1660")):
        for group in groups:
            result = namespace["judge"](group, wanted, artifact_files=known.GOOD_FILES, this_cpu=samples.THIS_CPU)
            yield (result.verdict, result.evidence, result.exit_code, result.reason, str(result.lines), result.run_ids)
            yield str(result.findings)


MODULES: dict[types.ModuleType, Callable[..., Iterator[Any]]] = {
    limits: answers_of_limits,
    identity: answers_of_rules,
    validity: answers_of_rules,
    gate: answers_of_gate,
}

# Changes that cannot change an answer, each with the reason why.
WHOLE = "times are whole nanoseconds and the roofline's floor is not, so they are never equal"
EQUIVALENT = {
    "validity.not_faster_than_physics: Lt -> LtE: min(durations) <= floor_s * 1000000000.0": WHOLE,
    "validity.not_faster_than_physics: Lt -> LtE: statistics.median(steps) <= floor_s * 1000000000.0": WHOLE,
}


def survivors(module: types.ModuleType) -> tuple[int, list[str]]:
    """Return the number of mutants of a module and a description of each that no probe noticed."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    original, answers = loaded(module, tree), MODULES[module]
    before: dict[str, list[Any]] = {}
    alive, total = [], 0
    for change in mutants(tree):
        function = change.partition(":")[0]
        if function not in before:
            before[function] = list(answers(original, function))
        total += 1
        if not is_noticed(loaded(module, tree), answers, function, before[function]):
            alive.append(change)
    return total, alive


def is_noticed(
    namespace: dict[str, Any], answers: Callable[..., Iterator[Any]], function: str, before: list[Any]
) -> bool:
    """Whether any answer differs, or a mutant ends in an exception; stops at the first."""
    try:
        after = answers(namespace, function)
        return any(ours != theirs for ours, theirs in zip(after, before, strict=True))
    except Exception:  # noqa: BLE001 - a crash is noticed
        return True


@pytest.mark.parametrize("module", list(MODULES), ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_mutant_of_the_verdict_survives(module: types.ModuleType) -> None:
    """Whatever operator, constant or branch of the verdict is flipped, a known record is judged otherwise."""
    total, alive = survivors(module)
    print(f"{module.__name__}: {total} mutants, {len(alive)} survive")
    name = module.__name__.rpartition(".")[2]
    assert total > 50
    assert [change for change in alive if f"{name}.{change}" not in EQUIVALENT] == []


def test_every_excuse_is_of_a_mutant_there_is() -> None:
    """A reason why a change is harmless does not outlive the line it was written for."""
    changes = set()
    for module in MODULES:
        name = module.__name__.rpartition(".")[2]
        changes |= {f"{name}.{change}" for change in mutants(ast.parse(Path(str(module.__file__)).read_text()))}
    assert set(EQUIVALENT) <= changes


if __name__ == "__main__":
    for module in MODULES:
        print(module.__name__, *survivors(module), sep="\n  ", flush=True)
