"""Triton twins of the outer family: linear layers with positions, and convolutions.

``out += alpha * sum_n (sum_t grad[n, t, row] * input[n, t, column])**2``: a program holds one tile
of a sample's gradient in registers, squares it and adds it to its sum over samples. Convolutions
are implicit matrix products: a column is a channel and a tap (a place in the convolution's kernel),
a position's input is found from both, and nothing is unfolded. Where there are few tiles, the
samples are divided among programs, whose sums a second kernel adds in order: no atomics, and the
same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ops import _OPERANDS, _are_operands
from .launch import (
    Blocks,
    Target,
    as_float,
    check,
    check_devices,
    float_bits,
    launch,
    powers,
    target_of,
    tuned,
)

# Samples are divided until each multiprocessor has this many programs.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# Groups of fewer rows than this waste most of a tile of a matrix product.
_ROWS_OF_A_TILE = 8
# A tile is of one tap, unless tiles of many taps together are this much fewer.
_TILES_BY_TAP = 1.25

# Whose values change nothing worth a compilation of its own.
_ANY_VALUE = [
    "alpha",
    *("samples", "part_samples", "out_width", "height", "width", "sums_part"),
    *("step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
]


@triton.jit
def _add(at, sums, valid, alpha, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores a part's sums, or adds them to the result where there is but one part."""
    if PARTS:
        tl.store(at, sums, mask=valid)
    else:
        factor = as_float(alpha, sums.dtype)
        tl.store(at, tl.load(at, mask=valid, other=0.0) + factor * sums, mask=valid)


