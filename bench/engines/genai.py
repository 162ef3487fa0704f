"""onnxruntime-genai: a folder with `genai_config.json`, on the CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "onnxruntime-genai"


class GenaiModel:
    """An open model and one generator; its cache is reused for each prompt."""

    is_own_process = True

    def __init__(self, model: Any, generator: Any) -> None:  # noqa: ANN401 - of another package
        self._model = model
        self._generator = generator

    def generate(self, ids: list[int], num_tokens: int) -> Iterator[int]:
        """Yield greedy tokens."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(ids)
        for _ in range(num_tokens):
            self._generator.generate_next_token()
            yield int(self._generator.get_next_tokens()[0])

    def next_logits(self, ids: list[int], num_ids: int) -> Any:  # noqa: ANN401, ARG002 - an array
        """Logits of the next token [V]."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(ids)
        found = self._generator.get_logits()
        return found.reshape(-1, found.shape[-1])[-1]


def prepare() -> None:
    """Import the package before the clock starts, so the time of loading a model does not include it."""
    import onnxruntime_genai  # noqa: F401


def open_model(path: str, *, num_threads: int, capacity: int) -> GenaiModel:
    """Open a folder; the model may not choose the end-of-text token."""
    import onnxruntime_genai as genai

    config = genai.Config(path)
    session = {"intra_op_num_threads": num_threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=capacity, min_length=capacity)
    return GenaiModel(model, genai.Generator(model, params))
