"""The emulated CUDA kernels under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from .proof.ladder import in_a_process


def test_nothing_is_reported() -> None:
    kernels = in_a_process("sanitized")["kernels"]
    assert {"outer_simt", "outer_mma", "channel_sums", "gather_windows", "zero_chunks"} <= {
        *kernels
    }
