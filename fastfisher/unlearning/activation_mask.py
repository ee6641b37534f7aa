"""ActivationMask: zero the channels that respond more to D_f than to D_r (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from ..data import size_of
from .base import Edit, Job, Method, register
from .channels import Layer, Zero, activations, find_layers, mask_layers_
from .recipe import check_choice

Definition = Literal["recommended", "paper", "authors"]
_ZERO: dict[Definition, Zero] = {
    "recommended": "all norms",
    "paper": "layer",
    "authors": "next norm",
}


@dataclass(frozen=True)
class ActivationMaskOptions:
    """Hyper-parameters of :class:`ActivationMask`.

    Attributes:
        definition: "recommended": the paper's score; all that belongs to a channel is zeroed, so
            that it is silent. "paper": only the layer's weight and bias are, after which BatchNorm
            gives the channel a constant, shift - scale * mean / deviation, instead of silence.
            "authors": as their code does it, sums of activations are divided by the number of
            batches, not of samples, which weighs D_r too little where it is smaller than a batch;
            of the norms the one that follows is zeroed, running statistics included.
    """

    definition: Definition = "recommended"

    def __post_init__(self) -> None:
        """Check the value.

        Raises:
            ValueError: an unknown definition.
        """
        check_choice("options.definition", self.definition, Definition)


@register
class ActivationMask(Method):
    """Masks the share R of all channels with the largest A_f - A_r; without D_r, with A_f alone.

    A is the mean over samples and positions of ReLU(BatchNorm(convolution)). Channels are those of
    convolutions and of hidden linear layers.
    """

    name = "activation-mask"
    edits_weights = True
    Options = ActivationMaskOptions

    def check(self, job: Job) -> None:
        """Raise unless the model's channels can be told."""
        find_layers(job.model, job.forget_set)

    def edit(self, job: Job) -> Edit:
        """Score and zero the channels in place."""
        definition: Definition = job.options.definition
        layers = find_layers(job.model, job.forget_set)
        scores = _means(job, layers, job.forget_set, definition)
        if job.remain_set is not None:
            remain = _means(job, layers, job.remain_set, definition)
            scores = [forget - other for forget, other in zip(scores, remain, strict=True)]
        return Edit(job.model, mask_layers_(job, layers, scores, _ZERO[definition]))


def _means(
    job: Job, layers: list[Layer], dataset: Dataset[Any], definition: Definition
) -> list[Tensor]:
    sums = activations(job, layers, dataset)
    samples = size_of(dataset)
    count = -(-samples // job.batch_size) if definition == "authors" else samples
    return [sums[f"normed:{layer.name}"].sum(0) / count for layer in layers]
