"""The emulators see each kind of mistake that they are there for, and none in a correct kernel."""

from __future__ import annotations

import re
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

SELFTEST = ROOT / "tests" / "emulation" / "selftest"
SCHEMAS = ("sums(Tensor(a!) out, Tensor input, int bug) -> ()",)
# The names of the header's enum, in its order.
BUGS = re.findall(r"^  (k\w+),$", (SELFTEST / "cuda" / "selftest.h").read_text(), re.MULTILINE)

ROWS, COLUMNS = 13, 44


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(ROWS * COLUMNS, dtype=torch.float32).remainder(17).reshape(ROWS, COLUMNS)
    return torch.zeros(COLUMNS + 1), x


def sums(operators: Any, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give, and what they should: sums of small integers, which are exact."""
    out, x = inputs()
    operators.sums(out, x, BUGS.index(bug))
    return out, torch.cat([x.sum(0), x.sum().reshape(1)])


@pytest.fixture(scope="module")
def plain() -> Any:
    load("plain", SELFTEST, "fastfisher_selftest", SCHEMAS)
    return torch.ops.fastfisher_selftest


@pytest.fixture(scope="module")
def checked() -> CheckedOperators:
    library = load("checked", SELFTEST, "fastfisher_selftest_checked", SCHEMAS)
    return CheckedOperators(library, "fastfisher_selftest_checked")


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
