"""Raw operators: schemas, fake kernels, plain-torch default kernels, and the loading of ``_C``.

``torch.ops.fastfisher.*`` exist as soon as this module is imported. Each has a default kernel in
plain torch that serves any device; where the compiled module is present it takes over on the CPU.
All of them return nothing; none is differentiable. Those named ``*_sum_grad_squared_`` add to their
first arguments in place, with ``power=1`` absolute values of per-sample gradients in place of the
squares; the others are the time steps of recurrent layers, all but the matrix products.

Shapes: ``N`` samples, ``T`` positions of one sample that share the parameter (tokens, pixels,
uses), ``O``/``C`` output and input features. The per-sample gradient is a sum over positions; it is
squared per sample, and the squares are summed over samples (paper, section 3.1).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from . import backends

SCHEMAS = (
    "linear_sum_grad_squared_(Tensor(a!) out, Tensor grad, Tensor input, float alpha, int "
    "power=2, bool allow_tf32=False) -> ()",
    "conv2d_sum_grad_squared_(Tensor(a!) out, Tensor grad, Tensor input, int[] stride, int[] "
    "padding, int[] dilation, int groups, float alpha, int power=2, bool allow_tf32=False) -> "
    "()",
    "channel_sum_grad_squared_(Tensor(a!)? weight, Tensor(b!)? bias, Tensor grad, Tensor? "
    "input, Tensor? mean, Tensor? scale, Tensor(c!)? grad_input, Tensor? factor, float alpha, "
    "int power=2) -> ()",
    "embedding_sum_grad_squared_(Tensor(a!) out, Tensor grad, Tensor index, int padding_index, "
    "float alpha, int power=2) -> ()",
    "lstm_step_(Tensor(a!) gates, Tensor? bias, Tensor cell, Tensor(b!) next_cell, Tensor(c!) "
    "hidden) -> ()",
    "lstm_step_backward_(Tensor(a!) grad_gates, Tensor(b!) grad_cell, Tensor? grad_output, "
    "Tensor? grad_hidden, Tensor gates, Tensor cell, Tensor next_cell) -> ()",
    "gru_step_(Tensor(a!) gates, Tensor product, Tensor? bias, Tensor hidden, Tensor(b!) "
    "candidate, Tensor(c!) next_hidden) -> ()",
    "gru_step_backward_(Tensor(a!) grad_gates, Tensor(b!) grad_product, Tensor(c!) "
    "grad_hidden, Tensor? grad_output, Tensor gates, Tensor candidate, Tensor hidden) -> ()",
)
"""The operators. Each backend that is not torch's own has the same ones in its own namespace."""

# A default kernel forms per-sample gradients of this many elements at once, at most (or of one
# sample, where that is more).
_DEFAULT_CHUNK_ELEMENTS = 1 << 24


def _refuse(op: str, argument: str, expected: str) -> NoReturn:
    raise ValueError(f"fastfisher::{op}: {argument}: expected {expected}")


_OPERANDS = "the dtype of out, or bfloat16 both where out is float32"


def _are_operands(grad: Tensor, input: Tensor, out: Tensor) -> bool:
    """Of the dtype of ``out``, or both bfloat16 where that is float32."""
    dtype = grad.dtype
    if dtype != out.dtype and not (dtype == torch.bfloat16 and out.dtype == torch.float32):
        return False
    return input.dtype == dtype


