"""The CUDA kernels, compiled for the host, against the float64 oracle."""

from __future__ import annotations

import pytest

from .emulation.build import emulated
from .proof import outer, outer_simt
from .proof.case import Case

CASES = [*outer.CASES, *outer_simt.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value(case: Case) -> None:
    case.run(emulated())
