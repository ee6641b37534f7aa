"""The emulators see each kind of mistake that they are there for, and none in a correct kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .emulation.build import (
    ORDERS,
    ROOT,
    Order,
    emulated,
    load,
    sanitizer_environment,
    scheduling,
)
from .emulation.checked import CheckedOperators, CheckError
from .emulation.checked import checked as build_checked
from .emulation.ptx import CompilerMissing, ReplayedOperators, replayed
from .emulation.ptx_program import PtxError, entry_names, parse
from .emulation.ptxsim import launch

SELFTEST = ROOT / "tests" / "emulation" / "selftest"
SCHEMAS = ("sums(Tensor(a!) out, Tensor input, int bug) -> ()",)
# The names of the header's enum, in its order.
BUGS = re.findall(r"^  (k\w+),$", (SELFTEST / "cuda" / "selftest.h").read_text(), re.MULTILINE)

ROWS, COLUMNS = 13, 44
VALUES = 17


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(ROWS * COLUMNS, dtype=torch.float32).remainder(VALUES).reshape(ROWS, COLUMNS)
    return torch.zeros(COLUMNS + 1 + VALUES), x


def sums(operators: Any, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give, and what they should: sums and counts of small integers, exact."""
    out, x = inputs()
    operators.sums(out, x, BUGS.index(bug))
    counts = x.flatten().int().bincount(minlength=VALUES)
    return out, torch.cat([x.sum(0), x.sum().reshape(1), counts])


@pytest.fixture(scope="module")
def plain() -> Any:
    load("plain", SELFTEST, "fastfisher_selftest", SCHEMAS)
    return torch.ops.fastfisher_selftest


@pytest.fixture(scope="module")
def checked() -> CheckedOperators:
    return build_checked(SELFTEST, "fastfisher_selftest_checked", SCHEMAS)


@pytest.fixture(scope="module")
def compiled() -> ReplayedOperators:
    try:
        return replayed(SELFTEST, "fastfisher_selftest", SCHEMAS)
    except CompilerMissing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("order", ORDERS)
def test_a_correct_kernel_is_right_in_every_order(plain: Any, order: Order) -> None:
    library = load("plain", SELFTEST, "fastfisher_selftest", SCHEMAS)
    with scheduling(order, seed=3, library=library):
        out, exact = sums(plain, "kNone")
    assert torch.equal(out, exact)


