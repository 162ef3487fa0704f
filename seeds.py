"""docs/seeds.md: every statement of the two guides that HAVOC began with, its state, and the command that shows it.

The statements are in docs/seeds.toml; `make seeds` writes the page.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import HavocError
from .mistakes import mistakes

if TYPE_CHECKING:
    from collections.abc import Iterator

State = Literal["works", "partly", "missing", "departs", "needs the card"]
Seed = Literal["003", "004", "card"]

_TITLES: Final[dict[Seed, str]] = {
    "003": "Seed 003: Transformer-Squared and ADAS",
    "004": "Seed 004: the HAVOC-7B transformer",
    "card": "The project's card",
}

_PAGE: Final = """# The seeds, statement by statement

Written by `make seeds` from [seeds.toml](seeds.toml). HAVOC began with two guides, seed 003 (experts and their search)
and seed 004 (the decoder), and a card that names libraries, folders and uses. Each of their statements is listed here
with its line, its state, its place in the code, and a command that shows it.

- **works**: the command fails without it.
- **partly**: some of it is there, and what is missing is said.
- **missing**: it is not there.
- **departs**: HAVOC does something else, and [departures](departures.md) says why.
- **needs the card**: it is a claim about a GTX 1660, on which nothing was ever measured.

{counts}

## What is not as the seeds say

{open}
{tables}
"""


class Statement(BaseModel):
    """One statement of a seed.

    `line` is None for the card's. `where` is a file, or `file:name` of a function or class in it, and `shows` the
    command that shows the statement; both may be "" where it is missing. `lacks` says what is missing, or is there
    instead; it is "" where the statement works. A statement that is not whole is a `ValueError`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    line: int | None = Field(default=None, ge=1)
    says: str = Field(min_length=1)
    state: State
    where: str = ""
    shows: str = ""
    lacks: str = ""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.state != "missing" and not (self.where and self.shows):
            raise ValueError(f"{self.says!r} is {self.state!r} without saying where it is and what shows it")
        if (self.state == "works") is bool(self.lacks):
            raise ValueError(f"{self.says!r} is {self.state!r}: say what it lacks if, and only if, it does not work")
        return self


class Section(BaseModel):
    """The statements of one part of a seed, in its order."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    seed: Seed
    title: str = Field(min_length=1)
    rows: list[Statement] = Field(min_length=1)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sections: list[Section] = Field(min_length=1)


def load_sections(path: Path) -> list[Section]:
    """Read docs/seeds.toml; a mistake in it is a `HavocError`."""
    try:
        return _Table.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).sections
    except ValidationError as error:
        raise HavocError(f"{path}: {mistakes(error, _Table)}") from error


def markdown(sections: list[Section]) -> str:
    """Return docs/seeds.md."""
    parts = {"counts": _counts(sections), "open": _open(sections), "tables": _tables(sections)}
    return _PAGE.format(**{name: "\n".join(lines) for name, lines in parts.items()}).rstrip() + "\n"


def _counts(sections: list[Section]) -> Iterator[str]:
    """How many statements of each seed are in which state."""
    found = Counter((section.seed, row.state) for section in sections for row in section.rows)
    states, seeds = get_args(State), get_args(Seed)
    yield f"| | {' | '.join(states)} | all |"
    yield f"|---|{'---|' * (len(states) + 1)}"
    for seed in seeds:
        numbers = [found[seed, state] for state in states]
        yield f"| {_TITLES[seed]} | {' | '.join(map(str, numbers))} | {sum(numbers)} |"
    numbers = [sum(found[seed, state] for seed in seeds) for state in states]
    yield f"| all | {' | '.join(map(str, numbers))} | {sum(numbers)} |"


def _open(sections: list[Section]) -> Iterator[str]:
    """A list for each state but the first, each statement with what it lacks."""
    for state in get_args(State)[1:]:
        rows = [(section, row) for section in sections for row in section.rows if row.state == state]
        if rows:
            yield f"### {state.capitalize()}\n"
            yield from (f"- {_place(section, row)}: {row.says} *{row.lacks}*" for section, row in rows)
            yield ""


def _place(section: Section, row: Statement) -> str:
    return f"{section.seed}, line {row.line}" if row.line else section.seed


def _tables(sections: list[Section]) -> Iterator[str]:
    seed = ""
    for section in sections:
        if section.seed != seed:
            seed = section.seed
            yield f"## {_TITLES[section.seed]}\n"
        yield f"### {section.title}\n"
        yield "| line | statement | state | where | shown by |"
        yield "|---|---|---|---|---|"
        for row in section.rows:
            cells = (str(row.line or ""), row.says, row.state, _link(row.where), f"`{row.shows}`" if row.shows else "")
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""


def _link(where: str) -> str:
    return f"[`{where}`](../{where.partition(':')[0]})" if where else ""


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown(load_sections(Path(sys.argv[1]))))
