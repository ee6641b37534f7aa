"""Runs the PTX that nvcc makes of csrc/cuda, launched by the real entry files and launchers.

The emulated build hands each launch over (``cusim_intercept``), and :mod:`.ptxsim` runs the
compiled kernel in its place, on the tensors themselves: so whatever is asserted of an operator is
asserted of its compiled kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastfisher import _build

from .build import NAMESPACES, ROOT, SCHEMAS, SOURCES, load
from .checked import CheckError, Operators
from .ptx_program import Program, PtxError, entry_names, parse
from .ptxsim import launch

ARCHITECTURE = "compute_80"


class CompilerMissing(RuntimeError):
    """There is no nvcc on this machine."""


class _Launch(ctypes.Structure):
    """``cusim::Launch``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_size_t),
    )


class _Region(ctypes.Structure):
    """A region of memory.cpp."""

    _fields_ = (("begin", ctypes.c_void_p), ("size", ctypes.c_size_t), ("writable", ctypes.c_int))


_INTERCEPTOR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


def compiler() -> Path:
    """Where nvcc is.

    Raises:
        CompilerMissing: it is not on this machine.
    """
    home = _build.toolkit()
    if home is None:
        raise CompilerMissing("nvcc was not found; set CUDA_HOME to a toolkit")
    return home / "bin" / "nvcc"


def compile_ptx(source: Path) -> str:
    """The PTX of a ``.cu`` file for sm_80, with the numbers of its lines."""
    directory = ROOT / "build" / "ptx"
    directory.mkdir(parents=True, exist_ok=True)
    options = [str(compiler()), "-O3", "-std=c++17", f"-arch={ARCHITECTURE}", "-lineinfo"]
    options += [f"-I{SOURCES / 'cuda'}"]
    headers = sorted([*source.parent.glob("*.*h"), *source.parent.parent.glob("*.h")])
    made_of = [*options, source.read_text(), *(path.read_text() for path in headers)]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    target = directory / f"{source.stem}-{key}.ptx"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [*options, "-ptx", str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-6000:]}")
        unfinished.rename(target)
    return target.read_text()


def _demangled(names: Sequence[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@functools.cache
def _kernels(sources: Path) -> dict[str, tuple[str, str]]:
    """PTX and mangled name of each kernel, by what it is called in C++."""
    kernels: dict[str, tuple[str, str]] = {}
    for source in sorted((sources / "cuda").glob("*.cu")):
        text = compile_ptx(source)
        names = entry_names(text)
        kernels |= {
            readable: (text, name) for readable, name in zip(_demangled(names), names, strict=True)
        }
    return kernels


@functools.cache
def _program(sources: Path, readable: str) -> Program:
    kernels = _kernels(sources)
    if readable not in kernels:
        raise PtxError(f"no kernel {readable} among {sorted(kernels)}")
    return parse(*kernels[readable])


@functools.cache
def _functions(library: Path) -> dict[int, str]:
    """What each function of a library is called in C++, by its offset."""
    done = subprocess.run(
        ["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    symbols = re.findall(r"^([0-9a-f]+) \w (\S+)$", done.stdout, re.MULTILINE)
    readable = _demangled([name for _, name in symbols])
    offsets = (int(offset, 16) for offset, _ in symbols)
    return dict(zip(offsets, readable, strict=True))


class ReplayedOperators(Operators):
    """Operators whose kernels run as compiled PTX; what ptxsim reports raises :class:`CheckError`.

    Attributes:
        launches: names of the kernels that have run.
    """

    def __init__(self, library: Path, namespace: str, sources: Path) -> None:
        super().__init__(library, namespace)
        self.launches: list[str] = []
        self._sources = sources
        self._failure: Exception | None = None
        self._interceptor = _INTERCEPTOR(self._intercept)
        here = ctypes.cast(self._emulator.cusim_error, ctypes.c_void_p).value or 0
        offsets = {name: offset for offset, name in _functions(library).items()}
        self._base = here - offsets["cusim_error"]
        self._emulator.cusim_regions.restype = ctypes.c_size_t

    def _call(self, operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        self._failure = None
        self._emulator.cusim_intercept(self._interceptor)
        try:
            return super()._call(operator, arguments, keywords)
        except RuntimeError as error:
            raise self._failure or error from None
        finally:
            self._emulator.cusim_intercept(None)

    def _intercept(self, launched: Any) -> int:
        try:
            self._run(launched.contents)
        except Exception as error:
            self._failure = error
            return 1
        return 0

    def _run(self, launched: _Launch) -> None:
        name = _functions(self._library)[launched.kernel - self._base]
        regions = (_Region * 64)()
        count = self._emulator.cusim_regions(regions, ctypes.c_size_t(len(regions)))
        if count > len(regions):
            raise RuntimeError(f"{count} regions of memory")
        reports = launch(
            _program(self._sources, name),
            tuple(launched.grid),
            tuple(launched.block),
            ctypes.string_at(launched.parameters, launched.parameter_bytes),
            launched.shared,
            [(each.begin, each.size, bool(each.writable)) for each in regions[:count]],
        )
        self.launches.append(name)
        if reports:
            raise CheckError(f"{name}: {reports}")


def replayed(
    sources: Path = SOURCES,
    namespace: str | None = None,
    schemas: tuple[str, ...] = SCHEMAS,
) -> ReplayedOperators:
    """The operators of the emulated build, their kernels run as compiled PTX.

    Args:
        sources: the directory ``csrc``, or a copy of it with other kernels.
        namespace: where the operators shall be, in place of the plain build's own.
        schemas: of the operators.

    Raises:
        CompilerMissing: there is no nvcc.
    """
    compiler()
    library = load("plain", sources, namespace, schemas)
    return ReplayedOperators(library, namespace or NAMESPACES["plain"], sources)
