"""Every metric that HAVOC logs: its name, unit, better direction, axis, and source.

A name is a pattern: `{domain}` and similar parts stand for one word without a slash, so `svf/math/loss` is a name of
the row `svf/{domain}/loss`. The names of seed 003 are `svf/{domain}/{loss,reward,kl_div,accuracy}`, `adas/*`,
`mixture/*` and `final/*`. A metric with an axis has one value per step of the axis; without an axis it has one per run.

`make metrics` writes docs/metrics.md from this file.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Better = Literal["higher", "lower", "neither"]
_BETTER: Final[dict[str, Better]] = {"higher": "higher", "lower": "lower", "neither": "neither"}

TRAINING: Final = "svf/{domain}/step"
GENERATION: Final = "adas/generation"
PROCESS: Final = "bench/process"
AXES: Final = {
    TRAINING: "optimizer steps taken by the training of one expert; 0 is the base",
    GENERATION: "generation of the search; 0 is the first",
    PROCESS: "number of a measured process in the record; 0 is the first",
}
"""The axes of metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedMetric:
    """One row of the catalogue.

    `axis` is one of `AXES`, "" for a metric with one value per run. `source` is the module that computes it. `rests`
    says why a good run may lack the metric or keep one value; "" if neither may happen.
    """

    name: str
    unit: str
    better: Better
    axis: str
    meaning: str
    source: str
    rests: str = ""

    @property
    def pattern(self) -> re.Pattern[str]:
        """A regular expression that matches the names of this row."""
        return _pattern(self.name)

    def axis_of(self, name: str) -> str:
        """Return the axis of a name of this row, with its `{domain}` filled in; "" without an axis."""
        words = self.pattern.fullmatch(name)
        return self.axis.format(**words.groupdict()) if words else ""


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile(
        "".join(f"(?P<{part}>[^/]+)" if place % 2 else re.escape(part) for place, part in enumerate(parts))
    )


def _rows(axis: str, source: str, prefix: str, table: str) -> Iterator[LoggedMetric]:
    """Read the rows of one axis and source: name behind `prefix`, unit, better, meaning, and why it may rest, if so."""
    for line in table.strip().splitlines():
        name, unit, better, meaning, *rests = (cell.strip() for cell in line.split("|"))
        yield LoggedMetric(
            name=prefix + name,
            unit=unit,
            better=_BETTER[better],
            axis=axis,
            meaning=meaning,
            source=source,
            rests="".join(rests),
        )


