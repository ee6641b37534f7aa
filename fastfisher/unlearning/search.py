"""Solve FisherMask's trade-off on training images kept out of the Fisher.

What is forgotten and what is lost depends above all on the weight w of ``F_f - w F_r``, then on the
ratio R, the unit and the scope. One pass over the data gives F_f and F_r; every candidate after
that is a selection and an evaluation. With w both accuracies rise, since ever fewer weights that
the remain set needs are zeroed: so for each R, unit and scope, bisection finds the largest w that
still forgets, which is the one that loses least. No test image is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import size_of, stratified, subset, targets_of
from ..fisher_diag import FisherDiag
from ..masking import Granularity, Scope, plan_masks
from .metrics import accuracy, accuracy_and_loss

REMAIN_WEIGHTS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
RATIOS = (0.001, 0.002, 0.005, 0.01, 0.02)
GRANULARITIES: tuple[Granularity, ...] = ("parameter", "kernel")
SCOPES: tuple[Any, ...] = ("global", "layer")

_FINALISTS, _STEPS = 3, 3
_REACH = 4.0


@dataclass(frozen=True)
class Candidate:
    """One way to mask, and what it does to the held-out images without fine-tuning.

    Attributes:
        remain_weight: w.
        ratio: R.
        granularity: what a unit is.
        scope: of what R is taken.
        k: units zeroed.
        forget: held-out accuracy on the forget set.
        remain: held-out accuracy on the remain set.
        remain_loss: held-out mean cross entropy on the remain set.
    """

    remain_weight: float
    ratio: float
    granularity: Granularity
    scope: Scope
    k: int
    forget: float
    remain: float
    remain_loss: float

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON-able values; a scope of one's own by its import path."""
        return {**vars(self), "scope": scope_name(self.scope)}


@dataclass(frozen=True)
class Search:
    """What :func:`search_mask` found.

    Attributes:
        candidates: all that was evaluated, by unit, scope, R and w.
        pareto: the candidates to which no other one is preferable in both accuracies, by forget
            accuracy; of equals, the first.
        chosen: the one to use.
        grid: how many candidates the grid has; bisection leaves most of them out.
        held_forget: forget images that each candidate was evaluated on.
        held_remain: the same for the remain set.
    """

    candidates: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]
    chosen: Candidate
    grid: int
    held_forget: int
    held_remain: int

    def to_dict(self) -> dict[str, Any]:
        """The search as JSON-able values."""
        return {
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "pareto": [candidate.to_dict() for candidate in self.pareto],
            "chosen": self.chosen.to_dict(),
            "grid": self.grid,
            "held_forget": self.held_forget,
            "held_remain": self.held_remain,
        }


