"""What a model can reach on a target, from arithmetic and the device's peaks, without running it.

A floor is certain: no kernel computes faster than the device's peak or reads faster than its memory, so a limit under
the floor is proven impossible. An estimate is not certain: it is what good kernels usually reach. Nothing here can pass
a gate. For a target without paper peaks (`host`) the peaks are measured quickly, and only memory can prove that a limit
is impossible.

Roofline: Williams, Waterman, Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import bounds
from ..errors import HavocError
from ..export.runtime.devices import DEVICE_KINDS
from ..model import cost
from ..model.config import PRESETS, HavocConfig
from ..model.config_file import is_gguf, read_config
from ..model.structure import ACTIVATION_DTYPES, WEIGHT_FORMATS, Structure
from .device import identify_cpu
from .judge.figures import show
from .judge.targets import BUNDLED, read_targets
from .roofline_probe import probe_roofline

if TYPE_CHECKING:
    from collections.abc import Callable

    from .judge.targets import Limit, Roofline, Target

Outlook = Literal["impossible", "unlikely", "possible"]
ROW_COUNTS = (100, 200, 500, 1000, 2000)
RANK_FRACTIONS = (0.75, 0.5, 0.4, 0.3, 0.2, 0.1)
TRUE_SHARES = (0.88, 0.90, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFigure:
    """One metric of one structure: the certain bound, the likely value, and the result for the limit."""

    metric: str
    unit: str
    sign: str
    limit: float
    floor: float
    estimate: float
    outlook: Outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One structure of the model on the target."""

    structure: str
    weight_bytes: int
    kv_bytes_per_token: int
    figures: tuple[PlannedFigure, ...]
    outlook: Outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan before a run. `is_impossible` is true if every format is proven to miss a limit at full rank.

    If no structure may pass at full rank, `truncated` has those that may pass with the largest possible rank.
    """

    model: str
    target: str
    target_title: str
    num_parameters: int
    prefill_flops: int
    decode_flops: int
    peaks: str
    options: tuple[Option, ...]
    truncated: tuple[Option, ...]
    is_impossible: bool
    conclusion: str
    samples: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def load_config(model: str) -> HavocConfig:
    """Return the shape of a preset, a model directory or a GGUF file; other names are a `HavocError`."""
    if model and (Path(model).is_dir() or is_gguf(model)):
        return read_config(model)
    if model.lower().replace("_", "-").removeprefix("havoc-") not in PRESETS:
        raise HavocError(f"{model}: not a directory, not a .gguf file and not a preset (presets: {', '.join(PRESETS)})")
    return HavocConfig.preset(model)


def build_plan(model: str, target: Target) -> Plan:
    """Compute every structure of a model on a target."""
    config = load_config(model)
    on_paper = paper_roofline(target)
    roofline, origin = (on_paper, "on paper") if on_paper is not None else probe_roofline()
    is_on_paper = on_paper is not None

    def work_out(rank_fraction: float) -> tuple[Option, ...]:
        return tuple(
            _option(config, structure, target, roofline, is_certain=is_on_paper)
            for structure in structures(rank_fraction)
        )

    options = work_out(1.0)
    can_pass = any(option.outlook == "possible" for option in options)
    workload = target.workload
    return Plan(
        model=model,
        target=target.name,
        target_title=target.title,
        num_parameters=cost.num_parameters(config),
        prefill_flops=cost.prefill_flops(config, workload.prompt_tokens),
        decode_flops=cost.decode_flops(config, workload.context_tokens),
        peaks=_peaks_text(roofline, origin) if roofline is not None else origin,
        options=options,
        truncated=() if can_pass else _most_rank_kept(work_out),
        is_impossible=all(option.outlook == "impossible" for option in options),
        conclusion=conclude(options) + ("" if roofline is not None else " (by memory alone)"),
        samples=samples_needed(target),
    )


def paper_roofline(target: Target) -> Roofline | None:
    """Return a target's own peaks, or those of the bundled target that names its device; None: measure them here.

    Only the peaks of this machine can be measured; for another device without peaks, a `HavocError` asks for them.
    """
    if target.roofline is not None:
        return target.roofline
    device = target.device
    for other in read_targets(BUNDLED).values():
        is_same = other.device.kind == device.kind and set(device.names) & set(other.device.names)
        if is_same and other.roofline is not None:
            return other.roofline
    if device.is_this_machine or (DEVICE_KINDS[device.kind].is_host and identify_cpu().name in device.names):
        return None
    raise HavocError(
        f"target {target.name}: the peaks of {device.names[0]!r} are unknown; give them in a table "
        f"[{target.name}.roofline]: fp32_flop_per_s, fp16_flop_per_s, bandwidth_bytes_per_s"
    )


def structures(rank_fraction: float = 1.0) -> list[Structure]:
    """Every pair of weight format and activation dtype, except fp32 weights with fp16 activations: no gain."""
    pairs = ((weights, activations) for weights in WEIGHT_FORMATS for activations in ACTIVATION_DTYPES)
    return [
        Structure(weights, activations, rank_fraction=rank_fraction)
        for weights, activations in pairs
        if (weights, activations) != ("fp32", "fp16")
    ]


def _most_rank_kept(work_out: Callable[[float], tuple[Option, ...]]) -> tuple[Option, ...]:
    """Structures that may pass with the largest possible rank; empty if not even the smallest rank may pass."""
    for rank_fraction in RANK_FRACTIONS:
        if possible := tuple(option for option in work_out(rank_fraction) if option.outlook == "possible"):
            return possible
    return ()


def _option(
    config: HavocConfig, structure: Structure, target: Target, roofline: Roofline | None, *, is_certain: bool
) -> Option:
    figures = tuple(
        figure
        for limit in target.limits
        if (figure := _figure(limit, config, structure, target, roofline, is_certain=is_certain)) is not None
    )
    outlooks = {figure.outlook for figure in figures}
    return Option(
        structure=str(structure),
        weight_bytes=cost.weight_bytes(config, structure),
        kv_bytes_per_token=cost.kv_bytes_per_token(config, structure),
        figures=figures,
        outlook=next((outlook for outlook in _WORST_FIRST if outlook in outlooks), "possible"),
    )


_WORST_FIRST: tuple[Outlook, ...] = ("impossible", "unlikely", "possible")


def _figure(
    limit: Limit,
    config: HavocConfig,
    structure: Structure,
    target: Target,
    roofline: Roofline | None,
    *,
    is_certain: bool,
) -> PlannedFigure | None:
    """Floor and estimate of one limited metric; None if arithmetic cannot give them (accuracy, load, energy).

    If the peaks are unknown, it cannot give times either.
    """
    workload = target.workload
    if roofline is not None and limit.metric in {"prefill_ms", "ttft_ms"}:
        one_pass = prefill_ms(config, structure, roofline, num_tokens=workload.prompt_tokens)
        floor, estimate = (workload.passes * part for part in one_pass)
        unit = "ms"
    elif roofline is not None and limit.metric == "decode_tok_per_s":
        floor, estimate = decode_tok_per_s(config, structure, roofline, num_past=workload.context_tokens)
        unit = "tok/s"
    elif limit.metric in {"peak_vram_bytes", "peak_rss_bytes"}:
        floor, estimate = peak_memory_bytes(config, structure, target)
        unit, is_certain = "bytes", True
    else:
        return None
    outlook = _outlook(limit, floor if is_certain else None, estimate)
    return PlannedFigure(
        metric=limit.metric,
        unit=unit,
        sign=limit.sign,
        limit=limit.value,
        floor=floor,
        estimate=estimate,
        outlook=outlook,
    )


def _outlook(limit: Limit, floor: float | None, estimate: float) -> Outlook:
    if floor is not None and _misses(limit, floor):
        return "impossible"
    return "unlikely" if _misses(limit, estimate) else "possible"


def _misses(limit: Limit, value: float) -> bool:
    return value >= limit.value if limit.below is not None else value <= limit.value


def prefill_ms(
    config: HavocConfig, structure: Structure, roofline: Roofline, *, num_tokens: int
) -> tuple[float, float]:
    """Milliseconds to read a prompt: at the peak of the activation's type, and with good kernels."""
    flops = cost.prefill_flops(config, num_tokens, structure)
    read_s = cost.decode_read_bytes(config, 0, structure) / roofline.bandwidth_bytes_per_s
    peak = roofline.fp32_flop_per_s if structure.activation_dtype == "fp32" else roofline.fp16_flop_per_s
    practical = peak * roofline.practical_share
    if structure.activation_dtype == "fp16" and roofline.practical_fp16_matmul_flop_per_s:
        practical = roofline.practical_fp16_matmul_flop_per_s
    return 1e3 * max(flops / peak, read_s), 1e3 * max(flops / practical, read_s / roofline.practical_share)


