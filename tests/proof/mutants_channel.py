"""Seeded bugs of the channel family's CUDA kernels."""

from __future__ import annotations

from .mutants import Mutant, Rung

_LAST, _FIRST, _SQUARES = "channel_sums_last", "channel_sums_first", "channel_squares"


def _bug(
    name: str, kernel: str, old: str, new: str, rung: Rung = "values", file: str = "channel.cu"
) -> Mutant:
    return Mutant(f"channel: {name}", kernel, f"csrc/cuda/{file}", old, new, rung)


MUTANTS: list[Mutant] = [
    _bug(
        "positions counted twice",
        _LAST,
        "first < end; first += batch * rows) {",
        "first < end; first += batch * rows - 1) {",
    ),
    _bug(
        "a load behind the last position, whose value is not used",
        _LAST,
        "const int64_t there = t < end ? left : 0;",
        "const int64_t there = left;",
        "cucheck",
    ),
    _bug(
        "a position's offset in 32 bits",
        _LAST,
        "load<vector>(gs[u], g + t * s.g.position, s.g.channel, apart, there);",
        "load<vector>(gs[u], g + static_cast<int>(t * s.g.position), s.g.channel, apart, there);",
    ),
    _bug(
        "lanes of other positions store as well",
        _LAST,
        "if (row != 0) return;\n  const int64_t to",
        "const int64_t to",
        "cucheck",
    ),
    _bug(
        "the input read with the gradient's stride",
        _FIRST,
        "load<vector>(xs[u], x + t * s.x.position, s.x.position, apart, end - t);",
        "load<vector>(xs[u], x + t * s.x.position, s.g.position, apart, end - t);",
    ),
    _bug(
        "a sum stored for a channel that is not there",
        _FIRST,
        "if (along != 0 || !is_channel) return;",
        "if (along != 0) return;",
        "cucheck",
    ),
    _bug(
        "neighbouring lanes not added",
        _FIRST,
        "weight = sum_lanes(weight, 1, lanes);",
        "weight = sum_lanes(weight, 2, lanes);",
    ),
    _bug(
        "the mean subtracted where no input is",
        _FIRST,
        "weight += t + k * apart < end ? value * (xs[u].lanes[k] - mean) : T(0);",
        "weight += (value + T(t + k * apart >= end)) * (xs[u].lanes[k] - mean);",
    ),
    _bug(
        "vectors at any address",
        _LAST,
        "is_aligned(data, sizes[0] > 1 ? stride[0] : 0, sizes[outer] > 1 ? stride[outer] : 0);",
        "(data != nullptr || outer < 0);",
        "cucheck",
        "channel_op.cpp",
    ),
    _bug(
        "no barrier before other warps' sums are read",
        _SQUARES,
        "of_warp[warp][lane] = sum;\n  __syncthreads();",
        "of_warp[warp][lane] = sum;",
        "cucheck",
    ),
    _bug(
        "every lane of a warp adds to the output",
        _SQUARES,
        "if (row != 0) return;\n  for (int other",
        "if (warp != 0) return;\n  for (int other",
        "cucheck",
    ),
    _bug(
        "one warp more than there is",
        _SQUARES,
        "other < kSquareWarps; ++other",
        "other <= kSquareWarps; ++other",
        "cucheck",
    ),
    _bug(
        "a sample in two splits",
        _SQUARES,
        "min((blockIdx.y + int64_t{1}) * s.split, s.samples);",
        "min((blockIdx.y + int64_t{1}) * s.split + 1, s.samples);",
    ),
    _bug(
        "pieces squared before they are added",
        _SQUARES,
        "s.pieces = plan.pieces;",
        "s.pieces = 1;",
    ),
]
