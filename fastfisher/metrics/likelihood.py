"""Membership attacks on single samples, by likelihood ratios against other models.

They take what the models answered, ``[models, samples]``; to train those models, and to remember
what they answered, is the caller's.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Variance = Literal["sample", "pooled"]


def rmia(
    target: Tensor,
    references: Tensor,
    population_target: Tensor,
    population_references: Tensor,
    *,
    trained_on: Tensor | None = None,
    gamma: float = 2.0,
    a: float = 0.3,
) -> Tensor:
    """Relative membership inference attack (RMIA; Zarifzadeh et al. 2024).

    The score of a sample x is the fraction of population samples z that it dominates:

    ``Pr_z( LR(x, z) >= gamma )``,  ``LR(x, z) = (p(x | target) / p(x)) / (p(z | target) / p(z))``

    where ``p(. | model)`` is the confidence in the label and ``p(.)`` its mean over reference
    models. Offline, with reference models that have not seen x and ``out`` their mean,
    ``p(x) = ((1 + a) out + 1 - a) / 2``, and likewise for z; one or two models will do. Online
    (``trained_on`` given), ``p(x) = (in + out) / 2``, the means over those that were trained on x
    and those that were not, and p(z) is the mean over all. In log space throughout, so
    confidences that round to 1 or 0 keep their order.

    Args:
        target: ``log p(y | x)`` of the attacked model, ``[N]``: ``-Outputs.losses``.
        references: the same of M reference models, ``[M, N]``.
        population_target: of samples that no model was trained on, ``[Z]``.
        population_references: ``[M, Z]``.
        trained_on: bool ``[M, N]``, which reference model was trained on which sample; for each
            sample at least one was and one was not. ``None``: offline, none was on any.
        gamma: how much more likely x has to be, at least 1; 2 is the authors'.
        a: of the offline mean, in [0, 1]: the slope of in-confidence over out-confidence. 0.3 is
            the authors' for CIFAR-10; small where models overfit. 1 is "no difference".

    Returns:
        Scores in [0, 1], ``[N]`` float64; higher means rather a member.

    Raises:
        ValueError: shapes that do not fit, a log-confidence above 0 or NaN, a number out of range,
            or ``p`` of a sample is 0.
        TypeError: ``trained_on`` is not bool.
    """
    if not (math.isfinite(gamma) and gamma >= 1):
        raise ValueError(f"gamma: expected a finite number of at least 1, got {gamma!r}")
    if not 0 <= a <= 1:
        raise ValueError(f"a: expected a number in [0, 1], got {a!r}")
    for name, values, references_name, of_references in (
        ("target", target, "references", references),
        (
            "population_target",
            population_target,
            "population_references",
            population_references,
        ),
    ):
        if values.ndim != 1 or values.numel() == 0:
            raise ValueError(f"{name}: expected [samples], got {tuple(values.shape)}")
        shape = len(references), len(values)
        if len(references) == 0 or of_references.shape != shape:
            raise ValueError(
                f"{references_name}: expected [models, samples] {list(shape)} of at least one "
                f"model, got {tuple(of_references.shape)}"
            )
        for checked, numbers in ((name, values), (references_name, of_references)):
            if not bool((numbers <= 0).all()):
                raise ValueError(f"{checked}: expected logarithms of confidences, at most 0")
    references, population_references = references.double(), population_references.double()
    if trained_on is None:
        prior, population_prior = (
            _offline(each, a) for each in (references, population_references)
        )
    else:
        inside, outside = _split("trained_on", trained_on, references.shape, 1)
        prior = torch.logaddexp(_log_mean(references, inside), _log_mean(references, outside))
        prior = prior - math.log(2)
        everything = torch.ones_like(population_references, dtype=torch.bool)
        population_prior = _log_mean(population_references, everything)
    for name, each in (("references", prior), ("population_references", population_prior)):
        if bool(each.isneginf().any()):
            raise ValueError(f"{name}: p of a sample is 0; give an a below 1 or more models")
    ratio = target.double() - prior
    population_ratio = (population_target.double() - population_prior).sort()[0]
    dominated = torch.searchsorted(population_ratio, ratio - math.log(gamma), right=True)
    # Of two ratios that are both 0, neither dominates.
    return (dominated.double() / len(population_ratio)).where(ratio > -torch.inf, 0.0)


def u_lira(
    attacked: Tensor,
    shadows: Tensor,
    unlearned: Tensor,
    *,
    variance: Variance = "sample",
) -> Tensor:
    """Log likelihood ratio of the U-LiRA attack (Hayes et al. 2025).

    For each sample x, Gaussians are fitted to its margins ``log(p / (1 - p))`` under the shadow
    models that learned x and then unlearned it, and under those that never saw it:

    ``log N(margin; mu_u, sigma_u) - log N(margin; mu_h, sigma_h)``

    Above 0: rather learned and unlearned. Give the result to
    :func:`~fastfisher.metrics.attack_quality` with ``decisions = result > 0``; perfect unlearning
    is an AUC of 0.5.

    Args:
        attacked: margins of samples under models to attack, ``[N]`` or ``[K, N]``:
            ``Outputs.margins``. None of these models may be among the shadows.
        shadows: margins under M shadow models, ``[M, N]``.
        unlearned: bool ``[M, N]``: the model learned the sample, then unlearned it; else it never
            saw it. At least two models of each kind for each sample.
        variance: "sample", of each sample's own, divided by the number of models - 1, as the
            source does with many shadow models; "pooled", one variance of each kind for all
            samples, as Carlini et al. 2022 do with few shadow models.

    Returns:
        Float64, of the shape of ``attacked``.

    Raises:
        ValueError: shapes that do not fit, a margin that is not finite, fewer than two models of a
            kind, an unknown ``variance``, or a variance of 0.
        TypeError: ``unlearned`` is not bool.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance: expected one of {get_args(Variance)}, got {variance!r}")
    if shadows.ndim != 2 or shadows.shape[1] == 0:
        raise ValueError(f"shadows: expected [models, samples], got {tuple(shadows.shape)}")
    if attacked.ndim not in (1, 2) or attacked.shape[-1] != shadows.shape[1]:
        raise ValueError(
            f"attacked: expected [{shadows.shape[1]}] or [models, {shadows.shape[1]}], "
            f"got {tuple(attacked.shape)}"
        )
    for name, values in (("attacked", attacked), ("shadows", shadows)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite margins, as Outputs.margins")
    learned, held_out = (
        _log_density(attacked.double(), shadows.double(), kind, variance)
        for kind in _split("unlearned", unlearned, shadows.shape, 2)
    )
    return learned - held_out


def _split(name: str, chosen: Tensor, shape: torch.Size, fewest: int) -> tuple[Tensor, Tensor]:
    """The mask and its complement, checked."""
    if chosen.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {chosen.dtype}")
    if chosen.shape != shape:
        raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(chosen.shape)}")
    counts = chosen.sum(0)
    short = (counts < fewest) | (len(chosen) - counts < fewest)
    if bool(short.any()):
        raise ValueError(
            f"{name}: expected at least {fewest} of the models on each side for every sample, "
            f"not so for sample {int(short.nonzero()[0])}"
        )
    return chosen, ~chosen


