"""Squares of batch-mean gradients: what other code calls a diagonal Fisher.

:func:`fastfisher.fisher_diag` squares the gradient of each sample. Published code often squares the
mean gradient of a batch instead, which depends on the size and the order of the batches and lets
samples cancel; it is here because results that others report were made with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data import batches, size_of
from ..reference import sum_dtype, wide
from .metrics import device_of, keeping_modes

Labels = Literal["observed", "model"]


def batch_mean_fisher(
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int = 128,
    labels: Labels = "observed",
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The mean over batches of squared gradients of a batch's mean cross entropy, in eval mode.

    With ``g(b, y)`` the gradient of the mean cross entropy of batch ``b`` with labels ``y``, and
    every batch of equal weight, the last and smaller one too:

    - "observed": ``mean_b g(b, observed)^2``: the importance of SSD (Foster et al. 2024).
    - "model": ``mean_b sum_y pbar(b, y) g(b, y)^2``, where all labels of the batch are ``y`` and
      ``pbar(b, y)`` is the batch's mean probability of ``y``: what the paper's authors do in their
      code. It is the Fisher of kind "exact" for ``batch_size=1`` alone. One backward pass a batch
      and class.

    Args:
        model: from inputs ``[B, ...]`` to logits ``[B, C]``; its modes, gradients and buffers stay.
        dataset: map-style, of (input, target), read in order; ``targets [B]`` are classes.
        batch_size: part of the definition, unless it is 1.
        labels: which of the two.
        progress: show a bar, if the standard error is a terminal.

    Returns:
        One tensor for each parameter that requires grad, of its shape and on its device; float64
        for float64 parameters and float32 for all others.

    Raises:
        ValueError: ``labels`` or ``batch_size`` is not as described, the data set has no sample,
            no parameter requires grad, or the outputs are not ``[B, C]``.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"labels: expected one of {get_args(Labels)}, got {labels!r}")
    loader = batches(dataset, batch_size)
    if not size_of(dataset):
        raise ValueError("dataset: expected at least one sample")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: no parameter requires grad")
    from tqdm import tqdm

    bar = tqdm(loader, desc="fisher", unit="batch", disable=None if progress else True)
    totals = {name: torch.zeros_like(p, dtype=sum_dtype(p)) for name, p in parameters.items()}
    device = device_of(model)
    with keeping_modes(model), torch.enable_grad():
        model.eval()
        for inputs, targets in bar:
            outputs = model(inputs.to(device))
            if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
                raise ValueError(
                    "model: expected outputs [B, C] for targets [B], got outputs "
                    f"{tuple(outputs.shape)} for targets {tuple(targets.shape)}"
                )
            for weight, loss in _losses(outputs, targets.to(device), labels):
                gradients = torch.autograd.grad(
                    loss, list(parameters.values()), retain_graph=True, allow_unused=True
                )
                for total, gradient in zip(totals.values(), gradients, strict=True):
                    if gradient is not None:
                        total.add_(wide(gradient).square() * weight)
    return {name: total.detach() / len(loader) for name, total in totals.items()}


def _losses(outputs: Tensor, targets: Tensor, labels: Labels) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of squared gradients, and the losses to take these gradients of."""
    if labels == "observed":
        yield torch.ones((), device=outputs.device), F.cross_entropy(outputs, targets)
        return
    log_probabilities = F.log_softmax(outputs, 1).mean(0)
    mean_probabilities = wide(outputs.detach()).softmax(1).mean(0)
    for weight, log_probability in zip(mean_probabilities, log_probabilities, strict=True):
        yield weight, -log_probability
