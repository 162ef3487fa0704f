"""Find the choice that a free text names: by the choice's whole text, else by its label.

The text of a choice has precedence, so "Answer: A dog has spots." is the choice with that text, not label A. A label
counts only if it is alone: at the end of the line, in brackets or emphasis, or before . ) : or a comma. Both sides are
normalized in the same way (case, marks of emphasis, quotes, a full stop at the end, spaces), so the text of a choice in
the data always names that choice.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_CUE = re.compile(r"\banswer\b[*_`\"']*(?:\s+is\b)?[*_`]*\s*:?[*_`]*[ \t]*", re.IGNORECASE)
_OPENING, _CLOSING = "[(*_$`\\[\\s\"'{]*", "[)*_$`\\]\"'}]*"
_BOXED = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm)\s*\{")
_DELIMITED = re.compile(rf"{_OPENING}([A-Za-z]|\d{{1,2}}){_CLOSING}\s*(?:[.):,;\]]|$|\n)", re.MULTILINE)
_BRACKETED = re.compile(r"\(([A-Za-z]|\d{1,2})\)")


def chosen_position(
    text: str, labels: Sequence[str], texts: Sequence[str] = (), *, needs_cue: bool = True
) -> int | None:
    """Position of the choice that `text` names after its last "Answer:"; None if it names none.

    Without `needs_cue`, a text without "Answer:" is used as a whole. Letters also name the positions of numeric labels,
    and digits those of letters.
    """
    cues = list(_CUE.finditer(text))
    if not needs_cue and (place := _by_text(text, texts)) is not None:  # a choice may itself contain "Answer:"
        return place
    tails = [text[cue.end() :] for cue in reversed(cues)] or ([] if needs_cue else [text])
    for tail in tails:
        place = _by_text(tail, texts)
        if place is None:
            place = _by_label(_BOXED.sub("{", tail), labels)
        if place is not None:
            return place
    return None


def _by_text(said: str, texts: Sequence[str]) -> int | None:
    for whole in dict.fromkeys((said.strip(), said.strip().split("\n", 1)[0])):
        for form in (str.strip, plain, _bare):
            forms = [form(text) for text in texts]
            if form(whole) and forms.count(form(whole)) == 1:
                return forms.index(form(whole))
            if form is str.strip and whole in forms:  # two choices that read the same are the same answer
                return forms.index(whole)
    return None


def plain(text: str) -> str:
    """`text` without parts that do not change its meaning: case, emphasis, quotes, a full stop at the end, spaces."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.strip("*_`$\"'\u2018\u2019\u201c\u201d ").rstrip(".").rstrip("*_`$\"' ") or text


def _bare(text: str) -> str:
    """As `plain`, without a label at the beginning: "B. water" and "(B) water" become "water"."""
    return re.sub(r"^(?:\(\w{1,2}\)|\w{1,2}[.):])\s+", "", plain(text))


def _by_label(said: str, labels: Sequence[str]) -> int | None:
    first_line = said.strip().split("\n", 1)[0]
    found = _DELIMITED.match(said.lstrip()) or _BRACKETED.search(first_line)
    return None if found is None else _place(found[1], labels)


def _place(label: str, labels: Sequence[str]) -> int | None:
    for written in (label, label.upper(), label.lower()):
        if written in labels:
            return list(labels).index(written)
    place = int(label) - 1 if label.isdigit() else ord(label.upper()) - ord("A")
    return place if 0 <= place < len(labels) else None
