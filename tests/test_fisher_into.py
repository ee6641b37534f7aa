"""``into`` and ``alpha``: one buffer accumulates passes, exactly, or is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfisher import FisherDiag, fisher_diag, fisher_mask_

from .oracle import relative_errors
from .zoo import ZOO

Batches = list[tuple[Tensor, Tensor]]


def scene(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Batches, Batches]:
    """A model, a forget set of 4 and a remain set of 10 samples."""
    case = ZOO["images"]()
    x, y = case.inputs.to(dtype), case.targets
    return case.model.to(dtype), [(x[:4], y[:4])], [(x, y), (x[4:], y[4:])]


def clones(values: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


@pytest.mark.parametrize("reduction, shares", [("mean", (4, 10)), ("sum", (1, 1))])
def test_one_buffer_holds_the_scores(reduction: str, shares: tuple[int, int]) -> None:
    model, forget, remain = scene()
    scores = fisher_diag(model, forget, reduction=reduction)
    pointers = {name: value.data_ptr() for name, value in scores.items()}
    result = fisher_diag(model, remain, reduction=reduction, into=scores, alpha=-3)
    assert result is scores
    assert scores.samples == 14
    assert {name: value.data_ptr() for name, value in scores.items()} == pointers
    sums = [fisher_diag(model, data, reduction="sum") for data in (forget, remain)]
    exact = {n: sums[0][n] / shares[0] - 3 * sums[1][n] / shares[1] for n in scores}
    assert max(relative_errors(scores, exact).values()) < 1e-12


def test_the_scores_make_the_mask_that_the_two_fishers_make() -> None:
    model, forget, remain = scene()
    twin = copy.deepcopy(model)
    scores = fisher_diag(model, forget)
    fisher_diag(model, remain, into=scores, alpha=-0.5)
    f, r = fisher_diag(twin, forget), fisher_diag(twin, remain)
    one = fisher_mask_(model, scores, ratio=0.1)
    two = fisher_mask_(twin, f, r, ratio=0.1, remain_weight=0.5)
    assert one.k == two.k > 0
    for name, mask in one.as_dict().items():
        assert torch.equal(mask, two.as_dict()[name])


def test_the_mean_of_several_calls() -> None:
    model, forget, remain = scene()
    total = fisher_diag(model, forget, reduction="sum")
    fisher_diag(model, remain, reduction="sum", into=total)
    mean = {name: value / total.samples for name, value in total.items()}
    whole = fisher_diag(model, [*forget, *remain])
    assert whole.samples == total.samples
    assert max(relative_errors(mean, whole).values()) < 1e-12


def test_a_mapping_of_buffers_that_share_one_storage() -> None:
    model, forget, _ = scene(torch.float32)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    flat = torch.full((sum(sizes.values()) + 3,), 7.0, dtype=torch.float64)
    buffers: dict[str, Tensor] = {"untouched": flat[-3:]}
    start = 0
    for name, p in model.named_parameters():
        # The last axis first: any strides will do.
        part = flat[start : start + p.numel()].view(p.shape[::-1])
        buffers[name] = part.permute(*reversed(range(p.dim())))
        start += p.numel()
    result = fisher_diag(model, forget, into=buffers, alpha=2)
    assert isinstance(result, FisherDiag)
    assert list(result) == list(sizes)
    assert all(result[name] is buffers[name] for name in result)
    assert result.samples == 4
    plain = fisher_diag(model, forget)
    exact = {name: 7 + 2 * value.double() for name, value in plain.items()}
    assert max(relative_errors(result, exact).values()) < 1e-7
    assert torch.equal(flat[-3:], torch.full((3,), 7.0, dtype=torch.float64))


def test_many_batches_are_added_from_float64() -> None:
    model, forget, _ = scene(torch.float32)
    many = forget * 70  # more than two of the float32 sums' life times
    buffers = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    fisher_diag(model, many, into=buffers, reduction="sum", alpha=0.5)
    one = fisher_diag(model, forget, reduction="sum")
    exact = {name: 35 * value.double() for name, value in one.items()}
    assert max(relative_errors(buffers, exact).values()) < 1e-6


def test_alpha_alone_scales() -> None:
    model, forget, _ = scene()
    plain, scaled = fisher_diag(model, forget), fisher_diag(model, forget, alpha=-0.25)
    exact = {name: -0.25 * value for name, value in plain.items()}
    assert max(relative_errors(scaled, exact).values()) < 1e-12
    groups = fisher_diag(model, forget, groups="target", alpha=2, reduction="sum")
    exact = {name: 8 * value for name, value in plain.items()}
    assert max(relative_errors(groups.without(), exact).values()) < 1e-12


class Stop(BaseException):
    """Neither an error nor expected, such as a keyboard interrupt."""


@pytest.mark.parametrize("where", ["data", "forward", "loss", "backward", "end"])
def test_a_pass_that_fails_has_changed_nothing(where: str) -> None:
    model, forget, remain = scene()
    scores = fisher_diag(model, forget)
    before, rules = clones(scores), dict(scores.rules)
    batch, calls = remain[0], {"forward": 0, "loss": 0}

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch
        yield batch
        if where == "data":
            raise Stop
        calls["late"] = 1
        yield batch

    def fail(point: str) -> None:
        if point == where and "late" in calls:
            raise Stop

    def loss(output: Tensor, target: Tensor) -> Tensor:
        fail("loss")
        if output.requires_grad:
            output.register_hook(lambda grad: fail("backward"))
        return nn.functional.cross_entropy(output, target, reduction="none")

    def hook(*_: object) -> None:
        fail("forward")
        if where == "end" and "late" in calls:
            # Found when the pass is over.
            with torch.no_grad():
                model[0].weight.add_(0)

    handle = model[3].register_forward_hook(hook)
    with pytest.raises(RuntimeError if where == "end" else Stop):
        fisher_diag(model, data(), loss=loss, into=scores, alpha=-1)
    handle.remove()
    assert scores.samples == 4
    assert scores.rules == rules
    assert all(torch.equal(scores[name], before[name]) for name in before)


def broken(change: str) -> tuple[nn.Module, Batches, dict[str, Any]]:
    model = nn.Linear(3, 5)
    buffers: Any = {"weight": torch.zeros(5, 3), "bias": torch.zeros(5)}
    options: dict[str, Any] = {"into": buffers}
    if change == "missing":
        del buffers["bias"]
    elif change == "shape":
        buffers["bias"] = torch.zeros(5, 1)
    elif change == "dtype":
        buffers["bias"] = torch.zeros(5, dtype=torch.bfloat16)
    elif change == "narrow":
        model = model.double()
    elif change == "device":
        buffers["bias"] = torch.zeros(5, device="meta")
    elif change == "sparse":
        buffers["weight"] = torch.zeros(5, 3).to_sparse()
    elif change == "no tensor":
        buffers["bias"] = [0.0] * 5
    elif change == "requires grad":
        buffers["bias"].requires_grad_()
    elif change == "expanded":
        buffers["bias"] = torch.zeros(1).expand(5)
    elif change == "overlap":
        buffers["bias"] = torch.zeros(19).as_strided((5,), (1,), 14)
        buffers["weight"] = buffers["bias"].as_strided((5, 3), (3, 1), 0)
    elif change == "parameter":
        buffers["weight"] = model.weight.data
    elif change == "kind":
        options = {"into": FisherDiag(buffers, samples=1, kind="exact")}
    elif change == "power":
        options = {"into": FisherDiag(buffers, samples=1, power=1)}
    elif change == "reduction":
        options = {"into": FisherDiag(buffers, samples=1, reduction="sum")}
    elif change == "list":
        options = {"into": list(buffers.values())}
    elif change == "groups":
        options["groups"] = "target"
    elif change == "strict":
        options["strict"] = False
    elif change == "alpha":
        options["alpha"] = float("nan")
    else:
        options["alpha"] = "1"
    x = torch.randn(2, 3, dtype=model.weight.dtype)
    return model, [(x, torch.zeros(2).long())], options


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "into: it has no buffer for parameter 'bias'"),
        (
            "shape",
            r"into: the buffer of 'bias': expected the parameter's shape \[5\], got \[5, 1\]",
        ),
        ("dtype", "into: the buffer of 'bias': expected float32 or float64, got torch.bfloat16"),
        ("narrow", "into: the buffer of 'weight': expected float64, got torch.float32"),
        ("device", "into: the buffer of 'bias': expected device cpu, got meta"),
        ("sparse", "into: the buffer of 'weight': expected a dense tensor"),
        ("no tensor", "into: the buffer of 'bias': expected a dense tensor, got list"),
        ("requires grad", "into: the buffer of 'bias': it requires grad"),
        ("expanded", "into: the buffer of 'bias': some of its entries share memory"),
        ("overlap", "into: the buffer of '.*': it shares memory with the buffer of"),
        ("parameter", "into: the buffer of 'weight': it shares memory with the model"),
        ("kind", "into: its kind is 'exact', not 'empirical'"),
        ("power", "into: its power is 1, not 2"),
        ("reduction", "into: its reduction is 'sum', not 'mean'"),
        ("list", "into: expected a mapping of buffers, got list"),
        ("groups", "into: groups have buffers of their own"),
        ("strict", "into: expected strict=True"),
        ("alpha", "alpha: expected a finite number, got nan"),
        ("alpha type", "alpha: expected a finite number, got '1'"),
    ],
)
def test_bad_arguments(change: str, message: str) -> None:
    model, data, options = broken(change)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=message):
        fisher_diag(model, data, **options)
    assert not passes
