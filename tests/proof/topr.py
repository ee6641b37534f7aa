"""Cases of the top-R selection: the bits of the CPU's operators, whatever runs the others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher import topr

from .case import Case

CHUNK, GROUP = topr.CHUNK, topr.GROUP
WORD = 64 * GROUP
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Make = Callable[[int, torch.dtype, torch.Generator], Tensor]


def random(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def wide(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of every magnitude, as Fisher information is."""
    return random(size, torch.float64, generator).mul(6).exp().to(dtype)


def ties(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return random(size, torch.float64, generator).round().to(dtype)


def equal(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.full((size,), 0.25, dtype=dtype)


def zeros(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Mostly zeros, of both signs."""
    noise = random(size, torch.float64, generator)
    return noise.where(noise > 1, noise.sign() * 0.0).to(dtype)


def denormal(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    limits = torch.finfo(dtype)
    steps = random(size, torch.float64, generator).mul(3).round()
    return (steps * limits.smallest_normal * limits.eps).to(dtype)


def special(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    noise = random(size, dtype, generator)
    noise[::7], noise[3::11], noise[5::13] = math.nan, math.inf, -math.inf
    noise[1::17], noise[2::19] = torch.finfo(dtype).max, torch.finfo(dtype).min
    return noise


def neighbours(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Keys next to one another, which only the last digit tells apart."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    steps = torch.randint(-40, 41, (size,), generator=generator).to(integers)
    return (steps + torch.tensor(0.5, dtype=dtype).view(integers)).view(dtype)


def rows(shape: Sequence[int], dtype: torch.dtype, make: Make, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return make(math.prod(shape), dtype, generator).view(tuple(shape))


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the first dimension innermost in memory."""
    order = [*range(1, tensor.dim()), 0]
    return tensor.permute(order).contiguous().permute(-1, *range(tensor.dim() - 1))


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def every_second(tensor: Tensor) -> Tensor:
    """The same values with a gap behind each."""
    space = tensor.new_full((*tensor.shape, 2), 7.0)
    space[..., 0] = tensor
    return space[..., 0]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, one element off the alignment of vectors."""
    space = tensor.new_empty(tensor.numel() + 1)
    space[1:] = tensor.reshape(-1)
    return space[1:].view(tensor.shape)


def like(score: Tensor, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """A parameter whose elements all differ from zero."""
    numbers = torch.arange(1, score.numel() + 1) % 97 + 1
    return layout(numbers.view(score.shape).to(dtype))


def check(
    operators: Any,
    scores: Sequence[Tensor],
    counts: Sequence[int],
    remain: Sequence[Tensor] = (),
    weight: float = 0.37,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layout: Callable[[Tensor], Tensor] = torch.clone,
) -> float:
    """Holds the operators to those of the CPU: every result, the parameters, and the record."""
    reference = torch.ops.fastfisher
    scores, remain = list(scores), list(remain)
    found = operators.select_top(scores, remain, weight, list(counts))
    wanted = reference.select_top(scores, remain, weight, list(counts))
    for name, own, other in zip(("keys", "selected", "finite"), found, wanted, strict=False):
        assert torch.equal(own, other), name
    for j, count in enumerate(counts):
        for record in (True, False):
            before = [like(s, dtypes[i % len(dtypes)], layout) for i, s in enumerate(scores)]
            after = [layout(parameter) for parameter in before]
            expected = [parameter.clone() for parameter in before]
            chosen = [found[0][j], found[1][j], found[3][j], count, record]
            data, rows_ = operators.zero_selected_(after, scores, remain, weight, *chosen)
            chosen = [wanted[0][j], wanted[1][j], wanted[3][j], count, record]
            data_, layout_ = reference.zero_selected_(expected, scores, remain, weight, *chosen)
            assert all(torch.equal(a, e) for a, e in zip(after, expected, strict=True)), count
            assert torch.equal(rows_[:, 0], layout_[:, 0]), "counts of the tensors"
            if record:
                own = topr.Zeroing(before, data, rows_)
                other = topr.Zeroing(before, data_, layout_)
                _check_records(*topr.Zeroing.records([own, other]))
    return 0.0


def _check_records(own: Sequence[topr.Zeroed], other: Sequence[topr.Zeroed]) -> None:
    for a, b in zip(own, other, strict=True):
        assert torch.equal(a.code, b.code) and torch.equal(a.values, b.values)
        assert a.runs == b.runs


def selection(
    name: str,
    shapes: Sequence[Sequence[int]],
    make: Make = random,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    counts: Sequence[int | float] = (0.02, 0.5),
    paired: bool = False,
    layout: Callable[[Tensor], Tensor] = torch.clone,
    parameters: Sequence[torch.dtype] = (torch.float32,),
    weight: float = 0.37,
    small: bool = False,
) -> Case:
    """Scores of these shapes; ``counts`` as numbers, or as parts of all."""

    def run(operators: Any) -> float:
        kinds = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
        pairs = list(zip(shapes, kinds, strict=True))
        scores = [layout(rows(shape, kind, make, i)) for i, (shape, kind) in enumerate(pairs)]
        remain = []
        if paired:
            remain = [layout(rows(shape, kind, random, 99)) for shape, kind in pairs]
        total = sum(map(math.prod, shapes))
        numbers = [round(k * total) if isinstance(k, float) else k for k in counts]
        return check(operators, scores, numbers, remain, weight, parameters, layout)

    return Case(name, "topr", run, small)


def boundary(elements: int, kept: int) -> Case:
    """All equal, so that the last element selected is where the ties end."""

    def run(operators: Any) -> float:
        scores = [torch.ones(elements), torch.ones(5)]
        return check(operators, scores, [kept])

    return Case(f"the first {kept} of {elements} ties", "topr", run)


def refused(name: str, argument: str, call: Callable[[Any], object]) -> Case:
    def run(operators: Any) -> float:
        try:
            call(operators)
        except (RuntimeError, ValueError) as error:
            assert argument in str(error), error
            return 0.0
        raise AssertionError("nothing was raised")

    return Case(name, "topr", run, small=True)


def _zero_other_scores(operators: Any) -> None:
    scores = [torch.arange(3000.0)]
    keys, selected, _, candidates = operators.select_top(scores, [], 1.0, [900])
    operators.zero_selected_(
        [torch.ones(3000)], [-scores[0]], [], 1.0, keys[0], selected[0], candidates[0], 900, False
    )


def _zero(operators: Any, **changed: Any) -> None:
    scores = [torch.arange(30.0)]
    keys, selected, _, candidates = operators.select_top(scores, [], 1.0, [9])
    arguments = {
        "parameters": [torch.ones(30)],
        "scores": scores,
        "remain": [],
        "weight": 1.0,
        "key": keys[0],
        "selected": selected[0],
        "candidates": candidates[0],
        "count": 9,
        "record": True,
    }
    operators.zero_selected_(*{**arguments, **changed}.values())


def _thousand(operators: Any) -> float:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(0, 60, (1000,), generator=generator).tolist()
    scores = list(ties(sum(sizes), torch.float32, generator).split(sizes))
    return check(operators, scores, [sum(sizes) // 3])


def _rounded_twice(dtype: torch.dtype) -> Case:
    def run(operators: Any) -> float:
        # A difference that is fused, or not rounded to the dtype, is nearly always another number.
        generator = torch.Generator().manual_seed(5)
        scale = 2.0 ** torch.randint(-24, 15, (3000,), generator=generator)
        score = (torch.randn(3000, dtype=torch.float64, generator=generator) * scale).to(dtype)
        remain = torch.cat([score[:-7].float().mul(2.7).to(dtype), score[:7]])
        return check(operators, [score], [1, 1000, 2995], [remain], 1 / 3)

    return Case(f"differences are rounded twice to {dtype}", "topr", run, small=True)


def _strided_beyond_int32(operators: Any) -> float:
    # Only the pages that are touched exist.
    space = torch.empty(2**31 + 5000, dtype=torch.float32)
    score = space.as_strided((3, 40), (2**30 + 1000, 1))
    score.copy_(rows((3, 40), torch.float32, random))
    return check(operators, [score], [7, 100])


ODD = [(5,), (0, 3), (2 * CHUNK + 1,), (7001,), (), (333,)]
TINY = [(5,), (0,), (40,), (1,), (WORD + 3,)]
_short = functools.partial(selection, shapes=TINY, small=True)

CASES: list[Case] = [
    *(selection(f"random {str(d)[6:]}", ODD, random, [d], counts=(1, 0.02, 0.5)) for d in FLOATS),
    *(selection(f"special {str(d)[6:]}", TINY, special, [d], small=True) for d in FLOATS),
    *(selection(f"denormal {str(d)[6:]}", TINY, denormal, [d], small=True) for d in FLOATS),
    *(selection(f"neighbours {str(d)[6:]}", [(3000,)], neighbours, [d]) for d in FLOATS),
    *(_rounded_twice(dtype) for dtype in FLOATS),
    _short("wide", make=wide),
    _short("all equal", make=equal, counts=(3, 500)),
    _short("mostly zero, of both signs", make=zeros, counts=(0.1, 0.5, 0.95)),
    _short("heavily tied", make=ties, counts=(0.1, 0.3, 0.8)),
    _short("none and all", counts=(0, 1.0)),
    _short("all but one, and one", counts=(1, len(ODD), 5 + 40 + WORD + 3)),
    _short("no counts", counts=()),
    _short("paired", paired=True),
    _short("remain, NaN and inf", make=special, paired=True),
    _short("weight 0 and infinite scores", make=special, paired=True, weight=0.0),
    _short("mixed dtypes", make=ties, dtypes=FLOATS),
    _short("mixed without float64", make=wide, dtypes=FLOATS[:1] + FLOATS[2:], paired=True),
    selection("mixed dtypes, paired", ODD, wide, FLOATS, paired=True),
    selection("heavily tied, long", ODD, ties, counts=(0.1, 0.3, 0.8)),
    selection("all equal, long", ODD, equal, counts=(0.1, 0.7)),
    selection("mostly zero, long", ODD, zeros, counts=(0.01, 0.9)),
    *(boundary(CHUNK + d, CHUNK) for d in (-1, 0, 1)),
    *(boundary(2 * CHUNK + 9, CHUNK + d) for d in (-1, 0, 1)),
    *(boundary(WORD + d, WORD - 1) for d in (-1, 0, 1)),
    boundary(GROUP * 3 + 1, GROUP * 2 + 1),
    selection("transposed", [(31, 97), (3, 5, 7)], ties, layout=transposed, small=True),
    selection("transposed float64", [(31, 97)], ties, [torch.float64], layout=transposed),
    selection("transposed bfloat16", [(31, 97)], ties, [torch.bfloat16], layout=transposed),
    selection("channels last", [(6, 5, 7, 3), (9, 11, 3, 3)], paired=True, layout=channels_last),
    selection("gaps", [(37, 41), (19,)], ties, layout=every_second, paired=True, small=True),
    selection("misaligned", [(2 * WORD,), (19,)], layout=misaligned, paired=True),
    selection("misaligned float16", [(2 * WORD,)], ties, [torch.float16], layout=misaligned),
    selection(
        "parameters of every width",
        [(50,)] * 6 + [(WORD + 1,)],
        ties,
        counts=(0.05, 0.6),
        parameters=(
            torch.bool,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.complex128,
            torch.uint8,
            torch.complex64,
        ),
        small=True,
    ),
    selection("long runs across chunks", [(2 * CHUNK + 9,), (64,)], zeros, counts=(0.16, 0.99)),
    Case("1000 tiny tensors", "topr", _thousand),
    Case("strides beyond 2^31", "topr", _strided_beyond_int32, small=True),
    refused("other scores", "selected", _zero_other_scores),
    refused("no scores", "counts", lambda o: o.select_top([torch.ones(3)], [], 1.0, [4])),
    refused("integers", "scores", lambda o: o.select_top([torch.ones(3).long()], [], 1.0, [1])),
    refused("remain", "remain", lambda o: o.select_top([torch.ones(3)], [torch.ones(2)], 1.0, [1])),
    refused("parameters", "parameters", lambda o: _zero(o, parameters=[torch.ones(29)])),
    refused("key", "key", lambda o: _zero(o, key=torch.zeros(1).long())),
    refused("selected", "selected", lambda o: _zero(o, selected=torch.zeros(2).long())),
    refused("sums", "selected", lambda o: _zero(o, count=8)),
    refused("candidates", "candidates", lambda o: _zero(o, candidates=torch.zeros(2).long())),
]
