"""l1-sparse: fine-tune on the remain set with a penalty on the size of all weights.

Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, equation 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Job, register
from .gradients import trainable
from .loop import EpochStats
from .options import TrainingOptions, check_number
from .tuning import TuningMethod


@dataclass(frozen=True)
class L1SparseOptions(TrainingOptions):
    """Hyper-parameters of "l1-sparse".

    Attributes:
        lr: as of :class:`TrainingOptions`.
        gamma: strength in the first epoch. It falls linearly, to ``gamma / epochs`` in the last
            one: the schedule that the source recommends.
    """

    gamma: float = 1e-4

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        super().__post_init__()
        check_number("options.gamma", self.gamma, at_least=0)


@register
class L1Sparse(TuningMethod):
    """Minimises cross entropy on the remain set plus ``gamma_t`` times the 1-norm of the weights.

    ``gamma_t = gamma (1 - t / T)`` in epoch ``t = 0 .. T - 1``. The norm is that of all parameters
    that are trained, biases and norms included, as in the source's program. The source tunes
    ``gamma``.
    """

    name = "l1-sparse"
    Options = L1SparseOptions

    def fit(self, job: Job, model: nn.Module, on_epoch: Callable[[EpochStats], object]) -> None:
        """Train with the penalty."""
        if not job.epochs:
            return
        parameters = list(trainable(model).values())
        done = 0

        def objective(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            norm = torch.stack([p.abs().sum() for p in parameters]).sum()
            strength = job.options.gamma * (1 - done / job.epochs)
            return F.cross_entropy(model(inputs), targets) + strength * norm

        def count(stats: EpochStats) -> None:
            nonlocal done
            done = stats.epoch
            on_epoch(stats)

        self.train(job, model, count, objective=objective)
