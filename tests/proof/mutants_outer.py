"""Seeded bugs in the outer family's kernels for float32 and float64, and in their planning."""

from __future__ import annotations

from .mutants import Mutant, Rung

_TILES, _GROUPS, _REDUCE = (
    f"csrc/cuda/outer_{each}.cu" for each in ("simt", "depthwise", "reduce")
)
_DEVICE, _PLAN = "csrc/cuda/outer_device.h", "csrc/cuda/outer_plan.h"


def _tiles(name: str, file: str, old: str, new: str, rung: Rung) -> Mutant:
    return Mutant(f"tiles: {name}", "outer_simt", file, old, new, rung)


def _groups(name: str, file: str, old: str, new: str, rung: Rung) -> Mutant:
    return Mutant(f"groups: {name}", "outer_depthwise", file, old, new, rung)


MUTANTS: list[Mutant] = [
    _tiles("no wait for the copies", _TILES, "ff_cp_wait<0>();", "", "values"),
    _tiles(
        "no barrier between steps",
        _TILES,
        "ff_cp_wait<0>();\n      __syncthreads();",
        "ff_cp_wait<0>();",
        "cucheck",
    ),
    _tiles(
        "no barrier after the table of columns",
        _TILES,
        "  }\n  __syncthreads();\n",
        "  }\n",
        "cucheck",
    ),
    _tiles(
        "the next step into the buffer in use",
        _TILES,
        "copy_step(stage ^ 1)",
        "copy_step(stage)",
        "cucheck",
    ),
    _tiles(
        "rows past the last one read",
        _TILES,
        "at < positions ? rows_left : 0",
        "at < positions ? Tile::kTileRows : 0",
        "cucheck",
    ),
    _tiles(
        "the last positions left out",
        _TILES,
        "left_here > 0",
        "left_here >= kUnrolled",
        "values",
    ),
    _tiles(
        "samples' products added before they are squared",
        _TILES,
        "    for_all([&](int r, int c) { product[r][c] = 0; });\n",
        "",
        "values",
    ),
    _tiles(
        "a thread's rows taken for neighbours",
        _TILES,
        "(r / kLanes * Tile::kDown + down)",
        "(down * kRowVectors + r / kLanes)",
        "values",
    ),
    _tiles(
        "the stride between samples in 32 bits",
        _TILES,
        "g += p.g_stride[0];",
        "g += static_cast<int>(p.g_stride[0]);",
        "cucheck",
    ),
    _tiles(
        "the order of a kernel's taps",
        _DEVICE,
        "{column % channels, tap / positions, tap % positions}",
        "{column % channels, tap % lines, tap / lines}",
        "values",
    ),
    _tiles(
        "the padding of positions used for lines",
        _DEVICE,
        "static_cast<int>(p.pad_h) : kOutside",
        "static_cast<int>(p.pad_w) : kOutside",
        "values",
    ),
    _tiles(
        "a divisor's inverse rounded down",
        _DEVICE,
        "(uint64_t{1} << shift_) + divisor_ - 1) / divisor_",
        "(uint64_t{1} << shift_)) / divisor_",
        "values",
    ),
    _tiles(
        "unaligned input copied 16 bytes at a time",
        _PLAN,
        "!task.positions_fast && aligned(x) &&",
        "!task.positions_fast &&",
        "values",
    ),
    _tiles(
        "unaligned out written 16 bytes at a time",
        _PLAN,
        "task.out_vector = aligned(out) &&",
        "task.out_vector =",
        "cucheck",
    ),
    _tiles(
        "a workspace for one split",
        _PLAN,
        "splits > 1 ? splits * entries : 0",
        "splits > 1 ? entries : 0",
        "asan",
    ),
    _tiles(
        "the last split left out",
        _REDUCE,
        "split < task.splits;",
        "split + 1 < task.splits;",
        "values",
    ),
    _tiles(
        "no barrier before the splits are added",
        _REDUCE,
        "  __syncthreads();\n",
        "",
        "cucheck",
    ),
    _groups(
        "groups past the last one written",
        _GROUPS,
        "of_group >= p.groups || ",
        "",
        "cucheck",
    ),
    _groups(
        "half of the lanes left out",
        _GROUPS,
        "distance = lanes;",
        "distance = 2 * lanes;",
        "values",
    ),
    _groups("no barrier before warps are added", _GROUPS, "  __syncthreads();\n", "", "cucheck"),
    _groups(
        "samples shared by too few warps",
        _GROUPS,
        "n < end_sample; n += kWarps",
        "n < end_sample; n += kWarps - 1",
        "values",
    ),
    _groups(
        "the image's edge read past",
        _DEVICE,
        "static_cast<unsigned>(window.line + column.line()) < static_cast<unsigned>(p.height)",
        "window.line + column.line() >= 0",
        "cucheck",
    ),
]
