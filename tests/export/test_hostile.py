"""Hostile and broken bases and targets: one clear line, exit code 2, nothing half-written, the old artifact kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from havoc_core.errors import HavocError
from havoc_core.export.inspection import inspect_directory
from havoc_core.export.package import export_artifact
from havoc_core.export.verify import verify_artifact
from havoc_core.model.config import HavocConfig
from havoc_core.model.config_file import read_config
from havoc_core.model.hf_config import from_hf, to_hf
from tests.commands import run

TABLE, NORM = "model.embed_tokens.weight", "model.norm.weight"
IS_ROOT = os.geteuid() == 0

Edit = Callable[[Path], object]


def fields(**changes: Any) -> Edit:
    def edit(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def text(name: str, content: str | bytes) -> Edit:
    return lambda base: (base / name).write_bytes(content.encode() if isinstance(content, str) else content)


def folder(name: str) -> Edit:
    def edit(base: Path) -> None:
        (base / name).unlink(missing_ok=True)
        (base / name).mkdir()

    return edit


def pipe(name: str) -> Edit:
    def edit(base: Path) -> None:
        (base / name).unlink(missing_ok=True)
        os.mkfifo(base / name)

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(base: Path) -> None:
        state = load_file(base / "model.safetensors")
        change(state)
        save_file(state, base / "model.safetensors")

    return edit


def header(content: object, body: bytes = b"") -> Edit:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text("model.safetensors", struct.pack("<Q", len(data)) + data + body)


def sharded(index: Callable[[dict[str, str]], object], then: Edit = lambda _: None) -> Edit:
    """Two shards, the table in the first, the norm at the end in the second; `index` makes the weight map."""

    def edit(base: Path) -> None:
        state = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        weight_map = {name: "b.safetensors" if name == NORM else "a.safetensors" for name in state}
        for file in ("a.safetensors", "b.safetensors"):
            save_file({name: state[name] for name, home in weight_map.items() if home == file}, base / file)
        text("model.safetensors.index.json", json.dumps({"weight_map": index(weight_map)}))(base)
        then(base)

    return edit


def also_in_second_shard(base: Path) -> None:
    save_file(load_file(base / "b.safetensors") | {TABLE: torch.ones(300, 32)}, base / "b.safetensors")


BROKEN: dict[str, tuple[Edit, str]] = {
    "config is a list": (text("config.json", "[]"), "config.json: must be a JSON object"),
    "config is a folder": (folder("config.json"), "config.json: not a regular file"),
    "config is a pipe": (pipe("config.json"), "config.json: not a regular file"),
    "config cut off": (text("config.json", '{"model_type": '), "config.json: not valid JSON"),
    "config in UTF-16": (text("config.json", "{}".encode("utf-16")), "it starts with a byte order mark"),
    "config after a BOM": (text("config.json", "{}".encode("utf-8-sig")), "it starts with a byte order mark"),
    "a key twice": (text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), "'vocab_size' occurs twice"),
    "NaN": (text("config.json", '{"rms_norm_eps": NaN}'), "NaN is not a JSON number"),
    "5000 digits": (text("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "not valid JSON"),
    "400 digits": (fields(rms_norm_eps=10**400), "norm_eps must be a number in [0, 1]"),
    "nested": (text("config.json", "[" * 100_000), "not valid JSON"),
    "negative": (fields(hidden_size=-32), "hidden_size must be a whole number"),
    "too many layers": (fields(num_hidden_layers=10**6), "num_layers must be a whole number from 1 to 1024"),
    "too long a context": (fields(max_position_embeddings=10**9), "max_seq_len must be"),
    "gigantic": (fields(hidden_size=2**31 - 1), "has shape [300, 32], the config says [300, 2147483647]"),
    "vocabulary larger than the table": (fields(vocab_size=400), "the config says [400, 32]"),
    "an end outside the vocabulary": (fields(eos_token_id=10**30), "is not in the vocabulary of 300 tokens"),
    "escapes in a name": (fields(**{"a\nb\x1b[31m": 1}), r"unknown field 'a\nb\x1b[31m'"),
    "a megabyte in a field": (fields(hidden_size="x" * 1_000_000), "hidden_size must be a whole number"),
    "tokenizer is a folder": (folder("tokenizer.json"), "tokenizer.json: not a regular file"),
    "tokenizer cut off": (text("tokenizer.json", '{"x":'), "tokenizer.json: not a tokenizer"),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
    "tokenizer settings cut off": (text("tokenizer_config.json", '{"x":'), "tokenizer_config.json: not valid JSON"),
    "tokenizer settings are a folder": (folder("tokenizer_config.json"), "tokenizer_config.json: not a regular file"),
    "chat template is a folder": (folder("chat_template.jinja"), "chat_template.jinja: not a regular file"),
    "generation settings cut off": (text("generation_config.json", '{"x":'), "generation_config.json: not valid JSON"),
    "generation settings are a list": (text("generation_config.json", "[1]"), "generation_config.json: must be"),
    "generation settings are a folder": (folder("generation_config.json"), "generation_config.json: not a regular"),
    "generation ends nowhere": (text("generation_config.json", '{"eos_token_id": "x"}'), "generation_config.json: eos"),
    "weights are a folder": (folder("model.safetensors"), "holds neither model.safetensors nor"),
    "weights are empty": (text("model.safetensors", b""), "model.safetensors: not a whole safetensors file"),
    "header beyond the file": (text("model.safetensors", struct.pack("<Q", 10**6) + b"{}"), "not a whole safetensors"),
    "header of 4 EiB": (text("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "not a whole safetensors file"),
    "header in UTF-16": (header('{"a": 1}'.encode("utf-16")), "not a whole safetensors file"),
    "header nested": (header(b"[" * 100_000), "not a whole safetensors file"),
    "header of nothing": (header({}), f"tensor {TABLE} is missing (and 19 more)"),
    "tensors overlap": (
        header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, b"\0" * 4),
        "not a whole safetensors file",
    ),
    "a negative size": (
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        "not a whole safetensors file",
    ),
    "a size beyond 64 bits": (
        header({"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 4]}}, b"\0" * 4),
        "not a whole safetensors file",
    ),
    "a tensor of nothing": (tensors(lambda s: s.update({TABLE: torch.zeros(0, 32)})), "has shape [0, 32]"),
    "a number for a vector": (tensors(lambda s: s.update({NORM: torch.tensor(1.0)})), "has shape []"),
    "fp8": (tensors(lambda s: s.update({NORM: s[NORM].to(torch.float8_e4m3fn)})), f"{NORM} is F8_E4M3; quantized"),
    "int32": (tensors(lambda s: s.update({NORM: s[NORM].to(torch.int32)})), f"{NORM} is I32; quantized"),
    "a tensor too much": (tensors(lambda s: s.update(x=torch.ones(1))), "tensor x is not part of this model"),
    "a tensor too few": (tensors(lambda s: s.pop(TABLE)), f"tensor {TABLE} is missing"),
    "NaN in a weight": (tensors(lambda s: s[NORM].fill_(torch.nan)), "holds NaN"),
    "beyond fp32": (tensors(lambda s: s.update({NORM: torch.full((32,), 1e300, dtype=torch.float64)})), "holds NaN"),
    "a head that is not the table": (
        tensors(lambda s: s.update({"lm_head.weight": s[TABLE] + 1})),
        f"lm_head.weight differs from {TABLE}",
    ),
    "a shard is missing": (
        sharded(lambda m: m, lambda base: (base / "b.safetensors").unlink()),
        "b.safetensors: no such",
    ),
    "a shard elsewhere": (sharded(lambda m: m | {TABLE: "../a.safetensors"}), "is not the name of a safetensors file"),
    "a tensor in the wrong shard": (sharded(lambda m: m | {TABLE: "b.safetensors"}), "is listed in model.safetensors"),
    "a tensor in two shards": (sharded(lambda m: m, also_in_second_shard), f"b.safetensors: holds tensor {TABLE}, but"),
    "a tensor not in the index": (
        sharded(lambda m: {name: home for name, home in m.items() if name != TABLE}),
        f"a.safetensors: holds tensor {TABLE}, but model.safetensors.index.json does not list it",
    ),
    "an index of nothing": (sharded(lambda _: {}), "has no weight_map"),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert len(lines[0]) < 2000
    return lines[0]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base_is_one_line(
    name: str, text_base_directory: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import` and both forms of `export` say what is wrong and where; an artifact at --out stays as it was."""
    edit, message = BROKEN[name]
    base = Path(shutil.copytree(text_base_directory, tmp_path / "base"))
    artifact = Path(shutil.copytree(plain, tmp_path / "artifact"))
    edit(base)
    before = contents(artifact)
    for words in (
        ("import", base, "--quiet"),
        ("export", base, "--replace", "--out", artifact, "--quiet"),
        ("export", base, "--to", "hf", "--out", tmp_path / "hf", "--quiet"),
    ):
        capsys.readouterr()
        assert run(*words) == 2, words
        line = one_line(capsys)
        assert message in line
        assert ".tmp" not in line
    assert contents(artifact) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "base"]