def search_mask(
    model: nn.Module,
    forget_fisher: FisherDiag,
    remain_fisher: FisherDiag,
    held_forget: Iterable[tuple[Tensor, Tensor]],
    held_remain: Iterable[tuple[Tensor, Tensor]],
    *,
    remain_weights: Sequence[float] = REMAIN_WEIGHTS,
    ratios: Sequence[float] = RATIOS,
    extra_ratio: float | None = None,
    granularities: Sequence[Granularity] = GRANULARITIES,
    scopes: Sequence[Scope] = SCOPES,
    exclude: Sequence[str] = (),
    max_forget: float = 0.005,
    tie: float = 0.001,
    progress: bool = False,
) -> Search:
    """Mask by many (w, R, unit, scope), measure on held-out images, undo, and choose.

    For each (R, unit, scope), bisection over the grid of w looks for the largest w that keeps at
    most ``max_forget`` of the forget set. Where none does for any of them, the whole grid is
    evaluated. Then w is refined for the three best (R, unit, scope): three times, halfway, in the
    logarithm, between the best w and its neighbours on both sides, also beyond the ends of the
    grid.

    Chosen is, of the candidates that keep at most ``max_forget`` of the forget set, the one with
    the largest accuracy on the remain set; among those within ``tie`` of it, of which there are
    many where a model gets all held-out images right, the one with the smallest loss on it, then
    the smaller w, then the smaller R. If no candidate forgets that much, it is the one with the
    largest difference of remain and forget accuracy.

    Args:
        model: masked in place and restored, bit for bit, for each candidate.
        forget_fisher: F_f, of reduction "mean".
        remain_fisher: F_r, of reduction "mean".
        held_forget: batches of forget images that F_f has not seen.
        held_remain: batches of remain images that F_r has not seen.
        remain_weights: the grid of w, positive; the ratio of the numbers of samples, with which the
            score is that of the paper's text, is added.
        ratios: the grid of R.
        extra_ratio: one more R.
        granularities: units to try, as in :func:`fastfisher.fisher_mask_`.
        scopes: scopes to try, as in :func:`fastfisher.fisher_mask_`.
        exclude: as in :func:`fastfisher.fisher_mask_`.
        max_forget: forget accuracy that counts as forgotten.
        tie: difference of remain accuracies that counts as none.
        progress: show a bar, if the standard error is a terminal.

    Returns:
        Every candidate, those on the Pareto curve, and the chosen one.

    Raises:
        ValueError: a Fisher is not of reduction "mean", a grid is empty, a weight is not positive
            and finite, or an argument is one that :func:`fastfisher.fisher_mask_` rejects. The
            model is as it was.
    """
    for name, fisher in (("forget_fisher", forget_fisher), ("remain_fisher", remain_fisher)):
        if fisher.reduction != "mean":
            raise ValueError(f"{name}: expected reduction 'mean', got {fisher.reduction!r}")
    if not (remain_weights and ratios and granularities and scopes):
        raise ValueError(
            "remain_weights, ratios, granularities and scopes: expected at least one value each"
        )
    for weight in remain_weights:
        if not 0 < weight < math.inf:
            raise ValueError(f"remain_weights: expected positive finite numbers, got {weight!r}")
    weights = sorted({*remain_weights, remain_fisher.samples / forget_fisher.samples})
    all_ratios = sorted({*ratios} if extra_ratio is None else {*ratios, extra_ratio})
    settings = [
        _Setting(ratio, granularity, scope)
        for granularity in dict.fromkeys(granularities)
        for scope in dict.fromkeys(scopes)
        for ratio in all_ratios
    ]
    from tqdm import tqdm

    held = list(held_forget), list(held_remain)
    bar = tqdm(desc="search", unit="mask", disable=None if progress else True)
    found: dict[_Setting, dict[float, Candidate]] = {setting: {} for setting in settings}

    def measure(setting: _Setting, weight: float) -> Candidate:
        [plan] = plan_masks(
            model,
            forget_fisher,
            remain_fisher,
            ratios=[setting.ratio],
            remain_weight=weight,
            granularity=setting.granularity,
            exclude=exclude,
            scope=setting.scope,
        )
        mask = plan.apply_()
        try:
            forget = accuracy(model, held[0])
            remain, loss = accuracy_and_loss(model, held[1])
        finally:
            mask.undo_(model)
        bar.update(1)
        candidate = Candidate(
            weight, setting.ratio, setting.granularity, setting.scope, mask.k, forget, remain, loss
        )
        found[setting][weight] = candidate
        return candidate

    with bar:
        for setting in settings:
            low, high = 0, len(weights)
            while low < high:
                middle = (low + high) // 2
                forgets = measure(setting, weights[middle]).forget <= max_forget
                low, high = (middle + 1, high) if forgets else (low, middle)
        if all(candidate.forget > max_forget for candidate in _in_order(found)):
            # Then the trade-off decides, and bisection has only looked at the smallest weights.
            for setting in settings:
                for weight in weights:
                    if weight not in found[setting]:
                        measure(setting, weight)
        ranking = dict(found)
        for _ in range(min(_FINALISTS, len(settings))):
            best = choose(_in_order(ranking), max_forget, tie)
            setting = _Setting(best.ratio, best.granularity, best.scope)
            by_weight = ranking.pop(setting)
            for _ in range(_STEPS):
                weight = choose(_in_order({setting: by_weight}), max_forget, tie).remain_weight
                below = max((w for w in by_weight if w < weight), default=weight / _REACH)
                above = min((w for w in by_weight if w > weight), default=weight * _REACH)
                for neighbour in (below, above):
                    measure(setting, math.sqrt(weight * neighbour))
    every = _in_order(found)
    return Search(
        tuple(every),
        tuple(pareto(every)),
        choose(every, max_forget, tie),
        grid=len(settings) * len(weights),
        held_forget=sum(len(targets) for _, targets in held[0]),
        held_remain=sum(len(targets) for _, targets in held[1]),
    )


@dataclass(frozen=True)
class _Setting:
    """All of a candidate but w."""

    ratio: float
    granularity: Granularity
    scope: Scope


def _in_order(found: Mapping[_Setting, Mapping[float, Candidate]]) -> list[Candidate]:
    return [by_weight[w] for by_weight in found.values() for w in sorted(by_weight)]


def choose(candidates: Sequence[Candidate], max_forget: float, tie: float) -> Candidate:
    """Apply the rule of :func:`search_mask`."""
    forgotten = [c for c in candidates if c.forget <= max_forget]
    if not forgotten:
        return max(candidates, key=lambda c: c.remain - c.forget)
    best = max(c.remain for c in forgotten)
    tied = [c for c in forgotten if c.remain >= best - tie]
    return min(tied, key=lambda c: (c.remain_loss, c.remain_weight, c.ratio))


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that no other one is as good as in both accuracies and better in one.

    Returns:
        By ascending forget accuracy, and so by ascending remain accuracy; of several with the same
        two accuracies, the first.
    """
    curve: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.forget, -c.remain)):
        if not curve or candidate.remain > curve[-1].remain:
            curve.append(candidate)
    return curve


def scope_name(scope: Scope) -> str:
    """The scope as it is written down: a callable, or the class of one, as its import path."""
    if isinstance(scope, str):
        return scope
    named: Any = scope if hasattr(scope, "__qualname__") else type(scope)
    return f"{named.__module__}:{named.__qualname__}"


def hold_out(
    dataset: Dataset[Any], *, cap: int, generator: torch.Generator
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split off a tenth of a data set, at random, with each class in proportion.

    Args:
        dataset: map-style, of (input, target); at least 2 samples.
        cap: hold out no more samples than this. Of a small set at least 50 are held out, but never
            more than half of it.
        generator: source of the draw, on the CPU.

    Returns:
        ``(rest, held)``; each sample is in one of them.

    Raises:
        ValueError: the data set has fewer than 2 samples.
    """
    total = size_of(dataset)
    if total < 2:
        raise ValueError(f"expected at least 2 samples to hold one out, got {total}")
    count = min(cap, max(total // 10, 50), total // 2)
    held = torch.zeros(total, dtype=torch.bool)
    held[stratified(targets_of(dataset), count, generator)] = True
    return subset(dataset, (~held).nonzero()[:, 0]), subset(dataset, held.nonzero()[:, 0])
