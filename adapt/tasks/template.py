r"""Jinja templates and expressions of task files, in a sandbox: they can read only one row's columns.

    Template("Question: {{ question }}\nAnswer:").render(row)       text
    Expression("choices.text").value(row)                           any plain value

A task file may come from an untrusted source. So a template cannot run code (Jinja's immutable sandbox: no attribute
with an underscore, only the methods in `_METHODS`), cannot load files, and always ends soon: a loop goes over a list of
at most `_MAX_ITEMS` items, two loops deep; there is no `set`, macro or recursion, no `range`, no product; and a
rendered prompt has at most `MAX_CHARS` characters. A name that is not a column of the row is an error, never an empty
text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import HavocError

if TYPE_CHECKING:
    from types import ModuleType

    from jinja2 import nodes
    from jinja2.sandbox import SandboxedEnvironment

MAX_CHARS = 1_000_000
MAX_SOURCE_CHARS = 20_000
_MAX_LOOPS = 2
_MAX_ITEMS = 2_000
_MAX_JOINS = 32
_MAX_REPLACED, _MAX_REPLACEMENT_CHARS = 2, 20
_FORBIDDEN = (
    "Macro CallBlock Include Import FromImport Extends Block Assign AssignBlock With FilterBlock Pow Mul Mod"
).split()
_FILTERS = (
    "capitalize first float int join last length list lower map reject rejectattr reverse round select selectattr sort "
    "string sum title trim unique upper items abs default min max tojson"
).split()
_METHODS = frozenset(
    "strip lstrip rstrip split splitlines replace lower upper capitalize title startswith endswith removeprefix "
    "removesuffix index count find get keys values items".split()
)


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
    environment.filters |= {"join": _joined, "bounded": _bounded}
    return environment


def _joined(parts: Iterable[object], between: str = "") -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) + len(texts) * len(between) > MAX_CHARS:
        raise ValueError(f"joined text of more than {MAX_CHARS} characters")
    return between.join(texts)


def _bounded(parts: object) -> list[object]:
    """The items of a loop: a list of the row, never the characters of a text."""
    if isinstance(parts, str | bytes) or not isinstance(parts, Iterable):
        raise ValueError(f"a loop needs a list, not {type(parts).__name__}")  # noqa: TRY004 - becomes one line
    found = list(itertools.islice(parts, _MAX_ITEMS + 1))
    if len(found) > _MAX_ITEMS:
        raise ValueError(f"a loop over more than {_MAX_ITEMS} items")
    return found


class _Compiled:
    """The base of templates and expressions: the checked source, and the columns that it uses."""

    columns: frozenset[str]

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_SOURCE_CHARS:
            raise HavocError(f"a template has {len(source)} characters; HAVOC reads at most {MAX_SOURCE_CHARS}")

    def _parsed(self, source: str) -> nodes.Template:
        """Return the tree of `source` with bounded loops; refuse code that could run long or read outside the row."""
        from jinja2 import TemplateError, meta

        try:
            tree = _environment().parse(source)
            complaint = _complaint(tree)  # before compiling, because compiling computes constants
            self.columns = frozenset() if complaint else frozenset(meta.find_undeclared_variables(tree))
        except (TemplateError, RecursionError) as error:
            raise HavocError(f"{_shown(self.source)} is not a Jinja template ({_first_line(error)})") from error
        if complaint:
            raise HavocError(f"{_shown(self.source)} {complaint}, which is not allowed in a task file")
        for loop in tree.find_all(_nodes().For):
            loop.iter = _nodes().Filter(loop.iter, "bounded", [], [], None, None, lineno=loop.lineno)
        return tree

    def _failed(self, error: Exception) -> HavocError:
        return HavocError(f"{_shown(self.source)} cannot be filled in ({_first_line(error)})")


class Template(_Compiled):
    """A text with columns of a row in it; `columns` are their names."""

    def __init__(self, source: str) -> None:
        """Compile `source`; an invalid template, or one that could run long, is a `HavocError`."""
        super().__init__(source)
        environment = _environment()
        code = environment.compile(self._parsed(source))
        self._template = environment.template_class.from_code(environment, code, {})

    def render(self, row: Mapping[str, Any]) -> str:
        """Fill in the columns of `row`; a missing column or a text that is too long is a `HavocError`."""
        parts, num_chars = [], 0
        try:
            for part in self._template.generate(row):
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    break
                parts.append(part)
        except Exception as error:  # a filter may raise any exception on a row's values
            raise self._failed(error) from error
        if num_chars > MAX_CHARS:
            raise HavocError(f"{_shown(self.source)} gives more than {MAX_CHARS} characters for one row")
        return "".join(parts)


class Expression(_Compiled):
    """A Jinja expression over a row's columns, such as `choices.text` or `[option_a, option_b]`."""

    def __init__(self, source: str) -> None:
        """Compile `source`; an invalid expression, or one that could run long, is a `HavocError`."""
        super().__init__(source)
        self._parsed("{{ (" + source + ") }}")
        self._expression = _environment().compile_expression(source, undefined_to_none=False)

    def value(self, row: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a row holds JSON values
        """The value of the expression for `row`; a missing column is a `HavocError`."""
        from jinja2 import Undefined

        try:
            found = self._expression(**row)
        except Exception as error:  # as above
            raise self._failed(error) from error
        if isinstance(found, Undefined):
            raise HavocError(f"{_shown(self.source)} is missing")
        return found


def _complaint(tree: nodes.Template) -> str:
    """Something in the tree that a task file may not do; empty if there is nothing."""
    kinds = _nodes()
    for name in _FORBIDDEN:
        if tree.find(getattr(kinds, name)) is not None:
            return f"uses {name.lower()}"
    if any(loop.recursive for loop in tree.find_all(kinds.For)) or _depth(tree) > _MAX_LOOPS:
        return f"has loops more than {_MAX_LOOPS} deep"
    num_joins = sum(len(node.nodes) for node in tree.find_all(kinds.Concat)) + len(list(tree.find_all(kinds.Add)))
    if num_joins > _MAX_JOINS:
        return f"joins more than {_MAX_JOINS} parts in expressions"
    calls = list(tree.find_all(kinds.Call))
    for call in calls:
        called = str(getattr(call.node, "attr", "a value"))
        if called not in _METHODS:
            return f"calls {called}"
    replacing = [call for call in calls if getattr(call.node, "attr", None) == "replace"]
    if len(replacing) > _MAX_REPLACED or not all(_is_short(argument) for call in replacing for argument in call.args):
        return f"replaces by other than {_MAX_REPLACED} fixed texts of {_MAX_REPLACEMENT_CHARS} characters"
    return ""


def _is_short(argument: nodes.Node) -> bool:
    value = getattr(argument, "value", None)
    return isinstance(value, str) and len(value) <= _MAX_REPLACEMENT_CHARS


def _nodes() -> ModuleType:
    from jinja2 import nodes

    return nodes


def _depth(node: nodes.Node) -> int:
    inner = max((_depth(child) for child in node.iter_child_nodes()), default=0)
    return inner + isinstance(node, _nodes().For)


def _shown(source: str) -> str:
    line = " ".join(source.split())
    return f"`{line if len(line) <= 60 else line[:57] + '...'}`"  # noqa: PLR2004 - a line of an error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
