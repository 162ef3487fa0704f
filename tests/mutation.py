"""Mutants of a module: its syntax tree with one operator, constant, branch or word of a verdict changed.

Loaded with `runpy`, because tests are no package.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
SWAPPED_CALLS = {"max": "min", "min": "max", "any": "all", "all": "any"}
WORDS = {"pass", "fail", "inconclusive", "invalid", "not_measured", "gate"}
MOST = 100
"""How much of a changed line stands in a mutant's name."""


def mutants(tree: ast.Module) -> Iterator[str]:
    """Change one node of the module's functions at a time; yield the mutant's name while it is changed.

    A name is the function, the change and the first line of the statement; a second of one name gets "#2".
    """
    seen: Counter[str] = Counter()
    for name in _mutants(tree):
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} #{seen[name]}"


def _mutants(tree: ast.Module) -> Iterator[str]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for part in (tree, *classes):
        prefix = f"{part.name}." if isinstance(part, ast.ClassDef) else ""
        for function in (node for node in part.body if isinstance(node, ast.FunctionDef)):
            for statement in statements(function.body):
                for node in own_nodes(statement):
                    yield from changed(node, prefix + function.name, statement)
            yield from dropped_calls(function, prefix + function.name)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for place, decorator in enumerate(list(function.decorator_list)):
            for node in ast.walk(decorator):
                yield from changed(node, "declared", decorator)
            del function.decorator_list[place]
            yield f"declared: dropped: {ast.unparse(decorator)[:MOST]}"
            function.decorator_list.insert(place, decorator)
    for table in (
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    ):
        for node in [node for row in table.elts if isinstance(row, ast.Call) for node in [row, *row.args]]:
            yield from changed(node, "table", node)
        for place, row in enumerate(list(table.elts)):
            del table.elts[place]
            yield f"table: dropped: {ast.unparse(row)[:MOST]}"
            table.elts.insert(place, row)


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Every statement of some, those inside others included; no docstrings."""
    found = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.stmt)]
    return [node for node in found if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]


def own_nodes(statement: ast.stmt) -> list[ast.AST]:
    """The statement and its expressions, without the statements inside it and without annotations."""
    found: list[ast.AST] = [statement]
    for name, value in ast.iter_fields(statement):
        parts = value if isinstance(value, list) else [value]
        if name not in {"annotation", "args", "returns"}:
            found += [node for part in parts if isinstance(part, ast.AST) for node in _expressions(part)]
    return found


def _expressions(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of an expression, without the `strict` of a zip, which checks and changes no result."""
    if not isinstance(node, ast.stmt) and not (isinstance(node, ast.keyword) and node.arg == "strict"):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _expressions(child)


def dropped_calls(function: ast.FunctionDef, where: str) -> Iterator[str]:
    """Leave out one statement that only calls something at a time."""
    for holder in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(holder, field, None)
            if not isinstance(block, list):
                continue
            for place, statement in enumerate(block):
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                    block[place] = ast.copy_location(ast.Pass(), statement)
                    yield f"{where}: dropped: {first_line(statement)}"
                    block[place] = statement


def changed(node: ast.AST, where: str, statement: ast.AST) -> Iterator[str]:
    """Change a node in every way there is, one at a time."""
    line = first_line(statement)
    for change, apply in changes_of(node):
        kept = {key: list(value) if isinstance(value, list) else value for key, value in vars(node).items()}
        apply(node)
        yield f"{where}: {change}: {line}"
        vars(node).update(kept)


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0][:MOST]


def changes_of(node: ast.AST) -> list[tuple[str, Callable[[Any], None]]]:
    """List the ways to change one node, each with a function that does it in place."""
    found: list[tuple[str, Callable[[Any], None]]] = []
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                found.append(
                    (
                        f"{type(operator).__name__} -> {other.__name__}",
                        lambda n, p=place, o=other: n.ops.__setitem__(p, o()),
                    )
                )
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        found.append((f"{type(node.op).__name__} -> {other.__name__}", lambda n, o=other: setattr(n, "op", o())))
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        other_op = ARITHMETIC[type(node.op)]
        found.append((f"{type(node.op).__name__} -> {other_op.__name__}", lambda n, o=other_op: setattr(n, "op", o())))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found.append(("drop not", lambda n: setattr(n, "op", ast.UAdd()) or setattr(n, "operand", as_bool(n.operand))))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        found.append(("drop minus", lambda n: setattr(n, "op", ast.UAdd())))
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            found.append((f"if -> {value}", lambda n, v=value: setattr(n, "test", ast.Constant(v))))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPPED_CALLS:
        found.append(
            (
                f"{node.func.id} -> {SWAPPED_CALLS[node.func.id]}",
                lambda n: setattr(n, "func", ast.Name(SWAPPED_CALLS[n.func.id], ast.Load())),
            )
        )
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            found.append((f"{node.value} -> {not node.value}", lambda n: setattr(n, "value", not n.value)))
        elif isinstance(node.value, int | float):
            found.append((f"{node.value} + 1", lambda n: setattr(n, "value", n.value + 1)))
        elif node.value in WORDS:
            word = "fail" if node.value == "pass" else "pass"
            found.append((f"{node.value} -> {word}", lambda n, w=word: setattr(n, "value", w)))
    return found


def as_bool(node: ast.expr) -> ast.expr:
    return ast.Call(func=ast.Name("bool", ast.Load()), args=[node], keywords=[])
