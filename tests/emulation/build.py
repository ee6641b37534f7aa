"""Builds csrc/cuda for the host: the very sources, with cusim in place of CUDA.

The library defines the operators of fastfisher for CPU tensors, in a namespace of its own. Objects
are kept in ``build/emulated`` under a hash of all they were made of.

There are four kinds of build: ``plain``; ``planned``, which divides work as for a device, where the
others do as for a tiny one: for launches that are noted and not run; ``checked``, whose kernels
report what cucheck.cpp sees; and ``sanitized``, under g++'s address and undefined-behaviour
sanitizers, which wants their library loaded before Python (:func:`sanitizer_environment`).
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from fastfisher import _build, ops, topr

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
CUSIM = Path(__file__).parent / "cusim"

Kind = Literal["plain", "planned", "checked", "sanitized"]
Order = Literal["forward", "reverse", "random"]

SCHEMAS = (*ops.SCHEMAS, *topr.SCHEMAS)
NAMESPACES: dict[Kind, str] = {
    "plain": "fastfisher_emulated",
    "planned": "fastfisher_planned",
    "checked": "fastfisher_checked",
    "sanitized": "fastfisher_sanitized",
}
ORDERS: dict[Order, int] = {"forward": 0, "reverse": 1, "random": 2}

# cucheck receives what both sanitizers tell; neither's library is linked. Without scalar
# replacement an access of 16 bytes stays one.
_CHECKED = "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero"
_SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KERNEL_FLAGS: dict[Kind, list[str]] = {
    "plain": ["-O2"],
    "planned": ["-O2"],
    "checked": ["-O1", "-g", "-fno-tree-sra", _CHECKED],
    "sanitized": _SANITIZED,
}
RUNTIME_FLAGS: dict[Kind, list[str]] = {
    "plain": ["-O2"],
    "planned": ["-O2"],
    "checked": ["-O2"],
    "sanitized": _SANITIZED,
}


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _cuda_include() -> Path:
    """CUDA's own headers of vector and 16-bit types."""
    home = _build.toolkit()
    if home is None:
        raise RuntimeError("CUDA's headers were not found; set CUDA_HOME to a toolkit")
    return home / "include"


def include_flags() -> list[str]:
    """Where a compiler on the host finds what csrc/cuda includes."""
    others = [Path(torch.__file__).parent / "include", _cuda_include()]
    return [f"-I{CUSIM}", f"-I{SOURCES / 'cuda'}", *(f"-isystem{path}" for path in others)]


