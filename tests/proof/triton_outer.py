"""The outer family's Triton kernels: cases of their own, and calls that launch all their forms."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops

from .case import Case
from .outer import TOLERANCE, conv_case, linear_case, relative_error

_PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def _linear(precision: str, width: int, odd: bool) -> Callable[[Any], None]:
    def call(operators: Any) -> None:
        dtype = _PRECISIONS[precision]
        rows, columns = width + 3 * odd, width + 5 * odd
        total = torch.float64 if precision == "float64" else torch.float32
        out = torch.empty(rows, columns, dtype=total, device="meta")
        grad = torch.empty(32, 200, rows, dtype=dtype, device="meta")
        x = torch.empty(32, 200, columns, dtype=dtype, device="meta")
        operators.linear_sum_grad_squared_(out, grad, x, 0.5, 2, precision == "tf32")

    return call


def _conv(
    precision: str, channels: int, outs: int, groups: int, odd: bool, channels_last: bool
) -> Callable[[Any], None]:
    def call(operators: Any) -> None:
        dtype = _PRECISIONS[precision]
        total = torch.float64 if precision == "float64" else torch.float32
        size = 32 - 3 * odd
        memory = torch.channels_last if channels_last else torch.contiguous_format
        options: Any = {"device": "meta", "memory_format": memory}
        out = torch.empty(outs, channels // groups, 3, 3, dtype=total, **options)
        grad = torch.empty(32, outs, size, size, dtype=dtype, **options)
        x = torch.empty(32, channels, size, size, dtype=dtype, **options)
        operators.conv2d_sum_grad_squared_(
            out, grad, x, (1, 1), (1, 1), (1, 1), groups, 0.5, 2, precision == "tf32"
        )

    return call


CALLS: dict[str, Callable[[Any], None]] = {}
"""The variant's name and the call, which takes the operators and hands them meta tensors."""

for _precision, _odd in itertools.product(_PRECISIONS, (False, True)):
    _end = " odd" * _odd
    CALLS[f"linear {_precision} narrow{_end}"] = _linear(_precision, 64, _odd)
    CALLS[f"linear {_precision} wide{_end}"] = _linear(_precision, 1024, _odd)
    for _last in (False, True):
        _name = f"conv {_precision} {'NHWC' if _last else 'NCHW'}"
        _n = 67 if _odd else 64
        for _kind, _sizes in {
            "narrow": (_n, _n, 1),
            "wide": (3 * _n, 3 * _n, 1),
            "thin": (_n, 16 + _odd, 1),
            "3 channels": (3, _n, 1),
            "depthwise": (_n, _n, _n),
        }.items():
            CALLS[f"{_name} {_kind}{_end}"] = _conv(_precision, *_sizes, _odd, _last)


