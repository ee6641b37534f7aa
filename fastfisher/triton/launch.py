"""How every Triton kernel here is launched: block sizes from a table, on the tensors' device.

``blocks.json`` has for each kernel, compute capability, precision and class of shapes a list of
block sizes, each with the number of ``warps``, of ``stages`` of the pipeline and, where the
assembler would rather spill than use them, of ``registers`` that a thread may have. The first one
is taken; with ``FASTFISHER_AUTOTUNE=1`` and a device, all of a list are timed once and the fastest
is remembered in ``$XDG_CACHE_HOME/fastfisher/triton_blocks.json`` (``~/.cache`` where that is not
set). Another choice may add floating-point numbers in another order; with a given one, results have
the same bits every time.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..files import replacing

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether triton's interpreter runs the kernels (``TRITON_INTERPRET=1``), on the CPU."""

_MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True, slots=True)
class Target:
    """What launches are made for.

    Attributes:
        capability: compute capability as in ``sm_80``, or 0 for the interpreter.
        multiprocessors: how many the device has; programs that run at the same time.
    """

    capability: int
    multiprocessors: int


# One program at a time is enough for an interpreter; two show that work is divided correctly.
_INTERPRETER = Target(0, 2)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Block sizes of a kernel (its constexpr parameters), and triton's options to compile it.

    ``precision`` and ``shapes`` say which entry of the table they are of.
    """

    precision: str
    shapes: str
    sizes: Mapping[str, int]
    options: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch, as tests record it.

    Attributes:
        kernel: the function under ``triton.jit``.
        grid: programs per dimension.
        arguments: all of the kernel's arguments by name, constexpr ones but block sizes included.
        blocks: block sizes, which are arguments too.
        target: the device it is for.
        reached: tensors that the kernel finds by addresses in another one.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    blocks: Blocks
    target: Target
    reached: Sequence[Tensor] = ()


_recorders: list[Callable[[Launch], None]] = []
_meta_target: Target | None = None


@contextmanager
def recording(meta: Target | None = None) -> Iterator[list[Launch]]:
    """Collects the launches made in the block, in the list that it yields.

    Args:
        meta: the device that tensors on ``meta`` stand for. Launches with such tensors are only
            recorded, which shows without a device what would be launched on it.
    """
    global _meta_target
    launches: list[Launch] = []
    before, _meta_target = _meta_target, meta
    _recorders.append(launches.append)
    try:
        yield launches
    finally:
        _recorders.remove(launches.append)
        _meta_target = before


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def target_of(tensor: Tensor) -> Target:
    """The device that a kernel with this tensor runs on.

    Raises:
        RuntimeError: there is none.
    """
    device = tensor.device
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu" and INTERPRETED:
        return _INTERPRETER
    if device.type == "meta" and _meta_target is not None:
        return _meta_target
    raise RuntimeError(f"no Triton kernel runs on {device}: expected a CUDA tensor")


def refuse(op: str, argument: str, expected: str) -> NoReturn:
    """Raises the ValueError of an operator's argument that does not fit."""
    raise ValueError(f"fastfisher::{op}: {argument}: expected {expected}")


def check(op: str, argument: str, condition: bool, expected: str) -> None:
    """Refuses the argument unless the condition holds."""
    if not condition:
        refuse(op, argument, expected)


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Refuses tensors that are not all on one device."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        first = tensor if first is None else first
        check(op, name, tensor.device == first.device, f"a tensor on {first.device}")


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, list[dict[str, int]]]]]]:
    """``blocks.json``: kernel, capability, precision, class of shapes, choices."""
    text = resources.files(__package__).joinpath("blocks.json").read_text(encoding="utf-8")
    loaded = json.loads(text)
    assert isinstance(loaded, dict)
    return loaded


def choices(kernel: str, target: Target, precision: str, shapes: str) -> list[Blocks]:
    """What the table has for a kernel, the default first.

    Args:
        kernel: the name of the kernel's function.
        target: the capability above all that the table has gets the entry of the highest one.
        precision: of the arithmetic, such as ``"float32"`` or ``"tf32"``.
        shapes: class of shapes; which there are is the kernel's family's affair.
    """
    capabilities = table()[kernel]
    fitting = [int(each) for each in capabilities if int(each) <= target.capability]
    entries = capabilities[str(max(fitting))][precision][shapes]
    return [_blocks(precision, shapes, entry) for entry in entries]


