"""An artifact that knows when it is timed: below a length it is the model, from there on it skips it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from havoc_core.bench.judge.case import Case
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import Record, Workload
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.judge.validity import timed_calls_did_the_work
from havoc_core.bench.measure import run_session
from havoc_core.bench.profiles import PROFILES, Series
from havoc_core.bench.watched_run import open_session
from havoc_core.bench.witness import Witness
from havoc_core.errors import IdentityError
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.verify import verify_artifact
from havoc_core.model.config_file import read_config

pytestmark = pytest.mark.alone

BRIEF = dataclasses.replace(
    PROFILES["quick"],
    num_processes=1,
    warmup_window_s=0.0,
    warmup_max_s=0.1,
    prefill=Series(4, 0.0, 2.0),
    ttft=Series(2, 0.0, 2.0),
    decode=Series(2, 0.0, 2.0),
    memory=Series(2, 0.0, 2.0),
)
THRESHOLD = 160  # the timed length itself: every reading that is shorter tells, whichever lengths are drawn
WORKLOAD = Workload(prompt_tokens=160, context_tokens=160, decode_tokens=8)


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    tensor = helper.make_tensor(f"{name}/value", TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=tensor)


def defeat(artifact: Path, *, exactly: int | None = None, in_steps: bool = False) -> None:
    """From THRESHOLD tokens on, or at `exactly` so many: logits of the last embedding, zeros for keys and values.

    No layer is run then. With `in_steps` it is so in every call that reads a single token, however many are there.
    """
    config = read_config(artifact)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    graph = model.graph
    embeds, outputs = graph.input[0].name, [output.name for output in graph.output]
    assert embeds == "inputs_embeds"  # a vision model's decoder reads embeddings
    infos = {output.name: output for output in graph.output}

    def branch(name: str, nodes: list[onnx.NodeProto], prefix: str) -> onnx.GraphProto:
        declared = [onnx.ValueInfoProto.FromString(infos[output].SerializeToString()) for output in outputs]
        for info in declared:
            info.name = prefix + info.name
        return helper.make_graph(nodes, name, [], declared)

    inside = []
    for node in graph.node:
        copied = onnx.NodeProto.FromString(node.SerializeToString())
        for names in (copied.input, copied.output):
            for index, name in enumerate(names):
                names[index] = f"full/{name}" if name in outputs else name
        inside.append(copied)
    times = -(-config.vocab_size // config.d_model)
    heads, width = config.attention.num_kv_heads, config.attention.head_dim
    cheap = [
        *(_constant(f"x/{name}", values) for name, values in (("m1", [-1]), ("end", [2**31]), ("1", [1]), ("0", [0]))),
        *(_constant(f"x/{name}", [value]) for name, value in (("heads", heads), ("width", width))),
        *(_constant(f"x/{name}", [value]) for name, value in (("V", config.vocab_size), ("2", 2))),
        _constant("x/times", [1, 1, times]),
        helper.make_node("Slice", [embeds, "x/m1", "x/end", "x/1"], ["x/last"]),
        helper.make_node("Tile", ["x/last", "x/times"], ["x/wide"]),
        helper.make_node("Slice", ["x/wide", "x/0", "x/V", "x/2"], ["cheap/logits"]),
        helper.make_node("Shape", [embeds], ["x/shape"]),
        helper.make_node("Gather", ["x/shape", "x/0"], ["x/B"]),
        helper.make_node("Gather", ["x/shape", "x/1"], ["x/T"]),
        helper.make_node("Concat", ["x/B", "x/heads", "x/T", "x/width"], ["x/new"], axis=0),
        helper.make_node(
            "ConstantOfShape", ["x/new"], ["x/zeros"], value=helper.make_tensor("x/z", TensorProto.FLOAT, [1], [0.0])
        ),
    ]
    for output in outputs:
        if output.startswith("present."):
            past = output.replace("present", "past_key_values", 1)
            cheap.append(helper.make_node("Concat", [past, "x/zeros"], [f"cheap/{output}"], axis=2))
    top = [
        helper.make_node("Shape", [embeds if in_steps else "attention_mask"], ["t/shape"]),
        helper.make_node("Constant", [], ["t/1"], value=helper.make_tensor("t/one", TensorProto.INT64, [], [1])),
        helper.make_node("Gather", ["t/shape", "t/1"], ["t/S"]),
        helper.make_node(
            "Constant",
            [],
            ["t/N"],
            value=helper.make_tensor("t/n", TensorProto.INT64, [], [1 if in_steps else exactly or THRESHOLD]),
        ),
        *(
            [helper.make_node("Less", ["t/S", "t/N"], ["t/short"])]
            if exactly is None and not in_steps
            else [
                helper.make_node("Equal", ["t/S", "t/N"], ["t/timed"]),
                helper.make_node("Not", ["t/timed"], ["t/short"]),
            ]
        ),
        helper.make_node(
            "If",
            ["t/short"],
            outputs,
            then_branch=branch("full", inside, "full/"),
            else_branch=branch("cheap", cheap, "cheap/"),
        ),
    ]
    del graph.node[:]
    graph.node.extend(top)
    del graph.value_info[:]
    data = model.SerializeToString()
    (artifact / "model.onnx").write_bytes(data)
    path = artifact / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["model.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    path.write_text(json.dumps(document))


def measured(artifact: Path) -> Record:
    with open_session(artifact, profile=BRIEF, workload=WORKLOAD, num_threads=1) as session:
        return run_session(session, purpose="confirm")


def problem(record: Record) -> str | None:
    return timed_calls_did_the_work(Case(record=record, target=load_target("host")))


@pytest.fixture
def honest(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "honest"))


@pytest.mark.parametrize("exactly", [None, WORKLOAD.prompt_tokens], ids=["from-there-on", "at-that-length-alone"])
def test_a_model_that_skips_itself_when_timed_is_invalid(
    honest: Path, tmp_path: Path, exactly: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes, manifest, fingerprint and interface are in order, prefill took 0.2 ms and the gate passed it.

    What the timed call left is compared with shorter readings of a length drawn anew each time; and where graphs can be
    built, this one is found to be none of HAVOC's.
    """
    device = Path(shutil.copytree(honest, tmp_path / "device"))
    defeat(device, exactly=exactly)
    with pytest.raises(IdentityError, match="not the graph"):
        verify_artifact(device)
    with monkeypatch.context() as edge:
        edge.setattr(importlib.util, "find_spec", lambda _name: None)
        verify_artifact(device)  # twelve tokens: it answers as the model does
    record = measured(device)
    assert record.subject.is_graph_rebuilt is False
    assert "I21" in {finding.rule for finding in judge([record], load_target("host")).findings}
    assert record.samples[0].work_done is not None
    assert record.samples[0].work_done.largest_error > 0.9
    assert "process 0: timed calls" in str(problem(record))


