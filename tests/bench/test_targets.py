"""Targets: the seed's limits under their names, strict files, units that cannot be mixed, one line for any mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from havoc_core.bench.targets import load_target, metric_of, read_targets
from havoc_core.errors import HavocError

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
    """Under 100 ms, under 2 GB, over 50 tokens per second, over 85 % in each domain."""
    limits = {limit.metric: (limit.sign, limit.value) for limit in load_target(name).limits}
    assert limits == {
        "prefill_ms": ("<", 100.0),
        memory: ("<", 2_000_000_000.0),
        "decode_tok_per_s": (">", 50.0),
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
    "wrong-direction": (OWN.replace("below", "above"), ("below",)),
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
    "not-a-table": ("jetson = 3\n", ("not a table",)),
    "empty": ("", ("no target",)),
    "not-toml": ("[[[", ("TOML",)),
    "not-text": (b"\xff\xfe\x00", ("TOML",)),
    "too-deep": ("a = " + "[" * 5000, ("TOML",)),
    "gigantic": ("#" * 1_000_001, ("larger",)),
    "hyphen-in-domain": (OWN.replace("prefill_ms", "accuracy/"), ("unknown metric",)),
}


@pytest.mark.parametrize(("text", "words"), [pytest.param(*value, id=key) for key, value in MISTAKES.items()])
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    """Whatever is wrong with a targets file, the line names it, and the exit code is 2."""
    refused(tmp_path, text, *words)


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


def test_a_name_no_file_can_have() -> None:
    """A recipe may hold a NUL."""
    with pytest.raises(HavocError, match="no file can be called so"):
        load_target("a\0.toml")
