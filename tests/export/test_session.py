"""The runtime gives torch's greedy text, says which provider ran, and refuses what it cannot do."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from havoc_core.adapt.tasks.task import Prompt
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.completion import generate_ids, left_padded
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.past import Past
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.verify import verify_artifact
from havoc_core.model.checkpoint import load_base
from havoc_core.model.generation import generate_text
from tests.export.listed import relist

VARIANTS = [
    GraphOptions(dialect="contrib"),
    GraphOptions(dialect="contrib", cache="static", cache_len=200),
    GraphOptions(cache="static", logits="all"),
]


@pytest.fixture(scope="module")
def session(whole: Path) -> DecoderSession:
    return DecoderSession.open(whole, num_threads=1)


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def prompts() -> list[Prompt]:
    texts = ["What is 12 + 30?", "the quick brown", "def f(x):", "x", "jumps over the lazy dog and more"]
    plain = [Prompt(text * times) for times in (1, 2) for text in texts]
    return [
        *plain,
        Prompt("What is it?", png(16, 8)),
        Prompt("And this?", png(8, 8, 1)),
        Prompt("the end", png(24, 16, 2)),
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_text_is_that_of_torch(base_directory: Path, session: DecoderSession, batch_size: int) -> None:
    """Text and images mixed, any batch size: the completions of the base's own torch model, in the order given."""
    base = load_base(base_directory)
    theirs = generate_text(base.model, base.tokenizer, prompts(), max_new_tokens=20)
    ours = session.generate_text(prompts(), max_new_tokens=20, batch_size=batch_size)
    assert ours == theirs


def test_rows_that_end_are_dropped_and_the_others_stay_right(session: DecoderSession) -> None:
    """With ends at different steps a batch gives what each row gives alone, and nothing after the end."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(4, 300, rng.integers(2, 30)).tolist() for _ in range(12)]
    endless = generate_ids(session, rows, max_new_tokens=16)
    eos_ids = [endless[0][3], endless[1][7], endless[2][1]]
    batched = generate_ids(session, rows, max_new_tokens=16, eos_ids=eos_ids)
    alone = [generate_ids(session, [row], max_new_tokens=16, eos_ids=eos_ids)[0] for row in rows]
    assert batched == alone
    for full, ended in zip(endless, batched, strict=True):
        stop = next((index + 1 for index, token_id in enumerate(full) if token_id in eos_ids), 16)
        assert ended == full[:stop]


def test_sampling_is_repeatable_and_follows_the_distribution(session: DecoderSession) -> None:
    """The same seed gives the same text; the first token's shares are those of the softmax."""
    settings = {"max_new_tokens": 6, "temperature": 1.0}
    first = session.generate_text(prompts(), seed=5, **settings)
    assert first == session.generate_text(prompts(), seed=5, **settings)
    assert first != session.generate_text(prompts(), seed=6, **settings)
    row = [5, 9, 11]
    drawn = generate_ids(session, [row] * 512, max_new_tokens=1, temperature=2.0, batch_size=512)
    logits, _ = session.prefill(np.array([row]))
    expected = torch.softmax(torch.from_numpy(logits[0]) / 2.0, dim=0).numpy()
    counts = np.bincount([ids[0] for ids in drawn], minlength=300)
    likely = expected > 0.02
    assert np.abs(counts[likely] / 512 - expected[likely]).max() < 0.1


