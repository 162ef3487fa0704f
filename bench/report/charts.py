"""Pictures of one measurement as inline SVG: latency, memory, decode, and the search's front.

Sizes are for one column on a phone, and for two columns on a larger screen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...bounds import quantile_of
from ..judge.figures import printable
from .drawing import ACCENT, BAD, GOOD, HEIGHT_IN, INK, MUTED, SERIES, SURFACE, drawing_board

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    from ..judge.record import Record
    from ..judge.schema import MemorySeries, TelemetryPoint
    from .search_files import Front, FrontCandidate

_MOST_POINTS = 1500
_MOST_BARS = 60


def latency_histogram(record: Record, limit_ms: float | None) -> str | None:
    """Distribution of every prefill, its median and 90th percentile, and the limit if it is near."""
    samples = sorted(ms for process in record.samples for ms in process.prefill_ms)
    if not samples:
        return None
    with drawing_board("histogram") as (figure, axes):
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
    """Every prefill in the order of measurement, process after process, with clock and temperature below."""
    if not any(process.prefill.duration_ns for process in record.samples):
        return None
    tracks = _telemetry_tracks(record)
    height = HEIGHT_IN + 0.9 * len(tracks)
    with drawing_board("series", rows=1 + len(tracks), height=height) as (figure, every_axes):
        top, *below = every_axes if isinstance(every_axes, list) else [every_axes]
        offset_s = 0.0
        for index, process in enumerate(record.samples):
            if not process.prefill.duration_ns:
                continue
            colour = SERIES[index % len(SERIES)]
            begin_ns, end_ns = process.prefill.start_ns[0], process.prefill.start_ns[-1]
            starts, durations = _thinned(process.prefill.start_ns, process.prefill.duration_ns)
            times_s = [offset_s + (start - begin_ns) / 1e9 for start in starts]
            top.plot(times_s, [ns / 1e6 for ns in durations], ".", color=colour, markersize=3, alpha=0.8)
            above = {"xycoords": ("data", "axes fraction"), "ha": "left", "va": "bottom", "fontsize": 8.5}
            top.annotate(f"{process.process}", (times_s[0], 1.01), color=colour, **above)
            for axes, (_, read) in zip(below, tracks, strict=True):
                points = _readings(record, process.process, read, begin_ns, end_ns)
                moments_s = [offset_s + (t_ns - begin_ns) / 1e9 for t_ns, _ in points]
                axes.plot(moments_s, [value for _, value in points], ".-", color=colour, linewidth=1, markersize=2)
            offset_s += 1.04 * (end_ns - begin_ns) / 1e9
        top.set_ylabel("prefill, ms")
        for axes, (label, _) in zip(below, tracks, strict=True):
            axes.set_ylabel(label)
        (below[-1] if below else top).set_xlabel("seconds of measurement, one colour per process")
    return figure.svg


def _readings(
    record: Record, process: int, read: Callable[[TelemetryPoint], float | None], begin_ns: int, end_ns: int
) -> list[tuple[int, float]]:
    """Readings while the process was timed; for a short process without readings, the nearest before and after."""
    every = [(p.t_ns, value) for p in record.telemetry if p.process == process and (value := read(p)) is not None]
    earlier = [point for point in every if point[0] < begin_ns][-1:]
    later = [point for point in every if point[0] > end_ns][:1]
    inside = [point for point in every if begin_ns <= point[0] <= end_ns]
    return inside or [(min(max(t_ns, begin_ns), end_ns), value) for t_ns, value in earlier + later]


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
    with drawing_board("decode") as (figure, axes):
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
    """Memory over time, device memory if there is any, with marks at the beginning of load, prefill and decode."""
    series = [item for item in (record.memory.vram or record.memory.rss) if item.time_ns]
    if not series:
        return None
    worst = max(series, key=lambda item: item.peak_bytes)
    begin_ns, peak_mb = worst.time_ns[0], worst.peak_bytes / 1e6
    with drawing_board("memory") as (figure, axes):
        times, sizes = _thinned(worst.time_ns, worst.reading_bytes)
        times_s, sizes_mb = [(t - begin_ns) / 1e9 for t in times], [size / 1e6 for size in sizes]
        axes.fill_between(times_s, sizes_mb, color=ACCENT, alpha=0.22, linewidth=0)
        axes.plot(times_s, sizes_mb, color=ACCENT, linewidth=1.4)
        axes.axhline(peak_mb, color=INK, linewidth=0.9, linestyle="--", label=f"peak {peak_mb:,.0f} MB")
        axes.set_ylim(0, 1.3 * peak_mb)
        axes.set_xlim(0, max(times_s) or 1.0)
        _mark_phases(axes, worst, begin_ns, max(times_s) or 1.0)
        if limit_bytes is not None and limit_bytes <= 1.3 * worst.peak_bytes:
            axes.axhline(limit_bytes / 1e6, color=BAD, linewidth=1.4, label=f"limit {limit_bytes / 1e6:,.0f} MB")
        axes.legend(loc="lower right")
        axes.set_xlabel(f"seconds in process {worst.process}, by {printable(worst.method)}")
        axes.set_ylabel("VRAM, MB" if record.memory.vram else "RSS, MB")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure.svg


_PHASE_WORDS = {"load": "load", "first_run": "prefill", "decode": "decode", "steady": "steady"}
_LEAST_APART = 0.15  # of the width: closer words would overlap


def _mark_phases(axes: Axes, series: MemorySeries, begin_ns: int, width_s: float) -> None:
    """Draw a line at the beginning of each phase, its word above the plot, moved right if phases are short."""
    free_from = 0.0
    for phase, start_ns in sorted(series.phase_start_ns.items(), key=lambda item: item[1]):
        if phase not in _PHASE_WORDS:
            continue
        begin_s = max((start_ns - begin_ns) / 1e9, 0.0)
        axes.axvline(begin_s, color=MUTED, linewidth=0.8, linestyle=":")
        place = max(begin_s / width_s, free_from)
        free_from = place + _LEAST_APART
        axes.annotate(
            _PHASE_WORDS[phase],
            xy=(begin_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(place, 1.06),
            textcoords="axes fraction",
            color=MUTED,
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )


def history(
    name: str,
    unit: str,
    runs: Sequence[Mapping[str, Any]],
    *,
    limits: Sequence[tuple[str, float]] = (),
    alarms: Sequence[str] = (),
    cuts: Sequence[str] = (),
) -> str | None:
    """One metric over all runs in their order, one colour per device; None if fewer than two runs have it.

    Simulated or projected figures are hollow, and not joined with measured ones. `limits` are lines with their words,
    `alarms` and `cuts` the folders of the runs that begin a worse level or another environment.
    """
    scale, unit_word = {"bytes": (1e6, "MB"), "share": (0.01, "%")}.get(unit, (1.0, unit))
    points = [
        (place, run["metrics"][name] / scale, (run["device"], run["fingerprint"], run["evidence"]))
        for place, run in enumerate(runs, start=1)
        if run["metrics"].get(name) is not None
    ]
    if len(points) < 2:  # noqa: PLR2004 - one run has no history
        return None
    kinds = list(dict.fromkeys(kind for _, _, kind in points))
    with drawing_board(f"history-{name.replace('/', '-')}", height=2.2) as (figure, axes):
        for index, kind in enumerate(kinds):
            own = [(place, value) for place, value, found in points if found == kind]
            device, _, evidence = kind
            is_measured = evidence == "measured"
            label = printable(device)[:40] + ("" if is_measured else f", {evidence}")
            style = {"color": SERIES[index % len(SERIES)], "fillstyle": "full" if is_measured else "none"}
            axes.plot(
                *zip(*own, strict=True),
                "o-" if is_measured else "o:",
                markersize=4.5,
                linewidth=1.2,
                label=label,
                **style,
            )
        top = 1.15 * max(value for _, value, _ in points)
        axes.set_ylim(bottom=0, top=top)
        axes.set_xlim(0.6, len(runs) + 0.4)
        _limit_lines(axes, [(word, value / scale) for word, value in limits if value / scale <= top])
        _mark_runs(axes, runs, alarms, colour=BAD, style="-", word="alarm")
        _mark_runs(axes, runs, cuts, colour=MUTED, style=":", word="cut")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("run, oldest first")
        axes.set_ylabel(unit_word)
        axes.legend(loc="best")
    return figure.svg


def _limit_lines(axes: Axes, limits: Sequence[tuple[str, float]]) -> None:
    """Draw each limit that is within the picture, with its words at the right end."""
    for word, value in limits:
        axes.axhline(value, color=BAD, linewidth=1.1, linestyle="--")
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 8}
        behind = {"facecolor": SURFACE, "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.text(0.995, value, printable(word), color=BAD, bbox=behind, **place)


def _mark_runs(
    axes: Axes, runs: Sequence[Mapping[str, Any]], marked: Sequence[str], *, colour: str, style: str, word: str
) -> None:
    """Draw a line before each marked run, with the word once above the plot."""
    places = [place - 0.5 for place, run in enumerate(runs, start=1) if run["folder"] in marked]
    for number, place in enumerate(places):
        axes.axvline(place, color=colour, linewidth=1.1, linestyle=style)
        above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 8}
        axes.annotate("" if number else word, (place, 1.01), color=colour, **above)


def pareto_front(front: Front, confirmed_mean: float | None) -> str | None:
    """Every candidate by cost and mean accuracy; arrows lead from the screened accuracy to the one scored again."""
    if not front.candidates:
        return None
    objective = _widest_objective(front)
    label, scale = _OBJECTIVE_LABELS.get(objective, (objective, 1.0))
    formats = sorted({candidate.structure.name for candidate in front.candidates})
    colours = {name: SERIES[index % len(SERIES)] for index, name in enumerate(formats)}
    with drawing_board("pareto") as (figure, axes):
        _front_line(axes, front, objective, scale)
        for candidate in front.candidates:
            colour = colours[candidate.structure.name]
            _candidate(axes, candidate, candidate.cost[objective] / scale, colour, is_best=candidate.key in front.front)
        for name, colour in colours.items():
            axes.plot([], [], "o", color=colour, markersize=5, label=printable(name))
        for chosen in [candidate for candidate in front.candidates if candidate.key == front.chosen][:1]:
            _chosen(axes, chosen, chosen.cost[objective] / scale, confirmed_mean)
        axes.set_xlabel(printable(label))
        axes.set_ylabel("mean accuracy, %")
        axes.margins(x=0.12, y=0.12)
        axes.legend(loc="best", ncols=2, columnspacing=1.0, handletextpad=0.3)
    return figure.svg


_OBJECTIVE_LABELS = {
    "prefill_ms": ("prefill, ms", 1.0),
    "peak_bytes": ("peak memory, MB", 1e6),
    "decode_tok_per_s": ("decode, tok/s", 1.0),
}


def _front_line(axes: Axes, front: Front, objective: str, scale: float) -> None:
    """Join the candidates that no other candidate beats in every objective."""
    best = [(item.cost[objective] / scale, _mean(item)) for item in front.candidates if item.key in front.front]
    if best:
        axes.plot(*zip(*sorted(best), strict=True), "-", color=MUTED, linewidth=1, alpha=0.6, label="front")


def _candidate(axes: Axes, item: FrontCandidate, x: float, colour: str, *, is_best: bool) -> None:
    axes.plot(
        x,
        _mean(item),
        "o",
        color=colour,
        alpha=0.9 if is_best else 0.35,
        markersize=6 if is_best else 4,
        markeredgecolor=INK if is_best else colour,
        markeredgewidth=0.8 if is_best else 0,
    )
    if item.rescored_accuracy:
        _arrow(axes, x, _mean(item), _mean(item, is_rescored=True), INK)


def _chosen(axes: Axes, item: FrontCandidate, x: float, confirmed_mean: float | None) -> None:
    seen = _mean(item, is_rescored=item.rescored_accuracy is not None)
    axes.plot(x, seen, "*", color=GOOD, markersize=13, label="chosen", zorder=5)
    if confirmed_mean is not None:
        _arrow(axes, x, seen, confirmed_mean, GOOD)
        axes.plot(x, confirmed_mean, "D", color=GOOD, markersize=5.5, label="gate split", zorder=6)


def _widest_objective(front: Front) -> str:
    every = list(front.candidates[0].cost)

    def spread(name: str) -> float:
        values = [item.cost[name] for item in front.candidates]
        return (max(values) - min(values)) / max(values)

    return max([name for name in every if name not in front.frozen] or every, key=spread)


def _arrow(axes: Axes, x: float, start: float, end: float, colour: str) -> None:
    axes.annotate(
        "",
        (x, end),
        (x, start),
        arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
    )


def _mean(item: FrontCandidate, *, is_rescored: bool = False) -> float:
    """Mean accuracy over the domains in percent, as screened or as scored again."""
    shares = (item.rescored_accuracy if is_rescored else None) or item.search_accuracy
    return 100 * sum(shares.values()) / len(shares)


def _thinned(times: Sequence[int], values: Sequence[int]) -> tuple[list[int], list[int]]:
    """Keep at most `_MOST_POINTS` points: the highest of each group of neighbours, so no peak is lost."""
    step = -(-len(times) // _MOST_POINTS) or 1
    picks = [
        max(range(start, min(start + step, len(times))), key=values.__getitem__) for start in range(0, len(times), step)
    ]
    return [times[pick] for pick in picks], [values[pick] for pick in picks]
