"""Experts that workers train are those of one machine, byte for byte, whichever workers die on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.training_state import state_path
from havoc_core.cli import main
from havoc_core.cluster.address import Address, TlsFiles
from havoc_core.cluster.fleet import Fleet
from havoc_core.cluster.trainer import train_on_workers
from havoc_core.config import Recipe, load_recipe, recipe_toml
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.jobs import Place
from havoc_core.model.checkpoint import BUNDLED_NANO, load_base
from havoc_core.pipeline import train_experts
from havoc_core.progress import SILENT
from havoc_core.storage import read_journal, sha256_file
from havoc_core.track.metrics_file import points_of
from tests.cluster.conftest import running_cluster

pytest.importorskip("distributed")
pytestmark = pytest.mark.alone

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
"""
DOMAINS = ("math", "code", "sums")
NUM_STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three tasks, one of them a file beside its rows, and a base that is a directory."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"q": f"{n} + 1?", "options": [str(n), str(n + 1)], "right": 1} for n in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.toml").write_text(TASK)
    shutil.copytree(BUNDLED_NANO, folder / "base")
    experts = {"tasks": ["math", "code", str(folder / "sums.toml")], "num_steps": NUM_STEPS, "validate_every": 2}
    experts |= {"prompts_per_step": 4, "num_train_rows": 40, "num_validation_rows": 4, "learning_rate": 0.03}
    return Recipe.model_validate({"model": {"base": str(folder / "base")}, "experts": experts})


def place_of(recipe: Recipe, out: Path, **experts: object) -> Place:
    section = recipe.experts.model_copy(update=experts)
    return Place(recipe.model_copy(update={"experts": section}), out, out / "experts")


def train(place: Place, **how: Any) -> None:
    train_experts(place, load_base(place.recipe.model.base), SILENT, **how)