@pytest.mark.parametrize("splits", [(17,), (1,) * 6, (9, 1, 7), (8, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_buffers_change_where_the_past_lies_and_nothing_else(
    session: DecoderSession, splits: tuple[int, ...], num_rows: int
) -> None:
    """Logits and every key and value, bit for bit those of a past that the runtime allocates; padding included."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 300, (num_rows, sum(splits)))
    mask = np.ones_like(ids)
    mask[1:, : splits[0] // 3] = 0
    for masks in (None, mask):
        ours, theirs, start = session.empty_past(num_rows, capacity=20), session.empty_past(num_rows), 0
        for size in splits:
            new, seen = ids[:, start : start + size], None if masks is None else masks[:, : start + size]
            ours_logits, ours = session.extend(new, seen, ours)
            theirs_logits, theirs = session.extend(new, seen, theirs)
            assert np.array_equal(ours_logits, theirs_logits)
            assert all(map(np.array_equal, ours.arrays(), theirs.arrays()))
            start += size


def test_images_and_dropped_rows_go_through_buffers(session: DecoderSession) -> None:
    """Patches reach their tokens, a row taken out leaves the others as they were."""
    ids = np.array([[5, 3, 3, 9], [6, 3, 3, 8]])
    patches = np.random.default_rng(0).uniform(-1, 1, (4, 192)).astype(np.float32)
    ours, theirs = session.empty_past(2, capacity=8), session.empty_past(2)
    found = []
    for empty in (ours, theirs):
        logits, past = session.extend(ids, None, empty, patches)
        last, _ = session.extend(ids[1:, :1], None, session.keep_rows(past, np.array([1])))
        found.append((logits, last))
    assert all(map(np.array_equal, *found))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_way_to_write_the_graph_gives_the_same_text(
    base_directory: Path, session: DecoderSession, tmp_path: Path, options: GraphOptions
) -> None:
    """Dialects and caches, text and images in one padded batch whose rows end one by one: the same completions."""
    other = DecoderSession.open(export_artifact(base_directory, tmp_path / "a", options=options), num_threads=1)
    assert other.options == options.fitted(256)
    assert other.generate_text(prompts(), max_new_tokens=20) == session.generate_text(prompts(), max_new_tokens=20)


def test_a_static_cache_does_not_move(base_directory: Path, tmp_path: Path) -> None:
    """Past and present are one buffer, of the manifest's length; what does not fit is refused in one line."""
    for dialect in ("standard", "contrib"):
        options = GraphOptions(dialect=dialect, cache="static", cache_len=40)
        session = DecoderSession.open(export_artifact(base_directory, tmp_path / dialect, options=options))
        past = session.empty_past(1)
        places = set()
        for size in (7, 1, 1, 3):
            _, past = session.extend(np.full((1, size), 5), None, past)
            places |= {tuple(past.buffers.pointers[past.side])}
        assert len(places) == 1
        with pytest.raises(HavocError, match="41 tokens .* cache of 40"):
            session.prefill(np.full((1, 41), 5))
        with pytest.raises(HavocError, match="30 prompt tokens .*11"):
            generate_ids(session, [[5] * 30], max_new_tokens=11)
        with pytest.raises(HavocError, match="50 tokens .* static cache of 40"):
            session.empty_past(1, capacity=50)


def test_the_contrib_dialect_says_which_padding_it_takes(base_directory: Path, tmp_path: Path) -> None:
    """Padding at the start of a row only, further chunks for one row only; what would need more is explained."""
    options = GraphOptions(dialect="contrib")
    session = DecoderSession.open(export_artifact(base_directory, tmp_path / "a", options=options))
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 1]])
    _, past = session.extend(np.full((2, 2), 5), mask[:, :2], session.empty_past(2))
    with pytest.raises(HavocError, match="2 new tokens in each of 2 rows"):
        session.extend(np.full((2, 2), 5), None, past)
    with pytest.raises(HavocError, match="padding among 2 new tokens"):
        session.extend(np.full((1, 2), 5), mask[1:], session.keep_rows(past, np.array([1])))
    with pytest.raises(HavocError, match="padding after a token"):
        session.prefill(np.full((1, 2), 5), np.array([[1, 0]]))


def test_logits_of_every_token(base_directory: Path, session: DecoderSession, tmp_path: Path) -> None:
    """`extend_all` gives each position's; a graph that computes the last only says how to get the others."""
    artifact = export_artifact(base_directory, tmp_path / "a", options=GraphOptions(logits="all"))
    every = DecoderSession.open(artifact, num_threads=1)
    ids = np.random.default_rng(0).integers(4, 300, (2, 9))
    for capacity in (None, 9):
        logits, _ = every.extend_all(ids, None, every.empty_past(2, capacity=capacity))
        each = [session.prefill(ids[:, : stop + 1])[0] for stop in range(9)]
        assert np.abs(logits - np.stack(each, axis=1)).max() < 1e-4
    with pytest.raises(HavocError, match="--logits all"):
        session.extend_all(ids, None, session.empty_past(2))


def test_capture_of_steps_needs_a_static_cache(artifact: Path) -> None:
    """Shapes that grow cannot be captured as a CUDA graph; said before anything is opened."""
    with pytest.raises(HavocError, match="--cache static"):
        DecoderSession.open(artifact, provider_options={"enable_cuda_graph": "1"})


def test_steps_into_buffers_allocate_nothing_that_stays(session: DecoderSession) -> None:
    """What a step returns lies where it was allocated: in one buffer, then in the other, then in the first.

    A past is not touched by its own extension, so it can be extended again.
    """
    past = session.empty_past(1, capacity=40)
    places = []
    for _ in range(4):
        _, past = session.extend(np.array([[5]]), None, past)
        places.append(past.values[0].data_ptr())
    assert places[0] == places[2] != places[1] == places[3]
    first, second = (session.extend(np.array([[5]]), None, past)[0] for _ in range(2))
    assert np.array_equal(first, second)


