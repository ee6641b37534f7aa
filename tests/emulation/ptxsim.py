"""Runs the PTX that nvcc or Triton emitted, one thread block at a time, its threads as numpy lanes.

Threads that take different ways are groups of a place and a mask, of which the one that is furthest
behind goes on; so they meet again where the ways do. Every access is checked (ptx_memory.py), and
so are barriers and warp operations with lanes that are not there. What is not known raises
:class:`~tests.emulation.ptx_program.PtxError`.

Not modelled: what ptxas makes of the PTX, lanes of a warp in another order, flushing of subnormals,
rounding inside the tensor cores (sums are exact, and rounded once), float64's fma (rounded twice),
and the approximations of transcendental functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_memory import Access, Bytes, Clock, GlobalMemory, Ints, Mask, Reports, SharedMemory
from .ptx_program import Instruction, Operand, Program, PtxError

Array = NDArray[Any]

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_KINDS: dict[str, dict[int, Any]] = {"u": _UNSIGNED, "b": _UNSIGNED, "s": _SIGNED, "f": _FLOAT}

# Where generic addresses of shared and local memory begin; no address of a process is there.
_SHARED_BASE, _LOCAL_BASE = 1 << 60, 1 << 61
_MAX_SHARED = 163 << 10


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of a PTX type such as ``s32``."""
    if name == "pred":
        return np.dtype(bool)
    if name == "bf16" or not name[1:].isdigit() or name[0] not in _KINDS:
        raise PtxError(f"type {name}")
    return np.dtype(_KINDS[name[0]][int(name[1:])])


def bf16_to_float32(bits: Array) -> Array:
    """The numbers of uint16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16(values: Array) -> Array:
    """Uint16 bits of the nearest numbers, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


@dataclass(slots=True)
class Copy:
    """A copy in the background: whose groups it is of, and what it will write."""

    access: Access
    data: Bytes
    group: Ints


