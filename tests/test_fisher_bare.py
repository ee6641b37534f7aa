"""Parameters outside of layers: in arithmetic, derived from others, common to all samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from fastfisher import fisher_diag

from .oracle import assert_exact

SAMPLES = [4, 1]


def labels(samples: int) -> Tensor:
    return torch.randint(0, 5, (samples,))


class Arithmetic(nn.Module):
    """``layer(x, p)`` on activations ``[N, 3, 6]`` (or on the data), then a head."""

    def __init__(
        self, combine: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], first: bool
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)
        self.p = nn.Parameter(torch.rand(shape) + 0.5)
        self.out = nn.Linear(6, 5)
        self.combine, self.first = combine, first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else torch.tanh(self.hidden(x))
        return self.out(torch.tanh(self.combine(x, self.p)).mean(1))


OPERATIONS = [
    lambda x, p: x + p,
    lambda x, p: p + x,
    lambda x, p: torch.add(x, p),
    lambda x, p: x - p,
    lambda x, p: p - x,
    lambda x, p: x * p,
    lambda x, p: p.mul(x),
    lambda x, p: x / p,
    lambda x, p: p / (2 + x**2),
    lambda x, p: x * p + p,  # several uses, of either sign
    lambda x, p: p - x * p - x / p,
    lambda x, p: (2 * p - 1) * x,  # derived
    lambda x, p: x * p.exp() + torch.cat([p, p]).mean(),
    lambda x, p: x * p.view(-1).view(p.shape),
    lambda x, p: x + p.expand_as(x),
    lambda x, p: x * p.expand(x.shape[0], 3, 6),
    lambda x, p: x + torch.broadcast_to(p, x.shape),
    lambda x, p: x * F.softplus(p) / (1 + p.norm()),
    lambda x, p: x * p * p.detach(),
    lambda x, p: x * p.to(torch.float64) * p.numel(),
]
SHAPES = [(6,), (3, 6), (1, 3, 6), (3, 1), (1, 1, 1), (1,)]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("combine", OPERATIONS)
def test_arithmetic(
    combine: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], samples: int
) -> None:
    assert_exact(Arithmetic(combine, shape, False), torch.randn(samples, 3, 6), labels(samples))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("combine", OPERATIONS)
def test_arithmetic_on_the_data(combine: Callable[[Tensor, Tensor], Tensor], samples: int) -> None:
    assert_exact(Arithmetic(combine, (3, 6), True), torch.randn(samples, 3, 6), labels(samples))


def in_place(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x += p
    return x


def set_rows(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1] = p
    return x


@pytest.mark.parametrize("combine", [in_place, set_rows, lambda x, p: torch.add(x, p, alpha=2)])
def test_arithmetic_without_a_rule(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Arithmetic(combine, (6,), False)
    assert_exact(model, torch.randn(4, 3, 6), labels(4), fallback={"p"})


def test_other_operand_may_be_modified_after_a_sum_but_not_after_a_product() -> None:
    def after_sum(x: Tensor, p: Tensor) -> Tensor:
        x = x * 2
        y = x + p
        x.zero_()
        return y

    def after_product(x: Tensor, p: Tensor) -> Tensor:
        x = (x * 2).detach()
        y = x * p
        x.zero_()
        return y

    inputs = torch.randn(4, 3, 6)
    assert_exact(Arithmetic(after_sum, (6,), False), inputs, labels(4))
    with pytest.raises(RuntimeError, match="modified in place"):
        fisher_diag(Arithmetic(after_product, (6,), False), [(inputs, labels(4))])


class VisionTransformer(nn.Module):
    """A class token and position embeddings common to all samples."""

    def __init__(self, spread: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.out = nn.Linear(8, 5)
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.spread(self.token, len(x)), x], 1)
        return self.out(self.block(x + self.positions[:, : x.shape[1]])[:, 0])


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize(
    "spread",
    [
        lambda token, n: token.expand(n, -1, -1),
        lambda token, n: token.repeat(n, 1, 1),
        lambda token, n: token[0].unsqueeze(0).expand(n, 1, token.shape[-1]),
    ],
)
def test_class_token_and_position_embeddings(
    spread: Callable[[Tensor, int], Tensor], samples: int
) -> None:
    model = VisionTransformer(spread)
    assert_exact(model, torch.randn(samples, 3, 8, 8), labels(samples))


class Positions(nn.Module):
    def __init__(self, make: Callable[[int, int], Tensor], tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.positions = nn.Embedding(11, 6)
        if tied:
            self.positions.weight = self.tokens.weight
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Linear(6, 6)
        self.out = nn.Linear(6, 5)
        self.make = make

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions(self.make(*tokens.shape))
        # Layers on what all samples share, too.
        positions = positions + self.mlp(torch.tanh(self.norm(positions)))
        return self.out(torch.tanh(self.norm(self.tokens(tokens) + positions)).mean(1))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [2, 4, 7])
@pytest.mark.parametrize(
    "make",
    [
        lambda n, length: torch.arange(length),
        lambda n, length: torch.arange(length)[None] % 3,
        lambda n, length: torch.arange(length).expand(n, -1),
    ],
)
def test_position_embeddings(
    make: Callable[[int, int], Tensor], length: int, tied: bool, samples: int
) -> None:
    tokens = torch.randint(0, 11, (samples, length))
    assert_exact(Positions(make, tied), tokens, labels(samples))


class RelativeBias(nn.Module):
    """A table looked up with a buffer and added to attention scores, as in Swin; scaled scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (5, 5)))
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.gamma = nn.Parameter(torch.rand(6))
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(5, 5, 2).permute(2, 0, 1).contiguous()
        scores = q @ k.transpose(-2, -1) * self.scale.exp() + bias.unsqueeze(0)
        x = x + self.gamma * (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(x.mean(1))


@pytest.mark.parametrize("samples", SAMPLES)
def test_relative_position_bias(samples: int) -> None:
    assert_exact(RelativeBias(), torch.randn(samples, 5, 6), labels(samples))


def masked(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


PARAMETRIZED = [
    (parametrizations.weight_norm, nn.Linear(6, 7), (6,)),
    (parametrizations.weight_norm, nn.Linear(6, 7), (3, 6)),
    (parametrizations.weight_norm, nn.Conv2d(2, 3, 3), (2, 5, 4)),
    (parametrizations.weight_norm, nn.ConvTranspose1d(2, 3, 3), (2, 5)),
    (nn.utils.weight_norm, nn.Linear(6, 7), (6,)),
    (masked, nn.Linear(6, 7), (6,)),
    (masked, nn.Conv1d(2, 3, 3), (2, 5)),
]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("wrap, layer, shape", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_computed_from_parameters(
    wrap: Callable[[nn.Module], nn.Module],
    layer: nn.Module,
    shape: tuple[int, ...],
    twice: bool,
    samples: int,
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = wrap(type(layer)(*arguments[type(layer)]).double())
            features = self.layer(torch.zeros(1, *shape).double()).numel()
            self.out = nn.Linear(features, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.layer(x))
            if twice:
                y = y * self.layer(x.flip(-1))
            return self.out(y.flatten(1))

    arguments = {
        nn.Linear: (6, 7),
        nn.Conv2d: (2, 3, 3),
        nn.ConvTranspose1d: (2, 3, 3),
        nn.Conv1d: (2, 3, 3),
    }
    assert_exact(Model(), torch.randn(samples, *shape), labels(samples))


class HiddenDerived(nn.Module):
    """A derived tensor that a custom function reads, where torch does not show it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors  # type: ignore[attr-defined]
            return g * w, (g * x).sum(0)

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(6))
        self.q = nn.Parameter(torch.rand(6))
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.p.exp() * self.q
        return self.out(torch.tanh(self.Product.apply(x, w) + w))


def test_derived_tensor_that_torch_does_not_show() -> None:
    assert_exact(HiddenDerived(), torch.randn(4, 6), labels(4), fallback={"p", "q"})


def test_gradient_switched_off_on_a_derived_tensor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.rand(6))
            self.out = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            w = self.p.exp()
            with torch.no_grad():
                constant = x * w
            return self.out(x * w + constant)

    assert_exact(Model(), torch.randn(4, 6), labels(4))


def add_and_multiply(w: Tensor) -> None:
    w.add_(1)
    w *= 3


def set_entry(w: Tensor) -> None:
    w[2] = 1.0


def set_view(w: Tensor) -> None:
    w.view(2, 3)[1] *= 2


@pytest.mark.parametrize("modify", [add_and_multiply, set_entry, set_view])
def test_derived_tensor_modified_in_place(modify: Callable[[Tensor], None]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.rand(6))
            self.out = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            w = self.p * 2
            modify(w)
            return self.out(x * w)

    assert_exact(Model(), torch.randn(4, 6), labels(4), fallback={"p"})


class Queries(nn.Module):
    """Learned queries through a layer of their own, then cross-attention with the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 6))
        self.project = nn.Linear(6, 6)
        self.keys = nn.Linear(6, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.tanh(self.project(self.queries)).unsqueeze(0).expand(len(x), -1, -1)
        x = F.scaled_dot_product_attention(q / math.sqrt(6), self.keys(x), self.keys(x))
        return self.out(x.mean(1))


@pytest.mark.parametrize("samples", SAMPLES)
def test_learned_queries(samples: int) -> None:
    assert_exact(Queries(), torch.randn(samples, 4, 6), labels(samples))


def test_two_batches_and_two_calls_agree() -> None:
    model = Positions(lambda n, length: torch.arange(length)[None], False).double()
    tokens, target = torch.randint(0, 11, (5, 4)), labels(5)
    whole = fisher_diag(model, [(tokens, target)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = fisher_diag(model, [(tokens[:3], target[:3]), (tokens[3:], target[3:])])
        one = fisher_diag(model, [(tokens[i : i + 1], target[i : i + 1]) for i in range(5)])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(one[name], value, rtol=1e-12, atol=1e-15)


class HyperNetwork(nn.Module):
    """Weights that are outputs of a layer whose samples cannot be told apart, beside parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.seed = nn.Parameter(torch.randn(10))
        self.bias = nn.Parameter(torch.randn(6))
        self.kernel_bias = nn.Parameter(torch.randn(2))
        self.norm_bias = nn.Parameter(torch.randn(6))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        seed = F.linear(x.mean(0, keepdim=True) * 0 + 1, self.seed[4:].outer(self.seed[:6]))[0]
        y = torch.tanh(F.linear(x, seed.outer(seed), self.bias))
        y = F.layer_norm(y, (6,), seed, self.norm_bias)
        y = F.conv1d(y.unsqueeze(1), seed.view(2, 1, 3), self.kernel_bias, padding=1)
        return self.out(y.flatten(1))


@pytest.mark.parametrize("samples", SAMPLES)
def test_gradients_flow_on_through_weights_that_are_no_parameters(samples: int) -> None:
    fallback = {"seed"} if samples > 1 else set()
    assert_exact(HyperNetwork(), torch.randn(samples, 6), labels(samples), fallback=fallback)
