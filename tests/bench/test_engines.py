"""Other engines: each gives the tokens that it should, scripted times are found again, what fails is one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import transformers

from havoc_core.bench import engine_worker, lockstep
from havoc_core.bench.contender import enter
from havoc_core.bench.divergence import compared, next_logits
from havoc_core.bench.duel import Agreement
from havoc_core.bench.judge.engine_files import hash_files
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import load_record
from havoc_core.bench.judge.schema import ProcessSamples, Workload
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.lockstep import Side, blocks_in_lockstep
from havoc_core.bench.profiles import PROFILES, Series
from havoc_core.bench.requests import LogitsRequest
from havoc_core.bench.watched_run import open_session
from havoc_core.cli import main
from havoc_core.errors import HavocError, IdentityError, MeasurementError
from havoc_core.export.package import export_artifact
from tests import gguf_files as files

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.alone

OPENVINO_PYTHON = os.environ.get("HAVOC_OPENVINO_PYTHON") or None
GENAI_PYTHON = os.environ.get("HAVOC_GENAI_PYTHON") or None
WORK = Workload(prompt_tokens=16, context_tokens=16, decode_tokens=6)
NUM_IDS = 300


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, as transformers saves it, with a tokenizer."""
    from havoc_core.model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("engines") / "base"
    tokenizer = train_tokenizer(["one and one is two"], 280)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=NUM_IDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # logits apart, so that no rounding decides between two tokens
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(base: Path) -> Path:
    """The base, exported."""
    return export_artifact(base, base.parent / "artifact")


def tokens_of(old: Side, new: Side) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return both sides' greedy tokens in one block of three turns, who begins alternating."""
    heard: list[Any] = []
    hear = lambda *tokens: heard.append(tokens)  # noqa: E731
    list(blocks_in_lockstep(old, new, num_blocks=1, num_exchanges=3, workload=WORK, num_ids=NUM_IDS, hear=hear))
    return heard


@pytest.mark.parametrize("engine", ["hugging_face", "genai"])
def test_an_engine_gives_the_same_tokens(engine: str, base: Path, artifact: Path, tmp_path: Path) -> None:
    """The same weights, the same prompts: every greedy token is the same, end of text or not."""
    path, python = base, Path(sys.executable)
    if engine == "genai":
        if GENAI_PYTHON is None:
            pytest.skip("no environment with onnxruntime-genai: `make genai` makes one")
        path, python = Path(shutil.copytree(artifact, tmp_path / "genai")), Path(GENAI_PYTHON)
        (path / "manifest.json").unlink()
    with enter(str(artifact)) as ours, enter(str(path), pythons=[python]) as theirs:
        assert theirs.engine == engine
        assert theirs.identity["version"][0].isdigit()
        heard = tokens_of(ours.side("ours"), theirs.side("theirs"))
        theirs.require_unchanged()
    assert len(heard) == 3
    for old, new in heard:
        assert len(old) == WORK.decode_tokens
        assert old == new
    assert len({old for old, _ in heard}) == 3, "each turn has a prompt of its own"


TO_OPENVINO = """
import sys
import openvino
from openvino._offline_transformations import apply_make_stateful_transformation

model = openvino.Core().read_model(sys.argv[1])
past = [name for put in model.inputs for name in put.names if name.startswith("past")]
shapes = {put.any_name: put.get_partial_shape() for put in model.inputs}
for shape in shapes.values():
    shape[0] = 1  # an empty state has no row to begin with
model.reshape(shapes)
apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in past})
openvino.save_model(model, sys.argv[2], compress_to_fp16=False)
"""


@pytest.fixture(scope="module")
def openvino_folder(base: Path, artifact: Path) -> tuple[Path, Path]:
    """The artifact's graph as OpenVINO keeps it, its cache in the state; and the interpreter that runs it."""
    python = OPENVINO_PYTHON or (sys.executable if importlib.util.find_spec("openvino") else None)
    if python is None:
        pytest.skip('needs pip install "havoc-core[openvino]", here or where HAVOC_OPENVINO_PYTHON says')
    folder = base.parent / "openvino"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    words = [python, "-c", TO_OPENVINO, artifact / "model.onnx", folder / "openvino_model.xml"]
    subprocess.run(list(map(str, words)), check=True)
    return folder, Path(python)


