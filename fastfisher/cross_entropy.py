"""Cross-entropy over classes, and its expectations over the model's own targets.

At one position, where the model gives the classes the probabilities ``p``, class ``y`` has the
gradient in the logits

    g_y = u_y (p - e_y) + b,    u_y = (1 - eps) w_y,    b = eps / C (sum(w) p - w)

with class weights ``w`` (ones) and label smoothing ``eps`` (zero). What ``kind="exact"`` adds up is
``E[(J^T g_y)**2]`` over ``y ~ p``, the squared gradient of this very loss: the Fisher where the
loss is a likelihood, and the same expectation where weights or smoothing make it none. Targets of
``ignore_index`` have no loss: as observed targets they take their position out of every kind; a
class of that number is drawn like any other, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import wide


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """The loss of ``torch.nn.CrossEntropyLoss``, summed over the positions of a sample.

    Outputs are ``[N, C, d1, ...]``: every entry of the axes after the classes is a position.
    Targets are class indices ``[N, d1, ...]`` or class probabilities of the output's shape.

    Attributes:
        weight: of each class, ``[C]``; None is one each.
        smoothing: the share of every target that is spread over all classes.
        ignored: the class index of targets without a loss.
    """

    weight: Tensor | None = None
    smoothing: float = 0.0
    ignored: int = -100

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """The losses ``[N]`` of given targets."""
        values = F.cross_entropy(
            output,
            target,
            weight=self.weight,
            ignore_index=self.ignored,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        return values.flatten(1).sum(1) if values.dim() > 1 else values

    def draw(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        """Class indices drawn from the model at every position that the observed ones count."""
        p, kept = _probabilities(output), self._kept(output, target)
        drawn = torch.multinomial(p.flatten(0, 1), 1, replacement=True, generator=generator)
        drawn = drawn.view(kept.shape).masked_fill(~kept, self.ignored)
        return drawn.view(output.shape[0], *output.shape[2:])

    def roots(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Cotangents whose squared gradients add up to the expected squared gradient.

        A single position takes ``C - 1``. Of several positions the targets are independent, given
        the output, so that ``E[(sum_t g_t)**2] = sum_t Var(g_t) + (sum_t E g_t)**2``: ``C - 1`` for
        each position that counts in any sample, and one more for the mean, which is zero only where
        the loss is a likelihood. Less would not do in general: the positions' gradients mix in the
        model, so the expected product of cotangents, of rank ``C - 1`` at every position, needs as
        many vectors as that to be written as a sum of squares.
        """
        p, kept = _probabilities(output), self._kept(output, target)
        mean = None if p.shape[1] == 1 else self._mean(p)
        for t, counts in enumerate(kept.any(0).tolist()):
            if not counts:
                continue
            here = p[:, t]
            if p.shape[1] == 1:
                vectors = _folded(partial(self._gradient, here), here, self._relation(here))
            else:
                # Centred gradients add up to nothing with their own probabilities.
                centre = None if mean is None else mean[:, t]
                vectors = _folded(partial(self._gradient, here, centre=centre), here, here)
            for vector in vectors:
                cotangent = torch.zeros_like(p)
                cotangent[:, t] = vector * kept[:, t, None]
                yield _as_output(cotangent, output)
        if mean is not None:
            yield _as_output(mean * kept[:, :, None], output)

    def outcomes(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """For each class, the gradient of its loss in the output, times its probability.

        Raises:
            ValueError: a sample has several positions.
        """
        p, kept = _probabilities(output), self._kept(output, target)
        if p.shape[1] != 1:
            raise ValueError(
                "power: 1 with kind 'exact' needs outputs [N, C]: the absolute value of a sum over "
                "positions does not split into theirs; with several positions a sample use kind "
                f"'mc', got an output {list(output.shape)}"
            )
        for j in range(p.shape[2]):
            gradient = p[:, 0, j : j + 1] * self._gradient(p[:, 0], j)
            yield _as_output((gradient * kept)[:, None], output)

    def _kept(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether each position's observed target has a loss, ``[N, T]``."""
        indices = output.shape[:1] + output.shape[2:]
        is_probable = isinstance(target, Tensor) and target.is_floating_point()
        expected = output.shape if is_probable else indices
        if not isinstance(target, Tensor) or target.shape != expected:
            got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"data: expected class indices {list(indices)} for an output {list(output.shape)}, "
                f"got targets {got}"
            )
        if is_probable:
            return torch.ones(indices, dtype=torch.bool, device=output.device).flatten(1)
        return (target != self.ignored).reshape(len(target), -1)

    def _weights(self, p: Tensor) -> Tensor:
        """Of each class, ``[C]``."""
        return p.new_ones(p.shape[-1]) if self.weight is None else self.weight.to(p)

    def _smooth(self, p: Tensor) -> Tensor:
        """``b``, of the shape of ``p [..., C]``."""
        w = self._weights(p)
        return self.smoothing / len(w) * (w.sum() * p - w)

    def _gradient(self, p: Tensor, j: int, centre: Tensor | None = None) -> Tensor:
        """``g_j`` of the shape of ``p [N, C]``, less ``centre``."""
        if j == self.ignored:
            g = torch.zeros_like(p)
        else:
            g = p.clone()
            # Minus the sum of the other classes' probabilities: p - 1 would cancel.
            g[:, j] = 0
            g[:, j] = -g.sum(1)
            g *= (1 - self.smoothing) * self._weights(p)[j]
            if self.smoothing:
                g += self._smooth(p)
        return g if centre is None else g - centre

    def _mean(self, p: Tensor) -> Tensor | None:
        """``E g`` of the shape of ``p [..., C]``, or None if it is zero."""
        lossy = p
        if 0 <= self.ignored < p.shape[-1]:
            lossy = p.clone()
            lossy[..., self.ignored] = 0
        elif self.weight is None and self.smoothing == 0:
            return None
        steep = (1 - self.smoothing) * self._weights(p) * lossy
        mean = steep.sum(-1, keepdim=True) * p - steep
        return mean + lossy.sum(-1, keepdim=True) * self._smooth(p)

    def _relation(self, p: Tensor) -> Tensor:
        """``z``, not zero, of the shape of ``p [N, C]`` with ``sum_j z_j g_j = 0``."""
        z, w = torch.zeros_like(p), self._weights(p)
        if 0 <= self.ignored < len(w):
            z[:, self.ignored] = 1
            return z
        weightless = (w == 0).nonzero()
        if len(weightless):
            # What the other case tends to as one weight vanishes.
            z[:, int(weightless[0])] = 1
        else:
            z = p / w
        return z - self.smoothing / len(w) * z.sum(1, keepdim=True)


def _probabilities(output: Tensor) -> Tensor:
    """The model's distribution at every position, ``[N, T, C]``."""
    logits = wide(output).movedim(1, -1)
    return logits.reshape(len(output), -1, output.shape[1]).softmax(2)


def _as_output(cotangent: Tensor, output: Tensor) -> Tensor:
    """``[N, T, C]`` in the shape of the output ``[N, C, d1, ...]``."""
    return cotangent.view(len(output), *output.shape[2:], -1).movedim(-1, 1)


def _folded(gradient: Callable[[int], Tensor], p: Tensor, relation: Tensor) -> Iterator[Tensor]:
    """``C - 1`` vectors with the second moment ``sum_j p_j g_j g_j^T`` of ``C`` dependent ones.

    With ``z`` the relation, the unit vector ``c`` along ``z_j / sqrt(p_j)`` is one that the matrix
    of columns ``sqrt(p_j) g_j`` maps to zero. The Householder reflection that takes ``c`` to the
    last axis leaves the columns' second moment as it is, and makes the last of them zero.
    """
    tiny = torch.finfo(p.dtype).tiny
    root = p.clamp(min=tiny).sqrt()
    c = relation / root
    # First by the largest entry: squares could overflow.
    c = c / c.abs().amax(1, keepdim=True).clamp(min=tiny)
    c = c / c.norm(dim=1, keepdim=True).clamp(min=tiny)
    last = p.shape[1] - 1
    c = torch.where(c[:, last:] < 0, -c, c)
    rest = root[:, last:] / (1 + c[:, last:]) * gradient(last)
    for j in range(last):
        yield root[:, j : j + 1] * gradient(j) - c[:, j : j + 1] * rest
