"""Convolutions of one to three dimensions, and transposed ones, as implicit GEMM (outer family).

All reach the two-dimensional kernel. One dimension is an image of height one; three are, for
each tap along the depth, the images at the depths it pairs; a transposed one is an ordinary one
with the roles of input and output gradient exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from .common import as_dtype, as_factors, as_operands, as_product_reads, bind, rounded, separate
from .terms import Images


@dataclass(slots=True)
class ConvUse:
    """A convolution of a batch ``input [B, C, *size]``; tuples have an entry a dimension."""

    views: Mapping[str, View]
    input: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    #: What a transposed convolution adds at the far end; None for an ordinary one.
    output_padding: tuple[int, ...] | None = None
    #: ``input`` rounded to bfloat16, where operands are to be.
    short: Tensor | None = None
    sample_axes: Sequence[int] = (0,)

    def _split(self, tensor: Tensor, samples: SampleAxis) -> Tensor:
        """``[B, ...]`` as ``[N, M, ...]``, ``M`` images a sample."""
        rows = samples.rows(tensor)
        return samples.split(tensor) if rows is None else rows.unsqueeze(1)

    def _images(
        self, grad: Tensor, samples: SampleAxis, dtype: torch.dtype
    ) -> Iterator[tuple[int, Images]]:
        """What each tap along the depth (the only one, below three dimensions) contracts."""
        dims = len(self.stride)
        grad, given = as_factors(grad, self.input.detach(), self.short)
        g, x = self._split(grad, samples).to(dtype), self._split(given, samples).to(dtype)
        if self.output_padding is not None:
            # Positions that only the far end's padding adds have an input of zero.
            more = [p // s for p, s in zip(self.output_padding, self.stride, strict=True)]
            x = torch.nn.functional.pad(x, [side for m in reversed(more) for side in (0, m)])
            g, x = x, g
        if dims == 1:
            g, x = g.unsqueeze(3), x.unsqueeze(3)
        geometry = [(1, *v)[-2:] for v in (self.stride, self.dilation)]
        stride, dilation = ((v[0], v[1]) for v in geometry)
        padding = (0, *self.padding)[-2:]
        rest = stride, (padding[0], padding[1]), dilation, self.groups, min(dims, 2)
        if dims < 3:
            yield 0, Images(g, x, *rest)
            return
        for tap in range(self.views["weight"].shape[2]):
            offset = tap * self.dilation[0] - self.padding[0]
            # Output depths whose input depth, depth * stride + offset, exists.
            begin = max(0, -(offset // self.stride[0]))
            end = min(g.shape[3], (x.shape[3] - 1 - offset) // self.stride[0] + 1)
            if begin < end:
                at = [depth * self.stride[0] + offset for depth in range(begin, end)]
                pairs = g[:, :, :, begin:end], x[:, :, :, at[0] : at[-1] + 1 : self.stride[0]]
                g_tap, x_tap = (t.movedim(3, 2).flatten(1, 2) for t in pairs)
                yield tap, Images(g_tap, x_tap, *rest)

    def _channels(self, grad: Tensor, samples: SampleAxis) -> Tensor:
        """``grad [B, O, *size]`` as ``[N, T, O]``."""
        rows = samples.rows(grad)
        if rows is not None:
            return rows.flatten(2).transpose(1, 2)
        return samples.split(grad).movedim(2, -1).reshape(samples.count, -1, grad.shape[1])

    def _is_plain(self, grad: Tensor, samples: SampleAxis) -> bool:
        """Whether it is an ordinary convolution of one image a sample."""
        two = len(self.stride) == 2 and self.output_padding is None
        return two and grad.shape[0] == samples.count

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        if "weight" in outs and self._is_plain(grad, samples):
            # What nearly all calls are, without the detours of the others.
            out = outs["weight"]
            g, x = as_operands(grad, self.input.detach(), out, self.short)
            ops.conv2d_sum_grad_squared_(
                out,
                g,
                x,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                alpha=alpha,
                power=power,
            )
        elif "weight" in outs:
            out = outs["weight"]
            for tap, images in self._images(grad, samples, out.dtype):
                entries = images.entries(out[:, :, tap] if len(self.stride) == 3 else out)
                images.add_powers_(entries, alpha, power)
        if "bias" in outs:
            bias = outs["bias"]
            g = as_dtype(self._channels(grad, samples), bias)
            ops.channel_sum_grad_squared_(None, bias, g, alpha=alpha, power=power)

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        if slot == "bias":
            return self._channels(grad, samples)[part].sum(1)
        weight = grad.new_empty(self.views["weight"].shape)
        grad, given = as_factors(grad, self.input.detach(), self.short)
        grads, inputs = self._split(grad, samples)[part], self._split(given, samples)[part]
        # Sample by sample: more at once is a grouped convolution, which is slower, or unfolds.
        return torch.stack(
            [
                torch.ops.aten.convolution_backward(
                    g,
                    x,
                    weight,
                    None,
                    self.stride,
                    self.padding,
                    self.dilation,
                    self.output_padding is not None,
                    self.output_padding or [0] * len(self.stride),
                    self.groups,
                    (False, True, False),
                )[1]
                for g, x in zip(grads, inputs, strict=True)
            ]
        )

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> Images | None:
        if slot == "bias" or len(self.stride) == 3:
            return None
        return next(self._images(grad, samples, grad.dtype))[1]


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_ORDINARY = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_ORDINARY[:5], "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _rule(dims: int, transposed: bool) -> Rule:
    names = _TRANSPOSED if transposed else _ORDINARY
    defaults = {**_DEFAULTS, "output_padding": 0} if transposed else _DEFAULTS

    def rule(
        recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = bind(args, kwargs, names, defaults)
        separated = separate(recorder, bound, ("weight", "bias"))
        if separated is None or bound["input"].dim() != dims + 2:
            return NotImplemented
        views, inputs = separated
        x = as_product_reads(bound["input"])
        stride, dilation = _each(bound["stride"], dims), _each(bound["dilation"], dims)
        if isinstance(bound["padding"], str):
            # "same" may need one more zero at the end than at the beginning: pad first, then none.
            if bound["padding"] == "same":
                sizes = zip(dilation, bound["weight"].shape[2:], strict=True)
                sides = [(d * (k - 1) // 2, -(-d * (k - 1) // 2)) for d, k in sizes]
                x = torch.nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])
            padding = (0,) * dims
        else:
            padding = _each(bound["padding"], dims)
        more = _each(bound["output_padding"], dims) if transposed else None
        use = ConvUse(
            views, x, stride, padding, dilation, bound["groups"], more, rounded(recorder, x)
        )
        bound["input"], bound["padding"] = x, padding
        arguments = [bound[name] for name in names]
        return recorder.record(func, use, inputs, lambda: func(*arguments), saved=[x])

    return rule


RULES: dict[Function, Rule] = {
    torch.conv1d: _rule(1, transposed=False),
    torch.conv2d: _rule(2, transposed=False),
    torch.conv3d: _rule(3, transposed=False),
    torch.conv_transpose1d: _rule(1, transposed=True),
    torch.conv_transpose2d: _rule(2, transposed=True),
    torch.conv_transpose3d: _rule(3, transposed=True),
}
