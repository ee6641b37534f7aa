"""The kinds of Fisher: expectations over the model's own targets, against their definition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import fisher_diag
from fastfisher.losses import resolve_loss
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


class Mixing(nn.Module):
    """Three logits at each of some positions, each of which sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = torch.tanh(self.tokens(tokens)).flatten(1, -2).cumsum(1)
        return self.out(seen).transpose(1, 2).unflatten(2, tokens.shape[1:])


def all_targets(model: nn.Module, x: Tensor, observed: Tensor, ignored: int) -> list[tuple]:
    """Every combination of classes at the positions that are not ignored, by its probability."""
    output = model(x).detach()
    logs = (
        output.flatten(2).log_softmax(1) if output.dim() > 2 else output.log_softmax(1)[..., None]
    )
    outcomes = []
    for classes in product(range(logs.shape[1]), repeat=logs.shape[2]):
        drawn = torch.tensor(classes).expand(len(x), -1)
        weight = logs.gather(1, drawn[:, None]).sum((1, 2)).exp()
        target = drawn.reshape(observed.shape)
        outcomes.append((weight, torch.where(observed == ignored, ignored, target)))
    return outcomes


def summed(module: nn.CrossEntropyLoss) -> Callable[[Tensor, Tensor], Tensor]:
    def reference(output: Tensor, target: Tensor) -> Tensor:
        each = nn.CrossEntropyLoss(
            module.weight,
            ignore_index=module.ignore_index,
            label_smoothing=module.label_smoothing,
            reduction="none",
        )
        return each(output, target).reshape(len(target), -1).sum(1)

    return reference


def options(**chosen: object) -> nn.CrossEntropyLoss:
    weight = chosen.pop("weight", None)
    if weight is not None:
        weight = torch.tensor(weight, dtype=torch.float64)
    return nn.CrossEntropyLoss(weight, **chosen)  # type: ignore[arg-type]


CROSS_ENTROPIES = {
    "plain": options(),
    "weight": options(weight=[1.0, 2.0, 0.5]),
    "a zero weight": options(weight=[1.0, 0.0, 0.5]),
    "smoothing": options(label_smoothing=0.2),
    "nothing but smoothing": options(label_smoothing=1.0),
    "weight, smoothing": options(weight=[1.0, 2.0, 0.5], label_smoothing=0.2),
    "zero weights, smoothing": options(weight=[0.0, 0.0, 0.5], label_smoothing=0.2),
    "ignored class": options(ignore_index=1),
    "ignored class, weight, smoothing": options(
        ignore_index=1, weight=[1.0, 2.0, 0.5], label_smoothing=0.2
    ),
}


