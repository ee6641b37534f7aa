"""What the emulated channel, gather and recurrent kernels promise beside their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .emulation.build import Order, emulated, scheduling
from .proof import channel, gather, recurrent
from .proof.case import Case

CASES = [case for family in (channel, gather, recurrent) for case in family.CASES if case.small]


class _Recorded:
    """Operators that keep a copy of what their tensors are after each call."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators
        self.after: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._operators, name)

        def call(*arguments: Any, **keywords: Any) -> None:
            operator(*arguments, **keywords)
            self.after += [each.clone() for each in arguments if isinstance(each, Tensor)]

        return call


def _after(case: Case, order: Order) -> list[Tensor]:
    operators = _Recorded(emulated())
    with scheduling(order, seed=3):
        case.run(operators)
    return operators.after


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_order_of_threads(case: Case) -> None:
    first, *others = (_after(case, order) for order in ("forward", "reverse", "random"))
    assert first
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_stops_the_kernel(token: int) -> None:
    # Rows around the ones that may be written.
    memory = torch.zeros(7, 8)
    out = memory[1:6]
    index = torch.tensor([[0, token, 1]])
    with pytest.raises(RuntimeError, match="own_token"):
        emulated().embedding_sum_grad_squared_(out, torch.ones(1, 3, 8), index, -1, 1.0, 2)
    assert (memory[[0, 6]] == 0).all()
