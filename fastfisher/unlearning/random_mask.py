"""Zero randomly chosen weights, then fine-tune: the paper's baseline "RandomMask"."""

from __future__ import annotations

import torch

from ..masking import random_mask_
from .base import Edit, Job, Method, register


@register
class RandomMask(Method):
    """Masks as many units as "fisher-mask" would, drawn uniformly from the job's seed."""

    name = "random-mask"
    edits_weights = True

    def edit(self, job: Job) -> Edit:
        """Zero the units in place."""
        mask = random_mask_(
            job.model,
            ratio=job.ratio,
            generator=torch.Generator().manual_seed(job.seed),
            granularity=job.granularity,
            exclude=job.exclude,
            scope=job.scope,
        )
        return Edit(job.model, mask)
