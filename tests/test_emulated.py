"""The CUDA kernels, compiled for the host, against the float64 oracle."""

from __future__ import annotations

import pytest

from .emulation.build import emulated
from .proof import channel, gather, outer_mma, outer_simt, recurrent, topr
from .proof.case import Case

FAMILIES = [outer_simt, outer_mma, channel, gather, recurrent, topr]
CASES = [case for family in FAMILIES for case in family.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value(case: Case) -> None:
    case.run(emulated())
