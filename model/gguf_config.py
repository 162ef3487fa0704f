"""`HavocConfig` out of the metadata of a GGUF file. No torch.

As with `config.json`, a key of the architecture is either translated, or known to change nothing, or must have the one
value that this decoder computes; every other key is refused by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import HavocError, printable
from .config import AttentionConfig, HavocConfig, MLPConfig, RopeScaling
from .families import family_of_gguf
from .gguf_header import Header, read_header

ROPE_FREQUENCIES = "rope_freqs.weight"
"""A tensor [head_dim / 2] by which llama.cpp divides RoPE's frequencies: Llama 3's scaling, as the file stores it."""

_TRANSLATED = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    }
)
_WITHOUT_EFFECT = frozenset({"expert_used_count", "rope.scaling.finetuned", "rope.scaling.original_context_length"})
_ONLY_VALUE: dict[str, Any] = {
    "attention.causal": True,
    "attention.max_alibi_bias": 0,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.factor": 1,
    "rope.scaling.type": "none",
    "tensor_data_layout": "Meta AI original pth",
    "use_parallel_residual": False,
}
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
"""Of every Llama 3.1 and later; a file keeps the frequencies that come of them and not the numbers themselves."""

_ROPE_TOLERANCE = 1e-5


def read_gguf_config(path: str | Path) -> HavocConfig:
    """The configuration of a GGUF file; one that this decoder does not compute is a `HavocError` that names the key."""
    return config_of(read_header(Path(path)))


def config_of(header: Header) -> HavocConfig:
    """The configuration that a header describes."""
    try:
        return _config(header, _Keys(header))
    except HavocError as error:
        raise error if str(error).startswith(str(header.path)) else HavocError(f"{header.path}: {error}") from error


class _Keys:
    """The metadata of one architecture, by name without its prefix."""

    def __init__(self, header: Header) -> None:
        self.family = family_of_gguf(header.metadata.get("general.architecture"))
        self.architecture = self.family.gguf_architecture
        self._only_value = {**_ONLY_VALUE, **self.family.gguf_only_value}
        prefix = f"{self.architecture}."
        found = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
        for name, value in found.items():
            self._require_known(name, value)
        self._found = found

    def _require_known(self, name: str, value: object) -> None:
        if name in self._only_value:
            if value != self._only_value[name]:
                only = f"HAVOC computes {self._only_value[name]!r} only"
                raise HavocError(f"{self.architecture}.{name} = {value!r:.60} is not supported; {only}")
        elif name not in _TRANSLATED | _WITHOUT_EFFECT:
            raise HavocError(
                f"unknown key {self.architecture}.{printable(name)} (= {value!r:.60}) may change the numbers"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number; a list of one value a layer counts where all are the same."""
        value = self._found.get(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or value < 1:
            what = "is missing" if value is None else f"must be a whole number of at least 1, not {value!r:.60}"
            raise HavocError(f"{self.architecture}.{name} {what}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._found.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            what = "is missing" if value is None else f"must be a number, not {value!r:.60}"
            raise HavocError(f"{self.architecture}.{name} {what}")
        return value


def _config(header: Header, keys: _Keys) -> HavocConfig:
    table = header.tensors.get("token_embd.weight")
    if table is None:
        raise HavocError("tensor token_embd.weight is missing")
    d_model, num_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", d_model // num_heads or 1)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.count(name, head_dim) != head_dim:
            raise HavocError(f"{keys.architecture}.{name} {keys.count(name)} is not the head's size of {head_dim}")
    theta = keys.number("rope.freq_base", 1e4)
    return HavocConfig(
        vocab_size=table.shape[0],
        d_model=d_model,
        num_layers=keys.count("block_count"),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=keys.count("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=_rope_scaling(header, head_dim, theta),
            qkv_bias=keys.family.qkv_bias,
            qk_norm=keys.family.qk_norm,
        ),
        mlp=MLPConfig(hidden_dim=keys.count("feed_forward_length")),
        max_seq_len=keys.count("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in header.tensors,
        **_token_ids(header, table.shape[0]),
    )


def _token_ids(header: Header, num_rows: int) -> dict[str, Any]:
    """The ids that begin, pad and end a text; an id without a row in the table is ignored."""

    def found(name: str) -> int | None:
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < num_rows else None

    ends = dict.fromkeys(end for name in ("eos", "eot", "eom") if (end := found(name)) is not None)
    eos = tuple(ends) if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": found("bos"), "pad_token_id": found("padding"), "eos_token_id": eos}


def _rope_scaling(header: Header, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3's scaling out of the frequencies that the file stores; frequencies of another kind are refused."""
    stored = header.tensors.get(ROPE_FREQUENCIES)
    if stored is None:
        return None
    if stored.type.name != "F32" or stored.shape != (head_dim // 2,):
        raise HavocError(
            f"tensor {ROPE_FREQUENCIES} is {stored.type.name} {list(stored.shape)}, not F32 [{head_dim // 2}]"
        )
    factors = _read_floats(header.path, stored.offset_bytes, head_dim // 2)
    if theta <= 0 or all(factor == 1 for factor in factors):
        return None
    largest = max(factors, default=1.0)
    if math.isfinite(largest) and 1 < largest <= 1e6:  # noqa: PLR2004 - what `RopeScaling` takes
        scaling = RopeScaling(
            factor=round(largest, 4), low_freq_factor=_LOW, high_freq_factor=_HIGH, original_max_seq_len=_ORIGINAL
        )
        expected = [_slowed(2 * index / head_dim, theta, scaling) for index in range(head_dim // 2)]
        if all(abs(a - b) <= _ROPE_TOLERANCE * b for a, b in zip(factors, expected, strict=True)):
            return scaling
    raise HavocError(
        f"tensor {ROPE_FREQUENCIES} scales RoPE in a way that is not supported; HAVOC computes Llama 3's scaling "
        "(low 1, high 4, 8192 positions) only"
    )


def _slowed(exponent: float, theta: float, scaling: RopeScaling) -> float:
    """By how much one frequency is divided (Llama 3; transformers, `_compute_llama3_parameters`)."""
    wavelength: float = 2 * math.pi * theta**exponent
    turns = scaling.original_max_seq_len / wavelength
    if turns < scaling.low_freq_factor:
        return scaling.factor
    if turns > scaling.high_freq_factor:
        return 1.0
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def _read_floats(path: Path, offset_bytes: int, count: int) -> list[float]:
    import struct

    with path.open("rb") as file:
        file.seek(offset_bytes)
        return list(struct.unpack(f"<{count}f", file.read(4 * count)))
