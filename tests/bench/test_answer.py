"""A signed record passes where its key and its challenge are the ones asked for, and no other does."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.answer import envelope_path, load_answerer, require_nonce, statement_of, verify_answer
from havoc_core.bench.judge.record import Record, load_record
from havoc_core.cli import main
from havoc_core.errors import HavocError, IdentityError
from tests.bench import sample_records as samples

NONCE, OTHER = "challenge-0123456789", "challenge-9876543210"
PRIVATE = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)


def write_key(folder: Path, name: str, key, password: bytes | None = None) -> Path:
    """A pair: NAME.key, and the public half in keys/NAME.pem."""
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(*PRIVATE, hidden))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "keys").mkdir(exist_ok=True)
    (folder / "keys" / f"{name}.pem").write_bytes(public)
    return folder / f"{name}.key"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The key of the machine that measures; the keyring beside it holds one more."""
    write_key(tmp_path, "other-device", ed25519.Ed25519PrivateKey.generate())
    return write_key(tmp_path, "device", ec.generate_private_key(ec.SECP256R1()))


def saved(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    cpu = identify_cpu().model_dump(mode="json")
    path = folder / "record.json"
    samples.record("cpu", **{"device__cpu": cpu, "device__name": cpu["name"], **changes}).save(path)
    return path


@pytest.fixture
def path(tmp_path: Path, device: Path) -> Path:
    """A record that the device signed in answer to NONCE."""
    path = saved(tmp_path / "run")
    load_answerer(device).sign(load_record(path), path, NONCE)
    return path


def test_it_is_a_standard_envelope_around_a_standard_statement(path: Path, tmp_path: Path) -> None:
    """in-toto's own library reads the statement, and the signature is right by nothing but the DSSE page's formula."""
    from in_toto_attestation.v1.statement import Statement

    envelope = json.loads(envelope_path(path).read_text())
    payload = base64.b64decode(envelope["payload"])
    statement = json.loads(payload)
    checked = Statement(
        [_descriptor(item) for item in statement["subject"]], statement["predicateType"], statement["predicate"]
    )
    checked.validate()
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    key = serialization.load_pem_public_key((tmp_path / "keys" / "device.pem").read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed, ec.ECDSA(hashes.SHA256()))
    assert statement["subject"][0]["digest"]["sha256"] == json.loads(path.read_text())["sha256"]


def _descriptor(item):
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

    return ResourceDescriptor(name=item["name"], digest=item["digest"]).pb


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["p256", "p384", "p521", "ed25519"],
)
def test_every_kind_of_key_signs(tmp_path: Path, make: Callable) -> None:
    """By the one key, or by a folder that holds it; the finding names it."""
    private, path = write_key(tmp_path, "mine", make()), saved(tmp_path / "run")
    load_answerer(private).sign(load_record(path), path, NONCE)
    for keyring in (tmp_path / "keys", tmp_path / "keys" / "mine.pem"):
        assert verify_answer(load_record(path), path, keyring, NONCE) == "mine.pem"
        assert verify_answer(load_record(path), path, keyring, None) == "mine.pem"


def refused(record: Record, path: Path, keyring: Path, said: str, nonce: str | None = NONCE) -> None:
    with pytest.raises(IdentityError, match=said):
        verify_answer(record, path, keyring, nonce)


def test_an_answer_to_another_challenge_is_old(path: Path, tmp_path: Path, device: Path) -> None:
    """Replayed, or signed without any challenge."""
    refused(load_record(path), path, tmp_path / "keys", f"answers another challenge than {OTHER}", OTHER)
    load_answerer(device).sign(load_record(path), path, None)
    refused(load_record(path), path, tmp_path / "keys", "answers another challenge")


