"""Seeded bugs of the outer family's kernel on tensor cores."""

from __future__ import annotations

from .mutants import Mutant, Rung

_KERNEL = "csrc/cuda/outer_mma.cu"
_LOAD = "csrc/cuda/outer_load.cuh"


def _mutant(name: str, file: str, old: str, new: str, rung: Rung) -> Mutant:
    return Mutant(name, "outer_mma", file, old, new, rung)


MUTANTS: list[Mutant] = [
    _mutant(
        "no wait for the copies",
        _KERNEL,
        "    ff_cp_wait<1>();\n    __syncthreads();\n",
        "    __syncthreads();\n",
        "values",
    ),
    _mutant(
        "no barrier between a tile's readers and its next copies",
        _KERNEL,
        "    ff_cp_wait<1>();\n    __syncthreads();\n",
        "    ff_cp_wait<1>();\n",
        "cucheck",
    ),
    _mutant(
        "copies go to the tile that is multiplied next",
        _KERNEL,
        "filled = stage == 0 ? stages - 1 : stage - 1;",
        "filled = stage == stages - 1 ? 0 : stage + 1;",
        "values",
    ),
    _mutant(
        "no barrier after the tables of features",
        _KERNEL,
        "  __syncthreads();\n\n  const int64_t first_sample",
        "  const int64_t first_sample",
        "cucheck",
    ),
    _mutant(
        "halves of two fragments of x swapped",
        _KERNEL,
        "b[fragment][1] = both[1];\n    b[fragment + 1][0] = both[2];",
        "b[fragment][1] = both[2];\n    b[fragment + 1][0] = both[1];",
        "values",
    ),
    _mutant(
        "rows and positions of g's fragments swapped",
        _KERNEL,
        "g + (step * 16 + lane % 8 + lane / 16 * 8) * Memory::pitch +\n"
        "                                 (first_row + lane / 8 % 2 * 8) * size;",
        "g + (step * 16 + lane % 16) * Memory::pitch +\n"
        "                                 (first_row + lane / 16 * 8) * size;",
        "values",
    ),
    _mutant(
        "float32 operands are not rounded",
        _KERNEL,
        "      if (begun > 1) round(stage == stages - 1 ? 0 : stage + 1);\n",
        "",
        "values",
    ),
    _mutant(
        "float32 operands are rounded while others multiply them",
        _KERNEL,
        "      if (begun > 1) round(stage == stages - 1 ? 0 : stage + 1);\n",
        "      round(stage);\n",
        "cucheck",
    ),
    _mutant(
        "a sample's products go on into the next one's",
        _KERNEL,
        "      for_all([&](int i, int j, int k) { dot[i][j][k] = 0; });\n",
        "",
        "values",
    ),
    _mutant(
        "the last positions reach into the next sample",
        _LOAD,
        "at.line == 0 && first + i * step < op.positions",
        "at.line == 0",
        "values",
    ),
    _mutant(
        "the last positions of a convolution reach past the image",
        _LOAD,
        "t < op.positions ? line * op.step_h : kOutside",
        "line * op.step_h",
        "values",
    ),
    _mutant(
        "the last rows of out are written past its end",
        _KERNEL,
        "      if (row >= task.problem.rows) continue;\n",
        "",
        "cucheck",
    ),
    _mutant(
        "samples' stride in 32 bits",
        _KERNEL,
        "op.sample = p.samples > 1 ? stride[0] * element : 0;",
        "op.sample = p.samples > 1 ? static_cast<int>(stride[0] * element) : 0;",
        "values",
    ),
    _mutant(
        "wide copies from unaligned memory",
        _KERNEL,
        "reinterpret_cast<uintptr_t>(op.data) % bytes != 0 || ",
        "",
        "values",
    ),
    _mutant(
        "copies reach over the taps of a kernel",
        _KERNEL,
        "whole({op.position, channels * element})",
        "whole({op.position})",
        "values",
    ),
    _mutant(
        "every group reads the first one's channels",
        _LOAD,
        "(group * p.columns + tap.channel)",
        "tap.channel",
        "values",
    ),
    _mutant(
        "padding is forgotten",
        _LOAD,
        "tap.position * p.dilation_w - p.pad_w;",
        "tap.position * p.dilation_w;",
        "values",
    ),
    _mutant(
        "elements that wait in registers are never stored",
        _LOAD,
        "if (op.copy_bytes != 2) return;",
        "if (op.copy_bytes == 2) return;",
        "cucheck",
    ),
]