def _spread(shape: Sequence[int], strides: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random numbers with these strides; pages that hold none are never taken from the system."""
    elements = 1 + sum((size - 1) * each for size, each in zip(shape, strides, strict=True))
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 4 * elements, flags=flags)
    tensor = torch.frombuffer(memory, dtype=torch.float32).as_strided(shape, strides)
    return tensor.copy_(torch.randn(*shape, generator=generator))


def _far_case(name: str, grad_strides: Sequence[int], input_strides: Sequence[int]) -> Case:
    """A linear layer [3, 4, 40] x [3, 4, 24] whose operands span more than 2**31 elements."""

    def run(operators: Any) -> float:
        generator = torch.Generator().manual_seed(3)
        grad = _spread((3, 4, 40), grad_strides, generator)
        x = _spread((3, 4, 24), input_strides, generator)
        out = torch.zeros(40, 24)
        operators.linear_sum_grad_squared_(out, grad, x, 1.0)
        exact = ops.linear_per_sample_grad(grad.double(), x.double()).square().sum(0)
        error = relative_error(out, exact)
        assert error <= TOLERANCE["float32"], f"relative error {error:.1e}"
        return error

    return Case(f"linear 3x4x40x24 {name}", "outer_tile", run)


def _shifted_case(precision: str, elements: int) -> Case:
    """A linear layer whose operands begin so many elements past an aligned address."""

    def run(operators: Any) -> float:
        generator = torch.Generator().manual_seed(5)
        grad, x = (
            torch.randn(3 * 32 * 48 + elements, generator=generator)
            .to(_PRECISIONS[precision])[elements:]
            .view(3, 32, 48)
            for _ in range(2)
        )
        out = torch.ones(48, 48)
        operators.linear_sum_grad_squared_(out, grad, x, -1.0, 1)
        exact = 1 - ops.linear_per_sample_grad(grad.double(), x.double()).abs().sum(0)
        error = relative_error(out, exact)
        assert error <= TOLERANCE[precision], f"relative error {error:.1e}"
        return error

    return Case(f"linear 3x32x48x48 {precision} from element {elements}", "outer_tile", run)


def _uneven_case() -> Case:
    """A 1 x 1 convolution whose gradient has gaps between its lines, and its input none."""

    def run(operators: Any) -> float:
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(2, 12, 5, 9, generator=generator)[..., :6]
        x = torch.randn(2, 10, 5, 6, generator=generator)
        out = torch.zeros(12, 10, 1, 1)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        operators.conv2d_sum_grad_squared_(out, grad, x, *geometry, 1.0)
        per_sample = ops.conv2d_per_sample_grad(grad.double(), x.double(), (1, 1), *geometry)
        error = relative_error(out, per_sample.square().sum(0))
        assert error <= TOLERANCE["float32"], f"relative error {error:.1e}"
        return error

    return Case("conv 2x10x5x6->12 1x1 gaps between the gradient's lines", "outer_tile", run, True)


_Shape = tuple[int, int, int, int]


def _tile_linear(shape: _Shape, precision: str = "float32", **options: Any) -> Case:
    return linear_case(shape, precision, kernel="outer_tile", **options)


def _tile_conv(
    shape: _Shape, outs: int, size: tuple[int, int], precision: str = "float32", **options: Any
) -> Case:
    return conv_case(shape, outs, size, precision, kernel="outer_tile", **options)


def _groups(
    shape: _Shape, outs: int, groups: int, precision: str = "float32", **options: Any
) -> Case:
    size = options.pop("size", (3, 3))
    return conv_case(shape, outs, size, precision, groups=groups, kernel="outer_pairs", **options)


_FAR = 1 << 31
CASES: list[Case] = [
    _tile_linear((2, 1, 33, 20), small=True),
    _tile_linear((1, 130, 40, 24), small=True),
    _tile_linear((5, 7, 65, 130), power=1),
    _tile_linear((17, 3, 10, 10), alpha=-2.0, small=True),
    _tile_linear((3, 32, 144, 160)),
    _tile_linear((3, 20, 37, 70), positions_innermost=True, transposed_out=True, small=True),
    _tile_linear((0, 4, 5, 6)),
    _tile_linear((2, 0, 5, 6)),
    _tile_linear((2, 3, 0, 6)),
    _tile_linear((2, 3, 5, 0)),
    _far_case("far samples", (_FAR, 40, 1), (_FAR + 1, 24, 1)),
    _far_case("far positions", (40, _FAR, 1), (24, 1 << 30, 1)),
    _far_case("far features", (160, 40, 1 << 27), (4, 1, 1 << 28)),
    _uneven_case(),
    _shifted_case("float32", 1),
    _shifted_case("bfloat16", 3),
    _tile_conv((2, 3, 9, 10), 5, (3, 3), padding=(1, 1), small=True),
    _tile_conv((2, 3, 9, 10), 40, (5, 3), stride=(2, 3), padding=(2, 0), channels_last=True),
    _tile_conv((3, 35, 6, 5), 37, (2, 3), dilation=(2, 1), padding=(0, 2)),
    _tile_conv((2, 40, 5, 6), 33, (3, 1), padding=(1, 0), channels_last=True, power=1),
    _tile_conv((3, 20, 5, 7), 34, (1, 1), small=True),
    _tile_conv((3, 20, 5, 7), 34, (1, 1), channels_last=True),
    _tile_conv((3, 20, 5, 7), 34, (1, 1), stride=(2, 2), small=True),
    _tile_conv((2, 12, 1, 17), 16, (1, 1), stride=(1, 2), small=True),
    _tile_conv((2, 4, 6, 6), 5, (1, 1), padding=(1, 2)),
    _tile_conv((2, 32, 5, 5), 16, (3, 3), groups=2, padding=(1, 1)),
    _tile_conv((2, 24, 5, 5), 27, (3, 3), groups=3, padding=(1, 1), channels_last=True),
    _tile_conv((0, 4, 6, 6), 8, (3, 3)),
    _tile_conv((1, 16, 4, 4), 16, (4, 4), small=True),
    *(
        case
        for precision in ("float64", "bfloat16", "tf32")
        for case in (
            _tile_linear((3, 5, 7, 10), precision, small=True),
            _tile_linear((3, 1, 70, 40), precision, power=1),
            _tile_linear((2, 48, 48, 64), precision),
            _tile_conv((2, 3, 9, 10), 20, (3, 3), precision, padding=(1, 1), small=True),
            _tile_conv((2, 40, 6, 5), 36, (3, 3), precision, stride=(2, 1), channels_last=True),
            _tile_conv((2, 16, 6, 5), 32, (1, 1), precision, groups=2),
            _groups((3, 6, 7, 6), 6, 6, precision, padding=(1, 1), small=True),
            _groups((2, 8, 6, 7), 16, 4, precision, channels_last=True),
        )
    ),
    *(
        case
        for last in (False, True)
        for case in (
            _groups((2, 5, 9, 8), 5, 5, padding=(1, 1), channels_last=last, small=True),
            _groups((3, 5, 9, 8), 10, 5, stride=(2, 1), padding=(0, 2), channels_last=last),
            _groups((2, 40, 6, 6), 40, 40, padding=(1, 1), channels_last=last),
            _groups((1, 6, 6, 6), 4, 2, channels_last=last, small=True),
            _groups((9, 4, 4, 5), 4, 4, size=(2, 2), channels_last=last, small=True),
            _groups((2, 4, 9, 9), 4, 4, size=(5, 5), padding=(2, 2), channels_last=last),
            _groups((2, 6, 9, 9), 12, 3, dilation=(2, 3), channels_last=last, power=1),
            _groups((2, 6, 7, 8), 6, 6, size=(1, 1), channels_last=last, alpha=3.0),
            _groups((2, 6, 1, 70), 6, 6, size=(1, 3), padding=(0, 1), channels_last=last),
            _groups((2, 6, 20, 1), 6, 6, size=(3, 1), channels_last=last, power=1),
            _groups((2, 14, 5, 5), 14, 7, padding=(1, 1), channels_last=last, alpha=-1.0),
            _groups((3, 4, 8, 8), 28, 4, stride=(3, 2), channels_last=last),
            _groups((2, 3, 12, 13), 3, 3, size=(7, 7), padding=(3, 3), channels_last=last),
            _groups((1, 64, 3, 3), 64, 64, size=(3, 3), channels_last=last),
            _groups((0, 6, 6, 6), 6, 6, channels_last=last),
            _groups((5, 12, 4, 4), 6, 6, padding=(1, 0), channels_last=last),
            _groups((4, 2, 30, 6), 2, 2, padding=(2, 2), channels_last=last),
        )
    ),
]
"""What the cases of the CUDA kernels do not reach, for each of the Triton kernels."""
