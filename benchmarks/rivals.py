"""The contenders: each way of computing the sum of squared per-sample gradients of a batch.

To add one, write a ``prepare`` function that returns a :class:`Call` and add a :class:`Rival` to
:data:`RIVALS`. Import its library inside ``prepare``: one that is absent must cost its own rows
only. ``prepare`` owns the model it is given and must be importable by name (no lambdas).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd

from benchmarks.registry import Problem
from fastfisher.reference import sum_grad_squared_func, sum_grad_squared_loop

Values = Mapping[str, Tensor]
Options = Mapping[str, int]
"""A rival's own settings; :func:`benchmarks.measure.fastest_options` picks them."""

NO_OPTIONS: Options = {}


def _nothing() -> None:
    return None


def _as_values(outcome: Values) -> Values:
    return outcome


def _no_note(_outcome: object) -> str:
    return ""


@dataclass(frozen=True)
class Call:
    """One contender, ready to run on one problem.

    Attributes:
        run: the timed part; may be called any number of times.
        read: gives the values per parameter from what ``run`` returned; called before ``reset``.
        reset: puts the model back and frees what ``run`` left on it; not timed.
        note: what the table should say about this run, from what ``run`` returned.
    """

    run: Callable[[], Values]
    read: Callable[[Values], Values] = _as_values
    reset: Callable[[], None] = _nothing
    note: Callable[[Values], str] = _no_note


def _only_defaults(_problem: Problem) -> Iterable[Options]:
    return (NO_OPTIONS,)


@dataclass(frozen=True)
class Rival:
    """A contender.

    Attributes:
        name: how the command line calls it.
        title: one line for people.
        prepare: ``(problem, options) -> Call``.
        quantity: what it computes, and so what it is checked against: ``"sum_grad_squared"`` or
            ``"gradient"`` (of the summed loss: the plain pass).
        candidates: options to try, in order; the fastest compete.
        install: the command that provides its library.
    """

    name: str
    title: str
    prepare: Callable[[Problem, Options], Call]
    quantity: str = "sum_grad_squared"
    candidates: Callable[[Problem], Iterable[Options]] = _only_defaults
    install: str = ""


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
    def run() -> Values:
        # vmap has no rule for the CPU's fused attention and falls back to a loop: 1.4x slower.
        with sdpa_kernel(SDPBackend.MATH):
            return sum_grad_squared_func(
                problem.model,
                problem.inputs,
                problem.targets,
                problem.loss.per_sample,
                problem.names,
                chunk_size=options.get("chunk_size"),
            )

    return Call(run)


def _chunk_sizes(problem: Problem) -> Iterable[Options]:
    """Doubling chunk sizes up to the batch, as long as their gradients fit the machine."""
    samples = problem.inputs.shape[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Per sample: the float32 gradients and, at worst, their squares. Half of the machine at most.
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


def _backpack(problem: Problem, options: Options) -> Call:
    # Loaded by name: nothing here may need BackPACK for its type hints. Without opt_einsum,
    # torch.einsum contracts BackPACK's four-operand expression for sequences left to right and
    # builds N x S x D1 x D2 numbers; it is no dependency of BackPACK, but only fair to have.
    importlib.import_module("opt_einsum")
    backpack = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    convnd = importlib.import_module("backpack.core.derivatives.convnd")

    model = backpack.extend(problem.model)
    summed = backpack.extend(problem.loss.summed())
    save_memory = bool(options.get("save_memory", 0))

    def run() -> Values:
        # BackPACK warns of each layer it has no rule for; the check names those parameters.
        with (
            warnings.catch_warnings(),
            convnd.weight_jac_t_save_memory(save_memory),
            backpack.backpack(extensions.SumGradSquared()),
        ):
            warnings.simplefilter("ignore")
            summed(model(problem.inputs), problem.targets).backward()
        return {}

    def read(_outcome: Values) -> Values:
        named = model.named_parameters()
        return {n: p.sum_grad_squared for n, p in named if hasattr(p, "sum_grad_squared")}

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        for p in model.parameters():
            if hasattr(p, "sum_grad_squared"):
                del p.sum_grad_squared

    return Call(run, read, reset)


def _backpack_modes(problem: Problem) -> Iterable[Options]:
    """BackPACK has two ways through a convolution; which is faster depends on the layers."""
    if any(isinstance(m, _ConvNd) for m in problem.model.modules()):
        yield {"save_memory": 0}
        yield {"save_memory": 1}


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
        Rival("loop", "one backward pass per sample", _loop),
        Rival(
            "backpack",
            "BackPACK SumGradSquared, with opt_einsum, at its faster convolution mode",
            _backpack,
            candidates=_backpack_modes,
            install="pip install backpack-for-pytorch opt_einsum",
        ),
    )
}
