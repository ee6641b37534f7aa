"""How the outer family's work is cut for a device, with the numbers that are shipped."""

from __future__ import annotations

import ctypes
import functools
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from .emulation.build import ROOT, emulated, include_flags, scheduling

SOURCE = """
#include "cuda/outer.h"
#include "cuda/outer_device.h"
using namespace fastfisher;
using namespace fastfisher::cuda;
extern "C" void divide(int64_t divisor, int number, int* results) {
  Divider(divisor).divide(number, results[0], results[1]);
}
// Sizes: samples, groups, rows, columns, positions of a square, size of a square kernel.
extern "C" void plan(const int64_t* sizes, bool channels_last, int64_t* results) {
  Problem p{};
  p.samples = sizes[0], p.groups = sizes[1], p.rows = sizes[2], p.columns = sizes[3];
  p.height = p.width = p.out_height = p.out_width = sizes[4];
  p.kernel_height = p.kernel_width = sizes[5];
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.pad_h = p.pad_w = sizes[5] / 2;
  const auto layout = [&](int64_t* stride, int64_t channels) {
    const int64_t area = sizes[4] * sizes[4];
    stride[0] = channels * area;
    stride[1] = channels_last ? 1 : area;
    stride[2] = sizes[4] * (channels_last ? channels : 1);
    stride[3] = channels_last ? channels : 1;
  };
  layout(p.g_stride, p.groups * p.rows);
  layout(p.x_stride, p.groups * p.columns);
  OuterTask task = outer_task(p, nullptr, nullptr, nullptr, 1, 4, 4);
  const bool tiny = plan_depthwise(task, 4);
  if (!tiny) plan_outer(task, kSimtTiles, kSimtKernel, 4);
  results[0] = tiny ? 0 : kSimtTiles[task.tile].rows;
  results[1] = tiny ? depthwise_blocks(task) : task.blocks();
  results[2] = tiny ? kDepthwiseThreads : kSimtTiles[task.tile].threads;
  results[3] = task.splits, results[4] = task.split_samples;
  results[5] = task.workspace_elements() * 4;
}
"""


@dataclass(frozen=True)
class Plan:
    """``tile`` is 0 for the kernel of tiny groups."""

    tile: int
    blocks: int
    threads: int
    splits: int
    split_samples: int
    workspace_bytes: int


@functools.cache
def library(directory: Path) -> ctypes.CDLL:
    source = directory / "plan.cpp"
    source.write_text(SOURCE)
    target = directory / "plan.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, *include_flags(), str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(tmp_path_factory.mktemp("plan"))


def plan(compiled: ctypes.CDLL, sizes: tuple[int, ...], channels_last: bool = False) -> Plan:
    results = (ctypes.c_int64 * 6)()
    compiled.plan((ctypes.c_int64 * 6)(*sizes), channels_last, results)
    return Plan(*results)


def test_division_is_exact(compiled: ctypes.CDLL) -> None:
    numbers = random.Random(0)
    results = (ctypes.c_int * 2)()
    for bits in range(1, 31):
        for divisor in {1 << (bits - 1), (1 << bits) - 1, numbers.randrange(1 << bits) + 1}:
            last = (1 << 31) - 1
            multiple = last // divisor * divisor
            for number in (0, divisor - 1, multiple - 1, multiple, numbers.randrange(last), last):
                compiled.divide(ctypes.c_int64(divisor), number, results)
                assert (results[0], results[1]) == divmod(number, divisor), (number, divisor)


@pytest.mark.parametrize(
    ("layer", "sizes", "tile"),
    [
        ("wide convolution", (32, 1, 512, 512, 14, 3), 128),
        ("many samples of one tile", (512, 1, 128, 128, 28, 1), 128),
        ("64 channels", (256, 1, 64, 64, 56, 1), 64),
        ("16 channels", (256, 1, 16, 16, 32, 3), 16),
        ("one sample", (1, 1, 64, 64, 8, 1), 32),
        ("depthwise", (64, 384, 1, 1, 14, 7), 0),
        ("ResNeXt's groups of four", (64, 32, 4, 4, 56, 3), 0),
        ("two halves", (64, 2, 128, 48, 27, 5), 128),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_tile_fits_the_layer(
    compiled: ctypes.CDLL, layer: str, sizes: tuple[int, ...], tile: int, channels_last: bool
) -> None:
    chosen = plan(compiled, sizes, channels_last)
    assert chosen.tile == tile, layer
    # 128 multiprocessors with 256 threads each, where the samples are enough for it.
    if sizes[0] * sizes[4] ** 2 > 1 << 16:
        assert chosen.blocks * chosen.threads * chosen.splits >= 1 << 15, layer


def test_splits_hold_every_sample_once(compiled: ctypes.CDLL) -> None:
    numbers = random.Random(1)
    for _ in range(2000):
        sizes = tuple(numbers.choice(each) for each in _SIZES)
        chosen = plan(compiled, sizes, numbers.random() < 0.5)
        last = sizes[0] - (chosen.splits - 1) * chosen.split_samples
        assert 0 < last <= chosen.split_samples, sizes
        assert chosen.splits <= 65535
        assert chosen.workspace_bytes <= 64 << 20, sizes


_SIZES = (
    (1, 2, 31, 128, 5000, 1 << 20),
    (1, 2, 32),
    (1, 3, 64, 1000, 4096),
    (1, 3, 64, 1000, 4096),
    (1, 7, 56, 224),
    (1, 3, 7),
)


@pytest.mark.parametrize("groups", [1, 32])
def test_bits_do_not_depend_on_the_schedule(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    grad, x = (torch.randn(9, 32, 7, 7, generator=generator) for _ in range(2))
    results = []
    for order in ("forward", "reverse", "random"):
        with scheduling(order):
            out = torch.zeros(32, 32 // groups, 3, 3)
            emulated().conv2d_sum_grad_squared_(
                out, grad, x, (1, 1), (1, 1), (1, 1), groups, 1.0, 2, False
            )
            results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_more_positions_than_are_counted_are_refused() -> None:
    grad = torch.ones(1, 1, 1).expand(1, 1 << 30, 3)
    out = torch.full((3, 3), 7.0)
    with pytest.raises(RuntimeError, match=r"linear_sum_grad_squared_: grad, input: .* 2\^30"):
        emulated().linear_sum_grad_squared_(out, grad, grad, 1.0, 2, False)
    assert (out == 7).all()