@pytest.mark.parametrize("module", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)], ids=str)
def test_exact_with_positions_and_options(
    shape: tuple[int, ...], module: nn.CrossEntropyLoss
) -> None:
    if shape:
        model, x = Mixing().double(), torch.randint(0, 9, (3, *shape))
    else:
        model, x = Net(3).double(), torch.randn(3, 6, dtype=torch.float64)
    model.out.weight.data *= 2
    observed = torch.randint(0, 3, (3, *shape))
    # One sample without a loss, and where there are several positions one of another sample.
    observed[1] = observed.view(3, -1)[2, -1 if shape > (1,) else 0] = module.ignore_index
    observed.view(3, -1)[0] = 2
    definition = [
        (weight, summed(module), target)
        for weight, target in all_targets(model, x, observed, module.ignore_index)
    ]
    result = fisher(model, [(x, observed)], kind="exact", loss=module)
    assert max(relative_errors(result, expectation(model, x, definition)).values()) < 1e-10
    # And by classes where they can be taken one by one: the same gradients, not squared.
    if math.prod(shape) == 1:
        output = model(x)
        gradients = [
            weight.view(-1, 1)
            * torch.autograd.grad(summed(module)(output, target).sum(), output, retain_graph=True)[
                0
            ].view(3, 3)
            for weight, target in all_targets(model, x, observed, module.ignore_index)
        ]
        absolute = fisher(model, [(x, observed)], kind="exact", loss=module, power=1)
        bias = torch.stack(gradients).abs().sum(0).mean(0)
        torch.testing.assert_close(absolute["out.bias"], bias, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("module", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
@pytest.mark.parametrize("common, rare", [(0, 2), (2, 0)])
def test_exact_with_a_class_next_to_impossible(
    common: int, rare: int, module: nn.CrossEntropyLoss
) -> None:
    model, x = Net(3).double(), torch.randn(3, 6, dtype=torch.float64)
    model.out.bias.data[rare], model.out.bias.data[common] = -800.0, 3.0
    observed = torch.full((3,), 2)
    definition = [
        (weight, summed(module), target)
        for weight, target in all_targets(model, x, observed, module.ignore_index)
    ]
    result = fisher(model, [(x, observed)], kind="exact", loss=module)
    assert max(relative_errors(result, expectation(model, x, definition)).values()) < 1e-10


def test_exact_with_many_impossible_classes() -> None:
    output = torch.full((1, 9), -800.0, dtype=torch.float64)
    output[0, 8] = 0
    weight = torch.full((9,), 1e-3, dtype=torch.float64)
    roots = resolve_loss(nn.CrossEntropyLoss(weight, label_smoothing=0.2)).roots
    assert roots is not None
    vectors = torch.cat(list(roots(output, torch.zeros(1).long())))
    # Class 8 is certain, with the gradient p less its smoothed target.
    gradient = -0.2 / 9 * weight
    gradient[8] *= -8
    torch.testing.assert_close(vectors.T @ vectors, gradient.outer(gradient), rtol=1e-10, atol=0)


def test_exact_takes_no_pass_for_positions_without_a_loss() -> None:
    module = CROSS_ENTROPIES["weight, smoothing"]
    output, target = torch.randn(2, 3, 4), torch.tensor([[0, -100, 2, -100], [1, -100, -100, -100]])
    roots = resolve_loss(module).roots
    assert roots is not None
    # Two classes less than all at each of positions 0 and 2, and the mean.
    assert len(list(roots(output, target))) == 2 + 2 + 1
    assert len(list(roots(output[..., 0], target[:, 0]))) == 2
    likelihood = resolve_loss("cross_entropy").roots
    assert likelihood is not None and len(list(likelihood(output, target))) == 2 + 2


@pytest.mark.parametrize("module", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_draws_converge_with_positions_and_options(module: nn.CrossEntropyLoss) -> None:
    model, tokens = Mixing().double(), torch.randint(0, 9, (3, 3))
    observed = torch.tensor([[2, 0, 2], [0, 2, module.ignore_index], [module.ignore_index] * 3])
    data = [(tokens, observed)]
    exact = fisher(model, data, kind="exact", loss=module)
    generator = torch.Generator().manual_seed(1)
    drawn = fisher(model, data, kind="mc", samples=3000, loss=module, generator=generator)
    assert max(relative_errors(drawn, exact).values()) < 5 * math.sqrt(2 / 3000)


@pytest.mark.parametrize("kind", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(ignore_index=7)], ids=str)
def test_ignored_positions_add_nothing(loss: object, kind: str) -> None:
    model, tokens = Mixing(), torch.randint(0, 9, (3, 2))
    tokens[:, 1] = torch.tensor([3, 4, 5])
    tokens[:, 0] = torch.tensor([0, 1, 2])
    targets = torch.full((3, 2), -100 if loss == "cross_entropy" else 7)
    targets[0], targets[1, 0] = 1, 2
    table = fisher(model, [(tokens, targets)], kind=kind, loss=loss)["tokens.weight"]
    # The second token is seen from its own position alone; the third sample has no loss.
    assert table.any(1).nonzero().flatten().tolist() == [0, 1, 3]


def test_positions_of_class_probabilities_are_all_kept() -> None:
    model, tokens = Mixing().double(), torch.randint(0, 9, (3, 2))
    soft = torch.rand(3, 3, 2, dtype=torch.float64).softmax(1)
    hard = torch.zeros(3, 2).long()
    for kind in ("mc", "exact"):
        results = [
            fisher(model, [(tokens, t)], kind=kind, generator=torch.Generator().manual_seed(0))
            for t in (soft, hard)
        ]
        assert max(relative_errors(*results).values()) == 0


def test_targets_that_do_not_fit_are_refused() -> None:
    roots = resolve_loss("cross_entropy").roots
    assert roots is not None
    with pytest.raises(ValueError, match=r"data: expected class indices \[2, 4\] for an output"):
        next(roots(torch.randn(2, 3, 4), torch.zeros(2).long()))


def test_absolute_values_of_several_positions_are_refused() -> None:
    data = [(torch.randint(0, 9, (2, 4)), torch.zeros(2, 4).long())]
    with pytest.raises(ValueError, match=r"power: 1 with kind 'exact' needs outputs \[N, C\]"):
        fisher(Mixing(), data, kind="exact", power=1)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * F.cross_entropy(output, target, reduction="none")


def test_subclass_with_a_forward_of_its_own_is_called() -> None:
    model, data = nn.Linear(6, 3), [(torch.randn(4, 6), torch.zeros(4).long())]
    once, twice = fisher(model, data), fisher(model, data, loss=Doubled())
    torch.testing.assert_close(twice["weight"], 4 * once["weight"])
    with pytest.raises(ValueError, match="kind: 'exact' needs a loss whose targets"):
        fisher(model, data, loss=Doubled(), kind="exact")


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
    tokens, labels = torch.randint(0, 9, (4, 7)), torch.randint(0, 5, (4, 7))
    assert_exact(Tagger(), tokens, labels, loss=module, reference_loss=summed(module))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "true"}, "kind: expected one of"),
        ({"kind": "mc", "loss": cross_entropy}, "kind: 'mc' needs a loss whose targets"),
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
