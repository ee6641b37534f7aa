"""Losses, one number a sample, and the functions of the output that each kind of Fisher squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cross_entropy import CrossEntropy
from .reference import PerSampleLoss, wide

KINDS = ("empirical", "mc", "exact")


@dataclass(frozen=True)
class Loss:
    """A per-sample loss, and expectations over the targets that the model's output predicts.

    The observed targets tell these which positions have a loss at all.

    Attributes:
        per_sample: ``(output, target) -> [N]``.
        draw: ``(output, target, generator) -> target`` drawn from the model's distribution.
        roots: ``(output, target) -> iterator of cotangents``, each of the output's shape: vectors
            whose outer products add up to the expected one of the loss's gradient in the output.
        outcomes: ``(output, target) -> iterator of cotangents``: for each target there can be, the
            gradient of its loss in the output, times its probability; None where they are too many.
    """

    per_sample: PerSampleLoss
    draw: Callable[[Tensor, Tensor, torch.Generator | None], Tensor] | None = None
    roots: Callable[[Tensor, Tensor], Iterator[Tensor]] | None = None
    outcomes: Callable[[Tensor, Tensor], Iterator[Tensor]] | None = None


@dataclass(frozen=True)
class Objective:
    """One function of a sample whose squared gradient is added, times ``weight``."""

    function: PerSampleLoss
    targets: Any
    weight: float


def resolve_loss(loss: str | nn.Module | Callable[[Any, Any], Tensor]) -> Loss:
    """The per-sample loss that ``loss`` stands for.

    Each named loss is a negative log-likelihood, summed over the positions of one sample:
    ``cross_entropy`` of class indices, ``mse`` = half the squared error (a unit-variance Gaussian;
    paper, section 3.1), ``bce_with_logits``. A ``torch.nn.CrossEntropyLoss`` is taken with its
    class weights, ``ignore_index`` and label smoothing, summed over positions whatever its
    reduction. Any other callable is taken to return one loss a sample.

    Raises:
        ValueError: no such name.
    """
    # A subclass with a forward of its own is a callable like any other.
    if isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward:
        return _of(CrossEntropy(loss.weight, loss.label_smoothing, loss.ignore_index))
    if callable(loss):
        return Loss(loss)
    if loss not in _LOSSES:
        raise ValueError(
            f"loss: expected one of {', '.join(map(repr, _LOSSES))}, a CrossEntropyLoss, or a "
            f"callable (output, target) -> per-sample losses, got {loss!r}"
        )
    return _LOSSES[loss]


def check_kind(kind: str, loss: Loss, samples: int, power: float) -> None:
    """Raises ValueError if this kind of Fisher is not defined for this loss and power."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if kind != "empirical" and loss.draw is None:
        raise ValueError(
            f"kind: {kind!r} needs a loss whose targets the output predicts: 'cross_entropy', "
            "'mse', 'bce_with_logits' or a CrossEntropyLoss"
        )
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected a positive integer, got {samples!r}")
    if isinstance(power, bool) or power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2, got {power!r}")
    if kind == "exact" and power == 1 and loss.outcomes is None:
        raise ValueError(
            "power: 1 with kind 'exact' needs a loss over classes, 'cross_entropy'; for the others "
            "use kind 'mc'"
        )


def objectives(
    kind: str,
    loss: Loss,
    output: Any,
    targets: Any,
    samples: int,
    generator: torch.Generator | None,
    power: int,
) -> Iterator[Objective]:
    """What a batch with this output contributes, one backward pass a term.

    ``empirical`` is the observed target; ``mc`` draws ``samples`` targets from the model; ``exact``
    is the expectation over the model's targets: the squared gradients along a square root of the
    expected outer product of the gradient in the output, C - 1 objectives for C classes (at each
    position, :meth:`CrossEntropy.roots`). Absolute values (``power`` 1) do not sum like that: they
    take the classes one by one.
    """
    if kind == "empirical":
        yield Objective(loss.per_sample, targets, 1.0)
        return
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"kind: {kind!r} needs a model whose output is one tensor")
    if kind == "mc":
        assert loss.draw is not None
        for _ in range(samples):
            drawn = loss.draw(output.detach(), targets, generator)
            yield Objective(loss.per_sample, drawn, 1.0 / samples)
        return
    cotangents = loss.roots if power == 2 else loss.outcomes
    assert cotangents is not None
    for cotangent in cotangents(output.detach(), targets):
        # The cotangent travels as the target, so that the fallback slices it like one.
        yield Objective(_inner_product, cotangent, 1.0)


def _inner_product(output: Tensor, cotangent: Tensor) -> Tensor:
    return (output * cotangent).flatten(1).sum(1)


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


# -- Gaussian and Bernoulli ----------------------------------------------------------------------


def _mse(output: Tensor, target: Tensor) -> Tensor:
    # Drawn targets are wider than a half-precision output, whose steps would swallow the noise.
    output = output.to(torch.promote_types(output.dtype, target.dtype))
    return _per_sample(F.mse_loss(output, target, reduction="none")) / 2


def _draw_gaussian(output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
    mean = wide(output)
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + noise


def _each_output(output: Tensor, scale: Tensor) -> Iterator[Tensor]:
    flat = scale.flatten(1)
    for d in range(flat.shape[1]):
        root = torch.zeros_like(flat)
        root[:, d] = flat[:, d]
        yield root.view(output.shape)


def _gaussian_roots(output: Tensor, target: Tensor) -> Iterator[Tensor]:
    return _each_output(output, torch.ones_like(output))


def _bce_with_logits(output: Tensor, target: Tensor) -> Tensor:
    target = target.to(output.dtype)
    return _per_sample(F.binary_cross_entropy_with_logits(output, target, reduction="none"))


def _draw_bernoulli(output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.bernoulli(wide(output).sigmoid(), generator=generator)


def _bernoulli_roots(output: Tensor, target: Tensor) -> Iterator[Tensor]:
    # p (1 - p) without the cancellation of 1 - p.
    return _each_output(output, (output.sigmoid() * (-output).sigmoid()).sqrt())


def _of(loss: CrossEntropy) -> Loss:
    return Loss(loss.per_sample, loss.draw, loss.roots, loss.outcomes)


_LOSSES: dict[str, Loss] = {
    "cross_entropy": _of(CrossEntropy()),
    "mse": Loss(_mse, _draw_gaussian, _gaussian_roots),
    "bce_with_logits": Loss(_bce_with_logits, _draw_bernoulli, _bernoulli_roots),
}
