"""Each access of the CUDA kernels is in bounds, of written memory, and races with none."""

from __future__ import annotations

import pytest

from .emulation.build import Order, load, scheduling
from .emulation.checked import checked
from .proof.case import Case, first_small
from .proof.collection import collect


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("case", first_small(collect(), 12), ids=lambda case: case.name)
def test_nothing_is_reported(case: Case, order: Order) -> None:
    operators = checked()
    with scheduling(order, seed=5, library=load("checked")):
        case.run(operators)
