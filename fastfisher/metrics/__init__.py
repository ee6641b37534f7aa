"""What is measured of an unlearned model, and how far it is from retrained ones.

Most metrics are functions of :class:`Outputs` or of tensors, in float64. None is good or bad by
itself: :func:`gap` puts it beside that of models retrained without the forget set.
"""

from __future__ import annotations

from .attack_quality import AttackQuality, attack_quality
from .distance import (
    activation_distance,
    class_confusion,
    confusion_distance,
    confusion_shift,
    js_divergence,
    js_divergences,
    prediction_distance,
    zrf,
)
from .gaps import Gap, gap
from .likelihood import rmia, u_lira
from .membership import ShadowAttack, ThresholdAttack, fit_thresholds, membership_statistic
from .outputs import Outputs, outputs
from .readout import Relearning, forget_error, relearn_epochs
from .summary import average_gap, tug_of_war
from .volatility import volatility

__all__ = [
    "AttackQuality",
    "Gap",
    "Outputs",
    "Relearning",
    "ShadowAttack",
    "ThresholdAttack",
    "activation_distance",
    "attack_quality",
    "average_gap",
    "class_confusion",
    "confusion_distance",
    "confusion_shift",
    "fit_thresholds",
    "forget_error",
    "gap",
    "js_divergence",
    "js_divergences",
    "membership_statistic",
    "outputs",
    "prediction_distance",
    "relearn_epochs",
    "rmia",
    "tug_of_war",
    "u_lira",
    "volatility",
    "zrf",
]
