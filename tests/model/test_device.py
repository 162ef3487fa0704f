"""Where torch computes: a card that is not there is refused before any work, and what is made says where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from havoc_core.cli import main
from havoc_core.errors import IdentityError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.device import clear_cache, made_on, open_device, place_of
from tests import pretended_card as pretended


def test_torch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its version, and what to do."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(IdentityError, match=r"torch \(.+\) .*without CUDA"):
        open_device("cuda")


def test_a_machine_without_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch could use one."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IdentityError, match="no NVIDIA card .*nvidia-smi"):
        open_device("cuda")


RECIPE = '[model]\ndevice = "cuda"\n'


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "nano", "--device", "cuda"],
        ["train", "nano", "--task", "math", "--device", "cuda"],
        ["train", "nano", "--task", "math", "--recipe", "RECIPE"],
        ["search", "nano", "--experts", "none", "--target", "host", "--device", "cuda"],
        ["run", "RECIPE"],
        ["eval", "nano", "--device", "cuda"],
        ["eval", "nano", "--experts", "FOLDER", "--dispatch", "prompt", "--device", "cuda"],
    ],
    ids="-".join,
)
def test_every_verb_refuses_it_at_the_start(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, the exit code of a device that is not there, and nothing written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cuda.toml").write_text(RECIPE)
    places = {"RECIPE": str(tmp_path / "cuda.toml"), "FOLDER": str(tmp_path)}
    words = [places.get(word, word) for word in words]
    out = [] if words[0] == "eval" else ["--out", str(tmp_path / "out")]
    assert main([*words, *out, "--quiet"]) == IdentityError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("havoc: error: device cuda: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_command_line_wins_over_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--device cpu` with a recipe of another machine: the training gets as far as its first unmet need."""
    (tmp_path / "cuda.toml").write_text(RECIPE)
    words = ["--task", "math", "--recipe", str(tmp_path / "cuda.toml"), "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", "pico", *words, "--quiet"]) == 2
    assert "device" not in capsys.readouterr().err


def test_an_artifact_is_proven_on_a_card_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `--to pt` writes no graph that could be proven."""
    monkeypatch.setattr("havoc_core.bench.device.open_nvml", lambda: pytest.fail("the format is refused first"))
    assert main(["export", "nano", "--to", "pt", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "--to pt writes no graph" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("havoc_core.bench.doctor.provider_problem", lambda _: "it was tried")
    assert main(["export", "nano", "--device", "cuda", "--out", str(tmp_path / "out"), "--quiet"]) == 5
    assert capsys.readouterr().err.startswith("havoc: error: device cuda: ")
    assert not (tmp_path / "out").exists()


def test_products_on_a_card_are_not_rounded_to_tf32() -> None:
    """Whatever was allowed before, as NVIDIA's containers do by an environment variable."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pretended.PretendedCard():
            open_device("cuda")
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_made_says_where() -> None:
    """Kind, name, dtype and torch's version; only on a card is there a cache to clear."""
    cpu = made_on(open_device("cpu"))
    assert (cpu["device"], cpu["dtype"], cpu["torch"]) == ("cpu", "float32", torch.__version__)
    assert cpu["name"]
    assert place_of(open_device("cpu")) == "cpu"
    with pretended.PretendedCard() as card:
        device = open_device("cuda")
        assert made_on(device) == {**cpu, "device": "cuda", "name": pretended.NAME}
        assert place_of(device) == f"cuda ({pretended.NAME})"
        clear_cache(device)
        clear_cache(open_device("cpu"))
        assert card.num_cleared == 1


def test_a_base_is_put_where_it_is_asked_for() -> None:
    """Every weight and table, a tied head still tied; the tensors of the file stay on the CPU."""
    with pretended.PretendedCard() as card:
        base = load_base("nano", device="cuda")
        assert base.model.device.type == "cuda"
        assert all(map(card.holds, (*base.model.parameters(), *base.model.buffers())))
        assert base.model.lm_head.weight is base.model.embed_tokens.weight
        assert not any(card.holds(base.tensors()[name]) for name in list(base.tensors())[:3])


def test_a_checkpoint_is_loaded_onto_a_card() -> None:
    """As seed 004 writes it: the same logits, from ids on the card."""
    from havoc_core.model import HavocModel
    from havoc_core.model.checkpoint import BUNDLED_NANO

    ids = torch.tensor([[1, 70, 71, 72]])
    expected = HavocModel.load_pretrained(str(BUNDLED_NANO))(ids)
    with pretended.PretendedCard() as card:
        model = HavocModel.load_pretrained(str(BUNDLED_NANO), device="cuda")
        logits = model(ids.to("cuda"))
        assert card.holds(logits)
        with pytest.raises(RuntimeError, match="on the CPU"):
            model(ids)
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-3)


def test_the_pretended_card_refuses_what_a_real_one_does() -> None:
    """The test of the tests: mixed operands, NumPy's view, a generator of the CPU; in a backward pass too."""
    with pretended.PretendedCard() as card:
        there, here = torch.ones(3, device="cuda", requires_grad=True), torch.ones(3)
        assert card.holds(there * 2)
        assert not card.holds(here)
        assert not card.holds(there.detach().cpu())
        assert torch.equal(there.detach()[torch.tensor([0, 2])].cpu(), torch.ones(2))
        (there * 3).sum().backward()
        assert card.holds(there.grad)
        for mixed in (lambda: there + here, lambda: torch.cat((there, here)), lambda: here.index_add(0, there, here)):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        with pytest.raises(TypeError, match="NumPy"):
            there.detach().numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.multinomial(there.detach(), 1, generator=torch.Generator())
        assert torch.multinomial(there.detach(), 1, generator=torch.Generator("cuda")).shape == (1,)
    assert torch.ones(3).device.type == "cpu"
