"""Targets: the seed's limits under their names, strict files, units that cannot be mixed, one line for any mistake."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from havoc_core.adapt.tasks.task import load_task
from havoc_core.bench.judge.metrics import metric_of
from havoc_core.bench.judge.targets import (
    MAX_DOTS,
    MAX_TARGETS_BYTES,
    RequiredWorkload,
    load_target,
    read_targets,
    require_known_tasks,
    require_pinned,
    title_of,
)
from havoc_core.errors import HavocError
from tests.bench import sample_records as samples

OWN = """
[jetson]
title = "a board"
[jetson.device]
kind = "cpu"
names = ["Board Processor"]
[[jetson.limits]]
metric = "prefill_ms"
below = 0.2
unit = "s"
"""


def refused(tmp_path: Path, text: str | bytes, *words: str) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HavocError) as caught:
        load_target(str(path))
    assert type(caught.value) is HavocError
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("name", "memory"), [("gtx1660", "peak_vram_bytes"), ("host", "peak_rss_bytes")])
def test_the_seeds_limits(name: str, memory: str) -> None:
    """Under 100 ms, under 2 GB, over 50 tokens per second, over 85 % in each domain; and what a format may cost."""
    limits = {limit.metric: (limit.sign, limit.value) for limit in load_target(name).limits}
    assert limits == {
        "prefill_ms": ("<", 100.0),
        memory: ("<", 2_000_000_000.0),
        "decode_tok_per_s": (">", 50.0),
        "kl_mean": ("<", 0.15),
        "top1_share": (">", 0.8),
        **{f"accuracy/{domain}": (">", 0.85) for domain in ("math", "code", "reasoning", "vision")},
    }


def test_the_card_is_told_from_its_siblings() -> None:
    """Name, PCI id, capability, multiprocessors and bus of the GTX 1660, and of no SUPER or Ti."""
    device = load_target("gtx1660").device
    assert device.names == ("NVIDIA GeForce GTX 1660", "GeForce GTX 1660")
    assert (device.pci_device_id, device.compute_capability, device.num_sms, device.bus_width_bits) == (
        "0x2184",
        "7.5",
        22,
        192,
    )


def test_a_users_own_file(tmp_path: Path) -> None:
    """Units are converted to the metric's own; a file with one target needs no name."""
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    target = load_target(str(path))
    assert (target.name, target.limits[0].value) == ("jetson", 200.0)
    path.write_text(OWN + OWN.replace("jetson", "other"))
    assert load_target(f"{path}:other").name == "other"
    with pytest.raises(HavocError, match="jetson, other"):
        load_target(str(path))


def test_two_gigabytes_are_not_two_gibibytes(tmp_path: Path) -> None:
    """GB and GiB both work, and are 7.4 % apart."""
    path = tmp_path / "own.toml"
    memory = OWN.replace('"prefill_ms"', '"peak_rss_bytes"').replace("0.2", "2")
    values = {}
    for unit in ("GB", "GiB"):
        path.write_text(memory.replace('unit = "s"', f'unit = "{unit}"'))
        values[unit] = load_target(str(path)).limits[0].value
    assert values == {"GB": 2_000_000_000, "GiB": 2_147_483_648}


