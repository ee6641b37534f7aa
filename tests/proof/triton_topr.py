"""Calls that launch every form of the top-R selection's Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _select(dtype: torch.dtype) -> Callable[[Any], None]:
    def call(operators: Any) -> None:
        operators.select_top([_empty(100_000, dtype=dtype)], [], 1.0, [2000])

    return call


def _zero(dtype: torch.dtype, record: bool) -> Callable[[Any], None]:
    def call(operators: Any) -> None:
        scores = [_empty(100_000, dtype=dtype)]
        chosen = (_empty(), _empty(13), _empty(98), 2000)
        operators.zero_selected_(scores, scores, [], 1.0, *chosen, record)

    return call


CALLS: dict[str, Callable[[Any], None]] = {}
"""The variant's name and the call, which takes the operators and hands them meta tensors."""

for _dtype in (torch.float32, torch.float64):
    _name = str(_dtype).removeprefix("torch.")
    CALLS[f"select {_name}"] = _select(_dtype)
    CALLS[f"zero {_name}"] = _zero(_dtype, False)
    CALLS[f"zero and record {_name}"] = _zero(_dtype, True)
