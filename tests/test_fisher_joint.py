"""A parameter with several uses is exact, and nothing of size samples x parameters is formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.rules import joint

from .oracle import assert_exact

SAMPLES = [4, 1]


@pytest.fixture
def no_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size per-sample gradients of anything but a vector are an error."""
    chunked = joint._add_in_chunks

    def refuse(total: Tensor, *args: Any) -> None:
        assert total.dim() == 1, "per-sample gradients were formed"
        chunked(total, *args)

    monkeypatch.setattr(joint, "_add_in_chunks", refuse)


def labels(samples: int) -> Tensor:
    return torch.randint(0, 5, (samples,))


class Reused(nn.Module):
    """One weight as it is, transposed, on tokens and on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.linear(x)))
        x = torch.tanh(self.norm(x) @ self.linear.weight)
        x = torch.tanh(F.linear(x, self.linear.weight.t(), self.linear.bias))
        return self.out(torch.tanh(self.linear(x.mean(1))))


@pytest.mark.parametrize("samples", SAMPLES)
def test_linear_layer(samples: int, no_chunks: None) -> None:
    result = assert_exact(Reused(), torch.randn(samples, 3, 7), labels(samples))
    assert result.rules["linear.weight"] == "linear + matmul, 4 uses"


class ReusedConvolution(nn.Module):
    def __init__(self, conv: nn.Module, features: int) -> None:
        super().__init__()
        self.conv = conv
        self.out = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.conv(x)), torch.tanh(self.conv(x.flip(-1) * x))
        return self.out((a * b + self.conv(2 * x)).flatten(1))


CONVOLUTIONS = [
    (nn.Conv2d(3, 4, 3), (3, 7, 5)),
    (nn.Conv2d(4, 6, (2, 3), stride=(3, 2), padding=(2, 1), groups=2), (4, 8, 9)),
    (nn.Conv2d(2, 2, 3, stride=2, dilation=(2, 1), padding=2), (2, 6, 6)),
    (nn.Conv2d(2, 3, 1, stride=4), (2, 6, 6)),
    (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (3, 5, 4)),
]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("conv, shape", CONVOLUTIONS)
def test_convolution(
    conv: nn.Module, shape: tuple[int, ...], samples: int, no_chunks: None
) -> None:
    inputs = torch.randn(samples, *shape)
    features = conv.double()(inputs.double()).flatten(1).shape[1]
    assert_exact(ReusedConvolution(conv, features), inputs, labels(samples))


class OtherGeometry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.volume = nn.Conv3d(1, 1, (2, 3, 3), padding=1)
        self.out = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv(x)), 2)
        x = torch.tanh(self.conv(x)).unsqueeze(1)
        x = self.volume(torch.tanh(self.volume(x)))
        return self.out(x.mean((1, 3, 4))[:, :3])


@pytest.mark.parametrize("samples", SAMPLES)
def test_uses_that_do_not_join(samples: int) -> None:
    assert_exact(OtherGeometry(), torch.randn(samples, 3, 6, 8), labels(samples))


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out, one table for both."""

    def __init__(self, tokens: int, padding: int | None, uses: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 6, padding_idx=padding)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, tokens, bias=False)
        self.head.weight = self.embedding.weight
        self.uses = uses

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.uses == 4:
            x = x * torch.tanh(self.embedding(tokens.flip(1)[:, 1:]).sum(1, keepdim=True))
        x = torch.tanh(self.hidden(x))
        logits = self.head(x)
        if self.uses == 4:
            logits = logits + torch.tanh(x**2 @ self.embedding.weight.t())
        return logits


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").sum(1)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("uses", [2, 4])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_embedding_tied_to_the_output_layer(
    padding: int | None,
    uses: int,
    samples: int,
    elements: int,
    no_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joint, "_ELEMENTS", elements)
    tokens = torch.randint(0, 5, (samples, 7))  # of nine: repeated and absent ones
    result = assert_exact(
        LanguageModel(9, padding, uses),
        tokens,
        torch.randint(0, 9, (samples, 7)),
        loss=token_loss,
        reference_loss=token_loss,
    )
    assert result.rules["embedding.weight"].endswith(f"{uses} uses")


class SoftTokens(nn.Module):
    """The table is read by token, and by weights that their own backward pass reads last."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(1, 9)
        self.embedding = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.mix(tokens.unsqueeze(-1).to(self.mix.weight.dtype)).softmax(-1)
        x = self.embedding(tokens) + F.linear(weights, self.embedding.weight.t())
        return self.out(torch.tanh(x).sum(1))


@pytest.mark.parametrize("samples", SAMPLES)
def test_tied_table_whose_rows_an_activation_weighs(samples: int, no_chunks: None) -> None:
    assert_exact(SoftTokens(), torch.randint(0, 5, (samples, 7)), labels(samples))


class WithAnother(nn.Module):
    """What is added to the logits shares their gradient, and asks for it last."""

    def __init__(self) -> None:
        super().__init__()
        self.language = LanguageModel(9, None, 2)
        self.another = nn.Linear(1, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        other = self.another(tokens.unsqueeze(-1).to(self.another.weight.dtype))
        return self.language(tokens) + other


@pytest.mark.parametrize("samples", SAMPLES)
def test_gradient_of_a_tied_layer_that_another_layer_shares(samples: int) -> None:
    assert_exact(
        WithAnother(),
        torch.randint(0, 5, (samples, 7)),
        torch.randint(0, 9, (samples, 7)),
        loss=token_loss,
        reference_loss=token_loss,
    )


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.flatten(1).sum(1)


@pytest.mark.parametrize("samples", SAMPLES)
def test_gradient_of_a_tied_layer_that_is_one_number(samples: int) -> None:
    tokens = torch.randint(0, 5, (samples, 7))
    model = LanguageModel(9, None, 2)
    assert_exact(model, tokens, labels(samples), loss=total, reference_loss=total)


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, padding_idx=1)
        self.out = nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        padded = self.embedding(tokens)
        plain = F.embedding(tokens[:, ::2], self.embedding.weight)
        return self.out(torch.tanh(padded.sum(1) * plain.sum(1)))


@pytest.mark.parametrize("samples", SAMPLES)
def test_embedding_with_and_without_padding(samples: int, no_chunks: None) -> None:
    assert_exact(TwoTables(), torch.randint(0, 6, (samples, 5)), labels(samples))


class ChannelsLastView(nn.Module):
    """A view that exists for the parameter's strides, not for those of the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.out = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.conv.weight.permute(0, 2, 3, 1).reshape(4, -1)
        return self.out(self.conv(x).mean((2, 3)) + F.linear(x.flatten(1)[:, :12], flat))


def test_view_that_only_the_parameter_has() -> None:
    model = ChannelsLastView()
    assert model.conv.weight.permute(0, 2, 3, 1).is_contiguous()
    assert_exact(model, torch.randn(4, 3, 4, 4), labels(4), fallback={"conv.weight"})