def test_another_record_or_artifact_is_not_what_was_signed(path: Path, tmp_path: Path) -> None:
    """Spliced: the envelope of one beside the other; relabelled: the same figures of another device or artifact."""
    for changes in (
        {"run_id": "second"},
        {"device__name": "NVIDIA GeForce GTX 1660"},
        {"subject__manifest_sha256": "9" * 64},
        {"samples__0__prefill__duration_ns__0": 1},
    ):
        other = saved(tmp_path / "other", **changes)
        shutil.copyfile(envelope_path(path), envelope_path(other))
        refused(load_record(other), other, tmp_path / "keys", "signs another record")


def test_a_key_that_is_not_in_the_ring_signs_nothing(path: Path, tmp_path: Path) -> None:
    """A stranger's key, and the right name on the stranger's key."""
    stranger = write_key(tmp_path / "run", "device", ec.generate_private_key(ec.SECP256R1()))
    load_answerer(stranger).sign(load_record(path), path, NONCE)
    refused(load_record(path), path, tmp_path / "keys", "not signed by a key of")
    document = json.loads(envelope_path(path).read_text())
    right = load_answerer(tmp_path / "device.key").signer.public_key.keyid
    document["signatures"][0]["keyid"] = right
    envelope_path(path).write_text(json.dumps(document))
    refused(load_record(path), path, tmp_path / "keys", "not signed by a key of")


def test_no_signature_is_none(path: Path, tmp_path: Path) -> None:
    """A missing file, a link to a good one, an envelope without signatures."""
    envelope = envelope_path(path)
    document = json.loads(envelope.read_text())
    envelope.write_text(json.dumps({**document, "signatures": []}))
    refused(load_record(path), path, tmp_path / "keys", "not signed by a key of")
    envelope.unlink()
    refused(load_record(path), path, tmp_path / "keys", "not signed \\(no file record.dsse.json\\)")
    (tmp_path / "good.json").write_text(json.dumps(document))
    envelope.symlink_to(tmp_path / "good.json")
    refused(load_record(path), path, tmp_path / "keys", "not signed \\(no file record.dsse.json\\)")


def test_what_is_signed_must_be_a_test_result(path: Path, tmp_path: Path, device: Path) -> None:
    """The device's key signs other things, too: none of them is an answer."""
    from securesystemslib.dsse import Envelope

    signer, record = load_answerer(device).signer, load_record(path)
    whole = statement_of(record, NONCE)
    for payload, kind in (
        (b"{}", "application/vnd.in-toto+json"),
        (json.dumps(whole).encode(), "text/plain"),
        (json.dumps({**whole, "_type": "x"}).encode(), "application/vnd.in-toto+json"),
        (json.dumps({**whole, "predicate": {}}).encode(), "application/vnd.in-toto+json"),
        (json.dumps([whole]).encode(), "application/vnd.in-toto+json"),
    ):
        envelope = Envelope(payload, kind, {})
        envelope.sign(signer)
        envelope_path(path).write_text(json.dumps(envelope.to_dict()))
        refused(record, path, tmp_path / "keys", "signs something else|signs another record")


