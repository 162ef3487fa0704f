"""How a graph is written: its operators, its cache, which logits it computes. No torch.

The choice does not change what the model is, nor a byte of its weights: one data file serves every graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...errors import HavocError
from .dialects import DEFAULT_DIALECT, DIALECTS, Cache

if TYPE_CHECKING:
    from .artifact import ArtifactManifest

Logits = Literal["last", "all"]

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

    dialect: str = DEFAULT_DIALECT
    cache: Cache = "dynamic"
    logits: Logits = "last"
    cache_len: int | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("dialect", self.dialect, tuple(DIALECTS)),
            ("cache", self.cache, CACHES),
            ("logits", self.logits, LOGITS),
        ):
            if value not in known:
                raise HavocError(f"unknown {what} {value!r}; known are {', '.join(known)}")
        if self.cache not in DIALECTS[self.dialect].decoders:
            caches = ", ".join(DIALECTS[self.dialect].decoders)
            raise HavocError(f"the {self.dialect} dialect has no {self.cache} cache; there are {caches}")
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
        return DIALECTS[self.dialect].opsets[self.cache]

    @property
    def ir_version(self) -> int:
        """The version of the file format, the oldest that holds the graph."""
        return DIALECTS[self.dialect].ir_version

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
        dialect=graph.get("dialect", DEFAULT_DIALECT),
        cache=graph.get("cache", "dynamic"),
        logits=logits,
        cache_len=graph.get("cache_len"),
    )
