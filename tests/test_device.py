"""The proof cases on a real card, and what carries them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .proof import collection
from .proof import device as proof_device
from .proof.case import Case
from .proof.collection import collect
from .proof.device import OnDevice

CASES = collect()
SMALL = collect(small=True)

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


def operators(backend: str) -> Any:
    try:
        return collection.operators(backend)
    except RuntimeError as error:
        pytest.skip(str(error))


@needs_card
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value(case: Case, backend: str) -> None:
    case.run(OnDevice(operators(backend), "cuda"))


@needs_card
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    case.run(OnDevice(operators("cuda"), "cuda", check=True))


# One of each kernel: opcheck traces the call five times.
@pytest.mark.parametrize(
    "case", {case.kernel: case for case in SMALL}.values(), ids=lambda case: case.name
)
def test_a_case_passes_through_copies(case: Case) -> None:
    """Here the device is the CPU: what is carried there and back is what the case would see."""
    case.run(OnDevice(torch.ops.fastfisher, "cpu", check=True))


@pytest.fixture
def probe() -> Any:
    """Operators that note what they are given."""
    library = torch.library.Library("fastfisher_probe", "FRAGMENT")
    library.define(
        "note(Tensor(a!) out, Tensor[] read, Tensor(b!)[] written, int n, Tensor(c!)? more=None) "
        "-> Tensor"
    )
    seen: list[Any] = []

    def note(
        out: Tensor, read: list[Tensor], written: list[Tensor], n: int, more: Tensor | None = None
    ) -> Tensor:
        seen[:] = [out, read, written, n, more]
        for tensor in (out, *read, *written, more):
            # What is done to the copies of those that are only read has to stay there.
            if n and tensor is not None:
                tensor.add_(n)
        return out.sum()

    library.impl("note", note, "CompositeExplicitAutograd")
    yield torch.ops.fastfisher_probe, seen
    library._destroy()


@pytest.mark.parametrize("large", [1 << 30, 0], ids=["whole storages", "views only"])
def test_what_is_written_comes_back_and_nothing_else(
    probe: Any, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_device, "LARGE", large)
    namespace, seen = probe
    memory = torch.arange(40.0)
    out = memory[4:28].view(4, 6).t()
    same = out[2:]
    read, more, whole = torch.ones(3), torch.ones(2, 1), torch.zeros(5)
    result = OnDevice(namespace, "cpu").note(out, [read, read], [whole], 3, more=more)
    assert seen[0].data_ptr() != out.data_ptr()
    assert seen[0].stride() == out.stride() == (1, 6)
    assert seen[1][0].data_ptr() == seen[1][1].data_ptr()
    assert seen[3] == 3
    assert read.tolist() == [1, 1, 1]
    assert whole.tolist() == [3] * 5
    assert more.tolist() == [[4], [4]]
    assert memory[:4].tolist() == [0, 1, 2, 3]
    assert memory[4:28].tolist() == [value + 3 for value in range(4, 28)]
    assert result.item() == out.sum().item()
    OnDevice(namespace, "cpu").note(out, [], [same], 1)
    assert seen[2][0].untyped_storage().data_ptr() == seen[0].untyped_storage().data_ptr()


def test_a_broadcast_operand_stays_broadcast(probe: Any) -> None:
    namespace, seen = probe
    OnDevice(namespace, "cpu").note(torch.zeros(1), [torch.ones(1, 3).expand(4, 3)], [], 0)
    assert seen[1][0].stride() == (0, 1)
    assert seen[1][0].untyped_storage().nbytes() == 12
