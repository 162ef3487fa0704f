"""What a search asks of a worker: frozen dataclasses, JSON on the wire (`messages`), never code.

Offer           what a worker says of itself when it registers
Tree            files by their path in a folder and by their content's hash
Lacking, Piece  which of a tree's files a worker has not got; a part of one of them
ScoreErrand     one job of `jobs` over the files of a tree
MeasureErrand   measure the artifact that a tree is, on the device that was offered
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from ..bench.judge.schema import Device, Workload  # noqa: TC001 - `messages.read` needs them
from ..errors import HavocError
from ..jobs import AnswerRequest, DivergeRequest  # noqa: TC001 - the same
from ..messages import plain
from ..storage import sha256_json


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a worker says of itself: its HAVOC, whether it scores, and the device it measures on, None for none.

    `token` is new for every process, so that a worker which was started again on the same port is another one.
    """

    version: str
    onnxruntime: str
    token: str
    scores: bool
    device: Device | None


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file: hex SHA-256 and size in bytes."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Tree:
    """The files of a folder by their paths in it, "/" between the parts. A path that leads out is a `HavocError`."""

    files: dict[str, StoredFile]

    def __post_init__(self) -> None:
        """Refuse paths that are absolute or lead out of the folder."""
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
                raise HavocError(f"{name!r}: not a path inside a folder; nothing was stored")

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of all paths and contents."""
        return sha256_json(plain(self.files))


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """Ask which of a tree's contents are not there: a list of their hashes."""

    tree: Tree


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Keep bytes of a file from `start` on; they travel beside this message. The last one completes the file."""

    file: StoredFile
    start: int


@dataclass(frozen=True, kw_only=True)
class ScoreErrand:
    """Answer rows, or say how far mixtures moved: one of both. The paths of their place are those of the tree."""

    tree: Tree
    answer: AnswerRequest | None = None
    diverge: DivergeRequest | None = None


@dataclass(frozen=True, kw_only=True)
class MeasureErrand:
    """Measure an artifact for a few seconds on the device whose fingerprint was offered; see `bench.measure_cost`."""

    tree: Tree
    fingerprint: str
    provider: str
    num_threads: int | None
    workload: Workload
    num_retries: int
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class MeasuredOnce:
    """Medians of one measurement by metric, and what disturbed it, "" for nothing."""

    values: dict[str, float]
    disturbance: str


Errand = Lacking | Piece | ScoreErrand | MeasureErrand
