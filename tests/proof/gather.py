"""Cases of the gather family: embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops

from .case import Case
from .layout import CONTIGUOUS, DTYPES, Held, Layout, check, numbers

Tokens = Callable[[int, int, int, torch.Generator], Tensor]


def anything(n: int, t: int, v: int, generator: torch.Generator) -> Tensor:
    return torch.randint(v, (n, t), generator=generator)


def one_token(n: int, t: int, v: int, generator: torch.Generator) -> Tensor:
    return torch.full((n, t), v - 1)


def ends_in_padding(n: int, t: int, v: int, generator: torch.Generator) -> Tensor:
    """Sequences of different lengths, filled up with token 0."""
    tokens = torch.randint(1, v, (n, t), generator=generator)
    lengths = torch.randint(1, t + 1, (n, 1), generator=generator)
    return torch.where(torch.arange(t) < lengths, tokens, 0)


def once_a_sample(n: int, t: int, v: int, generator: torch.Generator) -> Tensor:
    """The positions' own embeddings: each token once in every sample."""
    return torch.stack([torch.randperm(v, generator=generator)[:t] for _ in range(n)])


def rare_and_frequent(n: int, t: int, v: int, generator: torch.Generator) -> Tensor:
    """A few tokens make up most of the text, as in language."""
    return (v * torch.rand(n, t, generator=generator) ** 6).long()


def gather_case(
    shape: tuple[int, int, int],
    tokens: Tokens = anything,
    note: str = "",
    *,
    kernel: str = "gather_windows",
    vocabulary: int = 11,
    padding_index: int = -1,
    layout: Layout = CONTIGUOUS,
    index_layout: Layout = CONTIGUOUS,
    out_layout: Layout = CONTIGUOUS,
    shared_index: bool = False,
    precision: str = "float32",
    power: int = 2,
    alpha: float = 0.5,
    small: bool = False,
) -> Case:
    """A call with ``shape`` (N, T, D)."""

    def run(operators: Any) -> float:
        n, t, d = shape
        generator = torch.Generator().manual_seed(n * 7919 + t * 104729 + d)
        dtype = DTYPES[precision]
        grad = Held(numbers(shape, generator).to(dtype), layout)
        values = tokens(n, t, vocabulary, generator)
        index = Held(values, index_layout).tensor
        if shared_index:
            index = index[:1].expand(n, t)
        out = Held(numbers((vocabulary, d), generator).to(dtype), out_layout)
        per_sample = ops.embedding_per_sample_grad(
            grad.tensor.double(), index, padding_index, vocabulary
        )
        expected = out.tensor.double() + alpha * per_sample.abs().pow(power).sum(0)
        operators.embedding_sum_grad_squared_(
            out.tensor, grad.tensor, index, padding_index, alpha, power
        )
        return check("out", out, expected, precision)

    name = (tokens.__name__.replace("_", " "), note, precision)
    parts = ["x".join(map(str, shape)), f"of {vocabulary}", *(each for each in name if each)]
    parts += [f"padding={padding_index}"] * (padding_index >= 0)
    parts += [f"|g|^{power}"] * (power != 2) + [f"alpha={alpha}"] * (alpha < 0)
    return Case(f"gather {' '.join(parts)}", kernel, run, small)


def _windows() -> list[Case]:
    case = gather_case
    return [
        case((2, 5, 4), small=True),
        case((1, 1, 1), small=True),
        case((3, 7, 5), small=True),
        case((2, 6, 33), vocabulary=3, small=True),
        case((4, 9, 8), ends_in_padding, padding_index=0, small=True),
        case((3, 10, 4), once_a_sample, small=True),
        case((3, 5, 12), one_token, power=1, small=True),
        case((2, 9, 6), alpha=-0.5, precision="float64", small=True),
        case((5, 17, 9), precision="float64", small=True),
        case((2, 9, 8), layout=Layout(gap=1, offset=1), note="unaligned", small=True),
        case((2, 9, 8), layout=Layout((0, 2, 1)), note="positions innermost", small=True),
        case((2, 9, 8), layout=Layout((1, 0, 2)), note="samples inside"),
        case((2, 9, 8), layout=Layout(step=2), note="every other column"),
        case((3, 9, 8), index_layout=Layout((1, 0)), note="transposed index"),
        case((3, 9, 8), index_layout=Layout(step=3), note="every third index"),
        case((4, 9, 8), shared_index=True, note="one index for all samples"),
        case((2, 9, 8), out_layout=Layout((1, 0)), note="transposed out"),
        case((2, 9, 8), out_layout=Layout(gap=4), note="out with gaps"),
        case((2, 9, 8), out_layout=Layout(gap=1), note="out with unaligned rows"),
        case((2, 3, 130)),
        case((1, 4, 1027), vocabulary=5),
        case((2, 3, 300), precision="float64"),
        case((0, 5, 8), note="no samples"),
        case((4, 0, 8), note="no positions"),
        case((4, 5, 0), note="no columns"),
        case((4, 6, 8), one_token, padding_index=10, note="nothing but padding"),
        case((2, 3, 8), layout=Layout(far=True), note="far samples"),
        case((3, 2, 8), layout=Layout((1, 0, 2), far=True), note="far positions"),
        case((3, 4, 2), layout=Layout((2, 0, 1), far=True), note="far columns"),
        case((3, 4, 8), out_layout=Layout(far=True), vocabulary=2, note="far out"),
    ]


def _spans() -> list[Case]:
    """Tokens that take more positions than one window has."""

    def case(*args: Any, **kwargs: Any) -> Case:
        return gather_case(*args, kernel="gather_spans", **kwargs)

    return [
        case((2, 40, 4), one_token, small=True),
        case((1, 70, 5), one_token, small=True),
        case((40, 2, 4), one_token, power=1, small=True),
        case((5, 33, 4), vocabulary=2, small=True),
        case((9, 20, 3), ends_in_padding, small=True),
        case((3, 65, 4), rare_and_frequent, precision="float64", small=True),
        case((4, 32, 8), one_token, note="runs as long as a window", small=True),
        case((2, 64, 8), one_token, vocabulary=1, note="runs of two windows", small=True),
        case((2, 70, 6), one_token, layout=Layout(offset=1), note="unaligned", small=True),
        case((8, 40, 8), ends_in_padding, padding_index=0),
        case((3, 300, 20), vocabulary=3),
        case((200, 3, 20), vocabulary=2, alpha=-0.25),
        case((7, 190, 36), rare_and_frequent, vocabulary=500),
        case((50, 60, 16), rare_and_frequent, vocabulary=300, power=1),
        *(case((n, 130 // n, d), one_token) for n in (1, 2, 3, 10, 65) for d in (1, 7, 16)),
        case((1, 2500, 8), one_token),
        case((2500, 1, 8), one_token),
        case((31, 31, 132), ends_in_padding),
        case((6, 100, 9), vocabulary=2, layout=Layout((0, 2, 1)), out_layout=Layout((1, 0))),
        case((20, 50, 10), once_a_sample, vocabulary=50, precision="float64"),
        case((16, 16, 8), one_token, padding_index=10, note="nothing but padding"),
        case((2, 40, 8), one_token, vocabulary=2, out_layout=Layout(far=True), note="far out"),
        case((2, 40, 8), one_token, layout=Layout(far=True), note="far samples"),
    ]


CASES: list[Case] = _windows() + _spans()
