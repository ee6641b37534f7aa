"""A metric beside the same metric of several retrained models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gap:
    """How far a metric of a method is from that of models retrained without the forget set.

    Attributes:
        value: of the method.
        mean: of the retrained models.
        spread: standard deviation of the retrained models, divided by their number - 1; ``None``
            for one model, which says nothing of it.
        gap: ``value - mean``, signed. Within about one spread a method cannot be told from a
            retrained model by this metric.
    """

    value: float
    mean: float
    spread: float | None
    gap: float


def gap(value: float, references: Sequence[float]) -> Gap:
    """Compare a metric with that of retrained models.

    Args:
        value: the method's.
        references: one value for each retrained model, of different seeds.

    Raises:
        ValueError: there are no references, or a number is not finite.
    """
    if not references:
        raise ValueError("references: expected the metric of at least one retrained model")
    for name, number in (("value", value), *(("references", each) for each in references)):
        if not math.isfinite(number):
            raise ValueError(f"{name}: expected finite numbers, got {number!r}")
    mean = statistics.fmean(references)
    spread = statistics.stdev(references) if len(references) > 1 else None
    return Gap(float(value), mean, spread, value - mean)
