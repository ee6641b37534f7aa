"""Find the weight w and the ratio R of FisherMask on training images kept out of the Fisher.

One pass over the data gives F_f and F_r; every w after that is only a selection, for all R
together, so that a whole grid costs little more than the evaluations. No test image is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import size_of, subset, targets_of
from ..fisher_diag import FisherDiag
from ..masking import Granularity, MaskPlan, Scope, plan_masks
from .metrics import accuracy

REMAIN_WEIGHTS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0)
RATIOS = (0.001, 0.002, 0.005, 0.01, 0.02)


@dataclass(frozen=True)
class Candidate:
    """One (w, R) and what masking by it, without fine-tuning, does to the held-out images.

    Attributes:
        remain_weight: w.
        ratio: R.
        k: units zeroed.
        forget: held-out accuracy on the forget set.
        remain: held-out accuracy on the remain set; ``None`` where ``forget`` ruled the candidate
            out and it was not evaluated.
        chosen: this is the one to use.
    """

    remain_weight: float
    ratio: float
    k: int
    forget: float
    remain: float | None
    chosen: bool = False


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
    granularity: Granularity = "parameter",
    exclude: Sequence[str] = (),
    scope: Scope = "global",
    max_forget: float = 0.005,
    tie: float = 0.001,
    progress: bool = False,
) -> list[Candidate]:
    """Mask by every (w, R), measure on held-out images, undo, and choose.

    Chosen is, of the candidates that keep at most ``max_forget`` of the forget set, the one with
    the largest accuracy on the remain set; among those within ``tie`` of it the one with the lower
    forget accuracy, then the smaller w, then the smaller R. If no candidate forgets that much, it
    is the one with the largest difference of remain and forget accuracy.

    Args:
        model: masked in place and restored, bit for bit, for each candidate.
        forget_fisher: F_f, of reduction "mean".
        remain_fisher: F_r, of reduction "mean".
        held_forget: batches of forget images that F_f has not seen.
        held_remain: batches of remain images that F_r has not seen.
        remain_weights: the grid of w; the ratio of the numbers of samples, with which the score is
            that of the paper's text, is added.
        ratios: the grid of R.
        extra_ratio: one more R.
        granularity: as in :func:`fastfisher.fisher_mask_`.
        exclude: as in :func:`fastfisher.fisher_mask_`.
        scope: as in :func:`fastfisher.fisher_mask_`.
        max_forget: forget accuracy that counts as forgotten.
        tie: difference of remain accuracies that counts as none.
        progress: show a bar, if the standard error is a terminal.

    Returns:
        Every candidate, by w and R; exactly one is ``chosen``.

    Raises:
        ValueError: a Fisher is not of reduction "mean", a grid is empty, or an argument is one
            that :func:`fastfisher.fisher_mask_` rejects. The model is as it was.
    """
    for name, fisher in (("forget_fisher", forget_fisher), ("remain_fisher", remain_fisher)):
        if fisher.reduction != "mean":
            raise ValueError(f"{name}: expected reduction 'mean', got {fisher.reduction!r}")
    if not remain_weights or not ratios:
        raise ValueError("remain_weights and ratios: expected at least one value each")
    weights = sorted({*remain_weights, remain_fisher.samples / forget_fisher.samples})
    all_ratios = sorted({*ratios} if extra_ratio is None else {*ratios, extra_ratio})
    forget_batches, remain_batches = list(held_forget), list(held_remain)

    def plans() -> Iterator[tuple[float, MaskPlan]]:
        for weight in weights:
            for plan in plan_masks(
                model,
                forget_fisher,
                remain_fisher,
                ratios=all_ratios,
                remain_weight=weight,
                granularity=granularity,
                exclude=exclude,
                scope=scope,
            ):
                yield weight, plan

    def measure(weight: float, plan: MaskPlan, *, always_remain: bool) -> Candidate:
        mask = plan.apply_()
        try:
            forget = accuracy(model, forget_batches)
            remain = None
            if always_remain or forget <= max_forget:
                remain = accuracy(model, remain_batches)
        finally:
            mask.undo_(model)
        return Candidate(weight, plan.ratio, mask.k, forget, remain)

    def measure_all(description: str, *, always_remain: bool) -> list[Candidate]:
        from tqdm import tqdm

        bar = tqdm(
            plans(),
            desc=description,
            total=len(weights) * len(all_ratios),
            unit="mask",
            disable=None if progress else True,
        )
        return [measure(weight, plan, always_remain=always_remain) for weight, plan in bar]

    candidates = measure_all("search", always_remain=False)
    if all(candidate.remain is None for candidate in candidates):
        # Nothing forgets: the trade-off decides, and that needs both accuracies of each.
        candidates = measure_all("search again", always_remain=True)
    best = choose(candidates, max_forget, tie)
    return [dataclasses.replace(c, chosen=c is best) for c in candidates]


def choose(candidates: Sequence[Candidate], max_forget: float, tie: float) -> Candidate:
    """Apply the rule of :func:`search_mask`; candidates without a remain accuracy are out."""
    measured = [(c, c.remain) for c in candidates if c.remain is not None]
    forgotten = [(c, remain) for c, remain in measured if c.forget <= max_forget]
    if not forgotten:
        return max(measured, key=lambda pair: pair[1] - pair[0].forget)[0]
    best = max(remain for _, remain in forgotten)
    tied = [c for c, remain in forgotten if remain >= best - tie]
    return min(tied, key=lambda c: (c.forget, c.remain_weight, c.ratio))


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
    shuffled = torch.randperm(total, generator=generator)
    by_class = shuffled[targets_of(dataset)[shuffled].argsort(stable=True)]
    # Evenly spaced positions in an order by class meet each class in proportion to its size.
    positions = (torch.arange(count) * 2 + 1) * total // (2 * count)
    held = torch.zeros(total, dtype=torch.bool)
    held[by_class[positions]] = True
    return subset(dataset, (~held).nonzero()[:, 0]), subset(dataset, held.nonzero()[:, 0])
