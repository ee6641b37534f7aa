"""The regression gate: it passes what did not change, fails what became slower, and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gate
from benchmarks.gate import Baselines, Rounds, Samples, judge, judge_twice
from benchmarks.gated import GATED

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"cpu": "A (R) CPU", "kernels": "avx2", "threads": 2, "torch": "2.14.1+cpu"}


def measured(
    seed: int,
    *,
    slowdown: float = 1.0,
    drift: float = 1.0,
    noise: float = 0.05,
    rounds: int = gate.ROUNDS,
) -> Samples:
    """Rounds on a machine that is noisy, with a disturbance in one of eight."""
    generator = np.random.default_rng(seed)

    def ratios(middle: float) -> list[float]:
        values = middle * np.exp(noise * generator.standard_normal(rounds))
        disturbed = generator.random(rounds) < 1 / 8
        return list(np.where(disturbed, values * generator.uniform(0.5, 3, rounds), values))

    return Samples(ratios(0.9 * slowdown), ratios(0.3 * drift))


BASELINE = measured(999, rounds=45)


# Verdicts


def states(**change: float) -> list[str]:
    return [judge(measured(seed, **change), BASELINE).state for seed in range(100)]


def test_what_did_not_change_passes() -> None:
    assert states() == ["passed"] * 100
    assert states(noise=0.25) == ["passed"] * 100


def test_what_became_slower_by_thirty_percent_fails() -> None:
    assert states(slowdown=1.3) == ["failed"] * 100


@pytest.mark.parametrize("drift", [1.5, 1 / 1.5])
def test_verdict_is_withheld_where_the_anchor_moved_as_much(drift: float) -> None:
    assert states(slowdown=1.3, drift=drift) == ["withheld"] * 100
    assert states(drift=drift) == ["passed"] * 100
    assert states(slowdown=2, drift=drift, noise=0.02) == ["failed"] * 100


def test_interval_has_the_true_slowdown_in_nineteen_of_twenty_runs() -> None:
    inside = 0
    for seed in range(200):
        interval = judge(measured(seed, slowdown=1.2), measured(seed + 500)).slowdown
        assert interval.low <= interval.middle <= interval.high
        inside += interval.low <= 1.2 <= interval.high
    assert inside >= 180


def test_same_samples_give_the_same_verdict() -> None:
    assert judge(measured(1), BASELINE) == judge(measured(1), BASELINE)


@pytest.mark.parametrize(
    "first, second, state, measurements",
    [(1.0, 1.3, "passed", 1), (1.3, 1.0, "passed", 2), (1.3, 1.3, "failed", 2)],
)
def test_only_a_second_measurement_fails(
    first: float, second: float, state: str, measurements: int
) -> None:
    taken = [measured(1, slowdown=first)]

    def again() -> Samples:
        taken.append(measured(2, slowdown=second))
        return taken[-1]

    assert judge_twice(taken[0], again, BASELINE).state == state
    assert len(taken) == measurements


# Rounds


def test_rounds_alternate_and_give_ratios_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, clock = [], [0.0]
    monkeypatch.setattr(gate, "perf_counter", lambda: clock[0])

    def function(name: str, seconds: float) -> object:
        def run() -> None:
            calls.append(name)
            clock[0] += seconds

        return run

    rounds = Rounds(
        operation=function("o", 3.0), reference=function("r", 2.0), anchor=function("a", 1.0)
    )
    calls.clear()  # the warm-up
    assert rounds.play(4) == Samples([1.5] * 4, [0.5] * 4)
    assert "".join(calls) == "aroora" * 2


# Baselines


def test_baseline_is_recorded_and_read(tmp_path: Path) -> None:
    Baselines(tmp_path, MACHINE).record("old", measured(0), ["old"])
    Baselines(tmp_path, MACHINE).record("b", measured(1), ["a", "b"])
    Baselines(tmp_path, MACHINE).record("a", measured(2), ["a", "b"])
    read = Baselines(tmp_path, MACHINE)
    assert list(read) == ["a", "b"]  # in the order of the benchmarks, without those that are gone
    assert read["a"].operation == pytest.approx(measured(2).operation, abs=1e-4)
    assert read["b"].anchor == pytest.approx(measured(1).anchor, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["a-r-cpu-avx2-2t-torch-2-14-1.json"]
    assert json.loads(read.path.read_text())["environment"] == MACHINE


def test_baseline_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines = Baselines(tmp_path, MACHINE)
    baselines.record("a", measured(1), ["a"])
    before = baselines.path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        baselines.record("a", measured(2), ["a"])
    assert baselines.path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change", [{"cpu": "other"}, {"kernels": "avx512"}, {"threads": 1}, {"torch": "2.15.0"}]
)
def test_baseline_of_another_kind_of_machine_does_not_count(
    tmp_path: Path, change: dict[str, object]
) -> None:
    Baselines(tmp_path, MACHINE).record("a", measured(1), ["a"])
    other = Baselines(tmp_path, MACHINE | change)
    assert "a" not in other and "does not exist" in other.missing("a")


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"schema": 0}', '{"schema": 1, "benchmarks": {"a": {}}}']
)
def test_broken_baseline_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a-r-cpu-avx2-2t-torch-2-14-1.json").write_text(text)
    with pytest.raises(ValueError, match=r"2t-torch-2-14-1\.json is no baseline"):
        Baselines(tmp_path, MACHINE)


COMMITTED = sorted(gate.BASELINES.glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_benchmark_has_its_line_in_a_committed_baseline(path: Path) -> None:
    document = json.loads(path.read_text())
    assert list(document["benchmarks"]) == list(GATED)
    assert gate.key(document["environment"]) == path.stem
    assert not document["environment"]["commit"].endswith("-dirty")


@pytest.mark.parametrize("text, factor", [(None, 1.0), ("1.3", 1.3)])
def test_sabotage(text: str | None, factor: float) -> None:
    assert gate.sabotage({} if text is None else {gate.SABOTAGE: text}) == factor


@pytest.mark.parametrize("text", ["0.5", "nan", "inf", "much", ""])
def test_bad_sabotage_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"FASTFISHER_BENCH_SABOTAGE: expected a number"):
        gate.sabotage({gate.SABOTAGE: text})


# The front end


def pytest_benchmarks(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_every_gated_benchmark_runs_and_is_right() -> None:
    done = pytest_benchmarks("--benchmark-disable")
    assert done.returncode == 0 and f"{len(GATED)} passed" in done.stdout, done.stdout


def test_benchmark_without_a_baseline_fails_until_one_is_recorded(tmp_path: Path) -> None:
    one = ["-k", "norm", "--rounds=2", f"--baselines={tmp_path}"]
    done = pytest_benchmarks(*one)
    assert done.returncode == 1, done.stdout
    for part in ("no baseline of norm", "1t-torch-", "does not exist", "make gate ARGS=--record"):
        assert part in done.stdout

    done = pytest_benchmarks(*one, "--record")
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.iterdir()
    recorded = json.loads(path.read_text())["benchmarks"]
    assert {name: len(samples["operation"]) for name, samples in recorded.items()} == {"norm": 6}

    done = pytest_benchmarks(*one, FASTFISHER_BENCH_SABOTAGE="9")
    assert done.returncode == 1 and "norm became slower" in done.stdout, done.stdout


def test_sabotage_is_not_recorded(tmp_path: Path) -> None:
    arguments = ["-k", "norm", f"--baselines={tmp_path}", "--record"]
    done = pytest_benchmarks(*arguments, FASTFISHER_BENCH_SABOTAGE="1.3")
    assert done.returncode == 1 and "unset FASTFISHER_BENCH_SABOTAGE" in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())
