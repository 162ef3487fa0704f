"""Small GGUF files as llama.cpp's converter writes them, by the writer and quantizers of the `gguf` library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>")
WHOLE = ("<think>", "</think>")
D_MODEL, HIDDEN, NUM_LAYERS, CONTEXT = 256, 512, 2, 512
HEADS = {"llama": (8, 2, 32), "qwen2": (8, 2, 32), "qwen3": (4, 2, 128)}
"""Query heads, key-value heads and head width; transformers reads qwen3 with its default width of 128 only."""
CORPUS = [
    "What is 12 + 345? It is 357. The year 2024 had 366 days, 8784 hours.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(add(i, 2 * i))\n",
    "La reina Sofía vivió en Zürich; Ærø, naïve café, señor, où est-il?",
    "Привет, мир! Как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ٢٠٢٤.",  # noqa: RUF001
    "你好，世界。今天天气很好。日本語のテキストです。안녕하세요 세계",  # noqa: RUF001
    "🙂🚀👩🏽‍🚀 it's they're I'll don't HELLO World iPhone XMLHttpRequest",
] * 4
SENTENCEPIECE = [f"<0x{byte:02X}>" for byte in range(256)]
NO_QUANTIZER = {"Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2))}
NO_QUANTIZER |= {"Q6_K": (210, (208,))}
"""Bytes of a block and where its half-precision scales lie: the library reads these types and does not write them."""

_PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
} | {f"self_attn.{part}_proj.{kind}": f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")}


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens (special ones first) and merges of a byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*SPECIAL, *WHOLE]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    backend.train_from_iterator(CORPUS, trainer)
    ids = backend.get_vocab(with_added_tokens=True)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return sorted(ids, key=ids.__getitem__), [" ".join(pair) for pair in merges]


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece BPE: control tokens, 256 bytes, pieces by falling score."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    ids = backend.get_vocab()
    letters = [token for token in sorted(ids, key=ids.__getitem__) if len(token) == 1]
    pieces = [token for token in sorted(ids, key=ids.__getitem__) if len(token) > 1]
    tokens = ["<unk>", "<s>", "</s>", *SENTENCEPIECE, *pieces, *letters]
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces) + len(letters))]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)


def hugging_face_tensors(architecture: str, num_rows: int, *, is_tied: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights as large as trained ones, by Hugging Face name."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = HEADS[architecture]
    wide, narrow = num_heads * head_dim, num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (num_rows, D_MODEL)}
    for layer in range(NUM_LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (D_MODEL,),
            "self_attn.q_proj.weight": (wide, D_MODEL),
            "self_attn.k_proj.weight": (narrow, D_MODEL),
            "self_attn.v_proj.weight": (narrow, D_MODEL),
            "self_attn.o_proj.weight": (D_MODEL, wide),
            "post_attention_layernorm.weight": (D_MODEL,),
            "mlp.gate_proj.weight": (HIDDEN, D_MODEL),
            "mlp.up_proj.weight": (HIDDEN, D_MODEL),
            "mlp.down_proj.weight": (D_MODEL, HIDDEN),
        }
        if architecture == "qwen2":
            parts |= {f"self_attn.{part}_proj.bias": ((wide if part == "q" else narrow),) for part in "qkv"}
        if architecture == "qwen3":
            parts |= {f"self_attn.{part}_norm.weight": (head_dim,) for part in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes |= {"model.norm.weight": (D_MODEL,)} | ({} if is_tied else {"lm_head.weight": (num_rows, D_MODEL)})
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.5 if "embed" in name else 1.2 * shape[-1] ** -0.5
        tensors[name] = noise * scale if len(shape) == 2 else noise * 0.3 if name.endswith("bias") else 1 + noise * 0.2
    return tensors


def stored_name(name: str) -> str:
    """What llama.cpp calls a tensor of Hugging Face."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top |= {"lm_head.weight": "output.weight"}
    if name in top:
        return top[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}"


def permuted(array: np.ndarray, num_heads: int) -> np.ndarray:
    """The order in which llama.cpp stores q and k of the architecture llama (`LlamaModel.permute`)."""
    return (
        array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    block: str = "Q8_0",
    is_tied: bool = True,
    vocabulary: str = "gpt2",
    pre: str = "smollm",
    chat: str | None = CHAT,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: str | None = None,
) -> dict[str, torch.Tensor]:
    """Write a whole model and return its tensors before they were quantized, by Hugging Face name.

    `keys` replaces or adds metadata (None: leaves it out), `extra` adds F32 tensors, `without` leaves one out.
    """
    tokens, fields = _tokenizer_fields(vocabulary, pre, chat)
    tensors = hugging_face_tensors(architecture, len(tokens), is_tied=is_tied)
    num_heads, num_kv_heads, head_dim = HEADS[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    fields |= {
        f"{architecture}.block_count": NUM_LAYERS,
        f"{architecture}.context_length": CONTEXT,
        f"{architecture}.embedding_length": D_MODEL,
        f"{architecture}.feed_forward_length": HIDDEN,
        f"{architecture}.attention.head_count": num_heads,
        f"{architecture}.attention.head_count_kv": num_kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
        f"{architecture}.rope.freq_base": 1e5,
        f"{architecture}.vocab_size": len(tokens),
        "general.license": "apache-2.0",
    }
    for key, value in (fields | dict(keys or {})).items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    for name, tensor in tensors.items():
        if name != without:
            array = tensor.numpy()
            heads = {"q_proj": num_heads, "k_proj": num_kv_heads}.get(name.split(".")[-2])
            if heads and architecture == "llama":
                array = permuted(array, heads)
            _add_tensor(writer, stored_name(name), array, block if tensor.ndim == 2 else "F32")
    for name, array in (extra or {}).items():
        _add_tensor(writer, name, array, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tokenizer_fields(vocabulary: str, pre: str, chat: str | None) -> tuple[list[str], dict[str, Any]]:
    fields: dict[str, Any] = {"tokenizer.ggml.model": vocabulary, "tokenizer.chat_template": chat}
    if vocabulary == "llama":
        tokens, scores, types = sentencepiece_vocabulary()
        fields |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types}
        fields |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
        fields |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    else:
        tokens, merges = byte_level_vocabulary()
        kinds = dict.fromkeys(SPECIAL, 3) | dict.fromkeys(WHOLE, 4)
        fields |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
        fields |= {"tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens]}
        fields |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
        fields |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2}
        fields |= {"tokenizer.ggml.add_bos_token": False}
    return tokens, fields | {"tokenizer.ggml.tokens": tokens}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else adders[type(value)])(key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, block: str) -> None:
    kind = gguf.GGMLQuantizationType[block]
    if block in NO_QUANTIZER:
        data = _random_blocks(array.shape, block)
    elif block in {"F32", "F16"}:
        writer.add_tensor(name, array.astype(np.float32 if block == "F32" else np.float16))
        return
    else:
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def _random_blocks(shape: tuple[int, ...], block: str) -> np.ndarray:
    size, scales = NO_QUANTIZER[block]
    rng = np.random.default_rng(shape[0] * 7 + shape[1])
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    for at in scales:
        values = rng.uniform(1e-5, 1e-4, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., at : at + 2] = values.view(np.uint8)
    return blocks.reshape(shape[0], -1)
