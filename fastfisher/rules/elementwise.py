"""Parameters in elementwise arithmetic: the channel family, along the axes they broadcast over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from .common import as_dtype, plain


@dataclass
class ElementwiseUse:
    """An output each of whose entries depends on one entry of the parameter.

    ``aligned`` is the parameter's shape with one size for each axis of the output, 1 where it
    broadcasts. ``factor`` gives the derivative of the output by the parameter, a tensor that
    broadcasts to the output; None is one.
    """

    views: Mapping[str, View]
    aligned: Sequence[int]
    factor: Callable[[], Tensor] | None = None
    #: Samples lie where the parameter is the same for all of them.
    sample_axes: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sample_axes = [axis for axis, size in enumerate(self.aligned) if size == 1]

    def _positions(self, tensor: Tensor, samples: SampleAxis) -> Tensor:
        """``[N, T, C]``: broadcast axes, then the parameter's."""
        parts = samples.split(tensor)
        if samples.axis is not None and parts.dim() == tensor.dim():
            parts = parts.unsqueeze(samples.axis + 1)
        kept = [axis + 1 for axis, size in enumerate(self.aligned) if size > 1]
        summed = [axis + 1 for axis, size in enumerate(self.aligned) if size == 1]
        width = math.prod(self.aligned)
        count = math.prod(parts.shape[axis] for axis in summed)
        return parts.permute(0, *summed, *kept).reshape(samples.count, count, width)

    def _operands(self, grad: Tensor, samples: SampleAxis) -> tuple[Tensor, Tensor | None]:
        if self.factor is None:
            return self._positions(grad, samples), None
        factor = as_dtype(self.factor(), grad).expand_as(grad)
        return self._positions(grad, samples), self._positions(factor, samples)

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        ((slot, out),) = outs.items()
        grad = as_dtype(grad, out)
        if not out.is_contiguous():
            each = self.per_sample(slot, grad, samples, slice(None))
            out.add_(ops.powers_(each, power).sum(0), alpha=alpha)
            return
        g, factor = self._operands(grad, samples)
        flat = out.view(-1)
        if factor is None:
            ops.channel_sum_grad_squared_(None, flat, g, alpha=alpha, power=power)
        else:
            ops.channel_sum_grad_squared_(flat, None, g, factor, alpha=alpha, power=power)

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        g, factor = self._operands(grad, samples)
        each = g[part].sum(1) if factor is None else (g[part] * factor[part]).sum(1)
        return each.reshape(-1, *self.views[slot].shape)

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> None:
        return None


def _aligned(shape: Sequence[int], dims: int) -> list[int]:
    return [1] * (dims - len(shape)) + list(shape)


def _add(left: bool, other: Tensor, parameter: Tensor) -> Callable[[], Tensor] | None:
    return None


def _sub(left: bool, other: Tensor, parameter: Tensor) -> Callable[[], Tensor] | None:
    return None if left else lambda: parameter.new_tensor(-1)


def _mul(left: bool, other: Tensor, parameter: Tensor) -> Callable[[], Tensor] | None:
    return lambda: other


def _div(left: bool, other: Tensor, parameter: Tensor) -> Callable[[], Tensor] | None:
    if left:
        return lambda: other.reciprocal()
    return lambda: -other / parameter.square()


def _binary(derivative: Callable[[bool, Tensor, Tensor], Callable[[], Tensor] | None]) -> Rule:
    def rule(
        recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if len(args) != 2 or kwargs or not all(isinstance(value, Tensor) for value in args):
            return NotImplemented
        views = [recorder.view(value) for value in args]
        left = views[0] is not None
        view, other, parameter = views[1 - left], args[left], plain(recorder, args[1 - left])
        if view is None or views[left] is not None or not other.is_floating_point():
            return NotImplemented
        if recorder.is_constant(other):
            return NotImplemented  # the result is derived from the parameter
        dims = max(parameter.dim(), other.dim())
        factor = derivative(left, other.detach(), parameter)
        use = ElementwiseUse({"parameter": view}, _aligned(parameter.shape, dims), factor)

        def compute() -> Tensor:
            return func(parameter, other) if left else func(other, parameter)

        return recorder.record(func, use, [other], compute, saved=[other] if factor else [])

    return rule


def _prelu(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if len(args) != 2 or kwargs or recorder.view(args[0]) is not None:
        return NotImplemented
    x, weight = args[0], plain(recorder, args[1])
    view = recorder.view(args[1])
    assert view is not None
    aligned = [1] * x.dim()
    if weight.numel() > 1:
        aligned[1] = weight.numel()
    values = x.detach()
    use = ElementwiseUse({"weight": view}, aligned, lambda: values.clamp(max=0))
    return recorder.record(func, use, [x], lambda: torch.prelu(x, weight))


def _broadcast(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    view = recorder.view(args[0])
    parameter = plain(recorder, args[0])
    output = func(parameter, *args[1:], **kwargs)
    aligned = _aligned(parameter.shape, output.dim())
    # A repeated axis of more than one entry holds each entry several times.
    spread = all(a in (1, size) for a, size in zip(aligned, output.shape, strict=True))
    if view is None or not spread:
        return NotImplemented
    use = ElementwiseUse({"parameter": view}, aligned)
    return recorder.record(func, use, [], lambda: output)


RULES: dict[Function, Rule] = {
    **dict.fromkeys((torch.add, torch.Tensor.add), _binary(_add)),
    **dict.fromkeys((torch.sub, torch.Tensor.sub, torch.subtract), _binary(_sub)),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.multiply), _binary(_mul)),
    **dict.fromkeys((torch.div, torch.Tensor.div, torch.true_divide), _binary(_div)),
    **dict.fromkeys((torch.Tensor.expand, torch.Tensor.expand_as, torch.Tensor.repeat), _broadcast),
    **dict.fromkeys((torch.broadcast_to, torch.Tensor.broadcast_to), _broadcast),
    torch.prelu: _prelu,
    torch.Tensor.prelu: _prelu,
}