# What triton calls the entries of the table that are not block sizes.
_OPTIONS = {"warps": "num_warps", "stages": "num_stages", "registers": "maxnreg"}


def _blocks(precision: str, shapes: str, entry: Mapping[str, int]) -> Blocks:
    sizes = {name: value for name, value in entry.items() if name not in _OPTIONS}
    options = {_OPTIONS[name]: value for name, value in entry.items() if name in _OPTIONS}
    return Blocks(precision, shapes, sizes, options)


def tuned(
    kernel: str,
    precision: str,
    shapes: str,
    outs: Sequence[Tensor],
    body: Callable[[Blocks, Sequence[Tensor]], None],
) -> None:
    """Calls ``body`` with the kernel's block sizes and ``outs``.

    Args:
        kernel: as in :func:`choices`, as are ``precision`` and ``shapes``.
        precision: see there.
        shapes: see there.
        outs: what the body writes to. While choices are timed, it writes to copies of them.
        body: makes all launches of the operator.
    """
    target = target_of(outs[0])
    found = choices(kernel, target, precision, shapes)
    chosen = found[0]
    if len(found) > 1 and _may_autotune(outs[0]):
        with torch.cuda.device(outs[0].device):
            chosen = _fastest(f"{kernel} {precision} {shapes}", found, outs, body)
    body(chosen, outs)


def _may_autotune(tensor: Tensor) -> bool:
    return (
        os.environ.get("FASTFISHER_AUTOTUNE") == "1"
        and tensor.device.type == "cuda"
        # Nothing can be timed while a graph is captured.
        and not torch.cuda.is_current_stream_capturing()
    )


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastfisher" / "triton_blocks.json"


def _remembered() -> dict[str, dict[str, int]]:
    try:
        loaded = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


_fastest_so_far: dict[str, Blocks] = {}


def _fastest(
    key: str,
    found: Sequence[Blocks],
    outs: Sequence[Tensor],
    body: Callable[[Blocks, Sequence[Tensor]], None],
) -> Blocks:
    """The fastest choice, as the cache file has it or else as measured now."""
    key = f"{torch.cuda.get_device_name()}, triton {triton.__version__}: {key}"
    if key not in _fastest_so_far:
        entry = _remembered().get(key)
        known = [blocks for blocks in found if entry is not None and _entry(blocks) == entry]
        _fastest_so_far[key] = known[0] if known else _measure(key, found, outs, body)
    return _fastest_so_far[key]


def _measure(
    key: str,
    found: Sequence[Blocks],
    outs: Sequence[Tensor],
    body: Callable[[Blocks, Sequence[Tensor]], None],
) -> Blocks:
    copies = [out.clone() for out in outs]
    times = [triton.testing.do_bench(functools.partial(body, each, copies)) for each in found]
    best = found[times.index(min(times))]
    path = _cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(json.dumps(_remembered() | {key: _entry(best)}, indent=1), encoding="utf-8")
    return best


def _entry(blocks: Blocks) -> dict[str, int]:
    return {**blocks.sizes, **blocks.options}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    blocks: Blocks,
    on: Tensor,
    reached: Sequence[Tensor] = (),
    /,
    **arguments: Any,
) -> None:
    """Launches a kernel on the current stream of a tensor's device; an empty grid is nothing to do.

    Args:
        kernel: under ``triton.jit``.
        grid: programs per dimension, at most 2**31 - 1 in the first and 65535 in the others.
        blocks: its block sizes.
        on: a tensor on the device.
        reached: tensors that the kernel finds by addresses in another one.
        arguments: all its other arguments, by name.

    Raises:
        ValueError: the grid is too large.
    """
    if not math.prod(grid):
        return
    if any(size > limit for size, limit in zip(grid, _MAX_GRID, strict=False)):
        raise ValueError(f"{kernel.__name__}: the grid {grid} exceeds {_MAX_GRID}")
    for record in _recorders:
        record(Launch(kernel, grid, arguments, blocks, target_of(on), reached))
    if on.device.type == "meta":
        return
    with torch.cuda.device(on.device) if on.device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **blocks.sizes, **blocks.options)


def float_bits(value: float) -> int:
    """The bits of a float64, for :func:`as_float`: triton would round a float to float32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


@triton.jit
def as_float(bits, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number whose :func:`float_bits` a kernel was given, rounded to ``dtype``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def powers(values, ABSOLUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Absolute values or squares."""
    if ABSOLUTE:
        return tl.abs(values)
    return values * values
