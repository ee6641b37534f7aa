"""Scores that say in one number how near a method comes to the retrained model."""

from __future__ import annotations

from math import isfinite


def tug_of_war(*, forget: float, remain: float, test: float) -> float:
    """``(1 - |forget|) (1 - |remain|) (1 - |test|)``, in [0, 1]; 1 is the retrained model.

    Zhao et al. 2024 (RUM). For their ToW-MIA give the difference of the membership attack's
    success in the place of ``forget``.

    Args:
        forget: accuracy on the forget set, the method's minus the retrained model's, in [-1, 1].
        remain: the same on the remain set.
        test: the same on the test set.

    Raises:
        ValueError: a difference is not in [-1, 1]; percentages are none.
    """
    score = 1.0
    for name, value in (("forget", forget), ("remain", remain), ("test", test)):
        if not -1 <= value <= 1:
            raise ValueError(
                f"{name}: expected a difference of fractions in [-1, 1], got {value!r}"
            )
        score *= 1 - abs(value)
    return score


def average_gap(*, unlearning: float, remain: float, test: float, membership: float) -> float:
    """``(|UA| + |RA| + |TA| + |MIA|) / 4`` of differences to the retrained model; at least 0.

    Fan et al. 2024 (SalUn, after Jia et al. 2023). Lower is closer; in the unit of its arguments.

    Args:
        unlearning: difference of the unlearning accuracy, 1 - accuracy on the forget set.
        remain: of the accuracy on the remain set.
        test: of the accuracy on the test set.
        membership: of the fraction of the forget set that a membership attack calls non-members
            (theirs is the confidence attack, :func:`fit_thresholds`); say which attack it is.

    Raises:
        ValueError: a difference is not finite.
    """
    differences = {
        "unlearning": unlearning,
        "remain": remain,
        "test": test,
        "membership": membership,
    }
    for name, value in differences.items():
        if not isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return sum(map(abs, differences.values())) / len(differences)
