"""The CUDA kernels, compiled for the host, against the float64 oracle."""

from __future__ import annotations

from collections import Counter

import pytest

from .emulation.build import Order, emulated, scheduling
from .proof.case import Case, first_small
from .proof.collection import collect

CASES = collect()


def test_names_are_unique() -> None:
    assert max(Counter(case.name for case in CASES).values()) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value(case: Case) -> None:
    case.run(emulated())


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("case", first_small(CASES, 12), ids=lambda case: case.name)
def test_value_in_another_order(case: Case, order: Order) -> None:
    with scheduling(order, seed=11):
        case.run(emulated())
