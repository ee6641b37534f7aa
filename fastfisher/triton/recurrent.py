"""Triton twins of the time steps of recurrent layers: all but the matrix products.

Exponentials are computed here and not by the GPU's approximate instruction, whose relative error
grows with the argument.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import check, check_devices, choices, launch, target_of

_LOG2_E = tl.constexpr(1 / math.log(2))
# ln(2) in two parts: a product of the high one with an exponent is exact.
_LN2_HIGH_FLOAT = tl.constexpr(float.fromhex("0x1.63p-1"))
_LN2_LOW_FLOAT = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_LN2_HIGH_DOUBLE = tl.constexpr(float.fromhex("0x1.62e42feep-1"))
_LN2_LOW_DOUBLE = tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))
# The last term of the series that counts, for arguments up to ln(2) / 2.
_TERMS_FLOAT = tl.constexpr(7)
_TERMS_DOUBLE = tl.constexpr(14)
# exp(-x) is a normal number up to here.
_LIMIT_FLOAT = tl.constexpr(87.336)
_LIMIT_DOUBLE = tl.constexpr(708.396)
# From here on a hyperbolic tangent rounds to one.
_TANH_LIMIT = tl.constexpr(22.5)


@triton.constexpr_function
def _coefficient(k: int) -> float:
    return 1 / math.factorial(k)


@triton.jit
def _split_exp(x):  # type: ignore[no-untyped-def]
    """A power of two ``scale`` and ``rest`` with exp(x) = scale * (1 + rest), x normal and <= 0."""
    exponent = tl.floor(x * _LOG2_E + 0.5)
    # NaN has no integer; it comes out in `rest`.
    whole = tl.where(x == x, exponent, 0.0).to(tl.int32)
    if x.dtype == tl.float32:
        scale = ((whole + 127) << 23).to(tl.float32, bitcast=True)
        r = x - exponent * _LN2_HIGH_FLOAT - exponent * _LN2_LOW_FLOAT
    else:
        scale = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        r = x - exponent * _LN2_HIGH_DOUBLE - exponent * _LN2_LOW_DOUBLE
    terms: tl.constexpr = _TERMS_FLOAT if x.dtype == tl.float32 else _TERMS_DOUBLE
    series = tl.zeros_like(x) + _coefficient(terms)
    for i in tl.static_range(terms - 2):
        series = series * r + _coefficient(terms - 1 - i)
    return scale, series * (r * r) + r


@triton.jit
def _quotient(a, b):  # type: ignore[no-untyped-def]
    """Rounded to nearest, which a float32 division here is not by itself."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """``1 / (1 + exp(-x))``, 0 where that is no normal number."""
    limit: tl.constexpr = _LIMIT_FLOAT if x.dtype == tl.float32 else _LIMIT_DOUBLE
    z = -tl.abs(x)
    small = z < -limit
    scale, rest = _split_exp(tl.where(small, -limit, z))
    e = tl.where(small, 0.0, scale * rest + scale)
    return _quotient(tl.where(x < 0, e, 1.0), e + 1.0)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    z = -2.0 * tl.abs(x)
    scale, rest = _split_exp(tl.where(z < -2 * _TANH_LIMIT, -2 * _TANH_LIMIT, z))
    less_one = scale * rest + (scale - 1.0)
    return _quotient(tl.where(x < 0, less_one, -less_one), less_one + 2.0)


@triton.jit
def _tile(rows, units, BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows and units, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)[None, :]
    return row, unit, (row < rows) & (unit < units)


@triton.jit
def _sum(a_ptr, a_row, b_ptr, b_row, row, unit, valid, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of two optional operands."""
    total = tl.zeros(valid.shape, dtype)
    if a_ptr is not None:
        total += tl.load(a_ptr + row * a_row + unit, mask=valid, other=0.0)
    if b_ptr is not None:
        total += tl.load(b_ptr + row * b_row + unit, mask=valid, other=0.0)
    return total