def _log_mean(logs: Tensor, chosen: Tensor) -> Tensor:
    """Logarithm of the mean over the chosen models, ``[N]``."""
    return logs.where(chosen, -torch.inf).logsumexp(0) - chosen.sum(0).double().log()


def _offline(logs: Tensor, a: float) -> Tensor:
    """``log(((1 + a) mean + 1 - a) / 2)``, ``[N]``."""
    mean = _log_mean(logs, torch.ones_like(logs, dtype=torch.bool))
    rest = mean.new_tensor((1 - a) / 2).log()
    return torch.logaddexp(mean + math.log((1 + a) / 2), rest)


def _log_density(values: Tensor, shadows: Tensor, chosen: Tensor, variance: Variance) -> Tensor:
    counts = chosen.sum(0)
    mean = shadows.where(chosen, 0.0).sum(0) / counts
    squares = (shadows - mean).square().where(chosen, 0.0).sum(0)
    if variance == "sample":
        spread = squares / (counts - 1)
    else:
        spread = squares.sum() / (counts - 1).sum()
    if not bool((spread > 0).all()):
        raise ValueError(
            "shadows: the margins of a sample do not vary over the models of a kind; "
            "give more models, or variance='pooled'"
        )
    return -((values - mean).square() / spread + (2 * math.pi * spread).log()) / 2
