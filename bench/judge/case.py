"""A case is what a rule judges; a rule is one id, one sentence and one pure function.

A decorator declares a rule at its function:

    @rule("V07", "Every logit is finite.")
    def logits_are_finite(case: Case) -> str | None: ...

`rules.py` collects them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from ...export.runtime.verification import Verified
    from .record import Cpu, Record
    from .targets import Target

Exit = Literal[4, 5]
Blocks = Literal["invalid", "not_measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One record, one target, and what the gate knows besides.

    The gate knows its own CPU, the artifact's files, and what `havoc verify` found about them.
    """

    record: Record
    target: Target
    artifact_files: Mapping[str, str] | None = None
    this_cpu: Cpu | None = None
    now: datetime | None = None
    verified: Verified | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A named condition; `blocks` is the verdict of every limit if the rule does not hold."""

    id: str
    sentence: str
    blocks: Blocks
    check: Callable[[Case], str | None]

    @property
    def exit_code(self) -> Exit:
        """5 for identity rules (I), 4 for validity rules (V)."""
        return 5 if self.id.startswith("I") else 4

    def __call__(self, case: Case) -> str | None:
        """Return None if the rule holds, else a sentence with the figures."""
        return self.check(case)


def rule(id: str, sentence: str, *, blocks: Blocks = "invalid") -> Callable[[Callable[[Case], str | None]], Rule]:  # noqa: A002
    """Make a rule of the function that follows."""
    return lambda check: Rule(id, sentence, blocks, check)
