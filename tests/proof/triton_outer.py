"""Calls that launch every shipped form of the outer family's Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

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
