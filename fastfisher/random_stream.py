"""Random numbers of a pass, apart from everybody else's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class RandomStream:
    """While it is entered, draws from torch's global generators do not move them for others.

    It begins where the generators are when it is first entered, and goes on where it was left.

    Args:
        tensors: whose devices' generators, beside the CPU's, are kept.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        self._own: list[Tensor] = []
        self._others: list[Tensor] = []

    def _states(self) -> list[Tensor]:
        modules = [(torch.get_device_module(device.type), device) for device in self._devices]
        return [torch.get_rng_state(), *(each.get_rng_state(device) for each, device in modules)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device.type).set_rng_state(state, device)

    def __enter__(self) -> None:
        self._others = self._states()
        if self._own:
            self._set(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = self._states()
        self._set(self._others)
