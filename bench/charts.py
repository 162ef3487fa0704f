"""Pictures of one measurement as inline SVG: latency, memory, decode, and the search's front.

Colours are written as CSS variables of the page, so one picture serves light and dark; text stays text. The same record
gives the same bytes. Sizes are for one column of a phone, and for two columns on a desk.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .bounds import quantile_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

    from .record import Record
    from .schema import TelemetryPoint

INK, MUTED, GRID, ACCENT, GOOD, BAD, WARN, SURFACE = (f"#0{digit}0{digit}0{digit}" for digit in range(1, 9))
SERIES = ("#111101", "#111102", "#111103", "#111104", "#111105", "#111106")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    GOOD: "--good",
    BAD: "--bad",
    WARN: "--warn",
    SURFACE: "--surface",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}
_WIDTH_IN, _HEIGHT_IN = 5.2, 2.9
_MOST_POINTS = 1500
_MOST_BARS = 60
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def latency_histogram(record: Record, limit_ms: float | None) -> str | None:
    """Distribution of every prefill, its median and 90th percentile, and the limit where it lies near."""
    samples = sorted(ms for process in record.samples for ms in process.prefill_ms)
    if not samples:
        return None
    with _drawing("histogram") as (figure, axes):
        axes.hist(samples, bins=min(_MOST_BARS, max(8, int(len(samples) ** 0.5) * 2)), color=ACCENT, alpha=0.85)
        axes.grid(visible=False, axis="x")
        for quantile, style in ((0.5, "-"), (0.9, "--")):
            value = quantile_of(samples, quantile)
            axes.axvline(
                value, color=INK, linewidth=1.1, linestyle=style, label=f"p{quantile * 100:.0f} = {value:.3g} ms"
            )
        if limit_ms is not None and samples[0] <= limit_ms <= samples[-1] * 1.3:
            axes.axvline(limit_ms, color=BAD, linewidth=1.4, label=f"limit {limit_ms:g} ms")
        axes.set_xlabel("prefill, ms")
        axes.set_ylabel("calls")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.legend(loc="upper right")
    return figure.svg


def latency_series(record: Record) -> str | None:
    """Every prefill in the order it was measured, process after process, with clock and temperature beneath."""
    if not any(process.prefill.duration_ns for process in record.samples):
        return None
    tracks = _telemetry_tracks(record)
    height = _HEIGHT_IN + 0.9 * len(tracks)
    with _drawing("series", rows=1 + len(tracks), height=height) as (figure, every_axes):
        top, *below = every_axes if isinstance(every_axes, list) else [every_axes]
        offset_s = 0.0
        for index, process in enumerate(record.samples):
            starts, durations = _thinned(process.prefill.start_ns, process.prefill.duration_ns)
            if not starts:
                continue
            first_ns = process.prefill.start_ns[0]
            times_s = [offset_s + (start - first_ns) / 1e9 for start in starts]
            colour = SERIES[index % len(SERIES)]
            top.plot(times_s, [ns / 1e6 for ns in durations], ".", color=colour, markersize=3, alpha=0.8)
            top.annotate(
                f"{process.process}", (times_s[0], 1.0), xycoords=("data", "axes fraction"), color=colour, fontsize=8.5
            )
            for axes, (_, read) in zip(below, tracks, strict=True):
                points = [
                    (point.t_ns, value)
                    for point in record.telemetry
                    if point.process == process.process and (value := read(point)) is not None
                ]
                axes.plot(
                    [offset_s + (t - first_ns) / 1e9 for t, _ in points],
                    [value for _, value in points],
                    color=colour,
                    linewidth=1,
                )
            offset_s = times_s[-1] + 0.02 * max(1.0, times_s[-1])
        top.set_ylabel("prefill, ms")
        top.set_ylim(bottom=0)
        for axes, (label, _) in zip(below, tracks, strict=True):
            axes.set_ylabel(label)
        (below[-1] if below else top).set_xlabel("seconds of measurement, one colour a process")
    return figure.svg


def _clock_mhz(point: TelemetryPoint) -> float | None:
    return point.sm_clock_mhz if point.sm_clock_mhz is not None else point.cpu_clock_mhz


def _temperature_c(point: TelemetryPoint) -> float | None:
    return point.temperature_c


def _telemetry_tracks(record: Record) -> list[tuple[str, Callable[[TelemetryPoint], float | None]]]:
    candidates = (("core, MHz", _clock_mhz), ("°C", _temperature_c))
    return [(label, read) for label, read in candidates if any(read(point) is not None for point in record.telemetry)]


def decode_rates(record: Record, limit: float | None) -> str | None:
    """Tokens per second of each decode run, one column of dots for each process."""
    per_process = [(process.process, process.decode_tok_per_s) for process in record.samples]
    if not any(rates for _, rates in per_process):
        return None
    with _drawing("decode") as (figure, axes):
        for index, (process, rates) in enumerate(per_process):
            colour = SERIES[index % len(SERIES)]
            axes.plot([process] * len(rates), rates, "o", color=colour, markersize=4.5, alpha=0.55)
            if rates:
                axes.plot(process, sum(rates) / len(rates), "_", color=INK, markersize=16, markeredgewidth=1.6)
        axes.set_ylim(0, 1.15 * max(rate for _, rates in per_process for rate in rates))
        if limit is not None and limit < axes.get_ylim()[1]:
            axes.axhline(limit, color=BAD, linewidth=1.4)
            axes.text(
                0.995,
                limit,
                f"limit {limit:g}",
                color=BAD,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="bottom",
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.6, max(process for process, _ in per_process) + 0.6)
        axes.set_xlabel("process")
        axes.set_ylabel("decode, tok/s")
    return figure.svg


def memory_timeline(record: Record, limit_bytes: float | None) -> str | None:
    """Memory over time, device memory where there is any, with the beginning of load, first run and steady state."""
    series = [item for item in (record.memory.vram or record.memory.rss) if item.time_ns]
    if not series:
        return None
    worst = max(series, key=lambda item: item.peak_bytes)
    with _drawing("memory") as (figure, axes):
        times, sizes = _thinned(worst.time_ns, worst.reading_bytes)
        axes.fill_between(
            [t / 1e9 for t in times], [size / 1e6 for size in sizes], color=ACCENT, alpha=0.22, linewidth=0
        )
        axes.plot([t / 1e9 for t in times], [size / 1e6 for size in sizes], color=ACCENT, linewidth=1.4)
        axes.axhline(worst.peak_bytes / 1e6, color=INK, linewidth=0.9, linestyle="--")
        axes.set_ylim(0, 1.3 * worst.peak_bytes / 1e6)
        axes.text(
            0.995,
            worst.peak_bytes / 1e6,
            f"peak {worst.peak_bytes / 1e6:,.0f} MB",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=8.5,
        )
        for phase, start_ns in worst.phase_start_ns.items():
            axes.axvline(start_ns / 1e9, color=MUTED, linewidth=0.7, linestyle=":")
            axes.annotate(
                phase.replace("_", " "),
                (start_ns / 1e9, 0.02),
                xycoords=("data", "axes fraction"),
                color=MUTED,
                fontsize=8,
                rotation=90,
                ha="right",
                va="bottom",
            )
        if limit_bytes is not None and limit_bytes <= 1.3 * worst.peak_bytes:
            axes.axhline(limit_bytes / 1e6, color=BAD, linewidth=1.4)
        axes.set_xlabel(f"seconds in process {worst.process}, by {worst.method}")
        axes.set_ylabel("VRAM, MB" if record.memory.vram else "RSS, MB")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure.svg


def history(name: str, unit: str, runs: Sequence[Mapping[str, Any]]) -> str | None:
    """One metric over all runs in their order, one colour a device; None where fewer than two runs have it."""
    scale, label = {"bytes": (1e6, "MB"), "share": (0.01, "%")}.get(unit, (1.0, unit))
    points = [
        (place, run["metrics"][name] / scale, run["fingerprint"])
        for place, run in enumerate(runs)
        if run["metrics"].get(name) is not None
    ]
    if len(points) < 2:  # noqa: PLR2004 - one run has no history
        return None
    devices = list(dict.fromkeys(fingerprint for _, _, fingerprint in points))
    with _drawing(f"history-{name.replace('/', '-')}", height=2.2) as (figure, axes):
        for index, device in enumerate(devices):
            own = [(place, value) for place, value, fingerprint in points if fingerprint == device]
            colour = SERIES[index % len(SERIES)]
            axes.plot(*zip(*own, strict=True), "o-", color=colour, markersize=4.5, linewidth=1.2)
        axes.set_ylim(bottom=0, top=1.15 * max(value for _, value, _ in points))
        axes.set_xlim(-0.4, len(runs) - 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("run, oldest first")
        axes.set_ylabel(label)
    return figure.svg


def pareto_front(front: Mapping[str, Any], confirmed_mean: float | None) -> str | None:
    """Every candidate by cost and mean accuracy; arrows lead from the screened accuracy to the one scored again."""
    candidates = front.get("candidates") or []
    if not candidates:
        return None
    objective = _widest_objective(candidates, front.get("frozen") or [])
    on_front, chosen = set(front.get("front") or []), front.get("chosen")
    formats = sorted({candidate["structure"]["weight_format"] for candidate in candidates})
    label, scale = _OBJECTIVE_LABELS.get(objective, (objective, 1.0))
    candidates = [{**item, "x": item["cost"][objective] / scale} for item in candidates]
    with _drawing("pareto") as (figure, axes):
        for index, weight_format in enumerate(formats):
            group = [item for item in candidates if item["structure"]["weight_format"] == weight_format]
            _scatter_candidates(axes, group, on_front, SERIES[index % len(SERIES)])
            axes.plot([], [], "o", color=SERIES[index % len(SERIES)], markersize=5, label=weight_format)
        for item in candidates:
            if item.get("rescored_accuracy"):
                start, end = _mean(item["search_accuracy"]), _mean(item["rescored_accuracy"])
                _arrow(axes, item["x"], start, end, MUTED)
        best = next((item for item in candidates if item["key"] == chosen), None)
        if best is not None:
            cost, seen = best["x"], _mean(best.get("rescored_accuracy") or best["search_accuracy"])
            axes.plot(cost, seen, "*", color=GOOD, markersize=13, label="chosen", zorder=5)
            if confirmed_mean is not None:
                _arrow(axes, cost, seen, confirmed_mean, GOOD)
                axes.plot(cost, confirmed_mean, "D", color=GOOD, markersize=5.5, label="gate split", zorder=6)
        axes.set_xlabel(label)
        axes.set_ylabel("mean accuracy, %")
        axes.margins(x=0.12, y=0.12)
        axes.legend(loc="best", ncols=2, columnspacing=1.0, handletextpad=0.3)
    return figure.svg


_OBJECTIVE_LABELS = {
    "prefill_ms": ("prefill, ms", 1.0),
    "peak_bytes": ("peak memory, MB", 1e6),
    "decode_tok_per_s": ("decode, tok/s", 1.0),
}


def _scatter_candidates(axes: Axes, group: Sequence[Mapping[str, Any]], on_front: set[str], colour: str) -> None:
    for item in group:
        is_best = item["key"] in on_front
        axes.plot(
            item["x"],
            _mean(item["search_accuracy"]),
            "o",
            color=colour,
            alpha=0.9 if is_best else 0.35,
            markersize=6 if is_best else 4,
            markeredgecolor=INK if is_best else colour,
            markeredgewidth=0.8 if is_best else 0,
        )


def _widest_objective(candidates: Sequence[Mapping[str, Any]], frozen: Sequence[str]) -> str:
    names: list[str] = [name for name in candidates[0]["cost"] if name not in frozen] or list(candidates[0]["cost"])

    def spread(name: str) -> float:
        values = [float(item["cost"][name]) for item in candidates]
        return (max(values) - min(values)) / max(values)

    return max(names, key=spread)


def _arrow(axes: Axes, x: float, start: float, end: float, colour: str) -> None:
    axes.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.1})


def _mean(by_domain: Mapping[str, float]) -> float:
    return 100 * sum(by_domain.values()) / len(by_domain)


def _thinned(times: Sequence[int], values: Sequence[int]) -> tuple[list[int], list[int]]:
    """Keep at most `_MOST_POINTS` points: the highest of each run of neighbours, so no peak is lost."""
    step = -(-len(times) // _MOST_POINTS) or 1
    picks = [
        max(range(start, min(start + step, len(times))), key=values.__getitem__) for start in range(0, len(times), step)
    ]
    return [times[pick] for pick in picks], [values[pick] for pick in picks]


class _Drawing:
    """What a `_drawing` block leaves behind."""

    svg = ""


@contextlib.contextmanager
def _drawing(name: str, *, rows: int = 1, height: float = _HEIGHT_IN) -> Iterator[tuple[_Drawing, Any]]:
    """Give axes to draw on (a list when `rows` > 1); afterwards the drawing's `svg` is set."""
    drawing = _Drawing()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
        ratios = [3.0, *[1.0] * (rows - 1)]
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
        yield drawing, axes[0] if rows == 1 else list(axes)
        drawing.svg = _inline(figure, name)


def _inline(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element whose ids are its own and whose colours are the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', text)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [\d.]+px )[^;\"]+", r"\1var(--font)", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', lambda m: m[1] or m[2], text, count=1
    )
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
