"""The steps of recurrent layers equal their formulas, forward and backward, on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastfisher import ops

OPS = torch.ops.fastfisher
ISAS = ops.build_info()["supported_cpu_isas"]
DTYPES = [torch.float32, torch.float64]
STEPS = ("lstm_step_", "lstm_step_backward_", "gru_step_", "gru_step_backward_")
compiled = pytest.mark.skipif(not ISAS, reason="no compiled module")


@pytest.fixture(params=[*ISAS, "plain torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, then what runs without the compiled module."""
    if request.param == "plain torch":
        for name in STEPS:
            plain = SimpleNamespace(default=getattr(ops, f"_{name.rstrip('_')}_default"))
            monkeypatch.setattr(OPS, name, plain)
        yield request.param
        return
    from fastfisher import _C

    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def lstm(gates: Tensor, bias: Tensor | None, cell: Tensor) -> Sequence[Tensor]:
    i, f, g, o = (gates if bias is None else gates + bias).chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return cell, o.sigmoid() * cell.tanh()


def gru(gates: Tensor, product: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    product = product if bias is None else product + bias
    (x_r, x_z, x_n), (h_r, h_z, h_n) = gates.chunk(3, 1), product.chunk(3, 1)
    fresh = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return fresh + (x_z + h_z).sigmoid() * (hidden - fresh)


def apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers in rows that are further apart than they are long."""
    return torch.randn(rows, columns + 3, dtype=dtype)[:, :columns]


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double().clone().requires_grad_() for t in tensors]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """A few units in the last place of the largest entry."""
    expected = expected.detach()
    bound = 16 * torch.finfo(actual.dtype).eps * expected.abs().max().clamp(min=1)
    assert float((actual.double() - expected).abs().max()) <= float(bound)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_gates_are_accurate_wherever_they_are(name: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = torch.cat(
        [
            torch.linspace(-120, 120, 20_011, dtype=torch.float64),
            torch.linspace(-800, 800, 20_011, dtype=torch.float64),
            torch.randn(20_000, dtype=torch.float64),
            torch.randn(20_000, dtype=torch.float64) * 1e-4,
            torch.tensor([0.0, -0.0, tiny, -tiny, 1e-30, -1e30, 1e30, torch.inf, -torch.inf]),
        ]
    ).to(dtype)
    gate = {"sigmoid": 0, "tanh": 2}[name]
    gates = torch.zeros(1, 4, len(x), dtype=dtype)
    gates[0, gate] = x
    zeros = torch.zeros(1, len(x), dtype=dtype)
    ops.lstm_step_(gates.view(1, -1), None, zeros, zeros.clone(), zeros.clone())
    exact = getattr(torch, name)(x.double())
    error = (gates[0, gate].double() - exact).abs()
    # Where the exact value is no normal number, zero is as good.
    assert bool((error <= (4 * torch.finfo(dtype).eps * exact.abs()).clamp(min=tiny)).all())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("units", [1, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through(units: int, dtype: torch.dtype) -> None:
    for gate in range(4):
        gates = torch.zeros(1, 4, units, dtype=dtype)
        gates[0, gate, -1] = torch.nan
        cell, hidden = torch.ones(1, units, dtype=dtype), torch.empty(1, units, dtype=dtype)
        ops.lstm_step_(gates.view(1, -1), None, cell, cell.clone(), hidden)
        assert bool(hidden[0, -1].isnan()) and int(hidden.isnan().sum()) == 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows, units", [(1, 1), (3, 7), (2, 16), (5, 37), (70, 66)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lstm_step(dtype: torch.dtype, rows: int, units: int, with_bias: bool) -> None:
    gates, cell = apart(rows, 4 * units, dtype), apart(rows, units, dtype)
    bias = torch.randn(4 * units, dtype=dtype) if with_bias else None
    direct, through = apart(rows, units, dtype), apart(rows, units, dtype)
    grad_cell = apart(rows, units, dtype)
    exact = doubled(gates, bias, cell)
    expected = lstm(*exact)
    next_cell, hidden = apart(rows, units, dtype), apart(rows, units, dtype)
    ops.lstm_step_(gates, bias, cell, next_cell, hidden)
    assert_close(next_cell, expected[0])
    assert_close(hidden, expected[1])

    for a, b in ((direct, through), (direct, None), (None, through), (None, None)):
        given = sum((each.double() for each in (a, b) if each is not None), torch.zeros(()))
        leaves = [exact[0], exact[2]]
        total = (expected[0] * grad_cell.double()).sum() + (expected[1] * given).sum()
        at_gates, at_cell = torch.autograd.grad(total, leaves, retain_graph=True)
        in_place = gates.clone()
        for out, saved in ((apart(rows, 4 * units, dtype), gates), (in_place, in_place)):
            grad = grad_cell.clone()
            ops.lstm_step_backward_(out, grad, a, b, saved, cell, next_cell)
            assert_close(out, at_gates)
            assert_close(grad, at_cell)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows, units", [(1, 1), (3, 7), (2, 16), (5, 37), (70, 66)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_step(dtype: torch.dtype, rows: int, units: int, with_bias: bool) -> None:
    gates, product = apart(rows, 3 * units, dtype), apart(rows, 3 * units, dtype)
    bias = torch.randn(3 * units, dtype=dtype) if with_bias else None
    hidden, direct, through = (apart(rows, units, dtype) for _ in range(3))
    exact = doubled(gates, product, bias, hidden)
    expected = gru(*exact)
    candidate, next_hidden = apart(rows, units, dtype), apart(rows, units, dtype)
    ops.gru_step_(gates, product, bias, hidden, candidate, next_hidden)
    assert_close(next_hidden, expected)

    for a in (direct, None):
        given = through.double() + (0 if a is None else a.double())
        leaves = [exact[0], exact[1], exact[3]]
        wanted = torch.autograd.grad((expected * given).sum(), leaves, retain_graph=True)
        in_place = gates.clone()
        for out, saved in ((apart(rows, 3 * units, dtype), gates), (in_place, in_place)):
            at_product, grad = apart(rows, 3 * units, dtype), through.clone()
            ops.gru_step_backward_(out, at_product, grad, a, saved, candidate, hidden)
            for actual, expectation in zip((out, at_product, grad), wanted, strict=True):
                assert_close(actual, expectation)


def matrix(columns: int = 6) -> Tensor:
    return torch.zeros(4, columns)


@compiled
@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: ops.lstm_step_(matrix(18), None, matrix(), matrix(), matrix()), "gates"),
        (lambda: ops.lstm_step_(matrix(24), matrix(), matrix(), matrix(), matrix()), "bias"),
        (lambda: ops.lstm_step_(matrix(24), None, matrix()[0], matrix(), matrix()), "cell"),
        (
            lambda: ops.lstm_step_(matrix(24), None, matrix(), matrix().double(), matrix()),
            "next_cell",
        ),
        (
            lambda: ops.lstm_step_(matrix(24), None, matrix(), matrix(), torch.zeros(6, 4).t()),
            "hidden",
        ),
        (
            lambda: ops.lstm_step_backward_(
                matrix(24), matrix(), matrix()[:3], None, matrix(24), matrix(), matrix()
            ),
            "grad_output",
        ),
        (
            lambda: ops.gru_step_(matrix(18), matrix(6), None, matrix(), matrix(), matrix()),
            "product",
        ),
        (
            lambda: ops.gru_step_backward_(
                matrix(18), matrix(18), matrix(5), None, matrix(18), matrix(), matrix()
            ),
            "grad_hidden",
        ),
    ],
)
def test_compiled_steps_name_what_does_not_fit(call: Callable[[], None], argument: str) -> None:
    with pytest.raises(RuntimeError, match=f"_: {argument}: expected"):
        call()
