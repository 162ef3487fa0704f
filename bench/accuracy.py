"""How often the exported artifact is right, domain by domain, scored in a fresh child on the very files that ship.

    run = run_accuracy(Path("artifact"), num_rows=1000)
    record = add_accuracy(record, run)              # refused when the record is of another artifact

The gate counts a row that the judge could not decide as wrong, so such rows stay in `num_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapt.tasks.task import DOMAINS
from ..errors import HavocError, IdentityError
from ..progress import SILENT
from .child import run_worker
from .cuda_driver import CudaCard, open_cuda_card
from .device import CPU_PROVIDER, CUDA_PROVIDER, num_physical_cores
from .schema import DomainAccuracy
from .subject import identify_subject

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..progress import Progress, Stage
    from .record import Record

MAX_NEW_TOKENS = 80
BATCH_SIZE = 64
_CHUNK_ROWS = 4 * BATCH_SIZE
_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class AccuracyRun:
    """Accuracy of one artifact: counts for the record, and which rows were right, for paired comparison.

    `files` are the artifact's hashes; `right[domain]` is in the order of the rows that `rows_sha256` names.
    """

    files: dict[str, str]
    domains: dict[str, DomainAccuracy]
    right: dict[str, tuple[bool, ...]]


def run_accuracy(
    artifact: Path | str,
    *,
    domains: Sequence[str] | None = None,
    num_rows: int = 1000,
    split: str = "gate",
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
    may_be_fewer: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    is_chat: bool = True,
    provider: str | None = None,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> AccuracyRun:
    """Score an artifact on `num_rows` rows of a split per domain; `domains` None takes all that the model can read.

    With `may_be_fewer` a real data set with fewer rows is scored on all of them. Raises `HavocError` for what is no
    artifact or asks for rows there are not, `IdentityError` for a changed artifact, `MeasurementError` when the scoring
    process dies.
    """
    if num_rows < 1:
        raise HavocError(f"{num_rows} rows prove nothing: give at least 1")
    subject = identify_subject(Path(artifact))
    require_text(Path(artifact))
    if provider is None:
        provider = CUDA_PROVIDER if isinstance(open_cuda_card(), CudaCard) else CPU_PROVIDER
    request = {
        "task": "accuracy",
        "artifact": str(Path(artifact).absolute()),
        "provider": provider,
        "num_threads": num_threads or num_physical_cores(),
        "domains": None if domains is None else list(domains),
        "num_rows": num_rows,
        "split": split,
        "seed": seed,
        "data_dir": None if data_dir is None else str(Path(data_dir).absolute()),
        "online": online,
        "may_be_fewer": may_be_fewer,
        "max_new_tokens": max_new_tokens,
        "is_chat": is_chat,
    }
    with progress.stage("score", num_rows * len(domains or DOMAINS), unit="rows") as stage:
        result = run_worker(request, timeout_s=_TIMEOUT_S, listen=_announcer(stage))
    found = {
        domain: DomainAccuracy.model_validate(counts, strict=False) for domain, counts in result["domains"].items()
    }
    right = {domain: tuple(letter == "1" for letter in letters) for domain, letters in result["right"].items()}
    return AccuracyRun(files=subject.files, domains=found, right=right)


def require_rows(
    artifact: Path, num_rows: int, *, domains: Sequence[str] | None, data_dir: Path | None, online: bool
) -> None:
    """Refuse what cannot be scored before minutes of measuring: no tokenizer, no data, pictures for a text model."""
    from ..adapt.tasks.sources import rows
    from ..model.config import HavocConfig

    require_text(artifact)
    can_see = HavocConfig.from_directory(artifact).vision is not None
    if domains is not None and "vision" in domains and not can_see:
        raise HavocError(f"{artifact} reads text only: vision cannot be scored")
    if data_dir is None and not online:
        return
    for domain in DOMAINS if domains is None else domains:
        if can_see or domain != "vision":
            rows(domain, "gate", num_rows, data_dir=data_dir, online=online, may_be_fewer=True)


def require_text(artifact: Path) -> None:
    """Refuse an artifact that cannot read text, before anything is measured for its answers."""
    if not (artifact / "tokenizer.json").is_file():
        raise HavocError(
            f"{artifact} has no tokenizer.json (its base had none), so its answers cannot be scored: "
            "export it from a base that has one, or measure without accuracy (--n 0)"
        )


def fewer_rows(num_rows: Mapping[str, int], num_asked: int) -> list[str]:
    """Say of each domain whose data set has fewer rows than were asked for how many it has."""
    return [f"{domain}: {there} rows, {num_asked} asked" for domain, there in num_rows.items() if there < num_asked]


def _announcer(stage: Stage) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        stage.advance(event["num_rows"], note=event["domain"])

    return listen


def add_accuracy(record: Record, run: AccuracyRun) -> Record:
    """Return the record with the run's accuracy, sealed anew; `IdentityError` when they are of different artifacts."""
    if record.subject.files != run.files:
        raise IdentityError("the accuracy was scored on another artifact than the record was measured on")
    return record.model_copy(update={"accuracy": {**record.accuracy, **run.domains}}).sealed()


def score_here(request: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Do the scoring in this process, which is the child: plain JSON values out."""
    from ..adapt.tasks.evaluation import score
    from ..adapt.tasks.sources import rows, rows_hash
    from ..adapt.tasks.task import Prompt, task_for
    from ..export.session import DecoderSession

    session = DecoderSession.open(
        request["artifact"],
        provider=request["provider"],
        num_threads=request["num_threads"],
        is_chat=request["is_chat"],
    )
    can_see = session.config.vision is not None
    domains = request["domains"] or [domain for domain in DOMAINS if can_see or domain != "vision"]
    data_dir = None if request["data_dir"] is None else Path(request["data_dir"])
    counts, letters = {}, {}
    for domain in domains:
        some_rows = rows(
            domain,
            request["split"],
            request["num_rows"],
            seed=request["seed"],
            data_dir=data_dir,
            online=request["online"],
            may_be_fewer=request["may_be_fewer"],
        )

        def generate(prompts: Sequence[Prompt], domain: str = domain) -> list[str]:
            texts: list[str] = []
            for start in range(0, len(prompts), _CHUNK_ROWS):
                chunk = prompts[start : start + _CHUNK_ROWS]
                texts += session.generate_text(chunk, max_new_tokens=request["max_new_tokens"], batch_size=BATCH_SIZE)
                emit({"event": "progress", "domain": domain, "num_rows": len(chunk)})
            return texts

        scores = score(generate, domain, some_rows)
        task = task_for(domain)
        public = f"{task.dataset}/{task.subset}" if task.subset else task.dataset
        counts[domain] = {
            "num_right": sum(scores.right),
            "num_rows": len(scores.right),
            "num_failed": scores.failed,
            "split": request["split"],
            "rows_sha256": rows_hash(some_rows),
            "source": public if data_dir is not None or request["online"] else f"built-in {domain}",
            "seed": request["seed"],
        }
        letters[domain] = "".join("01"[is_right] for is_right in scores.right)
    return {"domains": counts, "right": letters}
