"""Zero randomly chosen weights, then fine-tune: the paper's baseline "RandomMask"."""

from __future__ import annotations

import dataclasses

import torch

from ..masking import Mask, random_mask_
from .base import Edit, Job, Method, register
from .channels import find_layers, mask_layers_


@register
class RandomMask(Method):
    """Masks as many units as "fisher-mask" would, drawn uniformly from the job's seed.

    With granularity "channel", all that belongs to a channel is zeroed, and channels are those that
    the other methods score: not the rows of the classifier, which the authors' code draws too.
    """

    name = "random-mask"
    edits_weights = True

    def check(self, job: Job) -> None:
        """Raise unless the model's channels, if they are to be drawn, can be told."""
        if job.granularity == "channel":
            find_layers(job.model, job.forget_set)

    def edit(self, job: Job) -> Edit:
        """Zero the units in place."""
        if job.granularity == "channel":
            return Edit(job.model, _random_channels_(job))
        mask = random_mask_(
            job.model,
            ratio=job.ratio,
            generator=torch.Generator().manual_seed(job.seed),
            granularity=job.granularity,
            exclude=job.exclude,
            scope=job.scope,
        )
        return Edit(job.model, mask)


def _random_channels_(job: Job) -> Mask:
    layers = find_layers(job.model, job.forget_set)
    sizes = [layer.channels for layer in layers]
    # The highest ranks of a random permutation are a uniform draw, within each group too.
    ranks = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(job.seed))
    mask = mask_layers_(job, layers, ranks.double().split(sizes), "all norms")
    return dataclasses.replace(mask, threshold=None)
