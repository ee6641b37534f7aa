"""Triton twins of the gather family: embeddings.

The positions of all samples are sorted by token, and those of a token stay in their order: a run of
positions of one token and one sample is summed, the power of the sum is added to the token's total,
and the total goes to the token's row of ``out``. A program takes the runs that begin in its piece
of the sorted positions, for a block of columns. Totals of tokens that go on in another piece go to
a workspace, from which a second kernel adds up each such token in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Blocks, as_float, check, check_devices, float_bits, launch, powers, tuned


@triton.jit
def _add_row(  # type: ignore[no-untyped-def]
    out_ptr, token, column, valid, total, alpha, vocabulary, padding_index, out_v, out_d
):
    """Adds to a token's row, if it is one that has a gradient."""
    if (token != padding_index) & (token >= 0) & (token < vocabulary):
        at = out_ptr + token * out_v + column * out_d
        before = tl.load(at, mask=valid, other=0.0)
        tl.store(at, before + as_float(alpha, total.dtype) * total, mask=valid)


@triton.jit(do_not_specialize=["alpha"])
def gather_pieces(  # type: ignore[no-untyped-def]
    out_ptr,
    heads_ptr,
    tails_ptr,
    grad_ptr,
    tokens_ptr,
    samples_ptr,
    order_ptr,
    alpha,
    total_positions,
    positions,
    columns,
    vocabulary,
    padding_index,
    out_v,
    out_d,
    grad_n,
    grad_t,
    grad_d,
    ABSOLUTE: tl.constexpr,
    PIECE: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The runs that begin in one piece; ``AHEAD`` rows of ``grad`` are under way at a time."""
    dtype = grad_ptr.dtype.element_ty
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    valid = column < columns
    begin = piece * PIECE
    end = min(begin + PIECE, total_positions)

    # The run of the piece's last position belongs to it to its end, if it begins in it.
    last_token = tl.load(tokens_ptr + end - 1)
    last_sample = tl.load(samples_ptr + end - 1)
    goes_on = tl.load(tokens_ptr + end, mask=end < total_positions, other=-1) == last_token
    goes_on &= end < total_positions
    token = tl.load(tokens_ptr + begin - 1, mask=begin > 0, other=0)
    sample = tl.load(samples_ptr + begin - 1, mask=begin > 0, other=-1)
    # Whether `token` has positions in an earlier piece, and whether its run is this piece's.
    is_head = (begin > 0) & (token == tl.load(tokens_ptr + begin))
    owned = begin < 0
    run = tl.zeros((BLOCK_COLUMNS,), dtype)
    total = tl.zeros((BLOCK_COLUMNS,), dtype)

    start = begin
    active = start < end
    while active:
        tokens, samples, rows = (), (), ()
        for i in tl.static_range(AHEAD):
            at = start + i
            inside = at < total_positions
            v = tl.load(tokens_ptr + at, mask=inside, other=-1)
            n = tl.load(samples_ptr + at, mask=inside, other=-1)
            t = tl.load(order_ptr + at, mask=inside, other=0) - n * positions
            inside &= (at < end) | ((v == last_token) & (n == last_sample))
            inside &= (v != padding_index) & (v >= 0) & (v < vocabulary)
            at_row = grad_ptr + n * grad_n + t * grad_t + column * grad_d
            row = tl.load(at_row, mask=valid & inside, other=0.0)
            tokens = tokens + (v,)  # type: ignore[assignment]  # noqa: RUF005
            samples = samples + (n,)  # type: ignore[assignment]  # noqa: RUF005
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(AHEAD):
            at = start + i
            v = tokens[i]
            n = samples[i]
            same_run = (v == token) & (n == sample)
            active &= (at < total_positions) & ((at < end) | (owned & same_run))
            if active:
                if not same_run:
                    total += powers(run, ABSOLUTE)
                    run = tl.zeros((BLOCK_COLUMNS,), dtype)
                    if v != token:
                        if is_head:
                            to = heads_ptr + piece * columns + column
                            tl.store(to, total, mask=valid)
                        elif owned:
                            _add_row(
                                out_ptr, token, column, valid, total,
                                alpha, vocabulary, padding_index, out_v, out_d,
                            )  # fmt: skip
                        total = tl.zeros((BLOCK_COLUMNS,), dtype)
                        is_head = begin < 0
                    owned = begin >= 0
                    token = v
                    sample = n
                if owned:
                    run += rows[i]
        start += AHEAD

    total += powers(run, ABSOLUTE)
    if is_head:
        tl.store(heads_ptr + piece * columns + column, total, mask=valid)
    elif goes_on:
        tl.store(tails_ptr + piece * columns + column, total, mask=valid)
    else:
        _add_row(
            out_ptr, token, column, valid, total,
            alpha, vocabulary, padding_index, out_v, out_d,
        )  # fmt: skip


@triton.jit(do_not_specialize=["alpha"])
def gather_finish(  # type: ignore[no-untyped-def]
    out_ptr,
    heads_ptr,
    tails_ptr,
    tokens_ptr,
    alpha,
    total_positions,
    piece_positions,
    columns,
    vocabulary,
    padding_index,
    out_v,
    out_d,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Adds up the token that goes on after a piece, if it begins in this one."""
    dtype = out_ptr.dtype.element_ty
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    valid = column < columns
    border = (piece + 1) * piece_positions
    token = tl.load(tokens_ptr + border - 1)
    begins = tl.load(tokens_ptr + border - piece_positions - 1, mask=piece > 0, other=-1) != token
    begins |= piece == 0
    if begins & (tl.load(tokens_ptr + border) == token):
        total = tl.zeros((BLOCK_PIECES, BLOCK_COLUMNS), dtype)
        start = piece + 1
        active = piece >= 0
        while active:
            other = start + tl.arange(0, BLOCK_PIECES)
            first = other * piece_positions
            inside = first < total_positions
            goes_on = tl.load(tokens_ptr + first, mask=inside, other=-1) == token
            goes_on &= inside
            at = heads_ptr + other[:, None] * columns + column[None, :]
            total += tl.load(at, mask=goes_on[:, None] & valid[None, :], other=0.0)
            active = tl.sum(goes_on.to(tl.int32), 0) == BLOCK_PIECES
            start += BLOCK_PIECES
        tail = tl.load(tails_ptr + piece * columns + column, mask=valid, other=0.0)
        _add_row(
            out_ptr, token, column, valid, tail + tl.sum(total, 0),
            alpha, vocabulary, padding_index, out_v, out_d,
        )  # fmt: skip


def embedding_sum_grad_squared_(
    out: Tensor, grad: Tensor, index: Tensor, padding_index: int, alpha: float, power: int = 2
) -> None:
    """``out[v] += alpha * sum_n (sum_{t: index[n, t] = v} grad[n, t])**2``.

    Args:
        out: ``[V, D]``, any strides; float32 or float64.
        grad: ``[N, T, D]``, any strides, dtype of ``out``.
        index: int64 ``[N, T]``, any strides, each in ``[0, V)``.
        padding_index: the row that gets no gradient; -1 for none.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.

    Raises:
        ValueError: an argument does not fit; nothing was modified.
        RuntimeError: an index is out of range. A GPU says so by an assertion on the device, as it
            does for torch's own lookups: a later call raises. Nothing is written outside ``out``.
    """
    op = "embedding_sum_grad_squared_"
    check_devices(op, out=out, grad=grad, index=index)
    dtype = str(out.dtype).removeprefix("torch.")
    fits = out.dim() == 2 and dtype in ("float32", "float64")
    check(op, "out", fits, "float32 or float64 [V, D]")
    fits = grad.dim() == 3 and grad.dtype == out.dtype and grad.shape[2] == out.shape[1]
    check(op, "grad", fits, "[N, T, D] of the dtype of out")
    fits = index.dtype == torch.int64 and index.shape == grad.shape[:2]
    check(op, "index", fits, "int64 [N, T]")
    check(op, "power", power in (1, 2), "1 or 2")
    if not index.numel():
        return

    vocabulary, columns = out.shape
    tokens, order = torch.sort(index.flatten(), stable=True)
    samples = order.div(index.shape[1], rounding_mode="floor")
    torch._assert_async(
        (tokens[0] >= 0) & (tokens[-1] < vocabulary),
        f"fastfisher::{op}: index: expected 0 <= index < {vocabulary}",
    )
    common = {
        "tokens_ptr": tokens,
        "alpha": float_bits(alpha),
        "total_positions": tokens.numel(),
        "columns": columns,
        "vocabulary": vocabulary,
        "padding_index": padding_index,
        "out_v": out.stride(0),
        "out_d": out.stride(1),
    }

    def body(blocks: Blocks, outs: Sequence[Tensor]) -> None:
        piece = blocks["PIECE"]
        pieces = triton.cdiv(tokens.numel(), piece)
        heads, tails = grad.new_empty(2, pieces, columns)
        launch(
            gather_pieces,
            (pieces, triton.cdiv(columns, blocks["BLOCK_COLUMNS"])),
            blocks,
            grad,
            out_ptr=outs[0],
            heads_ptr=heads,
            tails_ptr=tails,
            grad_ptr=grad,
            samples_ptr=samples,
            order_ptr=order,
            positions=index.shape[1],
            grad_n=grad.stride(0),
            grad_t=grad.stride(1),
            grad_d=grad.stride(2),
            ABSOLUTE=power == 1,
            **common,
        )

        def finish(blocks: Blocks, outs: Sequence[Tensor]) -> None:
            launch(
                gather_finish,
                (pieces - 1, triton.cdiv(columns, blocks["BLOCK_COLUMNS"])),
                blocks,
                grad,
                out_ptr=outs[0],
                heads_ptr=heads,
                tails_ptr=tails,
                piece_positions=piece,
                **common,
            )

        tuned(gather_finish.__name__, dtype, "all", outs, finish)

    tuned(gather_pieces.__name__, dtype, "all", [out], body)