def test_openvino_gives_the_same_tokens_and_logits(artifact: Path, openvino_folder: tuple[Path, Path]) -> None:
    """The same graph in another runtime: every greedy token is the same, and the distribution of the next one."""
    folder, python = openvino_folder
    pieces = np.arange(40, 88).reshape(3, 16)
    with enter(str(artifact)) as ours, enter(str(folder), pythons=[python]) as theirs:
        assert theirs.engine == "openvino"
        assert theirs.weight_bytes > 0
        heard = tokens_of(ours.side("ours"), theirs.side("theirs"))
        both = [next_logits(side, pieces, num_ids=280, num_threads=1) for side in (ours, theirs)]
    assert [old for old, _ in heard] == [new for _, new in heard]
    row = compared(*both, both[1], reference="ours", num_untold=0, text_sha256="")
    assert (0 <= row.old_kl < 0.02, row.old_top1) == (True, 1.0), "its precisions are the runtime's own choice"


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason='needs pip install "havoc-core[llama-cpp]"')
def test_llama_cpp_gives_the_same_tokens(tmp_path: Path) -> None:
    """A GGUF of random fp32 weights, in llama.cpp and as HAVOC exports it."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, block="F32")
    artifact = export_artifact(path, tmp_path / "artifact")
    with enter(str(artifact)) as ours, enter(str(path)) as theirs:
        heard = tokens_of(ours.side("ours"), theirs.side("theirs"))
    agreement = Agreement()
    for old, new in heard:
        agreement.hear(old, new)
    assert agreement == Agreement(num_prompts=3, num_first_same=3, num_tokens=18, num_same=18)


class Server(BaseHTTPRequestHandler):
    """A llama-server that follows a script: its times, its tokens, and what goes wrong."""

    prefill_s = step_s = 0.0
    fault = ""
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        if "n_probs" in asked:
            self._tell_probabilities(asked)
            return
        if self.fault == "stalls":
            time.sleep(60.0)
        if self.fault == "busy":
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        number = asked["n_predict"] - (self.fault == "short")
        for place in range(number):
            time.sleep(self.step_s if place else self.prefill_s)
            if self.fault == "dies" and place == 2:
                return
            if self.fault != "untold" or place != 2:
                self._say({"tokens": [place], "stop": False, "tokens_predicted": place + 1})
        read = len(asked["prompt"]) - 4 * (self.fault == "cache")
        self._say({"error": "no room"} if self.fault == "error" else {"stop": True, "timings": {"prompt_n": read}})

    def _tell_probabilities(self, asked: dict[str, Any]) -> None:
        told = [{"id": place, "logprob": -1.0 - place} for place in range(asked["n_probs"] - 1, 0, -1)]
        is_told = self.fault != "untold" or asked["prompt"][0] == 1 or "logit_bias" in asked
        self.send_response(200)
        self.end_headers()
        document = {"completion_probabilities": [{"id": 7, "top_logprobs": told}]} if is_told else {}
        self.wfile.write(json.dumps(document).encode())

    def _say(self, document: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a scripted server."""
    monkeypatch.setattr(Server, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(("prefill_s", "step_s"), [(0.12, 0.03), (0.05, 0.06)])
def test_scripted_times_are_found_again(
    server: str, prefill_s: float, step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known time to the first token and known gaps: found within what sleeping and the wire add."""
    monkeypatch.setattr(Server, "prefill_s", prefill_s)
    monkeypatch.setattr(Server, "step_s", step_s)
    side = Side(name="server", artifact=server, engine="llama_cpp")
    (block,) = blocks_in_lockstep(side, side, num_blocks=1, num_exchanges=6, workload=WORK, num_ids=NUM_IDS)
    assert block.once == {}, "an address tells neither load nor memory"
    firsts = block.turns["time to first token"]
    assert firsts == block.turns["prefill"]
    for quantity, wanted_s, num_calls in (("prefill", prefill_s, 1), ("decode step", step_s, WORK.decode_tokens - 1)):
        turns = [turn for pair in block.turns[quantity] for turn in pair]
        assert all(len(turn.wall_ns) == num_calls and turn.cpu_ns is None for turn in turns)
        usual_ms = statistics.median(statistics.mean(turn.wall_ns) for turn in turns) / 1e6
        assert 0.95 * 1000 * wanted_s <= usual_ms < 1000 * wanted_s + 15  # an event that is late shortens the next gap
    assert all(len(asked["prompt"]) == WORK.prompt_tokens and max(asked["prompt"]) < NUM_IDS for asked in Server.asked)
    assert {(asked["cache_prompt"], asked["temperature"]) for asked in Server.asked} == {(False, 0)}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("short", "5 tokens instead of 6"),
        ("cache", "read 12 of 16 prompt tokens"),
        ("dies", "tokens instead of 6"),
        ("busy", "answers 503"),
        ("error", "no room"),
    ],
)
def test_a_server_that_fails_is_one_line(server: str, fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens than asked for, a prompt out of the cache, a lost connection: no figure is made of it."""
    monkeypatch.setattr(Server, "fault", fault)
    side = Side(name="new", artifact=server, engine="llama_cpp")
    with pytest.raises(MeasurementError, match=f"new: .*{said}") as caught:
        list(blocks_in_lockstep(side, side, num_blocks=1, num_exchanges=1, workload=WORK, num_ids=NUM_IDS))
    assert "\n" not in str(caught.value)


def test_a_server_tells_how_likely_each_token_is(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By id; what it leaves out is as good as impossible; a token that it does not tell is asked for once more."""
    monkeypatch.setattr(Server, "fault", "untold")
    with enter(server) as side:
        found = next_logits(side, np.array([[2, 3], [1, 3], [2, 3]]), num_ids=5, num_threads=1)
    assert np.isnan(found[0]).all(), "nothing was told yet that it could be made to write"
    assert found[1].tolist() == found[2].tolist() == [-100.0, -2.0, -3.0, -4.0, -5.0]
    biases = [asked.get("logit_bias") for asked in Server.asked]
    assert biases == [None, None, None, [[7, 1e4]]]


@pytest.mark.parametrize("engine", ["hugging_face", "genai", "llama_cpp"])
def test_an_engine_tells_the_logits_that_havoc_computes(
    engine: str, base: Path, artifact: Path, tmp_path: Path
) -> None:
    """The same weights, the same pieces: the same distribution of the next token."""
    pieces, ours, path, python = np.arange(40, 88).reshape(3, 16), artifact, base, Path(sys.executable)
    if engine == "genai":
        if GENAI_PYTHON is None:
            pytest.skip("no environment with onnxruntime-genai: `make genai` makes one")
        path, python = artifact, Path(GENAI_PYTHON)
    elif engine == "llama_cpp":
        pytest.importorskip("xllamacpp", reason='needs pip install "havoc-core[llama-cpp]"')
        path = tmp_path / "model.gguf"
        files.write_gguf(path, block="F32")
        ours = export_artifact(path, tmp_path / "artifact")
    with enter(str(ours)) as side:
        wanted = next_logits(side, pieces, num_ids=280, num_threads=1)
    with enter(str(path), pythons=[python], engine=engine) as side:
        if engine == "hugging_face":  # in this process, which has imported transformers already
            request = LogitsRequest(
                artifact=str(path),
                provider="CPUExecutionProvider",
                num_threads=1,
                engine=engine,
                num_ids=280,
                pieces=tuple(map(tuple, pieces.tolist())),
                out=tmp_path / "logits.npy",
            )
            assert engine_worker.tell_logits(request, lambda _: None).num_told == 3
            found = np.load(tmp_path / "logits.npy")
        else:
            found = next_logits(side, pieces, num_ids=280, num_threads=1)
    row = compared(wanted, found, found, reference="ours", num_untold=0, text_sha256="")
    assert 0 <= row.old_kl < 1e-4
    assert row.old_top1 == 1.0


def test_an_engine_that_tells_no_logits_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still be timed; its divergence is not measured, and that is said."""
    module = SimpleNamespace()
    exec(OTHER_ENGINE.format(tokens=[], then="pass", opens="pass"), module.__dict__)
    monkeypatch.setattr(engine_worker, "load_engine", lambda _: module)
    request = LogitsRequest(
        artifact=str(base), provider="", num_threads=1, engine="x", num_ids=9, pieces=((1,),), out=tmp_path / "x.npy"
    )
    with pytest.raises(HavocError, match="pytest reports no token probabilities"):
        engine_worker.tell_logits(request, lambda _: None)


def test_a_server_that_stalls_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer within the longest time of a block: one line under the side's name, and its process is gone."""
    monkeypatch.setattr(Server, "fault", "stalls")
    monkeypatch.setattr(lockstep, "TIMEOUT_S", 3.0)
    side = Side(name="new", artifact=server, engine="llama_cpp")
    with pytest.raises(MeasurementError, match="^new: .* within 3 s"):
        list(blocks_in_lockstep(side, side, num_blocks=1, num_exchanges=1, workload=WORK, num_ids=NUM_IDS))


def test_a_token_that_is_told_late_is_counted(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server holds a token back that ends inside a character: it took its time, and its id is not known."""
    monkeypatch.setattr(Server, "fault", "untold")
    side = Side(name="server", artifact=server, engine="llama_cpp")
    assert tokens_of(side, side) == [((0, 1, -1, 3, 4, 5), (0, 1, -1, 3, 4, 5))] * 3


def test_a_duel_of_two_engines(base: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The document names both engines and how far their tokens agree."""
    options = "--prompt-tokens 16 --decode-tokens 6 --margin 1 --max-time 60 --json --quiet".split()
    code = main(["duel", str(base), str(artifact), *options])
    found = json.loads(capsys.readouterr().out)
    assert code in {0, 1, 3}
    assert code == found["exit_code"]
    assert found["old"]["engine"] == "transformers"
    assert found["old"]["version"] == transformers.__version__
    assert found["new"]["artifact"] == str(artifact)
    assert found["agreement"]["num_same"] >= 0.98 * found["agreement"]["num_tokens"] > 0  # two tokens may be near a tie


BRIEF = dataclasses.replace(
    PROFILES["quick"],
    num_processes=1,
    num_retries=0,
    warmup_window_s=0.0,
    warmup_max_s=0.1,
    prefill=Series(3, 0.0, 2.0),
    ttft=Series(2, 0.0, 2.0),
    decode=Series(2, 0.0, 2.0),
    memory=Series(2, 0.0, 2.0),
)
SMALL = "--prompt-tokens 16 --decode-tokens 6 --threads 1 --wait 0 --json --quiet".split()


@pytest.mark.parametrize("engine", ["genai", "llama_cpp"])
def test_an_engine_has_a_record(
    engine: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times, memory, load and a cold start as of an artifact; version and hashes of the model in it."""
    monkeypatch.setitem(PROFILES, "quick", BRIEF)
    if engine == "genai":
        if GENAI_PYTHON is None:
            pytest.skip("no environment with onnxruntime-genai: `make genai` makes one")
        model, words = artifact, ["--engine", engine, "--engine-python", GENAI_PYTHON]
    else:
        pytest.importorskip("xllamacpp", reason='needs pip install "havoc-core[llama-cpp]"')
        model, words = tmp_path / "model.gguf", []  # told by what the file is
        files.write_gguf(model, block="F32")
    out = tmp_path / "run"
    assert main(["bench", str(model), *words, *SMALL, "--out", str(out)]) in {0, 4}  # 4: a busy machine
    assert json.loads(capsys.readouterr().out)["record"] == str(out / "record.json")
    record = load_record(out / "record.json")
    assert record.subject.engine is not None
    assert record.subject.engine.version[0].isdigit()
    assert record.subject.files == hash_files(model)
    assert (record.protocol.io_binding, record.protocol.kv_cache, record.workload.ttft_from) == (False, None, "ids")
    (process,) = record.samples
    assert len(process.prefill.cpu_ns) == len(process.prefill.duration_ns) >= 3
    assert {(run.num_tokens, len(run.step_ns)) for run in process.decode} == {(6, 5)}
    assert (process.num_nonfinite_logits, process.nodes_by_provider, process.work_done) == (None, {}, None)
    assert process.num_distinct_outputs >= 2
    assert record.memory.peak_rss_bytes > record.memory.rss[0].baseline_bytes > 0
    assert set(record.memory.rss[0].phase_peak_bytes) == {"load", "first_run", "steady"}
    assert record.cold_start.load_ns > 0
    judged = judge([record], load_target("host"), artifact_files=hash_files(model), this_cpu=record.device.cpu)
    assert judged.verdict != "pass"
    assert {finding.rule for finding in judged.findings} <= {"V02", "V03", "V05", "V25"}  # few tokens, a busy machine


def test_transformers_is_timed_like_an_artifact(base: Path) -> None:
    """The samples of one process, in this one: as many calls and tokens as the plan asks for, all on the CPU."""
    with enter(str(base)) as model, open_session(model, profile=BRIEF, workload=WORK, num_threads=1) as session:
        assert session.request(0).engine == "hugging_face"
        found = engine_worker.measure_latency(session.request(0), lambda _: None)
    process = ProcessSamples.model_validate(found.samples, strict=False)
    assert len(process.prefill.cpu_ns) == len(process.prefill.duration_ns) >= 3
    assert {(run.num_tokens, len(run.step_ns)) for run in process.decode} == {(6, 5)}
    assert process.num_nonfinite_logits is None


def test_a_record_that_cannot_be_made_is_one_line(
    base: Path, artifact: Path, tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only an artifact can do, an address, an engine for another file, a short context: nothing is measured."""
    for words, said in (
        ([str(base), "--batch", "2"], "--batch is only for artifacts"),
        ([str(base), "--passes", "2"], "--passes is only for artifacts"),
        ([str(base), "--alpha", "math=1"], "--alpha is only for artifacts"),
        ([str(base), "--provider", "CUDAExecutionProvider"], "--provider is only for artifacts"),
        ([str(base), "--prompt-tokens", "4096"], f"{base} has 256"),
        ([str(base), "--n", "10"], "measured without accuracy"),
        ([str(base), "--task", "math"], "measured without accuracy"),
        ([server], "it cannot have a record"),
        ([str(base), "--engine", "llama_cpp"], "llama.cpp opens a .gguf file"),
        ([str(base), "--engine", "genai"], "opens a folder with genai_config.json"),
        ([str(tmp_path / "nothing")], "not an artifact, a .gguf file"),
        ([str(tmp_path)], "no manifest.json"),
    ):
        small = [] if "--prompt-tokens" in words else ["--prompt-tokens", "16", "--decode-tokens", "4"]
        assert main(["bench", *words, *small, "--quiet", "--out", str(tmp_path / "run")]) == 2, words
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


OTHER_ENGINE = """
PACKAGE = "pytest"
TOKENS = {tokens}

class Model:
    is_own_process = True

    def generate(self, ids, num_tokens):
        yield from TOKENS[:num_tokens + 1]
        {then}

def prepare():
    pass

def open_model(path, *, num_threads, capacity):
    {opens}
    return Model()
"""


COUNTING_ENGINE = """
import time

PACKAGE = "pytest"

class Model:
    is_own_process = True

    def generate(self, ids, num_tokens):
        time.sleep(0.02)
        for place in range(num_tokens):
            time.sleep(0.005 if place else 0.0)
            yield (sum(ids) + place) % 300

def prepare():
    pass

def open_model(path, *, num_threads, capacity):
    time.sleep(0.03)
    return Model()
"""


def test_another_engine_is_one_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/extending.md says: a file with three names is timed; its load, prompts and steps are found again."""
    module = SimpleNamespace()
    exec(COUNTING_ENGINE, module.__dict__)
    monkeypatch.setattr(engine_worker, "load_engine", lambda _: module)
    with enter(str(base)) as model, open_session(model, profile=BRIEF, workload=WORK, num_threads=1) as session:
        found = engine_worker.measure_latency(session.request(0), lambda _: None)
    process = ProcessSamples.model_validate(found.samples, strict=False)
    assert process.load_ns >= 30e6
    assert min(process.prefill.duration_ns) >= 20e6
    assert all(run.prefill_ns >= 20e6 and min(run.step_ns) >= 5e6 for run in process.decode)
    assert process.num_distinct_outputs > 2


@pytest.mark.parametrize(
    ("fill", "error", "said"),
    [
        ({"tokens": [7] * 3}, MeasurementError, "pytest gave 2 tokens instead of 1"),
        ({"tokens": []}, MeasurementError, "pytest gave 0 tokens instead of 1"),
        ({"tokens": [9000]}, MeasurementError, "gave token 9000, but the model has 300"),
        ({"tokens": [7], "then": "raise OSError('no room')"}, MeasurementError, "failed while it was measured"),
        ({"tokens": [7], "opens": "raise ValueError('odd file')"}, HavocError, "cannot open .* odd file"),
    ],
)
def test_an_engine_that_does_not_do_what_it_is_asked(
    fill: dict[str, Any], error: type[HavocError], said: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens than asked for, tokens that there are not, a failure: one line, and no figure."""
    text = OTHER_ENGINE.format(**{"tokens": [], "then": "pass", "opens": "pass"} | fill)
    module = SimpleNamespace()
    exec(text, module.__dict__)
    monkeypatch.setattr(engine_worker, "load_engine", lambda _: module)
    with enter(str(base)) as model, open_session(model, profile=BRIEF, workload=WORK, num_threads=1) as session:
        request = session.request(0)
        with pytest.raises(error, match=said) as caught:
            engine_worker.measure_latency(request, lambda _: None)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def closed_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_what_cannot_be_measured_is_one_line(
    base: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine that is not there, files it refuses, a size that is none, no server: exit 2, nothing measured."""
    genai, refused, lies, damaged = (tmp_path / name for name in ("genai", "refused", "lies", "model.gguf"))
    for folder in (genai, refused, lies):
        folder.mkdir()
    (genai / "genai_config.json").write_text('{"model": {"vocab_size": 9, "context_length": 4096}}')
    (refused / "config.json").write_text('{"vocab_size": 9, "max_position_embeddings": 4096}')
    (lies / "config.json").write_text('{"vocab_size": -1, "max_position_embeddings": 4096}')
    damaged.write_bytes(b"GGUF")
    nobody = f"http://127.0.0.1:{closed_port()}"
    for old, said in (
        (genai, 'onnxruntime-genai is not installed: pip install "havoc-core[genai]"'),
        (refused, "old: transformers cannot open"),
        (lies, "says -1 of the size of its vocabulary"),
        (damaged, "model.gguf"),
        (nobody, "old: llama.cpp cannot open"),
        (tmp_path / "nothing", "not an artifact, a .gguf file"),
    ):
        small = ["--prompt-tokens", "16", "--decode-tokens", "4", "--quiet"]
        assert main(["duel", str(old), str(artifact), *small]) == 2, old
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert main(["duel", str(base), str(artifact), "--provider", "CUDAExecutionProvider", "--prompt-tokens", "16"]) == 2
    assert "leave out --provider" in capsys.readouterr().err


def test_files_that_change_are_another_model(base: Path, tmp_path: Path) -> None:
    """What was hashed is what was measured, for an engine's files too."""
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    with enter(str(copy)) as side:
        side.require_unchanged()
        os.utime(copy / "config.json", (1, 1))
        with pytest.raises(IdentityError, match=r"config\.json changed"):
            side.require_unchanged()
