"""Calls that launch every shipped form of the channel family's Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch


def _norm(dtype: torch.dtype, channels: int, odd: bool, positions_first: bool) -> Any:
    """An affine norm whose statistics are each position's own, with the gradient of its input."""

    def call(operators: Any) -> None:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        c, t = channels + odd, 196 + odd
        lines = empty(32, t, c) if positions_first else empty(32, c, t).mT
        statistic = empty(32, t, 1).expand_as(lines)
        operators.channel_sum_grad_squared_(
            empty(c), empty(c), lines, lines, statistic, statistic, lines, empty(c), 0.5
        )

    return call


def _bias(dtype: torch.dtype, positions: int, odd: bool) -> Any:
    def call(operators: Any) -> None:
        channels = 512 + odd
        grad = torch.empty(64, positions, channels, dtype=dtype, device="meta")
        bias = torch.empty(channels, dtype=dtype, device="meta")
        operators.channel_sum_grad_squared_(None, bias, grad, None, None, None, None, None, 0.5)

    return call


def _scale(dtype: torch.dtype, odd: bool) -> Any:
    """Few samples, whose positions several programs share."""

    def call(operators: Any) -> None:
        channels = 64 + odd
        grad = torch.empty(2, 4096, channels, dtype=dtype, device="meta")
        weight = torch.empty(channels, dtype=dtype, device="meta")
        operators.channel_sum_grad_squared_(weight, None, grad, grad, None, None, None, None, 0.5)

    return call


CALLS: dict[str, Callable[[Any], None]] = {}
"""The variant's name and the call, which takes the operators and hands them meta tensors."""

for _dtype, _odd in itertools.product((torch.float32, torch.float64), (False, True)):
    _name = f"{str(_dtype).removeprefix('torch.')}{{}}{' odd' * _odd}".format
    CALLS["norm " + _name(" channels innermost")] = _norm(_dtype, 768, _odd, True)
    CALLS["norm " + _name(" few channels")] = _norm(_dtype, 12, _odd, True)
    CALLS["norm " + _name(" positions innermost")] = _norm(_dtype, 64, _odd, False)
    CALLS["bias " + _name(" one position")] = _bias(_dtype, 1, _odd)
    CALLS["bias " + _name("")] = _bias(_dtype, 196, _odd)
    CALLS["scale " + _name(" few samples")] = _scale(_dtype, _odd)
