"""The runtime of an artifact: ONNX Runtime sessions, a cache of past keys and values, greedy text. No torch.

    B batch, T new tokens, P past tokens, S = P + T, D model, V vocab, R image patches

The past stays on the device as ONNX Runtime values: what one step returns is bound to the next, unread by Python. The
provider that was asked for is the one that runs, or an error says so: ONNX Runtime by itself falls back to the CPU in
silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnxruntime as ort

from ..errors import HavocError, IdentityError
from ..model.config import HavocConfig
from ..model.tokenizer import Tokenizer
from .artifact import check_files, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .completion import PromptLike

CPU = "CPUExecutionProvider"
DECODER, EMBEDDING, VISION = "model.onnx", "embedding.onnx", "vision.onnx"
_DEVICES = {"CUDAExecutionProvider": "cuda", CPU: "cpu"}
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Past:
    """Keys and values of every layer, [B, num_kv_heads, P, head_dim] each, alternating, on the session's device."""

    values: tuple[ort.OrtValue, ...]

    @property
    def num_tokens(self) -> int:
        """P, padding included."""
        return int(self.values[0].shape()[2])


class DecoderSession:
    """An open artifact (or a graph with weights in memory), ready for prefill, single steps and greedy text."""

    def __init__(
        self,
        config: HavocConfig,
        graphs: Mapping[str, Path | bytes],
        *,
        tokenizer: Tokenizer | None = None,
        provider: str = CPU,
        num_threads: int | None = None,
        weights: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
        packs_weights: bool = True,
    ) -> None:
        """Open `graphs` by file name; see `open` for the usual way.

        `weights` gives initializers by graph and name, in the graph's dtype and shape. They replace the ones in the
        data file and are not copied before the runtime packs them. Without `packs_weights` the runtime computes with
        the mapped file alone: it holds no second copy in its own order, and quantized products are slow.
        """
        _require_provider(provider)
        self._packs_weights = packs_weights
        self.config = config
        self.tokenizer = tokenizer
        self.provider = provider
        self._device = _DEVICES[provider]
        self._weights: list[ort.OrtValue] = []  # alias the caller's arrays and keep them alive
        weights = weights or {}
        sessions = {
            name: self._open(graph, num_threads if name == DECODER else 1, weights.get(name, {}))
            for name, graph in graphs.items()
        }
        self._decoder = sessions[DECODER]
        self._embedding = sessions.get(EMBEDDING)
        self._vision = sessions.get(VISION)
        inputs = {item.name: item for item in self._decoder.get_inputs()}
        self._past_names = [name for name in inputs if name.startswith("past_key_values.")]
        self._output_names = [item.name for item in self._decoder.get_outputs()]
        self._dtype = _NUMPY_TYPES[inputs[self._past_names[0]].type]
        self._no_features = ort.OrtValue.ortvalue_from_numpy(np.zeros((0, config.d_model), self._dtype))

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        provider: str = CPU,
        num_threads: int | None = None,
        weights: Mapping[str, NDArray[Any]] | None = None,
    ) -> Self:
        """Open an artifact folder after checking its manifest, sizes and links (hashes are `verify`'s work).

        `num_threads` None leaves the choice to ONNX Runtime; `weights` replaces initializers of the decoder by name. A
        provider this machine lacks is an `IdentityError`; a damaged folder or graph is a `HavocError`.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        config = HavocConfig.from_directory(directory)
        tokenizer = Tokenizer.load(directory) if "tokenizer.json" in manifest.files else None
        names = [DECODER] if config.vision is None else [DECODER, EMBEDDING, VISION]
        graphs = {name: directory / name for name in names}
        replaced = {DECODER: weights or {}}
        return cls(config, graphs, tokenizer=tokenizer, provider=provider, num_threads=num_threads, weights=replaced)

    def _open(
        self, graph: Path | bytes, num_threads: int | None, weights: Mapping[str, NDArray[Any]]
    ) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        if not self._packs_weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False  # it would keep every unpacked matrix
        if weights:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
            self._weights += values
        source = graph if isinstance(graph, bytes) else str(graph)
        label = "graph" if isinstance(graph, bytes) else str(graph)
        try:
            session = ort.InferenceSession(source, options, providers=[self.provider])
        except Exception as error:
            msg = f"{label}: ONNX Runtime cannot open it ({_first_line(error)})"
            raise HavocError(msg) from error
        if session.get_providers()[0] != self.provider:
            msg = f"{label}: asked for {self.provider}, ONNX Runtime would run on {session.get_providers()[0]}"
            raise IdentityError(msg)
        session.disable_fallback()
        return session

    def placement(self) -> dict[str, list[str]]:
        """Which provider runs each node of the decoder, as ONNX Runtime recorded it: provider to sorted node names."""
        nodes: dict[str, list[str]] = {}
        for part in self._decoder.get_provider_graph_assignment_info():
            nodes.setdefault(part.ep_name, []).extend(node.name for node in part.get_nodes())
        return {name: sorted(found) for name, found in nodes.items()}

    def empty_past(self, num_rows: int) -> Past:
        """A past of no tokens for a batch of `num_rows`."""
        attention = self.config.attention
        empty = np.zeros((num_rows, attention.num_kv_heads, 0, attention.head_dim), self._dtype)
        return Past(tuple(ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past_names))

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        patches: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], Past]:
        """Read whole prompts: ids and mask [B, T] (1 real, 0 padding on the left), patches [R, patch_dim].

        Returns the logits fp32 [B, V] of the next token and the past.
        """
        return self.extend(input_ids, attention_mask, self.empty_past(len(input_ids)), patches)

    def decode(
        self, token_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None, past: Past
    ) -> tuple[NDArray[np.float32], Past]:
        """Append one token a row: ids [B, 1], mask [B, P + 1]; returns logits fp32 [B, V] and the past."""
        return self.extend(token_ids, attention_mask, past)

    def extend(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        past: Past,
        patches: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], Past]:
        """Append T tokens a row: ids [B, T], mask [B, P + T] or None for all real; logits fp32 [B, V] and the past.

        Ids outside the vocabulary, a sequence longer than the context, or images that do not match the image tokens
        are a `HavocError`.
        """
        num_rows, num_new = input_ids.shape
        num_total = past.num_tokens + num_new
        self._check_ids(input_ids, num_total)
        if attention_mask is None:
            attention_mask = np.ones((num_rows, num_total), np.int64)
            positions = np.tile(np.arange(past.num_tokens, num_total), (num_rows, 1))
        else:
            positions = np.maximum(np.cumsum(attention_mask, axis=1)[:, -num_new:] - 1, 0)
        binding = self._decoder.io_binding()
        if self._embedding is None:
            if patches is not None:
                msg = "this model reads text only: patches cannot be read"
                raise HavocError(msg)
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
        else:
            binding.bind_ortvalue_input("inputs_embeds", self._embed(input_ids, patches))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(attention_mask))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in zip(self._past_names, past.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._output_names:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._run(self._decoder, binding)
        logits, *present = binding.get_outputs()
        return logits.numpy()[:, -1], Past(tuple(present))

    def _embed(self, input_ids: NDArray[np.int64], patches: NDArray[np.float32] | None) -> ort.OrtValue:
        assert self._embedding is not None  # noqa: S101
        assert self.config.vision is not None  # noqa: S101
        if input_ids.shape[1] > 1 or patches is not None:
            num_image_tokens = int((input_ids == self.config.vision.image_token_id).sum())
            num_patches = 0 if patches is None else len(patches)
            if num_image_tokens != num_patches:
                msg = f"{num_patches} patches for {num_image_tokens} image tokens; every image token takes one patch"
                raise HavocError(msg)
        binding = self._embedding.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
        binding.bind_ortvalue_input("image_features", self._features(patches))
        binding.bind_output("inputs_embeds", self._device)
        self._run(self._embedding, binding)
        return binding.get_outputs()[0]

    def _features(self, patches: NDArray[np.float32] | None) -> ort.OrtValue:
        if patches is None:
            return self._no_features
        assert self._vision is not None  # noqa: S101
        binding = self._vision.io_binding()
        binding.bind_cpu_input("patches", np.ascontiguousarray(patches, dtype=self._dtype))
        binding.bind_output("image_features", self._device)
        self._run(self._vision, binding)
        return binding.get_outputs()[0]

    def _check_ids(self, input_ids: NDArray[np.int64], num_total: int) -> None:
        if num_total > self.config.max_seq_len:
            msg = f"{num_total} tokens exceed the model's context of {self.config.max_seq_len}; shorten the prompt"
            raise HavocError(msg)
        if input_ids.size == 0:
            msg = "the prompt is empty; give at least one token"
            raise HavocError(msg)
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            msg = f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}"
            raise HavocError(msg)

    @staticmethod
    def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            msg = f"ONNX Runtime failed while running the model ({_first_line(error)})"
            raise HavocError(msg) from error

    def keep_rows(self, past: Past, rows: NDArray[np.int64]) -> Past:
        """The past of some rows only, in the order of `rows`."""
        kept = (np.take(_on_host(value), rows, axis=0) for value in past.values)
        return Past(tuple(ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for array in kept))

    def generate_text(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Complete prompts, greedily at temperature 0: the new text of each, in the order given; see `completion`."""
        from .completion import generate_text

        return generate_text(
            self, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed
        )


def _on_host(value: ort.OrtValue) -> NDArray[Any]:
    """The values as an array; on the CPU without a copy."""
    return np.from_dlpack(value._ortvalue) if value.device_name() == "cpu" else value.numpy()  # noqa: SLF001


def _require_provider(provider: str) -> None:
    available = [name for name in ort.get_available_providers() if name in _DEVICES]
    if provider not in available:
        msg = f"execution provider {provider!r} is not in this ONNX Runtime; there are {', '.join(available)}"
        raise IdentityError(msg)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
