"""Model what the outer kernels should take on GPUs, from their compiled code and data sheets.

    python benchmarks/gpu_model.py          write docs/performance/gpu.md

Nothing of this runs on a GPU. What is launched is what the launchers decide for each layer's shape,
noted by the emulator; what a launch executes is counted in the code that nvcc emits.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

if not __package__:
    # Behind the installed packages: the fastfisher with compiled kernels goes before its source.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import layers, shapes
from benchmarks.machine import ROOT
from benchmarks.registry import CASES
from fastfisher.files import replacing
from tests.emulation.build import emulated
from tests.emulation.launches import Launch, noting
from tests.emulation.occupancy import blocks_per_sm
from tests.emulation.sass import Kernel, compile_kernels, matching

PAGE = ROOT / "docs" / "performance" / "gpu.md"
MODELS = ("resnet20", "vgg16_bn", "resnet50", "vit_tiny", "gpt")
SAMPLES = 64
"""Batch of every model here."""
GOAL = 1.3
"""Modelled time over floor that the kernels should stay below."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet; dense rates, no sparsity.

    Attributes:
        name: for people.
        architecture: 80 for sm_80.
        multiprocessors: how many there are.
        lanes: float32 multiply-adds that one issues a cycle.
        fp32: peak of float32, FLOP/s; the clock follows from it.
        tf32: peak of tensor cores on tf32.
        bf16: peak of tensor cores on bfloat16.
        mma: part of that peak that ``mma.sync`` can reach. ASSUMED where it is not 1: newer devices
            have other instructions for the whole peak, which these kernels do not use.
        dram: bytes/s.
        l2: bytes/s. ASSUMED: data sheets do not say.
    """

    name: str
    architecture: int
    multiprocessors: int
    lanes: int
    fp32: float
    tf32: float
    bf16: float
    mma: float
    dram: float
    l2: float

    @property
    def clock(self) -> float:
        """Cycles/s at which the float32 peak is reached."""
        return self.fp32 / (2 * self.lanes * self.multiprocessors)

    def peak(self, precision: str) -> float:
        """FLOP/s of the data sheet."""
        return {"float32": self.fp32, "tf32": self.tf32, "bfloat16": self.bf16}[precision]


DEVICES = (
    # NVIDIA A100 data sheet, SXM4 80 GB.
    Device("A100", 80, 108, 64, 19.5e12, 156e12, 312e12, 1.0, 2.039e12, 5e12),
    # NVIDIA H100 data sheet, SXM5; tensor peaks are half of those with sparsity.
    Device("H100", 90, 132, 128, 66.9e12, 494.7e12, 989.4e12, 0.62, 3.35e12, 7e12),
    # NVIDIA HGX B200 data sheet, an eighth of eight; tensor peaks are half of those with sparsity.
    Device("B200", 100, 148, 128, 75e12, 1.1e15, 2.25e15, 0.3, 8e12, 10e12),
)


@dataclass(frozen=True, slots=True)
class Modelled:
    """What the model says of one layer on one device.

    Attributes:
        kernel: the instance that is launched.
        blocks: thread blocks of the launch.
        splits: of the samples.
        resident: blocks that a multiprocessor holds at once.
        floor: seconds; operations at the peak, or bytes that have to move at DRAM's rate.
        seconds: of the kernel and of the one that adds the splits up.
        bound: what takes longest.
        l2: bytes that go through L2.
        shared: bytes that go through shared memory.
    """

    kernel: str
    blocks: int
    splits: int
    resident: int
    floor: float
    seconds: float
    bound: str
    l2: float
    shared: float

    @property
    def ratio(self) -> float:
        """Modelled time over the floor."""
        return self.seconds / self.floor


#: Multiply-adds of one warp-wide tensor-core instruction.
_PRODUCTS = {"bfloat16": 16 * 8 * 16, "tf32": 16 * 8 * 8}
_WIDTHS = {"128": 4, "64": 2, "4": 4, "2": 2}


@dataclass(frozen=True, slots=True)
class Cost:
    """Warp-wide instructions by what they keep busy; ``shared`` counts wavefronts."""

    issued: float = 0
    float32: float = 0
    tensor: float = 0
    shared: float = 0

    @classmethod
    def of(cls, way: Mapping[str, int]) -> Cost:
        """Of the instructions on one way through the code."""
        shared = 0
        for opcode, count in way.items():
            name, *modifiers = opcode.split(".")
            if name in ("LDS", "STS", "LDSM", "LDGSTS"):
                # 16 bytes a lane take four wavefronts, as if no two lanes asked for the same.
                shared += count * max((_WIDTHS.get(each, 1) for each in modifiers), default=1)
        float32 = sum(matching(way, opcode) for opcode in ("FFMA", "FADD", "FMUL"))
        return cls(sum(way.values()), float32, matching(way, "HMMA"), shared)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.issued + other.issued,
            self.float32 + other.float32,
            self.tensor + other.tensor,
            self.shared + other.shared,
        )

    def times(self, count: float) -> Cost:
        """So many of them."""
        return Cost(
            *(count * each for each in (self.issued, self.float32, self.tensor, self.shared))
        )


def tile_of(kernel: str) -> int:
    """Side of the square tile that a block computes.

    Raises:
        ValueError: the kernel is none that is modelled.
    """
    found = re.match(r"outer_simt<Tile<float, (\d+),", kernel) or re.match(
        r"outer_mma<\w+, \w+, (\d+)>", kernel
    )
    if found is None:
        raise ValueError(f"{kernel} is not modelled")
    return int(found[1])


def step_positions() -> int:
    """Positions that outer_simt copies to shared memory at once, as its source says."""
    source = (ROOT / "csrc" / "cuda" / "outer_simt.cu").read_text(encoding="utf-8")
    found = re.search(r"constexpr int kSteps = (\d+);", source)
    if found is None:
        raise ValueError("outer_simt.cu does not define kSteps")
    return int(found[1])


def cost_of_block(kernel: Kernel, precision: str, samples: int, positions: int) -> Cost:
    """What one warp of a block executes.

    Args:
        kernel: the instance.
        precision: of the products.
        samples: of the block's split.
        positions: of a sample.
    """
    warps = kernel.threads / 32
    usual = [Cost.of(level["usual"]) for level in kernel.ways]
    if precision == "float32":
        inner, step, sample, rest = usual
        at_once = inner.float32 * 32 * warps / tile_of(kernel.name) ** 2
        a_sample = (
            inner.times(math.ceil(positions / at_once))
            + step.times(math.ceil(positions / step_positions()))
            + sample
        )
    else:
        step, rest = usual
        at_once = step.tensor * _PRODUCTS[precision] * warps / tile_of(kernel.name) ** 2
        end = Cost.of(kernel.ways[0]["fullest"]) + step.times(-1)
        a_sample = step.times(math.ceil(positions / at_once)) + end
    return a_sample.times(samples) + rest


def launches_of(shape: shapes.Shape, precision: str) -> list[Launch]:
    """What the operator launches for a layer, channels_last; operands are never touched."""
    dtype = shapes.PRECISIONS[precision]
    operators = emulated("planned")
    with noting("planned") as launches:
        if isinstance(shape, shapes.Linear):
            grad = torch.empty(shape.samples, shape.positions, shape.outputs, dtype=dtype)
            x = torch.empty(shape.samples, shape.positions, shape.inputs, dtype=dtype)
            out = torch.empty(shape.outputs, shape.inputs)
            operators.linear_sum_grad_squared_(out, grad, x, 1.0, 2, precision == "tf32")
        else:
            last = {"memory_format": torch.channels_last}
            size = shape.samples, shape.outputs, *shape.output_image
            grad = torch.empty(size, dtype=dtype, **last)
            x = torch.empty(shape.samples, shape.inputs, *shape.image, dtype=dtype, **last)
            out = torch.empty(shape.weight_shape, **last)
            geometry = shape.stride, shape.padding, shape.dilation, shape.groups
            operators.conv2d_sum_grad_squared_(out, grad, x, *geometry, 1.0, 2, precision == "tf32")
    return launches


def positions_of(shape: shapes.Shape) -> int:
    """Positions of one sample."""
    return shape.positions if isinstance(shape, shapes.Linear) else math.prod(shape.output_image)


def entries_of(shape: shapes.Shape) -> int:
    """Scalars of the weight."""
    if isinstance(shape, shapes.Linear):
        return shape.inputs * shape.outputs
    return math.prod(shape.weight_shape)


def model(
    shape: shapes.Shape,
    precision: str,
    device: Device,
    launches: Sequence[Launch],
    kernels: Mapping[str, Kernel],
) -> Modelled:
    """Model one layer on one device.

    Args:
        shape: the layer.
        precision: of the products.
        device: the device.
        launches: of :func:`launches_of`.
        kernels: by name, compiled for the device.
    """
    launch, *adding = launches
    kernel = kernels[launch.kernel]
    tile, element = tile_of(kernel.name), shapes.PRECISIONS[precision].itemsize
    splits = launch.grid[1]
    samples, positions = math.ceil(shape.samples / splits), positions_of(shape)
    one = cost_of_block(kernel, precision, samples, positions)
    warps = launch.threads // 32
    resident = blocks_per_sm(
        device.architecture, kernel.registers, kernel.shared + launch.shared, launch.threads
    )
    # The last wave may leave multiprocessors idle: the busiest one has the rounded-up share.
    turns = math.ceil(launch.blocks / device.multiprocessors)
    schedulers = min(4, warps * min(turns, resident))
    products = _PRODUCTS.get(precision, 0)
    rate = device.mma * device.peak(precision) / 2 / device.multiprocessors / device.clock
    cycles = {
        "issue": one.issued / schedulers,
        "FFMA": one.float32 / (device.lanes / 32),
        "tensor cores": one.tensor * products / rate,
        "shared memory": one.shared,
    }
    outs = 4 * entries_of(shape)
    blocks = launch.blocks
    l2 = blocks * samples * positions * 2 * tile * element + 2 * outs
    seconds = {name: value * warps * turns / device.clock for name, value in cycles.items()}
    seconds["L2"] = l2 / device.l2
    seconds["DRAM"] = (shape.traffic(element) + (splits > 1) * splits * outs) / device.dram
    bound = max(seconds, key=seconds.__getitem__)
    # The second kernel reads every split's sums, and adds to out.
    second = ((splits * outs + 2 * outs) / device.dram) if adding else 0.0
    floor = max(shape.operations / device.peak(precision), shape.traffic(element) / device.dram)
    return Modelled(
        kernel.name,
        blocks,
        splits,
        resident,
        floor,
        seconds[bound] + second,
        bound,
        l2,
        one.shared * 128 * warps * blocks,
    )


# -- The page ------------------------------------------------------------------------------------


def shapes_of_models() -> dict[str, dict[shapes.Shape, int]]:
    """The layers of each model, with the batch of this page, as layers.py found them."""
    found: dict[str, dict[shapes.Shape, int]] = {name: {} for name in MODELS}
    for _, _, rows in layers.stored(layers.RESULTS):
        for row in rows:
            if row.model in found:
                found[row.model][replace(row.shape, samples=SAMPLES)] = row.layers
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """One layer shape of one model, modelled on every device."""

    model: str
    shape: shapes.Shape
    layers: int
    precision: str
    on: Mapping[str, Modelled]


def rows_of(found: Mapping[str, Mapping[shapes.Shape, int]]) -> list[Row]:
    """Model every layer of every model, in every precision, on every device."""
    sources = [ROOT / "csrc" / "cuda" / f"outer_{name}.cu" for name in ("simt", "mma")]
    kernels = {
        device.name: {
            kernel.name: kernel
            for source in sources
            for kernel in compile_kernels(source, device.architecture)
        }
        for device in DEVICES
    }
    rows = []
    for name, counted in found.items():
        for shape, count in counted.items():
            for precision in shapes.PRECISIONS:
                launches = launches_of(shape, precision)
                on = {
                    device.name: model(shape, precision, device, launches, kernels[device.name])
                    for device in DEVICES
                }
                rows.append(Row(name, shape, count, precision, on))
    return rows


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
    ]


def _ratio(value: float) -> str:
    return f"**{value:.2f}**" if value > GOAL else f"{value:.2f}"


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    first = DEVICES[1]
    lines = [
        *_INTRODUCTION.splitlines(),
        "",
        "## Devices (modelled; rates from data sheets, L2 and mma.sync assumed)",
        "",
        *_table(
            (
                "",
                "SMs",
                "clock GHz",
                "float32 TFLOP/s",
                "tf32",
                "bfloat16",
                "mma.sync, assumed",
                "DRAM TB/s",
                "L2 TB/s, assumed",
            ),
            (
                (
                    d.name,
                    str(d.multiprocessors),
                    f"{d.clock / 1e9:.2f}",
                    f"{d.fp32 / 1e12:.1f}",
                    f"{d.tf32 / 1e12:.0f}",
                    f"{d.bf16 / 1e12:.0f}",
                    f"{100 * d.mma:.0f}%",
                    f"{d.dram / 1e12:.2f}",
                    f"{d.l2 / 1e12:.0f}",
                )
                for d in DEVICES
            ),
        ),
        *_totals(rows),
        *_against_others(rows),
    ]
    for name in MODELS:
        for precision in shapes.PRECISIONS:
            of_model = [row for row in rows if (row.model, row.precision) == (name, precision)]
            lines += _layers(name, precision, of_model, first)
    return "\n".join(lines).rstrip() + "\n"


_INTRODUCTION = f"""\
# GPU kernels: modelled, never run

