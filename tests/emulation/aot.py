"""Compiles every shipped Triton kernel ahead of time, for devices that are not there.

The launches are those that the operators make when they are given meta tensors
(:func:`fastfisher.triton.launch.recording`), so what is compiled is what would run: the same
block sizes, the same specialisation on strides. The compiler is not to be had in a process where
triton interprets; ``python -m tests.emulation.aot`` prints the facts as JSON, a line a kernel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import fastfisher.triton as twins
from fastfisher.triton import launch

from ..proof import triton_channel, triton_gather, triton_outer, triton_recurrent, triton_topr

CAPABILITIES = (80, 90, 100, 120)
_CALLS = {
    **triton_outer.CALLS,
    **triton_channel.CALLS,
    **triton_gather.CALLS,
    **triton_recurrent.CALLS,
    **triton_topr.CALLS,
}
# As many as an A100 has; it decides how samples are divided, and no more.
_MULTIPROCESSORS = 108
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Configuration:
    """One kernel in one form.

    Attributes:
        name: the kernel and the call that launches it, and which choice of the table it is.
        kernel: the kernel's name.
        call: a key of the calls.
        choice: index of the block sizes in the table's entry.
        aligned: whether tensors begin at multiples of 16 bytes.
    """

    name: str
    kernel: str
    call: str
    choice: int
    aligned: bool


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs of the device, and what it consists of.

    Attributes:
        stack: bytes of local memory per thread, spilled registers included.
        shared: bytes of shared memory per block.
        opcodes: how often each instruction occurs, without its modifiers.
        instructions: the same with modifiers.
    """

    cubin: bytes
    ptx: str
    threads: int
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]
    instructions: dict[str, int]


@functools.cache
def _launches(call: str, capability: int) -> tuple[launch.Launch, ...]:
    """The launches of a call, without a second one of the same kernel."""
    with launch.recording(meta=launch.Target(capability, _MULTIPROCESSORS)) as made:
        _CALLS[call](SimpleNamespace(**twins.KERNELS))
    return tuple({each.kernel.__name__: each for each in made}.values())


def _choices(each: launch.Launch) -> list[launch.Blocks]:
    blocks = each.blocks
    return launch.choices(each.kernel.__name__, each.target, blocks.precision, blocks.shapes)


def _key(each: launch.Launch, aligned: bool) -> str:
    """Equal for launches that are compiled to the same code."""
    _, signature, constants, attributes, _ = _specialised(each, each.blocks, aligned)
    return repr((each.kernel.__name__, signature, constants, attributes))


def triton_configurations(capability: int = CAPABILITIES[0]) -> list[Configuration]:
    """All that is shipped for a capability, each form once."""
    found: dict[str, list[Configuration]] = {}
    for call in _CALLS:
        # An odd shape's tensors are taken to begin anywhere, too.
        aligned = not call.endswith(" odd")
        for each in _launches(call, capability):
            kernel, key = each.kernel.__name__, _key(each, aligned)
            if key not in found:
                found[key] = [
                    Configuration(f"{kernel}: {call}, choice {i}", kernel, call, i, aligned)
                    for i in range(len(_choices(each)))
                ]
    return [each for group in found.values() for each in group]


def _specialised(
    each: launch.Launch, blocks: launch.Blocks, aligned: bool
) -> tuple[GPUTarget, dict[str, str], dict[Any, Any], dict[Any, Any], dict[str, Any]]:
    """What triton makes of the arguments of a launch before it compiles."""
    target = GPUTarget("cuda", each.target.capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(each.kernel.signature, each.kernel.params, backend)
    bound, specialization, _ = bind(**each.arguments, **blocks.sizes)
    options, signature, constants, attributes = each.kernel._pack_args(
        backend, dict(blocks.options), bound, specialization, {}
    )
    if not aligned:
        pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
        attributes = {path: each for path, each in attributes.items() if path[0] not in pointers}
    return target, signature, constants, attributes, options.__dict__


def compile(configuration: Configuration, capability: int) -> Compiled:
    """Compiles a kernel for ``sm_<capability>`` and takes it apart."""
    (each,) = (
        each
        for each in _launches(configuration.call, capability)
        if each.kernel.__name__ == configuration.kernel
    )
    blocks = _choices(each)[configuration.choice]
    target, signature, constants, attributes, options = _specialised(
        each, blocks, configuration.aligned
    )
    source = ASTSource(each.kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        instructions = _instructions(_tool("nvdisasm", "-c", file.name))
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    opcodes: Counter[str] = Counter()
    for name, count in instructions.items():
        opcodes[name.partition(".")[0]] += count
    return Compiled(
        made.asm["cubin"],
        made.asm["ptx"],
        32 * made.metadata.num_warps,
        registers,
        stack,
        made.metadata.shared,
        dict(opcodes),
        dict(instructions),
    )


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump's output has no {pattern}:\n{text}")
    return int(match[1])


def _instructions(sass: str) -> Counter[str]:
    line = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
    return Counter(match[1] for match in line.finditer(sass))


def _facts(work: tuple[Configuration, int]) -> dict[str, Any]:
    configuration, capability = work
    facts = asdict(compile(configuration, capability))
    del facts["cubin"], facts["ptx"], facts["instructions"]
    return {"name": configuration.name, "capability": capability, **facts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints facts of each configuration whose name has a word, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--match", default="", help="part of the configuration's name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    work = [
        (configuration, capability)
        for capability in options.capability
        for configuration in triton_configurations(capability)
        if options.match in configuration.name
    ]
    run: Callable[..., Any] = map
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        run = pool.map if options.jobs > 1 else map
        for facts in run(_facts, work):
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
