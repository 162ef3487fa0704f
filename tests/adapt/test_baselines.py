"""Baselines: every arm on the same rows with the same budget, counted honestly, and done once however often stopped."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from havoc_core.adapt import baselines
from havoc_core.adapt.baselines import BaselineSettings, arms_of, run_baselines
from havoc_core.adapt.basis import TARGETS, Basis
from havoc_core.adapt.expert import Expert, lora_ratio
from havoc_core.adapt.paired import paired_margin
from havoc_core.adapt.tasks.names import ARMS
from havoc_core.adapt.tasks.sources import rows, rows_hash
from havoc_core.adapt.tasks.task import load_task
from havoc_core.cli import main
from havoc_core.config import ExpertSettings
from havoc_core.errors import HavocError
from havoc_core.jobs import training_settings
from havoc_core.model.checkpoint import Base
from tests.adapt.interrupted import StopAfter, StoppedError

pytest.importorskip("peft", reason="peft is not installed: LoRA has no layers")

MATH = load_task("math")
SMALL = dataclasses.replace(
    training_settings(ExpertSettings(num_steps=2, prompts_per_step=6, max_draws=1, validate_every=2), MATH),
    samples_per_prompt=4,
    num_train_rows=16,
    num_validation_rows=4,
)
ONE_RATE: dict[str, Any] = {"rates": (0.03,), "lora_rates": (0.01,), "num_gate_rows": 12, "training": SMALL}
KIND = BaselineSettings(**ONE_RATE, arms=("kind-next-token",), seeds=(0,))


@pytest.fixture(scope="module")
def compare(base: Base, basis: Basis) -> Callable[..., dict[str, Any]]:
    def compared(out: Path, settings: BaselineSettings, **keywords: Any) -> dict[str, Any]:
        return run_baselines(base, basis, MATH, settings, out, **keywords)

    return compared


@pytest.fixture(scope="module")
def whole(compare: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every arm, one seed."""
    return compare(tmp_path_factory.mktemp("whole"), BaselineSettings(**ONE_RATE, seeds=(5,)))


def test_every_arm_is_there(whole: dict[str, Any]) -> None:
    """And each says by which method, on which matrices, and how many prompts it saw."""
    assert [arm["name"] for arm in whole["arms"]] == list(ARMS)
    assert [[run["seed"] for run in arm["runs"]] for arm in whole["arms"]] == [[5]] * len(ARMS)
    methods = ["reinforce", "next-token", "reinforce", "next-token", "next-token"]
    assert [arm["method"] for arm in whole["arms"]] == methods
    assert [arm["matrices"] for arm in whole["arms"]] == [list(TARGETS)] * 4 + [["down_proj"]]
    assert whole["num_training_prompts"] == 12


def test_trained_values_are_counted(whole: dict[str, Any], base: Base, basis: Basis) -> None:
    """Against the lengths of z, and against `lora_ratio`, which counts LoRA's factors by their formula."""
    lengths = basis.num_directions()
    size_of = {arm["name"]: arm["num_parameters"] for arm in whole["arms"]}
    assert size_of["svf-reward"] == size_of["svf-next-token"] == sum(lengths.values())
    assert size_of["kind-next-token"] == sum(size for name, size in lengths.items() if "down_proj" in name)
    zeros = {name: torch.zeros(size) for name, size in lengths.items()}
    expert = Expert(domain="math", deltas=zeros, base_hash="", basis_hash="")
    assert whole["lora_over_svf"] == pytest.approx(lora_ratio(expert, base.model.named_tensors()))
    assert size_of["lora-reward"] == size_of["lora-next-token"] == whole["lora_over_svf"] * sum(lengths.values())


def test_counts_and_differences_are_those_of_the_rows(whole: dict[str, Any]) -> None:
    """What is said of an arm follows from which gate rows it had right; one seed's margin is its paired margin."""
    assert whole["rows"]["gate"] == {"num_rows": 12, "sha256": rows_hash(rows(MATH, "gate", 12))}
    right = [mark == "1" for mark in whole["base"]["right"]]
    for arm in whole["arms"]:
        margins = []
        for run in arm["runs"]:
            marks = [mark == "1" for mark in run["right"]]
            assert run["num_right"] == sum(marks)
            margins.append(paired_margin({"math": tuple(marks)}, {"math": tuple(right)})["margin"])
        assert arm["difference"]["by_seed"] == pytest.approx(margins)
        assert arm["difference"]["margin"] == pytest.approx(sum(margins) / len(margins))
    pairs = {(pair["ours"], pair["theirs"]) for pair in whole["pairs"]}
    assert len(pairs) == len(whole["pairs"]) == 10


