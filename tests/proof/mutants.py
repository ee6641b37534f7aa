"""Seeded bugs: whether each is caught by the rung of the proof ladder that is there for its kind.

A family lists its bugs in ``MUTANTS`` of ``mutants_<family>.py``. Each is put into a copy of the
sources, of which only the file that has changed is built, and the kernel's proof cases are run as
the rung does until one fails. Caught means that an assertion, a checker's report or a failed launch
says so; a bug that does not compile is an error of the list, and so is a case that fails without
the bug.

    python -m tests.proof.mutants [--match WORD] [--save FILE.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch

from ..emulation import build
from ..emulation.checked import checked
from .case import Case
from .collection import collect, modules

Rung = Literal["values", "cucheck", "asan", "ptxsim", "interpreter", "guard", "static"]

#: Rungs whose environment has to be set before Python starts.
SEPARATE: dict[Rung, Callable[[], dict[str, str]]] = {
    "asan": build.sanitizer_environment,
    "interpreter": lambda: {**os.environ, "TRITON_INTERPRET": "1"},
    "guard": lambda: {**os.environ, "TRITON_INTERPRET": "1"},
}
#: Seconds after which a bug that keeps a kernel from ending counts as survived.
TIME_LIMIT = 400


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug, as a change of a source's text.

    Attributes:
        name: what is wrong; unique.
        kernel: the proof cases to run: those whose ``kernel`` this is.
        file: path from the repository's root, in ``csrc`` or ``fastfisher/triton``.
        old: text that occurs exactly once in the file.
        new: what takes its place.
        rung: which has to catch it.
    """

    name: str
    kernel: str
    file: str
    old: str
    new: str
    rung: Rung


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        caught: whether the rung said that something is wrong.
        case: the proof case that failed, and in which order of threads.
        by: the first line of what was said.
    """

    name: str
    kernel: str
    file: str
    rung: Rung
    caught: bool
    case: str
    by: str
    seconds: float


def all_mutants() -> list[Mutant]:
    """The bugs of every family."""
    return [each for family in modules() for each in getattr(family, "MUTANTS", [])]


def cases_of(kernel: str) -> list[Case]:
    """The proof cases of a kernel, those first that are cheap.

    Raises:
        ValueError: there are none.
    """
    cases = [case for case in collect() if case.kernel == kernel]
    if not cases:
        raise ValueError(f"no proof case is of the kernel {kernel}")
    return sorted(cases, key=lambda case: not case.small)


def apply(mutant: Mutant, root: Path) -> None:
    """Changes the file of a copy of the repository.

    Raises:
        ValueError: the text to change does not occur exactly once.
    """
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {text.count(mutant.old)} times")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def _ways(rung: Rung, sources: Path, namespace: str) -> Iterator[tuple[str, Any, Any]]:
    """How a rung runs each case: the way's name, the operators, and a context to run in."""
    if rung == "values":
        library = build.load("plain", sources, namespace)
        for order in build.ORDERS:
            context = build.scheduling(order, seed=7, library=library)
            yield order, build.emulated("plain", sources, namespace), context
    elif rung == "cucheck":
        yield "cucheck", checked(sources, namespace), nullcontext()
    elif rung == "asan":
        yield "sanitizers", build.emulated("sanitized", sources, namespace), nullcontext()
    elif rung == "ptxsim":
        from ..emulation.ptx import replayed

        yield "ptx", replayed(sources, namespace), nullcontext()
    elif rung in ("interpreter", "guard"):
        yield rung, *_interpreted(rung)


def _interpreted(rung: Rung) -> tuple[Any, AbstractContextManager[Any]]:
    importlib.import_module("fastfisher.triton")
    from ..emulation.interpreter import Interpreted, guarded

    return Interpreted(), guarded(checks=rung == "guard")


