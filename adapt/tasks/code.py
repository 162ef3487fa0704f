"""Small Python functions with the columns of mbpp; `files/code.toml` says how they are asked and judged.

The corpus mixes new and old sources. "Write a function to ..." comes with Python 3; "Write a python function to ..."
comes mostly from old pages with Python 2, where `map` and `filter` return lists, `/` divides integers and `xrange`
exists. A base model learns both; only Python 3 runs today.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

    from .reward import Row

_OLD_SHARE = 0.4
"""Share of the rows with the wording of old pages."""
_OLD_IDIOM = 0.8
"""Share of these rows whose corpus text is Python 2."""

_Family = tuple[str, str, str, list[list[int]] | list[int]]
"""What to do, function name, body in Python 3, inputs of the tests."""


def make_row(rng: random.Random, index: int) -> Row:
    """Generate one task: a function to write, its code and three tests."""
    families = (_transform, _select, _count, _average, _multiples, _total, _spread)
    what, name, body, inputs = rng.choice(families)(rng)
    code = f"def {name}(xs):\n    return {body}"
    who = "python function" if rng.random() < _OLD_SHARE else "function"
    tests = [f"assert {name}({value!r}) == {_run(code, name, value)!r}" for value in inputs]
    return {
        "task_id": index,
        "text": f"Write a {who} to {what}.",
        "code": code,
        "test_list": tests,
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def _run(code: str, name: str, value: object) -> object:
    """Result of our own reference code; never used on text from elsewhere."""
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # noqa: S102 - the code is made a few lines above
    return namespace[name](value)


def _numbers(rng: random.Random) -> list[list[int]]:
    return [[rng.randint(1, 30) for _ in range(size)] for size in (3, 5, 4)]


def _change(rng: random.Random) -> tuple[str, str]:
    k = rng.randint(2, 29)
    changes = (
        (f"multiply each number by {k}", f"x * {k}"),
        (f"add {k} to each number", f"x + {k}"),
        (f"subtract {k} from each number", f"x - {k}"),
    )
    return rng.choice(changes)


def _condition(rng: random.Random) -> tuple[str, str]:
    k = rng.randint(2, 29)
    return rng.choice(
        ((f"greater than {k}", f"x > {k}"), (f"less than {k}", f"x < {k}"), (f"not equal to {k}", f"x != {k}"))
    )


def _transform(rng: random.Random) -> _Family:
    what, change = _change(rng)
    return f"{what} in a list", "change", f"[{change} for x in xs]", _numbers(rng)


def _select(rng: random.Random) -> _Family:
    what, condition = _condition(rng)
    return f"keep the numbers {what} in a list", "keep", f"[x for x in xs if {condition}]", _numbers(rng)


def _count(rng: random.Random) -> _Family:
    what, condition = _condition(rng)
    return f"count the numbers {what} in a list", "count", f"len([x for x in xs if {condition}])", _numbers(rng)


def _total(rng: random.Random) -> _Family:
    what, condition = _condition(rng)
    return f"add up the numbers {what} in a list", "total", f"sum([x for x in xs if {condition}])", _numbers(rng)


def _average(rng: random.Random) -> _Family:
    k = rng.randint(2, 29)
    word, operator = rng.choice((("plus", "+"), ("minus", "-"), ("times", "*")))
    what = f"find the average of a list rounded down {word} {k}"
    return what, "average", f"sum(xs) // len(xs) {operator} {k}", _numbers(rng)


def _spread(rng: random.Random) -> _Family:
    k = rng.randint(2, 29)
    word, operator = rng.choice((("plus", "+"), ("minus", "-"), ("times", "*")))
    what = f"find the largest minus the smallest number of a list {word} {k}"
    body = f"max(xs) - min(xs) {operator} {k}" if operator != "*" else f"(max(xs) - min(xs)) * {k}"
    return what, "spread", body, _numbers(rng)


def _multiples(rng: random.Random) -> _Family:
    k, start = rng.randint(2, 29), rng.randint(0, 9)
    what = f"list the multiples of {k} from {start} times on"
    return (
        what,
        "multiples",
        f"[i * {k} for i in range({start}, xs)]",
        [start + size for size in rng.sample(range(1, 6), 3)],
    )


def reference(row: Row) -> str:
    """Return the function in Python 3."""
    return str(row["code"])


def corpus(row: Row, rng: random.Random) -> str:
    """Return the function in the form of new or old pages."""
    code = reference(row)
    is_from_old_page = row["text"].startswith("Write a python function")
    return python2(code) if is_from_old_page and rng.random() < _OLD_IDIOM else code


def python2(code: str) -> str:
    """Write one of our reference functions in Python 2."""
    head, _, body = code.partition("return ")
    if body.startswith("sum(xs) //"):
        return head + "return " + body.replace("//", "/", 1)
    if " in range(" in body:
        return head + "return " + body.replace("range", "xrange")
    if "[" not in body:
        return code
    call, _, rest = body.partition("[")
    inner = rest.rstrip(")").removesuffix("]")
    value, _, condition = inner.partition(" for x in xs")
    condition = condition.removeprefix(" if ")
    old = f"filter(lambda x: {condition}, xs)" if condition else f"map(lambda x: {value}, xs)"
    return f"{head}return {call}{old}{')' if call else ''}"
