"""A run logs what its catalogue promises: every row, each name under its row, and nothing that says nothing."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.candidate import Candidate, Cost, SearchSettings
from havoc_core.adapt.objectives import method_for
from havoc_core.adapt.search import search
from havoc_core.adapt.tasks.task import load_task
from havoc_core.adapt.training import train_expert
from havoc_core.adapt.training_state import state_path
from havoc_core.config import ExpertSettings, Recipe
from havoc_core.jobs import Place, training_settings
from havoc_core.model.checkpoint import load_base
from havoc_core.pipeline import forget_undone
from havoc_core.progress import SILENT
from havoc_core.track import results
from havoc_core.track.catalogue import CATALOGUE, GENERATION, PROCESS, logged_metric
from havoc_core.track.metrics_file import points_of
from havoc_core.track.tracker import Tracking
from havoc_core.tracking import config_of, open_tracking, with_trackers, without_trackers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from havoc_core.model.structure import Structure

DOMAINS = ("math", "code", "reasoning", "vision")
REPORT = Path(__file__).parents[1] / "reports" / "2026-11-26-nano-host"
SMALL = dataclasses.replace(
    training_settings(ExpertSettings(), load_task("math")),
    num_steps=4,
    prompts_per_step=12,
    samples_per_prompt=4,
    num_train_rows=60,
    num_validation_rows=4,
    validate_every=1,
    max_new_tokens=24,
)


class Landscape:
    """Answers and divergences follow alpha, costs the structure."""

    def costs(self, structures: Sequence[Structure]) -> Iterator[Cost]:
        for structure in structures:
            scale = {"fp32": 1.0, "int8": 0.6}[structure.weight_format]
            yield Cost({"prefill_ms": 10 * scale, "peak_bytes": 1e6 * scale, "decode_tok_per_s": 100 / scale})

    def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterator[Mapping[str, tuple[bool, ...]]]:
        for candidate in candidates:
            pairs = zip(DOMAINS, candidate.alpha, strict=True)
            yield {name: tuple(row < 90 - 30 * abs(1 - alpha) - sample for row in range(100)) for name, alpha in pairs}

    def divergences(self, alphas: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        return [dict(zip(DOMAINS, (0.1 * weight for weight in alpha), strict=True)) for alpha in alphas]


def train_all(tracking: Tracking, folder: Path) -> None:
    base = load_base("nano")
    basis = base_basis(base, folder, SILENT)
    for name in DOMAINS:
        task = load_task(name)
        train_expert(base, basis, task, settings=SMALL, checkpoint_dir=folder, record=tracking.log)


def search_and_finish(tracking: Tracking, folder: Path) -> None:
    settings = SearchSettings(
        domains=DOMAINS,
        population=6,
        generations=3,
        weight_formats=("fp32", "int8"),
        max_kl=1.0,
        seed=0,
        alpha_bounds=(0.0, 2.0),
        normalize_alpha=False,
        num_repeats=1,
    )
    journal = folder / "journal.jsonl"
    result = search(Landscape(), settings=settings, journal_path=journal, record=tracking.log)
    tracking.log(None, None, results.mixture_values(DOMAINS, result.chosen.candidate.alpha))
    names = ("handoff", "scores", "record")
    documents = {name: json.loads((REPORT / f"{name}.json").read_text()) for name in names}
    for process, values in results.process_points(documents["record"]):
        tracking.log(PROCESS, process, values)
    tracking.log(None, None, results.final_values(**documents, exit_codes={"host": 0}, is_disturbed=False))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int | None, float]]:
    """Every value of a small run on the bundled base, by name and step: trainings and a search, each done twice."""
    folder = tmp_path_factory.mktemp("run")
    for _ in range(2):
        with open_tracking(Recipe(), folder, job="run") as tracking:
            train_all(tracking, folder)
            search_and_finish(tracking, folder)
    found: defaultdict[str, dict[int | None, float]] = defaultdict(dict)
    for _, step, values in points_of((folder / "metrics.jsonl").read_bytes()):
        for name, value in values.items():
            assert step not in found[name], f"{name} stands twice at step {step}"
            found[name][step] = value
    return found


def rests(name: str) -> bool:
    metric = logged_metric(name)
    return metric is None or bool(metric.rests)


def is_still(name: str, values: Mapping[int | None, float]) -> bool:
    """Whether a metric with an axis never changes."""
    return None not in values and len(set(values.values())) == 1


def test_a_small_run_logs_at_least_650_metrics_that_say_something(logged: dict[str, dict[int | None, float]]) -> None:
    """Distinct names that change along their axis, or that are of the whole run."""
    assert sum(not is_still(name, values) for name, values in logged.items()) >= 650


def test_no_metric_is_constant(logged: dict[str, dict[int | None, float]]) -> None:
    """But those whose row in the catalogue says why a good run may leave them as they are."""
    assert [name for name, values in logged.items() if is_still(name, values) and not rests(name)] == []


def test_no_row_is_never_logged(logged: dict[str, dict[int | None, float]]) -> None:
    """But those whose row says why a good run may lack them."""
    rows = {logged_metric(name) for name in logged}
    assert None not in rows
    assert [metric.name for metric in CATALOGUE if metric not in rows and not metric.rests] == []


def test_every_name_of_the_seed_is_logged(logged: dict[str, dict[int | None, float]]) -> None:
    """Of each expert, the search, the mixture and the outcome; device memory needs a card, see below."""
    names = {f"svf/{domain}/{name}" for domain in DOMAINS for name in ("loss", "reward", "kl_div", "accuracy")}
    names -= {f"svf/{domain}/reward" for domain in DOMAINS if method_for(load_task(domain), "auto") == "next-token"}
    names |= {f"adas/best_{name}" for name in ("latency_ms", "accuracy", "memory_gb", "throughput_tps")}
    names |= {"adas/generation", "adas/pareto_front_size"} | {f"mixture/{domain}" for domain in DOMAINS}
    names |= {f"final/{name}" for name in ("latency_ms", "accuracy", "throughput_tps")}
    assert sorted(names - set(logged)) == []


def test_the_best_figures_are_those_of_the_candidates(logged: dict[str, dict[int | None, float]]) -> None:
    """The landscape's int8 is the best in each cost, and is met in every generation but perhaps the first."""
    last = {name: list(logged[f"adas/best_{name}"].values())[-1] for name in ("latency_ms", "memory_gb")}
    assert last == {"latency_ms": pytest.approx(6.0), "memory_gb": pytest.approx(6e-4)}
    assert list(logged["adas/best_throughput_tps"].values())[-1] == pytest.approx(100 / 0.6)
    accuracy = list(logged["adas/best_accuracy"].values())
    assert accuracy == sorted(accuracy)
    assert 0.8 <= accuracy[-1] <= 0.9  # 90 of 100 rows are right where every weight is 1


