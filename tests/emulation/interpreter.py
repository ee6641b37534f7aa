"""Triton's interpreter, made to see what it overlooks.

As it comes it reads and writes any address, runs one program after another so that races go
unseen, multiplies the bit patterns of bfloat16 numbers, knows no tf32, and lets int32 wrap. Inside
:func:`guarded` each access has to lie in a tensor of the launch, programs must not touch what
others write, matrix products round as a GPU's do, and an overflowing index is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from fastfisher.triton import launch as launching

# Tensors that span more elements than this have their accesses noted one by one.
_DENSE_ELEMENTS = 1 << 22
_NOBODY = -1
_MANY = -2


class _Notes:
    """Which program was the last one to do something to each element; only few were touched."""

    def __init__(self) -> None:
        self._programs: dict[int, int] = {}

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self._programs.get(i, _NOBODY) for i in index.tolist()], np.int64)

    def __setitem__(self, index: NDArray[np.int64], values: NDArray[np.int64] | int) -> None:
        many = np.broadcast_to(values, index.shape).tolist()
        self._programs.update(zip(index.tolist(), many, strict=True))


def _notes(elements: int) -> Any:
    return _Notes() if elements > _DENSE_ELEMENTS else np.full(elements, _NOBODY, np.int64)


class _Memory:
    """A tensor of the launch: where it lies, and which programs read and wrote its elements."""

    def __init__(self, tensor: Tensor) -> None:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in sizes) if tensor.numel() else 0
        self.itemsize = tensor.element_size()
        self.first = tensor.data_ptr()
        self.last = self.first + elements * self.itemsize
        self.written_by, self.read_by = _notes(elements), _notes(elements)
        self.added_by = _notes(elements)  # atomically

    def note(self, addresses: NDArray[np.uint64], program: int, kind: str) -> None:
        """Notes accesses of a program, and reports those that others' forbid."""
        index = (addresses - np.uint64(self.first)).astype(np.int64) // self.itemsize
        others: list[tuple[str, Any]] = [("written", self.written_by)]
        if kind != "atomic":
            others.append(("added to", self.added_by))
        if kind != "load":
            others.append(("read", self.read_by))
        for what, notes in others:
            by = notes[index]
            wrong = (by != _NOBODY) & (by != program)
            if wrong.any():
                raise RuntimeError(
                    f"race: {kind} of element {int(index[wrong][0])}, {what} by another program"
                )
        if kind == "store":
            self.written_by[index] = program
            return
        notes = self.read_by if kind == "load" else self.added_by
        by = notes[index]
        notes[index] = np.where((by == _NOBODY) | (by == program), program, _MANY)


