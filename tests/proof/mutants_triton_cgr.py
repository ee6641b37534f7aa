"""Bugs of the Triton twins of the channel and gather families and of the recurrent steps."""

from __future__ import annotations

from .mutants import Mutant, Rung


def _bug(family: str, kernel: str, name: str, old: str, new: str, rung: Rung) -> Mutant:
    return Mutant(
        f"triton {kernel}: {name}", kernel, f"fastfisher/triton/{family}.py", old, new, rung
    )


def _channel(
    name: str, old: str, new: str, rung: Rung, kernel: str = "channel_sums_last"
) -> Mutant:
    return _bug("channel", kernel, name, old, new, rung)


def _gather(name: str, old: str, new: str, rung: Rung, kernel: str = "gather_spans") -> Mutant:
    return _bug("gather", kernel, name, old, new, rung)


def _step(kernel: str, name: str, old: str, new: str, rung: Rung = "interpreter") -> Mutant:
    return _bug("recurrent", kernel, name, old, new, rung)


MUTANTS: list[Mutant] = [
    _channel(
        "the last channels have no program",
        '    tiles = triton.cdiv(channels, blocks["BLOCK_CHANNELS"])',
        '    tiles = max(1, channels // blocks["BLOCK_CHANNELS"])',
        "interpreter",
    ),
    _channel(
        "positions after the sample's last one are read",
        "mask = (t < last)[:, None] & valid[None, :]",
        "mask = (t <= last)[:, None] & valid[None, :]",
        "guard",
    ),
    _channel(
        "parts of a sum are squared before they are added",
        "of_parts = work.parts > 1 and not single",
        "of_parts = work.parts > 1 and single",
        "interpreter",
    ),
    _channel(
        "the mean has the stride of another dimension",
        "at = n * mean_n + t[:, None] * mean_t",
        "at = n * mean_n + t[:, None] * mean_n",
        "interpreter",
    ),
    _channel(
        "parts share a row of the workspace",
        "row = piece * tl.num_programs(2) + part",
        "row = piece",
        "guard",
    ),
    _channel(
        "offsets wrap at 2^31",
        "at = n * grad_n + t[:, None] * grad_t + c[None, :] * grad_c",
        "at = (n * grad_n + t[:, None] * grad_t + c[None, :] * grad_c).to(tl.int32)",
        "guard",
    ),
    _channel(
        "the gradient passed on has no mask",
        "tl.store(grad_input_ptr + at, g * factor[None, :], mask=mask)",
        "tl.store(grad_input_ptr + at, g * factor[None, :])",
        "guard",
        "channel_sums_first",
    ),
    _channel(
        "the gradient passed on is not scaled",
        "tl.store(grad_input_ptr + at, g * factor[None, :], mask=mask)",
        "tl.store(grad_input_ptr + at, g, mask=mask)",
        "interpreter",
        "channel_sums_first",
    ),
    _channel(
        "one row too many of the workspace is read",
        "mask = (row < rows)[:, None] & valid[None, :]",
        "mask = (row <= rows)[:, None] & valid[None, :]",
        "guard",
        "channel_squares",
    ),
    _channel(
        "a strided output is taken for a contiguous one",
        "at = out_ptr + c * out_c",
        "at = out_ptr + c",
        "interpreter",
        "channel_squares",
    ),
    _channel(
        "single positions are squared after they are added",
        "POWER=_OF_EACH if single else",
        "POWER=_OF_SUM if single else",
        "interpreter",
        "channel_squares",
    ),
    _gather(
        "a run ends with its piece",
        "inside &= (at < end) | ((v == last_token) & (n == last_sample))",
        "inside &= at < end",
        "interpreter",
    ),
    _gather(
        "runs of one token in two samples are one",
        "same_run = (v == token) & (n == sample)",
        "same_run = v == token",
        "interpreter",
        "gather_windows",
    ),
    _gather(
        "two pieces write the row of a token that both have",
        "is_head = (begin > 0) & (token == tl.load(tokens_ptr + begin))",
        "is_head = begin < 0",
        "guard",
    ),
    _gather(
        "rows of the first sample only",
        "t = tl.load(order_ptr + at, mask=inside, other=0) - n * positions",
        "t = tl.load(order_ptr + at, mask=inside, other=0)",
        "guard",
        "gather_windows",
    ),
    _gather(
        "a token ends after so many pieces as are read at once",
        "active = tl.sum(goes_on.to(tl.int32), 0) == BLOCK_PIECES",
        "active = piece < 0",
        "interpreter",
    ),
    _gather(
        "the token that goes on after the first piece is forgotten",
        "begins |= piece == 0",
        "begins &= piece > 0",
        "interpreter",
    ),
    _gather(
        "every piece of a token adds it up",
        "begins |= piece == 0",
        "begins |= piece >= 0",
        "guard",
    ),
    _gather(
        "the last columns have no mask",
        "before = tl.load(at, mask=valid, other=0.0)",
        "before = tl.load(at)",
        "guard",
        "gather_windows",
    ),
    _step(
        "lstm_step",
        "the exponential's series is too short",
        "_TERMS_FLOAT = tl.constexpr(7)",
        "_TERMS_FLOAT = tl.constexpr(3)",
    ),
    _step(
        "lstm_step",
        "the low part of ln(2) has the wrong sign",
        '"-0x1.bd0106p-13"',
        '"0x1.bd0106p-13"',
    ),
    _step(
        "lstm_step",
        "large arguments of a tangent are cut too low",
        "tl.constexpr(22.5)",
        "tl.constexpr(2.25)",
    ),
    _step(
        "lstm_step",
        "all gates have the bias of the first",
        "bias_ptr + gate * units + unit",
        "bias_ptr + unit",
    ),
    _step(
        "lstm_step",
        "units after the last one",
        "(row < rows) & (unit < units)",
        "(row < rows) & (unit <= units)",
        "guard",
    ),
    _step(
        "lstm_step_backward",
        "the forget gate's slope",
        "d * cell * (f * (1.0 - f))",
        "d * cell * f",
    ),
    _step(
        "lstm_step_backward",
        "the tail of the rows",
        "(row < rows) & (unit < units)",
        "unit < units",
        "guard",
    ),
    _step(
        "gru_step",
        "the candidates have the gates' stride",
        "tl.store(candidate_ptr + row * candidate_row + unit, candidate, mask=valid)",
        "tl.store(candidate_ptr + row * gates_row + unit, candidate, mask=valid)",
        "guard",
    ),
    _step(
        "gru_step",
        "the update gate's share",
        "fresh + z * (hidden - fresh), valid)",
        "hidden + z * (hidden - fresh), valid)",
    ),
    _step(
        "gru_step_backward",
        "the candidates' share of the product is not reset",
        "tl.store(for_product + 2 * units, grad_fresh * r, mask=valid)",
        "tl.store(for_product + 2 * units, grad_fresh, mask=valid)",
    ),
    _step(
        "gru_step_backward",
        "one gate's gradient over another's",
        "tl.store(for_gates + 2 * units, grad_fresh, mask=valid)",
        "tl.store(for_gates + units, grad_fresh, mask=valid)",
    ),
]
