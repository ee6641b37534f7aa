"""The model of the GPU kernels' time: what it counts, and that its page says what it is."""

from __future__ import annotations

import re

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import DEVICES, Cost, Modelled, Row
from benchmarks.shapes import Convolution, Linear

from .emulation.launches import Launch
from .emulation.sass import Kernel, parse, ways

A100 = DEVICES[0]
NAME = "outer_simt<Tile<float, 128, 8, 8, 1>, true>"
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
    cost = gpu_model.cost_of_block(KERNEL, "float32", samples=3, positions=33)
    assert cost.issued == 3 * (9 * 280 + steps * 30 + 80) + 100
    assert cost.float32 == 3 * (9 * 256 + 64)
    assert cost.shared == 3 * (9 * 64 + steps * 16)


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
        device.name: Modelled(NAME, 4, 1, 2, 1e-6, ratio * 1e-6, "issue", 1e6, 1e6)
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
    assert "| 1.00 | 1.29 | **1.31** |" in page
