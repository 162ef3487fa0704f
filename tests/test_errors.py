"""The exit codes are a promise to scripts."""

from __future__ import annotations

import re

import pytest

from havoc_core import errors
from havoc_core.bench.judge.gate import EXIT_CODES
from havoc_core.errors import HavocError

CHILDREN = HavocError.__subclasses__()


def test_every_class_has_its_own_exit_code() -> None:
    """A script can tell every kind of failure from every other, from success and from a verdict."""
    codes = [HavocError.exit_code, *(child.exit_code for child in CHILDREN)]
    assert sorted([*codes, *EXIT_CODES.values()]) == [0, 1, 2, 3, 4, 5, 6]


def test_the_tree_in_the_docstring_is_the_truth() -> None:
    """What the module draws is what it defines: names, codes, nothing more."""
    drawn = dict(re.findall(r"(\w+Error) +(\d) ", errors.__doc__ or ""))
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in (HavocError, *CHILDREN)}


@pytest.mark.parametrize("kind", CHILDREN)
def test_one_except_clause_catches_all(kind: type[HavocError]) -> None:
    """A caller that treats all failures alike needs one name."""
    with pytest.raises(HavocError, match="87 of 100"):
        raise kind("87 of 100 rows")
