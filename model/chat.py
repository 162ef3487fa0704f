"""The chat template of a base: how a message of a user becomes the text that the model was trained to answer. No torch.

    chat = find_chat_template(directory, special_tokens)     # None if the base has none
    chat.render("What is 2 + 2?")                            # "<|im_start|>user", the text, "<|im_end|>" and so on

A template is a Jinja program from an untrusted download. It runs in a sandbox inside a separate process
(`chat_renderer`) with bounded time, memory and output, so an endless template ends with one line of error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from ..errors import HavocError, printable
from ..storage import read_json, unreadable

RENDERER = "havoc_core.model.chat_renderer"
MAX_TEMPLATE_CHARS = 1 << 20
_MAX_LINE_BYTES = 1 << 26
_TIMEOUT_S = 30.0
"""For one message. The process ends itself after two seconds of its own time; this is for a machine that hangs."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, its values of `bos_token` and so on, and the place that errors name."""

    source: str
    variables: dict[str, str] = field(default_factory=dict)
    place: str = field(default="chat template", compare=False)

    def render(self, text: str) -> str:
        """The text of a conversation with one user message, up to the beginning of the model's answer.

        A template that fails, refuses the message, or exceeds its limit of time or memory is a `HavocError`.
        """
        return self._renderer.render([{"role": "user", "content": text}])

    @cached_property
    def _renderer(self) -> _Renderer:
        return _Renderer(self)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str], str]]:
        """Copies and other processes start their own renderer."""
        return type(self), (self.source, self.variables, self.place)


class _Renderer:
    """The process that renders one template, started with its first message and ended with this object."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def render(self, messages: list[dict[str, str]]) -> str:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            return self._ask({"messages": messages})

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", RENDERER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _end, process, os.getpid())
        self._ask({"template": self._template.source, "variables": self._template.variables})

    def _ask(self, request: dict[str, Any]) -> str:
        process, place = self._process, self._template.place
        assert process is not None  # noqa: S101
        timer = threading.Timer(_TIMEOUT_S, process.kill)
        timer.daemon = True
        timer.start()
        try:
            answer = _converse(process.stdin, process.stdout, request)
        finally:
            timer.cancel()
        if answer is None:
            self._process = None
            raise HavocError(f"{place}: {_death(process, self._owner)}; fix the template, or give --no-chat")
        if "error" in answer:
            raise HavocError(f"{place}: {printable(str(answer['error']))}; fix the template, or give --no-chat")
        return str(answer["text"])


def _converse(to: IO[bytes] | None, back: IO[bytes] | None, request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer to one request; None if the process has ended."""
    assert to is not None  # noqa: S101
    assert back is not None  # noqa: S101
    try:
        to.write(json.dumps(request).encode() + b"\n")
        to.flush()
        answer = json.loads(back.readline(_MAX_LINE_BYTES))
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _death(process: subprocess.Popen[bytes], owner: int) -> str:
    """Why the process ended: a limit of the system ends it by a signal; with a broken installation it exits."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    code = process.returncode
    _end(process, owner)
    if code is not None and code > 0:
        return f"what renders it ended with code {code} (`{Path(sys.executable).name} -m {RENDERER}` says why)"
    return "it takes more than its 2 s of time or 1 GiB of memory"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():  # a fork holds a copy of the object, and another process's child
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def find_chat_template(directory: Path, variables: dict[str, str]) -> ChatTemplate | None:
    """The template of a Hugging Face directory, from the files that transformers reads, in its order; None: none.

    `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (of several the one called "default"), else
    `chat_template.json`.
    """
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        return chat_template(_text(alone), variables, place=str(alone))
    for name in ("tokenizer_config.json", "chat_template.json"):
        file = directory / name
        fields = read_json(file) if file.exists() else {}
        found = fields.get("chat_template") if isinstance(fields, dict) else None
        source = _default(found) if isinstance(found, list) else found
        if isinstance(source, str):
            return chat_template(source, variables, place=f"{file}: chat_template")
        if found is not None:
            raise HavocError(f"{file}: chat_template must be a text, or a list of named ones with a default")
    return None


def chat_template(source: str, variables: dict[str, str], *, place: str) -> ChatTemplate | None:
    """The template with that text, None if the text is empty; one larger than all known ones is a `HavocError`."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise HavocError(f"{place}: {len(source):,} characters; a chat template has at most {MAX_TEMPLATE_CHARS:,}")
    return ChatTemplate(source, variables, place) if source else None


def _default(named: list[Any]) -> object:
    texts = {item.get("name"): item.get("template") for item in named if isinstance(item, dict)}
    return texts.get("default")


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(4 * MAX_TEMPLATE_CHARS + 1).decode("utf-8")
    except OSError as error:
        raise unreadable(error, file) from error
    except UnicodeDecodeError as error:
        raise HavocError(f"{file}: not UTF-8 ({error.reason})") from error
