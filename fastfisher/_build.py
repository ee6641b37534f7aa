"""The CUDA toolkit that kernels are built with. ``setup.py`` loads this file by its path.

Nothing here imports fastfisher or starts a compiler.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

#: The oldest architecture the kernels are written for, and those they are compiled for. ``+PTX``
#: serves later ones.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield Path(environ[variable])
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        yield Path(nvcc).resolve().parents[1]
    # Where nvcc is a script that calls the real one, its own place says nothing.
    yield Path("/usr/local/cuda")


def toolkit(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory of a CUDA toolkit with a compiler and headers, or None."""
    for home in _candidates(environ):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def toolkit_version(home: Path) -> tuple[int, int]:
    """The CUDA version ``(major, minor)`` of a toolkit, by its headers."""
    for line in (home / "include" / "cuda.h").read_text(errors="replace").splitlines():
        if line.startswith("#define CUDA_VERSION "):
            number = int(line.split()[2])
            return number // 1000, number % 1000 // 10
    raise RuntimeError(f"{home / 'include' / 'cuda.h'} does not define CUDA_VERSION")
