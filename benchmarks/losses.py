"""Losses for the table of exactness, each with its definition: a loop over samples and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.registry import CROSS_ENTROPY, SEED, Problem
from fastfisher.losses import resolve_loss
from fastfisher.reference import PerSampleLoss, sum_grad_squared_loop

DRAWS = 2
"""Targets that ``kind="mc"`` draws for each sample here."""

IGNORED = -100
"""The target of positions without a loss."""

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcomes:
    """Targets of a batch, one for each sample, and the probability of each sample's."""

    targets: Tensor
    weights: Tensor


def weighted_sum(problem: Problem, loss: PerSampleLoss, parts: Iterable[Outcomes]) -> Values:
    """``sum_k sum_n weight[k, n] * grad(loss(f(x_n), target[k, n]))**2``, one sample at a time."""
    totals: dict[str, Tensor] = {}
    for part in parts:
        for n in range(len(problem.inputs)):
            one = slice(n, n + 1)
            squares = sum_grad_squared_loop(
                problem.model, problem.inputs[one], part.targets[one], loss, problem.names
            )
            for name, value in squares.items():
                value = part.weights[n] * value
                totals[name] = totals[name] + value if name in totals else value
    return totals


def observed(problem: Problem) -> Iterable[Outcomes]:
    """The labels of the batch."""
    yield Outcomes(problem.targets, torch.ones(len(problem.inputs)))


def drawn(problem: Problem, loss: str | nn.Module) -> Iterable[Outcomes]:
    """The targets that ``fisher_diag`` draws: same outputs, same generator."""
    draw = resolve_loss(loss).draw
    assert draw is not None
    output, source = problem.model(problem.inputs).detach(), generator()
    for _ in range(DRAWS):
        yield Outcomes(draw(output, problem.targets, source), torch.full((len(output),), 1 / DRAWS))


def all_classes(problem: Problem) -> Iterable[Outcomes]:
    """Every combination of classes over the positions of a sample, with its probability.

    Ignored positions stay so: their classes make outcomes that are equal, and add up.
    """
    ignored = problem.targets == IGNORED
    output = problem.model(problem.inputs).detach()
    logs = output.reshape(*output.shape[:2], -1).log_softmax(1)
    for classes in product(range(logs.shape[1]), repeat=logs.shape[2]):
        target = torch.tensor(classes).expand(len(output), -1)
        chance = logs.gather(1, target[:, None]).sum((1, 2)).exp()
        target = target.reshape(ignored.shape)
        yield Outcomes(target.masked_fill(ignored, IGNORED), chance)


def all_bits(problem: Problem) -> Iterable[Outcomes]:
    """Every combination of zeros and ones, with its probability."""
    output = problem.model(problem.inputs).detach()
    p = output.sigmoid().flatten(1)
    for bits in product([0.0, 1.0], repeat=p.shape[1]):
        target = torch.tensor(bits, dtype=p.dtype).expand_as(p)
        yield Outcomes(target.view_as(output), (target * p + (1 - target) * (1 - p)).prod(1))


def gaussian(problem: Problem) -> Iterable[Outcomes]:
    """Targets whose squared gradients add up to the expectation under a unit-variance Gaussian.

    The residuals of the outputs are independent and have variance 1: one residual of 1 for each
    output, zeros in the others.
    """
    output = problem.model(problem.inputs).detach()
    flat = output.flatten(1)
    for d in range(flat.shape[1]):
        target = flat.clone()
        target[:, d] += 1
        yield Outcomes(target.view_as(output), torch.ones(len(output)))


def generator() -> torch.Generator:
    """The source of the draws, as it was at the start."""
    return torch.Generator().manual_seed(SEED)


@dataclass(frozen=True)
class Loss:
    """A row of the table of losses.

    Attributes:
        name: of the row, and unique.
        given: what ``fisher_diag`` is given.
        definition: the same for the loop: ``(output, target) -> [N]``.
        problem: model and batch.
        outcomes: every target there can be; None where the loss is no likelihood.
    """

    name: str
    given: Any
    definition: PerSampleLoss
    problem: Callable[[], Problem]
    outcomes: Callable[[Problem], Iterable[Outcomes]] | None = None

    def values(self, problem: Problem, kind: str) -> Values:
        """The right values of a kind that the loss has."""
        if kind == "empirical":
            return weighted_sum(problem, self.definition, observed(problem))
        if kind == "mc":
            return weighted_sum(problem, self.definition, drawn(problem, self.given))
        assert self.outcomes is not None
        return weighted_sum(problem, self.definition, self.outcomes(problem))


