"""Operands rounded to bfloat16 on request: what is rounded, by how much, and that it is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import fisher_diag, ops

from .oracle import relative_errors


def layers(layer: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 3))


def gradient(model: nn.Sequential, x: Tensor, targets: Tensor) -> Tensor:
    """At the output of the first layer."""
    hidden = model[0](x).detach().requires_grad_()
    F.cross_entropy(model[1:](hidden), targets, reduction="sum").backward()
    assert hidden.grad is not None
    return hidden.grad.bfloat16().double()


def test_a_linear_layers_operands_are_rounded_once() -> None:
    model, x, targets = layers(nn.Linear(40, 20), 800), torch.randn(4, 40, 40), torch.arange(4) % 3
    result = fisher_diag(model, [(x, targets)], reduction="sum", operands="bfloat16")
    g = gradient(model, x, targets)
    exact = ops.linear_per_sample_grad(g, x.bfloat16().double()).square().sum(0)
    assert relative_errors({"w": result["0.weight"]}, {"w": exact})["w"] < 1e-6
    plain = fisher_diag(model, [(x, targets)], reduction="sum")
    error = relative_errors({"w": result["0.weight"]}, {"w": plain["0.weight"]})["w"]
    assert 1e-5 < error < 5e-3
    # A bias has no operand beside its gradient.
    assert torch.equal(result["0.bias"], plain["0.bias"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_operands_are_rounded_once(layout: torch.memory_format) -> None:
    model = layers(nn.Conv2d(6, 8, 3, stride=2, padding=1), 128)
    x, targets = torch.randn(4, 6, 8, 8).to(memory_format=layout), torch.arange(4) % 3
    result = fisher_diag(model, [(x, targets)], reduction="sum", operands="bfloat16")
    g = gradient(model, x, targets)
    per_sample = ops.conv2d_per_sample_grad(
        g, x.bfloat16().double(), (3, 3), (2, 2), (1, 1), (1, 1), groups=1
    )
    exact = per_sample.square().sum(0)
    assert relative_errors({"w": result["0.weight"]}, {"w": exact})["w"] < 1e-6


class Twice(nn.Module):
    """One layer, used twice, between two functions without parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).flatten(1)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(9, 9), torch.randn(4, 5, 9)),
        (nn.Conv1d(3, 3, 3, padding=1), torch.randn(4, 3, 9)),
        (nn.ConvTranspose2d(3, 3, 3, padding=1), torch.randn(4, 3, 5, 5)),
        (nn.Conv3d(2, 2, 3, padding=1), torch.randn(4, 2, 4, 4, 4)),
    ],
    ids=["linear", "conv1d", "transposed", "conv3d"],
)
def test_other_layers_and_layers_used_twice_are_near(layer: nn.Module, x: Tensor) -> None:
    model, data = Twice(layer), [(x, torch.arange(4) % 3)]
    short, full = (fisher_diag(model, data, operands=o) for o in ("bfloat16", "float32"))
    error = relative_errors(dict(short), dict(full))["layer.weight"]
    assert 1e-5 < error < 1e-2
    assert "operands in bfloat16" in short.rules["layer.weight"]


def test_rules_say_what_was_rounded() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(36, 5), nn.Flatten(),
        nn.Linear(20, 3),
    )  # fmt: skip
    data = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 3)]
    rules = fisher_diag(model, data, operands="bfloat16").rules
    said = {name for name, rule in rules.items() if rule.endswith(", operands in bfloat16")}
    assert said == {"0.weight", "3.weight", "5.weight"}
    assert not any("bfloat16" in rule for rule in fisher_diag(model, data).rules.values())


def test_float64_is_left_alone() -> None:
    model, data = nn.Linear(5, 3).double(), [(torch.randn(4, 5).double(), torch.arange(4) % 3)]
    short, full = (fisher_diag(model, data, operands=o) for o in ("bfloat16", "float32"))
    assert all(torch.equal(short[name], full[name]) for name in full)
    assert short.rules == full.rules


def test_unknown_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="operands: expected 'float32' or 'bfloat16', got 'half'"):
        fisher_diag(nn.Linear(5, 3), [], operands="half")
