"""Parameters that no rule covers: ``torch.func``, and where that cannot run, a loop of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import PerSampleLoss, sum_grad_squared_func, sum_grad_squared_loop

# Per-sample gradients of this many elements are held at once, at most.
_CHUNK_ELEMENTS = 1 << 25


def sum_grad_powers(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: PerSampleLoss,
    names: Sequence[str],
    count: int,
    power: int,
) -> tuple[Mapping[str, Tensor], str]:
    """Sums of ``|per-sample gradient| ** power`` of ``names`` over one batch.

    Returns:
        The sums, and which way they were computed: ``"torch.func"`` or ``"per-sample loop"``.

    Raises:
        RuntimeError: neither way can run the model; names the parameters.
    """
    sizes = dict(model.named_parameters(remove_duplicate=False))
    elements = sum(sizes[name].numel() for name in names)
    chunk = min(count, max(1, _CHUNK_ELEMENTS // max(1, elements)), 32)
    try:
        sums = sum_grad_squared_func(
            model, inputs, targets, loss, names, chunk_size=chunk, power=power
        )
        return sums, "torch.func"
    except Exception as first:
        try:
            with torch.enable_grad():
                return (
                    sum_grad_squared_loop(model, inputs, targets, loss, names, power=power),
                    "per-sample loop",
                )
        except Exception as second:
            raise RuntimeError(
                f"no way to compute the Fisher of {', '.join(names)}: no rule covers them, "
                f"torch.func failed ({first}), and so did single-sample passes ({second})"
            ) from second
