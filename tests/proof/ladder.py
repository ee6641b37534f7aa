"""Runs every rung of the proof ladder for every GPU kernel, and writes the table of what it saw.

    python -m tests.proof.ladder --save     writes docs/gpu-proof.json and docs/gpu-proof.md

Each rung runs in a process of its own, for some need another environment. What the compilers made
of the kernels is read from the budgets, which the test suite holds them to.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfisher.doctor import cpu_model
from fastfisher.files import replacing
from tests import budgets
from tests.emulation import build
from tests.emulation.checked import checked
from tests.emulation.launches import noting
from tests.emulation.ptx import replayed

from . import mutants
from .case import Case, first_small
from .collection import collect

DATA = build.ROOT / "docs" / "gpu-proof.json"
PAGE = build.ROOT / "docs" / "gpu-proof.md"

#: Rungs of CUDA kernels, and of Triton's, with the headings of their columns.
CUDA = {
    "values": "values, 3 orders of threads",
    "cucheck": "races, bounds, uninitialised",
    "sanitized": "address and UB sanitizers",
    "ptx": "compiled PTX simulated",
}
TRITON = {"interpreter": "interpreter, guarded", "triton_ptx": "compiled PTX simulated"}
#: Small cases of a kernel that the simulators of compiled code run.
_SIMULATED = 4

#: Cases and their largest relative error, per kernel.
Row = dict[str, Any]


def _rows(runs: Iterable[tuple[Iterable[str], float]]) -> dict[str, Row]:
    """Of cases: the kernels that each has launched, and its error; exact results have none."""
    rows: dict[str, Row] = defaultdict(lambda: {"cases": 0, "error": 0.0})
    for kernels, error in runs:
        for kernel in {_plain(each) for each in kernels}:
            rows[kernel]["cases"] += 1
            rows[kernel]["error"] = max(rows[kernel]["error"], error or 0.0)
    return dict(rows)


def _plain(kernel: str) -> str:
    """A kernel's name without return type, namespaces and arguments."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name)[0].split("::")[-1]


def _emulated_runs(
    kind: build.Kind, cases: Iterable[Case], operators: Any
) -> Iterator[tuple[list[str], float]]:
    for case in cases:
        with noting(kind, run=True) as launches:
            error = case.run(operators)
        yield [each.kernel for each in launches], error


def _values() -> dict[str, Row]:
    cases, operators = collect(), build.emulated()
    rows = _rows(_emulated_runs("plain", cases, operators))
    for order in ("reverse", "random"):
        for case in cases:
            with build.scheduling(order, seed=7, library=build.load("plain")):
                case.run(operators)
    return rows


def _cucheck() -> dict[str, Row]:
    return _rows(_emulated_runs("checked", collect(small=True), checked()))


def _sanitized() -> dict[str, Row]:
    operators = build.emulated("sanitized")
    return _rows(_emulated_runs("sanitized", collect(small=True), operators))


def _ptx() -> dict[str, Row]:
    operators = replayed()

    def runs() -> Iterator[tuple[list[str], float]]:
        for case in first_small(collect(), _SIMULATED):
            operators.launches.clear()
            error = case.run(operators)
            yield operators.launches, error

    return _rows(runs())


def _interpreter() -> dict[str, Row]:
    from fastfisher.triton import launch

    from .. import test_triton
    from ..emulation.interpreter import Interpreted, guarded

    def runs() -> Iterator[tuple[list[str], float]]:
        for case in test_triton.CASES:
            with guarded(), launch.recording() as made:
                error = case.run(Interpreted())
            yield [each.kernel.__name__ for each in made], error

    return _rows(runs())


def _triton_ptx() -> dict[str, Row]:
    command = [sys.executable, "-m", "tests.emulation.triton_ptx", "--per-kernel", str(_SIMULATED)]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    found = map(json.loads, done.stdout.splitlines())
    return _rows((each["kernels"], each["error"]) for each in found)


_RUNGS: dict[str, Callable[[], dict[str, Row]]] = {
    "values": _values,
    "cucheck": _cucheck,
    "sanitized": _sanitized,
    "ptx": _ptx,
    "interpreter": _interpreter,
    "triton_ptx": _triton_ptx,
}


def _environment(rung: str) -> Mapping[str, str]:
    if rung == "sanitized":
        return build.sanitizer_environment()
    if rung == "interpreter":
        return {**os.environ, "TRITON_INTERPRET": "1"}
    return {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}


def in_a_process(rung: str) -> dict[str, Any]:
    """A rung's rows and its seconds.

    Raises:
        RuntimeError: a case failed.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.proof.ladder", "--rung", rung]
    done = subprocess.run(
        command, cwd=build.ROOT, env=_environment(rung), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the rung {rung} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": round(time.monotonic() - start), "kernels": rows}


def _compiled() -> list[Row]:
    """One row for each source: instances, architectures, registers."""
    rows = []
    for path in sorted(budgets.FOLDER.glob("*.json")):
        kernels = budgets.read(path.stem)
        architectures = sorted({int(a[3:]) for each in kernels.values() for a in each})
        most = [
            max(each[f"sm_{a}"]["registers"] for each in kernels.values() if f"sm_{a}" in each)
            for a in architectures
        ]
        rows.append(
            {
                "source": path.stem,
                "kernels": len(kernels),
                "architectures": architectures,
                "registers": most,
            }
        )
    return rows


def run(bugs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Runs all rungs, and all seeded bugs unless their outcomes are given."""
    rungs = {}
    for name in _RUNGS:
        rungs[name] = in_a_process(name)
        print(f"{name}: {rungs[name]['seconds']} s", flush=True)
    return {
        "processor": cpu_model(),
        "rungs": rungs,
        "compiled": _compiled(),
        **(bugs or _seeded_bugs()),
    }


