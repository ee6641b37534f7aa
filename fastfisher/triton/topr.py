"""Triton twins of the top-R selection: a radix select over many tensors, and the zeroing.

A kernel finds tensors by a table of their addresses, so that each pass over all of them is one
launch. What is left between the passes is a few small torch operations on the same device: the host
waits for nothing. Tensors that are not contiguous are worked on in copies, and so are differences
of scores, which triton would fuse into one rounded operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..topr import CHUNK, GROUP
from .launch import check, choices, launch, target_of

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_DIGIT_BITS = 11
_ALIGNMENT = 16


@triton.jit
def _codes(address, dtype, begin, place, valid, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores as ordered integers, of which that of NaN is the lowest."""
    wide = tl.float64 if WIDE else tl.float32
    value = tl.zeros(place.shape, wide)
    if dtype == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + begin + place, valid, 0.0).to(
            wide
        )
    elif dtype == 1:
        # By its bits: triton's interpreter loses denormals.
        stored = tl.load(address.to(tl.pointer_type(tl.int16)) + begin + place, valid, 0).to(
            tl.int32
        )
        value = (stored << 16).to(tl.float32, bitcast=True).to(wide)
    elif dtype == 2:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + begin + place, valid, 0.0).to(
            wide
        )
    elif WIDE:
        value = tl.load(address.to(tl.pointer_type(tl.float64)) + begin + place, valid, 0.0)
    if WIDE:
        bits = value.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        infinity = tl.full(place.shape, 0x7FF0000000000000, tl.int64)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        infinity = tl.full(place.shape, 0x7F800000, tl.int32)
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > infinity, -infinity - 1, key)


