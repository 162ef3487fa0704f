"""The text around the numbers of a report: the facts of the run, its environment, how to repeat it, and caveats."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapt.tasks.names import bundled_tasks, in_order
from ...export.runtime.live_table import EXPERTS_FILE
from ..engines import key_of
from ..judge.figures import DASH, count, show, structure_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..judge.record import Record
    from ..judge.schema import DomainAccuracy, Subject, Workload
    from .run import Run


def facts(record: Record) -> list[tuple[str, str]]:
    """The few facts a reader wants before any number."""
    subject, protocol, workload = record.subject, record.protocol, record.workload
    alpha = ", ".join(f"{domain} {weight:g}" for domain, weight in (subject.alpha or {}).items())
    effort = (protocol.profile, count(protocol.num_processes, "fresh process"), count(protocol.num_threads, "thread"))
    weight_bytes = show(subject.weight_bytes, "bytes")
    structure = structure_of(subject.structure)
    plain = f"{subject.weight_format} weights, {subject.activation_dtype} activations"
    cold = record.cold_start
    cold_s = None if cold is None else (cold.startup_ns + cold.load_ns + cold.first_call_ns) / 1e9
    engine = subject.engine
    return [
        ("Device", record.device.name),
        *([("Engine", f"{engine.name} {engine.version}")] if engine else []),
        ("Weights", f"{structure.description if structure else plain}, {weight_bytes}"),
        ("Parameters", f"{subject.num_parameters:,}" if subject.num_parameters else DASH),
        ("Mixture", f"{alpha} ({subject.rule})" if alpha else "none"),
        ("Work", _work(workload)),
        ("Protocol", ", ".join(effort)),
        *([("Cold start", f"{show(cold_s, 's')} to the first prefill, {cold.page_cache} page cache")] if cold else []),
    ]


def _work(workload: Workload) -> str:
    passes = f", {workload.passes} passes" if workload.passes > 1 else ""
    return f"{workload.prompt_tokens} tokens in{passes}, {workload.decode_tokens} out, batch {workload.batch_size}"


def environment_rows(record: Record, previous: Record | None) -> list[dict[str, str]]:
    """Machine and versions, with the previous record's value if it differs; a dash for a missing value."""
    now = _environment_of(record)
    before = now if previous is None else _environment_of(previous)
    rows = ((name, now.get(name, DASH), before.get(name, DASH)) for name in dict.fromkeys([*now, *before]))
    return [{"name": name, "value": value, "before": was if was != value else ""} for name, value, was in rows]


def _environment_of(record: Record) -> dict[str, str]:
    device, host, protocol, tool = record.device, record.host, record.protocol, record.tool
    gpu = device.gpu
    options = ", ".join(f"{name} {value}" for name, value in sorted(protocol.provider_options.items()))
    graph = record.subject.graph or {}
    rows: dict[str, object | None] = {
        "device": device.name,
        "provider": protocol.provider,
        "provider options": options,
        "keys and values": protocol.kv_cache,
        "graph": ", ".join(
            f"{name} {graph[name]}" for name in ("dialect", "cache", "logits", "opset") if name in graph
        ),
        "CPU": f"{device.cpu.name}, {device.cpu.num_usable_cores} of {device.cpu.num_logical_cores} cores",
        "CPU features": " ".join(device.cpu.features),
        "GPU driver": gpu.driver_version if gpu else None,
        "GPU compute capability": gpu.cuda.compute_capability if gpu and gpu.cuda else None,
        "GPU power limit": f"{gpu.power_limit_w:g} W" if gpu and gpu.power_limit_w else None,
        "system": f"{host.os} {host.kernel}",
        "container": host.container,
        "memory": show(host.ram_bytes, "bytes"),
        "swap": show(host.swap_bytes, "bytes"),
        "CPU governor": host.cpu_governor,
        **{f"{name} version": version for name, version in sorted(host.versions.items())},
        "havoc-core version": tool.version,
        "havoc-core commit": f"{tool.git_commit}{', changed' if tool.is_git_dirty else ''}"
        if tool.git_commit
        else None,
    }
    return {name: str(value) for name, value in rows.items() if value}


