"""Half precision and autocast: the model's own computation, squared and added up in float32."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FisherDiag, fisher_diag
from fastfisher.reference import sum_grad_squared_loop

from .oracle import cross_entropy, relative_errors
from .zoo import ZOO, NoRule

BFLOAT16 = torch.finfo(torch.bfloat16).eps
MODES = ["bfloat16", "autocast"]


def autocast(mode: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")


def halved(mode: str, model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor]:
    if mode == "autocast":
        return model, inputs
    return model.bfloat16(), inputs.bfloat16() if inputs.is_floating_point() else inputs


def quiet(*arguments: Any, **options: Any) -> FisherDiag:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fisher_diag(*arguments, **options)


def float_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target, reduction="none")


def contracted(model: nn.Sequential, inputs: Tensor, targets: Tensor, mode: str) -> dict:
    """From one batch's activations and gradients as they are, everything else in float64."""
    reads: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Callable:
        def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            x = arguments[0].detach()
            narrows = isinstance(layer, (nn.Linear, nn.Conv2d))
            reads[name] = x.bfloat16() if narrows else x
            output.register_hook(lambda grad: grads.__setitem__(name, grad))

        return hook

    layers = {name: layer for name, layer in model.named_children() if list(layer.parameters())}
    for name, layer in layers.items():
        layer.register_forward_hook(watch(name, layer))
    with autocast(mode):
        losses = float_loss(model(inputs), targets)
    losses.sum().backward()
    result = {}
    for name, layer in layers.items():
        alone = copy.deepcopy(layer)
        alone._forward_hooks.clear()
        alone, reading = alone.double(), reads[name]
        reading = reading.double() if reading.is_floating_point() else reading
        for n in range(len(inputs)):
            y = alone(reading[n : n + 1]) * grads[name][n : n + 1].double()
            each = torch.autograd.grad(y.sum(), list(alone.parameters()))
            for (parameter, _), g in zip(alone.named_parameters(), each, strict=True):
                key = f"{name}.{parameter}"
                result[key] = result.get(key, 0) + g.square() / len(inputs)
    return result


def images() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.Tanh(), nn.Conv2d(9, 4, 3, stride=2), nn.Flatten(2), nn.Linear(9, 6),
        nn.LayerNorm(6), nn.Tanh(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    return model, torch.randn(7, 3, 9, 9)


def tokens() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Embedding(9, 6, padding_idx=2), nn.Linear(6, 7), nn.Tanh(), nn.Flatten(),
        nn.Linear(28, 5),
    )  # fmt: skip
    return model, torch.randint(0, 9, (7, 4))