@hypothesis.settings(
    max_examples=1000, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_a_thousand_damaged_envelopes_pass_nowhere(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of the envelope, its decoded payload or its signature changed, cut or doubled: no pass, no traceback."""
    envelope = tmp_path / "whole.json"
    if not envelope.exists():
        shutil.copyfile(envelope_path(path), envelope)
    document = json.loads(envelope.read_text())
    where = data.draw(st.sampled_from(["payload", "sig", "file"]))
    if where == "file":
        content = bytearray(envelope.read_bytes())
    else:
        place = document if where == "payload" else document["signatures"][0]
        content = bytearray(base64.b64decode(place[where]))
    at = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "double"]))
    if change == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del content[at:]
    else:
        content[at:at] = content[at : at + 1]
    if where == "file":
        envelope_path(path).write_bytes(bytes(content))
        hypothesis.assume(_meaning(envelope_path(path)) != _meaning(envelope))
    else:
        place[where] = base64.b64encode(bytes(content)).decode()
        envelope_path(path).write_text(json.dumps(document))
    with pytest.raises((IdentityError, HavocError)):
        verify_answer(load_record(path), path, tmp_path / "keys", NONCE)


def _meaning(envelope: Path) -> tuple[bytes, bytes] | None:
    """Payload and signature of an envelope: white space and unknown keys mean nothing."""
    try:
        document = json.loads(envelope.read_text())
        return base64.b64decode(document["payload"]), base64.b64decode(document["signatures"][0]["sig"])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


@pytest.mark.parametrize("nonce", ["short", "", "x" * 129, "with a space in it", "no\nline-breaks-here"])
def test_a_challenge_that_is_none(nonce: str) -> None:
    with pytest.raises(HavocError, match="a challenge is 16 to 128"):
        require_nonce(nonce)


def test_keys_that_are_none(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each: which file, what is wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pem").write_text("no key")
    write_key(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    hidden = write_key(tmp_path / "empty", "hidden", ed25519.Ed25519PrivateKey.generate(), b"word")
    for file, said in (
        (tmp_path / "text.pem", "text.pem: not a private key in PEM form"),
        (tmp_path / "rsa.key", "rsa.key: .* Ed25519, this is RSA"),
        (tmp_path / "missing.key", "missing.key: No such file"),
        (tmp_path, "not a regular file"),
        (hidden, "the key is encrypted; put its password into the environment as HAVOC_SIGNING_PASSWORD"),
    ):
        with pytest.raises(HavocError, match=said):
            load_answerer(file)
    monkeypatch.setenv("HAVOC_SIGNING_PASSWORD", "wrong")
    with pytest.raises(HavocError, match="hidden.key: not a private key"):
        load_answerer(hidden)
    monkeypatch.setenv("HAVOC_SIGNING_PASSWORD", "word")
    assert load_answerer(hidden)
    (tmp_path / "none").mkdir()
    record = load_record(path)
    for keyring, said in (
        (tmp_path / "none", "contains no key"),
        (tmp_path / "text.pem", "text.pem: not a public key"),
        (tmp_path / "keys", "rsa.pem: .* Ed25519, this is RSA"),
        (tmp_path / "nowhere", "nowhere: No such file"),
    ):
        with pytest.raises(HavocError, match=said):
            verify_answer(record, path, keyring, NONCE)


def test_the_gate_asks_for_it(path: Path, tmp_path: Path, device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code and verdict as ever, and the key's name; a stranger's record exits 5 in one line."""
    words = ["gate", str(path.parent), "--target", "host", "--require-signature", str(tmp_path / "keys"), "--nonce"]
    assert main([*words, NONCE]) == 0
    assert "; signed by device.pem" in capsys.readouterr().out
    assert main([*words, NONCE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signed_by"] == ["device.pem"]
    assert main([*words, OTHER]) == 5
    assert "answers another challenge" in capsys.readouterr().err
    assert main(["gate", str(path), "--target", "host", "--nonce", NONCE]) == 2
    assert "--require-signature" in capsys.readouterr().err
    second = saved(tmp_path / "second", run_id="b")
    assert main([*words[:2], str(second), *words[2:], NONCE]) == 5
    assert "not signed" in capsys.readouterr().err


def test_bench_answers(
    tiny_artifact: Path, tmp_path: Path, device: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """What was measured is signed as it lies on the disk; a challenge without a key is refused before any work."""
    words = ["bench", str(tiny_artifact), "--n", "0", "--out", str(tmp_path / "out"), "--challenge", NONCE]
    assert main(words) == 2
    assert "give the key with --sign KEY" in capsys.readouterr().err
    assert main([*words, "--sign", str(tmp_path / "no.key")]) == 2
    assert not (tmp_path / "out" / "record.json").exists()
    measured = samples.record("cpu")
    monkeypatch.setattr("havoc_core.bench.measure.measure", lambda *_, **__: measured)
    assert main([*words, "--sign", str(device), "--quiet"]) == 0
    path = tmp_path / "out" / "record.json"
    assert verify_answer(load_record(path), path, tmp_path / "keys", NONCE) == "device.pem"
    assert main([*words[:6], "--replace", "--quiet"]) == 0
    assert not envelope_path(path).exists()  # it was of the record before
