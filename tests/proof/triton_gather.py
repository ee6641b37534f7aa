"""Cases and calls of the gather family's Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .case import Case
from .gather import ends_in_padding, gather_case, one_token

# On both sides of the interpreter's pieces of 16 positions, and of the pairs of them that a program
# looks at in one go when it adds up a token.
CASES: list[Case] = [
    gather_case((samples, positions, 5), tokens, kernel="gather_spans", vocabulary=4, small=True)
    for samples, positions in ((1, 17), (2, 16), (3, 16), (1, 49), (2, 31))
    for tokens in (one_token, ends_in_padding)
]


def _embedding(dtype: torch.dtype, odd: bool) -> Callable[[Any], None]:
    def call(operators: Any) -> None:
        columns = 768 + odd
        out = torch.empty(30_000, columns, dtype=dtype, device="meta")
        grad = torch.empty(32, 128, columns, dtype=dtype, device="meta")
        index = torch.empty(32, 128, dtype=torch.int64, device="meta")
        operators.embedding_sum_grad_squared_(out, grad, index, 0, 0.5)

    return call


CALLS: dict[str, Callable[[Any], None]] = {
    f"embedding {str(dtype).removeprefix('torch.')}{' odd' * odd}": _embedding(dtype, odd)
    for dtype, odd in itertools.product((torch.float32, torch.float64), (False, True))
}
"""The variant's name and the call, which takes the operators and hands them meta tensors."""
