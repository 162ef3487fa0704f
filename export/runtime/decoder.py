"""The decoder of an artifact in ONNX Runtime: token ids in, logits out, and a cache of past keys and values. No torch.

    B batch, T new tokens, P past tokens, S = P + T, D model, V vocab, R image patches

The past stays on the device: the output of one step is bound as input of the next, and Python does not read it. By
default ONNX Runtime allocates the past again at every step; with a capacity, steps write into fixed buffers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnxruntime as ort

from ...errors import HavocError
from ...model.config_file import read_config
from ...model.tokenizer import Tokenizer
from .artifact import asked_alpha, check_files, read_manifest
from .binding import BoundCall
from .devices import CPU_PROVIDER, kind_of_provider
from .dialects import DIALECTS
from .interface import require_interface, require_replaceable
from .live import LiveWeights
from .options import DEFAULT_OPTIONS, GraphOptions, options_of
from .past import CacheLayout, KeyValueBuffers, Past
from .providers import open_graph, placement, require_provider, run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ...model.config import HavocConfig
    from .providers import Placement

DECODER, EMBEDDING, VISION = "model.onnx", "embedding.onnx", "vision.onnx"
_NUMPY_TYPES: dict[str, type[np.float32 | np.float16]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """An open artifact (or a graph with weights in memory), ready for prefill and single steps."""

    def __init__(
        self,
        config: HavocConfig,
        graphs: Mapping[str, Path | bytes],
        *,
        options: GraphOptions = DEFAULT_OPTIONS,
        tokenizer: Tokenizer | None = None,
        provider: str = CPU_PROVIDER,
        provider_options: Mapping[str, str] | None = None,
        num_threads: int | None = None,
        weights: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
        packs_weights: bool = True,
        profile: Path | None = None,
        data_folder: Path | None = None,
        live: LiveWeights | None = None,
    ) -> None:
        """Open `graphs` by file name; see `open` for the usual way. `options` are those the graphs were built with.

        Graphs in memory find their data file in `data_folder`. `weights` gives initializers by graph and name, in the
        graph's dtype and shape. They replace the ones in the data file and are not copied before the runtime packs
        them. Without `packs_weights` the runtime computes with the mapped file alone: it holds no second copy in its
        own order, and quantized products are slow. `live` are the matrices that `set_alpha` switches.
        """
        require_provider(provider)
        self.config = config
        self.tokenizer = tokenizer
        self.provider = provider
        self.options = options.fitted(config.max_seq_len)
        self._has_cuda_graphs = (provider_options or {}).get("enable_cuda_graph", "0") == "1"
        self._graph_ids = itertools.count()
        if self._has_cuda_graphs and options.cache == "dynamic":
            raise HavocError("enable_cuda_graph captures the steps of a static cache; export with --cache static")
        if self._has_cuda_graphs and live is not None:
            raise HavocError(
                "enable_cuda_graph captures the addresses of weights, but a live artifact switches them: leave it out"
            )
        self._live = live
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._weights: list[ort.OrtValue] = []  # alias the caller's arrays and keep them alive
        for name, graph in graphs.items():
            self._sessions[name], values = open_graph(
                graph,
                provider=provider,
                num_threads=num_threads if name == DECODER else 1,
                weights=(weights or {}).get(name, {}),
                packs_weights=packs_weights,
                provider_options=_options_of_graph(name, provider_options or {}),
                profile=profile if name == DECODER else None,
                data_folder=data_folder,
            )
            self._weights += values
        self._decoder = self._sessions[DECODER]
        self._embedding = self._sessions.get(EMBEDDING)
        self._vision = self._sessions.get(VISION)
        require_interface(config, self._decoder, self._embedding, self._vision)
        if live is not None:
            require_replaceable(self._decoder, live)
        inputs = {item.name: item for item in self._decoder.get_inputs()}
        self._past_names = [name for name in inputs if name.startswith("past_key_values.")]
        self._has_positions = "position_ids" in inputs
        self._output_names = [item.name for item in self._decoder.get_outputs()]
        self._cache = CacheLayout(
            num_tensors=len(self._past_names),
            num_kv_heads=config.attention.num_kv_heads,
            head_dim=config.attention.head_dim,
            dtype=_NUMPY_TYPES[inputs[self._past_names[0]].type],
            device=kind_of_provider(provider).tensors,
        )
        self._no_features = ort.OrtValue.ortvalue_from_numpy(np.zeros((0, config.d_model), self._cache.dtype))

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        provider: str = CPU_PROVIDER,
        provider_options: Mapping[str, str] | None = None,
        num_threads: int | None = None,
        weights: Mapping[str, NDArray[Any]] | None = None,
        is_chat: bool = True,
        profile: Path | None = None,
        alpha: Mapping[str, float] | None = None,
        num_mixtures: int = 1,
    ) -> Self:
        """Open an artifact folder after checking its manifest, sizes and links (hashes are `verify`'s work).

        Prompts go through the base's chat template where it has one and `is_chat` does not say otherwise.
        `num_threads` None leaves the choice to ONNX Runtime; `weights` replaces initializers of the decoder by name;
        `provider_options` are added to those that `runtime` sets, where `profile` is explained too; with
        `enable_cuda_graph` "1" the steps of a static cache are captured. `alpha` chooses the mixture of a live artifact
        (None: the manifest's), see `set_alpha`; the last `num_mixtures` that had to be summed stay in memory. A
        provider this machine lacks is an `IdentityError`; a damaged folder or graph, and an `alpha` for an artifact
        that holds one mixture only, is a `HavocError`.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        weights_asked = asked_alpha(manifest, alpha, where=str(directory))
        config = read_config(directory)
        tokenizer = Tokenizer.load(directory) if "tokenizer.json" in manifest.files else None
        if tokenizer is not None and not is_chat:
            tokenizer = tokenizer.without_chat()
        names = [DECODER] if config.vision is None else [DECODER, EMBEDDING, VISION]
        graphs = {name: directory / name for name in names}
        if provider != CPU_PROVIDER and manifest.structure.get("compute") == "w8a8":
            raise HavocError(f"{directory}: its w8a8 products run on the CPU only; for a card, export --compute int8")
        require_provider(provider)
        live = None
        if manifest.live is not None:
            device = kind_of_provider(provider).tensors
            live = LiveWeights(
                directory,
                manifest.live,
                alpha=manifest.alpha,
                rule=manifest.rule,
                device=device,
                num_threads=num_threads,
                num_kept=num_mixtures,
            )
        session = cls(
            config,
            graphs,
            options=options_of(manifest),
            tokenizer=tokenizer,
            provider=provider,
            provider_options=provider_options,
            num_threads=num_threads,
            weights={DECODER: weights or {}},
            profile=profile,
            live=live,
        )
        if live is not None:
            live.switch(weights_asked)
        return session

    @property
    def alpha(self) -> dict[str, float] | None:
        """The weights of a live artifact's experts as they are now; None where there is nothing to switch."""
        return None if self._live is None else dict(self._live.alpha)

    def set_alpha(self, alpha: Mapping[str, float]) -> None:
        """Answer with the mixture `alpha` from here on; experts that it does not name get the weight 0.

        An expert alone, and a mixture that is kept, is switched to at once; any other is summed first, see `live`.
        What was read before belongs to the mixture that read it: prompts are read again. An artifact that is not live,
        an unknown expert and a weight that is not finite are a `HavocError`, and nothing is switched.
        """
        if self._live is None:
            raise HavocError("this artifact holds one mixture, folded: export it with --live to choose another alpha")
        self._live.switch(alpha)

    @property
    def _version(self) -> int:
        return 0 if self._live is None else self._live.version

    @property
    def pad_id(self) -> int:
        """The id that fills short rows; it is never seen."""
        if self.tokenizer is not None:
            return self.tokenizer.pad_id
        return self.config.pad_token_id or 0

    @property
    def extends_many_rows(self) -> bool:
        """Whether several rows can go on behind a past by several tokens each, repeated from one row of their own."""
        return DIALECTS[self.options.dialect].extends_many_rows and self.options.cache == "dynamic"

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token of one row."""
        return self._cache.num_tensors * math.prod(self._cache.shape(1, 1)) * np.dtype(self._cache.dtype).itemsize

    @property
    def max_tokens(self) -> int:
        """The longest text, prompt included: the model's context, or a static cache's length."""
        return self.options.cache_len or self.config.max_seq_len

    @property
    def provider_options(self) -> dict[str, str]:
        """The options that ONNX Runtime says the provider runs with."""
        return {name: str(value) for name, value in self._decoder.get_provider_options()[self.provider].items()}

    def end_profiling(self) -> Path:
        """Write what was recorded since `open(profile=...)` of the decoder's nodes, and return the JSON file."""
        return Path(self._decoder.end_profiling())

    def placement(self) -> Placement:
        """Which provider runs each node of every graph, as ONNX Runtime recorded it."""
        return placement(self._sessions, self.provider)

    def empty_past(self, num_rows: int, *, capacity: int | None = None, num_rows_later: int | None = None) -> Past:
        """A past of no tokens for a batch of `num_rows`; `keep_rows` may repeat them to `num_rows_later` rows.

        With a capacity in tokens (always, when the cache is static) keys and values lie in buffers allocated here, and
        extending allocates nothing. Then a past is valid until the second extension after it, with a static cache
        until an earlier past is extended; several generations at once need an empty past each.
        """
        cache_len = self.options.cache_len
        if cache_len is not None and capacity is not None and capacity > cache_len:
            raise HavocError(f"{capacity} tokens do not fit this artifact's static cache of {cache_len}")
        capacity = cache_len or capacity
        if capacity is not None:
            num_most = max(num_rows, num_rows_later or 0)
            buffers = KeyValueBuffers(self._cache, num_most, capacity, is_static=cache_len is not None)
            return Past(num_rows=num_rows, num_tokens=0, buffers=buffers)
        empty = np.zeros(self._cache.shape(num_rows, 0), self._cache.dtype)
        held = tuple(ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past_names)
        return Past(num_rows=num_rows, num_tokens=0, held=held)

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
        logits_BNV, present = self._extend(input_ids, attention_mask, past, patches)
        return logits_BNV[:, -1].copy(), present

    def extend_all(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        past: Past,
        patches: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], Past]:
        """As `extend`, with the logits of every new token, fp32 [B, T, V]; needs a graph that computes them all."""
        if self.options.logits == "last":
            raise HavocError("this artifact computes the logits of the last token only; export it with --logits all")
        logits_BTV, present = self._extend(input_ids, attention_mask, past, patches)
        return logits_BTV.copy(), present

    def _extend(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        past: Past,
        patches: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float32], Past]:
        num_rows, num_new = input_ids.shape
        num_total = past.num_tokens + num_new
        self._check(input_ids, past, patches)
        if not DIALECTS[self.options.dialect].extends_many_rows:
            self._check_padding(input_ids.shape, attention_mask, past)
        if attention_mask is None:
            positions = np.arange(past.num_tokens, num_total)[None]
        else:
            positions = np.maximum(np.cumsum(attention_mask, axis=1)[:, -num_new:] - 1, 0)
        if past.buffers is None:
            return self._extend_held(input_ids, attention_mask, positions, past, patches)
        past.buffers.require_room(num_total)
        call = past.buffers.calls.get(input_ids.shape) or self._bind_call(past.buffers, input_ids.shape)
        if self._live is not None and call.version != self._live.version:
            call.bind_weights(self._live)
        logits, side = call.run(past.buffers, past, input_ids, attention_mask, positions, self._features(patches))
        present = Past(num_rows=num_rows, num_tokens=num_total, buffers=past.buffers, side=side, version=self._version)
        return logits, present

    def _bind_call(self, buffers: KeyValueBuffers, shape: tuple[int, int]) -> BoundCall:
        """Bind calls of a new shape [B, T]; single steps of all rows stay bound, of all other shapes the last."""
        for other in [other for other in buffers.calls if other != (buffers.num_rows, 1)]:
            del buffers.calls[other]
        graph_id = None
        if self._has_cuda_graphs:
            graph_id = next(self._graph_ids) if shape[1] == 1 else -1
        call = BoundCall(self._decoder, self._embedding, self.config, buffers, shape, graph_id=graph_id)
        buffers.calls[shape] = call
        return call

    def _extend_held(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        positions: NDArray[np.int64],
        past: Past,
        patches: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float32], Past]:
        num_rows, num_new = input_ids.shape
        num_total = past.num_tokens + num_new
        if attention_mask is None:
            attention_mask = np.ones((num_rows, num_total), np.int64)
        binding = self._decoder.io_binding()
        if self._embedding is None:
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
        else:
            binding.bind_ortvalue_input("inputs_embeds", self._embed(self._embedding, input_ids, patches))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(attention_mask))
        if self._has_positions:
            positions = np.ascontiguousarray(np.broadcast_to(positions, input_ids.shape))
            binding.bind_cpu_input("position_ids", positions)
        for name, value in zip(self._past_names, past.held, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in ({} if self._live is None else self._live.values).items():
            binding.bind_ortvalue_input(name, value)
        for name in self._output_names:
            binding.bind_output(name, "cpu" if name == "logits" else self._cache.device)
        run(self._decoder, binding)
        logits, *present = binding.get_outputs()
        held = tuple(present)
        return logits.numpy(), Past(num_rows=num_rows, num_tokens=num_total, held=held, version=self._version)

    def _embed(
        self, embedding: ort.InferenceSession, input_ids: NDArray[np.int64], patches: NDArray[np.float32] | None
    ) -> ort.OrtValue:
        binding = embedding.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
        binding.bind_ortvalue_input("image_features", self._features(patches))
        binding.bind_output("inputs_embeds", self._cache.device)
        run(embedding, binding)
        return binding.get_outputs()[0]

    def _features(self, patches: NDArray[np.float32] | None) -> ort.OrtValue:
        if patches is None:
            return self._no_features
        assert self._vision is not None  # noqa: S101
        binding = self._vision.io_binding()
        binding.bind_cpu_input("patches", np.ascontiguousarray(patches, dtype=self._cache.dtype))
        binding.bind_output("image_features", self._cache.device)
        run(self._vision, binding)
        return binding.get_outputs()[0]

    def _check(self, input_ids: NDArray[np.int64], past: Past, patches: NDArray[np.float32] | None) -> None:
        """Raise a `HavocError` unless ids and images fit the model and the past."""
        num_rows, num_new = input_ids.shape
        if past.num_tokens + num_new > self.config.max_seq_len:
            num_total = past.num_tokens + num_new
            raise HavocError(
                f"{num_total} tokens exceed the model's context of {self.config.max_seq_len}; shorten the prompt"
            )
        if input_ids.size == 0:
            raise HavocError("the prompt is empty; give at least one token")
        if num_rows != past.num_rows:
            raise HavocError(f"{num_rows} rows of token ids for a past of {past.num_rows} rows")
        if past.num_tokens and past.version != self._version:
            raise HavocError("another mixture read this past: after set_alpha, read the prompt again")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise HavocError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}"
            )
        if patches is not None or (self.config.vision is not None and num_new > 1):
            self._check_images(input_ids, patches)

    def _check_padding(self, shape: tuple[int, int], mask_BS: NDArray[np.int64] | None, past: Past) -> None:
        """Raise a `HavocError` for rows that a dialect without `extends_many_rows` does not read."""
        name, (num_rows, num_new) = self.options.dialect, shape
        is_chunk = past.num_tokens > 0 and num_new > 1
        if is_chunk and num_rows > 1:
            msg = f"{num_new} new tokens in each of {num_rows} rows after {past.num_tokens}: the {name} dialect goes on"
            raise HavocError(f"{msg} with one row, or one token a row; read the whole prompts at once")
        if mask_BS is None:
            return
        if (np.diff(mask_BS, axis=1) < 0).any():
            raise HavocError("padding after a token: pad rows on the left")
        if is_chunk and not mask_BS[:, -num_new:].all():
            msg = (
                f"padding among {num_new} new tokens after {past.num_tokens}: the {name} dialect takes it at the start"
            )
            raise HavocError(f"{msg} only; read the whole padding in the first chunk")

    def _check_images(self, input_ids: NDArray[np.int64], patches: NDArray[np.float32] | None) -> None:
        if self.config.vision is None:
            raise HavocError("this model reads text only: patches cannot be read")
        num_image_tokens = int((input_ids == self.config.vision.image_token_id).sum())
        num_patches = 0 if patches is None else len(patches)
        if num_image_tokens != num_patches:
            raise HavocError(
                f"{num_patches} patches for {num_image_tokens} image tokens; every image token takes one patch"
            )

    def keep_rows(self, past: Past, rows: NDArray[np.int64]) -> Past:
        """The past of `rows`, in their order: some left out, some repeated.

        In buffers there is room for as many rows as `empty_past` was told.
        """
        if past.buffers is not None:
            return past.buffers.kept(past, rows)
        kept = (np.take(array, rows, axis=0) for array in past.arrays())
        held = tuple(ort.OrtValue.ortvalue_from_numpy(array, self._cache.device, 0) for array in kept)
        return replace(past, num_rows=len(rows), held=held)


def _options_of_graph(name: str, options: Mapping[str, str]) -> dict[str, str]:
    """Provider options of one graph: only the decoder's steps keep their shapes, so only they can be captured."""
    return {key: value for key, value in options.items() if name == DECODER or key != "enable_cuda_graph"}
