"""The oracle: diagonal Fisher by ``torch.func`` and by a loop of single-sample backward passes.

Slow and simple on purpose. Tests compare every fast path with :func:`fisher_diag_loop`;
benchmarks time :func:`fisher_diag_func`; :mod:`fastfisher.rules.fallback` serves parameters that no
rule covers with the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

PerSampleLoss = Callable[[Any, Any], Tensor]


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``, with a tuple, list or mapping spread over its arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def samples_of(batch: Any, part: slice) -> Any:
    """The samples ``part`` of a tensor, or of each tensor in a container."""
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) else leaf, batch)


def sample_count(batch: Any) -> int:
    """Length of the first axis of the first tensor in ``batch``."""
    return next(leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """What squares of a parameter's gradients are added up in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def wide(values: Tensor) -> Tensor:
    """``values`` in float32, or in float64 if they are that."""
    dtype = sum_dtype(values)
    return values if values.dtype == dtype else values.to(dtype)


def _powers(gradient: Tensor, power: int) -> Tensor:
    return gradient.square() if power == 2 else gradient.abs()


def sum_grad_squared_loop(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: PerSampleLoss,
    names: Sequence[str],
    *,
    power: int = 2,
) -> dict[str, Tensor]:
    """Sum over the samples of a batch of squared per-sample gradients, one backward a sample.

    Args:
        model: called on one sample after the other, by :func:`call`; its mode is left alone.
        inputs: ``[N, ...]``, or a tuple, list or mapping of such.
        targets: ``[N, ...]``.
        loss: ``(output, target) -> [N]`` losses, one a sample.
        names: parameters to differentiate, as in ``model.named_parameters()``.
        power: 2, or 1 for the sum of absolute values.

    Returns:
        One tensor per name, of the parameter's shape; float64 for float64 parameters, else float32.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [named[name] for name in names]
    totals = [torch.zeros_like(p, dtype=sum_dtype(p), requires_grad=False) for p in parameters]
    with torch.enable_grad():
        for n in range(sample_count(inputs)):
            part = slice(n, n + 1)
            value = loss(call(model, samples_of(inputs, part)), samples_of(targets, part)).sum()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total.add_(_powers(gradient.detach().to_dense().to(total.dtype), power))
    return dict(zip(names, totals, strict=True))


def sum_grad_squared_func(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: PerSampleLoss,
    names: Sequence[str],
    *,
    chunk_size: int | None = None,
    power: int = 2,
) -> dict[str, Tensor]:
    """The same quantity by ``torch.func.vmap(grad)``; memory is O(chunk_size * P).

    Args:
        model: called through ``torch.func.functional_call``; its mode is left alone.
        inputs: ``[N, ...]``, or a tuple, list or mapping of such.
        targets: ``[N, ...]``.
        loss: ``(output, target) -> [N]`` losses, one a sample.
        names: parameters to differentiate.
        chunk_size: samples whose gradients are held at once; ``None`` holds all ``N``.
        power: 2, or 1 for the sum of absolute values.

    Returns:
        One tensor per name, of the parameter's shape; float64 for float64 parameters, else float32.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name: named[name].detach() for name in names}

    def alone(sample: Any) -> Any:
        return tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, sample)

    def sample_loss(parameters: Mapping[str, Tensor], x: Any, y: Any) -> Tensor:
        def functional(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, dict(parameters), args, kwargs)

        return loss(call(functional, alone(x)), alone(y)).sum()

    per_sample = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))
    count = sample_count(inputs)
    step = chunk_size or count
    totals = {name: torch.zeros_like(p, dtype=sum_dtype(p)) for name, p in chosen.items()}
    for start in range(0, count, step):
        part = slice(start, start + step)
        gradients = per_sample(chosen, samples_of(inputs, part), samples_of(targets, part))
        for name, gradient in gradients.items():
            totals[name] += _powers(gradient.to(sum_dtype(gradient)), power).sum(0)
    return totals


def fisher_diag_loop(
    model: nn.Module, data: Iterable[tuple[Any, Any]], loss: PerSampleLoss
) -> dict[str, Tensor]:
    """Mean over the samples of ``data`` of squared per-sample gradients (paper, section 3.1).

    Args:
        model: put it in eval mode first.
        data: iterable of ``(input, target)`` batches.
        loss: ``(output, target) -> [N]`` losses.

    Returns:
        One tensor per parameter that requires grad.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    totals: dict[str, Tensor] = {}
    samples = 0
    for inputs, targets in data:
        samples += sample_count(inputs)
        for name, value in sum_grad_squared_loop(model, inputs, targets, loss, names).items():
            totals[name] = totals[name] + value if name in totals else value
    return {name: total / samples for name, total in totals.items()}
