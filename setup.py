"""Builds ``fastfisher._C``. Everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI has what the sources use (parallel_for came in 2.10).
TORCH_TARGET = (2, 11)


def pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def extension() -> CppExtension:
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
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
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
    return CppExtension(
        name="fastfisher._C",
        sources=sources,
        include_dirs=[pybind11_include()],
        depends=[path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h")],
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
