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
SCHEDULERS = 4
"""Warps that a multiprocessor issues an instruction of, a cycle."""
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
        l2_size: bytes.
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
    l2_size: float

    @property
    def clock(self) -> float:
        """Cycles/s at which the float32 peak is reached."""
        return self.fp32 / (2 * self.lanes * self.multiprocessors)

    def peak(self, precision: str) -> float:
        """FLOP/s of the data sheet."""
        return {"float32": self.fp32, "tf32": self.tf32, "bfloat16": self.bf16}[precision]

    def reached(self, precision: str) -> float:
        """FLOP/s that the instructions of the kernels' path can reach."""
        return self.peak(precision) * (1.0 if precision == "float32" else self.mma)


DEVICES = (
    # NVIDIA A100 data sheet, SXM4 80 GB.
    Device("A100", 80, 108, 64, 19.5e12, 156e12, 312e12, 1.0, 2.039e12, 5e12, 40e6),
    # NVIDIA H100 data sheet, SXM5; tensor peaks are half of those with sparsity.
    Device("H100", 90, 132, 128, 66.9e12, 494.7e12, 989.4e12, 0.62, 3.35e12, 7e12, 50e6),
    # NVIDIA HGX B200 data sheet, an eighth of eight; tensor peaks are half of those with sparsity.
    Device("B200", 100, 148, 128, 75e12, 1.1e15, 2.25e15, 0.3, 8e12, 10e12, 126e6),
)


