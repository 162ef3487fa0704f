"""One side of a duel as the user names it: an artifact or another engine's model, recognized by its content.

with enter("artifact") as ours, enter("model.gguf") as theirs:
    ...                           # `duel(ours.side("old"), theirs.side("new"))`
    theirs.require_unchanged()
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError, IdentityError, printable
from ..export.runtime.artifact import MANIFEST
from ..export.runtime.child import isolation
from ..export.runtime.held import file_states, hold, require_unchanged
from ..model.config_file import is_gguf, read_config
from ..storage import read_json, sha256_json
from .engines import ENGINES
from .engines.engine import FAULT_CODE, load_engine
from .judge.engine_files import files_of, hash_files, is_weights
from .lockstep import Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_EXTRAS: Final = {"llama_cpp": "llama-cpp", "genai": "genai", "openvino": "openvino", "hugging_face": "transformers"}
_GENAI, _CONFIG = "genai_config.json", "config.json"
_MARKERS: Final = {"genai": _GENAI, "openvino": "openvino_model.xml"}
"""The file that marks a folder as an engine's model."""
MODELS: Final = {
    "llama_cpp": "a .gguf file",
    "genai": f"a folder with {_GENAI}",
    "openvino": "a folder with openvino_model.xml",
    "hugging_face": "a Hugging Face directory",
}
"""What each engine opens."""
_KNOWN = (
    "a .gguf file, a folder of onnxruntime-genai or OpenVINO, a Hugging Face directory or the http address of a "
    "llama-server"
)
_VERSION_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The measured model: `identity` identifies the bytes; `num_ids` and `max_tokens` are None if unknown.

    `base_hash` is that of the base of an artifact, `files` the SHA-256 of each file of another engine's model,
    `weight_bytes` the size of its files with weights.
    """

    shown: str
    place: Path | str
    identity: dict[str, Any]
    require_unchanged: Callable[[], None]
    engine: str | None = None
    python: Path = Path(sys.executable)
    num_ids: int | None = None
    max_tokens: int | None = None
    base_hash: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0

    def side(self, name: str) -> Side:
        """What `lockstep` measures."""
        return Side(
            name=name,
            artifact=self.place,
            engine=self.engine,
            python=self.python,
            num_ids=None if self.engine is None else self.num_ids,
        )


@contextmanager
def enter(word: str, *, pythons: Sequence[Path] = (), engine: str | None = None) -> Iterator[Contender]:
    """Find what `word` names, hash it and keep it open; the first interpreter with the engine's package runs it.

    With `engine` it is that engine's model, even if the folder is also an artifact. Raises `HavocError` if no engine
    runs it or the engine is not installed, and `IdentityError` if an artifact's bytes differ from its manifest.
    """
    path = Path(word)
    engine = engine or engine_of(word)
    if engine is None:
        with hold(path) as held:
            config = read_config(held.place)
            yield Contender(
                shown=str(path),
                place=held.place,
                identity={"artifact": str(path), "manifest_sha256": held.manifest.sha256},
                require_unchanged=held.require_unchanged,
                num_ids=config.vocab_size,
                max_tokens=config.max_seq_len,
                base_hash=held.manifest.base_hash,
            )
        return
    yield _foreign(word, pythons, engine)


def engine_of(word: str) -> str | None:
    """The engine that runs what `word` names, None for an artifact; a `HavocError` if no engine runs it."""
    path = Path(word)
    if "://" not in word and (path / MANIFEST).is_file():
        return None
    found = engines_of(word)
    if not found and not path.is_dir():
        raise HavocError(f"{word}: not an artifact, {_KNOWN}")
    return found[0] if found else None  # for an unknown folder, the error says what an artifact needs


def engines_of(word: str) -> list[str]:
    """Every other engine that can open what `word` names, the likeliest first; an artifact may be genai's."""
    path = Path(word)
    if "://" in word or is_gguf(path):
        return ["llama_cpp"]
    found = [engine for engine, marker in _MARKERS.items() if (path / marker).is_file()]
    return found or ["hugging_face"] * ((path / _CONFIG).is_file() and not (path / MANIFEST).is_file())


