"""Buffers of a caller that a pass is added to: checked before the pass, written after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from .reference import sum_dtype
from .result import FisherDiag


def check_alpha(alpha: object) -> float:
    """``alpha`` as a float; ValueError if it is not a finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha!r}")
    return float(alpha)


def check_into(
    into: Mapping[str, Tensor],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    settings: Mapping[str, object],
) -> None:
    """Raises ValueError if something would keep a finished pass from being added to ``into``.

    Args:
        into: the buffers.
        model: whose parameters and buffers must not share memory with them.
        parameters: those that need a buffer.
        settings: attributes that must be those of ``into``, where it is a :class:`FisherDiag`.
    """
    if not isinstance(into, Mapping):
        raise ValueError(f"into: expected a mapping of buffers, got {type(into).__name__}")
    if isinstance(into, FisherDiag):
        for name, value in settings.items():
            if getattr(into, name) != value:
                raise ValueError(f"into: its {name} is {getattr(into, name)!r}, not {value!r}")
    for name, parameter in parameters.items():
        if name not in into:
            raise ValueError(f"into: it has no buffer for parameter {name!r}")
        _check_buffer(f"into: the buffer of {name!r}", into[name], parameter)
    _check_memory({name: into[name] for name in parameters}, model)


def _check_buffer(what: str, buffer: Tensor, parameter: Tensor) -> None:
    if not isinstance(buffer, Tensor) or buffer.layout != torch.strided:
        raise ValueError(f"{what}: expected a dense tensor, got {type(buffer).__name__}")
    if buffer.shape != parameter.shape:
        shapes = f"{list(parameter.shape)}, got {list(buffer.shape)}"
        raise ValueError(f"{what}: expected the parameter's shape {shapes}")
    if buffer.dtype not in (sum_dtype(parameter), torch.float64):
        expected = "float64" if parameter.dtype == torch.float64 else "float32 or float64"
        raise ValueError(f"{what}: expected {expected}, got {buffer.dtype}")
    if buffer.device != parameter.device:
        raise ValueError(f"{what}: expected device {parameter.device}, got {buffer.device}")
    if buffer.requires_grad or buffer.is_inference():
        raise ValueError(f"{what}: it requires grad, or comes from inference mode")


def _check_memory(buffers: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises if an entry would be written twice, or is one of the model's."""
    spans = [(*_span(buffer), f"into: the buffer of {name!r}") for name, buffer in buffers.items()]
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    others = [
        (*_span(tensor), "the model")
        for tensor in held.values()
        if tensor.layout == torch.strided and not tensor.is_meta
    ]
    for begin, end, what in spans:
        if end < begin:
            raise ValueError(f"{what}: some of its entries share memory")
    # In order of their addresses, a span that overlaps any other one overlaps a neighbour.
    ordered = sorted((span for span in (*spans, *others) if span[0] < span[1]), key=lambda s: s[:2])
    end, owner = 0, ""
    for span in ordered:
        if span[0] < end and (owner, span[2]) != ("the model", "the model"):
            first, second = sorted((owner, span[2]), key=lambda what: what == "the model")
            raise ValueError(f"{first}: it shares memory with {second.removeprefix('into: ')}")
        if span[1] > end:
            end, owner = span[1], span[2]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte address; the wrong way round if an address belongs to two entries."""
    axes = sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    )
    reach = 1
    for stride, size in axes:
        if stride < reach:
            return 1, 0
        reach += (size - 1) * stride
    begin = tensor.data_ptr()
    return begin, begin + (reach * tensor.element_size() if tensor.numel() else 0)