@triton.jit(do_not_specialize=_ANY_VALUE)
def outer_tile(  # type: ignore[no-untyped-def]
    sums_ptr,
    grad_ptr,
    input_ptr,
    alpha,
    samples,
    part_samples,
    rows,
    columns,
    taps,
    kernel_width,
    positions,
    out_width,
    height,
    width,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    input_n,
    input_c,
    input_h,
    input_w,
    sums_part,
    sums_o,
    sums_c,
    sums_h,
    sums_w,
    LINEAR: tl.constexpr,
    EVEN_GRAD: tl.constexpr,
    BY_TAP: tl.constexpr,
    PARTS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """One tile of rows and columns of one group, for one part of the samples."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    if BY_TAP:
        column_tiles = tl.cdiv(columns, BLOCK_COLUMNS) * taps
    else:
        column_tiles = tl.cdiv(columns * taps, BLOCK_COLUMNS)
    program = tl.program_id(0)
    part = tl.program_id(1)
    column_tile = program // row_tiles % column_tiles
    group = program // row_tiles // column_tiles

    row = program % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if BY_TAP:
        column = column_tile // taps * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        tap = tl.full((1,), column_tile % taps, tl.int32)
        column_valid = column < columns
    else:
        flat = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column = flat % columns
        tap = flat // columns
        column_valid = flat < columns * taps
    row_valid = row < rows
    line = tap // kernel_width
    place = tap % kernel_width
    # Where the tap's input begins; what is left of it depends on the position only.
    first_h = line * dilation_h - pad_h
    first_w = place * dilation_w - pad_w
    channel = group * rows + row
    grad_offset = channel.to(INDEX) * grad_c
    input_offset = (group * columns + column).to(INDEX) * input_c
    if not LINEAR:
        input_offset += first_h.to(INDEX) * input_h + first_w.to(INDEX) * input_w

    dtype = sums_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)
    first = part * part_samples
    for n in range(first, min(first + part_samples, samples)):
        sample = tl.cast(n, tl.int64)
        grads = grad_ptr + sample * grad_n
        inputs = input_ptr + sample * input_n
        sample_grad = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)
        for start in range(0, positions, BLOCK_POSITIONS):
            t = start + tl.arange(0, BLOCK_POSITIONS)
            t_valid = t < positions
            if LINEAR:
                grad_at = t.to(INDEX) * grad_w
                input_at = t.to(INDEX) * input_w
                valid = t_valid[:, None] & column_valid[None, :]
            else:
                h = t // out_width
                w = t % out_width
                if EVEN_GRAD:
                    grad_at = t.to(INDEX) * grad_w
                else:
                    grad_at = h.to(INDEX) * grad_h + w.to(INDEX) * grad_w
                h *= step_h
                w *= step_w
                input_at = h.to(INDEX) * input_h + w.to(INDEX) * input_w
                at_h = h[:, None] + first_h[None, :]
                at_w = w[:, None] + first_w[None, :]
                inside = (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
                valid = inside & t_valid[:, None] & column_valid[None, :]
            g = tl.load(
                grads + (grad_offset[:, None] + grad_at[None, :]),
                mask=row_valid[:, None] & t_valid[None, :],
                other=0.0,
            )
            x = tl.load(inputs + (input_offset[None, :] + input_at[:, None]), mask=valid, other=0.0)
            sample_grad = tl.dot(g, x, sample_grad, input_precision=PRECISION, out_dtype=dtype)
        sums += powers(sample_grad, ABSOLUTE)

    at = sums_ptr + part.to(tl.int64) * sums_part + channel.to(tl.int64)[:, None] * sums_o
    of_tap = line.to(tl.int64) * sums_h + place.to(tl.int64) * sums_w
    at += (column.to(tl.int64) * sums_c + of_tap)[None, :]
    _add(at, sums, row_valid[:, None] & column_valid[None, :], alpha, PARTS)


@triton.jit(do_not_specialize=_ANY_VALUE)
def outer_pairs(  # type: ignore[no-untyped-def]
    sums_ptr,
    grad_ptr,
    input_ptr,
    alpha,
    samples,
    part_samples,
    pairs,
    rows,
    columns,
    taps,
    kernel_width,
    positions,
    out_width,
    height,
    width,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    input_n,
    input_c,
    input_h,
    input_w,
    sums_part,
    sums_o,
    sums_c,
    sums_h,
    sums_w,
    EVEN_GRAD: tl.constexpr,
    PARTS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Pairs of a row and a column of small groups, with some taps, for one part of the samples."""
    tap_tiles = tl.cdiv(taps, BLOCK_TAPS)
    part = tl.program_id(1)
    tap = tl.program_id(0) % tap_tiles * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    pair = tl.program_id(0) // tap_tiles * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    channel = pair // columns
    column = pair % columns
    line = tap // kernel_width
    place = tap % kernel_width
    pair_valid = pair < pairs
    tap_valid = tap < taps
    first_h = line * dilation_h - pad_h
    first_w = place * dilation_w - pad_w
    grad_offset = channel.to(INDEX) * grad_c
    input_offset = (channel // rows * columns + column).to(INDEX) * input_c
    tap_input = first_h.to(INDEX) * input_h + first_w.to(INDEX) * input_w
    tap_input = tap_input[:, None] + input_offset[None, :]

    dtype = sums_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_TAPS, BLOCK_PAIRS), dtype)
    first = part * part_samples
    for n in range(first, min(first + part_samples, samples)):
        sample = tl.cast(n, tl.int64)
        grads = grad_ptr + sample * grad_n
        inputs = input_ptr + sample * input_n
        products = tl.zeros((BLOCK_TAPS, BLOCK_PAIRS, BLOCK_POSITIONS), dtype)
        for start in range(0, positions, BLOCK_POSITIONS):
            t = start + tl.arange(0, BLOCK_POSITIONS)
            t_valid = t < positions
            h = t // out_width
            w = t % out_width
            if EVEN_GRAD:
                grad_at = t.to(INDEX) * grad_w
            else:
                grad_at = h.to(INDEX) * grad_h + w.to(INDEX) * grad_w
            h *= step_h
            w *= step_w
            input_at = h.to(INDEX) * input_h + w.to(INDEX) * input_w
            at_h = first_h[:, None] + h[None, :]
            at_w = first_w[:, None] + w[None, :]
            inside = (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
            inside &= tap_valid[:, None] & t_valid[None, :]
            g = tl.load(
                grads + (grad_offset[:, None] + grad_at[None, :]),
                mask=pair_valid[:, None] & t_valid[None, :],
                other=0.0,
            )
            x = tl.load(
                inputs + (tap_input[:, :, None] + input_at[None, None, :]),
                mask=inside[:, None, :] & pair_valid[None, :, None],
                other=0.0,
            )
            products += g.to(dtype)[None, :, :] * x.to(dtype)
        sums += powers(tl.sum(products, 2), ABSOLUTE)

    at = sums_ptr + part.to(tl.int64) * sums_part
    at += (line.to(tl.int64) * sums_h + place.to(tl.int64) * sums_w)[:, None]
    at += (channel.to(tl.int64) * sums_o + column.to(tl.int64) * sums_c)[None, :]
    _add(at, sums, tap_valid[:, None] & pair_valid[None, :], alpha, PARTS)


@triton.jit(do_not_specialize=["alpha"])
def outer_sum_parts(  # type: ignore[no-untyped-def]
    out_ptr,
    parts_ptr,
    alpha,
    parts,
    elements,
    columns,
    taps,
    kernel_width,
    out_o,
    out_c,
    out_h,
    out_w,
    BLOCK: tl.constexpr,
):
    """Adds alpha times the parts' sum, in their order; they lie as [part, row, tap, column]."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = element < elements
    sums = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for part in range(parts):
        offset = tl.cast(part, tl.int64) * elements
        sums += tl.load(parts_ptr + offset + element, mask=valid, other=0.0)
    tap = element // columns % taps
    at = element // columns // taps * out_o + element % columns * out_c
    at += tap // kernel_width * out_h + tap % kernel_width * out_w
    _add(out_ptr + at, sums, valid, alpha, False)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution, of which a linear layer with positions is one of a single line and tap.

    Attributes:
        grad: ``[N, O, OH, OW]``.
        input: ``[N, C, H, W]``.
        step: the convolution's stride.
    """

    grad: Tensor
    input: Tensor
    step: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    alpha: float
    power: int
    tf32: bool

    @property
    def positions(self) -> int:
        return self.grad.shape[2] * self.grad.shape[3]

    def is_linear(self, taps: int) -> bool:
        """Whether both operands of a position lie at constant distances from the last one's."""
        _, _, h, w = self.input.stride()
        lines, width = self.grad.shape[2:]
        even = lines == 1 or h * self.step[0] == w * self.step[1] * width
        return taps == 1 and tuple(self.padding) == (0, 0) and even and self.grad_is_even()

    def grad_is_even(self) -> bool:
        _, _, h, w = self.grad.stride()
        lines, width = self.grad.shape[2:]
        return lines == 1 or h == width * w

    def index_type(self) -> Any:
        """The integers that hold an offset of any element of a sample, padding included."""
        padded = [size + pad for size, pad in zip(self.input.shape[2:], self.padding, strict=True)]
        operands = (
            (self.grad, self.grad.shape[1:]),
            (self.input, (self.input.shape[1], *padded)),
        )
        extents = [
            sum(size * stride for size, stride in zip(sizes, operand.stride()[1:], strict=True))
            for operand, sizes in operands
        ]
        # A tile reaches beyond the last element, where nothing is read.
        return tl.int32 if max(extents) < 2**30 else tl.int64

    def precision(self) -> str:
        name = str(self.grad.dtype).removeprefix("torch.")
        return "tf32" if self.tf32 and name == "float32" else name


def _parts(target: Target, tiles: int, samples: int) -> tuple[int, int]:
    """How many parts the samples are divided into, and how many samples a part has."""
    wanted = triton.cdiv(target.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, tiles)
    part_samples = triton.cdiv(samples, min(samples, wanted))
    return triton.cdiv(samples, part_samples), part_samples


def _is_even(tensor: Tensor) -> bool:
    """Whether 16 consecutive elements along some dimension can be loaded as vectors."""
    strides = [stride for stride in tensor.stride() if stride > 1]
    return (
        1 in tensor.stride()
        and all(stride % 16 == 0 for stride in strides)
        and tensor.data_ptr() % 16 == 0
    )


def _tile_shapes(layer: _Layer, rows: int, columns: int) -> str:
    """The class of shapes of :func:`outer_tile`: wide tiles need the registers for addresses."""
    if rows <= 32:
        return "thin"
    if not (_is_even(layer.grad) and _is_even(layer.input)):
        return "odd"
    return "wide" if min(rows, columns) >= 128 else "narrow"


def _add_layer(out: Tensor, layer: _Layer) -> None:
    """Adds to ``out``, ``[O, C / groups, KH, KW]``; everything has been checked."""
    rows, columns = out.shape[0] // layer.groups, out.shape[1]
    taps = out.shape[2] * out.shape[3]
    if not out.numel() or not layer.positions or not layer.grad.shape[0]:
        return
    linear = layer.is_linear(taps)
    if layer.groups > 1 and rows < _ROWS_OF_A_TILE:
        kernel, shapes = outer_pairs, "channels" if layer.input.stride(1) == 1 else "positions"
    else:
        kernel, shapes = outer_tile, _tile_shapes(layer, rows, columns * taps)

    def body(blocks: Blocks, outs: Sequence[Tensor]) -> None:
        if kernel is outer_pairs:
            pairs = out.shape[0] * columns
            tiles = triton.cdiv(taps, blocks["BLOCK_TAPS"]) * triton.cdiv(
                pairs, blocks["BLOCK_PAIRS"]
            )
            own: dict[str, Any] = {"pairs": pairs}
        else:
            flat = triton.cdiv(columns * taps, blocks["BLOCK_COLUMNS"])
            across = triton.cdiv(columns, blocks["BLOCK_COLUMNS"]) * taps
            by_tap = across <= _TILES_BY_TAP * flat
            across = across if by_tap else flat
            tiles = layer.groups * across * triton.cdiv(rows, blocks["BLOCK_ROWS"])
            precision = "tf32" if layer.precision() == "tf32" else "ieee"
            own = {"LINEAR": linear, "BY_TAP": by_tap, "PRECISION": precision}
        _launch_layer(kernel, blocks, outs[0], layer, tiles, {**own, "rows": rows})

    tuned(kernel.__name__, layer.precision(), shapes, [out], body)


def _launch_layer(
    kernel: Any, blocks: Blocks, out: Tensor, layer: _Layer, tiles: int, own: dict[str, Any]
) -> None:
    grad, input = layer.grad, layer.input
    samples, (columns, kernel_height, kernel_width) = grad.shape[0], out.shape[1:]
    taps = kernel_height * kernel_width
    parts, part_samples = _parts(target_of(out), tiles, samples)
    sums, strides, part_stride = out, out.stride(), 0
    if parts > 1:
        sums = out.new_empty(parts, out.numel())
        strides = (taps * columns, 1, kernel_width * columns, columns)
        part_stride = out.numel()
    # A line's positions and those of the next one are a single line, where they lie evenly.
    input_w = input.stride(3) * (layer.step[1] if own.get("LINEAR") else 1)
    alpha = float_bits(layer.alpha)
    launch(
        kernel,
        (tiles, parts),
        blocks,
        out,
        sums_ptr=sums,
        grad_ptr=grad,
        input_ptr=input,
        alpha=alpha,
        samples=samples,
        part_samples=part_samples,
        columns=columns,
        taps=taps,
        kernel_width=kernel_width,
        positions=layer.positions,
        out_width=grad.shape[3],
        height=input.shape[2],
        width=input.shape[3],
        step_h=layer.step[0],
        step_w=layer.step[1],
        pad_h=layer.padding[0],
        pad_w=layer.padding[1],
        dilation_h=layer.dilation[0],
        dilation_w=layer.dilation[1],
        grad_n=grad.stride(0),
        grad_c=grad.stride(1),
        grad_h=grad.stride(2),
        grad_w=grad.stride(3),
        input_n=input.stride(0),
        input_c=input.stride(1),
        input_h=input.stride(2),
        input_w=input_w,
        sums_part=part_stride,
        sums_o=strides[0],
        sums_c=strides[1],
        sums_h=strides[2],
        sums_w=strides[3],
        EVEN_GRAD=layer.grad_is_even(),
        PARTS=parts > 1,
        ABSOLUTE=layer.power == 1,
        INDEX=layer.index_type(),
        **own,
    )
    if parts == 1:
        return

    def add_parts(blocks: Blocks, outs: Sequence[Tensor]) -> None:
        launch(
            outer_sum_parts,
            (triton.cdiv(out.numel(), blocks["BLOCK"]),),
            blocks,
            out,
            out_ptr=outs[0],
            parts_ptr=sums,
            alpha=alpha,
            parts=parts,
            elements=out.numel(),
            columns=columns,
            taps=taps,
            kernel_width=kernel_width,
            out_o=out.stride(0),
            out_c=out.stride(1),
            out_h=out.stride(2),
            out_w=out.stride(3),
        )

    tuned(outer_sum_parts.__name__, str(out.dtype).removeprefix("torch."), "all", [out], add_parts)


def _check_operands(op: str, out: Tensor, grad: Tensor, input: Tensor, power: int) -> None:
    check_devices(op, out=out, grad=grad, input=input)
    dtype = str(out.dtype).removeprefix("torch.")
    check(op, "out", dtype in ("float32", "float64"), "float32 or float64")
    check(op, "grad, input", _are_operands(grad, input, out), _OPERANDS)
    check(op, "power", power in (1, 2), "1 or 2")


def linear_sum_grad_squared_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    alpha: float,
    power: int = 2,
    allow_tf32: bool = False,
) -> None:
    """``out[o, i] += alpha * sum_n (sum_t grad[n, t, o] * input[n, t, i])**2``.

    Args:
        out: ``[O, I]``, any strides; float32 or float64.
        grad: ``[N, T, O]``, any strides; dtype of ``out``, or bfloat16 where that is float32.
        input: ``[N, T, I]``, dtype of ``grad``.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.
        allow_tf32: float32 products may be those of numbers rounded to tf32.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    op = "linear_sum_grad_squared_"
    check(op, "grad", grad.dim() == 3, "[N, T, O]")
    fits = input.dim() == 3 and input.shape[:2] == grad.shape[:2]
    check(op, "input", fits, "[N, T, I] with the N and T of grad")
    check(op, "out", out.shape == (grad.shape[2], *input.shape[2:]), "[O, I]")
    _check_operands(op, out, grad, input, power)
    layer = _Layer(
        grad.transpose(1, 2).unsqueeze(2),
        input.transpose(1, 2).unsqueeze(2),
        step=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        alpha=alpha,
        power=power,
        tf32=allow_tf32,
    )
    _add_layer(out[:, :, None, None], layer)


def conv2d_sum_grad_squared_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: float,
    power: int = 2,
    allow_tf32: bool = False,
) -> None:
    """Adds the summed squares of per-sample weight gradients of a 2-d convolution to ``out``.

    Args:
        out: ``[O, C / groups, KH, KW]``, any strides; float32 or float64.
        grad: ``[N, O, OH, OW]``, any strides; dtype of ``out``, or bfloat16 where that is float32.
        input: ``[N, C, H, W]``, any strides, dtype of ``grad``.
        stride: of the convolution, as the three that follow.
        padding: zeros on both sides of height and width.
        dilation: see ``stride``.
        groups: see ``stride``.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.
        allow_tf32: float32 products may be those of numbers rounded to tf32.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
    """
    op = "conv2d_sum_grad_squared_"
    check(op, "grad", grad.dim() == 4, "[N, O, OH, OW]")
    fits = input.dim() == 4 and input.shape[0] == grad.shape[0]
    check(op, "input", fits, "[N, C, H, W] with the N of grad")
    geometry = (*stride, *padding, *dilation)
    names = "stride, padding, dilation"
    two_each = len(stride) == len(padding) == len(dilation) == 2
    check(op, names, two_each, "two numbers each")
    positive = min(*stride, *dilation) > 0 and min(geometry) >= 0
    check(op, names, positive, "stride > 0, dilation > 0, padding >= 0")
    divides = groups > 0 and input.shape[1] % groups == 0 and grad.shape[1] % groups == 0
    check(op, "groups", divides, "a divisor of the channels of input and grad")
    fits = out.dim() == 4 and out.shape[:2] == (grad.shape[1], input.shape[1] // groups)
    check(op, "out", fits, "[O, C / groups, KH, KW]")
    for i in (0, 1):
        reach = input.shape[2 + i] + 2 * padding[i] - dilation[i] * (out.shape[2 + i] - 1) - 1
        check(
            op,
            "grad",
            reach // stride[i] + 1 == grad.shape[2 + i],
            "the height and width that follow from input, stride, padding and dilation",
        )
    _check_operands(op, out, grad, input, power)
    layer = _Layer(grad, input, stride, padding, dilation, groups, alpha, power, allow_tf32)
    _add_layer(out, layer)
