"""What holds for every test: seeds, and how hypothesis runs."""

from __future__ import annotations

import os
import random
import zlib

import hypothesis
import numpy as np
import pytest
import torch

# Read when triton is imported, which torch does not do by itself. Kernels that run on a device are
# for the compiler.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: the first call of an operator pays for loading it, and machines are shared.
hypothesis.settings.register_profile("local", deadline=None)
# In CI the same examples every time; new ones are found on developers' machines.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


class _TorchGenerator:
    """torch's global generator, as hypothesis wants to reset it before each example.

    It does so for ``random`` and numpy by itself. Without it an example that draws from torch
    would see other numbers when it is replayed, and be called flaky.
    """

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_GENERATOR = _TorchGenerator()  # hypothesis keeps only a weak reference
hypothesis.register_random(_TORCH_GENERATOR)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed by the name of the test: alone or in a suite, in any order, it sees the same numbers."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
