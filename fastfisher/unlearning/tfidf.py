"""TF-IDF pruning: zero channels that respond to the forgotten class and to few others.

Wang et al., Federated Unlearning via Class-Discriminative Pruning, WWW 2022 (arXiv 2110.11794).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import size_of, subset, targets_of
from .base import Edit, Job, Method, register
from .channels import activations, find_layers, mask_layers_
from .recipe import check_choice, check_integer

Definition = Literal["paper", "authors"]
Direction = Literal["highest", "lowest"]
Idf = Literal["paper", "code"]


@dataclass(frozen=True)
class TfIdfOptions:
    """Hyper-parameters of :class:`TfIdf`; ``None`` is what the definition says.

    Attributes:
        definition: "paper": the text of Wang et al.: highest scores, their printed IDF, all
            samples, the ratio as the job's scope says. "authors": their code, which the authors of
            FisherMask took over: lowest scores, its IDF, one batch, and of each layer of N channels
            all that do not score above the ``int(N (1 - R))``-th highest, but none where
            ``int(N R)`` is 0.
        direction: which scores are pruned. The code prunes the lowest: channels that respond
            little to the class, or to all classes.
        idf: see :func:`tf_idf`.
        batches: score by so many batches, drawn from both sets together by the job's seed (the
            authors' code takes the first of the training set); 0 is all samples.
    """

    definition: Definition = "paper"
    direction: Direction = None  # type: ignore[assignment]  # filled in
    idf: Idf = None  # type: ignore[assignment]  # filled in
    batches: int = None  # type: ignore[assignment]  # filled in

    def __post_init__(self) -> None:
        """Check the values and fill in those of the definition.

        Raises:
            ValueError: a value is unknown or out of range.
            TypeError: a value is of the wrong type.
        """
        check_choice("options.definition", self.definition, Definition)
        paper = self.definition == "paper"
        defaults: dict[str, object] = {
            "direction": "highest" if paper else "lowest",
            "idf": "paper" if paper else "code",
            "batches": 0 if paper else 1,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_choice("options.direction", self.direction, Direction)
        check_choice("options.idf", self.idf, Idf)
        check_integer("options.batches", self.batches, 0)


def tf_idf(means: Tensor, present: Tensor, forget_class: int, idf: Idf) -> Tensor:
    """Score the channels of one layer for one class.

    ``A[u, j]`` is the mean activation of channel j on class u. TF is ``A[c, j] / sum_j A[c, j]`` of
    the class c to forget, 0 in a layer that is silent on it.

    Args:
        means: A, ``[classes, channels]``.
        present: ``[classes]`` bool: there are samples of the class.
        forget_class: c.
        idf: "paper": ``log((1 + U) / (1 + #{u: A[u, j] >= mean over channels of A[u]}))``, over the
            U classes present. "code": ``log(U / (1 + #{u: A[u, j] >= mean over classes of
            A[:, j]}))`` over all classes, one without samples responding by 0; not above 0 for a
            channel that U - 1 classes reach.

    Returns:
        ``[channels]``.
    """
    own = means[forget_class]
    total = own.sum()
    frequency = own / total if total > 0 else torch.zeros_like(own)
    if idf == "paper":
        known = means[present]
        reached = (known >= known.mean(1, keepdim=True)).sum(0)
        return frequency * ((1 + len(known)) / (1 + reached).double()).log()
    reached = (means >= means.mean(0)).sum(0)
    return frequency * (len(means) / (1 + reached).double()).log()


@register
class TfIdf(Method):
    """Masks weights and biases of convolutions, channel by channel, to forget one whole class.

    Activations are those before BatchNorm, whose parameters are left alone (paper, section 3.2).
    """

    name = "tf-idf"
    edits_weights = True
    needs_remain_set = True
    Options = TfIdfOptions

    def check(self, job: Job) -> None:
        """Raise unless one class is to be forgotten, by a model with convolutions."""
        _class_of(job.forget_set)
        if not any(layer.convolution for layer in find_layers(job.model, job.forget_set)):
            raise ValueError("model: 'tf-idf' prunes convolutions, found none")

    def edit(self, job: Job) -> Edit:
        """Score and zero the channels in place."""
        options: TfIdfOptions = job.options
        forget_class = _class_of(job.forget_set)
        found = find_layers(job.model, job.forget_set)
        parts = [activations(job, found, part) for part in _sampled(job) if size_of(part)]
        sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        samples = sums["samples"]
        if not samples[forget_class]:
            raise ValueError(
                f"options.batches: {options.batches} batches have no sample of the class to forget"
            )
        layers = [layer for layer in found if layer.convolution]
        scores = []
        for layer in layers:
            means = sums[f"raw:{layer.name}"] / samples.clamp(min=1)[:, None]
            score = tf_idf(means, samples > 0, forget_class, options.idf)
            scores.append(-score if options.direction == "lowest" else score)
        if options.definition == "paper":
            return Edit(job.model, mask_layers_(job, layers, scores, "layer"))
        by_layer = dataclasses.replace(job, scope="layer")
        mask = mask_layers_(by_layer, layers, scores, "layer", lambda s: [_pruned(s[0], job.ratio)])
        return Edit(job.model, mask)


def _class_of(forget_set: Dataset[Any]) -> int:
    classes = targets_of(forget_set).unique().tolist()
    if len(classes) != 1:
        raise ValueError(f"forget_set: 'tf-idf' forgets one class, got samples of {classes}")
    return int(classes[0])


def _sampled(job: Job) -> list[Dataset[Any]]:
    """The samples to score by: of the forget set and of the remain set."""
    sets = job.forget_set, job.remain()
    sizes = [size_of(dataset) for dataset in sets]
    count = job.options.batches * job.batch_size
    if not 0 < count < sum(sizes):
        return list(sets)
    generator = torch.Generator().manual_seed(job.seed)
    drawn = torch.randperm(sum(sizes), generator=generator)[:count].sort().values
    of_forget = drawn < sizes[0]
    return [subset(sets[0], drawn[of_forget]), subset(sets[1], drawn[~of_forget] - sizes[0])]


def _pruned(scores: Tensor, ratio: float) -> Tensor:
    """What the pruner of the authors' code removes of one layer; a high score means to remove."""
    channels = scores.numel()
    kept = int(channels * (1 - ratio))
    if int(channels * ratio) < 1:
        return torch.zeros(channels, dtype=torch.bool)
    # It keeps what lies beyond the last of those kept: not that one itself, and none equal to it.
    return scores >= scores.kthvalue(max(kept, 1)).values
