"""The table of exactness: which layers, losses and kinds are exact, here and elsewhere.

    python benchmarks/exactness.py                  measure and print the page, about a minute
    python benchmarks/exactness.py --save           write docs/exactness.json and docs/exactness.md
    python benchmarks/exactness.py --from-json      write the page again, from the stored numbers

Every number is compared in float64 with its definition: one backward pass for each sample, and for
the kinds that take an expectation one for each sample and target. The rivals are those of
``rivals.py``, with the observed labels; one that is not installed says so in its column.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.losses import CLASSIFICATION, DRAWS, LOSSES, Loss, Values, generator
from benchmarks.machine import environment
from benchmarks.registry import Problem
from benchmarks.rivals import PLAIN, RIVALS, Rival
from benchmarks.single_layers import LAYERS
from fastfisher import fisher_diag
from fastfisher.files import replacing
from fastfisher.losses import KINDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
NUMBERS, PAGE = DOCS / "exactness.json", DOCS / "exactness.md"

TARGET = 1e-10
"""Largest relative error, in norm, of a parameter that is exact in float64."""

SINGLE = 1e-5
"""The same in float32, in which a rival may have another try."""

# The unit, ours, the definition itself, and variants that compute the same another way.
NOT_ASKED = {PLAIN, "fisher_diag", "loop", "torch_func_whole", "torch_func_compiled"}

_SCHEMA = 1
_ABSENT = "not installed"


@dataclass(frozen=True)
class Cell:
    """What one way of computing gave for one row.

    Attributes:
        status: "exact", "single" (exact as far as float32 goes, but not in float64), "wrong",
            "missing" (no value for some parameter), "error" (it raised), "absent" (not installed).
        error: largest relative error of the parameters that have a value; None where none has, and
            where it is infinite.
        note: the message of the error, the parameters without a value, or those of ours that took
            the fallback.
    """

    status: str
    error: float | None = None
    note: str = ""


def compare(got: Values, want: Values, note: str = "", allowed: float = TARGET) -> Cell:
    """Judge values by the right ones."""
    missing = [name for name in want if name not in got]
    errors = {name: _error(got[name], right) for name, right in want.items() if name in got}
    worst = max(errors.values(), default=math.inf)
    shown = worst if math.isfinite(worst) else None
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return Cell("missing", shown, f"no value for {', '.join(missing[:3])}{more}")
    if worst <= TARGET:
        return Cell("exact", shown, note)
    if shown is None:
        name = max(errors, key=errors.__getitem__)
        shapes = f"{list(got[name].shape)} for {list(want[name].shape)}"
        return Cell("wrong", note=f"{name} is not finite, or has another shape: {shapes}")
    return Cell("single" if worst <= allowed else "wrong", shown, note)


def _error(value: torch.Tensor, right: torch.Tensor) -> float:
    if value.shape != right.shape:
        return math.inf
    norm = float(right.norm())
    difference = float((value.detach().to(right.dtype) - right).norm())
    error = difference / norm if norm else difference
    return math.inf if math.isnan(error) else error


def raised(error: BaseException) -> Cell:
    """The first line of an error, without the addresses and paths that differ between machines."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"0x[0-9a-f]+|(?<![\w.])/[\w./-]+/", "...", lines[0])
    text = f"{type(error).__name__}: {text}".rstrip(": ")
    return Cell("error", note=text if len(text) <= 160 else text[:157] + "...")


def ours(problem: Problem, loss: Loss, kind: str) -> Cell:
    """``fisher_diag`` against the definition."""
    own = problem.with_own_model()
    try:
        result = fisher_diag(
            own.model,
            [(own.inputs, own.targets)],
            loss=loss.given,
            kind=kind,
            samples=DRAWS,
            generator=generator(),
            reduction="sum",
        )
    except (RuntimeError, ValueError) as error:
        return raised(error)
    slow = [name for name, rule in result.rules.items() if rule.startswith("fallback")]
    note = f"fallback: {', '.join(slow)}" if slow else ""
    return compare(result, loss.values(problem, kind), note)


def theirs(rival: Rival, problem: Problem, want: Values) -> Cell:
    """The best that a rival does, with any of its options, in float64 or at least in float32."""
    cells = []
    for dtype in (torch.float64, torch.float32):
        for options in rival.candidates(problem):
            try:
                call = rival.prepare(_as(problem, dtype), options)
                cells.append(compare(call.read(call.run()), want, allowed=SINGLE))
            except ModuleNotFoundError as error:
                return Cell("absent", note=f"{error}: {rival.install}")
            except Exception as error:
                cells.append(raised(error))
    order = ("exact", "single", "wrong", "missing", "error")
    return min(cells, key=lambda cell: order.index(cell.status))


