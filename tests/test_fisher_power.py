"""``power=1``: sums of absolute per-sample gradients, exact on every path that squares take."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfisher import FisherDiag, fisher_diag

from .oracle import TOLERANCE, cross_entropy, relative_errors
from .zoo import ZOO


def absolute(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> dict[str, Tensor]:
    """The mean of absolute gradients, one single-sample backward pass after the other."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for n in range(len(targets)):
        value = loss(model(inputs[n : n + 1]), targets[n : n + 1]).sum()
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        for at, grad in enumerate(grads):
            if grad is not None:
                total[at] = total[at] + grad.abs() / len(targets)
    return dict(zip(names, (each.detach() for each in total), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_every_path(name: str, dtype: torch.dtype) -> None:
    case = ZOO[name]()
    model, inputs = case.model.to(dtype), case.inputs
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fisher_diag(model, [(inputs, case.targets)], power=1)
    assert {n for n, r in result.rules.items() if r.startswith("fallback")} == case.fallback
    exact_inputs = inputs.double() if inputs.is_floating_point() else inputs
    exact = absolute(model.double(), exact_inputs, case.targets)
    errors = relative_errors(result, exact)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_exact_is_the_expectation_over_classes() -> None:
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    model[2].weight.data *= 3
    x = torch.randn(4, 6, dtype=torch.float64)
    result = fisher_diag(model, [(x, torch.zeros(4).long())], kind="exact", power=1)
    p = model(x).softmax(1).detach()
    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(4):
        for label in range(5):
            each = absolute(model, x[n : n + 1], torch.tensor([label]))
            for name, value in each.items():
                exact[name] = exact[name] + p[n, label] * value / 4
    assert max(relative_errors(result, exact).values()) < 1e-10


def test_draws_average_absolute_values() -> None:
    model, data = nn.Linear(6, 3).double(), [(torch.randn(4, 6).double(), torch.zeros(4).long())]
    exact = fisher_diag(model, data, kind="exact", power=1)
    generator = torch.Generator().manual_seed(1)
    drawn = fisher_diag(model, data, kind="mc", samples=4000, power=1, generator=generator)
    # 4000 draws: a relative standard error of about 1.5%, and 5 of them.
    assert max(relative_errors(drawn, exact).values()) < 0.08


def test_loss_free_importance_takes_no_labels() -> None:
    def squared_norm(output: Tensor, target: Tensor) -> Tensor:
        return output.square().sum(1)

    model, x = nn.Linear(6, 3).double(), torch.randn(4, 6).double()
    result = fisher_diag(model, [(x, torch.zeros(4))], loss=squared_norm, power=1)
    exact = absolute(model, x, torch.zeros(4), squared_norm)
    assert max(relative_errors(result, exact).values()) < 1e-10


def test_result_says_its_power(tmp_path: Path) -> None:
    model, data = nn.Linear(6, 3), [(torch.randn(4, 6), torch.zeros(4).long())]
    assert fisher_diag(model, data).power == 2
    result = fisher_diag(model, data, power=1.0)
    assert result.power == 1
    assert "power=1" in repr(result)
    result.save(tmp_path / "fisher.safetensors")
    assert FisherDiag.load(tmp_path / "fisher.safetensors").power == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"power": 3}, "power: expected 1 or 2, got 3"),
        ({"power": 1.5}, "power: expected 1 or 2, got 1.5"),
        ({"power": True}, "power: expected 1 or 2, got True"),
        ({"power": "1"}, "power: expected 1 or 2, got '1'"),
        ({"power": 1, "kind": "exact", "loss": "mse"}, "power: 1 with kind 'exact' needs"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_diag(nn.Linear(3, 2), [(torch.randn(2, 3), torch.zeros(2, 2))], **change)
