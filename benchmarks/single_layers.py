"""Tiny models, each around one layer or structure, for the table of exactness.

Every model maps its input, samples along the first axis, to five logits a sample. Sizes are small
enough for the definition, a backward pass for each sample and class, and odd enough for no rule to
be right by accident.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.registry import CROSS_ENTROPY, SEED, Problem

SAMPLES = 4
CLASSES = 5
TOKENS = 9

Build = Callable[[], tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Attributes:
        name: of the row, and unique.
        build: makes the model and its inputs from torch's global generator.
    """

    name: str
    build: Build

    def problem(self) -> Problem:
        """The model in float64 and eval mode with a batch; the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model, inputs = self.build()
            for value in [*model.parameters(), *model.buffers()]:
                # Norms begin as ones and zeros, on which many a wrong formula is right.
                if value.is_floating_point() and value.unique().numel() == 1:
                    value.data.uniform_(0.5, 1.5)
            targets = torch.randint(CLASSES, (SAMPLES,))
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        return Problem(model.double().eval(), inputs, targets, CROSS_ENTROPY)


class Head(nn.Module):
    """A layer, a bounded function so that gradients differ, and five logits a sample."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).flatten(1))


def _headed(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> Build:
    def build() -> tuple[nn.Module, Tensor]:
        layer, x = make().eval(), inputs()
        with torch.no_grad():
            features = layer(x).flatten(1).shape[1]
        return Head(layer, features), x

    return build


def _on(make: Callable[[], nn.Module], *shape: int) -> Build:
    return _headed(make, lambda: torch.randn(SAMPLES, *shape))


def _tokens(length: int) -> Tensor:
    # Of six of the nine: tokens repeat within a sample.
    return torch.randint(TOKENS - 3, (SAMPLES, length))


def _on_tokens(make: Callable[[], nn.Module]) -> Build:
    return _headed(make, lambda: _tokens(7))


def _model(make: Callable[[], nn.Module], *shape: int) -> Build:
    return lambda: (make(), torch.randn(SAMPLES, *shape))


def _language_model(make: Callable[[], nn.Module]) -> Build:
    return lambda: (make(), _tokens(6))


class Recurrent(nn.Module):
    """A recurrent layer over ``[N, T, 6]``, the mean of its outputs makes the logits."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear((2 if layer.bidirectional else 1) * layer.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.batch_first:
            return self.out(self.layer(x)[0].mean(1))
        return self.out(self.layer(x.transpose(0, 1))[0].mean(0))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 7)
        self.out = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        assert state is not None
        return self.out(state[0])


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.out = nn.Linear(6, CLASSES)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.out(torch.tanh(y).mean(1 if self.batch_first else 0))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x).mean(1))


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in Hugging Face's library: weight ``[in, out]``, ``addmm``."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows) / math.sqrt(columns))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], -1)


class GPT(nn.Module):
    """Token and position embeddings, one block of fused attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, 8)
        self.positions = nn.Embedding(6, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.qkv, self.project = Conv1D(24, 8), Conv1D(8, 8)
        self.up, self.down = Conv1D(12, 8), Conv1D(8, 12)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        x = self.tokens(tokens) + self.positions(positions)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.project(y.flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.out(self.norms[2](x).mean(1))


class Positions(nn.Module):
    """Position embeddings of shape ``[1, S]``, added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, 6)
        self.positions = nn.Embedding(8, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        return self.out(torch.tanh(self.tokens(tokens) + self.positions(positions)).mean(1))


class VisionTransformer(nn.Module):
    """Patches, a class token and position embeddings that are parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 10, 6))
        self.block = nn.TransformerEncoderLayer(
            6, 2, 12, dropout=0.0, batch_first=True, norm_first=True
        )
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.out(self.block(x + self.positions)[:, 0])


class Scale(nn.Module):
    """A parameter in arithmetic: a learned scale and shift of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp() + self.shift


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nsi,io->nso", x, self.mix)


class Functional(nn.Module):
    """No modules: parameters handed to functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.scale = nn.Parameter(torch.randn(16))
        self.weight = nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x.view(-1, 1, 4, 4), self.kernel, padding=1).mean(1).flatten(1)
        return F.linear(F.layer_norm(x, (16,), self.scale), self.weight)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


class ConvolutionCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.conv(x)))


class Tied(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class TiedToOutput(nn.Module):
    """The embedding is the weight of the output layer, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 6)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, TOKENS, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.embedding(tokens)))
        return self.out(x).mean(1)[:, :CLASSES]


class BatchSecond(nn.Module):
    """Linear layer and norm on ``[S, N, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.linear(x.transpose(0, 1)))).transpose(0, 1)


def _conv(*arguments: int, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **options)  # type: ignore[arg-type]


