"""Which layer shapes the benchmark cases have, and both ways of computing with one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.registry import IMAGE_LAYOUTS, SEED, Case
from fastfisher import fisher_diag, ops

_FLOAT32 = 4  # bytes
CONTIGUOUS = "contiguous"

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
"""What operands are given as; tf32 rounds those of products."""


@dataclass(frozen=True)
class Operands:
    """One layer's tensors, and what is timed on them.

    Attributes:
        out: where ours adds to, as :func:`fastfisher.fisher_diag` allocates it.
        ours: adds the summed squares of per-sample gradients to ``out``.
        reference: torch's gradient of the same weight, of the whole batch.
        engine: what torch computes that with: oneDNN, or a BLAS (on unfolded images).
        exact: in float64, what one call of ours adds.
    """

    out: Tensor
    ours: Callable[[], object]
    reference: Callable[[], object]
    engine: str
    exact: Callable[[], Tensor]

    def error(self) -> float:
        """How wrong ours is, relative, in norm."""
        self.out.zero_()
        self.ours()
        want = self.exact()
        return float((self.out - want).norm() / want.norm())


@dataclass(frozen=True)
class Convolution:
    """A 2-d convolution of ``samples`` images; pairs are (vertical, horizontal)."""

    samples: int
    inputs: int
    image: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    layouts = IMAGE_LAYOUTS

    @property
    def _sides(self) -> list[tuple[int, int, int, int, int]]:
        """Size, kernel, stride, padding and dilation along each dimension."""
        return list(
            zip(self.image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    @property
    def output_image(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in self._sides
        )
        return height, width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of the weight."""
        return self.outputs, self.inputs // self.groups, *self.kernel

    @property
    def operations(self) -> int:
        """Multiplications and additions of the weight gradient; those with padding count too."""
        height, width = self.output_image
        return 2 * self.samples * height * width * torch.Size(self.weight_shape).numel()

    @property
    def bytes(self) -> int:
        """What must move at least: gradient, the input as far as it is used, sums in and out."""
        return self.traffic(_FLOAT32)

    def traffic(self, element: int) -> int:
        """The same, with operands of ``element`` bytes a number."""
        used, written = 1, 1
        for (size, kernel, stride, padding, dilation), length in zip(
            self._sides, self.output_image, strict=True
        ):
            taps = {
                o * stride - padding + k * dilation for o in range(length) for k in range(kernel)
            }
            used *= len(taps & set(range(size)))
            written *= length
        images = self.samples * (self.inputs * used + self.outputs * written)
        return element * images + 2 * _FLOAT32 * torch.Size(self.weight_shape).numel()

    def __str__(self) -> str:
        (height, width), (rows, columns) = self.image, self.kernel
        parts = [f"{self.samples}×{self.inputs}×{height}×{width} → {self.outputs}"]
        parts.append(f"{rows}×{columns}")
        if self.stride != (1, 1):
            parts.append(f"stride {_pair(self.stride)}")
        if self.padding != tuple(
            d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel, strict=True)
        ):
            parts.append(f"padding {_pair(self.padding)}")
        if self.dilation != (1, 1):
            parts.append(f"dilation {_pair(self.dilation)}")
        if self.groups != 1:
            parts.append(f"{self.groups} groups")
        return ", ".join(parts)

    def operands(
        self,
        layout: str,
        samples: int | None = None,
        device: str = "cpu",
        precision: str = "float32",
    ) -> Operands:
        """Random operands in a memory layout.

        Args:
            layout: one of ``layouts``.
            samples: another number of them than the shape's.
            device: where the operands are.
            precision: a key of :data:`PRECISIONS`.
        """
        batch = samples or self.samples
        last = torch.channels_last
        memory = last if layout == "channels_last" else torch.contiguous_format
        to, tf32 = (device, PRECISIONS[precision]), precision == "tf32"
        grad = _random(0, *to, batch, self.outputs, *self.output_image)
        grad = grad.contiguous(memory_format=memory)
        inputs = _random(1, *to, batch, self.inputs, *self.image)
        inputs = inputs.contiguous(memory_format=memory)
        weight = torch.zeros(self.weight_shape, device=device, dtype=inputs.dtype)
        weight = weight.contiguous(memory_format=memory)
        out = torch.zeros(self.weight_shape, device=device).contiguous(memory_format=last)
        geometry = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

        def exact() -> Tensor:
            total = torch.zeros(self.weight_shape, dtype=torch.float64, device=device)
            for g, x in zip(grad.double().split(1), inputs.double().split(1), strict=True):
                total += torch.nn.grad.conv2d_weight(x, self.weight_shape, g, **geometry).square()
            return total

        rest = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        backend = torch._C._select_conv_backend(inputs, weight, None, *rest).name
        engine = {"Mkldnn": "oneDNN", "Slow2d": "BLAS"}.get(backend, backend)
        reference = partial(
            torch.ops.aten.convolution_backward,
            *(grad, inputs, weight, None, *rest, [False, True, False]),
        )
        ours = partial(ops.conv2d_sum_grad_squared_, out, grad, inputs, **geometry, allow_tf32=tf32)
        return Operands(out, ours, reference, engine, exact)