@triton.jit
def _chunk(table_ptr, owner_ptr, chunk, tensors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a chunk: its tensor, that one's score and dtype, where it begins and its size."""
    tensor = tl.load(owner_ptr + chunk)
    score = tl.load(table_ptr + tensor)
    dtype = tl.load(table_ptr + tensors + tensor)
    count = tl.load(table_ptr + 2 * tensors + tensor)
    first = tl.load(table_ptr + 3 * tensors + tensor)
    begin = (chunk - first).to(tl.int64) * BLOCK
    return tensor, score, dtype, begin, tl.minimum(count - begin, BLOCK).to(tl.int32)


@triton.jit
def topr_digits(  # type: ignore[no-untyped-def]
    histogram_ptr,
    not_finite_ptr,
    found_ptr,
    table_ptr,
    owner_ptr,
    tensors,
    chunks,
    shift,
    bits,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds one digit of all keys whose higher digits are those found."""
    found = tl.load(found_ptr)
    counts = tl.zeros((BINS,), tl.int32)
    place = tl.arange(0, BLOCK)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor, score, dtype, begin, size = _chunk(table_ptr, owner_ptr, chunk, tensors, BLOCK)
        valid = place < size
        keys = _codes(score, dtype, begin, place, valid, WIDE)
        if FIRST:
            infinity = 0x7FF0000000000000 if WIDE else 0x7F800000
            odd = valid & ((keys >= infinity) | (keys <= -infinity))
            if tl.max(odd.to(tl.int32), 0) > 0:
                tl.atomic_or(not_finite_ptr + tensor, 1, sem="relaxed")
            # The highest digit is signed: offset, it counts from 0 as the others do.
            digit = (keys >> shift) + BINS // 2
            counted = valid
        else:
            digit = (keys >> shift) & ((1 << bits) - 1)
            counted = valid & (((keys >> shift) >> bits) == found.to(keys.dtype))
        counts += tl.histogram(digit.to(tl.int32), BINS, mask=counted)
    at = tl.arange(0, BINS)
    tl.atomic_add(histogram_ptr + at, counts.to(tl.int64), mask=counts != 0, sem="relaxed")


@triton.jit
def topr_count(  # type: ignore[no-untyped-def]
    above_ptr,
    ties_ptr,
    key_ptr,
    table_ptr,
    owner_ptr,
    tensors,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys of each chunk are above the one found, and how many equal it."""
    chunk = tl.program_id(0).to(tl.int64)
    _tensor, score, dtype, begin, size = _chunk(table_ptr, owner_ptr, chunk, tensors, BLOCK)
    place = tl.arange(0, BLOCK)
    valid = place < size
    keys = _codes(score, dtype, begin, place, valid, WIDE)
    key = tl.load(key_ptr).to(keys.dtype)
    tl.store(above_ptr + chunk, tl.sum((valid & (keys > key)).to(tl.int64), 0))
    tl.store(ties_ptr + chunk, tl.sum((valid & (keys == key)).to(tl.int64), 0))


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    target, begin, values, before, place, rank, chosen, KIND: tl.constexpr, RECORD: tl.constexpr
):
    """Zeroes what is chosen of a tensor, as integers, and keeps it in order."""
    at = target.to(tl.pointer_type(KIND)) + begin + place
    if RECORD:
        tl.store(values.to(tl.pointer_type(KIND)) + before + rank, tl.load(at, chosen, 0), chosen)
    tl.store(at, tl.zeros(place.shape, KIND), chosen)


@triton.jit
def topr_zero(  # type: ignore[no-untyped-def]
    matches_ptr,
    record_ptr,
    layout_ptr,
    ends_ptr,
    key_ptr,
    selected_ptr,
    before_ptr,
    table_ptr,
    owner_ptr,
    tensors,
    RECORD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Zeroes the first elements of a chunk in order, and records what they were.

    It reads a chunk twice, in pieces, for a whole one would take more registers than there are.
    """
    chunk = tl.program_id(0).to(tl.int64)
    wanted = tl.load(selected_ptr + chunk)
    if (tl.load(matches_ptr) != 0) & (wanted != 0):
        tensor, score, dtype, begin, size = _chunk(table_ptr, owner_ptr, chunk, tensors, BLOCK)
        place = tl.arange(0, PIECE)
        key = tl.load(key_ptr).to(tl.int64 if WIDE else tl.int32)
        above_all = 0
        ties_all = 0
        for piece in range(0, size, PIECE):
            valid = place < size - piece
            keys = _codes(score, dtype, begin + piece, place, valid, WIDE)
            above_all += tl.sum((valid & (keys > key)).to(tl.int32), 0)
            ties_all += tl.sum((valid & (keys == key)).to(tl.int32), 0)
        left = wanted.to(tl.int32) - above_all
        if (left < 0) | (left > ties_all):
            tl.store(ends_ptr + 3 * chunk + 2, 1)
        else:
            target = tl.load(table_ptr + 4 * tensors + tensor)
            width = tl.load(table_ptr + 5 * tensors + tensor)
            before = tl.load(before_ptr + chunk)
            row = layout_ptr + tensor * 5
            values = tl.zeros((), tl.int64)
            if RECORD:
                values = record_ptr.to(tl.int64) + tl.load(row + 3)
                index_width = tl.load(row + 1)
                code = record_ptr.to(tl.int64) + tl.load(row + 2)
            ties = 0
            runs = 0
            last = 0
            for piece in range(0, size, PIECE):
                first = begin + piece
                valid = place < size - piece
                keys = _codes(score, dtype, first, place, valid, WIDE)
                tied = (valid & (keys == key)).to(tl.int32)
                earlier = ties + tl.cumsum(tied, 0)
                chosen = valid & ((keys > key) | ((tied != 0) & (earlier <= left)))
                ordered = chosen.to(tl.int32)
                rank = tl.cumsum(ordered, 0) - 1
                if RECORD:
                    if index_width == 4:
                        to = code.to(tl.pointer_type(tl.int32)) + before + rank
                        tl.store(to, first.to(tl.int32) + place, chosen)
                    elif index_width == 8:
                        to = code.to(tl.pointer_type(tl.int64)) + before + rank
                        tl.store(to, first + place, chosen)
                    else:
                        bit = ordered.reshape(PIECE // 8, 8) << tl.arange(0, 8)[None, :]
                        byte = tl.arange(0, PIECE // 8)
                        packed = tl.sum(bit, 1).to(tl.uint8)
                        at_byte = code.to(tl.pointer_type(tl.uint8)) + first // 8 + byte
                        tl.store(at_byte, packed, byte * 8 < size - piece)
                    # The element before each, which the one of a run's first is not chosen. That
                    # of the piece before is not read again: it may be among what was zeroed.
                    inner = valid & (place > 0)
                    previous = _codes(score, dtype, first, place - 1, inner, WIDE)
                    joined = (previous > key) | ((previous == key) & (earlier - tied <= left))
                    joined = tl.where(place == 0, last != 0, joined)
                    runs += tl.sum((chosen & ~joined).to(tl.int32), 0)
                    last = tl.sum(tl.where(place == PIECE - 1, ordered, 0), 0)
                    if piece == 0:
                        tl.store(ends_ptr + 3 * chunk + place, ordered.to(tl.int64), place == 0)
                if width == 1:
                    _take(target, first, values, before, place, rank, chosen, tl.int8, RECORD)
                elif width == 2:
                    _take(target, first, values, before, place, rank, chosen, tl.int16, RECORD)
                elif width == 4:
                    _take(target, first, values, before, place, rank, chosen, tl.int32, RECORD)
                else:
                    # Of 16 bytes, both halves.
                    words = width // 8
                    for half in range(words):
                        at, to = place * words + half, rank * words + half
                        _take(
                            target, first * words, values, before * words, at, to, chosen,
                            tl.int64, RECORD,
                        )  # fmt: skip
                ties += tl.sum(tied, 0)
                before += tl.sum(ordered, 0)
            if RECORD:
                tl.atomic_add(row + 4, runs, sem="relaxed")
                # Of a whole chunk; behind any other one, another tensor begins.
                tl.store(ends_ptr + 3 * chunk + 1, last)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a call, on their device.

    Attributes:
        scores: contiguous ones, which the table has the addresses of.
        targets: what is zeroed, contiguous as well; nothing where that is not to be done.
        table: int64 ``[6, tensors]``: score, dtype, elements, first chunk, parameter, its width.
        owner: int64 ``[chunks]``, the tensor of each chunk.
        wide: whether keys are those of float64.
    """

    scores: list[Tensor]
    targets: Sequence[Tensor]
    table: Tensor
    owner: Tensor
    wide: bool

    @property
    def chunks(self) -> int:
        """Number of chunks of all tensors."""
        return self.owner.numel()

    def run(self, kernel: object, programs: int, **arguments: object) -> None:
        """Launches a kernel."""
        own = {"table_ptr": self.table, "owner_ptr": self.owner, "tensors": len(self.scores)}
        name = kernel.__name__  # type: ignore[attr-defined]
        [blocks] = choices(name, target_of(self.table), "any", "any")
        constants = {"WIDE": self.wide, "BLOCK": CHUNK}
        reached = [*self.scores, *self.targets]
        launch(kernel, (programs,), blocks, self.table, reached, **own, **arguments, **constants)


def _chunks(tensor: Tensor) -> int:
    return -(-tensor.numel() // CHUNK)


def _tensors(
    op: str,
    scores: Sequence[Tensor],
    remain: Sequence[Tensor],
    weight: float,
    targets: Sequence[Tensor] = (),
) -> _Tensors:
    check(op, "scores", bool(scores), "at least one")
    device = scores[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A replay would read addresses from host memory that has been given back by then.
        raise RuntimeError(f"fastfisher::{op}: the Triton kernels cannot be captured in a graph")
    for score in scores:
        check(op, "scores", score.dtype in _DTYPES, "float32, float64, bfloat16 or float16")
        check(op, "scores", score.device == device, "all on one device")
    check(op, "remain", len(remain) in (0, len(scores)), "none or one for each score")
    for score, other in zip(scores, remain, strict=False):
        matches = other.dtype == score.dtype and other.shape == score.shape
        check(op, "remain", matches, "the dtypes and shapes of the scores")
        check(op, "remain", other.device == device, "the device of the scores")
    if remain:
        pairs = zip(scores, remain, strict=True)
        scores = [score - other * weight for score, other in pairs]
    scores = [score.contiguous() for score in scores]
    first, firsts = 0, []
    for score in scores:
        firsts.append(first)
        first += _chunks(score)
    rows = [
        [score.data_ptr() for score in scores],
        [_DTYPES[score.dtype] for score in scores],
        [score.numel() for score in scores],
        firsts,
        [target.data_ptr() for target in targets] or [0] * len(scores),
        [target.element_size() for target in targets] or [0] * len(scores),
    ]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        table = table.pin_memory()
    table = table.to(device, non_blocking=True)
    pieces = (table[2] + (CHUNK - 1)) // CHUNK
    numbers = torch.arange(len(scores), device=device)
    owner = torch.repeat_interleave(numbers, pieces, output_size=first)
    return _Tensors(scores, targets, table, owner, any(s.dtype == torch.float64 for s in scores))


def _digit(histogram: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Which digit the key of that rank has, and its rank among those of that digit."""
    at_least = histogram.flip(0).cumsum(0)
    place = torch.searchsorted(at_least, rank)
    digit = 2**_DIGIT_BITS - 1 - place
    return digit, rank - (at_least.gather(0, place) - histogram.gather(0, digit))


def select_top(
    scores: Sequence[Tensor], remain: Sequence[Tensor], weight: float, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastfisher.topr.select_top`."""
    op = "select_top"
    tensors = _tensors(op, scores, remain, weight)
    total = sum(map(Tensor.numel, scores))
    check(op, "counts", all(0 <= k <= total for k in counts), f"0..{total}")
    like = tensors.table
    width = 64 if tensors.wide else 32
    infinity = 0x7FF0000000000000 if tensors.wide else 0x7F800000
    keys = like.new_full((len(counts),), infinity + 1)
    selected = like.new_zeros(len(counts), tensors.chunks)
    not_finite = like.new_zeros(len(scores), dtype=torch.int32)
    programs = min(tensors.chunks, 4 * target_of(like).multiprocessors)

    def histogram(found: Tensor, shift: int, bits: int, first: bool) -> Tensor:
        sums = like.new_zeros(2**_DIGIT_BITS)
        tensors.run(
            topr_digits,
            programs,
            histogram_ptr=sums,
            not_finite_ptr=not_finite,
            found_ptr=found,
            chunks=tensors.chunks,
            shift=shift,
            bits=bits,
            FIRST=first,
            BINS=2**_DIGIT_BITS,
        )
        return sums

    top = width - _DIGIT_BITS
    highest = histogram(like.new_zeros(1), top, _DIGIT_BITS, True)
    for j, k in enumerate(counts):
        if k == 0:
            continue
        digit, rank = _digit(highest, like.new_full((1,), k))
        found, shift = digit - 2 ** (_DIGIT_BITS - 1), top
        while shift:
            bits = min(_DIGIT_BITS, shift)
            shift -= bits
            digit, rank = _digit(histogram(found, shift, bits, False), rank)
            found = (found << bits) + digit
        keys[j : j + 1] = found
        ties = torch.empty_like(selected[j])
        tensors.run(topr_count, tensors.chunks, above_ptr=selected[j], ties_ptr=ties, key_ptr=found)
        left = (rank - (ties.cumsum(0) - ties)).clamp_(min=0)
        selected[j] += ties.minimum(left)
    words = sum(-(-score.numel() // (64 * GROUP)) for score in scores)
    # A superset of the groups will do.
    candidates = like.new_full((len(counts), words), -1)
    return keys, selected, not_finite == 0, candidates


def zero_selected_(
    parameters: Sequence[Tensor],
    scores: Sequence[Tensor],
    remain: Sequence[Tensor],
    weight: float,
    key: Tensor,
    selected: Tensor,
    candidates: Tensor,
    count: int,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastfisher.topr.zero_selected_`."""
    op = "zero_selected_"
    check(op, "parameters", len(parameters) == len(scores), "one for each score")
    for parameter, score in zip(parameters, scores, strict=True):
        check(op, "parameters", parameter.shape == score.shape, "the shapes of the scores")
        check(op, "parameters", parameter.device == scores[0].device, "the device of the scores")
    targets = [parameter.detach().contiguous() for parameter in parameters]
    tensors = _tensors(op, scores, remain, weight, targets)
    like = tensors.table
    words = sum(-(-score.numel() // (64 * GROUP)) for score in scores)
    for name, given, shape in (
        ("key", key, ()),
        ("selected", selected, (tensors.chunks,)),
        ("candidates", candidates, (words,)),
    ):
        matches = given.dtype == torch.int64 and given.shape == shape
        check(op, name, matches, f"int64 {list(shape)}")
        check(op, name, given.device == like.device, "the device of the scores")
    total = sum(map(Tensor.numel, scores))
    check(op, "count", 0 <= count <= total, f"0..{total}")

    selected = selected.contiguous()
    sizes, firsts, widths = like[2], like[3], like[5]
    sums = torch.cat([like.new_zeros(1), selected.cumsum(0)])
    starts = sums.index_select(0, firsts)
    ends = sums.index_select(0, torch.cat([firsts[1:], like.new_full((1,), tensors.chunks)]))
    zeroed = ends - starts
    packed = (sizes + 7) // 8
    index_width = torch.where(sizes <= 2**31, 4, 8)
    index_width = torch.where(zeroed * index_width >= packed, 0, index_width)
    code = torch.where(index_width == 0, packed, zeroed * index_width)
    parts = torch.stack([code, zeroed * widths], 1)
    parts = (parts + (_ALIGNMENT - 1)) // _ALIGNMENT * _ALIGNMENT
    places = (parts.flatten().cumsum(0) - parts.flatten()).view(-1, 2)
    runs = torch.zeros_like(zeroed)
    layout = torch.stack([zeroed, index_width, places[:, 0], places[:, 1], runs], 1)
    inside = ((selected >= 0) & (selected <= CHUNK)).all() & (sums[-1] == count)
    room = _record_bytes(scores, parameters, count) if record else 0
    data = like.new_zeros(room, dtype=torch.uint8)
    marks = like.new_zeros(max(tensors.chunks, 1), 3)
    tensors.run(
        topr_zero,
        tensors.chunks,
        matches_ptr=inside.to(torch.int64),
        record_ptr=data,
        layout_ptr=layout,
        ends_ptr=marks,
        key_ptr=key,
        selected_ptr=selected,
        before_ptr=sums[:-1] - starts.index_select(0, tensors.owner),
        RECORD=record,
    )
    torch._assert_async(
        inside & (marks[:, 2] == 0).all(),
        "fastfisher::zero_selected_: selected: expected what select_top gave for these scores",
    )
    if tensors.chunks > 1:
        same = tensors.owner[1:] == tensors.owner[:-1]
        joined = (marks[1:, 0] != 0) & (marks[:-1, 1] != 0) & same
        layout[:, 4].index_add_(0, tensors.owner[1:], -joined.to(torch.int64))
    for parameter, target in zip(parameters, targets, strict=True):
        if not parameter.is_contiguous():
            parameter.detach().copy_(target)
    return data, layout


def _record_bytes(scores: Sequence[Tensor], parameters: Sequence[Tensor], count: int) -> int:
    """What the record of so many elements takes at most."""
    codes = 0
    for score in scores:
        size = score.numel()
        codes += min(min(count, size) * (4 if size <= 2**31 else 8), -(-size // 8))
    widest = max(parameter.element_size() for parameter in parameters)
    return codes + count * widest + 2 * _ALIGNMENT * len(scores)
