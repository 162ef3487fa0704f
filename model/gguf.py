"""A GGUF file as a base: its configuration, and its tensors by Hugging Face name, one at a time.

`GgufTensors` does for a file what `weights.StoredTensors` does for a directory. A tensor is dequantized to fp32 when it
is needed (`gguf.quants.dequantize`), so its hash is that of the Hugging Face directory from `havoc import FILE --out
DIR`: an expert of one of them fits the other. Files of the architecture `llama` store the rows of q and k in another
order (the pairs that RoPE rotates are neighbours; llama.cpp, `convert_hf_to_gguf.py`, `permute`); here they are put
back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .config_file import is_gguf
from .families import family_of_gguf
from .gguf_config import ROPE_FREQUENCIES, config_of
from .gguf_header import BlockType, Header, StoredTensor, read_header
from .tensors import EMBEDDING, FINAL_NORM, HEAD, layer_name
from .weights import StoredTensors, open_tensors, require_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .config import HavocConfig

_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK_BYTES = 1 << 24
"""Of stored blocks that are dequantized at a time: the library makes several temporary copies."""


@dataclass(frozen=True)
class GgufBlocks:
    """A tensor as the file stores it: `rows` uint8 [num_rows, bytes of a row], in the row order of Hugging Face."""

    type: BlockType
    shape: tuple[int, ...]
    rows: NDArray[np.uint8]


class GgufTensors(Mapping[str, Tensor]):
    """Tensors of a GGUF file by Hugging Face name, fp32, each read and dequantized when it is needed.

    `blocks(name)` gives the same tensor in the file's form, so that its own quantization can be kept: blocks are along
    a row, so a changed order of q and k moves whole rows and does not change any block.
    """

    def __init__(self, path: str | Path) -> None:
        header = read_header(Path(path))
        self.path = header.path
        self._config = config_of(header)
        self._is_permuted = family_of_gguf(header.metadata["general.architecture"]).is_gguf_permuted
        self._file_of = _by_name(header)
        require_tensors(self, self._config, source=self.path)

    def __getitem__(self, name: str) -> Tensor:
        stored, order = self._file_of[name], self._row_order(name)
        rows = self._rows(stored)
        values = np.empty((stored.num_rows, stored.shape[-1]), np.float32)
        step = max(1, _CHUNK_BYTES // stored.row_bytes)
        for start in range(0, stored.num_rows, step):
            values[start : start + step] = _dequantized(rows[start : start + step], stored.type)
        return torch.from_numpy(values if order is None else values[order]).reshape(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, read from the header."""
        return self._file_of[name].shape

    def block_type(self, name: str) -> BlockType:
        """How the file stores one tensor, read from the header."""
        return self._file_of[name].type

    def blocks(self, name: str) -> GgufBlocks:
        """One tensor in the file's form, with rows in the order of Hugging Face; a copy only if rows move."""
        stored, order = self._file_of[name], self._row_order(name)
        rows = self._rows(stored)
        return GgufBlocks(stored.type, stored.shape, rows if order is None else rows[order])

    def _rows(self, stored: StoredTensor) -> NDArray[np.uint8]:
        shape = (stored.num_rows, stored.row_bytes)
        return np.memmap(self.path, np.uint8, mode="r", offset=stored.offset_bytes, shape=shape)

    def _row_order(self, name: str) -> NDArray[np.int64] | None:
        """Which row of the file is row i; None: the same."""
        attention = self._config.attention
        num_heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}.get(name.split(".")[-2], 0)
        if not num_heads or not self._is_permuted:
            return None
        pairs = np.arange(num_heads * attention.head_dim).reshape(num_heads, attention.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(-1)


def open_weights(path: str | Path, config: HavocConfig) -> StoredTensors | GgufTensors:
    """The tensors of a base, a Hugging Face directory or a GGUF file, each read when it is needed."""
    return GgufTensors(path) if is_gguf(path) else open_tensors(path, is_tied=config.tie_word_embeddings)


def _by_name(header: Header) -> dict[str, StoredTensor]:
    """The tensors by Hugging Face name; RoPE's frequencies are part of the configuration."""
    return {_name(name): stored for name, stored in header.tensors.items() if name != ROPE_FREQUENCIES}


def _name(name: str) -> str:
    """The Hugging Face name of a tensor; one that no model of ours has keeps its own, and is refused by it."""
    if name in _TOP:
        return _TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.partition(".")
    if not name.startswith("blk.") or not block.isdecimal() or str(int(block)) != block or part not in _PARTS:
        return name
    return f"{layer_name(int(block), _PARTS[part]).removesuffix('weight')}{kind}"


def _dequantized(rows: NDArray[np.uint8], block: BlockType) -> NDArray[np.float32]:
    import gguf

    kind = gguf.GGMLQuantizationType[block.name]
    plain = {"F32": np.float32, "F16": np.float16}
    data = np.ascontiguousarray(rows)
    values = gguf.quants.dequantize(data.view(plain[block.name]) if block.name in plain else data, kind)
    return values.astype(np.float32, copy=False)
