"""Time the kernels on every layer shape of the benchmark cases, beside torch and beside the floor.

    python benchmarks/layers.py                           all models, a few minutes
    python benchmarks/layers.py --models resnet20,gpt --threads 1 --save
    python benchmarks/layers.py --page                    write the page again from stored results

What is measured, and how, is in docs/performance/layers.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import shapes
from benchmarks.gate import keep_freed_memory
from benchmarks.layer_tables import COLUMNS, Run, cells, tables
from benchmarks.machine import ROOT, environment, slug
from benchmarks.markdown import update_marked
from benchmarks.registry import CASES, IMAGE_LAYOUTS, Case
from benchmarks.report import Environment, header
from benchmarks.roofline import LEAST_ROUNDS, Row, measure_model
from fastfisher.files import replacing

RESULTS = ROOT / "benchmarks" / "results" / "layers"
PAGE = ROOT / "docs" / "performance" / "layers.md"
_SCHEMA = 1


def main(
    argv: Sequence[str] | None = None,
    *,
    cases: Mapping[str, Case] = CASES,
    results: Path = RESULTS,
    page: Path = PAGE,
) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process when ``None``.
        cases: what ``--models`` may name.
        results: the folder of the stored results.
        page: the page that shows them.

    Returns:
        0; a wrong kernel exits with a message, as wrong arguments do.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    command = shlex.join(
        ["python", "benchmarks/layers.py", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        rows = [] if arguments.page else _measure(arguments, command, cases, results)
        if arguments.page or arguments.save:
            update_marked(page, tables(stored(results)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if rows:
        print("\n" + _losses(rows))
    return 0


def _measure(
    arguments: argparse.Namespace, command: str, cases: Mapping[str, Case], results: Path
) -> list[Row]:
    models = _named(arguments.models, list(cases), "--models")
    layouts = _named(arguments.layouts, IMAGE_LAYOUTS, "--layouts")
    if arguments.rounds < LEAST_ROUNDS:
        raise ValueError(f"--rounds: expected at least {LEAST_ROUNDS}, got {arguments.rounds}")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    machine = environment()
    path = results / f"{slug(str(machine['cpu']))}-{machine['threads']}t.json"
    commands: Sequence[str] = []
    earlier: Sequence[Row] = []
    if arguments.save and path.exists():
        before, commands, earlier = read(path)
        _check_same(path, before, machine)
    commands = list(dict.fromkeys([*commands, command]))

    print(header(machine), flush=True)
    measured: list[Row] = []
    for model in models:
        for rows in measure_model(
            cases[model], layouts, rounds=arguments.rounds, budget=arguments.budget
        ):
            print("\n" + _text(rows), flush=True)
            measured += rows
            if arguments.save:
                write(path, (machine, commands, _merged(earlier, measured, list(cases))))
    return measured


def _parser() -> argparse.ArgumentParser:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="benchmarks/layers.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", metavar="A,B", help="benchmark cases; default: all")
    add("--layouts", metavar="A,B", help="of images; default: nchw,channels_last")
    add("--threads", type=int, metavar="N", help="default: torch's own choice")
    add("--rounds", type=int, metavar="R", default=9, help="timed rounds; default: 9")
    add(
        "--budget",
        type=float,
        metavar="S",
        default=2.0,
        help="seconds a shape's rounds may take; fewer are timed beyond, 3 at least; default: 2",
    )
    add("--save", action="store_true", help="add to the stored results, write the page")
    add("--page", action="store_true", help="only write the page from the stored results")
    return parser


def _named(text: str | None, known: Sequence[str], option: str) -> list[str]:
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option}: no {', '.join(unknown)!r}; known: {', '.join(known)}")
    return names


def _check_same(path: Path, earlier: Environment, now: Environment) -> None:
    other = [
        f"{key} {earlier.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if key != "date" and earlier.get(key) != now.get(key)
    ]
    if other:
        raise ValueError(
            f"--save: {path} was measured with {'; '.join(other)}; expected the same, as new rows "
            "join those of the file. Move it away to begin anew"
        )


def _merged(earlier: Iterable[Row], new: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """New tables in place of the earlier ones of their model and layout, in the cases' order."""
    replaced = {(row.model, row.layout) for row in new}
    kept = [
        row for row in earlier if row.model in models and (row.model, row.layout) not in replaced
    ]
    layouts = (*IMAGE_LAYOUTS, shapes.CONTIGUOUS)
    return sorted(
        [*kept, *new], key=lambda row: (models.index(row.model), layouts.index(row.layout))
    )


def _losses(rows: Sequence[Row]) -> str:
    """The shapes in which torch is faster, those first whose layers lose most time by it."""
    lost = {row: row.layers * row.reference_ms * (row.ratio - 1) for row in rows if row.ratio > 1}
    lines = [f"{len(lost)} of {len(rows)} slower than torch's weight gradient"]
    for row in sorted(lost, key=lost.__getitem__, reverse=True):
        about = f"{row.model}, {row.layout}, {row.shape} ({row.engine})"
        lines.append(f"  {row.ratio:.2f}, {lost[row]:.2f} ms in {row.layers} layer(s): {about}")
    return "\n".join(lines)


def _text(rows: Sequence[Row]) -> str:
    lines = [list(COLUMNS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = (
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join([f"{rows[0].model}, {rows[0].layout}", *texts])


def stored(results: Path) -> list[Run]:
    """Every run in the folder."""
    return [read(path) for path in sorted(results.glob("*.json"))]


def write(path: Path, run: Run) -> None:
    """Write a run; :func:`read` gives it back."""
    machine, commands, rows = run
    head = {"schema": _SCHEMA, "environment": dict(machine), "commands": list(commands)}
    # A line a row: what changed can be seen in a diff.
    lines = ",\n  ".join(json.dumps(_fields(row), allow_nan=False) for row in rows)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _fields(row: Row) -> dict[str, Any]:
    numbers = {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in asdict(row).items()
    }
    return {**numbers, "shape": shapes.to_json(row.shape)}


def read(path: Path) -> Run:
    """Read a file of :func:`write`.

    Raises:
        ValueError: the file is not one, or of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']}, not {_SCHEMA}")
        rows = [
            Row(**{**fields, "shape": shapes.from_json(fields["shape"])})
            for fields in document["rows"]
        ]
        return document["environment"], document["commands"], rows
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result file of benchmarks/layers.py: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
