"""The benchmark runner: no time without a right answer, fair rounds, honest files."""

from __future__ import annotations

import csv
import gc
import importlib.util
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import markdown, measure, report, run
from benchmarks.measure import Row, Settings, max_relative_error, measure_case, time_interleaved
from benchmarks.registry import CASES, Case, Problem
from benchmarks.rivals import PLAIN, RIVALS, Call, Options, Rival, Values

ROOT = Path(__file__).resolve().parent.parent
FAST = Settings(rounds=3, budget=0.1, memory=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def tiny_inputs(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(batch, 3, 6, 6, generator=generator)
    return inputs, torch.randint(4, (batch,), generator=generator)


TINY = Case("tiny", "a test", tiny_net, tiny_inputs, batch=6, layouts=("nchw", "channels_last"))


def forged(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> tuple[Rival, list[int]]:
    """A contender that spoils the right values, and the batch sizes it was run on."""
    seen: list[int] = []

    def prepare(problem: Problem, options: Options) -> Call:
        honest = RIVALS["loop"].prepare(problem, options)

        def spoilt() -> Values:
            seen.append(problem.inputs.shape[0])
            return change(dict(honest.run()))

        return Call(spoilt)

    return Rival("forged", "spoils the right values", prepare), seen


def rows_of(*rivals: Rival, settings: Settings = FAST) -> dict[str, Row]:
    rows = measure_case(TINY, "nchw", rivals, settings)
    assert [row.contender for row in rows] == [rival.name for rival in rivals]
    return {row.contender: row for row in rows}


# Correctness before time


LIBRARIES = {
    "backpack": "backpack",
    "nngeometry": "nngeometry",
    "opacus": "opacus",
    "opacus_functorch": "opacus",
    "kronfluence": "kronfluence",
    "asdl": "asdl",
}
OWN = [rival for name, rival in RIVALS.items() if name not in LIBRARIES]


def available(name: str) -> Rival:
    if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name]) is None:
        pytest.skip(f"{LIBRARIES[name]} is not installed")
    return RIVALS[name]


@pytest.mark.parametrize("layout", TINY.layouts)
def test_every_contender_is_right_and_gets_a_time_in_every_column(layout: str) -> None:
    rows = measure_case(TINY, layout, OWN, FAST)
    for row in rows:
        assert row.status == "ok", row
        assert row.max_rel_error is not None and 0 < row.max_rel_error < 1e-5
        assert row.time_ms is not None and row.time_ms > 0
        assert row.ratio is not None and row.ratio_q1 is not None and row.ratio_q3 is not None
        assert row.ratio_q1 <= row.ratio <= row.ratio_q3
        assert row.parameters == 3 * 5 * 9 + 5 + 5 + 5 + 5 * 4 + 4
    assert rows[0].contender == PLAIN and rows[0].ratio == 1.0


def no_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)
    )


def token_net() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 4)
    )


