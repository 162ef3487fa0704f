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
    from collections.abc import Sequence

    from ...model.prompt import PromptLike
    from .serving import Emit, Task

_MODULE = "havoc_core.export.runtime.foreign"
_START_S, _TOKEN_S, _BYTES_PER_S = 300.0, 5.0, 2e6
"""Far more than a machine that can run the model at all needs: to start, for a token, and to read and pack weights."""


def foreign_fingerprint(directory: Path, *, provider: str, num_bytes: int) -> dict[str, Any]:
    """The logits fingerprint of an artifact of `num_bytes`; errors as `run_worker` and `DecoderSession.open`."""
    request = {"task": "fingerprint", "artifact": str(directory.absolute()), "provider": provider}
    return _run(request, timeout_s=_START_S + num_bytes / _BYTES_PER_S)


def foreign_completions(
    directory: Path,
    prompts: Sequence[PromptLike],
    *,
    num_bytes: int,
    max_new_tokens: int,
    is_chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What an artifact of `num_bytes` writes after each prompt; see `DecoderSession.generate_text`."""
    request = {
        "task": "generate",
        "artifact": str(directory.absolute()),
        "prompts": [[prompt.text, _as_text(prompt.image_png)] for prompt in prompts],
        "is_chat": is_chat,
        "settings": {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
    }
    timeout_s = _START_S + num_bytes / _BYTES_PER_S + _TOKEN_S * max_new_tokens * len(prompts)
    return [str(text) for text in _run(request, timeout_s=timeout_s)["completions"]]


def _run(request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    return run_worker(request, timeout_s=timeout_s, module=_MODULE)


def _as_text(png: bytes | None) -> str | None:
    return None if png is None else base64.b64encode(png).decode()


def _fingerprint(request: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    found = fingerprint(DecoderSession.open(Path(request["artifact"]), provider=request["provider"]))
    if not all(math.isfinite(value) for value in (found["spread"], *found["logits"].values())):
        raise IdentityError(f"{request['artifact']}: its logits are not finite: another model or a broken runtime")
    return found


def _generate(request: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    session = DecoderSession.open(Path(request["artifact"]), is_chat=request["is_chat"])
    prompts = [Prompt(text, None if png is None else base64.b64decode(png)) for text, png in request["prompts"]]
    return {"completions": session.generate_text(prompts, **request["settings"])}


_TASKS: dict[str, Task] = {"fingerprint": _fingerprint, "generate": _generate}

if __name__ == "__main__":
    sys.exit(serve(_TASKS))
