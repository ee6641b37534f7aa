"""Affine norms: the channel family with the normalised input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from ..reference import wide
from .common import as_dtype, bind, is_recast, separate


@dataclass(slots=True)
class NormUse:
    """``output = (input - mean) * scale * weight + bias``.

    ``features`` is the number of trailing axes that weight covers (layer norm), or None where
    weight covers axis 1 (batch and group norm). ``mean`` and ``scale`` broadcast to the input, or
    are ``[C]``; where the forward pass computes them they are filled in by it.
    """

    views: Mapping[str, View]
    sample_axes: Sequence[int]
    input: Tensor
    features: int | None
    mean: Tensor | None = None
    scale: Tensor | None = None
    #: Where mean and scale are constants: ``[C]``, the derivative of the output by the input.
    factor: Tensor | None = None
    _grad_input: Tensor | None = None

    def _positions(self, tensor: Tensor, samples: SampleAxis) -> Tensor:
        """``[N, T, C]``, without a copy where the layout allows it."""
        if self.features is None:
            rows = samples.rows(tensor)
            if rows is not None:
                return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(2).transpose(1, 2)
            parts = samples.split(tensor).movedim(2, -1)
            return parts.reshape(samples.count, -1, tensor.shape[1])
        width = math.prod(tensor.shape[tensor.dim() - self.features :])
        rows = samples.rows(tensor)
        rows = samples.split(tensor) if rows is None else rows
        return rows.reshape(samples.count, -1, width)

    def _statistic(self, value: Tensor | None, samples: SampleAxis) -> Tensor | None:
        if value is None or value.dim() == 1:
            return value
        if self.features is not None:
            # One number a position.
            rows = samples.rows(value)
            rows = samples.split(value) if rows is None else rows
            return rows.reshape(samples.count, -1, 1)
        if value.shape[0] == 1:
            return value.reshape(1, 1, -1)
        parts = samples.split(value)
        if parts.dim() == value.dim():
            return parts.reshape(samples.count, 1, -1)
        return self._positions(value.expand_as(self.input), samples)

    def _operands(
        self, grad: Tensor, samples: SampleAxis
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        scale = self._statistic(self.scale, samples)
        assert scale is not None
        x = self._positions(self.input.detach(), samples)
        return self._positions(grad, samples), x, self._statistic(self.mean, samples), scale

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        like = next(iter(outs.values()))
        g, x, mean, scale = self._operands(grad, samples)
        weight, bias = _flat(outs.get("weight")), _flat(outs.get("bias"))
        if weight is None:
            ops.channel_sum_grad_squared_(None, bias, as_dtype(g, like), alpha=alpha, power=power)
            return
        ops.channel_sum_grad_squared_(
            weight,
            bias,
            as_dtype(g, like),
            as_dtype(x, like),
            None if mean is None else as_dtype(mean, like),
            as_dtype(scale, like),
            alpha=alpha,
            power=power,
            **self._passed_on(grad, like, samples),
        )

    def _passed_on(self, grad: Tensor, like: Tensor, samples: SampleAxis) -> dict[str, Tensor]:
        """What makes the kernel compute the input's gradient too, where it can."""
        if self.factor is None or not self.factor.dtype == grad.dtype == like.dtype:
            return {}
        if samples.part is not None:
            return {}  # the kernel sees some of the samples only
        result = torch.empty_like(grad)
        if result.stride() != grad.stride():
            return {}
        entries = self._positions(result, samples)
        if entries.data_ptr() != result.data_ptr():
            return {}
        self._grad_input = result
        return {"grad_input": entries, "factor": self.factor}

    def grad_input(self, grad: Tensor) -> Tensor:
        result, self._grad_input = self._grad_input, None
        if result is None:
            assert self.factor is not None
            shape = (-1, *[1] * (grad.dim() - 2))
            result = (grad * self.factor.reshape(shape)).to(grad.dtype)
        return result

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        g, x, mean, scale = self._operands(grad, samples)
        weight, bias = ops.channel_per_sample_grad(g, x, mean, scale)
        value = bias if slot == "bias" else weight
        assert value is not None
        return value[part].reshape(-1, *self.views[slot].shape)

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> None:
        return None


def _flat(out: Tensor | None) -> Tensor | None:
    return out if out is None or out.dim() == 1 else out.view(-1)


def _batch_norm(*names: str) -> Rule:
    def rule(
        recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = bind(args, kwargs, names, _BATCH_NORM_DEFAULTS)
        separated = separate(recorder, bound, ("weight", "bias"))
        x, mean, var = bound["input"], bound["running_mean"], bound["running_var"]
        if separated is None or bound["training"] or mean is None or x.dim() < 2:
            return NotImplemented
        views, inputs = separated
        weight, bias = bound["weight"], bound["bias"]
        eps, enabled = bound["eps"], bound["cudnn_enabled"]
        scale = torch.add(wide(var), eps).rsqrt_()
        use = NormUse(views, (0,), x, None, mean, scale)
        passing = None
        if x.requires_grad and not any([v.requires_grad for v in inputs if v is not x]):
            use.factor = scale if weight is None else scale * weight
            passing = x

        def compute() -> Tensor:
            return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, enabled)

        return recorder.record(func, use, inputs, compute, saved=[x], passing=passing)

    return rule


