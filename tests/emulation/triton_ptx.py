"""Runs what Triton compiles for sm_80 in ptxsim, launched by the operators of fastfisher.triton.

In the place of each launch its kernel is compiled ahead of time, specialised as triton would for
these arguments, and run on the tensors themselves. That needs a process where triton does not
interpret; ``python -m tests.emulation.triton_ptx [--per-kernel N]`` runs the small proof cases.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import fastfisher.triton as twins
from fastfisher.triton import launch as launching

from ..proof.case import first_small
from ..proof.collection import collect
from .checked import CheckError, merged_spans
from .ptx_program import PtxError, entry_names, parse
from .ptxsim import launch

TARGET = launching.Target(80, 2)

_PACKING = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip


def _packed(signature: dict[str, str], values: dict[str, Any]) -> bytes:
    """The parameters of a compiled kernel; triton adds two pointers to scratch memory, null here.

    Raises:
        PtxError: a parameter's type is not known.
    """
    data = b""
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            code, value = "Q", values[name].data_ptr()
        elif kind in _PACKING:
            code, value = _PACKING[kind], values[name]
        else:
            raise PtxError(f"parameter {name} of type {kind}")
        data += bytes(-len(data) % struct.calcsize(code)) + struct.pack(f"<{code}", value)
    return data + bytes(-len(data) % 8) + bytes(16)


class Replay:
    """Stands for :func:`fastfisher.triton.launch.launch`.

    Attributes:
        kernels: names of the kernels that have run.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        blocks: launching.Blocks,
        on: Tensor,
        reached: Sequence[Tensor] = (),
        /,
        **arguments: Any,
    ) -> None:
        """Compiles the kernel and runs its PTX.

        Raises:
            CheckError: ptxsim found something wrong.
        """
        if 0 in grid:
            return
        values = {**arguments, **blocks.sizes}
        target = GPUTarget("cuda", TARGET.capability, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(**values)
        options, signature, constants, attributes = kernel._pack_args(
            backend, dict(blocks.options), bound, specialization, {}
        )
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=target, options=options.__dict__)
        (name,) = entry_names(made.asm["ptx"])
        found = [*values.values(), *reached]
        tensors = [(each, True) for each in found if isinstance(each, Tensor)]
        reports = launch(
            parse(made.asm["ptx"], name),
            (*grid, 1, 1)[:3],
            (32 * made.metadata.num_warps, 1, 1),
            _packed(signature, dict(bound)),
            made.metadata.shared,
            merged_spans(tensors),
        )
        self.kernels.append(name)
        if reports:
            raise CheckError(f"{name}: {reports}")


def replace_launches() -> Replay:
    """Lets the operators of fastfisher.triton take tensors on the CPU, in this process."""
    if launching.INTERPRETED:
        raise RuntimeError("triton interprets in this process: TRITON_INTERPRET is set")
    replay = Replay()
    target_of = launching.target_of

    def target_here(tensor: Tensor) -> launching.Target:
        return TARGET if tensor.device.type == "cpu" else target_of(tensor)

    # A family's module may have imported either by name.
    stand_ins = {launching.launch: replay, target_of: target_here}
    for module in (launching, *twins._FAMILIES):
        for name, value in list(vars(module).items()):
            if callable(value) and value.__class__ is type(target_of) and value in stand_ins:
                setattr(module, name, stand_ins[value])
    return replay


class NoTwin(Exception):
    """A case calls an operator that no Triton kernel serves."""


class _Operators:
    """The twins under the names of their operators."""

    def __getattr__(self, name: str) -> Any:
        if name not in twins.KERNELS:
            raise NoTwin(name)
        return twins.KERNELS[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the first small proof cases of each kernel; 0 where all are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-kernel", type=int, default=3)
    parser.add_argument("--match", default="", help="part of a case's name")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    replay = replace_launches()
    wrong = 0
    for case in first_small(collect(), options.per_kernel):
        if options.match not in case.name:
            continue
        replay.kernels.clear()
        try:
            result: dict[str, Any] = {"error": case.run(_Operators())}
        except NoTwin:
            continue
        except (AssertionError, RuntimeError) as failure:
            result = {"failure": str(failure)}
            wrong += 1
        print(json.dumps({"case": case.name, "kernels": replay.kernels, **result}), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
