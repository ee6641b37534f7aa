"""The operators live in torch: opcheck, meta tensors, and programs traced without a break."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastfisher import backends, ops

from . import test_ops

NAMES = [schema.partition("(")[0] for schema in ops.SCHEMAS]
GPU = torch.device("cuda:0")


def arguments_of(name: str) -> list[Any]:
    """Arguments of the operator that have a tensor wherever one may be."""
    given = [arguments for each, arguments in test_ops.CASES.values() if each == name]
    most = max(given, key=lambda each: sum(isinstance(a, Tensor) for a in each))
    return [a.clone() if isinstance(a, Tensor) else a for a in most]


def test_every_operator_is_checked() -> None:
    assert {name for name, _ in test_ops.CASES.values()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_plain_torch_kernels_pass_opcheck(name: str) -> None:
    operator = getattr(torch.ops.fastfisher_torch, name).default
    torch.library.opcheck(operator, tuple(arguments_of(name)))


def interpreted(code: str) -> str:
    """What code prints where triton interprets, which is settled when triton is imported."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_twins_pass_opcheck() -> None:
    code = """
import torch
import fastfisher.triton
from tests.test_torch_contract import NAMES, arguments_of
for name in NAMES:
    operator = getattr(torch.ops.fastfisher_triton, name).default
    torch.library.opcheck(operator, tuple(arguments_of(name)))
print(len(NAMES))
"""
    assert int(interpreted(code)) == len(NAMES)


def test_triton_refuses_a_token_that_is_out_of_range() -> None:
    code = """
import torch
import fastfisher.triton
embedding = torch.ops.fastfisher_triton.embedding_sum_grad_squared_
fails = torch._assert_async
for token in (9, -1, 2**40):
    tokens = torch.tensor([[1, 3, token, 3]])
    out, grad = torch.zeros(11, 4)[1:10], torch.ones(1, 4, 4)
    try:
        embedding(out, grad, tokens, -1, 1.0)
    except RuntimeError as error:
        print("index: expected 0 <= index < 9" in str(error), not out.any())
    # A GPU says so when the kernels have run; they must not have written anywhere else.
    torch._assert_async = lambda condition, message: None
    embedding(out, grad, tokens, -1, 1.0)
    torch._assert_async = fails
    print(out._base.sum(1).tolist() == [0, 0, 4, 0, 16, 0, 0, 0, 0, 0, 0])
"""
    assert interpreted(code).splitlines() == ["True True", "True"] * 3


def shapes_that_do_not_fit(name: str) -> Iterator[tuple[str, list[Any]]]:
    """Each tensor of an operator in turn with a column more than it should have."""
    names = getattr(torch.ops.fastfisher, name).default._schema.arguments
    for i, tensor in enumerate(arguments_of(name)):
        if isinstance(tensor, Tensor):
            arguments = arguments_of(name)
            arguments[i] = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 1)
            yield names[i].name, arguments


@pytest.mark.parametrize("namespace", ["fastfisher", "fastfisher_torch"])
@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_that_do_not_fit_are_refused(name: str, namespace: str) -> None:
    operator = getattr(getattr(torch.ops, namespace), name).default

    def call(arguments: Sequence[Any]) -> None:
        operator(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))

    call(arguments_of(name))
    for argument, arguments in shapes_that_do_not_fit(name):
        with pytest.raises(ValueError, match=rf"fastfisher::{name}: \w+: expected"):
            call(arguments)
            pytest.fail(f"{argument} of another shape was taken")


# A small network that has a layer of each family, and a training step of it.
Gradients = Callable[..., tuple[Tensor, list[Tensor], dict[str, Tensor]]]


def parameters(device: str | torch.device) -> dict[str, Tensor]:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).requires_grad_()

    return {
        "convolution": numbers(6, 3, 3, 3),
        "bias": numbers(6),
        "table": numbers(11, 5),
        "recurrence": numbers(16, 5),
        "head": numbers(4, 6),
    }