def _as(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with a model of its own, in another precision."""
    inputs = problem.inputs.to(dtype) if problem.inputs.is_floating_point() else problem.inputs
    return replace(problem, model=copy.deepcopy(problem.model).to(dtype), inputs=inputs)


def measure(
    rivals: Sequence[Rival], status: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Fill both tables.

    Args:
        rivals: the columns beside ours.
        status: called with the name of each row.

    Returns:
        What the JSON file holds.
    """
    tables: dict[str, list[dict[str, Any]]] = {"layers": [], "losses": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in LAYERS:
            status(layer.name)
            problem = layer.problem()
            want = CLASSIFICATION.values(problem, "empirical")
            tables["layers"].append(
                {
                    "name": layer.name,
                    "ours": {k: asdict(ours(problem, CLASSIFICATION, k)) for k in KINDS},
                    "rivals": {r.name: asdict(theirs(r, problem, want)) for r in rivals},
                }
            )
        for loss in LOSSES:
            status(loss.name)
            problem = loss.problem()
            cells = {k: asdict(ours(problem, loss, k)) for k in KINDS}
            tables["losses"].append({"name": loss.name, "ours": cells})
    machine = environment()
    kept = ("date", "fastfisher", "kernels", "torch", "commit")
    return {
        "schema": _SCHEMA,
        "target": TARGET,
        "environment": {name: machine[name] for name in kept},
        "rivals": {rival.name: _release(rival) for rival in rivals},
        **tables,
    }


def _release(rival: Rival) -> str:
    """The library that a rival comes from, and which release of it."""
    distribution = rival.install.split()[2] if rival.install else "torch"
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return f"{distribution}, {_ABSENT}"


# -- the page ------------------------------------------------------------------------------------


class Notes:
    """Messages of a table, each numbered once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """The number that stands for a message."""
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def __str__(self) -> str:
        # In code spans: nothing in a message is Markdown.
        lines = (f"{n}. `{text.replace('`', chr(39))}`" for text, n in self._numbers.items())
        return "\n".join(lines)


_PAGE = """\
# Exactness

<!-- Written by `python benchmarks/exactness.py --save` from exactness.json. -->

Every parameter of a tiny model around each layer, in float64, against the definition: a loop of
single-sample backward passes, over all targets where the kind is an expectation. A number is the
largest relative error of a parameter, in norm; up to {target:.0e} is rounding.

## Layers

`fisher_diag` with each kind, then what others give for the first, with the observed labels.
**wrong**: a number, without a warning, that is not the one defined. **missing**: some parameters
get no number. **error**: it raises. **exact in float32**: right, but with the error of single
precision, or not at all in double. † some parameters need the slower `torch.func` fallback.

{layers}

{layer_notes}

## Losses

`fisher_diag` alone. **refused**: the kind is not defined for the loss, or not offered, and the call
says so. `mc` draws {draws} targets a sample; the definition is given the same ones.

{losses}

{loss_notes}

## Conditions

fastfisher {e[fastfisher]} ({e[kernels]}), torch {e[torch]}, commit {e[commit]}, {e[date]}.
Others: {rivals}.
Each is called as in the benchmarks, with the option that is right where it has several.
"""


def page(document: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON document."""
    layers, losses, rivals = document["layers"], document["losses"], document["rivals"]
    notes, loss_notes = Notes(), Notes()
    kinds = [f"`{kind}`" for kind in KINDS]
    rows = [
        [row["name"]]
        + [_number(cell, notes) for cell in row["ours"].values()]
        + [_verdict(cell, notes) for cell in row["rivals"].values()]
        for row in layers
    ]
    columns = [[row["ours"][kind]["status"] for row in layers] for kind in KINDS]
    columns += [[row["rivals"][name]["status"] for row in layers] for name in rivals]
    counts = [column.count("exact") + column.count("single") for column in columns]
    rows.append(["**exact**", *(f"**{count} of {len(layers)}**" for count in counts)])
    loss_rows = [
        [row["name"], *(_number(cell, loss_notes) for cell in row["ours"].values())]
        for row in losses
    ]
    return _PAGE.format(
        target=document["target"],
        draws=DRAWS,
        e=document["environment"],
        layers=_table(["layer", *kinds, *rivals], rows),
        layer_notes=notes,
        losses=_table(["loss", *kinds], loss_rows),
        loss_notes=loss_notes,
        rivals="; ".join(f"{name} is {release}" for name, release in rivals.items()),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _number(cell: Mapping[str, Any], notes: Notes) -> str:
    if cell["status"] == "error":
        return f"refused {notes.mark(cell['note'])}"
    if cell["status"] != "exact":
        return _verdict(cell, notes)
    return f"{cell['error']:.0e}{' †' if cell['note'] else ''}"


def _verdict(cell: Mapping[str, Any], notes: Notes) -> str:
    error = "" if cell["error"] is None else f" {cell['error']:.2g}"
    match cell["status"]:
        case "exact":
            return "exact"
        case "single":
            return "exact in float32"
        case "absent":
            return "–"
        case "wrong":
            return f"**wrong**{error or ' ' + notes.mark(cell['note'])}"
        case "missing":
            wrong = cell["error"] is not None and cell["error"] > TARGET
            more = f", **wrong**{error}" if wrong else ""
            return f"missing {notes.mark(cell['note'])}{more}"
    return f"error {notes.mark(cell['note'])}"


# -- the command ---------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when ``fisher_diag`` was wrong anywhere, or raised for a layer.
    """
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="benchmarks/exactness.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--save", action="store_true", help="write the page and its numbers")
    choice.add_argument("--from-json", action="store_true", help="write the page; measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.from_json:
        document = json.loads(NUMBERS.read_text(encoding="utf-8"))
    else:
        rivals = [rival for name, rival in RIVALS.items() if name not in NOT_ASKED]
        document = measure(rivals, _status)
        _status("")
        absent = [
            release for release in document["rivals"].values() if release.endswith("installed")
        ]
        if absent:
            print(f"their columns stay empty: {'; '.join(absent)}", file=sys.stderr)
    if arguments.save:
        write(NUMBERS, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if arguments.save or arguments.from_json:
        write(PAGE, page(document))
    else:
        print(page(document))
    return int(bool(_bad(document)))


def _bad(document: Mapping[str, Any]) -> list[str]:
    """Rows in which ours is not what it should be."""
    rows = [(row["name"], c, True) for row in document["layers"] for c in row["ours"].values()]
    rows += [(row["name"], c, False) for row in document["losses"] for c in row["ours"].values()]
    allowed = {True: {"exact"}, False: {"exact", "error"}}
    return [name for name, cell, layer in rows if cell["status"] not in allowed[layer]]


def _status(text: str) -> None:
    """Show what is being done, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
