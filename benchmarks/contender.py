"""What a contender is: how it is prepared, run and read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from benchmarks.registry import Problem

Values = Mapping[str, Tensor]
Options = Mapping[str, int]
"""A rival's own settings; :func:`benchmarks.measure.by_speed` tries them."""

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
        candidates: options to try, in order; the fastest that are right compete.
        trial: prepares what the options are tried on, if not the contender itself, which may take
            minutes to compile.
        package: the distribution of its library, whose version rows state.
        install: the command that provides its library.
        inexact: by design it computes another number on some layers. It gets a time all the same,
            and is shown as inexact.
    """

    name: str
    title: str
    prepare: Callable[[Problem, Options], Call]
    quantity: str = "sum_grad_squared"
    candidates: Callable[[Problem], Iterable[Options]] = _only_defaults
    trial: Callable[[Problem, Options], Call] | None = None
    package: str = ""
    install: str = ""
    inexact: bool = False
