"""What the methods share that train in a way of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import Dataset

from .base import Job, Method
from .loop import EpochStats, train
from .options import TrainingOptions
from .recipe import TrainRecipe


class TuningMethod(Method):
    """A method that edits nothing and trains with an objective of its own.

    Training takes ``epochs``; with 0 of them such a method does nothing.
    """

    Options: ClassVar[type] = TrainingOptions

    def recipe(self, job: Job) -> TrainRecipe:
        """The job's, with the learning rate of the options."""
        recipe = super().recipe(job)
        lr = job.options.lr
        return recipe if lr is None else dataclasses.replace(recipe, lr=lr)

    def train(
        self,
        job: Job,
        model: nn.Module,
        on_epoch: Callable[[EpochStats], object],
        *,
        dataset: Dataset[Any] | None = None,
        **changes: Any,
    ) -> None:
        """Run :func:`fastfisher.unlearning.train` as the job says.

        Args:
            job: gives epochs, recipe and seed.
            model: trained in place.
            on_epoch: called after each epoch.
            dataset: instead of the remain set.
            changes: objective, prelude, and what is called before or after a step.
        """
        epochs, schedule_epochs = self.epochs(job)
        train(
            model,
            job.remain() if dataset is None else dataset,
            self.recipe(job),
            epochs=epochs,
            schedule_epochs=schedule_epochs,
            seed=job.seed,
            progress=job.progress,
            on_epoch=on_epoch,
            **changes,
        )
