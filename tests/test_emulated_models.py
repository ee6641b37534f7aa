"""Whole models by the emulated CUDA operators: what rules hand over is what the kernels read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastfisher
from fastfisher import backends

from .emulation.build import NAMESPACES, emulated
from .oracle import assert_exact
from .zoo import ZOO


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    emulated()
    backend = backends.Backend("emulated", NAMESPACES["plain"], lambda: None, lambda: ("cpu",))
    monkeypatch.setitem(backends._backends, "emulated", backend)
    with fastfisher.backend("emulated"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_model(name: str, dtype: torch.dtype) -> None:
    case = ZOO[name]()
    assert_exact(case.model, case.inputs, case.targets, dtype=dtype, fallback=set(case.fallback))
