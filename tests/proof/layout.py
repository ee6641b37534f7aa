"""Where the operands of a case lie in memory, and that nothing beside them is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .outer import TOLERANCE, relative_error

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_UNTOUCHED = 7.0


@dataclass(slots=True)
class Layout:
    """How a tensor lies in memory.

    Attributes:
        order: the dimensions from the outermost to the innermost; as they come where empty.
        gap: elements between one innermost line and the next.
        step: the distance of neighbours in the innermost dimension.
        offset: elements before the first one; one makes all vector loads impossible.
        far: whether the outermost dimension's stride passes ``2**31`` elements. The host maps no
            memory that is not touched.
    """

    order: Sequence[int] = ()
    gap: int = 0
    step: int = 1
    offset: int = 0
    far: bool = False


CONTIGUOUS = Layout()


class Held:
    """Values in memory of their own, in which everything else has a known value.

    Args:
        values: what ``tensor`` holds then.
        layout: where.
    """

    def __init__(self, values: Tensor, layout: Layout = CONTIGUOUS) -> None:
        order = layout.order or range(values.dim())
        strides = [0] * values.dim()
        stride = layout.step
        for place, dim in enumerate(reversed(order)):
            strides[dim] = 2**31 + 8 if layout.far and dim == order[0] else stride
            stride = strides[dim] * max(1, values.shape[dim]) + (layout.gap if place == 0 else 0)
        reach = sum(max(0, n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        size = layout.offset + reach + 5
        self._memory: Tensor | None = None
        if not layout.far:
            memory = torch.full((size,), _UNTOUCHED, dtype=values.dtype)
            self._memory = memory
            self._others = torch.ones(size, dtype=torch.bool)
            self._others.as_strided(values.shape, strides, layout.offset).fill_(False)
        else:
            memory = torch.empty(size, dtype=values.dtype)
        self.tensor = memory.as_strided(values.shape, strides, layout.offset)
        self.tensor.copy_(values)

    def check_surroundings(self) -> None:
        """Asserts that nothing was written between and beside the values."""
        if self._memory is not None:
            assert (self._memory[self._others] == _UNTOUCHED).all(), "written outside the tensor"


def numbers(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def check(name: str, held: Held, exact: Tensor, precision: str) -> float:
    """Asserts that ``held`` has the values of ``exact``, and returns the relative error."""
    error = relative_error(held.tensor, exact)
    assert error <= TOLERANCE[precision], f"{name}: relative error {error:.1e}"
    held.check_surroundings()
    return error
