"""Who made this artifact: an OpenSSF model signature (`model.sig`) by a local elliptic-curve key, without a network.

The format is that of `model-signing`: a Sigstore bundle around a DSSE envelope around an in-toto statement that lists
the SHA-256 of every file, `manifest.json` included. Its own command verifies what is signed here, and conversely.
Source: OpenSSF Model Signing specification, https://github.com/ossf/model-signing-spec.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HavocError, IdentityError
from ...storage import explained, read_json
from .artifact import MANIFEST, SIGNATURE

if TYPE_CHECKING:
    from .artifact import ArtifactManifest

PASSWORD_VARIABLE = "HAVOC_SIGNING_PASSWORD"  # noqa: S105 - the name of one, not one
_MAX_REASON_CHARS, _MAX_KEY_BYTES = 240, 1 << 16
_CHANGED = re.compile(r"Hash mismatch for \\?'(.+?)\\?'")


@dataclass(frozen=True)
class Signer:
    """A private key that was read and found usable; nothing is signed yet."""

    configuration: Any

    def sign(self, directory: Path, *, name: str) -> None:
        """Write `model.sig` over every file of `directory`, which the statement calls `name`."""
        hashing, manifest = _library("hashing"), _library("manifest")

        class Named(hashing.Config):  # type: ignore[name-defined, misc]
            """Hashes as the library does; the folder is still under its temporary name, so the name is given."""

            def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:  # noqa: ANN401 - the library's types
                found = super().hash(model_path, files_to_hash=files_to_hash)
                kind = manifest.SerializationType.from_args(found.serialization_type)
                items = [kind.new_item(file.identifier, file.digest) for file in found.resource_descriptors()]
                return manifest.Manifest(name, items, kind)

        files = Named().use_file_serialization(ignore_paths=[Path(SIGNATURE)])
        self.configuration.set_hashing_config(files).sign(directory, directory / SIGNATURE)


def load_signer(private_key: Path) -> Signer:
    """Read a PEM key on P-256, P-384 or P-521; anything else is a `HavocError`.

    The password of an encrypted key is read from the environment, so no shell history or process list shows it.
    """
    signing = _library("signing")
    password = None
    if b"ENCRYPTED" in read_key(private_key):
        password = os.environ.get(PASSWORD_VARIABLE, "").encode()
        if not password:
            raise HavocError(
                f"{private_key}: the key is encrypted; put its password into the environment as {PASSWORD_VARIABLE}"
            )
    try:
        return Signer(signing.Config().use_elliptic_key_signer(private_key=private_key, password=password))
    except Exception as error:  # for another kind of key, the library raises any error of its crypto code
        raise HavocError(
            f"{private_key}: not a private key on P-256, P-384 or P-521 in PEM form ({_reason(error)})"
        ) from error


def verify_signature(directory: Path, manifest: ArtifactManifest, public_key: Path) -> str:
    """Check `model.sig` against every file by `public_key`; return the finding in words.

    No signature, one by another key, one that leaves a file of the artifact out, and a file that is not as it was
    signed are each an `IdentityError`; a key that cannot be read is a `HavocError`.
    """
    verifying = _library("verifying")
    read_key(public_key)
    try:
        configuration = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise HavocError(
            f"{public_key}: not a public key on P-256, P-384 or P-521 in PEM form ({_reason(error)})"
        ) from error
    path = directory / SIGNATURE
    if not path.is_file() or path.is_symlink():
        raise IdentityError(f"{directory}: not signed (no file {SIGNATURE}), but a signature is required")
    folder = directory.resolve()  # the library takes no link, and a folder that is held open is named by one
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the library prints its warnings
            configuration.verify(folder, folder / SIGNATURE)
    except Exception as error:  # each kind of damage to the bundle has its own exception, none is documented
        raise IdentityError(f"{path}: not a signature of these files by {public_key} ({_reason(error)})") from error
    if not folder.is_dir() or not folder.samefile(directory):
        raise IdentityError(f"{directory}: it was replaced while the signature was checked")
    signed = _signed_names(path)
    for name in (MANIFEST, *manifest.files):
        if name not in signed:
            raise IdentityError(f"{path}: {name} is not among the files it signs")
    return f"{len(signed)} files, signed by the key of {public_key.name}"


def _signed_names(path: Path) -> set[str]:
    """Files that the statement names; call it only after the signature was verified."""
    payload = json.loads(base64.b64decode(read_json(path)["dsseEnvelope"]["payload"]))
    return {str(resource["name"]) for resource in payload["predicate"]["resources"]}


def _library(part: str) -> Any:  # noqa: ANN401 - its classes are not typed
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ModuleNotFoundError as error:
        raise HavocError(f'signatures need {error.name}: pip install "havoc-core[sign]"') from error


def read_key(path: Path) -> bytes:
    """Read a key; a device or pipe, which may never end, and a file larger than any key are refused."""
    try:
        if path.exists() and not path.is_file():
            raise HavocError(f"{path}: not a regular file; give the key as a file in PEM form")
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise explained(error, path) from error
    if len(content) > _MAX_KEY_BYTES:
        raise HavocError(f"{path}: more than {_MAX_KEY_BYTES} bytes; no key in PEM form is that large")
    return content


def _reason(error: Exception) -> str:
    """The library's words in one line; of a changed file its name, not the raw bytes of both digests."""
    text = " ".join(str(error).split()) or type(error).__name__
    changed = _CHANGED.search(text)
    return f"{changed[1]} is not as it was signed" if changed else text[:_MAX_REASON_CHARS]