def first_failure(
    rung: Rung, cases: Sequence[Case], sources: Path, namespace: str
) -> tuple[str, str] | None:
    """Runs cases until one fails: its name and way, and what was said.

    Args:
        rung: how they are run.
        cases: of the kernel.
        sources: the directory ``csrc``, or a copy of it with a bug.
        namespace: for the operators that are built from it.
    """
    for way, operators, context in _ways(rung, sources, namespace):
        with context:
            for case in cases:
                try:
                    case.run(operators)
                except (AssertionError, RuntimeError, IndexError) as error:
                    return f"{case.name} ({way})", str(error) or type(error).__name__
    return None


def _in_a_process(rung: Rung, kernel: str, root: Path, case: str = "") -> tuple[str, str] | None:
    """:func:`first_failure` in an environment of the rung's own."""
    command = [sys.executable, "-m", "tests.proof.mutants", "--attempt", rung, kernel, case]
    done = subprocess.run(command, cwd=root, env=SEPARATE[rung](), capture_output=True, text=True)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("["):
            where, said = json.loads(line)
            return where, said
    if done.returncode == 0:
        return None
    said = [
        line
        for line in done.stderr.splitlines()
        if "ERROR: AddressSanitizer" in line or "runtime error" in line
    ]
    if not said:
        raise RuntimeError(f"the attempt failed by itself:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1], re.sub(r"^==\d+==| on address .*", "", said[0])


def _attempt(rung: Rung, kernel: str, case: str) -> None:
    """What a process of a rung's own does, in the root of a copy of the repository."""
    # A sanitizer ends the process, which is why each case is named before it runs.
    for each in cases_of(kernel):
        if case in ("", each.name):
            print(each.name, flush=True)
            failure = first_failure(rung, [each], Path("csrc").resolve(), "fastfisher_mutant")
            if failure:
                print(json.dumps(failure))
                return


def _static_failure(mutant: Mutant, root: Path) -> tuple[str, str] | None:
    """Whether a budget is exceeded, in a process that checks the copy's kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["tests/test_gpu_static.py", "-k", mutant.kernel]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "E  "))]
    return ("budget", failed[0]) if done.returncode == 1 and failed else None


def _copy(root: Path) -> None:
    """What a mutant may change, and the tests; links to what none does."""
    for name in ("csrc", "fastfisher", "tests"):
        shutil.copytree(
            build.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "build"):
        (root / name).symlink_to(build.ROOT / name)


def judge(mutant: Mutant) -> Outcome:
    """Whether a mutant is caught. To be called in a process of its own.

    Raises:
        RuntimeError: the mutant does not compile, or the case fails without it, too.
    """
    start = time.monotonic()
    rung = mutant.rung
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        root = Path(directory)
        _copy(root)
        apply(mutant, root)
        if rung == "static":
            failure = _static_failure(mutant, root)
        elif rung in SEPARATE:
            failure = _in_a_process(rung, mutant.kernel, root)
        else:
            cases = cases_of(mutant.kernel)
            failure = first_failure(rung, cases, root / "csrc", "fastfisher_mutant")
        if failure:
            _require_right_without(mutant, failure[0])
    seconds = round(time.monotonic() - start, 1)
    where, said = failure or ("", "")
    by = said.replace(directory + "/", "").splitlines()[0] if said else ""
    return Outcome(
        mutant.name, mutant.kernel, mutant.file, rung, failure is not None, where, by, seconds
    )


def _require_right_without(mutant: Mutant, where: str) -> None:
    """The case that failed passes where the bug is not."""
    if mutant.rung == "static":
        return  # the test of the budgets is that
    if mutant.rung in SEPARATE:
        name = where.removesuffix(f" ({mutant.rung})").removesuffix(" (sanitizers)")
        failure = _in_a_process(mutant.rung, mutant.kernel, build.ROOT, name)
    else:
        cases = [each for each in cases_of(mutant.kernel) if where.startswith(f"{each.name} (")]
        failure = first_failure(mutant.rung, cases, build.SOURCES, "fastfisher_original")
    if failure:
        raise RuntimeError(f"{mutant.name}: {where} fails without the bug, too: {failure[1]}")


def _judge_into(connection: Connection, mutant: Mutant) -> None:
    # A fork has none of the threads that torch would wait for.
    torch.set_num_threads(1)
    try:
        connection.send(judge(mutant))
    except BaseException:
        connection.send(traceback.format_exc())


_BUILDS: dict[Rung, build.Kind] = {
    "values": "plain",
    "ptxsim": "plain",
    "cucheck": "checked",
    "asan": "sanitized",
}


def judge_all(
    mutants: Sequence[Mutant],
    processes: int = 2,
    seen: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Judges mutants, several at a time, each in a process of its own.

    Args:
        mutants: in which order they start.
        processes: how many run at a time.
        seen: called with each outcome as it comes.

    Raises:
        RuntimeError: a mutant could not be judged.
    """
    # What no mutant changes is built once, and in no mutant's time.
    for kind in sorted({_BUILDS[each.rung] for each in mutants if each.rung in _BUILDS}):
        for namespace in ("fastfisher_mutant", "fastfisher_original"):
            build.build(kind, build.SOURCES, namespace)
    # A fork has torch and the cases already, which take longer to load than most mutants to run.
    context = multiprocessing.get_context("fork")
    waiting = deque(mutants)
    running: dict[Connection, tuple[Any, Mutant, float]] = {}
    outcomes: list[Outcome] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                mutant = waiting.popleft()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_judge_into, args=(there, mutant))
                process.start()
                there.close()
                running[here] = (process, mutant, time.monotonic())
            ready = wait(list(running), timeout=1)
            for connection, (process, mutant, start) in list(running.items()):
                late = time.monotonic() - start > TIME_LIMIT
                if connection not in ready and not late:
                    continue
                del running[connection]
                outcome = _received(connection, process, mutant, start)
                outcomes.append(outcome)
                seen(outcome)
    finally:
        for process, _, _ in running.values():
            process.kill()
    return outcomes