@pytest.mark.parametrize("order", ORDERS)
def test_a_correct_kernel_has_no_reports(checked: CheckedOperators, order: Order) -> None:
    library = load("checked", SELFTEST, "fastfisher_selftest_checked", SCHEMAS)
    with scheduling(order, seed=3, library=library):
        out, exact = sums(checked, "kNone")
    assert torch.equal(out, exact)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("kDivergentBarrier", r"divergent __syncthreads\(\): line \d+ here, line \d+ elsewhere"),
        ("kExitBeforeBarrier", r"is reached by 48 of 128 threads \(the others have exited\)"),
        ("kShuffleMask", r"lane 31 is not in its own mask 0000ffff"),
        ("kWildPointer", r"invalid access to address 0x40"),
        ("kTooMuchShared", r"165888 bytes of dynamic shared memory where 163840 are allowed"),
        ("kUnasked", r"65536 bytes of dynamic shared memory where 49152 are allowed"),
    ],
)
def test_an_error_of_the_launch_says_what_and_where(plain: Any, bug: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as error:
        sums(plain, bug)
    assert re.search(
        r"cusim: [\w<>]+: block \(\d+,\d+,\d+\) thread \(\d+,\d+,\d+\)", str(error.value)
    )
    # The emulator is as good as new afterwards.
    out, exact = sums(plain, "kNone")
    assert torch.equal(out, exact)


@pytest.mark.parametrize("bug", ["kNoWait", "kUninitialisedShared", "kUninitialisedWorkspace"])
def test_memory_that_was_never_written_is_nan(plain: Any, bug: str) -> None:
    out, _ = sums(plain, bug)
    assert out.isnan().any()


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("kNoBarrier", "race in shared memory, at a read"),
        ("kNoSecondBarrier", "race in shared memory, at a write"),
        ("kNoWarpSync", "race in shared memory, at a"),
        ("kNoClearBarrier", "race in shared memory, at a"),
        ("kNoAtomicBarrier", "race in shared memory, at a"),
        ("kReadOutOfBounds", "out-of-bounds read"),
        ("kWriteOutOfBounds", "out-of-bounds write"),
        ("kBeyondDimension", "index beyond an array's dimension"),
        ("kUninitialisedShared", "read of uninitialised shared memory"),
        ("kUninitialisedWorkspace", "read of uninitialised workspace"),
        ("kBetweenBlocks", "race between blocks"),
        ("kMisaligned", "misaligned access"),
        ("kNoWait", "access to what a copy has yet to fill"),
        ("kWriteReadOnly", "write to a tensor that the operator only reads"),
        ("kOverflow", "signed overflow of a product"),
        ("kWildPointer", "out-of-bounds write"),
    ],
)
def test_a_report_says_what_and_where(checked: CheckedOperators, bug: str, report: str) -> None:
    with pytest.raises(CheckError, match=report) as error:
        sums(checked, bug)
    (line,) = re.findall(rf"{report}.*?selftest\.cu:(\d+)", str(error.value))[:1]
    assert 0 < int(line) <= len((SELFTEST / "cuda" / "selftest.cu").read_text().splitlines())
    out, exact = sums(checked, "kNone")
    assert torch.equal(out, exact)


@pytest.mark.parametrize("bug", ["kDivergentBarrier", "kExitBeforeBarrier", "kShuffleMask"])
def test_an_error_of_the_launch_passes_the_checker(checked: CheckedOperators, bug: str) -> None:
    with pytest.raises((RuntimeError, CheckError)):
        sums(checked, bug)


def test_compiled_code_is_right_and_has_no_reports(compiled: ReplayedOperators) -> None:
    compiled.launches.clear()
    out, exact = sums(compiled, "kNone")
    assert torch.equal(out, exact)
    assert [name.partition("::")[2].partition("(float")[0] for name in compiled.launches] == [
        "part_sums",
        "add_parts",
        "count_values",
    ]


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("kNoBarrier", "race in shared memory, at a"),
        ("kNoSecondBarrier", "race in shared memory, at a write"),
        ("kNoWarpSync", "race in shared memory, at a read"),
        ("kNoClearBarrier", "race in shared memory, at a"),
        ("kNoAtomicBarrier", "race in shared memory, at a"),
        ("kReadOutOfBounds", "out of bounds of global memory: cp.async"),
        ("kWriteOutOfBounds", "out of bounds of global memory: st.global"),
        ("kUninitialisedShared", "read of uninitialised shared memory"),
        ("kBetweenBlocks", "race between blocks"),
        ("kMisaligned", "misaligned access to global memory"),
        ("kShuffleMask", "a lane is not in its own mask: shfl"),
        ("kNoWait", "access to what a copy has yet to fill"),
        ("kWriteReadOnly", "write to a tensor that is only read"),
        ("kDivergentBarrier", "divergent barrier"),
        ("kExitBeforeBarrier", "barrier after some threads have exited"),
        ("kWildPointer", "access to no tensor or workspace"),
    ],
)
def test_compiled_code_with_a_bug_is_reported(
    compiled: ReplayedOperators, bug: str, report: str
) -> None:
    with pytest.raises(CheckError, match=report) as error:
        sums(compiled, bug)
    assert re.search(rf"{report}.*line [1-9]", str(error.value))


PTX = """
.visible .entry kernel(.param .u64 to, .param .align 4 .b8 pair[8])
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [to];
    ld.param.v2.u32 {%r1, %r2}, [pair];
    OPERATION %r3, %r1, %r2REST;
    st.global.u32 [%rd1], %r3;
    ret;
}
"""


