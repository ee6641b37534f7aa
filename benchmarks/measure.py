"""How contenders are measured: correctness first, then peak memory, then time.

Correctness: against the float64 per-sample loop, on a few samples.
Memory: one fresh process per contender, so that none hides another's peak.
Time: all in one process, warmed up, in alternating rounds of rotating order. A ratio is taken
within a round, so that a machine that slows down for a minute slows both of its sides.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.registry import SEED, Case, Problem
from benchmarks.rivals import PLAIN, Call, Options, Rival
from fastfisher.reference import sum_grad_squared_loop

TOLERANCE = 1e-3
"""Largest relative error that still gets a time; single precision reaches 1e-6 to 1e-5."""

CHECK_SAMPLES = 5
"""Odd, so that no vector width or chunk size divides the batch of the check."""

CHECK_CANDIDATES = 64
NUDGE = 4e-6
"""Relative change of the weights, a few times what rounding to float32 does to activations."""

LEAST_ROUNDS = 3
NEAR = 3.0
"""Contenders up to this many times the plain pass take part in every round."""

LEAST_SECONDS = 0.05
"""Shorter calls are repeated within a round until they take about this long together."""


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        rounds: timed rounds.
        budget: seconds that a contender slower than ``NEAR`` plain passes may use per case.
        memory: whether to measure peak memory.
        batch: samples in the timed batch; the case's own when ``None``.
        device: where models and batches are.
    """

    rounds: int = 9
    budget: float = 15.0
    memory: bool = True
    batch: int | None = None
    device: str = "cpu"


@dataclass
class Row:
    """One contender on one case in one layout; ``None`` where nothing was measured.

    Attributes:
        status: ``"ok"``, ``"wrong"`` (error above ``TOLERANCE``), ``"inexact"`` (the same, of a
            contender that is so by design), ``"incomplete"`` (no value for some parameter),
            ``"failed"`` (raised) or ``"absent"`` (its library is not installed).
        rounds: rounds it took part in.
        ratio: median over rounds of its time over the plain pass's; ``_q1``, ``_q3`` quartiles.
        peak_mb: peak resident memory above the level before the call, in 10^6 bytes.
        peak_ratio: that over the plain pass's.
        max_rel_error: norm of the difference over the norm, worst parameter; infinite when a
            parameter has no value.
    """

    case: str
    layout: str
    contender: str
    batch: int
    parameters: int
    status: str = "ok"
    time_ms: float | None = None
    time_ms_q1: float | None = None
    time_ms_q3: float | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    rounds: int = 0
    peak_mb: float | None = None
    peak_ratio: float | None = None
    max_rel_error: float | None = None
    note: str = ""

    @property
    def gets_time(self) -> bool:
        """Whether its verdict lets it be measured."""
        return self.status in ("ok", "inexact")

    def fail(self, error: BaseException) -> None:
        """Give up on this contender for the reason that ``error`` states."""
        lines = str(error).strip().splitlines()
        self.status = "failed"
        self.note = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

    def add_note(self, text: str) -> None:
        """Append to the note."""
        self.note = "; ".join(part for part in (self.note, text) if part)


