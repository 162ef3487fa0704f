"""An artifact's folder held open, so the same folder is hashed, measured, scored and checked again.

    with hold(Path("artifact")) as held:
        ...                        # read and run `held.place`, in this process or in a child
        held.require_unchanged()

Another folder may be renamed to the same path at any time. So the folder is opened once, and `place` always leads to
the opened folder. The state of every file is recorded before the first is hashed and compared at the end: inode, size,
time of writing, and the time of the last change of any kind, which only the system sets. If a file has the same state
at both times, it was the file that was hashed and mapped in between.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import HavocError, IdentityError
from ...storage import unreadable
from .artifact import read_manifest, verify_hashes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .artifact import ArtifactManifest

States = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class HeldArtifact:
    """An artifact whose every byte was hashed, in a folder that is held open; `directory` is the user's name for it."""

    directory: Path
    place: Path
    manifest: ArtifactManifest
    states: States

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file by relative name, as they were found."""
        return {name: file.sha256 for name, file in self.manifest.files.items()}

    def require_unchanged(self) -> None:
        """Raise `IdentityError` if a file is no longer the hashed one: then another file was measured or run."""
        require_unchanged(self.place, self.states)


@contextmanager
def hold(directory: Path) -> Iterator[HeldArtifact]:
    """Open the folder and hash every file of it; errors inside the block name the folder as the user does.

    Raises `HavocError` if the folder is not an artifact or cannot be read, `IdentityError` if its bytes differ from its
    manifest.
    """
    with _opened(directory) as place:
        try:
            read_manifest(place)  # so that a folder that is not an artifact gets a clear error
            states = file_states(place)
            manifest = verify_hashes(place)
            yield HeldArtifact(directory=directory, place=place, manifest=manifest, states=states)
        except OSError as error:
            reason = unreadable(error, place)
            raise HavocError(str(reason).replace(str(place), str(directory))) from error
        except HavocError as error:
            if str(place) == str(directory) or str(place) not in str(error):
                raise
            raise type(error)(str(error).replace(str(place), str(directory))) from error


@contextmanager
def _opened(directory: Path) -> Iterator[Path]:
    """A path to the folder that is at `directory` now; `directory` itself if the system has no such path."""
    if sys.platform != "linux" or not directory.is_dir():
        yield directory
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(error, directory) from error
    try:
        place = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        yield place if place.is_dir() else directory
    finally:
        os.close(descriptor)


def file_states(artifact: Path) -> States:
    """Values that change if a file of the artifact is replaced or rewritten, also in a folder inside it.

    Inode, size and two times of every file: the time of writing, which anyone can set back, and the time of any change,
    which only the system sets.
    """
    states: States = {}
    try:
        for folder, _, names in os.walk(artifact, onerror=_raise):
            for path in (Path(folder, name) for name in names):
                state = path.lstat()
                found = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                states[path.relative_to(artifact).as_posix()] = found
    except OSError as error:
        raise HavocError(f"{error.filename or artifact}: {error.strerror or error}") from error
    return states


def _raise(error: OSError) -> None:
    raise error


def require_unchanged(artifact: Path, before: States) -> None:
    """Raise `IdentityError` if the artifact has changed since `file_states`: then another one was timed."""
    try:
        now = file_states(artifact)
    except HavocError as error:
        raise IdentityError(f"the artifact disappeared while it was measured ({error}): measure it again") from error
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise IdentityError(f"{artifact / changed[0]} changed while the artifact was measured: measure it again")