# --- fuzz: no exception but HavocError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.dictionaries(
    st.sampled_from(
        ["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "rope_theta", "attention_factor"]
    ),
    JSON | st.sampled_from(["llama3", "yarn", "default", 8.0]),
    max_size=5,
)
NAMES = sorted(
    {*to_hf(HavocConfig.pico()), "vision", "sliding_window", "layer_types", "head_dim", "qk_norm", "dropout"}
)
CHANGES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), JSON | ROPE, min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(CHANGES)
def test_any_value_in_any_field_is_read_or_refused(changes: dict[str, Any]) -> None:
    """A config with foreign values is a config that writes itself back equal, or a HavocError."""
    try:
        config = from_hf(to_hf(HavocConfig.pico()) | changes)
    except HavocError:
        return
    assert from_hf(to_hf(config)) == config


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_a_config_may_be_damaged(text_base_directory: Path, tmp_path: Path, data: st.DataObject) -> None:
    """The file is read, or refused by name."""
    content = bytearray((text_base_directory / "config.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "config.json").write_bytes(content)
    refused_or_right(lambda: read_config(tmp_path), "config.json")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_a_header_may_be_damaged(text_base_directory: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Names, types, shapes, offsets or the header's length: the base is whole, or refused with one line."""
    base = tmp_path / "base"
    if not base.exists():
        shutil.copytree(text_base_directory, base)
    content = bytearray((text_base_directory / "model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'0123456789{}[]",:')
        )
    (base / "model.safetensors").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    refused_or_right(lambda: inspect_directory(base), str(base))


def refused_or_right(read: Callable[[], object], name: str) -> None:
    try:
        read()
    except HavocError as error:
        assert name in str(error)
        assert error.exit_code == 2


# --- where it is written


def test_a_target_that_cannot_be_written(
    text_base_directory: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, somebody's folder, the base itself, a file in the way: refused before anything is written."""
    base = Path(shutil.copytree(text_base_directory, tmp_path / "base"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    before = contents(tmp_path)
    for out in ("file", "mine", "base", "file/inside", "", "x" * 300):
        for form in ("onnx", "hf"):
            assert run("export", base, "--to", form, "--out", tmp_path / out, "--quiet") == 2
            one_line(capsys)
    assert contents(tmp_path) == before


def test_what_a_person_put_into_an_artifact_is_kept(
    text_base_directory: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report, or the base itself, inside the folder that would be replaced: named, and nothing is touched."""
    artifact = Path(shutil.copytree(plain, tmp_path / "artifact"))
    base = Path(shutil.copytree(text_base_directory, artifact / "base"))
    before = contents(artifact)
    assert run("export", base, "--out", artifact, "--quiet") == 2
    assert "base/config.json" in one_line(capsys)
    assert run("export", base, "--to", "hf", "--out", artifact, "--quiet") == 2
    assert "is an artifact, not a" in one_line(capsys)
    assert contents(artifact) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights this user lacks")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not IS_ROOT, reason="mounting a small disk needs root")
@pytest.mark.parametrize("room", [300_000, 60_000, 20_000, 0])
def test_a_full_disk_keeps_the_old_artifact(
    text_base_directory: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    """Wherever it gives out, in the weights or after: one line, the old artifact verifies, nothing else is left."""
    out = export_artifact(text_base_directory, small_disk / "artifact")
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(b"x" * max(free - room, 0))
    before = contents(out)
    status = run("export", text_base_directory, "--weights", "int8", "--replace", "--out", out, "--quiet")
    if status:
        assert status == 2
        assert "the disk is full" in one_line(capsys)
        assert contents(out) == before
    assert (status == 0) == (room == 300_000)
    verify_artifact(out)
    assert sorted(path.name for path in small_disk.iterdir()) == ["artifact", "ballast"]


SLOW = """
import sys, time
from havoc_core.export import package
prove = package._prove
def slow(*args):
    print("writing", flush=True)
    sys.stdin.readline()
    return prove(*args)
package._prove = slow
from havoc_core.cli import main
sys.exit(main(["export", sys.argv[1], "--out", sys.argv[2], "--weights", "int8", "--replace", "--quiet"]))
"""


def slow_export(base: Path, out: Path) -> subprocess.Popen[str]:
    """An export in its own process that has written the weights and waits for a line."""
    command = [sys.executable, "-c", SLOW, str(base), str(out)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


def test_two_exports_into_one_folder(
    text_base_directory: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused in one line, and the first ends as if it had been alone."""
    out = Path(shutil.copytree(plain, tmp_path / "artifact"))
    first = slow_export(text_base_directory, out)
    for form in ("onnx", "hf"):
        assert run("export", text_base_directory, "--to", form, "--out", out, "--quiet") == 2
        one_line(capsys)
    _, errors = first.communicate("go\n", timeout=60)
    assert (first.returncode, errors) == (0, "")
    assert verify_artifact(out)[0].structure["weight_format"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_killed_over_an_old_artifact(text_base_directory: Path, plain: Path, tmp_path: Path) -> None:
    """kill -9 in mid-export: the old one is untouched, what lies beside it is none, the next export clears it away."""
    out = Path(shutil.copytree(plain, tmp_path / "artifact"))
    before = contents(out)
    child = slow_export(text_base_directory, out)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert contents(out) == before
    (left,) = [path for path in tmp_path.iterdir() if path != out]
    assert run("verify", left) == 2
    assert run("export", text_base_directory, "--weights", "int8", "--replace", "--out", out, "--quiet") == 0
    assert verify_artifact(out)[0].structure["weight_format"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
