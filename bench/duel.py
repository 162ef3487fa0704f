"""Is the new of two artifacts slower, or another engine's model? Both take turns until the answer is proven.

A block is a fresh process of each (`lockstep.py`); after each block the intervals of `paired.py` are looked at, and the
first proven answer ends the duel. Looking again and again would prove anything in the end, so each look spends its part
of what may go wrong (`confidence_at_look`): the answer holds at 99 % whenever it comes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError
from .judge.paired import CONFIDENCE, Block, Paired, confidence_at_look, judge_blocks, verdict_of
from .lockstep import Side, blocks_in_lockstep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..progress import Progress
    from .contender import Contender
    from .judge.paired import Shift
    from .judge.schema import Workload

MOST_BLOCKS: Final = 64
FEWEST_BLOCKS: Final = 4
EXIT_CODES: Final[dict[Shift, int]] = {"worse": 1, "better": 0, "equal": 0, "undecided": 3}


@dataclass(slots=True)
class Agreement:
    """How far both sides' greedy tokens agree behind the same prompts.

    Tokens count up to the first that differs, for behind it each side goes on from another text. A token that an engine
    does not tell (below 0) is taken for the same: where it was not, the next ones differ.
    """

    num_prompts: int = 0
    num_first_same: int = 0
    num_tokens: int = 0
    num_same: int = 0

    def hear(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Count one prompt's tokens."""
        pairs = enumerate(zip(old, new, strict=True))
        same = next((place for place, pair in pairs if min(pair) >= 0 and pair[0] != pair[1]), len(old))
        self.num_prompts += 1
        self.num_first_same += same > 0
        self.num_tokens += len(old)
        self.num_same += same

    def sentence(self) -> str:
        """The counts, for people."""
        return (
            f"greedy tokens behind the same random prompts: the first is the same in {self.num_first_same} of "
            f"{self.num_prompts}, and {self.num_same:,} of {self.num_tokens:,} come before the first that differs"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DuelOutcome:
    """What a duel found: one word, the intervals of the last look, how many blocks it took, and who said what."""

    verdict: Shift
    rows: Sequence[Paired]
    num_blocks: int
    agreement: Agreement | None = None


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
    num_ids: int | None,
    progress: Progress,
) -> DuelOutcome:
    """Measure two sides in lockstep until slower, faster or equal is proven, at most `max_time_s` seconds.

    Prompts are drawn from the first `num_ids` token ids. Raises `MeasurementError` under its name for a side that does
    not run, `HavocError` for an engine that cannot open its model.
    """
    agreement = Agreement()
    blocks = blocks_in_lockstep(
        old,
        new,
        num_blocks=MOST_BLOCKS,
        budget_s=max_time_s,
        workload=workload,
        provider=provider,
        num_threads=num_threads,
        num_ids=num_ids,
        hear=agreement.hear,
    )
    with progress.stage(f"{old.name} against {new.name}", None, unit="blocks") as stage:
        return replace(judge_until_proven(blocks, margin=margin, advance=stage.advance), agreement=agreement)


def require_room(side: Contender, work: Workload) -> None:
    """Refuse a workload that the model's context does not hold, before anything is measured."""
    needed, there = work.prompt_tokens + work.decode_tokens, side.max_tokens
    if there is not None and needed > there:
        raise HavocError(
            f"{side.shown}: {work.prompt_tokens} prompt tokens and {work.decode_tokens} decoded ones need a "
            f"context of {needed}, the model has {there}: use a smaller --prompt-tokens or --decode-tokens"
        )


def common_ids(old: Contender, new: Contender) -> int | None:
    """How many token ids both sides know; None where neither tells."""
    return min((side.num_ids for side in (old, new) if side.num_ids is not None), default=None)


def differences(old: Contender, new: Contender) -> Iterator[str]:
    """What a reader should know of the two: the same files, other models, another engine."""
    if old.identity == new.identity:
        yield "both are the same artifact or model: any difference is the machine's"
    elif old.engine is None and new.engine is None and old.base_hash != new.base_hash:
        yield "they were made from different bases: this compares two models, not two exports of one"
    if {old.num_ids, new.num_ids} - {None, common_ids(old, new)}:
        yield f"one model has {old.num_ids} token ids, the other {new.num_ids}: prompts use those of both"
    if any(side.engine == "llama_cpp" for side in (old, new)):
        yield "llama.cpp is asked over HTTP, as its users do"
    if any("address" in side.identity for side in (old, new)):
        yield "a server at an address tells no CPU time, and has its own threads"


def document(
    outcome: DuelOutcome, margin: float, old: Contender, new: Contender, notes: Sequence[str]
) -> dict[str, Any]:
    """Return the duel as plain JSON."""
    return {
        "verdict": outcome.verdict,
        "exit_code": EXIT_CODES[outcome.verdict],
        "margin": margin,
        "confidence": CONFIDENCE,
        "num_blocks": outcome.num_blocks,
        "old": old.identity,
        "new": new.identity,
        "notes": list(notes),
        "agreement": None if outcome.agreement is None else asdict(outcome.agreement),
        "rows": [asdict(row) for row in outcome.rows],
    }
