r"""Jinja templates and expressions of task files, in a sandbox: they see one row's columns and nothing else.

    Template("Question: {{ question }}\nAnswer:").render(row)       text
    Expression("choices.text").value(row)                           any plain value

What a task file says may come from anywhere, so it cannot run code (Jinja's immutable sandbox: no attribute with an
underscore, no method that changes a row), cannot load files, and cannot run long: a loop goes over a part of the row,
two loops deep at most, there are no macros, no recursion, no `range`, and text is not multiplied; a rendered prompt has
at most `MAX_CHARS` characters. A name that is no column of the row is an error, never an empty text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import HavocError

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import SandboxedEnvironment

MAX_CHARS = 1_000_000
MAX_SOURCE_CHARS = 20_000
_MAX_LOOPS = 2
_FORBIDDEN = ("Macro", "CallBlock", "Include", "Import", "FromImport", "Extends", "Block", "Pow", "Mul", "Mod")
_FILTERS = (
    "capitalize first float int join last length list lower map replace reject rejectattr reverse round select "
    "selectattr sort string sum title trim unique upper items abs default min max tojson"
).split()


@cache
def _environment() -> SandboxedEnvironment:
    """The sandbox; Jinja is imported here, when the first template is made."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, cache_size=0
    )
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    return environment


class _Compiled:
    """What templates and expressions share: the source, checked, and the columns it asks for."""

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_SOURCE_CHARS:
            raise HavocError(f"a template of {len(source)} characters; at most {MAX_SOURCE_CHARS} are read")

    def _check(self, source: str) -> frozenset[str]:
        from jinja2 import TemplateError, meta, nodes

        try:
            tree = _environment().parse(source)
        except (TemplateError, RecursionError) as error:
            raise HavocError(f"{_shown(self.source)} is no Jinja template ({_first_line(error)})") from error
        for name in _FORBIDDEN:
            if tree.find(getattr(nodes, name)) is not None:
                raise HavocError(f"{_shown(self.source)} uses {name.lower()}, which a task file may not")
        if any(loop.recursive for loop in tree.find_all(nodes.For)) or _depth(tree) > _MAX_LOOPS:
            raise HavocError(f"{_shown(self.source)} has loops more than {_MAX_LOOPS} deep, which a task file may not")
        return frozenset(meta.find_undeclared_variables(tree))

    def _failed(self, error: Exception) -> HavocError:
        return HavocError(f"{_shown(self.source)} cannot be filled in ({_first_line(error)})")


class Template(_Compiled):
    """Text with places for a row's columns; `columns` are those it names."""

    def __init__(self, source: str) -> None:
        """Compile `source`; what is no template, or could run long, is a `HavocError`."""
        super().__init__(source)
        self.columns = self._check(source)
        self._template = _environment().from_string(source)

    def render(self, row: Mapping[str, Any]) -> str:
        """Fill in the columns of `row`; a column it lacks and text that grows too long are a `HavocError`."""
        parts, num_chars = [], 0
        try:
            for part in self._template.generate(row):
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    break
                parts.append(part)
        except Exception as error:  # whatever a filter raises on what a row holds
            raise self._failed(error) from error
        if num_chars > MAX_CHARS:
            raise HavocError(f"{_shown(self.source)} makes more than {MAX_CHARS} characters of one row")
        return "".join(parts)


class Expression(_Compiled):
    """A Jinja expression over a row's columns, such as `choices.text` or `[option_a, option_b]`."""

    def __init__(self, source: str) -> None:
        """Compile `source`; what is no expression, or could run long, is a `HavocError`."""
        super().__init__(source)
        self.columns = self._check("{{ (" + source + ") }}")
        self._expression = _environment().compile_expression(source, undefined_to_none=False)

    def value(self, row: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a row holds JSON values
        """What the expression is for `row`; a column the row lacks is a `HavocError`."""
        from jinja2 import Undefined

        try:
            found = self._expression(**row)
        except Exception as error:  # as above
            raise self._failed(error) from error
        if isinstance(found, Undefined):
            raise HavocError(f"{_shown(self.source)} is not there")
        return found


def _depth(node: nodes.Node) -> int:
    from jinja2 import nodes

    inner = max((_depth(child) for child in node.iter_child_nodes()), default=0)
    return inner + isinstance(node, nodes.For)


def _shown(source: str) -> str:
    line = " ".join(source.split())
    return f"`{line if len(line) <= 60 else line[:57] + '...'}`"  # noqa: PLR2004 - a line of an error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