def _seeded_bugs() -> dict[str, Any]:
    start = time.monotonic()
    outcomes = mutants.judge_all(mutants.all_mutants())
    rows = [
        {
            "name": each.name,
            "kernel": each.kernel,
            "file": each.file,
            "rung": each.rung,
            "caught": each.caught,
        }
        for each in sorted(outcomes, key=lambda each: (each.file, each.kernel, each.name))
    ]
    return {"mutants": rows, "mutant_seconds": round(time.monotonic() - start)}


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['cases']}, {row['error']:.0e}" if row["error"] else f"{row['cases']}, exact"


def _ladder(data: Mapping[str, Any], columns: Mapping[str, str], of: str) -> list[str]:
    rungs = data["rungs"]
    kernels = sorted({kernel for rung in columns for kernel in rungs[rung]["kernels"]})
    bugs: dict[str, list[bool]] = defaultdict(list)
    for each in data["mutants"]:
        if each["file"].startswith(of):
            bugs[each["kernel"]].append(each["caught"])
    lines = [
        f"| kernel | {' | '.join(columns.values())} | seeded bugs caught |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for kernel in kernels:
        cells = [_cell(rungs[rung]["kernels"].get(kernel)) for rung in columns]
        caught = bugs.pop(kernel, [])
        cells.append(f"{sum(caught)} of {len(caught)}" if caught else "")
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    for kernel, caught in sorted(bugs.items()):
        blank = " | ".join("" for _ in columns)
        lines.append(f"| by the cases of `{kernel}` | {blank} | {sum(caught)} of {len(caught)} |")
    return lines


def page(data: Mapping[str, Any]) -> str:
    """The page of the table."""
    seconds = ", ".join(f"{name} {each['seconds']} s" for name, each in data["rungs"].items())
    caught = [each for each in data["mutants"] if each["caught"]]
    lines = [
        "# What each GPU kernel was put through",
        "",
        "**No kernel has run on a GPU.** Every cell is from a run of `python -m tests.proof.ladder "
        "--save`, on a CPU; [what the rungs are, and what they cannot see](gpu.md). A cell gives "
        "the number of proof cases and their largest relative error to the float64 oracle, cases "
        "in bfloat16 and TF32 included. A case counts for each kernel that it launches; the masks "
        "of the selection are compared bit for bit.",
        "",
        "## CUDA",
        "",
        *_ladder(data, CUDA, "csrc"),
        "",
        "## Triton",
        "",
        "Seeded bugs are listed under the kernel, or the group of them, whose cases judge them.",
        "",
        *_ladder(data, TRITON, "fastfisher"),
        "",
        "## Compiled",
        "",
        "No instance spills or has local memory: `tests/test_gpu_static.py` holds each to its "
        "budget. Registers are the budgets' largest, 8 above what was needed when they were "
        "recorded. Of Triton, an instance is a kernel with a choice of blocks and a kind of call.",
        "",
        "| source | instances | architecture: registers |",
        "|---|---|---|",
        *(
            f"| {row['source']} | {row['kernels']} | "
            + ", ".join(
                f"sm_{a}: {r}" for a, r in zip(row["architectures"], row["registers"], strict=True)
            )
            + " |"
            for row in data["compiled"]
        ),
        "",
        f"## Seeded bugs: {len(caught)} of {len(data['mutants'])} caught",
        "",
        "Each in a copy of the sources, judged by the rung that is there for its kind.",
        "",
        "| bug | file | caught by |",
        "|---|---|---|",
        *(
            f"| {each['name']} | `{each['file']}` | "
            f"{each['rung'] if each['caught'] else '**survived** ' + each['rung']} |"
            for each in data["mutants"]
        ),
        "",
        f"{data['processor']}; {seconds}; seeded bugs {data['mutant_seconds']} s.",
        "",
    ]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where a seeded bug survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof.ladder", description=__doc__)
    parser.add_argument("--save", action="store_true", help="write the page in docs")
    parser.add_argument(
        "--keep-bugs", action="store_true", help="take the outcomes of seeded bugs from docs"
    )
    parser.add_argument("--rung", choices=_RUNGS, help="run this one here, and print JSON")
    options = parser.parse_args(arguments)
    if options.rung:
        importlib.import_module("torch").set_num_threads(1)
        print(json.dumps(_RUNGS[options.rung]()))
        return 0
    bugs = None
    if options.keep_bugs:
        saved = json.loads(DATA.read_text(encoding="utf-8"))
        bugs = {name: saved[name] for name in ("mutants", "mutant_seconds")}
    data = run(bugs)
    if options.save:
        _write(DATA, json.dumps(data, indent=1) + "\n")
        _write(PAGE, page(data))
    else:
        print(page(data))
    return int(not all(each["caught"] for each in data["mutants"]))


if __name__ == "__main__":
    sys.exit(main())
