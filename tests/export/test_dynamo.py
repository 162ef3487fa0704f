"""A second, independent derivation: torch.onnx traces the module, and both graphs give the same logits and cache."""

from __future__ import annotations

import warnings

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.config import HavocConfig
from havoc_core.model.transformer import HavocModel

CHUNKS = (9, 1, 7)
VARIANTS = [
    GraphOptions(),
    GraphOptions(cache="static"),
    GraphOptions(dialect="contrib"),
    GraphOptions(dialect="contrib", cache="static"),
]


class _Flat(nn.Module):
    """HavocModel with its cache as flat inputs and outputs, as an exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        logits, present = self.model(input_ids, attention_mask, pairs, use_cache=True, last_only=True)
        return (logits, *(tensor for pair in present for tensor in pair))


@pytest.fixture(scope="module")
def source(configs: dict[str, HavocConfig], source_with, with_wide_heads) -> Source:
    made: Source = source_with(with_wide_heads(configs["text"]))
    return made


@pytest.fixture(scope="module")
def traced(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    config = source.config
    model = HavocModel.from_tensors(config, source.tensors, source="test")
    attention = config.attention
    past = [torch.randn(2, attention.num_kv_heads, 5, attention.head_dim) for _ in range(2 * config.num_layers)]
    shapes = ({0: "batch", 1: "new"}, {0: "batch", 1: "total"}, tuple({0: "batch", 2: "past"} for _ in past))
    path = tmp_path_factory.mktemp("traced") / "model.onnx"
    arguments = (torch.randint(0, 64, (2, 3)), torch.ones(2, 8, dtype=torch.long), *past)
    names = [f"past{index}" for index in range(len(past))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Flat(model).eval(),
            arguments,
            str(path),
            input_names=["input_ids", "attention_mask", *names],
            dynamo=True,
            opset_version=23,
            dynamic_shapes=shapes,
            verbose=False,
        )
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def session(request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    """Our graph, in every way to write it."""
    return DecoderSession.open(export_artifact(source, tmp_path_factory.mktemp("ours") / "a", options=request.param))


@pytest.mark.parametrize("splits", [(17,), (1,) * 6, CHUNKS], ids=["prefill", "steps", "chunks"])
def test_both_graphs_agree(
    traced: ort.InferenceSession, source: Source, session: DecoderSession, splits: tuple[int, ...]
) -> None:
    """Logits and every key and value, on prefill from an empty past, single steps and chunks, with left padding."""
    # GroupQueryAttention continues one row at a time
    is_one_row = session.options.dialect == "contrib" and splits == CHUNKS
    ids = np.random.default_rng(1).integers(0, source.config.vocab_size, (1 if is_one_row else 2, sum(splits)))
    mask = np.ones_like(ids)
    mask[1:, : splits[0] // 3] = 0
    past = session.empty_past(len(ids))
    theirs_past = [value.numpy() for value in past.values]
    start = 0
    for size in splits:
        stop = start + size
        ours, past = session.extend(ids[:, start:stop], mask[:, :stop], past)
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        feeds |= {f"past{index}": value for index, value in enumerate(theirs_past)}
        theirs, *theirs_past = traced.run(None, feeds)
        assert np.abs(ours - theirs[:, -1]).max() < 1e-4
        for value, other in zip(past.values, theirs_past, strict=True):
            assert np.abs(value.numpy()[0] - other[0]).max() < 1e-4
        start = stop
