"""Recurrent layers: each weight is one linear use whose positions are the time steps.

The fused functions of torch show no time step, so they are run as linear products and gates. The
input's product is one linear call over all steps. The product with the hidden state is not known
before the steps are: what it is added to, the input's product or zeros, collects its gradients of
all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recorder import Function, Recorder, Rule
from .common import bind, parameter_views, plain
from .linear import LinearUse

# (gates of the input, gates of the hidden state, state) -> state; a state starts with the hidden.
# Where only the sum of the gates counts, it may come as the first, without a second.
State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor | None, State], State]


def _sum(x: Tensor, h: Tensor | None) -> Tensor:
    return x if h is None else x + h


def _lstm(x: Tensor, h: Tensor | None, state: State) -> State:
    i, f, g, o = _sum(x, h).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(x: Tensor, h: Tensor | None, state: State) -> State:
    assert h is not None
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (new + torch.sigmoid(x_z + h_z) * (state[0] - new),)


def _rnn_tanh(x: Tensor, h: Tensor | None, state: State) -> State:
    return (torch.tanh(_sum(x, h)),)


def _rnn_relu(x: Tensor, h: Tensor | None, state: State) -> State:
    return (torch.relu(_sum(x, h)),)


class _StepwiseLinear:
    """``base[t] + linear(input of step t)``, recorded as one use; ``base [T, N, O]``."""

    def __init__(
        self,
        recorder: Recorder,
        func: Function,
        weight: Tensor,
        bias: Tensor | None,
        base: Tensor,
    ) -> None:
        self.transposed, b = plain(recorder, weight).t(), plain(recorder, bias)
        self.inputs: list[Tensor] = []
        views = parameter_views(recorder, {"weight": weight, "bias": bias}, ("weight", "bias"))
        self.use = LinearUse(views, range(2), weight) if views else None

        def compute() -> Tensor:
            return base.view_as(base) if b is None else base + b

        if self.use is None:
            self.bases = compute().unbind(0)
        else:
            self.bases = recorder.record(func, self.use, [base], compute, saved=[]).unbind(0)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bases[len(self.inputs)], x, self.transposed)
        self.inputs.append(x.detach())
        return y

    def finish(self) -> None:
        """To be called after the last step."""
        if self.use is not None:
            self.use.input = torch.stack(self.inputs)


def _layer(
    recorder: Recorder,
    func: Function,
    step: Step,
    x: Tensor,
    state: State,
    parameters: Sequence[Tensor],
    has_biases: bool,
) -> tuple[Tensor, State]:
    """One direction of one layer over ``x [T, N, I]``."""
    weight_x, weight_h, *rest = parameters
    bias_x, bias_h = (rest[0], rest[1]) if has_biases else (None, None)
    with recorder:
        gates = F.linear(x, weight_x, bias_x)

    def zeros(width: int) -> Tensor:
        return gates.new_zeros(x.shape[0], x.shape[1], width)

    base = zeros(gates.shape[-1]) if step is _gru else gates
    hidden = _StepwiseLinear(recorder, func, weight_h, bias_h, base)
    project = None
    if len(rest) % 2 == 1:
        project = _StepwiseLinear(recorder, func, rest[-1], None, zeros(len(rest[-1])))
    outputs = []
    for gate in gates.unbind(0):
        h = hidden(state[0])
        state = step(gate, h, state) if step is _gru else step(h, None, state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outputs.append(state[0])
    for linear in (hidden, project):
        if linear is not None:
            linear.finish()
    return torch.stack(outputs), state


def _sequence(step: Step) -> Rule:
    def rule(
        recorder: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # A packed sequence has its batch sizes second and its parameters fourth.
        if kwargs or len(args) != 9 or not isinstance(args[3], bool):
            return NotImplemented
        x, initial, parameters, has_biases, layers, dropout, train, both, batch_first = args
        several = isinstance(initial, (tuple, list))
        states = list(initial) if several else [initial]
        if (train and dropout > 0) or x.dim() != 3 or torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        if any(recorder.view(value) is not None for value in (x, *states)):
            return NotImplemented
        if batch_first:
            x = x.transpose(0, 1)
        directions = 2 if both else 1
        each = len(parameters) // (layers * directions)
        finals = []
        for layer in range(layers):
            outputs = []
            for backward in range(directions):
                at = layer * directions + backward
                y, final = _layer(
                    recorder,
                    func,
                    step,
                    x.flip(0) if backward else x,
                    tuple(state[at] for state in states),
                    parameters[at * each : (at + 1) * each],
                    has_biases,
                )
                outputs.append(y.flip(0) if backward else y)
                finals.append(final)
            x = torch.cat(outputs, -1)
        last = (torch.stack(values) for values in zip(*finals, strict=True))
        return x.transpose(0, 1) if batch_first else x, *last

    return rule


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
    torch.lstm: _sequence(_lstm),
    torch.gru: _sequence(_gru),
    torch.rnn_tanh: _sequence(_rnn_tanh),
    torch.rnn_relu: _sequence(_rnn_relu),
    torch.lstm_cell: _cell(_lstm),
    torch.gru_cell: _cell(_gru),
    torch.rnn_tanh_cell: _cell(_rnn_tanh),
    torch.rnn_relu_cell: _cell(_rnn_relu),
}
