"""A duel: is the new artifact, or another engine's model, worse than the old? Both run in turns until this is proven.

A block is one fresh process of each side (`lockstep.py`). After each block the duel looks at the intervals of
`paired.py`, and the first proven answer ends it. Repeated looks would prove anything in the end, so each look uses only
its part of the error rate (`confidence_at_look`): the answer holds at 99 %, whenever it comes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError
from .accuracy import require_rows, run_accuracy
from .engines import ENGINES
from .judge.paired import CONFIDENCE, Block, Paired, confidence_at_look, judge_blocks, verdict_of
from .judge.paired_rows import PairedRows, joined, judge_rows
from .judge.schema import asked_apart
from .lockstep import Side, blocks_in_lockstep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..adapt.tasks.evaluation import Scoring
    from ..progress import Progress
    from .contender import Contender
    from .divergence import Divergence
    from .judge.paired import Group, Shift
    from .judge.schema import Workload

MOST_BLOCKS: Final = 64
FEWEST_BLOCKS: Final = 4
EXIT_CODES: Final[dict[Shift, int]] = {"worse": 1, "better": 0, "equal": 0, "undecided": 3}


@dataclass(slots=True)
class Agreement:
    """How far both sides' greedy tokens agree after the same prompts.

    Tokens count up to the first difference, because each side continues from another text after it. A token that an
    engine does not report (below 0) counts as the same; if it was not the same, the next tokens differ.
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
            f"greedy tokens after the same random prompts: the first is the same in {self.num_first_same} of "
            f"{self.num_prompts}, and {self.num_same:,} of {self.num_tokens:,} come before the first difference"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DuelOutcome:
    """The result of a duel: one word, the intervals of the last look, the number of blocks, and both sides' facts."""

    verdict: Shift
    rows: Sequence[Paired]
    num_blocks: int
    agreement: Agreement | None = None


def _stay() -> None:
    """Ignore the answer."""


def judge_until_proven(
    blocks: Iterable[Block],
    *,
    margin: float,
    on: Sequence[Group] = ("latency",),
    advance: Callable[[], None] = _stay,
) -> DuelOutcome:
    """Look after each block from number `FEWEST_BLOCKS` on; stop at the first proven answer or after the last block."""
    seen: list[Block] = []
    rows: list[Paired] = []
    for block in blocks:
        seen.append(block)
        advance()
        number = max(1, len(seen) - FEWEST_BLOCKS + 1)
        rows = judge_blocks(seen, margin=margin, confidence=confidence_at_look(number), on=on)
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
    on: Sequence[Group] = ("latency",),
) -> DuelOutcome:
    """Measure two sides in lockstep until worse, better or equal is proven, at most `max_time_s` seconds.

    The metrics of `on` decide; the others are measured and shown. Prompts are drawn from the first `num_ids` token ids.
    Raises `MeasurementError` with the side's name if a side does not run, and `HavocError` if an engine cannot open its
    model.
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
        return replace(judge_until_proven(blocks, margin=margin, on=on, advance=stage.advance), agreement=agreement)


def require_room(side: Contender, work: Workload) -> None:
    """Refuse a workload that does not fit into a model's context, before anything is measured."""
    needed, there = work.prompt_tokens + work.decode_tokens, side.max_tokens
    if there is not None and needed > there:
        raise HavocError(
            f"{side.shown}: {work.prompt_tokens} prompt tokens and {work.decode_tokens} decoded tokens need a "
            f"context of {needed}, but the model has {there}: use a smaller --prompt-tokens or --decode-tokens"
        )


def require_answers(sides: Sequence[Contender], scoring: Scoring) -> None:
    """Refuse, before anything is measured, what cannot be scored: another engine's model, or missing rows."""
    for side in sides:
        if side.engine is not None:
            raise HavocError(
                f"{side.shown}: only answers of artifacts are scored, and {ENGINES[side.engine]} gives only tokens: "
                "leave out --task, or give an artifact that was exported from the same weights"
            )
        require_rows(Path(side.shown), scoring)


def answer_rows(
    old: Contender, new: Contender, scoring: Scoring, *, margin: float, num_threads: int, progress: Progress
) -> list[PairedRows]:
    """Score both artifacts on the same rows, each in a fresh process, and compare them row by row.

    Raises `HavocError` if the two were not asked the same prompts.
    """
    before, after = (
        run_accuracy(side.shown, scoring, num_threads=num_threads, progress=progress) for side in (old, new)
    )
    for task, asked in before.tasks.items():
        if asked.rows_sha256 != after.tasks[task].rows_sha256:
            raise HavocError(f"{task}: the data changed between the two sides' answers: start again")
        if apart := asked_apart(asked, after.tasks[task]):
            raise HavocError(f"{task}: both sides were asked in two ways ({apart} differ): give --no-chat")
    rows = {task: asked.rows_sha256 for task, asked in before.tasks.items()}
    return judge_rows(before.right, after.right, rows, margin=margin)


def require_told(side: Contender, on: Sequence[Group]) -> None:
    """Refuse to decide by a metric that a server at an address does not report."""
    missing = [group for group in on if group != "latency"]
    if missing and "address" in side.identity:
        raise HavocError(
            f"{side.shown}: a server at an address does not report {' or '.join(missing)}: leave it out of --on"
        )


def common_ids(old: Contender, new: Contender) -> int | None:
    """The number of token ids that both sides have; None if neither reports it."""
    return min((side.num_ids for side in (old, new) if side.num_ids is not None), default=None)


def differences(old: Contender, new: Contender) -> Iterator[str]:
    """Notes about the two sides: the same files, different models, another engine."""
    if old.identity == new.identity:
        yield "both are the same artifact or model: any difference comes from the machine"
    elif old.engine is None and new.engine is None and old.base_hash != new.base_hash:
        yield "the two were made from different bases: this compares two models, not two exports of one base"
    else:
        yield from _unknown_weights(old, new)
    if {old.num_ids, new.num_ids} - {None, common_ids(old, new)}:
        yield f"one model has {old.num_ids} token ids, the other {new.num_ids}: prompts use only ids of both"
    if any(side.engine == "llama_cpp" for side in (old, new)):
        yield "llama.cpp is asked over HTTP, as its users do"
    if any("address" in side.identity for side in (old, new)):
        yield "a server at an address reports no CPU time and has its own number of threads"


def _unknown_weights(old: Contender, new: Contender) -> Iterator[str]:
    if old.engine is not None or new.engine is not None:
        yield "only the agreement of their tokens shows whether both have the same weights"


def document(
    outcome: DuelOutcome,
    margin: float,
    old: Contender,
    new: Contender,
    notes: Sequence[str],
    on: Sequence[Group] = ("latency",),
    accuracy: Sequence[PairedRows] = (),
    far: Divergence | None = None,
) -> dict[str, Any]:
    """Return the duel as plain JSON."""
    word = joined([outcome.verdict, *(row.shift for row in accuracy)])
    return {
        "verdict": word,
        "exit_code": EXIT_CODES[word],
        "margin": margin,
        "on": list(on),
        "confidence": CONFIDENCE,
        "num_blocks": outcome.num_blocks,
        "old": old.identity,
        "new": new.identity,
        "notes": list(notes),
        "agreement": None if outcome.agreement is None else asdict(outcome.agreement),
        "rows": [asdict(row) for row in outcome.rows],
        "accuracy": [asdict(row) for row in accuracy],
        "divergence": None if far is None else asdict(far),
    }
