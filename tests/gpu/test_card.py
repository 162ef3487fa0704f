"""On a real NVIDIA card: who it is, what its memory figures mean, and that the graphs compute there what they say.

Run by `make gpu` where a card is; `make test` leaves these out. Torch, where it was built for CUDA, is a third witness.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from havoc_core.bench.doctor import examine, provider_problem
from havoc_core.bench.gpu_processes import sort_out
from havoc_core.bench.nvml import Nvml, open_nvml
from havoc_core.export.datafile import StoredWeights
from havoc_core.export.layout import DATA_FILE, plan_layout
from havoc_core.export.parity import compare, read_reference
from havoc_core.export.reference import FP32, StreamedModel, fp16_activations
from havoc_core.export.runtime.completion import generate_ids
from havoc_core.export.runtime.devices import CPU_PROVIDER as CPU
from havoc_core.export.runtime.devices import CUDA_PROVIDER as CUDA
from havoc_core.export.runtime.probe import text_probe
from havoc_core.export.runtime.sample import read_sample
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import open_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from havoc_core.bench.judge.schema import Device

pytestmark = pytest.mark.gpu
ALLOCATED_BYTES = 512 << 20
_HOLD = f"""
import sys
import onnxruntime as ort
ort.preload_dlls(cudnn=False, msvc=False)
small = ort.OrtValue.ortvalue_from_shape_and_type([1], "float32", "cuda", 0)
print("small", flush=True)
sys.stdin.readline()
large = ort.OrtValue.ortvalue_from_shape_and_type([{ALLOCATED_BYTES} // 4], "float32", "cuda", 0)
print("large", flush=True)
sys.stdin.readline()
"""


def test_two_witnesses_agree_on_a_real_card(device: Device) -> None:
    gpu = device.gpu
    assert gpu is not None
    assert gpu.nvml is not None
    assert gpu.cuda is not None
    assert gpu.disagreements == ()
    assert not device.is_simulated, device.simulation_reasons
    assert gpu.nvml.num_sms == gpu.cuda.num_sms


def test_torch_sees_the_same_card(device: Device) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA")
    seen = torch.cuda.get_device_properties(0)
    assert device.gpu is not None
    assert device.gpu.cuda is not None
    assert device.name == seen.name
    assert device.gpu.cuda.num_sms == seen.multi_processor_count
    assert device.gpu.cuda.compute_capability == f"{seen.major}.{seen.minor}"
    assert device.gpu.cuda.memory_total_bytes == seen.total_memory


def test_doctor_runs_a_graph_on_the_card() -> None:
    assert provider_problem(CUDA) is None
    answers = {finding.question: finding for finding in examine()}
    assert answers["runs on NVIDIA GPUs"].answer == "yes"


def test_a_known_allocation_is_seen_by_process_and_by_card() -> None:
    with open_nvml() as nvml:
        assert isinstance(nvml, Nvml), nvml
        card = nvml.card()
        assert card is not None
        idle = [process.pid for process in card.processes() or ()]
        with subprocess.Popen([sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            held = []
            for word in (b"small\n", b"large\n"):
                assert child.stdout.readline() == word
                time.sleep(0.2)
                own = sort_out(card.processes() or (), own_pid=child.pid, idle_pids=idle).own
                held.append((None if own is None else own.used_bytes, card.memory_used_bytes() or 0))
                child.stdin.write(b"\n")
                child.stdin.flush()
    (own_before, card_before), (own_after, card_after) = held
    assert card_after - card_before == pytest.approx(ALLOCATED_BYTES, rel=0.01)
    if own_before is not None and own_after is not None:
        assert own_after - own_before == pytest.approx(ALLOCATED_BYTES, rel=0.01)


def test_graphs_compute_on_the_card_what_their_weights_say(shipped) -> None:
    source = open_source("nano")
    config, structure = source.config, shipped.structure
    measure = fp16_activations() if structure.activation_dtype == "fp16" else FP32
    model = StreamedModel(config, StoredWeights(shipped.folder / DATA_FILE, plan_layout(config, structure)))
    sample = read_sample(config, source.tokenizer)
    reference = read_reference(model, text_probe(config, sample, num_tokens=64), [measure])
    cases = compare(reference, DecoderSession.open(shipped.folder, provider=CUDA), measure)
    for case in cases:
        print(f"{shipped.folder.name}, {case.name}: {case.ratio:.2f} times torch's error, top-1 {case.top1_share:.4f}")
    assert len(cases) >= 5


def test_every_node_that_computes_runs_on_the_card(shipped) -> None:
    placed = DecoderSession.open(shipped.folder, provider=CUDA).placement()
    assert set(placed.by_provider) == {CUDA}
    assert (placed.shapes == []) == (shipped.options.dialect == "standard")


def test_the_card_writes_the_text_that_the_cpu_writes(export: Callable[..., object], tmp_path: Path) -> None:
    shipped = export("fp32", "fp32", tmp_path)
    rng = np.random.default_rng(0)
    rows = [rng.integers(10, 500, size).tolist() for size in (3, 17, 40, 64)]
    on_cpu, on_card = (
        generate_ids(DecoderSession.open(shipped.folder, provider=provider), rows, max_new_tokens=64)
        for provider in (CPU, CUDA)
    )
    assert on_card == on_cpu


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
def test_captured_steps_give_the_logits_of_free_ones(
    export: Callable[..., object], tmp_path: Path, activations: str
) -> None:
    shipped = export("fp16", activations, tmp_path, cache="static")
    ids = np.random.default_rng(1).integers(10, 500, (1, 48))
    logits = {}
    for capture in ("0", "1"):
        options = {"enable_cuda_graph": capture}
        session = DecoderSession.open(shipped.folder, provider=CUDA, provider_options=options)
        _, past = session.prefill(ids[:, :24])
        steps = []
        for column in range(24, 48):
            step, past = session.decode(ids[:, column : column + 1], None, past)
            steps.append(step)
        logits[capture] = np.concatenate(steps)
    np.testing.assert_allclose(logits["1"], logits["0"], rtol=0, atol=1e-2 * logits["0"].std())
