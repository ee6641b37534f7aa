"""What the compilers made of the GPU kernels stays within the committed budgets, without a card."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fastfisher
from fastfisher import _build

from . import budgets
from .emulation import sass, triton_sass
from .emulation.launches import Launch, noting
from .emulation.occupancy import LIMITS, RESERVED, blocks_per_sm
from .emulation.sass import ARCHITECTURES, ROOT, Kernel, ToolsMissing, matching

CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(path.stem for path in CUDA.glob("*.cu"))


@pytest.fixture(scope="module")
def toolkit() -> None:
    try:
        for name in ("nvcc", "nvdisasm", "cuobjdump"):
            sass.tool(name)
    except ToolsMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def launches() -> dict[str, list[Launch]]:
    return budgets.launches_of_cases()


def assert_within_budgets(
    kernels: list[Kernel], source: str, architecture: int, launches: dict[str, list[Launch]]
) -> None:
    recorded = {
        name: of_kernel[f"sm_{architecture}"]
        for name, of_kernel in budgets.read(source).items()
        if f"sm_{architecture}" in of_kernel
    }
    assert {kernel.name for kernel in kernels} == set(recorded), f"record: {budgets.RECORD}"
    problems = [
        f"{budgets.label(kernel)}: {problem}"
        for kernel in kernels
        for problem in (
            *budgets.breaches(kernel),
            *budgets.excesses(kernel, launches.get(kernel.name, []), recorded[kernel.name]),
        )
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_stay_within_budget(
    source: str, architecture: int, launches: dict[str, list[Launch]]
) -> None:
    kernels = sass.compile_kernels(CUDA / f"{source}.cu", architecture)
    assert_within_budgets(kernels, source, architecture, launches)


@pytest.mark.parametrize("capability", triton_sass.CAPABILITIES)
def test_triton_kernels_stay_within_budget(capability: int) -> None:
    pytest.importorskip("triton")
    kernels = triton_sass.compile_all([capability])
    launches = budgets.triton_launches(kernels)
    assert_within_budgets(kernels, triton_sass.SOURCE, capability, launches)


def test_every_budget_has_a_source() -> None:
    assert sorted(path.stem for path in budgets.FOLDER.glob("*.json")) == sorted(
        [*SOURCES, triton_sass.SOURCE]
    )


@pytest.mark.usefixtures("toolkit")
def test_registers_taken_away_turn_a_budget_red(
    tmp_path: Path, launches: dict[str, list[Launch]]
) -> None:
    """The hungriest kernel, compiled to fit 32 registers, has to spill."""
    kernels = sass.compile_all(architectures=[80])
    hungriest = max(kernels, key=lambda kernel: kernel.registers)
    assert hungriest.registers > 40
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / f"{hungriest.source}.cu"
    # 1024 threads of 2 blocks leave 32 registers each; nvcc ignores -maxrregcount beside bounds.
    for path in (source, *source.parent.glob("*.cuh")):
        bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
        path.write_text(re.sub(bounds, "__launch_bounds__(1024, 2)", path.read_text()))
    starved = {kernel.name: kernel for kernel in sass.compile_kernels(source, 80)}[hungriest.name]
    found = budgets.breaches(starved)
    assert any("spilled" in problem for problem in found), found
    assert any("STL, which are forbidden" in problem for problem in found), found


KERNEL = Kernel(
    name="outer_simt<64, float>",
    source="outer_simt",
    architecture=80,
    registers=100,
    stack=0,
    spills=0,
    shared=16384,
    threads=256,
    opcodes={"FFMA": 64, "LDG.E.128.CONSTANT": 4, "STG.E": 2, "MEMBAR.SC.GPU": 1},
    hot={"FFMA": 64},
)
LAUNCHES = [Launch(KERNEL.name, (1, 1, 1), (256, 1, 1), 0)]
RULES = (budgets.Rule("outer_simt", required=("FFMA",), forbidden=("HMMA",), membars=1),)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "RULES", RULES)


def changed(**fields: object) -> Kernel:
    return dataclasses.replace(KERNEL, **fields)


def with_opcodes(**opcodes: int) -> Kernel:
    return changed(opcodes={**KERNEL.opcodes, **opcodes})


@pytest.mark.usefixtures("rules")
def test_a_kernel_is_within_its_own_budget() -> None:
    assert budgets.breaches(KERNEL) == []
    assert budgets.excesses(KERNEL, LAUNCHES, budgets.budget(KERNEL, LAUNCHES)) == []
    more = changed(registers=KERNEL.registers + budgets.SLACK)
    assert budgets.excesses(more, LAUNCHES, budgets.budget(KERNEL, LAUNCHES)) == []


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (changed(threads=0), "__launch_bounds__"),
        (changed(spills=4), "4 bytes of registers are spilled"),
        (changed(stack=16), "16 bytes of local memory"),
        (changed(name="other<float>"), "what kind of kernel"),
        (with_opcodes(**{"HMMA.1688.F32.TF32": 8}), "8 HMMA, which are forbidden"),
        (with_opcodes(**{"LDL.LU": 1}), "1 LDL, which are forbidden"),
        (with_opcodes(DFMA=3), "3 DFMA, which are forbidden"),
        (with_opcodes(FFMA=0), "no FFMA"),
        (with_opcodes(**{"MEMBAR.ALL.GPU": 1}), "2 MEMBAR, at most 1 allowed"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_breach_is_found(kernel: Kernel, message: str) -> None:
    [found] = budgets.breaches(kernel)
    assert message in found


@pytest.mark.usefixtures("rules")
def test_double_kernels_may_use_double() -> None:
    kernel = dataclasses.replace(
        KERNEL, name="outer_simt<64, double>", opcodes={**KERNEL.opcodes, "DFMA": 3}
    )
    assert budgets.breaches(kernel) == []


def test_one_of_several_instructions_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = budgets.Rule("outer_simt", one_of=("LDG.128", "LDGSTS.128"), membars=1)
    monkeypatch.setattr(budgets, "RULES", (rule,))
    assert budgets.breaches(KERNEL) == []
    narrow = changed(opcodes={"LDG.E.64": 4, "LDS.128": 2})
    assert budgets.breaches(narrow) == ["none of LDG.128, LDGSTS.128"]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (changed(registers=109), "109 registers, at most 108 allowed"),
        (changed(shared=16400), "16400 bytes of shared memory, at most 16384"),
        (changed(opcodes={"FFMA": 64, "STG.E": 2}), "no LDG.128 any more"),
        (with_opcodes(**{"RED.E.ADD": 1}), "1 RED, at most 0 allowed"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_excess_is_found(kernel: Kernel, message: str) -> None:
    [found] = budgets.excesses(kernel, LAUNCHES, budgets.budget(KERNEL, LAUNCHES))
    assert message in found


def test_blocks_lost_to_dynamic_shared_memory_are_found() -> None:
    bounds = budgets.budget(KERNEL, LAUNCHES)
    grown = [dataclasses.replace(LAUNCHES[0], shared=100_000)]
    assert budgets.excesses(KERNEL, grown, bounds) == ["1 blocks fit an SM, at least 2 demanded"]
    [found] = budgets.excesses(KERNEL, [], bounds)
    assert "no proof case" in found


@pytest.mark.usefixtures("rules")
def test_recording_refuses_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "FOLDER", tmp_path)
    stale = tmp_path / "gone.json"
    stale.write_text("{}")
    with pytest.raises(ValueError, match="sm_80: 4 bytes of registers are spilled"):
        budgets.record([changed(spills=4)], {KERNEL.name: LAUNCHES})
    with pytest.raises(ValueError, match="no proof case launches it"):
        budgets.record([changed(opcodes={"FFMA": 1})], {})
    assert list(tmp_path.iterdir()) == [stale]
    good = changed(opcodes={"FFMA": 1})
    assert budgets.record([good], {KERNEL.name: LAUNCHES}) == [tmp_path / "outer_simt.json"]
    assert not stale.exists()
    [(name, bounds)] = json.loads((tmp_path / "outer_simt.json").read_text()).items()
    assert name == good.name
    assert bounds == {"sm_80": budgets.budget(good, LAUNCHES)}


DISASSEMBLY = """
.text._Z1kPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
.L_x_2:
.L_x_9:
        /*0020*/                   FFMA R0, R1.reuse, R2, R3 ;
        /*0030*/              @!P2 BRA `(.L_x_2) ;
        /*0040*/               @P0 BRA `(.L_x_3) ;
        /*0050*/                   FADD R0, R1, R2 ;
