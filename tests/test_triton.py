"""The Triton kernels in triton's interpreter, guarded, against the float64 oracle."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch

from .proof import (
    channel,
    gather,
    outer_mma,
    outer_simt,
    recurrent,
    topr,
    triton_channel,
    triton_gather,
    triton_outer,
    triton_recurrent,
)
from .proof.case import Case

pytest.importorskip("triton")

from fastfisher import triton as twins
from fastfisher.triton import launch

from .emulation.interpreter import Interpreted, guarded

if not launch.INTERPRETED:
    pytest.skip("triton compiles for a device here", allow_module_level=True)

FAMILIES = [
    *(outer_simt, outer_mma, channel, gather, recurrent, topr),
    *(triton_outer, triton_channel, triton_gather, triton_recurrent),
]
CASES = [
    case
    for family in FAMILIES
    for case in getattr(family, "CASES", ())
    # The CUDA kernels round to the nearest tf32 and are held to just that; Triton's cut.
    if not (case.kernel == "outer_mma" and "tf32" in case.name)
    # Five minutes in the guard, which looks an address up among all tensors.
    and case.name != "1000 tiny tensors"
]
LEAST_CASES = 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value(case: Case) -> None:
    with guarded():
        case.run(Interpreted())


def test_each_kernel_has_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: Counter[str] = Counter()

    def nothing(*_: object, **__: object) -> None:
        """In place of a launch."""

    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", nothing)
    # The selection's launches depend on what earlier ones found.
    for case in (each for each in CASES if each.kernel != "topr"):
        with launch.recording() as made, contextlib.suppress(AssertionError):
            case.run(torch.ops.fastfisher_triton)
        cases.update({each.kernel.__name__ for each in made})
    assert set(cases) == {name for name in launch.table() if not name.startswith("topr_")}
    assert min(cases.values()) >= LEAST_CASES, cases
    assert len(topr.CASES) >= LEAST_CASES


def operands() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "out": torch.zeros(6, 2, 3, 3),
        "grad": torch.randn(5, 6, 4, 4, generator=generator),
        "input": torch.randn(5, 4, 4, 4, generator=generator),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 2,
        "alpha": 1.0,
    }


def test_the_same_bits_each_time() -> None:
    outs = []
    for _ in range(2):
        arguments = operands()
        torch.ops.fastfisher_triton.conv2d_sum_grad_squared_(**arguments)
        outs.append(arguments["out"])
    assert torch.equal(*outs)
    assert outs[0].count_nonzero()


@pytest.mark.parametrize(
    "changed, argument",
    [
        ({"out": torch.zeros(6, 3, 3, 3)}, "out"),
        ({"out": torch.zeros(6, 2, 3, 3, dtype=torch.float16)}, "out"),
        ({"grad": torch.zeros(5, 6, 16)}, "grad"),
        ({"grad": torch.zeros(5, 6, 4, 3)}, "grad"),
        ({"grad": torch.zeros(5, 6, 4, 4, dtype=torch.bfloat16)}, "grad, input"),
        ({"input": torch.zeros(4, 4, 4, 4)}, "input"),
        ({"input": torch.zeros(5, 4, 4, 4, device="meta")}, "input"),
        ({"stride": (1,)}, "stride, padding, dilation"),
        ({"dilation": (0, 1)}, "stride, padding, dilation"),
        ({"padding": (-1, 1)}, "stride, padding, dilation"),
        ({"groups": 0}, "groups"),
        ({"groups": 4}, "groups"),
        ({"power": 3}, "power"),
    ],
)
def test_refuses(changed: dict[str, Any], argument: str) -> None:
    arguments = operands() | changed
    before = arguments["out"].clone()
    with pytest.raises(ValueError, match=rf"conv2d_sum_grad_squared_: {argument}: expected "):
        twins.KERNELS["conv2d_sum_grad_squared_"](**arguments)
    assert torch.equal(arguments["out"], before)


def test_linear_refuses() -> None:
    good = [torch.zeros(3, 4), torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)]
    for i, name in enumerate(("out", "grad", "input")):
        tensors = [each[..., :1] if i == j else each for j, each in enumerate(good)]
        tensors[i] = tensors[i][0]
        with pytest.raises(ValueError, match=f"linear_sum_grad_squared_: {name}: expected "):
            twins.KERNELS["linear_sum_grad_squared_"](*tensors, 1.0)


def test_opcheck() -> None:
    arguments = operands()
    torch.library.opcheck(
        torch.ops.fastfisher_triton.conv2d_sum_grad_squared_.default,
        (),
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
