"""A case that each implementation of an operator is held to, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an operator with inputs of a fixed seed, and what has to come out.

    Attributes:
        name: says the shape and what is special about it; unique in its family.
        kernel: the CUDA kernel it is there for.
        run: takes the operators (an object with the operators of ``fastfisher.ops.SCHEMAS`` as
            attributes, such as ``torch.ops.fastfisher``), asserts that the result is right, and
            returns its relative error to the float64 oracle.
        small: cheap enough for interpreters and checkers, which are 10 to 1000 times slower.
    """

    name: str
    kernel: str
    run: Callable[[Any], float]
    small: bool = False


def first_small(cases: list[Case], per_kernel: int) -> list[Case]:
    """The first of the small cases of each kernel."""
    taken: dict[str, list[Case]] = {}
    for case in cases:
        if case.small and len(taken.setdefault(case.kernel, [])) < per_kernel:
            taken[case.kernel].append(case)
    return [case for group in taken.values() for case in group]
