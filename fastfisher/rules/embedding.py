"""Embedding tables: the gather family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..recorder import Function, Recorder, Rule, SampleAxis, View
from .common import as_dtype, bind, detach, parameter_views
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
        self, outs: Mapping[str, Tensor], grad: Tensor, samples: SampleAxis, alpha: float
    ) -> None:
        out = outs["weight"]
        g, index = self._positions(grad, samples)
        ops.embedding_sum_grad_squared_(
            out, as_dtype(g, out), index, padding_index=self.padding_index, alpha=alpha
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
    weight, index, padding = detach(bound["weight"]), bound["indices"], bound["padding_idx"]
    use = EmbeddingUse(views, range(index.dim()), index, padding)
    return recorder.record(func, use, [index], lambda: torch.embedding(weight, index, padding))


RULES: dict[Function, Rule] = {torch.embedding: _embedding}
