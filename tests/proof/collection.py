"""All proof cases there are, and the operators that they can be run with."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch

from fastfisher import backends
from tests import proof

from .case import Case

#: Backends and the namespaces of ``torch.ops`` that have their operators.
NAMESPACES = {"cpu": "fastfisher", "cuda": "fastfisher", "triton": "fastfisher_triton"}


def modules() -> list[ModuleType]:
    """The modules of this package that are no command."""
    return [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(proof.__path__, f"{proof.__name__}.")
        if found.name.rpartition(".")[2] not in ("__main__", "collection", "ladder", "mutants")
    ]


def collect(small: bool = False) -> list[Case]:
    """The cases of every family's module, or only those that are cheap, in the modules' order."""
    cases = [case for module in modules() for case in getattr(module, "CASES", ())]
    return [case for case in cases if case.small or not small]


def operators(backend: str) -> Any:
    """The operators of a backend, loaded; ``"emulated"`` are the CUDA kernels on the CPU.

    Raises:
        RuntimeError: the backend cannot serve here; the message says why.
    """
    if backend == "emulated":
        return importlib.import_module("tests.emulation.build").emulated()
    reason = backends.unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"the backend {backend!r} cannot serve here: {reason}")
    return getattr(torch.ops, NAMESPACES[backend])
