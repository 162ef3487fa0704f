"""Accuracy of an artifact or a base by domain, with exact intervals.

An artifact is scored in a fresh child on the very files that ship, as for a record; a base is scored with torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapt.tasks.task import DOMAINS
from ..export.artifact import MANIFEST
from ..progress import SILENT
from .accuracy import MAX_NEW_TOKENS, run_accuracy
from .bounds import share_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..adapt.tasks.task import Prompt
    from ..model.checkpoint import Base
    from ..progress import Progress

TWO_SIDED = 0.975  # one-sided confidence of each end of a 95 % interval
_CHUNK_ROWS = 256


def evaluate(
    model: str,
    *,
    domains: Sequence[str] = (),
    num_rows: int = 1000,
    split: str = "gate",
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    is_chat: bool = True,
    data_dir: Path | None = None,
    online: bool = False,
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """Score `model`, an artifact's folder, a base's folder or a preset; no `domains` means all it can read.

    `seed` makes the built-in rows and their splits, so a recipe's own seed and completion length repeat its scores.
    Returns for each domain num_right, num_rows, num_failed (counted as not right), and the 95 % interval low, high.
    """
    source: dict[str, Any] = {
        "num_rows": num_rows,
        "split": split,
        "seed": seed,
        "data_dir": data_dir,
        "online": online,
    }
    if (Path(model) / MANIFEST).is_file():
        run = run_accuracy(
            Path(model),
            domains=domains or None,
            may_be_fewer=True,
            max_new_tokens=max_new_tokens,
            is_chat=is_chat,
            progress=progress,
            **source,
        )
        return {
            domain: _row(found.num_right, found.num_rows, found.num_failed) for domain, found in run.domains.items()
        }
    from ..model.checkpoint import load_base

    return _evaluate_base(load_base(model, is_chat=is_chat), domains, max_new_tokens, progress, source)


def _evaluate_base(
    base: Base, domains: Sequence[str], max_new_tokens: int, progress: Progress, source: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    from ..adapt.tasks.evaluation import score
    from ..adapt.tasks.sources import rows
    from ..model.generation import generate_text

    wanted = tuple(domains) or tuple(d for d in DOMAINS if base.config.vision is not None or d != "vision")
    tokenizer, found = base.tokenizer, {}
    num_rows, split = source["num_rows"], source["split"]
    picked = {name: source[name] for name in ("seed", "data_dir", "online")}
    with progress.stage("score", num_rows * len(wanted), unit="rows") as stage:
        for domain in wanted:

            def generate(prompts: Sequence[Prompt], domain: str = domain) -> list[str]:
                texts: list[str] = []
                for start in range(0, len(prompts), _CHUNK_ROWS):
                    chunk = prompts[start : start + _CHUNK_ROWS]
                    texts += generate_text(base.model, tokenizer, chunk, max_new_tokens=max_new_tokens)
                    stage.advance(len(chunk), note=domain)
                return texts

            scores = score(generate, domain, rows(domain, split, num_rows, may_be_fewer=True, **picked))
            found[domain] = _row(sum(scores.right), len(scores.right), scores.failed)
    return found


def _row(num_right: int, num_rows: int, num_failed: int) -> dict[str, Any]:
    share = share_bounds(num_right, num_rows, confidence=TWO_SIDED)
    return {
        "num_right": num_right,
        "num_rows": num_rows,
        "num_failed": num_failed,
        "low": share.low,
        "high": share.high,
    }
