"""Cases and calls of the recurrent steps' Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .case import Case
from .recurrent import step_case

_OPERANDS: dict[str, dict[str, bool]] = {
    "lstm_step": {"bias": True},
    "lstm_step_backward": {"output": True, "state": True, "in_place": True},
    "gru_step": {"bias": True},
    "gru_step_backward": {"output": True, "in_place": True},
}
# On both sides of the interpreter's tiles of 4 rows and 32 units.
CASES: list[Case] = [
    step_case(kernel, rows, units, precision=precision, small=units < 40, **operands)
    for kernel, operands in _OPERANDS.items()
    for precision, sizes in {
        "float32": itertools.product((1, 4, 5, 9), (31, 32, 34, 64, 65)),
        "float64": itertools.product((3, 5), (16, 33, 70)),
    }.items()
    for rows, units in sizes
]


def _steps(dtype: torch.dtype, odd: bool) -> Callable[[Any], None]:
    def call(operators: Any) -> None:
        units = 256 + odd

        def state(gates: int = 1) -> torch.Tensor:
            return torch.empty(64, gates * units, dtype=dtype, device="meta")

        bias = torch.empty(12 * units, dtype=dtype, device="meta")
        cell = state()
        operators.lstm_step_(state(4), bias[: 4 * units], cell, cell, cell)
        operators.lstm_step_backward_(state(4), cell, cell, cell, state(4), cell, cell)
        operators.gru_step_(state(3), state(3), bias[: 3 * units], cell, cell, cell)
        operators.gru_step_backward_(state(3), state(3), cell, cell, state(3), cell, cell)

    return call


CALLS: dict[str, Callable[[Any], None]] = {
    f"steps {str(dtype).removeprefix('torch.')}{' odd' * odd}": _steps(dtype, odd)
    for dtype, odd in itertools.product((torch.float32, torch.float64), (False, True))
}
"""The variant's name and the call, which takes the operators and hands them meta tensors."""
