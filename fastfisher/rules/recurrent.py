"""Recurrent layers: each weight is one linear use whose positions are the time steps.

The fused functions of torch show no time step. So the input's product is one linear call over all
steps, and the steps are one function with a backward pass of its own, which leaves the gradients at
the gates of all steps in one tensor: they are those at the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import ops
from ..recorder import Function, Recorder, Rule, View
from .common import bind, parameter_views, plain
from .linear import LinearUse

# -- the steps of a sequence -----------------------------------------------------------------


@dataclass(frozen=True)
class _Direction:
    """One direction of one layer: what its steps read beside the input's product."""

    #: ``[G, P]``, for the hidden state.
    weight: Tensor
    #: ``[G]``, of that product, or of both.
    bias: Tensor | None
    #: ``[P, H]``, for the hidden state of an LSTM with projections.
    projection: Tensor | None
    #: Whether the last step comes first.
    backward: bool

    def ordered(self, steps: Tensor) -> list[Tensor]:
        """``steps [T, ...]``, each apart, in the order of the computation."""
        each = steps.unbind(0)
        return list(reversed(each) if self.backward else each)

    def before_and_after(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``states [T + 1, ...]`` those before each step ``[T, ...]``, and those after it."""
        return (states[1:], states[:-1]) if self.backward else (states[:-1], states[1:])


@dataclass(frozen=True)
class _Grads:
    """What the backward pass over a sequence gives."""

    #: At the input's product, ``[T, N, G]``.
    gates: Tensor
    #: At the hidden state's product, ``[T, N, G]``.
    product: Tensor
    #: At the initial states.
    initial: tuple[Tensor, ...]
    #: At the projected hidden states, ``[T, N, P]``.
    projected: Tensor | None = None


class _Kind(Protocol):
    """What happens in the steps."""

    @property
    def sums_products(self) -> bool:
        """Whether only the sum of the input's product and the hidden state's counts."""

    def forward(
        self, way: _Direction, gates: Tensor, hidden: Tensor, initial: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
        """Runs all steps.

        Args:
            way: the direction.
            gates: the input's product ``[T, N, G]``; may be overwritten.
            hidden: ``[T + 1, N, P]``, of which the first in order is there.
            initial: all states before the first step.

        Returns:
            The final states but for the hidden one, what ``backward`` needs, and the hidden states
            before their projection ``[T, N, H]``, if there is one.
        """

    def backward(
        self,
        way: _Direction,
        saved: tuple[Tensor, ...],
        outputs: Sequence[Tensor | None],
        finals: Sequence[Tensor | None],
        is_last: bool,
    ) -> _Grads:
        """The gradients.

        Args:
            way: the direction.
            saved: what ``forward`` left for this; may be overwritten if ``is_last``.
            outputs: those at the output of each step, in order.
            finals: those at all states after the last step.
            is_last: whether nobody asks for them again.
        """


def _started(grad: Tensor | None, steps: Tensor, width: int) -> Tensor:
    """``[N, width]`` to add gradients to: a copy of ``grad``, or zeros. ``steps [T, N, ...]``."""
    if grad is None:
        return steps.new_zeros(steps.shape[1], width)
    return grad.clone(memory_format=torch.contiguous_format)


class _Lstm:
    sums_products = True

    def forward(
        self, way: _Direction, gates: Tensor, hidden: Tensor, initial: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
        steps, samples, width = gates.shape
        cells = gates.new_empty(steps + 1, samples, width // 4)
        c, h = way.ordered(cells), way.ordered(hidden)
        c[0].copy_(initial[1])
        weight = way.weight.t().contiguous()
        raw = None if way.projection is None else torch.empty_like(cells[1:])
        outputs = h[1:] if raw is None else way.ordered(raw)
        for t, gate in enumerate(way.ordered(gates)):
            gate.addmm_(h[t], weight)
            ops.lstm_step_(gate, way.bias, c[t], c[t + 1], outputs[t])
            if way.projection is not None:
                torch.mm(outputs[t], way.projection.t(), out=h[t + 1])
        return [c[-1]], (gates, cells), raw

    def backward(
        self,
        way: _Direction,
        saved: tuple[Tensor, ...],
        outputs: Sequence[Tensor | None],
        finals: Sequence[Tensor | None],
        is_last: bool,
    ) -> _Grads:
        gates, cells = saved
        g, c = way.ordered(gates), way.ordered(cells)
        grads = gates if is_last else torch.empty_like(gates)
        at_gates = way.ordered(grads)
        grad_hidden = _started(finals[0], gates, way.weight.shape[1])
        grad_cell = _started(finals[1], gates, cells.shape[2])
        projected = None if way.projection is None else gates.new_empty(len(g), *grad_hidden.shape)
        at_projected = [] if projected is None else way.ordered(projected)
        for t in reversed(range(len(g))):
            direct, through = outputs[t], grad_hidden
            if way.projection is not None:
                at_projected[t].copy_(through if direct is None else through + direct)
                direct, through = None, at_projected[t] @ way.projection
            ops.lstm_step_backward_(at_gates[t], grad_cell, direct, through, g[t], c[t], c[t + 1])
            torch.mm(at_gates[t], way.weight, out=grad_hidden)
        return _Grads(grads, grads, (grad_hidden, grad_cell), projected)


class _Gru:
    sums_products = False

    def forward(
        self, way: _Direction, gates: Tensor, hidden: Tensor, initial: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
        candidates = torch.empty_like(hidden[1:])
        h, candidate = way.ordered(hidden), way.ordered(candidates)
        weight = way.weight.t().contiguous()
        product = torch.empty_like(gates[0])
        for t, gate in enumerate(way.ordered(gates)):
            torch.mm(h[t], weight, out=product)
            ops.gru_step_(gate, product, way.bias, h[t], candidate[t], h[t + 1])
        return [], (gates, candidates, hidden), None

    def backward(
        self,
        way: _Direction,
        saved: tuple[Tensor, ...],
        outputs: Sequence[Tensor | None],
        finals: Sequence[Tensor | None],
        is_last: bool,
    ) -> _Grads:
        gates, candidates, hidden = saved
        g, candidate, h = way.ordered(gates), way.ordered(candidates), way.ordered(hidden)
        grads, products = gates if is_last else torch.empty_like(gates), torch.empty_like(gates)
        at_gates, at_product = way.ordered(grads), way.ordered(products)
        grad = _started(finals[0], gates, hidden.shape[2])
        for t in reversed(range(len(g))):
            ops.gru_step_backward_(
                at_gates[t], at_product[t], grad, outputs[t], g[t], candidate[t], h[t]
            )
            grad.addmm_(at_product[t], way.weight)
        return _Grads(grads, products, (grad,))


@dataclass(frozen=True)
class _Rnn:
    #: ``(gates, *, out)``
    activate: Callable[..., Any]
    #: ``(grad, activated, *, grad_input)``
    activate_backward: Callable[..., Any]
    sums_products: bool = True

    def forward(
        self, way: _Direction, gates: Tensor, hidden: Tensor, initial: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
        if way.bias is not None:
            gates += way.bias
        h, weight = way.ordered(hidden), way.weight.t().contiguous()
        for t, gate in enumerate(way.ordered(gates)):
            self.activate(gate.addmm_(h[t], weight), out=h[t + 1])
        return [], (hidden,), None

    def backward(
        self,
        way: _Direction,
        saved: tuple[Tensor, ...],
        outputs: Sequence[Tensor | None],
        finals: Sequence[Tensor | None],
        is_last: bool,
    ) -> _Grads:
        (hidden,) = saved
        grads = torch.empty_like(hidden[1:])
        h, at_gates = way.ordered(hidden), way.ordered(grads)
        grad = _started(finals[0], hidden, hidden.shape[2])
        for t in reversed(range(len(grads))):
            direct = outputs[t]
            if direct is not None:
                grad += direct
            self.activate_backward(grad, h[t + 1], grad_input=at_gates[t])
            torch.mm(at_gates[t], way.weight, out=grad)
        return _Grads(grads, grads, (grad,))


def _relu_backward(grad: Tensor, activated: Tensor, *, grad_input: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(grad, activated, 0, grad_input=grad_input)


_TANH = _Rnn(torch.tanh, torch.ops.aten.tanh_backward.grad_input)
_RELU = _Rnn(torch.ops.aten.relu.out, _relu_backward)


class _Sequence(torch.autograd.Function):
    """All steps of one direction: outputs ``[T, N, P]`` and final states, views of buffers.

    It hands two gradients to tensors that no step reads: those at the hidden state's product and at
    the projected hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        kind: _Kind,
        way: _Direction,
        reads: list[Tensor | None],
        gates: Tensor,
        product: Tensor | None,
        projected: Tensor | None,
        *initial: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.recorder, ctx.kind, ctx.way, ctx.steps = recorder, kind, way, len(gates)
        ctx.set_materialize_grads(False)
        gates = gates.detach()
        hidden = gates.new_empty(len(gates) + 1, gates.shape[1], initial[0].shape[-1])
        ordered = way.ordered(hidden)
        ordered[0].copy_(initial[0])
        finals, saved, raw = kind.forward(way, gates, hidden, initial)
        ctx.save_for_backward(*saved)
        before, after = way.before_and_after(hidden)
        reads += [before, raw]
        return after, ordered[-1], *finals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        output, *finals = (_with_rows(grad) for grad in given)
        outputs = [None] * ctx.steps if output is None else ctx.way.ordered(output)
        is_last = not ctx.recorder.keeps_graph
        grads = ctx.kind.backward(ctx.way, ctx.saved_tensors, outputs, finals, is_last)
        product = grads.product if ctx.needs_input_grad[5] else None
        projected = grads.projected if ctx.needs_input_grad[6] else None
        return None, None, None, None, grads.gates, product, projected, *grads.initial


def _with_rows(grad: Tensor | None) -> Tensor | None:
    """``grad`` with contiguous rows, as the kernels read it."""
    return grad if grad is None or grad.stride(-1) == 1 else grad.contiguous()


# -- the rule of a fused function ------------------------------------------------------------


def _views(recorder: Recorder, weight: Tensor | None, bias: Tensor | None) -> dict[str, View]:
    slots = {"weight": weight, "bias": bias}
    return parameter_views(recorder, slots, tuple(slots)) or {}


def _awaited(
    recorder: Recorder, func: Function, views: dict[str, View], like: Tensor, width: int
) -> tuple[LinearUse | None, Tensor | None]:
    """The use of a weight within the steps, and where the gradient ``[T, N, width]`` arrives."""
    if not views:
        return None, None
    use, zero, shape = LinearUse(views, range(2), like), like.new_zeros(()), like.shape[:2]
    return use, recorder.record(func, use, [], lambda: zero.expand(*shape, width), saved=[])


def _layer(
    recorder: Recorder,
    func: Function,
    kind: _Kind,
    x: Tensor,
    initial: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    backward: bool,
) -> tuple[Tensor, ...]:
    """One direction of one layer over ``x [T, N, I]``: the outputs and the final states."""
    weight_x, weight_h, *rest = parameters
    bias_x, bias_h = (rest[0], rest[1]) if has_biases else (None, None)
    projection = rest[-1] if len(rest) % 2 == 1 else None
    w_x, b_x, w_h, b_h, w_p = (
        plain(recorder, value) for value in (weight_x, bias_x, weight_h, bias_h, projection)
    )
    if has_biases and kind.sums_products:
        # The steps add it as they go; the product would take a pass of its own to.
        b_x, b_h = None, b_x + b_h

    def compute() -> Tensor:
        return F.linear(x, w_x, b_x)

    views = _views(recorder, weight_x, bias_x)
    use = LinearUse(views, range(2), x)
    gates = recorder.record(F.linear, use, [x], compute, saved=[x]) if views else compute()
    hidden, product = _awaited(
        recorder, func, _views(recorder, weight_h, bias_h), gates, gates.shape[2]
    )
    outer, projected = _awaited(
        recorder, func, _views(recorder, projection, None), gates, initial[0].shape[-1]
    )
    reads: list[Tensor] = []
    way = _Direction(w_h, b_h, w_p, backward)
    results = _Sequence.apply(recorder, kind, way, reads, gates, product, projected, *initial)
    for each, read in zip((hidden, outer), reads, strict=True):
        if each is not None:
            each.input = read
    return results


def _sequence(kind: _Kind) -> Rule:
    def rule(
        recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # A packed sequence has its batch sizes second and its parameters fourth.
        if kwargs or len(args) != 9 or not isinstance(args[3], bool):
            return NotImplemented
        x, initial, parameters, has_biases, layers, dropout, train, both, batch_first = args
        states = list(initial) if isinstance(initial, (tuple, list)) else [initial]
        if (train and dropout > 0) or torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        if x.dim() != 3 or 0 in x.shape or any(state.dtype != x.dtype for state in states):
            return NotImplemented
        if any(recorder.view(value) is not None for value in (x, *states)):
            return NotImplemented
        if any(value.requires_grad and recorder.view(value) is None for value in parameters):
            return NotImplemented
        x = (x.transpose(0, 1) if batch_first else x).contiguous()
        directions = 2 if both else 1
        each = len(parameters) // (layers * directions)
        finals = []
        for layer in range(layers):
            outputs = []
            for at in range(layer * directions, (layer + 1) * directions):
                y, *final = _layer(
                    recorder,
                    func,
                    kind,
                    x,
                    [state[at] for state in states],
                    parameters[at * each : (at + 1) * each],
                    has_biases,
                    at % directions == 1,
                )
                outputs.append(y)
                finals.append(final)
            x = torch.cat(outputs, -1)
        last = (torch.stack(values) for values in zip(*finals, strict=True))
        return x.transpose(0, 1) if batch_first else x, *last

    return rule


# -- a single step ---------------------------------------------------------------------------

# (gates of the input, gates of the hidden state, state) -> state; a state starts with the hidden.
State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]


def _lstm_cell(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_cell(x: Tensor, h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (new + torch.sigmoid(x_z + h_z) * (state[0] - new),)


def _tanh_cell(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def _relu_cell(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(x + h),)


def _cell(step: Step) -> Rule:
    def rule(
        recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        names = ("input", "state", "w_ih", "w_hh", "b_ih", "b_hh")
        bound = bind(args, kwargs, names, {"b_ih": None, "b_hh": None})
        several = isinstance(bound["state"], (tuple, list))
        state = tuple(bound["state"]) if several else (bound["state"],)
        with recorder:
            x = F.linear(bound["input"], bound["w_ih"], bound["b_ih"])
            h = F.linear(state[0], bound["w_hh"], bound["b_hh"])
            state = step(x, h, state)
        return state if several else state[0]

    return rule


RULES: dict[Function, Rule] = {
    torch.lstm: _sequence(_Lstm()),
    torch.gru: _sequence(_Gru()),
    torch.rnn_tanh: _sequence(_TANH),
    torch.rnn_relu: _sequence(_RELU),
    torch.lstm_cell: _cell(_lstm_cell),
    torch.gru_cell: _cell(_gru_cell),
    torch.rnn_tanh_cell: _cell(_tanh_cell),
    torch.rnn_relu_cell: _cell(_relu_cell),
}
