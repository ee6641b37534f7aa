"""How much an accuracy moves from epoch to epoch (paper, section 4.1 and Table 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

VolatilityKind = Literal["total_variation", "max_drawup", "paper_formula", "paper_code"]
Part = Literal["remain", "forget"]


def volatility(
    curve: Sequence[float],
    kind: VolatilityKind = "total_variation",
    part: Part = "remain",
) -> float:
    """Volatility of a curve ``a_0 .. a_T``: ``a_0`` before fine-tuning, then one value an epoch.

    * "total_variation": ``mean |a_t - a_(t-1)|`` over the T steps, at least 0; 0 is a flat curve.
      This one measures what the name says.
    * "max_drawup": ``max over s <= t of a_t - a_s``, at least 0: how much comes back at most. Of a
      forget curve, memory that returns.
    * "paper_formula": the paper's sums, divided by T - 1. They telescope, to
      ``(a_T - a_0) / (T - 1)`` for the remain set and ``(a_0 - a_T) / (T - 1)`` for the forget set:
      signed, and blind to everything between the two ends. **No measure of stability.**
    * "paper_code": what the paper's Table 1 shows, by its authors' code: ``a_T - a_0`` for the
      remain set, and for the forget set the last step only, ``a_(T-1) - a_T``. **No measure of
      stability either.**

    Args:
        curve: T + 1 accuracies, in any unit; the result has the same unit.
        kind: which definition.
        part: whose accuracies they are; only the two kinds of the paper depend on it.

    Raises:
        ValueError: an unknown ``kind`` or ``part``, fewer than two values (three for
            "paper_formula", which divides by T - 1), or a value that is not finite.
    """
    if kind not in get_args(VolatilityKind):
        raise ValueError(f"kind: expected one of {get_args(VolatilityKind)}, got {kind!r}")
    if part not in get_args(Part):
        raise ValueError(f"part: expected one of {get_args(Part)}, got {part!r}")
    fewest = 3 if kind == "paper_formula" else 2
    if len(curve) < fewest or not all(map(math.isfinite, curve)):
        raise ValueError(f"curve: {kind!r} needs {fewest} finite values or more, got {curve!r}")
    values = np.asarray(curve, dtype=np.float64)
    if kind == "total_variation":
        result = np.abs(np.diff(values)).mean()
    elif kind == "max_drawup":
        result = (values - np.minimum.accumulate(values)).max()
    elif kind == "paper_formula":
        rise = (values[-1] - values[0]) / (len(values) - 2)
        result = rise if part == "remain" else -rise
    else:
        result = values[-1] - values[0] if part == "remain" else values[-2] - values[-1]
    return float(result)