def _included(source: Path, directories: Sequence[Path]) -> dict[str, str]:
    """The text of a file, and of all that it includes from these directories."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path.name in found:
            continue
        found[path.name] = path.read_text()
        for name in re.findall(r'^#include "(?:\.\./)*(.+)"', found[path.name], re.MULTILINE):
            places = [place / name for place in directories]
            waiting += [place for place in places if place.exists()][:1]
    return found


def _compile(source: Path, flags: Sequence[str], sources: Path, directory: Path) -> Path:
    options = [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        # Two builds in one process share no variable.
        "-fno-gnu-unique",
        "-march=x86-64-v3",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *flags,
    ]
    # Where the files lie is no part of it: a copy of the sources shares the objects.
    places = [source.parent, sources / "cuda", sources, SOURCES / "cuda", SOURCES, CUSIM]
    made_of = [_compiler(), torch.__version__, _cuda_include().as_posix(), *options]
    made_of += sorted(_included(source, places).values())
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    target = directory / f"{source.stem}-{key}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [_compiler(), *options, *include_flags()]
        command += [f"-ffile-prefix-map={sources}=csrc", f"-ffile-prefix-map={CUSIM}=cusim"]
        command += ["-x", "c++", "-c", str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-6000:]}")
        unfinished.rename(target)
    return target


def build(
    kind: Kind = "plain",
    sources: Path = SOURCES,
    namespace: str | None = None,
) -> Path:
    """Compiles the sources under ``sources`` and returns the shared library.

    Args:
        kind: how the kernels are compiled.
        sources: the directory ``csrc``, or a copy of it with other kernels.
        namespace: where the operators shall be, in place of the kind's own.

    Raises:
        RuntimeError: a file does not compile, or CUDA's headers were not found.
    """
    directory = ROOT / "build" / "emulated"
    directory.mkdir(parents=True, exist_ok=True)
    cuda = sources / "cuda"
    found = [*cuda.glob("*.cu"), *cuda.glob("*.cpp")]
    kernels = sorted(path for path in found if path.name != "module.cpp")
    here = [f"-DFASTFISHER_EMULATED={namespace or NAMESPACES[kind]}"]
    here += ["-DFASTFISHER_PLAN_FOR_DEVICE"] * (kind == "planned")
    work: list[tuple[Path, Sequence[str]]] = []
    for path in kernels:
        if path.suffix == ".cu":  # the same in every namespace
            work.append((path, [*KERNEL_FLAGS[kind], "-DFASTFISHER_EMULATED"]))
        else:
            work.append((path, ["-O1", *here]))
    parts = ["cusim.cpp", "async.cpp", "ldmatrix.cpp", "memory.cpp"]
    parts += ["cucheck.cpp"] * (kind == "checked")
    work += [(CUSIM / name, RUNTIME_FLAGS[kind]) for name in parts]

    def compiled(each: tuple[Path, Sequence[str]]) -> Path:
        return _compile(each[0], each[1], sources, directory)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, work))
    key = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:20]
    library = directory / f"emulated-{kind}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        torch_lib = Path(torch.__file__).parent / "lib"
        command = [_compiler(), "-shared", "-o", str(unfinished), *map(str, objects)]
        command += ["-Wl,-Bsymbolic", "-Wl,--wrap=torch_call_dispatcher"]
        command += ["-fsanitize=address,undefined"] * (kind == "sanitized")
        command += [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}"]
        subprocess.run(command, check=True)
        unfinished.rename(library)
    return library


@functools.cache
def runtime(library: Path) -> ctypes.CDLL:
    """The emulator inside a library that :func:`build` made, for the functions of cusim's C API."""
    loaded = ctypes.CDLL(str(library))
    loaded.cusim_error.restype = ctypes.c_char_p
    loaded.cusim_set.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.cusim_set.restype = None
    loaded.cusim_region.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    loaded.cusim_region.restype = None
    loaded.cusim_forget_regions.restype = None
    if hasattr(loaded, "cucheck_take_reports"):
        loaded.cucheck_take_reports.restype = ctypes.c_char_p
    return loaded


@functools.cache
def load(
    kind: Kind = "plain",
    sources: Path = SOURCES,
    namespace: str | None = None,
    schemas: tuple[str, ...] = SCHEMAS,
) -> Path:
    """Builds a library and registers its operators; returns its path.

    Args:
        kind: how the kernels are compiled.
        sources: the directory ``csrc``, or a copy of it with other kernels.
        namespace: where the operators shall be; another one for each library in a process.
        schemas: of the operators.
    """
    if kind == "sanitized" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("a sanitized build needs a process of sanitizer_environment()")
    library = build(kind, sources, namespace)
    define_operators(namespace or NAMESPACES[kind], schemas)
    torch.ops.load_library(str(library))
    return library


def emulated(kind: Kind = "plain", sources: Path = SOURCES, namespace: str | None = None) -> Any:
    """The operators of an emulated build, as ``torch.ops.fastfisher`` has them.

    Args:
        kind: how the kernels are compiled. What a checked build reports has to be fetched:
            :func:`tests.emulation.checked.checked` does.
        sources: the directory ``csrc``, or a copy of it with other kernels.
        namespace: where the operators shall be, in place of the kind's own.
    """
    load(kind, sources, namespace)
    return getattr(torch.ops, namespace or NAMESPACES[kind])


@contextmanager
def scheduling(
    order: Order, seed: int = 1, kind: Kind = "plain", library: Path | None = None
) -> Iterator[None]:
    """Lets threads and blocks of a build run in another order.

    Args:
        order: of the threads of a block, and of the blocks.
        seed: of the random order.
        kind: whose build, without ``library``.
        library: the build, where it is not the kind's own.
    """
    emulator = runtime(library or load(kind))
    emulator.cusim_set(ORDERS[order], seed)
    try:
        yield
    finally:
        emulator.cusim_set(ORDERS["forward"], 1)


@functools.cache
def define_operators(
    namespace: str = NAMESPACES["plain"], schemas: tuple[str, ...] = SCHEMAS
) -> torch.library.Library:
    """The schemas, for a library's kernels to be registered with."""
    library = torch.library.Library(namespace, "DEF")
    for schema in schemas:
        library.define(schema)
    return library


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that may load a sanitized build."""
    libraries = ["libasan.so", "libstdc++.so.6"]
    found = [
        subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in libraries
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