.L_x_3:
        /*0060*/             @!UP1 BRA.U `(.L_x_1) ;
        /*0070*/               @P3 EXIT ;
.L_x_0:
        /*0080*/                   BRA `(.L_x_0);
        /*0090*/                   NOP;
.text._Z1jv:
        /*0000*/                   EXIT ;
"""


def test_a_disassembly_is_read() -> None:
    functions = sass.parse(DISASSEMBLY)
    assert list(functions) == ["_Z1kPf", "_Z1jv"]
    code = functions["_Z1kPf"]
    assert [(each.offset, each.target) for each in code if each.target is not None] == [
        (0x30, 0x20),
        (0x40, 0x60),
        (0x60, 0x10),
        (0x80, 0x80),
    ]
    assert "NOP" not in [each.opcode for each in code]
    outer, inner = sass.loops(code)
    assert [each.opcode for each in outer] == ["LDG.E.128.CONSTANT", "BRA", "FADD", "BRA.U"]
    assert [each.opcode for each in inner] == ["FFMA", "BRA"]
    assert sass.hot_loop(code) == Counter(FFMA=1, BRA=1)
    assert sass.hot_loop(functions["_Z1jv"]) == Counter()


def test_patterns_match_whole_opcodes_and_any_order_of_modifiers() -> None:
    opcodes = {"LDG.E.128.CONSTANT": 3, "LDGSTS.E.BYPASS.128": 5, "LDG.E": 7}
    assert matching(opcodes, "LDG") == 10
    assert matching(opcodes, "LDG.128") == 3
    assert matching(opcodes, "LDGSTS.128.BYPASS") == 5
    assert matching(opcodes, "LDG*") == 15
    assert matching(opcodes, "LD") == 0


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void fastfisher::cuda::(anonymous namespace)::k<64, true>(float*, int)", "k<64, true>"),
        ("fastfisher::cuda::_GLOBAL__N__718797c9_4_a_cu_440a::k(float*)", "k"),
        (
            "void k<(int)4, fastfisher::cuda::V<float, (bool)1> >(void (*)(int))",
            "k<4, V<float, 1> >",
        ),
    ],
)
def test_names_lose_what_varies(demangled: str, name: str) -> None:
    assert sass.undecorated(demangled) == name


def test_launches_are_noted_and_not_run() -> None:
    import torch

    from .emulation.build import emulated

    out = torch.full((4, 64), 7.0)
    with noting() as launches:
        emulated().linear_sum_grad_squared_(
            out, torch.ones(2, 3, 4), torch.ones(2, 3, 64), 1.0, 2, False
        )
    assert launches
    assert all(each.blocks > 0 and each.threads > 0 for each in launches)
    assert (out == 7).all()


OCCUPANCY_PROGRAM = r"""
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major, minor, threads_per_sm, registers, threads;
  size_t shared_per_sm, reserved, shared;
  while (std::scanf("%d %d %d %zu %zu %d %zu %d", &major, &minor, &threads_per_sm, &shared_per_sm,
                    &reserved, &registers, &shared, &threads) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads_per_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = shared_per_sm;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = shared_per_sm - reserved;
    device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared_per_sm;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared))
      return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_nvidias_calculator(tmp_path: Path) -> None:
    home = _build.toolkit()
    if home is None or not (home / "include" / "cuda_occupancy.h").exists():
        pytest.skip("cuda_occupancy.h was not found; set CUDA_HOME to a toolkit")
    program = tmp_path / "occupancy"
    program.with_suffix(".cpp").write_text(OCCUPANCY_PROGRAM)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, f"-I{home / 'include'}", "-o", program, program.with_suffix(".cpp")], check=True
    )
    asked = [
        (architecture, registers, shared, threads)
        for architecture, limits in LIMITS.items()
        for registers in range(16, 256, 3)
        for shared in (0, 1, 127, 4096, 16384, 33000, 49152, limits.shared - RESERVED)
        for threads in (32, 64, 96, 128, 160, 256, 384, 512, 1024)
    ]
    lines = (
        f"{a // 10} {a % 10} {LIMITS[a].threads} {LIMITS[a].shared} {RESERVED} {r} {s} {t}"
        for a, r, s, t in asked
    )
    answers = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout.split()
    assert [blocks_per_sm(*each) for each in asked] == list(map(int, answers))
    # It can tell: the list has kernels of which none fits, and many numbers of blocks.
    assert {"0", "1", "2", "32"} <= set(answers)