def test_each_arm_moves_the_model_it_is_scored_with(
    compare: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Base
) -> None:
    """Gate rows are asked of the trained model with the best values, not of the base; afterwards the base is back."""
    prompt = torch.tensor([[7, 30, 12]])
    seen, answered = [], baselines.score

    def watching(scorer: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(base.model(prompt).detach().clone())
        return answered(scorer, *arguments, **keywords)

    monkeypatch.setattr(baselines, "score", watching)
    settings = BaselineSettings(
        **{**ONE_RATE, "rates": (0.3,), "lora_rates": (0.1,), "num_gate_rows": 2},
        arms=("svf-next-token", "lora-next-token", "kind-next-token"),
        seeds=(0,),
    )
    # every state is kept, so that the last is not the base's
    monkeypatch.setattr(baselines, "train_adapter", _last_state_wins)
    compare(tmp_path, settings)
    assert len(seen) == 4
    first, *others = seen
    assert torch.equal(first, base.model(prompt))
    assert all(not torch.allclose(first, other, atol=1e-3) for other in others)


def _last_state_wins(base: Base, adapter: Any, *arguments: Any, **keywords: Any) -> Any:
    from havoc_core.adapt.training import train_adapter

    found = train_adapter(base, adapter, *arguments, **keywords)
    return dataclasses.replace(found, values=adapter.snapshot())


def test_a_stopped_comparison_goes_on(compare: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Stopped again and again, in trainings of scales and of LoRA too: the same answers, steps and rates."""
    settings = BaselineSettings(**ONE_RATE, arms=("lora-next-token", "kind-next-token"), seeds=(0,))
    expected = compare(tmp_path / "whole", settings)
    num_stops = 0
    for num_steps in (1, 3, 3, 4, 6, 10, 20):
        try:
            found = compare(tmp_path / "cut", settings, progress=StopAfter(num_steps))
            break
        except StoppedError:
            num_stops += 1
    assert num_stops >= 3
    assert _without_times(found) == _without_times(expected)


def _without_times(document: dict[str, Any]) -> dict[str, Any]:
    runs = [
        {name: value for name, value in run.items() if not name.startswith("train_") and "cpu_s" not in name}
        for arm in document["arms"]
        for run in arm["runs"]
    ]
    return {**{name: value for name, value in document.items() if name != "arms"}, "runs": runs}


def test_what_is_finished_is_not_done_again_and_seeds_can_be_added(
    compare: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run of the same folder trains nothing; one with a further seed trains that seed."""
    first = compare(tmp_path, KIND)
    trained = []
    train = baselines.train_adapter

    def counting(*arguments: Any, **keywords: Any) -> Any:
        trained.append(keywords["settings"].seed)
        return train(*arguments, **keywords)

    monkeypatch.setattr(baselines, "train_adapter", counting)
    assert compare(tmp_path, KIND) == first
    assert trained == []
    more = compare(tmp_path, dataclasses.replace(KIND, seeds=(0, 4)))
    assert trained == [4]
    (arm,) = more["arms"]
    assert arm["runs"][0] == first["arms"][0]["runs"][0]
    shares = [run["num_right"] / run["num_rows"] for run in arm["runs"]]
    assert arm["mean"] == pytest.approx(sum(shares) / 2)
    share = more["base"]["num_right"] / more["base"]["num_rows"]
    assert arm["difference"]["by_seed"] == pytest.approx([one - share for one in shares])


def test_the_search_rows_choose_the_rate(
    compare: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate whose training did best there, the first of equals; each arm tries its own."""
    scores = {0.01: 2, 0.02: 3, 0.04: 3}

    def trained(*arguments: Any, **keywords: Any) -> Any:
        found = _last_state_wins(*arguments, **keywords)
        right = scores[keywords["settings"].optimizer.fallback_lr]
        return dataclasses.replace(found, score={**found.score, "num_right": right})

    monkeypatch.setattr(baselines, "train_adapter", trained)
    settings = dataclasses.replace(KIND, rates=tuple(scores), lora_rates=(1e-3, 2e-3, 3e-3))
    (run,) = compare(tmp_path, settings)["arms"][0]["runs"]
    assert run["rate"] == 0.02
    assert run["validation_by_rate"] == [[0.01, 2], [0.02, 3], [0.04, 3]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_gate_rows": 13}, "rows"),
        ({"rates": (0.05,)}, "rates"),
        ({"training": dataclasses.replace(SMALL, num_steps=3)}, "training"),
        ({"kind": "up_proj"}, "kind"),
        ({"data_seed": 1}, "data_seed, rows"),
    ],
)
def test_a_folder_of_another_comparison_is_refused(
    compare: Callable[..., dict[str, Any]], whole_kind: Path, changes: dict[str, Any], named: str
) -> None:
    """What differs is named; nothing is mixed."""
    with pytest.raises(HavocError, match=f"differs in {named}: .*--out"):
        compare(whole_kind, dataclasses.replace(KIND, **changes))


@pytest.fixture(scope="module")
def whole_kind(compare: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kind")
    compare(out, KIND)
    return out


@pytest.mark.parametrize("change", [{"right": "01"}, {"num_right": 99}, {"right": "x" * 12}])
def test_a_damaged_result_is_refused(
    compare: Callable[..., dict[str, Any]], whole_kind: Path, change: dict[str, Any]
) -> None:
    """An arm's file that does not hold the verdict of every row is named, with what to do."""
    path = whole_kind / "arms" / "kind-next-token-seed-0.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | change))
    try:
        with pytest.raises(HavocError, match="verdicts of 12 gate rows; remove it"):
            compare(whole_kind, KIND)
    finally:
        path.write_text(kept)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ("svf",)}, "unknown arm svf: choose from svf-reward"),
        ({"arms": ()}, r"unknown arm \(none\)"),
        ({"kind": "lm_head"}, "unknown kind of matrix 'lm_head': choose from q_proj"),
        ({"rates": (0.1, 0.2)}, "2 learning rates for scales and 1 for LoRA"),
        ({"seeds": (1, 1)}, "seeds: give at least one"),
    ],
)
def test_what_would_be_unfair_or_mean_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    """Before anything is loaded or written."""
    with pytest.raises(HavocError, match=said):
        BaselineSettings(**(ONE_RATE | changes))