@dataclass(frozen=True, slots=True)
class Modelled:
    """What the model says of one layer on one device.

    Attributes:
        kernel: the instance that is launched.
        blocks: thread blocks of the launch.
        splits: of the samples.
        resident: blocks that a multiprocessor holds at once.
        floor: seconds by the data sheet: operations at the peak, or bytes at DRAM's rate.
        issue_floor: seconds by instruction issue and bytes, see :func:`floor_by_issue`.
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
    issue_floor: float
    seconds: float
    bound: str
    l2: float
    shared: float

    @property
    def ratio(self) -> float:
        """Modelled time over the floor by instruction issue and bytes."""
        return self.seconds / self.issue_floor


#: Multiply-adds of one warp-wide tensor-core instruction.
_PRODUCTS = {"bfloat16": 16 * 8 * 16, "tf32": 16 * 8 * 8}
_WIDTHS = {"128": 4, "64": 2, "4": 4, "2": 2}


@dataclass(frozen=True, slots=True)
class Cost:
    """Warp-wide instructions by what they keep busy; ``shared`` counts wavefronts of 128 bytes."""

    issued: float = 0
    float32: float = 0
    tensor: float = 0
    shared: float = 0

    @classmethod
    def of(cls, way: Mapping[str, int], paired: bool = False) -> Cost:
        """Of the instructions on one way through the code.

        Args:
            way: how often each occurs.
            paired: lanes that read 16 bytes of shared memory do so in pairs, see
                :func:`tests.emulation.ptx_memory.wavefronts`.
        """
        shared = 0
        for opcode, count in way.items():
            name, *modifiers = opcode.split(".")
            if name in ("LDS", "STS", "LDSM", "LDGSTS"):
                each = max((_WIDTHS.get(each, 1) for each in modifiers), default=1)
                shared += count * (2 if paired and name == "LDS" and each == 4 else each)
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


def tile_of(kernel: str) -> tuple[int, int]:
    """Rows and columns of the tile that a block computes.

    Raises:
        ValueError: the kernel is none that is modelled.
    """
    if found := re.match(r"outer_simt<Tile<float, (\d+), (\d+),", kernel):
        return int(found[1]), int(found[2])
    if found := re.match(r"outer_mma<\w+, \w+, (\d+)>", kernel):
        return int(found[1]), int(found[1])
    raise ValueError(f"{kernel} is not modelled")


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
        _, step, sample, rest = usual
        # Its products read shared memory in pairs; test_gpu_model.py looks at the addresses.
        inner = Cost.of(kernel.ways[0]["usual"], paired=True)
        at_once = inner.float32 * 32 * warps / math.prod(tile_of(kernel.name))
        a_sample = (
            inner.times(math.ceil(positions / at_once))
            + step.times(math.ceil(positions / step_positions()))
            + sample
        )
    else:
        step, rest = usual
        at_once = step.tensor * _PRODUCTS[precision] * warps / math.prod(tile_of(kernel.name))
        end = Cost.of(kernel.ways[0]["fullest"]) + step.times(-1)
        a_sample = step.times(math.ceil(positions / at_once)) + end
        if 0 < positions % at_once <= at_once / 2:
            # Half of the last step's products is left out; its copies are not.
            a_sample += Cost(issued=step.tensor, tensor=step.tensor).times(-0.5)
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


def floor_by_issue(shape: shapes.Shape, precision: str, device: Device) -> float:
    """Seconds that no kernel of its path can go below: the longest of what it cannot leave out.

    That is the products at the rate of the path's instruction; a square for each entry and sample,
    which takes a float32 multiply-add whatever computed the product; the slots that both are issued
    in; and the bytes that have to move at DRAM's rate. On the float32 path products and squares
    share the same lanes.
    """
    squares = 2.0 * shape.samples * entries_of(shape)
    slots = device.multiprocessors * device.clock * SCHEDULERS
    if precision == "float32":
        arithmetic = (shape.operations + squares) / device.fp32
    else:
        issued = shape.operations / 2 / _PRODUCTS[precision] + squares / 2 / 32
        arithmetic = max(
            shape.operations / device.reached(precision), squares / device.fp32, issued / slots
        )
    element = shapes.PRECISIONS[precision].itemsize
    return max(arithmetic, shape.traffic(element) / device.dram)


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
    tile, element = sum(tile_of(kernel.name)), shapes.PRECISIONS[precision].itemsize
    splits = launch.grid[1]
    samples, positions = math.ceil(shape.samples / splits), positions_of(shape)
    one = cost_of_block(kernel, precision, samples, positions)
    warps = launch.threads // 32
    resident = blocks_per_sm(
        device.architecture, kernel.registers, kernel.shared + launch.shared, launch.threads
    )
    # The last wave may leave multiprocessors idle: the busiest one has the rounded-up share.
    turns = math.ceil(launch.blocks / device.multiprocessors)
    # A scheduler has a quarter of the lanes and of the tensor cores, and whole warps.
    warps_each = math.ceil(turns * warps / SCHEDULERS)
    products = _PRODUCTS.get(precision, 0)
    rate = device.reached(precision) / 2 / device.multiprocessors / device.clock
    cycles = {
        "issue": warps_each * one.issued,
        "FFMA": warps_each * one.float32 / (device.lanes / 32 / SCHEDULERS),
        "tensor cores": warps_each * one.tensor * products / (rate / SCHEDULERS),
        "shared memory": turns * warps * one.shared,
    }
    outs = 4 * entries_of(shape)
    blocks = launch.blocks
    l2 = blocks * samples * positions * tile * element + 2 * outs
    seconds = {name: value / device.clock for name, value in cycles.items()}
    seconds["L2"] = l2 / device.l2
    seconds["DRAM"] = (shape.traffic(element) + (splits > 1) * splits * outs) / device.dram
    bound = max(seconds, key=seconds.__getitem__)
    # The second kernel reads every split's sums, just written, and adds to out. ASSUMED: what takes
    # no more than half of L2 is still there.
    workspace = splits * outs
    rate = device.l2 if workspace <= device.l2_size / 2 else device.dram
    second = workspace / rate + 2 * outs / device.dram if adding else 0.0
    floor = max(shape.operations / device.peak(precision), shape.traffic(element) / device.dram)
    return Modelled(
        kernel.name,
        blocks,
        splits,
        resident,
        floor,
        floor_by_issue(shape, precision, device),
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
                "L2 MB",
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
                    f"{d.l2_size / 1e6:.0f}",
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

A layer has two floors. That by the data sheet is the longer of two times: its operations at the
peak, and the bytes that have to move at least (gradient, input, sums in and out) at DRAM's rate.
Part of that peak is out of reach of these kernels, and the floor by instruction issue and bytes
leaves it out. Squares take a float32 multiply-add for each entry and sample, whatever computed the
products, on lanes that float32 products need, too. And on newer devices the tensor cores' whole
peak belongs to instructions of those devices alone; these kernels use `mma.sync`, which all have.
The longest of products, squares, the slots that both are issued in, and bytes is that floor: no
kernel of these instructions can be faster.

The kernel's time comes from its machine code. The launcher decides on the tile, the grid and the
splits, as it would on a device; the emulator notes that. `nvdisasm` gives the instructions of the
hot loop, of the loops around it and of the rest, on the way that a full tile takes through the
branches, and the shape gives how often each runs. Per multiprocessor the slowest counts:
instructions issued, float32 arithmetic and tensor-core products, each by the scheduler that has
most warps (there are four, with a quarter of the lanes and of the tensor cores each), and shared
memory. Blocks are dealt out evenly, and the busiest multiprocessor decides: that is the tail. L2
and DRAM are bounds of the whole device. Where samples are split, writing their sums
counts as DRAM's work, and reading them is added: at the rate of L2 if they take at most half of it
(assumed: they were written last), else of DRAM.

Shared memory returns 128 bytes a cycle, a register of a warp: a wavefront. Loads of 16 bytes a lane
take four; or two, where all neighbouring lanes, or all lanes two apart, read the same, as
[NVIDIA says](https://forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228) of
devices of compute capability 7.x. That they do in `outer_simt` is checked on the addresses of its
compiled code; that later devices still serve them so is an assumption. Loads by ldmatrix and copies
from global memory share nothing.

Not in it: latencies (with the resident blocks shown they are taken to be hidden), launch times,
bank conflicts, clocks that fall under load, the contention of L2 with DRAM. All of it is a bound
from below, which a real run will not beat. The goal is at most {GOAL} times the floor by
instruction issue and bytes; what is above is **bold**.
"""


