"""Readout functions of Golatkar et al. 2020: the forget error and the time to relearn."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..data import size_of
from ..unlearning.loop import EpochStats, train
from ..unlearning.recipe import TrainRecipe, check_integer
from .outputs import Outputs, outputs

RelearnDefinition = Literal["original", "authors"]
_DRAWN = 500
_TOLERANCE = 1e-5


def forget_error(forget: Outputs) -> float:
    """``1 - accuracy`` on the forget set, in [0, 1]; to be compared with the retrained model's.

    Args:
        forget: of the training samples that were to be forgotten.
    """
    return 1 - forget.accuracy


@dataclass(frozen=True)
class Relearning:
    """How fast a model learns again what it was to forget.

    Attributes:
        epochs: trained until the loss was reached, or all there were if it was not. 0: the model
            had it from the start, nothing was forgotten.
        reached: whether the loss was reached.
        losses: mean loss on the forget set before training and after each epoch.
    """

    epochs: int
    reached: bool
    losses: tuple[float, ...]


def relearn_epochs(
    model: nn.Module,
    forget_set: Dataset[Any],
    train_set: Dataset[Any],
    target_loss: float,
    *,
    definition: RelearnDefinition = "original",
    recipe: TrainRecipe | None = None,
    max_epochs: int = 100,
    batch_size: int = 128,
    seed: int = 0,
) -> Relearning:
    """Epochs of training until the loss on the forget set is the original model's again.

    The loss is the mean cross entropy on ``forget_set`` in eval mode; it is reached when it is at
    most ``target_loss + 1e-5``. Fewer epochs than a retrained model needs: something was left.

    * "original" (Golatkar et al.): an epoch is 500 samples of the training set, drawn anew with
      replacement; SGD with rate 0.01, without weight decay.
    * "authors" (the paper's): an epoch is the whole training set; rate 0.1, weight decay 1e-4.
      They look only after an epoch, so what is 0 here is 1 there.

    Args:
        model: the unlearned one; a copy is trained.
        forget_set: D_f, training samples.
        train_set: the whole training set, with D_f.
        target_loss: mean loss of the original model on ``forget_set``.
        definition: which epochs, and the recipe if none is given.
        recipe: instead of that of the definition (whose rate is constant and momentum 0.9).
        max_epochs: give up after these.
        batch_size: of the evaluation.
        seed: of the samples drawn and their order.

    Raises:
        ValueError: an argument is out of range or unknown.
        TypeError: an argument is of the wrong type.
        FloatingPointError: the training loss stopped being finite.
    """
    if definition not in get_args(RelearnDefinition):
        raise ValueError(
            f"definition: expected one of {get_args(RelearnDefinition)}, got {definition!r}"
        )
    if not math.isfinite(target_loss):
        raise ValueError(f"target_loss: expected a finite number, got {target_loss!r}")
    check_integer("max_epochs", max_epochs, 1)
    check_integer("seed", seed, 0)
    if recipe is None:
        rate, decay = (0.01, 0.0) if definition == "original" else (0.1, 1e-4)
        recipe = TrainRecipe(lr=rate, weight_decay=decay, milestones=())
    total = size_of(train_set)
    if total < 1:
        raise ValueError("train_set: expected at least one sample")
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[int]:
        drawn: Tensor = torch.randint(total, (_DRAWN,), generator=generator)
        return drawn.tolist()

    learner = copy.deepcopy(model)
    losses = [float(outputs(learner, forget_set, batch_size).losses.mean())]
    drawn = Subset(train_set, draw()) if definition == "original" else None

    def look(stats: EpochStats) -> None:
        losses.append(float(outputs(learner, forget_set, batch_size).losses.mean()))
        if losses[-1] <= target_loss + _TOLERANCE:
            raise _Reached
        if drawn is not None:
            drawn.indices = draw()

    reached = losses[0] <= target_loss + _TOLERANCE
    if not reached:
        try:
            samples = train_set if drawn is None else drawn
            train(learner, samples, recipe, epochs=max_epochs, seed=seed, on_epoch=look)
        except _Reached:
            reached = True
    return Relearning(len(losses) - 1, reached, tuple(losses))


class _Reached(Exception):
    """Ends a training that has got where it was to get."""
