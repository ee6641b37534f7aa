"""Builds ``fastfisher._C`` and, with a CUDA toolkit, ``fastfisher._cuda``.

Everything declarative is in pyproject.toml. Environment variables: FASTFISHER_CUDA=0 leaves the
CUDA kernels out, =1 fails where they cannot be built; TORCH_CUDA_ARCH_LIST says for which GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI has what the sources use (parallel_for came in 2.10).
TORCH_TARGET = (2, 11)


def pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def build_facts() -> ModuleType:
    """``fastfisher/_build.py`` without importing fastfisher, which is not installed yet."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "fastfisher" / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def target_macro() -> str:
    major, minor = TORCH_TARGET
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"


def cpu_extension() -> Extension:
    major, minor = TORCH_TARGET
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    found = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    sources = sorted(path.relative_to(ROOT).as_posix() for path in found)
    if not x86:
        sources = [name for name in sources if not name.endswith(("_avx2.cpp", "_avx512.cpp"))]
    # The matrix unit's state has to be asked for, which is written for Linux.
    amx = x86 and platform.system() == "Linux"
    if not amx:
        sources = [name for name in sources if not name.endswith("_amx.cpp")]
    flags = [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        target_macro(),
        f'-DFASTFISHER_TORCH_TARGET="{major}.{minor}"',
    ]
    if x86:
        flags.append("-DFASTFISHER_X86")
    if amx:
        flags.append("-DFASTFISHER_AMX")
    link: list[str] = []
    # For `make sanitize`: such a module needs the sanitizers' runtime loaded before Python.
    sanitizers = os.environ.get("FASTFISHER_SANITIZE")
    if sanitizers:
        flags += ["-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        link.append(f"-fsanitize={sanitizers}")
    return cpp_extension.CppExtension(
        name="fastfisher._C",
        sources=sources,
        include_dirs=[pybind11_include()],
        depends=headers(),
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )


def headers() -> list[str]:
    found = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def no_cuda_because(home: Path | None, build: ModuleType) -> str | None:
    """Why the CUDA kernels cannot be built here, or None. Whether a GPU is visible matters not."""
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if home is None:
        return "no CUDA toolkit was found; set CUDA_HOME to one"
    major = build.toolkit_version(home)[0]
    if major != int(torch.version.cuda.split(".")[0]):
        return f"the toolkit {home} is CUDA {major}, torch is built for {torch.version.cuda}"
    return None


def cuda_extension() -> Extension | None:
    build = build_facts()
    wanted = os.environ.get("FASTFISHER_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTFISHER_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0" or os.environ.get("FASTFISHER_SANITIZE"):
        return None
    home = build.toolkit()
    reason = no_cuda_because(home, build)
    if reason is not None:
        if wanted == "1":
            raise SystemExit(f"FASTFISHER_CUDA=1, but {reason}")
        print(f"fastfisher: without CUDA kernels: {reason}", file=sys.stderr)
        return None
    # torch guesses by nvcc's place, and is wrong where that is a script that calls nvcc.
    cpp_extension.CUDA_HOME = str(home)
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.ARCHITECTURES)
    sources = [*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
    cxx = [
        "-O2",
        "-std=c++20",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-DUSE_CUDA",
        target_macro(),
        f'-DFASTFISHER_ARCHITECTURES="{architectures}"',
    ]
    # torch's defaults hide the conversions of 16-bit types.
    conversions = [f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16")]
    return cpp_extension.CUDAExtension(
        name="fastfisher._cuda",
        sources=sorted(path.relative_to(ROOT).as_posix() for path in sources),
        depends=headers(),
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++17", *conversions]},
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Checks the toolkit by :func:`no_cuda_because` instead of by the nvcc that PATH names."""

    def _check_cuda_version(self, *args: Any) -> None: ...


extensions = [each for each in (cpu_extension(), cuda_extension()) if each is not None]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
