"""Write a target for the card that is here, its rates measured by torch: `python tests/gpu/card_target.py FILE`.

The limits are those of gtx1660 that need no rows; the rates are what products and copies reach, doubled, since a
roofline must lie above what any kernel does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from havoc_core.bench.device import identify_device
from havoc_core.export.runtime.devices import CUDA_PROVIDER as CUDA

SIDE, NUM_BYTES, NUM_ROUNDS = 8192, 4 << 30, 10
_FORM = """[this-card]
title = "{name}, as it was found"

[this-card.device]
kind = "cuda"
names = ["{name}"]
pci_device_id = "{pci}"
compute_capability = "{capability}"
num_sms = {sms}
memory_total_bytes = [{least}, {most}]
bus_width_bits = {bus}

[this-card.roofline]
fp32_flop_per_s = {fp32:.3g}
fp16_flop_per_s = {fp16:.3g}
bandwidth_bytes_per_s = {bandwidth:.3g}

[this-card.protocol]
min_processes = 5
min_samples = 64

[[this-card.limits]]
metric = "prefill_ms"
below = 100
unit = "ms"

[[this-card.limits]]
metric = "peak_vram_bytes"
below = 2
unit = "GB"

[[this-card.limits]]
metric = "decode_tok_per_s"
above = 50
unit = "tok/s"
"""


def main(path: Path) -> None:
    """Measure, write the file, and print what was measured."""
    device = identify_device(CUDA)
    gpu = device.gpu
    assert gpu is not None
    assert gpu.nvml is not None
    rates = {
        "fp32": _product_flop_per_s(torch.float32),
        "fp16": _product_flop_per_s(torch.float16),
        "bandwidth": _copy_bytes_per_s(),
    }
    print({name: f"{rate:.4g}" for name, rate in rates.items()})
    total_bytes = gpu.nvml.memory_total_bytes or 0
    document = _FORM.format(
        name=device.name,
        pci=gpu.pci_device_id,
        capability=gpu.nvml.compute_capability,
        sms=gpu.nvml.num_sms,
        least=int(0.95 * total_bytes),
        most=int(1.05 * total_bytes),
        bus=gpu.bus_width_bits,
        **{name: 2 * rate for name, rate in rates.items()},
    )
    path.write_text(document)


def _product_flop_per_s(dtype: torch.dtype) -> float:
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * SIDE**3 / _best_s(lambda: a @ b)


def _copy_bytes_per_s() -> float:
    source = torch.empty(NUM_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * NUM_BYTES / _best_s(lambda: target.copy_(source))


def _best_s(work) -> float:
    """The shortest of some rounds, by the card's own events."""
    times = []
    for _ in range(NUM_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
