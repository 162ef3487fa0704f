"""Handlers of the verbs that measure and judge: bench, gate, compare, report, plan, doctor, eval.

Each prints one table for a person, or with --json one document; the verdict is the exit code.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import storage
from ..errors import HavocError
from .judge.disturbance import cpu_share, disturbed_share
from .judge.figures import DASH, count, printable, show, show_interval
from .judge.metrics import measured, metric_of
from .judge.targets import load_target, require_known_tasks, require_pinned
from .judge.verdicts import spelled
from .report.tables import emphasis, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..adapt.tasks.evaluation import Scoring
    from ..progress import Progress
    from .accuracy import AccuracyRun
    from .judge.compare import Comparison
    from .judge.gate import Judgement
    from .judge.limits import Line
    from .judge.record import Cpu, Record
    from .judge.schema import Workload
    from .plan import Option

DERIVED = ("record.dsse.json", "report.html", "report.md", "junit.xml", "badge.json", "telemetry.csv", "SHA256SUMS")
"""What `havoc report` and `havoc bench --sign` write beside a record."""


def handle_gate(args: argparse.Namespace) -> int:
    """Judge records against a target; the exit code is the verdict."""
    from ..export.runtime.verification import load_verified
    from .judge.gate import hash_artifact, judge
    from .judge.record import load_record

    if args.nonce is not None and args.keyring is None:
        raise HavocError("--nonce is compared with what was signed: give the keys with --require-signature KEYRING")
    target = load_target(args.target)
    paths = [record_path(path) for path in args.records]
    records = [load_record(path) for path in paths]
    signed_by = () if args.keyring is None else _signers(paths, records, args.keyring, args.nonce)
    require_known_tasks(target, [task for record in records for task in record.accuracy])
    require_pinned(target, records)
    files = None if args.artifact is None else hash_artifact(args.artifact)
    cpu = _this_cpu() if target.device.is_this_machine else None
    verified = None if args.verified is None else load_verified(args.verified)
    judgement = judge(records, target, artifact_files=files, this_cpu=cpu, verified=verified)
    judgement = replace(judgement, signed_by=signed_by)
    if args.json:
        _print_json(judgement.document())
    else:
        print(judgement_text(judgement, target.title))
    return judgement.exit_code


def _signers(paths: Sequence[Path], records: Sequence[Record], keyring: Path, nonce: str | None) -> tuple[str, ...]:
    from .judge.answer import require_nonce, verify_answers

    return verify_answers(paths, records, keyring, None if nonce is None else require_nonce(nonce))


def _this_cpu() -> Cpu:
    from .device import identify_cpu

    return identify_cpu()


def record_path(path: Path) -> Path:
    """Return the record that a path means: the file itself, or record.json of a measured folder."""
    if not path.is_dir():
        return path
    if not (path / "record.json").is_file():
        raise HavocError(f"{path} holds no record.json: give a folder that `havoc bench` or `havoc run` wrote")
    return path / "record.json"


def judgement_text(judgement: Judgement, title: str) -> str:
    """Return a verdict as a table of limits under one line that says it all."""
    word = spelled(judgement.verdict).upper()
    head = f"{emphasis(word, judgement.verdict)} on {printable(f'{judgement.target} ({title}): {judgement.reason}')}"
    if judgement.findings:
        rows = [[finding.rule, finding.sentence, finding.reason] for finding in judgement.findings]
        body = table(("rule", "must hold", "but"), rows)
    else:
        body = limits_text(judgement.lines)
    if judgement.unlimited:
        rows = [[f"{item.title}, {item.statistic}", show(item.value, item.unit)] for item in judgement.unlimited]
        body += "\n\n" + table(("without a limit", "measured"), rows, numbers=(1,))
    evidence = judgement.evidence.replace("_", " ")
    limits = ""
    if judgement.target_sha256:
        limits = f"; limits of {printable(judgement.target_file or '')}, SHA-256 {judgement.target_sha256[:16]}"
    signed = f"; signed by {', '.join(map(printable, judgement.signed_by))}" if judgement.signed_by else ""
    return f"{head}\n\n{body}\n\nevidence: {evidence}; exit code {judgement.exit_code}{limits}{signed}"


def limits_text(lines: Sequence[Line]) -> str:
    """Return a table of limits: what was measured, what is proven, and the verdict of each."""
    head = ("limit", "must be", "measured", "proven", "verdict", "because")
    return table(head, [_line_cells(line) for line in lines], numbers=(2, 3))


def _line_cells(line: Line) -> list[str]:
    effort = count(line.num_samples, "row" if line.metric.startswith("accuracy/") else "sample")
    return [
        f"{line.title}, {line.statistic}",
        f"{line.sign} {show(line.limit, line.unit)}",
        show(line.value, line.unit),
        show_interval(line.low, line.high, line.unit),
        line.verdict,
        effort if line.verdict == "pass" else line.reason,
    ]


def handle_bench(args: argparse.Namespace) -> int:
    """Measure an artifact here, then its accuracy, and write one record; exit 4 where the measurement is invalid."""
    storage.require_writable(args.out)  # or minutes of measuring would be lost
    with storage.only_writer(args.out):  # two into one folder: the second would replace the first one's record
        return _bench(args)


def _bench(args: argparse.Namespace) -> int:
    from .accuracy import add_accuracy, require_rows
    from .judge.answer import load_answerer, require_nonce
    from .judge.gate import why_invalid
    from .judge.record import load_record
    from .measure import measure
    from .record_folder import keep
    from .subject import identify_subject

    out: Path = args.out
    path = out / "record.json"
    workload, provider, num_threads = work_asked(args)
    if path.exists() and not args.replace:
        raise HavocError(f"{out} holds a record already: choose another folder for --out, or give --replace")
    if args.challenge is not None and args.sign is None:
        raise HavocError("--challenge is answered by a signature: give the key with --sign KEY")
    nonce = None if args.challenge is None else require_nonce(args.challenge)
    answerer = None if args.sign is None else load_answerer(args.sign)
    if args.n != 0:
        identify_subject(args.artifact)
        require_rows(args.artifact, _scoring(args))
    progress = _progress(args)
    record = measure(
        args.artifact,
        profile=args.profile,
        provider=provider,
        num_threads=num_threads,
        workload=workload,
        previous=previous_record(out),
        captures_steps=args.captures_steps,
        alpha=args.alpha,
        wait_s=args.wait,
        progress=progress,
    )
    keep(record, path)  # before scoring, which may fail after minutes of measuring
    for name in DERIVED:  # pages of a record that is no longer there would tell of the wrong one
        (out / name).unlink(missing_ok=True)
    notes: list[str] = []
    if args.n != 0:
        found = _scored(args, path, progress)
        record, notes = add_accuracy(record, found), found.notes(args.n)
        keep(record, path)
    if answerer is not None:
        answerer.sign(load_record(path), path, nonce)
    broken = why_invalid(record)
    if args.json:
        _print_json(
            {
                "is_valid": broken is None,
                "reason": broken or "",
                "disturbed_share": disturbed_share(record.samples),
                "record": str(path),
                "metrics": measured(record),
                "checks": _checks(record),
                "notes": notes,
            }
        )
    else:
        print("\n".join([record_text(record), *([""] if notes else []), *notes]))
        print(f"\nrecord: {path}\nnext:   havoc gate {path} --target {args.target or 'host'}    havoc report {out}")
    return 4 if broken else 0


def _scored(args: argparse.Namespace, record_path: Path, progress: Progress) -> AccuracyRun:
    """Score the artifact for `havoc bench`; an error says that what was measured is kept."""
    from .accuracy import run_accuracy

    try:
        return run_accuracy(
            args.artifact, _scoring(args), alpha=args.alpha, num_threads=args.threads, progress=progress
        )
    except HavocError as error:
        raise type(error)(f"{error}; what was measured is kept in {record_path}, without accuracy") from error


def _scoring(args: argparse.Namespace) -> Scoring:
    """Return which tasks and rows `bench` and `eval` are to score; the split is gate unless `eval` says otherwise."""
    from ..adapt.tasks.evaluation import Scoring

    return Scoring(
        tasks=tuple(args.task or ()) or None,
        num_rows=args.n,
        data_dir=args.data,
        online=args.online,
        may_be_fewer=True,
        few_shot=args.few_shot,
        is_chat=args.is_chat,
    )


def work_asked(args: argparse.Namespace) -> tuple[Workload, str | None, int | None]:
    """Workload, provider and threads that `bench` was asked for: the target's, where an option says nothing else."""
    from ..export.runtime.devices import DEVICE_KINDS
    from .judge.schema import Workload

    target = None if args.target is None else load_target(args.target)
    asked = {"batch_size": args.batch, "decode_tokens": args.decode_tokens, "passes": args.passes}
    if args.prompt_tokens is not None:
        asked |= {"prompt_tokens": args.prompt_tokens, "context_tokens": args.prompt_tokens}
    given = {} if target is None else target.workload.model_dump()
    workload = Workload(**given | {name: value for name, value in asked.items() if value is not None})
    if target is None:
        return workload, args.provider, args.threads
    provider = args.provider or DEVICE_KINDS[target.device.kind].provider
    return workload, provider, args.threads or target.protocol.num_threads


