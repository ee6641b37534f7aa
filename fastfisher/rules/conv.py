"""Two-dimensional convolutions: the outer family as implicit GEMM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from .common import as_dtype, bind, detach, parameter_views


@dataclass
class Conv2dUse:
    """``conv2d`` of a batch of images ``input [B, C, H, W]``."""

    views: Mapping[str, View]
    input: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    sample_axes: Sequence[int] = (0,)

    def _geometry(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def _channels(self, grad: Tensor, samples: SampleAxis) -> Tensor:
        """``grad [B, O, OH, OW]`` as ``[N, T, O]``."""
        if grad.shape[0] == samples.count:
            return grad.flatten(2).transpose(1, 2)
        parts = samples.split(grad)
        return parts.movedim(2, -1).reshape(samples.count, -1, grad.shape[1])

    def accumulate(
        self, outs: Mapping[str, Tensor], grad: Tensor, samples: SampleAxis, alpha: float
    ) -> None:
        if "weight" in outs:
            out = outs["weight"]
            g, x = as_dtype(grad, out), as_dtype(self.input.detach(), out)
            if grad.shape[0] == samples.count:
                ops.conv2d_sum_grad_squared_(out, g, x, alpha=alpha, **self._geometry())
            else:
                # Several images make up a sample: their gradients add before the square.
                for n in range(samples.count):
                    part = slice(n, n + 1)
                    out.add_(self.per_sample("weight", g, samples, part)[0].square(), alpha=alpha)
        if "bias" in outs:
            bias = outs["bias"]
            g = self._channels(as_dtype(grad, bias), samples)
            ops.channel_sum_grad_squared_(None, bias, g, alpha=alpha)

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        if slot == "bias":
            return self._channels(grad, samples)[part].sum(1)
        size = self.views["weight"].shape[2:]
        x = self.input.detach().to(grad.dtype)
        if grad.shape[0] == samples.count:
            return ops.conv2d_per_sample_grad(
                grad[part], x[part], size, self.stride, self.padding, self.dilation, self.groups
            )
        images = samples.split(grad)[part]
        inputs = samples.split(x)[part]
        each = ops.conv2d_per_sample_grad(
            images.flatten(0, 1),
            inputs.flatten(0, 1),
            size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return each.unflatten(0, images.shape[:2]).sum(1)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def _conv2d(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(
        args,
        kwargs,
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    )
    views = parameter_views(recorder, bound, ("weight", "bias"))
    x = bound["input"]
    if views is None or x.dim() != 4:
        return NotImplemented
    weight, bias = detach(bound["weight"]), detach(bound["bias"])
    stride, dilation = _pair(bound["stride"]), _pair(bound["dilation"])
    groups = bound["groups"]
    if isinstance(bound["padding"], str):
        # "same" may need one more zero at the end than at the beginning: pad first, then none.
        if bound["padding"] == "same":
            high, wide = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
            left, top = wide // 2, high // 2
            x = torch.nn.functional.pad(x, (left, wide - left, top, high - top))
        padding = (0, 0)
    else:
        padding = _pair(bound["padding"])
    use = Conv2dUse(views, x, stride, padding, dilation, groups)

    def compute() -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return recorder.record(func, use, [x], compute)


RULES: dict[Function, Rule] = {torch.conv2d: _conv2d}
