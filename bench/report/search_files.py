"""The pipeline's files beside a record: accuracy by domain (`scores.json`) and the search's front (`front.json`).

Values that a page shows are checked strictly; other keys may change. Both files name their artifact by `artifact_hash`,
so that no page shows the search or the scores of another artifact beside a record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ... import storage
from ...errors import HavocError, printable
from ...mistakes import mistakes
from ..judge.figures import count, structure_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..judge.record import Record

MAX_BYTES = 64_000_000
_SPEED = frozenset({"prefill_ms", "decode_tok_per_s"})

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
            raise ValueError(f"{self.num_right} of {self.num_rows} is not between {self.low} and {self.high}")
        return self


class ScoreRow(_Read):
    """The base, one expert, or the mixture, by domain."""

    name: str
    kind: Literal["base", "expert", "mixture"]
    accuracy: Annotated[dict[str, Score], Field(min_length=1)]
    kl_to_base: dict[str, Annotated[float, Field(ge=-1)]] | None = None

    def mean(self, domains: list[str]) -> float | None:
        """Mean share over the domains; None if any was not scored."""
        found = [self.accuracy[domain].share for domain in domains if domain in self.accuracy]
        return sum(found) / len(found) if len(found) == len(domains) else None


class Margin(_Read):
    """The mixture against another model on the same rows: the difference of the means over domains, with bounds."""

    against: str
    margin: Points
    low: Points
    high: Points
    is_proven: bool


class ScoreFile(_Read):
    """The content of `scores.json`."""

    rows: tuple[ScoreRow, ...] = ()
    paired: tuple[Margin, ...] = ()
    artifact_sha256: str | None = None

    @property
    def domains(self) -> list[str]:
        """Every domain of any row, in the order of first appearance."""
        return list(dict.fromkeys(domain for row in self.rows for domain in row.accuracy))


class Formats(_Read):
    """The structure of a candidate; a page shows its name."""

    model_config = ConfigDict(extra="allow", frozen=True)

    weight_format: str

    @property
    def name(self) -> str:
        """The structure's name, such as `int4a-hqq-fp32-r0.50`; only the weights' format if no more is known."""
        return str(structure_of(self.model_dump()) or self.weight_format)


class FrontOrigin(_Read):
    """The origin of a candidate: its generation, and how it was made."""

    kind: Literal["seeded", "random", "bred"]
    generation: Annotated[int, Field(ge=0)]
    label: str = ""
    parents: tuple[str, ...] = ()
    is_repaired: bool = False

    def __str__(self) -> str:
        """Say it in the words of a sentence."""
        if self.kind == "bred":
            return f"bred in generation {self.generation}"
        return f"a candidate of the first generation ({self.label or 'drawn at random'})"


class FrontConvergence(_Read):
    """Hypervolume that the candidates dominate, by generation, and the generation since which it hardly grew."""

    hypervolume: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
    stable_since: Annotated[int, Field(ge=0)]
    is_converged: bool

    def __str__(self) -> str:
        """Say it in the words of a sentence."""
        last = len(self.hypervolume) - 1
        if self.is_converged:
            return f"settled: the hypervolume grew by less than 1 % from generation {self.stable_since} to {last}"
        return f"not settled: the hypervolume still grew in generation {self.stable_since} of 0 to {last}"


class BredAgainstSeeded(_Read):
    """The best bred candidate against the best of the first generation, on rows that were not used to choose either."""

    bred: str
    seeded: str
    margin: Points
    low: Points
    high: Points
    is_proven: bool

    def __str__(self) -> str:
        """Say it in the words of a sentence."""
        words = "beats" if self.is_proven else "is not proven to beat"
        return (
            f"on fresh rows the best bred candidate {words} the best one of the first generation: "
            f"{100 * self.margin:+.1f} points on the mean, paired 95 % {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        )


class FrontCandidate(_Read):
    """One evaluation of the search: cost by objective, mean accuracy screened and, for some, scored again."""

    key: str
    alpha: tuple[float, ...] = ()
    structure: Formats
    cost: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    search_accuracy: Shares
    rescored_accuracy: Shares | None = None
    kl_to_base: dict[str, Annotated[float, Field(ge=-1)]] | None = None
    is_feasible: bool | None = None
    origin: FrontOrigin | None = None


class Failure(_Read):
    """A candidate that could not be measured, and why."""

    reason: str


class AnsweredOn(_Read):
    """Kind and name of the device that answered for the candidates."""

    device: str
    name: str


class Front(_Read):
    """The content of `front.json`."""

    candidates: tuple[FrontCandidate, ...] = ()
    front: tuple[str, ...] = ()
    chosen: str | None = None
    frozen: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()
    evaluations: Annotated[int, Field(ge=0)] | None = None
    evidence: Literal["measured_target", "measured_other_device"] | None = None
    disturbance: str = ""
    unmet: tuple[str, ...] = ()
    convergence: FrontConvergence | None = None
    bred_against_seeded: BredAgainstSeeded | None = None
    artifact_sha256: str | None = None
    answered_on: AnsweredOn | None = None

    @model_validator(mode="after")
    def _have_equal_objectives(self) -> Self:
        if len({frozenset(candidate.cost) for candidate in self.candidates}) > 1:
            raise ValueError("the candidates have costs of different objectives")
        return self

    def notes(self) -> list[str]:
        """Notes on the search, one sentence each; a front of an older version has fewer."""
        num_evaluated = len(self.candidates) if self.evaluations is None else self.evaluations
        notes = [f"{count(num_evaluated, 'candidate')} evaluated"]
        if self.evidence == "measured_other_device":
            notes.append(
                "costs were measured on another device than the target's, so no candidate counts as within the limits"
            )
        if self.answered_on is not None and self.answered_on.device != "cpu":
            notes.append(f"the answers come from {printable(self.answered_on.name)} ({self.answered_on.device})")
        if self.disturbance:
            notes.append(f"latency and throughput were not used: {self.disturbance}")
        if self.unmet:
            notes.append(
                f"no structure meets the limit on {', '.join(self.unmet)}, so the limit did not rank candidates"
            )
        if frozen := [name for name in self.frozen if not (self.disturbance and name in _SPEED)]:
            notes.append(f"frozen, because their differences are within the noise: {', '.join(frozen)}")
        chosen = next((candidate for candidate in self.candidates if candidate.key == self.chosen), None)
        if chosen is not None and chosen.origin is not None:
            notes.append(f"the chosen candidate {'was' if chosen.origin.kind == 'bred' else 'is'} {chosen.origin}")
        notes += [str(part) for part in (self.bred_against_seeded, self.convergence) if part is not None]
        if self.failed:
            notes.append(f"{count(len(self.failed), 'candidate')} failed: {self.failed[0].reason}")
        return notes


def read_scores(path: Path) -> ScoreFile | None:
    """Read `scores.json`; None if there is none, `HavocError` for another form."""
    return _read(path, ScoreFile)


def read_front(path: Path) -> Front | None:
    """Read `front.json`; None if there is none, `HavocError` for another form."""
    return _read(path, Front)


def artifact_hash(files: Mapping[str, str]) -> str:
    """SHA-256 of a whole artifact: over the names and hashes of its files, as in a record's subject."""
    return storage.sha256_json(dict(files))


