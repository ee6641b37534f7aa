"""Compare ways of computing the diagonal Fisher of a batch: time, memory and error in one table.

    python benchmarks/run.py                        all cases, all contenders: an hour
    python benchmarks/run.py --quick                a smoke run: batches of 4, no memory
    python benchmarks/run.py --cases vgg16_bn --contenders fisher_diag,torch_func --threads 1,2
    python benchmarks/run.py --save --threads 1,2 --cases gpt        adds to the results in git
    python benchmarks/run.py --save --threads 1,2 --resume           measures what they lack
    python benchmarks/run.py --from-json benchmarks/results/latest-2t.json --figure vgg.svg
    python benchmarks/run.py --from-json benchmarks/results/all-*.json --models models.md
    python benchmarks/run.py --list

What is measured, and how, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import markdown, report
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
        chosen = _chosen(arguments, cases, rivals)
        if arguments.from_json is not None:
            _present(arguments, chosen)
            return 0
        return _measure(arguments, command, chosen, cases, rivals)
    except (OSError, ValueError) as error:
        parser.error(str(error))


@dataclass(frozen=True)
class Chosen:
    """What the options name."""

    cases: list[Case]
    rivals: list[Rival]
    layouts: list[str]

    def tables(self) -> Iterator[tuple[Case, str]]:
        """Each case in each of its layouts; one with a single layout has no choice to make."""
        for case in self.cases:
            for layout in case.layouts:
                if layout in self.layouts or len(case.layouts) == 1:
                    yield case, layout

    def has(self, row: Row) -> bool:
        """Whether a stored row is among them."""
        return (
            row.contender in {rival.name for rival in self.rivals}
            and row.case in {case.name for case in self.cases}
            and (row.layout in self.layouts or row.layout not in IMAGE_LAYOUTS)
        )


def _chosen(
    arguments: argparse.Namespace, cases: Mapping[str, Case], rivals: Mapping[str, Rival]
) -> Chosen:
    contenders = _named(arguments.contenders, rivals, "--contenders")
    if rivals[PLAIN] not in contenders:
        contenders.insert(0, rivals[PLAIN])
    layouts = _named(arguments.layouts, {name: name for name in IMAGE_LAYOUTS}, "--layouts")
    return Chosen(_named(arguments.cases, cases, "--cases"), contenders, layouts)


def _present(arguments: argparse.Namespace, chosen: Chosen) -> None:
    """Show or draw stored runs."""
    stored = [report.read_json(path) for path in arguments.from_json]
    if arguments.models is not None:
        markdown.update_marked(arguments.models, markdown.models(stored))
    if arguments.readme is not None:
        table = markdown.short(_only(stored, "--readme"))
        markdown.update_marked(arguments.readme, table)
    shown = stored
    if arguments.cases or arguments.contenders or arguments.layouts:
        shown = [(machine, c, [r for r in rows if chosen.has(r)]) for machine, c, rows in stored]
    for machine, _, rows in shown:
        _show(machine, rows)
    if arguments.csv is not None:
        machine, _, rows = _only(shown, "--csv")
        report.write_csv(arguments.csv, machine, rows)
    if arguments.figure is not None:
        report.draw(arguments.figure, *_only(shown, "--figure"))


def _only(runs: list[report.Run], option: str) -> report.Run:
    if len(runs) != 1:
        raise ValueError(f"{option}: expected one file after --from-json, got {len(runs)}")
    return runs[0]


def _measure(
    arguments: argparse.Namespace,
    command: str,
    chosen: Chosen,
    cases: Mapping[str, Case],
    rivals: Mapping[str, Rival],
) -> int:
    settings = _settings(arguments)
    threads = arguments.threads or [torch.get_num_threads()]
    _check_options(arguments, threads)
    # All files are looked at before anything is measured.
    records = []
    for count in threads:
        torch.set_num_threads(count)
        records.append(_record(arguments, command))
    measured: list[Row] = []
    code = 0
    try:
        for count, record in zip(threads, records, strict=True):
            torch.set_num_threads(count)
            print(report.header(record.machine))
            for case, layout in chosen.tables():
                if arguments.resume and record.has(case.name, layout, chosen.rivals):
                    continue
                latest = measure_case(case, layout, chosen.rivals, settings, _status)
                _status("")
                print(f"\n{report.table(latest)}", flush=True)
                measured += latest
                record.rows = report.merged(record.rows, latest, list(cases), list(rivals))
                record.write()
    except KeyboardInterrupt:
        _status("")
        print("interrupted; what was measured is kept", file=sys.stderr)
        code = 130
    if measured and arguments.figure is not None:
        report.draw(arguments.figure, records[0].machine, command, measured)
    files = [path for record in records for path in (record.json, record.csv)]
    written = [str(path) for path in (*files, arguments.figure) if path is not None]
    if measured and written:
        print(f"\nwritten: {', '.join(written)}")
    bad = [row for row in measured if row.contender == report.OURS and row.status != "ok"]
    return code or int(bool(bad))


def _check_options(arguments: argparse.Namespace, threads: Sequence[int]) -> None:
    if arguments.readme is not None or arguments.models is not None:
        raise ValueError("--readme and --models: expected with --from-json")
    if arguments.quick and arguments.save:
        raise ValueError("--save: expected without --quick, whose batches are not the cases'")
    if arguments.resume and not arguments.save:
        raise ValueError("--resume: expected with --save, whose file says what is there")
    if len(threads) > 1 and (arguments.json or arguments.csv or arguments.figure):
        raise ValueError("--threads: expected one number with --json, --csv or --figure")
    if arguments.figure is not None:
        _check_writable(arguments.figure)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--figure needs matplotlib: pip install matplotlib")


@dataclass
class Record:
    """The rows of one number of threads, and the files they go to after every table."""

    machine: report.Environment
    command: str
    json: Path | None
    csv: Path | None
    rows: list[Row]

    def has(self, case: str, layout: str, rivals: Sequence[Rival]) -> bool:
        """Whether a table is there, with a row for each rival whose library was."""
        rows = [row for row in self.rows if (row.case, row.layout) == (case, layout)]
        there = {row.contender for row in rows if row.status != "absent"}
        return there.issuperset(rival.name for rival in rivals)

    def write(self) -> None:
        if self.json is not None:
            report.write_json(self.json, self.machine, self.command, self.rows)
        if self.csv is not None:
            report.write_csv(self.csv, self.machine, self.rows)


def _record(arguments: argparse.Namespace, command: str) -> Record:
    """With ``--save``, the stored rows to add to.

    Raises:
        ValueError: they were measured on something else, or a file cannot be written.
    """
    machine = environment()
    json_path, csv_path = _destinations(arguments, machine)
    for path in (json_path, csv_path):
        _check_writable(path)
    record = Record(machine, command, json_path, csv_path, [])
    if arguments.save and json_path is not None and json_path.exists():
        stored, commands, record.rows = report.read_json(json_path)
        other = [
            f"{key} {stored.get(key)!r}, now {machine.get(key)!r}"
            for key in sorted(stored.keys() | machine.keys())
            if key != "date" and stored.get(key) != machine.get(key)
        ]
        if other:
            raise ValueError(
                f"--save: {json_path} was measured with {'; '.join(other)}; expected the same, as "
                "new rows join those of the file. Move it away to begin anew"
            )
        record.command = "\n".join(dict.fromkeys([*commands.splitlines(), command]))
    return record


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
    add("--threads", type=_counts, metavar="N,M", help="one run each; default: torch's own choice")
    add("--rounds", type=_positive, metavar="R", help="timed rounds; default: 9")
    add(
        "--budget",
        type=_positive_seconds,
        metavar="S",
        help="seconds for each slow contender per table, 3 rounds at least; default: 15",
    )
    add("--no-memory", action="store_true", help="skip the fresh process per contender")
    add("--quick", action="store_true", help="batches of 4, 3 rounds, no memory, no latest.*")
    add("--json", type=Path, metavar="F", help="default: benchmarks/results/latest-<N>t.json")
    add("--csv", type=Path, metavar="F", help="default: benchmarks/results/latest-<N>t.csv")
    add("--save", action="store_true", help="add to benchmarks/results/all-<processor>-<N>t.*")
    add("--resume", action="store_true", help="with --save: leave out the tables that are there")
    add("--figure", type=Path, metavar="F.svg", help="draw the ratios (needs matplotlib)")
    add(
        "--from-json",
        type=Path,
        metavar="F",
        nargs="+",
        help="show or draw stored runs, as far as --cases, --contenders and --layouts name them",
    )
    add("--readme", type=Path, metavar="F", help="with --from-json: put the short table into F")
    add("--models", type=Path, metavar="F", help="with --from-json: put all tables into F")
    add("--list", action="store_true", help="list cases and contenders")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(_positive(part) for part in text.split(",")))


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
    arguments: argparse.Namespace, machine: report.Environment
) -> tuple[Path | None, Path | None]:
    """Where JSON and CSV go; nowhere for a quick run that does not ask."""
    stem = None if arguments.quick else RESULTS / f"latest-{machine['threads']}t"
    if arguments.save:
        stem = RESULTS / f"all-{slug(str(machine['cpu']))}-{machine['threads']}t"
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
