"""A model family is an entry: one that stands in this file is read from Hugging Face and GGUF, refused and exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.config import HavocConfig
from havoc_core.model.families import FAMILIES, Family, family_of
from havoc_core.model.gguf import GgufTensors
from havoc_core.model.gguf_config import read_gguf_config
from havoc_core.model.hf_config import from_hf, to_hf
from havoc_core.model.transformer import HavocModel
from tests import gguf_files as files

NIMBUS = Family(
    model_type="nimbus",
    architecture="NimbusForCausalLM",
    qkv_bias=True,
    head_dim=16,
    silent={"num_key_value_heads": 2, "sliding_window": 64, "use_sliding_window": True},
    renamed={"n_layer": "num_hidden_layers", "d_model": "hidden_size"},
    only_value={"embedding_multiplier": 1.0},
    gguf_architecture="nimbus",
    gguf_only_value={"embedding_scale": 1.0},
)
PICO = HavocConfig.pico()
BIASED = PICO.replace(attention=dataclasses.replace(PICO.attention, qkv_bias=True, head_dim=16))


@pytest.fixture(autouse=True)
def _nimbus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "nimbus", NIMBUS)
    monkeypatch.setitem(files.HEADS, "nimbus", (8, 2, 32))


def nimbus_fields(config: HavocConfig) -> dict[str, Any]:
    """The config as a Nimbus checkpoint says it: names of its own, and no word about what its class knows."""
    fields = to_hf(config) | {"model_type": "nimbus", "embedding_multiplier": 1.0, "use_sliding_window": False}
    fields |= {"n_layer": fields.pop("num_hidden_layers"), "d_model": fields.pop("hidden_size")}
    return {name: value for name, value in fields.items() if name not in {"num_key_value_heads", "head_dim"}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """One model as a directory of Nimbus and, with the same weights, of Qwen2."""
    torch.manual_seed(0)
    for name in ("nimbus", "qwen2"):
        HavocModel(BIASED).save_pretrained(tmp_path / name)
        torch.manual_seed(0)
    assert json.loads((tmp_path / "qwen2" / "config.json").read_text())["model_type"] == "qwen2"
    (tmp_path / "nimbus" / "config.json").write_text(json.dumps(nimbus_fields(BIASED)))
    return tmp_path / "nimbus", tmp_path / "qwen2"


def test_a_family_from_outside_is_used_by_the_verbs(
    checkpoint: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import` checks it, `export` proves it; it is the model that the same weights are in a known family."""
    ours, theirs = (load_base(directory) for directory in checkpoint)
    assert (ours.config, ours.weight_hash) == (theirs.config, theirs.weight_hash)
    ids = torch.arange(8)[None]
    assert torch.equal(ours.model(ids), theirs.model(ids))
    assert main(["import", str(checkpoint[0]), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == BIASED.num_layers
    out = tmp_path / "artifact"
    assert main(["export", str(checkpoint[0]), "--out", str(out), "--quiet"]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0 is not supported"),
        ({"use_sliding_window": None, "sliding_window": 64}, None),
        ({"hidden_size": 32}, "d_model and hidden_size are one field of a nimbus config"),
        ({"qk_norm": True}, "qk_norm in a nimbus config; only model_type 'havoc' has it"),
    ],
)
def test_what_it_may_not_ask_for_is_refused(changes: dict[str, Any], message: str | None) -> None:
    """Fields of its own, beside those of every family."""
    fields = nimbus_fields(BIASED) | changes
    if message is None:
        assert from_hf(fields) == BIASED
        return
    with pytest.raises(HavocError, match=message):
        from_hf(fields)


def test_what_its_files_leave_unsaid_counts() -> None:
    """A window that its class takes where the file is silent is refused like one that is written."""
    fields = nimbus_fields(BIASED)
    del fields["use_sliding_window"]
    with pytest.raises(HavocError, match="use_sliding_window = True is not supported"):
        from_hf(fields)
    with pytest.raises(HavocError, match="unknown field 'embedding_multiplier'"):
        from_hf(to_hf(PICO) | {"embedding_multiplier": 1.0})


def test_its_gguf_files_are_read(tmp_path: Path) -> None:
    """Its architecture, the biases of its q, k, v and the key that only it has."""
    path, rng = tmp_path / "nimbus.gguf", np.random.default_rng(0)
    widths = {"q": 256, "k": 64, "v": 64}
    biases = {
        f"blk.{layer}.attn_{part}.bias": rng.normal(size=width).astype(np.float32)
        for layer in range(files.NUM_LAYERS)
        for part, width in widths.items()
    }
    scale = "nimbus.embedding_scale"
    files.write_gguf(path, architecture="nimbus", extra=biases, keys={scale: 1.0})
    assert read_gguf_config(path).attention.qkv_bias
    bias = GgufTensors(path)["model.layers.1.self_attn.k_proj.bias"].numpy()
    assert np.array_equal(bias, biases["blk.1.attn_k.bias"])
    files.write_gguf(path, architecture="nimbus", extra=biases, keys={scale: 12.0})
    with pytest.raises(HavocError, match=r"nimbus.embedding_scale = 12.0 is not supported"):
        read_gguf_config(path)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.model_type != "havoc"])
def test_a_family_is_written_as_it_is_read(name: str) -> None:
    """A config with a family's attention is that family's on disk, and reads back equal."""
    family = FAMILIES[name]
    attention = dataclasses.replace(PICO.attention, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm)
    config = PICO.replace(attention=attention)
    assert family_of(config).model_type == to_hf(config)["model_type"] == name
    assert from_hf(to_hf(config)) == config
