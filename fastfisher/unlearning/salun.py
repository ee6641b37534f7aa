"""SalUn: teach random labels for the forget set, to the weights that its loss depends on most.

Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
Classification and Generation", ICLR 2024, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from ..data import size_of, targets_of
from .base import Job, register
from .gradients import sum_gradient, trainable
from .head import logits_of
from .loop import EpochStats
from .options import TrainingOptions, check_number
from .tuning import TuningMethod


@dataclass(frozen=True)
class SalUnOptions(TrainingOptions):
    """Hyper-parameters of "salun".

    Attributes:
        lr: as of :class:`TrainingOptions`; the source tunes it between 1e-4 and 1e-1.
        threshold: the fraction of all weights that are trained, in (0, 1]; the source's.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        super().__post_init__()
        check_number("options.threshold", self.threshold, above=0, at_most=1)


@register
class SalUn(TuningMethod):
    """Minimises cross entropy on both sets together, the forget set under wrong labels.

    Only the weights with the largest absolute gradients of the forget set's loss are trained; all
    others keep their values, as the source's equation 4 says. (In its program weight decay reaches
    them too.) A sample of the forget set has the same wrong label throughout, drawn uniformly from
    the other classes by the job's seed; the samples of both sets weigh the same.
    """

    name = "salun"
    Options = SalUnOptions

    def check(self, job: Job) -> None:
        """Require two classes.

        Raises:
            ValueError: the model has one output.
        """
        if logits_of(job.model, job.forget_set).shape[1] < 2:
            raise ValueError("model: 'salun' needs at least two classes, to draw wrong labels from")

    def fit(self, job: Job, model: nn.Module, on_epoch: Callable[[EpochStats], object]) -> None:
        """Find the salient weights, draw labels and train."""
        if not job.epochs:
            return
        parameters = trainable(model)
        remembered = job.scores.tensors(
            model,
            job.forget_set,
            {"score": "sum_gradient"},
            lambda: sum_gradient(model, job.forget_set, job.batch_size),
        )
        # In the model's order, by which ties are broken and which a file does not keep.
        gradients = {name: remembered[name] for name in parameters}
        frozen = _frozen(gradients, job.options.threshold)
        kept = [
            (parameter, frozen[name].to(parameter.device), parameter.detach().clone())
            for name, parameter in parameters.items()
        ]

        def restore() -> None:
            with torch.no_grad():
                for parameter, where, original in kept:
                    parameter.copy_(torch.where(where, original, parameter))

        labels = targets_of(job.forget_set)
        classes = logits_of(model, job.forget_set).shape[1]
        generator = torch.Generator().manual_seed(job.seed)
        shifts = torch.randint(1, classes, labels.shape, generator=generator)
        both: Dataset[Any] = ConcatDataset(
            [
                _Relabelled(job.forget_set, (labels + shifts) % classes),
                _Relabelled(job.remain(), targets_of(job.remain())),
            ]
        )
        self.train(job, model, on_epoch, dataset=both, after_step=restore)


class _Relabelled(Dataset[Any]):
    """The inputs of a data set with other targets ``[N]``."""

    def __init__(self, dataset: Dataset[Any], targets: Tensor) -> None:
        self._dataset, self._targets = dataset, targets

    def __len__(self) -> int:
        return size_of(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self._dataset[index][0], self._targets[index]


def _frozen(gradients: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Where a weight is not among the ``threshold`` of all with the largest absolute gradients."""
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    frozen = torch.ones_like(sizes, dtype=torch.bool)
    # A stable order: ties go to the first parameter.
    frozen[sizes.argsort(descending=True, stable=True)[: int(threshold * len(sizes))]] = False
    parts = frozen.split([gradient.numel() for gradient in gradients.values()])
    return {
        name: part.view(gradient.shape)
        for (name, gradient), part in zip(gradients.items(), parts, strict=True)
    }
