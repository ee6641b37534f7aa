"""What an unlearning method is, and the register of those there are.

A method is a subclass of :class:`Method` in a file of its own, decorated with :func:`register` and
imported by ``unlearning/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from torch.utils.data import Dataset

from ..masking import Granularity, Mask, Scope
from .recipe import TrainRecipe


@dataclass(frozen=True)
class Job:
    """The checked arguments of one :func:`fastfisher.unlearn` call, as a method sees them."""

    model: nn.Module
    forget_set: Dataset[Any]
    remain_set: Dataset[Any]
    ratio: float
    remain_weight: float | Literal["auto"]
    granularity: Granularity
    exclude: Sequence[str]
    scope: Scope
    epochs: int
    replay_epochs: int
    recipe: TrainRecipe | None
    batch_size: int
    seed: int
    model_factory: Callable[[], nn.Module] | None
    progress: bool


@dataclass(frozen=True)
class Edit:
    """What a method did to the weights before training.

    Attributes:
        model: the model to train and evaluate from here on; the job's own, except for "retrain".
        mask: which weights were zeroed, if any.
        search: every candidate of a search on held-out training images, if there was one.
    """

    model: nn.Module
    mask: Mask | None = None
    search: list[dict[str, Any]] | None = None


class Method:
    """An unlearning method: first an edit of the weights, then training on the remain set.

    The base class edits nothing and fine-tunes.

    Attributes:
        name: what users call it.
        edits_weights: the state between edit and training is worth a record of its own, "masked".
    """

    name: ClassVar[str]
    edits_weights: ClassVar[bool] = False

    def check(self, job: Job) -> None:
        """Raise what speaks against the job; called before anything is modified.

        Raises:
            ValueError: an argument that this method needs is missing or wrong.
        """

    def edit(self, job: Job) -> Edit:
        """Change ``job.model`` in place, or make another model."""
        return Edit(job.model)

    def recipe(self, job: Job) -> TrainRecipe:
        """The recipe to train by; the paper's when the job has none."""
        return job.recipe or TrainRecipe()

    def epochs(self, job: Job) -> tuple[int, int]:
        """Epochs to train, and epochs onto which the recipe's learning-rate curve is compressed."""
        return job.epochs, job.replay_epochs


_METHODS: dict[str, Method] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator: make a method known under its ``name``.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in _METHODS:
        raise ValueError(f"an unlearning method named {method.name!r} is registered already")
    _METHODS[method.name] = method()
    return method


def methods() -> Mapping[str, Method]:
    """Every registered method by name, in order of registration."""
    return dict(_METHODS)
