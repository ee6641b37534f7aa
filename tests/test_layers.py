"""The table of layer shapes: which shapes there are, what they are held against, what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import layers, markdown, roofline, shapes
from benchmarks.layer_tables import tables
from benchmarks.registry import IMAGE_LAYOUTS, Case
from benchmarks.roofline import Row
from benchmarks.shapes import Convolution, Linear
from fastfisher import ops

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance" / "layers.md"


class Tiny(nn.Module):
    """Two equal convolutions, one that differs, a linear layer on positions and one on none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.third = nn.Conv2d(3, 4, (1, 3), stride=(2, 1), dilation=(1, 2))
        self.tokens = nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)).relu()).flatten(2)
        return self.head(self.tokens(x.unflatten(2, (-1, 5))).mean((1, 2)))


def tiny_batch(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(batch, 3, 6, 9, generator=generator)
    return inputs, torch.randint(2, (batch,), generator=generator)


TINY = Case("tiny", "a tiny model", Tiny, tiny_batch, batch=5, layouts=IMAGE_LAYOUTS)
OTHER = replace(TINY, name="other", batch=2)
CASES = {case.name: case for case in (TINY, OTHER)}

EVERY_OPTION = Convolution(3, 4, (7, 8), 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2)
PLAIN = Convolution(3, 4, (5, 6), 7, (3, 3), padding=(1, 1))
LINEAR = Linear(3, 5, 4, 6)


# Shapes


def test_every_shape_of_a_model_is_found_with_its_number_of_layers() -> None:
    assert list(shapes.collect(TINY).items()) == [
        (Convolution(5, 3, (6, 9), 3, (3, 3), padding=(1, 1)), 2),
        (Convolution(5, 3, (6, 9), 4, (1, 3), stride=(2, 1), dilation=(1, 2)), 1),
        (Linear(5, 12, 5, 6), 1),
    ]


@pytest.mark.parametrize("shape", [EVERY_OPTION, PLAIN])
def test_output_is_as_large_as_torch_makes_it(shape: Convolution) -> None:
    images = torch.zeros(shape.samples, shape.inputs, *shape.image)
    weight = torch.zeros(shape.weight_shape)
    options = shape.stride, shape.padding, shape.dilation, shape.groups
    assert torch.conv2d(images, weight, None, *options).shape[2:] == shape.output_image


def test_operations_are_those_of_the_matrix_product() -> None:
    assert PLAIN.operations == 2 * (3 * 5 * 6) * (4 * 9) * 7
    assert LINEAR.operations == 2 * (3 * 5) * 4 * 6


@pytest.mark.parametrize(
    "shape", [EVERY_OPTION, PLAIN, Convolution(1, 1, (5, 5), 1, (1, 1), (2, 2))]
)
def test_bytes_count_the_pixels_that_the_kernel_reaches(shape: Convolution) -> None:
    images = torch.zeros(shape.samples, shape.inputs, *shape.image, requires_grad=True)
    options = shape.stride, shape.padding, shape.dilation, shape.groups
    output = torch.conv2d(images, torch.ones(shape.weight_shape), None, *options)
    output.sum().backward()
    used = int(images.grad.count_nonzero())
    weight = torch.Size(shape.weight_shape).numel()
    assert shape.bytes == 4 * (used + output.numel() + 2 * weight)


def test_bytes_of_a_linear_layer() -> None:
    assert LINEAR.bytes == 4 * (3 * 5 * (4 + 6) + 2 * 4 * 6)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("shape", [EVERY_OPTION, PLAIN])
def test_both_sides_of_a_convolution_work_in_the_layout(shape: Convolution, layout: str) -> None:
    operands = shape.operands(layout)
    assert operands.error() < 1e-6
    grad, images = operands.ours.args[1:]
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for tensor in (grad, images, operands.reference.args[2]):
        assert tensor.is_contiguous(memory_format=wanted)
    assert operands.out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [EVERY_OPTION, PLAIN, LINEAR])
def test_reference_is_the_gradient_of_the_batch(shape: shapes.Shape) -> None:
    operands = shape.operands(shape.layouts[0], samples=1)
    operands.ours()
    gradient = operands.reference()
    gradient = gradient if isinstance(gradient, Tensor) else gradient[1]
    assert torch.allclose(gradient.square(), operands.out, rtol=1e-4, atol=1e-4)


