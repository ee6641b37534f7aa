"""Influence functions: one Newton step that takes the forget set out of the training objective.

Koh and Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017; for groups
Koh, Ang, Teo, Liang, NeurIPS 2019; the paper's section 2 and figure 1. The inverse Hessian is
applied by LiSSA (Agarwal, Bullins, Hazan, JMLR 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset

from ..data import batches, size_of
from .base import Edit, Job, Method, register
from .gradients import sum_gradient, trainable
from .metrics import device_of, keeping_modes
from .options import check_number
from .recipe import check_choice, check_integer

Definition = Literal["original", "paper"]


@dataclass(frozen=True)
class InfluenceOptions:
    """Hyper-parameters of "influence"; the defaults are those of the paper's authors' program.

    Attributes:
        damping: of each step of LiSSA, above 0 and below 1; the Hessian is increased by
            ``damping * scale`` times the identity.
        scale: the Hessian is divided by it within LiSSA: above half of the largest eigenvalue of
            any batch's Hessian, or the steps diverge.
        passes: over all training data.
        batch_size: samples of each step's Hessian; part of the definition.
        definition: see :class:`Influence`.
    """

    damping: float = 0.01
    scale: float = 20.0
    passes: int = 30
    batch_size: int = 128
    definition: Definition = "original"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong type.
        """
        check_number("options.damping", self.damping, above=0, at_most=1)
        check_number("options.scale", self.scale, above=0)
        check_integer("options.passes", self.passes, 1)
        check_integer("options.batch_size", self.batch_size, 1)
        check_choice("options.definition", self.definition, Definition)


@register
class Influence(Method):
    """Adds ``H^-1 v``, with H the Hessian of the mean loss of all N training samples.

    "original": ``v = (1/N) sum_f grad l``, the influence of giving the forget set's samples the
    weight 0. The paper's authors do the same in their program. "paper": its section 2 as written,
    with losses that are sums: ``H = N H_mean`` and ``1 / |D_f|`` before it, so that the step is
    the original's divided by ``|D_f|``; too short to remove a group.

    LiSSA repeats ``d <- v + (1 - damping) d - H_b d / scale`` from ``d = v``, with the Hessians
    H_b of mini-batches in the order of the job's seed, and adds ``d / scale``: near
    ``(H + damping * scale)^-1 v``. Losses are taken in eval mode; buffers stay as they are. No
    training follows in the source: ``epochs=0``.
    """

    name = "influence"
    edits_weights = True
    needs_remain_set = True
    Options = InfluenceOptions

    def check(self, job: Job) -> None:
        """Require weights to change.

        Raises:
            ValueError: no parameter requires grad.
        """
        trainable(job.model)

    def edit(self, job: Job) -> Edit:
        """Take the step in place.

        Raises:
            FloatingPointError: LiSSA diverges; the model is as it was.
        """
        everything: Dataset[Any] = ConcatDataset([job.forget_set, job.remain()])
        forget = size_of(job.forget_set)
        step = job.scores.tensors(
            job.model,
            everything,
            {"score": "influence", "forget": forget, "seed": job.seed, **asdict(job.options)},
            lambda: _step(job, everything),
        )
        with torch.no_grad():
            for name, parameter in trainable(job.model).items():
                parameter.add_(step[name].to(parameter.device))
        return Edit(job.model)


def _step(job: Job, everything: Dataset[Any]) -> Mapping[str, Tensor]:
    """What is added to each parameter."""
    from tqdm import tqdm

    options: InfluenceOptions = job.options
    weight = 1 / size_of(everything)
    if options.definition == "paper":
        weight /= size_of(job.forget_set)
    gradient = sum_gradient(job.model, job.forget_set, job.batch_size)
    v = [value * weight for value in gradient.values()]
    generator = torch.Generator().manual_seed(job.seed)
    loader = batches(everything, options.batch_size, shuffle=True, generator=generator)
    parameters = list(trainable(job.model).values())
    device = device_of(job.model)
    # What d cannot exceed as long as no Hessian has an eigenvalue outside of 0 .. scale.
    bound = _norm(v) / options.damping
    d = [value.clone() for value in v]
    with keeping_modes(job.model):
        job.model.eval()
        for _ in tqdm(
            range(options.passes), "influence", disable=None if job.progress else True, unit="pass"
        ):
            for inputs, targets in loader:
                product = _times_hessian(
                    job.model, parameters, inputs.to(device), targets.to(device), d
                )
                for each, start, change in zip(d, v, product, strict=True):
                    each.mul_(1 - options.damping).add_(start).sub_(change, alpha=1 / options.scale)
            norm = _norm(d)
            if not norm <= bound:
                raise FloatingPointError(
                    f"'influence' diverges: after a pass the step has norm {norm:.3g}, above the "
                    f"{bound:.3g} that it has at most where all curvatures lie within 0 .. "
                    f"options.scale={options.scale:g}; raise options.scale or options.damping"
                )
    return {name: each / options.scale for name, each in zip(gradient, d, strict=True)}


def _times_hessian(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    inputs: Tensor,
    targets: Tensor,
    vector: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The Hessian of the batch's mean cross entropy, times a vector."""
    loss = F.cross_entropy(model(inputs), targets)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    inner = torch.stack([(g * x).sum() for g, x in zip(gradients, vector, strict=True)]).sum()
    return torch.autograd.grad(inner, parameters, materialize_grads=True)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
