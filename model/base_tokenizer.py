"""The tokenizer of a base, from its directory or its GGUF file, and whether it fits the model. No torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import HavocError
from .config_file import is_gguf
from .gguf_header import read_header
from .gguf_tokenizer import read_tokenizer
from .tokenizer import Tokenizer


def load_tokenizer(directory: str | Path, *, num_rows: int) -> Tokenizer | None:
    """The tokenizer of a base, or None; one with an id beyond the model's `num_rows` is refused."""
    if is_gguf(directory):
        tokenizer = read_tokenizer(read_header(Path(directory)))
    else:
        file = Path(directory) / "tokenizer.json"
        tokenizer = Tokenizer.load(directory) if file.exists() or file.is_symlink() else None
    if tokenizer is not None:
        require_rows(tokenizer, num_rows, place=str(directory))
    return tokenizer


def missing_tokenizer(directory: Path | None) -> str:
    """Why a base without a tokenizer cannot read text, and what to do."""
    if directory is None:
        return "this preset: has random weights and no tokenizer, so it cannot read or write text"
    if is_gguf(directory):
        return f"{directory}: its metadata holds no tokenizer, so it cannot read or write text"
    if (directory / "tokenizer.model").exists():
        return (
            f"{directory}: tokenizer.model is not read, and there is no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return f"{directory}: has no tokenizer.json, so it cannot read or write text"


def require_rows(tokenizer: Tokenizer, num_rows: int, *, place: str) -> None:
    """Refuse a tokenizer that can write an id beyond the model's table; ids may have holes, so the largest counts."""
    if tokenizer.largest_id >= num_rows:
        raise HavocError(
            f"{place}: the tokenizer has the id {tokenizer.largest_id}, the model's table {num_rows} rows "
            f"(ids 0 to {num_rows - 1}); take the tokenizer that the model was trained with"
        )
