"""What an unlearning method is, and the register of those there are.

A method is a subclass of :class:`Method` in a file of its own, decorated with :func:`register` and
imported by ``unlearning/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import nn
from torch.utils.data import Dataset

from ..masking import Granularity, Mask, Scope
from .loop import EpochStats, train
from .recipe import TrainRecipe
from .scores import Scores


@dataclass(frozen=True)
class NoOptions:
    """Of a method without hyper-parameters of its own."""


@dataclass(frozen=True)
class Job:
    """The checked arguments of one :func:`fastfisher.unlearn` call, as a method sees them.

    Attributes:
        remain_set: ``None`` where no sample of it is at hand (paper, section 4.3).
        options: the method's own hyper-parameters, an instance of its ``Options``.
        scores: where Fishers and other scores come from; it may remember them.
    """

    model: nn.Module
    forget_set: Dataset[Any]
    remain_set: Dataset[Any] | None
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
    options: Any = NoOptions()
    scores: Scores = field(default_factory=Scores)

    def remain(self) -> Dataset[Any]:
        """The remain set, for a method that :attr:`Method.needs_remain_set`."""
        assert self.remain_set is not None
        return self.remain_set


@dataclass(frozen=True)
class Edit:
    """What a method did to the weights before training.

    Attributes:
        model: the model to train and evaluate from here on; the job's own, except for "retrain".
        mask: which weights were zeroed, if any.
        search: what a search on held-out training images found, if there was one, JSON-able.
    """

    model: nn.Module
    mask: Mask | None = None
    search: dict[str, Any] | None = None


class Method:
    """An unlearning method: first an edit of the weights, then training on the remain set.

    The base class edits nothing and fine-tunes.

    Attributes:
        name: what users call it.
        edits_weights: the state between edit and training is worth a record of its own, "masked".
        needs_remain_set: the edit reads the remain set; training always does.
        Options: a frozen dataclass of the method's own hyper-parameters, each with a default; its
            ``__post_init__`` refuses bad values with errors that begin with ``options.NAME:``.
    """

    name: ClassVar[str]
    edits_weights: ClassVar[bool] = False
    needs_remain_set: ClassVar[bool] = False
    Options: ClassVar[type] = NoOptions

    def options(self, values: Mapping[str, Any]) -> Any:
        """An instance of :attr:`Options`.

        Raises:
            ValueError: a name that the method does not have, or a value out of range.
            TypeError: a value is of the wrong type.
        """
        known = [each.name for each in fields(self.Options)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"options: {self.name!r} has no {name!r}, only {known}"
                    if known
                    else f"options: {self.name!r} has none, got {name!r}"
                )
        return self.Options(**values)

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

    def fit(self, job: Job, model: nn.Module, on_epoch: Callable[[EpochStats], object]) -> None:
        """Train ``model`` in place after the edit, and call ``on_epoch`` after each epoch."""
        epochs, schedule_epochs = self.epochs(job)
        if epochs:
            train(
                model,
                job.remain(),
                self.recipe(job),
                epochs=epochs,
                schedule_epochs=schedule_epochs,
                seed=job.seed,
                progress=job.progress,
                on_epoch=on_epoch,
            )


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
