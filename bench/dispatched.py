"""`havoc eval --dispatch`: compare two-pass inference of a base and its experts with simpler systems.

torch scores in this process, as for a base: an artifact holds one mixture, so it has no choice of expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..adapt.tasks.evaluation import Scoring
from ..cores import limit_threads, threads_for
from ..export.runtime.artifact import refuse_artifact
from ..progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..adapt.dispatch_table import DispatchSettings
    from ..cores import TorchDevice
    from ..progress import Progress


def evaluate_dispatch(
    model: str,
    experts: Path,
    settings: DispatchSettings,
    *,
    tasks: Sequence[str] = (),
    few_shot: int | None = None,
    is_chat: bool = True,
    device: TorchDevice = "cpu",
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare the ways of dispatch on `model`, a base, with the experts of a folder; see `compare_dispatch`.

    Empty `tasks` means the tasks that have an expert; `made_on` of the result says what computed it. Raises
    `HavocError` for an artifact.
    """
    from ..adapt.dispatch import open_mixtures
    from ..adapt.dispatch_table import compare_dispatch
    from ..model.checkpoint import load_base
    from ..model.device import made_on

    refuse_artifact(model)
    base = load_base(model, is_chat=is_chat, device=device)
    _ = base.tokenizer  # a base that cannot read text is refused before any work
    limit_threads(threads_for(base.model.num_parameters(), num_threads=num_threads))
    mixtures, basis = open_mixtures(base, experts, progress)
    with mixtures:
        scoring = Scoring(
            tasks=tuple(tasks or mixtures.names),
            data_dir=settings.data_dir,
            online=settings.online,
            few_shot=few_shot,
        )
        asked = scoring.load(base.config)
        document = compare_dispatch(mixtures, basis, experts, asked, settings, progress=progress)
    return {"made_on": made_on(base.model.device), **document}