@pytest.fixture(scope="module")
def trained_here(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experts that this machine trains by itself."""
    out = tmp_path_factory.mktemp("here")
    train(place_of(recipe, out))
    return out


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two workers with a store each."""
    with running_cluster(tmp_path_factory.mktemp("crew"), None) as found:
        for name in ("a", "b"):
            found.worker(name=name, is_real=True)
        found.wait_for(2)
        yield found


def connected(cluster: Any) -> Fleet:
    return Fleet.connect(Address.parse(cluster.address), TlsFiles())


def metrics_of(out: Path) -> dict[tuple[str, int | None], float]:
    """What the trainings logged, by name and step, but what the processes took for it; no step stands there twice."""
    found: dict[tuple[str, int | None], float] = {}
    for _, step, values in points_of((out / "metrics.jsonl").read_bytes()):
        told = {(name, step): value for name, value in values.items() if "/process/" not in name}
        assert not found.keys() & told.keys()
        found |= told
    return found


def require_same(out: Path, here: Path, domains: tuple[str, ...] = DOMAINS) -> None:
    """Experts, lists of steps and metrics are those of one machine, and nothing else is left of a training."""
    names = {f"z_vectors_{domain}.safetensors" for domain in domains} | {f"training_{name}.jsonl" for name in domains}
    assert {path.name for path in (out / "experts").iterdir()} == names | {"cluster.jsonl"}
    for name in names:
        assert (out / "experts" / name).read_bytes() == (here / "experts" / name).read_bytes(), name
    prefixes = tuple(f"svf/{domain}/" for domain in domains)
    expected = {key: value for key, value in metrics_of(here).items() if key[0].startswith(prefixes)}
    assert metrics_of(out) == expected


def test_workers_train_what_one_machine_trains(crew: Any, recipe: Recipe, trained_here: Path, tmp_path: Path) -> None:
    """The same bytes; both workers train, and each content, the base's too, is sent to each of them once."""
    with connected(crew) as fleet:
        train(place_of(recipe, tmp_path), fleet=fleet)
    require_same(tmp_path, trained_here)
    events = read_journal(tmp_path / "experts" / "cluster.jsonl")
    trained = {event["trained"]: event["worker"] for event in events if "trained" in event}
    assert set(trained) == set(DOMAINS)
    assert len(set(trained.values())) == 2
    sent = [(event["sent"], event["worker"]) for event in events if "sent" in event]
    assert len(sent) == len(set(sent))
    weights = sha256_file(Path(recipe.model.base) / "model.safetensors")
    assert {worker for content, worker in sent if content == weights} == set(trained.values())


def test_a_training_that_began_here_goes_on_there(
    crew: Any, recipe: Recipe, trained_here: Path, tmp_path: Path
) -> None:
    """The worker does the steps that are left; a state of other settings is refused in one line, with its worker."""
    place = place_of(recipe, tmp_path, tasks=("math",))

    def stop() -> None:
        if state_path(place.experts, "math").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(place, follow=stop)
    with connected(crew) as fleet:
        other = place_of(recipe, tmp_path, tasks=("math",), learning_rate=0.02)
        with pytest.raises(HavocError, match=r"worker \S+: \S+/experts/training_math.* other settings") as caught:
            train(other, fleet=fleet)
        assert "\n" not in str(caught.value)
        train(place, fleet=fleet)
    require_same(tmp_path, trained_here, ("math",))


def test_havoc_train_sends_its_one_training(
    crew: Any, recipe: Recipe, trained_here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task file is sent with its rows; the expert is that of one machine, and is shown as always."""
    settings, out = tmp_path / "recipe.toml", tmp_path / "experts"
    settings.write_text(recipe_toml(recipe))
    words = ["train", recipe.model.base, "--task", recipe.experts.tasks[-1], "--recipe", str(settings), "--json"]
    assert main([*words, "--cluster", crew.address, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["expert"] == str(out / "z_vectors_sums.safetensors")
    for name in ("z_vectors_sums.safetensors", "training_sums.jsonl"):
        assert (out / name).read_bytes() == (trained_here / "experts" / name).read_bytes()
    for more in (["--task", "math", "--online"], ["--classifier", "math,code"]):
        assert main(["train", "nano", *more, "--cluster", crew.address, "--out", str(tmp_path / "more")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "workers download nothing from the hub" in said[-2]
    assert "--classifier: what chooses between experts is trained on this machine" in said[-1]


def test_a_training_that_nobody_waits_for_ends(crew: Any, recipe: Recipe, tmp_path: Path) -> None:
    """Whoever asks next does not wait for a hundred thousand steps."""

    def stop() -> None:
        raise KeyboardInterrupt

    endless = place_of(recipe, tmp_path / "endless", tasks=("math", "code"), num_steps=100_000, validate_every=100_000)
    with connected(crew) as fleet, pytest.raises(KeyboardInterrupt):
        train(endless, fleet=fleet, follow=stop)
    with connected(crew) as fleet:
        train(place_of(recipe, tmp_path / "next", tasks=("math",)), fleet=fleet)


def test_workers_that_cannot_train_are_an_error_at_once(crew: Any, recipe: Recipe, tmp_path: Path) -> None:
    """Exit 2, with what to start."""
    with connected(crew) as fleet:
        for worker in fleet.workers.values():
            worker.offer = dataclasses.replace(worker.offer, scores=False)
        with pytest.raises(HavocError, match=r"none of the \d workers at tcp://\S+ can train: start `havoc worker"):
            train(place_of(recipe, tmp_path), fleet=fleet)


def test_a_killed_worker_costs_only_its_training(crew: Any, recipe: Recipe, trained_here: Path, tmp_path: Path) -> None:
    """Signal 9 in the middle of it: another worker starts it again, and the other expert is trained once."""
    place, steps, killed = place_of(recipe, tmp_path, tasks=("math", "code")), [], []
    base = load_base(recipe.model.base)
    base_basis(base, place.out, SILENT)
    with connected(crew) as fleet:
        victim = next(iter(fleet.workers.values())).name  # it gets the first job

        def listen(n: int, note: str) -> None:
            steps.append(n)
            if note.startswith("train math") and not killed:
                killed.append(victim)
                os.kill(int(victim.rpartition("-")[2]), signal.SIGKILL)

        train_on_workers(fleet, place, base, ["math", "code"], listen=listen)
    require_same(tmp_path, trained_here, ("math", "code"))
    events = read_journal(tmp_path / "experts" / "cluster.jsonl")
    assert [event["lost"] for event in events if "lost" in event] == [victim]
    assert sorted(event["trained"] for event in events if "trained" in event) == ["code", "math"]
    assert sum(steps) == 2 * NUM_STEPS
    assert min(steps) < 0


def test_a_lost_scheduler_ends_the_run_and_the_same_command_goes_on(
    cluster: Any, recipe: Recipe, trained_here: Path, tmp_path: Path
) -> None:
    """One line, exit 4; then the expert that is there is not trained again."""
    cluster.worker(is_real=True)
    cluster.wait_for(1)
    place = place_of(recipe, tmp_path, tasks=("math", "code"))

    def stop() -> None:
        if (place.experts / "z_vectors_math.safetensors").exists() and cluster.scheduler.poll() is None:
            cluster.scheduler.kill()
            cluster.scheduler.wait()

    with connected(cluster) as fleet, pytest.raises(MeasurementError, match="is lost; all results so far") as caught:
        train(place, fleet=fleet, follow=stop)
    assert caught.value.exit_code == 4
    assert not (place.experts / "z_vectors_code.safetensors").exists()
    cluster.restart()
    cluster.worker(is_real=True)
    cluster.wait_for(2)
    with connected(cluster) as fleet:
        train(place, fleet=fleet)
    require_same(tmp_path, trained_here, ("math", "code"))
    events = read_journal(place.experts / "cluster.jsonl")
    assert [event["trained"] for event in events if "trained" in event] == ["math", "code"]


RUN = """
[experts]
tasks = ["math", "code"]
num_steps = 1
prompts_per_step = 4
num_train_rows = 40
num_validation_rows = 4
[search]
population = 4
generations = 1
num_rows = 8
weight_formats = ["fp32"]
[gate]
targets = ["host"]
num_rows = 8
"""


def test_a_run_trains_and_searches_on_its_workers(cluster: Any, two_experts: Path, tmp_path: Path) -> None:
    """Without a worker that measures it is refused before any work; with one, workers train, score and measure."""
    settings, out = tmp_path / "recipe.toml", tmp_path / "out"
    settings.write_text(RUN)
    cluster.worker(name="a", seconds=0.01)
    cluster.wait_for(1)
    refused = cluster.start(out, "run", settings)
    assert refused.wait() == 2, refused.said
    assert "none of the 1 workers may measure for it (no worker measures)" in refused.said
    assert not out.exists()
    (out / "experts").mkdir(parents=True)
    shutil.copy(two_experts / "z_vectors_code.safetensors", out / "experts")
    (out / "recipe.toml").write_text(recipe_toml(load_recipe(settings)))
    cluster.worker(name="b", seconds=0.01, words=["--measures", "cpu"])
    cluster.wait_for(2)
    run = cluster.start(out, "run", settings)
    while not (out / "artifact").exists():
        assert run.is_running(), run.said
        time.sleep(0.02)
    assert "math was trained by worker" in run.said
    trained = read_journal(out / "experts" / "cluster.jsonl")
    assert [event["trained"] for event in trained if "trained" in event] == ["math"]
    assert any("measured" in event for event in read_journal(out / "search" / "cluster.jsonl"))
