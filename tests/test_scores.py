"""Scores are computed once for the same weights, data and definition, and never mixed up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastfisher.data import batches
from fastfisher.fisher_diag import fisher_diag
from fastfisher.unlearning import scores as module
from fastfisher.unlearning.scores import Scores


@pytest.fixture(name="model")
def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def samples(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(20, 4, generator=generator), torch.arange(20) % 2)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    compute = module.fisher_diag

    def counted(*args: object, **options: object) -> object:
        calls.append("fisher_diag")
        return compute(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(module, "fisher_diag", counted)
    return calls


def test_what_is_remembered_is_what_was_computed(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch)
    expected = fisher_diag(model, batches(samples(), 7))
    for _ in range(2):
        scores = Scores(tmp_path)
        found = scores.fisher(model, samples(), batch_size=7)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (found.samples, found.kind, found.rules) == (20, "empirical", expected.rules)
    assert len(calls) == 1
    assert scores.seconds_saved > 0
    assert not list(tmp_path.glob(".*"))


CHANGES: dict[str, Callable[[nn.Module], tuple[TensorDataset, dict[str, str]]]] = {
    "other data": lambda model: (samples(1), {}),
    "another target": lambda model: (
        TensorDataset(samples().tensors[0], 1 - samples().tensors[1]),
        {},
    ),
    "another definition": lambda model: (samples(), {"kind": "exact"}),
    "another weight": lambda model: (changed(model.get_parameter("0.weight")), {}),
    "another running mean": lambda model: (changed(model.get_buffer("1.running_mean")), {}),
}


def changed(tensor: Tensor) -> TensorDataset:
    with torch.no_grad():
        tensor.view(-1)[0] += 1e-6
    return samples()


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_used(
    change: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch)
    scores = Scores(tmp_path)
    scores.fisher(model, samples(), batch_size=7)
    dataset, options = CHANGES[change](model)
    scores.fisher(model, dataset, batch_size=7, **options)
    assert len(calls) == 2
    assert scores.seconds_saved == 0


def test_tensors_of_any_score(model: nn.Module, tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T}

    for definition in ({"score": "one"}, {"score": "one"}, {"score": "two"}):
        found = Scores(tmp_path).tensors(model, samples(), definition, compute)
        assert torch.equal(found["a"], torch.arange(6.0).view(2, 3).T)
    assert len(calls) == 2
    Scores().tensors(model, samples(), {"score": "one"}, compute)
    assert len(calls) == 3
