"""Files of a running training, so that it continues with the same steps after an interruption.

training_<name>.safetensors    deltas, best deltas, optimizer, and as text: the key of the training, the progress
training_<name>.jsonl          one line per step, for people and plots; always the steps of the state, each once
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from .. import storage
from ..errors import HavocError
from .tensor_file import digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


_BEST = ("num_right", "num_rows", "step")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Everything that a step changes: `trace` has one entry per step, `best_score` the split's counts and the step."""

    num_done: int
    deltas: Mapping[str, torch.Tensor]
    best: Mapping[str, torch.Tensor]
    best_score: dict[str, Any]
    trace: list[dict[str, Any]]
    optimizer: dict[str, Any]


def state_path(directory: Path, name: str) -> Path:
    """The path of the state of the training `name`."""
    return directory / f"training_{name}.safetensors"


def trace_path(directory: Path, name: str) -> Path:
    """The path of the list of steps of the training `name`."""
    return directory / f"training_{name}.jsonl"


def forget_training(directory: Path, name: str) -> None:
    """Remove the state of a finished training, once its expert file is written; the list of its steps stays."""
    state_path(directory, name).unlink(missing_ok=True)


def save_state(state: TrainingState, directory: Path, name: str, *, key: str, place: str = "cpu") -> None:
    """Write the state atomically, then its list of steps.

    `key` identifies the training, `place` the device (`model.device.place_of`).
    """
    plain, flat = _flattened(state.optimizer)
    tensors = {f"delta.{matrix}": value for matrix, value in state.deltas.items()}
    tensors |= {f"best.{matrix}": value for matrix, value in state.best.items()}
    tensors |= {f"optimizer.{place}": value for place, value in flat.items()}
    texts = {
        "key": key,
        "place": place,
        "progress": json.dumps({"done": state.num_done, "best": state.best_score, "trace": state.trace}),
        "optimizer": json.dumps(plain),
    }
    on_cpu = {place: value.detach().cpu().contiguous() for place, value in tensors.items()}
    metadata = {**texts, "sha256": _digest(on_cpu, texts)}
    storage.write_bytes(state_path(directory, name), safetensors.torch.save(on_cpu, metadata))
    save_trace(state.trace, directory, name)


def _digest(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    """Over every tensor and every text: a bit that flips anywhere would otherwise train another expert unnoticed."""
    return storage.sha256_json({"tensors": digest_of(tensors), **texts})


def save_trace(trace: Sequence[Mapping[str, Any]], directory: Path, name: str) -> None:
    """Write the whole list of steps, so that a step that is repeated after an interruption is listed once."""
    storage.write_text(trace_path(directory, name), "".join(json.dumps(entry) + "\n" for entry in trace))


def load_state(directory: Path, name: str, *, key: str, place: str = "cpu") -> TrainingState | None:
    """Read the state, None if there is none.

    A state that is damaged, of another training, or of another device is a `HavocError`: each device rounds in its own
    order, so an expert is made on one device from its first step to its last.
    """
    path = state_path(directory, name)
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise HavocError(f"{path}: not a training state ({error}); remove it to start again") from error
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise HavocError(f"{path}: the state does not match its SHA-256, so it was damaged; remove it to start again")
    if metadata.get("key") != key:
        raise HavocError(f"{path} is a training of another base or other settings; remove it or choose another --out")
    if (began_on := metadata.get("place", "cpu")) != place:
        raise HavocError(
            f"{path}: the training began on {began_on}, this is {place}: continue there, or remove it to start again"
        )
    try:
        return _parsed(metadata, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise HavocError(f"{path}: not a training state ({type(error).__name__}); remove it to start again") from error


def _parsed(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> TrainingState:
    progress = json.loads(metadata["progress"])
    trace, best = progress["trace"], progress["best"]
    is_whole = type(progress["done"]) is int and progress["done"] == len(trace) and set(best) == set(_BEST)
    if not is_whole or not all(isinstance(entry, dict) for entry in trace):
        raise ValueError
    return TrainingState(
        num_done=progress["done"],
        deltas=_named(tensors, "delta."),
        best=_named(tensors, "best."),
        best_score=best,
        trace=trace,
        optimizer=_unflattened(json.loads(metadata["optimizer"]), _named(tensors, "optimizer.")),
    )


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flattened(value: Any, prefix: str = "") -> tuple[Any, dict[str, torch.Tensor]]:  # noqa: ANN401 - a state dict
    """Split a nested state dict into JSON with tensor references and the tensors themselves."""
    if isinstance(value, torch.Tensor):
        return {"tensor": prefix}, {prefix: value.detach().clone().contiguous()}
    if isinstance(value, dict):
        parts = {key: _flattened(item, f"{prefix}/{key}") for key, item in value.items()}
        plain = {"dict": [[key, part[0]] for key, part in parts.items()]}
        return plain, {name: tensor for part in parts.values() for name, tensor in part[1].items()}
    if isinstance(value, list | tuple):
        items = [_flattened(item, f"{prefix}/{index}") for index, item in enumerate(value)]
        plain = {"tuple" if isinstance(value, tuple) else "list": [item[0] for item in items]}
        return plain, {name: tensor for item in items for name, tensor in item[1].items()}
    return {"value": value}, {}


def _unflattened(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:  # noqa: ANN401 - a state dict
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflattened(item, tensors) for key, item in content}
    if kind in {"list", "tuple"}:
        items = [_unflattened(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content
