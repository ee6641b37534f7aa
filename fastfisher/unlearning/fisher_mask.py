"""FisherMask: zero the weights with the largest F_f - w F_r, then fine-tune (paper, 3.1, 3.4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data import batches
from ..fisher_diag import FisherDiag, fisher_diag
from ..masking import fisher_mask_
from .base import Edit, Job, Method, register
from .search import Candidate, hold_out, search_mask

# Of each set, at most this many images are held out of the Fisher for the search.
_HELD_FORGET, _HELD_REMAIN = 1000, 3000


@register
class FisherMask(Method):
    """Masks by the diagonal empirical Fisher of the two training sets, observed labels."""

    name = "fisher-mask"
    edits_weights = True
    needs_remain_set = True

    def check(self, job: Job) -> None:
        """Raise unless its units can be scored."""
        if job.granularity == "channel":
            raise ValueError(
                "granularity: 'fisher-mask' scores parameters or kernels, got 'channel'"
            )

    def edit(self, job: Job) -> Edit:
        """Score and zero in place; with ``remain_weight="auto"``, search w and R first."""
        forget, remain = job.forget_set, job.remain()
        ratio, weight = job.ratio, job.remain_weight
        candidates: list[Candidate] | None = None
        if weight == "auto":
            generator = torch.Generator().manual_seed(job.seed)
            forget, held_forget = hold_out(forget, cap=_HELD_FORGET, generator=generator)
            remain, held_remain = hold_out(remain, cap=_HELD_REMAIN, generator=generator)
        forget_fisher = _fisher(job, forget)
        remain_fisher = _fisher(job, remain)
        if weight == "auto":
            candidates = search_mask(
                job.model,
                forget_fisher,
                remain_fisher,
                batches(held_forget, job.batch_size),
                batches(held_remain, job.batch_size),
                extra_ratio=job.ratio,
                granularity=job.granularity,
                exclude=job.exclude,
                scope=job.scope,
                progress=job.progress,
            )
            chosen = next(candidate for candidate in candidates if candidate.chosen)
            ratio, weight = chosen.ratio, chosen.remain_weight
        mask = fisher_mask_(
            job.model,
            forget_fisher,
            remain_fisher,
            ratio=ratio,
            remain_weight=weight,
            granularity=job.granularity,
            exclude=job.exclude,
            scope=job.scope,
        )
        search = None if candidates is None else [dataclasses.asdict(c) for c in candidates]
        return Edit(job.model, mask, search)


def _fisher(job: Job, dataset: Dataset[Any]) -> FisherDiag:
    return fisher_diag(job.model, batches(dataset, job.batch_size), progress=job.progress)
