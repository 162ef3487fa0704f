"""Who is taken as a worker, and what is said where nobody is: at once, in one line, with the right exit code."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from havoc_core.cluster.address import Address, TlsFiles
from havoc_core.cluster.fleet import Fleet
from havoc_core.cluster.measurer import bind_fleet, device_model
from havoc_core.config import Recipe
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.storage import Journal

pytest.importorskip("distributed")
pytestmark = pytest.mark.alone

RECIPE = Recipe.model_validate({"experts": {"tasks": ["math"]}, "gate": {"targets": ["gtx1660"]}})
ANYWHERE = RECIPE.model_copy(update={"search": RECIPE.search.model_copy(update={"on_this_machine": True})})


def connected(cluster: Any) -> Fleet:
    return Fleet.connect(Address.parse(cluster.address), TlsFiles())


def test_no_scheduler_at_the_address() -> None:
    """Five seconds, one line, exit 2: for a search."""
    started_s = time.monotonic()
    with pytest.raises(HavocError, match=r"no Dask scheduler .* tcp://127\.0\.0\.1:9 within 5 s") as caught:
        Fleet.connect(Address.parse("tcp://127.0.0.1:9"), TlsFiles())
    assert time.monotonic() - started_s < 30
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_worker_that_finds_no_scheduler_ends() -> None:
    """One line, exit 2, no traceback."""
    command = [sys.executable, "-m", "havoc_core", "worker", "tcp://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "this worker at tcp://127.0.0.1:9 within 5 s" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_workers_one_of_another_version_and_a_stranger(cluster: Any) -> None:
    """Each is refused before any work, and the line names it with both versions."""
    with pytest.raises(HavocError, match="no workers: .*`havoc worker"):
        connected(cluster)
    old = cluster.worker(version="0.0.1")
    cluster.wait_for(1)
    with pytest.raises(HavocError, match=rf"worker \S+-{old.pid} at tcp://\S+ .*0\.0\.1"):
        connected(cluster)
    old.kill()
    old.wait()
    command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.address, "--no-nanny", "--name", "stranger"]
    with subprocess.Popen([*command, "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        try:
            with pytest.raises(HavocError, match="worker stranger at tcp://\\S+ .*`havoc worker`"):
                wait_for_workers(cluster)
        finally:
            worker.kill()


def wait_for_workers(cluster: Any) -> None:
    """Connect until the scheduler has a worker, and let what is said of it through."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            connected(cluster).close()
        except HavocError as error:
            if "has no workers" not in str(error):
                raise
        time.sleep(0.2)


def test_a_tag_that_no_worker_has_is_an_error(cluster: Any, tmp_path: Path) -> None:
    """Neither a worker that only scores nor a simulated card measures for a GTX 1660; nothing is waited for."""
    cluster.worker()
    cluster.wait_for(1)
    with (
        connected(cluster) as fleet,
        pytest.raises(HavocError, match="no worker measures") as caught,
    ):
        bind_fleet(fleet, RECIPE)
    assert caught.value.exit_code == 2
    cluster.worker(card=0)
    cluster.worker(card=1)
    cluster.wait_for(3)
    with connected(cluster) as fleet:
        with pytest.raises(HavocError, match="NVIDIA GeForce GTX 1660: the device is simulated"):
            bind_fleet(fleet, RECIPE)
        bound = bind_fleet(fleet, ANYWHERE)
        devices = [worker.offer.device for worker in fleet.workers.values() if worker.offer.device]
        second = next(worker for worker in fleet.workers.values() if worker.offer.device == devices[1])
        weaker = devices[1].model_copy(update={"gpu": devices[1].gpu.model_copy(update={"power_limit_w": 90.0})})
        second.offer = dataclasses.replace(second.offer, device=weaker)
        for chosen in (devices[0], weaker):  # of two models it is the one that the search has begun on
            model = device_model(chosen)
            journal = Journal(tmp_path / f"{model.fingerprint}.jsonl")
            journal.append({"plain": {"measured": {"device": model.model_dump(mode="json")}}})
            assert bind_fleet(fleet, ANYWHERE, journal.path).device == model
    assert bound.evidence == "measured_other_device"
    assert bound.provider == "CUDAExecutionProvider"
    assert len({device.fingerprint for device in devices}) == 2
    assert [device_model(device) for device in devices] == [bound.device] * 2
    assert device_model(weaker) != bound.device


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority of this test's own, and a certificate signed by it."""
    folder = tmp_path_factory.mktemp("tls")
    lines = [
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.pem -subj /CN=ca",
        "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out own.csr -subj /CN=cluster",
        "x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem",
    ]
    for line in lines:
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def tls_cluster(certificates: Path, start_cluster: Any) -> Iterator[Any]:
    files = [f"--tls-ca-file={certificates / 'ca.pem'}", f"--tls-cert={certificates / 'cert.pem'}"]
    files += [f"--tls-key={certificates / 'key.pem'}"]
    with start_cluster("tls", "--protocol", "tls", *files) as found:
        yield found


def test_by_tls_with_certificates_alone(tls_cluster: Any, certificates: Path) -> None:
    """Worker and search are let in by certificates of the cluster's authority; a plain search is not."""
    words = [("--tls-ca", "ca.pem"), ("--tls-cert", "cert.pem"), ("--tls-key", "key.pem")]
    tls_cluster.worker(words=[word for option, name in words for word in (option, str(certificates / name))])
    tls_cluster.wait_for(1)
    authority, certificate, key = (certificates / name for _, name in words)
    with Fleet.connect(
        Address.parse(tls_cluster.address), TlsFiles(authority=authority, certificate=certificate, key=key)
    ) as fleet:
        (worker,) = fleet.workers.values()
        assert worker.address.startswith("tls://")
    with pytest.raises(HavocError, match="no Dask scheduler answers"):
        Fleet.connect(Address.parse(tls_cluster.address.replace("tls:", "tcp:")), TlsFiles())


def test_a_lost_scheduler_is_said(cluster: Any) -> None:
    """Who asks next is told that what was measured is kept; exit 4."""
    cluster.worker()
    cluster.wait_for(1)
    with connected(cluster) as fleet:
        cluster.scheduler.kill()
        with pytest.raises(MeasurementError, match="is lost.* results so far are kept"):
            for _ in range(100):
                fleet._look()
                time.sleep(0.1)
