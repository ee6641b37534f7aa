"""How the kernels on tensor cores use shared memory."""

from __future__ import annotations

import ctypes

import pytest
import torch

from .emulation.build import emulated, load, runtime


@pytest.mark.parametrize("positions_innermost", [False, True])
def test_fragments_are_read_without_bank_conflicts(positions_innermost: bool) -> None:
    operators, counts = emulated(), (ctypes.c_uint64 * 2)()
    counter = runtime(load()).cusim_ldmatrix_counts
    grad, input = torch.ones(2, 40, 72).bfloat16(), torch.ones(2, 40, 136).bfloat16()
    if positions_innermost:
        grad, input = grad.mT.contiguous().mT, input.mT.contiguous().mT
    counter(counts)
    operators.linear_sum_grad_squared_(torch.zeros(72, 136), grad, input, 1.0, 2, False)
    counter(counts)
    matrices, wavefronts = counts
    assert matrices > 0
    assert wavefronts == matrices
