"""The options of two-pass inference on a command line, checked before a base is opened. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError
from .alpha_search import CrossEntropySettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

FEW_SHOT: Final = "few-shot"
_OF_FEW_SHOT: Final = {
    "examples": "--examples",
    "examples_from": "--examples-from",
    "population": "--population",
    "elite_share": "--elite-share",
    "generations": "--generations",
    "alpha_bounds": "--alpha-bounds",
}
_BOUNDS: Final = 2


def ways_of(args: argparse.Namespace) -> Sequence[str]:
    """The chosen ways of dispatch: `eval` takes several, `generate` one."""
    asked = args.dispatch or ()
    return (asked,) if isinstance(asked, str) else tuple(asked)


def require_experts_to_choose(args: argparse.Namespace) -> None:
    """Refuse dispatch without a folder of experts, and few-shot options without few-shot dispatch."""
    if args.experts is None:
        raise HavocError(f"--dispatch {','.join(ways_of(args))} needs experts to choose from: give --experts DIR")
    if not args.experts.is_dir():
        raise HavocError(f"--experts {args.experts}: no such directory")
    if FEW_SHOT not in ways_of(args):
        _refuse(args, _OF_FEW_SHOT, "--dispatch few-shot")


def refuse_stray_options(args: argparse.Namespace, others: Mapping[str, str]) -> None:
    """Refuse options that have no effect without dispatch; `others` are further ones of the command, by attribute."""
    _refuse(args, {**others, **_OF_FEW_SHOT}, "--experts DIR and --dispatch")


def _refuse(args: argparse.Namespace, options: Mapping[str, str], needed: str) -> None:
    for name, option in options.items():
        if getattr(args, name) not in (None, False):
            raise HavocError(f"{option} has no effect without {needed}: add it, or leave {option} out")


def few_shot_search(
    *,
    seed: int,
    population: int | None,
    elite_share: float | None,
    generations: int | None,
    alpha_bounds: tuple[float, ...] | None,
) -> CrossEntropySettings:
    """Settings of the search over alpha from the options; None stands for the default."""
    if alpha_bounds is not None and len(alpha_bounds) != _BOUNDS:
        raise HavocError(f"--alpha-bounds has {len(alpha_bounds)} numbers: give two, for example 0,1")
    low, high = (None, None) if alpha_bounds is None else alpha_bounds
    options = {
        "population": population,
        "elite_share": elite_share,
        "generations": generations,
        "low": low,
        "high": high,
    }
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return CrossEntropySettings(seed=seed, **changes)
