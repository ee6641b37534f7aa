"""What this machine and this installation offer, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from . import __version__, backends, ops
from .fisher_diag import fisher_diag
from .reference import fisher_diag_loop

State = Literal["ok", "missing", "broken"]
ISA_VARIABLE = "FASTFISHER_CPU_ISA"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: "broken" is what keeps fastfisher from working; "missing" only makes it slower or
            leaves a command out.
        found: what there is.
        fix: what to do about it; empty where there is nothing to do.
    """

    name: str
    state: State
    found: str
    fix: str = ""


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a result depends on beside its configuration; JSON-able, for config.json and reports."""
    build = ops.build_info()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "fastfisher": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": build["cpu_isa"] if build["compiled"] else "plain torch",
        "system": platform.platform(),
    }


def checks() -> Iterator[Check]:
    """Look at the installation and the machine, one finding at a time."""
    yield Check("fastfisher", "ok", __version__)
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Check("torch", "ok", torch.__version__)
    yield _extension()
    yield _cpu()
    yield Check("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    yield _cuda()
    for name in backends.names():
        yield _backend(name)
    for name, purpose, needed in _PACKAGES:
        yield _package(name, purpose, needed)
    yield _self_test()


def usable(findings: list[Check]) -> bool:
    """Whether nothing that fastfisher needs is broken."""
    return all(check.state != "broken" for check in findings)


_PACKAGES = (
    ("numpy", "reading data sets", True),
    ("safetensors", "reading and writing weights", True),
    ("jinja2", "writing report.html", True),
    ("sklearn", "the digits data set, and so `fastfisher demo`", False),
    ("torchvision", "MNIST, Fashion-MNIST, CIFAR and Tiny-ImageNet", False),
    ("tqdm", "progress bars", False),
    ("triton", "GPU kernels", False),
    ("matplotlib", "the figures of the benchmarks", False),
)
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def _package(name: str, purpose: str, needed: bool) -> Check:
    distribution = _DISTRIBUTIONS.get(name, name)
    fix = f"pip install {distribution} (for {purpose})"
    # Imported, not only found: a torchvision of another torch is there and still does not load.
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return Check(distribution, "broken" if needed else "missing", "not installed", fix)
        return Check(distribution, "broken", f"does not load: {_line(error)}", fix)
    except Exception as error:
        return Check(
            distribution,
            "broken",
            f"does not load: {_line(error)}",
            f"pip install --force-reinstall {distribution} (for {purpose})",
        )
    return Check(distribution, "ok", str(getattr(module, "__version__", "installed")))


def _extension() -> Check:
    name = "CPU kernels"
    rebuild = "install a C++ compiler (g++ or clang++), then: pip install --force-reinstall ."
    try:
        info = ops.build_info()
    except ValueError as error:
        return Check(name, "broken", _line(error), f"correct or unset {ISA_VARIABLE}")
    if not info["compiled"]:
        if importlib.util.find_spec("fastfisher._C") is None:
            found = "not built: the slower plain torch operators serve"
            return Check(name, "missing", found, rebuild)
        found = f"built, but do not load ({info['load_error']}): plain torch operators serve"
        return Check(name, "missing", found, rebuild)
    facts = ", ".join(
        f"{key.replace('_', ' ')} {' '.join(value) if isinstance(value, list) else value}"
        for key, value in info.items()
        if key not in ("compiled", "load_error")
    )
    return Check(name, "ok", facts)


def _cpu() -> Check:
    cap = os.environ.get(ISA_VARIABLE)
    found = f"{cpu_model()}, torch sees {torch.backends.cpu.get_cpu_capability()}"
    if cap:
        found += f", capped by {ISA_VARIABLE}={cap}"
    return Check("CPU", "ok", found)


def _cuda() -> Check:
    if not torch.backends.cuda.is_built():
        return Check("CUDA", "missing", "this torch is a CPU build: the CPU serves")
    if not torch.cuda.is_available():
        return Check(
            "CUDA", "missing", f"torch is built for CUDA {torch.version.cuda}, no device is visible"
        )
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("CUDA", "ok", f"{torch.version.cuda}: {', '.join(devices)}")


def _backend(name: str) -> Check:
    try:
        forced = backends.forced() == name
    except (ValueError, RuntimeError) as error:
        return Check(f"backend {name}", "broken", _line(error), f"unset {backends.VARIABLE}")
    reason = backends.unavailable(name)
    built = name == "cuda" and backends.load_cuda() is None
    code = f", compiled for {backends.architectures()}" if built else ""
    if reason is not None:
        return Check(f"backend {name}", "missing", reason + code)
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = (
        []
        if backends.forced()
        else [kind for kind in present if backends.serving(torch.device(kind)) == name]
    )
    if forced:
        return Check(f"backend {name}", "ok", f"serves all tensors, by {backends.VARIABLE}{code}")
    serves = f"serves tensors on {' and '.join(devices)}" if devices else "can serve, is not chosen"
    return Check(f"backend {name}", "ok", serves + code)


def _self_test() -> Check:
    """A tiny Fisher against the loop of single-sample backward passes, in float64."""
    name, fix = "self-test", "please report this with the output of `fastfisher doctor --json`"
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 5 * 5, 4),
    )
    model.double().eval()
    inputs = torch.randn(5, 2, 5, 5, generator=generator, dtype=torch.float64)
    batch = (inputs, torch.arange(5) % 4)
    try:
        found = fisher_diag(model, [batch])
        expected = fisher_diag_loop(
            model, [batch], lambda output, target: F.cross_entropy(output, target, reduction="none")
        )
        error = max(
            float((found[key] - value).norm() / value.norm()) for key, value in expected.items()
        )
    except Exception as failure:
        return Check(name, "broken", f"fisher_diag failed: {_line(failure)}", fix)
    if not error < 1e-10:
        return Check(name, "broken", f"fisher_diag is wrong by {error:.1e}", fix)
    return Check(name, "ok", f"fisher_diag is exact to {error:.1e}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