Operation = Callable[["Block", Instruction, Mask], None]
OPERATIONS: dict[str, Operation] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Registers what executes the instructions of these names."""

    def register(function: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


class Block:
    """One thread block.

    Args:
        program: the kernel.
        grid: blocks per dimension.
        size: threads per dimension.
        index: of the block.
        parameters: the kernel's, as bytes.
        dynamic_shared: bytes.
        memory: global memory.
        reports: where findings go.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        size: Sequence[int],
        index: Sequence[int],
        parameters: Bytes,
        dynamic_shared: int,
        memory: GlobalMemory,
        reports: Reports,
    ) -> None:
        self.program, self.memory, self.reports = program, memory, reports
        self.parameters = parameters
        self.threads = size[0] * size[1] * size[2]
        self.lane: Ints = np.arange(self.threads, dtype=np.int64) % 32
        self.clock = Clock(self.threads)
        dynamic = -(-program.shared_bytes // 16) * 16
        total = dynamic + dynamic_shared
        if total > _MAX_SHARED:
            raise PtxError(f"{total} bytes of shared memory")
        self.shared = SharedMemory(total, self.clock, reports)
        self.symbols = {
            name: dynamic if offset is None else offset for name, offset in program.shared.items()
        }
        self.symbols |= program.local | program.parameters
        self.local: Bytes = np.full((self.threads, program.local_bytes), 0xFF, np.uint8)
        self.registers: dict[str, Array] = {}
        self.special = self._special(grid, size, index)
        self.copies: list[Copy] = []
        self.group: Ints = np.zeros(self.threads, np.int64)

    def _special(
        self, grid: Sequence[int], size: Sequence[int], index: Sequence[int]
    ) -> dict[str, Array]:
        thread = np.arange(self.threads, dtype=np.uint32)
        special: dict[str, Array] = {
            "%tid.x": thread % np.uint32(size[0]),
            "%tid.y": thread // np.uint32(size[0]) % np.uint32(size[1]),
            "%tid.z": thread // np.uint32(size[0] * size[1]),
            "%laneid": thread % np.uint32(32),
            "%warpid": thread // np.uint32(32),
        }
        for i, axis in enumerate("xyz"):
            for name, value in (("ctaid", index), ("ntid", size), ("nctaid", grid)):
                special[f"%{name}.{axis}"] = np.full(self.threads, value[i], np.uint32)
        return special

    # Control.

    def run(self) -> None:
        """Runs all threads to their end."""
        instructions, labels = self.program.instructions, self.program.labels
        alive = np.ones(self.threads, bool)
        groups: dict[int, Mask] = {0: alive.copy()}
        waiting, barrier = np.zeros(self.threads, bool), -1

        def add(place: int, mask: Mask) -> None:
            if mask.any():
                groups[place] = groups[place] | mask if place in groups else mask

        while groups:
            place = min(groups)
            mask = groups.pop(place)
            place = self._run_straight(place, mask, min(groups, default=len(instructions)))
            if place >= len(instructions):
                raise PtxError(f"{self.program.name} does not end with ret")
            each = instructions[place]
            if place in groups:
                add(place, mask)
            elif each.name in ("bra", "ret", "exit"):
                taken = self._taken(each, mask)
                if each.name == "bra":
                    add(labels[each.operands[0].text], taken)
                else:
                    alive &= ~taken
                add(place + 1, mask & ~taken)
            else:
                if waiting.any() and barrier != place:
                    self.reports.note("divergent barrier", each)
                waiting |= mask
                barrier = place
            if not groups and waiting.any():
                each = instructions[barrier]
                if not alive.all():
                    self.reports.note("barrier after some threads have exited", each)
                if not np.array_equal(waiting, alive):
                    raise PtxError(f"deadlock at {each.opcode}, line {each.line}")
                self._pass_barrier(each, waiting)
                groups[barrier + 1] = waiting
                waiting, barrier = np.zeros(self.threads, bool), -1

    def _pass_barrier(self, instruction: Instruction, mask: Mask) -> None:
        """All threads have met; some barriers tell each of them something about all predicates."""
        kinds = [each for each in instruction.modifiers if each not in ("cta", "aligned")]
        operands = list(instruction.operands)
        to = operands.pop(0) if kinds[0] == "red" else None
        number_ = operands.pop(0)
        plain = number_.text == "0" and not instruction.guard
        if to is None:
            known = kinds == ["sync"] and not operands
        else:
            known = len(operands) == 1 and kinds in (
                ["red", "and", "pred"],
                ["red", "or", "pred"],
                ["red", "popc", "u32"],
            )
        if not (plain and known):
            raise PtxError(f"{instruction.opcode} of barrier {number_.text}")
        if to is not None:
            holds = self.predicate(operands[0].text)[mask]
            total = {"and": holds.all, "or": holds.any, "popc": holds.sum}[kinds[1]]()
            dtype = np.uint32 if kinds[1] == "popc" else bool
            self.write(to, np.full(self.threads, total, dtype), mask)
        self.clock.pass_barrier()

    def _taken(self, instruction: Instruction, mask: Mask) -> Mask:
        if not instruction.guard:
            return mask
        return mask & (self.predicate(instruction.guard) ^ instruction.negated)

    def _run_straight(self, place: int, mask: Mask, end: int) -> int:
        """Executes until a branch, an exit, a barrier, or where others wait; returns the place."""
        instructions = self.program.instructions
        while place < end:
            each = instructions[place]
            if each.name in ("bra", "ret", "exit"):
                break
            if each.name in ("bar", "barrier") and "warp" not in each.modifiers:
                break
            taken = self._taken(each, mask)
            if taken.any():
                self.execute(each, taken)
            place += 1
        return place

    def execute(self, instruction: Instruction, mask: Mask) -> None:
        """Executes an instruction that does not branch, for the threads of the mask."""
        function = OPERATIONS.get(instruction.name)
        if function is None:
            raise PtxError(f"unknown instruction {instruction.opcode}")
        with np.errstate(all="ignore"):
            function(self, instruction, mask)

    # Operands.

    def predicate(self, name: str) -> Array:
        """Bool [threads]."""
        if name.startswith("!"):
            return ~self.predicate(name[1:])
        return self._register(name)

    def _register(self, name: str) -> Array:
        value = self.registers.get(name)
        if value is None:
            width = self.program.width(name)
            dtype = np.dtype(bool) if width == 1 else np.dtype(_UNSIGNED[width])
            value = self.registers[name] = np.zeros(self.threads, dtype)
        return value

    def read(self, operand: Operand, dtype: Any) -> Array:
        """An operand of all threads, as numbers of this type."""
        wanted = np.dtype(dtype)
        if operand.kind == "number":
            return np.full(self.threads, number(operand.text, wanted), wanted)
        if operand.kind == "symbol":
            return np.full(self.threads, self.symbols[operand.text], wanted)
        if operand.kind == "special":
            value = self.special[operand.text]
        elif operand.kind == "register":
            value = (
                self.predicate(operand.text) if wanted.kind == "b" else self._register(operand.text)
            )
        else:
            raise PtxError(f"operand {operand.text}")
        if wanted.kind == "b":
            return value
        if value.dtype.itemsize != wanted.itemsize:
            value = value.astype(_UNSIGNED[wanted.itemsize * 8])
        return value.view(wanted)

    def write(self, operand: Operand, value: Array, mask: Mask) -> None:
        """Puts a value into a register, extended by its own sign or cut to the register's width."""
        if operand.text == "_":
            return
        register = self._register(operand.text)
        value = np.asarray(value)
        if register.dtype.kind != "b":
            bits = register.dtype.itemsize * 8
            if value.dtype.itemsize * 8 != bits:
                value = value.astype(_SIGNED[bits] if value.dtype.kind == "i" else _UNSIGNED[bits])
            value = value.view(register.dtype)
        np.copyto(register, value, where=mask)

    def addresses(self, operand: Operand) -> Ints:
        """Int64 [threads]."""
        if operand.text.startswith("%"):
            base = self._register(operand.text)
            address = base.astype(np.int64) + operand.offset
            # A sum of 32 bits wraps: what is in the register may lie below 0, as far as the offset.
            return address & 0xFFFFFFFF if base.dtype.itemsize == 4 else address
        return np.full(self.threads, self.symbols[operand.text] + operand.offset, np.int64)

    # Memory.

    def load(self, space: str, access: Access) -> Bytes:
        """Uint8 [threads, size] from a state space, or by generic addresses."""
        if space == "shared":
            return self.shared.load(access)
        if space == "global":
            return self.memory.load(access)
        if space == "local":
            index = np.clip(access.bytes_of(0), 0, max(self.program.local_bytes - 1, 0))
            out = np.zeros((self.threads, access.size), np.uint8)
            out[access.mask] = self.local[np.nonzero(access.mask)[0][:, None], index]
            return out
        out = np.zeros((self.threads, access.size), np.uint8)
        for named, part in self._by_space(access):
            out[part.mask] = self.load(named, part)[part.mask]
        return out

    def store(self, space: str, access: Access, data: Bytes) -> None:
        """Writes uint8 [threads, size] to a state space, or by generic addresses."""
        if space == "shared":
            self.shared.store(access, data)
        elif space == "global":
            self.memory.store(access, data)
        elif space == "local":
            index = np.clip(access.bytes_of(0), 0, max(self.program.local_bytes - 1, 0))
            self.local[np.nonzero(access.mask)[0][:, None], index] = data[access.mask]
        else:
            for named, part in self._by_space(access):
                self.store(named, part, data)

    def _by_space(self, access: Access) -> list[tuple[str, Access]]:
        bounds = [("global", 0, _SHARED_BASE), ("shared", _SHARED_BASE, _LOCAL_BASE)]
        bounds.append(("local", _LOCAL_BASE, 2 * _LOCAL_BASE))
        parts = []
        for name, low, high in bounds:
            mask = access.mask & (access.address >= low) & (access.address < high)
            if mask.any():
                base = 0 if name == "global" else low
                part = Access(access.address - base, access.size, mask, access.instruction)
                parts.append((name, part))
        return parts


def number(text: str, dtype: np.dtype[Any]) -> Any:
    """A literal, as a number of this type."""
    if text[:2] in ("0f", "0d") and dtype.kind != "b":  # a bit pattern, whatever the type
        exact = np.array(int(text[2:], 16), np.uint32 if text[1] == "f" else np.uint64)
        if dtype.itemsize != exact.itemsize:
            raise PtxError(f"{text} as {dtype}")
        return exact.view(dtype)[()]
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return bool(value)
    bits = dtype.itemsize * 8
    return np.array(value & ((1 << bits) - 1), _UNSIGNED[bits]).view(dtype)[()]


def space_of(instruction: Instruction) -> str:
    """The state space that an instruction names, or ``generic``."""
    for each in instruction.modifiers:
        name = each.split("::")[0]
        if name in ("global", "shared", "local", "param"):
            return name
    return "generic"


def _type(instruction: Instruction) -> np.dtype[Any]:
    return dtype_of(instruction.modifiers[-1])


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if operand.kind == "vector" else (operand,)


# Arithmetic.


def _binary(function: Callable[[Array, Array], Array]) -> Operation:
    def run(block: Block, instruction: Instruction, mask: Mask) -> None:
        dtype = _type(instruction)
        to, a, b = instruction.operands
        value = function(block.read(a, dtype), block.read(b, dtype))
        block.write(to, value.astype(dtype, copy=False), mask)

    return run


def _unary(function: Callable[[Array], Array]) -> Operation:
    def run(block: Block, instruction: Instruction, mask: Mask) -> None:
        dtype = _type(instruction)
        to, a = instruction.operands
        block.write(to, function(block.read(a, dtype)).astype(dtype, copy=False), mask)

    return run


OPERATIONS |= {
    "add": _binary(lambda a, b: a + b),
    "sub": _binary(lambda a, b: a - b),
    "rem": _binary(lambda a, b: np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))),
    "and": _binary(np.bitwise_and),
    "or": _binary(np.bitwise_or),
    "xor": _binary(np.bitwise_xor),
    # copysign.f32 d, a, b: the sign of a with the magnitude of b.
    "copysign": _binary(lambda a, b: np.copysign(b, a)),
    "not": _unary(np.invert),
    "neg": _unary(np.negative),
    "abs": _unary(np.abs),
    "sqrt": _unary(np.sqrt),
    "rcp": _unary(lambda a: 1 / a),
    "rsqrt": _unary(lambda a: 1 / np.sqrt(a)),
    "ex2": _unary(np.exp2),
    "lg2": _unary(np.log2),
    "tanh": _unary(np.tanh),
}


