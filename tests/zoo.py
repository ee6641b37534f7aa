"""Small models, one for each way a Fisher is computed; for options that all must honour.

Each takes inputs whose samples lie along the first axis and gives five logits a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CLASSES = 5


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: Tensor
    #: Parameters without a fast rule.
    fallback: frozenset[str] = frozenset()

    @property
    def targets(self) -> Tensor:
        # Unsorted, and not all classes equally often.
        return torch.tensor([3, 0, 3, 1, 0, 4, 3])[: len(self.inputs)]


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def spread(model: nn.Module) -> nn.Module:
    """Parameters and statistics that are not the ones and zeros of a fresh norm."""
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point():
            value.data.uniform_(0.5, 1.5)
    return model


def images() -> Case:
    model = sequential(
        nn.Conv2d(3, 17, 3, padding=1),
        spread(nn.BatchNorm2d(17)),
        nn.Tanh(),
        nn.Conv2d(17, 17, 3, stride=2, groups=17),
        spread(nn.GroupNorm(1, 17)),
        nn.Conv2d(17, 6, 1),
        nn.PReLU(6),
        nn.Conv2d(6, 4, 2, groups=2, dilation=2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    return Case(model, torch.randn(7, 3, 9, 9))


def channels_last() -> Case:
    case = images()
    last = torch.channels_last
    return Case(case.model.to(memory_format=last), case.inputs.to(memory_format=last))


def other_dimensions() -> Case:
    model = sequential(
        nn.Conv3d(2, 4, 2, padding=1),
        nn.Tanh(),
        spread(nn.InstanceNorm3d(4, affine=True)),
        nn.Flatten(2),
        nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1),
        nn.Tanh(),
        nn.Conv1d(3, 2, 5, stride=3),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )
    inputs = torch.randn(7, 2, 3, 3, 2)
    model(inputs)
    return Case(model, inputs)


def sequences() -> Case:
    model = sequential(
        nn.Linear(6, 17),
        spread(nn.LayerNorm(17)),
        nn.Tanh(),
        nn.Linear(17, 4, bias=False),
        spread(nn.RMSNorm(4)),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    )
    return Case(model, torch.randn(7, 5, 6))


class BatchSecond(nn.Module):
    """Recurrent layers and attention, with the samples along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, bidirectional=True)
        self.attention = nn.TransformerEncoderLayer(12, 2, 8, dropout=0.0)
        self.gru = nn.GRUCell(12, 8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.lstm(x.transpose(0, 1))[0])
        return self.out(self.gru(y[0], y.new_zeros(len(x), 8)))


def recurrent() -> Case:
    return Case(BatchSecond().eval(), torch.randn(7, 5, 4))


class Tokens(nn.Module):
    """Tables with padding, in bags, of positions, and one tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Embedding(CLASSES, 6)
        self.padded = nn.Embedding(CLASSES, 6, padding_idx=1)
        self.bag = nn.EmbeddingBag(CLASSES, 6, mode="mean")
        self.positions = nn.Embedding(4, 6)
        self.first = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).unsqueeze(0)
        x = self.tied(tokens) * self.padded(tokens.flip(1)) + self.positions(places)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        x = torch.tanh(x.cumsum(1)).sum(1) + self.bag(tokens)
        return torch.tanh(x) @ self.tied.weight.t()


def tables() -> Case:
    return Case(Tokens().eval(), torch.randint(0, CLASSES, (7, 4)))


class SharedLayers(nn.Module):
    """Layers called twice, on equal and on different sizes, and a weight that is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.linear = nn.Linear(6, 6)
        self.normalised = parametrizations.weight_norm(nn.Linear(48, 6))
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        halves = torch.tanh(self.conv(x[:, :, ::2]))
        x = self.normalised(torch.cat([x.flatten(1), halves.flatten(1)], 1))
        x = torch.tanh(self.linear(torch.tanh(self.linear(x)))) * self.scale
        return self.out(x)


def shared() -> Case:
    return Case(SharedLayers().eval(), torch.randn(7, 2, 4, 4))


class NoRule(nn.Module):
    def __init__(self, vmap: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 7)
        self.mix = nn.Parameter(torch.randn(7, CLASSES))
        self.vmap = vmap

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.hidden(x))
        if not self.vmap:
            assert y.sum().item() < 1e6
        return torch.einsum("ni,io->no", y, self.mix)


def fallback() -> Case:
    return Case(NoRule(vmap=True), torch.randn(7, 6), frozenset({"mix"}))


def fallback_loop() -> Case:
    return Case(NoRule(vmap=False), torch.randn(7, 6), frozenset({"mix"}))


def perceptron() -> Case:
    model = sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))
    return Case(model, torch.randn(7, 6))


def convolution_twice() -> Case:
    layer = nn.Conv1d(3, 3, 3, padding=1)
    model = sequential(layer, nn.Tanh(), layer, nn.Flatten(), nn.Linear(15, CLASSES))
    return Case(model, torch.randn(7, 3, 5))


ZOO: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        perceptron,
        sequences,
        images,
        channels_last,
        other_dimensions,
        recurrent,
        tables,
        shared,
        convolution_twice,
        fallback,
        fallback_loop,
    )
}