def decode_tok_per_s(
    config: HavocConfig, structure: Structure, roofline: Roofline, *, num_past: int
) -> tuple[float, float]:
    """Tokens per second at batch 1: at full bandwidth or peak arithmetic, and with good kernels."""
    read_s = cost.decode_read_bytes(config, num_past, structure) / roofline.bandwidth_bytes_per_s
    ceiling = 1 / max(read_s, cost.decode_flops(config, num_past, structure) / roofline.peak_flop_per_s)
    return ceiling, ceiling * roofline.practical_share


def peak_memory_bytes(config: HavocConfig, structure: Structure, target: Target) -> tuple[float, float]:
    """Bytes for weights and cache; the estimate also has activations and the runtime's own memory."""
    workload = target.workload
    num_tokens = max(workload.prompt_tokens, workload.context_tokens)
    cache = (num_tokens + workload.decode_tokens) * cost.kv_bytes_per_token(config, structure)
    runtime = DEVICE_KINDS[target.device.kind].runtime_bytes
    likely = cost.peak_bytes(config, num_tokens, structure, num_new_tokens=workload.decode_tokens) + runtime
    return float(cost.weight_bytes(config, structure) + cache), float(likely)


def conclude(options: tuple[Option, ...]) -> str:
    """One sentence: the structures that can pass, or the limits that none meets with the best value."""
    possible = [option.structure for option in options if option.outlook == "possible"]
    if possible:
        return f"may pass: {', '.join(possible)}"
    is_open = any(option.outlook == "unlikely" for option in options)
    outlooks = {"unlikely", "impossible"} if is_open else {"impossible"}
    hopeless = sorted(
        set.intersection(*({f.metric for f in option.figures if f.outlook in outlooks} for option in options))
    )
    reasons = "; ".join(_at_best(metric, options, is_certain=not is_open) for metric in hopeless)
    words = (
        "no format is likely to pass, but none is proven impossible" if is_open else "proven impossible in every format"
    )
    return f"{words}{': ' + reasons if reasons else ''}"


