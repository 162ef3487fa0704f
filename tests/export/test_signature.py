"""A signed artifact says who made it; whatever was changed since, or signed by another key, ends in exit code 5."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from havoc_core.export.runtime.artifact import SIGNATURE, read_manifest
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.runtime.signature import PASSWORD_VARIABLE
from havoc_core.storage import sha256_file
from tests.commands import run


def write_key_pair(folder: Path, name: str, key, password: bytes | None = None) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine` and `theirs` on P-256 and P-384, `locked` behind a password, `other` of another kind."""
    folder = tmp_path_factory.mktemp("keys")
    write_key_pair(folder, "mine", ec.generate_private_key(ec.SECP256R1()))
    write_key_pair(folder, "theirs", ec.generate_private_key(ec.SECP384R1()))
    write_key_pair(folder, "locked", ec.generate_private_key(ec.SECP256R1()), b"secret")
    write_key_pair(folder, "other", rsa.generate_private_key(65537, 2048))
    return folder


@pytest.fixture(scope="module")
def signed_once(text_base_directory: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signed") / "reader"
    assert run("export", text_base_directory, "--out", out, "--sign", keys / "mine.pem", "--quiet") == 0
    return out


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed_once, tmp_path / "reader"))


def test_the_right_key_verifies(signed: Path, keys: Path, capsys) -> None:
    """One check more, with the number of files; the manifest is signed and the signature is not in the manifest."""
    assert run("verify", signed, "--public-key", keys / "mine.pub") == 0
    num_signed = len(read_manifest(signed).files) + 1
    assert f"signature    {num_signed} files, signed by the key of mine.pub" in capsys.readouterr().out
    assert SIGNATURE not in read_manifest(signed).files
    DecoderSession.open(signed)
    assert run("verify", signed) == 0
    assert "give --public-key PEM" in capsys.readouterr().out


def test_the_signature_is_the_standards(signed: Path, keys: Path) -> None:
    """The command of model-signing verifies what we sign, under the artifact's own name."""
    found = model_signing("verify", "key", signed, "--signature", signed / SIGNATURE, "--public_key", keys / "mine.pub")
    assert found.returncode == 0, found.stderr
    envelope = json.loads((signed / SIGNATURE).read_bytes())["dsseEnvelope"]
    (subject,) = json.loads(base64.b64decode(envelope["payload"]))["subject"]
    assert subject["name"] == "reader"


def test_an_existing_artifact_is_signed_by_the_standards_command(signed: Path, keys: Path) -> None:
    """And we verify what it signs."""
    (signed / SIGNATURE).unlink()
    arguments = ["--signature", signed / SIGNATURE, "--private_key", keys / "theirs.pem"]
    found = model_signing("sign", "key", signed, *arguments)
    assert found.returncode == 0, found.stderr
    assert run("verify", signed, "--public-key", keys / "theirs.pub") == 0


def model_signing(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True, text=True)


