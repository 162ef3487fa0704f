"""Start a child process, or say in one line why the system allows no further one."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NO_MORE = (
    "the system allows no further process or thread (the limit of this user or container, `ulimit -u` or pids.max, is "
    "reached): end other processes or raise it"
)
TOO_MANY_FILES = "too many files are open (`ulimit -n`): raise the limit and run the same command again"

_LENT: ContextVar[tuple[int, ...]] = ContextVar("lent", default=())


@contextlib.contextmanager
def lent(descriptor: int) -> Iterator[None]:
    """Let every child started in the block inherit an open file: its lock stays until all of them have ended."""
    token = _LENT.set((*_LENT.get(), descriptor))
    try:
        yield
    finally:
        _LENT.reset(token)


def start_process(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401 - Popen's own
    """Start `command` as `subprocess.Popen` does; a system that has no room for it is a `HavocError`."""
    try:
        return subprocess.Popen(command, pass_fds=_LENT.get(), **options)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise HavocError(NO_MORE) from error
        raise
