"""The device that torch computes on: the CPU or an NVIDIA card. Both use fp32, and a result names its device.

Weights, activations, gradients, delta = z - 1 and the optimizer's state are fp32, and products on a card are not
rounded to TF32: docs/decisions/0023 says why there is no bf16 (but for a step inside torch's Muon, on both). The basis
is computed on the CPU, in float64. Torch is loaded when a device is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..cores import cpu_name
from ..errors import IdentityError

if TYPE_CHECKING:
    import torch

    from ..cores import TorchDevice

_INSTEAD = "or take the CPU (--device cpu, in a recipe model.device)"


def open_device(name: TorchDevice) -> torch.device:
    """Return torch's device of that name, ready for fp32; `IdentityError` where torch finds no such device here."""
    import torch

    if name == "cpu":
        return torch.device("cpu")
    if not torch.backends.cuda.is_built():
        raise IdentityError(
            f"device cuda: this torch ({torch.__version__}) was built without CUDA; install one that was "
            f"(https://pytorch.org/get-started), {_INSTEAD}"
        )
    if not torch.cuda.is_available():
        raise IdentityError(
            f"device cuda: torch ({torch.__version__}) finds no NVIDIA card here that it can use; check nvidia-smi and "
            f"CUDA_VISIBLE_DEVICES, {_INSTEAD}"
        )
    torch.set_float32_matmul_precision("highest")  # an environment variable may have allowed TF32
    return torch.device("cuda")


def made_on(device: torch.device) -> dict[str, Any]:
    """Say where and how numbers are made on `device`: its kind and name, the dtype, and torch's version."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": device.type, "name": name, "dtype": "float32", "torch": torch.__version__}


def place_of(device: torch.device) -> str:
    """Name the device on which a computation must continue: "cpu", or the card: each sums in its own order."""
    return device.type if device.type == "cpu" else f"{device.type} ({made_on(device)['name']})"


def clear_cache(device: torch.device) -> None:
    """Free the memory of a card that torch caches for later tensors; does nothing on the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