def _received(connection: Connection, process: Any, mutant: Mutant, start: float) -> Outcome:
    """The outcome that a process sent, or what it means that it sent none."""
    survived = (mutant.name, mutant.kernel, mutant.file, mutant.rung, False, "")
    seconds = round(time.monotonic() - start, 1)
    if not connection.poll():
        process.kill()
        process.join()
        return Outcome(*survived, f"no end after {TIME_LIMIT} s", seconds)
    try:
        received = connection.recv()
    except EOFError:
        process.join()
        return Outcome(*survived, f"the process ended with {process.exitcode}", seconds)
    process.join()
    if isinstance(received, Outcome):
        return received
    raise RuntimeError(f"{mutant.name} could not be judged:\n{received}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judges all mutants, or those whose name or kernel has a word; 0 where all are caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="part of a mutant's name, kernel or rung")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path, help="JSON file whose entry `mutants` is replaced")
    parser.add_argument("--attempt", nargs=3, metavar=("RUNG", "KERNEL", "CASE"), help="internal")
    options = parser.parse_args(arguments)
    if options.attempt:
        _attempt(*options.attempt)
        return 0
    chosen = [
        each
        for each in all_mutants()
        if any(options.match in part for part in (each.name, each.kernel, each.rung))
    ]

    def show(outcome: Outcome) -> None:
        verdict = "caught" if outcome.caught else "SURVIVED"
        print(
            f"{verdict:8} {outcome.seconds:6.1f} s  {outcome.rung:11} {outcome.kernel}: "
            f"{outcome.name}: {outcome.by[:140]}",
            flush=True,
        )

    outcomes = judge_all(chosen, options.processes, show)
    caught = sum(each.caught for each in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    if options.save:
        text = options.save.read_text(encoding="utf-8") if options.save.exists() else "{}"
        order = {each.name: i for i, each in enumerate(chosen)}
        rows = [asdict(each) for each in sorted(outcomes, key=lambda each: order[each.name])]
        proof = json.loads(text) | {"mutants": rows}
        options.save.write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
