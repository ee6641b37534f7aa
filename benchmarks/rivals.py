"""The contenders: each way of computing the sum of squared per-sample gradients of a batch.

To add one, write a ``prepare`` function that returns a :class:`Call` and add a :class:`Rival` to
:data:`RIVALS`. Import its library inside ``prepare``: one that is absent must cost its own rows
only. ``prepare`` owns the model it is given and must be importable by name (no lambdas).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import libraries
from benchmarks.contender import NO_OPTIONS, Call, Options, Rival, Values
from benchmarks.registry import Problem
from fastfisher.reference import sum_grad_squared_func, sum_grad_squared_loop

__all__ = ["NO_OPTIONS", "PLAIN", "RIVALS", "Call", "Options", "Rival", "Values"]


def _plain(problem: Problem, _options: Options) -> Call:
    model, summed = problem.model, problem.loss.summed()

    def run() -> Values:
        summed(model(problem.inputs), problem.targets).backward()
        return {}

    def read(_outcome: Values) -> Values:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return Call(run, read, reset=lambda: model.zero_grad(set_to_none=True))


def _fisher_diag(problem: Problem, _options: Options) -> Call:
    from fastfisher import FisherDiag, fisher_diag

    def run() -> Values:
        batch = (problem.inputs, problem.targets)
        return fisher_diag(problem.model, [batch], loss=problem.loss.name, reduction="sum")

    def note(outcome: Values) -> str:
        if not isinstance(outcome, FisherDiag):
            raise TypeError(f"fisher_diag returned {type(outcome).__name__}, not FisherDiag")
        rules = Counter(outcome.rules.values()).most_common()
        return ", ".join(f"{count} {rule}" for rule, count in rules)

    return Call(run, note=note)


def _torch_func(problem: Problem, options: Options) -> Call:
    return _by_chunks(problem, sum_grad_squared_func, options.get("chunk_size"))


def _torch_func_compiled(problem: Problem, options: Options) -> Call:
    # Every chunk size is a graph of its own: with symbolic sizes the C++ is slower.
    compiled = torch.compile(sum_grad_squared_func, dynamic=False)
    return _by_chunks(problem, compiled, options.get("chunk_size"))


def _by_chunks(
    problem: Problem, sum_grad_squared: Callable[..., dict[str, Tensor]], chunk_size: int | None
) -> Call:
    inputs, targets, names = problem.inputs, problem.targets, problem.names
    step = chunk_size or inputs.shape[0]
    chunks = list(zip(inputs.split(step), targets.split(step), strict=True))

    def run() -> Values:
        totals: dict[str, Tensor] = {}
        # vmap has no rule for the CPU's fused attention and falls back to a loop: 1.4x slower.
        # It has none for BatchNorm in eval mode either, and warns.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x, y in chunks:
                part = sum_grad_squared(problem.model, x, y, problem.loss.per_sample, names)
                for name, value in part.items():
                    totals[name] = totals[name].add_(value) if name in totals else value
        return totals

    return Call(run)


def _chunk_sizes(problem: Problem) -> Iterable[Options]:
    """Doubling chunk sizes up to the batch, as long as their gradients fit the machine."""
    samples = problem.inputs.shape[0]
    device = problem.inputs.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Per sample: the float32 gradients and, at worst, their squares. Half of the memory at most.
    fitting = memory // 2 // (2 * 4 * problem.scalars)
    size = min(4, samples)
    while True:
        yield {"chunk_size": size}
        if size == samples or 2 * size > fitting:
            return
        size = min(2 * size, samples)


def _loop(problem: Problem, _options: Options) -> Call:
    def run() -> Values:
        return sum_grad_squared_loop(
            problem.model,
            problem.inputs,
            problem.targets,
            problem.loss.per_sample,
            problem.names,
        )

    return Call(run)


PLAIN = "plain"
"""The unit: every ratio is to this contender."""

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival(
            PLAIN,
            "forward + backward with all parameter gradients (the unit, always run)",
            _plain,
            quantity="gradient",
        ),
        Rival("fisher_diag", "fastfisher.fisher_diag", _fisher_diag),
        Rival(
            "torch_func",
            "torch.func vmap(grad) at its fastest chunk size, then square and sum",
            _torch_func,
            candidates=_chunk_sizes,
        ),
        Rival(
            "torch_func_whole",
            "the same with all samples of the batch at once, as tutorials write it",
            _torch_func,
        ),
        Rival(
            "torch_func_compiled",
            "the same under torch.compile, at the chunk size that is fastest without",
            _torch_func_compiled,
            candidates=_chunk_sizes,
            trial=_torch_func,
        ),
        Rival("loop", "one backward pass per sample", _loop),
        Rival(
            "backpack",
            "BackPACK SumGradSquared, with opt_einsum, at its faster convolution mode",
            libraries.backpack,
            candidates=libraries.backpack_modes,
            package="backpack-for-pytorch",
            install="pip install backpack-for-pytorch opt_einsum",
        ),
        Rival(
            "nngeometry",
            "NNGeometry, diagonal of the loss gradients' covariance, at its faster convolution",
            libraries.nngeometry,
            candidates=libraries.nngeometry_modes,
            package="nngeometry",
            install="pip install nngeometry",
        ),
        Rival(
            "opacus",
            "Opacus per-sample gradients by its own rules, then square and sum",
            libraries.opacus_hooks,
            package="opacus",
            install="pip install opacus",
        ),
        Rival(
            "opacus_functorch",
            "Opacus per-sample gradients by vmap of each layer, then square and sum",
            libraries.opacus_functorch,
            package="opacus",
            install="pip install opacus",
        ),
        Rival(
            "kronfluence",
            'kronfluence, strategy "diagonal"',
            libraries.kronfluence,
            candidates=libraries.kronfluence_modes,
            package="kronfluence",
            install="pip install kronfluence",
        ),
        Rival(
            "asdl",
            "ASDL, empirical Fisher, diagonal; inexact: tokens and small maps count as samples",
            libraries.asdl,
            package="asdfghjkl",
            install="pip install asdfghjkl",
            inexact=True,
        ),
    )
}
