"""What nvcc makes of the CUDA kernels, run in a simulator, against the float64 oracle."""

from __future__ import annotations

import pytest

from .emulation.ptx import CompilerMissing, ReplayedOperators, replayed
from .proof.case import Case, first_small
from .proof.collection import collect


@pytest.fixture(scope="module")
def operators() -> ReplayedOperators:
    try:
        return replayed()
    except CompilerMissing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", first_small(collect(), 4), ids=lambda case: case.name)
def test_compiled_code(case: Case, operators: ReplayedOperators) -> None:
    operators.launches.clear()
    case.run(operators)
    assert operators.launches
