"""The guard around triton's interpreter sees each kind of bug, and none in right code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastfisher.triton import launch

from .emulation.interpreter import guarded

if not launch.INTERPRETED:
    pytest.skip("triton compiles for a device here", allow_module_level=True)


@triton.jit
def shift(out_ptr, in_ptr, to, valid, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(in_ptr + element, mask=element < valid)
    tl.store(out_ptr + element * to, values, mask=element < valid)


@triton.jit
def neighbour(values_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    after = tl.load(values_ptr + (program + 1) % tl.num_programs(0))
    tl.store(values_ptr + program, after)


@triton.jit
def count(total_ptr, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(total_ptr, 1.0, sem="relaxed")
    else:
        tl.store(total_ptr, tl.load(total_ptr) + 1)


@triton.jit
def square_index(out_ptr, factor):
    tl.store(out_ptr, factor * factor)


@triton.jit
def product(out_ptr, a_ptr, b_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def convert(out_ptr, in_ptr, DOUBLED: tl.constexpr):
    at = tl.arange(0, 16)
    values = tl.load(in_ptr + at)
    if DOUBLED:
        values = values + values
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty))


def guarded_run(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
    with guarded():
        kernel[(grid,)](*arguments, **constants)


def test_right_code_is_left_alone() -> None:
    values, out = torch.randn(100), torch.zeros(300)
    guarded_run(shift, 4, out, values, 3, 100, BLOCK=32)
    assert torch.equal(out[::3], values)
    total = torch.zeros(1)
    guarded_run(count, 5, total, ATOMIC=True)
    assert total == 5


@pytest.mark.parametrize(
    "out, to, valid, message",
    [
        (100, 1, 101, "load out of bounds by 1 lanes"),
        (99, 1, 100, "store out of bounds by 1 lanes"),
        (300, 3, 200, "load out of bounds"),
        (100, 0, 100, "lanes of program .* store to one element"),
    ],
)
def test_accesses(out: int, to: int, valid: int, message: str) -> None:
    memory = torch.zeros(out + 8)
    with pytest.raises(InterpreterError, match=message):
        guarded_run(shift, 4, memory[:out], torch.randn(108)[:100], to, valid, BLOCK=32)


def test_strides_that_span_much_are_checked_too() -> None:
    out = torch.empty(1).expand(3)
    far = torch.empty(0).set_(out.untyped_storage(), 0, (1,), (1,))
    with pytest.raises(InterpreterError, match="store out of bounds"):
        guarded_run(shift, 1, far, torch.randn(2), 1 << 24, 2, BLOCK=2)


@pytest.mark.parametrize("size", [4, 1 << 23])
def test_races_between_programs(size: int) -> None:
    with pytest.raises(InterpreterError, match="race: store of element 1, read by another"):
        guarded_run(neighbour, 4, torch.zeros(size), BLOCK=1)
    with pytest.raises(InterpreterError, match="race: load of element 0, written by another"):
        guarded_run(count, 2, torch.zeros(size), ATOMIC=False)


def test_an_index_that_overflows() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    guarded_run(square_index, 1, out, 46340)
    assert out == 46340**2
    with pytest.raises(InterpreterError, match="overflow"):
        guarded_run(square_index, 1, out, 46341)


def test_products_of_bfloat16() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.zeros(16, 16)
    guarded_run(product, 1, out, a, b, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float())


def test_products_of_tf32() -> None:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)

    a, b, out = torch.randn(16, 16), torch.randn(16, 16), torch.zeros(16, 16)
    guarded_run(product, 1, out, a, b, PRECISION="tf32")
    torch.testing.assert_close(out, cut(a) @ cut(b))
    guarded_run(product, 1, out, a, b, PRECISION="ieee")
    torch.testing.assert_close(out, a @ b)


def test_conversions_of_bfloat16() -> None:
    values = torch.tensor([1.0, 1.00390625, 1.01171875, -3.4e38, 1e-40, 0.1, 7.0, -0.0] * 2)
    rounded = torch.zeros(16, dtype=torch.bfloat16)
    guarded_run(convert, 1, rounded, values, DOUBLED=False)
    assert torch.equal(rounded.view(torch.int16), values.bfloat16().view(torch.int16))
    for dtype in (torch.float32, torch.float64):
        out = torch.zeros(16, dtype=dtype)
        guarded_run(convert, 1, out, rounded, DOUBLED=False)
        assert torch.equal(out, rounded.to(dtype))
    with pytest.raises(InterpreterError, match="has to convert to float32"):
        guarded_run(convert, 1, torch.zeros(16), rounded, DOUBLED=True)