MISTAKES = {
    "unknown-key": (OWN + "percentil = 0.9\n", ("percentil",)),
    "unknown-metric": (OWN.replace("prefill_ms", "prefil_ms"), ("prefil_ms",)),
    "no-unit": (OWN.replace('unit = "s"', ""), ("unit",)),
    "wrong-unit": (OWN.replace('unit = "s"', 'unit = "GB"'), ("GB", "ms")),
    "wrong-direction": (OWN.replace("below", "above"), ("needs `below`",)),
    "other-wrong-direction": (
        OWN.replace("prefill_ms", "accuracy/math").replace('"s"', '"%"').replace("0.2", "85"),
        ("needs `above`",),
    ),
    "under-the-range": (OWN.replace("0.2", "0.9e-6"), ("check the unit",)),
    "over-the-range": (OWN.replace("0.2", "1000.1"), ("check the unit",)),
    "rows-of-a-time": (OWN + "rows = 3\nseed = 1\n", ("prefill_ms is not judged on rows: leave out rows, seed",)),
    "task-of-a-time": (OWN + 'task = "a.toml"\n', ("prefill_ms has no task",)),
    "limit-of-no-form": (OWN[: OWN.index("[[")] + "[jetson.more]\n", ("unknown key more",)),
    "limits-of-no-form": (OWN[: OWN.index("[jetson.device]")] + "limits = [3]\n", ("limits",)),
    "origin": (OWN.replace("title", 'origin = "mine"\ntitle'), ("target jetson: origin: no such key",)),
    "this-machine-of-a-card": (
        OWN.replace('kind = "cpu"', 'kind = "cuda"\nis_this_machine = true').replace(
            'names = ["Board Processor"]', "names = []"
        ),
        ("is_this_machine is only for a cpu",),
    ),
    "name-of-a-bundled-one": (OWN.replace("jetson", "GTX-1660"), ("'GTX-1660'", "bundled target gtx1660")),
    "both-directions": (OWN + "above = 1\n", ("either",)),
    "no-direction": (OWN.replace("below = 0.2", ""), ("either",)),
    "negative": (OWN.replace("0.2", "-1"), ("below",)),
    "nan": (OWN.replace("0.2", "nan"), ("below",)),
    "infinite": (OWN.replace("0.2", "inf"), ("below",)),
    "milliseconds-as-seconds": (OWN.replace("0.2", "100000"), ("check the unit",)),
    "share-over-one": (
        OWN.replace("prefill_ms", "accuracy/math").replace("below = 0.2", "above = 85").replace('"s"', '"share"'),
        ("check the unit",),
    ),
    "percentile-of-accuracy": (
        OWN.replace("prefill_ms", "accuracy/math").replace("below = 0.2", "above = 85").replace('"s"', '"%"')
        + "percentile = 0.9\n",
        ("percentile",),
    ),
    "two-limits": (OWN + OWN[OWN.index("[[") :], ("two limits",)),
    "no-limit": (OWN[: OWN.index("[[")], ("limits",)),
    "no-device-name": (OWN.replace('names = ["Board Processor"]', ""), ("names",)),
    "gpu-fields-of-a-cpu": (OWN.replace('kind = "cpu"', 'kind = "cpu"\nnum_sms = 22'), ("num_sms",)),
    "this-machine-by-name": (OWN.replace('kind = "cpu"', 'kind = "cpu"\nis_this_machine = true'), ("is_this_machine",)),
    "share-as-percent": (
        OWN.replace("prefill_ms", "accuracy/math").replace("below = 0.2", "above = 0.85").replace('"s"', '"%"'),
        ("is under one percent: write 85, or 0.85", 'unit "share"'),
    ),
    "true-for-a-number": (OWN.replace("below = 0.2", "below = true"), ("below", "number")),
    "text-for-a-number": (OWN.replace("below = 0.2", 'below = "100"'), ("below", "number")),
    "one-for-true": (OWN.replace('kind = "cpu"', 'kind = "cpu"\nis_this_machine = 1'), ("is_this_machine", "boolean")),
    "date-for-a-number": (OWN.replace("below = 0.2", "below = 2026-11-22"), ("jetson",)),
    "long-number": (OWN.replace("below = 0.2", "below = 0x" + "f" * 9000), ("jetson",)),
    "tiny-percentile": (OWN + "percentile = 1e-300\n", ("percentile", "0.01")),
    "certain-percentile": (OWN + "percentile = 0.99999999\n", ("percentile", "0.9999")),
    "certain-confidence": (OWN + "confidence = 0.9999999999\n", ("confidence", "0.999999")),
    "tiny-roofline": (
        OWN + "[jetson.roofline]\nfp32_flop_per_s = 5e-324\nfp16_flop_per_s = 1e12\nbandwidth_bytes_per_s = 1e9\n",
        ("roofline.fp32_flop_per_s", "1000000"),
    ),
    "endless-prompt": (OWN + f"[jetson.workload]\nprompt_tokens = {10**400}\n", ("prompt_tokens",)),
    "endless-protocol": (OWN + f"[jetson.protocol]\nmin_processes = {10**400}\n", ("min_processes",)),
    "endless-busy": (OWN + "[jetson.protocol]\nmin_busy_s = 1e300\n", ("min_busy_s",)),
    "many-dots": (OWN + ".".join("a" * 90_000) + " = 1\n", ("line 11 has 89999 dots", "more than 32")),
    "one-dot-more": (OWN + 'note = "' + "." * 33 + '"\n', ("line 11 has 33 dots",)),
    "not-a-table": ("jetson = 3\n", ("not a table",)),
    "empty": ("", ("no target",)),
    "not-toml": ("[[[", ("TOML",)),
    "not-text": (b"\xff\xfe\x00", ("TOML",)),
    "too-deep": ("a = " + "[" * 5000, ("not valid TOML (", "recursion")),
    "gigantic": ("#" * 1_000_001, ("larger",)),
    "one-byte-more": (OWN + "#" * (MAX_TARGETS_BYTES + 1 - len(OWN)), ("larger than 200000 bytes",)),
    "hyphen-in-domain": (OWN.replace("prefill_ms", "accuracy/"), ("unknown metric",)),
}


