"""FisherNoise: noise on every weight, the more of it the less the remain set depends on it.

Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020; the paper's baseline
(section 2, equation 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .base import Edit, Job, Method, register
from .gradients import trainable
from .head import find_head, forget_class
from .options import check_number
from .recipe import check_choice

Definition = Literal["original", "paper"]

_EPSILON = 1e-8  # of both definitions: what no remaining sample depends on has a Fisher of zero
_MOST, _MOST_OF_HEAD = 1e3, 1e2
_OF_CLASS = 1e-4


@dataclass(frozen=True)
class FisherNoiseOptions:
    """Hyper-parameters of "fisher-noise".

    Attributes:
        alpha: strength; the square root of the paper's ``lambda sigma^2``.
        definition: see :class:`FisherNoise`.
    """

    alpha: float = 1e-6
    definition: Definition = "original"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        check_number("options.alpha", self.alpha, at_least=0)
        check_choice("options.definition", self.definition, Definition)


@register
class FisherNoise(Method):
    """Adds Gaussian noise of variances that follow from h, the diagonal Fisher of the remain set.

    "original" is what Golatkar et al. published as a program, which departs from their equation.
    h is the expectation over the model's own labels, sample by sample. The variance is ``alpha``
    times ``min(1 / (h + 1e-8), 1e3)``, 1e2 in the last layer; of matrices and kernels its mean over
    the input channels; 10 times that in the last layer and for every other parameter of one
    dimension (biases, norms). Where the forget set is a whole class, its row of the last layer
    becomes pure noise of variance 1e-3.

    "paper" is equation 2: variance ``(lambda sigma^2)^(1/2) h^(-1/2)`` and no other rule, with h
    the Fisher of the paper's section 3.1 (observed labels). The equation has no bound; h is
    increased by 1e-8 here, as in the program.

    As published, no training follows: ``epochs=0``.
    """

    name = "fisher-noise"
    edits_weights = True
    needs_remain_set = True
    Options = FisherNoiseOptions

    def check(self, job: Job) -> None:
        """Require a last layer that makes the logits, where the definition treats it apart.

        Raises:
            ValueError: the model has none.
        """
        if job.options.definition == "original":
            find_head(job.model, job.forget_set)

    def edit(self, job: Job) -> Edit:
        """Add the noise in place, drawn from the job's seed."""
        original = job.options.definition == "original"
        fisher = job.scores.fisher(
            job.model,
            job.remain(),
            batch_size=job.batch_size,
            progress=job.progress,
            kind="exact" if original else "empirical",
        )
        head: set[nn.Parameter] = set()
        label = None
        if original:
            head = set(find_head(job.model, job.forget_set).parameters(recurse=False))
            label = forget_class(job.forget_set, job.remain_set)
        generator = torch.Generator().manual_seed(job.seed)
        with torch.no_grad():
            # In the model's order, which a Fisher read from a file does not have.
            for name, parameter in trainable(job.model).items():
                h = fisher[name]
                of_head = parameter in head
                if original:
                    variance = _variance(h, job.options.alpha, of_head)
                else:
                    variance = job.options.alpha * (h + _EPSILON) ** -0.5
                if of_head and label is not None:
                    parameter[label] = 0
                    variance[label] = 10 * _OF_CLASS
                # Drawn on the CPU: the same noise on every device.
                noise = torch.randn(h.shape, generator=generator, dtype=h.dtype)
                parameter.add_((variance.sqrt().cpu() * noise).to(parameter))
        return Edit(job.model)


def _variance(h: Tensor, alpha: float, of_head: bool) -> Tensor:
    """Variance of "original" but for the forgotten class; of the shape of the Fisher ``h``."""
    variance = alpha * (1 / (h + _EPSILON)).clamp(max=_MOST_OF_HEAD if of_head else _MOST)
    if h.ndim > 1:
        variance = variance.mean(1, keepdim=True).expand_as(h).clone()
    return variance * 10 if of_head or h.ndim == 1 else variance