@pytest.mark.parametrize(
    ("opcode", "rest", "a", "b", "exact"),
    [
        ("sub.s32", "", 3, 5, 0xFFFFFFFE),
        ("lop3.b32", ", 0f3F800000, 0xAA", 0, 0, 0x3F800000),
        ("div.s32", "", 0xFFFFFFF9, 2, 0xFFFFFFFD),
        ("rem.s32", "", 0xFFFFFFF9, 2, 0xFFFFFFFF),
        ("mul.hi.u32", "", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE),
        ("mul.hi.s32", "", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("shl.b32", "", 1, 32, 0),
        ("shr.s32", "", 0x80000000, 40, 0xFFFFFFFF),
        ("shf.l.wrap.b32", ", 8", 0x12345678, 0x9ABCDEF0, 0xBCDEF012),
        ("shf.r.wrap.b32", ", 8", 0x12345678, 0x9ABCDEF0, 0xF0123456),
        ("prmt.b32", ", 0x7531", 0x33221100, 0x77665544, 0x77553311),
        ("prmt.b32", ", 0x888B", 0x80221100, 0, 0x000000FF),
        ("lop3.b32", ", 0xFF00FF00, 0x96", 0x0F0F0F0F, 0x33333333, 0xC33CC33C),
        ("bfe.u32", ", 8", 0x12345678, 4, 0x67),
        ("bfe.s32", ", 8", 0x00000F80, 4, 0xFFFFFFF8),
        ("bfi.b32", ", 8, 4", 0xA, 0xFFFFFFFF, 0xFFFFFAFF),
        ("min.s32", "", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("max.f32", "", 0x7FC00000, 0x3F800000, 0x3F800000),
        ("copysign.f32", "", 0x80000000, 0x3F800000, 0xBF800000),
        ("cvt.rn.bf16x2.f32", "", 0x3F808000, 0x3F818000, 0x3F803F82),
    ],
)
def test_an_instruction(opcode: str, rest: str, a: int, b: int, exact: int) -> None:
    text = PTX.replace("OPERATION", opcode).replace("REST", rest)
    out = torch.zeros(1, dtype=torch.int32)
    parameters = struct.pack("<QII", out.data_ptr(), a, b)
    spans = [(out.data_ptr(), 4, True)]
    reports = launch(parse(text, "kernel"), (1, 1, 1), (1, 1, 1), parameters, 0, spans)
    assert not reports
    assert int(out.item()) & 0xFFFFFFFF == exact


BARRIERS = """
.visible .entry kernel(.param .u64 to, .param .u32 least)
{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [to];
    ld.param.u32 %r1, [least];
    mov.u32 %r2, %tid.x;
    setp.eq.u32 %p1, %r2, 0;
    {
        .reg .pred %p1;
        .reg .pred %p2;
        setp.ge.u32 %p1, %r2, %r1;
        bar.red.OPERATION;
    }
    selp.u32 %r4, 256, 0, %p1;
    add.u32 %r3, %r3, %r4;
    mul.wide.u32 %rd2, %r2, 4;
    add.u64 %rd2, %rd1, %rd2;
    st.global.u32 [%rd2], %r3;
    ret;
}
"""


@pytest.mark.parametrize(
    ("operation", "least", "exact"),
    [
        ("popc.u32 %r3, 0, %p1", 37, 3),
        ("popc.u32 %r3, 0, !%p1", 37, 37),
        ("and.pred %p2, 0, %p1; selp.u32 %r3, 1, 0, %p2", 0, 1),
        ("and.pred %p2, 0, %p1; selp.u32 %r3, 1, 0, %p2", 1, 0),
        ("or.pred %p2, 0, %p1; selp.u32 %r3, 1, 0, %p2", 39, 1),
        ("or.pred %p2, 0, %p1; selp.u32 %r3, 1, 0, %p2", 40, 0),
    ],
)
def test_a_barrier_reduces_over_all_warps(operation: str, least: int, exact: int) -> None:
    # The predicate of the outer scope, which the inner one hides, is as it was after it.
    out = torch.zeros(40, dtype=torch.int32)
    program = parse(BARRIERS.replace("OPERATION", operation), "kernel")
    parameters = struct.pack("<QI", out.data_ptr(), least)
    spans = [(out.data_ptr(), 160, True)]
    assert not launch(program, (1, 1, 1), (40, 1, 1), parameters, 0, spans)
    assert out.tolist() == [exact + 256] + [exact] * 39


@pytest.mark.parametrize("operation", ["and.pred %p2, 1, %p1", "xor.pred %p2, 0, %p1"])
def test_a_barrier_of_another_kind_is_refused(operation: str) -> None:
    program = parse(BARRIERS.replace("OPERATION", operation), "kernel")
    out = torch.zeros(40, dtype=torch.int32)
    parameters = struct.pack("<QI", out.data_ptr(), 0)
    with pytest.raises(PtxError, match="of barrier"):
        launch(program, (1, 1, 1), (40, 1, 1), parameters, 0, [(out.data_ptr(), 160, True)])


SHARED = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 to, .param .u32 before)
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [to];
    ld.param.u32 %r1, [before];
    mov.u32 %r2, memory;
    sub.u32 %r3, %r2, %r1;
    st.shared.u32 [%r2+8], 7;
    atom.shared.add.u32 %r4, [%r3+4096], 1;
    st.global.u32 [%rd1], %r4;
    ret;
}
"""


@pytest.mark.parametrize("before", [4088, 4096 + 4, 4088 - 16])
def test_an_address_of_32_bits_wraps(before: int) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    parameters = struct.pack("<QI", out.data_ptr(), before)
    spans = [(out.data_ptr(), 4, True)]
    reports = launch(parse(SHARED, "kernel"), (1, 1, 1), (1, 1, 1), parameters, 16, spans)
    if before == 4088:
        assert not reports
        assert out.item() == 7
    else:
        assert "out of bounds of shared memory: atom.shared" in str(reports)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(PtxError, match=r"no kernel other among \['kernel'\]"):
        parse(PTX, "other")
    assert entry_names(PTX) == ["kernel"]
    program = parse(PTX.replace("OPERATION", "wgmma.s32").replace("REST", ""), "kernel")
    with pytest.raises(PtxError, match=r"unknown instruction wgmma\.s32"):
        launch(program, (1, 1, 1), (1, 1, 1), bytes(16), 0, [])
    with pytest.raises(PtxError, match="8 bytes of parameters, not 16"):
        launch(program, (1, 1, 1), (1, 1, 1), bytes(8), 0, [])


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("kNone", None),
        ("kWriteOutOfBounds", "heap-buffer-overflow"),
        ("kBeyondDimension", "out of bounds for type"),
        ("kMisaligned", "misaligned address"),
        ("kOverflow", "signed integer overflow"),
    ],
)
def test_the_sanitizers_stop_at_a_bug(bug: str, report: str | None) -> None:
    command = [sys.executable, "-m", "tests.test_emulator", bug]
    done = subprocess.run(
        command, cwd=ROOT, env=sanitizer_environment(), capture_output=True, text=True
    )
    if report is None:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0
        assert report in done.stderr


def test_a_sanitized_build_wants_its_libraries_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(RuntimeError, match="sanitizer_environment"):
        emulated("sanitized", Path("elsewhere"))


def main() -> None:
    """Runs the sanitized kernels with the bug that the command line names."""
    load("sanitized", SELFTEST, "fastfisher_selftest", SCHEMAS)
    out, exact = sums(torch.ops.fastfisher_selftest, sys.argv[1])
    assert torch.equal(out, exact)


if __name__ == "__main__":
    main()