def test_a_wrong_kernel_is_seen_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(out: Tensor, grad: Tensor, inputs: Tensor, **_: object) -> None:
        out.add_(ops.linear_per_sample_grad(grad, inputs).square().sum(0), alpha=1.001)

    monkeypatch.setattr(ops, "linear_sum_grad_squared_", twice)
    assert LINEAR.operands(shapes.CONTIGUOUS).error() == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(ValueError, match=r"tiny, contiguous, 3×5×4 → 6: wrong, relative error"):
        roofline.measure("tiny", shapes.CONTIGUOUS, 1, LINEAR, rounds=3, budget=0.0)


@pytest.mark.parametrize("shape", [EVERY_OPTION, PLAIN, LINEAR])
def test_shape_survives_json(shape: shapes.Shape) -> None:
    assert shapes.from_json(json.loads(json.dumps(shapes.to_json(shape)))) == shape


def test_shape_says_what_is_special_about_it() -> None:
    assert str(PLAIN) == "3×4×5×6 → 7, 3×3"
    assert str(EVERY_OPTION) == (
        "3×4×7×8 → 6, 3×2, stride 2×1, padding 1×0, dilation 1×2, 2 groups"
    )
    assert str(LINEAR) == "3×5×4 → 6"


# Rounds and rows


def test_rounds_alternate_and_repeat_what_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, played = 0.0, ""

    def work(name: str, seconds: float) -> None:
        nonlocal clock, played
        clock += seconds
        played += name

    monkeypatch.setattr(roofline, "perf_counter", lambda: clock)
    monkeypatch.setattr(roofline, "LEAST_SECONDS", 2**-6)  # whose sums are exact
    functions: dict[str, Callable[[], object]] = {
        "a": partial(work, "a", 2**-7),
        "b": partial(work, "b", 2**-6),
    }
    seconds = roofline.time_rounds(functions, rounds=4, budget=1.0)
    assert played == "aabb" + 2 * ("aab" + "baa")
    assert seconds == {"a": 4 * [2**-7], "b": 4 * [2**-6]}
    few = roofline.time_rounds(functions, rounds=9, budget=0.0)
    assert len(few["a"]) == len(few["b"]) == roofline.LEAST_ROUNDS


def row(**change: object) -> Row:
    shape = Linear(1000, 1, 1000, 500)  # 1 GFLOP
    same = dict(model="tiny", layout="contiguous", layers=3, shape=shape, engine="BLAS", rounds=9)
    times = dict(time_ms=10.0, reference_ms=8.0, ratio=1.25, ratio_q1=1.2, ratio_q3=1.3)
    machine = dict(read_ms=1.0, sgemm=200.0, bandwidth=10.0, error=1e-7)
    return Row(**{**same, **times, **machine, **change})


def test_floor_is_the_larger_of_operations_and_bytes() -> None:
    assert row().compute_ms == pytest.approx(5.0)
    assert (row().floor_ms, row().of_floor, row().is_compute_bound) == (5.0, 0.5, True)
    moved = row(read_ms=8.0)
    assert (moved.floor_ms, moved.of_floor, moved.is_compute_bound) == (8.0, 0.8, False)


# Tables

MACHINE = {
    "cpu": "A CPU",
    "threads": 1,
    "torch": "2.14.1",
    "torch_isa": "AVX512",
    "fastfisher": "0.1.0",
    "kernels": "avx512",
    "commit": "0123456",
    "date": "2026-01-01",
}


def lines_of(rows: list[Row]) -> list[list[str]]:
    text = tables([(MACHINE, ["python x"], rows)])
    return [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]


def test_summary_counts_shapes_and_weighs_layers() -> None:
    fast = row(layers=1, time_ms=5.0, reference_ms=10.0, ratio=0.5, error=3e-7)
    moved = row(layers=1, read_ms=9.0, ratio=1.0)
    line = [text.strip() for text in lines_of([row(), fast, moved])[1]]
    # 3 x 10 + 5 + 10 over 3 x 8 + 10 + 8; floors 3 x 5 + 5 + 9.
    assert line == [
        *("tiny, contiguous", "3", "2 (67%)", "1.07", "1.25", "1 of 2", "1 of 1", "64%", "3e-07")
    ]


def test_all_convolutions_have_a_line_and_all_linear_layers() -> None:
    image = Convolution(1, 1000, (1, 1), 500, (1, 1))
    rows = [
        row(layout="nchw", shape=image, engine="oneDNN"),
        row(layout="channels_last", shape=image, ratio=0.9),
        row(),
    ]
    counts = {line[0].strip(): line[1].strip() for line in lines_of(rows)[1:10]}
    assert counts["**convolutions**"] == "2"
    assert counts["**convolutions, nchw**"] == counts["**convolutions, channels_last**"] == "1"
    assert counts["**convolutions, torch's by oneDNN**"] == "1"
    assert counts["**linear layers**"] == "1"


