"""What Triton's compiler made of fastfisher/triton, in the form in which sass.py has CUDA kernels.

The compiler is not to be had in a process where Triton interprets, so :func:`compile_all` asks
another one, which is this file run as a program. Triton keeps what it compiled in
``build/triton``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .sass import ARCHITECTURES, PARALLEL, ROOT, Kernel

SOURCE = "triton"
#: What Triton's kernels are compiled for; the others differ from one of these by limits alone.
CAPABILITIES = (80, 90, 100, 120)


def compile_all(capabilities: Sequence[int]) -> list[Kernel]:
    """The shipped forms of every Triton kernel, for devices that are not there.

    For the oldest device all of them, for the others the first choice of block sizes for aligned
    operands, which is what runs where nobody asked for tuning: each takes a second.

    Args:
        capabilities: 80 for sm_80.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    command = [sys.executable, "-m", __name__, *map(str, capabilities)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a Triton kernel does not compile:\n{done.stderr[-6000:]}")
    return [Kernel(**json.loads(line)) for line in done.stdout.splitlines()]


def _is_compiled(name: str, capability: int) -> bool:
    return capability == min(ARCHITECTURES) or (name.endswith("choice 0") and " odd," not in name)


def _kernel(work: tuple[str, int]) -> Kernel:
    from . import aot

    name, capability = work
    [configuration] = [each for each in aot.triton_configurations(capability) if each.name == name]
    made = aot.compile(configuration, capability)
    return Kernel(
        name=name,
        source=SOURCE,
        architecture=capability,
        registers=made.registers,
        stack=made.stack,
        # What is spilled is on the stack.
        spills=0,
        shared=made.shared,
        threads=made.threads,
        opcodes=made.instructions,
        hot={},
    )


def main() -> None:
    """Print a JSON object a line for each kernel."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from . import aot

    work = [
        (configuration.name, capability)
        for capability in map(int, sys.argv[1:])
        for configuration in aot.triton_configurations(capability)
        if _is_compiled(configuration.name, capability)
    ]
    with ProcessPoolExecutor(PARALLEL, mp_context=get_context("spawn")) as pool:
        for kernel in pool.map(_kernel, work, chunksize=4):
            print(json.dumps(asdict(kernel)), flush=True)


if __name__ == "__main__":
    main()
