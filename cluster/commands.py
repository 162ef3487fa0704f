"""`havoc worker ADDRESS`: let searches score on this machine and, with --measures, measure on its device."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import secrets
import socket
import sys
from typing import TYPE_CHECKING

from .. import __version__
from ..bench.device import default_provider, identify_device, runtime_package
from ..errors import HavocError, MeasurementError
from ..export.runtime.devices import DEVICE_KINDS
from ..messages import plain
from ..storage import scratch_directory
from .address import Address, TlsFiles, security
from .dask import quiet_dask
from .duties import PLUGIN, Duties, plugin
from .store import Store, default_store
from .worker_requests import Offer

if TYPE_CHECKING:
    import argparse

_CONNECT_S = 5


def handle_worker(args: argparse.Namespace) -> int:
    """Work for searches until the scheduler ends or this process is ended."""
    address = Address.parse(args.address)
    tls = TlsFiles(authority=args.tls_ca, certificate=args.tls_cert, key=args.tls_key)
    offer = make_offer(args.measures)
    duties = Duties(offer, Store(args.store or default_store()))
    quiet_dask()
    asyncio.run(_serve(address, tls, offer, duties))
    raise MeasurementError(
        f"the scheduler at {address.text} has ended, or the connection to it is lost: start this worker again"
    )


def make_offer(measures: str | None) -> Offer:
    """Describe what this machine offers. `measures`: a kind of device, "auto" (a card if there is one), or None."""
    device = None
    if measures is not None:
        if sys.platform == "win32":
            raise HavocError("--measures needs a file lock of Linux or macOS: measure on such a machine")
        device = identify_device(default_provider() if measures == "auto" else DEVICE_KINDS[measures].provider)
    return Offer(
        version=__version__,
        onnxruntime=importlib.metadata.version(runtime_package()),
        token=secrets.token_hex(8),
        scores=all(importlib.util.find_spec(package) for package in ("torch", "safetensors", "onnx_ir")),
        device=device,
    )


async def _serve(address: Address, tls: TlsFiles, offer: Offer, duties: Duties) -> None:
    from distributed import Worker

    async def introduce(_worker: object) -> str:
        return json.dumps(plain(offer))

    with scratch_directory("havoc-worker-") as folder:
        worker = Worker(
            address.text,
            nthreads=1,
            name=f"{socket.gethostname()}-{os.getpid()}",
            host="127.0.0.1" if address.is_local else None,
            security=security(address, tls, "worker"),
            memory_limit=0,
            local_directory=str(folder),
            startup_information={PLUGIN: introduce},
            plugins=(plugin(duties),),
            death_timeout=_CONNECT_S,
            dashboard=False,
        )
        is_taken = False
        try:
            async with worker:
                is_taken = True
                _say(f"{worker.name} at {worker.address}, scheduler {address.text}; {_words(offer)}")
                await worker.finished()
        except (OSError, RuntimeError, TimeoutError, ValueError) as error:
            if is_taken:
                raise
            raise HavocError(
                f"no Dask scheduler accepted this worker at {address.text} within {_CONNECT_S} s: start one "
                f"(docs/cluster.md), or correct the address or the certificates ({str(error)[:200] or 'no answer'})"
            ) from None


def _words(offer: Offer) -> str:
    does = ["scores"] if offer.scores else []
    does += [f"measures on {offer.device.name} ({offer.device.kind})"] if offer.device is not None else []
    return " and ".join(does) or "does nothing: install havoc-core[lab] to score, or start it with --measures"


def _say(text: str) -> None:
    print(f"havoc worker: {text}", file=sys.stderr, flush=True)
