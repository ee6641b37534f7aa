"""Builds csrc/cuda for the host: the very sources, with cusim in place of CUDA.

The library defines the operators of fastfisher for CPU tensors in ``torch.ops.fastfisher_emulated``.
Objects are kept in ``build/emulated`` under a hash of all they were made of.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastfisher import ops

ROOT = Path(__file__).resolve().parents[2]
CUSIM = Path(__file__).parent / "cusim"
NAMESPACE = "fastfisher_emulated"

# cucheck receives what the compiler's thread sanitizer tells of every access; libtsan is not linked.
KERNEL_FLAGS = {"plain": ["-O2"], "checked": ["-O1", "-g", "-fsanitize=thread"]}


def _include_flags() -> list[str]:
    torch_include = Path(torch.__file__).parent / "include"
    # CUDA's own headers of vector and 16-bit types.
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (cuda / "crt" / "host_defines.h").exists():
        raise RuntimeError("CUDA's headers were not found; set CUDA_HOME to a toolkit")
    return [f"-I{CUSIM}", f"-isystem{torch_include}", f"-isystem{cuda}"]


def _compile(source: Path, flags: Sequence[str], inputs: str, directory: Path) -> Path:
    command = [
        os.environ.get("CXX", "g++"),
        "-std=c++20",
        "-fPIC",
        "-march=x86-64-v3",
        "-DFASTFISHER_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *_include_flags(),
        *flags,
        "-x",
        "c++",
        "-c",
        str(source),
    ]
    key = hashlib.sha256("\0".join([*command, source.read_text(), inputs]).encode()).hexdigest()[
        :20
    ]
    target = directory / f"{source.stem}-{key}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-6000:]}")
        unfinished.rename(target)
    return target


def build(kind: str = "plain", sources: Path = ROOT / "csrc") -> Path:
    """Compiles the sources under ``sources`` and returns the shared library.

    Args:
        kind: ``"plain"``, or ``"checked"`` for one with cucheck's reports.
        sources: the directory ``csrc``, or a copy of it with other kernels.
    """
    directory = ROOT / "build" / "emulated"
    directory.mkdir(parents=True, exist_ok=True)
    cuda = sources / "cuda"
    headers = [*sources.glob("*.h"), *cuda.glob("*.h"), *cuda.glob("*.cuh"), *CUSIM.glob("*.h")]
    inputs = "\0".join(path.read_text() for path in sorted(headers))
    work = [(path, KERNEL_FLAGS[kind]) for path in sorted(cuda.glob("*.cu"))]
    work += [(p, ["-O1"]) for p in sorted(cuda.glob("*.cpp")) if p.name != "module.cpp"]
    runtime = ["cusim.cpp", "async.cpp", *(["cucheck.cpp"] if kind == "checked" else [])]
    work += [(CUSIM / name, ["-O2"]) for name in runtime]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda each: _compile(*each, inputs, directory), work))
    key = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:20]
    library = directory / f"emulated-{kind}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        torch_lib = Path(torch.__file__).parent / "lib"
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-shared", "-o", str(unfinished), *map(str, objects)]
            + [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}"],
            check=True,
        )
        unfinished.rename(library)
    return library


@functools.cache
def emulated(kind: str = "plain") -> Any:
    """The operators of the emulated build, as ``torch.ops.fastfisher`` has them.

    One kind a process: both would register the same operators.
    """
    define_operators()
    library = build(kind)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, NAMESPACE)


@functools.cache
def define_operators() -> torch.library.Library:
    """The schemas, for the library's kernels to be registered with."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in ops.SCHEMAS:
        library.define(schema)
    return library
