"""Raw operators of the top-R selection: schemas, fake kernels, plain-torch default kernels.

``select_top`` finds the largest scores of many tensors together, ``zero_selected_`` zeroes what
they score. As with the operators of :mod:`fastfisher.ops`, the default kernels serve any device,
the compiled ones take over where there are some, and none is differentiable. What is selected stays
on the device of the scores, so that compiled kernels can select and zero there without the host
waiting for anything; :meth:`Zeroing.records` and :func:`value_of` wait. On the CPU, where nothing
has to see the operators, the compiled kernels are called without torch's dispatcher, which takes
longer to be handed many small tensors than the work itself.

Order: larger first; equal scores by position, the earlier tensor and then the lower row-major index
first, as in a stable sort. -0.0 equals +0.0, denormals differ from zero, NaN ranks below all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import backends, ops

CHUNK = 1 << 13
"""Selected scores are counted in chunks of this many consecutive elements of a tensor."""

GROUP = 16
"""Candidates are noted in groups of this many consecutive elements of a chunk."""

_DIGIT_BITS = 16
_ALIGNMENT = 16
_WORD = 64 * GROUP

SCHEMAS = (
    "select_top(Tensor[] scores, Tensor[] remain, float weight, int[] counts) -> "
    "(Tensor keys, Tensor selected, Tensor finite, Tensor candidates)",
    "zero_selected_(Tensor(a!)[] parameters, Tensor[] scores, Tensor[] remain, float weight, "
    "Tensor key, Tensor selected, Tensor candidates, int count, bool record) -> "
    "(Tensor record, Tensor layout)",
)
"""The operators. Each backend that is not torch's own has the same ones in its own namespace."""

# As in ops.py: ``fastfisher_torch`` has the default kernels only.
_libraries = [torch.library.Library(n, "FRAGMENT") for n in ("fastfisher", "fastfisher_torch")]
for _library in _libraries:
    for _schema in SCHEMAS:
        _library.define(_schema)


class Chosen(NamedTuple):
    """What one count selects: a row of a :class:`Selection`."""

    key: Tensor
    selected: Tensor
    candidates: Tensor
    k: int


class Selection(NamedTuple):
    """What :func:`select_top` selects, for each of its ``counts`` (axis 0 of all but ``finite``).

    The tensors are on the device of the scores, or on the CPU where these are on several.

    Attributes:
        keys: int64 ``[counts]``, the k-th largest score as an ordered integer, which
            :func:`value_of` turns back; above all others where k is 0.
        selected: int64 ``[counts, chunks]``, how many elements each chunk has of the first k:
            those above the key, then those equal to it, in index order. A tensor's last chunk may
            be shorter than :data:`CHUNK`.
        finite: bool ``[tensors]``, whether no score of a tensor is NaN or infinite.
        candidates: int64 ``[counts, words]``, one bit for each :data:`GROUP` elements of a tensor,
            the lowest bit first and each tensor in words of its own: no element is selected where
            the bit is 0. These groups are not read again.
        counts: what was asked for.
    """

    keys: Tensor
    selected: Tensor
    finite: Tensor
    candidates: Tensor
    counts: tuple[int, ...]

    def rows(self) -> list[Chosen]:
        """What each count selects."""
        rows = zip(self.keys, self.selected, self.candidates, self.counts, strict=True)
        return [Chosen(*row) for row in rows]


class Zeroed(NamedTuple):
    """What :func:`zero_selected_` zeroed in one tensor; on the CPU.

    Attributes:
        code: the ascending flat indices (int32, or int64 above 2**31 elements), or one bit per
            element, the lowest bit of a byte first (uint8). Whichever is smaller.
        values: what was zeroed, in index order, of the parameter's dtype.
        runs: number of runs of consecutive indices.
    """

    code: Tensor
    values: Tensor
    runs: int


