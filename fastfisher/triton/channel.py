"""Triton twins of the channel family: biases, affine norms and elementwise scales.

Each program sums over positions of one sample after another, for a block of channels, and adds the
powers of these sums. Where there are few samples, several programs share the positions of one, and
the power comes after the sum over them; where a sample has one position, nothing is summed before
the power, and samples take the place of positions. All of it goes to a workspace, whose rows are
added to the outputs in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Blocks,
    as_float,
    check,
    check_devices,
    float_bits,
    launch,
    powers,
    target_of,
    tuned,
)

# Programs that hide the latency of memory: so many for each multiprocessor, if there is work.
_PROGRAMS_PER_MULTIPROCESSOR = 8
# Below this many positions a sample's sum is not divided: its parts would have to be added too.
_POSITIONS_OF_A_PART = 64
# Where the power is taken: of each product, of a program's sum, or by the kernel that adds the
# parts of a sum.
_OF_EACH = tl.constexpr(0)
_OF_SUM = tl.constexpr(1)
_OF_PARTS = tl.constexpr(2)
_FEW_CHANNELS = 16


@triton.jit
def channel_sums(  # type: ignore[no-untyped-def]
    weight_sums_ptr,
    bias_sums_ptr,
    grad_input_ptr,
    grad_ptr,
    input_ptr,
    mean_ptr,
    scale_ptr,
    factor_ptr,
    samples,
    positions,
    channels,
    piece_samples,
    part_positions,
    grad_n,
    grad_t,
    grad_c,
    input_n,
    input_t,
    input_c,
    mean_n,
    mean_t,
    mean_c,
    scale_n,
    scale_t,
    scale_c,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A row of the workspace: sums of a piece of the samples, or of a part of one's positions."""
    dtype = grad_ptr.dtype.element_ty
    # Products of these with strides may pass 2^31.
    c = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    piece = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    valid = c < channels
    first = part * part_positions
    last = min(first + part_positions, positions)
    weight_total = tl.zeros((BLOCK_CHANNELS,), dtype)
    bias_total = tl.zeros((BLOCK_CHANNELS,), dtype)
    if grad_input_ptr is not None:
        factor = tl.load(factor_ptr + c, mask=valid, other=0.0)
    for sample in range(piece * piece_samples, min((piece + 1) * piece_samples, samples)):
        n = tl.cast(sample, tl.int64)
        weight_sum = tl.zeros((BLOCK_POSITIONS, BLOCK_CHANNELS), dtype)
        bias_sum = tl.zeros((BLOCK_POSITIONS, BLOCK_CHANNELS), dtype)
        for start in range(first, last, BLOCK_POSITIONS):
            t = start + tl.arange(0, BLOCK_POSITIONS).to(tl.int64)
            mask = (t < last)[:, None] & valid[None, :]
            at = n * grad_n + t[:, None] * grad_t + c[None, :] * grad_c
            g = tl.load(grad_ptr + at, mask=mask, other=0.0)
            if grad_input_ptr is not None:
                tl.store(grad_input_ptr + at, g * factor[None, :], mask=mask)
            if input_ptr is not None:
                at = n * input_n + t[:, None] * input_t + c[None, :] * input_c
                x = tl.load(input_ptr + at, mask=mask, other=0.0)
                if mean_ptr is not None:
                    at = n * mean_n + t[:, None] * mean_t + c[None, :] * mean_c
                    x -= tl.load(mean_ptr + at, mask=mask, other=0.0)
                if scale_ptr is not None:
                    at = n * scale_n + t[:, None] * scale_t + c[None, :] * scale_c
                    x *= tl.load(scale_ptr + at, mask=mask, other=0.0)
                product = g * x
                weight_sum += powers(product, ABSOLUTE) if POWER == _OF_EACH else product
            bias_sum += powers(g, ABSOLUTE) if POWER == _OF_EACH else g
        weight_of_sample = tl.sum(weight_sum, 0)
        bias_of_sample = tl.sum(bias_sum, 0)
        if POWER == _OF_SUM:
            weight_of_sample = powers(weight_of_sample, ABSOLUTE)
            bias_of_sample = powers(bias_of_sample, ABSOLUTE)
        weight_total += weight_of_sample
        bias_total += bias_of_sample
    row = piece * tl.num_programs(2) + part
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + row * channels + c, weight_total, mask=valid)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + row * channels + c, bias_total, mask=valid)


