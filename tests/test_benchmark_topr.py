"""The benchmark of the selection checks what it times, and its page shows committed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import topr
from benchmarks.markdown import MARKS
from benchmarks.measure import peak_rss_growth
from fastfisher import ops


def test_page_shows_the_committed_runs() -> None:
    text = topr.PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    shown = text[begin + len(MARKS[0]) : end]
    assert shown == topr.saved_runs() and "| same |" in shown


def test_a_run_is_saved_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topr, "TENSORS", 20)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "".join(MARKS) + "\nafter\n", encoding="utf-8")
    arguments = ["--size", "3e4", "--ratio", "0.1", "--rounds", "2", "--save"]
    assert topr.main(arguments, results=tmp_path / "results", page=page) == 0
    [path] = (tmp_path / "results").iterdir()
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 18 and all(row["ms"] > 0 and 1 <= row["rounds"] <= 2 for row in rows)
    ours = [row for row in rows if row["contender"] not in topr.RIVALS]
    assert len(ours) == 15 and all(row["mask"] == "same" for row in ours)
    assert [row["bound"] is None for row in rows] == [False] * 3 + [True] * 2 + [False] * 9 + [
        True
    ] * 4
    section = topr.saved_runs(tmp_path / "results")
    assert page.read_text(encoding="utf-8") == (f"before\n{MARKS[0]}{section}{MARKS[1]}\nafter\n")
    assert capsys.readouterr().out.startswith(section)


def test_a_wrong_mask_of_ours_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(topr, "TENSORS", 20)
    zero_top = topr.zero_top

    def one_less(parameters: list[Tensor], scores: list[Tensor], k: int, *_: object, **__: object):
        zero_top(parameters, scores, k - 1)

    monkeypatch.setattr(topr, "zero_top", one_less)
    assert topr.main(["--size", "3e4", "--rounds", "1"], results=tmp_path, page=tmp_path) == 1


def test_touched_lines_are_those_of_16_floats() -> None:
    zeroed = torch.zeros(40, dtype=torch.bool)
    zeroed[[3, 5, 39]] = True  # two of three lines, the last of which is half a line
    assert topr.touched_lines(zeroed) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("zeros", "verdict"),
    [
        ([1, 2], "same"),
        ([1, 4], "other ties"),
        ([2, 4], "wrong"),
        ([1], "-1 scalars"),
        ([1, 2, 4], "+1 scalars"),
    ],
)
def test_masks_are_compared_with_a_stable_sort(zeros: list[int], verdict: str) -> None:
    ranked = torch.tensor([0.0, 3.0, 2.0, 1.0, 2.0])
    parameter = torch.ones(5)
    parameter[zeros] = 0
    assert topr.compare([parameter], ranked, 2) == verdict


@pytest.mark.parametrize("arguments", [["--ratio", "1.5"], ["--size", "10"], ["--rounds", "0"]])
def test_bad_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        topr.main(arguments)


@pytest.mark.skipif(not ops.build_info()["compiled"], reason="no compiled module")
def test_the_memory_beside_the_scores_is_small() -> None:
    scores, parameters = torch.rand(16_000_000), torch.ones(16_000_000)
    topr.zero_top([parameters[:100_000]], [scores[:100_000]], 1000)
    growth = peak_rss_growth(lambda: topr.zero_top([parameters], [scores], 160_000))
    assert growth < scores.nbytes / 50  # 1%, and the pages that a first call touches
