"""Handlers of the verbs that measure and judge: bench, gate, compare, duel, history, report, plan, doctor and others.

Each prints one table for people, or one document with --json; the exit code is the verdict.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import storage
from ..errors import HavocError
from .judge.disturbance import disturbed_share
from .judge.metrics import measured
from .judge.targets import load_target, require_known_tasks, require_pinned
from .record_folder import DERIVED, keep, previous_record, record_path
from .report.terminal import accuracy_text, capabilities_text, comparison_text, judgement_text, plan_text, record_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..adapt.tasks.evaluation import Scoring
    from ..progress import Progress
    from .accuracy import AccuracyRun
    from .contender import Contender
    from .divergence import Divergence
    from .judge.record import Cpu, Record
    from .judge.schema import Workload


EVERY_ENGINE = "all"


def handle_gate(args: argparse.Namespace) -> int:
    """Judge records against a target; the exit code is the verdict."""
    from ..export.runtime.verification import load_verified
    from .judge.gate import hash_measured, judge
    from .judge.record import load_record

    if args.nonce is not None and args.keyring is None:
        raise HavocError("--nonce needs a signature to compare with: give the keys with --require-signature KEYRING")
    target = load_target(args.target)
    paths = [record_path(path) for path in args.records]
    records = [load_record(path) for path in paths]
    signed_by = () if args.keyring is None else _signers(paths, records, args.keyring, args.nonce)
    require_known_tasks(target, [task for record in records for task in record.accuracy])
    require_pinned(target, records)
    files = None if args.artifact is None else hash_measured(args.artifact, records[0].subject)
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


def handle_bench(args: argparse.Namespace) -> int:
    """Measure an artifact here, then its accuracy, and write one record; exit 4 if the measurement is invalid.

    Another engine's model is measured in the same way, without accuracy.
    """
    models = args.artifact
    if args.engine != EVERY_ENGINE and len(models) > 1:
        raise HavocError(f"{len(models)} models need --engine {EVERY_ENGINE}, one with any other")
    storage.require_writable(args.out)  # otherwise minutes of measuring would be lost
    with storage.only_writer(args.out):  # a second writer would replace the first one's record
        if args.engine == EVERY_ENGINE:
            return _bench_everywhere(args)
        (args.artifact,) = models
        return _bench(args)


def _bench_everywhere(args: argparse.Namespace) -> int:
    """Measure models in every engine that opens them; exit 4 if a measurement is invalid, 2 if there is none."""
    from .engine_table import bench_everywhere
    from .report.tables import engines_table

    artifacts_alone = {"--n": args.n, "--task": args.task, "--alpha": args.alpha, "--sign": args.sign}
    for option in (name for name, value in artifacts_alone.items() if value):
        raise HavocError(f"{option} is for one artifact: leave it out with --engine {EVERY_ENGINE}")
    if any(args.out.glob("*/record.json")) and not args.replace:
        raise HavocError(f"{args.out} holds records already: choose another folder for --out, or give --replace")
    workload, _, num_threads = work_asked(args)
    rows = bench_everywhere(
        args.artifact,
        out=args.out,
        pythons=args.engine_python,
        profile=args.profile,
        num_threads=num_threads,
        workload=workload,
        wait_s=args.wait,
        progress=_progress(args),
    )
    if args.json:
        _print_json([row.document() for row in rows])
    else:
        print(engines_table(rows))
    found = [row for row in rows if row.record is not None]
    if not found:
        return HavocError.exit_code
    return 4 if any(row.reason for row in found) else 0


def _bench(args: argparse.Namespace) -> int:
    from .accuracy import add_accuracy, require_rows
    from .contender import engine_of, enter
    from .judge.answer import load_answerer, require_nonce
    from .judge.gate import why_invalid
    from .judge.record import load_record
    from .measure import measure
    from .subject import identify_subject

    out: Path = args.out
    engine = args.engine or engine_of(args.artifact)
    path = out / "record.json"
    workload, provider, num_threads = work_asked(args)
    if path.exists() and not args.replace:
        raise HavocError(f"{out} holds a record already: choose another folder for --out, or give --replace")
    if args.challenge is not None and args.sign is None:
        raise HavocError("--challenge needs a signature: give the key with --sign KEY")
    nonce = None if args.challenge is None else require_nonce(args.challenge)
    answerer = None if args.sign is None else load_answerer(args.sign)
    if engine is not None and (args.n or args.task):
        raise HavocError(
            f"{args.artifact}: another engine's model is measured without accuracy: leave out --n and --task"
        )
    is_scored = engine is None and args.n != 0
    if is_scored:
        identify_subject(Path(args.artifact))
        require_rows(Path(args.artifact), _scoring(args))
    progress = _progress(args)
    with contextlib.ExitStack() as stack:
        model = None
        if engine is not None:
            model = stack.enter_context(enter(args.artifact, pythons=args.engine_python, engine=engine))
        record = measure(
            model or Path(args.artifact),
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
    for name in DERIVED:  # old pages would describe the replaced record
        (out / name).unlink(missing_ok=True)
    notes: list[str] = []
    if is_scored:
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
    """Score the artifact for `havoc bench`; an error says that the measurement is kept."""
    from .accuracy import run_accuracy

    try:
        return run_accuracy(
            Path(args.artifact), _scoring(args), alpha=args.alpha, num_threads=args.threads, progress=progress
        )
    except HavocError as error:
        raise type(error)(f"{error}; the measurement is kept in {record_path}, without accuracy") from error


def _scoring(args: argparse.Namespace) -> Scoring:
    """Return the tasks and rows for `bench` and `eval`; the split is gate unless `eval` has another."""
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
    """Workload, provider and threads for `bench`: from the options, else from the target."""
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


def _checks(record: Record) -> list[dict[str, Any]]:
    return [check.model_dump(mode="json") for check in record.checks]


def handle_compare(args: argparse.Namespace) -> int:
    """Show the ratio of each metric of two records with its interval; exit 1 if the result is in `--fail-if`."""
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
    print(comparison_text(rows, warnings))
    return code


def handle_duel(args: argparse.Namespace) -> int:
    """Measure two sides in turns; exit 0 if the new one is proven equal or better, 1 if worse, 3 if undecided."""
    from ..export.runtime.devices import CPU_PROVIDER
    from .contender import enter
    from .duel import (
        EXIT_CODES,
        answer_rows,
        common_ids,
        differences,
        document,
        duel,
    )
    from .judge.paired_rows import joined
    from .judge.schema import Workload
    from .report.markdown import duel_markdown
    from .report.terminal import duel_text

    _refuse_two_forms(args)
    if not args.margin:
        raise HavocError("no measurement can prove a margin of 0: give a larger --margin, such as 0.02 for 2 %")
    scoring = _scoring(args) if args.task else None
    if scoring is None and (args.n is not None or args.data is not None or args.online):
        raise HavocError("--n, --data and --online need a task to score: give --task")
    num_tokens = args.prompt_tokens
    work = Workload(prompt_tokens=num_tokens, context_tokens=num_tokens, decode_tokens=args.decode_tokens)
    with enter(args.old, pythons=args.engine_python) as old, enter(args.new, pythons=args.engine_python) as new:
        _require_sides((old, new), args, work, scoring)
        outcome = duel(
            old.side("old"),
            new.side("new"),
            margin=args.margin,
            max_time_s=args.max_time,
            workload=work,
            provider=args.provider or CPU_PROVIDER,
            num_threads=args.threads,
            num_ids=None if old.engine is new.engine is None else common_ids(old, new),
            progress=_progress(args),
            on=args.on,
        )
        accuracy = []
        if scoring is not None:
            margin, threads = args.accuracy_margin, args.threads
            accuracy = answer_rows(old, new, scoring, margin=margin, num_threads=threads, progress=_progress(args))
        far = None if args.reference is None else _divergence(args, old, new)
        for side in (old, new):
            side.require_unchanged()
        notes = list(differences(old, new))
    code = EXIT_CODES[joined([outcome.verdict, *(row.shift for row in accuracy)])]
    if args.json:
        _print_json(document(outcome, args.margin, old, new, notes, args.on, accuracy, far))
        return code
    if args.markdown:
        sides, told = (args.old, args.new), [*notes, *([] if far is None else [far.sentence()])]
        print(duel_markdown(outcome, args.margin, sides, told, answers=accuracy, answer_margin=args.accuracy_margin))
        return code
    print(
        duel_text(
            outcome,
            args.margin,
            notes,
            answers=accuracy,
            answer_margin=args.accuracy_margin,
            far=far,
            max_time_s=args.max_time,
        )
    )
    return code


def handle_history(args: argparse.Namespace) -> int:
    """Sort the records of a folder by time and find lasting changes; exit 1 with `--fail-if alarm` and an alarm."""
    from .past_records import read_history
    from .report.history_text import history_markdown, history_text

    _refuse_two_forms(args)
    target = None if args.target is None else load_target(args.target)
    history = read_history(args.directory, target=target, margin=args.margin)
    standing = [alarm for alarm in history.alarms if alarm.stands and alarm.created_utc >= (args.since or "")]
    if args.json:
        _print_json(history.document())
    else:
        print(history_markdown(history) if args.markdown else history_text(history))
    return 1 if args.fail_if == "alarm" and standing else 0


def _refuse_two_forms(args: argparse.Namespace) -> None:
    if args.json and args.markdown:
        raise HavocError("--json and --markdown exclude each other: give one of them")


def _require_sides(
    sides: tuple[Contender, Contender], args: argparse.Namespace, work: Workload, scoring: Scoring | None
) -> None:
    """Refuse, before anything is measured, a side that lacks a feature that is needed from both."""
    from ..export.runtime.devices import CPU_PROVIDER
    from .duel import require_answers, require_room, require_told

    for side in sides:
        require_room(side, work)
        require_told(side, args.on)
        if side.engine is not None and (args.provider or CPU_PROVIDER) != CPU_PROVIDER:
            raise HavocError(f"{side.shown}: another engine runs on the CPU only; leave out --provider")
    if scoring is not None:
        require_answers(sides, scoring)


def _divergence(args: argparse.Namespace, old: Contender, new: Contender) -> Divergence:
    """Measure how far both sides are from a reference."""
    from .contender import enter
    from .divergence import divergence

    with enter(args.reference, pythons=args.engine_python) as reference:
        found = divergence(reference, old, new, num_threads=args.threads)
        reference.require_unchanged()
    return found


def handle_report(args: argparse.Namespace) -> int:
    """Write the pages of one measured folder, or of every run in it with an index above them.

    For a search without a record, running or finished, the state of its journal is shown instead.
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
                f"{directory}: contains a search but no {RECORD} yet, so --target, --artifact and --verified have "
                "nothing to judge: leave them out"
            )
        print(search_report(directory, as_json=args.json))
        return 0
    if (directory / RECORD).is_file() or not any(directory.glob(f"*/{RECORD}")):
        page, judgements = write_report(directory, targets=targets, artifact=args.artifact, verified=args.verified)
        document: dict[str, Any] = {"report": str(page), "verdicts": {j.target: j.verdict for j in judgements}}
    elif args.artifact is not None or args.verified is not None:
        raise HavocError(
            f"{directory} contains several runs, but --artifact and --verified belong to one: give that run's folder"
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
    """Say what a model can reach on a target; exit 1 if every structure is proven to miss a limit."""
    from .plan import build_plan

    plan = build_plan(args.model, load_target(args.target))
    if args.json:
        _print_json(plan.document())
        return 1 if plan.is_impossible else 0
    print(plan_text(plan))
    return 1 if plan.is_impossible else 0


def handle_doctor(args: argparse.Namespace) -> int:
    """Say what this machine can and cannot measure, and why."""
    from .doctor import examine, measured_device

    findings = examine()
    if args.json:
        device = measured_device()
        document = None if device is None else {"kind": device.kind, "name": device.name}
        _print_json({"device": document, "findings": [finding.document() for finding in findings]})
        return 0
    print(capabilities_text(findings))
    return 0


def handle_baselines(args: argparse.Namespace) -> int:
    """Train and score SVF, LoRA and others with one budget, and write one report."""
    from pathlib import Path

    from ..adapt.baselines import BaselineSettings, run_baselines
    from ..adapt.basis import base_basis
    from ..adapt.tasks.sight import require_sight
    from ..adapt.tasks.task import load_task
    from ..config import ExpertSettings
    from ..cores import limit_threads, threads_for
    from ..jobs import training_settings
    from ..model.checkpoint import load_base
    from .report.baselines import lines, write_baselines

    task = load_task(args.task, data_dir=args.data, online=args.online)
    # one draw per step, so that every arm sees the same number of prompts
    shared = {"num_steps": args.steps, "prompts_per_step": args.prompts, "max_draws": 1}
    shared |= {"num_validation_rows": args.search_rows, "validate_every": max(1, args.steps // _VALIDATIONS)}
    experts = ExpertSettings(**shared)
    settings = BaselineSettings(
        training=training_settings(experts, task),
        arms=args.arms,
        seeds=args.seeds,
        rates=args.rates,
        lora_rates=args.lora_rates,
        rank=args.rank,
        kind=args.kind,
        num_gate_rows=args.n,
        data_dir=args.data,
        online=args.online,
    )
    progress = _progress(args)
    with storage.only_writer(args.out):
        base = load_base(args.base, is_chat=args.is_chat)
        _ = base.tokenizer  # a base that cannot read text is refused before any work
        require_sight(task, base)
        limit_threads(threads_for(base.model.num_parameters(), num_threads=args.threads))
        basis = base_basis(base, args.out, progress)
        found = run_baselines(base, basis, task, settings, args.out, progress=progress)
        document = {**found, "model": Path(args.base).name, "command": _baselines_command(args)}
        page = write_baselines(document, args.out)
    if args.json:
        _print_json(document)
    else:
        print(f"{lines(document)}\n\nreport: {page}")
    return 0


def _baselines_command(args: argparse.Namespace) -> str:
    """The command that repeats the comparison."""
    import shlex

    def joined(values: Sequence[float]) -> str:
        return ",".join(f"{value:g}" for value in values)

    words = ["havoc", "baselines", args.base, "--task", args.task, "--arms", ",".join(args.arms)]
    words += ["--seeds", joined(args.seeds), "--steps", str(args.steps), "--prompts", str(args.prompts)]
    words += ["--rates", joined(args.rates), "--lora-rates", joined(args.lora_rates), "--rank", str(args.rank)]
    words += ["--kind", args.kind, "--n", str(args.n), "--search-rows", str(args.search_rows)]
    words += [] if args.data is None else ["--data", str(args.data)]
    words += [*(["--online"] if args.online else []), *([] if args.is_chat else ["--no-chat"])]
    return shlex.join([*words, "--out", str(args.out)])


_VALIDATIONS = 4
"""Number of validations in a training of `havoc baselines`, without that of the base before the first step."""


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
    print(accuracy_text(document, pooled(found.tasks) if args.mixed else None, found.notes))
    return 0


def _eval_dispatch(args: argparse.Namespace) -> int:
    """Compare two-pass inference of a base with the systems that it must beat."""
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
        raise HavocError(f"the result has a number that JSON cannot represent: {error}") from error
    print()
