"""The model of the GPU kernels' time: what it counts, and that its page says what it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import gpu_model
from benchmarks.gpu_model import DEVICES, Cost, Modelled, Row
from benchmarks.shapes import Convolution, Linear

from .emulation.launches import Launch
from .emulation.ptx import CompilerMissing, replayed
from .emulation.ptx_memory import Access, Bytes, Ints, SharedMemory, wavefronts
from .emulation.sass import Kernel, parse, ways

A100 = DEVICES[0]
NAME = "outer_simt<Tile<float, 128, 128, 8, 8, 1>, true>"
WAYS = [
    {"FFMA": 256, "LDS.128": 16, "ISETP": 8},
    {"LDGSTS.E.BYPASS.128": 4, "IADD3": 26},
    {"FFMA": 64, "MOV": 16},
    {"STG.E.128": 16, "MOV": 84},
]
KERNEL = Kernel(
    name=NAME,
    source="outer_simt",
    architecture=80,
    registers=200,
    stack=0,
    spills=0,
    shared=34304,
    threads=256,
    opcodes={},
    hot={},
    ways=[{"usual": way, "fullest": way} for way in WAYS],
)


def test_instructions_are_sorted_by_what_they_keep_busy() -> None:
    way = {"FFMA": 5, "HMMA.16816.F32.BF16": 3, "LDS.128": 2, "LDSM.16.M88.4": 1, "LDG.E.128": 7}
    assert Cost.of(way) == Cost(issued=18, float32=5, tensor=3, shared=12)


def test_a_block_runs_each_loop_as_often_as_its_shape_says() -> None:
    # 4 positions a turn of the hot loop, kSteps a step: 3 samples of 33 positions.
    steps = -(-33 // gpu_model.step_positions())
    # Its loads of 16 bytes are paired: two wavefronts each.
    cost = gpu_model.cost_of_block(KERNEL, "float32", samples=3, positions=33)
    assert cost.issued == 3 * (9 * 280 + steps * 30 + 80) + 100
    assert cost.float32 == 3 * (9 * 256 + 64)
    assert cost.shared == 3 * (9 * 32 + steps * 16)


def test_full_tiles_cost_their_multiplications_and_the_last_wave_counts() -> None:
    shape = Linear(samples=64, positions=4096, inputs=1024, outputs=1024)

    def modelled(blocks: int) -> Modelled:
        launch = Launch(NAME, (blocks, 1, 1), (256, 1, 1), 0)
        return gpu_model.model(shape, "float32", A100, [launch], {NAME: KERNEL})

    one = modelled(A100.multiprocessors)
    # An A100 issues two float32 instructions a cycle: they are what takes longest.
    assert one.bound == "FFMA"
    expected = 64 * (1024 * 256 + 64) * 8 / 2 / A100.clock
    assert one.seconds == pytest.approx(expected)
    assert modelled(A100.multiprocessors + 1).seconds == pytest.approx(2 * expected)


def test_few_warps_have_few_lanes() -> None:
    """One warp a block, one block a multiprocessor: three of four schedulers have nothing to do."""
    shape = Linear(samples=64, positions=4096, inputs=128, outputs=128)
    launch = Launch(NAME, (A100.multiprocessors, 1, 1), (32, 1, 1), 0)
    one = gpu_model.model(shape, "float32", A100, [launch], {NAME: replace(KERNEL, threads=32)})
    assert one.bound == "FFMA"
    # A turn of the hot loop is half a position of the whole tile, at half an instruction a cycle.
    assert one.seconds == pytest.approx(64 * (2 * 4096 * 256 + 64) * 2 / A100.clock)


def test_the_floor_by_issue_has_the_squares_and_what_mma_sync_reaches() -> None:
    wide = Linear(samples=64, positions=1 << 20, inputs=512, outputs=512)
    products = 2 * 64 * (1 << 20) * 512 * 512
    squares = 2 * 64 * 512 * 512
    for device in DEVICES:
        floor = gpu_model.floor_by_issue(wide, "float32", device)
        assert floor == pytest.approx((products + squares) / device.fp32)
        floor = gpu_model.floor_by_issue(wide, "bfloat16", device)
        assert floor == pytest.approx(products / (device.bf16 * device.mma))
    # Of few positions the squares are more work than the products, on tensor cores.
    few = Linear(samples=64, positions=4, inputs=4096, outputs=4096)
    floor = gpu_model.floor_by_issue(few, "bfloat16", A100)
    assert floor == pytest.approx(2 * 64 * 4096 * 4096 / A100.fp32)
    # A single one is nothing but bytes.
    one = Linear(samples=2, positions=1, inputs=4096, outputs=4096)
    floor = gpu_model.floor_by_issue(one, "bfloat16", A100)
    assert floor == pytest.approx(one.traffic(2) / A100.dram)


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        (lambda lane: 4 * lane, 4, 1),
        (lambda lane: 0 * lane, 4, 1),
        (lambda lane: 128 * lane, 4, 32),
        (lambda lane: 8 * lane, 8, 2),
        (lambda lane: 16 * lane, 16, 4),
        # Neighbours, and lanes two apart, share a read; lanes four apart do not.
        (lambda lane: 16 * (lane // 2), 16, 2),
        (lambda lane: 16 * (lane % 2 + lane // 4 * 2), 16, 2),
        (lambda lane: 16 * (lane % 4 + lane // 8 * 4), 16, 4),
        (lambda lane: 256 * (lane // 2), 16, 16),
    ],
)
def test_wavefronts(address: Callable[[Ints], Ints], size: int, expected: int) -> None:
    access = Access(address(np.arange(64) % 32), size, np.ones(64, bool), None)
    assert wavefronts(access) == [expected, expected]


def test_products_read_shared_memory_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model takes for granted, on the addresses of the compiled code."""
    try:
        operators = replayed()
    except CompilerMissing as error:
        pytest.skip(str(error))
    taken: Counter[int] = Counter()
    load = SharedMemory.load

    def counting(memory: SharedMemory, access: Access) -> Bytes:
        if access.size == 16 and access.mask.all():
            taken.update(wavefronts(access))
        return load(memory, access)

    monkeypatch.setattr(SharedMemory, "load", counting)
    for sides in ((256, 256), (100, 60), (20, 12)):
        taken.clear()
        grad, x = (torch.ones(1, 16, side) for side in sides)
        operators.linear_sum_grad_squared_(torch.zeros(sides), grad, x, 1.0, 2, False)
        # All but those of the table of columns, which a thread reads once a step.
        assert taken[2] > 0.9 * taken.total()
        assert not taken - Counter({2: taken[2], 4: taken[4]})


