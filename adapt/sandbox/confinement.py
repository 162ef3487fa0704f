"""Take rights from a process: Landlock, seccomp, resource limits and user, by direct system calls.

Two steps, because the confined parent must still fork and its children must not:

    confine_parent()   once: no new privileges, user nobody if started as root, Landlock without any rule
    confine_child()    after each fork: resource limits, then a seccomp filter that allows only computing

The filter is a list of allowed system calls, so a call that a future kernel adds is denied too. If the kernel lacks a
layer, it is left out; `probe` then tries the forbidden actions from inside and reports which were refused.
Sources: landlock(7), seccomp(2), prctl(2), include/uapi/linux/{landlock,seccomp,filter,audit}.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import resource
import signal
import socket
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_NOBODY = 65534

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column in `_ALLOWED`, and AUDIT_ARCH, of the known machines."""

_ALLOWED = {
    # memory and threads of control that already exist
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "futex": (202, 98), "membarrier": (324, 283), "rseq": (334, 293),
    "set_robust_list": (273, 99),
    # the descriptors that it has
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "fstat": (5, 80),
    "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72),
    # time and chance
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, -1), "times": (100, 153), "getrusage": (98, 165), "getrandom": (318, 278),
    # its own signals and its end
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
    # who it is
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sched_yield": (24, 124), "getcpu": (309, 168),
    "sched_getaffinity": (204, 123), "sysinfo": (99, 179),
}  # fmt: skip
"""Name -> number on (x86_64, aarch64), -1 if the machine has no such call. Everything else fails with EPERM."""


_LANDLOCK = (
    (6, 0xFFFF, 0b11, 0b11, 24),
    (5, 0xFFFF, 0b11, 0, 16),
    (4, 0x7FFF, 0b11, 0, 16),
    (3, 0x7FFF, 0, 0, 8),
    (2, 0x3FFF, 0, 0, 8),
    (1, 0x1FFF, 0, 0, 8),
)
"""By first version: all file rights, all network rights, all scopes, and the bytes of the ruleset for them."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


def confine_parent() -> dict[str, bool]:
    """Take all unneeded rights from this process and its children, permanently; return the layers in force."""
    is_linux = sys.platform == "linux"
    has_no_new_privileges = is_linux and _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if is_linux and os.geteuid() == 0:
        _become_nobody()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    could_read = _is_allowed(_read_device)
    is_landlocked = has_no_new_privileges and _landlock() and could_read and not _is_allowed(_read_device)
    return {"privileges": has_no_new_privileges, "landlock": is_landlocked}


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def confine_child(*, cpu_s: int, memory_bytes: int) -> bool:
    """Take the last rights from a freshly forked child; return whether the seccomp filter is in force.

    The child keeps descriptors 0 to 3. SIGXCPU comes after `cpu_s`, SIGKILL one second later.
    """
    end_with_parent()
    limits = (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, 4, 4),
        (resource.RLIMIT_NPROC, 0, 0),
    )
    for which, soft, hard in limits:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(which, (soft, hard))
    return _FILTER is not None and _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(_FILTER))


def probe(*, is_filtered: bool, memory_bytes: int) -> dict[str, bool]:
    """Try the forbidden actions from inside a confined child; True means refused.

    One descriptor is closed first, so that the limit on open files is not the reason why a file is refused.
    """
    os.close(0)
    attempts = {
        "files": (_read_device, _list_root),
        "writes": (_write_file,),
        "network": (_tcp, _udp, _unix_socket),
        "processes": (_fork,),
        "signals": (lambda: os.kill(os.getppid(), 0),),
        "memory": (lambda: mmap.mmap(-1, memory_bytes).close(),),
        "seccomp": (lambda: os.getpriority(os.PRIO_PROCESS, 0),),
    }
    refused = {name: not any(_is_allowed(attempt) for attempt in group) for name, group in attempts.items()}
    refused["seccomp"] = refused["seccomp"] and is_filtered
    return refused


def _prctl(option: int, first: int, second: int = 0) -> bool:
    arguments = [ctypes.c_ulong(value) for value in (first, second, 0, 0)]
    return bool(_LIBC.prctl(ctypes.c_int(option), *arguments) == 0)


def _become_nobody() -> None:
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _landlock() -> bool:
    """Handle every right that this kernel's Landlock knows, and allow none."""
    create, restrict = 444, 446  # the same numbers on every machine
    version = _LIBC.syscall(ctypes.c_long(create), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    files, network, scopes, size = next(row[1:] for row in _LANDLOCK if version >= row[0])
    ruleset = _Ruleset(files, network, scopes)
    descriptor = _LIBC.syscall(ctypes.c_long(create), ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if descriptor < 0:
        return False
    is_restricted = _LIBC.syscall(ctypes.c_long(restrict), ctypes.c_int(descriptor), ctypes.c_uint32(0)) == 0
    os.close(descriptor)
    return bool(is_restricted)


def _filter() -> _Program | None:
    """Build the seccomp program: allow the numbers of `_ALLOWED`, refuse others, kill foreign architectures."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize < 1 << 32:
        return None
    column, architecture = _ARCHITECTURES[platform.machine()]
    numbers = [row[column] for row in _ALLOWED.values() if row[column] >= 0]
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
    steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    return _Program(len(steps), ctypes.cast(instructions, ctypes.POINTER(_Instruction)))


_FILTER = _filter()
_LIBC = ctypes.CDLL(None, use_errno=True)


def _is_allowed(attempt: object) -> bool:
    try:
        attempt()  # type: ignore[operator]
    except (OSError, MemoryError):
        return False
    return True


def _read_device() -> None:
    os.close(os.open(os.devnull, os.O_RDONLY))


def _list_root() -> None:
    os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))


def _write_file() -> None:
    path = Path(f"/tmp/havoc-probe-{os.getpid()}")  # noqa: S108 - this must fail, and the file is removed if it does not
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    path.unlink()


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _tcp() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()


def _udp() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def _unix_socket() -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()