def _check_devices(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    # The dispatcher looks at one tensor's device, and kernels read memory where they run.
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            _refuse(
                op, argument, f"a tensor on {device}, as the others, got one on {tensor.device}"
            )


def _check_linear(out: Tensor, grad: Tensor, input: Tensor, power: int) -> None:
    op, g, x = "linear_sum_grad_squared_", grad.shape, input.shape
    if len(g) != 3:
        _refuse(op, "grad", "[N, T, O]")
    if len(x) != 3 or x[0] != g[0] or x[1] != g[1]:
        _refuse(op, "input", "[N, T, I]")
    if out.shape != (g[2], x[2]):
        _refuse(op, "out", "[O, I]")
    if not _are_operands(grad, input, out):
        _refuse(op, "grad, input", _OPERANDS)
    if power not in (1, 2):
        _refuse(op, "power", "1 or 2")
    _check_devices(op, out.device, grad=grad, input=input)


def _check_conv2d(out: Tensor, grad: Tensor, input: Tensor, groups: int, power: int) -> None:
    op, g, x, o = "conv2d_sum_grad_squared_", grad.shape, input.shape, out.shape
    if len(g) != 4:
        _refuse(op, "grad", "[N, O, OH, OW]")
    if len(x) != 4 or x[0] != g[0]:
        _refuse(op, "input", "[N, C, H, W]")
    if len(o) != 4 or groups < 1 or o[0] != g[1] or o[1] != x[1] // groups:
        _refuse(op, "out", "[O, C / groups, KH, KW]")
    if not _are_operands(grad, input, out):
        _refuse(op, "grad, input", _OPERANDS)
    if power not in (1, 2):
        _refuse(op, "power", "1 or 2")
    _check_devices(op, out.device, grad=grad, input=input)


def _check_channel(
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    input: Tensor | None,
    grad_input: Tensor | None,
    factor: Tensor | None,
    power: int,
    **broadcast: Tensor | None,
) -> None:
    op, g = "channel_sum_grad_squared_", grad.shape
    if len(g) != 3:
        _refuse(op, "grad", "[N, T, C]")
    if weight is None and bias is None:
        _refuse(op, "weight, bias", "at least one of them")
    if (input is None) != (weight is None):
        _refuse(op, "input", "with weight, and only with it")
    if weight is not None and weight.shape != g[2:]:
        _refuse(op, "weight", "[C]")
    if bias is not None and bias.shape != g[2:]:
        _refuse(op, "bias", "[C]")
    if input is not None and input.shape != g:
        _refuse(op, "input", "[N, T, C]")
    if (factor is None) != (grad_input is None):
        _refuse(op, "factor", "with grad_input, and only then")
    if factor is not None and factor.shape != g[2:]:
        _refuse(op, "factor", "[C]")
    if grad_input is not None and (grad_input.shape != g or grad_input.stride() != grad.stride()):
        _refuse(op, "grad_input", "[N, T, C] with the strides of grad")
    if power not in (1, 2):
        _refuse(op, "power", "1 or 2")
    _check_devices(
        op,
        grad.device,
        weight=weight,
        bias=bias,
        input=input,
        **broadcast,
        grad_input=grad_input,
        factor=factor,
    )


def _check_embedding(out: Tensor, grad: Tensor, index: Tensor, power: int) -> None:
    op, g = "embedding_sum_grad_squared_", grad.shape
    if out.dim() != 2:
        _refuse(op, "out", "[V, D]")
    if len(g) != 3 or g[2] != out.shape[1]:
        _refuse(op, "grad", "[N, T, D]")
    if index.shape != g[:2]:
        _refuse(op, "index", "[N, T]")
    if power not in (1, 2):
        _refuse(op, "power", "1 or 2")
    _check_devices(op, out.device, grad=grad, index=index)


def powers_(values: Tensor, power: int) -> Tensor:
    """``|values| ** power`` for a power of 1 or 2, in place."""
    return values.square_() if power == 2 else values.abs_()


def _sample_chunks(samples: int, elements: int) -> Sequence[slice]:
    step = max(1, _DEFAULT_CHUNK_ELEMENTS // max(1, elements))
    return [slice(start, min(start + step, samples)) for start in range(0, samples, step)]


def linear_per_sample_grad(grad: Tensor, input: Tensor) -> Tensor:
    """Per-sample weight gradients ``[N, O, I]`` of ``grad [N, T, O]`` and ``input [N, T, I]``."""
    return grad.transpose(1, 2) @ input


def conv2d_per_sample_grad(
    grad: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Per-sample weight gradients ``[N, O, C / groups, KH, KW]`` of a 2-d convolution."""
    samples, rows = grad.shape[:2]
    unfolded = torch.nn.functional.unfold(
        input,
        tuple(kernel_size),
        dilation=tuple(dilation),
        padding=tuple(padding),
        stride=tuple(stride),
    )
    x = unfolded.reshape(samples, groups, unfolded.shape[1] // groups, unfolded.shape[2])
    g = grad.reshape(samples, groups, rows // groups, unfolded.shape[2])
    return (g @ x.transpose(2, 3)).reshape(
        samples, rows, input.shape[1] // groups, kernel_size[0], kernel_size[1]
    )


def channel_per_sample_grad(
    grad: Tensor, input: Tensor | None, mean: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Per-sample ``(weight, bias)`` gradients, each ``[N, C]``, of ``grad [N, T, C]``."""
    weight = None
    if input is not None:
        xhat = input if mean is None else input - mean
        weight = (grad * (xhat if scale is None else xhat * scale)).sum(1)
    return weight, grad.sum(1)


def embedding_per_sample_grad(
    grad: Tensor, index: Tensor, padding_index: int, num_embeddings: int
) -> Tensor:
    """Per-sample weight gradients ``[N, V, D]`` of ``grad [N, T, D]`` and ``index [N, T]``."""
    samples, _, columns = grad.shape
    if padding_index >= 0:
        grad = grad.masked_fill((index == padding_index).unsqueeze(-1), 0)
    out = grad.new_zeros(samples, num_embeddings, columns)
    return out.scatter_add_(1, index.unsqueeze(-1).expand(-1, -1, columns), grad)


def _linear_default(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    alpha: float,
    power: int = 2,
    allow_tf32: bool = False,
) -> None:
    grad, input = grad.to(out.dtype), input.to(out.dtype)
    for part in _sample_chunks(grad.shape[0], out.numel()):
        per_sample = linear_per_sample_grad(grad[part], input[part])
        out.add_(powers_(per_sample, power).sum(0), alpha=alpha)


def _conv2d_default(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: float,
    power: int = 2,
    allow_tf32: bool = False,
) -> None:
    grad, input = grad.to(out.dtype), input.to(out.dtype)
    for part in _sample_chunks(grad.shape[0], out.numel()):
        per_sample = conv2d_per_sample_grad(
            grad[part], input[part], out.shape[2:], stride, padding, dilation, groups
        )
        out.add_(powers_(per_sample, power).sum(0), alpha=alpha)


def _channel_default(
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    input: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    grad_input: Tensor | None,
    factor: Tensor | None,
    alpha: float,
    power: int = 2,
) -> None:
    if grad_input is not None and factor is not None:
        torch.mul(grad, factor, out=grad_input)
    weight_grad, bias_grad = channel_per_sample_grad(grad, input, mean, scale)
    if weight is not None and weight_grad is not None:
        weight.add_(powers_(weight_grad, power).sum(0), alpha=alpha)
    if bias is not None:
        bias.add_(powers_(bias_grad, power).sum(0), alpha=alpha)


def _embedding_default(
    out: Tensor, grad: Tensor, index: Tensor, padding_index: int, alpha: float, power: int = 2
) -> None:
    # Equal tokens of one sample are summed under one key, so nothing of size N x V x D is formed.
    samples, _, columns = grad.shape
    sample = torch.arange(samples, device=index.device).unsqueeze(1)
    keys, inverse = torch.unique((sample * out.shape[0] + index).flatten(), return_inverse=True)
    sums = grad.new_zeros(keys.shape[0], columns)
    sums.index_add_(0, inverse, grad.flatten(0, 1))
    tokens = keys % out.shape[0]
    kept = tokens != padding_index
    out.index_add_(0, tokens[kept], powers_(sums[kept], power), alpha=alpha)


def _lstm_step_default(
    gates: Tensor, bias: Tensor | None, cell: Tensor, next_cell: Tensor, hidden: Tensor
) -> None:
    if bias is not None:
        gates.add_(bias)
    i, f, g, o = gates.chunk(4, -1)
    gates[:, : 2 * cell.shape[1]].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    next_cell.copy_(f * cell + i * g)
    hidden.copy_(o * next_cell.tanh())


def _lstm_step_backward_default(
    grad_gates: Tensor,
    grad_cell: Tensor,
    grad_output: Tensor | None,
    grad_hidden: Tensor | None,
    gates: Tensor,
    cell: Tensor,
    next_cell: Tensor,
) -> None:
    i, f, g, o = gates.chunk(4, -1)
    squashed = next_cell.tanh()
    grad = _sum_of(grad_output, grad_hidden, cell)
    d = grad_cell + grad * o * (1 - squashed.square())
    parts = (
        d * g * (i * (1 - i)),
        d * cell * (f * (1 - f)),
        d * i * (1 - g.square()),
        grad * squashed * (o * (1 - o)),
    )
    grad_cell.copy_(d * f)
    torch.cat(parts, -1, out=grad_gates)


def _gru_step_default(
    gates: Tensor,
    product: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    candidate: Tensor,
    next_hidden: Tensor,
) -> None:
    if bias is not None:
        product = product + bias
    two = 2 * hidden.shape[1]
    gates[:, :two].add_(product[:, :two]).sigmoid_()
    candidate.copy_(product[:, two:])
    r, z, fresh = gates.chunk(3, -1)
    fresh.add_(r * candidate).tanh_()
    next_hidden.copy_(fresh + z * (hidden - fresh))


def _gru_step_backward_default(
    grad_gates: Tensor,
    grad_product: Tensor,
    grad_hidden: Tensor,
    grad_output: Tensor | None,
    gates: Tensor,
    candidate: Tensor,
    hidden: Tensor,
) -> None:
    r, z, fresh = gates.chunk(3, -1)
    grad = _sum_of(grad_output, grad_hidden, hidden)
    grad_fresh = grad * (1 - z) * (1 - fresh.square())
    grad_r = grad_fresh * candidate * (r * (1 - r))
    grad_z = grad * (hidden - fresh) * (z * (1 - z))
    torch.cat((grad_r, grad_z, grad_fresh * r), -1, out=grad_product)
    grad_hidden.copy_(grad * z)
    torch.cat((grad_r, grad_z, grad_fresh), -1, out=grad_gates)


def _sum_of(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    """The sum of two optional operands."""
    given = [each for each in (a, b) if each is not None]
    return sum(given[1:], given[0]) if given else torch.zeros_like(like)


def _linear_fake(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    alpha: float,
    power: int = 2,
    allow_tf32: bool = False,
) -> None:
    _check_linear(out, grad, input, power)


def _conv2d_fake(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: float,
    power: int = 2,
    allow_tf32: bool = False,
) -> None:
    _check_conv2d(out, grad, input, groups, power)
    for dim in (0, 1):
        span = dilation[dim] * (out.shape[2 + dim] - 1) + 1
        lines = (input.shape[2 + dim] + 2 * padding[dim] - span) // stride[dim] + 1
        if lines != grad.shape[2 + dim]:
            _refuse("conv2d_sum_grad_squared_", "grad", "the height and width of the output")


def _channel_fake(
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    input: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    grad_input: Tensor | None,
    factor: Tensor | None,
    alpha: float,
    power: int = 2,
) -> None:
    statistics = {"mean": mean, "scale": scale}
    _check_channel(weight, bias, grad, input, grad_input, factor, power, **statistics)
    for name, tensor in statistics.items():
        if tensor is not None and tensor.shape != grad.shape:
            _refuse("channel_sum_grad_squared_", name, "[N, T, C]")


def _embedding_fake(
    out: Tensor, grad: Tensor, index: Tensor, padding_index: int, alpha: float, power: int = 2
) -> None:
    _check_embedding(out, grad, index, power)


def _check_step(
    op: str, state: str, like: Tensor, /, **gates_of: tuple[Tensor | None, int]
) -> None:
    """Refuses a tensor unless it has a row for each of ``like`` and so many times its columns."""
    if like.dim() != 2:
        _refuse(op, state, "[N, H]")
    for argument, (tensor, gates) in gates_of.items():
        columns = gates * like.shape[1]
        rows = () if argument == "bias" else (like.shape[0],)
        if tensor is not None and tensor.shape != (*rows, columns):
            _refuse(op, argument, f"{[*rows, columns]}")


def _lstm_step_fake(
    gates: Tensor, bias: Tensor | None, cell: Tensor, next_cell: Tensor, hidden: Tensor
) -> None:
    states = {"next_cell": (next_cell, 1), "hidden": (hidden, 1)}
    _check_step("lstm_step_", "cell", cell, gates=(gates, 4), bias=(bias, 4), **states)


def _lstm_step_backward_fake(
    grad_gates: Tensor,
    grad_cell: Tensor,
    grad_output: Tensor | None,
    grad_hidden: Tensor | None,
    gates: Tensor,
    cell: Tensor,
    next_cell: Tensor,
) -> None:
    _check_step(
        "lstm_step_backward_",
        "cell",
        cell,
        grad_gates=(grad_gates, 4),
        grad_cell=(grad_cell, 1),
        grad_output=(grad_output, 1),
        grad_hidden=(grad_hidden, 1),
        gates=(gates, 4),
        next_cell=(next_cell, 1),
    )


def _gru_step_fake(
    gates: Tensor,
    product: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    candidate: Tensor,
    next_hidden: Tensor,
) -> None:
    _check_step(
        "gru_step_",
        "hidden",
        hidden,
        gates=(gates, 3),
        product=(product, 3),
        bias=(bias, 3),
        candidate=(candidate, 1),
        next_hidden=(next_hidden, 1),
    )


def _gru_step_backward_fake(
    grad_gates: Tensor,
    grad_product: Tensor,
    grad_hidden: Tensor,
    grad_output: Tensor | None,
    gates: Tensor,
    candidate: Tensor,
    hidden: Tensor,
) -> None:
    _check_step(
        "gru_step_backward_",
        "hidden",
        hidden,
        grad_gates=(grad_gates, 3),
        grad_product=(grad_product, 3),
        grad_hidden=(grad_hidden, 1),
        grad_output=(grad_output, 1),
        gates=(gates, 3),
        candidate=(candidate, 1),
    )


FAKES: dict[str, Callable[..., None]] = {
    "linear_sum_grad_squared_": _linear_fake,
    "conv2d_sum_grad_squared_": _conv2d_fake,
    "channel_sum_grad_squared_": _channel_fake,
    "embedding_sum_grad_squared_": _embedding_fake,
    "lstm_step_": _lstm_step_fake,
    "lstm_step_backward_": _lstm_step_backward_fake,
    "gru_step_": _gru_step_fake,
    "gru_step_backward_": _gru_step_backward_fake,
}
"""What the operators do where tensors have no values: they refuse what does not fit."""

_KERNELS: dict[str, Callable[..., Any]] = {
    "linear_sum_grad_squared_": _linear_default,
    "conv2d_sum_grad_squared_": _conv2d_default,
    "channel_sum_grad_squared_": _channel_default,
    "embedding_sum_grad_squared_": _embedding_default,
    "lstm_step_": _lstm_step_default,
    "lstm_step_backward_": _lstm_step_backward_default,
    "gru_step_": _gru_step_default,
    "gru_step_backward_": _gru_step_backward_default,
}
# ``fastfisher`` has compiled kernels too, where there are any for a tensor's device;
# ``fastfisher_torch`` has only these.
_libraries = [torch.library.Library(name, "DEF") for name in ("fastfisher", "fastfisher_torch")]
for _library in _libraries:
    for _schema in SCHEMAS:
        _library.define(_schema)
    for _name, _kernel in _KERNELS.items():
        _library.impl(_name, _kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_library.ns}::{_name}", FAKES[_name], lib=_library)

_C: Any = None
_load_error: str | None = None
try:
    _C = importlib.import_module("fastfisher._C")
except ImportError as error:
    _load_error = str(error)
backends.load_cuda()


def build_info() -> dict[str, object]:
    """What was compiled, and what runs.

    Returns:
        ``compiled`` (bool), ``load_error`` (str or None: why the compiled module is absent),
        ``cpu_isa`` and ``supported_cpu_isas`` (None and [] without it), and the build's own facts.
    """
    if _C is None:
        return {
            "compiled": False,
            "load_error": _load_error,
            "cpu_isa": None,
            "supported_cpu_isas": [],
        }
    return {
        "compiled": True,
        "load_error": None,
        "cpu_isa": _C.cpu_isa(),
        "supported_cpu_isas": _C.supported_cpu_isas(),
        **_C.build_config(),
    }


def _may_round(out: Tensor, allow_tf32: bool | None) -> bool:
    if allow_tf32 is None:
        return out.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return allow_tf32


def linear_sum_grad_squared_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    *,
    alpha: float = 1.0,
    power: int = 2,
    allow_tf32: bool | None = None,
) -> None:
    """``out[o, i] += alpha * sum_n (sum_t grad[n, t, o] * input[n, t, i])**2``.

    Args:
        out: ``[O, I]``, any strides; float32 or float64.
        grad: ``[N, T, O]``, gradient at the layer's output; dtype of ``out``, or bfloat16 where
            that is float32: products and sums are float32's all the same.
        input: ``[N, T, I]``, the layer's input, dtype of ``grad``.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.
        allow_tf32: whether a GPU may round float32 operands to TF32, whose products are off by
            1e-3; None is torch's own setting, ``torch.backends.cuda.matmul.allow_tf32``.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``power`` is neither.
    """
    _check_linear(out, grad, input, power)
    if grad.shape[1] == 1 and (_may_round(out, allow_tf32) or not _may_round(out, None)):
        # One position: the square of a product is the product of squares, a plain GEMM; unless the
        # BLAS would round what this call may not.
        grad, input = grad.squeeze(1).to(out.dtype), input.squeeze(1).to(out.dtype)
        powers = torch.square if power == 2 else torch.abs
        out.addmm_(powers(grad).t(), powers(input), alpha=alpha)
        return
    operator = backends.operator("linear_sum_grad_squared_", out.device)
    operator(out, grad, input, alpha, power, _may_round(out, allow_tf32))
    torch.autograd.graph.increment_version(out)


def conv2d_sum_grad_squared_(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    alpha: float = 1.0,
    power: int = 2,
    allow_tf32: bool | None = None,
) -> None:
    """Adds the summed squares of per-sample weight gradients of a 2-d convolution to ``out``.

    Args:
        out: ``[O, C / groups, KH, KW]``, any strides (channels_last is the fastest).
        grad: ``[N, O, OH, OW]``, gradient at the output, any strides; dtype of ``out``, or bfloat16
            where that is float32.
        input: ``[N, C, H, W]``, dtype of ``grad``, any strides.
        stride: of the convolution.
        padding: zeros on both sides of height and width.
        dilation: of the convolution.
        groups: of the convolution.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.
        allow_tf32: see :func:`linear_sum_grad_squared_`.

    Raises:
        ValueError: a shape or device does not fit, or ``power`` is neither.
    """
    _check_conv2d(out, grad, input, groups, power)
    operator = backends.operator("conv2d_sum_grad_squared_", out.device)
    geometry = (stride, padding, dilation, groups)
    operator(out, grad, input, *geometry, alpha, power, _may_round(out, allow_tf32))
    torch.autograd.graph.increment_version(out)


def channel_sum_grad_squared_(
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    input: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    grad_input: Tensor | None = None,
    factor: Tensor | None = None,
    alpha: float = 1.0,
    power: int = 2,
) -> None:
    """Adds the summed squares of per-channel sums of one sample.

    ``weight[c] += alpha * sum_n (sum_t grad * (input - mean) * scale)**2`` and
    ``bias[c] += alpha * sum_n (sum_t grad)**2``.

    Args:
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        grad: ``[N, T, C]``, any strides.
        input: ``[N, T, C]``; needed with ``weight``.
        mean: broadcasts to ``[N, T, C]``; None is zero.
        scale: broadcasts to ``[N, T, C]``; None is one.
        grad_input: ``[N, T, C]`` with the strides of ``grad``; becomes ``grad * factor``, so that
            a layer's backward pass reads ``grad`` once.
        factor: contiguous ``[C]``; needed with ``grad_input``.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.

    Raises:
        ValueError: a shape or device does not fit, or ``power`` is neither.
    """
    statistics = {"mean": mean, "scale": scale}
    _check_channel(weight, bias, grad, input, grad_input, factor, power, **statistics)
    if input is not None:
        mean = None if mean is None else mean.expand_as(grad)
        scale = (grad.new_ones(()) if scale is None else scale).expand_as(grad)
    operator = backends.operator("channel_sum_grad_squared_", grad.device)
    operator(weight, bias, grad, input, mean, scale, grad_input, factor, alpha, power)
    outs = [out for out in (weight, bias, grad_input) if out is not None]
    torch.autograd.graph.increment_version(outs)


def embedding_sum_grad_squared_(
    out: Tensor,
    grad: Tensor,
    index: Tensor,
    *,
    padding_index: int = -1,
    alpha: float = 1.0,
    power: int = 2,
) -> None:
    """``out[v] += alpha * sum_n (sum_{t: index[n, t] = v} grad[n, t])**2``.

    Args:
        out: ``[V, D]``.
        grad: ``[N, T, D]``, dtype of ``out``.
        index: int64 ``[N, T]``, each in ``[0, V)``.
        padding_index: the row that gets no gradient; -1 for none.
        alpha: factor of the added squares.
        power: 2, or 1 for absolute values in place of squares.

    Raises:
        ValueError: a shape or device does not fit, or ``power`` is neither.
    """
    _check_embedding(out, grad, index, power)
    operator = backends.operator("embedding_sum_grad_squared_", out.device)
    operator(out, grad, index.long(), padding_index, alpha, power)
    torch.autograd.graph.increment_version(out)


def _step(name: str, default: Callable[..., None], gates: Tensor) -> Callable[..., None]:
    """The operator, or its plain torch kernel where no compiled one takes the dtype."""
    if gates.dtype not in (torch.float32, torch.float64):
        return default
    return cast("Callable[..., None]", backends.operator(name, gates.device))


def lstm_step_(
    gates: Tensor, bias: Tensor | None, cell: Tensor, next_cell: Tensor, hidden: Tensor
) -> None:
    """One time step of an LSTM, from the gates before activation to the next state.

    All tensors have one dtype, and the rows of matrices are contiguous; the compiled kernel, which
    serves float32 and float64, raises a RuntimeError where something does not fit.

    Args:
        gates: ``[N, 4 * H]``, the sum of both products; becomes the input, forget, cell and output
            gates after activation.
        bias: contiguous ``[4 * H]``, added to ``gates`` first, or None.
        cell: ``[N, H]``, before the step.
        next_cell: ``[N, H]``, overwritten by the cell after it.
        hidden: ``[N, H]``, overwritten by the hidden state after it.
    """
    step = _step("lstm_step_", _lstm_step_default, gates)
    step(gates, bias, cell, next_cell, hidden)
    torch.autograd.graph.increment_version((gates, next_cell, hidden))


def lstm_step_backward_(
    grad_gates: Tensor,
    grad_cell: Tensor,
    grad_output: Tensor | None,
    grad_hidden: Tensor | None,
    gates: Tensor,
    cell: Tensor,
    next_cell: Tensor,
) -> None:
    """The backward pass of :func:`lstm_step_`.

    Args:
        grad_gates: ``[N, 4 * H]``, overwritten by the gradient at the gates before activation; may
            be ``gates``.
        grad_cell: ``[N, H]``, the gradient at the next cell; becomes that at the previous one.
        grad_output: ``[N, H]`` or None, a summand of the gradient at the hidden state.
        grad_hidden: ``[N, H]`` or None, the other summand.
        gates: after activation.
        cell: before the step.
        next_cell: after it.
    """
    step = _step("lstm_step_backward_", _lstm_step_backward_default, gates)
    step(grad_gates, grad_cell, grad_output, grad_hidden, gates, cell, next_cell)
    torch.autograd.graph.increment_version((grad_gates, grad_cell))


def gru_step_(
    gates: Tensor,
    product: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    candidate: Tensor,
    next_hidden: Tensor,
) -> None:
    """One time step of a GRU, from both shares of the gates to the next state.

    Demands what :func:`lstm_step_` does.

    Args:
        gates: ``[N, 3 * H]``, the input's share; becomes the reset gates, the update gates and the
            candidates after activation.
        product: ``[N, 3 * H]``, the hidden state's share.
        bias: contiguous ``[3 * H]``, added to ``product``, or None.
        hidden: ``[N, H]``, before the step.
        candidate: ``[N, H]``, overwritten by the hidden state's share of the candidates.
        next_hidden: ``[N, H]``, overwritten by the hidden state after the step.
    """
    step = _step("gru_step_", _gru_step_default, gates)
    step(gates, product, bias, hidden, candidate, next_hidden)
    torch.autograd.graph.increment_version((gates, candidate, next_hidden))


def gru_step_backward_(
    grad_gates: Tensor,
    grad_product: Tensor,
    grad_hidden: Tensor,
    grad_output: Tensor | None,
    gates: Tensor,
    candidate: Tensor,
    hidden: Tensor,
) -> None:
    """The backward pass of :func:`gru_step_`.

    Args:
        grad_gates: ``[N, 3 * H]``, overwritten by the gradient at the input's share; may be
            ``gates``.
        grad_product: ``[N, 3 * H]``, overwritten by the gradient at the hidden state's share.
        grad_hidden: ``[N, H]``, a summand of the gradient at the next hidden state; becomes the
            gradient at the previous one, less what the product with the weight gives.
        grad_output: ``[N, H]`` or None, the other summand.
        gates: after activation.
        candidate: as :func:`gru_step_` left it.
        hidden: before the step.
    """
    step = _step("gru_step_backward_", _gru_step_backward_default, gates)
    step(grad_gates, grad_product, grad_hidden, grad_output, gates, candidate, hidden)
    torch.autograd.graph.increment_version((grad_gates, grad_product, grad_hidden))
