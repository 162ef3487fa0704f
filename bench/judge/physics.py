"""The shortest time a device can take for the recorded work: its roofline, with headroom for everything faster.

    seconds >= max(operations / peak, bytes / bandwidth)

The work is counted from the model's own shape (`model/cost.py`). Only work that no kernel can skip counts: the products
of every layer with every token, attention over the keys that a causal query may see, the head on the last token; each
weight is read once, in the format it is stored in. Every doubt is decided in favour of the device:

    CLOCK_HEADROOM   cards boost above the clock of their paper peaks: a GTX 1660 to 2.1 GHz, on paper 1.785
    INTEGER_SPEEDUP  integer weights may be multiplied as integers: DP4A does four products where fp32 does one, a
                     4-bit tensor core four where its fp16 does one
    on_chip_bytes    weights that stay in caches and registers are not read again

So a time below the floor does not come from a good kernel: it is another card, other work or a wrong clock. CPUs have
no peaks on paper here; their cores count as faster than any core, with all weights in their first-level caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...export.runtime.devices import DEVICE_KINDS
from ...model import cost
from ...model.hf_config import from_hf
from ...model.structure import Structure

if TYPE_CHECKING:
    from ...model.config import HavocConfig
    from .case import Case
    from .schema import Subject

CLOCK_HEADROOM = 1.25
INTEGER_SPEEDUP = 4.0
# Two AMX tile products of 2048 8-bit operations each per cycle, at 6.5 GHz.
CORE_OPS_PER_S = 2 * 2048 * 6.5e9
# Three loads of 64 bytes per cycle, more than the first-level cache of any core, at 6.5 GHz.
CORE_BYTES_PER_S = 3 * 64 * 6.5e9
LEAST_LOAD_S = 1e-5  # reading a graph takes system calls, even if it is small
BYTES_PER_PARAMETER = 8  # fp32 and everything that may be stored with it
# Of a record older than the shape in it: the least share of a decoder's parameters that every token passes through; the
# rest may be an embedding table of which one row is read (Gemma 3 270M has the largest known: 63 %).
SURE_SHARE = 1 / 3


def prefill_floor_s(case: Case) -> float:
    """The least seconds for a prefill of the workload with all its passes; 0.0 if nothing is known."""
    subject, num_tokens = case.record.subject, case.record.workload.prompt_tokens
    num_passes = case.record.workload.passes
    model = _model_of(subject)
    if model is None:
        operations = 2 * SURE_SHARE * _num_parameters(subject) * num_tokens
        return num_passes * _seconds(operations, _peak_flop_per_s(case, None))
    config, structure = model
    operations = cost.prefill_flops(config, num_tokens, structure)
    return num_passes * max(
        _seconds(operations, CLOCK_HEADROOM * _peak_flop_per_s(case, structure)),
        _read_s(cost.decode_read_bytes(config, 0, structure), case),
    )


def step_floor_s(case: Case) -> float:
    """The least seconds for a decode step of the workload; 0.0 if nothing is known."""
    subject, num_past = case.record.subject, case.record.workload.context_tokens
    model = _model_of(subject)
    if model is None:
        roofline = case.target.roofline
        return _seconds(
            SURE_SHARE * subject.weight_bytes,
            roofline.bandwidth_bytes_per_s if roofline else _cores_bytes_per_s(case),
        )
    config, structure = model
    return max(
        _seconds(cost.decode_flops(config, num_past, structure), CLOCK_HEADROOM * _peak_flop_per_s(case, structure)),
        _read_s(cost.decode_read_bytes(config, num_past, structure), case),
    )


def _model_of(subject: Subject) -> tuple[HavocConfig, Structure] | None:
    """Shape and formats from the record; a `HavocError` if this HAVOC has no such model."""
    if subject.config is None or subject.structure is None:
        return None
    return from_hf(dict(subject.config)), Structure.from_fields(subject.structure)


def _num_parameters(subject: Subject) -> float:
    """The stated number of parameters, but at least the number that the bytes of weights must hold."""
    return max(subject.num_parameters or 0, subject.weight_bytes / BYTES_PER_PARAMETER)


def _read_s(num_bytes: float, case: Case) -> float:
    roofline = case.target.roofline
    if roofline is None:
        return _seconds(num_bytes, _cores_bytes_per_s(case))
    return _seconds(max(num_bytes - roofline.on_chip_bytes, 0.0), CLOCK_HEADROOM * roofline.bandwidth_bytes_per_s)


def _cores_bytes_per_s(case: Case) -> float:
    device = case.record.device
    return device.cpu.num_logical_cores * CORE_BYTES_PER_S if DEVICE_KINDS[device.kind].is_host else 0.0


def _peak_flop_per_s(case: Case, structure: Structure | None) -> float:
    """Operations per second of the fastest data type that the work may use; 0.0 if nothing is known."""
    roofline, device = case.target.roofline, case.record.device
    if roofline is None:
        return device.cpu.num_logical_cores * CORE_OPS_PER_S if DEVICE_KINDS[device.kind].is_host else 0.0
    if structure is not None and structure.is_quantized:
        return INTEGER_SPEEDUP * roofline.peak_flop_per_s
    return roofline.peak_flop_per_s


def _seconds(amount: float, per_s: float) -> float:
    return amount / per_s if per_s else 0.0
