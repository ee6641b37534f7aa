"""Zero the weights that matter most for a forget set, exactly and reversibly.

The score of a parameter is ``F_f - w * F_r`` (forget and remain Fisher, paper section 3.2). The
top ``R`` of all scored units, over all parameters together, is set to zero in place. What is
selected depends on the scores alone, never on the device or the number of threads: ties go to the
lowest flat index in the order of ``model.named_parameters()``. The selection itself, which reads
the scores twice, is in :mod:`fastfisher.topr`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import chain
from numbers import Real
from typing import Any, Literal, NoReturn, TypeAlias, cast, get_args, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import topr
from .files import replacing

Granularity = Literal["parameter", "kernel", "channel"]
Scope: TypeAlias = "Literal['global', 'layer'] | Callable[[str], Hashable]"

# Leading dimensions of a parameter that number its units.
_UNIT_DIMS = {"kernel": 2, "channel": 1}
_FORMAT = "fastfisher.mask"
# Version 1 had no groups at first: all parameters competed with each other. Version 3 adds masks of
# channels, which may name buffers, and parameters that are zeroed without competing.
_VERSION, _READ_VERSIONS = "3", ("1", "2", "3")


def fisher_mask_(
    model: nn.Module,
    forget: Mapping[str, Tensor],
    remain: Mapping[str, Tensor] | None = None,
    *,
    ratio: float,
    remain_weight: float = 1.0,
    granularity: Granularity = "parameter",
    exclude: Sequence[str] = (),
    scope: Scope = "global",
) -> Mask:
    """Zero, in place, the units of ``model`` with the highest score ``F_f - w * F_r``.

    The score is computed in the Fisher's dtype as two rounded operations, ``r * w`` and then the
    subtraction. Parameters that ``forget`` does not name are never scored. Everything is checked
    before the first write: a call that raises has changed nothing.

    Args:
        model: modified in place; parameters keep their storage, and elements that are not
            selected keep their bits.
        forget: Fisher of the forget set, one floating-point tensor of the parameter's shape per
            name, as :func:`fastfisher.fisher_diag` returns it. A parameter known under several
            names (tied weights) counts once, under the first.
        remain: Fisher of the remain set: the names, shapes and dtypes of ``forget``. ``None``
            scores by ``F_f`` alone.
        ratio: ``R`` in [0, 1]. ``k = floor(R * N)`` of the ``N`` scored units are zeroed, where
            the floor is the largest ``k`` whose quotient ``k / N`` is not above ``R`` as floats:
            0.29 of 100 units is 29. ``k = 0`` changes nothing.
        remain_weight: ``w``, finite and not negative. With Fishers of reduction "mean", 1 is the
            choice of the paper's authors in their code and ``len(remain) / len(forget)`` that of
            the paper's text.
        granularity: "parameter": each scalar is a unit (paper, section 3.2). "kernel": each
            convolution kernel (one output and one input channel, all positions) is a unit scored
            by its mean, taken in float64 in index order; each scalar of a matrix is one too; the
            unit of the authors' code. Parameters with fewer than two dimensions (biases, norms)
            then neither scored nor masked. "channel" is refused: see :func:`channel_mask_`.
        exclude: parameter names or :mod:`fnmatch` patterns, such as ``"fc.*"``, that are neither
            scored nor masked.
        scope: which parameters compete. "global": all of them. "layer": those of one module, such
            as a weight and its bias. A callable: those whose names it maps to the same key. In
            each group of ``N`` units, its own ``floor(R * N)`` are zeroed.

    Returns:
        The mask, which can undo itself.

    Raises:
        ValueError: an argument is out of range; names, shapes or dtypes do not match; a score is
            NaN or infinite; an ``exclude`` pattern matches nothing; nothing is left to score; or a
            parameter that would be masked shares memory with another one.
        TypeError: an argument is of the wrong type.
    """
    [plan] = plan_masks(
        model,
        forget,
        remain,
        ratios=[ratio],
        remain_weight=remain_weight,
        granularity=granularity,
        exclude=exclude,
        scope=scope,
    )
    return plan.apply_()


def plan_masks(
    model: nn.Module,
    forget: Mapping[str, Tensor],
    remain: Mapping[str, Tensor] | None = None,
    *,
    ratios: Sequence[float],
    remain_weight: float = 1.0,
    granularity: Granularity = "parameter",
    exclude: Sequence[str] = (),
    scope: Scope = "global",
) -> list[MaskPlan]:
    """Find, for several ratios together, what :func:`fisher_mask_` would zero; modifies nothing.

    The scores are read once for all ratios.

    Args:
        model: as of :func:`fisher_mask_`.
        forget: as of :func:`fisher_mask_`; not to be modified while a plan is in use.
        remain: as of :func:`fisher_mask_`; not to be modified while a plan is in use.
        ratios: each as ``ratio`` of :func:`fisher_mask_`.
        remain_weight: as of :func:`fisher_mask_`.
        granularity: as of :func:`fisher_mask_`.
        exclude: as of :func:`fisher_mask_`.
        scope: as of :func:`fisher_mask_`.

    Returns:
        One plan per ratio. Undo the mask of one before you apply another.

    Raises:
        ValueError: as :func:`fisher_mask_`.
        TypeError: as :func:`fisher_mask_`.
    """
    ratios = [_checked_real("ratio", ratio, at_most=1.0) for ratio in ratios]
    weight = _checked_real("remain_weight", remain_weight)
    parameters, first_names = _named(model)
    forget_values = _by_first_name("forget", forget, parameters, first_names)
    remain_values: dict[str, Tensor] = {}
    if remain is not None:
        remain_values = _by_first_name("remain", remain, parameters, first_names)
        _check_pair(forget, remain, forget_values, remain_values)
    names = _scored_names(parameters, first_names, forget_values, granularity, exclude)

    plans = [
        MaskPlan(ratio, granularity, None if remain is None else weight, tuple(names), [])
        for ratio in ratios
    ]
    finite: list[Tensor] = []
    groups = _grouped(names, scope)
    for group in groups:
        scores = [forget_values[name] for name in group]
        others = [remain_values[name] for name in group] if remain_values else []
        if granularity == "kernel":
            if others:
                scores = [s - o.to(s.device) * weight for s, o in zip(scores, others, strict=True)]
                others = []
            scores = [_unit_scores(score, granularity) for score in scores]
        units = sum(score.numel() for score in scores)
        counts = [_unit_count(ratio, units) for ratio in ratios]
        found = topr.select_top(scores, counts, remain=others, weight=weight)
        finite.append(found.finite)
        members = {name: parameters[name] for name in group}
        for plan, k, chosen in zip(plans, counts, found.rows(), strict=True):
            plan.groups.append(_Group(members, scores, others, weight, k, chosen))
    # Read when all is under way: on another device than the CPU, the host has to wait.
    is_finite = [ok for group in topr.on_cpu(finite) for ok in group.tolist()]
    grouped = [name for group in groups for name in group]
    not_finite = {name for name, ok in zip(grouped, is_finite, strict=True) if not ok}
    for name in names:
        if name in not_finite:
            raise ValueError(f"the score of parameter {name!r} is NaN or infinite")
    return plans


@dataclass(frozen=True, eq=False, repr=False)
class MaskPlan:
    """A selection that is ready to be zeroed; made by :func:`plan_masks`.

    Attributes:
        ratio: ``R``.
        granularity: "parameter" or "kernel".
        remain_weight: ``w``; ``None`` if no remain Fisher is used.
        names: of the scored parameters, in parameter order.
        groups: the parameters that compete with each other, and what is selected of them.
    """

    ratio: float
    granularity: Granularity
    remain_weight: float | None
    names: tuple[str, ...]
    groups: list[_Group]

    def apply_(self) -> Mask:
        """Zero the selected units of the model, in place.

        Returns:
            The mask, which can undo itself.
        """
        zeroed: dict[str, _Zeroed] = {}
        if self.granularity == "kernel":
            for group in self.groups:
                zeroed |= group.zero_kernels_()
        else:
            # Read when all is under way: on another device than the CPU, the host has to wait.
            records = topr.Zeroing.records([group.start_zeroing_() for group in self.groups])
            for group, record in zip(self.groups, records, strict=True):
                for (name, parameter), part in zip(group.parameters.items(), record, strict=True):
                    own = _Zeroed(parameter.shape, part.code, part.values)
                    zeroed[name] = own.shortest(part.runs)
        keys = topr.on_cpu([group.chosen.key for group in self.groups])
        # Adding 0.0 makes -0.0, which ranks as +0.0, read as 0.0.
        thresholds = [
            topr.value_of(int(key), group.scores) + 0.0
            for key, group in zip(keys, self.groups, strict=True)
            if group.k
        ]
        return Mask(
            self.ratio,
            self.granularity,
            self.remain_weight,
            min(thresholds, default=None),
            tuple(tuple(group.parameters) for group in self.groups),
            {name: zeroed[name] for name in self.names},
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Group:
    """Parameters that compete with each other.

    Attributes:
        parameters: of the model, by name.
        scores: of the units of each parameter: of all its elements, or of its kernels.
        remain: nothing, or what to subtract from each of ``scores``, times ``weight``.
        weight: of ``remain``.
        k: units selected of all of them.
        chosen: which they are.
    """

    parameters: dict[str, nn.Parameter]
    scores: list[Tensor]
    remain: list[Tensor]
    weight: float
    k: int
    chosen: topr.Chosen

    @torch.no_grad()
    def zero_kernels_(self) -> dict[str, _Zeroed]:
        """Zero the kernels that are selected, and return what they were."""
        zeroed = _record(self.parameters, _masks(self.scores, self.chosen))
        for parameter, part in zip(self.parameters.values(), zeroed.values(), strict=True):
            if part.values.numel():
                parameter.masked_fill_(part.mask().to(parameter.device), 0)
        return zeroed

    def start_zeroing_(self) -> topr.Zeroing:
        """Zero the elements that are selected, and record what they were."""
        return topr.start_zeroing_(
            list(self.parameters.values()),
            self.scores,
            self.chosen,
            remain=self.remain,
            weight=self.weight,
            record=True,
        )


def random_mask_(
    model: nn.Module,
    *,
    ratio: float,
    generator: torch.Generator | None = None,
    granularity: Granularity = "parameter",
    exclude: Sequence[str] = (),
    scope: Scope = "global",
) -> Mask:
    """Zero, in place, units of ``model`` drawn uniformly without replacement: the control.

    Args:
        model: modified in place, as by :func:`fisher_mask_`. Units are those of the parameters
            that require grad, which is what :func:`fastfisher.fisher_diag` scores by default.
        ratio: ``R`` in [0, 1], as in :func:`fisher_mask_`.
        generator: source of the draw, of any device; ``None`` is torch's global CPU generator. A
            CPU generator gives the same mask whatever the model's device.
        granularity: as in :func:`fisher_mask_`; channels are drawn by the method "random-mask" of
            :func:`fastfisher.unlearn`, which can find them.
        exclude: as in :func:`fisher_mask_`.
        scope: as in :func:`fisher_mask_`: the units of each group are drawn on their own.

    Returns:
        The mask; its ``threshold`` and ``remain_weight`` are ``None``.

    Raises:
        ValueError: as :func:`fisher_mask_`, where it applies.
        TypeError: as :func:`fisher_mask_`.
    """
    ratio = _checked_real("ratio", ratio, at_most=1.0)
    parameters, first_names = _named(model)
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    names = _scored_names(parameters, first_names, trainable, granularity, exclude)

    device = generator.device if generator is not None else torch.device("cpu")
    groups = _grouped(names, scope)
    zeroed: dict[str, _Zeroed] = {}
    for group in groups:
        members = {name: parameters[name] for name in group}
        shapes = [_unit_shape(parameter.shape, granularity) for parameter in members.values()]
        sizes = [math.prod(shape) for shape in shapes]
        k = _unit_count(ratio, sum(sizes))
        chosen = torch.zeros(sum(sizes), dtype=torch.bool)
        chosen[torch.randperm(sum(sizes), generator=generator, device=device)[:k].cpu()] = True
        parts = zip(chosen.split(sizes), shapes, strict=True)
        zeroed |= _record(members, [part.view(shape) for part, shape in parts])
    mask = Mask(
        ratio,
        granularity,
        None,
        None,
        tuple(map(tuple, groups)),
        {name: zeroed[name] for name in names},
    )
    mask.apply_(model)
    return mask


@dataclass(frozen=True)
class Channels:
    """The output channels of one layer, and what is zeroed with them.

    Attributes:
        weight: name of the layer's weight ``[channels, ...]``, by which the layer is known.
        others: further parameters and buffers, such as those of a norm, that hold one element for
            each channel: name, and the index there of channel 0.
    """

    weight: str
    others: tuple[tuple[str, int], ...] = ()


def channel_mask_(
    model: nn.Module,
    channels: Sequence[Channels],
    scores: Sequence[Tensor],
    *,
    ratio: float,
    exclude: Sequence[str] = (),
    scope: Scope = "global",
    select: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Mask:
    """Zero, in place, whole output channels of ``model``: those with the highest score.

    Args:
        model: modified in place; what is not selected keeps its bits.
        channels: the layers; a tensor may belong to channels of several of them.
        scores: of each layer ``[channels]``, floating point.
        ratio: as in :func:`fisher_mask_`, of channels.
        exclude: as in :func:`fisher_mask_`; an excluded weight excludes the channels of its layer.
            Buffers can be excluded by their names too.
        scope: as in :func:`fisher_mask_`, by the names of the layers' weights.
        select: from the scores of one group to a bool tensor each, instead of the top ``ratio``.

    Returns:
        The mask, of granularity "channel", which can undo itself.

    Raises:
        ValueError: an argument is out of range; names or shapes do not match; a score is NaN or
            infinite; nothing is left to score; or what would be masked shares memory. Nothing has
            been modified.
        TypeError: an argument is of the wrong type.
    """
    ratio = _checked_real("ratio", ratio, at_most=1.0)
    tensors, first_names = _named(model, buffers=True)
    excluded = _excluded(first_names, exclude)
    layers: dict[str, tuple[Channels, Tensor]] = {}
    for layer, score in zip(channels, scores, strict=True):
        if layer.weight not in tensors:
            raise ValueError(f"channels: the model has no weight {layer.weight!r} of its own")
        if layer.weight in layers:
            raise ValueError(f"channels: {layer.weight!r} is named twice")
        if score.shape != tensors[layer.weight].shape[:1]:
            raise ValueError(
                f"scores of {layer.weight!r}: expected one for each of "
                f"{len(tensors[layer.weight])} channels, got shape {tuple(score.shape)}"
            )
        if layer.weight in excluded:
            continue
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"the score of {layer.weight!r} is NaN or infinite")
        layers[layer.weight] = layer, score
    if not layers:
        raise ValueError(f"no channel is left to score: {exclude=}")

    groups = _grouped([name for name in tensors if name in layers], scope)
    selected: dict[str, Tensor] = {}
    for group in groups:
        values = [layers[name][1] for name in group]
        k = _unit_count(ratio, sum(value.numel() for value in values))
        chosen = select_top(values, k) if select is None else select(values)
        selected |= {name: part.cpu() for name, part in zip(group, chosen, strict=True)}
    rows: dict[str, Tensor] = {}
    for name, (layer, _) in layers.items():
        for part, start in ((name, 0), *layer.others):
            own = first_names.get(part)
            end = start + len(selected[name])
            if own is None or not tensors[own].dim() or end > len(tensors[own]):
                raise ValueError(
                    f"channels: the model has no parameter or buffer {part!r} of {end} channels"
                )
            if own not in excluded:
                row = rows.setdefault(own, torch.zeros(len(tensors[own]), dtype=torch.bool))
                row[start:end] |= selected[name]
    zeroed = {name: tensor for name, tensor in tensors.items() if name in rows}
    thresholds = [float(layers[n][1].cpu()[m].min()) for n, m in selected.items() if m.any()]
    mask = Mask(
        ratio,
        "channel",
        None,
        min(thresholds, default=None),
        tuple(map(tuple, groups)),
        _record(zeroed, [rows[name] for name in zeroed]),
    )
    mask.apply_(model)
    return mask


def select_top(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Select the ``k`` largest elements of several tensors together, exactly.

    Order: larger first; equal elements by position, the earlier tensor and then the lower
    row-major index first. -0.0 equals +0.0, denormals differ from zero, NaN ranks below all else.

    Nothing is concatenated or sorted; see :func:`fastfisher.topr.select_top`.

    Args:
        scores: floating-point tensors of any shape, strides, dtype and device.
        k: how many to select, 0 to the number of elements.

    Returns:
        One contiguous bool tensor per score, of its shape and on its device; ``k`` are True.

    Raises:
        TypeError: a score is not of a floating-point dtype.
        ValueError: ``k`` is out of range.
    """
    [chosen] = topr.select_top(scores, [k]).rows()
    return _masks(scores, chosen)


