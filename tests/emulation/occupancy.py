"""How many blocks of a kernel an SM holds at once, from the published limits of each architecture.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", and the tables of NVIDIA's occupancy
calculator.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 1 << 16
WARP = 32
PARTITIONS = 4
#: A warp's registers and a block's shared memory are handed out in multiples of these.
REGISTER_UNIT, SHARED_UNIT = 256, 128
#: Shared memory of each block that the system keeps for itself.
RESERVED = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one SM."""

    threads: int
    blocks: int
    shared: int


LIMITS = {
    80: Limits(2048, 32, 164 * 1024),
    86: Limits(1536, 16, 100 * 1024),
    89: Limits(1536, 24, 100 * 1024),
    90: Limits(2048, 32, 228 * 1024),
    100: Limits(2048, 32, 228 * 1024),
    120: Limits(1536, 24, 100 * 1024),
}


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_sm(architecture: int, registers: int, shared: int, threads: int) -> int:
    """Blocks that one SM holds at once; 0 where not even one fits.

    Args:
        architecture: 80 for sm_80.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
        threads: of a block.
    """
    limits = LIMITS[architecture]
    warps = -(-threads // WARP)
    fitting = [limits.blocks, limits.threads // (warps * WARP)]
    # Each of the four partitions has a quarter of the registers, and holds whole warps.
    partition = REGISTERS // PARTITIONS // _up(registers * WARP, REGISTER_UNIT)
    fitting.append(partition * PARTITIONS // warps)
    needed = _up(shared + RESERVED, SHARED_UNIT)
    fitting.append(limits.shared // needed)
    return min(fitting)


def occupancy(architecture: int, registers: int, shared: int, threads: int) -> float:
    """Warps that one SM holds at once, over the warps that it could."""
    warps = -(-threads // WARP)
    blocks = blocks_per_sm(architecture, registers, shared, threads)
    return blocks * warps * WARP / LIMITS[architecture].threads
