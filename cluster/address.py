"""The scheduler's address: plain TCP is allowed on this machine only; every other machine needs TLS."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import HavocError

if TYPE_CHECKING:
    from pathlib import Path

_PORT = "8786"


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """A cluster's certificate authority, and this side's certificate and key (PEM files). None: as Dask is set up."""

    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Address:
    """A scheduler's address as Dask writes it; `is_local`: it is on this machine and reached without TLS."""

    text: str
    is_local: bool

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `tls://host:port` or `tcp://127.0.0.1:port`; the port is 8786 if none is given.

        Plain TCP to another machine is a `HavocError`.
        """
        scheme, mark, rest = text.partition("://")
        scheme, rest = (scheme, rest) if mark else ("tcp", text)
        host, colon, port = rest.rpartition(":") if not rest.endswith("]") else (rest, "", "")
        host, port = (host, port) if colon else (rest, _PORT)
        if scheme not in {"tcp", "tls"} or not host or not port.isdigit():
            raise HavocError(f"{text!r} is not a scheduler's address: give tls://HOST:PORT, or tcp://127.0.0.1:PORT")
        if scheme == "tcp" and not _is_loopback(host.strip("[]")):
            raise HavocError(
                f"{text}: anyone who reaches a plain Dask port can run programs on every worker, so another machine "
                "needs TLS: start scheduler and workers with TLS and give tls://HOST:PORT (docs/cluster.md)"
            )
        return cls(text=f"{scheme}://{host}:{port}", is_local=scheme == "tcp")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def security(address: Address, tls: TlsFiles, role: Literal["client", "worker"]) -> Any:  # noqa: ANN401 - Dask's own
    """Return Dask's `Security` for one side of the connection, None without TLS. Bad files are a `HavocError`."""
    if address.is_local:
        if tls != TlsFiles():
            raise HavocError(
                f"{address.text} is a plain address, so the certificates have no use: give tls://HOST:PORT"
            )
        return None
    from distributed import Security

    given = {"tls_ca_file": tls.authority, f"tls_{role}_cert": tls.certificate, f"tls_{role}_key": tls.key}
    words = {name: str(path) for name, path in given.items() if path is not None}
    found = Security(require_encryption=True, **words)
    missing = [name for name in given if getattr(found, name) is None]
    if missing:
        raise HavocError(
            f"{address.text} needs TLS, and {', '.join(missing)} is not set: give --tls-ca, --tls-cert and --tls-key, "
            "or set them in Dask's configuration"
        )
    try:
        found.get_connection_args(role)
        found.get_listen_args(role)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(getattr(found, name))[:200] for name in given)
        raise HavocError(
            f"TLS: {error.strerror or error}; are these a CA, a certificate and its key (PEM)? {files}"
        ) from None
    return found
