"""The judge of seeded bugs tells those that are noticed from those that are not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .emulation.build import ROOT
from .proof.mutants import Mutant, all_mutants, apply, cases_of, judge_all

FILE = "csrc/cuda/outer_simt.cu"
BARRIER = "      ff_cp_wait<0>();\n      __syncthreads();"


def test_every_mutant_can_be_applied(tmp_path: Path) -> None:
    mutants = all_mutants()
    assert max(Counter(each.name for each in mutants).values(), default=1) == 1
    for mutant in mutants:
        copy = tmp_path / mutant.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / mutant.file).read_text())
        apply(mutant, tmp_path)
        assert copy.read_text() != (ROOT / mutant.file).read_text()
        assert cases_of(mutant.kernel)[0].small


def test_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("one one")
    with pytest.raises(ValueError, match="'one' occurs 2 times"):
        apply(Mutant("twice", "outer_simt", "a.cu", "one", "two", "values"), tmp_path)


def test_a_bug_is_caught_and_a_comment_is_not() -> None:
    no_barrier = BARRIER.replace("__syncthreads();", "")
    mutants = [
        Mutant("no barrier", "outer_simt", FILE, BARRIER, no_barrier, "cucheck"),
        Mutant("a comment", "outer_simt", FILE, BARRIER, f"{BARRIER} // waits", "cucheck"),
    ]
    outcomes = {each.name: each for each in judge_all(mutants)}
    assert outcomes["no barrier"].caught
    assert not outcomes["a comment"].caught


@pytest.mark.parametrize("file", sorted({each.file for each in all_mutants()}))
def test_every_seeded_bug_is_caught(file: str) -> None:
    outcomes = judge_all([each for each in all_mutants() if each.file == file])
    assert outcomes
    assert [each for each in outcomes if not each.caught] == []


def test_what_does_not_compile_is_an_error() -> None:
    broken = Mutant("broken", "outer_simt", FILE, BARRIER, "not C++", "values")
    with pytest.raises(RuntimeError, match=r"outer_simt\.cu does not compile"):
        judge_all([broken])