@operation("min", "max")
def _extremum(block: Block, instruction: Instruction, mask: Mask) -> None:
    least = instruction.name == "min"
    # Without that modifier a number is preferred to NaN.
    propagates = "NaN" in instruction.modifiers
    low, high = (np.minimum, np.maximum) if propagates else (np.fmin, np.fmax)
    _binary(low if least else high)(block, instruction, mask)


@operation("div")
def _divide(block: Block, instruction: Instruction, mask: Mask) -> None:
    def quotient(a: Array, b: Array) -> Array:
        if a.dtype.kind == "f":
            return np.asarray(a / b)
        divisor = np.where(b == 0, 1, b).astype(b.dtype)
        # Towards zero.
        return (a - np.fmod(a, divisor)) // divisor

    _binary(quotient)(block, instruction, mask)


def _high_product(a: Array, b: Array) -> Array:
    exact = a.astype(object) * b.astype(object) >> (a.dtype.itemsize * 8)
    return exact.astype(a.dtype)


def _product(block: Block, instruction: Instruction) -> Array:
    dtype = _type(instruction)
    a, b = (block.read(each, dtype) for each in instruction.operands[1:3])
    if "wide" in instruction.modifiers:
        wide = _KINDS["s" if dtype.kind == "i" else "u"][dtype.itemsize * 16]
        return np.asarray(a.astype(wide) * b.astype(wide))
    if "hi" in instruction.modifiers:
        return _high_product(a, b)
    return np.asarray(a * b)