@pytest.mark.parametrize(("text", "words"), [pytest.param(*value, id=key) for key, value in MISTAKES.items()])
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    """Whatever is wrong with a targets file, the line names it, and the exit code is 2."""
    refused(tmp_path, text, *words)


def with_accuracy(share: float) -> str:
    return OWN.replace("prefill_ms", "accuracy/math").replace("below = 0.2", f"above = {share}").replace('"s"', '"%"')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (OWN.replace("0.2", "1e-6"), 0.001),
        (OWN.replace("0.2", "1000"), 1e6),
        (with_accuracy(1), 0.01),
        (with_accuracy(1.5), 0.015),
        (OWN + "#" * (MAX_TARGETS_BYTES - len(OWN)), 200.0),
        (OWN + "#" + "." * MAX_DOTS + "\n #" + "." * 90_000, 200.0),
        (OWN.replace("Board Processor", "." * MAX_DOTS), 200.0),
    ],
    ids=["fastest", "slowest", "one-percent", "more-percent", "largest", "comment", "most-dots"],
)
def test_what_lies_on_the_edge_is_read(tmp_path: Path, text: str, value: float) -> None:
    """The ends of a metric's range, one percent, the largest file and the most dots, and any number in a comment."""
    (tmp_path / "own.toml").write_text(text)
    (limit,) = load_target(str(tmp_path / "own.toml")).limits
    assert limit.value == pytest.approx(value)


def test_a_targets_file_may_have_any_name(tmp_path: Path) -> None:
    """Alone or with an entry; a file that is named like one and is missing is told as missing."""
    (tmp_path / "limits").write_text(OWN + OWN.replace("jetson", "other"))
    assert load_target(f"{tmp_path / 'limits'}:other").name == "other"
    (tmp_path / "limits").write_text(OWN)
    assert load_target(str(tmp_path / "limits")).name == "jetson"
    with pytest.raises(HavocError, match="no.toml: No such file"):
        load_target(f"{tmp_path / 'no.toml'}:jetson")
    with pytest.raises(HavocError, match=f"limits holds the targets jetson: choose one with --target {tmp_path}"):
        load_target(f"{tmp_path / 'limits'}:other")


def test_a_title_tells_the_length_of_a_prompt() -> None:
    """Of what reads one; of no other metric, and not where none is known."""
    workload = RequiredWorkload(prompt_tokens=7)
    told = [title_of("prefill_ms", workload), title_of("prefill_ms"), title_of("load_s", workload)]
    assert told == ["prefill, 7 tokens", "prefill", "load"]


def test_a_cards_peak_is_that_of_its_fastest_arithmetic() -> None:
    """Half precision on this card."""
    roofline = load_target("gtx1660").roofline
    assert (roofline.peak_flop_per_s, roofline.fp32_flop_per_s) == (10.05e12, 5.03e12)


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    """A typo lists what there is; a missing or unreadable file is named."""
    for name, word in (("gtx1661", "gtx1660"), (str(tmp_path / "no.toml"), "No such file"), ("", "gtx1660")):
        with pytest.raises(HavocError, match=word):
            load_target(name)
    with pytest.raises(HavocError):
        load_target(str(tmp_path))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: (OWN + text).encode("utf-8", "surrogatepass")))
