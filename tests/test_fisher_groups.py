"""``groups``: one pass gives the Fisher of every group that separate passes would give."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfisher import FisherGroups, fisher_diag

from .oracle import relative_errors
from .zoo import ZOO

IDS = torch.tensor([2, -1, 2, 2, 0, -1, 7])


def quiet(*arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fisher_diag(*arguments, **options)


def data() -> tuple[nn.Module, Tensor, Tensor]:
    case = ZOO["perceptron"]()
    return case.model.double(), case.inputs.double(), case.targets


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ZOO)
def test_one_pass_equals_a_pass_a_group(name: str, power: int) -> None:
    case = ZOO[name]()
    model, inputs, targets = case.model.double(), case.inputs, case.targets
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    # The second batch has one sample, and groups in another order.
    batches = [(inputs, targets), (inputs[3:4], targets[3:4]), (inputs[1:4], targets[1:4])]
    together = quiet(model, batches, groups="target", power=power)
    assert isinstance(together, FisherGroups)
    assert list(together) == [0, 1, 3, 4]
    for group, result in together.items():
        members = [(x[y == group], y[y == group]) for x, y in batches]
        alone = quiet(model, members, power=power)
        assert result.samples == alone.samples
        assert result.power == power
        assert result.rules == alone.rules
        assert max(relative_errors(result, alone).values()) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_integers_and_their_unions(reduction: str) -> None:
    model, inputs, targets = data()
    options: dict[str, Any] = {"reduction": reduction}
    groups = fisher_diag(model, [(inputs, targets)], groups=lambda x, y: IDS, **options)
    assert {group: result.samples for group, result in groups.items()} == {-1: 2, 0: 1, 2: 3, 7: 1}
    assert repr(groups) == "FisherGroups(samples={-1: 2, 0: 1, 2: 3, 7: 1})"
    for result, members in (
        (groups.union(2, 7), (IDS == 2) | (IDS == 7)),
        (groups.union(7, 2, 7), (IDS == 2) | (IDS == 7)),
        (groups.without(-1), IDS != -1),
        (groups.without(), IDS > -2),
    ):
        alone = fisher_diag(model, [(inputs[members], targets[members])], **options)
        assert (result.samples, result.reduction) == (alone.samples, reduction)
        assert max(relative_errors(result, alone).values()) < 1e-12
    for wrong in (groups.union, groups.without):
        with pytest.raises(KeyError, match="3"):
            wrong(3)
    with pytest.raises(ValueError, match="at least one group"):
        groups.without(-1, 0, 2, 7)


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_kinds(kind: str) -> None:
    model, inputs, targets = data()
    order = IDS.argsort(stable=True)
    batch, ids = [(inputs[order], targets[order])], IDS[order]

    def run(**options: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        return fisher_diag(model, batch, kind=kind, samples=3, generator=generator, **options)

    groups = run(groups=lambda x, y: ids)
    # In this order a pass without groups makes the same draws.
    assert max(relative_errors(groups.without(), run()).values()) < 1e-12
    if kind == "exact":
        alone = fisher_diag(model, [(inputs[IDS == 2], targets[IDS == 2])], kind=kind)
        assert max(relative_errors(groups[2], alone).values()) < 1e-12


def test_groups_of_booleans_and_of_inputs() -> None:
    model, inputs, targets = data()
    groups = fisher_diag(model, [(inputs, targets)], groups=lambda x, y: x[:, 0] > 0)
    positive = inputs[:, 0] > 0
    alone = fisher_diag(model, [(inputs[positive], targets[positive])])
    assert list(groups) == [0, 1]
    assert max(relative_errors(groups[1], alone).values()) < 1e-12


class Convolutions(nn.Module):
    """One use of its weight for large inputs; two for small ones, and one needs its strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        if x.shape[-1] > 3:
            return y
        return y + torch.nn.functional.linear(x.flatten(1)[:, :8], self.conv.weight.view(3, 8))


def test_a_group_that_comes_late_gets_the_buffers_of_the_others() -> None:
    # A buffer of other strides would let one group take the fast path where another cannot.
    model = Convolutions().double()
    large, small = torch.randn(4, 2, 5, 5).double(), torch.randn(4, 2, 3, 3).double()
    labels = torch.tensor([0, 0, 1, 1])
    batches = [(large[2:], labels[2:]), (small, labels), (large, labels)]
    groups = quiet(model, batches, groups="target")
    for group in (0, 1):
        members = [(x[y == group], y[y == group]) for x, y in batches]
        alone = quiet(model, [(x, y) for x, y in members if len(x)])
        assert max(relative_errors(groups[group], alone).values()) < 1e-12


def test_left_out_parameters_are_left_out_of_every_group() -> None:
    class Unfit(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.fast = nn.Linear(3, 5)
            self.mix = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            # The probe's two passes and the batch's own; then those of the fallback.
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("enough")
            return self.fast(torch.einsum("ni,i->ni", x, self.mix))

    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    groups = quiet(Unfit(), [batch], groups="target", strict=False)
    assert list(groups) == [0, 1]
    for result in groups.values():
        assert set(result) == {"fast.weight", "fast.bias"}


@pytest.mark.parametrize(
    "groups, message",
    [
        ("label", "groups: expected None, 'target' or a callable"),
        (3, "groups: expected None, 'target' or a callable"),
        (lambda x, y: y[:2], r"groups: expected integers \[N\] = \[7\], got torch.int64 \[2\]"),
        (lambda x, y: x[:, 0], r"groups: expected integers \[N\] = \[7\], got torch.float64 \[7\]"),
        (lambda x, y: y.tolist(), r"groups: expected integers \[N\] = \[7\], got list"),
    ],
)
def test_bad_groups(groups: Any, message: str) -> None:
    model, inputs, targets = data()
    with pytest.raises(ValueError, match=message):
        fisher_diag(model, [(inputs, targets)], groups=groups)


def test_targets_of_many_positions_are_no_groups() -> None:
    model = nn.Conv2d(2, 3, 1)
    batch = (torch.randn(2, 2, 4, 4), torch.zeros(2, 4, 4).long())
    with pytest.raises(ValueError, match="groups: expected integers"):
        fisher_diag(model, [batch], groups="target")