def _masks(scores: Sequence[Tensor], chosen: topr.Chosen) -> list[Tensor]:
    """A selection as one contiguous bool tensor per score, of its shape and on its device."""
    masks = [torch.ones(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    topr.zero_selected_(masks, scores, chosen)
    return [mask.logical_not_() for mask in masks]


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which weights were zeroed, and what they were.

    Made by :func:`fisher_mask_`, :func:`random_mask_`, :func:`channel_mask_` and :meth:`load`.
    Holds, on the CPU, one bit per scored element, or the indices of the zeroed ones, or the runs of
    such indices, whichever is the smallest, and the original values of the zeroed ones.

    Attributes:
        ratio: ``R``, the fraction of the units that was asked for.
        granularity: "parameter", "kernel" or "channel": what a unit is. With "channel", biases,
            norms and buffers are zeroed with the channel of a layer's weight, and are no units.
        remain_weight: ``w``; ``None`` if no remain Fisher was used.
        threshold: the smallest score selected; ``None`` for an empty or a random mask.
        groups: names of the parameters that competed with each other: one group of all of them
            where the scope was "global".
    """

    ratio: float
    granularity: Granularity
    remain_weight: float | None
    threshold: float | None
    groups: tuple[tuple[str, ...], ...]
    _zeroed: Mapping[str, _Zeroed]

    @property
    def counts(self) -> dict[str, int]:
        """Units zeroed in each scored parameter; they sum to :attr:`k`."""
        return {
            name: zeroed.values.numel() // _unit_size(zeroed.shape, self.granularity)
            for name, zeroed in self._scored()
        }

    @property
    def k(self) -> int:
        """Number of units zeroed."""
        return sum(self.counts.values())

    @property
    def units(self) -> int:
        """Number of units scored, ``N``."""
        return sum(
            math.prod(_unit_shape(zeroed.shape, self.granularity)) for _, zeroed in self._scored()
        )

    def _scored(self) -> list[tuple[str, _Zeroed]]:
        scored = {name for group in self.groups for name in group}
        return [(name, zeroed) for name, zeroed in self._zeroed.items() if name in scored]

    @property
    def zeroed(self) -> int:
        """Number of scalars zeroed."""
        return sum(zeroed.values.numel() for zeroed in self._zeroed.values())

    def __repr__(self) -> str:
        return (
            f"Mask(k={self.k}, units={self.units}, zeroed={self.zeroed}, ratio={self.ratio}, "
            f"granularity={self.granularity!r}, remain_weight={self.remain_weight}, "
            f"threshold={self.threshold})"
        )

    def as_dict(self) -> dict[str, Tensor]:
        """The mask as one bool tensor per parameter or buffer it names, of its shape, on the CPU.

        Returns:
            New tensors; True where the parameter was zeroed.
        """
        return {name: zeroed.mask() for name, zeroed in self._zeroed.items()}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero the masked elements of ``model``, in place.

        The original values that :meth:`undo_` restores stay those of the model that was scored.

        Args:
            model: has every scored parameter, of the same shape.

        Raises:
            ValueError: a name or a shape does not match, or masked parameters share memory;
                nothing has been modified.
        """
        for _, parameter, zeroed in self._targets(model):
            parameter.masked_fill_(zeroed.mask().to(parameter.device), 0)

    @torch.no_grad()
    def undo_(self, model: nn.Module) -> None:
        """Give the masked elements of ``model`` their original values back, bit for bit, in place.

        Args:
            model: has every scored parameter, of the same shape and dtype.

        Raises:
            ValueError: a name, a shape or a dtype does not match, or masked parameters share
                memory; nothing has been modified.
        """
        targets = self._targets(model)
        for name, parameter, zeroed in targets:
            if parameter.dtype != zeroed.values.dtype:
                raise ValueError(
                    f"parameter {name!r} is {parameter.dtype} but was "
                    f"{zeroed.values.dtype} when it was masked: its bits cannot be restored"
                )
        for _, parameter, zeroed in targets:
            mask = zeroed.mask().to(parameter.device)
            parameter[mask] = zeroed.values.to(parameter.device)

    def _targets(self, model: nn.Module) -> list[tuple[str, Tensor, _Zeroed]]:
        """Match the mask to ``model``; only parameters with something to write come back."""
        parameters, first_names = _named(model, buffers=self.granularity == "channel")
        owners: dict[str, str] = {}
        for name, zeroed in self._zeroed.items():
            if name not in first_names:
                raise ValueError(f"the model has no parameter {name!r}, which the mask names")
            first = first_names[name]
            if first in owners:
                raise ValueError(
                    f"parameters {owners[first]!r} and {name!r} of the mask are one in the model"
                )
            owners[first] = name
            if parameters[first].shape != zeroed.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(parameters[first].shape)}, "
                    f"the mask was made for {tuple(zeroed.shape)}"
                )
        _check_writable(parameters, owners)
        return [
            (name, parameters[first], self._zeroed[name])
            for first, name in owners.items()
            if self._zeroed[name].values.numel()
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as one safetensors file, replacing ``path`` in one step.

        Args:
            path: of the file; its folder exists.
        """
        tensors = {}
        for name, zeroed in self._zeroed.items():
            tensors[f"mask:{name}"] = zeroed.code
            tensors[f"values:{name}"] = zeroed.values
        description = {
            "ratio": self.ratio,
            "granularity": self.granularity,
            "remain_weight": self.remain_weight,
            "threshold": self.threshold,
            "groups": [list(group) for group in self.groups],
            "shapes": {name: list(zeroed.shape) for name, zeroed in self._zeroed.items()},
        }
        with replacing(path) as temporary:
            header = {"format": _FORMAT, "version": _VERSION, "mask": json.dumps(description)}
            save_file(tensors, temporary, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a mask that :meth:`save` wrote, of this version of fastfisher or an earlier one.

        Args:
            path: of the file.

        Returns:
            The mask.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a mask, its parts contradict each other, or a later version
                of fastfisher wrote it in a format that is not known here.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                names = file.keys()
                # Cloned, since what safetensors returns may still be backed by the file.
                tensors = {name: file.get_tensor(name).clone() for name in names}
            return _parse(header, tensors)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} is not a valid mask file: {error}") from error


@dataclass(frozen=True, eq=False)
class _Zeroed:
    """What was zeroed in one parameter.

    Attributes:
        shape: of the parameter.
        code: the mask in row-major order: uint8, eight elements a byte, lowest bit first; or
            int32/int64, the ascending flat indices; or int32/int64 ``[runs, 2]``, the first index
            of each run of consecutive ones and its length. Whichever is the smallest.
        values: the original values in row-major order, of the parameter's dtype.
    """

    shape: torch.Size
    code: Tensor
    values: Tensor

    @classmethod
    def record(cls, parameter: Tensor, mask: Tensor) -> _Zeroed:
        """Take the masked elements of ``parameter``; both have the same shape, on any devices."""
        values = parameter.detach()[mask.to(parameter.device)].cpu()
        flat = mask.reshape(-1).cpu()
        code, runs = topr.encode(flat)
        return cls(parameter.shape, code, values).shortest(runs)

    def shortest(self, runs: int) -> _Zeroed:
        """The same with the mask as its ``runs`` runs, where that takes less memory."""
        dtype = topr.index_dtype(math.prod(self.shape))
        if 2 * runs * dtype.itemsize >= self.code.nbytes:
            return self
        index = self.index()
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1] + 1
        starts = first.nonzero()[:, 0]
        lengths = torch.cat([starts, torch.tensor([index.numel()])]).diff()
        return _Zeroed(self.shape, torch.stack([index[starts], lengths], 1).to(dtype), self.values)

    def index(self) -> Tensor:
        """Decode: the ascending flat indices, int64."""
        if self.code.dtype == torch.uint8:
            return self.mask().view(-1).nonzero()[:, 0]
        if self.code.dim() == 1:
            return self.code.long()
        starts, lengths = self.code.long().unbind(1)
        # Within a run, the index and the rank among the masked elements grow together.
        ahead = starts - (lengths.cumsum(0) - lengths)
        return torch.arange(int(lengths.sum())) + ahead.repeat_interleave(lengths)

    def mask(self) -> Tensor:
        """Decode: a bool tensor of the parameter's shape, on the CPU."""
        size = math.prod(self.shape)
        if self.code.dtype == torch.uint8:
            flat = ((self.code[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool()
            return flat.view(-1)[:size].view(self.shape)
        flat = torch.zeros(size, dtype=torch.bool)
        flat[self.index()] = True
        return flat.view(self.shape)

    def check(self, name: str, unit_size: int) -> None:
        """Raise ``ValueError`` unless the parts, read from a file, are those of a mask."""
        size = math.prod(self.shape)
        is_runs = self.code.dim() == 2 and self.code.dtype != torch.uint8
        if not (self.code.dim() == 1 or is_runs) or self.values.dim() != 1:
            raise ValueError(f"the tensors of {name!r} are not flat")
        if self.code.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise ValueError(f"the mask of {name!r} has dtype {self.code.dtype}")
        if self.code.dtype == torch.uint8:
            if self.code.numel() != _packed_size(size):
                raise ValueError(f"the mask of {name!r} does not have one bit per element")
            if size % 8 and int(self.code[-1]) >> (size % 8):
                raise ValueError(f"the mask of {name!r} has bits beyond its last element")
            count = int(self.mask().sum())
        elif is_runs:
            if self.code.shape[1] != 2:
                raise ValueError(f"the runs of {name!r} are not pairs of a start and a length")
            starts, lengths = self.code.long().unbind(1)
            ends = starts + lengths
            # Where the sum overflowed, an end is not after its start.
            ascending = bool((starts >= 0).all() and (ends > starts).all())
            ascending = ascending and bool((starts[1:] > ends[:-1]).all())
            if not ascending or (ends.numel() and int(ends[-1]) > size):
                raise ValueError(f"the runs of {name!r} are not ascending within its shape")
            count = int(lengths.sum())
        else:
            ascending = bool((self.code[1:] > self.code[:-1]).all())
            count = self.code.numel()
            if count and not (ascending and self.code[0] >= 0 and int(self.code[-1]) < size):
                raise ValueError(f"the indices of {name!r} are not ascending within its shape")
        # Before decoding: a file must not make this ask for more memory than its own values take.
        if self.values.numel() != count:
            raise ValueError(
                f"{name!r} has {self.values.numel()} values for {count} masked elements"
            )
        index = self.index()
        whole = index.numel() % unit_size == 0
        if whole and index.numel():
            units = index.view(-1, unit_size)
            starts = units[:, :1]
            aligned = bool((starts % unit_size == 0).all())
            whole = aligned and bool((units == starts + torch.arange(unit_size)).all())
        if not whole:
            raise ValueError(f"the mask of {name!r} splits a unit")


def _record(parameters: Mapping[str, Tensor], selected: Sequence[Tensor]) -> dict[str, _Zeroed]:
    """Take the selected units of ``parameters``, in the same order."""
    zeroed = {}
    for (name, parameter), units in zip(parameters.items(), selected, strict=True):
        positions = [1] * (parameter.dim() - units.dim())
        mask = units.view((*units.shape, *positions)).expand(parameter.shape)
        zeroed[name] = _Zeroed.record(parameter, mask)
    return zeroed


def _grouped(names: Sequence[str], scope: object) -> list[list[str]]:
    """The names that compete with each other, in order."""
    if scope == "global":
        return [list(names)]
    if scope == "layer":
        return _grouped(names, lambda name: name.rpartition(".")[0])
    check_scope(scope)
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        key = cast("Callable[[str], Hashable]", scope)(name)
        try:
            groups.setdefault(key, []).append(name)
        except TypeError:
            raise TypeError(
                f"scope must return hashable keys, got {type(key).__name__} for {name!r}"
            ) from None
    return list(groups.values())


def check_scope(scope: object) -> None:
    """Raise unless ``scope`` is one of :func:`fisher_mask_`.

    Raises:
        ValueError: it is not.
    """
    if scope not in ("global", "layer") and not callable(scope):
        raise ValueError(f"scope must be 'global', 'layer' or a callable, got {scope!r}")


def _parse(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Mask:
    """Rebuild a mask from the content of its file; every contradiction is a ``ValueError``."""
    if header.get("format") != _FORMAT:
        raise ValueError(f"the header does not say that its format is {_FORMAT!r}")
    version = header.get("version")
    if version not in _READ_VERSIONS:
        raise ValueError(
            f"its format is of version {version!r}, this fastfisher reads {_READ_VERSIONS}"
        )
    description = json.loads(header.get("mask", ""), parse_constant=_refuse_constant)
    fields = {"ratio", "granularity", "remain_weight", "threshold", "groups", "shapes"}
    ungrouped = version == "1" and isinstance(description, dict) and "groups" not in description
    if ungrouped:
        fields.remove("groups")
    if not isinstance(description, dict) or description.keys() != fields:
        raise ValueError(f"the header does not have the fields {sorted(fields)}")
    ratio = _checked_real("ratio", description["ratio"], at_most=1.0)
    granularity = _checked_granularity(description["granularity"], get_args(Granularity))
    weight = description["remain_weight"]
    if weight is not None:
        weight = _checked_real("remain_weight", weight)
    threshold = description["threshold"]
    if threshold is not None:
        threshold = _checked_real("threshold", threshold, at_least=-math.inf)
    shapes = description["shapes"]
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise ValueError("shapes must map names to lists of sizes")
    if tensors.keys() != {f"{part}:{name}" for name in shapes for part in ("mask", "values")}:
        raise ValueError("the tensors are not those of the parameters in the header")
    groups = [list(shapes)] if ungrouped else description["groups"]
    if (
        not isinstance(groups, list)
        or not all(isinstance(group, list) and group for group in groups)
        or not all(isinstance(name, str) for group in groups for name in group)
        or not _covers([name for group in groups for name in group], shapes, granularity)
    ):
        raise ValueError("groups must be lists of names, each parameter's in one of them")
    zeroed = {}
    for name, shape in shapes.items():
        if granularity == "kernel" and not _is_scored(len(shape), granularity):
            raise ValueError(f"{name!r} has no kernels")
        zeroed[name] = _Zeroed(
            torch.Size(shape), tensors[f"mask:{name}"], tensors[f"values:{name}"]
        )
        zeroed[name].check(name, _unit_size(zeroed[name].shape, granularity))
    mask = Mask(ratio, granularity, weight, threshold, tuple(map(tuple, groups)), zeroed)
    counts = mask.counts
    for group in groups:
        k = sum(counts[name] for name in group)
        units = sum(math.prod(_unit_shape(zeroed[name].shape, granularity)) for name in group)
        # How many channels are zeroed is up to the method.
        if granularity != "channel" and k != _unit_count(ratio, units):
            raise ValueError(f"{k} of {units} units is not the ratio {ratio}")
    if mask.k == 0 and threshold is not None:
        raise ValueError("an empty mask has no threshold")
    return mask


def _covers(grouped: Sequence[str], shapes: Mapping[str, object], granularity: Granularity) -> bool:
    """Whether each scored name is in one group; only channels have parts that are not scored."""
    if granularity == "channel":
        return len(set(grouped)) == len(grouped) and shapes.keys() >= set(grouped)
    return sorted(grouped) == sorted(shapes)


def _packed_size(elements: int) -> int:
    """Bytes that hold one bit per element."""
    return (elements + 7) // 8


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(size) is int and 0 < size < 2**63 for size in shape)


def _checked_real(
    name: str, value: object, *, at_least: float = 0.0, at_most: float = math.inf
) -> float:
    """``value`` as a finite float within the bounds, or a ``ValueError`` that names it."""
    try:
        real = not isinstance(value, bool) and isinstance(value, Real)
        number = float(cast(Real, value)) if real else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and at_least <= number <= at_most):
        raise ValueError(
            f"{name} must be a finite real number in [{at_least:g}, {at_most:g}], got {value!r}"
        )
    return number


def _checked_granularity(
    value: object, expected: Sequence[str] = ("parameter", "kernel")
) -> Granularity:
    if value not in expected:
        raise ValueError(f"granularity must be one of {tuple(expected)}, got {value!r}")
    return cast(Granularity, value)


def _unit_count(ratio: float, units: int) -> int:
    """The largest ``k`` with ``k / units <= ratio``, the quotient rounded to a float.

    ``int(ratio * units)`` loses a unit where the product falls just short of a whole number
    (``0.29 * 100``), and so does an exact product where ``ratio`` was itself a rounded quotient
    (``3 / 7`` of 7 units). This is right for both.
    """
    k = math.floor(Fraction(ratio) * units)
    return k + 1 if k < units and (k + 1) / units <= ratio else k


@overload
def _named(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]: ...
@overload
def _named(model: nn.Module, *, buffers: bool) -> tuple[dict[str, Tensor], dict[str, str]]: ...
def _named(model: nn.Module, *, buffers: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """The distinct parameters in order, by first name; and for every name, the first one.

    Buffers follow, if they are asked for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    parameters: dict[str, Any] = {}
    first_by_id: dict[int, str] = {}
    first_names: dict[str, str] = {}
    named: Iterable[tuple[str, Tensor]] = model.named_parameters(remove_duplicate=False)
    if buffers:
        named = chain(named, model.named_buffers(remove_duplicate=False))
    for name, parameter in named:
        first = first_by_id.setdefault(id(parameter), name)
        first_names[name] = first
        parameters.setdefault(first, parameter)
    return parameters, first_names


def _by_first_name(
    argument: str,
    fisher: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    first_names: Mapping[str, str],
) -> dict[str, Tensor]:
    """The tensors of ``fisher`` by first name, checked against the model's parameters."""
    if not isinstance(fisher, Mapping):
        raise TypeError(
            f"{argument} must map parameter names to tensors, got {type(fisher).__name__}"
        )
    values: dict[str, Tensor] = {}
    for name, value in fisher.items():
        if name not in first_names:
            raise ValueError(f"{argument} has {name!r}, which is no parameter of the model")
        first = first_names[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{argument}[{name!r}] must be a floating-point tensor")
        if value.shape != parameters[first].shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {tuple(value.shape)}, "
                f"the parameter has {tuple(parameters[first].shape)}"
            )
        if first in values and not torch.equal(values[first], value):
            raise ValueError(
                f"{argument} has different values for {first!r} and {name!r}, "
                "which are names of one parameter"
            )
        values[first] = value.detach()
    return values


def _check_pair(
    forget: object,
    remain: object,
    forget_values: Mapping[str, Tensor],
    remain_values: Mapping[str, Tensor],
) -> None:
    """Raise unless both Fishers are of one kind, so that their difference means something."""
    for name in forget_values.keys() ^ remain_values.keys():
        have, lack = ("forget", "remain") if name in forget_values else ("remain", "forget")
        raise ValueError(f"{have} has parameter {name!r}, {lack} does not")
    for name, value in forget_values.items():
        if value.dtype != remain_values[name].dtype:
            raise ValueError(
                f"remain[{name!r}] is {remain_values[name].dtype}, forget has {value.dtype}"
            )
    reductions = [getattr(fisher, "reduction", None) for fisher in (forget, remain)]
    if None not in reductions and reductions[0] != reductions[1]:
        raise ValueError(
            f"remain has reduction {reductions[1]!r}, forget has {reductions[0]!r}: "
            "they must be the same"
        )


def _scored_names(
    parameters: Mapping[str, Tensor],
    first_names: Mapping[str, str],
    candidates: Collection[str],
    granularity: object,
    exclude: Sequence[str],
) -> list[str]:
    """Names of the parameters to score, in parameter order, safe to write to."""
    granularity = _checked_granularity(granularity)
    excluded = _excluded(first_names, exclude)
    names = [
        name
        for name, parameter in parameters.items()
        if name in candidates
        and name not in excluded
        and parameter.numel()
        and _is_scored(parameter.dim(), granularity)
    ]
    if not names:
        raise ValueError(f"no parameter is left to score: granularity={granularity!r}, {exclude=}")
    _check_writable(parameters, names)
    return names


def _excluded(first_names: Mapping[str, str], patterns: Iterable[str]) -> set[str]:
    """First names of the parameters that a pattern matches under any of their names."""
    if isinstance(patterns, str):
        raise TypeError(f"exclude must be a sequence of patterns, got the string {patterns!r}")
    excluded = set()
    for pattern in patterns:
        matched = {
            first
            for name, first in first_names.items()
            if name == pattern or fnmatchcase(name, pattern)
        }
        if not matched:
            raise ValueError(f"exclude has {pattern!r}, which matches no parameter of the model")
        excluded |= matched
    return excluded


def _is_scored(dim: int, granularity: Granularity) -> bool:
    return granularity == "parameter" or dim >= 2


def _unit_shape(shape: torch.Size, granularity: Granularity) -> torch.Size:
    return shape if granularity == "parameter" else shape[: _UNIT_DIMS[granularity]]


def _unit_size(shape: torch.Size, granularity: Granularity) -> int:
    """Scalars in a unit."""
    return 1 if granularity == "parameter" else math.prod(shape[_UNIT_DIMS[granularity] :])


def _unit_scores(score: Tensor, granularity: Granularity) -> Tensor:
    """Scores of the units: the scalars themselves, or the mean over each kernel in float64."""
    if granularity == "parameter" or score.dim() == 2:
        return score
    kernels = score.flatten(2)
    total = torch.zeros(kernels.shape[:2], dtype=torch.float64, device=score.device)
    # One position after the other: the order of summation, and with it the last bit that decides
    # a near tie, would otherwise depend on the device and its vector width.
    for position in range(kernels.shape[2]):
        total += kernels[:, :, position]
    return total / kernels.shape[2]


def _check_writable(parameters: Mapping[str, Tensor], touched: Collection[str]) -> None:
    """Raise unless writing to each ``touched`` parameter changes that parameter and no other."""
    for name in touched:
        parameter = parameters[name]
        if parameter.is_meta or parameter.layout != torch.strided or parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} cannot be masked: it must be dense, hold data, "
                "and not be an inference tensor"
            )
        if _repeats_memory(parameter):
            raise ValueError(f"elements of parameter {name!r} share memory with each other")
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, p in parameters.items():
        if p.numel() and p.layout == torch.strided and not p.is_meta:
            start = p.data_ptr()
            spans.setdefault(p.device, []).append((start, start + _extent(p), name))
    to_write = frozenset(touched)
    for on_device in spans.values():
        on_device.sort()
        for i, (_, end, name) in enumerate(on_device):
            for j in range(i + 1, len(on_device)):
                start, _, other = on_device[j]
                if start >= end:
                    break
                written, read = (name, other) if name in to_write else (other, name)
                if written in to_write and _shares_memory(parameters[written], parameters[read]):
                    raise ValueError(f"parameters {name!r} and {other!r} share memory")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the end of the last element in memory."""
    if tensor.is_contiguous():
        return tensor.nbytes
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _repeats_memory(tensor: Tensor) -> bool:
    """Whether two indices may lead to one address: true of an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _shares_memory(written: Tensor, read: Tensor) -> bool:
    """Whether two tensors of one device have a byte in common; spans alone say too much."""
    base = min(written.data_ptr(), read.data_ptr())
    end = max(tensor.data_ptr() + _extent(tensor) for tensor in (written, read))
    taken = torch.zeros(end - base, dtype=torch.bool)

    def view(tensor: Tensor) -> Tensor:
        width = tensor.element_size()
        steps = [step * width for step in tensor.stride()]
        return taken.as_strided((*tensor.shape, width), (*steps, 1), tensor.data_ptr() - base)

    view(written).fill_(True)
    return bool(view(read).any())
