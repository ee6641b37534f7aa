"""The learning rate of each step, and its compressed replay (paper, section 3.4)."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .recipe import TrainRecipe


def milestone_steps(
    recipe: TrainRecipe, steps_per_epoch: int, schedule_epochs: int
) -> tuple[int, ...]:
    """Steps from which on each decay of the recipe holds, compressed to ``schedule_epochs``.

    A decay after ``m`` of ``N`` epochs comes after ``floor(m / N * S * L)`` steps, in exact
    arithmetic (paper, section 3.4; the authors' code works in steps too).

    Args:
        recipe: gives m and N.
        steps_per_epoch: L, batches an epoch.
        schedule_epochs: S; the recipe's own ``epochs`` gives the original schedule.

    Returns:
        0-based steps, one a milestone.
    """
    length = schedule_epochs * steps_per_epoch
    return tuple(milestone * length // recipe.epochs for milestone in recipe.milestones)


def lr_scheduler(
    optimizer: torch.optim.Optimizer,
    recipe: TrainRecipe,
    *,
    steps_per_epoch: int,
    schedule_epochs: int,
) -> LRScheduler:
    """The whole learning-rate curve of a recipe, warm-up included, over ``schedule_epochs``.

    Args:
        optimizer: its base rate is ``recipe.lr``.
        recipe: which curve.
        steps_per_epoch: batches an epoch.
        schedule_epochs: length of the curve; ``recipe.epochs`` for training, the paper's S = 5 for
            fine-tuning.

    Returns:
        A scheduler to step after each batch, at most ``schedule_epochs * steps_per_epoch - 1``
        times.
    """
    total = schedule_epochs * steps_per_epoch
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=total, cycle_momentum=False)
    milestones = milestone_steps(recipe, steps_per_epoch, schedule_epochs)
    warmup = recipe.warmup_epochs * total // recipe.epochs

    def factor(step: int) -> float:
        decayed = recipe.gamma ** bisect_right(milestones, step)
        return float(decayed * min(1.0, (step + 1) / warmup) if warmup else decayed)

    return LambdaLR(optimizer, factor)
