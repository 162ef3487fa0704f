"""A progress that ends the work where Ctrl-C would."""

from __future__ import annotations

from typing import Self


class StoppedError(Exception):
    """The work was ended."""


class StopAfter:
    """Ends the work after so many steps of any stage; a step is told with a note that begins with `note`."""

    def __init__(self, num_steps: int, note: str = "") -> None:
        self._left, self._note, self.stages = num_steps, note, list[tuple[str, int | None]]()

    def stage(self, name: str, total: int | None, *, unit: str = "") -> Self:
        self.stages.append((name, total))
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, n: int = 1, note: str = "") -> None:
        if n and note.startswith(self._note):
            self._left -= 1
            if self._left == 0:
                raise StoppedError
