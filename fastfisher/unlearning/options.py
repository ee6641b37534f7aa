"""What the hyper-parameters of several methods have in common, and how bad ones are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Raise unless ``value`` is a finite number within the bounds.

    Args:
        name: of the argument, as the user wrote it.
        value: that was given for it.
        above: it must be larger than this.
        at_least: it must not be smaller than this.
        at_most: it must not be larger than this.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and above < value and at_least <= value <= at_most):
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("above", above), ("at least", at_least), ("at most", at_most))
            if math.isfinite(bound)
        ]
        raise ValueError(f"{name}: must be {' and '.join(['finite', *bounds])}, got {value!r}")


@dataclass(frozen=True)
class TrainingOptions:
    """Of a method that trains in a way of its own.

    Attributes:
        lr: learning rate in place of the recipe's, which was chosen to train from scratch; ``None``
            keeps the recipe's. Its schedule stays.
    """

    lr: float | None = 0.01

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        if self.lr is not None:
            check_number("options.lr", self.lr, above=0)
