"""The kinds of Fisher: expectations over the model's own targets, against their definition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import fisher_diag
from fastfisher.reference import sum_grad_squared_loop

from .oracle import assert_exact, cross_entropy, relative_errors


class Net(nn.Module):
    """A rule, a parameter without one, and a bounded function between."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 7)
        self.mix = nn.Parameter(torch.randn(7, 7))
        self.out = nn.Linear(7, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("ni,io->no", torch.tanh(self.hidden(x)), self.mix))


def fisher(model: nn.Module, *arguments: object, **options: object) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(fisher_diag(model, *arguments, **options))  # type: ignore[arg-type]


def expectation(
    model: nn.Module, x: Tensor, weighted: list[tuple[Tensor, Callable, Tensor]]
) -> dict[str, Tensor]:
    """``1/N sum_n sum_k weight[n, k] * grad(loss(x_n, target[n, k]))**2`` by definition."""
    names = [name for name, _ in model.named_parameters()]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for weight, loss, target in weighted:
        for n in range(len(x)):
            part = slice(n, n + 1)
            squares = sum_grad_squared_loop(model, x[part], target[part], loss, names)
            for name in names:
                total[name] = total[name] + weight[n] * squares[name] / len(x)
    return {name: value.detach() for name, value in total.items()}


@pytest.mark.parametrize("classes", [2, 5])
def test_exact_is_the_expectation_over_classes(classes: int) -> None:
    model, x = Net(classes).double(), torch.randn(4, 6, dtype=torch.float64)
    model.out.weight.data *= 3
    p = model(x).softmax(1).detach()
    definition = [(p[:, y], cross_entropy, torch.full((4,), y)) for y in range(classes)]
    result = fisher(model, [(x, torch.zeros(4).long())], kind="exact")
    assert max(relative_errors(result, expectation(model, x, definition)).values()) < 1e-10


def test_exact_with_a_certain_class_is_finite() -> None:
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    model.bias.data = torch.tensor([0.0, 200.0, 0.0, 0.0])
    result = fisher(model, [(x, torch.zeros(5).long())], kind="exact")
    assert all(bool(value.isfinite().all()) for value in result.values())


def test_exact_of_bernoulli_and_gaussian() -> None:
    model, x = Net(3).double(), torch.randn(4, 6, dtype=torch.float64)
    p = model(x).sigmoid().detach()
    outcomes = [torch.tensor([(i >> b) & 1 for b in range(3)]) for i in range(8)]

    def bce(output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1)

    definition = []
    for outcome in outcomes:
        target = outcome.double().expand(4, 3)
        weight = (p * target + (1 - p) * (1 - target)).prod(1)
        definition.append((weight, bce, target))
    data = [(x, torch.zeros(4, 3, dtype=torch.float64))]
    result = fisher(model, data, kind="exact", loss="bce_with_logits")
    assert max(relative_errors(result, expectation(model, x, definition)).values()) < 1e-10

    # The Gaussian's Fisher is the sum of squared Jacobian rows: the loss of a target one above.
    def row(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum(1)

    ones = torch.ones(4, dtype=torch.float64)
    definition = [(ones, row, torch.eye(3).double()[d].expand(4, 3)) for d in range(3)]
    result = fisher(model, data, kind="exact", loss="mse")
    assert max(relative_errors(result, expectation(model, x, definition)).values()) < 1e-10


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_with_logits"])
def test_draws_converge_to_the_expectation(loss: str) -> None:
    model, x = nn.Linear(6, 3).double(), torch.randn(4, 6, dtype=torch.float64)
    target = torch.zeros(4).long() if loss == "cross_entropy" else torch.zeros(4, 3).double()
    data = [(x, target)]
    exact = fisher(model, data, kind="exact", loss=loss)
    generator = torch.Generator().manual_seed(1)
    drawn = fisher(model, data, kind="mc", samples=4000, loss=loss, generator=generator)
    # 4000 draws: a relative standard error of about 2%, and 5 of them.
    assert max(relative_errors(drawn, exact).values()) < 5 * math.sqrt(2 / 4000)


def test_draws_follow_the_generator() -> None:
    model, data = nn.Linear(6, 3), [(torch.randn(4, 6), torch.zeros(4).long())]

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return fisher(model, data, kind="mc", generator=generator)["weight"]

    state = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_for_every_position_of_a_segmentation() -> None:
    model = nn.Conv2d(2, 3, 1)
    data = [(torch.randn(2, 2, 4, 4), torch.zeros(2, 4, 4).long())]
    assert set(fisher(model, data, kind="mc", samples=2)) == {"weight", "bias"}
    with pytest.raises(ValueError, match=r"'exact' needs outputs \[N, C\]"):
        fisher(model, data, kind="exact")


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.tokens(tokens))).transpose(1, 2)


@pytest.mark.parametrize(
    "module",
    [
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.2),
    ],
    ids=["ignore_index", "weight", "label_smoothing"],
)
def test_cross_entropy_options_with_tokens(module: nn.CrossEntropyLoss) -> None:
    def reference(output: Tensor, target: Tensor) -> Tensor:
        each = nn.CrossEntropyLoss(
            module.weight,
            ignore_index=module.ignore_index,
            label_smoothing=module.label_smoothing,
            reduction="none",
        )
        return each(output, target).sum(1)

    tokens, labels = torch.randint(0, 9, (4, 7)), torch.randint(0, 5, (4, 7))
    assert_exact(Tagger(), tokens, labels, loss=module, reference_loss=reference)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "true"}, "kind: expected one of"),
        ({"kind": "mc", "loss": cross_entropy}, "kind: 'mc' needs a loss that is a likelihood"),
        ({"kind": "mc", "samples": 0}, "samples: expected a positive integer"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_diag(nn.Linear(3, 2), [(torch.randn(2, 3), torch.zeros(2).long())], **change)


@pytest.mark.slow
def test_a_million_samples_keep_their_precision() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs, labels = torch.rand(1_000_000, 4) + 0.5, torch.randint(0, 3, (1_000_000,))
    batches = list(zip(inputs.split(50), labels.split(50), strict=True))
    result = fisher_diag(model, batches)
    # In float64 and in closed form: the gradient is (p - onehot) x.
    x, w, b = inputs.double(), model.weight.double(), model.bias.double()
    error = (x @ w.T + b).softmax(1).detach() - F.one_hot(labels, 3)
    exact = {
        "weight": (error**2).T @ x**2 / len(x),
        "bias": (error**2).mean(0),
    }
    assert max(relative_errors(result, exact).values()) < 1e-6