class Zeroing(NamedTuple):
    """What :func:`start_zeroing_` recorded, on the device of the scores.

    Attributes:
        parameters: what it was given.
        data: uint8, all that was recorded.
        layout: int64 ``[tensors, 5]``: of each tensor, how many elements were zeroed; bytes of an
            index, or 0 where the record has bits; where in ``data`` the indices or bits begin, and
            where the values; and the number of runs.
    """

    parameters: Sequence[Tensor]
    data: Tensor
    layout: Tensor

    @staticmethod
    def records(zeroings: Sequence[Zeroing]) -> list[list[Zeroed]]:
        """What each of several calls zeroed in each of its tensors.

        The host waits once for each device: it copies all at once.
        """
        parts = on_cpu([part for zeroing in zeroings for part in (zeroing.data, zeroing.layout)])
        records = []
        for zeroing, data, layout in zip(zeroings, parts[::2], parts[1::2], strict=True):
            # Row by row, torch makes a tensor of each.
            numbers = layout.flatten().tolist()
            rows = zip(*(numbers[i::5] for i in range(5)), strict=True)
            pairs = zip(zeroing.parameters, rows, strict=True)
            records.append([_zeroed(data, parameter, *row) for parameter, row in pairs])
        return records


def select_top(
    scores: Sequence[Tensor],
    counts: Sequence[int],
    *,
    remain: Sequence[Tensor] = (),
    weight: float = 1.0,
) -> Selection:
    """Find the ``k`` largest elements of several tensors together, for each ``k`` in ``counts``.

    The compiled kernel reads the scores once for all counts together, and again only where a sample
    of them misled; beside the result it takes memory of less than 1% of float32 scores.

    Args:
        scores: floating-point tensors of any shape, strides, dtype and device. Where they are on
            several devices, the default kernels serve.
        counts: how many to select, each from 0 to the number of elements.
        remain: nothing, or for each score a tensor of its shape and dtype: what is ranked is then
            ``score - remain * weight``, computed in that dtype as two rounded operations.
        weight: of ``remain``.

    Returns:
        The selection.

    Raises:
        TypeError: a score is not of a floating-point dtype.
        ValueError: a count is out of range.
        RuntimeError: ``remain`` does not match.
    """
    direct = _direct("select_top", list(scores), list(remain), weight, list(counts))
    if direct is not None:
        keys, selected, finite, candidates = direct
        return Selection(keys, selected, finite, candidates, tuple(counts))
    _check_dtypes(scores)
    total = sum(map(Tensor.numel, scores))
    for k in counts:
        if not 0 <= k <= total:
            raise ValueError(f"k must be in 0..{total}, the number of scores, got {k}")
    # Without a tensor there is no device to dispatch on.
    home = _home([*scores, *remain])
    op = backends.operator("select_top", home) if home is not None else _select_top_default
    keys, selected, finite, candidates = op(list(scores), list(remain), weight, list(counts))
    return Selection(keys, selected, finite, candidates, tuple(counts))


def zero_selected_(
    parameters: Sequence[Tensor],
    scores: Sequence[Tensor],
    chosen: Chosen,
    *,
    remain: Sequence[Tensor] = (),
    weight: float = 1.0,
    record: bool = False,
) -> list[Zeroed]:
    """Zero, in place, the elements of ``parameters`` that a selection of ``scores`` selects.

    Args:
        parameters: tensors of the shapes of ``scores``, of any strides and dtype, that share no
            memory; the elements that are not selected keep their bits. Where not all tensors of the
            call are on one device, the default kernels serve.
        scores: what :func:`select_top` was given.
        chosen: one of :meth:`Selection.rows`.
        remain: what :func:`select_top` was given.
        weight: what :func:`select_top` was given.
        record: return what was zeroed; the host waits for it.

    Returns:
        With ``record`` one entry per tensor, on the CPU, in one piece of memory; else nothing.

    Raises:
        TypeError: a score is not of a floating-point dtype.
        RuntimeError: the numbers, shapes or dtypes of the tensors do not match, or ``chosen`` is
            not of these scores. In the last case parameters may have been modified, and kernels of
            another device than the CPU, which the host does not wait for, raise it later.
    """
    zeroing = start_zeroing_(
        parameters, scores, chosen, remain=remain, weight=weight, record=record
    )
    return Zeroing.records([zeroing])[0] if record else []


