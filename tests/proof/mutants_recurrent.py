"""Seeded bugs of the CUDA kernels of the recurrent steps."""

from __future__ import annotations

from .mutants import Mutant, Rung


def _bug(name: str, kernel: str, old: str, new: str, rung: Rung = "values") -> Mutant:
    return Mutant(f"recurrent: {name}", kernel, "csrc/cuda/recurrent.cu", old, new, rung)


MUTANTS: list[Mutant] = [
    _bug(
        "another gate's bias",
        "lstm_step",
        "S::add_bias(f, s.bias, u + s.units);",
        "S::add_bias(f, s.bias, u);",
    ),
    _bug(
        "units behind the last",
        "lstm_step",
        "if (u >= s.units) return;",
        "",
        "cucheck",
    ),
    _bug(
        "vectors at any address",
        "lstm_step_backward",
        "s.units % Vector<T>::size == 0 && has_vectors(s);",
        "s.units % Vector<T>::size == 0;",
        "cucheck",
    ),
    _bug(
        "the gradient of the output for that of the state",
        "lstm_step_backward",
        "S::add(grad, s.grad_hidden, n, u);\n",
        "S::add(grad, s.grad_output, n, u);\n",
    ),
    _bug(
        "a row behind the last",
        "gru_step",
        "n < s.rows; n += rows",
        "n <= s.rows; n += rows",
        "cucheck",
    ),
    _bug(
        "a row's offset in 32 bits",
        "gru_step_backward",
        "return read(from.data + row * from.stride + at);",
        "return read(from.data + static_cast<int>(row * from.stride) + at);",
    ),
    _bug(
        "the input's share stored as the hidden state's",
        "gru_step_backward",
        "S::write(s.grad_product, n, u + 2 * s.units, candidate);",
        "S::write(s.grad_product, n, u + 2 * s.units, fresh);",
    ),
]
