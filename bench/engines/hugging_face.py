"""transformers: a Hugging Face directory in torch, eager, in its stored dtype."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "transformers"


class TransformersModel:
    """An open model; each prompt gets its own cache, as in `generate`."""

    is_own_process = True

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - of another package
        self._model = model
        names = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in names else "past_key_values"  # the name in versions before 5.24

    def generate(self, ids: list[int], num_tokens: int) -> Iterator[int]:
        """Yield greedy tokens."""
        import torch

        next_ids, past = torch.tensor([ids]), None
        with torch.inference_mode():
            for _ in range(num_tokens):
                found = self._model(next_ids, **{self._cache: past}, use_cache=True, logits_to_keep=1)
                past, next_ids = getattr(found, self._cache), found.logits[:, -1].argmax(dim=-1, keepdim=True)
                yield int(next_ids)

    def next_logits(self, ids: list[int], num_ids: int) -> Any:  # noqa: ANN401, ARG002 - an array
        """Logits of the next token [V]."""
        import torch

        with torch.inference_mode():
            return self._model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].float().numpy()


def prepare() -> None:
    """Import the packages before the clock starts, so the time of loading a model does not include them."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401


def open_model(path: str, *, num_threads: int, capacity: int) -> TransformersModel:  # noqa: ARG001 - its cache grows
    """Open a directory; nothing is downloaded, and no code in the directory runs."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    return TransformersModel(AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True).eval())