@pytest.mark.parametrize("make", [images, tokens])
@pytest.mark.parametrize("mode", MODES)
def test_sums_lose_nothing_that_the_model_computed(mode: str, make: Callable) -> None:
    model, inputs = halved(mode, *make())
    targets = torch.arange(7) % 5
    with autocast(mode):
        result = fisher_diag(model, [(inputs, targets)], loss=float_loss)
    exact = contracted(copy.deepcopy(model), inputs, targets, mode)
    assert {value.dtype for value in result.values()} == {torch.float32}
    for name, error in relative_errors(result, exact).items():
        # torch hands out a norm's statistics rounded to its input's dtype.
        rounded = mode == "bfloat16" and result.rules[name].endswith("norm")
        assert error < (2 * BFLOAT16 if rounded else 1e-6), (name, error)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_every_path_agrees_with_single_samples(name: str, mode: str) -> None:
    case = ZOO[name]()
    model, inputs = halved(mode, case.model, case.inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    exact = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    with autocast(mode):
        result = quiet(model, [(inputs, case.targets)])
        for n in range(len(inputs)):
            part = slice(n, n + 1)
            value = cross_entropy(model(inputs[part]), case.targets[part]).sum()
            for key, grad in zip(names, torch.autograd.grad(value, parameters), strict=True):
                exact[key] += grad.double().square() / len(inputs)
    assert {value.dtype for value in result.values()} == {torch.float32}
    # The gradients of single samples are rounded, so their squares are off by twice as much;
    # torch's recurrent layers in bfloat16 round at other places than steps in Python.
    tolerance = 3e-2 if (name, mode) == ("recurrent", "bfloat16") else 3 * BFLOAT16
    errors = relative_errors(result, exact)
    assert max(errors.values()) < tolerance, errors
    # But for the recurrent function itself, autocast costs no fast rule.
    slow = {n for n, rule in result.rules.items() if rule.startswith("fallback")}
    recurrent = {n for n in result if n.startswith("lstm")} if mode == "autocast" else set()
    assert slow == case.fallback | recurrent


class Autocasting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with autocast("autocast"):
            return self.model(x)


@pytest.mark.parametrize("name", ["perceptron", "sequences", "tables", "shared", "images"])
def test_autocast_around_the_call_is_autocast_in_the_forward_pass(name: str) -> None:
    case = ZOO[name]()
    batch = [(case.inputs, case.targets)]
    inside = quiet(Autocasting(case.model), batch, loss=float_loss)
    with autocast("autocast"):
        around = quiet(case.model, batch, loss=float_loss)
    assert torch.is_autocast_enabled("cpu") is False
    for key, value in around.items():
        assert torch.equal(value, inside[f"model.{key}"]), key


@pytest.mark.parametrize("vmap", [True, False, None], ids=["torch.func", "loop", "rule"])
def test_many_samples_add_up(vmap: bool | None) -> None:
    # In bfloat16 a sum of equal numbers stops at 256 of them.
    count = 600
    model = nn.Linear(6, 5) if vmap is None else NoRule(vmap)
    model, inputs = halved("bfloat16", model, torch.randn(1, 6))
    one = quiet(model, [(inputs, torch.tensor([1]))])
    many = quiet(model, [(inputs.expand(count, 6).contiguous(), torch.ones(count).long())])
    # Single rows and many take other kernels, whose results may differ by a rounding.
    tolerance = 1e-2 if vmap is None else 1e-5
    name = "weight" if vmap is None else "mix"
    assert relative_errors({name: many[name]}, {name: one[name]})[name] < tolerance


def test_rms_norm_takes_the_epsilon_of_float32() -> None:
    model = nn.Sequential(nn.RMSNorm(6), nn.Flatten(), nn.Linear(24, 5))
    model, inputs = halved("bfloat16", model, 0.05 * torch.randn(4, 4, 6))
    targets = torch.arange(4)
    result = fisher_diag(model, [(inputs, targets)], reduction="sum")
    exact = sum_grad_squared_loop(model, inputs, targets, cross_entropy, list(result))
    assert max(relative_errors(result, exact).values()) < 3 * BFLOAT16


def test_expectation_over_classes_of_half_precision_logits() -> None:
    model, inputs = halved("bfloat16", nn.Linear(6, 40), 3 * torch.randn(4, 6))
    result = fisher_diag(model, [(inputs, torch.zeros(4).long())], kind="exact", reduction="sum")
    p = model(inputs).detach().double().softmax(1)
    variance = p * (1 - p)  # of onehot - p, the gradient at the logits
    exact = {"weight": variance.t() @ inputs.double().square(), "bias": variance.sum(0)}
    assert max(relative_errors(result, exact).values()) < 3 * BFLOAT16


def test_noise_of_a_gaussian_survives_large_outputs() -> None:
    # Between 256 and 512 the steps of bfloat16 are 2, and the noise is about 1.
    model, inputs = halved("bfloat16", nn.Linear(1, 8), torch.zeros(50, 1))
    model.bias.data.fill_(300)
    generator = torch.Generator().manual_seed(0)
    data = [(inputs, torch.zeros(50, 8, dtype=torch.bfloat16))]
    result = fisher_diag(model, data, loss="mse", kind="mc", samples=20, generator=generator)
    # The variance of 8000 draws.
    assert abs(float(result["bias"].mean()) - 1) < 5 * math.sqrt(2 / 8000)
