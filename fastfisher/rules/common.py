"""What several rules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..recorder import Recorder, Use, View


def bind(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of a built-in function by name; built-ins have no signature to ask."""
    bound = dict(defaults)
    bound.update(zip(names, args, strict=False))
    bound.update(kwargs)
    return bound


def plain(recorder: Recorder, value: Any) -> Any:
    """A tracked parameter without its history; anything else as it is."""
    return value if recorder.view(value) is None else value.detach()


def parameter_views(
    recorder: Recorder, bound: Mapping[str, Any], slots: Sequence[str]
) -> dict[str, View] | None:
    """Views of the tracked parameters among ``slots``; None if one is passed anywhere else."""
    views = {}
    for name, value in bound.items():
        view = recorder.view(value)
        if view is None:
            continue
        if name not in slots:
            return None
        views[name] = view
    return views


def separate(
    recorder: Recorder, bound: dict[str, Any], slots: Sequence[str]
) -> tuple[dict[str, View], list[Tensor]] | None:
    """Tells the tracked parameters of a call from its other tensors.

    The parameters among the arguments ``bound`` are replaced by themselves without their history.

    Returns:
        The views that the parameters are, by their place among ``slots``, and the tensors through
        which gradients must go on flowing; None if a parameter is passed anywhere else.
    """
    views, others = {}, []
    for name, value in bound.items():
        if not isinstance(value, Tensor):
            continue
        view = recorder.view(value)
        if view is None:
            others.append(value)
        elif name in slots:
            views[name] = view
        else:
            return None
    for name in views:
        bound[name] = bound[name].detach()
    return views, others


def as_product_reads(x: Tensor) -> Tensor:
    """``x`` as a matrix product or a convolution reads it: autocast may narrow it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def is_recast(x: Tensor) -> bool:
    """Whether autocast may change the dtype that a norm of ``x`` computes in."""
    return x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)


def as_dtype(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the dtype that ``like`` accumulates in."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def rounded(recorder: Recorder, x: Tensor) -> Tensor | None:
    """``x`` in bfloat16 if ``recorder`` rounds operands and it is float32, else None."""
    return x.detach().bfloat16() if recorder.rounds and x.dtype == torch.float32 else None


def is_rounded(use: Use, slot: str) -> bool:
    """Whether ``use`` multiplies rounded operands for the gradient of ``slot``: not for a bias."""
    return slot == "weight" and getattr(use, "short", None) is not None


def as_operands(
    grad: Tensor, x: Tensor, out: Tensor, short: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``grad`` and ``x`` as a product that is added to ``out`` takes them.

    Kernels read bfloat16 as it is and sum in float32. ``short`` is ``x`` rounded to it, if the
    product is to be one of rounded operands.
    """
    if short is not None:
        return grad.bfloat16(), short
    if grad.dtype == x.dtype == torch.bfloat16 and out.dtype == torch.float32:
        return grad, x
    return as_dtype(grad, out), as_dtype(x, out)


def as_factors(grad: Tensor, x: Tensor, short: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for what computes in the dtype of ``grad``, which rounding does not change."""
    if short is not None:
        return grad.bfloat16().to(grad.dtype), short.to(grad.dtype)
    return grad, x.to(grad.dtype)
