"""How a graph is written: its operators, its cache, which logits it computes. No torch.

The choice does not change what the model is, nor a byte of its weights: one data file serves every graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...errors import HavocError

if TYPE_CHECKING:
    from ...model.structure import ActivationDtype
    from .artifact import ArtifactManifest

Device = Literal["cpu", "cuda"]
Dialect = Literal["standard", "contrib"]
Cache = Literal["dynamic", "static"]
Logits = Literal["last", "all"]

PROVIDER_OF_KIND: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's execution provider for each kind of device."""

DIALECTS: tuple[Dialect, ...] = ("standard", "contrib")
CACHES: tuple[Cache, ...] = ("dynamic", "static")
LOGITS: tuple[Logits, ...] = ("last", "all")

MIN_CACHE_LEN = 32
"""The shortest static cache, in tokens: it must hold the sequences that parity reads."""

_ANSWERED: dict[Logits, str] = {"last": "the last token", "all": "every token"}
_LOGITS_NAMES: dict[Logits, str] = {"last": "last token", "all": "every token"}


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """One way to write the graph of a decoder.

    `dialect` names the operators: ONNX's own, or ONNX Runtime's fused ones. A `dynamic` cache grows by concatenation, a
    `static` one holds `cache_len` tokens (None: the whole context) in buffers that never move. `logits` of the `last`
    token, or of `all`.
    """

    dialect: Dialect = "standard"
    cache: Cache = "dynamic"
    logits: Logits = "last"
    cache_len: int | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("dialect", self.dialect, DIALECTS),
            ("cache", self.cache, CACHES),
            ("logits", self.logits, LOGITS),
        ):
            if value not in known:
                raise HavocError(f"no {what} is called {value!r}; there are {', '.join(known)}")
        if self.cache_len is not None and self.cache == "dynamic":
            raise HavocError(
                f"a cache length of {self.cache_len} needs a static cache: a dynamic one grows with the text"
            )
        if self.cache_len is not None and (type(self.cache_len) is not int or self.cache_len < 1):
            raise HavocError(f"the length of a cache must be a positive number of tokens, not {self.cache_len!r}")

    def fitted(self, max_seq_len: int) -> GraphOptions:
        """The same options with the cache's length as a number; one longer than the context is a `HavocError`."""
        if self.cache == "dynamic":
            return self
        least = min(MIN_CACHE_LEN, max_seq_len)
        if self.cache_len is not None and not least <= self.cache_len <= max_seq_len:
            raise HavocError(f"a cache of {self.cache_len} tokens: give {least} to {max_seq_len}, the model's context")
        return replace(self, cache_len=self.cache_len or max_seq_len)

    @property
    def opset(self) -> int:
        """The version of ONNX's operators that the graph is written in."""
        return 22 if self.dialect == "contrib" else 24 if self.cache == "static" else 23

    @property
    def ir_version(self) -> int:
        """The version of the file format, the oldest that holds the graph."""
        return 10 if self.dialect == "contrib" else 11

    def to_json(self) -> dict[str, Any]:
        """The keys kept in the manifest; those of a static cache only where there is one."""
        document: dict[str, Any] = {"dialect": self.dialect, "logits": _LOGITS_NAMES[self.logits]}
        return document if self.cache == "dynamic" else {**document, "cache": "static", "cache_len": self.cache_len}

    @property
    def description(self) -> str:
        """The choice in words: `contrib dialect, static cache of 512 tokens, logits of the last token`."""
        length = "" if self.cache_len is None else f" of {self.cache_len} tokens"
        return f"{self.dialect} dialect, {self.cache} cache{length}, logits of {_ANSWERED[self.logits]}"

    def __str__(self) -> str:
        """Name the choice the way tables and file names do: `contrib-static-last`."""
        return f"{self.dialect}-{self.cache}-{self.logits}"


DEFAULT_OPTIONS = GraphOptions()
"""Standard operators, a cache that grows, the logits of the last token."""


BEST_DIALECT: dict[tuple[Device, ActivationDtype, Cache], Dialect] = {
    ("cpu", "fp32", "dynamic"): "standard",  # prefill 120 ms, a step 3.2; GroupQueryAttention 126 and 3.7
    ("cpu", "fp32", "static"): "standard",
    ("cpu", "fp16", "dynamic"): "contrib",  # prefill 122 ms, a step 3.3; standard 131 and 3.6
    ("cpu", "fp16", "static"): "contrib",
    ("cuda", "fp32", "dynamic"): "standard",  # GroupQueryAttention has no fp32 kernel in the CUDA provider
    ("cuda", "fp32", "static"): "standard",
    ("cuda", "fp16", "dynamic"): "standard",  # a step 1.6 ms; GroupQueryAttention 44: see docs/decisions/0003
    ("cuda", "fp16", "static"): "contrib",
}
"""What each execution provider really runs best, by device, activation dtype and cache.

The CPU's rows are measured: prefill of 512 tokens and a step after them, of a decoder of 26.7 M parameters on one
thread of ONNX Runtime 1.31. Of CUDA's, fp16 over a cache that grows was timed, on an NVIDIA H200.
"""

HEAD_DIM_UNIT = 16
"""What a head's width must be a multiple of for GroupQueryAttention to rotate it (ONNX Runtime 1.31 checks it)."""


def choose_dialect(
    name: Dialect | Literal["auto"],
    *,
    device: Device,
    activation_dtype: ActivationDtype,
    head_dim: int,
    cache: Cache = "dynamic",
) -> Dialect:
    """Take `auto` from the table, where the heads allow it.

    A dialect whose operators `device` does not run in that dtype, or not with such heads, is a `HavocError`.
    """
    is_rotatable = head_dim % HEAD_DIM_UNIT == 0
    if name == "auto":
        return BEST_DIALECT[device, activation_dtype, cache] if is_rotatable else "standard"
    if name == "contrib" and (device, activation_dtype) == ("cuda", "fp32"):
        msg = "the contrib dialect does not run in fp32 on CUDA: GroupQueryAttention has fp16 kernels only there"
        raise HavocError(f"{msg}; use --dialect standard or --activations fp16")
    if name == "contrib":
        require_heads(head_dim)
    return name


def require_heads(head_dim: int) -> None:
    """Raise a `HavocError` unless GroupQueryAttention can rotate heads of this width."""
    if head_dim % HEAD_DIM_UNIT:
        msg = f"GroupQueryAttention rotates heads of a multiple of {HEAD_DIM_UNIT}, this model's have {head_dim}"
        raise HavocError(f"{msg}: use --dialect standard")


def options_of(manifest: ArtifactManifest) -> GraphOptions:
    """The options an artifact's graph was written with; unknown ones are a `HavocError`."""
    graph = manifest.graph
    found = graph.get("logits", _LOGITS_NAMES["last"])
    logits = next((key for key, name in _LOGITS_NAMES.items() if name == found), None)
    if logits is None:
        raise HavocError(
            f"the manifest's graph computes the logits of {found!r}; there are {list(_LOGITS_NAMES.values())}"
        )
    return GraphOptions(
        dialect=graph.get("dialect", "standard"),
        cache=graph.get("cache", "dynamic"),
        logits=logits,
        cache_len=graph.get("cache_len"),
    )
