"""Seeded bugs of the gather family's CUDA kernels."""

from __future__ import annotations

from .mutants import Mutant, Rung

_WINDOWS, _SPANS = "gather_windows", "gather_spans"


def _bug(
    name: str, kernel: str, old: str, new: str, rung: Rung = "values", file: str = "gather.cu"
) -> Mutant:
    return Mutant(f"gather: {name}", kernel, f"csrc/cuda/{file}", old, new, rung)


MUTANTS: list[Mutant] = [
    _bug(
        "squares of one token added to another",
        _WINDOWS,
        "token = __shfl_sync(kAll, own_token, i + u);",
        "token = __shfl_sync(kAll, own_token, i);",
    ),
    _bug(
        "a sample's offset in 32 bits",
        _WINDOWS,
        "int64_t offset = sample * s.sample +",
        "int64_t offset = static_cast<int>(sample * s.sample) +",
    ),
    _bug(
        "a run goes on with another token",
        _WINDOWS,
        "new_token | __ballot_sync(kAll, there && sample != previous_sample);",
        "__ballot_sync(kAll, there && sample != previous_sample);",
    ),
    _bug(
        "rows read behind the last position",
        _WINDOWS,
        "const bool is_read = i + u < count && from >= 0;",
        "const bool is_read = from >= 0;",
    ),
    _bug(
        "columns written that are not there",
        _WINDOWS,
        "store<vector>(to, sum, s.out_column, columns.apart, columns.left);",
        "store<vector>(to, sum, s.out_column, columns.apart, columns.left + 1);",
        "cucheck",
    ),
    _bug(
        "vectors at any address",
        _WINDOWS,
        "is_aligned(s.g, s.sample, s.position) && is_aligned(s.out, s.out_row);",
        "is_aligned(s.out, s.out_row);",
        "cucheck",
        "gather_op.cpp",
    ),
    _bug(
        "a position counted through all samples",
        _WINDOWS,
        "(place - sample * s.positions) * s.position;",
        "place * s.position;",
        "cucheck",
    ),
    _bug(
        "the wrong lane hands on the last sample",
        _SPANS,
        "last_sample = __shfl_sync(kAll, sample, kWarp - 1);",
        "last_sample = __shfl_sync(kAll, sample, 0);",
    ),
    _bug(
        "a run that passes through is squared in each window",
        _SPANS,
        "if (passes >> (i + u) & 1) continue;",
        "",
    ),
    _bug(
        "each window of a token adds up the rest",
        _SPANS,
        "if (begin > 0 && s.tokens[begin - 1] == token) return;",
        "",
        "cucheck",
    ),
    _bug(
        "the sum of a run read that no window has left",
        _SPANS,
        "columns, heads >> (i + u) & 1);",
        "columns, is_there);",
        "cucheck",
    ),
    _bug(
        "a run cut on both sides left as if it began here",
        _SPANS,
        "if (after.run && !is_head) {",
        "if (after.run) {",
    ),
]
