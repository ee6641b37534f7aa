"""What is printed, written and drawn from the measured rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measure import TOLERANCE, Row
from benchmarks.rivals import PLAIN
from fastfisher.files import replacing

SCHEMA = 1
"""Raised when a field of the JSON changes its meaning or goes away."""

OURS = "fisher_diag"
COLUMNS = ("contender", "time ms", "x plain (IQR)", "rounds", "peak MB", "x plain", "max rel err")

Environment = Mapping[str, str | int]
Run = tuple[Environment, str, list[Row]]
"""One stored measurement: where it was made, by which command, and its rows."""


def header(environment: Environment) -> str:
    """One line on the machine, one on the software."""
    e = environment
    return (
        f"{e['cpu']} | {e['threads']} thread(s) | float32 | torch {e['torch']} ({e['torch_isa']})\n"
        f"fastfisher {e['fastfisher']} ({e['kernels']}) | commit {e['commit']} | {e['date']}"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows of one case in one layout as text."""
    first = rows[0]
    lines = [
        f"{first.case} | {first.layout} | batch {first.batch} | {first.parameters:,} parameters"
    ]
    cells = [[*COLUMNS, "note"], *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for line in cells:
        name, numbers = line[0].ljust(widths[0]), zip(line[1:-1], widths[1:], strict=True)
        columns = [name, *(text.rjust(width) for text, width in numbers), line[-1]]
        lines.append("  ".join(columns).rstrip())
    lines += _against_rivals(rows)
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    spread = ""
    if row.ratio is not None:
        spread = f"{row.ratio:.2f} ({row.ratio_q1:.2f}-{row.ratio_q3:.2f})"
    return [
        row.contender if row.status != "inexact" else f"{row.contender} (inexact)",
        row.status if row.time_ms is None else number(row.time_ms, ".2f"),
        spread or "-",
        str(row.rounds) if row.rounds else "-",
        number(row.peak_mb, ".1f"),
        number(row.peak_ratio, ".2f"),
        number(row.max_rel_error, ".1e"),
        row.note,
    ]


def number(value: float | None, form: str) -> str:
    """The value, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def _against_rivals(rows: Sequence[Row]) -> list[str]:
    """One line that says how much faster ours is than each rival that is right."""
    ratios = {row.contender: row.ratio for row in rows if row.ratio and row.status == "ok"}
    ours = ratios.pop(OURS, None)
    ratios.pop(PLAIN, None)
    if ours is None or not ratios:
        return []
    parts = [f"{ratio / ours:.2f}x {name}" for name, ratio in ratios.items()]
    return [f"speed of {OURS}: " + ", ".join(parts)]


def write_json(path: Path, environment: Environment, command: str, rows: Sequence[Row]) -> None:
    """Write everything that was measured; :func:`read_json` gives it back."""
    document = {
        "schema": SCHEMA,
        "command": command,
        "tolerance": TOLERANCE,
        "environment": dict(environment),
        "rows": [_finite(dataclasses.asdict(row)) for row in rows],
    }
    _replace(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Run:
    """Read a file of :func:`write_json`: environment, command, rows.

    Raises:
        ValueError: the file is not one, or of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, not {SCHEMA}")
        rows = [Row(**row) for row in document["rows"]]
        return document["environment"], document["command"], rows
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result file of benchmarks/run.py: {error}") from error


def write_csv(path: Path, environment: Environment, rows: Sequence[Row]) -> None:
    """Write one line per row, each with the environment, so that files can be joined."""
    lines = [{**_finite(dataclasses.asdict(row)), **environment} for row in rows]
    text = io.StringIO(newline="")
    fields = [field.name for field in dataclasses.fields(Row)] + list(environment)
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    _replace(path, text.getvalue())


def merged(
    old: Sequence[Row], new: Sequence[Row], cases: Sequence[str], contenders: Sequence[str]
) -> list[Row]:
    """Stored rows and new ones, which replace those of the same contender on the same table.

    Sorted as ``cases`` and ``contenders`` are. A ratio is to the plain pass of its own rounds.
    """
    rows = {(row.case, row.layout, row.contender): row for row in (*old, *new)}
    layouts = list(dict.fromkeys(layout for _, layout, _ in rows))

    def place(row: Row) -> tuple[int, int, int]:
        return (
            cases.index(row.case) if row.case in cases else len(cases),
            layouts.index(row.layout),
            contenders.index(row.contender) if row.contender in contenders else len(contenders),
        )

    return sorted(rows.values(), key=place)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an error without bound is null, and the note says why."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def draw(path: Path, environment: Environment, command: str, rows: Sequence[Row]) -> None:
    """Draw the ratios to the plain pass as horizontal bars, one panel per case and layout.

    Contenders without a time keep their line, with the reason in place of the bar.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = [list(group) for _, group in groupby(rows, key=lambda row: (row.case, row.layout))]
    bars = [[row for row in panel if row.contender != PLAIN] for panel in panels]
    heights = [max(1, len(panel)) for panel in bars]
    # The salt makes the SVG's ids, and so the file, the same for the same data.
    with matplotlib.rc_context({"svg.hashsalt": "fastfisher", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 1.4 + 0.34 * sum(heights) + 0.5 * len(heights)))
        axes = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )[:, 0]
        widest = max((row.ratio for row in rows if row.ratio is not None), default=1.0)
        for axis, panel, shown in zip(axes, panels, bars, strict=True):
            for position, row in enumerate(shown):
                color = "tab:blue" if row.contender == OURS else "tab:gray"
                length = row.ratio or 0.0
                axis.barh(position, length, color=color, height=0.7)
                text = f" {length:.2f}" if row.ratio is not None else f"  {_reason(row)}"
                if row.status == "inexact":
                    text += f" (inexact: relative error {row.max_rel_error:.0e})"
                axis.text(length, position, text, va="center", fontsize=8)
            axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
            axis.set_yticks(range(len(shown)), [row.contender for row in shown], fontsize=8)
            axis.set_ylim(len(shown) - 0.5, -0.5)
            title = f"{panel[0].case}, {panel[0].layout}, batch {panel[0].batch}"
            axis.set_title(title, fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].set_xlim(0, 1.12 * max(widest, 1.0))
        axes[-1].set_xlabel(
            "time / time of one plain forward + backward pass (dashed line); shorter is better",
            fontsize=8,
        )
        axes[-1].tick_params(axis="x", labelsize=8)
        figure.supxlabel(header(environment) + f"\n{command}", fontsize=7, color="0.35")
        figure.set_layout_engine("constrained")
        kind = path.suffix.lstrip(".") or "svg"
        image = io.BytesIO()
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
    _replace(path, image.getvalue())


def _reason(row: Row) -> str:
    error = row.max_rel_error
    if row.status == "wrong" and error is not None and math.isfinite(error):
        return f"wrong: relative error {error:.1e}"
    return f"{row.status}: {row.note}"[:90]


def _replace(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
