"""Put together the entries of a targets file before they are checked: an entry can extend another one.

    [my-board]
    extends = "gtx1660"                  # another entry of the file, or a bundled target
    title = "my board"
    without = ["accuracy/vision"]        # limits of that entry that are left out

    [my-board.workload]                  # keys of a table replace the same keys of that entry
    prompt_tokens = 128

    [[my-board.limits]]                  # a limit replaces that entry's limit on the same metric, or is added
    metric = "prefill_ms"
    below = 40
    unit = "ms"

This module works on plain tables; their content is checked afterwards. A mistake is a `ValueError` with one sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...mistakes import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

EXTENDS, WITHOUT, LIMITS = "extends", "without", "limits"


def whole_entry(
    name: str, entries: Mapping[str, Any], bundled: Mapping[str, Any], *, heirs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return an entry with everything that it takes over from others, without the keys `extends` and `without`.

    An entry of the same file has precedence over a bundled one.
    """
    entry = dict(entries[name])
    base = entry.pop(EXTENDS, None)
    if base is None:
        if WITHOUT in entry:
            raise ValueError(f"`{WITHOUT}` leaves out limits of the target in `{EXTENDS}`, which is missing: add it")
        return entry
    if not isinstance(base, str):
        raise ValueError(f"`{EXTENDS}` must be the name of a target")  # noqa: TRY004 - a mistake in a file, not a program
    if base in heirs:
        raise ValueError(f"{' extends '.join((*heirs, name, base))}: a circle")
    without = entry.pop(WITHOUT, [])
    taken = _base_entry(name, base, entries, bundled, heirs=(*heirs, name))
    return _joined(taken, entry, without)


def _base_entry(
    name: str, base: str, entries: Mapping[str, Any], bundled: Mapping[str, Any], *, heirs: tuple[str, ...]
) -> dict[str, Any]:
    is_here = base in entries and base != name
    if not is_here and base not in bundled:
        known = [*(other for other in entries if other != name), *bundled]
        raise ValueError(f"{EXTENDS} names {base!r}, which is not a target; {nearest(base, known)}")
    if is_here:
        return whole_entry(base, entries, bundled, heirs=heirs)
    return whole_entry(base, bundled, {}, heirs=())


def _joined(taken: dict[str, Any], entry: dict[str, Any], without: object) -> dict[str, Any]:
    """Lay an entry over the one it extends: tables by key, limits by metric, all other values as a whole."""
    if not (isinstance(without, list) and all(isinstance(metric, str) for metric in without)):
        raise ValueError(f"`{WITHOUT}` must be a list of metrics")
    inherited = {limit.get("metric"): limit for limit in taken.get(LIMITS, [])}
    for metric in without:
        if metric not in inherited:
            raise ValueError(f"`{WITHOUT}` names {metric!r}, which has no limit; {nearest(metric, inherited)}")
        del inherited[metric]
    own = entry.get(LIMITS, [])
    if not isinstance(own, list) or not all(isinstance(limit, dict) for limit in own):
        return {**taken, **entry}  # said when it is checked
    replaced = {limit.get("metric") for limit in own}
    limits = [*(limit for metric, limit in inherited.items() if metric not in replaced), *own]
    tables = {
        key: {**taken[key], **value}
        for key, value in entry.items()
        if isinstance(value, dict) and isinstance(taken.get(key), dict)
    }
    return {**taken, **entry, **tables, LIMITS: limits}
