"""Cases of the recurrent steps. The oracle of a backward step is autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .layout import CONTIGUOUS, DTYPES, Held, Layout, check, numbers

# Rows of a longer sequence's buffer, as the layers pass them.
ROWS = Layout(gap=8)
UNALIGNED = Layout(gap=3, offset=1)
FAR = Layout(far=True)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates after activation, next cell and hidden state."""
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    next_cell = f * cell + i * g
    return torch.cat((i, f, g, o), -1), next_cell, o * next_cell.tanh()


def _gru(gates: Tensor, product: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates after activation, the hidden state's share of the candidates, next hidden state."""
    (r, z, n), (pr, pz, candidate) = gates.chunk(3, -1), product.chunk(3, -1)
    r, z = (r + pr).sigmoid(), (z + pz).sigmoid()
    fresh = (n + r * candidate).tanh()
    return torch.cat((r, z, fresh), -1), candidate, (1 - z) * fresh + z * hidden


class _Operands:
    """Makes the operands of a step, all of one layout."""

    def __init__(self, samples: int, units: int, layout: Layout, precision: str, size: float):
        self._shape = (samples, units)
        self._layout = layout
        self._dtype = DTYPES[precision]
        self._size = size
        self._generator = torch.Generator().manual_seed(samples * 7919 + units)

    def given(self, blocks: int = 1, size: float | None = None) -> Held:
        values = numbers((self._shape[0], blocks * self._shape[1]), self._generator)
        return self.holding(values * (self._size if size is None else size))

    def empty(self, blocks: int = 1) -> Held:
        """What is there counts for nothing."""
        return self.holding(torch.full((self._shape[0], blocks * self._shape[1]), float("nan")))

    def holding(self, values: Tensor) -> Held:
        return Held(values.to(self._dtype), self._layout)

    def bias(self, blocks: int, present: bool) -> Tensor | None:
        values = numbers((blocks * self._shape[1],), self._generator).to(self._dtype)
        return values if present else None


def _leaf(held: Held) -> Tensor:
    return held.tensor.to(torch.float64, copy=True).requires_grad_()


def _plus(values: Tensor, bias: Tensor | None) -> Tensor:
    return values.double() if bias is None else values.double() + bias.double()


def _sum(like: Tensor, *given: Held | None) -> Tensor:
    """The sum of optional operands."""
    total = torch.zeros_like(like)
    for each in given:
        total = total if each is None else total + each.tensor.double()
    return total


def _tensor(held: Held | None) -> Tensor | None:
    return None if held is None else held.tensor


def _check_all(precision: str, **outputs: tuple[Held, Tensor]) -> float:
    return max(check(name, *pair, precision) for name, pair in outputs.items())


def _lstm_step(operators: Any, make: _Operands, precision: str, bias: bool) -> float:
    gates, b, cell = make.given(4), make.bias(4, bias), make.given()
    next_cell, hidden = make.empty(), make.empty()
    exact = _lstm(_plus(gates.tensor, b), cell.tensor.double())
    operators.lstm_step_(gates.tensor, b, cell.tensor, next_cell.tensor, hidden.tensor)
    return _check_all(
        precision,
        gates=(gates, exact[0]),
        next_cell=(next_cell, exact[1]),
        hidden=(hidden, exact[2]),
    )


def _lstm_step_backward(
    operators: Any, make: _Operands, precision: str, output: bool, state: bool, in_place: bool
) -> float:
    before, cell, grad_cell = make.given(4), make.given(), make.given(size=1.0)
    grad_output = make.given(size=1.0) if output else None
    grad_hidden = make.given(size=1.0) if state else None
    leaves = (_leaf(before), _leaf(cell))
    after, next_cell, hidden = _lstm(*leaves)
    grad = _sum(hidden, grad_output, grad_hidden)
    exact = torch.autograd.grad((hidden, next_cell), leaves, (grad, grad_cell.tensor.double()))
    gates = make.holding(after.detach())
    grad_gates = gates if in_place else make.empty(4)
    operators.lstm_step_backward_(
        grad_gates.tensor,
        grad_cell.tensor,
        _tensor(grad_output),
        _tensor(grad_hidden),
        gates.tensor,
        cell.tensor,
        make.holding(next_cell.detach()).tensor,
    )
    return _check_all(precision, grad_gates=(grad_gates, exact[0]), grad_cell=(grad_cell, exact[1]))


def _gru_step(operators: Any, make: _Operands, precision: str, bias: bool) -> float:
    gates, product, b, hidden = make.given(3), make.given(3), make.bias(3, bias), make.given()
    candidate, next_hidden = make.empty(), make.empty()
    exact = _gru(gates.tensor.double(), _plus(product.tensor, b), hidden.tensor.double())
    operators.gru_step_(
        gates.tensor, product.tensor, b, hidden.tensor, candidate.tensor, next_hidden.tensor
    )
    return _check_all(
        precision,
        gates=(gates, exact[0]),
        candidate=(candidate, exact[1]),
        next_hidden=(next_hidden, exact[2]),
    )


def _gru_step_backward(
    operators: Any, make: _Operands, precision: str, output: bool, in_place: bool
) -> float:
    before, product, hidden = make.given(3), make.given(3), make.given()
    grad_hidden = make.given(size=1.0)
    grad_output = make.given(size=1.0) if output else None
    leaves = (_leaf(before), _leaf(product), _leaf(hidden))
    after, candidate, next_hidden = _gru(*leaves)
    grad = _sum(next_hidden, grad_output, grad_hidden)
    exact = torch.autograd.grad(next_hidden, leaves, grad)
    gates = make.holding(after.detach())
    grad_gates = gates if in_place else make.empty(3)
    grad_product = make.empty(3)
    operators.gru_step_backward_(
        grad_gates.tensor,
        grad_product.tensor,
        grad_hidden.tensor,
        _tensor(grad_output),
        gates.tensor,
        make.holding(candidate.detach()).tensor,
        hidden.tensor,
    )
    return _check_all(
        precision,
        grad_gates=(grad_gates, exact[0]),
        grad_product=(grad_product, exact[1]),
        grad_hidden=(grad_hidden, exact[2]),
    )


_STEPS: dict[str, Callable[..., float]] = {
    "lstm_step": _lstm_step,
    "lstm_step_backward": _lstm_step_backward,
    "gru_step": _gru_step,
    "gru_step_backward": _gru_step_backward,
}


def step_case(
    kernel: str,
    samples: int,
    units: int,
    layout: Layout = CONTIGUOUS,
    note: str = "",
    *,
    precision: str = "float32",
    size: float = 1.0,
    small: bool = False,
    **optional: bool,
) -> Case:
    """One step of ``kernel``; ``size`` scales the numbers before activation."""

    def run(operators: Any) -> float:
        make = _Operands(samples, units, layout, precision, size)
        return _STEPS[kernel](operators, make, precision, **optional)

    parts = [kernel.replace("_", " "), f"{samples}x{units}", precision, note]
    parts += [f"size={size}"] * (size != 1) + [name for name, given in optional.items() if given]
    return Case(" ".join(part for part in parts if part), kernel, run, small)


def _cases(kernel: str, plain: dict[str, bool], others: list[dict[str, bool]]) -> list[Case]:
    """A kernel's cases, with each choice of optional operands in the small ones."""

    def case(*args: Any, **kwargs: Any) -> Case:
        return step_case(kernel, *args, **{**plain, **kwargs})

    return [
        case(1, 1, small=True),
        case(3, 5, small=True),
        case(2, 8, small=True),
        case(2, 8, UNALIGNED, "unaligned", small=True),
        case(3, 12, ROWS, "rows of a sequence", small=True),
        case(2, 6, precision="float64", small=True),
        case(3, 8, size=40.0, small=True),
        *(case(3, 7, small=True, **other) for other in others),
        *(case(2, 36, precision="float64", **other) for other in others),
        case(4, 33),
        case(5, 260),
        case(1, 1027, size=10.0),
        case(70, 64, ROWS, "rows of a sequence"),
        case(300, 4),
        case(7, 130, UNALIGNED, "unaligned", precision="float64"),
        case(9, 31, ROWS, "rows of a sequence", size=1000.0),
        case(0, 4, note="no samples"),
        case(3, 0, note="no units"),
        case(2, 8, FAR, "far rows"),
    ]


_GRADS = {"output": True, "state": True, "in_place": True}
_PARTS = ({"state": False}, {"output": False}, {"output": False, "state": False})

CASES: list[Case] = [
    *_cases("lstm_step", {"bias": True}, [{"bias": False}]),
    *_cases("lstm_step_backward", _GRADS, [{"in_place": False}, *_PARTS]),
    *_cases("gru_step", {"bias": True}, [{"bias": False}]),
    *_cases(
        "gru_step_backward",
        {"output": True, "in_place": True},
        [{"in_place": False}, {"output": False}],
    ),
]