class Positions(nn.Module):
    """Three outputs at each position, ``[N, 3, S]``, which sees the tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.tokens(tokens)).cumsum(1)).transpose(1, 2)


def _vector() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def _map() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2))


def _problem(
    model: Callable[[], nn.Module], inputs: Callable[[], Tensor], target: Callable[[Tensor], Tensor]
) -> Callable[[], Problem]:
    def build() -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            net, x = model().double().eval(), inputs()
            targets = target(net(x).detach())
        return Problem(net, x, targets, CROSS_ENTROPY)

    return build


def _classes(output: Tensor) -> Tensor:
    return torch.randint(3, output[:, 0].shape)


def _some_ignored(output: Tensor) -> Tensor:
    labels = _classes(output)
    return labels.masked_fill(torch.rand(labels.shape) < 0.4, IGNORED)


def _reals(output: Tensor) -> Tensor:
    return torch.randn_like(output)


def _bits(output: Tensor) -> Tensor:
    return torch.randint(2, output.shape).double()


def _rows(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _cross_entropy(**options: Any) -> PerSampleLoss:
    return lambda o, t: _rows(F.cross_entropy(o, t, reduction="none", **options))


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return _rows((output - target) ** 2 / 2)


def _bce(output: Tensor, target: Tensor) -> Tensor:
    return _rows(F.binary_cross_entropy_with_logits(output, target, reduction="none"))


def _huber(output: Tensor, target: Tensor) -> Tensor:
    return _rows(F.huber_loss(output, target, reduction="none"))


def _vectors() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64)


def _sequences() -> Tensor:
    return torch.randint(9, (4, 3))


def _images() -> Tensor:
    return torch.randn(2, 2, 2, 2, dtype=torch.float64)


_WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

CLASSIFICATION = Loss(
    "cross-entropy, [N, C]",
    "cross_entropy",
    _cross_entropy(),
    _problem(_vector, _vectors, _classes),
    all_classes,
)
"""The loss of the table of layers, too."""

LOSSES: tuple[Loss, ...] = (
    CLASSIFICATION,
    Loss(
        "cross-entropy of tokens, [N, C, S]",
        "cross_entropy",
        _cross_entropy(),
        _problem(Positions, _sequences, _classes),
        all_classes,
    ),
    Loss(
        "cross-entropy of a segmentation, [N, C, H, W]",
        "cross_entropy",
        _cross_entropy(),
        _problem(_map, _images, _classes),
        all_classes,
    ),
    Loss(
        "cross-entropy, ignore_index, tokens",
        nn.CrossEntropyLoss(ignore_index=IGNORED),
        _cross_entropy(ignore_index=IGNORED),
        _problem(Positions, _sequences, _some_ignored),
        all_classes,
    ),
    Loss(
        "cross-entropy, label smoothing",
        nn.CrossEntropyLoss(label_smoothing=0.2),
        _cross_entropy(label_smoothing=0.2),
        _problem(_vector, _vectors, _classes),
        all_classes,
    ),
    Loss(
        "cross-entropy, label smoothing, tokens",
        nn.CrossEntropyLoss(label_smoothing=0.2),
        _cross_entropy(label_smoothing=0.2),
        _problem(Positions, _sequences, _classes),
        all_classes,
    ),
    Loss(
        "cross-entropy, class weights",
        nn.CrossEntropyLoss(_WEIGHT),
        _cross_entropy(weight=_WEIGHT),
        _problem(_vector, _vectors, _classes),
        all_classes,
    ),
    Loss(
        "cross-entropy, class weights, segmentation",
        nn.CrossEntropyLoss(_WEIGHT),
        _cross_entropy(weight=_WEIGHT),
        _problem(_map, _images, _classes),
        all_classes,
    ),
    Loss(
        "cross-entropy, all three, tokens",
        nn.CrossEntropyLoss(_WEIGHT, ignore_index=IGNORED, label_smoothing=0.2),
        _cross_entropy(weight=_WEIGHT, ignore_index=IGNORED, label_smoothing=0.2),
        _problem(Positions, _sequences, _some_ignored),
        all_classes,
    ),
    Loss("mse, [N, D]", "mse", _mse, _problem(_vector, _vectors, _reals), gaussian),
    Loss("mse, [N, D, S]", "mse", _mse, _problem(Positions, _sequences, _reals), gaussian),
    Loss(
        "bce_with_logits, [N, D]",
        "bce_with_logits",
        _bce,
        _problem(_vector, _vectors, _bits),
        all_bits,
    ),
    Loss(
        "bce_with_logits, [N, D, S]",
        "bce_with_logits",
        _bce,
        _problem(Positions, _sequences, _bits),
        all_bits,
    ),
    Loss("a callable (Huber)", _huber, _huber, _problem(_vector, _vectors, _reals)),
)