@triton.jit(do_not_specialize=["alpha"])
def channel_finish(  # type: ignore[no-untyped-def]
    out_ptr,
    sums_ptr,
    alpha,
    rows,
    parts,
    channels,
    out_c,
    OF_PARTS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Adds alpha times the sum of rows, or of the powers of ``rows`` sums of ``parts`` rows."""
    dtype = out_ptr.dtype.element_ty
    c = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    valid = c < channels
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & valid[None, :]
        row_sum = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype)
        for part in range(parts):
            at = (row * parts + part)[:, None] * channels + c[None, :]
            row_sum += tl.load(sums_ptr + at, mask=mask, other=0.0)
        total += powers(row_sum, ABSOLUTE) if OF_PARTS else row_sum
    at = out_ptr + c * out_c
    before = tl.load(at, mask=valid, other=0.0)
    tl.store(at, before + as_float(alpha, dtype) * tl.sum(total, 0), mask=valid)


@dataclass(frozen=True, slots=True)
class _Work:
    """How the samples and positions are divided among programs.

    Attributes:
        pieces: of the samples, each of ``piece_samples``.
        parts: of the positions of a sample, each of ``part_positions``; more than one only where a
            piece is one sample.
    """

    pieces: int
    piece_samples: int
    parts: int
    part_positions: int


def _divide(samples: int, positions: int, programs: int, block: int) -> _Work:
    """Divides work that cannot be divided by channels among so many programs, or fewer."""
    piece_samples = triton.cdiv(samples, min(samples, programs))
    pieces = triton.cdiv(samples, piece_samples)
    parts = 1
    if piece_samples == 1:
        parts = min(programs // pieces, triton.cdiv(positions, _POSITIONS_OF_A_PART))
    part_positions = triton.cdiv(triton.cdiv(positions, parts), block) * block
    return _Work(pieces, piece_samples, triton.cdiv(positions, part_positions), part_positions)


def _strides(tensor: Tensor | None, single: bool) -> tuple[int, int, int]:
    """Of samples, positions and channels; samples are the positions where there is a single one."""
    if tensor is None:
        return 0, 0, 0
    n, t, c = tensor.stride()
    return (0, n, c) if single else (n, t, c)


def channel_sum_grad_squared_(
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    input: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    grad_input: Tensor | None,
    factor: Tensor | None,
    alpha: float,
    power: int = 2,
) -> None:
    """Adds the summed squares of per-channel sums of one sample.

    ``weight[c] += alpha * sum_n (sum_t grad * (input - mean) * scale)**2`` and
    ``bias[c] += alpha * sum_n (sum_t grad)**2``.

    Args:
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        grad: ``[N, T, C]``, any strides; float32 or float64, as all the others.
        input: ``[N, T, C]``, with ``weight`` and only with it.
        mean: ``[N, T, C]``; None is zero.
        scale: ``[N, T, C]``; None is one.
        grad_input: ``[N, T, C]`` with the strides of ``grad``; becomes ``grad * factor``.
        factor: contiguous ``[C]``, with ``grad_input`` and only with it.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    op = "channel_sum_grad_squared_"
    vectors = {"weight": weight, "bias": bias, "factor": factor}
    tensors = {"input": input, "mean": mean, "scale": scale, "grad_input": grad_input}
    check_devices(op, grad=grad, **vectors, **tensors)
    dtype = str(grad.dtype).removeprefix("torch.")
    fits = grad.dim() == 3 and dtype in ("float32", "float64")
    check(op, "grad", fits, "float32 or float64 [N, T, C]")
    check(op, "weight, bias", not (weight is None and bias is None), "at least one of them")
    check(op, "input", (input is None) == (weight is None), "with weight, and only with it")
    for name, vector in vectors.items():
        fits = vector is None or (vector.dtype == grad.dtype and vector.shape == grad.shape[2:])
        check(op, name, fits, "[C] of the dtype of grad")
    for name, tensor in tensors.items():
        fits = tensor is None or (tensor.dtype == grad.dtype and tensor.shape == grad.shape)
        check(op, name, fits, "the dtype and [N, T, C] of grad")
    check(op, "factor", (factor is None) == (grad_input is None), "with grad_input, and only then")
    check(op, "factor", factor is None or factor.is_contiguous(), "a contiguous tensor")
    fits = grad_input is None or grad_input.stride() == grad.stride()
    check(op, "grad_input", fits, "the strides of grad")
    check(op, "power", power in (1, 2), "1 or 2")
    if not grad.numel():
        return

    single = grad.shape[1] == 1
    samples, positions, channels = grad.shape
    if single:
        samples, positions = 1, samples
    strides = {
        f"{name}_{dim}": stride
        for name, tensor in (("grad", grad), ("input", input), ("mean", mean), ("scale", scale))
        for dim, stride in zip("ntc", _strides(tensor, single), strict=True)
    }
    shapes = "channels" if channels > _FEW_CHANNELS else "few channels"
    if strides["grad_t"] == 1 and channels > 1:
        shapes = "positions"

    def body(blocks: Blocks, outs: Sequence[Tensor]) -> None:
        tiles = triton.cdiv(channels, blocks["BLOCK_CHANNELS"])
        programs = target_of(grad).multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
        work = _divide(samples, positions, triton.cdiv(programs, tiles), blocks["BLOCK_POSITIONS"])
        of_parts = work.parts > 1 and not single
        sums = grad.new_empty(len(outs), work.pieces * work.parts, channels)
        launch(
            channel_sums,
            (tiles, work.pieces, work.parts),
            blocks,
            grad,
            weight_sums_ptr=None if weight is None else sums[0],
            bias_sums_ptr=None if bias is None else sums[-1],
            grad_input_ptr=grad_input,
            grad_ptr=grad,
            input_ptr=input,
            mean_ptr=mean,
            scale_ptr=scale,
            factor_ptr=factor,
            samples=samples,
            positions=positions,
            channels=channels,
            piece_samples=work.piece_samples,
            part_positions=work.part_positions,
            **strides,
            POWER=_OF_EACH if single else _OF_PARTS if of_parts else _OF_SUM,
            ABSOLUTE=power == 1,
        )
        for out, out_sums in zip(outs, sums, strict=True):
            _finish(out, out_sums, alpha, work.parts if of_parts else 1, power)

    outs = [out for out in (weight, bias) if out is not None]
    tuned(channel_sums.__name__, dtype, shapes, outs, body)


def _finish(out: Tensor, sums: Tensor, alpha: float, parts: int, power: int) -> None:
    rows, channels = sums.shape

    def body(blocks: Blocks, outs: Sequence[Tensor]) -> None:
        launch(
            channel_finish,
            (triton.cdiv(channels, blocks["BLOCK_CHANNELS"]),),
            blocks,
            sums,
            out_ptr=outs[0],
            sums_ptr=sums,
            alpha=float_bits(alpha),
            rows=rows // parts,
            parts=parts,
            channels=channels,
            out_c=out.stride(0),
            OF_PARTS=parts > 1,
            ABSOLUTE=power == 1,
        )

    dtype = str(out.dtype).removeprefix("torch.")
    tuned(channel_finish.__name__, dtype, "all", [out], body)
