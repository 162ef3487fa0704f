"""Off this machine there is TLS or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from havoc_core.cluster.address import Address, TlsFiles, security
from havoc_core.errors import HavocError


@pytest.mark.parametrize(
    ("text", "address", "is_local"),
    [
        ("127.0.0.1", "tcp://127.0.0.1:8786", True),
        ("tcp://127.0.0.1:9000", "tcp://127.0.0.1:9000", True),
        ("localhost:1", "tcp://localhost:1", True),
        ("tcp://[::1]:8786", "tcp://[::1]:8786", True),
        ("tls://box", "tls://box:8786", False),
        ("tls://10.0.0.7:8786", "tls://10.0.0.7:8786", False),
    ],
)
def test_addresses(text: str, address: str, is_local: bool) -> None:
    """The port may be left out; what is reached plainly is this machine."""
    assert Address.parse(text) == Address(text=address, is_local=is_local)


@pytest.mark.parametrize("text", ["tcp://10.0.0.7:8786", "box:8786", "tcp://0.0.0.0:8786", "tcp://127.0.0.1.evil:8786"])
def test_a_plain_address_elsewhere_is_refused(text: str) -> None:
    """Names are not looked up: one that leads to loopback today may lead elsewhere tomorrow."""
    with pytest.raises(HavocError, match="needs TLS"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["", "tcp://", "http://127.0.0.1:8786", "127.0.0.1:port", "tls://:8786"])
def test_what_is_no_address(text: str) -> None:
    """One line says how they are written."""
    with pytest.raises(HavocError, match="is not a scheduler's address"):
        Address.parse(text)


def test_certificates_that_are_missing_or_broken(tmp_path: Path) -> None:
    """TLS without files, and files that are none, are refused before anything is tried."""
    pytest.importorskip("distributed")
    address = Address.parse("tls://127.0.0.1:8786")
    with pytest.raises(HavocError, match="--tls-ca, --tls-cert and --tls-key"):
        security(address, TlsFiles(), "client")
    with pytest.raises(HavocError, match="give tls"):
        security(Address.parse("127.0.0.1"), TlsFiles(key=tmp_path / "key.pem"), "client")
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    with pytest.raises(HavocError, match=r"TLS: .*broken\.pem"):
        security(address, TlsFiles(authority=broken, certificate=broken, key=broken), "client")
    absent = tmp_path / "absent.pem"
    with pytest.raises(HavocError, match=r"TLS: .*absent\.pem"):
        security(address, TlsFiles(authority=absent, certificate=absent, key=absent), "worker")
