"""Which launches an operator makes, from the launchers themselves, without running the kernels."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import Kind, load, runtime
from .sass import plain_names


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch.

    Attributes:
        kernel: as :class:`tests.emulation.sass.Kernel` names it.
        grid: blocks along each dimension.
        block: threads along each dimension.
        shared: bytes of dynamic shared memory.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int

    @property
    def blocks(self) -> int:
        """Of the whole grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        """Of one block."""
        return self.block[0] * self.block[1] * self.block[2]


class _Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _Launch(ctypes.Structure):
    """``cusim::Launch``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("grid", _Dim3),
        ("block", _Dim3),
        ("shared", ctypes.c_size_t),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_size_t),
    )


# What an interceptor returns to let the emulator go on; else it is a CUDA error, or 0.
_RUN = -1
_Interceptor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


@contextlib.contextmanager
def noting(kind: Kind = "plain", run: bool = False) -> Iterator[list[Launch]]:
    """Within it, launches of an emulated build's operators are noted and, on demand, run as well.

    Operands may be as large as the address space allows: nothing reads or writes them. Launches
    that a device would refuse are errors, as ever.

    Args:
        kind: of the build.
        run: whether the kernels run, too.

    Yields:
        A list that gets the launches as they are made.
    """
    path = load(kind)
    library = runtime(path)
    base = _base(library)
    launches: list[Launch] = []

    @_Interceptor
    def note(launch: Any) -> int:
        made = launch.contents
        name = _symbol(path, made.kernel - base)
        grid, block = ((each.x, each.y, each.z) for each in (made.grid, made.block))
        launches.append(Launch(name, grid, block, made.shared))
        return _RUN if run else 0

    library.cusim_intercept(note)
    try:
        yield launches
    finally:
        library.cusim_intercept(None)


class _Info(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _base(library: ctypes.CDLL) -> int:
    """Where a library was loaded."""
    info = _Info()
    where = ctypes.cast(library.cusim_intercept, ctypes.c_void_p)
    if not ctypes.CDLL(None).dladdr(where, ctypes.byref(info)) or info.base is None:
        raise RuntimeError("the loader does not know the emulated library")
    return int(info.base)


@functools.cache
def _symbols(path: Path) -> tuple[list[int], list[str]]:
    """Addresses and names of a library's functions: kernels are not exported, so nm has to say."""
    listing = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
    fields = [line.split() for line in listing.splitlines()]
    found = sorted((int(f[0], 16), f[2]) for f in fields if len(f) == 3 and f[1] in "tTwW")
    return [address for address, _ in found], [name for _, name in found]


def _symbol(path: Path, offset: int) -> str:
    addresses, names = _symbols(path)
    at = bisect.bisect_left(addresses, offset)
    if at == len(addresses) or addresses[at] != offset:
        raise RuntimeError(f"{path.name} has no function at {offset:#x}")
    return _plain_name(names[at])


@functools.cache
def _plain_name(mangled: str) -> str:
    return plain_names([mangled])[mangled]
