"""What the numbers were measured on: they mean nothing without it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

from fastfisher import doctor

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str | int]:
    """Describe this machine and build, for the header and the result files."""
    return {
        **doctor.environment(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
    }


def slug(text: str) -> str:
    """Turn a processor's name into part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# What the numbers come from. Results and prose may change between the parts of one measurement.
_MEASURING = ("registry", "nets", "contender", "libraries", "rivals", "measure")
_SOURCES = ("fastfisher", "csrc", "setup.py", *(f"benchmarks/{name}.py" for name in _MEASURING))


def _commit() -> str:
    """Short commit that last changed the sources, ``-dirty`` with changes since, or ``unknown``."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)
        commit = git("log", "-1", "--format=%h", "--", *_SOURCES) or "unknown"
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