@operation("mul")
def _multiply(block: Block, instruction: Instruction, mask: Mask) -> None:
    block.write(instruction.operands[0], _product(block, instruction), mask)


@operation("mad")
def _multiply_add(block: Block, instruction: Instruction, mask: Mask) -> None:
    product = _product(block, instruction)
    value = product + block.read(instruction.operands[3], product.dtype)
    block.write(instruction.operands[0], value, mask)


@operation("fma")
def _fused(block: Block, instruction: Instruction, mask: Mask) -> None:
    dtype = _type(instruction)
    a, b, c = (block.read(each, dtype) for each in instruction.operands[1:])
    if dtype == np.float32:  # exact product; the sum is rounded to float64 first
        value = (a.astype(np.float64) * b + c).astype(np.float32)
    else:
        value = a * b + c
    block.write(instruction.operands[0], value, mask)


@operation("shl", "shr")
def _shift(block: Block, instruction: Instruction, mask: Mask) -> None:
    dtype = _type(instruction)
    value = block.read(instruction.operands[1], dtype)
    by = block.read(instruction.operands[2], np.uint32)
    bits = dtype.itemsize * 8
    shift = np.minimum(by, bits - 1).astype(dtype)
    if instruction.name == "shl":
        result = np.where(by >= bits, 0, value << shift)
    elif dtype.kind == "i":
        result = value >> shift
    else:
        result = np.where(by >= bits, 0, value >> shift)
    block.write(instruction.operands[0], result.astype(dtype), mask)


@operation("shf")
def _funnel_shift(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, a, b, c = instruction.operands
    low, high = (block.read(each, np.uint32).astype(np.uint64) for each in (a, b))
    by = block.read(c, np.uint32)
    by = (by & 31 if "wrap" in instruction.modifiers else np.minimum(by, 32)).astype(np.uint64)
    both = high << np.uint64(32) | low
    left = "l" in instruction.modifiers
    result = (both << by) >> np.uint64(32) if left else both >> by
    block.write(to, result.astype(np.uint32), mask)


# Bits.


@operation("bfe")
def _extract_bits(block: Block, instruction: Instruction, mask: Mask) -> None:
    dtype = _type(instruction)
    to, a, b, c = instruction.operands
    start, length = (block.read(each, np.uint32).astype(np.int64) & 255 for each in (b, c))
    value = block.read(a, dtype).astype(object)
    result = (value >> start) & ((1 << length.astype(object)) - 1)
    if dtype.kind == "i":
        sign = (length > 0) & ((result >> np.maximum(length - 1, 0)) & 1 == 1)
        result = result - np.where(sign, 1 << length.astype(object), 0)
    block.write(to, result.astype(dtype), mask)


@operation("bfi")
def _insert_bits(block: Block, instruction: Instruction, mask: Mask) -> None:
    dtype = _type(instruction)
    to, a, b, c, d = instruction.operands
    bits = dtype.itemsize * 8
    start, length = (block.read(each, np.uint32).astype(np.int64) & 255 for each in (c, d))
    ones = (1 << np.minimum(length, bits).astype(object)) - 1
    field = (ones << start.astype(object)) & ((1 << bits) - 1)
    inserted = (block.read(a, dtype).astype(object) << start.astype(object)) & field
    result = (block.read(b, dtype).astype(object) & ~field) | inserted
    block.write(to, result.astype(dtype), mask)


@operation("popc", "clz", "brev", "bfind")
def _count_bits(block: Block, instruction: Instruction, mask: Mask) -> None:
    dtype = _type(instruction)
    bits = dtype.itemsize * 8
    to, a = instruction.operands
    texts = [format(int(each), f"0{bits}b") for each in block.read(a, _UNSIGNED[bits])]
    if instruction.name == "brev":
        block.write(to, np.array([int(each[::-1], 2) for each in texts], _UNSIGNED[bits]), mask)
        return
    if instruction.name == "bfind" and dtype.kind == "i":
        raise PtxError(instruction.opcode)
    counts = {
        "popc": [each.count("1") for each in texts],
        "clz": [len(each) - len(each.lstrip("0")) for each in texts],
        "bfind": [len(each.lstrip("0")) - 1 & 0xFFFFFFFF for each in texts],
    }
    block.write(to, np.array(counts[instruction.name], np.uint32), mask)


@operation("prmt")
def _permute_bytes(block: Block, instruction: Instruction, mask: Mask) -> None:
    if instruction.modifiers != ("b32",):
        raise PtxError(instruction.opcode)
    to, a, b, c = instruction.operands
    low, high, selector = (block.read(each, np.uint32) for each in (a, b, c))
    both = high.astype(np.uint64) << np.uint64(32) | low
    result = np.zeros(block.threads, np.uint64)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i)
        byte = both >> ((chosen & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        byte = np.where(chosen & np.uint32(8), sign, byte)
        result |= byte << np.uint64(8 * i)
    block.write(to, result.astype(np.uint32), mask)


@operation("lop3")
def _three_way_logic(block: Block, instruction: Instruction, mask: Mask) -> None:
    if instruction.modifiers != ("b32",):
        raise PtxError(instruction.opcode)
    to, *sources, table = instruction.operands
    a, b, c = (block.read(each, np.uint32) for each in sources)
    wanted = int(table.text, 0)
    result = np.zeros(block.threads, np.uint32)
    for row in range(8):
        if wanted >> row & 1:
            terms = (x if row >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0)))
            result |= np.bitwise_and.reduce(list(terms))
    block.write(to, result, mask)


