"""Train a fresh model on the remain set: the reference that unlearning is measured against."""

from __future__ import annotations

from torch import nn

from .base import Edit, Job, Method, register
from .loop import seeded
from .metrics import device_of


@register
class Retrain(Method):
    """A new model, trained by the original recipe in full; the job's model is left alone."""

    name = "retrain"

    def check(self, job: Job) -> None:
        """Require the factory and the recipe.

        Raises:
            ValueError: one of them is missing.
        """
        if job.model_factory is None:
            raise ValueError("model_factory: 'retrain' needs a function that makes a fresh model")
        if job.recipe is None:
            raise ValueError("recipe: 'retrain' needs the recipe of the original model")

    def edit(self, job: Job) -> Edit:
        """Make the fresh model, initialised from the job's seed, on the job's model's device.

        Raises:
            TypeError: the factory returned something else than a module.
            ValueError: the factory's model shares parameters with the job's.
        """
        assert job.model_factory is not None
        device = device_of(job.model)
        with seeded(job.seed, device):
            fresh = job.model_factory()
        if not isinstance(fresh, nn.Module):
            raise TypeError(f"model_factory: expected a Module, got {type(fresh).__name__}")
        if {id(p) for p in fresh.parameters()} & {id(p) for p in job.model.parameters()}:
            raise ValueError("model_factory: returned the original model, not a fresh one")
        return Edit(fresh.to(device))

    def epochs(self, job: Job) -> tuple[int, int]:
        """The whole of the original training."""
        assert job.recipe is not None
        return job.recipe.epochs, job.recipe.epochs
