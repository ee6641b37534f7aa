"""Per-sample losses by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .reference import PerSampleLoss


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return _per_sample(F.cross_entropy(output, target, reduction="none"))


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return _per_sample(F.mse_loss(output, target, reduction="none")) / 2


def _bce_with_logits(output: Tensor, target: Tensor) -> Tensor:
    target = target.to(output.dtype)
    return _per_sample(F.binary_cross_entropy_with_logits(output, target, reduction="none"))


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


_LOSSES: dict[str, PerSampleLoss] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
    "bce_with_logits": _bce_with_logits,
}


def resolve_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> PerSampleLoss:
    """The per-sample loss that ``loss`` names; a callable is returned as it is.

    Each named loss is a negative log-likelihood, summed over the positions of one sample:
    ``cross_entropy`` of class indices, ``mse`` = half the squared error (a unit-variance Gaussian;
    paper, section 3.1), ``bce_with_logits``.

    Raises:
        ValueError: no such name.
    """
    if callable(loss):
        return loss
    if loss not in _LOSSES:
        raise ValueError(
            f"loss: expected one of {', '.join(map(repr, _LOSSES))} or a callable "
            f"(output, target) -> per-sample losses, got {loss!r}"
        )
    return _LOSSES[loss]