def forge_manifest(artifact: Path) -> None:
    """Change a tokenizer file and put its new hash into the manifest: only the signature can tell."""
    file, path = artifact / "tokenizer_config.json", artifact / "manifest.json"
    file.write_text(file.read_text() + " ")
    document = json.loads(path.read_text())
    document["files"][file.name] = {"sha256": sha256_file(file), "num_bytes": file.stat().st_size}
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "key", "message"),
    [
        (lambda artifact: None, "theirs", "not a signature of these files by"),
        (forge_manifest, "mine", "(manifest.json is not as it was signed)"),
        (lambda artifact: (artifact / "extra.txt").write_text("x"), "mine", "Extra files"),
        (lambda artifact: (artifact / SIGNATURE).unlink(), "mine", "not signed (no file model.sig)"),
        (lambda artifact: (artifact / SIGNATURE).write_text("{}"), "mine", "not a signature of these files by"),
        (lambda artifact: (artifact / SIGNATURE).write_bytes(b"\xff"), "mine", "not a signature of these files by"),
    ],
    ids=["another-key", "forged", "extra-file", "no-signature", "empty-signature", "no-text"],
)
def test_what_is_not_as_it_was_signed(signed: Path, keys: Path, capsys, damage, key: str, message: str) -> None:
    """Exit code 5 and one line, though every hash of the manifest is right."""
    damage(signed)
    capsys.readouterr()
    assert run("verify", signed, "--public-key", keys / f"{key}.pub") == 5
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_signature_that_leaves_a_file_out_is_refused(signed: Path, keys: Path, capsys) -> None:
    """Signed by the right key, but not over the graph."""
    arguments = ["--private_key", keys / "mine.pem", "--ignore-paths", signed / "model.onnx"]
    assert model_signing("sign", "key", signed, "--signature", signed / SIGNATURE, *arguments).returncode == 0
    assert run("verify", signed, "--public-key", keys / "mine.pub") == 5
    assert "model.onnx is not among" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("locked.pem", "the key is encrypted; put its password into the environment as HAVOC_SIGNING_PASSWORD"),
        ("other.pem", "not a private key on P-256, P-384 or P-521"),
        ("mine.pub", "not a private key on"),
        ("absent.pem", "absent.pem: No such file"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_first(tmp_path: Path, keys: Path, capsys, key: str, message: str) -> None:
    """Before the base is even looked at: one line, exit code 2, nothing written."""
    assert run("export", "nowhere", "--out", tmp_path / "a", "--sign", keys / key) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_encrypted_key_signs_with_its_password(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password comes by the environment; a wrong one is one line and exit code 2."""
    words = ("export", "pico", "--out", tmp_path / "a", "--sign", keys / "locked.pem", "--quiet")
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    assert run(*words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    assert run(*words) == 0
    assert run("verify", tmp_path / "a", "--public-key", keys / "locked.pub", "--quiet") == 0


@pytest.mark.parametrize("key", ["other.pub", "mine.pem", "absent.pub"])
def test_a_key_that_cannot_verify_is_a_mistake(signed: Path, keys: Path, capsys, key: str) -> None:
    """Not an identity question: exit code 2."""
    assert run("verify", signed, "--public-key", keys / key) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_the_package_the_extra_is_named(signed: Path, keys: Path, tmp_path: Path) -> None:
    """Where `model-signing` is not installed, the one line says what to install, and nothing is written."""
    hidden = "import sys; sys.modules['model_signing'] = None; from havoc_core.cli import main; sys.exit(main())"
    for words in (
        ("export", "pico", "--out", tmp_path / "out", "--sign", keys / "mine.pem"),
        ("verify", signed, "--public-key", keys / "mine.pub"),
    ):
        found = subprocess.run([sys.executable, "-c", hidden, *map(str, words)], capture_output=True, text=True)
        assert found.returncode == 2
        assert 'pip install "havoc-core[sign]"' in found.stderr
        assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_to_hf_is_signed_too(text_base_directory: Path, keys: Path, tmp_path: Path) -> None:
    """A Hugging Face directory carries a signature that the standard's command verifies."""
    out = tmp_path / "hf"
    assert run("export", text_base_directory, "--to", "hf", "--out", out, "--sign", keys / "mine.pem", "--quiet") == 0
    found = model_signing("verify", "key", out, "--signature", out / SIGNATURE, "--public_key", keys / "mine.pub")
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the documented commands make the key with openssl")
def test_the_documented_commands_work(tmp_path: Path) -> None:
    """Every line of the section on signatures in turn: key, export, verify, and the standard's own command."""
    section = (Path(__file__).parents[2] / "docs" / "export.md").read_text().partition("## Signature")[2]
    lines = [line for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    assert [line.split()[0] for line in lines] == ["openssl", "openssl", "havoc", "havoc", *["model_signing"] * 2]
    for line in lines:
        program, *words = shlex.split(line)
        module = {"havoc": "havoc_core", "model_signing": "model_signing"}.get(program)
        command = [program, *words] if module is None else [sys.executable, "-m", module, *words]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == 0, (line, found.stderr)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such devices")
@pytest.mark.parametrize("kind", ["device", "pipe", "directory", "large"])
def test_a_key_that_never_ends_is_refused(signed: Path, tmp_path: Path, capsys, kind: str) -> None:
    """A device, a pipe that nobody writes to, a file of gigabytes: one line at once, to verify and to sign."""
    key = Path("/dev/zero") if kind == "device" else tmp_path / "key"
    if kind == "pipe":
        os.mkfifo(key)
    elif kind == "directory":
        key.mkdir()
    elif kind == "large":
        key.touch()
        os.truncate(key, 1 << 33)
    said = "more than 65536 bytes" if kind == "large" else "not a regular file"
    for words in (("verify", signed, "--public-key", key), ("export", "pico", "--out", tmp_path / "a", "--sign", key)):
        assert run(*words, "--quiet") == 2
        error = capsys.readouterr().err
        assert f"{key}: {said}" in error
        assert len(error.splitlines()) == 1
