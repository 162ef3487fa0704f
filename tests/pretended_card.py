"""A card that is pretended on the CPU: tensors compute as ever, but say that they are on it, and never mix with others.

    with PretendedCard() as card:
        base = load_base("nano", device="cuda")         # copies every weight "to the card"

What a real card refuses is refused here with the same kind of error: an operation on tensors of which some are on the
card and some are not, NumPy's view of a tensor on the card, a random generator of the CPU. The memory is the CPU's, and
so are the numbers. A tensor is on the card if its storage is: questions about devices go through `__torch_function__`,
and every operation, those of the backward pass included, goes through `_Operations`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "Pretended GeForce"
CARD = torch.device("cuda", 0)
_MOVES = ("aten::copy_", "aten::_to_copy", "aten::to")
_TAKES_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_CPU_VIEWS = (Tensor.numpy, Tensor.__array__)


class _Generator(torch.Generator):
    """A generator that knows where it was asked for."""

    def __new__(cls, device: object = "cpu") -> Self:
        return super().__new__(cls)

    def __init__(self, device: object = "cpu") -> None:
        self.is_of_card = torch.device(device).type == "cuda"  # type: ignore[arg-type]


class _Storages:
    """Which storages are on the card. A weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def put(self, tensor: Tensor) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known[reference.cdata] = reference
        return tensor

    def hold(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self._known


class _Operations(TorchDispatchMode):
    """Refuses operations that mix, and puts what comes of tensors on the card there too."""

    def __init__(self, storages: _Storages) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        own, others = self._sorted((args, kwargs or {}))
        if own and name not in _MOVES:
            strangers = [tensor for tensor in others if tensor.ndim and not self._may_be_index(name, args, tensor)]
            if strangers:
                shapes = [list(tensor.shape) for tensor in strangers]
                raise RuntimeError(f"{name}: expected all tensors to be on the card, these are on the CPU: {shapes}")
        result = function(*args, **(kwargs or {}))
        if own and name not in _MOVES:
            for tensor in _tensors(result):
                self._storages.put(tensor)
        return result

    def _sorted(self, values: object) -> tuple[list[Tensor], list[Tensor]]:
        own, others = [], []
        for tensor in _tensors(values):
            (own if self._storages.hold(tensor) else others).append(tensor)
        return own, others

    def _may_be_index(self, name: str, args: Any, tensor: Tensor) -> bool:
        """Whether a tensor of the CPU only says which places of one on the card are meant, as torch allows."""
        return name in _TAKES_INDICES and tensor is not args[0] and self._storages.hold(args[0])


class PretendedCard(TorchFunctionMode):
    """The machine has a card while this is entered; `num_cleared` counts how often its cache was cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.num_cleared = 0
        self._storages = _Storages()
        self._open = contextlib.ExitStack()

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the card."""
        return self._storages.hold(tensor)

    def __enter__(self) -> Self:
        import pytest

        patch = self._open.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda _device=None: NAME)
        patch.setattr(torch.cuda, "empty_cache", self._clear)
        patch.setattr(torch, "Generator", _Generator)
        self._open.enter_context(_Operations(self._storages))
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._open.close()

    def _clear(self) -> None:
        self.num_cleared += 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:
            return CARD if self._storages.hold(args[0]) else torch.device("cpu")
        if function in _CPU_VIEWS and self._storages.hold(args[0]):
            raise TypeError("can't convert a tensor on the card to NumPy: copy it to the CPU first")
        if function is Tensor.cpu:
            return self._moved(args[0], torch.device("cpu"), lambda tensor: tensor)
        if function is Tensor.to:
            return self._to(args, kwargs)
        self._check_generator(args, kwargs)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type != "meta":
            result = function(*args, **(kwargs | {"device": "cpu"}))
            return self._storages.put(result) if torch.device(wanted).type == "cuda" else result
        is_of_card = function is not Tensor.copy_ and any(map(self._storages.hold, _tensors((args, kwargs))))
        result = function(*args, **kwargs)
        if is_of_card:  # what a function makes for itself inside torch, it makes where its arguments are
            for tensor in _tensors(result):
                self._storages.put(tensor)
        return result

    def _to(self, args: Any, kwargs: Any) -> Tensor:
        """Copy a tensor where it is to be, which may be where another one is."""
        like = [self._place(value) for value in args[1:] if isinstance(value, Tensor)]
        named = [torch.device(value) for value in args[1:] if isinstance(value, torch.device | str)]
        wanted = [*named, *([torch.device(kwargs["device"])] if kwargs.get("device") is not None else []), *like]
        plain = tree_map(lambda value: torch.device("cpu") if isinstance(value, torch.device) else value, args[1:])
        plain = tuple("cpu" if isinstance(value, str) else value for value in plain)
        kwargs = kwargs | ({"device": "cpu"} if kwargs.get("device") is not None else {})
        place = wanted[0] if wanted else self._place(args[0])
        return self._moved(args[0], place, lambda tensor: Tensor.to(tensor, *plain, **kwargs))

    def _place(self, tensor: Tensor) -> torch.device:
        return CARD if self._storages.hold(tensor) else torch.device("cpu")

    def _moved(self, tensor: Tensor, place: torch.device, convert: Any) -> Tensor:
        """Convert a tensor, with memory of its own where it changes its place."""
        is_there = self._storages.hold(tensor) == (place.type == "cuda")
        converted: Tensor = convert(tensor)
        if not is_there and converted.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            converted = Tensor.to(converted, copy=True)
        return self._storages.put(converted) if place.type == "cuda" else converted

    def _check_generator(self, args: Any, kwargs: Any) -> None:
        generator = kwargs.get("generator")
        if generator is None:
            return
        is_card = any(self._storages.hold(tensor) for tensor in _tensors(args))
        if is_card != getattr(generator, "is_of_card", False):
            raise RuntimeError("expected a generator of the device that the tensors are on")


def _tensors(values: object) -> Iterable[Tensor]:
    return (value for value in tree_flatten(values)[0] if isinstance(value, Tensor))