def test_a_task_of_choices_takes_the_expected_reward() -> None:
    """Its answers can be listed, so nothing needs to be sampled."""
    task = load_task("arc-easy", is_public=True)
    arms = {arm.name: arm.method for arm in arms_of(task, BaselineSettings(**ONE_RATE))}
    assert arms["svf-reward"] == arms["lora-reward"] == "expected-reward"
    assert arms["svf-next-token"] == "next-token"


def test_without_peft_nothing_is_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the extra, exit code 2, no folder; the arms without LoRA need none of it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["baselines", "nano", "--task", "math", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert 'pip install "havoc-core[baselines]"' in said
    assert not (tmp_path / "out").exists()
    assert dataclasses.replace(KIND, arms=("svf-reward", "svf-next-token")).arms == ("svf-reward", "svf-next-token")


def test_the_verb_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON on stdout is the document in the folder; the pages lie beside it."""
    words = ["baselines", "nano", "--task", "math", "--arms", "kind-next-token", "--seeds", "0", "--steps", "1"]
    words += ["--prompts", "2", "--rates", "0.01", "--lora-rates", "0.01", "--n", "4", "--search-rows", "4"]
    assert main([*words, "--out", str(tmp_path), "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "baselines.json").read_text())
    assert document["model"] == "nano"
    assert "math on nano" in (tmp_path / "baselines.md").read_text()
    assert "<svg" in (tmp_path / "baselines.html").read_text()
    assert main([*words, "--out", str(tmp_path), "--quiet"]) == 0
    assert "down_proj, next-token" in capsys.readouterr().out
