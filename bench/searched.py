"""What the pipeline leaves beside a record: accuracy by domain (`scores.json`) and the search's front (`front.json`).

Read strictly where a page rests on a value, while keys that no page shows may come and go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .. import storage
from ..errors import HavocError

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 64_000_000

Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[float, Field(ge=-1, le=1)]
Shares = Annotated[dict[str, Share], Field(min_length=1)]
_Document = TypeVar("_Document", bound="_Read")


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Score(_Read):
    """Right answers of one model in one domain, with the bounds of their share."""

    num_right: Annotated[int, Field(ge=0)]
    num_rows: Annotated[int, Field(gt=0)]
    low: Share
    high: Share

    @property
    def share(self) -> float:
        """Right answers over rows."""
        return self.num_right / self.num_rows

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if not self.low <= self.share <= self.high:
            raise ValueError(f"{self.num_right} of {self.num_rows} does not lie between {self.low} and {self.high}")
        return self


class ScoreRow(_Read):
    """The base, one expert, or the mixture, by domain."""

    name: str
    kind: Literal["base", "expert", "mixture"]
    accuracy: Annotated[dict[str, Score], Field(min_length=1)]

    def mean(self, domains: list[str]) -> float | None:
        """Mean share over the domains; None unless all were scored."""
        found = [self.accuracy[domain].share for domain in domains if domain in self.accuracy]
        return sum(found) / len(found) if len(found) == len(domains) else None


class Margin(_Read):
    """The mixture against another on the same rows: points of the mean over domains, as shares, and their bounds."""

    against: str
    margin: Points
    low: Points
    high: Points
    is_proven: bool


class Scores(_Read):
    """The content of `scores.json`."""

    rows: tuple[ScoreRow, ...] = ()
    paired: tuple[Margin, ...] = ()

    @property
    def domains(self) -> list[str]:
        """Every domain that any row has, in the order they first appear."""
        return list(dict.fromkeys(domain for row in self.rows for domain in row.accuracy))


class Formats(_Read):
    """The formats of a candidate, of which a page shows the weights'."""

    weight_format: str


class Candidate(_Read):
    """One evaluation of the search: cost by objective, mean accuracy screened and, for some, scored again."""

    key: str
    structure: Formats
    cost: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    search_accuracy: Shares
    rescored_accuracy: Shares | None = None


class Failure(_Read):
    """A candidate that could not be measured, and why."""

    reason: str


class Front(_Read):
    """The content of `front.json`."""

    candidates: tuple[Candidate, ...] = ()
    front: tuple[str, ...] = ()
    chosen: str | None = None
    frozen: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()
    evaluations: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _have_equal_objectives(self) -> Self:
        if len({frozenset(candidate.cost) for candidate in self.candidates}) > 1:
            raise ValueError("the candidates' costs are of different objectives")
        return self


def read_scores(path: Path) -> Scores | None:
    """Read `scores.json`; None where there is none, `HavocError` for one of another form."""
    return _read(path, Scores)


def read_front(path: Path) -> Front | None:
    """Read `front.json`; None where there is none, `HavocError` for one of another form."""
    return _read(path, Front)


def _read(path: Path, form: type[_Document]) -> _Document | None:
    if not path.is_file():
        return None
    try:
        return form.model_validate(storage.read_json(path, max_bytes=MAX_BYTES))
    except (ValidationError, RecursionError) as error:
        raise HavocError(f"{path}: not of the form that `havoc run` writes ({_first_line(error)})") from error


def _first_line(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:120]
    return " ".join(f"{where or 'it'}: {first['msg'][:200]}".split())
