"""One model answers with any mixture: none is left over from the one before, and the base comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from havoc_core.adapt.dispatch import open_mixtures
from havoc_core.adapt.expert import load_expert
from havoc_core.adapt.mixture import mix
from havoc_core.adapt.svf import fold_matrix
from havoc_core.adapt.tasks.task import Prompt
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import Base
from havoc_core.progress import SILENT

REQUEST = [(Prompt("Question: what is 2 + 3?\nAnswer:\n"), ["5", "6"])]


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def test_the_base_is_the_base_before_between_and_after(base: Base, small_experts: Path) -> None:
    """Alpha 0 is the base bit for bit, whichever mixture answered before."""
    before = weights(base)
    mixtures, _ = open_mixtures(base, small_experts, SILENT)
    with mixtures:
        for alpha in ((1.0, 0.0, 0.0), (0.3, 0.5, 0.9)):
            mixtures.scorer(alpha)
            assert any(not torch.equal(before[name], value) for name, value in weights(base).items())
            mixtures.scorer(mixtures.only(None))
            assert all(torch.equal(before[name], value) for name, value in weights(base).items())
        mixtures.scorer((0.0, 1.0, 0.0))
    assert all(torch.equal(before[name], value) for name, value in weights(base).items())


def test_nothing_is_left_over_from_the_mixture_before(base: Base, small_experts: Path) -> None:
    """A mixture answers the same first and after others, and after the scales of a classifier."""

    def said(mixtures: object, alpha: tuple[float, ...]) -> float:
        return mixtures.scorer(alpha).log_likelihoods(REQUEST)[0][0].log_likelihood  # type: ignore[attr-defined]

    first = {}
    for alpha in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.2, 0.4, 0.6)):
        mixtures, _ = open_mixtures(base, small_experts, SILENT)
        with mixtures:
            first[alpha] = said(mixtures, alpha)
    assert len(set(first.values())) == 3
    mixtures, basis = open_mixtures(base, small_experts, SILENT)
    other = load_expert(small_experts / "z_vectors_code.safetensors", basis=basis)
    with mixtures:
        for alpha, expected in [*first.items(), *reversed(first.items())]:
            assert said(mixtures, alpha) == expected
            mixtures.expert_scorer(other)


def test_a_mixture_is_what_an_export_would_fold(base: Base, small_experts: Path) -> None:
    """The weights in memory are those of the rule delta, folded one matrix at a time."""
    alpha = (0.2, 0.4, 0.6)
    mixtures, basis = open_mixtures(base, small_experts, SILENT)
    tensors = base.tensors()
    with mixtures:
        deltas = mix(mixtures.experts, alpha)
        mixtures.scorer(alpha)
        held = {name: value for name, value in base.model.state_dict().items() if "q_proj" in name}
        for name, value in held.items():
            full = next(other for other in deltas if other.endswith(name))
            matrix = basis.matrices[full]
            expected = fold_matrix(tensors[full].float(), matrix.factor, matrix.side, deltas[full])
            torch.testing.assert_close(value, expected)


def test_a_folder_without_experts_is_refused(base: Base, tmp_path: Path) -> None:
    """One line that says what is missing; nothing is computed or written."""
    with pytest.raises(HavocError, match="has no z_vectors_"):
        open_mixtures(base, tmp_path, SILENT)
    assert list(tmp_path.iterdir()) == []


def test_the_basis_of_a_run_lies_above_its_experts(base: Base, small_experts: Path, tmp_path: Path) -> None:
    """`havoc run` writes out/basis.safetensors and out/experts: dispatch finds it there and writes no second one."""
    folder = tmp_path / "experts"
    folder.mkdir()
    for path in small_experts.iterdir():
        place = tmp_path if path.name == "basis.safetensors" else folder
        (place / path.name).write_bytes(path.read_bytes())
    mixtures, _ = open_mixtures(base, folder, SILENT)
    mixtures.close()
    assert not (folder / "basis.safetensors").exists()
