"""The regression gate: ``make gate``. How it decides is in ``gate.py`` and README.md."""

from __future__ import annotations

import gc

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import gate
from benchmarks.conftest import Session
from benchmarks.gated import GATED, Gated, anchor
from benchmarks.measure import TOLERANCE


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
@pytest.mark.parametrize("gated", GATED.values(), ids=GATED)
def test_is_as_fast_as_its_baseline(
    gated: Gated, benchmark: BenchmarkFixture, session: Session
) -> None:
    if benchmark.disabled:
        pair = gated.build(True)
        benchmark(pair.operation)
        pair.reference()
        assert pair.error() < TOLERANCE
        return
    if not session.record and gated.name not in session.baselines:
        pytest.fail(session.baselines.missing(gated.name), pytrace=False)

    first = _rounds(gated, session)
    benchmark.pedantic(
        first.operation, setup=first.before, teardown=first.after, rounds=session.rounds
    )
    benchmark.extra_info["reference"] = gated.reference
    if session.record:
        # More than one sitting: where the allocator puts the data is part of the noise.
        sittings = [first.samples(), *(_rounds(gated, session).play(session.rounds) for _ in "23")]
        session.baselines.record(gated.name, gate.pooled(sittings), list(GATED))
        return
    verdict = gate.judge_twice(
        first.samples(),
        lambda: _rounds(gated, session).play(session.rounds),
        session.baselines[gated.name],
    )
    session.lines.append(f"{gated.name:20} {verdict}")
    benchmark.extra_info["verdict"] = str(verdict)
    if verdict.state == "failed":
        pytest.fail(f"{gated.name} became slower. {verdict}", pytrace=False)
    if verdict.state == "withheld":
        pytest.skip(f"the machine is too unsteady to judge {gated.name}. {verdict}")


def _rounds(gated: Gated, session: Session) -> gate.Rounds:
    """The benchmark on data of its own, found right before anything is timed."""
    pair = gated.build(False)
    error = pair.error()
    assert error < TOLERANCE, f"wrong by {error:.1e}: its time means nothing"
    gc.collect()

    def operation() -> None:
        for _ in range(round(session.work * gated.repeats)):
            pair.operation()

    def reference() -> None:
        for _ in range(gated.repeats):
            pair.reference()

    return gate.Rounds(operation=operation, reference=reference, anchor=anchor())