def _foreign(word: str, pythons: Sequence[Path], engine: str) -> Contender:
    """Describe another engine's model."""
    if "://" in word:
        return Contender(
            shown=word,
            place=word,
            engine="llama_cpp",
            identity={"engine": "llama-server", "address": word},
            require_unchanged=_stay,
        )
    path = Path(word)
    if engine == "llama_cpp":
        if not is_gguf(path):
            raise HavocError(f"{word}: {ENGINES[engine]} opens a .gguf file")
        config = read_config(path)
        return _of_files(path, engine, pythons, config.vocab_size, config.max_seq_len)
    marker = _MARKERS.get(engine, _CONFIG)
    if not (path / marker).is_file():
        raise HavocError(f"{word}: {ENGINES[engine]} opens a folder with {marker}; this folder has none")
    if engine == "genai":
        model = _fields(path / _GENAI).get("model")
        fields = model if isinstance(model, dict) else {}
        return _of_files(path, engine, pythons, fields.get("vocab_size"), fields.get("context_length"))
    fields = _fields(path / _CONFIG)
    return _of_files(path, engine, pythons, fields.get("vocab_size"), fields.get("max_position_embeddings"))


def _fields(file: Path) -> dict[str, Any]:
    document = read_json(file)
    if not isinstance(document, dict):
        raise HavocError(f"{file}: must be a JSON object")
    return document


def _size(path: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HavocError(f"{path}: says {value!r:.40} of the size of its {name}, expected a whole number above 0")
    return value


def _of_files(path: Path, engine: str, pythons: Sequence[Path], num_ids: object, max_tokens: object) -> Contender:
    """Hash the files on the disk, and find an interpreter with the engine."""
    sizes = _size(path, "vocabulary", num_ids), _size(path, "context", max_tokens)
    python, version = interpreter_with(engine, pythons)
    states = file_states(path) if path.is_dir() else {"": _state(path)}

    def unchanged() -> None:
        if path.is_dir():
            require_unchanged(path, states)
        elif _state(path) != states[""]:
            raise IdentityError(f"{path} changed while it was measured: measure it again")

    hashes = hash_files(path)
    return Contender(
        shown=str(path),
        place=path,
        engine=engine,
        python=python,
        identity={
            "engine": ENGINES[engine],
            "version": version,
            "path": str(path),
            "sha256": sha256_json(hashes),
        },
        require_unchanged=unchanged,
        num_ids=sizes[0],
        max_tokens=sizes[1],
        files=hashes,
        weight_bytes=sum(file.stat().st_size for file in files_of(path).values() if is_weights(file)),
    )


def _state(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _stay() -> None:
    """Do nothing: the files of a server are not on this disk, so they cannot be checked for changes."""


def interpreter_with(engine: str, pythons: Sequence[Path] = ()) -> tuple[Path, str]:
    """The first of `pythons`, then this interpreter, that has the engine's package; and the package's version.

    If none has it, a `HavocError` names the extra to install.
    """
    for python in (*pythons, Path(sys.executable)):
        version = engine_version(engine, python)
        if version is not None:
            return python, version
    raise HavocError(
        f'{ENGINES[engine]} is not installed: pip install "havoc-core[{_EXTRAS[engine]}]", or name the Python that '
        f"has {load_engine(engine).PACKAGE} with --engine-python"
    )


def engine_version(engine: str, python: Path) -> str | None:
    """Version of the engine's package in `python`, None if it is missing there."""
    command = [str(python), *isolation(), str(Path(__file__).with_name("engines") / "engine.py"), engine, "--version"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HavocError(f"{python}: not an interpreter that can be asked for {ENGINES[engine]} ({error})") from error
    if found.returncode == FAULT_CODE:
        return None
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise HavocError(f"{python}: cannot run {ENGINES[engine]} ({printable(last)[:200]})")
    return found.stdout.strip()