@triton.jit
def _biased(at, bias_ptr, gate: tl.constexpr, unit, units, valid):  # type: ignore[no-untyped-def]
    value = tl.load(at + gate * units, mask=valid, other=0.0)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + gate * units + unit, mask=valid, other=0.0)
    return value


@triton.jit
def lstm_step(  # type: ignore[no-untyped-def]
    gates_ptr,
    bias_ptr,
    cell_ptr,
    next_cell_ptr,
    hidden_ptr,
    rows,
    units,
    gates_row,
    cell_row,
    next_cell_row,
    hidden_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Gates after activation, next cell and hidden state."""
    row, unit, valid = _tile(rows, units, BLOCK_ROWS, BLOCK_UNITS)
    gates = gates_ptr + row * gates_row + unit
    i = _sigmoid(_biased(gates, bias_ptr, 0, unit, units, valid))
    f = _sigmoid(_biased(gates, bias_ptr, 1, unit, units, valid))
    g = _tanh(_biased(gates, bias_ptr, 2, unit, units, valid))
    o = _sigmoid(_biased(gates, bias_ptr, 3, unit, units, valid))
    before = tl.load(cell_ptr + row * cell_row + unit, mask=valid, other=0.0)
    cell = f * before + i * g
    tl.store(gates, i, mask=valid)
    tl.store(gates + units, f, mask=valid)
    tl.store(gates + 2 * units, g, mask=valid)
    tl.store(gates + 3 * units, o, mask=valid)
    tl.store(next_cell_ptr + row * next_cell_row + unit, cell, mask=valid)
    tl.store(hidden_ptr + row * hidden_row + unit, o * _tanh(cell), mask=valid)


@triton.jit
def lstm_step_backward(  # type: ignore[no-untyped-def]
    grad_gates_ptr,
    grad_cell_ptr,
    grad_output_ptr,
    grad_hidden_ptr,
    gates_ptr,
    cell_ptr,
    next_cell_ptr,
    rows,
    units,
    grad_gates_row,
    grad_cell_row,
    grad_output_row,
    grad_hidden_row,
    gates_row,
    cell_row,
    next_cell_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Gradients at the gates before activation and at the previous cell."""
    row, unit, valid = _tile(rows, units, BLOCK_ROWS, BLOCK_UNITS)
    gates = gates_ptr + row * gates_row + unit
    i = tl.load(gates, mask=valid, other=0.0)
    f = tl.load(gates + units, mask=valid, other=0.0)
    g = tl.load(gates + 2 * units, mask=valid, other=0.0)
    o = tl.load(gates + 3 * units, mask=valid, other=0.0)
    cell = tl.load(cell_ptr + row * cell_row + unit, mask=valid, other=0.0)
    squashed = _tanh(tl.load(next_cell_ptr + row * next_cell_row + unit, mask=valid, other=0.0))
    grad = _sum(
        grad_output_ptr, grad_output_row, grad_hidden_ptr, grad_hidden_row,
        row, unit, valid, gates_ptr.dtype.element_ty,
    )  # fmt: skip
    grad_cell = grad_cell_ptr + row * grad_cell_row + unit
    d = tl.load(grad_cell, mask=valid, other=0.0) + grad * o * (1.0 - squashed * squashed)
    to = grad_gates_ptr + row * grad_gates_row + unit
    tl.store(to, d * g * (i * (1.0 - i)), mask=valid)
    tl.store(to + units, d * cell * (f * (1.0 - f)), mask=valid)
    tl.store(to + 2 * units, d * i * (1.0 - g * g), mask=valid)
    tl.store(to + 3 * units, grad * squashed * (o * (1.0 - o)), mask=valid)
    tl.store(grad_cell, d * f, mask=valid)


@triton.jit
def gru_step(  # type: ignore[no-untyped-def]
    gates_ptr,
    product_ptr,
    bias_ptr,
    hidden_ptr,
    candidate_ptr,
    next_hidden_ptr,
    rows,
    units,
    gates_row,
    product_row,
    hidden_row,
    candidate_row,
    next_hidden_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Gates after activation, the hidden state's share of the candidates, next hidden state."""
    row, unit, valid = _tile(rows, units, BLOCK_ROWS, BLOCK_UNITS)
    gates = gates_ptr + row * gates_row + unit
    product = product_ptr + row * product_row + unit
    at_r = tl.load(gates, mask=valid, other=0.0)
    at_z = tl.load(gates + units, mask=valid, other=0.0)
    at_fresh = tl.load(gates + 2 * units, mask=valid, other=0.0)
    r = _sigmoid(at_r + _biased(product, bias_ptr, 0, unit, units, valid))
    z = _sigmoid(at_z + _biased(product, bias_ptr, 1, unit, units, valid))
    candidate = _biased(product, bias_ptr, 2, unit, units, valid)
    fresh = _tanh(at_fresh + r * candidate)
    hidden = tl.load(hidden_ptr + row * hidden_row + unit, mask=valid, other=0.0)
    tl.store(gates, r, mask=valid)
    tl.store(gates + units, z, mask=valid)
    tl.store(gates + 2 * units, fresh, mask=valid)
    tl.store(candidate_ptr + row * candidate_row + unit, candidate, mask=valid)
    tl.store(next_hidden_ptr + row * next_hidden_row + unit, fresh + z * (hidden - fresh), valid)


@triton.jit
def gru_step_backward(  # type: ignore[no-untyped-def]
    grad_gates_ptr,
    grad_product_ptr,
    grad_hidden_ptr,
    grad_output_ptr,
    gates_ptr,
    candidate_ptr,
    hidden_ptr,
    rows,
    units,
    grad_gates_row,
    grad_product_row,
    grad_hidden_row,
    grad_output_row,
    gates_row,
    candidate_row,
    hidden_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Gradients at both shares of the gates, and at the previous hidden state."""
    row, unit, valid = _tile(rows, units, BLOCK_ROWS, BLOCK_UNITS)
    gates = gates_ptr + row * gates_row + unit
    r = tl.load(gates, mask=valid, other=0.0)
    z = tl.load(gates + units, mask=valid, other=0.0)
    fresh = tl.load(gates + 2 * units, mask=valid, other=0.0)
    candidate = tl.load(candidate_ptr + row * candidate_row + unit, mask=valid, other=0.0)
    hidden = tl.load(hidden_ptr + row * hidden_row + unit, mask=valid, other=0.0)
    grad = _sum(
        grad_output_ptr, grad_output_row, grad_hidden_ptr, grad_hidden_row,
        row, unit, valid, gates_ptr.dtype.element_ty,
    )  # fmt: skip
    grad_fresh = grad * (1.0 - z) * (1.0 - fresh * fresh)
    grad_r = grad_fresh * candidate * (r * (1.0 - r))
    grad_z = grad * (hidden - fresh) * (z * (1.0 - z))
    for_gates = grad_gates_ptr + row * grad_gates_row + unit
    tl.store(for_gates, grad_r, mask=valid)
    tl.store(for_gates + units, grad_z, mask=valid)
    tl.store(for_gates + 2 * units, grad_fresh, mask=valid)
    for_product = grad_product_ptr + row * grad_product_row + unit
    tl.store(for_product, grad_r, mask=valid)
    tl.store(for_product + units, grad_z, mask=valid)
    tl.store(for_product + 2 * units, grad_fresh * r, mask=valid)
    tl.store(grad_hidden_ptr + row * grad_hidden_row + unit, grad * z, mask=valid)


def _run(
    op: str, kernel: Any, gates: int, bias: Tensor | None, state: str, /, **matrices: Tensor | None
) -> None:
    """Checks the arguments of a step and launches its kernel.

    Args:
        op: the operator's name.
        kernel: has a parameter ``x_ptr`` and a parameter ``x_row`` for each matrix.
        gates: how many there are; matrices named after them have so many times the units.
        bias: of the gates, or None.
        state: the name of the matrix that has a column for each unit and a row for each sample.
        matrices: all of them; None for one that is not given.
    """
    check_devices(op, bias=bias, **matrices)
    like = matrices[state]
    assert like is not None
    dtype = str(like.dtype).removeprefix("torch.")
    fits = like.dim() == 2 and dtype in ("float32", "float64")
    check(op, state, fits, "float32 or float64 [N, H]")
    rows, units = like.shape
    for name, matrix in matrices.items():
        wide = name.removeprefix("grad_") in ("gates", "product")
        columns = gates * units if wide else units
        fits = matrix is None or (
            matrix.dtype == like.dtype
            and matrix.shape == (rows, columns)
            and (columns < 2 or matrix.stride(1) == 1)
        )
        expected = f"the rows and the dtype of the state, and {columns} contiguous columns"
        check(op, name, fits, expected)
    fits = bias is None or (
        bias.dtype == like.dtype and bias.shape == (gates * units,) and bias.is_contiguous()
    )
    check(op, "bias", fits, f"contiguous [{gates * units}] of the dtype of the state")
    if not like.numel():
        return
    pointers = {f"{name}_ptr": matrix for name, matrix in matrices.items()}
    strides = {
        f"{name}_row": 0 if matrix is None else matrix.stride(0)
        for name, matrix in matrices.items()
    }
    if "bias_ptr" in kernel.arg_names:
        pointers["bias_ptr"] = bias
    blocks = choices(kernel.__name__, target_of(like), dtype, "all")[0]
    grid = triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(units, blocks["BLOCK_UNITS"])
    launch(kernel, grid, blocks, like, **pointers, **strides, rows=rows, units=units)


def lstm_step_(
    gates: Tensor, bias: Tensor | None, cell: Tensor, next_cell: Tensor, hidden: Tensor
) -> None:
    """See :func:`fastfisher.ops.lstm_step_`.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    _run(
        "lstm_step_",
        lstm_step,
        4,
        bias,
        "cell",
        gates=gates,
        cell=cell,
        next_cell=next_cell,
        hidden=hidden,
    )


def lstm_step_backward_(
    grad_gates: Tensor,
    grad_cell: Tensor,
    grad_output: Tensor | None,
    grad_hidden: Tensor | None,
    gates: Tensor,
    cell: Tensor,
    next_cell: Tensor,
) -> None:
    """See :func:`fastfisher.ops.lstm_step_backward_`.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    _run(
        "lstm_step_backward_",
        lstm_step_backward,
        4,
        None,
        "cell",
        grad_gates=grad_gates,
        grad_cell=grad_cell,
        grad_output=grad_output,
        grad_hidden=grad_hidden,
        gates=gates,
        cell=cell,
        next_cell=next_cell,
    )


def gru_step_(
    gates: Tensor,
    product: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    candidate: Tensor,
    next_hidden: Tensor,
) -> None:
    """See :func:`fastfisher.ops.gru_step_`.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    _run(
        "gru_step_",
        gru_step,
        3,
        bias,
        "hidden",
        gates=gates,
        product=product,
        hidden=hidden,
        candidate=candidate,
        next_hidden=next_hidden,
    )


def gru_step_backward_(
    grad_gates: Tensor,
    grad_product: Tensor,
    grad_hidden: Tensor,
    grad_output: Tensor | None,
    gates: Tensor,
    candidate: Tensor,
    hidden: Tensor,
) -> None:
    """See :func:`fastfisher.ops.gru_step_backward_`.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    _run(
        "gru_step_backward_",
        gru_step_backward,
        3,
        None,
        "hidden",
        grad_gates=grad_gates,
        grad_product=grad_product,
        grad_hidden=grad_hidden,
        grad_output=grad_output,
        gates=gates,
        candidate=candidate,
        hidden=hidden,
    )