def token_inputs(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(7, (batch, 3), generator=generator)
    return tokens, torch.randint(4, (batch,), generator=generator)


class InPlace(nn.Module):
    """Adds to the output of a layer, as residual blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(108, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += x
        return self.head(out.flatten(1))


IN_PLACE = replace(TINY, build=InPlace)
NO_NORM = replace(TINY, build=no_norm_net)
TOKENS = Case("tokens", "a test", token_net, token_inputs, batch=6)


@pytest.mark.parametrize(
    ("name", "case", "status", "reason"),
    [
        ("backpack", TINY, "ok", ""),
        ("backpack", TOKENS, "ok", ""),
        ("backpack", IN_PLACE, "ok", "converter 1"),
        ("nngeometry", TINY, "ok", ""),
        ("nngeometry", TOKENS, "failed", "I do not know what to do with layer Embedding(7, 6)"),
        ("opacus", TINY, "failed", "BatchNorm2d"),
        ("opacus", NO_NORM, "ok", ""),
        ("opacus", TOKENS, "ok", ""),
        ("opacus_functorch", TINY, "failed", "BatchNorm2d"),
        ("opacus_functorch", TOKENS, "ok", ""),
        ("kronfluence", TINY, "incomplete", "no value for 1.weight, 1.bias"),
        ("kronfluence", NO_NORM, "ok", ""),
        ("asdl", NO_NORM, "ok", ""),
        ("asdl", TOKENS, "inexact", "worst: "),
    ],
)
def test_what_each_library_gives(name: str, case: Case, status: str, reason: str) -> None:
    (row,) = measure_case(case, case.layouts[0], [available(name)], FAST)
    assert row.status == status and reason in row.note, row
    assert (row.time_ms is None) == (status in ("failed", "incomplete"))
    assert (status == "ok") == (row.max_rel_error is not None and row.max_rel_error < 1e-5)


@pytest.mark.parametrize(
    ("change", "least", "complaint"),
    [
        (lambda v: {n: 1.002 * t for n, t in v.items()}, 0.00199, "worst: "),
        (lambda v: {**v, "5.bias": -v["5.bias"]}, 1.99, "worst: 5.bias"),
        (lambda v: {**v, "1.weight": math.nan * v["1.weight"]}, math.inf, "worst: 1.weight"),
        (lambda v: {**v, "5.weight": v["5.weight"].T}, math.inf, "5.weight has the wrong shape"),
    ],
)
def test_a_wrong_contender_is_shown_with_its_error_and_without_a_time(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], least: float, complaint: str
) -> None:
    rival, seen = forged(change)
    row = rows_of(RIVALS[PLAIN], rival)["forged"]
    assert row.status == "wrong"
    assert row.max_rel_error is not None and row.max_rel_error >= least
    assert complaint in row.note
    assert row.time_ms is None and row.ratio is None and row.rounds == 0
    assert seen == [measure.CHECK_SAMPLES], "it ran after it was found wrong"


def test_a_contender_that_leaves_a_parameter_out_is_incomplete() -> None:
    rival, seen = forged(lambda v: {n: t for n, t in v.items() if n != "0.bias"})
    row = rows_of(RIVALS[PLAIN], rival)["forged"]
    assert (row.status, row.note) == ("incomplete", "no value for 0.bias")
    assert row.max_rel_error == math.inf and row.time_ms is None
    assert seen == [measure.CHECK_SAMPLES], "it ran after it was found incomplete"


def test_one_that_is_inexact_by_design_gets_a_time_beside_its_error() -> None:
    rival, _ = forged(lambda v: {n: 3 * t for n, t in v.items()})
    row = rows_of(RIVALS[PLAIN], replace(rival, inexact=True))["forged"]
    assert row.status == "inexact" and row.time_ms is not None and row.ratio is not None
    assert row.max_rel_error == pytest.approx(2, rel=1e-5)


def test_an_error_within_tolerance_is_printed_and_timed() -> None:
    rival, _ = forged(lambda v: {n: 1.0005 * t for n, t in v.items()})
    row = rows_of(RIVALS[PLAIN], rival)["forged"]
    assert row.status == "ok" and row.time_ms is not None
    assert row.max_rel_error == pytest.approx(5e-4, rel=0.02)


def test_a_contender_that_raises_gets_a_row_with_the_reason() -> None:
    def prepare(problem: Problem, options: Options) -> Call:
        raise NotImplementedError("no rule for Conv2d\nand a long story")

    row = rows_of(RIVALS[PLAIN], Rival("broken", "", prepare))["broken"]
    assert (row.status, row.note) == ("failed", "NotImplementedError: no rule for Conv2d")


def test_a_contender_that_fails_only_on_the_timed_batch_costs_its_own_row_only() -> None:
    def prepare(problem: Problem, options: Options) -> Call:
        honest = RIVALS["loop"].prepare(problem, options)

        def picky() -> Values:
            if problem.inputs.shape[0] == TINY.batch:
                raise RuntimeError("batch too large")
            return honest.run()

        return Call(picky)

    rows = rows_of(RIVALS[PLAIN], Rival("picky", "", prepare), RIVALS["loop"])
    assert rows["picky"].status == "failed" and "batch too large" in rows["picky"].note
    assert rows["picky"].time_ms is None
    assert rows["loop"].ratio is not None


def test_an_absent_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "backpack", None)
    row = rows_of(RIVALS[PLAIN], RIVALS["backpack"])["backpack"]
    assert row.status == "absent"
    assert "pip install backpack-for-pytorch opt_einsum" in row.note


def test_a_plain_pass_without_all_gradients_is_no_unit() -> None:
    def prepare(problem: Problem, options: Options) -> Call:
        call = RIVALS[PLAIN].prepare(problem, options)
        next(problem.model.parameters()).requires_grad_(False)
        return call

    rows = rows_of(replace(RIVALS[PLAIN], prepare=prepare), RIVALS["loop"])
    assert rows[PLAIN].status == "incomplete" and "0.weight" in rows[PLAIN].note
    assert rows["loop"].time_ms is not None and rows["loop"].ratio is None


@pytest.mark.parametrize("name", RIVALS)
def test_reset_leaves_nothing_on_the_model(name: str) -> None:
    rival, problem = available(name), NO_NORM.problem("nchw", 3)
    names = set(problem.names)
    call = rival.prepare(problem, {})
    assert set(call.read(call.run())) == names
    call.reset()
    for module in problem.model.modules():
        assert not hasattr(module, "fisher")
    for p in problem.model.parameters():
        assert p.grad is None and not hasattr(p, "sum_grad_squared")
        assert getattr(p, "grad_sample", None) is None


@pytest.mark.parametrize("name", RIVALS)
def test_a_second_run_gives_the_same(name: str) -> None:
    call = available(name).prepare(NO_NORM.problem("nchw", 3), {})
    first = {n: v.clone() for n, v in call.read(call.run()).items()}
    call.reset()
    for key, value in call.read(call.run()).items():
        torch.testing.assert_close(value, first[key])


def test_a_case_that_cannot_be_built_gives_rows_that_say_so() -> None:
    def unbuildable() -> nn.Module:
        raise KeyError("no such model")

    rows = measure_case(replace(TINY, build=unbuildable), "nchw", [RIVALS[PLAIN]], FAST)
    assert rows[0].status == "failed"
    assert rows[0].note.startswith("the case cannot be built: KeyError")


def test_relative_error_is_the_worst_parameter_by_norm() -> None:
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0]), "c": torch.zeros(2)}
    want = {name: value.double() for name, value in want.items()}
    got = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.2]), "c": torch.zeros(2)}
    error, about = max_relative_error(got, want)
    assert error == pytest.approx(0.2) and about == "worst: b"
    assert max_relative_error({**got, "c": torch.tensor([0.0, 1e-30])}, want)[0] == math.inf


@pytest.mark.parametrize("side", [1e-7, -1e-7])
def test_samples_on_the_kink_of_a_relu_check_nobody(side: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 3))
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    clear = torch.tensor([[1.0, 3.0], [2.0, -0.5], [1.0, 0.2], [0.7, 0.1]])
    inputs = torch.cat([clear[:1], torch.tensor([[1.0, 1.0 + side]]), clear[1:]])
    problem = Problem(model, inputs, torch.tensor([0, 1, 2, 0, 1]), TINY.loss)
    assert measure.steady_samples(problem, 3) == [0, 2, 3]
    assert 1 in measure.steady_samples(problem, 5), "with too few steady samples, all are used"


# Fair rounds


def logged(log: list[str], **costs: float) -> tuple[dict[str, Call], Callable[[], float]]:
    """Contenders that advance a clock of their own, and that clock."""
    now = [0.0]

    def call(name: str) -> Call:
        def work() -> Values:
            log.append(name)
            now[0] += costs[name]
            return {}

        def reset() -> None:
            log.append(f"reset {name}")
            now[0] += 1000.0

        return Call(work, reset=reset)

    return {name: call(name) for name in costs}, lambda: now[0]


def test_rounds_rotate_the_order_and_leave_reset_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    calls, clock = logged(log, plain=1.0, a=2.0, b=3.0)
    monkeypatch.setattr(measure, "perf_counter", clock)
    timings = time_interleaved(calls, rounds=4, budget=1.0)
    runs = [name for name in log if not name.startswith("reset")]
    warm = len(runs) - 4 * 3
    rounds = [tuple(runs[i : i + 3]) for i in range(warm, len(runs), 3)]
    assert rounds == [
        ("plain", "a", "b"),
        ("a", "b", "plain"),
        ("b", "plain", "a"),
        ("plain", "a", "b"),
    ]
    assert set(runs[:warm]) == {"plain", "a", "b"}, "all are warmed up before the first round"
    assert log[1::2] == [f"reset {name}" for name in log[::2]]
    assert list(timings["b"].seconds.values()) == [3.0] * 4
    assert timings["a"].ratios == [2.0] * 4


def test_slow_contenders_get_fewer_rounds_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = logged([], plain=1.0, near=2.9, slow=4.0, slower=50.0)
    monkeypatch.setattr(measure, "perf_counter", clock)
    timings = time_interleaved(calls, rounds=9, budget=18.0)
    assert list(timings["near"].seconds) == list(range(9))
    assert len(timings["slow"].seconds) == 4
    assert list(timings["slower"].seconds) == [0, 3, 6]
    assert timings["slower"].ratios == [50.0] * 3


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now, load = [0.0], [1.0]

    def call(cost: float) -> Call:
        def work() -> Values:
            now[0] += cost * load[0]
            return {}

        return Call(work)

    # The machine gets slower with every round: times spread, ratios do not.
    monkeypatch.setattr(gc, "collect", lambda: load.__setitem__(0, 2 * load[0]))
    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    timings = time_interleaved({"plain": call(1.5), "other": call(3.0)}, rounds=5, budget=1.0)
    assert max(timings["other"].seconds.values()) == 16 * min(timings["other"].seconds.values())
    assert timings["other"].ratios == [2.0] * 5


def test_options_are_tried_until_a_clearly_slower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    tried: list[int] = []

    def prepare(problem: Problem, options: Options) -> Call:
        def work() -> Values:
            tried.append(options["chunk_size"])
            if options["chunk_size"] == 8:
                raise RuntimeError("not with 8")
            now[0] += {4: 3.0, 16: 2.0, 32: 2.5, 64: 1.0}[options["chunk_size"]]
            return {}

        return Call(work)

    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    options = [{"chunk_size": size} for size in (4, 8, 16, 32, 64)]
    rival = Rival("r", "", prepare, candidates=lambda p: options)
    by_speed = measure.by_speed(rival, TINY.problem("nchw", 2))
    assert [o["chunk_size"] for o in by_speed] == [16, 32, 4]
    assert tried == [4, 8, 16, 32]
    with pytest.raises(RuntimeError, match="not with 8"):
        measure.by_speed(
            replace(rival, candidates=lambda p: 2 * options[1:2]), TINY.problem("nchw", 2)
        )


def test_options_are_tried_on_the_trial_where_there_is_one() -> None:
    def slow_to_prepare(problem: Problem, options: Options) -> Call:
        pytest.fail("it was prepared")

    honest = RIVALS["torch_func"]
    rival = replace(honest, prepare=slow_to_prepare, trial=honest.prepare)
    by_speed = measure.by_speed(rival, TINY.problem("nchw", 8))
    assert {o["chunk_size"] for o in by_speed} <= {4, 8} and by_speed


def test_the_fastest_options_that_are_right_compete() -> None:
    def prepare(problem: Problem, options: Options) -> Call:
        honest = RIVALS["loop"].prepare(problem, options)

        def run() -> Values:
            return honest.run() if options["right"] else {n: 0 * v for n, v in right.items()}

        right = honest.run()
        return Call(run)

    rival = Rival("r", "", prepare, candidates=lambda p: [{"right": 0}, {"right": 1}])
    row = rows_of(RIVALS[PLAIN], rival)["r"]
    assert (row.status, row.note) == ("ok", "right 1")
    never = replace(rival, candidates=lambda p: [{"right": 0}, {"right": -0}])
    row = rows_of(RIVALS[PLAIN], never)["r"]
    assert row.status == "wrong" and row.note.endswith("right 0")


def test_chunk_sizes_double_up_to_the_batch() -> None:
    chunks = [dict(o) for o in RIVALS["torch_func"].candidates(TINY.problem("nchw", 12))]
    assert chunks == [{"chunk_size": 4}, {"chunk_size": 8}, {"chunk_size": 12}]


def test_a_mode_that_takes_minutes_on_large_images_is_not_tried_on_them() -> None:
    def modes(problem: Problem) -> list[int]:
        return [o["save_memory"] for o in RIVALS["backpack"].candidates(problem)]

    small = NO_NORM.problem("nchw", 1)
    assert modes(small) == [0, 1, 0, 1]
    assert modes(replace(small, inputs=torch.zeros(1, 3, 224, 224))) == [1, 1]


# Memory


def test_peak_counts_what_was_freed_before_the_end() -> None:
    def spike() -> None:
        torch.ones(16_000_000)

    assert 63e6 < measure.peak_rss_growth(spike) < 80e6
    assert measure.peak_rss_growth(lambda: None) < 8e6, "an earlier peak is counted again"


_LOADED_ONCE: list[Tensor] = []


def _prepare_spike(problem: Problem, options: Options) -> Call:
    def spike() -> Values:
        if not _LOADED_ONCE:
            _LOADED_ONCE.append(torch.ones(25_000_000))
        return {"all": torch.ones(8_000_000 * options["size"])}

    return Call(spike)


def _prepare_death(problem: Problem, options: Options) -> Call:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def test_peak_memory_comes_from_a_fresh_process_without_what_is_loaded_once() -> None:
    rival = Rival("spike", "", _prepare_spike)
    peak = measure.peak_memory(TINY, "nchw", 6, rival, {"size": 2})
    assert 63e6 < peak < 80e6
    assert not _LOADED_ONCE, "it ran in this process"


def test_a_process_killed_for_memory_is_a_reason_not_a_crash() -> None:
    with pytest.raises(MemoryError, match="killed"):
        measure.peak_memory(TINY, "nchw", 6, Rival("dies", "", _prepare_death), {})


# The registry


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_cases_and_contenders_reach_other_processes(case: Case) -> None:
    # A partial equals only itself, so the copy is judged by what it makes.
    copy = pickle.loads(pickle.dumps(case))
    assert [*copy.build().state_dict()] == [*case.build().state_dict()]
    assert pickle.loads(pickle.dumps(list(RIVALS.values()))) == list(RIVALS.values())


def test_a_problem_is_the_same_every_time_and_in_its_layout() -> None:
    one, two = (TINY.problem("channels_last", 6) for _ in range(2))
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name])
    assert one.inputs.is_contiguous(memory_format=torch.channels_last)
    assert not one.inputs.is_contiguous()
    taken = one.take([4, 1])
    assert taken.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(taken.inputs[1], one.inputs[1])
    assert taken.targets.tolist() == [one.targets[4], one.targets[1]]
    assert not one.model.training
    assert one.model.get_buffer("1.running_var").sub(1).abs().min() > 1e-3, "fresh statistics"


# Files and the command line


def row_of(contender: str, ratio: float) -> Row:
    row = Row("tiny", "nchw", contender, batch=6, parameters=174, rounds=9)
    row.time_ms_q1, row.time_ms, row.time_ms_q3 = 1.9, 2.0, 2.2
    row.ratio_q1, row.ratio, row.ratio_q3 = ratio - 0.1, ratio, ratio + 0.1
    return row


def rows_for_files() -> list[Row]:
    bad = Row("tiny", "nchw", "bad", 6, 174, "wrong", max_rel_error=math.inf, note="no value")
    return [row_of("plain", 1.0), row_of("fisher_diag", 1.25), row_of("torch_func", 6.25), bad]


FIELDS = ["case", "layout", "contender", "batch", "parameters", "status"]
FIELDS += ["time_ms", "time_ms_q1", "time_ms_q3", "ratio", "ratio_q1", "ratio_q3", "rounds"]
FIELDS += ["peak_mb", "peak_ratio", "max_rel_error", "note"]

MACHINE: dict[str, str | int] = {
    "cpu": "Some CPU @ 2.60GHz",
    "threads": 2,
    "torch": "2.14.1",
    "torch_isa": "AVX2",
    "fastfisher": "0.1.0",
    "kernels": "avx2",
    "commit": "abc1234",
    "date": "2026-01-01 00:00 UTC",
}


def test_the_table_shows_ratios_errors_and_refusals() -> None:
    lines = report.table(rows_for_files()).splitlines()
    assert lines[0] == "tiny | nchw | batch 6 | 174 parameters"
    assert lines[3].split()[:4] == ["fisher_diag", "2.00", "1.25", "(1.15-1.35)"]
    assert lines[5].split()[:2] == ["bad", "wrong"] and lines[5].endswith("inf  no value")
    assert lines[-1] == "speed of fisher_diag: 5.00x torch_func"


def test_json_and_csv_hold_every_field(tmp_path: Path) -> None:
    rows = rows_for_files()
    report.write_json(tmp_path / "r.json", MACHINE, "python benchmarks/run.py", rows)
    document = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert set(document) == {"schema", "command", "tolerance", "environment", "rows"}
    assert all(list(row) == FIELDS for row in document["rows"])
    environment, command, back = report.read_json(tmp_path / "r.json")
    assert (environment, command) == (MACHINE, "python benchmarks/run.py")
    assert back[:3] == rows[:3]
    assert back[3] == replace(rows[3], max_rel_error=None)

    report.write_csv(tmp_path / "r.csv", MACHINE, rows)
    with open(tmp_path / "r.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == FIELDS + list(MACHINE)
    assert lines[1]["ratio"] == "1.25" and lines[3]["time_ms"] == ""
    assert {line["cpu"] for line in lines} == {"Some CPU @ 2.60GHz"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.csv", "r.json"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def no_replace(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="disk full"):
        report.write_json(path, MACHINE, "", rows_for_files())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99, "rows": []}'])
def test_a_foreign_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="no result file"):
        report.read_json(tmp_path / "r.json")


def test_the_figure_has_every_contender_the_unit_and_the_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    lines: list[float] = []
    monkeypatch.setattr(axes.Axes, "axvline", lambda self, x, **style: lines.append(x))
    for name in ("a.svg", "b.svg"):
        report.draw(tmp_path / name, MACHINE, "python benchmarks/run.py", rows_for_files())
    text = (tmp_path / "a.svg").read_text()
    for part in ("fisher_diag", "torch_func", "wrong: no value", "Some CPU @ 2.60GHz", "1.25"):
        assert part in text
    assert lines == [1.0, 1.0], "the plain pass, in either file"
    assert (tmp_path / "b.svg").read_text() == text


def command_line(*argv: str, **rivals: Rival) -> int:
    chosen = {name: RIVALS[name] for name in (PLAIN, "loop")} | rivals
    return run.main(argv, cases={"tiny": TINY}, rivals=chosen)


def test_the_command_line_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "r.json"
    argv = ["--quick", "--contenders", "loop", "--layouts", "channels_last", "--threads", "1"]
    assert command_line(*argv, "--json", str(target), "--csv", str(tmp_path / "r.csv")) == 0
    printed = capsys.readouterr().out
    environment, command, rows = report.read_json(target)
    assert [(row.contender, row.layout, row.batch) for row in rows] == [
        ("plain", "channels_last", 4),
        ("loop", "channels_last", 4),
    ]
    assert all(row.status == "ok" and row.ratio for row in rows)
    assert environment["threads"] == 1 and environment["torch"] == torch.__version__
    assert command.startswith("python benchmarks/run.py --quick --contenders loop")
    assert "tiny | channels_last | batch 4" in printed and str(target) in printed

    assert command_line("--from-json", str(target)) == 0
    assert capsys.readouterr().out.strip() in printed


SHORT = ["--rounds", "1", "--no-memory", "--layouts", "nchw"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results, on a machine that does not change while it is measured."""
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "environment", lambda: {**MACHINE, "threads": torch.get_num_threads()})
    return tmp_path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SAVED = "all-some-cpu-2-60ghz-1t.json"