LAYERS: tuple[Layer, ...] = (
    Layer("Linear, [N, D]", _on(lambda: nn.Linear(6, 7), 6)),
    Layer("Linear, [N, S, D]", _on(lambda: nn.Linear(6, 7), 3, 6)),
    Layer("Linear, [N, A, B, D]", _on(lambda: nn.Linear(6, 7), 2, 3, 6)),
    Layer("Conv1d", _on(lambda: nn.Conv1d(3, 5, 3, padding=1), 3, 9)),
    Layer("Conv2d", _on(_conv(3, 5, 3, padding=1), 3, 9, 8)),
    Layer("Conv2d, many channels on a small map", _on(_conv(16, 16, 3, padding=1), 16, 4, 4)),
    Layer("Conv2d, kernel 1", _on(_conv(5, 7, 1), 5, 4, 4)),
    Layer("Conv2d, stride and dilation", _on(_conv(3, 5, 3, stride=2, dilation=2), 3, 9, 8)),
    Layer("Conv2d, groups=2", _on(_conv(4, 6, 3, groups=2), 4, 6, 6)),
    Layer("Conv2d, depthwise", _on(_conv(6, 6, 3, groups=6), 6, 6, 6)),
    Layer("Conv2d, padding='same'", _on(_conv(3, 5, 3, padding="same"), 3, 6, 6)),
    Layer("Conv2d, circular", _on(_conv(3, 5, 3, padding=1, padding_mode="circular"), 3, 6, 6)),
    Layer("Conv2d, reflect", _on(_conv(3, 5, 3, padding=1, padding_mode="reflect"), 3, 6, 6)),
    Layer("Conv2d, replicate", _on(_conv(3, 5, 3, padding=1, padding_mode="replicate"), 3, 6, 6)),
    Layer("Conv3d", _on(lambda: nn.Conv3d(2, 3, 2, padding=1), 2, 3, 4, 3)),
    Layer("ConvTranspose1d", _on(lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), 3, 5)),
    Layer("ConvTranspose2d", _on(lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), 3, 4, 5)),
    Layer(
        "ConvTranspose2d, groups=2",
        _on(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 4, 4, 5),
    ),
    Layer("ConvTranspose3d", _on(lambda: nn.ConvTranspose3d(2, 3, 2), 2, 2, 3, 2)),
    Layer("BatchNorm1d", _on(lambda: nn.BatchNorm1d(7), 7)),
    Layer("BatchNorm2d", _on(lambda: nn.BatchNorm2d(5), 5, 4, 3)),
    Layer("LayerNorm", _on(lambda: nn.LayerNorm(6), 3, 6)),
    Layer("LayerNorm, bias=False", _on(lambda: nn.LayerNorm(6, bias=False), 3, 6)),
    Layer("RMSNorm", _on(lambda: nn.RMSNorm(6), 3, 6)),
    Layer("GroupNorm", _on(lambda: nn.GroupNorm(2, 6), 6, 4, 3)),
    Layer("InstanceNorm2d", _on(lambda: nn.InstanceNorm2d(5, affine=True), 5, 4, 3)),
    Layer("PReLU", _on(lambda: nn.PReLU(5), 5, 4)),
    Layer("Embedding, repeated tokens", _on_tokens(lambda: nn.Embedding(TOKENS, 6))),
    Layer("Embedding, padding_idx", _on_tokens(lambda: nn.Embedding(TOKENS, 6, padding_idx=2))),
    Layer("EmbeddingBag", _on_tokens(lambda: nn.EmbeddingBag(TOKENS, 6))),
    Layer("RNN", _model(lambda: Recurrent(nn.RNN(6, 7, batch_first=True)), 3, 6)),
    Layer("LSTM", _model(lambda: Recurrent(nn.LSTM(6, 7, batch_first=True)), 3, 6)),
    Layer(
        "LSTM, 2 layers, bidirectional",
        _model(
            lambda: Recurrent(nn.LSTM(6, 7, 2, bidirectional=True, batch_first=True)),
            3,
            6,
        ),
    ),
    Layer(
        "GRU, 2 layers, bidirectional",
        _model(
            lambda: Recurrent(nn.GRU(6, 7, 2, bidirectional=True, batch_first=True)),
            3,
            6,
        ),
    ),
    Layer("LSTM, batch second", _model(lambda: Recurrent(nn.LSTM(6, 7)), 3, 6)),
    Layer("LSTMCell in a loop", _model(Cell, 3, 6)),
    Layer("MultiheadAttention", _model(lambda: SelfAttention(True), 3, 6)),
    Layer("MultiheadAttention, batch second", _model(lambda: SelfAttention(False), 3, 6)),
    Layer("TransformerEncoderLayer", _model(Encoder, 3, 6)),
    Layer("Vision transformer: class token, positions", _model(VisionTransformer, 3, 6, 6)),
    Layer("Conv1D of Hugging Face", _on(lambda: Conv1D(7, 6), 3, 6)),
    Layer("GPT block: Conv1D, scaled_dot_product_attention", _language_model(GPT)),
    Layer("Position embeddings, [1, S]", _language_model(Positions)),
    Layer("Parameters in arithmetic", _on(Scale, 3, 6)),
    Layer("Parameter in an einsum", _on(Einsum, 3, 6)),
    Layer("Functions without modules", _on(Functional, 16)),
    Layer("weight_norm", _on(lambda: parametrizations.weight_norm(nn.Linear(6, 7)), 3, 6)),
    Layer("Module called twice", _on(CalledTwice, 3, 6)),
    Layer("Convolution called twice", _on(ConvolutionCalledTwice, 3, 5, 4)),
    Layer("Weight tied in two modules", _on(Tied, 3, 6)),
    Layer("Embedding tied to the output layer", _language_model(TiedToOutput)),
    Layer("Batch axis second", _on(BatchSecond, 3, 6)),
)
