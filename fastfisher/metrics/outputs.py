"""What a model answers to every sample of a data set: the input of most metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches
from ..unlearning.metrics import device_of, evaluating


@dataclass(frozen=True, eq=False)
class Outputs:
    """Logits and labels of the samples of a data set, in its order.

    Logits may be ``-inf``, as where a class is masked, though not all of a sample's. What is
    computed from them is float64, and from differences of logits: a probability that rounds to 1
    still has the loss and the margin that its logits say.

    Attributes:
        logits: ``[N, C]`` float32, with at least one sample and two classes.
        targets: ``[N]`` int64, in ``0 .. C - 1``.

    Raises:
        ValueError: shapes that do not fit, a target out of range, or a logit that is NaN or +inf.
        TypeError: logits that are not floating-point, or targets that are no integers.
    """

    logits: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        """Check, and convert to float32 and int64."""
        logits, targets = self.logits, self.targets
        if not logits.is_floating_point():
            raise TypeError(f"logits: expected floating-point numbers, got {logits.dtype}")
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"targets: expected integers, got {targets.dtype}")
        if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
            raise ValueError(
                "logits: expected [N, C] of at least one sample and two classes, "
                f"got {tuple(logits.shape)}"
            )
        if targets.shape != logits.shape[:1]:
            raise ValueError(
                f"targets: expected [{logits.shape[0]}], one a sample, got {tuple(targets.shape)}"
            )
        if bool(((targets < 0) | (targets >= logits.shape[1])).any()):
            raise ValueError(f"targets: expected labels in 0..{logits.shape[1] - 1}")
        if not bool((logits.isfinite() | logits.isneginf()).all()):
            raise ValueError("logits: expected finite numbers or -inf, got NaN or +inf")
        if bool(logits.isneginf().all(1).any()):
            raise ValueError("logits: every logit of a sample is -inf")
        object.__setattr__(self, "logits", logits.detach().to(torch.float32))
        object.__setattr__(self, "targets", targets.to(torch.int64))

    def __len__(self) -> int:
        """Number of samples, N."""
        return self.logits.shape[0]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[1]

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, ``[N, C]`` float64."""
        return self.logits.double().softmax(1)

    @property
    def correct(self) -> Tensor:
        """Whether the largest logit is that of the label, ``[N]`` bool."""
        return self.logits.argmax(1) == self.targets

    @property
    def accuracy(self) -> float:
        """Fraction of :attr:`correct` samples, in [0, 1]."""
        return float(self.correct.double().mean())

    @property
    def margins(self) -> Tensor:
        """``logit_y - logsumexp(other logits) = log(p_y / (1 - p_y))``, ``[N]`` float64.

        The logit-scaled confidence of Carlini et al. 2022 (LiRA), free of the cancellation in
        ``1 - p_y``.
        """
        logits = self.logits.double()
        labels = self.targets[:, None]
        others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
        return logits.gather(1, labels)[:, 0] - others

    @property
    def losses(self) -> Tensor:
        """Cross entropy ``-log p_y = log(1 + exp(-margin))`` in nats, ``[N]`` float64."""
        margins = self.margins
        return torch.logaddexp(torch.zeros_like(margins), -margins)


def outputs(model: nn.Module, dataset: Dataset[Any], batch_size: int = 128) -> Outputs:
    """Logits of every sample, from one pass in eval mode without gradients.

    Args:
        model: from inputs ``[B, ...]`` to logits ``[B, C]``; its modules keep their modes.
        dataset: map-style, of (input, target).
        batch_size: samples a pass.

    Returns:
        Logits and targets, on the CPU.

    Raises:
        ValueError: the data set is empty, ``batch_size`` is not positive, or as :class:`Outputs`.
    """
    device = device_of(model)
    logits, targets = [], []
    with evaluating(model):
        for inputs, labels in batches(dataset, batch_size):
            logits.append(model(inputs.to(device)).to(torch.float32))
            targets.append(labels)
    if not logits:
        raise ValueError("dataset: expected at least one sample")
    return Outputs(torch.cat(logits).cpu(), torch.cat(targets).cpu())


def check_same_samples(method: Outputs, reference: Outputs) -> None:
    """Raise unless two models answered to the same samples, as far as the labels tell.

    Raises:
        ValueError: other labels, or another number of samples or classes.
    """
    if method.logits.shape != reference.logits.shape or not torch.equal(
        method.targets, reference.targets
    ):
        raise ValueError(
            "reference: expected outputs for the same samples in the same order, got other labels "
            f"or sizes: {tuple(method.logits.shape)} against {tuple(reference.logits.shape)}"
        )
