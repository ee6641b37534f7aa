"""Models whose structure makes other libraries wrong: every parameter exact, or a clear error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastfisher import FallbackWarning, fisher_diag
from fastfisher.reference import fisher_diag_loop

from .oracle import assert_exact, cross_entropy, relative_errors

LABELS = torch.tensor([0, 3, 1, 4])


class LayerTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(torch.tanh(self.norm(self.linear(x)))))
        x = self.conv(torch.tanh(self.conv(x[:, None, None]))).flatten(1)
        return self.out(x)


def test_a_layer_called_twice() -> None:
    result = assert_exact(LayerTwice(), torch.randn(4, 10), LABELS)
    assert "2 uses" in result.rules["linear.weight"]


class TiedToOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(tokens))).mean(1))


def test_weight_tied_between_embedding_and_output() -> None:
    tokens = torch.tensor([[0, 1, 1], [2, 2, 2], [4, 3, 0], [1, 0, 4]])
    assert_exact(TiedToOutput(), tokens, LABELS)


class TiedSlices(nn.Module):
    """Overlapping and transposed views of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8) / 3)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight[:8], self.weight[4:]
        x = torch.tanh(F.linear(x, first)) + F.linear(x, second)
        return self.out(torch.tanh(x @ self.weight.t()[:, 2:10]))


def test_overlapping_views_of_one_parameter() -> None:
    assert_exact(TiedSlices(), torch.randn(4, 8), LABELS)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(10, 8))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(torch.einsum("ni,io->no", x, self.mix)))


def test_bare_parameter_in_an_einsum() -> None:
    assert_exact(Einsum(), torch.randn(4, 10), LABELS, fallback={"mix"})


def test_fallback_warns_and_names_parameter_and_function() -> None:
    with pytest.warns(FallbackWarning, match="mix: einsum") as caught:
        fisher_diag(Einsum(), [(torch.randn(4, 10), LABELS)] * 3)
    assert len(caught) == 1


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.scale = nn.Parameter(torch.randn(16))
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.bias = nn.Parameter(torch.randn(16))
        self.out = nn.Parameter(torch.randn(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x.view(-1, 1, 4, 4), self.kernel, padding=1).mean(1).flatten(1)
        x = F.layer_norm(x, (16,), self.scale)
        return torch.tanh(F.linear(x, weight=self.weight, bias=self.bias)) @ self.out


def test_functional_calls() -> None:
    assert_exact(Functional(), torch.randn(4, 16), LABELS)


class Transformer(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.positions = nn.Embedding(9, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
        self.out = nn.Linear(16, 5)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        x = self.tokens(tokens) + self.positions(positions)
        if not self.batch_first:
            x = x.transpose(0, 1)
        return self.out(self.block(x).mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [2, 4, 7])
def test_sample_axis_is_found_even_where_lengths_equal_the_batch(
    batch_first: bool, length: int
) -> None:
    assert_exact(Transformer(batch_first), torch.randint(0, 11, (4, length)), LABELS)


class SharedPositions(nn.Module):
    """Position embeddings of shape [1, S], added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.positions = nn.Embedding(9, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        return self.out(torch.tanh(self.tokens(tokens) + self.positions(positions)).mean(1))


@pytest.mark.parametrize("samples", [4, 1])
def test_output_shared_between_samples(samples: int) -> None:
    tokens = torch.randint(0, 11, (samples, 4))
    assert_exact(SharedPositions(), tokens, LABELS[:samples])


class Frames(nn.Module):
    """Several images a sample, folded into the batch axis: samples slowest or fastest."""

    def __init__(self, samples_slowest: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 5)
        self.samples_slowest = samples_slowest

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        if not self.samples_slowest:
            x = x.transpose(0, 1)
        x = self.group(self.batch(self.conv(x.flatten(0, 1)))).mean((2, 3))
        x = self.out(x)
        return x.view(n, t, 5).mean(1) if self.samples_slowest else x.view(t, n, 5).mean(0)


@pytest.mark.parametrize("samples_slowest", [True, False])
@pytest.mark.parametrize("frames", [2, 3])
def test_frames_folded_into_the_batch(samples_slowest: bool, frames: int) -> None:
    assert_exact(Frames(samples_slowest), torch.randn(4, frames, 3, 6, 6), LABELS)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class HiddenUse(nn.Module):
    """One parameter used by a custom function, which torch does not show, and once openly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(10))
        self.linear = nn.Linear(10, 10)
        self.norm = nn.LayerNorm(10)
        self.norm.weight = self.scale
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(Scale.apply(self.linear(Scale.apply(x, self.scale)), self.scale)))


def test_use_that_torch_does_not_show() -> None:
    assert_exact(HiddenUse(), torch.randn(4, 10), LABELS, fallback={"scale"})


def test_single_sample_batches_after_a_larger_one() -> None:
    model = HiddenUse().double()
    inputs = torch.randn(4, 10, dtype=torch.float64)
    data = [(inputs, LABELS), (inputs[:1], LABELS[:1])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fisher_diag(model, data)
    errors = relative_errors(result, fisher_diag_loop(model, data, cross_entropy))
    assert max(errors.values()) < 1e-10


class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 7, batch_first=True)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
        return self.out(self.lstm(packed)[1][0][-1])


def test_function_that_vmap_cannot_run_goes_through_the_loop() -> None:
    model = PackedLSTM()
    names = {name for name, _ in model.named_parameters() if name.startswith("lstm")}
    result = assert_exact(model, torch.randn(4, 3, 6), LABELS, fallback=names)
    assert "per-sample loop" in result.rules["lstm.weight_ih_l0"]


class MixesSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.out(torch.tanh(x - x.mean(0)))


def test_samples_that_depend_on_each_other_leave_the_fast_path() -> None:
    model = MixesSamples()
    result = assert_exact(model, torch.randn(4, 10), LABELS, fallback=None)
    assert all("depends on the other samples" in rule for rule in result.rules.values())


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 10)
        self.b = nn.Linear(10, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) if bool((x[:, 0] > 0).all()) else self.b(torch.tanh(self.b(x)))
        return self.out(torch.tanh(x))


