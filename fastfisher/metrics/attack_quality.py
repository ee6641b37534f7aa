"""How good a membership attack is, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FALSE_POSITIVE_RATES = (0.001, 0.01)


@dataclass(frozen=True)
class AttackQuality:
    """What an attack gets right of members and non-members.

    An unlearned model is to be compared with retrained ones: where these are attacked with an AUC
    of 0.5, less is as telling as more.

    Attributes:
        auc: area under the ROC curve: the probability that a member scores higher than a
            non-member, ties half; 0.5 is chance.
        best_balanced_accuracy: ``max over thresholds of (TPR + TNR) / 2``, in [0.5, 1]; an upper
            limit, since it is chosen on the samples that it is measured on.
        balanced_accuracy: ``(TPR + TNR) / 2`` of the attack's own decisions, in [0, 1]; ``None``
            for an attack that only ranks.
        tpr: for each false positive rate, the largest true positive rate of a threshold with at
            most that rate. Below one over the number of non-members that means none.
    """

    auc: float
    best_balanced_accuracy: float
    balanced_accuracy: float | None
    tpr: dict[float, float]


def attack_quality(
    scores: Tensor,
    members: Tensor,
    decisions: Tensor | None = None,
    false_positive_rates: Sequence[float] = _FALSE_POSITIVE_RATES,
) -> AttackQuality:
    """Quality of an attack's scores.

    Args:
        scores: higher means rather a member; any shape, infinite ones allowed.
        members: the truth, bool, of the same shape.
        decisions: the attack's own, bool, of the same shape.
        false_positive_rates: of :attr:`AttackQuality.tpr`, in [0, 1].

    Raises:
        ValueError: shapes differ, a score is NaN, a rate is out of range, or there are no members
            or no non-members.
        TypeError: ``members`` or ``decisions`` is not bool.
    """
    from sklearn.metrics import auc, roc_curve

    for name, mask in (("members", members), ("decisions", decisions)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected bool, got {mask.dtype}")
        if mask.shape != scores.shape:
            raise ValueError(
                f"{name}: expected the shape of scores {tuple(scores.shape)}, "
                f"got {tuple(mask.shape)}"
            )
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected no NaN")
    if not bool(members.any()) or bool(members.all()):
        raise ValueError("members: expected at least one member and one non-member")
    for rate in false_positive_rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"false_positive_rates: must be in [0, 1], got {rate!r}")
    # Ranks in the place of scores: the curve is the same, and they are finite.
    ranks = scores.flatten().unique(return_inverse=True)[1]
    false_rate, true_rate, _ = roc_curve(
        members.flatten().cpu().numpy(), ranks.cpu().numpy(), drop_intermediate=False
    )
    return AttackQuality(
        auc=float(auc(false_rate, true_rate)),
        best_balanced_accuracy=float((1 + (true_rate - false_rate).max()) / 2),
        balanced_accuracy=None if decisions is None else _balanced(decisions, members),
        tpr={rate: float(true_rate[false_rate <= rate].max()) for rate in false_positive_rates},
    )


def _balanced(decisions: Tensor, members: Tensor) -> float:
    hits = decisions[members].double().mean() + (~decisions[~members]).double().mean()
    return float(hits) / 2
