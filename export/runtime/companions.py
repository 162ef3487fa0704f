"""What comes along from the base unchanged: tokenizer, chat template, licence. No torch.

Of a GGUF file it is what its metadata says, in the form of a Hugging Face directory.

A base is input from somewhere else. A link in it may lead to another file of the same download (the hub's cache is made
of such links), but not out of it: what is carried along is published with the artifact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import HavocError
from ...model.config_file import is_gguf
from ...storage import explained, read_bounded, write_bytes

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")

_README_BYTES = 1 << 16
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_LICENCE = re.compile(r"[A-Za-z0-9.+-]{1,64}")
_LICENCE_LINE = re.compile(r"^license:[ \t]*['\"]?([A-Za-z0-9.+-]{1,64})['\"]?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Licence:
    """The terms of a base: the identifier its model card names, and the file that holds the text; None: not said."""

    identifier: str | None = None
    file: str | None = None


def carry(directory: Path | None, folder: Path) -> None:
    """Copy tokenizer, chat template and licence of a base into `folder`; what may not be carried is refused."""
    if directory is not None and is_gguf(directory):
        from ...model.gguf_header import read_header
        from ...model.gguf_tokenizer import read_tokenizer  # the gate reads names from here, and needs no tokenizer

        tokenizer = read_tokenizer(read_header(directory))
        for name, content in ({} if tokenizer is None else tokenizer.files()).items():
            write_bytes(folder / name, content)
        return
    for file in carried_files(directory):
        try:
            content = read_bounded(file)
        except OSError as error:
            raise explained(error, file) from error
        write_bytes(folder / file.name, content)


def carried_files(directory: Path | None) -> list[Path]:
    """Files that are copied with a base; one that is not a regular file in that directory is a `HavocError`."""
    if directory is None or is_gguf(directory):
        return []
    files = [directory / name for name in TOKENIZER_FILES + CHAT_TEMPLATES + LICENCE_FILES]
    found = [file for file in files if file.exists() or file.is_symlink()]
    for file in found:
        _require_inside(file)
    return found


def licence_of(directory: Path | None) -> Licence:
    """The licence that a base's directory names in the front matter of `README.md`, and its file.

    Of a GGUF file: what its metadata names.
    """
    if directory is None:
        return Licence()
    if is_gguf(directory):
        from ...model.gguf_header import read_header

        named = read_header(directory).metadata.get("general.license")
        return Licence(identifier=named if isinstance(named, str) and _LICENCE.fullmatch(named) else None)
    named = None
    readme = directory / "README.md"
    if readme.is_file():
        try:
            with readme.open("rb") as file:
                text = file.read(_README_BYTES).decode("utf-8", errors="replace")
        except OSError as error:
            raise explained(error, readme) from error
        front = _FRONT_MATTER.match(text)
        named = _LICENCE_LINE.search(front[1]) if front else None
    texts = [name for name in LICENCE_FILES if name.startswith("LICENSE") and (directory / name).is_file()]
    return Licence(identifier=named[1] if named else None, file=texts[0] if texts else None)


def _require_inside(file: Path) -> None:
    home, target = file.parent.resolve(), file.resolve()
    is_hub_blob = target.parent == home.parent.parent / "blobs"
    if target.parent != home and not is_hub_blob:
        raise HavocError(f"{file}: a link that leads out of the directory; replace the link by a copy of the file")
    if not target.is_file():
        raise HavocError(f"{file}: not a regular file")