def commands(run: Run) -> list[str]:
    """Return the commands that repeat the run: export, measurement and gate."""
    protocol = run.record.protocol
    captured = " --cuda-graph" if protocol.provider_options.get("enable_cuda_graph") == "1" else ""
    engine = run.record.subject.engine
    by_engine = f"--engine {key_of(engine.name)}" if engine else ""
    own = f"--provider {shlex.quote(protocol.provider)} {' '.join(_scoring_options(run.record.accuracy))}"
    measure = (
        f"havoc bench ARTIFACT --profile {shlex.quote(protocol.profile)} {by_engine or own}"
        f"{_workload_options(run.record.workload)}{captured}"
        f"{_mixture_option(run.record.subject)} --out DIR"
    )
    targets = (shlex.quote(Path(name).name) for name in run.target_names)  # the folder exists only on this machine
    gates = [f"havoc gate DIR/record.json --target {name} --artifact ARTIFACT" for name in targets]
    return [*([run.command] if run.command else []), measure, *gates]


def _mixture_option(subject: Subject) -> str:
    """The option that opens a live artifact with the measured mixture."""
    if EXPERTS_FILE not in subject.files or not subject.alpha:
        return ""
    return f" --alpha {shlex.quote(','.join(f'{domain}={weight!r}' for domain, weight in subject.alpha.items()))}"


def _scoring_options(accuracy: Mapping[str, DomainAccuracy]) -> list[str]:
    """Options that score the same tasks on the same data; DATA and NAME.toml replace paths that may have changed."""
    num_rows = max((item.num_rows for item in accuracy.values()), default=0)
    bundled = bundled_tasks()
    words = [f"--task {name if name in bundled else f'{name}.toml'}" for name in in_order(accuracy)]
    read = [item for name, item in accuracy.items() if name in bundled and not item.source.startswith("built-in")]
    if read:
        words.append("--data DATA" if any(item.data_sha256 for item in read) else "--online")
    shots = {item.few_shot for item in accuracy.values() if item.few_shot}
    words += [f"--few-shot {number}" for number in shots if len(shots) == 1]
    words += ["--no-chat"] if any(item.chat is False for item in accuracy.values()) else []
    return [*words, f"--n {num_rows}"]


def _workload_options(workload: Workload) -> str:
    """Options of `havoc bench` for differences from its default workload."""
    usual = type(workload)()
    options = {
        "prompt_tokens": "--prompt-tokens",
        "decode_tokens": "--decode-tokens",
        "batch_size": "--batch",
        "passes": "--passes",
    }
    return "".join(
        f" {option} {getattr(workload, field)}"
        for field, option in options.items()
        if getattr(workload, field) != getattr(usual, field)
    )


def caveats(run: Run) -> list[str]:
    """Caveats for the reader, those of the record first."""
    record = run.record
    found = [f"{check.id}: {check.detail}" for check in record.checks if check.status in {"warning", "unavailable"}]
    if record.subject.has_random_weights:
        found.append("The weights are random: speed and memory are real, but accuracy is not that of a trained model.")
    if record.subject.engine is not None:
        found.append(
            f"{record.subject.engine.name} ran the model and shows neither graph nor logits: no verdict on it can be a "
            "pass."
        )
    elif record.subject.is_graph_rebuilt is None and not run.is_rebuilt_elsewhere:
        found.append(
            "The measuring machine did not build the graphs again, so it is not proven that they are HAVOC's own: "
            "`havoc verify ARTIFACT` proves it, with the packages of the lab."
        )
    if record.evidence != "measured":
        found.append(f"This record is {record.evidence}: it can never pass a gate.")
    if record.protocol.num_retries:
        found.append(f"{count(record.protocol.num_retries, 'window')} had to be measured again.")
    found.append("Hashes detect accidents and edits, not a determined forger; no consumer card can prove its identity.")
    found.append(
        f"Bounds are one-sided at {_confidences(run)}; 2 GB means 2,000,000,000 bytes; "
        "accuracy counts undecided rows as wrong."
    )
    return found


def _confidences(run: Run) -> str:
    """Name the confidence of most limits, and the limits with another confidence."""
    metrics: dict[float, list[str]] = {}
    for target, _ in run.judged:
        for limit in target.limits:
            metrics.setdefault(limit.confidence, []).append(f"{limit.metric} on {target.name}")
    usual = max(metrics, key=lambda confidence: len(metrics[confidence]), default=0.95)
    others = [
        f"{100 * confidence:.6g} % for {', '.join(names)}"
        for confidence, names in sorted(metrics.items())
        if confidence != usual
    ]
    return " and ".join([f"{100 * usual:.6g} %", *others])
