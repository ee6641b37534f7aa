"""The contract of ``fisher_diag``: arguments, scale, what is left behind, and files."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FallbackWarning, FisherDiag, fisher_diag
from fastfisher.reference import fisher_diag_loop

from .oracle import assert_exact, cross_entropy, relative_errors


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(144, 5),
    )


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5


def test_module_and_function_share_a_name() -> None:
    import fastfisher.fisher_diag

    inputs, labels = batch()
    assert len(fastfisher.fisher_diag(small(), [(inputs, labels)])) == 6


def test_batches_do_not_matter() -> None:
    model, (inputs, labels) = small().double(), batch(7)
    inputs = inputs.double()
    whole = fisher_diag(model, [(inputs, labels)])
    cuts = (slice(0, 4), slice(4, 5), slice(5, 7))
    parts = fisher_diag(model, [(inputs[cut], labels[cut]) for cut in cuts])
    assert whole.samples == parts.samples == 7
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-12, atol=0)


def test_sum_is_mean_times_samples() -> None:
    model, data = small(), [batch()]
    mean, total = fisher_diag(model, data), fisher_diag(model, data, reduction="sum")
    for name in mean:
        torch.testing.assert_close(mean[name] * 6, total[name])


def test_same_bits_for_any_number_of_threads() -> None:
    model, data = small(), [batch(9)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(fisher_diag(model[:1].append(nn.Flatten()), data))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("fail", [False, True])
def test_model_is_left_as_found(fail: bool) -> None:
    model = small().train()
    model[1].eval()
    inputs, labels = batch()
    model(inputs).sum().backward()
    hooks = []
    handle = model[0].register_forward_hook(lambda *_: hooks.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    versions = {name: p._version for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    if fail:
        with pytest.raises(ValueError, match="agree in their first axis"):
            fisher_diag(model, [(inputs, labels), (inputs, labels[:2])])
    else:
        fisher_diag(model, [(inputs, labels)])
    assert hooks
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert all(p._version == versions[name] for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Watched(nn.Module):
    """Remembers, without holding them, the activations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(weakref.ref(x))
        return x


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_nothing_of_a_batch_outlives_it(kind: str) -> None:
    first, second = Watched(), Watched()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), first, nn.ReLU(), nn.Conv2d(4, 4, 3), second, nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    gc.disable()  # a circle that only the collector opens would fill the memory first
    try:
        fisher_diag(model, [batch(), batch()], kind=kind)
        alive = [ref for watched in (first, second) for ref in watched.seen if ref() is not None]
    finally:
        gc.enable()
    assert len(first.seen) >= 4
    assert not alive


def test_frozen_parameters_and_a_choice_of_names() -> None:
    model, (inputs, labels) = small(), batch()
    model[0].weight.requires_grad_(False)
    everything = fisher_diag(model, [(inputs, labels)])
    assert "0.weight" not in everything
    some = fisher_diag(model, [(inputs, labels)], parameters=["5.bias", "1.weight"])
    assert list(some) == ["1.weight", "5.bias"]
    for name in some:
        assert torch.equal(some[name], everything[name])


def test_first_layer_frozen_and_later_ones_not() -> None:
    model, (inputs, labels) = small(), batch()
    whole = fisher_diag(model, [(inputs, labels)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("5"))
    last = fisher_diag(model, [(inputs, labels)])
    assert list(last) == ["5.weight", "5.bias"]
    assert torch.equal(last["5.weight"], whole["5.weight"])


def test_inputs_as_tuple_and_mapping() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(a * b)

    model, a, b = Two(), torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.arange(4)
    expected = fisher_diag(model.out, [(a * b, labels)])["weight"]
    for inputs in ((a, b), [a, b], {"b": b, "a": a}):
        torch.testing.assert_close(fisher_diag(model, [(inputs, labels)])["out.weight"], expected)


def test_fallback_takes_a_tuple_and_a_mapping() -> None:
    class Two(nn.Module):
        def __init__(self, vmap: bool) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3))
            self.vmap = vmap

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            if not self.vmap:
                assert a.sum().item() < 1e6
            return torch.einsum("ni,ni,i->ni", a, b, self.scale)

    a, b = torch.randn(4, 3), torch.randn(4, 3)
    p = nn.Linear(3, 3, bias=False)
    for vmap in (True, False):
        model = Two(vmap)
        p.weight.data = torch.diag(model.scale.data)
        expected = fisher_diag(p, [(a * b, torch.arange(4) % 3)])["weight"].diagonal()
        for inputs in ((a, b), {"b": b, "a": a}):
            with pytest.warns(FallbackWarning, match="torch.func" if vmap else "per-sample loop"):
                result = fisher_diag(model, [(inputs, torch.arange(4) % 3)])
            torch.testing.assert_close(result["scale"], expected)


