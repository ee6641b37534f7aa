"""Block choices, grids and autotuning of the Triton kernels' launcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastfisher import triton as twins
from fastfisher.triton import launch
from fastfisher.triton.launch import Blocks, Target, choices


def test_a_capability_gets_the_entry_of_the_highest_below() -> None:
    table = launch.table()["outer_tile"]
    known = sorted(map(int, table))
    for capability in (known[-1], known[-1] + 5):
        (first, *_) = choices("outer_tile", Target(capability, 100), "tf32", "wide")
        entry = table[str(known[-1])]["tf32"]["wide"][0]
        assert first["BLOCK_ROWS"] == entry["BLOCK_ROWS"]
        assert first.options["num_warps"] == entry["warps"]
    assert "BLOCK_ROWS" in choices("outer_tile", Target(0, 2), "tf32", "wide")[0].sizes


def test_a_grid_that_no_device_takes_is_refused() -> None:
    blocks = Blocks("float32", "all", {}, {})
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match=r"the grid .* exceeds"):
        launch.launch(next(iter(twins.KERNELS.values())), (1, 65536), blocks, tensor)


def test_meta_tensors_are_only_recorded() -> None:
    out = torch.empty(96, 64, device="meta")
    operands = [torch.empty(5, 7, n, device="meta") for n in (96, 64)]
    linear = twins.KERNELS["linear_sum_grad_squared_"]
    with pytest.raises(RuntimeError, match="no Triton kernel runs on meta"):
        linear(out, *operands, 1.0)
    with launch.recording(meta=Target(80, 108)) as made:
        linear(out, *operands, 1.0)
    assert [each.kernel.__name__ for each in made] == ["outer_tile", "outer_sum_parts"]
    assert made[0].grid[1] == 5  # a part for each sample: the device has more room than tiles


FOUND = [Blocks("float32", "all", {"BLOCK": size}, {"num_warps": 4}) for size in (64, 128, 256)]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "_fastest_so_far", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    return tmp_path / "fastfisher" / "triton_blocks.json"


def fastest(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> tuple[int, torch.Tensor]:
    """The block size that wins with these times, and the tensor that all were to write to."""
    tried: list[int] = []

    def body(blocks: Blocks, outs: Any) -> None:
        tried.append(blocks["BLOCK"])
        outs[0].add_(1)

    def bench(run: Any) -> float:
        run()
        return times[tried[-1]]

    monkeypatch.setattr(launch.triton.testing, "do_bench", bench)
    out = torch.zeros(3)
    return launch._fastest("kernel float32 all", FOUND, [out], body)["BLOCK"], out


def test_the_fastest_choice_is_remembered(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    best, out = fastest(monkeypatch, {64: 2.0, 128: 1.0, 256: 3.0})
    assert best == 128
    assert not out.count_nonzero()  # what is timed writes to copies
    (entry,) = json.loads(cache.read_text()).values()
    assert entry == {"BLOCK": 128, "num_warps": 4}
    # In the process, and in the next one, without another measurement.
    assert fastest(monkeypatch, {})[0] == 128
    launch._fastest_so_far.clear()
    assert fastest(monkeypatch, {})[0] == 128


def test_a_choice_that_is_gone_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    fastest(monkeypatch, {64: 2.0, 128: 1.0, 256: 3.0})
    cache.write_text(cache.read_text().replace("128", "32"))
    launch._fastest_so_far.clear()
    assert fastest(monkeypatch, {64: 0.5, 128: 1.0, 256: 3.0})[0] == 64
    cache.write_text("not JSON")
    launch._fastest_so_far.clear()
    assert fastest(monkeypatch, {64: 2.0, 128: 1.0, 256: 0.1})[0] == 256


def test_nothing_is_timed_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTFISHER_AUTOTUNE", raising=False)
    assert not launch._may_autotune(torch.zeros(1))
    monkeypatch.setenv("FASTFISHER_AUTOTUNE", "1")
    assert not launch._may_autotune(torch.zeros(1))  # not on a device


def test_a_float_reaches_a_kernel_whole() -> None:
    for value in (0.1, -2.5e-310, 0.0, 1e300):
        bits = torch.tensor(launch.float_bits(value), dtype=torch.int64)
        assert bits.view(torch.float64).item() == value