CATALOGUE: Final[tuple[LoggedMetric, ...]] = (
    *_rows(
        TRAINING,
        "adapt/step_figures.py",
        "svf/{domain}/",
        """
        loss | nats | lower | loss of the step, with the KL term
        reward | share | higher | mean reward of the step's rows | next-token has none
        nats_per_token | nats | lower | cross-entropy of the reference | only next-token has it
        kl_div | nats/token | lower | KL from the base at the predicted tokens | none if kl_coefficient is 0
        right | share | higher | rows of the step whose right choice is the likeliest | only expected-reward has it
        flat_groups | prompts | lower | prompts whose samples all had the same reward | only reinforce has it
        failed | completions | lower | completions of the step whose judge failed | only reinforce has it
        draws | draws | lower | number of draws until enough prompts had a signal | only reinforce has it
        skipped | steps | lower | steps in a row whose loss or gradient was not finite | 0 in a good run
        gradient_norm | 1 | neither | norm of the whole gradient before it is clipped | none without a signal
        clipped_share | share | lower | share of that norm that clipping removes | 0 if the norm is below the limit
        accuracy | share | higher | validation rows answered right | few rows may give equal values
        best_accuracy | share | higher | accuracy of the best state so far | few rows may give equal values
        kl_to_base | nats/token | lower | KL from the base on validation rows
        errors/wrong | rows | lower | validation rows with a wrong answer | few rows may give equal values
        errors/empty | rows | lower | validation rows on which the model wrote nothing | 0 in a good run
        errors/failed | rows | lower | validation rows whose judge failed | 0 in a good run
        errors/cut | rows | lower | validation rows whose prompt was longer than the context | 0 in a good run
        """,
    ),
    *_rows(
        TRAINING,
        "adapt/delta_figures.py",
        "svf/{domain}/z/{layer}/{matrix}/",
        """
        norm | 1 | neither | norm of delta = z - 1
        mean | 1 | neither | mean of delta: above 0 the matrix grows
        min | 1 | neither | least delta
        max | 1 | neither | greatest delta
        gradient_norm | 1 | neither | norm of the matrix's gradient, not clipped | none without a signal
        effective_rank | directions | neither | effective rank of W' - W, from its singular values s delta
        weight_change | share | neither | norm of W' - W over the norm of W
        """,
    ),
    *_rows(
        TRAINING,
        "track/process_figures.py",
        "svf/{domain}/process/",
        """
        step_s | s | lower | wall time since the previous step, with validation
        cpu_s | s | lower | CPU time of the process for it
        rss_bytes | bytes | lower | resident memory of the process | only on Linux; a process may keep its size
        involuntary_switches | switches | lower | involuntary context switches | a quiet machine has none
        """,
    ),
    *_rows(
        GENERATION,
        "adapt/generation_figures.py",
        "adas/",
        """
        generation | generation | neither | the generation that has been evaluated
        best_latency_ms | ms | lower | least prefill time of a candidate so far | known after the first generation
        best_accuracy | share | higher | highest mean accuracy of a candidate so far | few rows may give equal values
        best_memory_gb | GB | lower | least peak memory of a candidate so far | known after the first generation
        best_throughput_tps | token/s | higher | highest decoding rate so far | known after the first generation
        pareto_front_size | candidates | neither | non-dominated candidates so far | few rows may give equal values
        evaluated | candidates | higher | candidates evaluated so far
        failed | candidates | lower | candidates so far that could not be measured | 0 in a good run
        feasible | candidates | higher | candidates so far within every limit | none on another device
        repaired | candidates | lower | candidates moved into the bounds | a small generation may have none
        hypervolume | 1 | higher | hypervolume that the candidates so far dominate | a settled search no longer grows
        accuracy/{domain} | share | higher | mean accuracy of the generation | few rows may give equal values
        best_accuracy/{domain} | share | higher | highest accuracy so far | few rows may give equal values
        kl/{domain} | nats/token | lower | mean KL of its mixtures from the base
        alpha_mean/{domain} | 1 | neither | mean weight of the expert in the generation
        alpha_std/{domain} | 1 | neither | spread of the expert's weight in the generation
        structures/{structure} | candidates | neither | its candidates with this structure | the number may stay equal
        """,
    ),
    *_rows(
        PROCESS,
        "track/results.py",
        "bench/",
        """
        load_s | s | lower | time to open the artifact
        cold_ms | ms | lower | first call of the process
        prefill_p50_ms | ms | lower | median prefill
        prefill_p90_ms | ms | lower | 90th percentile of prefill
        ttft_p50_ms | ms | lower | median time to the first token
        decode_p50_tok_per_s | token/s | higher | median rate of decoding
        busy_s | s | neither | CPU time of the process | not every profile counts it
        foreign_cpu_share | share | lower | share of the cores used by other processes | not every device reports it
        involuntary_switches | switches | lower | involuntary context switches | not every device reports it
        major_page_faults | faults | lower | pages read from the disk | not every device reports it
        peak_rss_bytes | bytes | lower | peak resident memory of a memory process | one memory process has one value
        peak_vram_bytes | bytes | lower | peak device memory of a memory process | not every device reports it
        cpu_clock_mhz | MHz | higher | mean clock of the processor | not every device reports it
        sm_clock_mhz | MHz | higher | mean clock of the card | not every device reports it
        temperature_c | °C | lower | highest temperature | not every device reports it
        power_w | W | lower | mean power | not every device reports it
        """,
    ),
    *_rows(
        "",
        "track/results.py",
        "",
        """
        mixture/{domain} | 1 | neither | weight of the expert in the chosen mixture
        final/latency_ms | ms | lower | 90th percentile of every prefill | none if nothing was timed
        final/accuracy | share | higher | mean over the domains on the gate split
        final/vram_gb | GB | lower | peak device memory of the worst process | none without a card
        final/throughput_tps | token/s | higher | tokens after the first over their time | none if nothing was timed
        final/peak_rss_gb | GB | lower | peak resident memory of the worst process | none if it was not read
        final/accuracy/{model}/{domain} | share | higher | share right on the gate split
        final/accuracy_low/{model}/{domain} | share | higher | lower end of its 95 % interval
        final/accuracy_high/{model}/{domain} | share | higher | upper end of its 95 % interval
        final/kl_to_base/{model}/{domain} | nats/token | lower | KL of the model from the base on the gate split
        final/gain/{domain} | share | higher | the expert's accuracy on its own task minus the base's
        final/margin/{model} | share | higher | mean accuracy of the mixture minus this model's
        final/exit_code/{target} | code | neither | exit code of `havoc gate` for the target
        final/disturbed | count | lower | 1 if the search could not use its figures of speed | 0 in a good run
        """,
    ),
)
"""The rows, in the order of the documentation."""


@functools.lru_cache(maxsize=8192)
def logged_metric(name: str) -> LoggedMetric | None:
    """Return the row of `name`; None if no row has this name."""
    return next((metric for metric in CATALOGUE if metric.pattern.fullmatch(name)), None)


def markdown() -> str:
    """Return docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `make metrics` from `track/catalogue.py`; [tracking](tracking.md) explains how they are logged.",
    ]
    for axis, meaning in (*AXES.items(), ("", "")):
        title = f"Against `{axis}`" if axis else "Once a run"
        lines += ["", f"## {title}", "", *([f"{meaning[0].upper()}{meaning[1:]}.", ""] if meaning else [])]
        lines += ["| name | unit | better | meaning | from | may be missing or constant |", "|---|---|---|---|---|---|"]
        lines += [
            f"| `{row.name}` | {row.unit} | {row.better} | {row.meaning} | `{row.source}` | {row.rests} |"
            for row in CATALOGUE
            if row.axis == axis
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
