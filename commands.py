"""Handlers of the verbs that need every room: `havoc run` and `havoc search`."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING, Any

from . import storage
from .cluster.address import Address, TlsFiles
from .config import load_recipe
from .cores import limit_threads, threads_for
from .errors import HavocError
from .progress import make_progress
from .tracking import log_search, open_tracking, with_trackers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from .cluster.fleet import Fleet
    from .config import Recipe
    from .progress import Progress


def handle_run(args: argparse.Namespace) -> int:
    """Run the pipeline, show its tables, and exit with the verdict for the first target."""
    from .bench.report.phase6 import read_handed_over
    from .pipeline import run
    from .summary import show_run

    recipe = with_trackers(load_recipe(args.recipe), args.track)
    handed = None if args.handoff is None else read_handed_over(args.handoff)
    progress = make_progress(quiet=args.quiet)
    words = [*([str(args.recipe)] if args.recipe else []), *(["--handoff", str(args.handoff)] if handed else [])]
    words += ["--cluster", args.cluster] if args.cluster else []
    command = shlex.join(["havoc", "run", *words, "--out", str(args.out)])
    with opened_fleet(args.cluster, _tls_files(args), recipe, progress) as fleet:
        judgements = run(
            recipe, args.out, handed=handed, command=command, num_threads=args.threads, fleet=fleet, progress=progress
        )
    show_run(args.out, judgements, as_json=args.json)
    return judgements[0][1].exit_code


def handle_search(args: argparse.Namespace) -> int:
    """Search mixture and structure of experts that are there; write `search/journal.jsonl` and `front.json`."""
    from .adapt.basis import base_basis
    from .jobs import Place
    from .measuring import require_device
    from .model.checkpoint import load_base
    from .pipeline import (
        forget_undone,
        read_experts,
        require_change,
        require_experts,
        require_inputs,
        search_mixture,
        searched_on,
    )
    from .summary import export_command, show_search

    recipe = with_trackers(load_recipe(args.recipe), args.track)
    model = {"base": args.base, "chat": recipe.model.chat and args.is_chat}
    model |= {"device": args.device or recipe.model.device}
    data = {"source": str(args.data) if args.data else recipe.data.source, "online": args.online or recipe.data.online}
    search_changes: dict[str, Any] = {} if args.seed is None else {"seed": args.seed}
    search_changes |= {"on_this_machine": True} if args.on_this_machine else {}
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update=data),
            "search": recipe.search.model_copy(update=search_changes),
            "gate": recipe.gate.model_copy(update={"targets": (args.target,)}),
        }
    )
    require_inputs(recipe)
    progress = make_progress(quiet=args.quiet)
    with contextlib.ExitStack() as opened:
        fleet = opened.enter_context(opened_fleet(args.cluster, _tls_files(args), recipe, progress))
        require_device(recipe)
        require_experts(recipe, args.experts)
        bound = searched_on(recipe, args.out, fleet)
        base = load_base(recipe.model.base, is_chat=recipe.model.chat)
        _ = base.tokenizer  # a base that cannot read text is refused before any work
        limit_threads(threads_for(base.model.num_parameters(), num_threads=args.threads))
        opened.enter_context(storage.only_writer(args.out))
        tracking = opened.enter_context(open_tracking(recipe, args.out, job="search"))
        basis = base_basis(base, args.out, progress)
        experts = read_experts(recipe, args.experts, base, basis)
        require_change(experts, progress)
        place = Place(recipe, args.out, args.experts, args.threads)
        forget_undone(place, tracking)
        result = search_mixture(place, base, experts, progress, bound=bound, fleet=fleet, record=tracking.log)
        log_search(tracking, result, [expert.domain for expert in experts])
    command = export_command(
        result, recipe, [expert.domain for expert in experts], base=args.base, experts=args.experts
    )
    show_search(result, [expert.domain for expert in experts], args.out, command=command, as_json=args.json)
    return 0


def _tls_files(args: argparse.Namespace) -> TlsFiles:
    return TlsFiles(authority=args.tls_ca, certificate=args.tls_cert, key=args.tls_key)


@contextlib.contextmanager
def opened_fleet(cluster: str | None, tls: TlsFiles, recipe: Recipe, progress: Progress) -> Iterator[Fleet | None]:
    """Connect to the workers of `--cluster`, as `cluster.fleet.Fleet.connect` does; None without that option."""
    if cluster is None:
        if tls != TlsFiles():
            raise HavocError("--tls-ca, --tls-cert and --tls-key are for --cluster tls://HOST:PORT, which is not given")
        yield None
        return
    if recipe.model.device != "cpu":
        raise HavocError("--cluster: workers compute on their CPUs: leave out --device, and device in [model]")
    from .cluster.fleet import Fleet

    with Fleet.connect(Address.parse(cluster), tls, progress) as fleet:
        yield fleet