def batch(device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.randn(2, 3, 8, 8, device=device)
    tokens = torch.randint(11, (2, 7), device=device)
    return image, tokens, torch.randint(4, (2,), device=device)


def by_autograd(
    p: dict[str, Tensor], image: Tensor, tokens: Tensor, target: Tensor
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The loss, the parameters' gradients, and what the operators read."""
    features = F.conv2d(image, p["convolution"], p["bias"], padding=1)
    positions = features.relu().flatten(2).mT
    logits = positions @ p["head"].t()
    looked = F.embedding(tokens, p["table"])
    gates = looked.sum(1) @ p["recurrence"].t()
    i, _, g, o = gates.chunk(4, 1)
    hidden = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    loss = F.cross_entropy(logits.sum(1) + hidden, target, reduction="sum")
    inner = (features, looked, logits)
    gradients = torch.autograd.grad(loss, [*p.values(), *inner])
    seen = dict(zip(("features", "looked", "logits"), gradients[len(p) :], strict=True))
    return loss.detach(), list(gradients[: len(p)]), {**seen, "positions": positions.detach()}


@torch.no_grad()
def by_hand(
    p: dict[str, Tensor], image: Tensor, tokens: Tensor, target: Tensor
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The same without autograd, whose engine wants a device where tensors are on one."""
    features = F.conv2d(image, p["convolution"], p["bias"], padding=1)
    positions = features.relu().flatten(2).mT
    logits = positions @ p["head"].t()
    looked = F.embedding(tokens, p["table"])
    summed = looked.sum(1)
    gates = summed @ p["recurrence"].t()
    cell = gates.new_zeros(2, 4)
    next_cell, hidden = torch.empty_like(cell), torch.empty_like(cell)
    ops.lstm_step_(gates, None, cell, next_cell, hidden)
    scores = logits.sum(1) + hidden
    loss = F.cross_entropy(scores, target, reduction="sum")

    at_scores = scores.softmax(1) - F.one_hot(target, 4)
    at_gates = torch.empty_like(gates)
    ops.lstm_step_backward_(at_gates, cell.clone(), at_scores, None, gates, cell, next_cell)
    at_looked = (at_gates @ p["recurrence"]).unsqueeze(1).expand_as(looked).contiguous()
    at_logits = at_scores.unsqueeze(1).expand_as(logits).contiguous()
    at_features = ((at_logits @ p["head"]).mT.reshape(features.shape)) * (features > 0)
    _, at_convolution, at_bias = torch.ops.aten.convolution_backward(
        at_features, image, p["convolution"], [6], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        [False, True, True],
    )  # fmt: skip
    at_table = torch.zeros_like(p["table"])
    at_table.index_add_(0, tokens.flatten(), at_looked.flatten(0, 1))
    at_head = torch.einsum("nto,ntc->oc", at_logits, positions)
    gradients = [at_convolution, at_bias, at_table, at_gates.t() @ summed, at_head]
    seen = {"features": at_features, "looked": at_looked, "logits": at_logits}
    return loss, gradients, {**seen, "positions": positions}


def training_step(
    gradients_of: Gradients,
    p: dict[str, Tensor],
    sums: dict[str, Tensor],
    image: Tensor,
    tokens: Tensor,
    target: Tensor,
) -> Tensor:
    """Loss, gradients, squares of the samples' gradients, update."""
    loss, gradients, seen = gradients_of(p, image, tokens, target)
    with torch.no_grad():
        at_features = seen["features"]
        ops.conv2d_sum_grad_squared_(
            sums["convolution"], at_features, image, padding=(1, 1), alpha=0.5
        )
        ops.channel_sum_grad_squared_(None, sums["bias"], at_features.flatten(2).mT, alpha=0.5)
        ops.embedding_sum_grad_squared_(sums["table"], seen["looked"], tokens, alpha=0.5)
        ops.linear_sum_grad_squared_(sums["head"], seen["logits"], seen["positions"], alpha=0.5)
        for parameter, gradient in zip(p.values(), gradients, strict=True):
            parameter.sub_(gradient, alpha=0.1)
    return loss


CALLED = {
    "conv2d_sum_grad_squared_",
    "channel_sum_grad_squared_",
    "embedding_sum_grad_squared_",
    "linear_sum_grad_squared_",
}
STEPS = {"lstm_step_", "lstm_step_backward_"}


def traced(gradients_of: Gradients, device: str | torch.device) -> tuple[list[Tensor], set[str]]:
    """All that a compiled step leaves behind, and the operators in its one graph."""
    p, data = parameters(device), batch(device)
    sums = {name: torch.zeros_like(each, requires_grad=False) for name, each in p.items()}
    torch.compiler.reset()
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(training_step, fullgraph=True, backend=recorded)
    with warnings.catch_warnings(), torch._dynamo.config.patch(trace_autograd_ops=True):
        warnings.simplefilter("error")
        loss = compiled(gradients_of, p, sums, *data)
    (graph,) = recorded.graphs
    called = {
        parts[1]
        for node in graph.graph.nodes
        if (parts := str(node.target).split("."))[0].startswith("fastfisher")
    }
    return [loss, *p.values(), *sums.values()], called


@pytest.mark.parametrize("gradients_of", [by_autograd, by_hand], ids=lambda each: each.__name__)
def test_a_training_step_compiles_to_one_graph(gradients_of: Gradients) -> None:
    torch.manual_seed(0)
    actual, called = traced(gradients_of, "cpu")
    assert called == (CALLED if gradients_of is by_autograd else CALLED | STEPS)
    torch.manual_seed(0)
    p, data = parameters("cpu"), batch("cpu")
    sums = {name: torch.zeros_like(each, requires_grad=False) for name, each in p.items()}
    loss = training_step(by_autograd, p, sums, *data)
    torch.testing.assert_close(actual, [loss, *p.values(), *sums.values()])


def test_a_training_step_of_a_gpu_compiles_to_one_graph() -> None:
    with FakeTensorMode():
        results, called = traced(by_hand, GPU)
        assert {each.device for each in results} == {GPU}
    assert called == CALLED | STEPS


def test_a_traced_program_follows_the_backend() -> None:
    def step(out: Tensor, grad: Tensor) -> None:
        ops.linear_sum_grad_squared_(out, grad, grad)

    def namespace() -> str:
        torch.compiler.reset()
        recorded = AotEagerAndRecordGraphs()
        torch.compile(step, fullgraph=True, backend=recorded)(torch.zeros(4, 4), test_ops.G3)
        (graph,) = recorded.graphs
        targets = [str(node.target) for node in graph.graph.nodes]
        (name,) = (each for each in targets if each.startswith("fastfisher"))
        return name.partition(".")[0]

    assert namespace() == "fastfisher"
    with backends.backend("torch"):
        assert namespace() == "fastfisher_torch"
