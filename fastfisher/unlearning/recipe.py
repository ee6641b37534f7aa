"""How a model is trained: numbers only, so that a recipe can be written down and repeated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Schedule = Literal["multistep", "onecycle"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainRecipe:
    """Training with SGD; the defaults are the paper's for CIFAR (section 4).

    Attributes:
        epochs: passes over the training set, at least 1.
        batch_size: samples a step.
        lr: base learning rate; the highest one of "onecycle".
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD, on every parameter.
        milestones: epochs after which "multistep" multiplies the rate by ``gamma``; increasing,
            within 1 .. epochs - 1. An empty tuple keeps the rate constant (the paper's MNIST). By
            default half and three quarters of ``epochs``: the paper's 80 and 120 of 160.
        gamma: factor of a decay, in (0, 1].
        warmup_epochs: "multistep" begins with this many epochs of linearly rising rate.
        schedule: "multistep", or "onecycle" (Smith and Topin 2018; ``torch.optim``'s with its
            defaults), which needs fewer epochs and knows neither milestones nor warm-up.
        augment: shift each image by up to 4 pixels and mirror half of them.
        seed: of the order of the samples, the augmentation and dropout.
        channels_last: memory format during training; faster for convolutions on many CPUs and
            GPUs, other rounding.
        precision: of what autocast covers, in training and in the accuracies after it: "bfloat16"
            is faster where the processor has units for it; weights, optimizer and scores stay
            float32.
    """

    epochs: int = 160
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = None  # type: ignore[assignment]  # __post_init__ fills it in
    gamma: float = 0.1
    warmup_epochs: int = 0
    schedule: Schedule = "multistep"
    augment: bool = False
    seed: int = 0
    channels_last: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Fill in the milestones and check every value.

        Raises:
            ValueError: a value is out of range; the message names it.
            TypeError: a value is of the wrong type.
        """
        for name, at_least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("seed", 0)):
            check_integer(f"recipe.{name}", getattr(self, name), at_least)
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"recipe.{name}: expected a number, got {value!r}")
        for name, good, expected in (
            ("lr", 0 < self.lr < math.inf, "positive and finite"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "finite and not negative"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
        ):
            if not good:
                raise ValueError(f"recipe.{name}: must be {expected}, got {getattr(self, name)!r}")
        for name in ("augment", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"recipe.{name}: expected a bool, got {getattr(self, name)!r}")
        for name, choices in (("schedule", Schedule), ("precision", Precision)):
            check_choice(f"recipe.{name}", getattr(self, name), choices)
        self._settle_milestones()

    def _settle_milestones(self) -> None:
        onecycle = self.schedule == "onecycle"
        given: Any = self.milestones
        if given is None:
            half, three_quarters = self.epochs // 2, self.epochs * 3 // 4
            given = () if onecycle else sorted({half, three_quarters} - {0})
        elif isinstance(given, str) or not hasattr(given, "__iter__"):
            raise TypeError(f"recipe.milestones: expected a tuple of epochs, got {given!r}")
        milestones = tuple(given)
        for epoch in milestones:
            check_integer("recipe.milestones", epoch, 1)
        if list(milestones) != sorted(set(milestones)) or max(milestones, default=0) >= self.epochs:
            raise ValueError(
                f"recipe.milestones: expected increasing epochs below epochs={self.epochs}, "
                f"got {milestones}"
            )
        if onecycle and (milestones or self.warmup_epochs):
            raise ValueError("recipe.schedule: 'onecycle' takes no milestones and no warmup_epochs")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"recipe.warmup_epochs: must be below epochs={self.epochs}, "
                f"got {self.warmup_epochs}"
            )
        object.__setattr__(self, "milestones", milestones)

    def autocast(self, device: torch.device) -> torch.autocast:
        """A context in which a model computes in :attr:`precision`."""
        return torch.autocast(device.type, torch.bfloat16, self.precision == "bfloat16")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able values."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainRecipe:
        """Undo :meth:`to_dict`; what is left out takes its default.

        Raises:
            ValueError: an unknown name, or a value out of range.
            TypeError: a value of the wrong type.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"recipe: unknown names {unknown}")
        return cls(**values)


def check_integer(name: str, value: object, at_least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``at_least``.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name}: must be at least {at_least}, got {value}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise unless ``value`` is one of a ``Literal``.

    Raises:
        ValueError: it is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {get_args(choices)}, got {value!r}")
