"""Check that a record agrees with itself: different parts of a record must describe the same work.

Each function is one rule of `rules.py`: it returns None if the rule holds, else a sentence with the figures. Timings
are whole nanoseconds, so two series of calls are never equal by chance: equal ones were copied.
"""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

from .case import Case, rule
from .validity import CROSS_CHECK_BYTES, CROSS_CHECK_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .record import ProcessSamples, Record

LEAST_TELLING_CALLS = 8  # fewer may be equal by chance, where a clock ticks seldom
BUSY_SLACK_NS = 1000
LEAST_POWER_W = 0.01
MOST_POWER_W = 100_000.0


def copied_timings(records: Sequence[Record]) -> str | None:
    """Say which two series of timed calls are equal, in one record or in several."""
    seen: dict[tuple[int, ...], str] = {}
    for record in records:
        for process in record.samples:
            for name, timed_ns in _series(process):
                where = f"{name} of process {process.process} in {record.run_id}"
                if timed_ns in seen:
                    return f"{where} has the same times as {seen[timed_ns]}, to the nanosecond: one is a copy"
                seen[timed_ns] = where
    return None


def _series(process: ProcessSamples) -> Iterator[tuple[str, tuple[int, ...]]]:
    decode = ((f"decode run {place}", episode.step_ns) for place, episode in enumerate(process.decode))
    for name, timed_ns in (("prefill", process.prefill.duration_ns), ("ttft", process.ttft.duration_ns), *decode):
        if len(timed_ns) >= LEAST_TELLING_CALLS:
            yield name, timed_ns


@rule("V18", "No timings are copies of others.")
def no_timings_are_copies(case: Case) -> str | None:
    """Refuse timings that are copies, such as a process that appears twice."""
    return copied_timings([case.record])


@rule("V19", "The busy time is the sum of the calls.")
def busy_time_is_that_of_calls(case: Case) -> str | None:
    """Refuse a busy time that is not the sum of the calls: calls were left out, or the figure was invented."""
    for process in case.record.samples:
        timed_ns = sum(process.prefill.duration_ns) + sum(process.ttft.duration_ns)
        timed_ns += sum(episode.prefill_ns + sum(episode.step_ns) for episode in process.decode)
        if process.busy_ns > timed_ns + BUSY_SLACK_NS:
            return (
                f"process {process.process}: busy for {process.busy_ns / 1e9:.4g} s, "
                f"its calls add up to {timed_ns / 1e9:.4g} s"
            )
    return None


@rule("V20", "A first token takes at least as long as a prefill.")
def first_token_takes_a_prefill(case: Case) -> str | None:
    """Refuse a typical first token that came before the fastest prefill ended.

    The prefill of another engine ends with its first token: both are the same call, so either may be faster by chance.
    """
    if case.record.subject.engine is not None:
        return None
    prefills = [ns for process in case.record.samples for ns in process.prefill.duration_ns]
    firsts = [ns for process in case.record.samples for ns in process.ttft.duration_ns]
    if not prefills or not firsts or statistics.median(firsts) >= min(prefills):
        return None
    return (
        f"a first token took {statistics.median(firsts) / 1e6:.4g} ms, "
        f"but a prefill takes at least {min(prefills) / 1e6:.4g} ms"
    )


@rule("V21", "A peak is the highest reading.")
def peak_is_the_highest_reading(case: Case) -> str | None:
    """Refuse a peak below the peak of a phase, or below a reading by more than two methods may differ."""
    memory = case.record.memory
    for series in (*memory.rss, *memory.vram):
        highest = max((series.peak_bytes, *series.phase_peak_bytes.values()))
        if highest > series.peak_bytes:
            return f"process {series.process}: a phase peaked at {highest} bytes, but the peak is {series.peak_bytes}"
    for series in memory.rss:
        highest = max((series.peak_bytes, *series.reading_bytes))
        if highest - series.peak_bytes > max(CROSS_CHECK_BYTES, CROSS_CHECK_SHARE * series.peak_bytes):
            return f"process {series.process}: a reading is {highest} bytes, but the peak is {series.peak_bytes}"
    return None


@rule("V22", "Every domain has its own rows.")
def domains_have_rows_of_their_own(case: Case) -> str | None:
    """Refuse two domains with the same rows."""
    for (one, first), (other, second) in itertools.combinations(case.record.accuracy.items(), 2):
        if first.rows_sha256 == second.rows_sha256:
            return f"{one} and {other} were measured on the same rows"
    return None


@rule("V23", "The harness checked the measurement.")
def harness_checks_are_there(case: Case) -> str | None:
    """Require the checks that every measurement ends with."""
    return None if case.record.checks else "the checks of the harness are missing: measure with `havoc bench`"


@rule("V24", "The mean power is plausible for a working processor.")
def energy_is_possible(case: Case) -> str | None:
    """Refuse a mean power that no working processor has."""
    energy = case.record.energy
    if energy is None:
        return None
    power_w = energy.joules / energy.span_s
    if LEAST_POWER_W <= power_w <= MOST_POWER_W:
        return None
    return f"{energy.joules:.4g} J in {energy.span_s:.4g} s is a mean power of {power_w:.4g} W"
