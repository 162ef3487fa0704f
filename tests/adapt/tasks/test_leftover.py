"""What earlier jobs left in the memory of the processes that served them must not reach a later one."""

from __future__ import annotations

import platform
import sys

import pytest

from havoc_core.adapt.tasks import assertions

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the thief speaks Linux on x86_64"
)

# rt_sigprocmask with a `how` that does not exist fails with EFAULT where a page is not mapped, and with EINVAL where it
# is: so the thief finds what it may read without a crash. It looks around objects of the heap it was forked with.
THIEF = r"""
import ctypes, gc, re
LIBC = ctypes.CDLL(None, use_errno=True)
KEPT = [b"z" * 5000, "x" * 300, b"y" * 700, object(), {}]
def mapped(address):
    ctypes.set_errno(0)
    return LIBC.syscall(14, 77, ctypes.c_void_p(address), None, 8) == -1 and ctypes.get_errno() != 14
def areas():
    seen = set()
    for kept in KEPT + gc.get_objects()[-200:]:
        page = id(kept) & ~4095
        if page in seen:
            continue
        low, high = page, page + 4096
        while page - low < (8 << 20) and low - 4096 not in seen and mapped(low - 4096):
            low -= 4096
        while high - page < (8 << 20) and high not in seen and mapped(high):
            high += 4096
        seen.update(range(low, high, 4096))
        yield ctypes.string_at(low, high - low)
NEEDLE = b"set(_" + b"values[0]) == set(("
def f(n):
    for area in areas():
        at = area.find(NEEDLE)
        while at >= 0:
            text = area[at + len(NEEDLE):].split(b"))", 1)[0]
            if re.fullmatch(rb"[0-9, ]+", text):
                return [int(x) for x in text.decode().split(",")]
            at = area.find(NEEDLE, at + 1)
    return ["nothing found"]
"""


def test_what_a_row_expects_is_not_left_in_memory_for_the_next_completion():
    """After wrong completions of a row, a completion that reads all memory it can does not find what the row expects.

    With one process that read every request, the thief was right 12 times of 12.
    """
    test = f"assert set(f(3)) == set({tuple(range(10**6, 10**6 + 420, 7))!r})"

    def outcomes(codes: list[str]) -> list[str]:
        return [
            reward.outcome for reward in assertions.judge([assertions.Program("", code, (test,)) for code in codes])
        ]

    assert set(outcomes([f"def f(n):\n    return [{i}]" for i in range(24)])) == {"wrong"}
    found = [outcome for round_ in range(3) for outcome in outcomes([THIEF + f"# {round_} {i}" for i in range(4)])]
    assert found == ["wrong"] * 12


def test_the_thief_can_read_memory_at_all():
    """It finds the needle where its own process holds it, so that it finds nothing elsewhere means something."""
    planted = "PLANTED = ''.join(['set(_val', 'ues[0]) == set((7, 8))']).encode() * 300\n"
    program = assertions.Program("", planted + THIEF, ("assert set(f(3)) == set((7, 8))",))
    assert assertions.judge([program])[0].outcome == "right"
