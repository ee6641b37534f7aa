"""Decides whether an operation became slower than its committed baseline says.

Seconds of different runs say little, on a shared machine least of all. The gate judges ratios:
fastfisher's operation over a reference that no change to fastfisher touches, both timed in
alternation in one process. Each round also times an anchor, a copy in memory: where the anchor
moved against the reference, the machine's balance changed, and a slow-down that is no larger
proves nothing.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np

from benchmarks.machine import slug
from benchmarks.report import Environment
from fastfisher.files import replacing

BASELINES = Path(__file__).resolve().parent / "baselines"
RECORD = "make gate ARGS=--record"
SABOTAGE = "FASTFISHER_BENCH_SABOTAGE"

THRESHOLD = 1.15
"""Slow-down that fails. Of one build, medians of several processes differ by up to 1.1."""

ROUNDS = 21
CONFIDENCE = 0.95
_RESAMPLES = 2000
_SCHEMA = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@dataclass(frozen=True)
class Samples:
    """What the rounds gave: times over the reference's time of the same round.

    Attributes:
        operation: one ratio a round.
        anchor: one ratio a round.
    """

    operation: list[float]
    anchor: list[float]


@dataclass(frozen=True)
class Interval:
    """A quotient of two medians and the range that it is in with probability ``CONFIDENCE``."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Verdict:
    """What two sets of samples say.

    Attributes:
        state: "withheld": it looks slower, but the anchor moved as much.
        slowdown: of the operation against its baseline; above 1 is slower.
        drift: of the anchor against its baseline.
    """

    state: Literal["passed", "failed", "withheld"]
    slowdown: Interval
    drift: Interval

    def __str__(self) -> str:
        return f"{self.state}: {self.slowdown} of its baseline, the anchor {self.drift}"


def judge(now: Samples, baseline: Samples) -> Verdict:
    """Compare ratios with the baseline's.

    Returns:
        "failed" if the low end of the slow-down exceeds both ``THRESHOLD`` and what the anchor may
        have moved in either direction.
    """
    slowdown = _quotient(now.operation, baseline.operation)
    drift = _quotient(now.anchor, baseline.anchor)
    if slowdown.low <= THRESHOLD:
        return Verdict("passed", slowdown, drift)
    noise = max(drift.high, 1 / drift.low)
    return Verdict("failed" if slowdown.low > noise else "withheld", slowdown, drift)


def _quotient(now: Sequence[float], before: Sequence[float]) -> Interval:
    """Median over median, with its bootstrap interval; the same samples give the same one."""
    generator = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> np.ndarray:
        return np.median(generator.choice(values, (_RESAMPLES, len(values))), axis=1)

    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians(now) / medians(before), [outside, 1 - outside])
    return Interval(float(low), float(np.median(now) / np.median(before)), float(high))


def judge_twice(first: Samples, again: Callable[[], Samples], baseline: Samples) -> Verdict:
    """Judge a measurement; where it does not pass, a second one, and then that one counts."""
    verdict = judge(first, baseline)
    return verdict if verdict.state == "passed" else judge(again(), baseline)


class Rounds:
    """Times three functions in alternation: anchor, reference, operation, and back again.

    A round is :meth:`before`, :meth:`operation`, :meth:`after`. The operation follows the reference
    in one round and precedes it in the next: neither always finds its data in the cache.
    """

    def __init__(self, **functions: Callable[[], object]) -> None:
        """Warm the functions ``operation``, ``reference`` and ``anchor`` up by one call each."""
        self._functions = functions
        self._seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()

    def before(self) -> None:
        """What a round times before the operation."""
        if len(self._seconds["operation"]) % 2 == 0:
            self._time("anchor")
            self._time("reference")

    def operation(self) -> None:
        """The operation."""
        self._time("operation")

    def after(self) -> None:
        """What a round times after the operation."""
        if len(self._seconds["operation"]) % 2 == 0:
            self._time("reference")
            self._time("anchor")

    def play(self, rounds: int) -> Samples:
        """Play rounds and return the ratios of all."""
        for _ in range(rounds):
            self.before()
            self.operation()
            self.after()
        return self.samples()

    def samples(self) -> Samples:
        """The ratios of all rounds that were played."""
        unit = self._seconds["reference"]

        def ratios(name: str) -> list[float]:
            return [mine / one for mine, one in zip(self._seconds[name], unit, strict=True)]

        return Samples(ratios("operation"), ratios("anchor"))

    def _time(self, name: str) -> None:
        start = perf_counter()
        self._functions[name]()
        self._seconds[name].append(perf_counter() - start)


def pooled(sittings: Iterable[Samples]) -> Samples:
    """All rounds of several sittings as one."""
    together = Samples([], [])
    for one in sittings:
        together.operation.extend(one.operation)
        together.anchor.extend(one.anchor)
    return together


def keep_freed_memory() -> None:
    """Make malloc keep what is freed, for good, where it is glibc's.

    By default it returns large blocks to the system, or not, by what happened before; the first
    touch of each new page then decides the time. An operation's ratio moved by 1.7x with it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def key(environment: Environment) -> str:
    """What ratios depend on beside the code: processor, instruction set, threads, torch."""
    e = environment
    release = str(e["torch"]).partition("+")[0]
    return slug(f"{e['cpu']} {e['kernels']} {e['threads']}t torch {release}")


class Baselines(Mapping[str, Samples]):
    """The committed samples of one kind of machine.

    Attributes:
        path: the file.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        """Read the file of this machine's key, if there is one.

        Raises:
            ValueError: there is one, and it is no baseline file.
        """
        self.path = folder / f"{key(environment)}.json"
        self._environment = environment
        self._samples: dict[str, Samples] = {}
        if self.path.exists():
            self._samples = _read(self.path)

    def missing(self, name: str) -> str:
        """What to do about a benchmark that has no baseline."""
        file = f"{self.path} {'has none' if self.path.exists() else 'does not exist'}"
        return (
            f"no baseline of {name} for this machine: {file}. Record one on an idle machine, with "
            f"a build that is as fast as it should be: {RECORD}"
        )

    def __getitem__(self, name: str) -> Samples:
        return self._samples[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, name: str, samples: Samples, known: Sequence[str]) -> None:
        """Write the samples of one benchmark; drop those of benchmarks that are not ``known``."""
        self._samples[name] = samples
        ordered = {other: self._samples[other] for other in known if other in self._samples}
        self._samples = ordered
        document = {
            "schema": _SCHEMA,
            "environment": dict(self._environment),
            "benchmarks": {
                other: {
                    kind: [round(ratio, 4) for ratio in ratios]
                    for kind, ratios in asdict(value).items()
                }
                for other, value in ordered.items()
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            text = json.dumps(document, indent=1) + "\n"
            # The ratios of a benchmark on one line, not a line each.
            text = re.sub(r"\[[\d\s.,]+\]", lambda match: " ".join(match[0].split()), text)
            temporary.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Samples]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']}, not {_SCHEMA}")
        return {name: Samples(**value) for name, value in document["benchmarks"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no baseline of the gate: {error}") from error


def sabotage(environment: Mapping[str, str]) -> float:
    """How much more work the operation shall do on purpose: proof that the gate can fail.

    Raises:
        ValueError: the variable is not a number of at least 1.
    """
    text = environment.get(SABOTAGE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor < 100:
        raise ValueError(f"{SABOTAGE}: expected a number of at least 1, such as 1.3, got {text!r}")
    return factor
