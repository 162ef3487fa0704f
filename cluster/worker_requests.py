"""What a run asks of a worker: frozen dataclasses, sent as JSON (`messages`), never code.

Offer           what a worker says about itself when it registers
Tree            the files of a folder: path, hash and size of each
Lacking, Piece  which files of a tree the worker still lacks; a part of one file
ScoreTree       one scoring job of `jobs` over the files of a tree
TrainTree       train one expert over the files of a tree; `TrainedFiles` come back
MeasureTree     measure the artifact in a tree on the device that was offered
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from ..bench.judge.schema import Device, Workload  # noqa: TC001 - `messages.read` needs them
from ..errors import HavocError
from ..jobs import AnswerRequest, DivergeRequest, TrainRequest  # noqa: TC001 - the same
from ..messages import plain
from ..storage import sha256_json


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a worker says about itself: its versions, whether it scores, and the device it measures on (None: none).

    `token` is new for every process, so a worker that was restarted on the same port counts as another worker.
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
    """The files of a folder by their relative paths, written with "/". A path out of the folder is a `HavocError`."""

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
    """Ask which contents of a tree the worker lacks; the result is a list of their hashes."""

    tree: Tree


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Store bytes of a file from offset `start`; they are sent beside this message. The last piece ends the file."""

    file: StoredFile
    start: int


@dataclass(frozen=True, kw_only=True)
class ScoreTree:
    """Answer rows, or compute how far mixtures moved: exactly one is set. All paths are relative to the tree."""

    tree: Tree
    answer: AnswerRequest | None = None
    diverge: DivergeRequest | None = None


@dataclass(frozen=True, kw_only=True)
class TrainTree:
    """Train the expert of the task called `domain`; the paths of the recipe and its tasks are relative to the tree.

    The state of a training that has begun is sent beside this message, if there is one.
    """

    tree: Tree
    domain: str
    train: TrainRequest


@dataclass(frozen=True, kw_only=True)
class TrainedFiles:
    """The files that a training leaves: the expert, the list of its steps and its metrics."""

    expert: bytes
    trace: bytes
    metrics: bytes


@dataclass(frozen=True, kw_only=True)
class MeasureTree:
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
    """The medians of one measurement by metric, and what disturbed it ("": nothing)."""

    values: dict[str, float]
    disturbance: str


WorkerRequest = Lacking | Piece | ScoreTree | TrainTree | MeasureTree
