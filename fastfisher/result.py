"""The results of a pass: one diagonal Fisher, or one a group."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .files import replacing


class FisherDiag(Mapping[str, Tensor]):
    """A diagonal Fisher: one tensor per parameter, named as in ``model.named_parameters()``.

    Attributes:
        samples: how many samples it was computed from.
        kind: ``"empirical"``, ``"mc"`` or ``"exact"``.
        reduction: ``"mean"`` (divided by ``samples``) or ``"sum"``.
        power: of the gradients' absolute values: 2, or 1.
        rules: for each parameter, what computed it.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        samples: int,
        kind: str = "empirical",
        reduction: str = "mean",
        power: int = 2,
        rules: Mapping[str, str] | None = None,
    ) -> None:
        self._values = dict(values)
        self.samples = samples
        self.kind = kind
        self.reduction = reduction
        self.power = power
        self.rules = dict(rules or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return (
            f"FisherDiag({len(self)} parameters, samples={self.samples}, kind={self.kind!r}, "
            f"reduction={self.reduction!r}, power={self.power})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; the other attributes go into its JSON header."""
        from safetensors.torch import save_file

        header = {
            "format": "fastfisher.FisherDiag/1",
            "samples": str(self.samples),
            "kind": self.kind,
            "reduction": self.reduction,
            "power": str(self.power),
            "rules": json.dumps(self.rules),
        }
        values = {name: value.contiguous() for name, value in self._values.items()}
        with replacing(path) as temporary:
            save_file(values, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FisherDiag:
        """Reads a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is not one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)!r} is not a safetensors file") from error
        if header.get("format") != "fastfisher.FisherDiag/1":
            raise ValueError(f"path: {os.fspath(path)!r} holds no FisherDiag")
        return cls(
            values,
            samples=int(header["samples"]),
            kind=header["kind"],
            reduction=header["reduction"],
            power=int(header.get("power", 2)),  # files of earlier versions hold squares
            rules=json.loads(header["rules"]),
        )


class FisherGroups(Mapping[int, FisherDiag]):
    """One :class:`FisherDiag` a group of samples, in ascending order of the groups.

    To make a model forget class 3, with one pass over its training data::

        by_class = fisher_diag(model, train, groups="target")
        fisher_mask_(model, by_class[3], by_class.without(3), ratio=0.002)
    """

    def __init__(self, groups: Mapping[int, FisherDiag]) -> None:
        self._groups = {group: groups[group] for group in sorted(groups)}

    def __getitem__(self, group: int) -> FisherDiag:
        return self._groups[group]

    def __iter__(self) -> Iterator[int]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        sizes = {group: fisher.samples for group, fisher in self.items()}
        return f"FisherGroups(samples={sizes})"

    def union(self, *groups: int) -> FisherDiag:
        """The Fisher of the samples of several groups together, as one pass over them gives it.

        Raises:
            KeyError: there is no such group.
            ValueError: no group is named.
        """
        parts = [self[group] for group in dict.fromkeys(groups)]
        if not parts:
            raise ValueError("groups: expected at least one group")
        first, samples = parts[0], sum(part.samples for part in parts)
        values = {}
        for name, like in first.items():
            values[name] = torch.zeros_like(like)
            for part in parts:
                share = part.samples / samples if first.reduction == "mean" else 1.0
                values[name].add_(part[name], alpha=share)
        return FisherDiag(
            values,
            samples=samples,
            kind=first.kind,
            reduction=first.reduction,
            power=first.power,
            rules=first.rules,
        )

    def without(self, *groups: int) -> FisherDiag:
        """The Fisher of all samples but those of some groups: :meth:`union` of the others.

        Raises:
            KeyError: there is no such group.
            ValueError: no group is left.
        """
        for group in groups:
            self[group]
        return self.union(*(group for group in self if group not in groups))