def measure_case(
    case: Case,
    layout: str,
    rivals: Sequence[Rival],
    settings: Settings,
    status: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check and measure all contenders on one case in one layout.

    Args:
        case: the case.
        layout: one of ``case.layouts``.
        rivals: the contenders; ratios need the plain pass to be among them.
        settings: how much to measure.
        status: called with what is being done.

    Returns:
        One row per contender, in the order given.
    """
    batch = settings.batch or case.batch
    rows = {r.name: Row(case.name, layout, r.name, batch, 0) for r in rivals}
    try:
        problem = case.problem(layout, batch).to(settings.device)
        status(f"{case.name} {layout}: choosing samples for the check")
        small = case.check_problem(layout, CHECK_CANDIDATES).take(_samples_of_check(case))
        small = small.to(settings.device)
    except Exception as error:
        for row in rows.values():
            row.fail(error)
            row.note = f"the case cannot be built: {row.note}"
        return list(rows.values())

    references = References(small)
    calls: dict[str, Call] = {}
    for rival in rivals:
        row = rows[rival.name]
        row.parameters = problem.scalars
        try:
            status(f"{case.name} {layout}: checking {rival.name}")
            options = _check_fastest(row, rival, problem, references)
            if row.gets_time and settings.memory:
                status(f"{case.name} {layout}: peak memory of {rival.name}")
                peak = peak_memory(case, layout, batch, rival, options, settings.device)
                row.peak_mb = peak / 1e6
            if row.gets_time:
                calls[rival.name] = rival.prepare(problem.with_own_model(), options)
        except ImportError as error:
            row.fail(error)
            if rival.install:
                row.status = "absent"
                row.note = f"not installed ({error}): {rival.install}"
        except Exception as error:
            row.fail(error)

    status(f"{case.name} {layout}: timing {len(calls)} contenders")
    timings = time_interleaved(calls, rounds=settings.rounds, budget=settings.budget)
    for name, timing in timings.items():
        _fill(rows[name], timing)
    plain = rows.get(PLAIN)
    for row in rows.values():
        if plain is not None and row.peak_mb is not None and plain.peak_mb:
            row.peak_ratio = row.peak_mb / plain.peak_mb
    return list(rows.values())


@lru_cache
def _samples_of_check(case: Case) -> list[int]:
    """The same samples in every layout."""
    return steady_samples(case.check_problem(case.layouts[0], CHECK_CANDIDATES), CHECK_SAMPLES)


def steady_samples(problem: Problem, count: int) -> list[int]:
    """Find samples whose exact answer does not jump when all weights move a little.

    Where the input of a ReLU is within rounding of zero, or two inputs of a max-pooling window
    are that close, float32 and float64 may take different branches, and a right contender is off
    by percents. Among a million activations some are; such samples can check nobody.

    Args:
        problem: the samples to choose from.
        count: samples wanted.

    Returns:
        The first ``count`` samples that stay within ``TOLERANCE`` when every weight is multiplied
        by 1 + ``NUDGE`` x (normal noise) and by 1 - the same; if too few do, the steadiest too.
    """
    exact = problem.in_float64()
    generator = torch.Generator().manual_seed(SEED)
    noise = [torch.randn(p.shape, generator=generator) for p in exact.model.parameters()]
    nudged = [exact.with_own_model(), exact.with_own_model()]
    for variant, size in zip(nudged, (NUDGE, -NUDGE), strict=True):
        with torch.no_grad():
            for p, change in zip(variant.model.parameters(), noise, strict=True):
                p.mul_(1 + size * change)

    jumps: dict[int, float] = {}
    for sample in range(problem.inputs.shape[0]):
        right = _loop_answer(exact.take([sample]))
        jumps[sample] = 0.0
        for variant in nudged:
            jump, _ = max_relative_error(_loop_answer(variant.take([sample])), right)
            jumps[sample] = max(jumps[sample], jump)
            if jump > TOLERANCE:
                break
        if sum(jump <= TOLERANCE for jump in jumps.values()) == count:
            break
    return sorted(sorted(jumps, key=jumps.__getitem__)[:count])


def _loop_answer(problem: Problem) -> dict[str, Tensor]:
    return sum_grad_squared_loop(
        problem.model, problem.inputs, problem.targets, problem.loss.per_sample, problem.names
    )


class References:
    """The right answers in float64 for a small batch, each computed when first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[str, dict[str, Tensor]] = {}

    def __getitem__(self, quantity: str) -> dict[str, Tensor]:
        if quantity not in self._known:
            self._known[quantity] = self._compute(quantity)
        return self._known[quantity]

    def _compute(self, quantity: str) -> dict[str, Tensor]:
        exact = self.problem.in_float64()
        if quantity == "sum_grad_squared":
            return _loop_answer(exact)
        if quantity == "gradient":
            total = exact.loss.per_sample(exact.model(exact.inputs), exact.targets).sum()
            named = dict(exact.model.named_parameters())
            gradients = torch.autograd.grad(total, [named[name] for name in exact.names])
            return dict(zip(exact.names, gradients, strict=True))
        raise ValueError(f"no reference for the quantity {quantity!r}")


def max_relative_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """Compare values per parameter.

    Returns:
        The largest norm of a difference over the norm of the right value, and what it is about:
        the parameter, or the parameters that have no value (then the error is infinite).
    """
    missing = [name for name in want if name not in got]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return math.inf, f"no value for {', '.join(missing[:3])}{more}"
    worst, where = 0.0, ""
    for name, right in want.items():
        value = got[name].detach().to(right.dtype)
        if value.shape != right.shape:
            shapes = f"{list(value.shape)} for {list(right.shape)}"
            return math.inf, f"{name} has the wrong shape: {shapes}"
        norm = right.norm().item()
        difference = (value - right).norm().item()
        error = difference / norm if norm else math.inf if difference else 0.0
        if math.isnan(error):
            error = math.inf
        if error > worst:
            worst, where = error, f"worst: {name}"
    return worst, where


def _check_fastest(row: Row, rival: Rival, problem: Problem, references: References) -> Options:
    """Put the verdict on the rival's fastest right options into the row, and give them back.

    Where none are right the verdict is that on the fastest.
    """
    verdicts: list[tuple[Row, Options]] = []
    for options in by_speed(rival, problem):
        verdict = replace(row)
        _check(verdict, rival, options, references)
        verdicts.append((verdict, options))
        if verdict.status == "ok":
            break
    chosen, options = verdicts[-1] if verdicts[-1][0].status == "ok" else verdicts[0]
    vars(row).update(vars(chosen))
    return options


def _check(row: Row, rival: Rival, options: Options, references: References) -> None:
    """Put the error into the row, and the verdict."""
    call = rival.prepare(references.problem.with_own_model(), options)
    outcome = call.run()
    values, right = call.read(outcome), references[rival.quantity]
    row.max_rel_error, about = max_relative_error(values, right)
    if not right.keys() <= values.keys():
        row.status = "incomplete"
    elif row.max_rel_error > TOLERANCE:
        row.status = "inexact" if rival.inexact else "wrong"
    if row.status != "ok":
        row.add_note(about)
    row.add_note(", ".join(f"{name} {value}" for name, value in options.items()))
    row.add_note(call.note(outcome))
    if rival.package:
        row.add_note(f"{rival.package} {metadata.version(rival.package)}")


def by_speed(rival: Rival, problem: Problem) -> list[Options]:
    """Order the rival's options by one run each, the fastest first.

    Options that raise are left out, and so are those after a clearly slower one.

    Raises:
        Exception: what the first options raised, if all did.
    """
    candidates = list(rival.candidates(problem))
    prepare = rival.trial or rival.prepare
    if len(candidates) == 1:
        return candidates
    seconds: dict[int, float] = {}
    errors: list[Exception] = []
    for number, options in enumerate(candidates):
        try:
            seconds[number] = _warm_up(prepare(problem.with_own_model(), options))
        except Exception as error:
            errors.append(error)
            continue
        if seconds[number] > 1.1 * min(seconds.values()):
            break
    if not seconds:
        raise errors[0]
    return [candidates[number] for number in sorted(seconds, key=seconds.__getitem__)]


def _timed(call: Call, repeats: int = 1) -> float:
    """Mean seconds of a run; ``reset`` is outside."""
    total = 0.0
    for _ in range(repeats):
        enabled = gc.isenabled()
        gc.disable()
        start = perf_counter()
        call.run()
        wait_for_device()
        total += perf_counter() - start
        if enabled:
            gc.enable()
        call.reset()
    return total / repeats


def wait_for_device() -> None:
    """Let a GPU finish what it was given, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _warm_up(call: Call) -> float:
    """Seconds of a run that is not the first, unless the first alone takes over a second."""
    first = _timed(call)
    return first if first > 1.0 else _timed(call)


@dataclass
class Timing:
    """What the rounds gave for one contender, or why they gave nothing.

    Attributes:
        seconds: round -> seconds of one run.
        ratios: its time over the plain pass's, for each round that both took part in.
        error: what it raised.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    error: Exception | None = None


def time_interleaved(
    calls: Mapping[str, Call], *, rounds: int, budget: float, baseline: str = PLAIN
) -> dict[str, Timing]:
    """Time all contenders in alternating rounds, the first of each round rotating.

    A contender that takes more than ``NEAR`` times the baseline takes part in as many rounds,
    evenly spread, as ``budget`` seconds allow, in ``LEAST_ROUNDS`` at least.

    Args:
        calls: the contenders by name.
        rounds: number of rounds.
        budget: seconds for each slow contender.
        baseline: the contender that ratios are to.

    Returns:
        One timing per contender.
    """
    timings = {name: Timing() for name in calls}
    warm: dict[str, float] = {}
    for name, call in calls.items():
        try:
            warm[name] = _warm_up(call)
        except Exception as error:
            timings[name].error = error
    near = NEAR * warm.get(baseline, 0.0)
    names = list(warm)
    turns = {
        name: rounds
        if seconds <= near or seconds * rounds <= budget
        else min(rounds, max(LEAST_ROUNDS, int(budget / seconds)))
        for name, seconds in warm.items()
    }
    for number in range(rounds):
        shift = number % len(names) if names else 0
        gc.collect()
        for name in names[shift:] + names[:shift]:
            timing = timings[name]
            spread = number * turns[name] // rounds != (number - 1) * turns[name] // rounds
            if timing.error is not None or not spread:
                continue
            repeats = min(20, math.ceil(LEAST_SECONDS / max(warm[name], 1e-6)))
            try:
                timing.seconds[number] = _timed(calls[name], repeats)
            except Exception as error:
                timing.error = error
    units = timings[baseline].seconds if baseline in timings else {}
    for timing in timings.values():
        timing.ratios = [s / units[n] for n, s in timing.seconds.items() if n in units]
    return timings


def _fill(row: Row, timing: Timing) -> None:
    if timing.error is not None:
        row.fail(timing.error)
        return
    row.rounds = len(timing.seconds)
    q1, row.time_ms, q3 = _quartiles([1e3 * s for s in timing.seconds.values()])
    row.time_ms_q1, row.time_ms_q3 = q1, q3
    if timing.ratios:
        row.ratio_q1, row.ratio, row.ratio_q3 = _quartiles(timing.ratios)


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    data = list(values)
    if len(data) == 1:
        return data[0], data[0], data[0]
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive")
    return q1, median, q3


def peak_memory(
    case: Case, layout: str, batch: int, rival: Rival, options: Options, device: str = "cpu"
) -> int:
    """Run the contender once in a fresh process.

    Returns:
        Bytes by which memory (:func:`peak_growth`) rises above the level just before the call.
        Model and batch are below that level, gradients, activations and the result above it.

    Raises:
        MemoryError: the process was killed, as the system does when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            threads = torch.get_num_threads()
            arguments = (case, layout, batch, rival, options, threads, device)
            return pool.submit(_peak_in_this_process, *arguments).result()
    except BrokenProcessPool as error:
        raise MemoryError("the process that ran it was killed; out of memory?") from error


def _peak_in_this_process(
    case: Case,
    layout: str,
    batch: int,
    rival: Rival,
    options: Options,
    threads: int,
    device: str,
) -> int:
    torch.set_num_threads(threads)
    problem = case.problem(layout, batch).to(device)
    # What a first call loads once (code, thread stacks, primitive caches) is no contender's own.
    small = rival.prepare(problem.take([0]).with_own_model(), options)
    small.run()
    small.reset()
    del small
    call = rival.prepare(problem, options)
    gc.collect()
    _give_back_freed_memory()
    return peak_growth(call.run, device)


def peak_growth(run: Callable[[], object], device: str) -> int:
    """Bytes by which memory rises, at its peak, while ``run`` runs.

    Resident memory, or on a GPU what torch's allocator has handed out.
    """
    if torch.device(device).type != "cuda":
        return peak_rss_growth(run)
    wait_for_device()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait_for_device()
    return torch.cuda.max_memory_allocated() - before


def _give_back_freed_memory() -> None:
    """Make malloc return what is free, or a peak could hide in pages it still holds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def peak_rss_growth(run: Callable[[], object]) -> int:
    """Bytes by which resident memory rises, at its peak, while ``run`` runs.

    Where the kernel cannot reset the high-water mark (outside Linux) the growth of the process's
    all-time mark stands in, which in a fresh process is a little too low.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        before = _high_water_mark()
        run()
        return _high_water_mark() - before
    before = _proc_status("VmRSS")
    run()
    return max(0, _proc_status("VmHWM") - before)


def _high_water_mark() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")
