"""Cases of the outer family: linear layers with positions, and convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops

from .case import Case

#: Largest relative error to the float64 oracle, of the largest element.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 5e-3, "tf32": 5e-3}
_DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def relative_error(out: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    if not exact.numel():
        return 0.0
    scale = float(exact.abs().max())
    difference = float((out.double() - exact).abs().max())
    return difference if scale == 0 else difference / scale


def strided(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same values with the dimensions in another order in memory, the last one innermost."""
    inverse = [order.index(i) for i in range(tensor.dim())]
    return tensor.permute(*order).contiguous().permute(*inverse)


def _numbers(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _check(out: Tensor, before: Tensor, added: Tensor, precision: str) -> float:
    error = relative_error(out, before.double() + added)
    assert error <= TOLERANCE[precision], f"relative error {error:.1e}"
    return error


def linear_case(
    shape: tuple[int, int, int, int],
    precision: str = "float32",
    *,
    power: int = 2,
    alpha: float = 0.5,
    positions_innermost: bool = False,
    transposed_out: bool = False,
    kernel: str,
    small: bool = False,
) -> Case:
    """A linear layer of ``shape`` (N, T, O, I)."""

    def run(operators: Any) -> float:
        n, t, o, i = shape
        generator = torch.Generator().manual_seed(n * 7919 + t * 104729 + o * 31 + i)
        grad, x = _numbers((n, t, o), generator), _numbers((n, t, i), generator)
        before = _numbers((o, i), generator).abs()
        dtype = _DTYPES.get(precision, torch.float32)
        out = before.to(torch.float64 if precision == "float64" else torch.float32)
        grad, x = grad.to(dtype), x.to(dtype)
        # Products of rounded operands have to be right to the last bits of the sums.
        added = ops.linear_per_sample_grad(grad.double(), x.double()).abs().pow(power).sum(0)
        if positions_innermost:
            grad, x = strided(grad, (0, 2, 1)), strided(x, (0, 2, 1))
        if transposed_out:
            out = strided(out, (1, 0))
        start = out.clone()
        operators.linear_sum_grad_squared_(
            out, grad, x, alpha, power, allow_tf32=precision == "tf32"
        )
        return _check(out, start, alpha * added, precision)

    extras = [f"|g|^{power}"] * (power != 2) + ["NCHW-like"] * positions_innermost
    name = "x".join(map(str, shape)) + f" {precision}" + "".join(f" {each}" for each in extras)
    return Case(f"linear {name}{' out^T' * transposed_out}", kernel, run, small)


def conv_case(
    shape: tuple[int, int, int, int],
    out_channels: int,
    kernel_size: tuple[int, int],
    precision: str = "float32",
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    power: int = 2,
    alpha: float = -0.25,
    channels_last: bool = False,
    kernel: str,
    small: bool = False,
) -> Case:
    """A convolution of an input of ``shape`` (N, C, H, W)."""

    def run(operators: Any) -> float:
        n, _, h, w = shape
        size = [
            (e + 2 * p - d * (k - 1) - 1) // s + 1
            for e, p, d, k, s in zip((h, w), padding, dilation, kernel_size, stride, strict=True)
        ]
        generator = torch.Generator().manual_seed(math.prod(shape) + 31 * out_channels)
        grad = _numbers((n, out_channels, *size), generator)
        x = _numbers(shape, generator)
        dtype = _DTYPES.get(precision, torch.float32)
        grad, x = grad.to(dtype), x.to(dtype)
        geometry = (stride, padding, dilation, groups)
        per_sample = ops.conv2d_per_sample_grad(grad.double(), x.double(), kernel_size, *geometry)
        added = per_sample.abs().pow(power).sum(0)
        out = torch.full(
            added.shape, 0.75, dtype=torch.float64 if precision == "float64" else torch.float32
        )
        if channels_last:
            grad, x, out = (
                each.contiguous(memory_format=torch.channels_last) for each in (grad, x, out)
            )
        start = out.clone()
        operators.conv2d_sum_grad_squared_(
            out, grad, x, *geometry, alpha, power, allow_tf32=precision == "tf32"
        )
        return _check(out, start, alpha * added, precision)

    parts = [
        f"conv {'x'.join(map(str, shape))}->{out_channels}",
        "x".join(map(str, kernel_size)),
        precision,
        f"s{stride} p{padding} d{dilation} g{groups}".replace(" ", ""),
    ]
    parts += ["NHWC"] * channels_last + [f"|g|^{power}"] * (power != 2)
    return Case(" ".join(parts), kernel, run, small)
