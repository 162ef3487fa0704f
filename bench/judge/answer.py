"""A record signed where it was measured: an in-toto statement over record and artifact, in a DSSE envelope beside it.

    record.dsse.json   {"payload", "payloadType", "signatures"}; the payload, decoded:
    {"_type", "subject": [{"name": "record.json", "digest": {"sha256"}}, {"name": "manifest.json", "digest": {...}}],
     "predicateType", "predicate": {"result", "configuration": [{"name": "challenge", "content"}]}}

The record's digest is its seal, the SHA-256 of its content as canonical JSON; the artifact's is that of its manifest,
which lists the digests of all other files. A model of another engine has no manifest: `model/NAME` stands for each of
its files. The challenge is a nonce chosen by the person who asked; it proves that the answer is not an older one. A
signature shows who signed, not that the content is true: the owner of the machine and the key can sign anything.
Sources: DSSE 1.0, https://github.com/secure-systems-lab/dsse; in-toto Statement v1 and its Test Result predicate v0.1,
https://github.com/in-toto/attestation.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import HavocError, IdentityError
from ...export.runtime.signature import PASSWORD_VARIABLE, read_key
from ...storage import canonical_json, parse_json, read_json, unreadable, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .record import Record

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_NONCE = re.compile(r"[A-Za-z0-9._~-]{16,128}")
_MAX_ENVELOPE_BYTES, _MAX_KEYS = 1 << 17, 1000


def envelope_path(record_path: Path) -> Path:
    """Where the envelope of a record lies: `record.dsse.json` beside `record.json`."""
    return record_path.with_suffix(".dsse.json")


def require_nonce(nonce: str) -> str:
    """Return a challenge that is hard to guess and unlikely to be used twice; any other text is a `HavocError`."""
    if not _NONCE.fullmatch(nonce):
        raise HavocError(f"a challenge is 16 to 128 letters, digits or any of . _ ~ - (not {nonce[:40]!r})")
    return nonce


def statement_of(record: Record, nonce: str | None) -> dict[str, Any]:
    """The statement that is signed: the content, the artifact, and the challenge."""
    from .gate import why_invalid

    measured = {"manifest.json": record.subject.manifest_sha256}
    if record.subject.engine is not None:
        measured = {f"model/{name}": sha256 for name, sha256 in sorted(record.subject.files.items())}
    hashes = {"record.json": record.sha256, **measured}
    subject = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in hashes.items()]
    content = "" if nonce is None else base64.b64encode(nonce.encode()).decode()
    predicate = {
        "result": "PASSED" if why_invalid(record) is None else "FAILED",
        "configuration": [{"name": "challenge", "content": content}],
    }
    return {"_type": STATEMENT, "subject": subject, "predicateType": TEST_RESULT, "predicate": predicate}


@dataclass(frozen=True)
class Answerer:
    """A private key that was read and found usable; nothing is signed yet."""

    signer: Any

    def sign(self, record: Record, path: Path, nonce: str | None) -> Path:
        """Write the envelope of the record at `path` beside it, and return the envelope's path."""
        dsse = _dsse()
        envelope = dsse.Envelope(canonical_json(statement_of(record, nonce)), _PAYLOAD_TYPE, {})
        envelope.sign(self.signer)
        write_json(envelope_path(path), envelope.to_dict())
        return envelope_path(path)


def load_answerer(private_key: Path) -> Answerer:
    """Read a private key in PEM form, elliptic curve or Ed25519; anything else is a `HavocError`.

    The password of an encrypted key is read from the environment.
    """
    _dsse()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

    content = read_key(private_key)
    password = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
    if b"ENCRYPTED" in content and password is None:
        raise HavocError(
            f"{private_key}: the key is encrypted; put its password into the environment as {PASSWORD_VARIABLE}"
        )
    try:
        key = load_pem_private_key(content, password if b"ENCRYPTED" in content else None)
        _require_kind(key.public_key(), private_key)
        return Answerer(CryptoSigner(key))
    except HavocError:
        raise
    except Exception as error:  # for another kind of key, the library raises any error of its crypto code
        raise HavocError(f"{private_key}: not a private key in PEM form ({_reason(error)})") from error


