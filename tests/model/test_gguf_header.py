"""GGUF headers that lie or are damaged: one line, no more time and memory than the file's size is worth."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from havoc_core import cli
from havoc_core.errors import HavocError
from havoc_core.model.base_tokenizer import load_tokenizer
from havoc_core.model.config_file import is_gguf
from havoc_core.model.gguf import GgufTensors
from havoc_core.model.gguf_header import MAX_HEADER_BYTES, read_header
from tests import gguf_files as files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    files.write_gguf(path, block="Q4_0")
    return path.read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, version: int = 3, tensors: int = 0, entries: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + body


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return header(entries=1, body=text("a.key") + struct.pack("<IIQ", 9, kind, count) + body)


def tensor(*, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    shape = struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", size) for size in dims)
    return header(tensors=1, body=text(name) + shape + struct.pack("<IQ", kind, offset) + bytes(64))


HUGE = 1 << 63
DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read|does not begin with GGUF"),
    "another file": (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
    "magic alone": (b"GGUF", "ends inside its header"),
    "version 1": (header(version=1), "is of version 1; HAVOC reads little-endian files of version 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "tensors without end": (header(tensors=HUGE), "claims 9,223,372,036,854,775,808 tensors"),
    "entries without end": (header(entries=HUGE), "claims 9,223,372,036,854,775,808 metadata entries"),
    "a key without end": (header(entries=1, body=struct.pack("<Q", HUGE)), "a metadata key 9,223,372"),
    "a text without end": (
        header(entries=1, body=text("a.key") + struct.pack("<IQ", 8, HUGE)),
        "gives a.key 9,223,372,036,854,775,808 bytes",
    ),
    "an array without end": (array(4, HUGE), "gives a.key 9,223,372,036,854,775,808 values"),
    "texts without end": (array(8, HUGE), "gives a.key 9,223,372,036,854,775,808 values"),
    "bytes of 4 GiB": (array(0, 1 << 32), "gives a.key 4,294,967,296 values"),
    "an array of arrays": (array(9, 1, struct.pack("<IQ", 9, 1) * 8), "as an array of arrays"),
    "an array of nothing known": (array(99, 1), "an array of the unknown type 99"),
    "an unknown type": (header(entries=1, body=text("a.key") + struct.pack("<I", 99)), "the unknown type 99"),
    "a key twice": (header(entries=2, body=(text("a.key") + struct.pack("<II", 4, 1)) * 2), "gives a.key twice"),
    "no UTF-8": (header(entries=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16)), "not UTF-8"),
    "five dimensions": (tensor(dims=(1,) * 5), "5 dimensions"),
    "no dimension": (tensor(dims=()), "0 dimensions"),
    "a size of nothing": (tensor(dims=(0,)), r"shape \[0\]"),
    "half a block": (tensor(dims=(33,), kind=2), r"shape \[33\], which Q4_0 blocks of 32 cannot store"),
    "a type that is not read": (tensor(kind=20), "in type IQ4_NL, which is not supported; HAVOC reads F32"),
    "a type of nothing": (tensor(kind=4_000_000_000), "in type 4000000000"),
    "beyond the end": (tensor(offset=1 << 40), "tensor t ends at 1,099,511,627,"),
    "larger than the file": (tensor(dims=(1 << 60, 1 << 3)), "truncated or damaged"),
    "sizes that overflow": (tensor(dims=(1 << 62,) * 4), "truncated or damaged"),
    "an offset that is not aligned": (tensor(offset=1), "at offset 1, which is not a multiple of 32"),
    "an offset of 2^63": (tensor(offset=HUGE), "truncated or damaged"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_lie_is_one_line(name: str, tmp_path: Path) -> None:
    """The file and what is wrong with it, in one line, at once."""
    content, message = DAMAGE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(HavocError, match=message) as refused:
        read_header(path)
    assert time.process_time() - started < 1
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("verb", ["import", "export", "generate", "plan", "eval"])
def test_every_verb_refuses_it_with_exit_code_2(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written."""
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    path.write_bytes(DAMAGE["a type that is not read"][0])
    more = {"import": ["--out", str(out)], "export": ["--out", str(out)], "generate": ["--prompt", "a"]}
    more |= {"plan": ["--target", "host"], "eval": ["--domain", "math"]}
    assert cli.main([verb, str(path), *more[verb]]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "IQ4_NL" in captured.err
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_truncated_file_is_named(whole: bytes, tmp_path: Path) -> None:
    """Cut anywhere, header or data: one line."""
    path = tmp_path / "model.gguf"
    for share in (0.001, 0.01, 0.03, 0.5, 0.9, 0.9999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(HavocError, match="truncated or damaged"):
            read_header(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 1 TiB whose metadata claims a text of it: nothing is allocated."""
    path = tmp_path / "model.gguf"
    path.write_bytes(header(entries=1, body=text("a.key") + struct.pack("<IQ", 8, MAX_HEADER_BYTES)))
    os.truncate(path, 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HavocError, match="header of at most 67,108,864 bytes"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * MAX_HEADER_BYTES / 1024


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    """A pipe would wait for ever."""
    path = tmp_path / "model.gguf"
    make(path)
    assert is_gguf(path) == (not path.is_dir())
    with pytest.raises(HavocError, match="not a regular file"):
        read_header(path)


def test_2000_damaged_files_are_read_or_refused(whole: bytes, tmp_path: Path) -> None:
    """Flipped bits and random bytes in the header, and counts replaced by extreme ones: a `HavocError` or a file."""
    path, rng = tmp_path / "model.gguf", random.Random(0)
    size = read_size_of_header(whole, path)
    num_refused = 0
    for index in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(min(size, 1500) if index % 2 else size)
            if index % 3:
                damaged[at] = rng.choice([damaged[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
            else:
                damaged[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, HUGE, HUGE - 1, (1 << 64) - 1, 1 << 32]))
        path.write_bytes(damaged)
        try:
            opened = GgufTensors(path)
            load_tokenizer(path, num_rows=opened.shape("model.embed_tokens.weight")[0])
            opened[rng.choice(list(opened))]
        except HavocError as error:
            num_refused += 1
            assert "\n" not in str(error)
    assert 200 < num_refused < 2000


def read_size_of_header(whole: bytes, path: Path) -> int:
    path.write_bytes(whole)
    return min(stored.offset_bytes for stored in read_header(path).tensors.values())
