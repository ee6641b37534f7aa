"""What the regression gate watches: each kernel family, two whole models, the top-R selection.

Every entry pairs fastfisher's operation with a reference that is not fastfisher's: torch's own
gradient of the same parameter, a plain pass, ``torch.topk``. The gate judges the ratio of their
times. To add one, write a function that builds a :class:`Pair`, add it to :data:`GATED` and record
a baseline: ``make gate ARGS=--record``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import CHECK_CANDIDATES, References, max_relative_error, steady_samples
from benchmarks.registry import CASES, SEED
from benchmarks.rivals import NO_OPTIONS, PLAIN, RIVALS
from fastfisher import fisher_mask_, ops

CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True)
class Pair:
    """One operation and what it is timed against, on inputs of their own.

    Attributes:
        operation: one call of fastfisher's operation.
        reference: one call of the other.
        error: how wrong the operation is, relative, in norm.
    """

    operation: Callable[[], object]
    reference: Callable[[], object]
    error: Callable[[], float]


@dataclass(frozen=True)
class Gated:
    """A gated benchmark.

    Attributes:
        name: of the test and of its line in the baseline.
        reference: what the reference is, for people.
        build: makes the pair; with True at a size that takes no time, for a smoke run.
        repeats: calls of either in one round.
    """

    name: str
    reference: str
    build: Callable[[bool], Pair]
    repeats: int = 10


def anchor() -> Callable[[], object]:
    """A copy between buffers that no private cache holds: the speed of memory, and nothing else."""
    source = torch.ones(1 << 24)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _random(stream: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED + stream))


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _linear(small: bool) -> Pair:
    samples, positions, rows, columns = (3, 5, 7, 6) if small else (16, 64, 256, 256)
    grad, inputs = _random(0, samples, positions, rows), _random(1, samples, positions, columns)
    out = torch.zeros(rows, columns)

    def error() -> float:
        once = torch.zeros_like(out)
        ops.linear_sum_grad_squared_(once, grad, inputs)
        return _difference(once, ops.linear_per_sample_grad(grad, inputs).square().sum(0))

    return Pair(
        lambda: ops.linear_sum_grad_squared_(out, grad, inputs),
        lambda: grad.flatten(0, 1).t() @ inputs.flatten(0, 1),
        error,
    )


@dataclass(frozen=True)
class _Convolution:
    """Sizes of a 2-d convolution whose padding keeps a stride of 1 from shrinking the image."""

    inputs: int
    outputs: int
    image: int
    kernel: int
    stride: int = 1
    groups: int = 1
    layout: torch.memory_format = torch.contiguous_format

    def __call__(self, small: bool) -> Pair:
        samples, image = (3, 5) if small else (8, self.image)
        padding = self.kernel // 2
        size = (image + 2 * padding - self.kernel) // self.stride + 1
        grad = _random(0, samples, self.outputs, size, size).contiguous(memory_format=self.layout)
        inputs = _random(1, samples, self.inputs, image, image).contiguous(
            memory_format=self.layout
        )
        weight = torch.zeros(self.outputs, self.inputs // self.groups, self.kernel, self.kernel)
        weight = weight.contiguous(memory_format=self.layout)
        out = torch.zeros_like(weight)
        geometry = {"stride": [self.stride] * 2, "padding": [padding] * 2, "groups": self.groups}
        add = partial(ops.conv2d_sum_grad_squared_, **geometry)

        def error() -> float:
            once = torch.zeros_like(out)
            add(once, grad, inputs)
            each = ops.conv2d_per_sample_grad(
                grad, inputs, [self.kernel] * 2, dilation=[1, 1], **geometry
            )
            return _difference(once, each.square().sum(0))

        def weight_gradient() -> object:
            return torch.ops.aten.convolution_backward(
                grad,
                inputs,
                weight,
                None,
                geometry["stride"],
                geometry["padding"],
                [1, 1],
                False,
                [0, 0],
                self.groups,
                [False, True, False],
            )

        return Pair(lambda: add(out, grad, inputs), weight_gradient, error)


def _channel(small: bool) -> Pair:
    samples, channels, image = (3, 5, 4) if small else (16, 64, 32)
    grad, inputs = (_random(stream, samples, channels, image, image) for stream in (0, 1))
    mean, variance = _random(2, channels), _random(3, channels).square() + 1
    scale = variance.rsqrt()
    weight, bias = torch.zeros(channels), torch.zeros(channels)
    by_position = [t.flatten(2).transpose(1, 2) for t in (grad, inputs)]

    def add(weight: Tensor, bias: Tensor) -> None:
        ops.channel_sum_grad_squared_(weight, bias, *by_position, mean, scale)

    def error() -> float:
        once = torch.zeros_like(weight), torch.zeros_like(bias)
        add(*once)
        each = ops.channel_per_sample_grad(*by_position, mean, scale)
        want = [values.square().sum(0) for values in each if values is not None]
        return _difference(torch.cat(once), torch.cat(want))

    def norm_gradient() -> object:
        return torch.ops.aten.native_batch_norm_backward(
            grad, inputs, weight, mean, variance, None, None, False, 0.0, [False, True, True]
        )

    return Pair(lambda: add(weight, bias), norm_gradient, error)


def _embedding(small: bool) -> Pair:
    samples, positions, tokens, columns = (3, 5, 4, 6) if small else (16, 256, 1000, 256)
    grad = _random(0, samples, positions, columns)
    generator = torch.Generator().manual_seed(SEED)
    index = torch.randint(tokens, (samples, positions), generator=generator)
    out = torch.zeros(tokens, columns)

    def error() -> float:
        once = torch.zeros_like(out)
        ops.embedding_sum_grad_squared_(once, grad, index)
        each = ops.embedding_per_sample_grad(grad, index, -1, tokens)
        return _difference(once, each.square().sum(0))

    return Pair(
        lambda: ops.embedding_sum_grad_squared_(out, grad, index),
        lambda: torch.ops.aten.embedding_dense_backward(grad, index, tokens, -1, False),
        error,
    )


@dataclass(frozen=True)
class _Model:
    """A whole ``fisher_diag`` call on a case of the benchmarks, beside its plain pass."""

    case: str
    layout: str
    batch: int

    def __call__(self, small: bool) -> Pair:
        case = CASES[self.case]
        problem = case.problem(self.layout, 2 if small else self.batch)
        ours, plain = RIVALS["fisher_diag"], RIVALS[PLAIN]
        operation = ours.prepare(problem.with_own_model(), NO_OPTIONS)
        reference = plain.prepare(problem.with_own_model(), NO_OPTIONS)

        def plain_pass() -> None:
            reference.run()
            reference.reset()

        def error() -> float:
            candidates = case.problem(self.layout, CHECK_CANDIDATES)
            few = candidates.take(steady_samples(candidates, 1 if small else 3))
            call = ours.prepare(few.with_own_model(), NO_OPTIONS)
            want = References(few)[ours.quantity]
            return max_relative_error(call.read(call.run()), want)[0]

        return Pair(operation.run, plain_pass, error)


class _Tensors(nn.Module):
    """Parameters as a model has them: few large, many small."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.ones(size) for size in sizes)


