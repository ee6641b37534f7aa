"""Per-sample gradients of one use of a parameter, held as factors so that uses can be joined.

A parameter used several times has per-sample gradients that are sums over its uses, and the square
comes after the sum. Uses of one form over the same entries join by laying their positions side by
side, and one call of a kernel then serves them all: nothing of size ``N x P`` is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class Outer:
    """``out[o, i]`` gets ``sum_t grad[n, t, o] * input[n, t, i]`` from sample ``n``."""

    grad: Tensor
    input: Tensor
    #: The entries are the transpose of the parameter's view.
    transposed: bool = False

    def entries(self, view: Tensor) -> Tensor:
        """``out``, given the parameter's view."""
        return view.t() if self.transposed else view

    def flipped(self) -> Outer:
        """The same gradients, for the transposed entries."""
        return Outer(self.input, self.grad, not self.transposed)

    def joined(self, others: Sequence[Outer]) -> Outer:
        """The sum of this term and ``others``, over the same entries."""
        if not others:
            return self
        grad = torch.cat([self.grad, *(term.grad for term in others)], 1)
        return replace(
            self, grad=grad, input=torch.cat([self.input, *(t.input for t in others)], 1)
        )

    def add_powers_(self, out: Tensor, alpha: float, power: int) -> None:
        """Adds ``alpha`` times the sum over samples of ``|g_n| ** power``."""
        ops.linear_sum_grad_squared_(out, self.grad, self.input, alpha=alpha, power=power)


@dataclass(frozen=True)
class Gather:
    """``out[index[n, t]]`` gets ``grad[n, t]`` from sample ``n``, summed over ``t``."""

    grad: Tensor
    index: Tensor

    def entries(self, view: Tensor) -> Tensor:
        """``out``, given the parameter's view."""
        return view

    def joined(self, others: Sequence[Gather]) -> Gather:
        """The sum of this term and ``others``, over the same entries."""
        if not others:
            return self
        grad = torch.cat([self.grad, *(term.grad for term in others)], 1)
        return Gather(grad, torch.cat([self.index, *(term.index for term in others)], 1))

    def add_powers_(self, out: Tensor, alpha: float, power: int) -> None:
        """Adds ``alpha`` times the sum over samples of ``|g_n| ** power``."""
        ops.embedding_sum_grad_squared_(out, self.grad, self.index, alpha=alpha, power=power)


@dataclass(frozen=True)
class Images:
    """A convolution of ``M`` images a sample: ``[N, M, O, OH, OW]`` with ``[N, M, C, H, W]``.

    ``dims`` is 1 for a ``conv1d``, whose images have a height of one.
    """

    grad: Tensor
    input: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dims: int = 2

    def entries(self, view: Tensor) -> Tensor:
        """``out [O, C / groups, KH, KW]``, given the parameter's view."""
        return view.unsqueeze(2) if self.dims == 1 else view

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What must agree for two terms to be joined."""
        sizes = (self.grad.shape[3:], self.input.shape[3:])
        return (*sizes, self.stride, self.padding, self.dilation, self.groups, self.dims)

    def joined(self, others: Sequence[Images]) -> Images:
        """The sum of this term and ``others``, over the same entries and of the same geometry."""
        if not others:
            return self
        grad = torch.cat([self.grad, *(term.grad for term in others)], 1)
        return replace(
            self, grad=grad, input=torch.cat([self.input, *(t.input for t in others)], 1)
        )

    def add_powers_(self, out: Tensor, alpha: float, power: int) -> None:
        """Adds ``alpha`` times the sum over samples of ``|g_n| ** power``."""
        grad, x, pad_h = self.grad, self.input, self.padding[0]
        if grad.shape[1] == 1:
            grad, x = grad.squeeze(1), x.squeeze(1)
        else:
            # One tall image: below each other, so far apart that no window reaches into the next,
            # and in steps of the stride. Rows between them have no gradient.
            reach = self.dilation[0] * (out.shape[2] - 1) + 1
            rows = -(-(x.shape[3] + 2 * pad_h) // self.stride[0])
            height = rows * self.stride[0]
            x = _below_each_other(x, height, pad_h)
            last = (x.shape[2] - reach) // self.stride[0] + 1
            grad, pad_h = _below_each_other(grad, rows, 0)[:, :, :last], 0
        ops.conv2d_sum_grad_squared_(
            out,
            grad,
            x,
            stride=self.stride,
            padding=(pad_h, self.padding[1]),
            dilation=self.dilation,
            groups=self.groups,
            alpha=alpha,
            power=power,
        )


Term = Outer | Gather | Images


def _below_each_other(images: Tensor, rows: int, top: int) -> Tensor:
    """``[N, M, C, H, W]`` as ``[N, C, M * rows, W]``, each image ``top`` rows down in its block."""
    samples, count, channels, height, width = images.shape
    tall = images.new_zeros(samples, channels, count, rows, width)
    tall[:, :, :, top : top + height] = images.transpose(1, 2)
    return tall.flatten(2, 3)
