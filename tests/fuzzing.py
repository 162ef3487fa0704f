"""Damaged files for every reader of HAVOC: each is read, or refused by a `HavocError` in one line, and nothing else.

    python tests/fuzzing.py --inputs 100000 --seed 0        what `make fuzz` runs

An input is a good file with bytes flipped, cut, doubled or exchanged, or a good document with one value replaced; where
a checksum guards the content, half of the inputs carry the right one, as an attacker would write it.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import runpy
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from havoc_core import storage
from havoc_core.adapt.candidate import COST_OBJECTIVES
from havoc_core.adapt.entries import known_entries
from havoc_core.adapt.sandbox import plain
from havoc_core.bench.judge.answer import load_answerer, verify_answer
from havoc_core.bench.judge.record import Record, load_record
from havoc_core.bench.judge.targets import BUNDLED, read_targets
from havoc_core.config import Recipe, load_recipe, recipe_toml
from havoc_core.errors import HavocError
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.external import external_locations
from havoc_core.export.runtime.verification import load_verified
from havoc_core.model.config_file import read_config

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, 1e308, -0.0, "", "x", "../x", "\0", "\ud7ff", "0" * 64, [], [[]], {}, {"": {}},
    ["a", 1], "9" * 400,
)  # fmt: skip


NUM_READERS = 10
NONCE = "challenge-0123456789"


@dataclass(frozen=True)
class Subject:
    """One reader, a good file for it, and how a changed document becomes a file with right checksums, if it has any."""

    name: str
    file: str
    good: bytes
    read: Callable[[Path], object]
    forge: Callable[[Any], bytes] | None = None


def subjects(folder: Path) -> list[Subject]:
    """Every reader, with files that a real export, record and journal gave."""
    artifact = export_artifact("pico", folder / "artifact")
    samples = runpy.run_path(str(Path(__file__).parent / "bench" / "sample_records.py"))
    record = samples["record"]("cpu").document()
    for process in record["samples"]:
        for part in ("prefill", "ttft"):
            process[part] = {key: value[:2] for key, value in process[part].items()}
        process["decode"] = process["decode"][:1]
    cost = dict.fromkeys(COST_OBJECTIVES, 1.0)
    entries = [
        {"kind": "search", "settings": "0" * 64},
        {"key": "cost:a:0", "kind": "cost", "structure": {}, "cost": cost},
        {"key": "kl:c", "kind": "divergence", "alpha": [1.0], "kl_to_base": {"math": 0.1}},
        {"key": "b:0", "kind": "evaluation", "sample": 0, "alpha": [1.0], "structure": {}, "right": {"math": "0110"}},
    ]
    verified = {
        "format": "havoc-verified/1",
        "manifest_sha256": "0" * 64,
        "is_folded": True,
        "is_rebuilt": True,
        "checks": [],
    }
    return [
        Subject("manifest", "manifest.json", (artifact / "manifest.json").read_bytes(), _manifest, _json),
        Subject("config", "config.json", (artifact / "config.json").read_bytes(), _config, _json),
        Subject("record", "record.json", _record(record), load_record, _record),
        Subject("targets", "own.toml", _own(BUNDLED.read_bytes()), read_targets),
        Subject("recipe", "recipe.toml", recipe_toml(Recipe()).encode(), load_recipe),
        Subject("journal", "journal.jsonl", _journal(entries), _entries, _journal),
        Subject("verified", "verified.json", _record(verified), load_verified, _record),
        _envelope(folder, samples["record"]("cpu")),
        Subject("graph", "model.onnx", (artifact / "model.onnx").read_bytes(), external_locations),
        Subject("values", "values", plain.encode([1, (2.5, "x"), {3: {4}}, b"5", 2**70]).encode(), _plain, _json),
    ]


def _envelope(folder: Path, record: Record) -> Subject:
    """The signature of a record, by a key that is made here."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pem").write_bytes(public)
    envelope = load_answerer(folder / "key").sign(record, folder / "record.json", NONCE)

    def read(path: Path) -> object:
        return verify_answer(record, path.with_name("record.json"), folder / "key.pem", NONCE)

    return Subject("envelope", envelope.name, envelope.read_bytes(), read, _json)


def _manifest(path: Path) -> object:
    return read_manifest(path.parent)


def _config(path: Path) -> object:
    return read_config(path.parent)