# Moves, conversions, comparisons.


@operation("mov")
def _move(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    dtype = _type(instruction)
    if to.kind == "vector":
        bits = dtype.itemsize * 8 // len(to.parts)
        value = block.read(source, _UNSIGNED[dtype.itemsize * 8])
        for i, part in enumerate(to.parts):
            shifted = value >> np.array(i * bits, value.dtype)
            block.write(part, shifted.astype(_UNSIGNED[bits]), mask)
    elif source.kind == "vector":
        bits = dtype.itemsize * 8 // len(source.parts)
        whole = _UNSIGNED[dtype.itemsize * 8]
        result = np.zeros(block.threads, whole)
        for i, part in enumerate(source.parts):
            piece = block.read(part, _UNSIGNED[bits]).astype(whole)
            result |= piece << np.array(i * bits, whole)
        block.write(to, result, mask)
    else:
        block.write(to, block.read(source, dtype), mask)


@operation("cvta")
def _convert_address(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    base = {"shared": _SHARED_BASE, "local": _LOCAL_BASE}.get(space_of(instruction), 0)
    value = block.read(source, _type(instruction)).astype(np.int64)
    block.write(to, value - base if "to" in instruction.modifiers else value + base, mask)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("cvt")
def _convert(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, *sources = instruction.operands
    target, source = instruction.modifiers[-2:]
    if "relu" in instruction.modifiers:
        raise PtxError(instruction.opcode)
    if "sat" in instruction.modifiers:  # to [0, 1]; NaN becomes 0
        if target != source or target not in ("f32", "f64"):
            raise PtxError(instruction.opcode)
        value = np.nan_to_num(block.read(sources[0], dtype_of(source)), nan=0.0)
        block.write(to, np.clip(value, 0, 1), mask)
        return
    if target == "bf16x2":
        high, low = (float32_to_bf16(block.read(each, np.float32)) for each in sources)
        block.write(to, high.astype(np.uint32) << np.uint32(16) | low, mask)
    elif target == "bf16":
        block.write(to, float32_to_bf16(block.read(sources[0], np.float32)), mask)
    elif source == "bf16" and target == "f32":
        block.write(to, bf16_to_float32(block.read(sources[0], np.uint16)), mask)
    elif target == "tf32":
        bits = block.read(sources[0], np.uint32)
        finite = np.isfinite(bits.view(np.float32))
        rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        block.write(to, np.where(finite, rounded, bits), mask)
    else:
        value = block.read(sources[0], dtype_of(source))
        block.write(to, _converted(value, dtype_of(target), instruction), mask)


def _converted(value: Array, dtype: np.dtype[Any], instruction: Instruction) -> Array:
    """Between ordinary types; integers saturate where they come from floating-point numbers."""
    rounding = [_ROUND[each] for each in instruction.modifiers if each in _ROUND]
    if value.dtype.kind != "f":
        return value.astype(dtype)
    if dtype.kind == "f":
        return (rounding[0](value) if rounding else value).astype(dtype)
    limits = np.iinfo(dtype)
    rounded = np.nan_to_num(rounding[0](value.astype(np.float64)), nan=0.0)
    inside = np.clip(rounded, float(limits.min), float(limits.max))
    result = inside.astype(dtype)
    result = np.where(rounded >= float(limits.max), limits.max, result)
    return np.where(rounded <= float(limits.min), limits.min, result).astype(dtype)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ALIASES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


@operation("setp")
def _compare(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, a, b, *more = instruction.operands
    if "|" in to.text:
        raise PtxError(f"{instruction.opcode} {to.text}")
    dtype = _type(instruction)
    x, y = block.read(a, dtype), block.read(b, dtype)
    wanted = instruction.modifiers[0]
    nan = np.isnan(x) | np.isnan(y) if dtype.kind == "f" else np.zeros(block.threads, bool)
    if wanted in ("num", "nan"):
        value = nan if wanted == "nan" else ~nan
    else:
        unordered = dtype.kind == "f" and len(wanted) == 3
        name = wanted[:2] if unordered else _ALIASES.get(wanted, wanted)
        value = _COMPARE[name](x, y)
        value = value | nan if unordered else value & ~nan
    if more:
        value = _COMBINE[instruction.modifiers[1]](value, block.predicate(more[0].text))
    block.write(to, value, mask)


@operation("selp")
def _select(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, a, b, condition = instruction.operands
    dtype = _type(instruction)
    value = np.where(block.predicate(condition.text), block.read(a, dtype), block.read(b, dtype))
    block.write(to, value, mask)


# Memory.


@operation("ld", "ldu")
def _load(block: Block, instruction: Instruction, mask: Mask) -> None:
    targets = _parts(instruction.operands[0])
    source = instruction.operands[1]
    dtype = _type(instruction)
    size = dtype.itemsize * len(targets)
    space = space_of(instruction)
    if space == "param":
        index = block.addresses(source)[:, None] + np.arange(size)
        raw = block.parameters[np.where(mask[:, None], index, 0)]
    else:
        raw = block.load(space, Access(block.addresses(source), size, mask, instruction))
    for i, target in enumerate(targets):
        part = np.ascontiguousarray(raw[:, i * dtype.itemsize : (i + 1) * dtype.itemsize])
        block.write(target, part.view(dtype)[:, 0], mask)


@operation("st")
def _store(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    dtype = _type(instruction)
    values = [block.read(each, dtype) for each in _parts(source)]
    raw = np.stack(values, axis=1).view(np.uint8)
    access = Access(block.addresses(to), raw.shape[1], mask, instruction)
    block.store(space_of(instruction), access, raw)


_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "inc": lambda old, value: type(old)(0) if old >= value else old + type(old)(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - type(old)(1),
}


@operation("atom", "red")
def _atomic(block: Block, instruction: Instruction, mask: Mask) -> None:
    operands = list(instruction.operands)
    to = operands.pop(0) if instruction.name == "atom" else None
    dtype = _type(instruction)
    values = [block.read(_parts(each)[0], dtype) for each in operands[1:]]
    what = next(each for each in instruction.modifiers if each in (*_ATOMIC, "cas"))
    access = Access(block.addresses(operands[0]), dtype.itemsize, mask, instruction, atomic=True)
    old = np.zeros(block.threads, dtype)

    def change(data: Bytes, begin: int, part: Access) -> None:
        for thread in np.nonzero(part.mask)[0]:  # one after another: several may share a place
            start = int(part.address[thread]) - begin
            place = data[start : start + dtype.itemsize].view(dtype)
            before = old[thread] = place[0]
            if what != "cas":
                place[0] = _ATOMIC[what](before, values[0][thread])
            elif before == values[0][thread]:
                place[0] = values[1][thread]

    space = space_of(instruction)
    parts = block._by_space(access) if space == "generic" else [(space, access)]
    for named, part in parts:
        part.atomic = True
        if named == "shared":
            change(block.shared.data, 0, block.shared.mark_atomic(part))
        else:
            for region, inside in block.memory.atomic_parts(part):
                change(region.data, region.begin, inside)
    if to is not None:
        block.write(_parts(to)[0], old, mask)


@operation("membar", "fence", "discard", "prefetch", "nanosleep", "applypriority")
def _nothing(block: Block, instruction: Instruction, mask: Mask) -> None:
    """Orders, or makes faster, what happens in order here anyhow."""


# Copies in the background.


@operation("cp")
def _copy(block: Block, instruction: Instruction, mask: Mask) -> None:
    kind = instruction.modifiers[1] if instruction.modifiers[0] == "async" else ""
    if kind == "commit_group":
        block.group[mask] += 1
    elif kind == "wait_group":
        _wait(block, mask, int(instruction.operands[0].text, 0))
    elif kind == "wait_all":
        block.group[mask] += 1
        _wait(block, mask, 0)
    elif kind in ("ca", "cg"):
        _issue(block, instruction, mask)
    else:
        raise PtxError(instruction.opcode)


def _issue(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, source, bytes_, *taken = instruction.operands
    size = int(bytes_.text, 0)
    count = block.read(taken[0], np.uint32) if taken else np.full(block.threads, size, np.uint32)
    if (mask & (count != 0) & (count != size)).any():
        raise PtxError(f"{instruction.opcode} of a part of its bytes")
    reading = mask & (count != 0)
    from_there = Access(block.addresses(source), size, reading, instruction)
    data = block.memory.load(from_there)
    into = Access(block.addresses(to), size, mask.copy(), instruction)
    block.shared.store(into, np.full_like(data, 0xFF), awaited=True)
    block.copies.append(Copy(into, data, block.group.copy()))


def _wait(block: Block, mask: Mask, left: int) -> None:
    for copy in block.copies:
        landing = copy.access.mask & mask & (copy.group < block.group - left)
        if landing.any():
            part = Access(copy.access.address, copy.access.size, landing, copy.access.instruction)
            block.shared.land(part, copy.data)
            copy.access.mask = copy.access.mask & ~landing
    block.copies = [copy for copy in block.copies if copy.access.mask.any()]


# Warps.


def _warps(block: Block, value: Array) -> Array:
    """[warps, 32] of a value per thread, zeros for lanes that are not there."""
    missing = -block.threads % 32
    return np.pad(value, (0, missing)).reshape(-1, 32)


def _check_members(block: Block, instruction: Instruction, mask: Mask, members: Array) -> None:
    own = members.astype(np.int64) >> block.lane & 1
    if (mask & (own == 0)).any():
        block.reports.note("a lane is not in its own mask", instruction)
    active = (_warps(block, mask).astype(np.int64) << np.arange(32)).sum(1)
    exists = (_warps(block, np.ones_like(mask)).astype(np.int64) << np.arange(32)).sum(1)
    wanted = members.astype(np.int64) & exists[np.arange(block.threads) // 32]
    if (mask & (wanted & ~active[np.arange(block.threads) // 32] != 0)).any():
        block.reports.note("a lane of the mask does not take part", instruction)


@operation("shfl")
def _shuffle(block: Block, instruction: Instruction, mask: Mask) -> None:
    to, source, *rest = instruction.operands
    names = to.text.split("|")
    value = block.read(source, np.uint32)
    by, clamp, members = (block.read(each, np.uint32).astype(np.int64) for each in rest)
    _check_members(block, instruction, mask, members)
    lane, by = block.lane, by & 31
    segment, limit = clamp >> 8 & 31, clamp & 31
    low, high = lane & segment, lane & segment | limit & ~segment & 31
    mode = next(each for each in instruction.modifiers if each in ("up", "down", "bfly", "idx"))
    wanted = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | by & ~segment}
    chosen = wanted[mode]
    inside = chosen >= high if mode == "up" else chosen <= high
    if mode == "up":  # the limit is the first lane of the segment
        inside = chosen >= (lane & segment | limit & ~segment & 31)
    chosen = np.where(inside, chosen, lane)
    from_thread = np.arange(block.threads) // 32 * 32 + chosen
    known = from_thread < block.threads
    from_thread = np.where(known, from_thread, np.arange(block.threads))
    if (mask & (~known | ~mask[from_thread] | (members >> chosen & 1 == 0))).any():
        block.reports.note("shuffle from a lane that does not take part", instruction)
    block.write(Operand("register", names[0]), value[from_thread], mask)
    if len(names) > 1:
        block.write(Operand("register", names[1]), inside, mask)


@operation("vote", "match", "redux", "activemask", "bar", "barrier", "elect")
def _collective(block: Block, instruction: Instruction, mask: Mask) -> None:
    if instruction.name in ("bar", "barrier"):  # bar.warp.sync
        members = block.read(instruction.operands[0], np.uint32)
        _check_members(block, instruction, mask, members)
        block.clock.sync_warps(mask)
        return
    if instruction.name not in ("vote", "match", "redux") or "sync" not in instruction.modifiers:
        raise PtxError(instruction.opcode)
    to, source, members_operand = instruction.operands
    members = block.read(members_operand, np.uint32).astype(np.int64)
    _check_members(block, instruction, mask, members)
    result = np.zeros(block.threads, np.uint32)
    is_vote = instruction.name == "vote"
    value = block.predicate(source.text) if is_vote else block.read(source, _type(instruction))
    for thread in map(int, np.nonzero(mask)[0]):
        first = thread // 32 * 32
        peers = [
            first + lane
            for lane in range(min(32, block.threads - first))
            if members[thread] >> lane & 1
        ]
        result[thread] = _COLLECTIVE[instruction.name](instruction, value, thread, peers)
    is_predicate = is_vote and "ballot" not in instruction.modifiers
    block.write(to, result.astype(bool) if is_predicate else result, mask)


def _vote(instruction: Instruction, value: Array, thread: int, peers: list[int]) -> int:
    if "ballot" in instruction.modifiers:
        return sum(1 << peer % 32 for peer in peers if value[peer])
    if "any" in instruction.modifiers:
        return int(any(value[peers]))
    if "all" in instruction.modifiers:
        return int(all(value[peers]))
    raise PtxError(instruction.opcode)


def _match(instruction: Instruction, value: Array, thread: int, peers: list[int]) -> int:
    if "any" not in instruction.modifiers:
        raise PtxError(instruction.opcode)
    return sum(1 << peer % 32 for peer in peers if value[peer] == value[thread])


def _redux(instruction: Instruction, value: Array, thread: int, peers: list[int]) -> int:
    name = next(each for each in instruction.modifiers if each in _ATOMIC)
    total = value[peers[0]]
    for peer in peers[1:]:
        total = _ATOMIC[name](total, value[peer])
    return int(total) & 0xFFFFFFFF


_COLLECTIVE = {"vote": _vote, "match": _match, "redux": _redux}


# Tensor cores. A lane is 4 * its group + its place, as in the PTX manual's tables.
_LANES = np.arange(32)
_GROUP, _PLACE = _LANES // 4, _LANES % 4


def _whole_warps(block: Block, instruction: Instruction, mask: Mask) -> None:
    if (_warps(block, mask).any(1) != _warps(block, mask).all(1)).any():
        block.reports.note("warp instruction with lanes that do not take part", instruction)


@operation("ldmatrix")
def _load_matrices(block: Block, instruction: Instruction, mask: Mask) -> None:
    _whole_warps(block, instruction, mask)
    targets = _parts(instruction.operands[0])
    addresses = block.addresses(instruction.operands[1])
    naming = mask & (block.lane < 8 * len(targets))
    # A lane's address names a row; the elements are read by the lanes that get them.
    access = Access(addresses, 16, naming, instruction)
    rows = block.load("shared", access).view(np.uint16).reshape(-1, 32, 8)
    for i, target in enumerate(targets):
        matrix = rows[:, 8 * i : 8 * i + 8, :]
        if "trans" in instruction.modifiers:
            low, high = matrix[:, 2 * _PLACE, _GROUP], matrix[:, 2 * _PLACE + 1, _GROUP]
        else:
            low, high = matrix[:, _GROUP, 2 * _PLACE], matrix[:, _GROUP, 2 * _PLACE + 1]
        block.write(target, (low.astype(np.uint32) | high.astype(np.uint32) << 16).ravel(), mask)


@operation("mma")
def _multiply_matrices(block: Block, instruction: Instruction, mask: Mask) -> None:
    _whole_warps(block, instruction, mask)
    shape = next(each for each in instruction.modifiers if each.startswith("m16n8"))
    kind = (shape, *instruction.modifiers[-4:])
    to, a_parts, b_parts, c_parts = (_parts(each) for each in instruction.operands)
    warps = block.threads // 32

    def registers(parts: tuple[Operand, ...], dtype: Any) -> list[Array]:
        return [block.read(each, dtype).reshape(warps, 32) for each in parts]

    a_bits, b_bits = registers(a_parts, np.uint32), registers(b_parts, np.uint32)
    if kind in (
        ("m16n8k16", "f32", "bf16", "bf16", "f32"),
        ("m16n8k16", "f32", "f16", "f16", "f32"),
    ):
        a, b = _halves(a_bits, b_bits, bf16="bf16" in kind)
    elif kind == ("m16n8k8", "f32", "tf32", "tf32", "f32"):
        a, b = _tf32(a_bits, b_bits)
    else:
        raise PtxError(instruction.opcode)
    total = np.zeros((warps, 16, 8))
    for i, each in enumerate(registers(c_parts, np.float32)):
        total[:, _GROUP + 8 * (i // 2), 2 * _PLACE + i % 2] = each
    total = (total + a @ b).astype(np.float32)
    for i, target in enumerate(to):
        part = total[:, _GROUP + 8 * (i // 2), 2 * _PLACE + i % 2]
        block.write(target, np.ascontiguousarray(part).ravel(), mask)


def _halves(a_bits: list[Array], b_bits: list[Array], bf16: bool) -> tuple[Array, Array]:
    """The matrices [warps, 16, 16] and [warps, 16, 8] of two 16-bit numbers a register."""

    def numbers(bits: Array) -> Array:
        half = bits.astype(np.uint16)
        return bf16_to_float32(half) if bf16 else half.view(np.float16).astype(np.float32)

    a, b = np.zeros((len(a_bits[0]), 16, 16)), np.zeros((len(a_bits[0]), 16, 8))
    for i, bits in enumerate(a_bits):
        row, column = _GROUP + 8 * (i % 2), 2 * _PLACE + 8 * (i // 2)
        a[:, row, column] = numbers(bits & np.uint32(0xFFFF))
        a[:, row, column + 1] = numbers(bits >> np.uint32(16))
    for i, bits in enumerate(b_bits):
        row = 2 * _PLACE + 8 * i
        b[:, row, _GROUP] = numbers(bits & np.uint32(0xFFFF))
        b[:, row + 1, _GROUP] = numbers(bits >> np.uint32(16))
    return a, b


def _tf32(a_bits: list[Array], b_bits: list[Array]) -> tuple[Array, Array]:
    """The matrices [warps, 16, 8] and [warps, 8, 8]; of a register the upper 19 bits are read."""
    a, b = np.zeros((len(a_bits[0]), 16, 8)), np.zeros((len(a_bits[0]), 8, 8))
    for i, bits in enumerate(a_bits):
        number_ = (bits & np.uint32(0xFFFFE000)).view(np.float32)
        a[:, _GROUP + 8 * (i % 2), _PLACE + 4 * (i // 2)] = number_
    for i, bits in enumerate(b_bits):
        b[:, _PLACE + 4 * i, _GROUP] = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return a, b


def launch(
    program: Program,
    grid: Sequence[int],
    block: Sequence[int],
    parameters: bytes,
    dynamic_shared: int,
    spans: Sequence[tuple[int, int, bool]],
) -> Reports:
    """Runs a kernel on memory of this process.

    Args:
        program: the kernel.
        grid: blocks per dimension, three numbers.
        block: threads per dimension, three numbers.
        parameters: all of them, at their offsets.
        dynamic_shared: bytes of dynamic shared memory.
        spans: the global memory that the kernel may use: address, bytes, whether it may write.

    Returns:
        What was found to be wrong.

    Raises:
        PtxError: an instruction is not known, or threads wait for each other for ever.
    """
    if len(parameters) < program.parameter_bytes:
        raise PtxError(f"{len(parameters)} bytes of parameters, not {program.parameter_bytes}")
    reports = Reports()
    memory = GlobalMemory(spans, reports)
    values = np.frombuffer(parameters, np.uint8)
    for number_ in range(grid[0] * grid[1] * grid[2]):
        index = (number_ % grid[0], number_ // grid[0] % grid[1], number_ // (grid[0] * grid[1]))
        memory.block = number_
        Block(program, grid, block, index, values, dynamic_shared, memory, reports).run()
    return reports