def start_zeroing_(
    parameters: Sequence[Tensor],
    scores: Sequence[Tensor],
    chosen: Chosen,
    *,
    remain: Sequence[Tensor],
    weight: float,
    record: bool,
) -> Zeroing:
    """As :func:`zero_selected_`, but the record may be read later, with those of other calls."""
    arguments = (list(parameters), list(scores), list(remain), weight, *chosen, record)
    direct = _direct("zero_selected_", *arguments)
    changed: Sequence[Tensor] = parameters
    if direct is not None:
        data, layout, changed = direct
    else:
        _check_dtypes(scores)
        home = _home([*parameters, *scores, *remain, *chosen[:3]]) if scores else None
        op = backends.operator("zero_selected_", home) if home else _zero_selected_default
        with torch.no_grad():
            data, layout = op(*arguments)
        if layout.is_cpu:
            changed = [parameters[i] for i in layout[:, 0].nonzero()[:, 0].tolist()]
    torch.autograd.graph.increment_version(changed)
    return Zeroing(parameters, data, layout)


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU, those of a device all at once; those of the CPU are not copied."""
    copies = list(tensors)
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        flat = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in places]
        # Each part begins where any dtype may.
        sizes = [part.numel() + -part.numel() % _ALIGNMENT for part in flat]
        padded = [torch.nn.functional.pad(part, (0, -part.numel() % _ALIGNMENT)) for part in flat]
        for i, part in zip(places, torch.cat(padded).cpu().split(sizes), strict=True):
            tensor = tensors[i]
            copies[i] = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copies


def value_of(key: int, scores: Sequence[Tensor]) -> float:
    """The score that has one of the keys that :func:`select_top` gave for ``scores``."""
    dtype = _common_dtype(scores)
    if -key > _infinity(dtype):
        return float("nan")
    magnitude = torch.tensor(abs(key), dtype=_integers(dtype)).view(dtype).item()
    return -magnitude if key < 0 else magnitude


def pack_bits(flat: Tensor) -> Tensor:
    """One bit per element of a bool tensor: uint8 ``[ceil(n / 8)]``, the lowest bit first."""
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def encode(flat: Tensor) -> tuple[Tensor, int]:
    """Where a bool tensor ``[n]`` on the CPU is True.

    Returns:
        Its bits (:func:`pack_bits`) or the ascending indices, whichever is smaller, and how many
        runs of consecutive indices there are.
    """
    index = flat.nonzero()[:, 0].to(index_dtype(flat.numel()))
    runs = int((index[1:] != index[:-1] + 1).sum()) + bool(index.numel())
    return (index if 8 * index.nbytes < flat.numel() else pack_bits(flat)), runs


def index_dtype(elements: int) -> torch.dtype:
    """The narrowest dtype for indices of that many elements."""
    return torch.int32 if elements <= 2**31 else torch.int64


def _direct(name: str, *arguments: object) -> tuple[Any, ...] | None:
    """Call a compiled operator, unless its call has to be seen or it cannot judge its arguments."""
    if (
        not hasattr(ops._C, name)
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or backends.forced() not in (None, "cpu")
    ):
        return None
    return cast("tuple[Any, ...] | None", getattr(ops._C, name)(*arguments))


def _home(tensors: Sequence[Tensor]) -> torch.device | None:
    """The device that all tensors are on, or None."""
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 else None


def _check_dtypes(scores: Sequence[Tensor]) -> None:
    for dtype in {score.dtype for score in scores}:
        if not dtype.is_floating_point:
            raise TypeError(f"scores must be floating-point tensors, got {dtype}")


def _zeroed(
    data: Tensor, parameter: Tensor, count: int, width: int, code: int, values: int, runs: int
) -> Zeroed:
    size = parameter.numel()
    bits = data[code : code + (count * width if width else -(-size // 8))]
    return Zeroed(
        bits.view(index_dtype(size)) if width else bits,
        data[values : values + count * parameter.element_size()].view(parameter.dtype),
        runs,
    )


# The plain-torch kernels.


def _check(op: str, argument: str, condition: bool, expected: str) -> None:
    # A RuntimeError, as the compiled kernels raise.
    if not condition:
        raise RuntimeError(f"fastfisher::{op}: {argument}: expected {expected}")


def _scores(
    op: str, scores: Sequence[Tensor], remain: Sequence[Tensor], weight: float
) -> list[Tensor]:
    if not remain:
        return list(scores)
    _check(op, "remain", len(remain) == len(scores), "none or one for each score")
    for score, other in zip(scores, remain, strict=True):
        matches = other.dtype == score.dtype and other.shape == score.shape
        _check(op, "remain", matches, "the dtypes and shapes of the scores")
    return [s - r.to(s.device) * weight for s, r in zip(scores, remain, strict=True)]


def _common_dtype(scores: Sequence[Tensor]) -> torch.dtype:
    # Both conversions are exact, so scores of different dtypes compare by value.
    wide = any(score.dtype == torch.float64 for score in scores)
    return torch.float64 if wide else torch.float32


def _integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _infinity(dtype: torch.dtype) -> int:
    return int(torch.tensor(float("inf"), dtype=dtype).view(_integers(dtype)))


def _ordered_keys(score: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat signed integers in the order of the elements; NaN is the lowest, -0.0 is +0.0.

    Integers, because comparing floats is not exact for denormals where the processor is told to
    flush them to zero.
    """
    values = score.detach().reshape(-1).to(dtype)
    bits = values.view(_integers(dtype))
    keys = torch.where(bits < 0, -(bits & torch.iinfo(bits.dtype).max), bits)
    return keys.masked_fill_(values.isnan(), -_infinity(dtype) - 1)


