"""NegGrad+: descend on the remain set and ascend on the forget set in the same step.

Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023 (SCRUB), among its baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import batches
from .base import Job, register
from .loop import EpochStats, shift_and_mirror
from .options import TrainingOptions, check_number
from .tuning import TuningMethod


@dataclass(frozen=True)
class NegGradPlusOptions(TrainingOptions):
    """Hyper-parameters of "neg-grad-plus".

    Attributes:
        lr: as of :class:`TrainingOptions`; the source's.
        alpha: weight of the remain set, in [0, 1]; 1 is fine-tuning. The source tunes it, close to
            1, since ascent is not bounded.
    """

    alpha: float = 0.95

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        super().__post_init__()
        check_number("options.alpha", self.alpha, at_least=0, at_most=1)


@register
class NegGradPlus(TuningMethod):
    """Minimises ``alpha CE(remain batch) - (1 - alpha) CE(forget batch)`` in each step.

    An epoch is one pass over the remain set; the forget set is passed over again and again, in a
    new order each time.
    """

    name = "neg-grad-plus"
    Options = NegGradPlusOptions

    def fit(self, job: Job, model: nn.Module, on_epoch: Callable[[EpochStats], object]) -> None:
        """Train on both sets."""
        if not job.epochs:
            return
        alpha = job.options.alpha
        forget = self._forget_batches(job)

        def objective(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            unwanted, labels = next(forget)
            descent = F.cross_entropy(model(inputs), targets)
            ascent = F.cross_entropy(model(unwanted.to(inputs.device)), labels.to(inputs.device))
            return alpha * descent - (1 - alpha) * ascent

        self.train(job, model, on_epoch, objective=objective)

    def _forget_batches(self, job: Job) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self.recipe(job)
        generator = torch.Generator().manual_seed(job.seed)
        loader = batches(job.forget_set, recipe.batch_size, shuffle=True, generator=generator)
        while True:
            for inputs, targets in loader:
                yield shift_and_mirror(inputs, generator) if recipe.augment else inputs, targets
