"""Accuracy, and a model in eval mode; what is compared after that is in ``fastfisher.metrics``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def accuracy(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Fraction of samples whose largest output is that of their label, in eval mode.

    Args:
        model: its modules are given back in the mode they were in.
        data: batches ``(inputs [B, ...], targets [B])``; outputs are ``[B, C]``.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: there are no samples, the outputs are not ``[B, C]``, or a target is not in
            ``0 .. C - 1``.
    """
    return accuracy_and_loss(model, data)[0]


def accuracy_and_loss(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """:func:`accuracy`, and the mean cross entropy in nats, of one pass.

    Args:
        model: as of :func:`accuracy`.
        data: as of :func:`accuracy`.

    Raises:
        ValueError: as :func:`accuracy`.
    """
    correct = total = 0
    loss = 0.0
    device = device_of(model)
    with evaluating(model):
        for inputs, targets in data:
            outputs = model(inputs.to(device))
            targets = targets.to(device)
            if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
                raise ValueError(
                    "expected outputs [B, C] for targets [B], got outputs "
                    f"{tuple(outputs.shape)} for targets {tuple(targets.shape)}"
                )
            classes = outputs.shape[1]
            if bool(((targets < 0) | (targets >= classes)).any()):
                raise ValueError(f"a target is not in 0..{classes - 1}")
            correct += int((outputs.argmax(1) == targets).sum())
            loss += float(F.cross_entropy(outputs.float(), targets.long(), reduction="sum"))
            total += targets.numel()
    if total == 0:
        raise ValueError("data: expected at least one sample")
    return correct / total, loss / total


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter; the CPU for a model without one."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module gets its own mode back."""
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its training or eval mode back at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
