"""One operator, many backends: which implementation serves a call.

==========  ==================================================================  ==================
``cpu``     compiled kernels for processors (``csrc/cpu``)                      CPU tensors
``cuda``    compiled kernels for NVIDIA GPUs (``csrc/cuda``)                    CUDA tensors
``triton``  the same kernels in Triton (``fastfisher/triton``)                  CUDA tensors
``torch``   plain torch                                                         any device
==========  ==================================================================  ==================

On its own a call goes to the first of them that serves its device. :func:`backend` or the
environment variable ``FASTFISHER_BACKEND`` make one of them serve all calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

VARIABLE = "FASTFISHER_BACKEND"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: as in the table above.
        namespace: of ``torch.ops``, where its operators are.
        unavailable: why it cannot serve here, or None. Loads the backend where that takes loading.
        devices: types of the devices whose tensors it serves; empty for all.
    """

    name: str
    namespace: str
    unavailable: Callable[[], str | None]
    devices: Callable[[], tuple[str, ...]]


_backends: dict[str, Backend] = {}
# The backend that serves all calls; one for the process, for a traced call has to find it too.
_forced: str | None = None


def register(backend: Backend) -> None:
    """Add a backend that calls can be forced to."""
    _backends[backend.name] = backend


def names() -> list[str]:
    """The names of all backends."""
    return list(_backends)


def unavailable(name: str) -> str | None:
    """Why a backend cannot serve here, or None where it can.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in _backends:
        raise ValueError(f"backend must be one of {', '.join(_backends)}, got {name!r}")
    return _backends[name].unavailable()


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Let one backend serve every operator call of the process inside the ``with`` block.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``; None for the automatic choice.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot serve here; the message says why. Also raised by a call with a
            tensor on a device that it does not serve.
    """
    global _forced
    if name is not None:
        reason = unavailable(name)
        if reason is not None:
            raise RuntimeError(f"the backend {name!r} cannot serve here: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that serves all calls, or None where each call's device decides.

    Raises:
        ValueError, RuntimeError: ``FASTFISHER_BACKEND`` names none, or one that cannot serve here.
    """
    return _forced or _from_environment()


def _constant_in_traces(function: Callable[P, R]) -> Callable[P, R]:
    """What a cached function returns is a constant of traced programs: tracing sees no caches.

    As ``torch.compiler.assume_constant_result``, which imports the compiler, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_in_traces
def _from_environment() -> str | None:
    return _environment()


@functools.cache
def _environment() -> str | None:
    name = os.environ.get(VARIABLE) or None
    if name is None:
        return None
    try:
        reason = unavailable(name)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    if reason is not None:
        raise RuntimeError(f"{VARIABLE}={name}: the backend cannot serve here: {reason}")
    return name


def serving(device: torch.device) -> str:
    """The name of the backend that serves calls with tensors on ``device``.

    Raises:
        ValueError, RuntimeError: see :func:`forced`; or the one forced does not serve ``device``.
    """
    name = forced()
    if name is None:
        return _automatic(device.type, device.index)
    devices = _backends[name].devices()
    if devices and device.type not in devices and device.type != "meta":
        raise RuntimeError(
            f"the backend {name!r} serves {' and '.join(devices)} tensors, got one on {device}"
        )
    return name


def operator(name: str, device: torch.device) -> Any:
    """The operator that serves calls of ``name`` with tensors on ``device``.

    Raises:
        ValueError, RuntimeError: see :func:`serving`.
    """
    return _operator(name, _backends[serving(device)].namespace)


def _operator(name: str, namespace: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name).default


@_constant_in_traces
def _automatic(device: str, index: int | None) -> str:
    return _first(device, index)


@functools.cache
def _first(device: str, index: int | None) -> str:
    if device == "cpu":
        return "cpu" if load_cpu() is None else "torch"
    if device == "cuda":
        # Tensors of a traced program may be on a device that is not here: what is compiled serves.
        if load_cuda() is None and (not torch.cuda.is_available() or _fits(index)):
            return "cuda"
        if torch.cuda.is_available() and _triton_unavailable() is None:
            return "triton"
    return "torch"


def _fits(index: int | None) -> bool:
    """Whether the compiled CUDA kernels run on a device."""
    return fits_architectures(*torch.cuda.get_device_capability(index), architectures())


def architectures() -> str:
    """What the CUDA kernels were compiled for, such as ``"8.0;9.0+PTX"``.

    Raises:
        ImportError: they were not built, or do not load.
    """
    return str(importlib.import_module("fastfisher._cuda").architectures)


def fits_architectures(major: int, minor: int, architectures: str) -> bool:
    """Whether code for ``architectures``, such as ``"8.0;9.0+PTX"``, runs on a capability.

    Machine code runs on the same major and no smaller minor version, PTX on any that is no older.
    """
    for each in architectures.split(";"):
        number, _, ptx = each.partition("+")
        own = tuple(map(int, number.split(".")))
        if own <= (major, minor) and (bool(ptx) or own[0] == major):
            return True
    return False


def _load(module: str, absent: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return absent
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"built, but does not load ({error})"
    return None


@functools.cache
def load_cpu() -> str | None:
    """Loads the kernels for processors, and returns why that is impossible, or None."""
    return _load("fastfisher._C", "not built: no C++ compiler was found when this was installed")


@functools.cache
def load_cuda() -> str | None:
    """Loads the kernels for NVIDIA GPUs, and returns why that is impossible, or None."""
    return _load(
        "fastfisher._cuda", "not built: no CUDA toolkit of torch's version was found by the build"
    )


def _cuda_cannot_run() -> str | None:
    reason = load_cuda()
    if reason is not None:
        return reason
    return None if torch.cuda.is_available() else "no CUDA device is visible"


@functools.cache
def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    importlib.import_module("fastfisher.triton")
    return None


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_cannot_run() -> str | None:
    reason = _triton_unavailable()
    if reason is not None or _triton_interpreted() or torch.cuda.is_available():
        return reason
    return "no CUDA device is visible"


register(Backend("cuda", "fastfisher", _cuda_cannot_run, lambda: ("cuda",)))
register(
    Backend(
        "triton",
        "fastfisher_triton",
        _triton_cannot_run,
        lambda: ("cpu", "cuda") if _triton_interpreted() else ("cuda",),
    )
)
register(Backend("cpu", "fastfisher", load_cpu, lambda: ("cpu",)))
register(Backend("torch", "fastfisher_torch", lambda: None, tuple))