def why_not_its_scores(scores: ScoreFile, record: Record) -> str | None:
    """Say why these scores do not belong to this record: another artifact, or other counts.

    Scores of an older version have no artifact hash: they are accepted if the record has the mixture's counts.
    """
    if scores.artifact_sha256 not in {None, artifact_hash(record.subject.files)}:
        return "they belong to another artifact than the record"
    mixture = {domain: score for row in scores.rows if row.kind == "mixture" for domain, score in row.accuracy.items()}
    for domain, score in mixture.items():
        own = record.accuracy.get(domain)
        if own is not None and (own.num_right, own.num_rows) != (score.num_right, score.num_rows):
            return (
                f"they count {score.num_right} of {score.num_rows} right in {domain} for the mixture, "
                f"the record {own.num_right} of {own.num_rows} on the {own.split} split"
            )
    if scores.artifact_sha256 is None and not (mixture and mixture.keys() <= record.accuracy.keys()):
        return "it is not proven that they belong to the record's artifact"
    return None


def why_not_its_front(front: Front, record: Record) -> str | None:
    """Say why this search does not belong to this record: it led to another artifact.

    A front of an older version has no artifact hash: it is accepted if its choice is the record's mixture.
    """
    if front.artifact_sha256 is not None:
        is_its = front.artifact_sha256 == artifact_hash(record.subject.files)
        return None if is_its else "it led to another artifact than the record's"
    chosen = [dict(zip(item.search_accuracy, item.alpha, strict=False)) for item in front.candidates]
    keys = [item.key for item in front.candidates]
    if front.chosen in keys and record.subject.alpha and chosen[keys.index(front.chosen)] == record.subject.alpha:
        return None
    return "it is not proven that it led to the record's artifact"


def _read(path: Path, form: type[_Document]) -> _Document | None:
    if not path.is_file():
        return None
    try:
        return form.model_validate(storage.read_json(path, max_bytes=MAX_BYTES))
    except (ValidationError, RecursionError) as error:
        said = mistakes(error, form, is_handwritten=False)
        raise HavocError(f"{path}: not in the form that `havoc run` writes ({said})") from error