def verify_answer(record: Record, record_path: Path, keyring: Path, nonce: str | None) -> str:
    """Check that a key of `keyring` signed this record in answer to `nonce`; return that key's file name.

    `keyring` is a public key in PEM form, or a folder of them. If `nonce` is None, any challenge is accepted. A record
    without a signature, or signed by another key or for another content, artifact or challenge, is an `IdentityError`.
    """
    dsse = _dsse()
    keys = _keys(keyring)
    path = envelope_path(record_path)
    if path.is_symlink() or not path.is_file():
        raise IdentityError(f"{record_path}: not signed (no file {path.name}), but a signature is required")
    document = read_json(path, max_bytes=_MAX_ENVELOPE_BYTES)
    try:
        envelope = dsse.Envelope.from_dict(document)
        accepted = envelope.verify([key for key, _ in keys], 1)
        payload = envelope.payload
        payload_type = envelope.payload_type
    except Exception as error:  # each kind of damage has its own exception, none is documented
        raise IdentityError(f"{path}: not signed by a key of {keyring} ({_reason(error)})") from error
    if payload_type != _PAYLOAD_TYPE:
        raise IdentityError(f"{path}: signs something else than an in-toto statement")
    _require_said(path, parse_json(payload, path), record, nonce)
    return next(name for key, name in keys if key.keyid in accepted)


def _require_said(path: Path, found: object, record: Record, nonce: str | None) -> None:
    """Check that the signed statement describes this record."""
    wanted = statement_of(record, nonce)
    found = found if isinstance(found, dict) else {}
    for key in ("_type", "predicateType"):
        if found.get(key) != wanted[key]:
            raise IdentityError(f"{path}: signs something else than a test result")
    if found.get("subject") != wanted["subject"]:
        raise IdentityError(f"{path}: signs another record, or one of another artifact")
    predicate = found.get("predicate")
    if not isinstance(predicate, dict) or predicate.get("result") not in {"PASSED", "FAILED"}:
        raise IdentityError(f"{path}: signs something else than a test result")
    if nonce is not None and predicate.get("configuration") != wanted["predicate"]["configuration"]:
        raise IdentityError(f"{path}: answers another challenge than {nonce}: it is older, or for another request")


def _keys(keyring: Path) -> list[tuple[Any, str]]:
    """Every public key of a file or folder, with its file's name."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    try:
        files = sorted(keyring.glob("*.pem"))[: _MAX_KEYS + 1] if keyring.is_dir() else [keyring]
    except OSError as error:
        raise unreadable(error, keyring) from error
    if not files:
        raise HavocError(f"{keyring}: contains no key; give a public key in PEM form, or a folder of *.pem files")
    if len(files) > _MAX_KEYS:
        raise HavocError(f"{keyring}: more than {_MAX_KEYS} keys")
    keys = []
    for file in files:
        try:
            key = load_pem_public_key(read_key(file))
            _require_kind(key, file)
            keys.append((SSlibKey.from_crypto(key), file.name))
        except HavocError:
            raise
        except Exception as error:
            raise HavocError(f"{file}: not a public key in PEM form ({_reason(error)})") from error
    return keys


def _require_kind(key: object, path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if not isinstance(key, (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)):
        raise HavocError(f"{path}: the key must be elliptic curve or Ed25519, this is {type(key).__name__}")


def _dsse() -> Any:  # noqa: ANN401 - its classes are not typed
    try:
        from cryptography.hazmat.primitives import serialization  # noqa: F401 - asked for with it
        from securesystemslib import dsse
    except ModuleNotFoundError as error:
        raise HavocError(f'signatures need {error.name}: pip install "havoc-core[sign]"') from error
    return dsse


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def verify_answers(
    paths: Sequence[Path], records: Sequence[Record], keyring: Path, nonce: str | None
) -> tuple[str, ...]:
    """Check each record by the envelope beside its file; return the names of the keys, each once."""
    pairs = zip(paths, records, strict=True)
    return tuple(dict.fromkeys(verify_answer(record, path, keyring, nonce) for path, record in pairs))