<!-- Written by benchmarks/gpu_model.py; change that. -->

Every number on this page is **modelled**: none was measured on a GPU. Batches of {SAMPLES},
channels_last, the kernels of the outer family, which do nearly all of the work. `make gpu` on a
machine with a card measures the same layers.

## How it is modelled

The floor of a layer is the longer of two times: its operations at the data sheet's peak, and the
bytes that have to move at least (gradient, input, sums in and out) at DRAM's rate. The kernel's
time comes from its machine code. The launcher decides on the tile, the grid and the splits, as it
would on a device; the emulator notes that. `nvdisasm` gives the instructions of the hot loop, of
the loops around it and of the rest, on the way that a full tile takes through the branches, and
the shape gives how often each runs. Per multiprocessor the slowest counts: instructions issued
(four a cycle, fewer with fewer than four warps), float32 arithmetic, tensor-core products, shared
memory (a wavefront a cycle; 16 bytes a lane are counted as four, as if no two lanes shared any).
Blocks are dealt out evenly, and the busiest multiprocessor decides: that is the tail. L2 and DRAM
are bounds of the whole device. Where samples are split, the sums' way through memory is added.

Not in it: latencies (with the resident blocks shown they are taken to be hidden), launch times,
bank conflicts, clocks that fall under load, the contention of L2 with DRAM. Shared memory is
counted for more than it may take; everything else is a bound from below, which a real run will
not beat. The goal is {GOAL} of the floor on full tiles; what is above is **bold**.
"""


def _totals(rows: Sequence[Row]) -> list[str]:
    head = ["model", "precision", "GFLOP"]
    for device in DEVICES:
        head += [f"{device.name}: floor ms, modelled", "kernels ms, modelled", "ratio, modelled"]
    body = []
    for name in MODELS:
        for precision in shapes.PRECISIONS:
            chosen = [row for row in rows if (row.model, row.precision) == (name, precision)]
            work = sum(row.layers * row.shape.operations for row in chosen)
            line = [f"{name}: {CASES[name].title}", precision, f"{work / 1e9:.1f}"]
            for device in DEVICES:
                floor = sum(row.layers * row.on[device.name].floor for row in chosen)
                taken = sum(row.layers * row.on[device.name].seconds for row in chosen)
                line += [f"{1e3 * floor:.3f}", f"{1e3 * taken:.3f}", _ratio(taken / floor)]
            body.append(line)
    return ["## Sums over a model's layers (modelled)", "", *_table(head, body)]


def _against_others(rows: Sequence[Row]) -> list[str]:
    """The plain pass's floor, and what materialised per-sample gradients would move."""
    head = ["model"]
    for device in DEVICES:
        head += [
            f"{device.name}: plain pass floor ms, modelled",
            "with our kernels ms, modelled",
            "times plain, modelled",
            "per-sample gradients in memory: ms, modelled",
        ]
    body = []
    for name in MODELS:
        chosen = [row for row in rows if (row.model, row.precision) == (name, "float32")]
        line = [name]
        for device in DEVICES:
            floor = sum(row.layers * row.on[device.name].floor for row in chosen)
            taken = sum(row.layers * row.on[device.name].seconds for row in chosen)
            entries = sum(row.layers * entries_of(row.shape) for row in chosen)
            # Written and read once each; the same products have to be computed before.
            moved = 2 * 4 * SAMPLES * entries / device.dram
            ours = 2 * floor + taken
            line += [
                f"{1e3 * 3 * floor:.2f}",
                f"{1e3 * ours:.2f}",
                f"{ours / (3 * floor):.2f}",
                f"+{1e3 * moved:.2f}",
            ]
        body.append(line)
    return [
        "## Beside a plain pass and torch.func (modelled, float32)",
        "",
        "The plain pass's floor is three times that of the weight gradients: forward, gradient of",
        "the inputs, gradient of the weights. Ours computes the first two at their floor and the",
        "squares by the kernels. `torch.func` writes and reads a gradient of every sample, N x P x",
        "4 bytes each way: the last column is that traffic alone, on top of a plain pass.",
        "",
        *_table(head, body),
    ]


