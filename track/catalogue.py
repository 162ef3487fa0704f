"""Every metric that HAVOC logs: its name, unit, which way is better, what it is drawn against, and where it comes from.

A name is a pattern: `{domain}` and its like stand for one word without a slash, so `svf/{domain}/loss` is what
`svf/math/loss` means. Names without braces and those of seed 003 are `svf/{domain}/{loss,reward,kl_div,accuracy}`,
`adas/*`, `mixture/*` and `final/*`. A metric with an axis has one value a step of it; without one it has one a run.

docs/metrics.md is written from here by `make metrics`.
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
"""What metrics are drawn against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedMetric:
    """One row of the catalogue.

    `axis` is one of `AXES`, "" for a metric with one value a run. `source` is the module that computes it. `rests` says
    why a good run may lack the metric or see it stay as it is; "" where it may do neither.
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
        """What matches the names that this row stands for."""
        return _pattern(self.name)

    def axis_of(self, name: str) -> str:
        """Return the axis of a name that this row stands for, its `{domain}` filled in; "" where it has none."""
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
        loss | nats | lower | what the step descended, KL term included
        reward | share | higher | mean reward of the step's rows | next-token has none
        nats_per_token | nats | lower | cross-entropy of the reference | of next-token alone
        kl_div | nats/token | lower | KL from the base where the step predicted | none where kl_coefficient is 0
        right | share | higher | rows of the step whose right choice is the likeliest | of expected-reward alone
        flat_groups | prompts | lower | prompts of the step whose samples were all rewarded alike | of reinforce alone
        failed | completions | lower | completions of the step whose judge failed | of reinforce alone
        draws | draws | lower | how often prompts were drawn until enough carried a signal | of reinforce alone
        skipped | steps | lower | steps in a row whose loss or gradient was not finite | 0 in a good run
        gradient_norm | 1 | neither | norm of the whole gradient before it is clipped | none without a signal
        clipped_share | share | lower | share of that norm that clipping takes away | 0 where it is short enough
        accuracy | share | higher | validation rows answered right | few rows may come out alike
        best_accuracy | share | higher | accuracy of the state that would be kept | few rows may come out alike
        kl_to_base | nats/token | lower | KL from the base on validation rows
        errors/wrong | rows | lower | validation rows that were answered, and wrong | few rows may come out alike
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
        step_s | s | lower | wall time since the step before, validation included
        cpu_s | s | lower | CPU time that the process took for it
        rss_bytes | bytes | lower | resident memory of the process | Linux alone tells it; a process may keep its size
        involuntary_switches | switches | lower | how often it was put aside for another | a quiet machine has none
        """,
    ),
    *_rows(
        GENERATION,
        "adapt/generation_figures.py",
        "adas/",
        """
        generation | generation | neither | the generation that has been evaluated
        best_latency_ms | ms | lower | least prefill time of a candidate so far | known after the first generation
        best_accuracy | share | higher | highest mean accuracy of a candidate so far | few rows may come out alike
        best_memory_gb | GB | lower | least peak memory of a candidate so far | known after the first generation
        best_throughput_tps | token/s | higher | highest decoding rate so far | known after the first generation
        pareto_front_size | candidates | neither | candidates so far that none dominates | few rows may come out alike
        evaluated | candidates | higher | candidates evaluated so far
        failed | candidates | lower | candidates so far that could not be measured | 0 in a good run
        feasible | candidates | higher | candidates so far within every limit | none on another device
        repaired | candidates | lower | candidates moved into the bounds | a small generation may have none
        hypervolume | 1 | higher | what the candidates so far dominate | it no longer grows once it has settled
        accuracy/{domain} | share | higher | mean accuracy of the generation | few rows may come out alike
        best_accuracy/{domain} | share | higher | highest accuracy so far | few rows may come out alike
        kl/{domain} | nats/token | lower | mean KL of its mixtures from the base
        alpha_mean/{domain} | 1 | neither | mean weight of the expert in the generation
        alpha_std/{domain} | 1 | neither | spread of the expert's weight in the generation
        structures/{structure} | candidates | neither | its candidates with this structure | may stay as many
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
        foreign_cpu_share | share | lower | share of the cores that other processes took | not every device tells it
        involuntary_switches | switches | lower | how often the process was put aside | not every device tells it
        major_page_faults | faults | lower | pages fetched from the disk | not every device tells it
        peak_rss_bytes | bytes | lower | peak resident memory of a memory process | one memory process has one value
        peak_vram_bytes | bytes | lower | peak device memory of a memory process | not every device tells it
        cpu_clock_mhz | MHz | higher | mean clock of the processor | not every device tells it
        sm_clock_mhz | MHz | higher | mean clock of the card | not every device tells it
        temperature_c | °C | lower | highest temperature | not every device tells it
        power_w | W | lower | mean power | not every device tells it
        """,
    ),
    *_rows(
        "",
        "track/results.py",
        "",
        """
        mixture/{domain} | 1 | neither | weight of the expert in the chosen mixture
        final/latency_ms | ms | lower | 90th percentile of every prefill | none where nothing was timed
        final/accuracy | share | higher | mean over the domains on the gate split
        final/vram_gb | GB | lower | peak device memory of the worst process | none without a card
        final/throughput_tps | token/s | higher | tokens after the first over their time | none where nothing was timed
        final/peak_rss_gb | GB | lower | peak resident memory of the worst process | none where it was not read
        final/accuracy/{model}/{domain} | share | higher | share right on the gate split
        final/accuracy_low/{model}/{domain} | share | higher | lower end of its 95 % interval
        final/accuracy_high/{model}/{domain} | share | higher | upper end of its 95 % interval
        final/kl_to_base/{model}/{domain} | nats/token | lower | KL of the model from the base on the gate split
        final/gain/{domain} | share | higher | the expert's accuracy on its own task less the base's
        final/margin/{model} | share | higher | mean accuracy of the mixture less this model's
        final/exit_code/{target} | code | neither | verdict for a target, as `havoc gate` exits
        final/disturbed | count | lower | 1 where the search could not believe its figures of speed | 0 in a good run
        """,
    ),
)
"""The rows, in the order of the documentation."""


@functools.lru_cache(maxsize=8192)
def logged_metric(name: str) -> LoggedMetric | None:
    """Return the row that `name` falls under; None for a name that is in no row."""
    return next((metric for metric in CATALOGUE if metric.pattern.fullmatch(name)), None)


def markdown() -> str:
    """Return docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `make metrics` from `track/catalogue.py`; how they are logged stands in [tracking](tracking.md).",
    ]
    for axis, meaning in (*AXES.items(), ("", "")):
        title = f"Against `{axis}`" if axis else "Once a run"
        lines += ["", f"## {title}", "", *([f"{meaning[0].upper()}{meaning[1:]}.", ""] if meaning else [])]
        lines += ["| name | unit | better | what it is | from | may be away or rest |", "|---|---|---|---|---|---|"]
        lines += [
            f"| `{row.name}` | {row.unit} | {row.better} | {row.meaning} | `{row.source}` | {row.rests} |"
            for row in CATALOGUE
            if row.axis == axis
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
