"""Seeded bugs of the outer family's Triton kernels."""

from __future__ import annotations

from .mutants import Mutant, Rung

_FILE = "fastfisher/triton/outer.py"


def _tile(name: str, old: str, new: str, rung: Rung) -> Mutant:
    return Mutant(f"triton tile: {name}", "outer_tile", _FILE, old, new, rung)


def _pairs(name: str, old: str, new: str, rung: Rung) -> Mutant:
    return Mutant(f"triton pairs: {name}", "outer_pairs", _FILE, old, new, rung)


_SAMPLES = """    for n in range(first, min(first + part_samples, samples)):
        sample = tl.cast(n, tl.int64)
        grads = grad_ptr + sample * grad_n
        inputs = input_ptr + sample * input_n
        {next} ="""
_TILE_SAMPLES = _SAMPLES.format(next="sample_grad")
_PAIR_SAMPLES = _SAMPLES.format(next="products")


def _past_the_last(loop: str) -> str:
    return loop.replace("min(first + part_samples, samples)", "first + part_samples")


MUTANTS = [
    _tile(
        "gradients of positions that are not there",
        "mask=row_valid[:, None] & t_valid[None, :]",
        "mask=row_valid[:, None]",
        "guard",
    ),
    _tile(
        "one column too many",
        "column_valid = flat < columns * taps",
        "column_valid = flat <= columns * taps",
        "guard",
    ),
    _tile("samples of the next part", _TILE_SAMPLES, _past_the_last(_TILE_SAMPLES), "guard"),
    _tile("int32 for far operands", "max(extents) < 2**30", "max(extents) < 2**60", "guard"),
    _tile(
        "every part stored in one place",
        "at = sums_ptr + part.to(tl.int64) * sums_part + channel",
        "at = sums_ptr + channel",
        "guard",
    ),
    _tile("taps counted as columns", "tap = flat // columns", "tap = flat // taps", "interpreter"),
    _tile(
        "a sample begins with the sum of the last ones",
        "sample_grad = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)",
        "sample_grad = sums",
        "interpreter",
    ),
    Mutant(
        "triton tile: squares with a sign",
        "outer_tile",
        "fastfisher/triton/launch.py",
        "return values * values",
        "return tl.abs(values) * values",
        "interpreter",
    ),
    _tile("tf32 unasked", "input_precision=PRECISION", 'input_precision="tf32"', "interpreter"),
    _tile(
        "without the last part",
        "for part in range(parts)",
        "for part in range(parts - 1)",
        "interpreter",
    ),
    _tile(
        "added twice",
        "tl.store(at, tl.load(at, mask=valid, other=0.0) + factor",
        "tl.store(at, 2 * tl.load(at, mask=valid, other=0.0) + factor",
        "interpreter",
    ),
    _tile(
        "gradients of uneven lines", "and even and self.grad_is_even()", "and even", "interpreter"
    ),
    _pairs("one pair too many", "pair_valid = pair < pairs", "pair_valid = pair <= pairs", "guard"),
    _pairs("samples of the next part", _PAIR_SAMPLES, _past_the_last(_PAIR_SAMPLES), "guard"),
    _pairs("taps that are not there", "tap_valid = tap < taps", "tap_valid = tap >= 0", "guard"),
    _pairs(
        "a channel's group",
        "(channel // rows * columns + column)",
        "(channel * columns + column)",
        "interpreter",
    ),
    _pairs(
        "positions beyond the line's end",
        "at_w = first_w[:, None] + w[None, :]",
        "at_w = first_w[:, None] + w[None, :] * 0",
        "interpreter",
    ),
    _pairs(
        "columns' sums in the wrong place",
        "column.to(tl.int64) * sums_c)[None, :]\n    _add(at, sums, tap_valid",
        "column.to(tl.int64) * sums_w)[None, :]\n    _add(at, sums, tap_valid",
        "interpreter",
    ),
]
