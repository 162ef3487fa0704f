"""Every failure HAVOC reports to a person, and the exit code it ends with.

    HavocError                 2  the request cannot be carried out as asked: usage, schema, a bad file
    ├── MeasurementError       4  the measurement or the training run is invalid
    ├── IdentityError          5  wrong, unknown or simulated device; a hash that does not match
    └── NothingLearnedError    6  the experts are the base: training changed nothing

A message says what was wrong, with the numbers, and what to do next, in one line. Exit code 0 is success. 1 (a limit is
proven missed) and 3 (a limit is undecided) are verdicts of `bench.judge.gate`, not errors. Every command uses the codes
of the gate, so a script can distinguish "missed", "undecided" and "broken". Text from other files in a message or a
page goes through `printable`.
"""

from __future__ import annotations

from typing import ClassVar

_REPLACED = "\N{REPLACEMENT CHARACTER}"


class HavocError(Exception):
    """The request cannot be carried out as asked."""

    exit_code: ClassVar[int] = 2


class MeasurementError(HavocError):
    """A measurement or training run is invalid and must not be used."""

    exit_code = 4


class IdentityError(HavocError):
    """The device, artifact or base is not the one that was asked for."""

    exit_code = 5


class NothingLearnedError(HavocError):
    """Every expert is its base, so there is nothing to mix, to release or to compare."""

    exit_code = 6


def printable(text: str) -> str:
    """Return text from another file without characters that control a terminal or break a page."""
    return "".join(letter if letter.isprintable() else _REPLACED for letter in text)