def test_a_kernel_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="outer_depthwise<float, float> is not modelled"):
        gpu_model.tile_of("outer_depthwise<float, float>")


def test_launches_are_those_for_a_device() -> None:
    """Not those for the tiny one that other emulated builds plan for."""
    shape = Convolution(64, 64, (56, 56), 64, (3, 3), padding=(1, 1))
    launch, *adding = gpu_model.launches_of(shape, "float32")
    assert launch.kernel.startswith("outer_simt")
    assert launch.blocks * launch.threads > 1 << 15
    assert (len(adding) == 1) == (launch.grid[1] > 1)


LOOPS = """
.text._Z1kPf:
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_1:
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   LDGSTS.E R4, [R2.64] ;
        /*0030*/                   LDGSTS.E R4, [R2.64] ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   LDGSTS.E.BYPASS.128 R4, [R2.64] ;
.L_x_3:
        /*0060*/                   HMMA.16816.F32.BF16 R0, R1, R2, R3 ;
        /*0070*/              @!P2 BRA `(.L_x_4) ;
        /*0080*/                   FFMA R0, R1, R2, R3 ;
.L_x_4:
        /*0090*/               @P3 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E R0, [R2.64] ;
        /*00b0*/                   EXIT ;
"""


def test_the_way_of_a_full_tile_is_found() -> None:
    loop, kernel = ways(parse(LOOPS)["_Z1kPf"])
    usual = {"BRA": 3, "LDGSTS.E.BYPASS.128": 1, "HMMA.16816.F32.BF16": 1}
    assert loop["usual"] == usual
    assert loop["fullest"] == {**usual, "FFMA": 1}
    assert kernel["usual"] == {"S2R": 1, "STG.E": 1, "EXIT": 1}


def test_every_table_says_that_it_is_modelled() -> None:
    shape = Linear(samples=64, positions=4, inputs=8, outputs=8)
    on = {
        device.name: Modelled(NAME, 4, 1, 2, 5e-7, 1e-6, ratio * 1e-6, "issue", 1e6, 1e6)
        for device, ratio in zip(DEVICES, (1.0, 1.29, 1.31), strict=True)
    }
    rows = [
        Row(model, shape, 2, precision, on)
        for model in gpu_model.MODELS
        for precision in ("float32", "tf32", "bfloat16")
    ]
    page = gpu_model.page(rows)
    assert page.startswith("# GPU kernels: modelled, never run\n")
    titles = re.findall(r"^## (.*)", page, re.MULTILINE)
    assert len(titles) == 1 + 3 + 3 * len(gpu_model.MODELS)
    assert all("modelled" in title for title in titles)
    assert "| 2.00, 1.00 | 2.58, 1.29 | 2.62, **1.31** |" in page