def _layer_norm(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(
        args,
        kwargs,
        ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
        {"weight": None, "bias": None, "eps": 1e-5},
    )
    separated = separate(recorder, bound, ("weight", "bias"))
    x, shape = bound["input"], list(bound["normalized_shape"])
    if separated is None or x.dim() <= len(shape) or is_recast(x):
        return NotImplemented
    views, inputs = separated
    weight, bias, eps = bound["weight"], bound["bias"], bound["eps"]
    use = NormUse(views, range(x.dim() - len(shape)), x, len(shape))

    def compute() -> Tensor:
        output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        use.mean, use.scale = mean.detach(), rstd.detach()
        return output

    return recorder.record(func, use, inputs, compute, saved=[x])


def _group_norm(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(
        args,
        kwargs,
        ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
        {"weight": None, "bias": None, "eps": 1e-5},
    )
    separated = separate(recorder, bound, ("weight", "bias"))
    x, groups = bound["input"], bound["num_groups"]
    if separated is None or x.dim() < 2 or is_recast(x):
        return NotImplemented
    views, inputs = separated
    weight, bias, eps = bound["weight"], bound["bias"], bound["eps"]
    rows, channels = x.shape[:2]
    use = NormUse(views, (0,), x, None)

    def compute() -> Tensor:
        output, mean, rstd = torch.native_group_norm(
            x.contiguous(), weight, bias, rows, channels, math.prod(x.shape[2:]), groups, eps
        )
        shape = (rows, channels, *[1] * (x.dim() - 2))
        each = channels // groups
        use.mean = mean.detach().repeat_interleave(each, 1).reshape(shape)
        use.scale = rstd.detach().repeat_interleave(each, 1).reshape(shape)
        return output

    return recorder.record(func, use, inputs, compute, saved=[x])


def _rms_norm(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(
        args,
        kwargs,
        ("input", "normalized_shape", "weight", "eps"),
        {"weight": None, "eps": None},
    )
    separated = separate(recorder, bound, ("weight",))
    x, shape = bound["input"], list(bound["normalized_shape"])
    if separated is None or x.dim() <= len(shape):
        return NotImplemented
    views, inputs = separated
    weight, eps = bound["weight"], bound["eps"]
    values = wide(x.detach())
    squares = values.square().mean(list(range(-len(shape), 0)), keepdim=True)
    scale = torch.rsqrt(squares + (torch.finfo(values.dtype).eps if eps is None else eps))
    use = NormUse(views, range(x.dim() - len(shape)), x, len(shape), None, scale)
    return recorder.record(
        func, use, inputs, lambda: torch.rms_norm(x, shape, weight, eps), saved=[x]
    )


def _instance_norm(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(
        args,
        kwargs,
        (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "use_input_stats",
            "momentum",
            "eps",
            "cudnn_enabled",
        ),
        {},
    )
    separated = separate(recorder, bound, ("weight", "bias"))
    x, mean, var = bound["input"], bound["running_mean"], bound["running_var"]
    if separated is None or x.dim() < 3 or (bound["use_input_stats"] and mean is not None):
        return NotImplemented
    if mean is None:
        axes = list(range(2, x.dim()))
        var, mean = torch.var_mean(wide(x.detach()), axes, correction=0, keepdim=True)
    else:
        mean, var = (wide(s).reshape(1, -1, *[1] * (x.dim() - 2)) for s in (mean, var))
    views, inputs = separated
    arguments = list(bound.values())[1:]
    use = NormUse(views, (0,), x, None, mean, torch.rsqrt(var + bound["eps"]))
    return recorder.record(func, use, inputs, lambda: torch.instance_norm(x, *arguments), saved=[x])


_BATCH_NORM_DEFAULTS = {
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
    "cudnn_enabled": True,
}
_STATISTICS, _WEIGHTS = ("running_mean", "running_var"), ("weight", "bias")
_OPTIONS = ("training", "momentum", "eps")

# Those of torch.nn.functional would be expanded into the others; they are called often.
RULES: dict[Function, Rule] = {
    torch.batch_norm: _batch_norm("input", *_WEIGHTS, *_STATISTICS, *_OPTIONS, "cudnn_enabled"),
    torch.nn.functional.batch_norm: _batch_norm("input", *_STATISTICS, *_WEIGHTS, *_OPTIONS),
    torch.layer_norm: _layer_norm,
    torch.nn.functional.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.rms_norm: _rms_norm,
    torch.instance_norm: _instance_norm,
}