def _kth_key(scores: Sequence[Tensor], k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Find the key of the ``k``-th largest score, and how many with that key are selected.

    A radix select from the highest digit: the histogram of a digit, over the keys whose higher
    digits are those found so far, says which digit the k-th key has.
    """
    found = 0
    top = dtype.itemsize * 8 - _DIGIT_BITS
    for shift in range(top, -1, -_DIGIT_BITS):
        histogram = torch.zeros(2**_DIGIT_BITS, dtype=torch.int64)
        # The highest digit is signed: offset, it counts from 0 as the others do.
        offset = 2 ** (_DIGIT_BITS - 1) if shift == top else -(found << _DIGIT_BITS)
        for score in scores:
            keys = _ordered_keys(score, dtype)
            if shift != top:
                keys = keys[keys >> (shift + _DIGIT_BITS) == found]
            digits = (keys >> shift) + offset
            histogram += torch.bincount(digits, minlength=2**_DIGIT_BITS).cpu()
        at_least = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(at_least, k))
        if place:
            k -= int(at_least[place - 1])
        found = 2**_DIGIT_BITS - 1 - place - offset
    return found, k


def _chunked(flat: Tensor) -> Tensor:
    """A flat bool tensor as ``[chunks, CHUNK]``, filled up with False."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % CHUNK)).view(-1, CHUNK)


def _chunks(score: Tensor) -> int:
    return -(-score.numel() // CHUNK)


def _words(scores: Sequence[Tensor]) -> int:
    return sum(-(-score.numel() // _WORD) for score in scores)


def _select_top_default(
    scores: Sequence[Tensor], remain: Sequence[Tensor], weight: float, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    home = _home([*scores, *remain]) or torch.device("cpu")
    scores = _scores("select_top", scores, remain, weight)
    dtype = _common_dtype(scores)
    keys = torch.full((len(counts),), _infinity(dtype) + 1, dtype=torch.int64)
    selected = torch.zeros(len(counts), sum(map(_chunks, scores)), dtype=torch.int64)
    for j, k in enumerate(counts):
        if k == 0:
            continue
        key, ties = _kth_key(scores, k, dtype)
        own = [_ordered_keys(score, dtype) for score in scores]
        above = torch.cat([_chunked(part > key).sum(1).cpu() for part in own])
        tied = torch.cat([_chunked(part == key).sum(1).cpu() for part in own])
        left = (ties - (tied.cumsum(0) - tied)).clamp_(min=0)
        keys[j], selected[j] = key, above + tied.minimum(left)
    finite = torch.tensor([bool(score.isfinite().all()) for score in scores], dtype=torch.bool)
    # A superset of the groups will do, and nothing is gained here by a smaller one.
    candidates = torch.full((len(counts), _words(scores)), -1)
    return keys.to(home), selected.to(home), finite.to(home), candidates.to(home)


def _zero_selected_default(
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
    op = "zero_selected_"
    home = _home([*parameters, *scores, *remain, key, selected]) or torch.device("cpu")
    scores = _scores(op, scores, remain, weight)
    _check(op, "parameters", len(parameters) == len(scores), "one for each score")
    for parameter, score in zip(parameters, scores, strict=True):
        _check(op, "parameters", parameter.shape == score.shape, "the shapes of the scores")
    selected, least = selected.cpu(), int(key)
    _check(op, "selected", int(selected.sum()) == count, f"{count} in all")
    dtype = _common_dtype(scores)
    masks = []
    for score, counts in zip(scores, selected.split([*map(_chunks, scores)]), strict=True):
        keys = _ordered_keys(score, dtype)
        above, tied = _chunked(keys > least), _chunked(keys == least)
        left = counts.to(keys.device) - above.sum(1)
        chosen = above | (tied & (tied.cumsum(1) <= left[:, None]))
        matches = torch.equal(chosen.sum(1).cpu(), counts)
        _check(op, "selected", matches, "what select_top gave for these scores")
        masks.append(chosen.view(-1)[: score.numel()].view(score.shape))

    pieces: list[Tensor] = []
    end = 0

    def keep(piece: Tensor) -> int:
        nonlocal end
        begin = end
        data = piece.view(torch.uint8)
        pieces.append(torch.nn.functional.pad(data, (0, -data.numel() % _ALIGNMENT)))
        end += pieces[-1].numel()
        return begin

    layout = torch.zeros(len(parameters), 5, dtype=torch.int64)
    for row, parameter, mask in zip(layout, parameters, masks, strict=True):
        mask = mask.to(parameter.device)
        flat = mask.reshape(-1).cpu()
        code, runs = encode(flat)
        zeroed = int(flat.sum())
        width = 0 if code.dtype == torch.uint8 else code.element_size()
        places = [keep(code), keep(parameter[mask].cpu())]
        row.copy_(torch.tensor([zeroed, width, *places, runs if record else 0]))
        if zeroed:
            parameter.masked_fill_(mask, 0)
    data = torch.cat(pieces) if record and pieces else torch.empty(0, dtype=torch.uint8)
    return data.to(home), layout.to(home)


def select_top_fake(
    scores: Sequence[Tensor], remain: Sequence[Tensor], weight: float, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``select_top`` gives for tensors without data."""
    home = _home([*scores, *remain])
    return (
        torch.empty(len(counts), dtype=torch.int64, device=home),
        torch.empty(len(counts), sum(map(_chunks, scores)), dtype=torch.int64, device=home),
        torch.empty(len(scores), dtype=torch.bool, device=home),
        torch.empty(len(counts), _words(scores), dtype=torch.int64, device=home),
    )


def zero_selected_fake(
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
    """What ``zero_selected_`` gives for tensors without data."""
    home = _home([*parameters, *scores, *remain, key, selected])
    size = torch.library.get_ctx().new_dynamic_size() if record else 0
    return (
        torch.empty(size, dtype=torch.uint8, device=home),
        torch.empty(len(parameters), 5, dtype=torch.int64, device=home),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "select_top": select_top_fake,
    "zero_selected_": zero_selected_fake,
}
"""What each operator gives for tensors without data."""

for _library in _libraries:
    _library.impl("select_top", _select_top_default, "CompositeExplicitAutograd")
    _library.impl("zero_selected_", _zero_selected_default, "CompositeExplicitAutograd")
    for _name, _kernel in FAKES.items():
        torch.library.register_fake(f"{_library.ns}::{_name}", _kernel, lib=_library)
