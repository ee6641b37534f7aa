"""SCRUB: stay close to the original model on the remain set, and leave it on the forget set.

Kurmanji, Triantafillou, Hayes, Triantafillou, "Towards Unbounded Machine Unlearning", NeurIPS 2023,
equation 3 and algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Job, register
from .loop import EpochStats, Prelude
from .options import TrainingOptions, check_number
from .recipe import check_integer
from .tuning import TuningMethod


@dataclass(frozen=True)
class SCRUBOptions(TrainingOptions):
    """Hyper-parameters of "scrub"; the defaults are those of the source's program.

    Attributes:
        lr: as of :class:`TrainingOptions`; the source's.
        alpha: weight of the divergence from the original model on the remain set.
        gamma: weight of the cross entropy on the remain set.
        msteps: epochs that begin with a pass of ascent over the forget set.
        temperature: divides the logits of both models in the divergence, which is multiplied by its
            square; the equation has 1.
    """

    lr: float | None = 5e-4
    alpha: float = 0.001
    gamma: float = 0.99
    msteps: int = 2
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        super().__post_init__()
        check_number("options.alpha", self.alpha, at_least=0)
        check_number("options.gamma", self.gamma, at_least=0)
        check_integer("options.msteps", self.msteps, 0)
        check_number("options.temperature", self.temperature, above=0)


@register
class SCRUB(TuningMethod):
    """Alternates max-steps on the forget set with min-steps on the remain set.

    A max-step ascends ``d(x) = KL(p(x; w_o) || p(x; w))`` from the original model w_o; a min-step
    descends ``alpha d(x) + gamma CE``. Each of the first ``msteps`` epochs is a pass of max-steps
    and one of min-steps, the later ones are min-steps only. The original model is in eval mode.
    Steps are the recipe's SGD and batch size; the source uses Adam or SGD and sizes of its own.
    """

    name = "scrub"
    Options = SCRUBOptions

    def fit(self, job: Job, model: nn.Module, on_epoch: Callable[[EpochStats], object]) -> None:
        """Train away from and towards a frozen copy of the model."""
        if not job.epochs:
            return
        options: SCRUBOptions = job.options
        teacher = copy.deepcopy(model).eval().requires_grad_(False)

        def divergence(logits: Tensor, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = F.log_softmax(teacher(inputs) / options.temperature, 1)
            actual = F.log_softmax(logits / options.temperature, 1)
            kl = F.kl_div(actual, wanted, reduction="batchmean", log_target=True)
            return kl * options.temperature**2

        def ascend(model: nn.Module, inputs: Tensor, _: Tensor) -> Tensor:
            return -divergence(model(inputs), inputs)

        def descend(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            logits = model(inputs)
            loss = options.gamma * F.cross_entropy(logits, targets)
            return loss + options.alpha * divergence(logits, inputs)

        prelude = Prelude(job.forget_set, ascend, options.msteps)
        self.train(job, model, on_epoch, objective=descend, prelude=prelude)
