"""FisherMask: zero the weights with the largest F_f - w F_r, then fine-tune (paper, 3.1, 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches, size_of
from ..fisher_diag import FisherDiag, fisher_diag
from ..masking import Granularity, fisher_mask_
from .base import Edit, Job, Method, register
from .fisher_scores import batch_mean_fisher
from .metrics import device_of
from .search import GRANULARITIES, SCOPES, hold_out, search_mask

Definition = Literal["recommended", "paper", "authors"]
Kind = Literal["empirical", "exact", "mc"]

# Of each set, at most this many images are held out of the Fisher for the search.
_HELD_FORGET, _HELD_REMAIN = 300, 1000


@dataclass(frozen=True)
class FisherMaskOptions:
    """Hyper-parameters of :class:`FisherMask`.

    Attributes:
        definition: where the score comes from.

            - "recommended": ``F_f - w F_r`` with Fishers averaged over samples, of the kind, w,
              units and scope asked for.
            - "paper" (sections 3.1, 3.2): the empirical Fishers of single samples, summed and not
              averaged, which is w = |D_r| / |D_f|; each scalar of every parameter is a unit.
            - "authors" (their code): :func:`batch_mean_fisher` with labels "model" and the call's
              batch size, w = 1; the units are the kernels of convolutions and the scalars of
              linear weights, never biases or norms, and ``int(R N)`` of all N are zeroed. Where
              that is none, none is zeroed: their code then zeroes every unit.
        kind: of the Fisher of "recommended": as in :func:`fastfisher.fisher_diag`.
        search_granularities: what ``remain_weight="auto"`` tries, where ``granularity`` is left at
            its default.
        search_scopes: the same for ``scope``.
    """

    definition: Definition = "recommended"
    kind: Kind = "empirical"
    search_granularities: tuple[Granularity, ...] = GRANULARITIES
    search_scopes: tuple[Literal["global", "layer"], ...] = SCOPES

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is not one of those there are.
            TypeError: a value is of the wrong type.
        """
        for name, choices in (("definition", Definition), ("kind", Kind)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"options.{name}: expected one of {get_args(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        for name, known in (("search_granularities", GRANULARITIES), ("search_scopes", SCOPES)):
            values = getattr(self, name)
            if not isinstance(values, tuple | list):
                raise TypeError(f"options.{name}: expected a list, got {values!r}")
            if not values or any(value not in known for value in values):
                raise ValueError(f"options.{name}: expected some of {known}, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        if self.definition != "recommended" and self.kind != "empirical":
            raise ValueError(
                f"options.kind: the definition {self.definition!r} has a Fisher of its own, "
                f"got {self.kind!r}"
            )


@register
class FisherMask(Method):
    """Masks by the Fishers of the two training sets; where no remain set is at hand, by F_f."""

    name = "fisher-mask"
    edits_weights = True
    Options = FisherMaskOptions

    def check(self, job: Job) -> None:
        """Raise where the arguments of the call contradict the definition.

        Raises:
            ValueError: they do, or a remain set is needed and missing.
        """
        definition = job.options.definition
        if job.granularity == "channel":
            raise ValueError(
                "granularity: 'fisher-mask' scores parameters or kernels, got 'channel'"
            )
        if definition == "recommended":
            if job.remain_weight == "auto" and job.remain_set is None:
                raise ValueError('remain_set: expected a data set for remain_weight="auto"')
            return
        fixed = f"options.definition: {definition!r} fixes it"
        if job.remain_weight != 1:
            raise ValueError(f"remain_weight: leave it at 1, got {job.remain_weight!r}; {fixed}")
        if job.scope != "global":
            raise ValueError(f"scope: leave it at 'global', got {job.scope!r}; {fixed}")
        if definition == "paper" and job.granularity != "parameter":
            raise ValueError(f"granularity: expected 'parameter', got {job.granularity!r}; {fixed}")
        if definition == "authors" and job.exclude:
            raise ValueError(f"exclude: leave it empty, got {job.exclude!r}; {fixed}")
        if definition == "authors" and not _unit_counts(job.model):
            raise ValueError("model: expected a convolution or linear layer that requires grad")

    def edit(self, job: Job) -> Edit:
        """Score and zero in place; with ``remain_weight="auto"``, search first."""
        if job.options.definition == "authors":
            return _as_the_authors(job)
        if job.remain_weight == "auto":
            return _by_search(job)
        weight = job.remain_weight
        if job.options.definition == "paper" and job.remain_set is not None:
            weight = size_of(job.remain_set) / size_of(job.forget_set)
        mask = fisher_mask_(
            job.model,
            _fisher(job, job.forget_set),
            None if job.remain_set is None else _fisher(job, job.remain_set),
            ratio=job.ratio,
            remain_weight=weight,
            granularity=job.granularity,
            exclude=job.exclude,
            scope=job.scope,
        )
        return Edit(job.model, mask)


def _by_search(job: Job) -> Edit:
    generator = torch.Generator().manual_seed(job.seed)
    forget, held_forget = hold_out(job.forget_set, cap=_HELD_FORGET, generator=generator)
    remain, held_remain = hold_out(job.remain(), cap=_HELD_REMAIN, generator=generator)
    fishers = _fisher(job, forget), _fisher(job, remain)
    search = search_mask(
        job.model,
        *fishers,
        batches(held_forget, job.batch_size),
        batches(held_remain, job.batch_size),
        extra_ratio=job.ratio,
        granularities=(
            job.options.search_granularities
            if job.granularity == "parameter"
            else [job.granularity]
        ),
        scopes=job.options.search_scopes if job.scope == "global" else [job.scope],
        exclude=job.exclude,
        progress=job.progress,
    )
    chosen = search.chosen
    mask = fisher_mask_(
        job.model,
        *fishers,
        ratio=chosen.ratio,
        remain_weight=chosen.remain_weight,
        granularity=chosen.granularity,
        exclude=job.exclude,
        scope=chosen.scope,
    )
    return Edit(job.model, mask, search.to_dict())


def _fisher(job: Job, dataset: Dataset[Any]) -> FisherDiag:
    kind = job.options.kind
    if kind != "mc":
        return job.scores.fisher(
            job.model, dataset, batch_size=job.batch_size, progress=job.progress, kind=kind
        )

    def compute() -> FisherDiag:
        # Seeded here, so that the draws do not depend on what was drawn before or remembered.
        generator = torch.Generator(device_of(job.model)).manual_seed(job.seed)
        return fisher_diag(
            job.model,
            batches(dataset, job.batch_size),
            kind=kind,
            generator=generator,
            progress=job.progress,
        )

    definition = {"score": "fisher_diag", "kind": kind, "seed": job.seed, "batch": job.batch_size}
    values = job.scores.tensors(job.model, dataset, definition, compute)
    return FisherDiag(values, samples=size_of(dataset), kind=kind)


def _as_the_authors(job: Job) -> Edit:
    def scores(dataset: Dataset[Any]) -> Mapping[str, Tensor]:
        definition = {"score": "batch_mean_fisher", "labels": "model", "batch": job.batch_size}
        found = job.scores.tensors(
            job.model,
            dataset,
            definition,
            lambda: batch_mean_fisher(
                job.model, dataset, job.batch_size, "model", progress=job.progress
            ),
        )
        return {name: found[name] for name in counts if name in found}

    counts = _unit_counts(job.model)
    forget = scores(job.forget_set)
    units = sum(counts[name] for name in forget)
    mask = fisher_mask_(
        job.model,
        forget,
        None if job.remain_set is None else scores(job.remain_set),
        # The product rounded down as they do, which 0.29 of 100 units makes 28.
        ratio=int(job.ratio * units) / units,
        granularity="kernel",
        exclude=job.exclude,
    )
    return Edit(job.model, mask)


def _unit_counts(model: nn.Module) -> dict[str, int]:
    """Units in the weight of each convolution and linear layer, by name."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    return {
        f"{name}.weight" if name else "weight": module.weight.shape[:2].numel()
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight.requires_grad
    }