def _entries(path: Path) -> object:
    entries = storage.Journal(path).entries
    return known_entries(entries, path, objectives=COST_OBJECTIVES, domains=("math",))


def _plain(path: Path) -> object:
    try:
        return plain.decode(path.read_bytes().decode(errors="replace"))
    except plain.NotPlainError as error:  # its one error, which the sandbox turns into a wrong answer
        raise HavocError(" ".join(str(error).split())) from error


def _own(data: bytes) -> bytes:
    return data.replace(b"gtx1660", b"mine").replace(b"[host", b"[yours").replace(b"[[host", b"[[yours")


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _record(document: Any) -> bytes:
    if not isinstance(document, dict):
        return _json(document)
    content = {key: value for key, value in document.items() if key != "sha256"}
    try:
        return _json({**content, "sha256": storage.sha256_json(content)})
    except (ValueError, RecursionError, UnicodeEncodeError):
        return _json(document)


def _journal(entries: Any) -> bytes:
    lines = entries if isinstance(entries, list) else [entries]
    bodies = [json.dumps(entry).encode() for entry in lines]
    return b"".join(b"%08x %s\n" % (zlib.crc32(body), body) for body in bodies)


def inputs(subject: Subject, rng: random.Random) -> Iterator[bytes]:
    """Changed files without end."""
    documents = _document(subject)
    while True:
        if subject.forge is not None and documents is not None and rng.random() < 0.5:
            yield subject.forge(_changed_document(copy.deepcopy(documents), rng))
        else:
            yield _changed_bytes(subject.good, rng)


def _document(subject: Subject) -> Any:
    if subject.name == "journal":
        return [json.loads(line.partition(b" ")[2]) for line in subject.good.splitlines()]
    return None if subject.forge is None else json.loads(subject.good)


def _changed_document(document: Any, rng: random.Random) -> Any:
    """The document with one to three values, at any depth, replaced, removed or renamed."""
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return copy.deepcopy(rng.choice(ODD_VALUES))
        holder, key = rng.choice(places)
        if isinstance(holder, dict) and rng.random() < 0.2:
            value = holder.pop(key)
            if rng.random() < 0.5:
                holder[str(rng.choice(("", "x", "sha256", key + "_")))] = value
        elif rng.random() < 0.1:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [document]
    while waiting:
        node = waiting.pop()
        pairs = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        for key, value in pairs:
            yield node, key
            waiting.append(value)


def _changed_bytes(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        place, size = rng.randrange(len(data)), rng.choice((1, 1, 4, 64))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + size] = rng.randbytes(size)
            case 2:
                del data[place : place + size]
            case 3:
                data[place:place] = data[place : place + size] * rng.choice((1, 2, 200))
            case 4:
                del data[place:]
            case 5:
                data[place:place] = rng.choice((b"[" * 3000, b'{"a":', b"\xff", b"1e999", b"\0", b"NaN", b"."))
    return bytes(data)


def run(num_inputs: int, seed: int, *, say: Callable[[str], object] = lambda _: None) -> dict[str, Counter[str]]:
    """Read so many inputs, each reader as many; raises `AssertionError` with the input's file where it went wrong."""
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="havoc-fuzz-") as name:
        folder = Path(name)
        for subject in subjects(folder):
            place = folder / subject.name
            place.mkdir()
            path, counts, begin = place / subject.file, Counter[str](), time.monotonic()
            each = inputs(subject, random.Random(f"{seed} {subject.name}"))
            for _ in range(num_inputs // NUM_READERS):
                path.write_bytes(next(each))
                counts[_outcome(subject, path)] += 1
            found[subject.name] = counts
            say(f"{subject.name:10s} {dict(counts)} in {time.monotonic() - begin:.0f} s")
    return found


def _outcome(subject: Subject, path: Path) -> str:
    try:
        subject.read(path)
    except HavocError as error:
        assert "\n" not in str(error), f"{subject.name}: an error of several lines: {error}"
        return "refused"
    except BaseException as error:
        kept = Path(tempfile.gettempdir()) / f"havoc-fuzz-{subject.name}"
        kept.write_bytes(path.read_bytes())
        raise AssertionError(f"{subject.name}: {type(error).__name__}: {error} (input kept in {kept})") from error
    return "read"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run(args.inputs, args.seed, say=lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