def _totals(rows: Sequence[Row]) -> list[str]:
    head = ["model", "precision", "GFLOP"]
    for device in DEVICES:
        head += [
            f"{device.name}: data sheet's floor ms, modelled",
            "floor by issue and bytes ms, modelled",
            "kernels ms, modelled",
            "of the data sheet's floor, modelled",
            "of the floor by issue and bytes, modelled",
        ]
    body = []
    for name in MODELS:
        for precision in shapes.PRECISIONS:
            chosen = [row for row in rows if (row.model, row.precision) == (name, precision)]
            work = sum(row.layers * row.shape.operations for row in chosen)
            line = [f"{name}: {CASES[name].title}", precision, f"{work / 1e9:.1f}"]
            for device in DEVICES:
                on = [(row.layers, row.on[device.name]) for row in chosen]
                floor = sum(count * each.floor for count, each in on)
                issue = sum(count * each.issue_floor for count, each in on)
                taken = sum(count * each.seconds for count, each in on)
                line += [f"{1e3 * each:.3f}" for each in (floor, issue, taken)]
                line += [f"{taken / floor:.2f}", _ratio(taken / issue)]
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
            f"{1e6 * on.issue_floor:.1f}",
            f"{1e6 * on.seconds:.1f}",
            on.bound,
            *(
                f"{each.seconds / each.floor:.2f}, {_ratio(each.ratio)}"
                for each in (row.on[device.name] for device in DEVICES)
            ),
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
        f"{first.name}: data sheet's floor us, modelled",
        "floor by issue and bytes us, modelled",
        "kernel us, modelled",
        "bound by, modelled",
        *(f"{device.name}: of either floor, modelled" for device in DEVICES),
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