def _at_best(metric: str, options: tuple[Option, ...], *, is_certain: bool) -> str:
    """Say what the best format reaches: its certain bound, or its likely value."""
    figures = {option.structure: figure for option in options for figure in option.figures if figure.metric == metric}

    def reached(name: str) -> float:
        return figures[name].floor if is_certain else figures[name].estimate

    is_lower_better = next(iter(figures.values())).sign == "<"
    name = min(figures, key=reached) if is_lower_better else max(figures, key=reached)
    best = figures[name]
    words = "at best" if is_certain else "likely"
    return (
        f"{metric} {words} {show(reached(name), best.unit)} ({name}; must be {best.sign} {show(best.limit, best.unit)})"
    )


def samples_needed(target: Target) -> dict[str, Any]:
    """Samples for a verdict: timings if none is over the limit, right answers by number of rows, and probabilities."""
    latency = {
        limit.metric: bounds.num_samples_needed(1.0, quantile=limit.percentile, confidence=limit.confidence)
        for limit in target.limits
        if limit.metric in {"prefill_ms", "ttft_ms"}
    }
    shares = sorted(
        {(limit.value, limit.confidence) for limit in target.limits if limit.metric.startswith("accuracy/")}
    )
    accuracy = [
        {"share": share, "num_rows": num_rows, **_accuracy_need(num_rows, share, confidence)}
        for share, confidence in shares
        for num_rows in ROW_COUNTS
    ]
    return {
        "min_processes": target.protocol.min_processes,
        "min_samples": target.protocol.min_samples,
        "min_busy_s": target.protocol.min_busy_s,
        "latency_none_over": latency,
        "accuracy": accuracy,
    }


def _accuracy_need(num_rows: int, share: float, confidence: float) -> dict[str, Any]:
    needed = bounds.num_right_needed(num_rows, share=share, confidence=confidence)
    if needed is None:
        return {"num_right": None, "chance": {}}
    chance = {
        f"{true:.2f}": 1.0 - bounds.binomial_cdf(needed - 1, num_trials=num_rows, probability=true)
        for true in TRUE_SHARES
        if true > share
    }
    return {"num_right": needed, "chance": chance}


def _peaks_text(roofline: Roofline, origin: str) -> str:
    slow = roofline.practical_fp16_matmul_flop_per_s
    practice = f"; fp16 products reach about {slow / 1e12:.3g} TFLOP/s in practice" if slow else ""
    return (
        f"{roofline.fp32_flop_per_s / 1e12:.3g} TFLOP/s fp32, {roofline.fp16_flop_per_s / 1e12:.3g} fp16, "
        f"{roofline.bandwidth_bytes_per_s / 1e9:.3g} GB/s ({origin}{practice})"
    )