class _Guard:
    """The tensors of the launch that is under way."""

    def __init__(self, checks: bool) -> None:
        self.checks = checks
        self.memories: list[_Memory] = []
        self._reached: Sequence[Tensor] = ()
        self._programs: dict[tuple[int, ...], int] = {}

    def announce(self, launch: launching.Launch) -> None:
        """Learns of a launch before it begins."""
        self._reached = launch.reached

    def begin(self, arguments: Any) -> None:
        tensors = {
            (each.data_ptr(), tuple(each.shape), each.stride()): each
            for each in (*arguments, *self._reached)
            if isinstance(each, Tensor)
        }
        self.memories = [_Memory(each) for each in tensors.values()]
        self._programs.clear()

    def access(self, builder: Any, pointers: Any, mask: Any, kind: str) -> None:
        """Checks an access of all lanes that the mask lets through."""
        if not self.checks:
            return
        addresses = pointers.data.astype(np.uint64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.ravel()
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        program = self._programs.setdefault(tuple(builder.grid_idx), len(self._programs))
        outside = np.ones(addresses.shape, bool)
        for memory in self.memories:
            inside = addresses >= np.uint64(memory.first)
            inside &= addresses + size <= np.uint64(memory.last)
            if inside.any():
                memory.note(addresses[inside], program, kind)
                outside &= ~inside
        if outside.any():
            raise IndexError(
                f"{kind} out of bounds by {int(outside.sum())} lanes of program {builder.grid_idx}"
            )
        if kind == "store" and len(np.unique(addresses)) != len(addresses):
            raise RuntimeError(f"race: lanes of program {builder.grid_idx} store to one element")


def _float32(handle: Any) -> NDArray[np.float32]:
    """The numbers of a handle of bfloat16 bits."""
    bits: NDArray[np.uint32] = handle.data.astype(np.uint32) << 16
    return bits.view(np.float32)


def _bfloat16(values: NDArray[np.float32]) -> Any:
    """The nearest bfloat16 numbers, ties to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits.reshape(values.shape), tl.bfloat16)


def _is(handle: Any, dtype: tl.dtype) -> bool:
    return bool(handle.dtype.scalar == dtype)


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        def operand(handle: Any) -> Any:
            if _is(handle, tl.bfloat16):
                return interpreter.TensorHandle(_float32(handle), tl.float32)
            if _is(handle, tl.float32) and precision == ir.INPUT_PRECISION.TF32:
                # Triton hands float32 to the tensor cores as it is; they do not read the last bits.
                bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
                return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
            return handle

        return original(self, operand(a), operand(b), d, precision, imprecise)

    return dot


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, to: Any, *rest: Any) -> Any:
        if _is(source, tl.bfloat16) and to.scalar == tl.float32:
            return interpreter.TensorHandle(_float32(source), tl.float32)
        if _is(source, tl.bfloat16) and to.scalar == tl.float64:
            return interpreter.TensorHandle(_float32(source).astype(np.float64), tl.float64)
        if _is(source, tl.float32) and to.scalar == tl.bfloat16:
            return _bfloat16(source.data)
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            raise NotImplementedError(f"a cast from {source.dtype.scalar} to {to.scalar}")
        return original(self, source, to, *rest)

    return cast


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if _is(left, tl.bfloat16):
            raise NotImplementedError("bfloat16 arithmetic: the kernel has to convert to float32")
        return original(self, left, right, operation)

    return binary


def _accesses(guard: _Guard, name: str, kind: str, pointer: int, mask: int | None) -> Any:
    original = getattr(interpreter.InterpreterBuilder, name)

    @functools.wraps(original)
    def access(self: Any, *args: Any) -> Any:
        lanes = None if mask is None else args[mask]
        guard.access(self, args[pointer], lanes, kind)
        return original(self, *args)

    return access


class Interpreted:
    """The operators of ``torch.ops.fastfisher_triton``, as an object that has them as attributes.

    What they allocate is NaN until it is written, and an error in a kernel is raised as it was,
    not as the interpreter's report of it.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.fastfisher_triton, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)
            try:
                return operator(*args, **kwargs)
            except InterpreterError as error:
                cause: BaseException = error
                while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                    cause = cause.__cause__
                raise cause from error
            finally:
                torch.use_deterministic_algorithms(before)

        return call


@contextmanager
def guarded(checks: bool = True) -> Iterator[None]:
    """Guards every launch in the block.

    Args:
        checks: whether accesses and overflow are checked; numbers are a GPU's in any case.
    """
    guard = _Guard(checks)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

    def begin(_: Any, args: Any, kwargs: Any) -> Any:
        # Tensors on the CPU need no copy, which would take as much memory as their strides span.
        guard.begin([*args, *kwargs.values()])
        return list(args), dict(kwargs)

    patches: dict[tuple[Any, str], Any] = {
        (builder, "create_masked_load"): _accesses(guard, "create_masked_load", "load", 0, 1),
        (builder, "create_masked_store"): _accesses(guard, "create_masked_store", "store", 0, 2),
        (builder, "create_atomic_rmw"): _accesses(guard, "create_atomic_rmw", "atomic", 1, 3),
        (builder, "create_atomic_cas"): _accesses(guard, "create_atomic_cas", "atomic", 0, None),
        (builder, "create_dot"): _dot(builder.create_dot),
        (builder, "cast_impl"): _cast(builder.cast_impl),
        (builder, "create_fp_to_fp"): _cast(builder.create_fp_to_fp),
        (builder, "binary_op"): _binary(builder.binary_op),
        (executor, "_init_args_hst"): begin,
        (executor, "_restore_args_dev"): lambda *_: None,
        # Asserts of overflow are only made under this option.
        (interpreter.interpreter_builder, "options"): interpreter.InterpreterOptions(debug=checks),
    }
    stack = [mock.patch.object(owner, name, new) for (owner, name), new in patches.items()]
    for patch in stack:
        patch.start()
    launching._recorders.append(guard.announce)
    try:
        yield
    finally:
        launching._recorders.remove(guard.announce)
        for patch in reversed(stack):
            patch.stop()
