"""Cases of the outer family's kernels for float32 and float64: tiles, and tiny groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops

from . import outer
from .case import Case
from .layout import CONTIGUOUS, DTYPES, Held, Layout, check, numbers

Pair = tuple[int, int]

TILES = "outer_simt"
GROUPS = "outer_depthwise"

# Over (sample, position, feature), and over the dimensions of images.
POSITIONS_LAST = Layout((0, 2, 1))
POSITIONS_FIRST = Layout((1, 0, 2))
NHWC = Layout((0, 2, 3, 1))
TRANSPOSED = Layout((1, 0))


def linear(
    shape: tuple[int, int, int, int],
    note: str = "",
    *,
    grad: Layout = CONTIGUOUS,
    x: Layout = CONTIGUOUS,
    out: Layout = CONTIGUOUS,
    expand: tuple[int, ...] = (),
    precision: str = "float32",
    power: int = 2,
    alpha: float = 0.5,
    kernel: str = TILES,
    small: bool = False,
) -> Case:
    """A linear layer of ``shape`` (N, T, O, I); both operands are broadcast over ``expand``."""

    def run(operators: Any) -> float:
        n, t, o, i = shape
        generator = torch.Generator().manual_seed(n * 7919 + t * 104729 + o * 31 + i)

        def operand(features: int, layout: Layout) -> tuple[Held, Tensor]:
            sizes = [1 if d in expand else size for d, size in enumerate((n, t, features))]
            held = Held(numbers(sizes, generator).to(DTYPES[precision]), layout)
            return held, held.tensor.expand(n, t, features)

        (held_grad, g), (held_x, columns) = operand(o, grad), operand(i, x)
        total = Held(numbers((o, i), generator).abs().to(DTYPES[precision]), out)
        exact = ops.linear_per_sample_grad(g.double(), columns.double()).abs().pow(power).sum(0)
        exact = total.tensor.double() + alpha * exact
        operators.linear_sum_grad_squared_(total.tensor, g, columns, alpha, power, allow_tf32=False)
        for held in (held_grad, held_x):
            held.check_surroundings()
        return check(name, total, exact, precision)

    parts = ["x".join(map(str, shape)), precision, note]
    parts += [f"|g|^{power}"] * (power != 2)
    name = "linear " + " ".join(filter(None, parts))
    return Case(name, kernel, run, small)


def conv(
    shape: tuple[int, int, int, int],
    out_channels: int,
    kernel_size: Pair,
    note: str = "",
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    grad: Layout = CONTIGUOUS,
    x: Layout = CONTIGUOUS,
    out: Layout = CONTIGUOUS,
    nhwc: bool = False,
    precision: str = "float32",
    power: int = 2,
    alpha: float = 0.5,
    kernel: str = TILES,
    small: bool = False,
) -> Case:
    """A convolution of an input of ``shape`` (N, C, H, W); ``nhwc`` is the layout of all three."""
    if nhwc:
        grad = x = out = NHWC

    def run(operators: Any) -> float:
        n, channels, *sides = shape
        size = [
            (e + 2 * p - d * (k - 1) - 1) // s + 1
            for e, p, d, k, s in zip(sides, padding, dilation, kernel_size, stride, strict=True)
        ]
        generator = torch.Generator().manual_seed(math.prod(shape) + 31 * out_channels)
        dtype = DTYPES[precision]
        g = Held(numbers((n, out_channels, *size), generator).to(dtype), grad)
        image = Held(numbers(shape, generator).to(dtype), x)
        weight = (out_channels, channels // groups, *kernel_size)
        total = Held(numbers(weight, generator).abs().to(dtype), out)
        geometry = (stride, padding, dilation, groups)
        exact = total.tensor.double()
        if n:
            per_sample = ops.conv2d_per_sample_grad(
                g.tensor.double(), image.tensor.double(), kernel_size, *geometry
            )
            exact = exact + alpha * per_sample.abs().pow(power).sum(0)
        operators.conv2d_sum_grad_squared_(
            total.tensor, g.tensor, image.tensor, *geometry, alpha, power, allow_tf32=False
        )
        for held in (g, image):
            held.check_surroundings()
        return check(name, total, exact, precision)

    parts = [f"{'x'.join(map(str, shape))}->{out_channels}", "x".join(map(str, kernel_size))]
    parts += [f"{stride=} {padding=} {dilation=} {groups=}".replace(" ", "")]
    parts += [precision, "NHWC" * nhwc, note] + [f"|g|^{power}"] * (power != 2)
    name = "conv " + " ".join(filter(None, parts))
    return Case(name, kernel, run, small)


_LINEAR = [
    # Each tile, full, with a rest, and smaller than itself; one step of positions, and several.
    linear((1, 16, 256, 256), small=True),
    linear((1, 21, 252, 124), "rest", small=True),
    linear((1, 19, 251, 123), "rest, no vectors", small=True),
    linear((1, 19, 250, 256), "vectors of the input"),
    linear((1, 19, 256, 250), "vectors of the gradient"),
    linear((5, 17, 100, 61), "vectors of the gradient"),
    linear((6, 17, 256, 128), "splits"),
    linear((5, 18, 253, 125), "splits, no vectors"),
    linear((1, 16, 256, 64), "high tiles", small=True),
    linear((1, 19, 251, 61), "high tiles, no vectors"),
    linear((1, 19, 251, 64), "high tiles, vectors of the input"),
    linear((2, 19, 252, 61), "high tiles, vectors of the gradient"),
    linear((1, 16, 64, 256), "tiles of two warps", small=True),
    linear((1, 19, 61, 251), "tiles of two warps, no vectors"),
    linear((1, 19, 61, 256), "tiles of two warps, vectors of the input"),
    linear((2, 19, 64, 251), "tiles of two warps, vectors of the gradient"),
    linear((3, 21, 16, 144), "flat tiles", small=True),
    linear((1, 37, 250, 250), "positions last", grad=POSITIONS_LAST, x=POSITIONS_LAST),
    linear((2, 21, 260, 132)),
    linear((3, 33, 128, 64)),
    linear((5, 17, 100, 60), small=True),
    linear((5, 18, 97, 61), "no vectors", small=True),
    linear((9, 50, 32, 32), "splits"),
    linear((40, 7, 20, 12), "splits"),
    linear((3, 6, 7, 9), small=True),
    linear((2, 1, 33, 34), "one position", small=True),
    linear((1, 1, 1, 1), "one of everything", small=True),
    linear((1, 64, 5, 3), "one sample"),
    linear((4, 4, 8, 8), "whole chunks"),
    linear((7, 16, 36, 40), "whole steps"),
    linear((0, 5, 6, 7), "no samples", small=True),
    linear((3, 0, 6, 7), "no positions", small=True),
    linear((3, 5, 0, 7), "no rows", small=True),
    linear((3, 5, 6, 0), "no columns", small=True),
    # Where the operands lie.
    linear((3, 20, 36, 40), "positions last", grad=POSITIONS_LAST, x=POSITIONS_LAST),
    linear((3, 20, 130, 140), "positions last", grad=POSITIONS_LAST, x=POSITIONS_LAST),
    linear((3, 20, 36, 40), "grad's positions last", grad=POSITIONS_LAST),
    linear((3, 20, 36, 40), "input's positions last", x=POSITIONS_LAST),
    linear((3, 20, 36, 40), "positions first", grad=POSITIONS_FIRST, x=POSITIONS_FIRST),
    linear((3, 20, 36, 40), "unaligned grad", grad=Layout(offset=1)),
    linear((3, 20, 36, 40), "unaligned input", x=Layout(offset=2)),
    linear((3, 20, 36, 40), "odd lines", grad=Layout(gap=1), x=Layout(gap=3), small=True),
    linear((3, 20, 36, 40), "longer lines", grad=Layout(gap=4), x=Layout(gap=8)),
    linear((3, 20, 36, 40), "every second", grad=Layout(step=2), x=Layout(step=3)),
    linear((6, 20, 36, 40), "grad and input of one sample", expand=(0,)),
    linear((2, 20, 36, 40), "grad and input of one position", expand=(1,)),
    # Where out lies.
    linear((2, 20, 36, 40), "out transposed", out=TRANSPOSED),
    linear((2, 20, 36, 40), "unaligned out", out=Layout(offset=1)),
    linear((2, 20, 36, 40), "longer lines of out", out=Layout(gap=4)),
    linear((12, 20, 36, 40), "every second of out, splits", out=Layout(step=2)),
    # Strides past 2**31 elements.
    linear((3, 3, 33, 4), "far samples", grad=Layout(far=True), x=Layout(far=True)),
    linear((2, 2, 33, 4), "far positions", grad=Layout((1, 0, 2), far=True)),
    linear((2, 2, 4, 36), "far positions", x=Layout((1, 0, 2), far=True)),
    linear((2, 3, 2, 36), "far rows", grad=Layout((2, 0, 1), far=True)),
    linear((2, 3, 70, 2), "far columns", x=Layout((2, 0, 1), far=True)),
    linear((2, 3, 2, 36), "far rows of out", out=Layout(far=True)),
    linear((2, 3, 36, 2), "far columns of out", out=Layout((1, 0), far=True)),
    # What is added.
    linear((3, 5, 40, 50), power=1, small=True),
    linear((3, 5, 40, 50), "alpha<0", alpha=-2.0),
    linear((9, 40, 33, 31), "splits, alpha<0", power=1, alpha=-2.0),
]

_CONV = [
    conv((2, 5, 7, 6), 33, (3, 3), padding=(1, 1), small=True),
    conv((2, 8, 7, 6), 8, (3, 3), padding=(1, 1), nhwc=True, small=True),
    conv((2, 3, 12, 11), 16, (3, 3), "first layer", padding=(1, 1)),
    conv((2, 3, 12, 11), 16, (3, 3), "first layer", padding=(1, 1), nhwc=True),
    conv((1, 28, 6, 6), 256, (3, 3), padding=(1, 1)),
    conv((1, 28, 6, 6), 256, (3, 3), padding=(1, 1), nhwc=True),
    conv((6, 16, 8, 8), 32, (1, 1)),
    conv((6, 16, 8, 8), 32, (1, 1), nhwc=True, small=True),
    conv((2, 12, 9, 8), 10, (2, 3), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    conv((2, 12, 9, 8), 12, (2, 3), stride=(2, 3), padding=(1, 2), dilation=(2, 1), nhwc=True),
    conv((3, 24, 5, 5), 32, (3, 2), groups=2),
    conv((3, 32, 5, 5), 32, (3, 2), groups=2, nhwc=True),
    conv((2, 16, 3, 3), 16, (3, 3), "one position"),
    conv((2, 16, 2, 2), 16, (5, 5), "mostly padding", padding=(3, 2)),
    conv((2, 6, 30, 1), 40, (3, 1), "one position a line", padding=(1, 0)),
    conv((2, 6, 1, 30), 40, (1, 3), "one line", padding=(0, 1)),
    conv((2, 8, 6, 6), 8, (3, 3), "unaligned", padding=(1, 1), x=Layout((0, 2, 3, 1), offset=1)),
    conv((2, 8, 6, 6), 16, (3, 3), "mixed layouts", padding=(1, 1), grad=NHWC),
    conv((2, 8, 6, 6), 16, (3, 3), "longer lines", x=Layout(gap=3), grad=Layout(gap=1)),
    conv((9, 8, 6, 6), 8, (3, 3), "lines first", x=Layout((2, 0, 3, 1)), out=Layout((3, 1, 0, 2))),
    conv((2, 8, 2, 6), 9, (2, 2), "far lines", x=Layout((2, 0, 3, 1), far=True)),
    conv((2, 2, 5, 6), 40, (2, 3), "far channels", x=Layout((1, 0, 2, 3), far=True)),
    conv((0, 8, 6, 6), 8, (3, 3), "no samples", small=True),
    conv((2, 8, 6, 6), 8, (3, 3), power=1, alpha=-0.25, nhwc=True),
]

_DOUBLE = [
    linear((1, 20, 128, 128), precision="float64"),
    linear((2, 21, 70, 66), precision="float64", small=True),
    linear((3, 5, 7, 9), precision="float64", small=True),
    linear((3, 17, 64, 65), "vectors of the gradient", precision="float64"),
    linear((12, 18, 33, 34), "splits", precision="float64", out=TRANSPOSED),
    linear((1, 20, 127, 127), "no vectors", precision="float64"),
    linear((3, 17, 65, 64), "positions last", grad=POSITIONS_LAST, precision="float64"),
    linear((2, 3, 36, 4), "far samples", x=Layout(far=True), precision="float64"),
    linear((3, 20, 36, 40), "unaligned", x=Layout(offset=1), precision="float64", power=1),
    conv((2, 5, 7, 6), 40, (3, 3), padding=(1, 1), precision="float64"),
    conv((2, 10, 7, 6), 40, (3, 3), padding=(1, 1), nhwc=True, precision="float64"),
    conv((3, 24, 9, 5), 32, (3, 2), stride=(2, 1), groups=2, precision="float64"),
]

_TINY = [
    conv((2, 6, 8, 8), 6, (3, 3), padding=(1, 1), groups=6, kernel=GROUPS, small=True),
    conv((2, 6, 8, 8), 6, (3, 3), padding=(1, 1), groups=6, nhwc=True, kernel=GROUPS, small=True),
    conv((9, 35, 7, 7), 35, (3, 3), "splits", padding=(1, 1), groups=35, kernel=GROUPS),
    conv((9, 35, 7, 7), 35, (3, 3), "splits", groups=35, nhwc=True, kernel=GROUPS),
    conv((6, 64, 5, 5), 64, (5, 5), padding=(2, 2), groups=64, nhwc=True, kernel=GROUPS),
    conv((3, 4, 9, 9), 4, (7, 7), padding=(3, 3), groups=4, kernel=GROUPS),
    conv((3, 5, 9, 8), 15, (2, 3), stride=(2, 1), groups=5, kernel=GROUPS, small=True),
    conv((3, 5, 9, 8), 15, (2, 3), dilation=(2, 3), groups=5, nhwc=True, kernel=GROUPS),
    conv((2, 16, 6, 5), 16, (3, 3), "4 to 4", padding=(1, 1), groups=4, kernel=GROUPS),
    conv((2, 16, 6, 5), 8, (3, 3), "4 to 2", groups=4, nhwc=True, kernel=GROUPS, small=True),
    conv((3, 40, 2, 2), 40, (1, 1), "few positions", groups=40, kernel=GROUPS, small=True),
    conv((3, 40, 2, 2), 40, (1, 1), "few positions", groups=40, nhwc=True, kernel=GROUPS),
    conv((2, 1, 20, 20), 1, (3, 3), "one channel", padding=(1, 1), kernel=GROUPS, small=True),
    conv((2, 9, 12, 3), 1, (3, 3), "one row", padding=(0, 1), kernel=GROUPS),
    conv((2, 6, 8, 8), 6, (3, 3), "odd lines", x=Layout(gap=1), groups=6, kernel=GROUPS),
    conv((2, 2, 3, 8), 2, (1, 3), "far", x=Layout((1, 0, 2, 3), far=True), groups=2, kernel=GROUPS),
    conv((2, 2, 3, 8), 2, (1, 3), "far out", out=Layout(far=True), groups=2, kernel=GROUPS),
    conv((0, 6, 8, 8), 6, (3, 3), "no samples", groups=6, kernel=GROUPS),
    conv((5, 6, 8, 8), 6, (3, 3), alpha=-1.5, power=1, groups=6, kernel=GROUPS, small=True),
    conv(
        (5, 6, 8, 8), 6, (3, 3), "permuted out", out=Layout((1, 3, 2, 0)), groups=6, kernel=GROUPS
    ),
    conv((9, 6, 8, 8), 6, (3, 3), padding=(1, 1), groups=6, precision="float64", kernel=GROUPS),
    conv((2, 6, 8, 8), 6, (3, 3), groups=6, precision="float64", nhwc=True, kernel=GROUPS),
]

_BFLOAT16 = [
    outer.conv_case(
        shape,
        shape[1],
        (3, 3),
        "bfloat16",
        padding=(1, 1),
        groups=shape[1],
        channels_last=channels_last,
        kernel=GROUPS,
        small=True,
    )
    for shape, channels_last in (((5, 7, 8, 9), False), ((3, 40, 6, 5), True))
]

CASES: list[Case] = [*_LINEAR, *_CONV, *_DOUBLE, *_TINY, *_BFLOAT16]