def previous_record(out: Path) -> Record | None:
    """Return the newest sound record of an earlier run: the one this run replaces, or of a neighbouring folder."""
    from .judge.record import load_record

    places = [out / "record.json", *out.resolve().parent.glob("*/record.json")]
    found = [path for path in places if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(HavocError):  # a broken neighbour is no reason not to measure
            return load_record(path)
    return None


def record_text(record: Record) -> str:
    """Return what a record measured, as a table of figures without any verdict, below the reason why it is invalid."""
    from .judge.gate import why_invalid

    rows = [[metric_of(name).label, show(value, metric_of(name).unit)] for name, value in measured(record).items()]
    broken = why_invalid(record)
    lines = [] if broken is None else [f"{emphasis('INVALID', 'invalid')}: {printable(broken)}\n"]
    lines.append(table(("measured", printable(record.device.name)), rows, numbers=(1,)))
    lines.extend(_witness_lines(record))
    if (cold := record.cold_start) is not None:
        seconds = (cold.startup_ns + cold.load_ns + cold.first_call_ns) / 1e9
        lines.append(
            f"\ncold start, {cold.page_cache} page cache: {show(seconds, 's')} to the first prefill, of which "
            f"{show(cold.load_ns / 1e9, 's')} to load and {show(cold.first_call_ns / 1e6, 'ms')} for the first call"
        )
    doubts = [f"{check.status}: {check.id}: {check.detail}" for check in record.checks if check.status != "ok"]
    return "\n".join([*lines, *([""] if doubts else []), *doubts])


def _witness_lines(record: Record) -> list[str]:
    """Put CPU time beside wall time, and say how much of the time something else took the CPU."""
    cores, share = cpu_share(record.samples), disturbed_share(record.samples)
    lines = []
    if cores is not None:
        threads = count(record.protocol.num_threads, "thread")
        lines.append(f"\nprefills computed on {cores:.2f} cores all the while, with {threads}")
    if share:
        lines.append(f"disturbed: {share:.0%} of the timed time, in which calls say nothing of the model")
    return lines


def _checks(record: Record) -> list[dict[str, Any]]:
    return [check.model_dump(mode="json") for check in record.checks]


def handle_compare(args: argparse.Namespace) -> int:
    """Show the ratio of each metric of two records with its interval; exit 1 where `--fail-if` says so."""
    from .judge.compare import compare, disturbances
    from .judge.record import load_record

    old, new = (load_record(record_path(path)) for path in args.records)
    rows = compare(old, new, margin=args.margin, across=args.across)
    warnings = disturbances(old, new)
    code = 1 if args.fail_if == "worse" and any(row.change == "worse" for row in rows) else 0
    if args.json:
        metrics = [row.document() for row in rows]
        _print_json({"warnings": warnings, "old": old.run_id, "new": new.run_id, "metrics": metrics})
        return code
    if warnings:
        print("\n".join(f"{emphasis('warning', 'undecided')}: {printable(warning)}" for warning in warnings) + "\n")
    cells = [
        [
            f"{row.title}, median" if metric_of(row.metric).kind in _MEDIANS else row.title,
            show(row.old, row.unit),
            show(row.new, row.unit),
            DASH if row.ratio is None else f"{row.ratio:.3f}",
            DASH if row.low is None or row.high is None else f"{row.low:.3f} {DASH} {row.high:.3f}",
            row.change,
            _would_show(row),
        ]
        for row in rows
    ]
    print(table(("metric", "old", "new", "ratio", "95 % interval", "change", ""), cells, numbers=(1, 2, 3, 4)))
    return code


def handle_duel(args: argparse.Namespace) -> int:
    """Measure two sides in turns; exit 0 where the new one is proven equal or faster, 1 slower, 3 undecided."""
    from ..export.runtime.devices import CPU_PROVIDER
    from ..progress import make_progress
    from .contender import enter
    from .duel import EXIT_CODES, common_ids, differences, document, duel, require_room
    from .judge.schema import Workload
    from .report.tables import paired_table

    if not args.margin:
        raise HavocError("no measurement can prove a margin of 0: give a larger --margin, such as 0.02 for 2 %")
    num_tokens = args.prompt_tokens
    work = Workload(prompt_tokens=num_tokens, context_tokens=num_tokens, decode_tokens=args.decode_tokens)
    with enter(args.old, python=args.engine_python) as old, enter(args.new, python=args.engine_python) as new:
        for side in (old, new):
            require_room(side, work)
            if side.engine is not None and (args.provider or CPU_PROVIDER) != CPU_PROVIDER:
                raise HavocError(f"{side.shown}: another engine is measured on the CPU; leave out --provider")
        outcome = duel(
            old.side("old"),
            new.side("new"),
            margin=args.margin,
            max_time_s=args.max_time,
            workload=work,
            provider=args.provider or CPU_PROVIDER,
            num_threads=args.threads,
            num_ids=None if old.engine is new.engine is None else common_ids(old, new),
            progress=make_progress(quiet=args.quiet),
        )
        for side in (old, new):
            side.require_unchanged()
        notes = list(differences(old, new))
    code = EXIT_CODES[outcome.verdict]
    if args.json:
        _print_json(document(outcome, args.margin, old, new, notes))
        return code
    print("\n".join([*(f"note: {note}\n" for note in notes), paired_table(outcome.verdict, outcome.rows, args.margin)]))
    if outcome.agreement is not None and outcome.agreement.num_prompts:
        print(f"\n{outcome.agreement.sentence()}")
    if code == EXIT_CODES["undecided"]:
        blocks = count(outcome.num_blocks, "block")
        print(f"\n{blocks} in {args.max_time} s prove nothing: give --max-time more, or --margin, or a quiet machine")
    return code


_MEDIANS = ("latency", "throughput")
"""What `compare` shows the medians of; the gate judges percentiles and the rate over all runs."""


def _would_show(row: Comparison) -> str:
    """Beside every "no change": the least change that these samples would have shown, or why nothing is compared."""
    if row.change not in {"equal", "undecided"}:
        return row.reason
    shown = "too few samples to show any" if row.detectable is None else f"would show {row.detectable:.1%}"
    return f"{shown}; {row.reason}" if row.reason else shown


def handle_report(args: argparse.Namespace) -> int:
    """Write the pages of one measured folder, or of every run in it with an index above them.

    Of a search that nothing was measured after, one that is running included, the journal so far is told instead.
    """
    from .report.folder import write_report
    from .report.history import write_index
    from .report.run import RECORD

    targets = args.target or ["host"]
    directory: Path = args.directory
    if not (directory / RECORD).is_file() and directory.joinpath("search", "journal.jsonl").is_file():
        from ..watching import search_report

        if args.target or args.artifact is not None or args.verified is not None:
            raise HavocError(
                f"{directory}: holds a search and no {RECORD} yet, so --target, --artifact and --verified have nothing "
                "to judge: leave them out"
            )
        print(search_report(directory, as_json=args.json))
        return 0
    if (directory / RECORD).is_file() or not any(directory.glob(f"*/{RECORD}")):
        page, judgements = write_report(directory, targets=targets, artifact=args.artifact, verified=args.verified)
        document: dict[str, Any] = {"report": str(page), "verdicts": {j.target: j.verdict for j in judgements}}
    elif args.artifact is not None or args.verified is not None:
        raise HavocError(
            f"{directory} holds several runs; --artifact and --verified are of one: give that run's folder"
        )
    else:
        page = write_index(directory, targets=targets)
        document = {"index": str(page)}
    if args.json:
        _print_json(document)
    else:
        print(page)
    return 0


def handle_plan(args: argparse.Namespace) -> int:
    """Say what a model can reach on a target; exit 1 where every structure is proven to miss a limit."""
    from .plan import build_plan

    plan = build_plan(args.model, load_target(args.target))
    if args.json:
        _print_json(plan.document())
        return 1 if plan.is_impossible else 0
    print(
        f"{printable(f'{plan.model} on {plan.target} ({plan.target_title})')}: {plan.num_parameters:,} parameters, "
        f"{plan.prefill_flops / 1e9:.4g} GFLOP to read the prompt, {plan.decode_flops / 1e9:.3g} to write a token\n"
        f"peaks: {plan.peaks}\n"
    )
    metrics = plan.options[0].figures
    head = [f"{figure.metric} {figure.sign} {show(figure.limit, figure.unit)}" for figure in metrics]
    rows = [_option_cells(option) for option in plan.options]
    right = tuple(range(1, 3 + len(head)))
    print(table(("structure", "weights", "KV/token", *head, "outlook"), rows, numbers=right))
    print("\neach figure: certain bound / likely value\n")
    print(_samples_text(plan.samples))
    best = min((option.outlook for option in plan.options), key=("possible", "unlikely", "impossible").index)
    print(f"\n{emphasis(plan.conclusion, best)}")
    if plan.truncated:
        names = ", ".join(option.structure for option in plan.truncated)
        print(f"with ranks cut, by arithmetic alone and if its accuracy holds: {names}")
    return 1 if plan.is_impossible else 0


def _option_cells(option: Option) -> list[str]:
    figures = [f"{show(figure.floor, figure.unit)} / {show(figure.estimate, figure.unit)}" for figure in option.figures]
    return [
        option.structure,
        show(option.weight_bytes, "bytes"),
        show(option.kv_bytes_per_token, "bytes"),
        *figures,
        option.outlook,
    ]


def _samples_text(samples: dict[str, Any]) -> str:
    effort = f"{samples['min_processes']} processes, {samples['min_samples']} samples, {samples['min_busy_s']:g} s busy"
    none_over = ", ".join(f"{metric} {number}" for metric, number in samples["latency_none_over"].items())
    lines = [f"a verdict needs: {effort}" + (f"; with none over the limit at least {none_over}" if none_over else "")]
    for row in samples["accuracy"]:
        needed = "cannot be proven" if row["num_right"] is None else f"{row['num_right']} right"
        chance = ", ".join(f"{float(true):.0%} model {odds:.0%}" for true, odds in row["chance"].items())
        passes = f" (passes: {chance})" if chance else ""
        lines.append(f"to prove more than {row['share']:.0%} on {row['num_rows']} rows: {needed}{passes}")
    return "\n".join(lines)


def handle_doctor(args: argparse.Namespace) -> int:
    """Say what this machine can measure, what it cannot, and why."""
    from .doctor import examine, measured_device

    findings = examine()
    if args.json:
        device = measured_device()
        document = None if device is None else {"kind": device.kind, "name": device.name}
        _print_json({"device": document, "findings": [finding.document() for finding in findings]})
        return 0
    topic, rows = "", []
    for finding in findings:
        rows.append(["" if finding.topic == topic else finding.topic, finding.question, finding.answer, finding.reason])
        topic = finding.topic
    print(table(("about", "question", "answer", "because"), rows))
    return 0


def handle_eval(args: argparse.Namespace) -> int:
    """Score an artifact or a base by task, with exact 95 % intervals."""
    from ..adapt.dispatch_options import refuse_stray_options
    from .evaluate import evaluate, pooled

    if args.experts is not None or args.dispatch:
        return _eval_dispatch(args)
    refuse_stray_options(args, {})
    scoring = replace(_scoring(args), split=args.split, seed=args.seed, max_new_tokens=args.max_new_tokens)
    found = evaluate(
        args.model,
        scoring,
        alpha=args.alpha,
        device=args.device,
        num_threads=args.threads,
        progress=_progress(args),
    )
    document = found.document()
    if args.json:
        mixed = {"mixed": pooled(found.tasks)} if args.mixed else {}
        about = {"model": args.model, "split": args.split, "made_on": found.made_on, "accuracy": document, **mixed}
        _print_json({**about, "notes": list(found.notes)})
        return 0
    cells = [cell for task, row in document.items() for cell in _accuracy_cells(task, row)]
    if args.mixed:
        counts = pooled(found.tasks)
        cells.append(["mixed", "", *_share_cells(counts), "all rows of all tasks"])
    print(table(("task", "metric", "accuracy", "95 % interval", "right", ""), cells, numbers=(2, 3, 4)))
    print()
    for task, row in document.items():
        print(_source_line(task, row))
    for note in found.notes:
        print(note)
    return 0


def _source_line(task: str, row: dict[str, Any]) -> str:
    """Where a task's rows came from, with the hashes by which others find the same."""
    hashes = [f"{name} {row[key][:12]}" for name, key in _HASHES.items() if row[key] is not None]
    return f"{task}: {printable(row['source'])}, {row['split']} split; SHA-256: {', '.join(hashes)}"


_HASHES = {"rows": "rows_sha256", "task": "task_sha256", "data": "data_sha256"}


def _accuracy_cells(task: str, row: dict[str, Any]) -> list[list[str]]:
    """One line for each metric of a task, the one that `accuracy/<task>` means first."""
    names = sorted(row["metrics"], key=lambda name: name != row["metric"])
    shots = f"{row['few_shot']}-shot" if row["few_shot"] else ""
    failed = count(row["num_failed"], "judge") + " failed" if row["num_failed"] else ""
    chat = "chat template" if row["chat"] else ""
    remarks = ", ".join(filter(None, (chat, shots, failed)))
    return [
        [
            "" if place else task,
            name,
            *_share_cells(counts),
            "" if place else remarks,
        ]
        for place, (name, counts) in enumerate((name, row["metrics"][name]) for name in names)
    ]


def _share_cells(counts: Mapping[str, Any]) -> list[str]:
    """A share, its interval, and the rows it is of."""
    return [
        show(counts["num_right"] / counts["num_rows"], "share"),
        show_interval(counts["low"], counts["high"], "share"),
        f"{counts['num_right']} of {counts['num_rows']}",
    ]


def _eval_dispatch(args: argparse.Namespace) -> int:
    """Hold two-pass inference of a base against what it must beat."""
    from ..adapt.dispatch_options import few_shot_search, require_experts_to_choose
    from ..adapt.dispatch_table import DispatchSettings
    from .dispatched import evaluate_dispatch
    from .report.dispatch_tables import dispatch_lines

    require_experts_to_choose(args)
    settings = DispatchSettings(
        ways=args.dispatch,
        split=args.split,
        num_rows=args.n,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        fixed=args.alpha,
        examples_file=args.examples_from,
        search=few_shot_search(
            seed=args.seed,
            population=args.population,
            elite_share=args.elite_share,
            generations=args.generations,
            alpha_bounds=args.alpha_bounds,
        ),
        data_dir=args.data,
        online=args.online,
        **({} if args.examples is None else {"num_examples": args.examples}),
    )
    document = evaluate_dispatch(
        args.model,
        args.experts,
        settings,
        tasks=tuple(args.task or ()),
        few_shot=args.few_shot,
        is_chat=args.is_chat,
        device=args.device or "cpu",
        num_threads=args.threads,
        progress=_progress(args),
    )
    if args.json:
        _print_json({"model": args.model, **document})
    else:
        print("\n".join(dispatch_lines(document)))
    return 0


def _progress(args: argparse.Namespace) -> Any:  # noqa: ANN401 - a Progress, whose module is imported late
    from ..progress import make_progress

    return make_progress(quiet=args.quiet)


def _print_json(document: object) -> None:
    try:
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
    except ValueError as error:
        raise HavocError(f"the result holds a number that JSON cannot hold: {error}") from error
    print()