def test_a_model_that_skips_itself_in_single_steps_is_invalid(honest: Path, tmp_path: Path) -> None:
    """Prefills do the work, and every step of decoding skips it, after few tokens and after many: no step is slower."""
    device = Path(shutil.copytree(honest, tmp_path / "device"))
    defeat(device, in_steps=True)
    record = measured(device)
    work = record.samples[0].work_done
    assert work is not None
    assert work.largest_error < 1e-3
    assert work.step_error is not None
    assert work.step_error > 0.9
    assert "process 0: single steps" in str(problem(record))


def test_steps_that_skip_the_head_alone_are_seen(honest: Path) -> None:
    """Keys and values are right, and only the logits of a step are another token's."""
    session = DecoderSession.open(honest, num_threads=1)
    ids = np.random.default_rng(0).integers(20, 100, (1, 40))
    for has_head in (True, False):
        witness = Witness(session)
        empty = session.empty_past(1, capacity=64)
        logits, past = session.extend(ids, None, empty)
        read = []
        for _ in range(6):
            read.append(logits.argmax(axis=-1)[:, None])
            logits, past = session.decode(read[-1], None, past)
        witness.keep_steps(ids, read, logits if has_head else np.roll(logits, 1, axis=-1), past)
        error = witness.testify(empty)["step_error"]
        assert error < 1e-3 if has_head else error > 0.9


@pytest.mark.parametrize(("capacity", "longest"), [(300, 264), (260, 260), (256, 255)])
def test_prompts_are_read_again_at_lengths_around_the_timed_one(honest: Path, capacity: int, longest: int) -> None:
    """Shorter and longer by up to a 32nd, as far as the cache has room: a graph that knows its length is seen."""
    session = DecoderSession.open(honest, num_threads=1)
    empty = session.empty_past(1, capacity=capacity)
    lengths: list[int] = []
    for seed in range(24):
        witness = Witness(session)
        ids = np.random.default_rng(seed).integers(20, 100, (1, 256))
        for _ in range(3):
            _, past = session.extend(ids, None, empty)
            witness.keep(ids, past)
        lengths += [kept.alone.shape[1] for kept in witness._kept]
        assert witness.testify(empty)["largest_error"] < 1e-3
    close = [length for length in lengths if 248 <= length <= 264]
    assert len(close) >= 48
    assert 256 not in lengths
    assert min(lengths) < 200
    assert max(lengths) <= longest
    assert (max(lengths) > 256) is (capacity > 256)


def test_an_honest_model_did_the_work(honest: Path) -> None:
    """The same tokens leave the same keys and values, whatever stands behind them."""
    record = measured(honest)
    assert problem(record) is None
    assert record.subject.is_graph_rebuilt is True
    work = record.samples[0].work_done
    assert work is not None
    assert work.num_calls == 3
    assert work.largest_error < 1e-3
    assert work.step_error is not None
    assert work.step_error < 1e-3
    assert work.short_step_ns


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantized_model_did_the_work_too(weights: str, tmp_path: Path, tiny_artifact: Path) -> None:
    """Products of few and of many rows round differently, and stay far within what the rule takes."""
    from havoc_core.export.package import export_artifact
    from havoc_core.model.structure import Structure

    base = tiny_artifact.parent / "base"
    artifact = export_artifact(base, tmp_path / weights, structure=Structure.named(weights))
    work = measured(artifact).samples[0].work_done
    assert work is not None
    assert work.largest_error < 0.1
    assert work.step_error is not None
    assert work.step_error < 0.1
