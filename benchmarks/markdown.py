"""The tables of the README and of docs/performance/models.md, made from stored runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.report import OURS, Environment, Run, header, number
from benchmarks.rivals import PLAIN
from fastfisher.files import replacing

MARKS = ("<!-- table:begin -->\n", "<!-- table:end -->")

SHORT_CASES = ("resnet20", "vgg16_bn", "seq_mlp", "transformer")
SHORT_CONTENDERS = (PLAIN, OURS, "torch_func", "loop", "backpack")
"""What the README has room for; the page of all models has the rest."""

_CHANNELS_LAST = "channels_last"


def update_marked(path: Path, table: str) -> None:
    """Put ``table`` between the marks of a file.

    Raises:
        ValueError: the file has no marks.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = text.find(MARKS[0]), text.find(MARKS[1])
    if begin < 0 or end < begin:
        raise ValueError(f"{path} has no lines {MARKS[0].strip()} and {MARKS[1]}")
    with replacing(path) as temporary:
        text = text[: begin + len(MARKS[0])] + table + text[end:]
        temporary.write_text(text, encoding="utf-8")


def short(run: Run) -> str:
    """The README's table: some cases and contenders of one run."""
    environment, _, rows = run
    chosen = [r for r in rows if r.case in SHORT_CASES and r.contender in SHORT_CONTENDERS]
    legend = (
        "Multiples of the time (and peak memory) of one plain forward and backward pass of the "
        "same model; median of interleaved rounds. Error: worst parameter, relative, float32 "
        "against float64."
    )
    # The commands are with the table of all models: there are as many as parts it was measured in.
    lines = [*_every_contender(chosen), "", legend, "", *_conditions(environment, "")]
    return "\n".join(lines) + "\n"


def models(runs: Sequence[Run]) -> str:
    """For each processor: a line a model, every contender, and why some have no time.

    Args:
        runs: stored runs, in any order; at most one for a processor and a number of threads.
    """
    lines = []
    ordered = sorted(runs, key=lambda run: (str(run[0]["cpu"]), int(run[0]["threads"])))
    for cpu, group in groupby(ordered, key=lambda run: str(run[0]["cpu"])):
        of_cpu = list(group)
        lines += [f"## {cpu}", "", *_line_a_model(of_cpu)]
        for environment, command, rows in of_cpu:
            lines += ["", f"### Every contender, {environment['threads']} thread(s)", ""]
            lines += [*_every_contender(rows), "", *_conditions(environment, command)]
        lines += ["", "### Why a contender has no time, or is inexact", "", *_reasons(of_cpu), ""]
    return "\n".join(lines)


def _line_a_model(runs: Sequence[Run]) -> list[str]:
    tables = {f"{machine['threads']}t": _by_table(rows) for machine, _, rows in runs}
    titles = [f"{count}, {layout}" for count in tables for layout in ("nchw", _CHANNELS_LAST)]
    lines = [
        f"| {OURS} / plain pass | {' | '.join(titles)} | peak memory | error | nearest rival |",
        "|---" * (4 + len(titles)) + "|",
    ]
    for case in dict.fromkeys(case for table in tables.values() for case, _ in table):
        cells: list[str] = []
        ours: list[Row] = []
        nearest: list[tuple[float, str]] = []
        for count, table in tables.items():
            # A model without images has one layout, which stands in the first column.
            own = {
                ("second" if la == _CHANNELS_LAST else "first"): la for c, la in table if c == case
            }
            plain = {la: table[case, la][PLAIN].time_ms or 0.0 for la in own.values()}
            for layout in (own.get("first"), own.get("second")):
                if layout is None:
                    cells.append("")
                    continue
                rows = table[case, layout]
                ours.append(rows[OURS])
                cells.append(_ratio(rows[OURS], bold=plain[layout] == min(plain.values())))
                nearest += [(more, f"{name}, {count}, {layout}") for name, more in _exact(rows)]
        memory = max((row.peak_ratio for row in ours if row.peak_ratio), default=None)
        error = max((row.max_rel_error for row in ours if row.max_rel_error), default=None)
        rival = "{:.2f}x ({})".format(*min(nearest)) if nearest else "-"
        ends = [number(memory, ".2f"), number(error, ".0e"), rival]
        lines.append(f"| {' | '.join([case, *cells, *ends])} |")
    lines += [
        "",
        "Bold: the layout in which the plain pass is faster. Peak memory, a multiple of the plain "
        "pass's, and the relative error are the worst of the line. Nearest rival: the time of an "
        f"exact one over that of {OURS}, where it comes closest.",
    ]
    return lines


def _by_table(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, layout) -> contender -> row, for the tables that have ours and the unit."""
    tables: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        tables.setdefault((row.case, row.layout), {})[row.contender] = row
    return {key: table for key, table in tables.items() if {PLAIN, OURS} <= table.keys()}


def _exact(rows: dict[str, Row]) -> list[tuple[str, float]]:
    """How many times slower than ours each rival is that is right."""
    ours = rows[OURS].ratio
    rivals = [row for row in rows.values() if row.contender not in (PLAIN, OURS)]
    return [(r.contender, r.ratio / ours) for r in rivals if r.status == "ok" and r.ratio and ours]


def _ratio(row: Row, bold: bool) -> str:
    text = row.status if row.ratio is None else f"{row.ratio:.2f}"
    return f"**{text}**" if bold else text


def _every_contender(rows: Sequence[Row]) -> list[str]:
    """One line a case and layout, every contender a column."""
    rivals = list(dict.fromkeys(r.contender for r in rows if r.contender not in (PLAIN, OURS)))
    lines = [
        f"| batch, layout | plain pass | {OURS} | its peak memory | its error | "
        + " | ".join(rivals)
        + " |",
        "|---" * (5 + len(rivals)) + "|",
    ]
    for (case, layout), table in _by_table(rows).items():
        plain, ours = table[PLAIN], table[OURS]
        lines.append(
            f"| {case}, {plain.batch}, {layout} | {number(plain.time_ms, '.0f')} ms | "
            f"**{_multiple(ours)}** | {number(ours.peak_ratio, '.2f')} | "
            f"{number(ours.max_rel_error, '.0e')} | "
            + " | ".join(_multiple(table[name]) if name in table else "" for name in rivals)
            + " |"
        )
    return lines


def _multiple(row: Row) -> str:
    if row.ratio is None:
        return row.status
    return f"{row.ratio:.2f}x" + (" (inexact)" if row.status == "inexact" else "")


def _conditions(environment: Environment, command: str) -> list[str]:
    lines = [*header(environment).splitlines(), *(f"`{line}`" for line in command.splitlines())]
    return [f"{line}  " for line in lines[:-1]] + lines[-1:]


def _reasons(runs: Sequence[Run]) -> list[str]:
    """Every reason once, with the cases it is about."""
    cases: dict[tuple[str, str, str], dict[str, None]] = {}
    for _, _, rows in runs:
        for row in rows:
            if row.status != "ok":
                cases.setdefault((row.contender, row.status, row.note), {})[row.case] = None
    return [
        f"- {contender} on {', '.join(about)}: {status}: `{note.replace('`', chr(39))}`"
        for (contender, status, note), about in sorted(cases.items(), key=lambda item: item[0][0])
    ]
