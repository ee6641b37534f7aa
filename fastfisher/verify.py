"""Checks a model's Fisher against its definition, one single-sample backward pass at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .fisher_diag import fisher_diag
from .losses import resolve_loss
from .reference import sum_grad_squared_loop

__all__ = ["ParameterCheck", "verify"]

# Relative error in norm that counts as exact, by the dtype of the comparison.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class ParameterCheck:
    """One parameter's Fisher beside the loop's.

    Attributes:
        name: of the parameter.
        rule: what :func:`fastfisher.fisher_diag` computed it with.
        error: norm of the difference over the norm of the loop's value (absolute where that is 0).
        exact: the error is within rounding.
    """

    name: str
    rule: str
    error: float
    exact: bool


def verify(
    model: nn.Module,
    batch: tuple[Any, Any],
    *,
    loss: str | nn.Module | Callable[[Any, Any], Tensor] = "cross_entropy",
    double: bool = True,
) -> list[ParameterCheck]:
    """Compare ``fisher_diag`` with a loop of single-sample backward passes, parameter by parameter.

    Args:
        model: left as it is; the comparison runs on a copy.
        batch: ``(input, target)`` of a few samples, as :func:`fastfisher.fisher_diag` takes it.
        loss: as in :func:`fastfisher.fisher_diag`.
        double: compare in float64, where only a wrong rule differs by more than 1e-10. With False
            the model keeps its dtypes, for models that cannot run in float64; then 1e-4 is allowed.

    Returns:
        One check for each parameter that requires grad, largest error first.

    Raises:
        ValueError: as :func:`fastfisher.fisher_diag`.
        RuntimeError: as :func:`fastfisher.fisher_diag`.
    """
    inputs, targets = batch
    subject = copy.deepcopy(model).eval()
    if double:
        subject = subject.double()
        inputs, targets = tree_map(_as_double, (inputs, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fisher_diag(subject, [(inputs, targets)], loss=loss, reduction="sum")
    exact = sum_grad_squared_loop(
        subject, inputs, targets, resolve_loss(loss).per_sample, list(result)
    )
    tolerance = _TOLERANCE[torch.float64 if double else torch.float32]
    checks = []
    for name, value in result.items():
        reference = exact[name].detach().double()
        norm = float(reference.norm())
        difference = float((value.double() - reference).norm())
        error = difference / norm if norm > 0 else difference
        checks.append(ParameterCheck(name, result.rules[name], error, error <= tolerance))
    return sorted(checks, key=lambda check: -check.error)


def _as_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
