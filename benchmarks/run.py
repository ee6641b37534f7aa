"""Compare ways of computing the diagonal Fisher of a batch: time, memory and error in one table.

    python benchmarks/run.py                        all cases, all contenders, a few minutes
    python benchmarks/run.py --quick                a smoke run: batches of 4, no memory
    python benchmarks/run.py --cases vgg16_bn --contenders fisher_diag,torch_func --threads 2
    python benchmarks/run.py --save --figure vgg.svg
    python benchmarks/run.py --from-json benchmarks/results/latest.json --figure vgg.svg
    python benchmarks/run.py --list

What is measured, and how, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.machine import environment, slug
from benchmarks.measure import Row, Settings, measure_case
from benchmarks.registry import CASES, IMAGE_LAYOUTS, Case
from benchmarks.rivals import PLAIN, RIVALS, Rival

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = Settings(rounds=3, budget=1.0, memory=False, batch=4)

T = TypeVar("T")


def main(
    argv: Sequence[str] | None = None,
    *,
    cases: Mapping[str, Case] = CASES,
    rivals: Mapping[str, Rival] = RIVALS,
) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process when ``None``.
        cases: what ``--cases`` may name.
        rivals: what ``--contenders`` may name; must have the plain pass.

    Returns:
        0; 1 when ``fisher_diag`` ran and was wrong or failed; 130 when interrupted.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        if arguments.list:
            print(_listing(cases, rivals))
            return 0
        if arguments.readme is not None and arguments.from_json is None:
            raise ValueError("--readme: expected with --from-json")
        if arguments.from_json is not None:
            stored, command, rows = report.read_json(arguments.from_json)
            _show(stored, rows)
        else:
            return _measure(arguments, command, cases, rivals)
        if arguments.csv is not None:
            report.write_csv(arguments.csv, stored, rows)
        if arguments.figure is not None:
            report.draw(arguments.figure, stored, command, rows)
        if arguments.readme is not None:
            report.update_readme(arguments.readme, report.markdown(stored, command, rows))
        return 0
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _measure(
    arguments: argparse.Namespace,
    command: str,
    cases: Mapping[str, Case],
    rivals: Mapping[str, Rival],
) -> int:
    chosen = _named(arguments.cases, cases, "--cases")
    contenders = _named(arguments.contenders, rivals, "--contenders")
    if rivals[PLAIN] not in contenders:
        contenders.insert(0, rivals[PLAIN])
    layouts = _named(arguments.layouts, {name: name for name in IMAGE_LAYOUTS}, "--layouts")
    settings = _settings(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    machine = environment()
    json_path, csv_path = _destinations(arguments, chosen, machine)
    for path in (json_path, csv_path, arguments.figure):
        _check_writable(path)
    if arguments.figure is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install matplotlib")

    print(report.header(machine))
    rows: list[Row] = []
    code = 0
    try:
        for case in chosen:
            # A case with one layout has no choice to make.
            own = [name for name in case.layouts if name in layouts or len(case.layouts) == 1]
            for layout in own:
                latest = measure_case(case, layout, contenders, settings, _status)
                _status("")
                print(f"\n{report.table(latest)}", flush=True)
                rows += latest
    except KeyboardInterrupt:
        _status("")
        print("interrupted; what was measured is kept", file=sys.stderr)
        code = 130
    if rows and json_path is not None:
        report.write_json(json_path, machine, command, rows)
    if rows and csv_path is not None:
        report.write_csv(csv_path, machine, rows)
    if rows and arguments.figure is not None:
        report.draw(arguments.figure, machine, command, rows)
    written = [str(p) for p in (json_path, csv_path, arguments.figure) if p is not None]
    if rows and written:
        print(f"\nwritten: {', '.join(written)}")
    bad = [row for row in rows if row.contender == report.OURS and row.status != "ok"]
    return code or int(bool(bad))


def _parser() -> argparse.ArgumentParser:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", metavar="A,B", help="default: all; see --list")
    add("--contenders", metavar="A,B", help="default: all; the plain pass always runs")
    add("--layouts", metavar="A,B", help="of image models; default: nchw,channels_last")
    add("--threads", type=_positive, metavar="N", help="default: torch's own choice")
    add("--rounds", type=_positive, metavar="R", help="timed rounds; default: 9")
    add(
        "--budget",
        type=_positive_seconds,
        metavar="S",
        help="seconds for each slow contender per table, 3 rounds at least; default: 15",
    )
    add("--no-memory", action="store_true", help="skip the fresh process per contender")
    add("--quick", action="store_true", help="batches of 4, 3 rounds, no memory, no latest.*")
    add("--json", type=Path, metavar="F", help="default: benchmarks/results/latest.json")
    add("--csv", type=Path, metavar="F", help="default: benchmarks/results/latest.csv")
    add("--save", action="store_true", help="name the results after cases and processor instead")
    add("--figure", type=Path, metavar="F.svg", help="draw the ratios (needs matplotlib)")
    add("--from-json", type=Path, metavar="F", help="show or draw a stored run; measures nothing")
    add("--readme", type=Path, metavar="F", help="with --from-json: put its table into F")
    add("--list", action="store_true", help="list cases and contenders")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _positive_seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _named(text: str | None, known: Mapping[str, T], option: str) -> list[T]:
    """The known values that a comma-separated list names; all without a list."""
    if text is None:
        return list(known.values())
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option}: no {', '.join(unknown)!r}; known: {', '.join(known)}")
    return [known[name] for name in names]


def _settings(arguments: argparse.Namespace) -> Settings:
    base = QUICK if arguments.quick else Settings()
    return Settings(
        rounds=arguments.rounds or base.rounds,
        budget=arguments.budget or base.budget,
        memory=base.memory and not arguments.no_memory,
        batch=base.batch,
    )


def _destinations(
    arguments: argparse.Namespace, chosen: Sequence[Case], machine: report.Environment
) -> tuple[Path | None, Path | None]:
    """Where JSON and CSV go; nowhere for a quick run that does not ask."""
    stem = None if arguments.quick else RESULTS / "latest"
    if arguments.save:
        cases = "-".join(case.name for case in chosen) if arguments.cases else "all"
        stem = RESULTS / f"{cases}-{slug(str(machine['cpu']))}-{machine['threads']}t"
    # Not Path.with_suffix: processors' names may have dots.
    default = {kind: stem and stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "csv")}
    return arguments.json or default["json"], arguments.csv or default["csv"]


def _check_writable(path: Path | None) -> None:
    """Fail now rather than after minutes of measuring."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}")


def _listing(cases: Mapping[str, Case], rivals: Mapping[str, Rival]) -> str:
    lines = ["cases:"]
    lines += [
        f"  {case.name:12} {case.title}; batch {case.batch}; {', '.join(case.layouts)}"
        for case in cases.values()
    ]
    lines += ["contenders:"]
    lines += [
        f"  {rival.name:12} {rival.title}" + (f" ({rival.install})" if rival.install else "")
        for rival in rivals.values()
    ]
    return "\n".join(lines)


def _show(machine: report.Environment, rows: Sequence[Row]) -> None:
    print(report.header(machine))
    for key in dict.fromkeys((row.case, row.layout) for row in rows):
        print("\n" + report.table([row for row in rows if (row.case, row.layout) == key]))


def _status(text: str) -> None:
    """Show what is being done, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
