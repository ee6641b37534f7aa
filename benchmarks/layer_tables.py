"""The tables of docs/performance/layers.md, made from the rows of every stored run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from benchmarks.report import Environment, header
from benchmarks.roofline import Row
from benchmarks.shapes import Convolution, Linear

Run = tuple[Environment, Sequence[str], Sequence[Row]]
"""One stored measurement: where it was made, by which commands, and its rows."""

COMPUTE_GOAL, MEMORY_GOAL = 0.90, 0.85
"""Parts of the bound that a kernel should reach where operations, or where bytes, take longer."""

COLUMNS = (
    "shape",
    "layers",
    "GFLOP",
    "MB",
    "bound",
    "floor ms",
    "ours ms",
    "torch ms",
    "ours GFLOP/s",
    "torch GFLOP/s",
    "torch's by",
    "ours / torch (IQR)",
    "of the floor",
    "error",
)
SUMMARY_COLUMNS = (
    "",
    "shapes",
    "at least torch's speed",
    "sum of layers, ours / torch",
    "worst shape",
    "bound by operations: at 90%",
    "bound by bytes: at 85%",
    "sum of layers, of the floor",
    "error",
)


def cells(row: Row) -> list[str]:
    """One text a column of ``COLUMNS``."""
    gigaflop = row.shape.operations / 1e9
    ratio = f"{row.ratio:.2f}" if row.ratio <= 1 else f"**{row.ratio:.2f}**"
    return [
        str(row.shape),
        str(row.layers),
        f"{gigaflop:.3f}",
        f"{row.shape.bytes / 1e6:.2f}",
        "operations" if row.is_compute_bound else "bytes",
        f"{row.floor_ms:.3f}",
        f"{row.time_ms:.3f}",
        f"{row.reference_ms:.3f}",
        f"{1e3 * gigaflop / row.time_ms:.0f}",
        f"{1e3 * gigaflop / row.reference_ms:.0f}",
        row.engine,
        f"{ratio} ({row.ratio_q1:.2f}-{row.ratio_q3:.2f})",
        f"{row.of_floor:.0%}",
        f"{row.error:.0e}",
    ]


def tables(runs: Sequence[Run]) -> str:
    """For each run a summary, then a table a model and layout.

    Args:
        runs: stored runs, in any order; at most one for a processor and a number of threads.
    """
    lines: list[str] = []
    ordered = sorted(runs, key=lambda run: (str(run[0]["cpu"]), int(run[0]["threads"])))
    for environment, commands, rows in ordered:
        lines += [f"## {environment['cpu']}, {environment['threads']} thread(s)", ""]
        lines += [*_summary(rows), ""]
        for model, group in groupby(rows, key=lambda row: row.model):
            lines += [f"<details><summary>{model}</summary>", "", *_of_model(list(group))]
            lines += ["</details>", ""]
        conditions = [*header(environment).splitlines(), *(f"`{line}`" for line in commands)]
        lines += [*(f"{line}  " for line in conditions[:-1]), conditions[-1], ""]
    return "\n".join(lines)


def _of_model(rows: Sequence[Row]) -> list[str]:
    lines = []
    for layout, group in groupby(rows, key=lambda row: row.layout):
        of_layout = list(group)
        rates = f"sgemm {of_layout[0].sgemm:.0f} GFLOP/s, memory {of_layout[0].bandwidth:.1f} GB/s"
        lines += [f"{layout}: {rates}", "", *_table(COLUMNS, map(cells, of_layout)), ""]
    return lines


def _summary(rows: Sequence[Row]) -> list[str]:
    """A line a model and layout, then lines for all convolutions and all linear layers."""
    groups = [
        (f"{model}, {layout}", list(group))
        for (model, layout), group in groupby(rows, key=lambda row: (row.model, row.layout))
    ]
    images = [row for row in rows if isinstance(row.shape, Convolution)]
    groups += [
        (f"**convolutions, {layout}**", [row for row in images if row.layout == layout])
        for layout in Convolution.layouts
    ]
    groups += [
        (f"**convolutions, torch's by {engine}**", [row for row in images if row.engine == engine])
        for engine in sorted({row.engine for row in images})
    ]
    groups.append(("**convolutions**", images))
    groups.append(("**linear layers**", [row for row in rows if isinstance(row.shape, Linear)]))
    return _table(SUMMARY_COLUMNS, [_line(name, group) for name, group in groups if group])


def _line(name: str, rows: Sequence[Row]) -> list[str]:
    ours = sum(row.layers * row.time_ms for row in rows)
    torch = sum(row.layers * row.reference_ms for row in rows)
    floor = sum(row.layers * row.floor_ms for row in rows)
    computing = [row.of_floor >= COMPUTE_GOAL for row in rows if row.is_compute_bound]
    moving = [row.of_floor >= MEMORY_GOAL for row in rows if not row.is_compute_bound]
    fast = sum(row.ratio <= 1 for row in rows)
    return [
        name,
        str(len(rows)),
        f"{fast} ({fast / len(rows):.0%})",
        f"{ours / torch:.2f}",
        f"{max(row.ratio for row in rows):.2f}",
        f"{sum(computing)} of {len(computing)}",
        f"{sum(moving)} of {len(moving)}",
        f"{floor / ours:.0%}",
        f"{max(row.error for row in rows):.0e}",
    ]


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
