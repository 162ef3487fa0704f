"""A graph with the right interface and right hashes that never ends: every command that runs it can be ended."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from havoc_core.errors import HavocError, IdentityError, MeasurementError
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime import foreign
from havoc_core.export.runtime.foreign import foreign_completions
from havoc_core.export.verify import verify_artifact


class Ask:
    """A prompt."""

    text = "the"
    image_png = None


@pytest.fixture(scope="module")
def endless(text_base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose logits wait for a loop of 2**62 rounds."""
    out = export_artifact(text_base_directory, tmp_path_factory.mktemp("hostile") / "artifact")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    graph = model.graph
    logits = graph.output[0].name
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == logits:
                node.output[index] = "z/real"
    number, real, condition = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "z/one"], ["v_next"])],
        "body",
        [helper.make_tensor_value_info(*each, []) for each in (("i", number), ("go", condition), ("v", real))],
        [helper.make_tensor_value_info(*each, []) for each in (("go_on", condition), ("v_next", real))],
    )
    graph.node.extend(
        [
            helper.make_node("Constant", [], ["z/n"], value=helper.make_tensor("n", number, [], [2**62])),
            helper.make_node("Shape", ["attention_mask"], ["z/s"]),  # known only when it runs: not folded on loading
            helper.make_node("ReduceSum", ["z/s"], ["z/t"], keepdims=0),
            helper.make_node("Cast", ["z/t"], ["z/c"], to=condition),
            helper.make_node("Constant", [], ["z/one"], value=helper.make_tensor("o", real, [], [1.0])),
            helper.make_node("Constant", [], ["z/v"], value=helper.make_tensor("v", real, [], [0.0])),
            helper.make_node("Loop", ["z/n", "z/c", "z/v"], ["z/w"], body=body),
            helper.make_node("Mul", ["z/w", "z/v"], ["z/x"]),
            helper.make_node("Add", ["z/real", "z/x"], [logits]),
        ]
    )
    data = model.SerializeToString()
    (out / "model.onnx").write_bytes(data)
    path = out / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["model.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    path.write_text(json.dumps(document))
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("verb", ["verify", "generate"])
def test_a_signal_ends_a_command_that_runs_an_endless_graph(
    endless: Path, verb: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM end it at once, and its child with it. Both were survived: no signal reached Python."""
    words = [verb, str(endless), *(["--prompt", "the"] if verb == "generate" else [])]
    if verb == "verify":  # it opens foreign graphs only where it cannot build them anew
        edge = "import importlib.util, sys; importlib.util.find_spec = lambda name: None"
        (tmp_path / "edge.py").write_text(f"{edge}; from havoc_core.cli import main; sys.exit(main())")
    program = [str(tmp_path / "edge.py")] if verb == "verify" else ["-m", "havoc_core"]
    process = subprocess.Popen([sys.executable, *program, *words], stderr=subprocess.PIPE, text=True)
    child = _busy_child(process.pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code, said
    assert not Path(f"/proc/{child}/exe").exists()


def _busy_child(parent: int) -> int:
    """Wait until a child of the process has used a second of CPU time inside the graph, and return it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                is_worker = b"havoc_core.export.runtime.foreign" in (stat.parent / "cmdline").read_bytes()
                is_open = is_worker and "model.onnx.data" in (stat.parent / "maps").read_text()
            except OSError:
                continue
            if int(fields[1]) == parent and is_open and int(fields[11]) > 300:
                return int(stat.parent.name)
        time.sleep(0.1)
    raise AssertionError("no child runs the graph")


def test_a_deadline_ends_an_endless_graph(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to press Ctrl-C: after its time it is an invalid run, exit code 4, in one line."""
    for name, value in (("_START_S", 8.0), ("_BYTES_PER_S", 1e15), ("_TOKEN_S", 0.0)):
        monkeypatch.setattr(foreign, name, value)
    start = time.monotonic()
    with pytest.raises(IdentityError, match="not the graph"):
        verify_artifact(endless)  # where it can be built anew it is never run
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MeasurementError, match="within 8 s and was ended"):
        verify_artifact(endless)
    with pytest.raises(MeasurementError, match="within 8 s and was ended"):
        foreign_completions(endless, [Ask()], num_bytes=0, max_new_tokens=1)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("name", ["input_ids", "logits", "present.0.key", "batch"])
def test_a_name_that_is_not_utf8_is_one_line(name: str, text_base_directory: Path, tmp_path: Path) -> None:
    """Of an input, an output or an axis: an error with the file's name, no defect of HAVOC's own."""
    from havoc_core.export.runtime.session import DecoderSession

    out = export_artifact(text_base_directory, tmp_path / "artifact")
    data = (out / "model.onnx").read_bytes()
    assert name.encode() in data
    (out / "model.onnx").write_bytes(data.replace(name.encode(), name.encode()[:-1] + b"\xff"))
    with pytest.raises(HavocError, match=r"model\.onnx: (a name in it is not UTF-8|ONNX Runtime cannot open it)"):
        DecoderSession.open(out)


def test_an_honest_graph_says_the_same_from_its_child(text_base_directory: Path, tmp_path: Path) -> None:
    """The child gives what the session gives here."""
    from havoc_core.export.runtime.session import DecoderSession

    out = export_artifact(text_base_directory, tmp_path / "artifact")
    here = DecoderSession.open(out).generate_text([Ask()], max_new_tokens=5)
    assert foreign_completions(out, [Ask()], num_bytes=0, max_new_tokens=5) == here
    shutil.rmtree(out)
