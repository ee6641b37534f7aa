"""Operators of a device for tensors of the CPU, which proof cases make wherever they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_map, tree_map_only

#: Bytes of memory from which only what a tensor shows is copied: cases with strides beyond 2^31
#: elements map memory that is mostly never touched.
LARGE = 1 << 30


class OnDevice:
    """Calls operators with copies of their tensors on a device, and copies back what they wrote.

    Copies lie as the tensors do: strides, offsets and memory that tensors share stay the same, and
    so does what lies around a view.
    """

    def __init__(self, operators: Any, device: torch.device | str, check: bool = False) -> None:
        """Args:
        operators: with the operators as attributes, such as ``torch.ops.fastfisher``.
        device: where they run.
        check: after each call, hold the operator to ``torch.library.opcheck`` with its arguments.
        """
        self._operators = operators
        self._device = torch.device(device)
        self._check = check

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(self._operators, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            copies, others = _Copies(self._device), _Copies(self._device)
            checked = tree_map(others.of, (args, kwargs)) if self._check else None
            moved, named = tree_map(copies.of, (args, kwargs))
            results = operator(*moved, **named)  # first: what it refuses is not to be checked
            if checked is not None:
                torch.library.opcheck(operator, *checked)
            written: list[Any] = []
            for position, argument in enumerate(operator._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    positional = position < len(args)
                    written.append(args[position] if positional else kwargs.get(argument.name))
            tree_map_only(Tensor, copies.back, written)
            return tree_map_only(Tensor, Tensor.cpu, results)

        return call


class _Copies:
    """The memory of tensors on another device, each piece once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: dict[int, UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        """The copy of a tensor; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        own = value.untyped_storage()
        if own.data_ptr() not in self._pieces:
            piece = UntypedStorage(own.nbytes(), device=self._device)
            self._pieces[own.data_ptr()] = piece
            if own.nbytes() <= LARGE:
                piece.copy_(own)
        copy = self._view(value)
        if own.nbytes() > LARGE:
            copy.copy_(value)
        return copy

    def back(self, tensor: Tensor) -> None:
        """Copies what is on the device now to the tensor's own memory."""
        own = tensor.untyped_storage()
        if own.nbytes() > LARGE:
            tensor.copy_(self._view(tensor))
        else:
            own.copy_(self._pieces[own.data_ptr()])

    def _view(self, tensor: Tensor) -> Tensor:
        piece = self._pieces[tensor.untyped_storage().data_ptr()]
        empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return empty.set_(piece, tensor.storage_offset(), tensor.shape, tensor.stride())
