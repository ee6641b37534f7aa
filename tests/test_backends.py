"""Each call goes to the backend that serves its device, or to the one that it is forced to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastfisher
from fastfisher import backends, ops

G = torch.randn(3, 5, 4)
X = torch.randn(3, 5, 7)


def linear(device: str = "cpu") -> Tensor:
    out = torch.zeros(4, 7, device=device)
    ops.linear_sum_grad_squared_(out, G.to(device), X.to(device))
    return out


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_device_decides() -> None:
    assert backends.serving(torch.device("cpu")) == "cpu"
    assert backends.serving(torch.device("meta")) == "torch"


def test_a_block_forces_and_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    real = backends._operator
    monkeypatch.setattr(
        backends, "_operator", lambda *names: served.append(names[1]) or real(*names)
    )
    exact = linear()
    with fastfisher.backend("torch"):
        plain = linear()
        with fastfisher.backend(None):
            linear()
    linear()
    assert served == ["fastfisher", "fastfisher_torch", "fastfisher", "fastfisher"]
    torch.testing.assert_close(plain, exact)


def test_an_error_in_the_block_gives_back_too() -> None:
    with pytest.raises(KeyError), fastfisher.backend("torch"):
        raise KeyError
    assert backends.forced() is None


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="one of cuda, triton, cpu, torch, got 'gpu'"),
        fastfisher.backend("gpu"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_serve_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        pytest.raises(RuntimeError, match=f"'{name}' cannot serve here: "),
        fastfisher.backend(name),
    ):
        pass


def test_a_forced_backend_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    only_cuda = backends.Backend("cuda", "fastfisher", lambda: None, lambda: ("cuda",))
    monkeypatch.setitem(backends._backends, "cuda", only_cuda)
    with (
        fastfisher.backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' serves cuda tensors, got one on cpu"),
    ):
        linear()


@pytest.mark.parametrize(
    "value, message",
    [
        ("torch", ""),
        ("gpu", "ValueError: FASTFISHER_BACKEND: backend must be one of"),
        ("cuda", "RuntimeError: FASTFISHER_BACKEND=cuda: the backend cannot serve here"),
    ],
)
def test_the_environment_forces(value: str, message: str) -> None:
    code = (
        "import torch; from fastfisher import backends; cpu = torch.device('cpu');"
        "print(backends.serving(cpu))"
    )
    done = run(code, FASTFISHER_BACKEND=value, CUDA_VISIBLE_DEVICES="")
    if message:
        assert done.returncode and message in done.stderr
    else:
        assert done.stdout.strip() == value


@pytest.mark.parametrize(
    "capability, architectures, fits",
    [
        ((8, 0), "8.0", True),
        ((8, 9), "8.0", True),
        ((9, 0), "8.0", False),
        ((9, 0), "8.0+PTX", True),
        ((8, 0), "8.6", False),
        ((7, 5), "8.0;9.0+PTX", False),
        ((12, 1), "8.0;12.0", True),
        ((11, 0), "8.0;12.0+PTX", False),
    ],
)
def test_which_devices_compiled_kernels_fit(
    capability: tuple[int, int], architectures: str, fits: bool
) -> None:
    assert backends.fits_architectures(*capability, architectures) is fits


@pytest.mark.skipif(backends.load_cuda() is not None, reason="the CUDA kernels are not built")
def test_the_cuda_kernels_load_without_a_driver() -> None:
    code = (
        "import torch, fastfisher.ops as ops; from fastfisher import backends;"
        "print(backends.architectures());"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key("
        "'fastfisher::linear_sum_grad_squared_', 'CUDA'))"
    )
    done = run(code, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"


def test_tensors_on_two_devices_are_refused() -> None:
    out = torch.ones(4, 7)
    with pytest.raises(ValueError, match="input: expected a tensor on cpu, as the others, got one"):
        ops.linear_sum_grad_squared_(out, G, X.to("meta"))
    assert torch.equal(out, torch.ones(4, 7))
    with pytest.raises(ValueError, match="mean: expected a tensor on cpu"):
        ops.channel_sum_grad_squared_(
            torch.zeros(4), None, G, torch.randn(3, 5, 4), torch.zeros(4, device="meta")
        )