def test_no_file_raises_anything_else(tmp_path: Path, data: bytes) -> None:
    """Any bytes are a target or a HavocError."""
    path = tmp_path / "fuzz.toml"
    path.write_bytes(data)
    try:
        read_targets(path)
    except HavocError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["title", "kind", "names", "metric", "below", "unit"]),
    st.one_of(
        st.integers(),
        st.floats(),
        st.booleans(),
        st.text(st.characters(exclude_categories=("C",)), max_size=20),
        st.just([]),
    ),
)
def test_no_value_raises_anything_else(tmp_path: Path, key: str, value: object) -> None:
    """Any value in place of a right one is a target or a HavocError."""
    import json

    written = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    literal = written or (json.dumps(value, ensure_ascii=False) if isinstance(value, (str, list)) else repr(value))
    lines = [f"{key} = {literal}" if line.startswith(f"{key} =") else line for line in OWN.splitlines()]
    path = tmp_path / "fuzz.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        read_targets(path)
    except HavocError as error:
        assert "\n" not in str(error)


def test_metrics_say_their_direction() -> None:
    """Times, memory and energy are better when lower, rates and shares when higher."""
    lower = {
        name: metric_of(name).is_lower_better for name in ("prefill_ms", "load_s", "peak_rss_bytes", "energy_j_per_tok")
    }
    assert set(lower.values()) == {True}
    assert not metric_of("decode_tok_per_s").is_lower_better
    assert not metric_of("accuracy/math").is_lower_better


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    """A pipe would be waited for without end, a device read without end."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "endless"):
        with pytest.raises(HavocError, match="not a file"):
            load_target(str(tmp_path / f"{name}.toml"))


def test_an_entry_of_no_file_is_an_unknown_target() -> None:
    """What stands in front of the colon must be a targets file, or it is a name that was misspelt."""
    for name in ("x:y", "nothing-of-this-name:host"):
        with pytest.raises(HavocError, match=f"^unknown target '{name}': choose"):
            load_target(name)


def test_a_missing_file_is_told_in_words(tmp_path: Path) -> None:
    """The system's words, without its number."""
    with pytest.raises(HavocError) as caught:
        load_target(str(tmp_path / "no.toml"))
    assert str(caught.value) == f"{tmp_path / 'no.toml'}: No such file or directory"


def test_a_name_no_file_can_have() -> None:
    """A recipe may hold a NUL."""
    with pytest.raises(HavocError, match="not a valid file name"):
        load_target("a\0.toml")
    with pytest.raises(HavocError, match="unknown target"):
        load_target("x" * 5000)


# Limits on tasks


MINE = """
[mine]
title = "mine"
[mine.device]
kind = "cpu"
is_this_machine = true
[[mine.limits]]
"""


@pytest.mark.parametrize("name", ["host", "gtx1660"])
def test_a_text_target_is_the_same_without_pictures(name: str) -> None:
    """Device, effort, work and every other limit are those of the target it is named for."""
    whole, text = load_target(name), load_target(f"{name}-text")
    assert text.limits == tuple(limit for limit in whole.limits if limit.metric != "accuracy/vision")
    assert len(text.limits) == len(whole.limits) - 1
    for part in ("device", "roofline", "protocol", "workload"):
        assert getattr(text, part) == getattr(whole, part)


def test_a_task_that_does_not_exist_is_no_limit(tmp_path: Path) -> None:
    """Bundled tasks, tasks of the records and tasks whose file is named are known; the nearest name is offered."""
    (tmp_path / "t.toml").write_text(MINE + 'metric = "accuracy/reasonin"\nabove = 50\nunit = "%"\n')
    target = load_target(str(tmp_path / "t.toml"))
    with pytest.raises(HavocError, match="accuracy/reasonin .*did you mean"):
        require_known_tasks(target, ["math"])
    require_known_tasks(target, ["math", "reasonin"])
    for name in ("host", "gtx1660", "host-text", "gtx1660-text"):
        require_known_tasks(load_target(name), [])


