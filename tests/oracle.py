"""Comparison of a fast result with the loop of single-sample backward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FisherDiag, fisher_diag
from fastfisher.reference import fisher_diag_loop

# Relative error in norm, per parameter, that the project promises.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def relative_errors(result: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Error of each parameter relative to the exact one's norm; absolute where that is zero."""
    assert set(result) == set(exact)
    errors = {}
    for name, reference in exact.items():
        assert result[name].shape == reference.shape, name
        norm = reference.detach().double().norm()
        difference = (result[name].detach().double() - reference.detach().double()).norm()
        errors[name] = float(difference / norm if norm > 0 else difference)
    return errors


def assert_exact(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    reference_loss: Callable[[Any, Any], Tensor] = cross_entropy,
    fallback: set[str] | None = frozenset(),  # type: ignore[assignment]
) -> FisherDiag:
    """Asserts that every parameter's Fisher equals the loop's.

    ``fallback`` is the set of parameters that are expected to need the fallback; None is any.
    """
    model = model.to(dtype).eval()
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fisher_diag(model, [(inputs, targets)], loss=loss)
    # The oracle in float64 whatever the model's dtype: it has to be better than what it judges.
    loop = fisher_diag_loop(model, [(inputs, targets)], reference_loss)
    exact_inputs = inputs.double() if inputs.is_floating_point() else inputs
    exact = fisher_diag_loop(model.double(), [(exact_inputs, targets)], reference_loss)
    model.to(dtype)
    errors = relative_errors(result, exact)
    # Where terms cancel, the loop in the model's own dtype is no better than that.
    unavoidable = relative_errors(loop, exact)
    for name, error in errors.items():
        assert error < max(TOLERANCE[dtype], 4 * unavoidable[name]), (
            name,
            error,
            result.rules[name],
        )
    if fallback is not None:
        used = {name for name, rule in result.rules.items() if rule.startswith("fallback")}
        assert used == set(fallback), result.rules
    return result
