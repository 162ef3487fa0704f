"""Read the number at the end of an answer, in the different ways that people write numbers.

    read_number("1,234.5")  1234.5        read_number("1/2")     1/2        read_number("€5")      5
    read_number("1 000")    1000          read_number("1e3")     1000       read_number("-3")      -3 (any minus sign)

Values are exact fractions: no binary float rounds a decimal.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\uff0d\ufe63", "-") | {"\u2044": "/"})
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_MAX_EXPONENT, _MAX_DIGITS = 300, 300

_COMMAS = r"\d{1,3}(?:,\d{2,3})*,\d{3}"  # 1,234,567 and, as in India, 12,34,567
_SPACED = "\\d{1,3}(?:[ '\u00a0\u2009\u202f\u2019]\\d{3})+(?!\\d)"
_GLUED = r"[\d\u00b2\u00b3\u00b9\u2070-\u2079\u00bc-\u00be]"  # digits, superscripts and vulgar fractions
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)[ ]?(?:[{_CURRENCY}][ ]?)?(?P<inner>[-+]?)
    (?P<whole>{_COMMAS}|{_SPACED}|\d+)?(?P<decimals>\.\d+)?
    (?P<exponent>[eE][-+]?\d{{1,4}}(?!\w))?
    (?:[ ]?/[ ]?(?P<below>\d+))?
    (?P<rest>(?:[/^*_:']\d|[/^]|[.,]\d|[eE]\d|[ \t]+[\d\u00bc-\u00be]|{_GLUED})?)""",
    re.VERBOSE,
)
_VULGAR = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4"}


def read_number(text: str) -> Fraction | None:
    """Return the number at the beginning of `text`, after spaces and marks of emphasis; None if it is not certain.

    `1,2`, `1.2.3`, `2 1/2` and `5:30` are not read: a part of them would be another number.
    """
    plain = text.translate(_MINUS).lstrip().lstrip("*_`\\([").lstrip()
    plain = _VULGAR.get(plain[:1], plain[:1]) + plain[1:]
    found = _NUMBER.match(plain)
    if found is None or not (found["whole"] or found["decimals"]) or found["rest"]:
        return None
    if found["sign"] and found["inner"]:
        return None
    whole = re.sub(r"\D", "", found["whole"] or "0")
    exponent = int(found["exponent"][1:]) if found["exponent"] else 0
    below = int(found["below"]) if found["below"] and len(found["below"]) <= _MAX_DIGITS else 1
    if abs(exponent) > _MAX_EXPONENT or len(whole) + len(found["decimals"] or "") > _MAX_DIGITS or below == 0:
        return None
    value = Fraction(whole + (found["decimals"] or "")) * Fraction(10) ** exponent / below
    return -value if "-" in (found["sign"], found["inner"]) else value


def last_number(text: str) -> Fraction | None:
    """Return the last number in `text` that can be read; None if there is none."""
    starts = [
        found.start() for found in _NUMBER.finditer(text.translate(_MINUS)) if found["whole"] or found["decimals"]
    ]
    return next((value for start in reversed(starts) if (value := read_number(text[start:])) is not None), None)