TASK = """
kind = "choice"
metric = "acc"
[data]
path = "rows.jsonl"
problem = ["q"]
[prompt]
template = "{{ q }}"
[choice]
choices = "options"
label = "right"
[limits]
above = 0.4
"""


def test_a_limit_takes_what_the_tasks_file_says(tmp_path: Path) -> None:
    """The share it asks for, and its hash; a bundled task's share without a file; a record of another is refused."""
    (tmp_path / "sums.toml").write_text(TASK)
    (tmp_path / "t.toml").write_text(
        MINE + 'metric = "accuracy/sums"\ntask = "sums.toml"\n[[mine.limits]]\nmetric = "accuracy/math"\n'
    )
    target = load_target(str(tmp_path / "t.toml"))
    own, bundled = target.limits
    assert (own.value, own.sign, own.task_sha256) == (0.4, ">", load_task(tmp_path / "sums.toml").sha256)
    assert (bundled.value, bundled.task_sha256) == (0.85, None)
    require_known_tasks(target, [])
    (tmp_path / "t.toml").write_text(MINE + 'metric = "accuracy/sums"\ntask = "sums.toml"\nabove = 60\nunit = "%"\n')
    (asked,) = load_target(str(tmp_path / "t.toml")).limits
    assert (asked.value, asked.task_sha256) == (0.6, own.task_sha256)
    (tmp_path / "t.toml").write_text(MINE + 'metric = "accuracy/unheard"\nunit = "%"\n')
    with pytest.raises(HavocError, match="`below` or `above`"):
        load_target(str(tmp_path / "t.toml"))
    (tmp_path / "t.toml").write_text(MINE + 'metric = "accuracy/other"\ntask = "sums.toml"\n')
    with pytest.raises(HavocError, match="accuracy/other .* task sums"):
        load_target(str(tmp_path / "t.toml"))
    (tmp_path / "t.toml").write_text(MINE + 'metric = "accuracy/gsm8k"\nunit = "%"\n')
    with pytest.raises(HavocError, match="`below` or `above`"):
        load_target(str(tmp_path / "t.toml"))
    for pin in ("data_sha256", "task_sha256"):
        (tmp_path / "t.toml").write_text(MINE + f'metric = "load_s"\nbelow = 1\nunit = "s"\n{pin} = "{"0" * 64}"\n')
        with pytest.raises(HavocError, match=f"load_s has no {pin}"):
            load_target(str(tmp_path / "t.toml"))


def test_a_record_of_other_data_is_refused(tmp_path: Path) -> None:
    """A pinned hash that the record does not hold is one line with both, and exit code 2."""
    record = samples.record()
    held = record.accuracy["math"].model_copy(update={"data_sha256": "a" * 64})
    record = record.model_copy(update={"accuracy": {**record.accuracy, "math": held}})
    text = MINE + 'metric = "accuracy/math"\nabove = 50\nunit = "%"\ndata_sha256 = "{}"\n'
    (tmp_path / "t.toml").write_text(text.format("a" * 64))
    require_pinned(load_target(str(tmp_path / "t.toml")), [record])
    (tmp_path / "t.toml").write_text(text.format("b" * 64))
    with pytest.raises(HavocError, match=f"{'b' * 64}, .* has {'a' * 64}") as caught:
        require_pinned(load_target(str(tmp_path / "t.toml")), [record])
    assert caught.value.exit_code == 2
    with pytest.raises(HavocError, match=f"{'b' * 64}, .* has none: score"):
        require_pinned(load_target(str(tmp_path / "t.toml")), [samples.record()])
    require_pinned(load_target(str(tmp_path / "t.toml")), [samples.record(accuracy={})])
    (tmp_path / "t.toml").write_text(MINE + 'metric = "accuracy/math"\nabove = 50\nunit = "%"\n')
    require_pinned(load_target(str(tmp_path / "t.toml")), [record])
