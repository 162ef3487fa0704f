"""The shape of a HAVOC decoder as frozen, validated data, and its form on disk.

The disk form is Hugging Face's `config.json`: plain text models are `llama`, `qwen2` (bias on q, k, v) or `qwen3`
(norms on q, k) and load in transformers unchanged; a model with vision, or with both extras, is `havoc`. Reading
refuses, by name, every field that would change the numbers in a way this decoder does not compute. No torch here: a
device without it reads configs too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

PRESETS = ("7b", "pico", "nano", "edge-135m", "edge-360m")

# Limits for allocations before any tensor of an untrusted directory proves its size.
MAX_SIZE = (1 << 31) - 1
MAX_LAYERS = 1024
MAX_CONTEXT = 1 << 20


def _require(claim: bool, message: str) -> None:
    if not claim:
        raise HavocError(message)


def _require_count(owner: str, fields: Mapping[str, object], *, most: int = MAX_SIZE) -> None:
    for name, value in fields.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        _require(is_count, f"{owner}.{name} must be a whole number from 1 to {most}, not {value!r}")


def _require_between(owner: str, name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise HavocError(f"{owner}.{name} must be a number in [{low:g}, {high:g}], not {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, others interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _require_between("rope_scaling", "factor", self.factor, 1, 1e6)
        _require_between("rope_scaling", "low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
        _require_between("rope_scaling", "high_freq_factor", self.high_freq_factor, 1e-6, 1e6)
        _require_count("rope_scaling", {"original_max_position_embeddings": self.original_max_seq_len})
        low, high = self.low_freq_factor, self.high_freq_factor
        _require(low < high, f"rope_scaling.low_freq_factor ({low:g}) must be below high_freq_factor ({high:g})")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention: `num_heads` queries share `num_kv_heads` keys and values, rotated by RoPE."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        counts = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        _require_count("attention", counts)
        _require_between("attention", "rope_theta", self.rope_theta, 1, 1e12)
        _require(self.head_dim % 2 == 0, f"attention.head_dim must be even for RoPE, not {self.head_dim}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention.num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """SwiGLU feed-forward of width `hidden_dim`."""

    hidden_dim: int

    def __post_init__(self) -> None:
        _require_count("mlp", {"hidden_dim": self.hidden_dim})


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Square image patches that enter the token stream at the places of `image_token_id` (Fuyu)."""

    patch_size: int = 8
    num_channels: int = 3
    image_token_id: int

    def __post_init__(self) -> None:
        _require_count("vision", {"patch_size": self.patch_size, "num_channels": self.num_channels})
        _require(
            self.num_channels in {1, 3}, f"vision.num_channels must be 1 (grey) or 3 (RGB), not {self.num_channels}"
        )

    @property
    def patch_dim(self) -> int:
        """Values in one patch: patch_size x patch_size x num_channels."""
        return self.patch_size**2 * self.num_channels


@dataclass(frozen=True, kw_only=True)
class HavocConfig:
    """The whole decoder. A value out of range is a `HavocError` that names the field."""

    vocab_size: int
    d_model: int
    num_layers: int
    attention: AttentionConfig
    mlp: MLPConfig
    vision: VisionConfig | None = None
    max_seq_len: int
    norm_eps: float = 1e-5
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require_count("config", {"vocab_size": self.vocab_size, "d_model": self.d_model})
        _require_count("config", {"num_layers": self.num_layers}, most=MAX_LAYERS)
        _require_count("config", {"max_seq_len": self.max_seq_len}, most=MAX_CONTEXT)
        _require_between("config", "norm_eps", self.norm_eps, 0, 1)
        _require_between("config", "dropout", self.dropout, 0, 0.99)
        _require_between("config", "initializer_range", self.initializer_range, 0, 1)
        self._require_token_ids()

    def _require_token_ids(self) -> None:
        token_ids = [("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)]
        token_ids += [("eos_token_id", token_id) for token_id in self.eos_token_ids]
        if self.vision is not None:
            token_ids += [("vision.image_token_id", self.vision.image_token_id)]
        for name, token_id in token_ids:
            is_in_table = token_id is None or (type(token_id) is int and 0 <= token_id < self.vocab_size)
            _require(is_in_table, f"{name} {token_id!r} is not in the vocabulary of {self.vocab_size} tokens")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: none, one or several."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def preset(cls, name: str) -> HavocConfig:
        """The shape of that name: one of `PRESETS`, dashes or underscores, with or without the prefix `havoc-`."""
        key = name.lower().replace("_", "-").removeprefix("havoc-")
        _require(key in PRESETS, f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
        presets = {"7b": cls.havoc_7b, "pico": cls.pico, "nano": cls.nano}
        presets |= {"edge-135m": cls.edge_135m, "edge-360m": cls.edge_360m}
        return presets[key]()

    @classmethod
    def havoc_7b(cls) -> HavocConfig:
        """The seed's shape. It has 5,957,685,248 parameters: the name rounds up."""
        return cls(
            vocab_size=70_000,
            d_model=4096,
            num_layers=32,
            attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
            mlp=MLPConfig(hidden_dim=11_008),
            max_seq_len=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    @classmethod
    def pico(cls, *, vision: VisionConfig | None = None) -> HavocConfig:
        """The smallest shape that still has every part, for tests."""
        return cls(
            vocab_size=64,
            d_model=32,
            num_layers=2,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
            mlp=MLPConfig(hidden_dim=64),
            vision=vision,
            max_seq_len=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    @classmethod
    def nano(cls) -> HavocConfig:
        """The shape of the bundled, trained model: text and 8 x 8 RGB patches."""
        return cls(
            vocab_size=512,
            d_model=128,
            num_layers=4,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
            mlp=MLPConfig(hidden_dim=384),
            vision=VisionConfig(patch_size=8, num_channels=3, image_token_id=3),
            max_seq_len=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    @classmethod
    def edge_135m(cls) -> HavocConfig:
        """The shape of SmolLM2-135M."""
        return cls._smollm2(d_model=576, num_layers=30, num_heads=9, num_kv_heads=3, hidden_dim=1536)

    @classmethod
    def edge_360m(cls) -> HavocConfig:
        """The shape of SmolLM2-360M."""
        return cls._smollm2(d_model=960, num_layers=32, num_heads=15, num_kv_heads=5, hidden_dim=2560)

    @classmethod
    def _smollm2(
        cls, *, d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int
    ) -> HavocConfig:
        return cls(
            vocab_size=49_152,
            d_model=d_model,
            num_layers=num_layers,
            attention=AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64, rope_theta=1e5),
            mlp=MLPConfig(hidden_dim=hidden_dim),
            max_seq_len=8192,
            pad_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
        )

    def replace(self, **changes: Any) -> HavocConfig:  # noqa: ANN401 - the fields of this class, checked by it
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
