"""Cases of the outer family on tensor cores: bfloat16 operands, and float32 rounded to tf32."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops

from .case import Case
from .outer import TOLERANCE, conv_case, linear_case, relative_error

#: Largest relative error to the float64 oracle of the operands as the tensor cores read them: what
#: is left then is the rounding of float32 sums.
ROUNDED_TOLERANCE = 1e-5

_KERNEL = "outer_mma"


def round_to_tf32(tensor: Tensor) -> Tensor:
    """The nearest numbers of 10 bits of mantissa, ties away from zero, of a float32 tensor."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class _Rounded:
    """Operators that hold each result to the oracle of the rounded operands, too."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators

    @staticmethod
    def _check(out: Tensor, before: Tensor, per_sample: Tensor, alpha: float, power: int) -> None:
        exact = before.double() + alpha * per_sample.abs().pow(power).sum(0)
        error = relative_error(out, exact)
        assert error <= ROUNDED_TOLERANCE, f"relative error {error:.1e} with rounded operands"

    @staticmethod
    def _operand(tensor: Tensor, allow_tf32: bool) -> Tensor:
        return (round_to_tf32(tensor) if allow_tf32 else tensor).double()

    def linear_sum_grad_squared_(
        self, out: Tensor, grad: Tensor, input: Tensor, alpha: float, power: int, allow_tf32: bool
    ) -> None:
        before = out.clone()
        self._operators.linear_sum_grad_squared_(out, grad, input, alpha, power, allow_tf32)
        g, x = self._operand(grad, allow_tf32), self._operand(input, allow_tf32)
        self._check(out, before, ops.linear_per_sample_grad(g, x), alpha, power)

    def conv2d_sum_grad_squared_(
        self,
        out: Tensor,
        grad: Tensor,
        input: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        alpha: float,
        power: int,
        allow_tf32: bool,
    ) -> None:
        before = out.clone()
        geometry = (stride, padding, dilation, groups)
        self._operators.conv2d_sum_grad_squared_(
            out, grad, input, *geometry, alpha, power, allow_tf32
        )
        g, x = self._operand(grad, allow_tf32), self._operand(input, allow_tf32)
        kernel_size = (out.shape[2], out.shape[3])
        per_sample = ops.conv2d_per_sample_grad(g, x, kernel_size, *geometry)
        self._check(out, before, per_sample, alpha, power)


def _layout_case(name: str, precision: str, make: Callable[[Tensor], Tensor], small: bool) -> Case:
    """A linear layer whose operands `make` lays out in another way, with the same values."""

    def run(operators: Any) -> float:
        generator = torch.Generator().manual_seed(7)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        grad = make(torch.randn(3, 20, 40, generator=generator).to(dtype))
        input = make(torch.randn(3, 20, 72, generator=generator).to(dtype))
        out = torch.zeros(40, 72)
        operators.linear_sum_grad_squared_(out, grad, input, 1.0, 2, precision == "tf32")
        exact = ops.linear_per_sample_grad(grad.double(), input.double()).square().sum(0)
        error = relative_error(out, exact)
        assert error <= TOLERANCE[precision], f"relative error {error:.1e}"
        return error

    return Case(f"linear 3x20x40x72 {precision} {name}", _KERNEL, run, small)


def _shifted(elements: int) -> Callable[[Tensor], Tensor]:
    """Begins so many elements past an aligned address."""

    def make(tensor: Tensor) -> Tensor:
        memory = tensor.new_zeros(tensor.numel() + elements)
        memory[elements:] = tensor.flatten()
        return memory[elements:].view_as(tensor)

    return make


def _spread(*strides: int) -> Callable[[Tensor], Tensor]:
    """Lies with these strides of its dimensions, whatever memory that takes."""

    def make(tensor: Tensor) -> Tensor:
        size = 1 + sum((e - 1) * s for e, s in zip(tensor.shape, strides, strict=True))
        # Pages that are not written are never taken from the system, nor counted as if they were.
        no_reserve = 0x4000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        memory = mmap.mmap(-1, size * tensor.element_size(), flags=flags)
        view = torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides)
        return view.copy_(tensor)

    return make


def _repeated(tensor: Tensor) -> Tensor:
    """Every position is the first one."""
    return tensor[:, :1].expand_as(tensor)


def _empty_conv(precision: str) -> Case:
    def run(operators: Any) -> float:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        grad, input = torch.empty(0, 6, 3, 3, dtype=dtype), torch.empty(0, 4, 5, 5, dtype=dtype)
        out = torch.ones(6, 4, 3, 3)
        operators.conv2d_sum_grad_squared_(
            out, grad, input, (1, 1), (0, 0), (1, 1), 1, 1.0, 2, precision == "tf32"
        )
        assert torch.equal(out, torch.ones(6, 4, 3, 3))
        return 0.0

    return Case(f"conv 0x4x5x5->6 3x3 {precision}", _KERNEL, run, True)


def _some_channels(precision: str) -> Case:
    """A convolution of the first channels of two tensors that have more."""

    def run(operators: Any) -> float:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        generator = torch.Generator().manual_seed(3)
        grad = torch.randn(2, 6, 7, 32, generator=generator).to(dtype)[..., :20]
        input = torch.randn(2, 8, 9, 16, generator=generator).to(dtype)[..., :12]
        grad, input = grad.permute(0, 3, 1, 2), input.permute(0, 3, 1, 2)
        out = torch.zeros(20, 12, 3, 3)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        operators.conv2d_sum_grad_squared_(out, grad, input, *geometry, 1.0, 2, precision == "tf32")
        per_sample = ops.conv2d_per_sample_grad(grad.double(), input.double(), (3, 3), *geometry)
        error = relative_error(out, per_sample.square().sum(0))
        assert error <= TOLERANCE[precision], f"relative error {error:.1e}"
        return error

    return Case(f"conv of 12 and 20 channels of more {precision}", _KERNEL, run, True)


def _nan_case(precision: str) -> Case:
    """A pixel that is no number reaches the taps that read it, no others."""

    def run(operators: Any) -> float:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        generator = torch.Generator().manual_seed(5)
        grad = torch.randn(2, 24, 4, 5, generator=generator).to(dtype)
        input = torch.randn(2, 8, 6, 7, generator=generator).to(dtype)
        # No position is there for these taps to read the last line: 20 positions are not 32.
        input[:, 3, 5] = math.nan
        out = torch.zeros(24, 8, 3, 3)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        operators.conv2d_sum_grad_squared_(out, grad, input, *geometry, 1.0, 2, precision == "tf32")
        per_sample = ops.conv2d_per_sample_grad(grad.double(), input.double(), (3, 3), *geometry)
        exact = per_sample.square().sum(0)
        assert torch.equal(out.isnan(), exact.isnan())
        error = relative_error(out.nan_to_num(), exact.nan_to_num())
        assert error <= TOLERANCE[precision], f"relative error {error:.1e}"
        return error

    return Case(f"conv of a line of NaN {precision}", _KERNEL, run, True)


def _strict(case: Case) -> Case:
    return replace(case, run=lambda operators: case.run(_Rounded(operators)))


def _cases(precision: str) -> list[Case]:
    def linear(*shape: int, **options: Any) -> Case:
        n, t, o, i = shape
        return linear_case((n, t, o, i), precision, kernel=_KERNEL, **options)

    def conv(
        shape: tuple[int, int, int, int], channels: int, kernel: tuple[int, int], **options: Any
    ) -> Case:
        return conv_case(shape, channels, kernel, precision, kernel=_KERNEL, **options)

    cases = [
        linear(3, 5, 7, 9, small=True),
        linear(1, 1, 20, 30, small=True),
        linear(2, 1, 24, 40, small=True),
        linear(2, 15, 16, 8, small=True),
        linear(2, 16, 64, 64, small=True),
        linear(3, 17, 65, 72, small=True),
        linear(2, 33, 66, 31, small=True, positions_innermost=True),
        linear(1, 64, 128, 64),
        linear(4, 50, 96, 130),
        linear(5, 7, 200, 136, alpha=-1.5),
        linear(7, 31, 40, 257, power=1),
        linear(2, 40, 64, 64, positions_innermost=True, small=True),
        linear(3, 44, 72, 70, positions_innermost=True),
        linear(3, 34, 66, 129, positions_innermost=True, power=1),
        linear(2, 36, 130, 136, transposed_out=True),
        # The large tile, full and with a rest, both ways round in memory.
        linear(1, 40, 256, 128),
        linear(2, 21, 250, 253, positions_innermost=True),
        linear(0, 4, 5, 6),
        linear(2, 0, 5, 6),
        linear(2, 3, 0, 6),
        linear(2, 3, 5, 0),
        linear(33, 3, 20, 20),
        conv((2, 3, 9, 9), 13, (3, 3), padding=(1, 1), small=True),
        conv((2, 3, 9, 9), 5, (3, 3), padding=(1, 1), channels_last=True, small=True),
        conv((2, 16, 8, 8), 24, (1, 1), small=True),
        conv((2, 16, 7, 7), 24, (1, 1), small=True),
        conv((2, 8, 6, 6), 16, (3, 3), padding=(1, 1), channels_last=True, small=True),
        conv((3, 64, 14, 14), 32, (1, 1)),
        conv((2, 32, 8, 8), 72, (1, 1), channels_last=True, power=1),
        conv((2, 32, 9, 7), 40, (3, 3), padding=(1, 1)),
        conv((2, 32, 9, 7), 40, (3, 3), padding=(1, 1), channels_last=True),
        conv((2, 24, 11, 10), 33, (3, 2), stride=(2, 1), padding=(2, 0)),
        conv((2, 24, 11, 10), 32, (3, 2), stride=(2, 1), padding=(2, 0), channels_last=True),
        conv((2, 12, 13, 12), 20, (3, 3), dilation=(2, 3), padding=(0, 3)),
        conv((2, 16, 13, 12), 20, (3, 3), dilation=(3, 2), padding=(1, 0), channels_last=True),
        conv((2, 16, 9, 9), 32, (1, 1), stride=(2, 2)),
        conv((2, 16, 9, 9), 32, (1, 1), stride=(2, 2), channels_last=True),
        conv((2, 24, 8, 8), 48, (3, 3), groups=3, padding=(1, 1)),
        conv((2, 48, 8, 8), 24, (3, 3), groups=3, padding=(1, 1), channels_last=True),
        conv((2, 40, 6, 8), 36, (1, 1), groups=2),
        conv((2, 54, 7, 7), 45, (3, 3), groups=3, padding=(1, 1), channels_last=True),
        conv((1, 3, 20, 20), 16, (7, 7), stride=(2, 2), padding=(3, 3)),
        conv((2, 8, 1, 16), 8, (1, 3), padding=(0, 1)),
        conv((2, 8, 16, 1), 8, (3, 1), padding=(1, 0), channels_last=True),
        conv((2, 130, 4, 4), 132, (1, 1), power=1),
    ]
    layouts: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
        ("begins 1 late", _shifted(1), True),
        ("begins 2 late", _shifted(2), True),
        ("begins 4 late", _shifted(4), True),
        ("every second sample", _spread(3000, 72, 1), False),
        ("every third position", _spread(4320, 216, 1), False),
        ("every second feature", _spread(2880, 144, 2), True),
        ("samples past 2^31", _spread(1 << 31, 72, 1), False),
        ("positions past 2^31", _spread(80, 1 << 27, 1), False),
        ("one position repeated", _repeated, True),
        ("samples of one memory", lambda tensor: tensor[:1].expand_as(tensor), False),
    ]
    cases += [_layout_case(name, precision, make, small) for name, make, small in layouts]
    cases.append(_some_channels(precision))
    return [*map(_strict, cases), _nan_case(precision), _empty_conv(precision)]


CASES: list[Case] = [*_cases("bfloat16"), *_cases("tf32")]
