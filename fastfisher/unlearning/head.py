"""Which layer makes the logits, and which class a forget set is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches, subset, targets_of
from .loop import seeded
from .metrics import device_of, evaluating

_HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_head(model: nn.Module, dataset: Dataset[Any]) -> nn.Module:
    """The layer whose output, flattened, is the logits, found by running the model on samples.

    Its weight then has one row for each class. A layer with as many outputs as there are classes
    elsewhere in the model is never taken for it.

    Args:
        model: from inputs ``[B, ...]`` to logits ``[B, C]``; left as it was.
        dataset: map-style, of (input, target); its first sample is run.

    Returns:
        A Linear, or a convolution applied to a single position.

    Raises:
        ValueError: no such layer makes the logits: something is computed from its output.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs.append((module, output.clone()))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, _HEADS):
                hooks.callback(module.register_forward_hook(note).remove)
        logits = logits_of(model, dataset)
    for module, output in reversed(outputs):
        if output.numel() == logits.numel() and torch.equal(output.flatten(1), logits):
            return module
    raise ValueError(
        "model: expected the logits to be the output of one Linear layer (or of a convolution at "
        "one position), but no layer's output equals them"
    )


def logits_of(model: nn.Module, dataset: Dataset[Any]) -> Tensor:
    """Logits ``[1, C]`` of the first sample of a data set, in eval mode.

    Raises:
        ValueError: the outputs are not ``[B, C]``.
    """
    inputs, _ = next(iter(batches(subset(dataset, torch.arange(1)), 1)))
    device = device_of(model)
    with seeded(0, device), evaluating(model):
        logits: Tensor = model(inputs.to(device))
    if logits.ndim != 2:
        raise ValueError(f"model: expected outputs [B, C], got {tuple(logits.shape)}")
    return logits


def class_of(dataset: Dataset[Any]) -> int | None:
    """The label that all samples of a data set have; ``None`` where they differ."""
    labels = targets_of(dataset).unique()
    return int(labels) if labels.numel() == 1 else None


def forget_class(forget_set: Dataset[Any], remain_set: Dataset[Any] | None) -> int | None:
    """The class that is forgotten as a whole; ``None`` where no class is.

    Args:
        forget_set: all of one label, if a class is to be forgotten.
        remain_set: then has no sample of that label.
    """
    label = class_of(forget_set)
    if label is None:
        return None
    if remain_set is not None and bool((targets_of(remain_set) == label).any()):
        return None
    return label