def test_what_torch_does_faster_stands_out() -> None:
    shown = [line[11].strip() for line in lines_of([row(), row(ratio=0.987)]) if len(line) > 11]
    assert shown == ["ours / torch (IQR)", "**1.25** (1.20-1.30)", "0.99 (1.20-1.30)"]


# Command line


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let the measurement take time, nor change the process for other tests."""
    monkeypatch.setattr(roofline, "PRODUCT", {"cpu": 8})
    monkeypatch.setattr(roofline, "LARGE", 8)
    monkeypatch.setattr(roofline, "LEAST_SECONDS", 1e-5)
    monkeypatch.setattr(layers, "keep_freed_memory", lambda: None)


def run(folder: Path, *arguments: str) -> int:
    page = folder / "layers.md"
    if not page.exists():
        page.write_text("words\n" + "".join(markdown.MARKS), encoding="utf-8")
    return layers.main(
        ["--rounds", "3", "--budget", "0.001", *arguments],
        cases=CASES,
        results=folder / "layers",
        page=page,
    )


@pytest.mark.usefixtures("_quick")
def test_measured_parts_join_and_the_page_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--models", "other", "--save") == 0
    assert run(tmp_path, "--models", "tiny", "--layouts", "nchw", "--save") == 0
    ((_, commands, rows),) = layers.stored(tmp_path / "layers")
    assert [(r.model, r.layout) for r in rows] == [
        *[("tiny", "nchw")] * 2,
        ("tiny", "contiguous"),
        *[("other", "nchw")] * 2,
        *[("other", "channels_last")] * 2,
        ("other", "contiguous"),
    ]
    assert len(commands) == 2
    assert all(r.rounds == 3 and r.time_ms > 0 and r.reference_ms > 0 for r in rows)

    assert run(tmp_path, "--models", "tiny", "--layouts", "channels_last", "--save") == 0
    ((_, commands, again),) = layers.stored(tmp_path / "layers")
    assert len(again) == len(rows) + 2 and len(commands) == 3
    assert again[:2] == rows[:2] and again[4] != rows[2]
    page = (tmp_path / "layers.md").read_text(encoding="utf-8")
    assert tables(layers.stored(tmp_path / "layers")) in page
    assert page.startswith("words\n")
    assert "tiny, channels_last" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.usefixtures("_quick")
def test_what_loses_most_is_listed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(layers=1), row(layers=2, ratio=1.2), row(layers=9, ratio=1.0)]
    monkeypatch.setattr(layers, "measure_model", lambda *_, **__: iter([rows]))
    assert run(tmp_path, "--models", "tiny") == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "2 of 3 slower than torch's weight gradient",
        "  1.20, 3.20 ms in 2 layer(s): tiny, contiguous, 1000×1×1000 → 500 (BLAS)",
        "  1.25, 2.00 ms in 1 layer(s): tiny, contiguous, 1000×1×1000 → 500 (BLAS)",
    ]


@pytest.mark.usefixtures("_quick")
def test_without_save_nothing_is_written(tmp_path: Path) -> None:
    assert run(tmp_path, "--models", "other", "--layouts", "nchw") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["layers.md"]
    assert (tmp_path / "layers.md").read_text(encoding="utf-8") == "words\n" + "".join(
        markdown.MARKS
    )


@pytest.mark.usefixtures("_quick")
def test_rows_of_another_machine_do_not_join(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {**MACHINE, "threads": torch.get_num_threads()}
    monkeypatch.setattr(layers, "environment", lambda: now)
    monkeypatch.setattr(layers, "measure_model", lambda *_, **__: pytest.fail("it was measured"))
    path = tmp_path / "layers" / f"a-cpu-{now['threads']}t.json"
    layers.write(path, ({**now, "torch": "2.11.0"}, ["python x"], [row()]))
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, "--save")
    assert "torch '2.11.0', now '2.14.1'" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "resnet21"], "--models: no 'resnet21'; known: tiny, other"),
        (["--layouts", "nhwc"], "--layouts: no 'nhwc'; known: nchw, channels_last"),
        (["--rounds", "2"], "--rounds: expected at least 3, got 2"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"schema": 0}', '{"schema": 1, "rows": [{"shape": {}}]}'])
def test_what_is_no_result_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json is no result file of benchmarks/layers\.py"):
        layers.read(path)


# The committed numbers


def test_page_shows_the_committed_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in markdown.MARKS)
    assert text[begin + len(markdown.MARKS[0]) : end] == tables(layers.stored(layers.RESULTS))
