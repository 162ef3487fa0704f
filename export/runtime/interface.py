"""Whether the graphs of an artifact are those of its configuration: names, types and sizes of inputs and outputs.

    B batch, T new tokens, P past tokens, D model, V vocab, R image patches

A graph that loads may still belong to another model. A mismatch is reported when the graph is opened, with the graph's
names, before anything fails at run time. No torch, no onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnxruntime as ort

    from ...model.config import HavocConfig
    from .live import LiveWeights

_IDS, _FLOAT, _HALF = "tensor(int64)", "tensor(float)", "tensor(float16)"
_KINDS = ("key", "value")

Shape = tuple[int | None, ...]
"""Sizes of a value's axes; None is any."""


def require_interface(
    config: HavocConfig,
    decoder: ort.InferenceSession,
    embedding: ort.InferenceSession | None,
    vision: ort.InferenceSession | None,
) -> None:
    """Raise a `HavocError` unless each graph has the inputs and outputs of a model with this configuration.

    If there is an `embedding` graph, the decoder reads embeddings [B, T, D] and there is a `vision` graph.
    """
    ids: Shape = (None, None)
    embeds: Shape = (None, None, config.d_model)
    activation = _activation(decoder)
    reads = {"input_ids": (_IDS, ids)} if embedding is None else {"inputs_embeds": (activation, embeds)}
    cache: Shape = (None, config.attention.num_kv_heads, None, config.attention.head_dim)
    layers = [f"{layer}.{kind}" for layer in range(config.num_layers) for kind in _KINDS]
    past = {f"past_key_values.{name}": (activation, cache) for name in layers}
    present = {f"present.{name}": (activation, cache) for name in layers}
    _require(
        "model.onnx",
        decoder,
        {**reads, "attention_mask": (_IDS, ids), **past},
        {"logits": (_FLOAT, (None, None, config.vocab_size)), **present},
        optional={"position_ids": (_IDS, ids)},
    )
    features: Shape = (None, config.d_model)
    if embedding is not None:
        takes = {"input_ids": (_IDS, ids), "image_features": (activation, features)}
        _require("embedding.onnx", embedding, takes, {"inputs_embeds": (activation, embeds)})
    if vision is not None and config.vision is not None:
        patches = {"patches": (activation, (None, config.vision.patch_dim))}
        _require("vision.onnx", vision, patches, {"image_features": (activation, features)})


def require_replaceable(decoder: ort.InferenceSession, live: LiveWeights) -> None:
    """Raise a `HavocError` unless the decoder accepts exactly the matrices of `live` instead of its own."""
    found = {item.name: (item.type, tuple(item.shape)) for item in decoder.get_overridable_initializers()}
    for name, value in live.values.items():
        if found.pop(name, None) != (_FLOAT, tuple(value.shape())):
            _refuse("model.onnx", f"it does not take {name[:80]} of shape {value.shape()} in place of its own")
    if found:
        _refuse("model.onnx", f"{next(iter(found))[:80]!r} can be replaced, and no expert has one")


def _activation(decoder: ort.InferenceSession) -> str:
    """The type that the decoder computes in, as its past says."""
    types = {item.type for item in decoder.get_inputs() if item.name.startswith("past_key_values.")}
    return _HALF if types == {_HALF} else _FLOAT


def _require(
    graph: str,
    session: ort.InferenceSession,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, tuple[str, Shape]],
    *,
    optional: Mapping[str, tuple[str, Shape]] | None = None,
) -> None:
    for what, items, expected in (
        ("input", session.get_inputs(), inputs),
        ("output", session.get_outputs(), outputs),
    ):
        known = {**expected, **(optional or {})} if what == "input" else expected
        found = {item.name: item for item in items}
        for name in [*expected, *found]:
            if name not in found:
                _refuse(graph, f"it has no {what} {name}")
            if name not in known:
                _refuse(graph, f"{what} {name[:80]!r} does not belong to such a model")
            kind, shape = known[name]
            if found[name].type != kind or not _fits(found[name].shape, shape):
                is_of = f"{found[name].type} of {found[name].shape}"[:200]
                _refuse(graph, f"{what} {name} is {is_of}, not {kind} of {[size or '?' for size in shape]}")
        if [name for name in found if _is_cached(name)] != [name for name in expected if _is_cached(name)]:
            _refuse(graph, f"the {what}s for keys and values are in another order")


def _is_cached(name: str) -> bool:
    return name == "logits" or name.startswith(("past_key_values.", "present."))


def _fits(found: list[int | str | None], shape: Shape) -> bool:
    """Whether the axes are as many and the fixed ones as long; a named axis may have any length where any fits."""
    pairs = zip(found, shape, strict=False)
    return len(found) == len(shape) and all(size is None or size == actual for actual, size in pairs)


def _refuse(graph: str, reason: str) -> None:
    raise HavocError(f"{graph} is not the graph of this configuration: {reason}; export the artifact again")
