"""The memories of a simulated device, and what is checked of every access.

Times count barriers: what was accessed before the last barrier is done, whoever did it, and so is
what lanes of a warp accessed before they synchronized.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# Several threads read a byte since the last barrier: lanes of one warp, or not.
_ONE, _WARP, _BLOCK = 0, 1, 2
# Regions beyond this are not watched for races between blocks, which takes 12 bytes a byte.
_WATCHED_BYTES = 1 << 26


class Reports(Counter[tuple[str, str, int]]):
    """What was found, in which instruction, at which line, and how often."""

    def note(self, what: str, instruction: Any) -> None:
        """Counts one finding."""
        self[what, instruction.opcode, instruction.line] += 1

    def __str__(self) -> str:
        return "\n".join(
            f"{what}: {opcode}, line {line} ({count} times)"
            for (what, opcode, line), count in self.items()
        )


@dataclass(slots=True)
class Access:
    """One instruction's accesses of a block's threads.

    Attributes:
        address: int64 [threads], of the first byte.
        size: bytes of each.
        mask: which threads.
        instruction: for reports.
        atomic: whether it is.
    """

    address: Ints
    size: int
    mask: Mask
    instruction: Any
    atomic: bool = False

    def bytes_of(self, begin: int) -> Ints:
        """Int64 [active threads, size], the indices of all bytes from ``begin`` on."""
        return (self.address[self.mask] - begin)[:, None] + np.arange(self.size)


def wavefronts(access: Access) -> list[int]:
    """Cycles that shared memory takes to serve each warp of a load in which all lanes take part.

    It returns a register a lane and cycle, so 16 bytes a lane take four; two, where all
    neighbouring lanes, or all lanes two apart, read the same (NVIDIA's developer forum, topic
    77228). Of what a cycle serves, each bank can give one word: others wait.

    Args:
        access: aligned, of 4, 8 or 16 bytes a thread; whole warps.
    """
    words = access.size // 4
    found = []
    for warp in access.address.reshape(-1, 32):
        paired = any(np.array_equal(warp, warp[np.arange(32) ^ distance]) for distance in (1, 2))
        pieces = warp.reshape(2 if words == 4 and paired else words, -1, 1)
        asked = (np.unique(piece // 4 + np.arange(words)) for piece in pieces)
        found.append(sum(int(np.bincount(word % 32).max()) for word in asked))
    return found


class Clock:
    """What orders the threads of the block that runs."""

    def __init__(self, threads: int) -> None:
        self.now = 1
        self.barrier = 1
        self.thread: Ints = np.arange(threads, dtype=np.int64)
        self.warp_synced = np.ones(-(-threads // 32), np.int64)

    def pass_barrier(self) -> None:
        """All threads have met."""
        self.now += 1
        self.barrier = self.now

    def sync_warps(self, mask: Mask) -> None:
        """The warps that are complete in the mask have met."""
        self.now += 1
        lanes = np.zeros(len(self.warp_synced) * 32, bool)
        lanes[len(mask) :] = True
        lanes[: len(mask)] = mask
        self.warp_synced[lanes.reshape(-1, 32).all(1)] = self.now


class SharedMemory:
    """A block's shared memory.

    Args:
        size: bytes.
        clock: of the block.
        reports: where findings go.
    """

    def __init__(self, size: int, clock: Clock, reports: Reports) -> None:
        self.data: Bytes = np.full(size, 0xFF, np.uint8)
        self._clock, self._reports = clock, reports
        self._write_time, self._read_time = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._writer, self._reader = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._read_scope = np.zeros(size, np.int8)
        self._write_atomic = np.zeros(size, bool)
        self._awaited = np.zeros(size, bool)

    def inside(self, access: Access) -> Access:
        """The part of an access that is in bounds and aligned; the rest is reported."""
        return _inside(access, 0, len(self.data), "shared memory", self._reports)

    def load(self, access: Access) -> Bytes:
        """Uint8 [threads, size]; zeros where a thread does not take part."""
        access = self.inside(access)
        out = np.zeros((len(access.mask), access.size), np.uint8)
        index = access.bytes_of(0)
        if (self._write_time[index] == 0).any():
            self._reports.note("read of uninitialised shared memory", access.instruction)
        self._check_awaited(access, index)
        me = self._clock.thread[access.mask][:, None]
        if not self._ordered(self._write_time, self._writer, _ONE, index, me).all():
            self._reports.note("race in shared memory, at a read", access.instruction)
        old_time, old_reader = self._read_time[index], self._reader[index]
        since = old_time >= self._clock.barrier
        scope = np.where(since, self._read_scope[index], _ONE)
        scope = np.where(since & (old_reader != me), np.maximum(scope, _WARP), scope)
        scope = np.where(since & (old_reader // 32 != me // 32), _BLOCK, scope)
        self._read_scope[index] = scope
        self._several_readers(access, index)
        self._read_time[index] = self._clock.now
        self._reader[index] = np.broadcast_to(me, index.shape)
        out[access.mask] = self.data[index]
        return out

    def _several_readers(self, access: Access, index: Ints) -> None:
        """Threads that read the same byte in this very instruction."""
        thread = np.broadcast_to(self._clock.thread[access.mask][:, None], index.shape)
        first = np.full(len(self.data), np.iinfo(np.int64).max)
        last = np.full(len(self.data), -1)
        np.minimum.at(first, index, thread)
        np.maximum.at(last, index, thread)
        several = last[index] > first[index]
        one_warp = last[index] // 32 == first[index] // 32
        wider = np.where(several, np.where(one_warp, _WARP, _BLOCK), _ONE)
        self._read_scope[index] = np.maximum(self._read_scope[index], wider)

    def store(self, access: Access, data: Bytes, *, awaited: bool = False) -> None:
        """Writes uint8 [threads, size]; ``awaited`` until the copy that fills it is waited for."""
        access = self.inside(access)
        index = access.bytes_of(0)
        self._check_awaited(access, index)
        self._check_write(access, index)
        self._awaited[index] = awaited
        self.data[index] = data[access.mask]
        _check_agreement(self.data[index], data[access.mask], access, self._reports)

    def land(self, access: Access, data: Bytes) -> None:
        """A copy in the background arrives."""
        access = self.inside(access)
        self._awaited[access.bytes_of(0)] = False
        self.store(access, data)

    def mark_atomic(self, access: Access) -> Access:
        """Checks an atomic operation, which the caller does; returns what of it is in bounds."""
        access = self.inside(access)
        index = access.bytes_of(0)
        if (self._write_time[index] == 0).any():
            self._reports.note("read of uninitialised shared memory", access.instruction)
        self._check_awaited(access, index)
        self._check_write(access, index)
        return access

    def _check_awaited(self, access: Access, index: Ints) -> None:
        if self._awaited[index].any():
            self._reports.note("access to what a copy has yet to fill", access.instruction)

    def _check_write(self, access: Access, index: Ints) -> None:
        me = self._clock.thread[access.mask][:, None]
        after_writes = self._ordered(self._write_time, self._writer, _ONE, index, me)
        if access.atomic:
            after_writes |= self._write_atomic[index]
        scope = self._read_scope[index]
        after_reads = self._ordered(self._read_time, self._reader, scope, index, me)
        if not (after_writes & after_reads).all():
            self._reports.note("race in shared memory, at a write", access.instruction)
        self._write_time[index] = self._clock.now
        self._writer[index] = np.broadcast_to(me, index.shape)
        self._write_atomic[index] = access.atomic

    def _ordered(self, times: Ints, threads: Ints, scope: Any, index: Ints, me: Ints) -> Mask:
        time, thread = times[index], threads[index]
        synced = self._clock.warp_synced[me // 32]
        same_warp = (thread // 32 == me // 32) & (scope != _BLOCK) & (time < synced)
        ordered = (time < self._clock.barrier) | ((thread == me) & (scope == _ONE)) | same_warp
        return np.asarray(ordered)


@dataclass(slots=True)
class Region:
    """A piece of global memory, at its address in this process.

    Attributes:
        begin: address.
        data: the memory itself.
        writable: whether kernels may write it.
        touched: int32 [3, bytes], the block that last wrote, read or changed a byte atomically,
            plus one; none where the region is too large to be watched.
    """

    begin: int
    data: Bytes
    writable: bool
    touched: NDArray[np.int32] | None = None


class GlobalMemory:
    """What kernels may use of this process's memory.

    Args:
        spans: address, bytes, whether it may be written; none overlaps another.
        reports: where findings go.
    """

    def __init__(self, spans: Sequence[tuple[int, int, bool]], reports: Reports) -> None:
        self._reports = reports
        self._regions = [
            Region(begin, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin)), write)
            for begin, size, write in sorted(spans)
        ]
        for region in self._regions:
            if len(region.data) <= _WATCHED_BYTES:
                region.touched = np.zeros((3, len(region.data)), np.int32)
        self._begins = np.array([each.begin for each in self._regions], np.int64)
        self.block = 0

    def _parts(self, access: Access) -> list[tuple[Region, Access]]:
        """An access, region by region; what is in none is reported."""
        found = np.searchsorted(self._begins, access.address, side="right") - 1
        wild = access.mask & (found < 0)
        if wild.any():
            self._reports.note("access to no tensor or workspace", access.instruction)
        parts = []
        for number in np.unique(found[access.mask & ~wild]):
            region = self._regions[number]
            part = Access(
                access.address,
                access.size,
                access.mask & (found == number),
                access.instruction,
                access.atomic,
            )
            part = _inside(part, region.begin, len(region.data), "global memory", self._reports)
            parts.append((region, part))
        return parts

    def load(self, access: Access) -> Bytes:
        """Uint8 [threads, size]; zeros where a thread does not take part or is out of bounds."""
        out = np.zeros((len(access.mask), access.size), np.uint8)
        for region, part in self._parts(access):
            index = part.bytes_of(region.begin)
            out[part.mask] = region.data[index]
            self._watch(region, part, index, 1)
        return out

    def store(self, access: Access, data: Bytes) -> None:
        """Writes uint8 [threads, size] where it is allowed."""
        for region, part in self._writable(access):
            index = part.bytes_of(region.begin)
            region.data[index] = data[part.mask]
            _check_agreement(region.data[index], data[part.mask], part, self._reports)
            self._watch(region, part, index, 0)

    def atomic_parts(self, access: Access) -> list[tuple[Region, Access]]:
        """The regions that an atomic operation of the caller's may change."""
        parts = self._writable(access)
        for region, part in parts:
            self._watch(region, part, part.bytes_of(region.begin), 2)
        return parts

    def _writable(self, access: Access) -> list[tuple[Region, Access]]:
        parts = self._parts(access)
        if any(not region.writable and part.mask.any() for region, part in parts):
            self._reports.note("write to a tensor that is only read", access.instruction)
        return [(region, part) for region, part in parts if region.writable]

    def _watch(self, region: Region, part: Access, index: Ints, kind: int) -> None:
        """Races between blocks: nothing orders them but atomic operations among themselves."""
        if region.touched is None:
            return
        me = self.block + 1
        for other in {0: (0, 1, 2), 1: (0, 2), 2: (0, 1)}[kind]:
            by = region.touched[other][index]
            if ((by != 0) & (by != me)).any():
                self._reports.note("race between blocks", part.instruction)
        region.touched[kind][index] = me


def _check_agreement(found: Bytes, written: Bytes, access: Access, reports: Reports) -> None:
    """Threads may write one address in one instruction if it is the same that they write."""
    if not np.array_equal(found, written):
        reports.note("several threads write one address", access.instruction)


def _inside(access: Access, begin: int, size: int, where: str, reports: Reports) -> Access:
    address = access.address
    beyond = access.mask & ((address < begin) | (address + access.size > begin + size))
    if beyond.any():
        reports.note(f"out of bounds of {where}", access.instruction)
    crooked = access.mask & (address % access.size != 0)
    if crooked.any():
        reports.note(f"misaligned access to {where}", access.instruction)
    if not beyond.any():
        return access
    mask = access.mask & ~beyond
    return Access(address, access.size, mask, access.instruction, access.atomic)
