"""Recurrent layers and attention are exact by fast rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import fisher_diag
from fastfisher.reference import sum_grad_squared_loop

from .oracle import assert_exact, cross_entropy, relative_errors

SAMPLES = [3, 1]


def labels(samples: int) -> Tensor:
    return torch.randint(0, 5, (samples,))


class Tagger(nn.Module):
    """``layer`` over ``[N, T, 6]``; the outputs and, if asked, the final states make the logits."""

    def __init__(self, layer: nn.RNNBase, states: bool, initial: bool) -> None:
        super().__init__()
        self.layer = layer
        ways = 2 if layer.bidirectional else 1
        size = layer.proj_size or layer.hidden_size
        self.initial = nn.Parameter(torch.randn(ways * layer.num_layers, 1, size))
        self.initial.requires_grad_(initial)
        self.out = nn.Linear(ways * size, 5)
        self.last = nn.Linear(size, 5)
        self.states = states

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        if self.initial.requires_grad:
            h0 = self.initial.expand(-1, n, -1)
            cells = x.new_ones(h0.shape[0], n, self.layer.hidden_size)
            y, last = self.layer(x, (h0, cells) if isinstance(self.layer, nn.LSTM) else h0)
        else:
            y, last = self.layer(x)
        logits = self.out(y).mean(1 if self.layer.batch_first else 0)
        if self.states:
            last = last[0] if isinstance(last, tuple) else last
            logits = logits + self.last(last.sum(0))
        return logits


LAYERS = [
    lambda: nn.RNN(6, 7, batch_first=True),
    lambda: nn.RNN(6, 7, nonlinearity="relu", bidirectional=True),
    lambda: nn.LSTM(6, 7),
    lambda: nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5),
    lambda: nn.LSTM(6, 7, num_layers=2, proj_size=3, bidirectional=True),
    lambda: nn.LSTM(6, 7, proj_size=2, bias=False),
    lambda: nn.GRU(6, 7, batch_first=True),
    lambda: nn.GRU(6, 1, num_layers=3, bidirectional=True, bias=False),
]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("length", [1, 3, 5])  # three: as many as samples
@pytest.mark.parametrize("states, initial", [(False, False), (True, True)])
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_recurrent_layer(
    layer: int, states: bool, initial: bool, length: int, samples: int
) -> None:
    model = Tagger(LAYERS[layer](), states, initial)
    assert_exact(model, torch.randn(samples, length, 6), labels(samples))


def test_recurrent_layer_in_float32() -> None:
    model = Tagger(LAYERS[3](), True, False)
    assert_exact(model, torch.randn(3, 4, 6), labels(3), dtype=torch.float32)


def test_recurrent_layer_with_frozen_weights() -> None:
    layer = nn.GRU(6, 7, num_layers=2)
    for name in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l1", "bias_hh_l1"):
        getattr(layer, name).requires_grad_(False)
    assert_exact(Tagger(layer, True, False), torch.randn(3, 4, 6), labels(3))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.layer = nn.LSTM(6, 6, batch_first=True)
        self.out = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        y, state = self.layer(self.embedding(tokens))
        return self.out(self.layer(y.flip(1), state)[0][:, -1])


@pytest.mark.parametrize("samples", SAMPLES)
def test_recurrent_layer_called_twice(samples: int) -> None:
    assert_exact(Twice(), torch.randint(0, 9, (samples, 4)), labels(samples))


class Seeded(nn.Module):
    """A layer makes the initial states; outputs, changed in place, and final states count."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.states = 2 if isinstance(layer, nn.LSTM) else 1
        self.seed = nn.Linear(6, self.states * 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        seeds = torch.tanh(self.seed(x[:, 0])).unsqueeze(0).chunk(self.states, -1)
        y, last = self.layer(x, seeds if self.states == 2 else seeds[0])
        y = y.transpose(1, 2).tanh_()
        last = last[1] if self.states == 2 else last
        return self.out(y.sum(2) + last[0])


SEEDED = [
    lambda: nn.LSTM(6, 7, batch_first=True),
    lambda: nn.GRU(6, 7, batch_first=True),
    lambda: nn.RNN(6, 7, batch_first=True),
]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("layer", range(len(SEEDED)))
def test_initial_states_that_a_layer_makes(layer: int, samples: int) -> None:
    assert_exact(Seeded(SEEDED[layer]()), torch.randn(samples, 4, 6), labels(samples))


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_several_backward_passes_over_one_forward_pass(layer: int) -> None:
    model, x = Tagger(LAYERS[layer](), True, True).double().eval(), torch.randn(3, 4, 6).double()
    result = fisher_diag(model, [(x, labels(3))], kind="exact")
    p = model(x).softmax(1).detach()
    wanted = {name: torch.zeros_like(value) for name, value in result.items()}
    for n in range(3):
        for y in range(5):
            one, target = x[n : n + 1], torch.tensor([y])
            squares = sum_grad_squared_loop(model, one, target, cross_entropy, list(wanted))
            for name in wanted:
                wanted[name] += p[n, y] * squares[name].detach() / 3
    assert max(relative_errors(result, wanted).values()) < 1e-10


class Hyper(nn.Module):
    """The recurrent weight is computed from a parameter alone, or with what a batch holds."""

    def __init__(self, per_batch: bool) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 7, batch_first=True)
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(7, 5)
        self.per_batch = per_batch

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale * torch.ones_like(x).mean() if self.per_batch else self.scale
        weights = [*self.layer._flat_weights]
        weights[1] = weights[1] * factor
        zeros = x.new_zeros(1, len(x), 7)
        y = torch.gru(x, zeros, weights, True, 1, 0.0, False, False, True)[0]
        return self.out(y[:, -1])