def test_results_go_to_latest_or_to_a_name_of_their_own(results: Path) -> None:
    plain = [*SHORT, "--contenders", "plain"]
    assert command_line("--quick", *plain) == 0
    assert names_in(results) == set()
    assert command_line(*plain) == 0
    assert names_in(results) == {"latest-1t.json", "latest-1t.csv"}
    assert command_line(*plain, "--save") == 0
    assert names_in(results) >= {SAVED, "all-some-cpu-2-60ghz-1t.csv"}


def test_every_number_of_threads_gets_its_own_files(results: Path) -> None:
    assert command_line(*SHORT, "--contenders", "loop", "--threads", "1,2,1") == 0
    assert names_in(results) == {f"latest-{n}t.{kind}" for n in (1, 2) for kind in ("json", "csv")}
    for count in (1, 2):
        environment, _, rows = report.read_json(results / f"latest-{count}t.json")
        assert environment["threads"] == count and len(rows) == 2


def test_saved_runs_add_up(results: Path) -> None:
    assert command_line(*SHORT, "--save", "--contenders", "loop") == 0
    first = {row.contender: row for row in report.read_json(results / SAVED)[2]}
    broken = Rival("broken", "", lambda problem, options: Call(lambda: 1 / 0))
    assert command_line(*SHORT, "--save", "--contenders", "broken", broken=broken) == 0
    command_line("--save", "--layouts", "channels_last", "--rounds", "1", "--no-memory")
    _, command, rows = report.read_json(results / SAVED)
    assert [(row.layout, row.contender) for row in rows] == [
        ("nchw", "plain"),
        ("nchw", "loop"),
        ("nchw", "broken"),
        ("channels_last", "plain"),
        ("channels_last", "loop"),
    ]
    assert rows[1] == first["loop"] and rows[0] != first["plain"], "the newest of each is kept"
    assert len(command.splitlines()) == 3
    with open(results / "all-some-cpu-2-60ghz-1t.csv", newline="") as file:
        assert [line["contender"] for line in csv.DictReader(file)] == [r.contender for r in rows]


