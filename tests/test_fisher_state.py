"""A pass leaves the model, and everything global, as it was; also if it raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import fisher_diag


class Stop(BaseException):
    """Neither an error nor expected, such as a keyboard interrupt."""


class Restless(nn.Module):
    """Draws random numbers, and counts its calls in buffers: in place, and by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.calls + 1
        # A draw that changes anything would send every parameter to the fallback.
        return self.out(x) + 0 * torch.rand(())


def build() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Tanh(), Restless()
    ).train()
    model[1].eval()
    model[4].out.bias.requires_grad_(False)
    return model


def facts(model: nn.Module) -> dict[str, Any]:
    """Everything that a pass might change, by identity where that counts."""
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad versions": [g._version for p in model.parameters() if (g := p.grad) is not None],
        "parameters": [(id(p), p._version) for p in model.parameters()],
        "grads": [id(p.grad) for p in model.parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("kind", ["empirical", "exact", "mc"])
@pytest.mark.parametrize("where", [None, "data", "forward", "loss", "backward"])
def test_everything_is_left_as_found(where: str | None, kind: str, mode: str) -> None:
    model = build()
    x, y = torch.randn(6, 3), torch.arange(6) % 5
    model(x).sum().backward()
    late: list[bool] = []

    def fail(point: str) -> None:
        if point == where and late:
            raise Stop

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield x, y
        late.append(True)
        fail("data")
        yield x, y

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        fail("forward")
        if output.requires_grad:
            output.register_hook(lambda grad: fail("backward"))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        fail("loss")
        return F.cross_entropy(output, target, reduction="none")

    # Only the named losses have the other kinds.
    chosen: Any = loss if kind == "empirical" else "cross_entropy"
    raises = where is not None and not (where == "loss" and kind != "empirical")
    model[3].register_forward_hook(hook)
    before, state, random = facts(model), values(model), torch.get_rng_state()
    generator = torch.Generator()
    contexts = {
        "plain": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    with contexts[mode]:
        inside = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        if raises:
            with pytest.raises(Stop):
                fisher_diag(model, data(), kind=kind, generator=generator, loss=chosen)
        else:
            result = fisher_diag(model, data(), kind=kind, generator=generator, loss=chosen)
            assert all(bool(value.gt(0).any()) for value in result.values())
            assert not any(rule.startswith("fallback") for rule in result.rules.values())
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == inside
    assert late
    assert facts(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)


def test_the_models_draws_go_on_from_batch_to_batch() -> None:
    seen: list[float] = []

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand(())
            seen.append(float(noise))
            return super().forward(x) + noise

    model, batch = Noisy(3, 5), (torch.randn(1, 3), torch.tensor([0]))
    torch.manual_seed(0)
    fisher_diag(model, [batch, batch])
    assert len(set(seen)) == len(seen) >= 2
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), first)


def test_draws_of_targets_move_the_global_generator() -> None:
    # Else two estimates from one seed would be the same estimate.
    model, data = nn.Linear(6, 3), [(torch.randn(4, 6), torch.zeros(4).long())]
    one, two = (fisher_diag(model, data, kind="mc")["weight"] for _ in range(2))
    assert not torch.equal(one, two)


def test_tensors_of_inference_mode() -> None:
    model, y = nn.Linear(3, 5), torch.arange(4)
    with torch.inference_mode():
        x = torch.randn(4, 3)
    assert x.is_inference()
    expected = fisher_diag(model, [(x.clone(), y)])
    with torch.inference_mode():
        result = fisher_diag(model, [(x, y)])
    assert not result["weight"].is_inference()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
