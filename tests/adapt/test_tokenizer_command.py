"""`havoc tokenizer train`: equal texts give equal files, which a base can be pretrained with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from havoc_core.adapt.pretrain import PretrainSettings, pretrain
from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.tokenizer import Tokenizer, train_tokenizer

DRAW = random.Random(0)
TEXT = "".join("".join(DRAW.choices("abcdefghijkl", k=DRAW.randint(2, 7))) + DRAW.choice(" \n") for _ in range(4000))
TINY = PretrainSettings(
    num_steps=1, batch_size=4, rows_per_domain=20, num_tokenizer_rows=10, checkpoint_every=1, num_accuracy_rows=1
)


def written(folder: Path, *texts: bytes) -> list[str]:
    paths = [folder / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    return list(map(str, paths))


def test_equal_texts_give_equal_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte, at the size asked for; every text comes back, and a special token cannot be typed."""
    words = ["tokenizer", "train", *written(tmp_path, TEXT.encode(), b"and more\n"), "--quiet", "--json"]
    for out in ("a", "b"):
        assert main([*words, "--vocab-size", "300", "--out", str(tmp_path / out)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["vocab_size"], first["sha256"]) == (300, second["sha256"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "a")
    for text in ("the engineer said 42", "\N{SNOWMAN} <eos> na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3}


def test_a_base_is_pretrained_with_it(tmp_path: Path) -> None:
    """Its file is the base's, its hash stands in the record, and the same command goes on with no other one."""
    (text,) = written(tmp_path, TEXT.encode())
    assert main(["tokenizer", "train", text, "--vocab-size", "400", "--quiet", "--out", str(tmp_path / "own")]) == 0
    own = Tokenizer.load(tmp_path / "own")
    out = pretrain("nano", tmp_path / "base", settings=TINY, tokenizer=own)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "own" / "tokenizer.json").read_bytes()
    assert len(json.loads((out / "pretraining.json").read_text())["data"]) == 4
    assert len(json.loads((out / "pretraining.json").read_text())["tokenizer"]) == 64
    assert load_base(out).tokenizer.vocab_size == 400


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """More ids than the preset has: both numbers, before anything is written."""
    large = train_tokenizer([TEXT], 600)
    with pytest.raises(HavocError, match="599, .*'nano' has 512"):
        pretrain("nano", tmp_path / "base", settings=TINY, tokenizer=large)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (b"\xff\xfe", [], "not UTF-8 (byte 0)"),
        (b"", [], "the files hold no text"),
        (b"text", ["--vocab-size", "259"], "must hold 4 special tokens and 256 bytes, not 259 ids"),
        (None, [], "cannot be read (No such file or directory)"),
    ],
    ids=["bytes", "empty", "small", "missing"],
)
def test_what_is_wrong_is_one_line(
    text: bytes | None, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, and no folder is made."""
    path = str(tmp_path / "none.txt") if text is None else written(tmp_path, text)[0]
    assert main(["tokenizer", "train", path, *options, "--quiet", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rows_are_seen_to_be_made(tmp_path: Path) -> None:
    """Piece by piece, each domain and the tokenizer; the rows are those of the split."""
    import io

    from havoc_core.adapt.pretrain import _train_rows
    from havoc_core.adapt.tasks import sources
    from havoc_core.progress import SILENT, LineProgress

    stream, now_s = io.StringIO(), [0.0]

    def clock() -> float:
        now_s[0] += 1.0
        return now_s[0]

    settings = PretrainSettings(rows_per_domain=1200)
    rows = _train_rows("math", settings, LineProgress(stream, clock=clock))
    assert rows == sources.rows("math", "train", 1200, seed=settings.seed)
    assert "rows of math: 500 of 1200 rows (42%)" in stream.getvalue()
    assert len(_train_rows("math", PretrainSettings(rows_per_domain=3), SILENT)) == 3
