"""Expert files: the singular-value scales of one task, bound to the base they were trained on.

`z_vectors_<domain>.safetensors` holds one fp32 vector delta = z - 1 per adapted matrix, by the matrix's Hugging Face
name, and as text: format, formula, base hash, basis hash, training settings, seed, held-out score. A z vector is
index-aligned to one basis of one base, so loading against another base is refused, as is a file that is damaged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ..errors import HavocError
from ..storage import canonical_json
from .tasks.names import CLASSIFIER, NAME, in_order
from .tensor_file import digest_of, read_tensor_file, write_tensor_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .basis import Basis

FORMULA: Final = "delta"
"""The meaning of the vectors in a file: W' = U diag(s (1 + delta)) V^T."""

_FORMAT = "havoc-expert/1"
_HASH_SHOWN = 12
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One task's scales: `deltas` maps tensor names to delta = z - 1, fp32 [R]; 0 is the base.

    `score` is the held-out result with its interval, or None; `settings` and `score` are plain JSON values.
    """

    domain: str
    deltas: Mapping[str, Tensor]
    base_hash: str
    basis_hash: str
    formula: str = FORMULA
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    score: Mapping[str, Any] | None = None

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the vectors: their names, shapes and bytes."""
        return digest_of(self.deltas)

    @property
    def is_base(self) -> bool:
        """Whether it changes nothing: every delta is 0."""
        return not any(bool(delta.any()) for delta in self.deltas.values())

    @property
    def num_parameters(self) -> int:
        """Trained numbers in all vectors."""
        return sum(delta.numel() for delta in self.deltas.values())


def lora_ratio(expert: Expert, tensors: Mapping[str, Tensor], *, rank: int = LORA_RANK) -> float:
    """How many times as many numbers LoRA of this rank trains on the same matrices [M, N].

    rank (M + N) for a matrix against min(M, N): 32 times for square ones at rank 16.
    """
    num_lora = sum(rank * sum(tensors[name].shape) for name in expert.deltas)
    return num_lora / expert.num_parameters


def expert_path(directory: Path, domain: str) -> Path:
    """The path of the expert of `domain` in a folder of experts: z_vectors_<domain>.safetensors."""
    _require_domain(domain, directory)
    if domain == CLASSIFIER:
        raise HavocError(
            f"{directory}: {CLASSIFIER} is the name of the classifier, which chooses between experts and is not one: "
            f"its file is {CLASSIFIER}.safetensors"
        )
    return directory / f"z_vectors_{domain}.safetensors"


def experts_in(directory: Path) -> list[str]:
    """Names of the tasks that a folder holds experts of: the four domains first, then by name."""
    prefix, suffix = "z_vectors_", ".safetensors"
    names = [path.name[len(prefix) : -len(suffix)] for path in directory.glob(f"{prefix}*{suffix}") if path.is_file()]
    return in_order([name for name in names if NAME.fullmatch(name)])


def save_expert(expert: Expert, directory: Path) -> Path:
    """Write the expert's file into `directory` atomically and return its path; one that holds NaN or Inf is refused."""
    path = expert_path(directory, expert.domain)
    write_expert(expert, path)
    return path


def write_expert(expert: Expert, path: Path) -> None:
    """Write the expert's file as `path` atomically; one that holds NaN or Inf is refused."""
    _check_vectors(expert.deltas, path)
    metadata = {
        "format": _FORMAT,
        "domain": expert.domain,
        "formula": expert.formula,
        "base_hash": expert.base_hash,
        "basis_hash": expert.basis_hash,
        "settings": _json(expert.settings, "settings"),
        "seed": str(expert.seed),
        "score": _json(expert.score, "score"),
    }
    write_tensor_file(path, expert.deltas, metadata=metadata)


def load_expert(
    path: Path, *, base_hash: str | None = None, basis_hash: str | None = None, basis: Basis | None = None
) -> Expert:
    """Read an expert file; with `base_hash`, `basis_hash` or `basis`, refuse one that belongs to another.

    Raises `HavocError` for a missing, damaged or hostile file, for another base or basis, and for vectors that are not
    finite fp32 of the basis's names and lengths.
    """
    tensors, metadata = read_tensor_file(path, format_name=_FORMAT)
    try:
        expert = Expert(
            domain=metadata["domain"],
            deltas=tensors,
            base_hash=metadata["base_hash"],
            basis_hash=metadata["basis_hash"],
            formula=metadata["formula"],
            settings=json.loads(metadata["settings"]),
            seed=int(metadata["seed"]),
            score=json.loads(metadata["score"]),
        )
    except KeyError as error:
        raise HavocError(f"{path}: the entry {error} is missing; train the expert again") from None
    except (ValueError, RecursionError) as error:
        raise HavocError(f"{path}: its metadata cannot be read ({error}); train the expert again") from None
    _require_domain(expert.domain, path)
    if expert.formula != FORMULA:
        raise HavocError(f"{path}: holds {expert.formula!r} vectors, this version reads {FORMULA!r}")
    _check_vectors(tensors, path)
    if basis is not None:
        base_hash, basis_hash = basis.base_hash, basis.hash
    _require_same("base", expert.base_hash, base_hash, path)
    _require_same("basis", expert.basis_hash, basis_hash, path)
    if basis is not None:
        _check_fit(expert, basis, path)
    return expert


def load_experts(
    directory: Path, domains: Sequence[str], *, base_hash: str | None = None, basis: Basis | None = None
) -> list[Expert]:
    """Read the experts of `domains`, in that order, from one folder; see `load_expert` for what is refused."""
    experts = [load_expert(expert_path(directory, domain), base_hash=base_hash, basis=basis) for domain in domains]
    for domain, expert in zip(domains, experts, strict=True):
        if expert.domain != domain:
            path = expert_path(directory, domain)
            raise HavocError(f"{path}: was trained for {expert.domain!r}; give the file its own name again")
    return experts


def _json(value: object, name: str) -> str:
    try:
        return canonical_json(value).decode()
    except (TypeError, ValueError) as error:
        raise HavocError(f"the expert's {name} cannot be written as JSON ({error})") from error


def _require_domain(domain: str, path: Path) -> None:
    if not NAME.fullmatch(domain):
        raise HavocError(f"{path}: {domain[:80]!r} is not a task name (small letters, digits, - and _)")


def _require_same(what: str, theirs: str, ours: str | None, path: Path) -> None:
    if ours is not None and theirs != ours:
        raise HavocError(
            f"{path}: was trained on {what} {theirs[:_HASH_SHOWN]}, this is {what} {ours[:_HASH_SHOWN]}; "
            f"z vectors fit only the {what} they were trained on"
        )


def _check_vectors(deltas: Mapping[str, Tensor], path: Path) -> None:
    if not deltas:
        raise HavocError(f"{path}: holds no vectors")
    for name, delta in deltas.items():
        if delta.ndim != 1 or delta.dtype != torch.float32:
            raise HavocError(f"{path}: {name} is {delta.dtype} {list(delta.shape)}, expected one float32 vector")
        if not delta.isfinite().all():
            raise HavocError(f"{path}: {name} holds NaN or Inf; train the expert again")


def _check_fit(expert: Expert, basis: Basis, path: Path) -> None:
    for name, delta in expert.deltas.items():
        if name not in basis.matrices:
            raise HavocError(f"{path}: {name} is not an adapted matrix of this base")
        num_directions = basis.matrices[name].num_directions
        if delta.numel() != num_directions:
            raise HavocError(f"{path}: {name} has {delta.numel()} values, the basis {num_directions} directions")
