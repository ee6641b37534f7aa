"""Parameters with several uses: reused layers, tied weights, overlapping views.

Their per-sample gradients are sums over the uses, squared after the sum. Where the uses are of one
form they are joined (:mod:`fastfisher.rules.terms`); an embedding tied to the output layer takes
the rows that a sample's tokens touch apart from the rest. Any other mixture forms the gradients of
a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..recorder import Derived, SampleAxis, Use, View
from .terms import Gather, Images, Outer, Term

# Per-sample gradients of this many elements are formed at once, at most (or of one sample, where
# that is more).
_ELEMENTS = 1 << 24


class CopyingView(Exception):
    """A view of the parameter is not one of the sums, whose strides differ."""


@dataclass(frozen=True)
class Occurrence:
    """One use of a parameter, and the gradient at its output."""

    use: Use
    slot: str
    grad: Tensor
    samples: SampleAxis

    @property
    def view(self) -> View:
        """Which entries of the parameter are used."""
        return self.use.views[self.slot]


def add_jointly(
    total: Tensor, uses: Sequence[Occurrence], count: int, alpha: float, power: int
) -> None:
    """``total += alpha * sum_n |sum of the uses' gradients for sample n| ** power``.

    Args:
        total: of the parameter's shape; float32 or float64.
        uses: every use of the parameter.
        count: samples.
        alpha: factor of what is added.
        power: 1 or 2.

    Raises:
        CopyingView: before anything is added.
    """
    views = []
    for use in uses:
        view = use.view.into(total)
        if view is None:
            raise CopyingView("used through a view that copies")
        views.append(view)
    terms = []
    for use, view in zip(uses, views, strict=True):
        term = use.use.term(use.slot, use.grad.to(total.dtype), use.samples)
        if term is None:
            break
        terms.append((term.entries(view), term))
    if len(terms) < len(uses) or not _add_joined(terms, alpha, power):
        _add_in_chunks(total, uses, count, alpha, power)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one tensor are the same entries in the same order."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _add_joined(terms: Sequence[tuple[Tensor, Term]], alpha: float, power: int) -> bool:
    """Joins terms and adds their powers; False if they cannot be joined."""
    gathers = [term for _, term in terms if isinstance(term, Gather)]
    images = [term for _, term in terms if isinstance(term, Images)]
    # Rows of a table give the orientation, if there are any.
    out = next((view for view, term in terms if isinstance(term, Gather)), terms[0][0])
    outers, is_flipped = [], False
    for view, term in terms:
        if isinstance(term, Outer) and not _same(view, out):
            view, term, is_flipped = view.t(), term.flipped(), True
        if not _same(view, out):
            return False
        if isinstance(term, Outer):
            outers.append(term)
    if images:
        if len({term.geometry for term in images}) > 1:
            return False
        images[0].joined(images[1:]).add_powers_(out, alpha, power)
    elif not gathers:
        outers[0].joined(outers[1:]).add_powers_(out, alpha, power)
    elif not outers:
        gathers[0].joined(gathers[1:]).add_powers_(out, alpha, power)
    else:
        outer, gather = outers[0].joined(outers[1:]), gathers[0].joined(gathers[1:])
        _add_tied(out, outer, gather, alpha, power, is_owned=not is_flipped)
    return True


def _add_tied(
    out: Tensor, outer: Outer, gather: Gather, alpha: float, power: int, *, is_owned: bool
) -> None:
    """An embedding tied to an output layer, without anything of the size of N tables.

    A sample's gradient is the output layer's, except in the rows of its own tokens, where the
    embedding's is added. So those rows are left out of the output layer's squares, and theirs are
    formed row by row.

    ``is_owned`` says that ``outer.grad`` is a gradient, which nobody reads meanwhile: then zeros
    stand in those rows while the others are squared, in place of a copy.
    """
    positions, tokens = outer.grad.shape[1], gather.index.shape[1]
    grad = outer.grad
    if not (is_owned and _is_dense(grad)):
        grad = grad.clone(memory_format=torch.contiguous_format)
    step = max(1, _ELEMENTS // max(1, tokens * max(positions, tokens, out.shape[1])))
    for start in range(0, len(grad), step):
        part = slice(start, start + step)
        g, x = grad[part], outer.input[part]
        index, direct = gather.index[part], gather.grad[part]
        # Equal tokens of a sample are one row, kept where the token comes first.
        equal = index.unsqueeze(2) == index.unsqueeze(1)
        first = ~equal.tril(-1).any(2)
        columns = index.unsqueeze(1).expand(-1, positions, -1)
        touched = g.gather(2, columns)
        gradients = touched.transpose(1, 2) @ x + equal.to(direct.dtype) @ direct
        g.scatter_(2, columns, 0)
        Outer(g, x).add_powers_(out, alpha, power)
        g.scatter_(2, columns, touched)
        out.index_add_(0, index[first], ops.powers_(gradients[first], power), alpha=alpha)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill their memory, each at a place of its own."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _add_in_chunks(
    total: Tensor, uses: Sequence[Occurrence], count: int, alpha: float, power: int
) -> None:
    """Forms the gradients of as many samples as fit, all uses added."""
    step = max(1, _ELEMENTS // max(1, total.numel()))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        joint = total.new_zeros(part.stop - part.start, *total.shape)
        for use in uses:
            each = use.use.per_sample(use.slot, use.grad.to(total.dtype), use.samples, part)
            if not use.view.steps:
                joint.add_(each)
                continue
            for row, value in zip(joint, each, strict=True):
                use.view.replay(row).add_(value)
        total.add_(ops.powers_(joint, power).sum(0), alpha=alpha)


def add_through_derived(
    totals: Mapping[str, Tensor],
    derived: Sequence[Derived],
    uses: Sequence[Occurrence],
    count: int,
    alpha: float,
    power: int,
) -> None:
    """Adds the powers for parameters that are used through tensors derived from them.

    A few samples at a time, their gradients with respect to derived tensors are formed, and pulled
    back to the parameters by the chain rule, one sample after the other.

    Args:
        totals: by parameter, of its shape; float32 or float64.
        derived: every derived tensor between the uses and the parameters, oldest first.
        uses: every use of the parameters and of the derived tensors.
        count: samples.
        alpha: factor of what is added.
        power: 1 or 2.

    Raises:
        CopyingView: before anything is added.
    """
    like = {**totals, **{each.name: each.leaf for each in derived}}
    dtype = max((total.dtype for total in totals.values()), key=lambda dtype: dtype.itemsize)
    uses = [use for use in uses if use.view.name in like]
    for use in uses:
        if use.view.into(torch.empty_like(like[use.view.name])) is None:
            raise CopyingView("used through a view that copies")
    elements = sum(tensor.numel() for tensor in like.values())
    step = max(1, _ELEMENTS // max(1, elements))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        values = [
            use.use.per_sample(use.slot, use.grad.to(dtype), use.samples, part) for use in uses
        ]
        for n in range(part.stop - part.start):
            rows = {name: torch.zeros_like(t, dtype=dtype) for name, t in like.items()}
            for use, value in zip(uses, values, strict=True):
                use.view.replay(rows[use.view.name]).add_(value[n])
            for each in reversed(derived):
                for view, gradient in each.pull(rows[each.name]):
                    if view.name in rows:
                        view.replay(rows[view.name]).add_(gradient)
            for name, total in totals.items():
                total.add_(ops.powers_(rows[name], power), alpha=alpha)
