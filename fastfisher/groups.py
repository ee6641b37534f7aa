"""Which group each sample of a batch belongs to, where a pass keeps one Fisher a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

GroupsOf = Callable[[Any, Any], Tensor]


def resolve_groups(groups: str | GroupsOf | None) -> GroupsOf | None:
    """The function ``(input, target) -> [N]`` that ``groups`` stands for.

    Raises:
        ValueError: it stands for none.
    """
    if groups == "target":
        return _by_target
    if groups is None or callable(groups):
        return groups
    raise ValueError(
        "groups: expected None, 'target' or a callable (input, target) -> group of each sample, "
        f"got {groups!r}"
    )


def _by_target(inputs: Any, targets: Any) -> Any:
    return targets


def sort_by_group(
    groups: GroupsOf, inputs: Any, targets: Any, count: int
) -> tuple[Any, Any, list[tuple[int, slice]]]:
    """A batch with the samples of one group side by side, and where each group lies.

    Raises:
        ValueError: the groups are not one integer a sample.
    """
    ids = groups(inputs, targets)
    if not isinstance(ids, Tensor) or ids.shape != (count,) or ids.is_floating_point():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"groups: expected integers [N] = [{count}], got {got}")
    ids = ids.long()
    if bool((ids[1:] < ids[:-1]).any()):
        ids, order = ids.sort(stable=True)
        inputs, targets = tree_map(
            lambda leaf: leaf[order.to(leaf.device)] if isinstance(leaf, Tensor) else leaf,
            (inputs, targets),
        )
    found, sizes = torch.unique_consecutive(ids, return_counts=True)
    parts, start = [], 0
    for group, size in zip(found.tolist(), sizes.tolist(), strict=True):
        parts.append((group, slice(start, start + size)))
        start += size
    return inputs, targets, parts