def steps_of(session: DecoderSession, past: Past, splits: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """Logits after each chunk of a fixed text in two rows."""
    ids, start, found = np.random.default_rng(8).integers(4, 300, (2, sum(splits))), 0, []
    for size in splits:
        seen = None if mask is None else mask[:, : start + size]
        logits, past = session.extend(ids[:, start : start + size], seen, past)
        found.append(logits)
        start += size
    return np.stack(found)


@pytest.mark.parametrize("options", [GraphOptions(), *VARIANTS], ids=str)
def test_buffers_forget_what_was_read_before(base_directory: Path, tmp_path: Path, options: GraphOptions) -> None:
    """One set of buffers read again and again, longer and shorter, masked and not, gives what new ones give."""
    session = DecoderSession.open(export_artifact(base_directory, tmp_path / "a", options=options), num_threads=1)
    empty = session.empty_past(2, capacity=12)
    padded = np.ones((2, 12), np.int64)
    padded[1, :3] = 0
    chunked = ((2, 2, 1), (4, 1)) if options.dialect == "standard" else ()
    for splits in ((4, 1, 1, 1, 1, 1, 1), (4, 1), *chunked, (3, 1, 1), (4, 1, 1)):
        for mask in (None, padded, None):
            new = steps_of(session, session.empty_past(2, capacity=12), splits, mask)
            assert np.array_equal(steps_of(session, empty, splits, mask), new)


def test_rows_are_kept_beside_what_they_come_from(session: DecoderSession) -> None:
    """Taking rows out of a past leaves it as it was, to be extended itself."""
    ids = np.array([[5, 7, 9], [6, 8, 4]])
    _, past = session.extend(ids, None, session.empty_past(2, capacity=8))
    before = [array.copy() for array in past.arrays()]
    kept = session.keep_rows(past, np.array([1]))
    assert all(map(np.array_equal, past.arrays(), before))
    assert all(np.array_equal(array, whole[1:]) for array, whole in zip(kept.arrays(), before, strict=True))


def test_buffers_go_with_the_last_past(session: DecoderSession) -> None:
    """Memory of a whole cache is given back at once, not when cycles are collected."""
    gc.disable()
    try:
        past = session.empty_past(1, capacity=8)
        buffers = weakref.ref(past.buffers)
        for _ in range(3):
            _, past = session.extend(np.array([[5]]), None, past)
        del past
        assert buffers() is None
    finally:
        gc.enable()


def test_a_past_that_is_full_is_refused(session: DecoderSession) -> None:
    """The tokens, the room and the rows are named before the runtime writes beyond a buffer."""
    past = session.empty_past(1, capacity=4)
    with pytest.raises(HavocError, match="5 tokens .* past of 4"):
        session.extend(np.array([[5] * 5]), None, past)
    with pytest.raises(HavocError, match="2 rows .* a past of 1"):
        session.extend(np.array([[5], [5]]), None, past)


def test_every_node_runs_on_the_provider_that_was_asked_for(session: DecoderSession) -> None:
    """The runtime's own record of the placement, node by node, of every graph."""
    placement, shapes = session.placement()
    assert shapes == []
    assert set(placement) == {"CPUExecutionProvider"}
    nodes = placement["CPUExecutionProvider"]
    assert len(nodes) > 20
    assert {name.partition(":")[0] for name in nodes} == {"model.onnx", "embedding.onnx", "vision.onnx"}


def test_a_provider_this_machine_lacks_is_refused(artifact: Path) -> None:
    """No silent fallback: exit code 5, whether the provider is unknown or its libraries do not load."""
    for provider in ("CUDAExecutionProvider", "NoSuchExecutionProvider"):
        if provider.startswith("CUDA") and torch.cuda.is_available():
            continue
        with pytest.raises(IdentityError, match=provider):
            DecoderSession.open(artifact, provider=provider)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[5, 300]], "token id 300 is outside the vocabulary of 300"),
        ([[5, -1]], "token id -1 is outside"),
        ([[5] * 257], "257 tokens exceed the model's context of 256"),
        ([[]], "empty"),
        ([[5, 3, 3]], "0 patches for 2 image tokens"),
    ],
)
def test_wrong_input_is_one_clear_line(session: DecoderSession, ids: list[list[int]], message: str) -> None:
    """Ids, lengths and images that do not fit are explained before the runtime sees them."""
    with pytest.raises(HavocError, match=message):
        session.prefill(np.array(ids, np.int64))


