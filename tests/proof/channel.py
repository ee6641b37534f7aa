"""Cases of the channel family: biases, affine norms and elementwise scales."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops

from .case import Case
from .layout import CONTIGUOUS, DTYPES, Held, Layout, check, numbers

# Over (sample, position, channel).
LAST = Layout((0, 1, 2))
FIRST = Layout((0, 2, 1))
# What a mean or a scale has one number for; it is broadcast to the rest by strides of zero.
_STATISTICS = {
    "one": (1, 1, 1),
    "channel": (1, 1, None),
    "sample": (None, 1, None),
    "position": (None, None, 1),
    "full": (None, None, None),
}


def channel_case(
    shape: tuple[int, int, int],
    kernel: str,
    layout: Layout = LAST,
    note: str = "",
    *,
    weight: bool = True,
    bias: bool = True,
    mean: str | None = "channel",
    scale: str = "channel",
    grad_input: bool = False,
    input_layout: Layout | None = None,
    out_layout: Layout = CONTIGUOUS,
    precision: str = "float32",
    power: int = 2,
    alpha: float = 0.5,
    small: bool = False,
) -> Case:
    """A call with ``shape`` (N, T, C); ``mean`` and ``scale`` name what they depend on."""

    def run(operators: Any) -> float:
        n, t, c = shape
        generator = torch.Generator().manual_seed(n * 7919 + t * 104729 + c)
        dtype = DTYPES[precision]

        def statistic(kind: str) -> Tensor:
            sizes = [
                own if own is not None else n
                for own, n in zip(_STATISTICS[kind], shape, strict=True)
            ]
            return numbers(sizes, generator).to(dtype).expand(shape)

        grad = Held(numbers(shape, generator).to(dtype), layout)
        x = Held(numbers(shape, generator).to(dtype), input_layout or layout) if weight else None
        m = statistic(mean) if weight and mean is not None else None
        s = statistic(scale) if weight else None
        to_weight = Held(numbers((c,), generator).to(dtype), out_layout) if weight else None
        to_bias = Held(numbers((c,), generator).to(dtype), out_layout) if bias else None
        factor = numbers((c,), generator).to(dtype) if grad_input else None
        to_input = Held(torch.zeros(shape, dtype=dtype), layout) if grad_input else None

        exact = [
            None if each is None else each.double()
            for each in (grad.tensor, None if x is None else x.tensor, m, s)
        ]
        assert exact[0] is not None
        per_sample = ops.channel_per_sample_grad(exact[0], *exact[1:])
        expected = [
            None
            if held is None or each is None
            else held.tensor.double() + alpha * each.abs().pow(power).sum(0)
            for held, each in zip((to_weight, to_bias), per_sample, strict=True)
        ]
        operators.channel_sum_grad_squared_(
            None if to_weight is None else to_weight.tensor,
            None if to_bias is None else to_bias.tensor,
            grad.tensor,
            None if x is None else x.tensor,
            m,
            s,
            None if to_input is None else to_input.tensor,
            factor,
            alpha,
            power,
        )
        errors = [
            check(name, held, right, precision)
            for name, held, right in zip(
                ("weight", "bias"), (to_weight, to_bias), expected, strict=True
            )
            if held is not None and right is not None
        ]
        if to_input is not None and factor is not None:
            passed_on = exact[0] * factor.double()
            errors.append(check("grad_input", to_input, passed_on, precision))
        grad.check_surroundings()
        return max(errors)

    parts = ["x".join(map(str, shape)), precision, "+".join(["w"] * weight + ["b"] * bias)]
    parts += [f"mean={mean} scale={scale}"] * weight + ["grad_input"] * grad_input
    parts += [f"|g|^{power}"] * (power != 2) + [f"alpha={alpha}"] * (alpha < 0)
    parts += [f"({note})"] * bool(note)
    kind = "".join("NTC"[dim] for dim in layout.order)
    return Case(f"channel {kind} {' '.join(parts)}", kernel, run, small)


def _lines_case(
    kernel: str,
    usual: Layout,
    samples: int,
    lines: int,
    length: int,
    *,
    layout: Layout | None = None,
    **kwargs: Any,
) -> Case:
    """A line is a position's channels where these are innermost, or a channel's positions."""
    shape = (samples, lines, length) if usual is LAST else (samples, length, lines)
    return channel_case(shape, kernel, layout or usual, **kwargs)


def _sums() -> list[Case]:
    """Both access patterns of the sums over positions, which share the list of sizes."""
    cases = []
    for kernel, usual in (("channel_sums_last", LAST), ("channel_sums_first", FIRST)):
        case = functools.partial(_lines_case, kernel, usual)
        order = usual.order
        cases += [
            case(2, 5, 8, small=True),
            case(2, 7, 5, small=True),
            case(1, 3, 1, small=True),
            case(3, 6, 33, mean=None, small=True),
            case(2, 9, 12, mean="sample", scale="sample", small=True),
            case(2, 5, 12, mean="position", scale="position", small=True),
            case(2, 6, 10, mean="full", scale="full", small=True),
            case(2, 6, 12, grad_input=True, small=True),
            case(2, 4, 8, precision="float64", small=True),
            case(2, 5, 12, layout=Layout(order, gap=3, offset=1), note="unaligned", small=True),
            case(2, 5, 12, layout=Layout(order, gap=4), note="aligned lines", small=True),
            case(2, 5, 6, layout=Layout(order, step=2), note="every other", small=True),
            case(3, 5, 16, bias=False, power=1, small=True),
            case(3, 17, 100, power=1, alpha=-0.25),
            case(4, 50, 64, grad_input=True, power=1),
            case(2, 300, 130, scale="one", mean=None),
            case(2, 49, 7 * 7),
            case(1, 700, 12, note="many positions, few samples"),
            case(1, 6, 2500),
            case(5, 40, 68, precision="float64", grad_input=True),
            case(3, 33, 31, precision="float64", mean="position", scale="position"),
            case(2, 12, 40, weight=False, grad_input=True, mean=None),
            case(2, 130, 36, mean="position", scale="channel"),
            case(2, 130, 36, mean="channel", scale="position", grad_input=True),
            case(2, 20, 24, input_layout=FIRST if usual is LAST else LAST, note="x the other way"),
            case(0, 5, 8, note="no samples"),
            case(2, 5, 0, note="an empty line"),
            case(2, 0, 5, note="no lines"),
            case(2, 3, 8, layout=Layout(order, far=True), note="far samples", grad_input=True),
            case(3, 2, 8, layout=Layout((order[1], 0, order[2]), far=True), note="far lines"),
        ]
    return cases


def _squares() -> list[Case]:
    """One position and no factor: nothing to add before the squares."""
    kernel = "channel_squares"

    def case(n: int, c: int, layout: Layout = LAST, **kwargs: Any) -> Case:
        return channel_case((n, 1, c), kernel, layout, weight=False, **kwargs)

    return [
        case(3, 8, small=True),
        case(1, 1, small=True),
        case(5, 3, small=True),
        case(70, 10, small=True),
        case(33, 33, power=1, small=True),
        case(9, 128, alpha=-0.5, small=True),
        case(40, 6, precision="float64", small=True),
        case(6, 12, Layout(LAST.order, gap=1, offset=1), note="unaligned", small=True),
        case(6, 12, Layout(order=(1, 0, 2)), note="samples innermost", small=True),
        case(6, 12, Layout(LAST.order, step=3), note="every third", small=True),
        case(12, 20, out_layout=Layout(step=2), note="strided out", small=True),
        case(2000, 10, note="many samples"),
        # Enough samples to be split, which another kernel adds up.
        *(
            case(n, c, power=1 + c % 2, small=n == 1100 and c < 65)
            for n in (1100, 1300, 1700, 2500)
            for c in (17, 20, 33, 40, 50, 64, 65, 70, 80, 100, 130)
        ),
        case(1500, 64, power=1),
        case(3, 1030),
        case(300, 260, precision="float64"),
        case(0, 8, note="no samples"),
        case(4, 0, note="no channels"),
        case(2, 8, Layout(LAST.order, far=True), note="far samples"),
        case(2, 2, Layout((2, 0, 1), far=True), note="far channels"),
        channel_case((30, 1, 20), kernel, mean="sample", scale="one", out_layout=Layout(step=2)),
        channel_case((260, 1, 20), kernel, weight=True, grad_input=True, power=1),
        channel_case((2, 600, 24), kernel, note="partial sums of positions"),
    ]


CASES: list[Case] = _sums() + _squares()
