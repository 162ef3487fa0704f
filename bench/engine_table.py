"""The models of one release in every installed engine: one record for each, and a table that compares them.

    rows = bench_everywhere(["artifact", "model.gguf"], out=Path("reports/engines"), ...)

The engines run one after another, each by the plan of `havoc bench`. The machine may change between two records, so the
table compares but proves nothing. For a proof, `havoc duel` measures two of them in turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError
from ..export.runtime.artifact import MANIFEST
from .contender import MODELS, engines_of, enter, interpreter_with
from .engines import ENGINES
from .judge.gate import why_invalid
from .judge.metrics import measured
from .measure import measure
from .record_folder import keep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..progress import Progress
    from .judge.record import Record
    from .judge.schema import Workload

OWN: Final = "HAVOC"


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """One engine with one model: its record and the record's path, or the reason why there is none."""

    engine: str
    version: str = ""
    model: str = ""
    record: Record | None = None
    path: Path | None = None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        """Return plain JSON values: figures by metric, null for what was not measured."""
        found = self.record
        return {
            "engine": self.engine,
            "version": self.version,
            "model": self.model,
            "record": None if self.path is None else str(self.path),
            "is_valid": found is not None and why_invalid(found) is None,
            "reason": self.reason,
            "metrics": None if found is None else measured(found),
        }


def bench_everywhere(
    models: Sequence[str],
    *,
    out: Path,
    pythons: Sequence[Path],
    profile: str,
    num_threads: int | None,
    workload: Workload,
    wait_s: float,
    progress: Progress,
) -> list[EngineRow]:
    """Measure each model in each engine that opens it; an engine that is missing or fails gets a row with the reason.

    The first of `pythons`, then this interpreter, that has an engine runs it. Records: `out/ENGINE-PLACE/record.json`.
    """
    options: dict[str, Any] = {
        "profile": profile,
        "num_threads": num_threads,
        "workload": workload,
        "wait_s": wait_s,
        "progress": progress,
    }
    opened_by = {model: engines_of(model) for model in models}
    for stray in (model for model in models if not opened_by[model] and not _is_artifact(model)):
        raise HavocError(f"{stray}: not an artifact, {', '.join(MODELS.values())}")
    rows = []
    for engine in (None, *ENGINES):
        its = [model for model in models if (_is_artifact(model) if engine is None else engine in opened_by[model])]
        if not its:
            rows.append(_without_model(engine, pythons))
        for place, model in enumerate(its):
            path = out / f"{engine or OWN.lower()}-{place}" / "record.json"
            try:
                record, version = _measured(model, engine, pythons, **options)
                keep(record, path)
            except HavocError as error:
                rows.append(EngineRow(engine=_shown(engine), model=model, reason=str(error)))
                continue
            broken = why_invalid(record) or ""
            rows.append(
                EngineRow(engine=_shown(engine), version=version, model=model, record=record, path=path, reason=broken)
            )
    return rows


def _measured(model: str, engine: str | None, pythons: Sequence[Path], **options: Any) -> tuple[Record, str]:  # noqa: ANN401
    """Measure one model in one engine with the options of `measure`; return its record and the engine's version."""
    if engine is None:
        record = measure(Path(model), **options)
        return record, record.tool.version
    with enter(model, pythons=pythons, engine=engine) as entered:
        return measure(entered, **options), entered.identity["version"]


def _without_model(engine: str | None, pythons: Sequence[Path]) -> EngineRow:
    """Say that the engine can open none of the models, and how to install the engine if it is missing."""
    if engine is None:
        return EngineRow(engine=OWN, reason="no artifact among the models: export one with `havoc export`")
    reason = f"it can open none of the models; it opens {MODELS[engine]}"
    try:
        interpreter_with(engine, pythons)
    except HavocError as error:
        reason = str(error)
    return EngineRow(engine=_shown(engine), reason=reason)


def _shown(engine: str | None) -> str:
    return OWN if engine is None else ENGINES[engine]


def _is_artifact(model: str) -> bool:
    return (Path(model) / MANIFEST).is_file()
