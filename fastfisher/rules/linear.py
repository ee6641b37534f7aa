"""Linear layers and products with a weight: the outer family, with positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from .common import as_dtype, as_factors, as_operands, as_product_reads, bind, rounded, separate
from .terms import Outer


@dataclass(slots=True)
class LinearUse:
    """``output = input @ weight.T + bias``; ``transposed`` is for ``input @ weight``."""

    views: Mapping[str, View]
    sample_axes: Sequence[int]
    input: Tensor
    transposed: bool = False
    #: ``input`` rounded to bfloat16, where operands are to be.
    short: Tensor | None = None

    def _positions(self, tensor: Tensor, samples: SampleAxis) -> Tensor:
        rows = samples.rows(tensor)
        if rows is None:
            rows = samples.split(tensor)
        elif rows.dim() == 2:
            return rows.unsqueeze(1)
        return rows.reshape(samples.count, -1, tensor.shape[-1])

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        g = self._positions(grad, samples)
        if "weight" in outs:
            out = outs["weight"].t() if self.transposed else outs["weight"]
            x = self._positions(self.input.detach(), samples)
            short = None if self.short is None else self._positions(self.short, samples)
            operands = as_operands(g, x, out, short)
            ops.linear_sum_grad_squared_(out, *operands, alpha=alpha, power=power)
        if "bias" in outs:
            bias = outs["bias"]
            ops.channel_sum_grad_squared_(None, bias, as_dtype(g, bias), alpha=alpha, power=power)

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        if slot == "bias":
            return self._positions(grad, samples)[part].sum(1)
        grad, x = as_factors(grad, self.input.detach(), self.short)
        weight = ops.linear_per_sample_grad(
            self._positions(grad, samples)[part], self._positions(x, samples)[part]
        )
        return weight.transpose(1, 2) if self.transposed else weight

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> Outer | None:
        if slot == "bias":
            return None
        grad, x = as_factors(grad, self.input.detach(), self.short)
        return Outer(self._positions(grad, samples), self._positions(x, samples), self.transposed)


def _record(
    recorder: Recorder,
    func: Function,
    bound: dict[str, Any],
    slots: Sequence[str],
    transposed: bool,
) -> Any:
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if weight.dim() != 2 or x.dim() < 1:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[1 if transposed else 0 :][:1]:
        return NotImplemented
    separated = separate(recorder, bound, slots)
    if separated is None:
        return NotImplemented
    views, inputs = separated
    x = as_product_reads(x)
    use = LinearUse(views, range(x.dim() - 1), x, transposed, rounded(recorder, x))
    w, b = bound["weight"], bound.get("bias")

    def compute() -> Tensor:
        if not transposed:
            return torch.nn.functional.linear(x, w, b)
        return x @ w if b is None else torch.addmm(b, x, w)

    return recorder.record(func, use, inputs, compute, saved=[x])


def _linear(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(args, kwargs, ("input", "weight", "bias"), {"bias": None})
    return _record(recorder, func, bound, ("weight", "bias"), transposed=False)


def _matmul(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    bound = {"input": args[0], "weight": args[1]}
    return _record(recorder, func, bound, ("weight",), transposed=True)


def _addmm(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if len(args) != 3 or kwargs:
        return NotImplemented
    bound = {"bias": args[0], "input": args[1], "weight": args[2]}
    return _record(recorder, func, bound, ("weight", "bias"), transposed=True)


RULES: dict[Function, Rule] = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
}