@pytest.mark.parametrize("name", ["mse", "bce_with_logits"])
def test_named_losses(name: str) -> None:
    def reference(output: Tensor, target: Tensor) -> Tensor:
        if name == "mse":
            return 0.5 * ((output - target) ** 2).sum(1)
        return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1)

    targets = torch.rand(4, 5).double()
    model = nn.Sequential(nn.Linear(3, 5))
    assert_exact(model, torch.randn(4, 3), targets, loss=name, reference_loss=reference)


def test_callable_loss() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.softmax(1)[:, 0] - target).abs()

    model = nn.Sequential(nn.Linear(3, 5))
    assert_exact(model, torch.randn(4, 3), torch.rand(4).double(), loss=loss, reference_loss=loss)


def test_loss_that_mixes_samples_is_an_error() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.mean(0)).square().sum(1)

    with pytest.raises(ValueError, match="another sample's output"):
        fisher_diag(nn.Linear(3, 5), [(torch.randn(4, 3), torch.zeros(4))], loss=loss)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "hinge"}, "loss: expected one of"),
        ({"loss": lambda o, t: o.sum()}, r"loss: expected per-sample losses \[N\]"),
        ({"kind": "true"}, "kind: expected"),
        ({"reduction": "max"}, "reduction: expected"),
        ({"parameters": ["nope"]}, "parameters: the model has no parameter 'nope'"),
        ({"data": []}, "data: expected at least one sample"),
        ({"model": nn.ReLU()}, "model: expected at least one parameter"),
        ({"model": "resnet"}, "model: expected a torch.nn.Module"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"model": small(), "data": [batch()], **change}
    with pytest.raises(ValueError, match=message):
        fisher_diag(**arguments)


def test_low_precision_parameters_accumulate_in_float32() -> None:
    model, (inputs, labels) = small().bfloat16(), batch()
    result = fisher_diag(model, [(inputs.bfloat16(), labels)])
    assert {value.dtype for value in result.values()} == {torch.float32}


def test_save_and_load(tmp_path: Path) -> None:
    result = fisher_diag(small(), [batch()])
    path = tmp_path / "fisher.safetensors"
    result.save(path)
    again = FisherDiag.load(path)
    assert (again.samples, again.kind, again.reduction) == (6, "empirical", "mean")
    assert again.rules == result.rules
    assert all(torch.equal(result[name], again[name]) for name in result)
    assert [p.name for p in tmp_path.iterdir()] == ["fisher.safetensors"]
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        FisherDiag.load(path)


class _GradientPenalty(nn.Module):
    """Differentiates its own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            output = self.head(torch.tanh(self.hidden(x)))
            (slope,) = torch.autograd.grad(output.sum(), [x], create_graph=True)
        return output + slope.sum(1, keepdim=True)


def test_a_model_that_differentiates_its_forward_pass_is_named() -> None:
    batch = torch.randn(3, 4), torch.tensor([0, 2, 1])
    with pytest.raises(RuntimeError, match="forward pass itself differentiates"):
        fisher_diag(_GradientPenalty(), [batch])


def test_results_are_contiguous_whatever_the_kernels_write() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 64, 3), nn.Conv2d(64, 32, 3), nn.Conv2d(32, 80, 3), nn.Flatten()
    )
    data = [(torch.randn(2, 2, 7, 7), torch.zeros(2).long())]
    result = fisher_diag(model, data)
    exact = fisher_diag_loop(model, data, cross_entropy)
    assert all(value.is_contiguous() for value in result.values())
    assert max(relative_errors(result, exact).values()) < 1e-5
    assert len({value.untyped_storage().data_ptr() for value in result.values()}) == len(result)
