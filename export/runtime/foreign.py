"""Run untrusted graphs in a process that can be ended: `verify` and `generate` get only the results.

A graph may loop for ever, request all memory or crash the runtime, and Python receives no signal while it runs. So it
runs in a child with a deadline, and Ctrl-C ends the command at once.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapt.tasks.task import Prompt
from ...errors import IdentityError
from ...messages import ChildJob
from .child import run_worker
from .probe import Fingerprint, fingerprint
from .serving import serve, served
from .session import DecoderSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ...model.prompt import PromptLike

_START_S, _TOKEN_S, _BYTES_PER_S = 300.0, 5.0, 2e6
"""Generous times for any machine that can run the model: to start, for a token, and to read and pack weights."""


@dataclass(frozen=True, kw_only=True)
class FingerprintRequest:
    """Whose fingerprint is taken, and at which mixtures of a live artifact; None is its own."""

    artifact: Path
    provider: str
    alphas: tuple[dict[str, float] | None, ...] = (None,)


@dataclass(frozen=True)
class Fingerprints:
    """One of each mixture, in order."""

    found: tuple[Fingerprint, ...]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What an artifact is to complete; see `DecoderSession.generate_text`. `alpha` is the mixture of a live one."""

    artifact: Path
    prompts: tuple[Prompt, ...]
    is_chat: bool
    max_new_tokens: int
    temperature: float
    seed: int
    alpha: dict[str, float] | None = None


@dataclass(frozen=True)
class Completions:
    """The new text of each prompt."""

    texts: tuple[str, ...]


_MODULE = "havoc_core.export.runtime.foreign"
FINGERPRINTS = ChildJob(
    module=_MODULE, name="fingerprints", asked=FingerprintRequest, told=type(None), answer=Fingerprints
)
GENERATE = ChildJob(module=_MODULE, name="generate", asked=GenerateRequest, told=type(None), answer=Completions)


def foreign_fingerprints(
    directory: Path, alphas: Sequence[Mapping[str, float] | None], *, provider: str, num_bytes: int
) -> tuple[Fingerprint, ...]:
    """The logits fingerprint of an artifact of `num_bytes` at each of `alphas`, None being its own.

    Errors are those of `run_worker` and `DecoderSession.open`.
    """
    request = FingerprintRequest(
        artifact=directory.absolute(),
        provider=provider,
        alphas=tuple(None if alpha is None else dict(alpha) for alpha in alphas),
    )
    return run_worker(FINGERPRINTS, request, timeout_s=_START_S + num_bytes / _BYTES_PER_S).found


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
    request = GenerateRequest(
        artifact=directory.absolute(),
        prompts=tuple(Prompt(prompt.text, prompt.image_png) for prompt in prompts),
        is_chat=is_chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        alpha=None if alpha is None else dict(alpha),
    )
    timeout_s = _START_S + num_bytes / _BYTES_PER_S + _TOKEN_S * max_new_tokens * len(prompts)
    return list(run_worker(GENERATE, request, timeout_s=timeout_s).texts)


def _fingerprints(request: FingerprintRequest, _tell: Callable[[None], None]) -> Fingerprints:
    session, found = DecoderSession.open(request.artifact, provider=request.provider), []
    for alpha in request.alphas:
        if alpha is not None:
            session.set_alpha(alpha)
        found.append(fingerprint(session))
        if not all(math.isfinite(value) for value in (found[-1].spread, *found[-1].logits.values())):
            raise IdentityError(f"{request.artifact}: its logits are not finite: another model or a broken runtime")
    return Fingerprints(tuple(found))


def _generate(request: GenerateRequest, _tell: Callable[[None], None]) -> Completions:
    session = DecoderSession.open(request.artifact, is_chat=request.is_chat, alpha=request.alpha)
    texts = session.generate_text(
        request.prompts, max_new_tokens=request.max_new_tokens, temperature=request.temperature, seed=request.seed
    )
    return Completions(tuple(texts))


if __name__ == "__main__":
    sys.exit(serve([served(FINGERPRINTS, _fingerprints), served(GENERATE, _generate)]))