def test_control_flow_that_changes_between_batches() -> None:
    model = DataDependent().double()
    inputs = torch.randn(4, 10, dtype=torch.float64).abs()
    data = [(inputs, LABELS), (-inputs, LABELS), (inputs, LABELS)]
    result = fisher_diag(model, data)
    errors = relative_errors(result, fisher_diag_loop(model, data, cross_entropy))
    assert max(errors.values()) < 1e-10


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(10, 10)
        self.out = nn.Linear(10, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            x = x.requires_grad_()
        return self.out(torch.tanh(checkpoint(self.hidden, x, use_reentrant=self.reentrant)))


def test_checkpointing() -> None:
    assert_exact(Checkpointed(reentrant=False), torch.randn(4, 10), LABELS)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        fisher_diag(Checkpointed(reentrant=True), [(torch.randn(4, 10), LABELS)])


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(10, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.hidden(x)
        x.mul_(2)
        return self.out(torch.tanh(y + x))


def test_input_modified_after_use_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"linear .*hidden.*modified in place"):
        fisher_diag(InPlace(), [(torch.randn(4, 10), LABELS)])


class LooseTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loose = [torch.ones(10, requires_grad=True)]
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.loose[0])


def test_tensor_that_requires_grad_but_is_no_parameter_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not one of its parameters"):
        fisher_diag(LooseTensor(), [(torch.randn(4, 10), LABELS)])


def test_unused_parameter_is_zero() -> None:
    model = nn.Sequential(nn.Linear(10, 5))
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    result = fisher_diag(model, [(torch.randn(4, 10), LABELS)])
    assert result.rules["idle"].startswith("not used")
    assert torch.equal(result["idle"], torch.zeros(3))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_torchscript_module() -> None:
    model = nn.Sequential(nn.Linear(10, 10), torch.jit.script(nn.Linear(10, 5)))
    assert_exact(model, torch.randn(4, 10), LABELS, fallback={"1.weight", "1.bias"})
