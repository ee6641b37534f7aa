"""The operators keep torch's contract, and both kernels of each agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastfisher import ops

OPS = torch.ops.fastfisher
G3, X3 = torch.randn(3, 5, 4), torch.randn(3, 5, 7)
IMAGES, GRADS = torch.randn(2, 4, 6, 6), torch.randn(2, 6, 6, 6)
TOKENS = torch.randint(0, 9, (3, 5))


CASES: dict[str, tuple[str, tuple]] = {
    "linear": ("linear_sum_grad_squared_", (torch.zeros(4, 7), G3, X3, 0.5)),
    "linear empty": (
        "linear_sum_grad_squared_",
        (torch.zeros(4, 7), G3[:0], X3[:0], 1.0),
    ),
    "linear strided": (
        "linear_sum_grad_squared_",
        (torch.zeros(7, 4).t(), torch.randn(3, 4, 5).mT, torch.randn(3, 5, 14)[..., ::2], 1.0),
    ),
    "linear bfloat16": (
        "linear_sum_grad_squared_",
        (torch.zeros(4, 7), G3.bfloat16(), X3.bfloat16(), 0.5),
    ),
    "conv2d bfloat16": (
        "conv2d_sum_grad_squared_",
        (
            torch.zeros(6, 4, 3, 3),
            GRADS.bfloat16(),
            IMAGES.bfloat16(),
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            2.0,
        ),
    ),
    "conv2d": (
        "conv2d_sum_grad_squared_",
        (torch.zeros(6, 2, 3, 3), GRADS, IMAGES, [1, 1], [1, 1], [1, 1], 2, 2.0),
    ),
    "conv2d channels_last": (
        "conv2d_sum_grad_squared_",
        (
            torch.zeros(6, 4, 3, 3).to(memory_format=torch.channels_last),
            GRADS.to(memory_format=torch.channels_last),
            IMAGES.to(memory_format=torch.channels_last),
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            1.0,
        ),
    ),
    "channel": (
        "channel_sum_grad_squared_",
        (
            torch.zeros(4),
            torch.zeros(4),
            G3,
            torch.randn(3, 5, 4),
            torch.randn(4).expand(3, 5, 4),
            torch.rand(3, 5, 1).expand(3, 5, 4),
            None,
            None,
            1.0,
        ),
    ),
    "channel with the input's gradient": (
        "channel_sum_grad_squared_",
        (
            torch.zeros(4),
            torch.zeros(4),
            G3,
            torch.randn(3, 5, 4),
            torch.randn(4).expand(3, 5, 4),
            torch.rand(4).expand(3, 5, 4),
            torch.empty(3, 5, 4),
            torch.randn(4),
            1.0,
        ),
    ),
    "channel bias": (
        "channel_sum_grad_squared_",
        (None, torch.zeros(4), G3, None, None, None, None, None, 1.0),
    ),
    "channel strided": (
        "channel_sum_grad_squared_",
        (None, torch.zeros(8)[::2], G3, None, None, None, None, None, 1.0),
    ),
    "embedding": ("embedding_sum_grad_squared_", (torch.zeros(9, 4), G3, TOKENS, 3, 1.0)),
    "embedding strided": (
        "embedding_sum_grad_squared_",
        (torch.zeros(4, 9).t(), G3, TOKENS, 3, 1.0),
    ),
    "depthwise": (
        "conv2d_sum_grad_squared_",
        (torch.zeros(4, 1, 1, 1), GRADS[:, :4], IMAGES, [1, 1], [0, 0], [1, 1], 4, 2.0),
    ),
}
# The same with absolute values in place of squares.
POWERS = CASES | {f"{case}, power 1": (name, (*args, 1)) for case, (name, args) in CASES.items()}


def rows(columns: int) -> Tensor:
    return torch.randn(3, columns)


STEPS: dict[str, tuple[str, tuple]] = {
    "lstm": ("lstm_step_", (rows(20), torch.randn(20), rows(5), rows(5), rows(5))),
    "lstm without bias": ("lstm_step_", (rows(20), None, rows(5), rows(5), rows(5))),
    "lstm backward": (
        "lstm_step_backward_",
        (rows(20), rows(5), rows(5), None, rows(20), rows(5), rows(5)),
    ),
    "gru": ("gru_step_", (rows(15), rows(15), torch.randn(15), rows(5), rows(5), rows(5))),
    "gru backward": (
        "gru_step_backward_",
        (rows(15), rows(15), rows(5), rows(5), rows(15), rows(5), rows(5)),
    ),
}
CASES = POWERS | STEPS


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    name, arguments = CASES[case]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("case", CASES)
def test_compiled_kernel_equals_the_plain_torch_kernel(case: str) -> None:
    name, arguments = CASES[case]
    defaults: dict[str, Callable] = {
        "linear_sum_grad_squared_": ops._linear_default,
        "conv2d_sum_grad_squared_": ops._conv2d_default,
        "channel_sum_grad_squared_": ops._channel_default,
        "embedding_sum_grad_squared_": ops._embedding_default,
        "lstm_step_": ops._lstm_step_default,
        "lstm_step_backward_": ops._lstm_step_backward_default,
        "gru_step_": ops._gru_step_default,
        "gru_step_backward_": ops._gru_step_backward_default,
    }
    fast = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    plain = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    getattr(OPS, name).default(*fast)
    defaults[name](*plain)
    for a, b in zip(fast, plain, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)


def test_in_place_means_in_place() -> None:
    out = torch.ones(4, 7)
    pointer, version = out.data_ptr(), out._version
    ops.linear_sum_grad_squared_(out, G3, X3, alpha=-1.0)
    assert out.data_ptr() == pointer
    assert out._version > version
    expected = 1 - ops.linear_per_sample_grad(G3, X3).square().sum(0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", [(5, 16, 16, 9), (3, 3, 4, 33), (2, 64, 40, 4)], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], threads: int) -> None:
    samples, channels, rows, size = shape
    x, g = torch.randn(samples, channels, size, size), torch.randn(samples, rows, size, size)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            conv, weight, bias = (
                torch.zeros(rows, channels, 3, 3),
                torch.zeros(rows),
                torch.zeros(rows),
            )
            ops.conv2d_sum_grad_squared_(conv, g, x, padding=(1, 1))
            positions = g.flatten(2).mT
            ops.channel_sum_grad_squared_(weight, bias, positions, positions * 2)
            table = torch.zeros(size, size)
            ops.embedding_sum_grad_squared_(
                table, x[:, 0], torch.arange(size).expand(samples, size) // 2
            )
            results.append((conv, weight, bias, table))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.linear_sum_grad_squared_(torch.zeros(4, 8), G3, X3),
            r"out: expected \[O, I\]",
        ),
        (lambda: ops.linear_sum_grad_squared_(torch.zeros(4, 7), G3, X3[:2]), "input: expected"),
        (
            lambda: ops.linear_sum_grad_squared_(torch.zeros(4, 7), G3, X3, power=3),
            "power: expected 1 or 2",
        ),
        (
            lambda: ops.linear_sum_grad_squared_(torch.zeros(4, 7), G3, X3.double()),
            "grad, input: expected the dtype of out",
        ),
        (
            lambda: ops.conv2d_sum_grad_squared_(
                torch.zeros(6, 4, 3, 3).double(), GRADS.bfloat16(), IMAGES.bfloat16()
            ),
            "grad, input: expected the dtype of out",
        ),
        (lambda: ops.channel_sum_grad_squared_(None, None, G3), "at least one"),
        (lambda: ops.channel_sum_grad_squared_(torch.zeros(4), None, G3), "input: expected"),
        (
            lambda: ops.embedding_sum_grad_squared_(torch.zeros(9, 5), G3, TOKENS),
            "grad: expected",
        ),
        (
            lambda: ops.conv2d_sum_grad_squared_(torch.zeros(6, 4, 3, 3), GRADS, IMAGES, groups=0),
            "out: expected",
        ),
    ],
)
def test_bad_shapes_name_the_argument(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not ops.build_info()["compiled"], reason="no compiled module")
def test_compiled_kernels_check_what_they_read() -> None:
    with pytest.raises(RuntimeError, match="index"):
        ops.embedding_sum_grad_squared_(torch.zeros(9, 4), G3, TOKENS + 9)
    with pytest.raises(RuntimeError, match="height and width"):
        ops.conv2d_sum_grad_squared_(torch.zeros(6, 4, 3, 3), GRADS, IMAGES)
    for name, arguments in POWERS.values():
        schema = getattr(OPS, name).default._schema
        power = [argument.name for argument in schema.arguments].index("power")
        with pytest.raises(RuntimeError, match="power: expected 1 or 2"):
            getattr(OPS, name).default(*arguments[:power], 3)
    with pytest.raises(RuntimeError, match="dtype of out"):
        OPS.linear_sum_grad_squared_.default(torch.zeros(4, 7), G3.double(), X3, 1.0)


def test_compile_traces_without_a_break() -> None:
    def step(out: Tensor, grad: Tensor, input: Tensor) -> Tensor:
        grad = grad * 2
        OPS.linear_sum_grad_squared_.default(out, grad, input, 1.0)
        return out.sum()

    eager, traced = torch.zeros(4, 7), torch.zeros(4, 7)
    expected = step(eager, G3, X3)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(traced, G3, X3)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(traced, eager)


@pytest.mark.skipif(not ops.build_info()["compiled"], reason="no compiled module")
def test_a_kernel_that_does_not_fit_its_input_is_refused() -> None:
    out, grad, images = torch.zeros(2, 2, 4, 4), torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 3, 3)
    with pytest.raises(RuntimeError, match="height and width"):
        OPS.conv2d_sum_grad_squared_.default(out, grad, images, [2, 2], [0, 0], [1, 1], 1, 1.0)