@pytest.mark.parametrize("per_batch", [True, False])
def test_recurrent_weight_that_is_computed(per_batch: bool) -> None:
    assert_exact(Hyper(per_batch), torch.randn(3, 4, 6), labels(3), fallback=None)


class Constant(nn.Module):
    """A recurrent layer reads a buffer, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 6)
        self.register_buffer("queries", torch.randn(4, 1, 6))
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x + self.layer(self.queries)[0][:, 0]).sum(1))


@pytest.mark.parametrize("frozen", [True, False])
def test_recurrent_layer_that_no_sample_enters(frozen: bool) -> None:
    model = Constant()
    for weight in (model.layer.weight_hh_l0, model.layer.bias_hh_l0):
        weight.requires_grad_(not frozen)
    assert_exact(model, torch.randn(3, 4, 6), labels(3), fallback=None)


class Summed(nn.Module):
    """Every unit of a step gets the same gradient, from one number in memory."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0].sum(-1))


@pytest.mark.parametrize("layer", range(len(SEEDED)))
def test_gradient_of_a_sum(layer: int) -> None:
    assert_exact(Summed(SEEDED[layer]()), torch.randn(3, 4, 6), labels(3))


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


CELLS = [
    lambda: nn.LSTMCell(6, 7),
    lambda: nn.GRUCell(6, 7),
    lambda: nn.RNNCell(6, 7, nonlinearity="relu"),
    lambda: nn.RNNCell(6, 7, bias=False),
]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("cell", range(len(CELLS)))
def test_recurrent_cell(cell: int, samples: int) -> None:
    assert_exact(Cells(CELLS[cell]()), torch.randn(samples, 4, 6), labels(samples))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 7, batch_first=True)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, :, 0] > 0).sum(1).clamp(max=x.shape[1] - 1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False)
        return self.out(self.gru(packed)[1][-1])


def test_packed_sequence_goes_through_the_fallback() -> None:
    names = {f"gru.{kind}_{way}_l0" for kind in ("weight", "bias") for way in ("ih", "hh")}
    assert_exact(Packed(), torch.randn(3, 4, 6), labels(3), fallback=names)


class Attention(nn.Module):
    def __init__(self, cross: bool, batch_first: bool, **options: bool | int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)
        self.out = nn.Linear(6, 5)
        self.cross, self.batch_first = cross, batch_first

    def forward(self, x: Tensor) -> Tensor:
        other = torch.cat([x, x.flip(1)], 1)[:, 1:] if self.cross else x
        if self.attention.kdim != 6:
            other = torch.cat([other, other[..., :2]], -1)
        if not self.batch_first:
            x, other = x.transpose(0, 1), other.transpose(0, 1)
        y = self.attention(x, other if self.cross else x, other if self.cross else x)[0]
        return self.out(torch.tanh(y).mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "cross, options",
    [
        (False, {}),
        (True, {}),
        (True, {"kdim": 8, "vdim": 8}),
        (False, {"bias": False}),
        (True, {"add_bias_kv": True, "add_zero_attn": True}),
    ],
)
def test_multihead_attention(
    cross: bool, options: dict[str, int], batch_first: bool, samples: int
) -> None:
    model = Attention(cross, batch_first, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros
            parameter.normal_()
    assert_exact(model, torch.randn(samples, 3, 6), labels(samples))


class EncoderDecoder(nn.Module):
    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        options = {"batch_first": batch_first, "norm_first": norm_first}
        encoder = nn.TransformerEncoderLayer(6, 2, 12, activation="gelu", **options)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(6, 3, 8, **options)
        self.out = nn.Linear(6, 5)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        x = self.decoder(x, self.encoder(x), tgt_mask=mask, tgt_is_causal=True)
        return self.out(x.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(norm_first: bool, batch_first: bool, samples: int) -> None:
    model = EncoderDecoder(batch_first, norm_first)
    assert_exact(model, torch.randn(samples, 3, 6), labels(samples))


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
    """Token and position embeddings, a block, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.positions = nn.Embedding(6, 8)
        self.norm = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.qkv, self.project = Conv1D(24, 8), Conv1D(8, 8)
        self.up, self.down = Conv1D(12, 8), Conv1D(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        x = self.tokens(tokens) + self.positions(positions)
        q, k, v = self.qkv(self.norm[0](x)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.project(y.flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm[1](x))))
        return F.linear(self.norm[2](x), self.tokens.weight)


def next_token(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").sum(1)


@pytest.mark.parametrize("samples", SAMPLES)
def test_language_model(samples: int) -> None:
    tokens = torch.randint(0, 9, (samples, 5))
    target = torch.randint(0, 9, (samples, 5))
    assert_exact(GPT(), tokens, target, loss=next_token, reference_loss=next_token)