@dataclass(frozen=True)
class Linear:
    """A linear layer that ``positions`` of each sample share."""

    samples: int
    positions: int
    inputs: int
    outputs: int

    layouts = (CONTIGUOUS,)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the weight gradient."""
        return 2 * self.samples * self.positions * self.inputs * self.outputs

    @property
    def bytes(self) -> int:
        """What must move at least: gradient, input, sums in and out."""
        return self.traffic(_FLOAT32)

    def traffic(self, element: int) -> int:
        """The same, with operands of ``element`` bytes a number."""
        rows = self.samples * self.positions
        weight = self.inputs * self.outputs
        return element * rows * (self.inputs + self.outputs) + 2 * _FLOAT32 * weight

    def __str__(self) -> str:
        return f"{self.samples}×{self.positions}×{self.inputs} → {self.outputs}"

    def operands(
        self,
        layout: str,
        samples: int | None = None,
        device: str = "cpu",
        precision: str = "float32",
    ) -> Operands:
        """Random contiguous operands; arguments as in :meth:`Convolution.operands`."""
        batch = samples or self.samples
        to, tf32 = (device, PRECISIONS[precision]), precision == "tf32"
        grad = _random(0, *to, batch, self.positions, self.outputs)
        inputs = _random(1, *to, batch, self.positions, self.inputs)
        out = torch.zeros(self.outputs, self.inputs, device=device)
        grads, rows = grad.flatten(0, 1).t(), inputs.flatten(0, 1)

        def exact() -> Tensor:
            return sum(
                ((g.t() @ x).square() for g, x in zip(grad.double(), inputs.double(), strict=True)),
                torch.zeros((), dtype=torch.float64, device=device),
            )

        ours = partial(ops.linear_sum_grad_squared_, out, grad, inputs, allow_tf32=tf32)
        return Operands(out, ours, partial(torch.mm, grads, rows), "BLAS", exact)


Shape = Convolution | Linear


def to_json(shape: Shape) -> dict[str, Any]:
    """The fields of a shape and the name of its kind."""
    return {"kind": type(shape).__name__, **asdict(shape)}


def from_json(fields: Mapping[str, Any]) -> Shape:
    """The shape whose :func:`to_json` it is.

    Raises:
        KeyError: it has no kind, or one that does not exist.
        TypeError: its fields are not those of the kind.
    """
    kinds = {kind.__name__: kind for kind in (Convolution, Linear)}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name != "kind"
    }
    return kinds[fields["kind"]](**values)


def collect(case: Case) -> dict[Shape, int]:
    """Watch what one ``fisher_diag`` call on the case's batch hands to the kernels.

    Returns:
        Each distinct shape, in the order of the forward pass, and how many layers have it.
        Layers with one position are not among them: they are a product of squares.
    """
    problem = case.problem(case.layouts[0], case.batch)
    with _Calls() as calls:
        fisher_diag(problem.model, [(problem.inputs, problem.targets)], reduction="sum")
    return dict(Counter(reversed(calls.shapes)))


class _Calls(TorchDispatchMode):
    """Notes the shapes of outer-family calls.

    Attributes:
        shapes: one a call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is torch.ops.fastfisher.linear_sum_grad_squared_.default:
            _, grad, inputs = args[:3]
            self.shapes.append(Linear(*inputs.shape, grad.shape[2]))
        elif func is torch.ops.fastfisher.conv2d_sum_grad_squared_.default:
            out, _, inputs, stride, padding, dilation, groups = args[:7]
            samples, channels, *image = inputs.shape
            pairs = (tuple(pair) for pair in (stride, padding, dilation))
            kernel = tuple(out.shape[2:])
            shape = samples, channels, tuple(image), out.shape[0], kernel, *pairs, groups
            self.shapes.append(Convolution(*shape))
        return func(*args, **(kwargs or {}))


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}" if values[0] == values[1] else f"{values[0]}×{values[1]}"


def _random(stream: int, device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + stream))
    return values.to(device, dtype)
