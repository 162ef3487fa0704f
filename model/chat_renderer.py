"""The process that renders a chat template: `python -m havoc_core.model.chat_renderer`, one JSON document per line.

It reads the template, then conversations, and answers each with {"text": ...} or {"error": ...}. The template runs in
Jinja's immutable sandbox with the functions, filters and tags that transformers offers. Time and memory are bounded by
the operating system: one message takes at most two seconds of processor time, the whole process 1 GiB.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jinja2.parser import Parser
    from jinja2.runtime import Macro

CPU_S = 2.0
MEMORY_BYTES = 1 << 30
MAX_CHARS = 1 << 22
_MAX_MESSAGE_CHARS = 300


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the model's text, for training; the text is the same."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's own extensions name them

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **values: Any) -> None:  # noqa: ANN401 - a template may name a value `self`
        self, attributes = args[0], dict(*args[1:], **values)
        for name in attributes:
            _require_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _require_public(name)
        super().__setitem__(name, value)


class _Dict:
    """The function `dict(...)` of a template: not a type, so a template cannot reach other objects through it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:  # noqa: ANN401 - as the built-in one
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401 - as the built-in one
        return dict.fromkeys(*args)


def _require_public(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return dt.datetime.now().strftime(form)  # noqa: DTZ005 - the user's own day, as transformers gives it


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as in the models' training: Jinja's own filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with all that a template may call."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    sandbox.globals |= {"namespace": _Namespace, "dict": _Dict()}
    return sandbox


def render(template: jinja2.Template, messages: list[dict[str, str]], variables: dict[str, str]) -> str:
    """The conversation as text, up to the beginning of the model's answer; more than `MAX_CHARS` is an error."""
    parts: Iterable[str] = template.generate(**variables, messages=messages, add_generation_prompt=True)
    text, allowed = "", MAX_CHARS + sum(len(message["content"]) for message in messages)
    for part in parts:
        text += part
        if len(text) > allowed:
            raise jinja2.exceptions.TemplateError(f"it writes more than {MAX_CHARS:,} characters")
    return text


def main() -> None:
    """Answer requests until the other side closes."""
    _bound_memory()
    template: jinja2.Template | None = None
    variables: dict[str, str] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _bound_time(CPU_S)
        try:
            if template is None:
                variables = request["variables"]
                template, text = environment().from_string(request["template"]), ""
            else:
                text = render(template, request["messages"], variables)
            answer: dict[str, Any] = {"text": text}
        except Exception as error:  # noqa: BLE001 - an untrusted program may raise anything
            answer = {"error": _described(error)}
        _bound_time(0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _described(error: Exception) -> str:
    if isinstance(error, MemoryError | RecursionError):
        return f"it needs too much memory ({type(error).__name__})"
    line = f"line {error.lineno}: " if isinstance(error, jinja2.exceptions.TemplateSyntaxError) else ""
    said = " ".join(str(error).split())[:_MAX_MESSAGE_CHARS] or type(error).__name__
    is_said = isinstance(error, jinja2.exceptions.TemplateError)
    return line + (said if is_said else f"it fails with {type(error).__name__}: {said}")


def _bound_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _bound_time(seconds: float) -> None:
    """End this process after this much of its own CPU time; 0 removes the limit. It also ends one long operation."""
    with contextlib.suppress(ImportError, AttributeError):
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
