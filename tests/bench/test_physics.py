"""The floor of a measurement: what no kernel can leave out, at more than the device can do."""

from __future__ import annotations

from typing import Any

import pytest

from havoc_core.bench.judge import physics
from havoc_core.bench.judge.case import Case
from havoc_core.bench.judge.targets import Roofline, load_target
from havoc_core.bench.judge.validity import not_faster_than_physics
from havoc_core.errors import HavocError
from havoc_core.model import cost
from havoc_core.model.config import HavocConfig
from havoc_core.model.hf_config import to_hf
from havoc_core.model.structure import Structure
from tests.bench import sample_records as samples

CONFIG = HavocConfig.edge_135m()


def case_of(structure: Structure | None = None, *, kind: str = "cuda", **changes: Any) -> Case:
    shape = {"subject__config": to_hf(CONFIG), "subject__structure": (structure or Structure()).to_fields()}
    fields = {key: str(value) for key, value in shape["subject__structure"].items()}
    record = samples.record(kind, **{**shape, "subject__structure": fields}, **changes)
    return Case(record=record, target=load_target("gtx1660" if kind == "cuda" else "host"))


def test_the_prefill_floor_is_the_models_own_work() -> None:
    """All products of 512 tokens at 1.25 times the paper peak; integer weights at four times that."""
    operations = cost.prefill_flops(CONFIG, 512)
    assert physics.prefill_floor_s(case_of()) == pytest.approx(operations / (1.25 * 10.05e12))
    assert physics.prefill_floor_s(case_of(Structure("int4"))) == pytest.approx(operations / (5 * 10.05e12))
    halved = Structure(rank_fraction=0.25)
    assert physics.prefill_floor_s(case_of(halved)) < 0.7 * physics.prefill_floor_s(case_of())


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_two_passes_take_twice_the_floor(kind: str) -> None:
    """A record that says two passes and shows the time of one is refused."""
    one, two = (physics.prefill_floor_s(case_of(kind=kind, workload__passes=passes)) for passes in (1, 2))
    assert two == 2 * one
    changes = {"samples__0__prefill__duration_ns": [round(1.5e9 * one)] * 20}
    changes |= {"samples__each__decode__each__step_ns": [9_000_000_000] * 127}
    refused = [not_faster_than_physics(case_of(kind=kind, workload__passes=passes, **changes)) for passes in (1, 2)]
    assert refused[0] is None
    assert "a prefill took" in str(refused[1])


def test_the_step_floor_is_the_bytes_that_must_be_read() -> None:
    """Every weight and the cache of 512 tokens, less what stays on the chip, at 1.25 times the paper bandwidth."""
    num_bytes = cost.decode_read_bytes(CONFIG, 512)
    assert physics.step_floor_s(case_of()) == pytest.approx((num_bytes - 10e6) / (1.25 * 192e9))
    assert physics.step_floor_s(case_of(Structure("int4"))) < 0.3 * physics.step_floor_s(case_of())
    bare = Roofline(fp32_flop_per_s=1e18, fp16_flop_per_s=1e18, bandwidth_bytes_per_s=1e9)
    case = case_of()
    roomy = Case(record=case.record, target=case.target.model_copy(update={"roofline": bare}))
    assert physics.step_floor_s(roomy) == pytest.approx((num_bytes - 256e6) / 1.25e9)


@pytest.mark.parametrize(("field", "share"), [("prefill", 0.999), ("step", 0.999), ("prefill", 1.001), ("step", 1.001)])
def test_faster_than_the_floor_is_refused(field: str, share: float) -> None:
    """One in a thousand below the floor breaks the rule, one in a thousand above does not."""
    floor_s = physics.prefill_floor_s(case_of()) if field == "prefill" else physics.step_floor_s(case_of())
    times = round(floor_s * 1e9 * share)
    changes = {
        "prefill": {"samples__0__prefill__duration_ns": [times] * 20},
        "step": {"samples__each__decode__each__step_ns": [times] * 127},
    }[field]
    slow = {"samples__each__decode__each__step_ns": [9_000_000] * 127} if field == "prefill" else {}
    reason = not_faster_than_physics(case_of(**{**slow, **changes}))
    assert (reason is not None) is (share < 1)


def test_a_cpu_has_only_its_cores() -> None:
    """Without paper peaks eight cores get more than eight cores can do, and read as if all lay in their caches."""
    case = case_of(kind="cpu")
    assert physics.prefill_floor_s(case) == pytest.approx(
        cost.prefill_flops(CONFIG, 512) / (1.25 * 8 * physics.CORE_OPS_PER_S)
    )
    assert physics.step_floor_s(case) == pytest.approx(
        cost.decode_read_bytes(CONFIG, 512, Structure("fp32", "fp32")) / (8 * physics.CORE_BYTES_PER_S)
    )


def test_an_unknown_card_has_no_floor() -> None:
    """A target that gives no peaks of its card bounds nothing."""
    case = case_of()
    bare = Case(record=case.record, target=case.target.model_copy(update={"roofline": None}))
    assert (physics.prefill_floor_s(bare), physics.step_floor_s(bare)) == (0.0, 0.0)


def test_a_record_without_its_shape_is_bounded_by_a_third() -> None:
    """Older records hold only the number of parameters, of which a third at least takes part in every product."""
    case = Case(record=samples.record("cuda"), target=load_target("gtx1660"))
    assert physics.prefill_floor_s(case) == pytest.approx(2 * 20e6 / 3 * 512 / 10.05e12)
    assert physics.step_floor_s(case) == pytest.approx(80e6 / 3 / 192e9)


def test_a_shape_that_is_none_is_one_line() -> None:
    """A record whose configuration describes no model cannot be bounded, and says so."""
    record = samples.record("cuda", subject__config={"model_type": "none"}, subject__structure={})
    with pytest.raises(HavocError, match="model_type"):
        physics.prefill_floor_s(Case(record=record, target=load_target("gtx1660")))