def test_a_saved_run_of_something_else_is_not_added_to(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*SHORT, "--save") == 0
    before = (results / SAVED).read_bytes()
    other = {**MACHINE, "threads": 1, "commit": "fff0000", "date": "2026-01-02 00:00 UTC"}
    monkeypatch.setattr(run, "environment", lambda: other)
    monkeypatch.setattr(run, "measure_case", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit):
        command_line(*SHORT, "--save")
    error = capsys.readouterr().err
    assert "was measured with commit 'abc1234', now 'fff0000'; expected" in error
    assert (results / SAVED).read_bytes() == before


def test_resume_measures_what_is_not_there(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    original = measure_case

    def interrupted(case: Case, layout: str, *rest: object) -> list[Row]:
        measured.append(layout)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return original(case, layout, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "measure_case", interrupted)
    argv = ["--save", "--resume", "--rounds", "1", "--no-memory"]
    assert command_line(*argv) == 130
    assert command_line(*argv) == 0
    assert command_line(*argv) == 0
    assert measured == ["nchw", "channels_last", "channels_last"]
    assert len(report.read_json(results / SAVED)[2]) == 4


def test_a_library_that_was_absent_is_measured_on_resume(results: Path) -> None:
    def absent(problem: Problem, options: Options) -> Call:
        raise ImportError("no such library")

    argv = [*SHORT, "--save", "--resume"]
    rival = Rival("late", "", absent, install="pip install late")
    assert command_line(*argv, late=rival) == 0
    assert command_line(*argv, late=replace(rival, prepare=RIVALS["loop"].prepare)) == 0
    statuses = {r.contender: r.status for r in report.read_json(results / SAVED)[2]}
    assert statuses == {"plain": "ok", "loop": "ok", "late": "ok"}


def test_options_choose_among_stored_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    rows = [replace(r, layout=name) for name in ("nchw", "channels_last") for r in rows_for_files()]
    report.write_json(path, MACHINE, "a command", [*rows, replace(rows[0], case="gone")])
    assert command_line("--from-json", str(path)) == 0
    everything = capsys.readouterr().out
    assert all(word in everything for word in ("torch_func", "| channels_last |", "gone | nchw"))
    assert command_line("--from-json", str(path), "--cases", "tiny", "--layouts", "nchw") == 0
    some = capsys.readouterr().out
    assert "tiny | nchw" in some and "torch_func" not in some, "only contenders that are known"
    assert "channels_last" not in some and "gone" not in some


def page_runs() -> list[report.Run]:
    """One processor with two numbers of threads, written in the wrong order."""
    runs: list[report.Run] = []
    for threads, scale in ((2, 1.1), (1, 1.0)):
        rows = []
        for layout, plain in (("nchw", 4.0), ("channels_last", 3.0)):
            unit = replace(row_of(PLAIN, 1.0), layout=layout, time_ms=plain)
            ours = replace(row_of("fisher_diag", scale * plain / 3), layout=layout)
            ours = replace(ours, peak_ratio=plain / 4, max_rel_error=1e-6 * plain)
            near = replace(row_of("near", 2.2 * scale), layout=layout)
            crude = replace(row_of("crude", 0.1), layout=layout, status="inexact", note="worst: a")
            failed = Row("tiny", layout, "failing", 6, 174, "failed", note="Error: `no` way")
            rows += [unit, ours, near, crude, failed]
        rows += [
            replace(row_of(name, 1.5), case="tokens", layout="contiguous")
            for name in (PLAIN, "fisher_diag")
        ]
        runs.append(({**MACHINE, "threads": threads}, f"run {threads}", rows))
    return runs


def test_the_page_of_models_has_a_line_a_model_and_every_reason() -> None:
    lines = markdown.models(page_runs()).splitlines()
    assert lines[0] == "## Some CPU @ 2.60GHz"
    assert lines[2].startswith(
        "| fisher_diag / plain pass | 1t, nchw | 1t, channels_last | 2t, nchw | 2t, channels_last |"
    )
    assert lines[4] == (
        "| tiny | 1.33 | **1.00** | 1.47 | **1.10** | 1.00 | 4e-06 | 1.65x (near, 1t, nchw) |"
    )
    assert lines[5] == "| tokens | **1.50** |  | **1.50** |  | - | - | - |"
    assert (
        "| tiny, 6, nchw | 4 ms | **1.33x** | 1.00 | 4e-06 | 2.20x | 0.10x (inexact) | failed |"
        in lines
    )
    assert "| tokens, 6, contiguous | 2 ms | **1.50x** | - | - |  |  |  |" in lines
    assert lines.count("- failing on tiny: failed: `Error: 'no' way`") == 1
    assert "- crude on tiny: inexact: `worst: a`" in lines
    assert [line for line in lines if line.startswith("`run")] == ["`run 1`", "`run 2`"]


def test_the_short_table_leaves_out_what_the_readme_has_no_room_for() -> None:
    rows = [replace(r, case=case) for case in ("resnet20", "gpt") for r in rows_for_files()]
    table = markdown.short((MACHINE, "one\ntwo", rows))
    assert "resnet20" in table and "gpt" not in table
    assert "torch_func" in table and "bad" not in table
    assert "`one`" not in table  # the commands are with the table of all models


def test_tables_go_between_the_marks_only(tmp_path: Path) -> None:
    source, page = tmp_path / "r.json", tmp_path / "page.md"
    machine, command, rows = page_runs()[0]
    report.write_json(source, machine, command, rows)
    page.write_text("before\n" + "old\n".join(markdown.MARKS) + "\nafter\n")
    for option, table in (
        ("--models", markdown.models),
        ("--readme", lambda r: markdown.short(r[0])),
    ):
        assert command_line("--from-json", str(source), option, str(page)) == 0
        expected = table([report.read_json(source)]).join(markdown.MARKS)
        assert page.read_text() == f"before\n{expected}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        command_line("--from-json", str(source), "--models", str(page))
    assert page.read_text() == "no marks"


def test_a_wrong_fisher_diag_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, _ = forged(lambda v: {n: 2 * t for n, t in v.items()})
    ours = replace(wrong, name="fisher_diag")
    assert command_line("--quick", fisher_diag=ours) == 1
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "nope"], "--cases: no 'nope'; known: tiny"),
        (["--contenders", "plain,nope"], "--contenders: no 'nope'; known: plain, loop"),
        (["--layouts", "nhwc"], "--layouts: no 'nhwc'; known: nchw, channels_last"),
        (["--rounds", "0"], "must be at least 1"),
        (["--budget", "nan"], "must be above 0"),
        (["--from-json", "/nonexistent/r.json"], "No such file"),
        (["--json", "/proc/nowhere/r.json"], "/proc/nowhere"),
        (["--threads", "1,0"], "must be at least 1"),
        (["--threads", "1,2", "--json", "r.json"], "--threads: expected one number with --json"),
        (["--save", "--quick"], "--save: expected without --quick"),
        (["--resume"], "--resume: expected with --save"),
        (["--models", "models.md"], "--readme and --models: expected with --from-json"),
    ],
)
def test_a_bad_argument_is_one_clear_line_before_anything_runs(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "measure_case", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as stop:
        command_line(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--list"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in (*CASES, *RIVALS):
        assert f"  {name} " in done.stdout
