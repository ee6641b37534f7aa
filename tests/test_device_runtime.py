"""What only a GPU can show of the operators: streams, graphs, layouts, sizes, whole models.

Skipped where no CUDA device is visible; ``make gpu`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastfisher
from fastfisher import backends, fisher_diag, fisher_mask_, ops

from .oracle import assert_exact
from .zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    with fastfisher.backend(request.param):
        yield request.param


def linear(out: Tensor, g: Tensor, x: Tensor) -> None:
    ops.linear_sum_grad_squared_(out, g, x)


def conv(out: Tensor, g: Tensor, x: Tensor) -> None:
    ops.conv2d_sum_grad_squared_(out, g, x, padding=(1, 1))


def channel(out: Tensor, g: Tensor, x: Tensor) -> None:
    ops.channel_sum_grad_squared_(out, None, g, x)


CALLS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], None], tuple[tuple[int, ...], ...]]] = {
    "linear": (linear, ((33, 65), (7, 50, 33), (7, 50, 65))),
    "conv": (conv, ((20, 9, 3, 3), (5, 20, 14, 13), (5, 9, 14, 13))),
    "channel": (channel, ((33,), (7, 50, 33), (7, 50, 33))),
}


def operands(name: str) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    out, *rest = (torch.randn(s, device="cuda", generator=generator) for s in CALLS[name][1])
    return out.zero_(), *rest


def exact(name: str, *tensors: Tensor) -> Tensor:
    with fastfisher.backend("torch"):
        out, *rest = (each.double() for each in tensors)
        CALLS[name][0](out, *rest)
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_replays_the_call(name: str) -> None:
    out, g, x = operands(name)
    CALLS[name][0](out, g, x)  # compiles what is compiled on first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        CALLS[name][0](out, g, x)
    g.copy_(torch.randn_like(g))
    expected = 2 * exact(name, torch.zeros_like(out), g, x)
    out.zero_()
    graph.replay()
    graph.replay()
    assert_close(out, expected)


@pytest.mark.parametrize("name", CALLS)
def test_work_goes_to_the_current_stream(name: str) -> None:
    out, g, x = operands(name)
    expected = exact(name, out, 2 * g, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 30 ms: another stream would be too early
        doubled = g * 2
        CALLS[name][0](out, doubled, x)
    stream.synchronize()
    assert_close(out, expected)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(name: str) -> None:
    results = []
    for _ in range(5):
        out, g, x = operands(name)
        CALLS[name][0](out, g, x)
        results.append(out)
    assert all(torch.equal(results[0], each) for each in results)


def test_products_are_rounded_only_where_torch_may() -> None:
    out, g, x = operands("linear")
    expected = exact("linear", out, g, x)
    linear(out, g, x)
    assert_close(out, expected)
    rounded = torch.zeros_like(out)
    ops.linear_sum_grad_squared_(rounded, g, x, allow_tf32=True)
    error = float((rounded - expected).abs().max() / expected.abs().max())
    assert error < 5e-3


def test_offsets_beyond_31_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of memory")
    big = torch.randn(2, 1 << 31, device="cuda", dtype=torch.bfloat16)
    g = big[:, : 50 * 33].view(2, 50, 33)
    x = big[:, -50 * 65 :].view(2, 50, 65)
    out = torch.zeros(33, 65, device="cuda")
    linear(out, g, x)
    assert_close(out, exact("linear", torch.zeros_like(out), g, x))


@pytest.mark.parametrize("name", ZOO)
def test_models_on_the_device_equal_the_loop(name: str) -> None:
    case = ZOO[name]()
    result = assert_exact(
        case.model.cuda(),
        case.inputs.cuda(),
        case.targets.cuda(),
        dtype=torch.float32,
        fallback=set(case.fallback),
    )
    assert {value.device.type for value in result.values()} == {"cuda"}


def test_a_mask_on_the_device_is_the_mask_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10)).cuda()
    batch = [(torch.randn(32, 64, device="cuda"), torch.randint(0, 10, (32,), device="cuda"))]
    forget, remain = fisher_diag(model, batch), fisher_diag(model, batch)
    twin = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    twin.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    mask = fisher_mask_(model, forget, remain, ratio=0.1, remain_weight=0.5)
    with fastfisher.backend(None):
        fisher_mask_(
            twin,
            {key: value.cpu() for key, value in forget.items()},
            {key: value.cpu() for key, value in remain.items()},
            ratio=0.1,
            remain_weight=0.5,
        )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)
    mask.undo_(model)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
