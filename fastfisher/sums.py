"""The buffers that a pass adds to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .reference import sum_dtype

# Batches whose powers are added in the sums' own precision before they go into a float64 total.
_BATCHES_PER_SUM = 32

# Entries of a buffer that an allocator takes fresh pages for.
_PAGES = 1 << 14


class Sums:
    """Sums over samples of the powers of per-sample gradients, one buffer a parameter.

    Args:
        parameters: by name. One that is taken out later has no buffer any more.
        formats: memory formats by name, shared by every group of a pass: a view that one group's
            buffer has must be there in all of them. Filled by what is asked for first.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], formats: dict[str, torch.memory_format]
    ) -> None:
        self.samples = 0
        self._parameters = parameters
        self._formats = formats
        self._batches = 0
        self._sums: dict[str, Tensor] = {}
        #: Sums of earlier batches, in float64; only where there are many batches.
        self._totals: dict[str, Tensor] = {}

    def of(self, name: str, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """The buffer that a parameter's powers are added to."""
        if name not in self._sums:
            parameter = self._parameters[name]
            shape, dtype, device = parameter.shape, sum_dtype(parameter), parameter.device
            layout = self._formats.setdefault(name, memory_format)
            if layout == torch.contiguous_format:
                self._sums[name] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                self._sums[name] = torch.empty(
                    shape, dtype=dtype, device=device, memory_format=layout
                ).zero_()
        return self._sums[name]

    def end_batch(self, samples: int) -> None:
        """To be called after every batch that had something to add."""
        self.samples += samples
        self._batches += 1
        if self._batches % _BATCHES_PER_SUM == 0:
            self._fold()

    def _fold(self) -> None:
        """Moves the float32 sums of the last batches into float64 totals.

        A float32 sum of very many batches would lose the small ones: after 10^4 additions the
        rounding errors alone reach 1e-6.
        """
        for name, value in self._sums.items():
            if value.dtype == torch.float32:
                total = self._totals.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
                total.add_(value)
                value.zero_()

    def add_to(self, buffers: Mapping[str, Tensor], factor: float) -> None:
        """Adds ``factor`` times the sums to other buffers; ends their use."""
        if self._totals:
            self._fold()
        for name in self._parameters:
            value = self._totals.pop(name, None)
            value = self.of(name) if value is None else value
            buffers[name].add_(value, alpha=factor)
            self._sums.pop(name, None)

    def finish(self, factor: float) -> dict[str, Tensor]:
        """``factor`` times the sums, contiguous, in the order of the parameters; ends their use."""
        if self._totals:
            self._fold()
        values = {}
        scratch: dict[torch.dtype, Tensor] = {}
        for name in self._parameters:
            total = self._totals.pop(name, None)
            value = self.of(name)
            if total is not None:
                value.copy_(total.mul_(factor))
            elif factor != 1.0:
                value.mul_(factor)
            values[name] = _contiguous(self._sums.pop(name), scratch)
        return values


def _contiguous(value: Tensor, scratch: dict[torch.dtype, Tensor]) -> Tensor:
    """``value``, dense in either memory format, with contiguous strides in its own memory.

    ``scratch`` is kept between calls: fresh pages for every result would cost more than the copies.
    """
    if value.is_contiguous() or value.numel() < _PAGES:
        return value.contiguous()
    buffer = scratch.get(value.dtype)
    if buffer is None or buffer.numel() < value.numel():
        buffer = scratch[value.dtype] = value.new_empty(value.numel())
    stored = value.permute(0, 2, 3, 1)
    copy = buffer[: value.numel()].view(stored.shape).copy_(stored)
    return stored.view(value.shape).copy_(copy.permute(0, 3, 1, 2))
