"""Losses, one number a sample, and the functions of the output that each kind of Fisher squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .reference import PerSampleLoss, wide

KINDS = ("empirical", "mc", "exact")


@dataclass(frozen=True)
class Loss:
    """A per-sample loss, and the likelihood it is the negative logarithm of, if it is one.

    Attributes:
        per_sample: ``(output, target) -> [N]``.
        draw: ``(output, generator) -> target``, a target drawn from the model's distribution.
        roots: ``output -> iterator of cotangents``: the rows of a square root of the expected
            Hessian of the loss in the output, each of the output's shape.
        outcomes: ``output -> iterator of cotangents``: for each target there can be, the gradient
            of its loss in the output, times its probability; None where they are too many.
    """

    per_sample: PerSampleLoss
    draw: Callable[[Tensor, torch.Generator | None], Tensor] | None = None
    roots: Callable[[Tensor], Iterator[Tensor]] | None = None
    outcomes: Callable[[Tensor], Iterator[Tensor]] | None = None


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
    if isinstance(loss, nn.CrossEntropyLoss):
        return _cross_entropy_module(loss)
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
            f"kind: {kind!r} needs a loss that is a likelihood: 'cross_entropy', 'mse' or "
            "'bce_with_logits'"
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
    Hessian in the output, C - 1 objectives for C classes. Absolute values (``power`` 1) do not sum
    like that: they take the classes one by one.
    """
    if kind == "empirical":
        yield Objective(loss.per_sample, targets, 1.0)
        return
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"kind: {kind!r} needs a model whose output is one tensor")
    if kind == "mc":
        assert loss.draw is not None
        for _ in range(samples):
            yield Objective(loss.per_sample, loss.draw(output.detach(), generator), 1.0 / samples)
        return
    cotangents = loss.roots if power == 2 else loss.outcomes
    assert cotangents is not None
    for cotangent in cotangents(output.detach()):
        # The cotangent travels as the target, so that the fallback slices it like one.
        yield Objective(_inner_product, cotangent, 1.0)


def _inner_product(output: Tensor, cotangent: Tensor) -> Tensor:
    return (output * cotangent).flatten(1).sum(1)


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


# -- cross-entropy -----------------------------------------------------------------------------


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return _per_sample(F.cross_entropy(output, target, reduction="none"))


def _cross_entropy_module(module: nn.CrossEntropyLoss) -> Loss:
    def per_sample(output: Tensor, target: Tensor) -> Tensor:
        values = F.cross_entropy(
            output,
            target,
            weight=module.weight,
            ignore_index=module.ignore_index,
            reduction="none",
            label_smoothing=module.label_smoothing,
        )
        return _per_sample(values)

    plain = module.weight is None and module.label_smoothing == 0
    return replace(_LOSSES["cross_entropy"], per_sample=per_sample) if plain else Loss(per_sample)


def _draw_class(output: Tensor, generator: torch.Generator | None) -> Tensor:
    # Classes are axis 1; every position of a segmentation or a sequence draws its own.
    logits = output.movedim(1, -1)
    flat = logits.reshape(-1, logits.shape[-1]).float().softmax(1)
    drawn = torch.multinomial(flat, 1, replacement=True, generator=generator)
    return drawn.view(logits.shape[:-1])


def _class_probabilities(output: Tensor) -> Tensor:
    if output.dim() != 2:
        raise ValueError(
            "kind: 'exact' needs outputs [N, C]; with several positions a sample use 'mc', got "
            f"{tuple(output.shape)}"
        )
    return output.softmax(1)


def _class_outcomes(output: Tensor) -> Iterator[Tensor]:
    p = _class_probabilities(output)
    for j in range(p.shape[1]):
        gradient = p.clone()
        # Minus the sum of the other classes' probabilities: p - 1 would cancel.
        gradient[:, j] = 0
        gradient[:, j] = -gradient.sum(1)
        yield p[:, j : j + 1] * gradient


def _class_roots(output: Tensor) -> Iterator[Tensor]:
    """Columns of L with ``L L^T = diag(p) - p p^T``, by its closed-form Cholesky factor."""
    p = _class_probabilities(output)
    # Mass of the classes after j, summed from the small end: 1 - cumsum(p) would cancel.
    tail = p.flip(1).cumsum(1).flip(1)
    after = torch.cat([tail[:, 1:], torch.zeros_like(tail[:, :1])], 1)
    classes = p.shape[1]
    for j in range(classes - 1):
        root = torch.zeros_like(p)
        scale = p[:, j] / (tail[:, j] * after[:, j])
        scale = torch.where(torch.isfinite(scale), scale, torch.zeros_like(scale)).sqrt()
        root[:, j] = scale * after[:, j]
        root[:, j + 1 :] = -scale[:, None] * p[:, j + 1 :]
        yield root


# -- Gaussian and Bernoulli ----------------------------------------------------------------------


def _mse(output: Tensor, target: Tensor) -> Tensor:
    # Drawn targets are wider than a half-precision output, whose steps would swallow the noise.
    output = output.to(torch.promote_types(output.dtype, target.dtype))
    return _per_sample(F.mse_loss(output, target, reduction="none")) / 2


def _draw_gaussian(output: Tensor, generator: torch.Generator | None) -> Tensor:
    mean = wide(output)
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + noise


def _each_output(output: Tensor, scale: Tensor) -> Iterator[Tensor]:
    flat = scale.flatten(1)
    for d in range(flat.shape[1]):
        root = torch.zeros_like(flat)
        root[:, d] = flat[:, d]
        yield root.view(output.shape)


def _gaussian_roots(output: Tensor) -> Iterator[Tensor]:
    return _each_output(output, torch.ones_like(output))


def _bce_with_logits(output: Tensor, target: Tensor) -> Tensor:
    target = target.to(output.dtype)
    return _per_sample(F.binary_cross_entropy_with_logits(output, target, reduction="none"))


def _draw_bernoulli(output: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.bernoulli(wide(output).sigmoid(), generator=generator)


def _bernoulli_roots(output: Tensor) -> Iterator[Tensor]:
    # p (1 - p) without the cancellation of 1 - p.
    return _each_output(output, (output.sigmoid() * (-output).sigmoid()).sqrt())


_LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, _draw_class, _class_roots, _class_outcomes),
    "mse": Loss(_mse, _draw_gaussian, _gaussian_roots),
    "bce_with_logits": Loss(_bce_with_logits, _draw_bernoulli, _bernoulli_roots),
}
