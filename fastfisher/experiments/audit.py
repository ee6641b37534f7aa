"""Attacks with shadow models on what a method has unlearned."""

from __future__ import annotations

from typing import Any

import torch

from ..metrics.attack_quality import attack_quality
from ..metrics.likelihood import Variance, u_lira
from ..metrics.membership import ShadowAttack
from ..metrics.outputs import Outputs
from . import measure
from .engine import Setting
from .plan import Task

# The file of a task's outputs.
OUTPUTS = "outputs.safetensors"
# Below so many shadow models of a kind, one variance for all samples is the better estimate
# (Carlini et al. 2022).
_FEW = 64
_FEWEST = 2  # models of a kind, for it to have a variance


def run(task: Task, setting: Setting) -> dict[str, Any]:
    """Attack the models of one method, one of each seed.

    U-LiRA asks of each forgotten sample whether the model learned and unlearned it or never saw it;
    the other side are the retrained reference models. Shokri's attack asks which samples were
    trained on: the forgotten ones, against test samples of their kind.
    """
    # A run that failed has no outputs.
    ran = {
        role: [each for each in tasks if (setting.of(each) / OUTPUTS).is_file()]
        for role, tasks in task.needs.items()
    }
    found = {
        role: [measure.load_outputs(setting.of(each) / OUTPUTS) for each in tasks]
        for role, tasks in ran.items()
    }
    attacks: list[dict[str, Any]] = [
        {
            "seed": each.params["seed"],
            "rmia_auc": measure.rmia_auc(target, found["references"]),
        }
        for each, target in zip(ran["targets"], found["targets"], strict=True)
    ]
    if min(len(found["unlearned"]), len(found["retrained"])) >= _FEWEST:
        _u_lira(attacks, found)
    if found["halves"]:
        attack = ShadowAttack([(each["inside"], each["outside"]) for each in found["halves"]])
        for row, target in zip(attacks, found["targets"], strict=True):
            scores = [attack.scores(target[name]) for name in ("train_forget", "test_forget")]
            members = torch.arange(sum(map(len, scores))) < len(scores[0])
            row["shokri_auc"] = attack_quality(torch.cat(scores), members).auc
    return {
        "budget": {
            "unlearned": len(found["unlearned"]),
            "retrained": len(found["retrained"]),
            "shokri": len(found["halves"]),
        },
        "attacks": attacks,
    }


def _u_lira(attacks: list[dict[str, Any]], found: dict[str, list[dict[str, Outputs]]]) -> None:
    shadows = torch.stack(
        [
            each["train_forget"].margins
            for role in ("unlearned", "retrained")
            for each in found[role]
        ]
    )
    unlearned = torch.zeros(shadows.shape, dtype=torch.bool)
    unlearned[: len(found["unlearned"])] = True
    outside = torch.stack([each["train_forget"].margins for each in found["references"]])
    for row, target in zip(attacks, found["targets"], strict=True):
        attacked = torch.cat([target["train_forget"].margins[None], outside])
        row["ulira_auc"], row["ulira_tpr"] = None, None
        if not bool(attacked.isfinite().all()) or not bool(shadows.isfinite().all()):
            continue  # a logit at minus infinity gives the method away, and has no Gaussian
        variance: Variance = "pooled" if len(found["unlearned"]) < _FEW else "sample"
        scores = u_lira(attacked, shadows, unlearned, variance=variance)
        members = torch.zeros(scores.shape, dtype=torch.bool)
        members[0] = True
        quality = attack_quality(scores, members)
        row["ulira_auc"] = quality.auc
        row["ulira_tpr"] = {str(rate): value for rate, value in quality.tpr.items()}
