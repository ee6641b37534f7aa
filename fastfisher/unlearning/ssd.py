"""Selective Synaptic Dampening: shrink what matters far more to the forget set than to all data.

Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
Dampening", AAAI 2024, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..data import batches, size_of
from .base import Edit, Job, Method, register
from .gradients import loss_gradients, trainable
from .options import check_number
from .recipe import check_choice

Definition = Literal["paper", "original"]


@dataclass(frozen=True)
class SSDOptions:
    """Hyper-parameters of "ssd"; the defaults are the source's for ResNet-18.

    Attributes:
        alpha: a weight is dampened where its importance to the forget set is more than ``alpha``
            times that to all data.
        dampening: lambda: the weight is multiplied by lambda times the quotient of the two.
        definition: see :class:`SSD`.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    definition: Definition = "paper"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        check_number("options.alpha", self.alpha, at_least=0)
        check_number("options.dampening", self.dampening, at_least=0)
        check_choice("options.definition", self.definition, Definition)


@register
class SSD(Method):
    """Multiplies w by ``min(lambda I / I_f, 1)`` where ``I_f > alpha I``.

    I_f is the importance to the forget set, I that to all training data, the forget set included.
    "paper": the diagonal Fisher of observed labels, sample by sample, as the source's text says.
    "original": as its program computes it, the square of the gradient of each batch's mean loss,
    averaged over the batches. That depends on the size of the batches (the job's) and on which
    samples share one (drawn from the job's seed). As published, no training follows: ``epochs=0``.
    """

    name = "ssd"
    edits_weights = True
    needs_remain_set = True
    Options = SSDOptions

    def edit(self, job: Job) -> Edit:
        """Dampen in place."""
        options: SSDOptions = job.options
        of_forget, of_all = _importance(job)
        parameters = dict(job.model.named_parameters())
        with torch.no_grad():
            for name, forget in of_forget.items():
                selected = forget > options.alpha * of_all[name]
                factor = (options.dampening * of_all[name] / forget).clamp(max=1)
                parameters[name].mul_(torch.where(selected, factor, 1).to(parameters[name]))
        return Edit(job.model)


def _importance(job: Job) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Importance of each weight to the forget set and to all data."""
    forget, remain = job.forget_set, job.remain()
    if job.options.definition == "paper":
        fishers = [
            job.scores.fisher(job.model, part, batch_size=job.batch_size, progress=job.progress)
            for part in (forget, remain)
        ]
        # The mean over all samples, from those over the two parts.
        share = size_of(forget) / (size_of(forget) + size_of(remain))
        return fishers[0], {
            name: share * value + (1 - share) * fishers[1][name]
            for name, value in fishers[0].items()
        }
    return (
        _batch_mean_squares(job, forget),
        _batch_mean_squares(job, ConcatDataset([forget, remain])),
    )


def _batch_mean_squares(job: Job, dataset: Dataset[Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(job.seed)
    loader = batches(dataset, job.batch_size, shuffle=True, generator=generator)

    def compute() -> dict[str, Tensor]:
        means = {name: torch.zeros_like(p.detach()) for name, p in trainable(job.model).items()}
        for gradients in loss_gradients(job.model, loader, reduction="mean"):
            for name, gradient in gradients.items():
                means[name] += gradient**2 / len(loader)
        return means

    definition = {"score": "batch_mean_square", "batch_size": job.batch_size, "seed": job.seed}
    return job.scores.tensors(job.model, dataset, definition, compute)
