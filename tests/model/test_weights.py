"""Tensors one at a time: from disk, from a seed, and the hash that names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from havoc_core.errors import HavocError
from havoc_core.model import HavocConfig
from havoc_core.model.tensors import EMBEDDING, tensor_shapes
from havoc_core.model.weights import INDEX_FILE, RandomTensors, open_tensors, require_tensors, weight_hash


def test_stored_tensors_are_a_mapping(tmp_path: Path) -> None:
    """Names, shapes and values are those of the file, in the type they are stored in."""
    state = {"b": torch.randn(2, 3).half(), "a": torch.randn(4)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    stored = open_tensors(tmp_path)
    assert list(stored) == ["a", "b"]
    assert len(stored) == 2
    assert stored.shape("b") == (2, 3)
    assert all(torch.equal(stored[name], state[name]) for name in state)
    with pytest.raises(KeyError):
        stored["c"]


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3, ""])
def test_shards_stay_in_the_directory(tmp_path: Path, file: object) -> None:
    """An index cannot point out of its directory, nor at another kind of file."""
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(HavocError, match="safetensors"):
        open_tensors(inner)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    """A tensor the index promises and no file holds, a missing shard, an index without a map: one line each."""
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "part.safetensors")
    index = tmp_path / INDEX_FILE
    for fields, message in (
        ({"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}, "tensor b is listed"),
        ({"weight_map": {"a": "absent.safetensors"}}, r"absent\.safetensors: no such file"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        index.write_text(json.dumps(fields))
        with pytest.raises(HavocError, match=message):
            open_tensors(tmp_path)


def test_the_hash_sees_name_type_shape_and_bytes() -> None:
    """Two sets of tensors have one hash only if all four agree; the order of insertion does not matter."""
    base = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    variants = [
        base,
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(2, 3), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"] + 0.5, "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({weight_hash(variant) for variant in variants}) == len(variants)
    assert weight_hash(dict(reversed(base.items()))) == weight_hash(base)
    assert weight_hash({"a": base["b"].t(), "s": torch.tensor(1.0)}) == weight_hash(
        {"a": base["b"].t().contiguous(), "s": torch.tensor(1.0)}
    )


def test_random_tensors_stand_alone() -> None:
    """Each tensor is drawn from its own seed: the same alone or after all others, another for another seed."""
    config = HavocConfig.pico().replace(vocab_size=2000)
    tensors = RandomTensors(config, seed=1)
    assert {name: tuple(tensors[name].shape) for name in tensors} == tensor_shapes(config)
    again = RandomTensors(config, seed=1)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(again, tensors["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(again, RandomTensors(config, seed=2)["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(again, tensors["model.layers.1.mlp.gate_proj.weight"])


def test_random_tensors_are_gpt_neox() -> None:
    """Normal(0, 0.02), norms one, the padding row zero."""
    config = HavocConfig.pico().replace(vocab_size=2000)
    tensors = RandomTensors(config)
    assert tensors[EMBEDDING][1:].std().item() == pytest.approx(0.02, rel=0.05)
    assert (tensors[EMBEDDING][0] == 0).all()
    assert (tensors["model.norm.weight"] == 1).all()


def test_requirements_read_headers_only() -> None:
    """7b's tensors are checked against 7b's config without drawing one."""
    config = HavocConfig.havoc_7b()
    require_tensors(RandomTensors(config), config, source="7b")
    with pytest.raises(HavocError, match=r"7b: .*embed_tokens\.weight has shape \[70000, 4096\]"):
        require_tensors(RandomTensors(config), config.replace(vocab_size=70_001), source="7b")
