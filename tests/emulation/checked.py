"""The operators of an emulated build, with the kernels' memory known and every report raised."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import NAMESPACES, SCHEMAS, SOURCES, Kind, load, runtime


class CheckError(AssertionError):
    """What cucheck reported of one call: a line for each kind and place."""


def storage_span(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first element to its last one, in memory."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def written_and_read(
    operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]
) -> list[tuple[Tensor, bool]]:
    """The tensors of a call, and whether the operator's schema says that it writes them."""
    parameters = operator._schema.arguments
    named = {p.name: value for p, value in zip(parameters, arguments, strict=False)} | keywords
    return [
        (tensor, p.alias_info is not None and p.alias_info.is_write)
        for p in parameters
        for tensor in _tensors(named.get(p.name))
    ]


class Operators:
    """Operators as attributes; a call tells the emulator which memory its kernels may use.

    Args:
        library: what :func:`tests.emulation.build.load` returned.
        namespace: where its operators are.
    """

    def __init__(self, library: Path, namespace: str) -> None:
        self._library = library
        self._emulator = runtime(library)
        self._namespace = getattr(torch.ops, namespace)

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._namespace, name).default

        def call(*arguments: Any, **keywords: Any) -> Any:
            return self._call(operator, arguments, keywords)

        return call

    def _call(self, operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        self._emulator.cusim_forget_regions()  # of calls that were not made through here
        for begin, size, written in merged_spans(written_and_read(operator, arguments, keywords)):
            self._emulator.cusim_region(begin, size, written)
        try:
            return operator(*arguments, **keywords)
        finally:
            self._emulator.cusim_forget_regions()


def merged_spans(tensors: Sequence[tuple[Tensor, bool]]) -> list[tuple[int, int, bool]]:
    """Spans of memory that do not overlap: address, bytes, whether a tensor in it is written."""
    spans = sorted((*storage_span(tensor), written) for tensor, written in tensors)
    merged: list[tuple[int, int, bool]] = []
    for begin, size, written in spans:
        if size and merged and begin < sum(merged[-1][:2]):
            start, length, before = merged.pop()
            end = max(start + length, begin + size)
            merged.append((start, end - start, before or written))
        elif size:
            merged.append((begin, size, written))
    return merged


class CheckedOperators(Operators):
    """Operators of a checked build; a call raises :class:`CheckError` for any report of cucheck."""

    def _call(self, operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        self._emulator.cucheck_take_reports()
        failure = None
        try:
            result = super()._call(operator, arguments, keywords)
        except RuntimeError as error:
            failure = error
        reports = self._emulator.cucheck_take_reports().decode()
        if reports:
            lines = [self._readable(line) for line in reports.splitlines()]
            raise CheckError(f"{operator.name()}: " + "\n".join(lines)) from failure
        if failure is not None:
            raise failure
        return result

    def _readable(self, report: str) -> str:
        count, what, kernel, where = report.split("|")
        if where.startswith("+0x"):
            where = source_line(self._library, where[1:])
        return f"{what}, {kernel}, {where} ({count} times)"


def source_line(library: Path, offset: str) -> str:
    """``file:line`` of an instruction, in the kernel and not in what the emulator adds to it."""
    command = ["addr2line", "-i", "-e", str(library), offset]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    places = [line.split(" ")[0] for line in done.stdout.splitlines()]
    return next((place for place in places if "/cusim/" not in place), places[0])


def checked(
    sources: Path = SOURCES,
    namespace: str | None = None,
    schemas: tuple[str, ...] = SCHEMAS,
) -> CheckedOperators:
    """The operators of a checked build, which raise on any report.

    Args:
        sources: the directory ``csrc``, or a copy of it with other kernels.
        namespace: where the operators shall be, in place of the kind's own.
        schemas: of the operators.
    """
    kind: Kind = "checked"
    library = load(kind, sources, namespace, schemas)
    return CheckedOperators(library, namespace or NAMESPACES[kind])