def _selection(small: bool) -> Pair:
    sizes = [50, 7, 7] if small else [200_000] + 4 * [20_000] + 20 * [500]
    model, ratio = _Tensors(sizes), 0.02
    names = [name for name, _ in model.named_parameters()]
    scores = [_random(stream, size) for stream, size in enumerate(sizes)]
    fisher = dict(zip(names, scores, strict=True))
    k = int(ratio * sum(sizes))

    def top() -> Tensor:
        flat = torch.cat(scores)
        return torch.zeros_like(flat).scatter_(0, flat.topk(k, sorted=False).indices, 1.0)

    def error() -> float:
        fisher_mask_(model, fisher, ratio=ratio)
        zeroed = torch.cat([1 - p.detach() for p in model.parameters()])
        return _difference(zeroed, top())

    return Pair(lambda: fisher_mask_(model, fisher, ratio=ratio), top, error)


_GRADIENT = "torch's weight gradient"

GATED: dict[str, Gated] = {
    gated.name: gated
    for gated in (
        Gated("linear", "a matrix product of the same size", _linear, repeats=20),
        Gated("conv_nchw", _GRADIENT, _Convolution(32, 32, 32, 3), repeats=20),
        Gated(
            "conv_channels_last",
            _GRADIENT,
            _Convolution(32, 32, 32, 3, layout=CHANNELS_LAST),
            repeats=20,
        ),
        Gated("conv_late", _GRADIENT, _Convolution(256, 256, 4, 3), repeats=20),
        Gated("conv_1x1", _GRADIENT, _Convolution(64, 256, 16, 1), repeats=40),
        Gated("conv_depthwise", _GRADIENT, _Convolution(64, 64, 32, 3, groups=64), repeats=40),
        Gated("conv_first", _GRADIENT, _Convolution(3, 64, 64, 7, stride=2), repeats=20),
        Gated("norm", "torch's gradient of weight and bias", _channel, repeats=60),
        Gated("embedding", "torch's gradient of the table", _embedding, repeats=40),
        Gated("resnet20", "a plain pass", _Model("resnet20", "nchw", 8)),
        Gated("transformer", "a plain pass", _Model("transformer", "contiguous", 4)),
        Gated("fisher_mask", "torch.cat, topk, scatter", _selection, repeats=60),
    )
}
