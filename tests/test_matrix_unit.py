"""The outer family on a matrix unit: as exact as vector kernels, at every seam of its layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher import ops

SUPPORTED = ops.build_info()["supported_cpu_isas"]
pytestmark = pytest.mark.skipif("amx" not in SUPPORTED, reason="no matrix unit")

# Relative, in norm. The terms leave out 2^-21 of a product at most, and 8e-8 of it on average.
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def unit() -> Iterator[None]:
    from fastfisher import _C

    before, threads = _C.cpu_isa(), torch.get_num_threads()
    _C.set_cpu_isa("amx")
    _C.set_always_matrix_unit(True)
    yield
    _C.set_always_matrix_unit(False)
    _C.set_cpu_isa(before)
    torch.set_num_threads(threads)


def sums(grad: Tensor, x: Tensor, out: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    out = torch.zeros(grad.shape[2], x.shape[2]) if out is None else out
    ops.linear_sum_grad_squared_(out, grad, x, alpha=alpha)
    return out


def exact(grad: Tensor, x: Tensor) -> Tensor:
    return ops.linear_per_sample_grad(grad.double(), x.double()).square().sum(0)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# Every tail of a sample, with and without whole steps before it.
@pytest.mark.parametrize("positions", [*range(1, 35), 63, 64, 65, 80, 81, 197])
@pytest.mark.parametrize("layout", ["positions", "channels"])
def test_any_number_of_positions(positions: int, layout: str) -> None:
    grad, x = torch.randn(3, positions, 21), torch.randn(3, positions, 37)
    if layout == "channels":
        grad, x = (t.mT.contiguous().mT for t in (grad, x))
    assert error(sums(grad, x), exact(grad, x)) < TOLERANCE


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("inputs", [1, 16, 31, 33, 130])
def test_any_number_of_channels(outputs: int, inputs: int) -> None:
    grad, x = torch.randn(2, 40, outputs), torch.randn(2, 40, inputs)
    assert error(sums(grad, x), exact(grad, x)) < TOLERANCE


# The last does not fit the cache, so that its positions go in segments.
@pytest.mark.parametrize("shape", [(5, 33, 40, 40), (40, 36, 200, 150), (2, 5000, 200, 136)])
def test_samples_blocks_and_segments(shape: tuple[int, int, int, int]) -> None:
    samples, positions, outputs, inputs = shape
    grad, x = torch.randn(samples, positions, outputs), torch.randn(samples, positions, inputs)
    out = torch.ones(inputs, outputs).t()
    sums(grad, x, out, alpha=0.5)
    assert error(out, 1 + exact(grad, x) / 2) < TOLERANCE


# Outputs too large for sums of their own, with the wider operand on either side.
@pytest.mark.parametrize("channels", [(130, 200), (200, 130), (131, 253)])
@pytest.mark.parametrize("positions", [40, 65, 4000])
def test_sums_go_straight_to_large_outputs(positions: int, channels: tuple[int, int]) -> None:
    outputs, inputs = channels
    grad, x = torch.randn(3, positions, outputs), torch.randn(3, positions, inputs)
    out = torch.ones(outputs, inputs)
    sums(grad, x, out, alpha=0.5)
    assert error(out, 1 + exact(grad, x) / 2) < TOLERANCE


CONVOLUTIONS = {
    "3x3": (3, 20, 9, 7, 18, 3, 3, 1, 1, 1),
    "3x3 no padding": (2, 16, 10, 12, 16, 3, 3, 1, 0, 1),
    "3 channels": (3, 3, 12, 11, 20, 3, 3, 1, 1, 1),
    "7x7 stride 2": (2, 3, 23, 22, 9, 7, 7, 2, 3, 1),
    "3x3 stride 2": (2, 33, 12, 11, 17, 3, 3, 2, 1, 1),
    "4x4 stride 4": (2, 3, 16, 16, 24, 4, 4, 4, 0, 1),
    "2x3 stride 3 dilation 2": (2, 19, 17, 20, 16, 2, 3, 3, 2, 2),
    "1x1": (2, 40, 9, 9, 33, 1, 1, 1, 0, 1),
    "1x1 stride 2": (3, 40, 9, 8, 33, 1, 1, 2, 0, 1),
    "1x1 padding": (2, 17, 6, 6, 18, 1, 1, 1, 1, 1),
    "kernel larger than the image": (2, 18, 2, 3, 16, 5, 5, 1, 3, 1),
    "1x5": (2, 24, 5, 40, 16, 1, 5, 1, 2, 1),
    "segments": (2, 64, 60, 50, 64, 3, 3, 1, 1, 1),
    "segments of a first layer": (2, 3, 150, 150, 64, 7, 7, 2, 3, 1),
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, layout: str) -> None:
    n, c, height, width, o, kh, kw, stride, padding, dilation = CONVOLUTIONS[name]
    x, weight = torch.randn(n, c, height, width), torch.ones(o, c, kh, kw)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    grad = torch.randn_like(F.conv2d(x, weight, **geometry))
    if layout == "channels_last":
        x, grad, weight = (t.to(memory_format=torch.channels_last) for t in (x, grad, weight))
    elif layout == "strided":
        x = torch.randn(n, c, height, 2 * width)[..., ::2]
        grad = grad.transpose(2, 3).contiguous().transpose(2, 3)
    pairs = {key: (value, value) for key, value in geometry.items()}
    per_sample = ops.conv2d_per_sample_grad(
        grad.double(), x.double(), (kh, kw), *pairs.values(), groups=1
    )
    ops.conv2d_sum_grad_squared_(weight, grad, x, groups=1, alpha=2.0, **pairs)
    assert error(weight, 1 + 2 * per_sample.square().sum(0)) < TOLERANCE


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("positions", [1, 7, 16, 33, 64, 100])
def test_bfloat16_operands_are_taken_as_they_are(positions: int, layout: str) -> None:
    grad, x = torch.randn(3, positions, 21), torch.randn(3, positions, 37)
    grad, x = grad.bfloat16(), x.bfloat16()
    if layout == "channels":
        grad, x = (t.mT.contiguous().mT for t in (grad, x))
    elif layout == "strided":
        grad, x = (torch.stack([t, t], -1).transpose(1, 2)[..., 0].mT for t in (grad, x))
    assert error(sums(grad, x), exact(grad, x)) < TOLERANCE


def test_bfloat16_images_are_taken_as_they_are() -> None:
    x, grad = torch.randn(2, 20, 9, 8).bfloat16(), torch.randn(2, 18, 5, 4).bfloat16()
    geometry = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    out = torch.zeros(18, 20, 3, 3)
    ops.conv2d_sum_grad_squared_(out, grad, x, **geometry)
    per_sample = ops.conv2d_per_sample_grad(
        grad.double(), x.double(), (3, 3), *geometry.values(), groups=1
    )
    assert error(out, per_sample.square().sum(0)) < TOLERANCE


@pytest.mark.parametrize("shape", [(9, 70, 30, 40), (9, 70, 130, 200)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    samples, positions, outputs, inputs = shape
    grad, x = torch.randn(samples, positions, outputs), torch.randn(samples, positions, inputs)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(sums(grad, x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_large_and_small_numbers(scale: float) -> None:
    grad, x = torch.randn(2, 40, 20) * scale, torch.randn(2, 40, 20)
    assert error(sums(grad, x), exact(grad, x)) < TOLERANCE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_does_not_pass_for_one(value: float) -> None:
    grad, x = torch.randn(2, 40, 20), torch.randn(2, 40, 20)
    grad[1, 3, 7] = value
    result = sums(grad, x)
    assert not result[7].isfinite().any()
    assert result[[*range(7), *range(8, 20)]].isfinite().all()


def test_absolute_values_of_tiny_gradients_keep_their_bits() -> None:
    grad, x = 1e-36 * torch.randn(2, 40, 20), torch.randn(2, 40, 20)
    out = torch.zeros(20, 20)
    ops.linear_sum_grad_squared_(out, grad, x, power=1)
    want = ops.linear_per_sample_grad(grad.double(), x.double()).abs().sum(0)
    assert error(out, want) < TOLERANCE
