"""Embedding tables: the gather family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from ..reference import sum_dtype
from .common import as_dtype, bind, parameter_views, plain
from .terms import Gather


@dataclass
class EmbeddingUse:
    """``output = weight[index]``."""

    views: Mapping[str, View]
    sample_axes: Sequence[int]
    index: Tensor
    padding_index: int

    def _positions(self, grad: Tensor, samples: SampleAxis) -> tuple[Tensor, Tensor]:
        g = samples.split(grad).reshape(samples.count, -1, grad.shape[-1])
        return g, samples.split(self.index).reshape(samples.count, -1)

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        out = outs["weight"]
        g, index = self._positions(grad, samples)
        ops.embedding_sum_grad_squared_(
            out, as_dtype(g, out), index, padding_index=self.padding_index, alpha=alpha, power=power
        )

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        g, index = self._positions(grad, samples)
        rows = self.views[slot].shape[0]
        return ops.embedding_per_sample_grad(g[part], index[part], self.padding_index, rows)

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> Gather:
        g, index = self._positions(grad, samples)
        if self.padding_index >= 0:
            g = g.masked_fill((index == self.padding_index).unsqueeze(-1), 0)
        return Gather(g, index.long())


def _embedding(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(
        args,
        kwargs,
        ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
        {"padding_idx": -1, "scale_grad_by_freq": False, "sparse": False},
    )
    views = parameter_views(recorder, bound, ("weight",))
    if views is None or bound["scale_grad_by_freq"] or bound["weight"].dim() != 2:
        return NotImplemented
    index, padding = bound["indices"], bound["padding_idx"]
    weight = plain(recorder, bound["weight"])
    use = EmbeddingUse(views, range(index.dim()), index, padding)
    return recorder.record(func, use, [index], lambda: torch.embedding(weight, index, padding))


@dataclass
class EmbeddingBagUse:
    """``output[b] = sum_t factor[b, t] * weight[index[b, t]]``; fillers have a factor of 0."""

    views: Mapping[str, View]
    index: Tensor
    factor: Tensor
    sample_axes: Sequence[int] = (0,)

    def _positions(self, grad: Tensor, samples: SampleAxis) -> tuple[Tensor, Tensor]:
        factor = samples.split(self.factor)
        each = samples.split(grad).unsqueeze(-2) * factor.unsqueeze(-1)
        index = samples.split(self.index)
        return each.reshape(samples.count, -1, grad.shape[1]), index.reshape(samples.count, -1)

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        out = outs["weight"]
        self.term("weight", as_dtype(grad, out), samples).add_powers_(out, alpha, power)

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        g, index = self._positions(grad, samples)
        return ops.embedding_per_sample_grad(g[part], index[part], -1, self.views[slot].shape[0])

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> Gather:
        return Gather(*self._positions(grad, samples))


_SUM, _MEAN = 0, 1
# In the order of torch.embedding_bag's signature, with its defaults.
_BAG_ARGUMENTS = {
    "weight": None,
    "input": None,
    "offsets": None,
    "scale_grad_by_freq": False,
    "mode": _SUM,
    "sparse": False,
    "per_sample_weights": None,
    "include_last_offset": False,
    "padding_idx": None,
}


def _embedding_bag(
    recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bound = bind(args, kwargs, tuple(_BAG_ARGUMENTS), _BAG_ARGUMENTS)
    views = parameter_views(recorder, bound, ("weight",))
    factors = bound["per_sample_weights"]
    if views is None or bound["scale_grad_by_freq"] or bound["mode"] not in (_SUM, _MEAN):
        return NotImplemented
    if factors is not None and factors.requires_grad:
        return NotImplemented
    tokens, offsets = bound["input"].long(), bound["offsets"].long()
    ends = offsets[1:]
    if bound["include_last_offset"]:
        offsets = offsets[:-1]
    else:
        ends = torch.cat([ends, ends.new_tensor([len(tokens)])])
    lengths = ends - offsets
    longest = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(longest, device=tokens.device)
    inside = place < lengths.unsqueeze(1)
    at = torch.where(inside, offsets.unsqueeze(1) + place, 0)
    index = tokens[at] if len(tokens) else at
    if bound["padding_idx"] is not None:
        inside &= index != bound["padding_idx"] % bound["weight"].shape[0]
    factor = inside.to(sum_dtype(bound["weight"]))
    if factors is not None:
        factor *= factors.detach()[at]
    if bound["mode"] == _MEAN:
        factor /= inside.sum(1, keepdim=True).clamp(min=1)
    arguments = [plain(recorder, value) for value in bound.values()]
    with torch.no_grad():
        rest = func(*arguments)[1:]
    use = EmbeddingBagUse(views, index, factor)
    output = recorder.record(func, use, [tokens], lambda: func(*arguments)[0], saved=[])
    return (output, *rest)


RULES: dict[Function, Rule] = {
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
}
