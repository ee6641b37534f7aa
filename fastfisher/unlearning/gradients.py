"""The gradient of a model's loss over a whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data import batches
from .metrics import device_of, keeping_modes


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, by name; tied ones once.

    Raises:
        ValueError: there are none.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise ValueError("model: no parameter requires grad")
    return chosen


def loss_gradients(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], *, reduction: str
) -> Iterator[dict[str, Tensor]]:
    """Gradient of each batch's cross entropy, in eval mode, for the parameters that require grad.

    Args:
        model: from inputs ``[B, ...]`` to logits ``[B, C]``; its ``.grad`` is left alone.
        data: batches ``(inputs [B, ...], targets [B])``.
        reduction: "sum" or "mean" over a batch's samples.
    """
    parameters, device = trainable(model), device_of(model)
    with keeping_modes(model):
        model.eval()
        for inputs, targets in data:
            loss = F.cross_entropy(
                model(inputs.to(device)), targets.to(device), reduction=reduction
            )
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            yield dict(zip(parameters, gradients, strict=True))


def sum_gradient(model: nn.Module, dataset: Dataset[Any], batch_size: int) -> dict[str, Tensor]:
    """Gradient of the sum of all samples' cross entropies, in eval mode.

    Args:
        model: as of :func:`loss_gradients`.
        dataset: map-style, of (input, target).
        batch_size: samples a pass; no part of the definition.

    Returns:
        One tensor of its shape a parameter that requires grad.
    """
    sums = {name: torch.zeros_like(p.detach()) for name, p in trainable(model).items()}
    for gradients in loss_gradients(model, batches(dataset, batch_size), reduction="sum"):
        for name, gradient in gradients.items():
            sums[name] += gradient
    return sums