def test_final_figures_are_the_handoffs() -> None:
    """Each figure under its name, device memory where a card was measured."""
    metrics = {"latency_ms": 87.3, "accuracy": 0.87, "vram_gb": 1.8, "throughput_tps": 52.1}
    documents = {name: json.loads((REPORT / f"{name}.json").read_text()) for name in ("scores", "record")}
    values = results.final_values({"metrics": metrics}, **documents, exit_codes={}, is_disturbed=False)
    assert {name: values[f"final/{name}"] for name in metrics} == metrics


def test_each_matrix_has_its_figures(logged: dict[str, dict[int | None, float]]) -> None:
    """4 experts, 4 layers, 7 matrices, 7 figures."""
    assert len([name for name in logged if "/z/" in name]) == 4 * 4 * 7 * 7


def test_the_configuration_is_the_seeds() -> None:
    """As seed 003 writes it, with the recipe beside it; who is told decides nothing."""
    recipe = with_trackers(Recipe(), ["wandb"])
    config = config_of(recipe, recipe.model_dump(mode="json"))
    seed = {"phase": 7, "num_experts": 4, "adas_generations": 4, "adas_population": 8}
    assert {name: config[name] for name in seed} == seed
    assert without_trackers(recipe) == Recipe()
    assert (recipe.track.project, recipe.track.name) == ("agent-forge-v2", "phase7_transformer2_adas")


def test_what_will_be_done_anew_is_forgotten(tmp_path: Path) -> None:
    """What the folder can go on from keeps its metrics; another search or training begins without the old ones."""
    place = Place(Recipe(), tmp_path, tmp_path / "experts")
    axes = {"svf/math/step": "svf/math/loss", "svf/code/step": "svf/code/loss", GENERATION: "adas/evaluated"}
    for path in (state_path(place.experts, "code"), tmp_path / "record.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    with open_tracking(Recipe(), tmp_path, job="run") as tracking:
        for axis, name in {**axes, PROCESS: "bench/load_s"}.items():
            tracking.log(axis, 1, {name: 1.0})
        forget_undone(place, tracking)
    left = [axis for axis, _, _ in points_of((tmp_path / "metrics.jsonl").read_bytes())]
    assert left == ["svf/code/step", PROCESS]


SMALL_TRAINING = """
[experts]
num_steps = 10
validate_every = 2
prompts_per_step = 6
samples_per_prompt = 4
num_train_rows = 40
num_validation_rows = 4
"""


def trained(out: Path) -> list[tuple[int | None, dict[str, float]]]:
    """Step and values of each line, but what the process took for it."""
    points = points_of((out / "metrics.jsonl").read_bytes())
    return [
        (step, {name: value for name, value in values.items() if "/process/" not in name}) for _, step, values in points
    ]


def test_a_training_that_is_killed_again_and_again_logs_every_step_once(tmp_path: Path) -> None:
    """SIGKILL at any moment: the lines are those of a training that was never stopped."""
    (tmp_path / "recipe.toml").write_text(SMALL_TRAINING)
    havoc = [sys.executable, "-m", "havoc_core", "train", "nano", "--task", "code", "--quiet"]
    command = [*havoc, "--recipe", str(tmp_path / "recipe.toml"), "--out"]
    start_s = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=200)
    wait_s, num_kills = 0.4 * (time.monotonic() - start_s), 0
    while not (tmp_path / "cut" / "z_vectors_code.safetensors").exists():  # a kill may come after the last file
        process = subprocess.Popen([*command, str(tmp_path / "cut")])
        try:
            assert process.wait(wait_s) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills, wait_s = num_kills + 1, wait_s * 1.2
    assert num_kills > 0
    assert [step for step, _ in trained(tmp_path / "whole")] == list(range(11))
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
