"""Two controls: edits of the last layer alone, which forget a class in name only.

They leave what the network represents untouched, so that a metric which they pass says nothing of
unlearning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Edit, Job, Method, register
from .head import class_of, find_head


class _HeadControl(Method):
    """Shared: needs a forget set of one class, and a layer that makes the logits."""

    edits_weights = True

    def check(self, job: Job) -> None:
        """Look for the head and the class.

        Raises:
            ValueError: there is no such layer, the forget set has several classes, or one that the
                model has no output for.
        """
        self._target(job)

    def _target(self, job: Job) -> tuple[nn.Module, int]:
        label = class_of(job.forget_set)
        if label is None:
            raise ValueError(f"forget_set: {self.name!r} needs samples of one class only")
        head = find_head(job.model, job.forget_set)
        rows = _weight(head).shape[0]
        if not 0 <= label < rows:
            raise ValueError(f"forget_set: class {label} is not in 0..{rows - 1}")
        return head, label


@register
class HeadRow(_HeadControl):
    """Zeroes the row and the bias of the forgotten class in the last layer.

    Its logit is then 0 for every input, which still wins where all others are negative. No training
    follows in the definition: ``epochs=0``.
    """

    name = "head-row"

    def edit(self, job: Job) -> Edit:
        """Zero them in place."""
        head, label = self._target(job)
        bias = head.bias
        with torch.no_grad():
            _weight(head)[label] = 0
            if isinstance(bias, Tensor):
                bias[label] = 0
        return Edit(job.model)


@register
class LogitMask(_HeadControl):
    """Sets the bias of the forgotten class so low that its logit can never win: -1e18.

    Less in dtypes that do not reach so far. A finite number, so that losses and weight decay stay
    finite too: its probability is exactly 0, its loss about 1e18. The weights stay as they are. No
    training follows in the definition: ``epochs=0``; training on the remain set has no gradient
    that could raise the logit, and weight decay cannot in any number of steps that matters.
    """

    name = "logit-mask"

    def check(self, job: Job) -> None:
        """Look for the head, its bias and the class.

        Raises:
            ValueError: one is missing, as for "head-row".
        """
        head, _ = self._target(job)
        if head.bias is None:
            raise ValueError("model: 'logit-mask' needs a last layer with a bias")

    def edit(self, job: Job) -> Edit:
        """Set the bias in place."""
        head, label = self._target(job)
        bias = head.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[label] = -min(1e18, torch.finfo(bias.dtype).max / 2)
        return Edit(job.model)


def _weight(head: nn.Module) -> Tensor:
    assert isinstance(head.weight, Tensor)
    return head.weight