def _layers(name: str, precision: str, rows: Sequence[Row], first: Device) -> list[str]:
    def line(row: Row) -> list[str]:
        on = row.on[first.name]
        element = shapes.PRECISIONS[precision].itemsize
        return [
            str(row.shape),
            str(row.layers),
            f"{row.shape.operations / 1e9:.2f}",
            f"{row.shape.traffic(element) / 1e6:.1f}",
            f"{on.l2 / 1e6:.0f}",
            f"{on.shared / 1e6:.0f}",
            f"`{on.kernel}`",
            f"{on.blocks} ({on.resident})",
            f"{1e6 * on.floor:.1f}",
            f"{1e6 * on.seconds:.1f}",
            on.bound,
            *(_ratio(row.on[device.name].ratio) for device in DEVICES),
        ]

    head = (
        "layer",
        "layers",
        "GFLOP",
        "DRAM MB, least",
        "L2 MB, modelled",
        "shared MB, modelled",
        "kernel",
        "blocks (resident on an SM)",
        f"{first.name}: floor us, modelled",
        "kernel us, modelled",
        "bound by, modelled",
        *(f"{device.name}: of the floor, modelled" for device in DEVICES),
    )
    return [f"## {name}, {precision} (modelled)", "", *_table(head, map(line, rows))]


def main(path: Path = PAGE) -> int:
    """Write the page."""
    rows = rows_of(shapes_of_models())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page(rows), encoding="utf-8")
    for device in DEVICES:
        above = [row for row in rows if row.on[device.name].ratio > GOAL]
        print(f"{device.name}: {len(above)} of {len(rows)} layers above {GOAL} of their floor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
