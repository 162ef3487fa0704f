"""Is the new of two artifacts slower? Both are measured in lockstep until the answer is proven.

A block is a fresh process of each (`lockstep.py`); after each block the intervals of `paired.py` are looked at, and the
first proven answer ends the duel. Looking again and again would prove anything in the end, so each look spends its part
of what may go wrong (`confidence_at_look`): the answer holds at 99 % whenever it comes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError
from ..model.config_file import read_config
from .judge.paired import CONFIDENCE, Block, Paired, confidence_at_look, judge_blocks, verdict_of
from .lockstep import Side, blocks_in_lockstep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..export.runtime.held import HeldArtifact
    from ..progress import Progress
    from .judge.paired import Shift
    from .judge.schema import Workload

MOST_BLOCKS: Final = 64
FEWEST_BLOCKS: Final = 4
EXIT_CODES: Final[dict[Shift, int]] = {"worse": 1, "better": 0, "equal": 0, "undecided": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class DuelOutcome:
    """What a duel found: one word, the intervals of the last look, and how many blocks it took."""

    verdict: Shift
    rows: Sequence[Paired]
    num_blocks: int


def _stay() -> None:
    """Tell nobody."""


def judge_until_proven(blocks: Iterable[Block], *, margin: float, advance: Callable[[], None] = _stay) -> DuelOutcome:
    """Look after each block from the `FEWEST_BLOCKS`-th on; stop at the first proven answer, or when blocks end."""
    seen: list[Block] = []
    rows: list[Paired] = []
    for block in blocks:
        seen.append(block)
        advance()
        number = max(1, len(seen) - FEWEST_BLOCKS + 1)
        rows = judge_blocks(seen, margin=margin, confidence=confidence_at_look(number))
        if len(seen) >= FEWEST_BLOCKS and (word := verdict_of(rows)) != "undecided":
            return DuelOutcome(verdict=word, rows=rows, num_blocks=len(seen))
    return DuelOutcome(verdict="undecided", rows=rows, num_blocks=len(seen))


def duel(
    old: Side,
    new: Side,
    *,
    margin: float,
    max_time_s: float,
    workload: Workload,
    provider: str,
    num_threads: int,
    progress: Progress,
) -> DuelOutcome:
    """Measure two artifacts in lockstep until slower, faster or equal is proven, at most `max_time_s` seconds.

    Raises `MeasurementError` under its name for a side that does not run.
    """
    blocks = blocks_in_lockstep(
        old,
        new,
        num_blocks=MOST_BLOCKS,
        budget_s=max_time_s,
        workload=workload,
        provider=provider,
        num_threads=num_threads,
    )
    with progress.stage(f"{old.name} against {new.name}", None, unit="blocks") as stage:
        return judge_until_proven(blocks, margin=margin, advance=stage.advance)


def require_room(held: HeldArtifact, work: Workload) -> None:
    """Refuse a workload that the model's context does not hold, before anything is measured."""
    needed, there = work.prompt_tokens + work.decode_tokens, read_config(held.place).max_seq_len
    if needed > there:
        raise HavocError(
            f"{held.directory}: {work.prompt_tokens} prompt tokens and {work.decode_tokens} decoded ones need a "
            f"context of {needed}, the model has {there}: use a smaller --prompt-tokens or --decode-tokens"
        )


def differences(old: HeldArtifact, new: HeldArtifact) -> Iterator[str]:
    """What a reader should know of the two: the same files, or other models."""
    if old.hashes == new.hashes:
        yield "both are the same artifact: any difference is the machine's"
    elif old.manifest.base_hash != new.manifest.base_hash:
        yield "they were made from different bases: this compares two models, not two exports of one"


def document(
    outcome: DuelOutcome, margin: float, old: HeldArtifact, new: HeldArtifact, notes: Sequence[str]
) -> dict[str, Any]:
    """Return the duel as plain JSON."""
    return {
        "verdict": outcome.verdict,
        "exit_code": EXIT_CODES[outcome.verdict],
        "margin": margin,
        "confidence": CONFIDENCE,
        "num_blocks": outcome.num_blocks,
        "old": {"artifact": str(old.directory), "manifest_sha256": old.manifest.sha256},
        "new": {"artifact": str(new.directory), "manifest_sha256": new.manifest.sha256},
        "notes": list(notes),
        "rows": [asdict(row) for row in outcome.rows],
    }
