"""Importing works with no compiler, no GPU and no compiled module; heavy packages stay out."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = "import sys; sys.modules['fastfisher._C'] = None; "


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_compiled_module_plain_torch_serves() -> None:
    code = BLOCKED + (
        "import torch, fastfisher.fisher_diag, fastfisher.ops;"
        "from torch import nn;"
        "m = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3));"
        "f = fastfisher.fisher_diag(m, [(torch.ones(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))]);"
        "print(fastfisher.ops.build_info()['compiled'], f.rules['0.weight'])"
    )
    assert run(code).split() == ["False", "conv2d"]


@pytest.mark.parametrize("module", ["torchvision", "sklearn", "matplotlib", "tqdm", "triton"])
def test_import_stays_light(module: str) -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import fastfisher.fisher_diag;"
        f"print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] == {module!r}))"
    )
    assert run(code).strip() == "[]"