INT, STRING = onnx.TensorProto.INT64, onnx.TensorProto.STRING


def graph_of(*more_inputs: onnx.ValueInfoProto) -> bytes:
    """A graph that ONNX Runtime opens and that is no decoder: its logits are its ids."""
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    inputs, outputs = [value("input_ids", INT, ["b", "t"]), *more_inputs], [value("logits", INT, ["b", "t"])]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", inputs, outputs), opset_imports=[onnx.helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    return model.SerializeToString()


def reordered(content: bytes) -> bytes:
    model = onnx.ModelProto.FromString(content)
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([outputs[0], *reversed(outputs[1:])])
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("name", "forge", "match"),
    [
        ("model.onnx", lambda _: graph_of(), "it has no input inputs_embeds"),
        (
            "model.onnx",
            lambda _: graph_of(onnx.helper.make_tensor_value_info("past_key_values.0.key", STRING, ["b"])),
            "it has no input inputs_embeds",
        ),
        ("model.onnx", reordered, "outputs for keys and values are in another order"),
        ("embedding.onnx", lambda _: graph_of(), "it has no input image_features"),
        ("vision.onnx", lambda _: graph_of(), "it has no input patches"),
    ],
    ids=["identity", "strings", "order", "embedding", "vision"],
)
def test_a_graph_of_something_else_is_refused(
    artifact: Path, tmp_path: Path, name: str, forge, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that loads and whose hash is right, but that is no decoder of this configuration: said when opened."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)  # as on a device, which builds no graph
    copy = Path(shutil.copytree(artifact, tmp_path / "forged"))
    relist(copy, name, forge((copy / name).read_bytes()))
    with pytest.raises(HavocError, match=f"{name} is not the graph .*{match}") as caught:
        verify_artifact(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision": None},
        {"vocab_size": 299},
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 8},
        {"hidden_size": 64},
        {"vision": {"patch_size": 1, "num_channels": 1, "image_token_id": 3}},
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(artifact: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its graphs do not fit it, which is said before anything runs."""
    copy = Path(shutil.copytree(artifact, tmp_path / "forged"))
    fields = json.loads((copy / "config.json").read_text()) | changes
    relist(copy, "config.json", json.dumps(fields).encode())
    with pytest.raises(HavocError, match=r"is not the graph of this configuration|says num_parameters \d+"):
        verify_artifact(copy)


def test_images_for_a_text_model_are_refused(text_base_directory: Path, tmp_path: Path) -> None:
    """A text artifact has one graph and says that it cannot see."""
    session = DecoderSession.open(export_artifact(text_base_directory, tmp_path / "a"))
    with pytest.raises(HavocError, match="text only"):
        session.generate_text([Prompt("what?", png(8, 8))], max_new_tokens=2)
    with pytest.raises(HavocError, match="text only"):
        session.prefill(np.array([[1, 2]]), None, np.zeros((1, 192), np.float32))


def test_a_text_that_would_not_fit_the_context_is_refused(session: DecoderSession) -> None:
    """The prompt, what was asked for and the context are named, before anything runs."""
    with pytest.raises(HavocError, match="250 prompt tokens .*7 .* 256"):
        generate_ids(session, [[5] * 250], max_new_tokens=7)
    with pytest.raises(HavocError, match="at least 1"):
        generate_ids(session, [[5]], max_new_tokens=0)


def test_the_image_token_is_never_written(session: DecoderSession) -> None:
    """Not even where it is the likeliest: drawn at a high temperature, every other token comes up."""
    drawn = generate_ids(session, [[5, 6]] * 256, max_new_tokens=20, temperature=50.0, batch_size=256)
    assert set(range(300)) - {token_id for row in drawn for token_id in row} == {3}


def test_left_padding() -> None:
    """Rows end together; the mask is 1 where a token is."""
    ids, mask = left_padded([[1, 2, 3], [4]], pad_id=0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_runs_without_torch(artifact: Path) -> None:
    """Opening and generating load neither torch nor onnx; verifying builds graphs where onnx-ir is, without torch."""
    code = (
        "import sys; from pathlib import Path; from havoc_core.export import DecoderSession\n"
        "from havoc_core.export.verify import verify_artifact; from havoc_core.adapt.tasks.task import Prompt\n"
        f"path = Path({str(artifact)!r})\n"
        "DecoderSession.open(path).generate_text([Prompt('hello')], max_new_tokens=2)\n"
        "loaded = {'torch', 'onnx', 'onnx_ir', 'safetensors'} & set(sys.modules); assert not loaded, loaded\n"
        "verify_artifact(path)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
