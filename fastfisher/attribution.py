"""Which rows of a site's output belong to which sample, found by probing, not by guessing.

A rule turns the gradient ``g`` at an output into per-sample gradients, so it must know where the
samples lie in it: first axis, second (``[T, N, E]``), or merged into another (``[N * T, E]``).
Shapes cannot tell ``T`` from ``N``. A probe can: two samples are run, an arbitrary function of each
one's output is differentiated on its own, and the entries of ``g`` that it reaches are that
sample's. A site where no axis explains both probes shares its output between samples, or mixes
them, and is not attributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recorder import SampleAxis, Site

PROBES = 2


@dataclass(frozen=True)
class Layout:
    """Where a site's samples may lie: every ``(axis, minor)`` that explains the probes."""

    function: str
    names: tuple[str, ...]
    occurrence: int
    dims: int
    candidates: tuple[tuple[int, bool], ...]
    reason: str = ""
    #: Nothing but parameters and constants enters the call, and several samples read its output.
    shared: bool = False

    @property
    def key(self) -> tuple[str, tuple[str, ...], int]:
        """:attr:`Site.key` of the call."""
        return self.function, self.names, self.occurrence

    def matches(self, site: Site) -> bool:
        """Whether ``site`` is the call that was probed."""
        return (
            self.occurrence == site.occurrence
            and self.names == site.names
            and self.function == site.function
            and self.dims == len(site.output_shape)
        )

    def resolve(self, shape: Sequence[int], count: int) -> SampleAxis | str:
        """The axis of an output of ``shape`` over ``count`` samples, or why there is none."""
        if count == 1:
            return SampleAxis(1, None)
        if not self.candidates:
            return self.reason
        fitting = {
            (axis, minor and shape[axis] != count)
            for axis, minor in self.candidates
            if shape[axis] % count == 0
        }
        if len(fitting) != 1:
            return "its output does not show which rows belong to which sample"
        return SampleAxis(count, *fitting.pop())


def lay_out(site: Site, reached: Mapping[int, Tensor]) -> Layout:
    """The layout of ``site``, given for each probe the mask of entries its gradient reached."""
    touched = {probe: mask for probe, mask in reached.items() if bool(mask.any())}
    dims = len(site.output_shape)
    if not touched:
        return Layout(*site.key, dims, (), "no gradient reached it in a probe")
    candidates = []
    for axis in site.use.sample_axes:
        size = site.output_shape[axis]
        if size % PROBES:
            continue
        index = torch.arange(size)
        owners = {False: index // (size // PROBES)}
        if size > PROBES:
            owners[True] = index % PROBES
        others = [d for d in range(dims) if d != axis]
        lines = {p: mask.any(others) if others else mask for p, mask in touched.items()}
        for minor, owner in owners.items():
            if not any(bool(line.cpu()[owner != p].any()) for p, line in lines.items()):
                candidates.append((axis, minor))
    reason = "" if candidates else "its output is shared between samples, or mixes them"
    return Layout(*site.key, dims, tuple(candidates), reason, not candidates and site.source)
