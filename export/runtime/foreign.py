"""Graphs of somebody else run in a process that can be ended: `verify` and `generate` see only what comes back.

A graph may loop for ever, ask for all memory or crash the runtime, and no signal reaches Python while it runs. So it
runs in a child with a deadline, and Ctrl-C ends the command at once.
"""

from __future__ import annotations

import base64
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapt.tasks.task import Prompt
from ...errors import IdentityError
from .child import run_worker
from .probe import fingerprint
from .serving import serve
from .session import DecoderSession

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...model.prompt import PromptLike
    from .serving import Emit, Task

_MODULE = "havoc_core.export.runtime.foreign"
_START_S, _TOKEN_S, _BYTES_PER_S = 300.0, 5.0, 2e6
"""Far more than a machine that can run the model at all needs: to start, for a token, and to read and pack weights."""


def foreign_fingerprints(
    directory: Path, alphas: Sequence[Mapping[str, float] | None], *, provider: str, num_bytes: int
) -> list[dict[str, Any]]:
    """The logits fingerprint of an artifact of `num_bytes` at each of `alphas`, None being its own.

    Errors are those of `run_worker` and `DecoderSession.open`.
    """
    request = {"task": "fingerprint", "artifact": str(directory.absolute()), "provider": provider, "alphas": alphas}
    found: list[dict[str, Any]] = _run(request, timeout_s=_START_S + num_bytes / _BYTES_PER_S)["fingerprints"]
    return found


def foreign_completions(
    directory: Path,
    prompts: Sequence[PromptLike],
    *,
    num_bytes: int,
    max_new_tokens: int,
    is_chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    alpha: Mapping[str, float] | None = None,
) -> list[str]:
    """What an artifact of `num_bytes` writes after each prompt; see `DecoderSession.generate_text`.

    `alpha` is the mixture of a live one.
    """
    request = {
        "task": "generate",
        "artifact": str(directory.absolute()),
        "prompts": [[prompt.text, _as_text(prompt.image_png)] for prompt in prompts],
        "is_chat": is_chat,
        "alpha": alpha,
        "settings": {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
    }
    timeout_s = _START_S + num_bytes / _BYTES_PER_S + _TOKEN_S * max_new_tokens * len(prompts)
    return [str(text) for text in _run(request, timeout_s=timeout_s)["completions"]]


def _run(request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    return run_worker(request, timeout_s=timeout_s, module=_MODULE)


def _as_text(png: bytes | None) -> str | None:
    return None if png is None else base64.b64encode(png).decode()


def _fingerprint(request: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    session = DecoderSession.open(Path(request["artifact"]), provider=request["provider"])
    fingerprints = []
    for alpha in request["alphas"]:
        if alpha is not None:
            session.set_alpha(alpha)
        found = fingerprint(session)
        if not all(math.isfinite(value) for value in (found["spread"], *found["logits"].values())):
            raise IdentityError(f"{request['artifact']}: its logits are not finite: another model or a broken runtime")
        fingerprints.append(found)
    return {"fingerprints": fingerprints}


def _generate(request: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    session = DecoderSession.open(Path(request["artifact"]), is_chat=request["is_chat"], alpha=request["alpha"])
    prompts = [Prompt(text, None if png is None else base64.b64decode(png)) for text, png in request["prompts"]]
    return {"completions": session.generate_text(prompts, **request["settings"])}


_TASKS: dict[str, Task] = {"fingerprint": _fingerprint, "generate": _generate}

if __name__ == "__main__":
    sys.exit(serve(_TASKS))