@pytest.fixture(scope="module")
def module() -> Path:
    """The built module ``fastfisher._cuda``."""
    for path in Path(fastfisher.__file__).parent.glob("_cuda.*so"):
        return path
    pytest.skip("fastfisher._cuda is not built: there was no toolkit that fits torch")


@pytest.mark.usefixtures("toolkit")
def test_the_module_has_code_for_every_architecture(module: Path) -> None:
    listing = sass.run([sass.tool("cuobjdump"), "--list-elf", module])
    found = Counter(re.findall(r"\.sm_(\d+)\.cubin", listing))
    assert found == {str(architecture): len(SOURCES) for architecture in ARCHITECTURES}


def test_the_module_imports_without_a_driver(module: Path) -> None:
    """And registers what its sources say; the driver's library is not linked."""
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True)
    assert "libcudart.so" in needed.stdout
    assert "libcuda.so" not in needed.stdout
    sources = "".join(path.read_text() for path in CUDA.glob("*.cpp"))
    names = re.findall(r'm\.impl\("(\w+)"', sources)
    assert names
    program = (
        "import torch, fastfisher, importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('fastfisher._cuda', {str(module)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"sys.exit([n for n in {names!r} if not has('fastfisher::' + n, 'CUDA')] or 0)\n"
    )
    # A card in the machine is hidden, so that the same holds wherever this runs.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
