"""Engines in this process: which there are, what their child times, and how far tokens agree."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core.bench.contender import Contender, engine_of, engine_version, engines_of
from havoc_core.bench.duel import Agreement, differences, require_told
from havoc_core.bench.engines import ENGINES
from havoc_core.bench.engines.engine import episode, load_engine
from havoc_core.errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Scripted:
    """A model that takes known times and gives so many tokens."""

    is_own_process = True

    def __init__(self, num_given: int) -> None:
        self.num_given = num_given

    def generate(self, ids: list[int], num_tokens: int) -> Iterator[int]:
        """Wait longer for the first token."""
        assert num_tokens
        for place in range(self.num_given):
            time.sleep(0.01 if place else 0.03)
            yield ids[0] + place


def test_an_episode_is_timed_token_by_token() -> None:
    """The first token's time is the prefill's, the others' are steps; sleeping takes no CPU time."""
    found = episode(Scripted(4), [7], 4, num_ids=300)
    assert found["tokens"] == [7, 8, 9, 10]
    (prefill_ns,), steps_ns = found["prefill"]["wall_ns"], found["decode"]["wall_ns"]
    assert prefill_ns >= 30e6
    assert len(steps_ns) == 3
    assert min(steps_ns) >= 10e6
    assert found["decode"]["cpu_ns"] < sum(steps_ns)


@pytest.mark.parametrize("num_given", [3, 5])
def test_another_number_of_tokens_is_a_fault(num_given: int) -> None:
    """No figure is made of an answer that is too short or too long."""
    with pytest.raises(RuntimeError, match=f"gave {num_given} tokens instead of 4"):
        episode(Scripted(num_given), [7], 4, num_ids=None)


def test_a_token_that_the_model_does_not_have_is_a_fault() -> None:
    """A vocabulary of nine has no token nine, whatever an engine says."""
    with pytest.raises(RuntimeError, match="token 10, .*has 9"):
        episode(Scripted(4), [7], 4, num_ids=9)


def test_agreement_counts_up_to_the_first_difference() -> None:
    """Behind it the texts differ; a token that llama.cpp did not tell is no difference."""
    agreement = Agreement()
    agreement.hear((5, 6, 7, 8), (5, 9, 7, 8))
    agreement.hear((5, 6, 7, 8), (4, 6, 7, 8))
    agreement.hear((5, 6, 7, 8), (5, -1, 7, 8))
    assert agreement == Agreement(num_prompts=3, num_first_same=2, num_tokens=12, num_same=5)
    assert "in 2 of 3, and 5 of 12" in agreement.sentence()


def test_every_engine_is_a_file_with_a_package(tmp_path: Path) -> None:
    """The names are those of the files; an interpreter that is none is one line."""
    folder = Path(str(importlib.util.find_spec("havoc_core.bench.engines").submodule_search_locations[0]))  # type: ignore[union-attr, index]
    assert {file.stem for file in folder.glob("*.py")} - {"__init__", "engine"} == set(ENGINES)
    assert all(load_engine(name).PACKAGE for name in ENGINES)
    with pytest.raises(HavocError, match="not an interpreter"):
        engine_version("hugging_face", tmp_path / "python")


def contender(**changes: Any) -> Contender:
    """An artifact of a base, changed in some places."""
    fields: dict[str, Any] = {
        "shown": "model",
        "place": Path("model"),
        "identity": {"artifact": "model"},
        "require_unchanged": lambda: None,
        "num_ids": 300,
        "base_hash": "a" * 64,
    }
    return Contender(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["both are the same artifact or model: any difference comes from the machine"]),
        ({"identity": {"artifact": "b"}}, []),
        ({"identity": {"artifact": "b"}, "base_hash": "b" * 64}, ["the two were made from different bases"]),
        ({"identity": {"artifact": "b"}, "num_ids": 280}, ["one model has 300 token ids, the other 280"]),
        (
            {"identity": {"engine": "transformers"}, "engine": "hugging_face", "base_hash": None},
            ["only the agreement of their tokens"],
        ),
        (
            {"identity": {"address": "http://x"}, "engine": "llama_cpp", "base_hash": None, "num_ids": None},
            [
                "only the agreement of their tokens",
                "llama.cpp is asked over HTTP",
                "a server at an address reports no CPU time",
            ],
        ),
    ],
)
def test_what_is_different_is_said(changes: dict[str, Any], said: list[str]) -> None:
    """Two models may meet; whoever reads the answer is told that they are two, or that nothing tells."""
    found = list(differences(contender(), contender(**changes)))
    assert len(found) == len(said)
    assert all(line.startswith(words) for line, words in zip(found, said, strict=True))


def test_an_address_decides_by_latency_alone() -> None:
    """It tells neither its memory nor how long it loaded, so neither can decide."""
    server = contender(identity={"address": "http://x"}, engine="llama_cpp", shown="http://x")
    require_told(server, ("latency",))
    with pytest.raises(HavocError, match="http://x: a server at an address does not report memory or load"):
        require_told(server, ("latency", "memory", "load"))
    require_told(contender(), ("latency", "memory", "load"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.gguf"], []),
        (["manifest.json", "config.json", "genai_config.json"], ["genai"]),
        (["manifest.json", "config.json"], []),
        (["config.json"], ["hugging_face"]),
        (["config.json", "openvino_model.xml"], ["openvino"]),
        (["config.json", "genai_config.json"], ["genai"]),
    ],
)
def test_a_folder_is_known_by_what_it_holds(names: list[str], found: list[str], tmp_path: Path) -> None:
    """An artifact may be genai's folder as well; a folder of an engine is not taken for a Hugging Face directory."""
    for name in names:
        (tmp_path / name).write_text("{}")
    assert engines_of(str(tmp_path)) == found
    if "manifest.json" in names or not found:
        assert engine_of(str(tmp_path)) is None
    else:
        assert engine_of(str(tmp_path)) == found[0]
