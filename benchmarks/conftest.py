"""Options of the regression gate, and its table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import gate
from benchmarks.machine import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastfisher's regression gate")
    group.addoption("--record", action="store_true", help="write baselines instead of judging")
    group.addoption("--threads", type=int, default=1, help="torch's threads; default: 1")
    group.addoption("--rounds", type=int, default=gate.ROUNDS, help=f"default: {gate.ROUNDS}")
    group.addoption(
        "--baselines", type=Path, default=gate.BASELINES, metavar="DIR", help="where they are kept"
    )


@dataclass
class Session:
    """What the gated benchmarks share.

    Attributes:
        baselines: of this machine.
        record: write them instead of judging.
        rounds: timed rounds of each benchmark.
        work: how much of its work an operation does; above 1 is sabotage.
        lines: what the table at the end says, one line a benchmark.
    """

    baselines: gate.Baselines
    record: bool
    rounds: int
    work: float
    lines: list[str] = field(default_factory=list)


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    option = request.config.getoption
    if not option("benchmark_disable"):
        gate.keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(option("--threads"))
    work = gate.sabotage(os.environ)
    if option("--record") and work != 1:
        raise ValueError(f"--record: unset {gate.SABOTAGE} first")
    baselines = gate.Baselines(option("--baselines"), environment())
    shared = Session(baselines, option("--record"), option("--rounds"), work)
    request.config.stash[_SESSION] = shared
    yield shared
    torch.set_num_threads(before)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    shared = config.stash.get(_SESSION, None)
    if shared is not None and shared.lines:
        terminalreporter.section(f"gate: {shared.baselines.path.name}")
        terminalreporter.write_line("\n".join(shared.lines))
