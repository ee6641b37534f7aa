"""What Triton makes of the twins for sm_80, run in a simulator, against the float64 oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from .emulation.build import ROOT

pytest.importorskip("triton")


def test_compiled_twins() -> None:
    # Triton cannot both interpret and compile in one process.
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.emulation.triton_ptx", "--per-kernel", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row for row in rows if "failure" in row] == [], done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows) >= 20
    assert all(row["kernels"] for row in rows)
