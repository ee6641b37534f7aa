"""Times a layer shape beside torch's weight gradient and beside the least that it can take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil
from time import perf_counter

import torch

from benchmarks.measure import wait_for_device
from benchmarks.registry import IMAGE_LAYOUTS, Case
from benchmarks.shapes import PRECISIONS, Shape, collect

LEAST_SECONDS = 1e-2
"""A shorter call is repeated within a round."""
LEAST_ROUNDS = 3
CHECKED_SAMPLES = 2
TOLERANCE = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 5e-3}
PRODUCT = {"cpu": 1024, "cuda": 8192}
LARGE = 1 << 26  # float32 numbers: more than a core's own caches hold, or a GPU's


@dataclass(frozen=True)
class Row:
    """What was measured of one shape of one model in one layout.

    Attributes:
        model: the benchmark case.
        layout: of input and gradient.
        layers: how many layers of the model have the shape.
        shape: the shape.
        engine: what torch computes its weight gradient with.
        rounds: how many the medians are over.
        time_ms: median time of ours.
        reference_ms: median time of torch's weight gradient.
        ratio: median over rounds of the time of ours over that of the reference.
        ratio_q1: its lower quartile.
        ratio_q3: its upper quartile.
        read_ms: median time of reading a buffer as large as what the layer must move.
        sgemm: rate of a large square matrix product, GFLOP/s (of size ``PRODUCT``); median over
            the shapes that were measured with this one.
        bandwidth: rate of reading 256 MiB, GB/s; likewise.
        error: relative, in norm, on two samples, against float64.
    """

    model: str
    layout: str
    layers: int
    shape: Shape
    engine: str
    rounds: int
    time_ms: float
    reference_ms: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    read_ms: float
    sgemm: float
    bandwidth: float
    error: float

    @property
    def compute_ms(self) -> float:
        """Time of the operations at the rate of the matrix product."""
        return self.shape.operations / self.sgemm / 1e6

    @property
    def floor_ms(self) -> float:
        """The least that both bounds leave."""
        return max(self.compute_ms, self.read_ms)

    @property
    def is_compute_bound(self) -> bool:
        """Whether the operations take longer than the bytes."""
        return self.compute_ms >= self.read_ms

    @property
    def of_floor(self) -> float:
        """Part of the bound that is reached: 1 is the floor itself."""
        return self.floor_ms / self.time_ms


def measure_model(
    case: Case, layouts: Sequence[str], *, rounds: int, budget: float
) -> Iterator[list[Row]]:
    """Measure every shape of a model, layout by layout.

    Args:
        case: the model and its batch.
        layouts: of images; a shape without images has one layout, which is always measured.
        rounds: rounds of each shape.
        budget: seconds for them; fewer are timed, three at least, where all take longer.

    Yields:
        The rows of one layout.

    Raises:
        ValueError: a kernel is wrong.
    """
    shapes = collect(case)
    for layout in dict.fromkeys(layout for shape in shapes for layout in shape.layouts):
        if layout in IMAGE_LAYOUTS and layout not in layouts:
            continue
        rows = [
            measure(case.name, layout, layers, shape, rounds, budget)
            for shape, layers in shapes.items()
            if layout in shape.layouts
        ]
        # A rate is of the machine, not of the shape: the median over all forgets disturbances.
        sgemm = statistics.median(row.sgemm for row in rows)
        bandwidth = statistics.median(row.bandwidth for row in rows)
        yield [replace(row, sgemm=sgemm, bandwidth=bandwidth) for row in rows]


def measure(
    model: str,
    layout: str,
    layers: int,
    shape: Shape,
    rounds: int,
    budget: float,
    device: str = "cpu",
    precision: str = "float32",
) -> Row:
    """Check one shape, then time it; arguments as in :func:`measure_model`.

    Args:
        model: the benchmark case.
        layout: of input and gradient.
        layers: how many layers of the model have the shape.
        shape: the shape.
        rounds: rounds.
        budget: seconds for them.
        device: where it is computed.
        precision: of the operands, and of the product that gives the rate.

    Raises:
        ValueError: the kernel is wrong on it.
    """
    error = shape.operands(layout, CHECKED_SAMPLES, device, precision).error()
    if not error <= TOLERANCE[precision]:
        raise ValueError(f"{model}, {layout}, {shape}: wrong, relative error {error:.1e}")
    operands = shape.operands(layout, None, device, precision)
    size = PRODUCT[torch.device(device).type]
    product = _product(size, device, PRECISIONS[precision])
    around = [_time(product), _time(product)]
    seconds = time_rounds(
        {"ours": operands.ours, "reference": operands.reference}, rounds=rounds, budget=budget
    )
    # On its own: between the two it would push their operands out of the caches.
    moved = shape.traffic(PRECISIONS[precision].itemsize)
    read = time_rounds({"read": _reader(moved // 4, device)}, rounds=rounds, budget=budget)["read"]
    around += [_time(product), _time(product)]
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["reference"], strict=True)]
    q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(
        model,
        layout,
        layers,
        shape,
        operands.engine,
        rounds=len(ratios),
        time_ms=1e3 * statistics.median(seconds["ours"]),
        reference_ms=1e3 * statistics.median(seconds["reference"]),
        ratio=ratio,
        ratio_q1=q1,
        ratio_q3=q3,
        read_ms=1e3 * statistics.median(read),
        sgemm=2e-9 * size**3 / statistics.median(around),
        bandwidth=4e-9 * LARGE / _time(_large_reader(LARGE, device)),
        error=error,
    )


def time_rounds(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, budget: float
) -> dict[str, list[float]]:
    """Time functions in alternating rounds, the order turning round with each.

    Args:
        functions: by name.
        rounds: rounds to time.
        budget: seconds after which fewer suffice, but ``LEAST_ROUNDS``.

    Returns:
        Seconds of one call, per function and round.
    """
    once = {}
    for name, function in functions.items():
        function()  # loads and compiles what is loaded and compiled once
        once[name] = _time(function)
    repeats = {name: ceil(LEAST_SECONDS / max(s, LEAST_SECONDS / 1000)) for name, s in once.items()}
    each_round = sum(once[name] * repeats[name] for name in once)
    affordable = max(LEAST_ROUNDS, int(budget / each_round))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for _ in range(min(rounds, affordable)):
        for name in names:
            seconds[name].append(_time(functions[name], repeats[name]))
        names.reverse()
    return seconds


def _time(function: Callable[[], object], repeats: int = 1) -> float:
    start = perf_counter()
    for _ in range(repeats):
        function()
    wait_for_device()
    return (perf_counter() - start) / repeats


@lru_cache
def _product(size: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    a, b, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    product = partial(torch.mm, a, b, out=out)
    product()
    return product


def _reader(numbers: int, device: str) -> Callable[[], object]:
    """Read a buffer in two streams, as a layer's gradient and input are: the faster way."""
    buffer = torch.ones(numbers, device=device)
    return partial(torch.dot, buffer[: numbers // 2], buffer[-(numbers // 2) :])


@lru_cache
def _large_reader(numbers: int, device: str) -> Callable[[], object]:
    read = _reader(numbers, device)
    read()
    return read
