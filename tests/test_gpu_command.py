"""``make gpu`` goes through all of its steps without a card, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, roofline, topr
from benchmarks.measure import Row


@pytest.fixture
def plan(tmp_path: Path) -> gpu.Plan:
    return gpu.Plan("meta", [], tmp_path / "result.json", quick=True)


def test_the_dry_run_goes_through_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(roofline, "LARGE", 1 << 12)
    monkeypatch.setattr(roofline, "LEAST_SECONDS", 1e-5)
    path = tmp_path / "result.json"
    assert gpu.main(["--dry-run", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert list(document["seconds"]) == list(gpu.STEPS)
    assert document["failures"] == []
    # Every row has its check beside it.
    assert document["proof"] and all(row["error"] < 5e-3 for row in document["proof"])
    assert {row["precision"] for row in document["layers"]} == {"float32", "tf32", "bfloat16"}
    assert all(row["error"] < 5e-3 and row["time_ms"] > 0 for row in document["layers"])
    assert {row["status"] for row in document["models"]} == {"ok"}
    assert all(row["max_rel_error"] < 1e-3 for row in document["models"])
    assert {row["mask"] for row in document["topr"] if row["contender"] == topr.OURS} == {"same"}
    assert document["tests"]["exit"] == 0
    assert document["doctor"]
    assert "0 failure(s)" in capfd.readouterr().out


def test_without_a_card_the_real_run_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "no CUDA device is visible; --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "docter"], "--steps: no 'docter'; known: doctor, proof"),
        (["--cases", "resnet99"], "--cases: no 'resnet99'; known: resnet20"),
    ],
)
def test_wrong_names_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", *arguments])
    assert message in capsys.readouterr().err


def test_a_failed_step_is_kept_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def breaks(plan: gpu.Plan) -> None:
        """It breaks."""
        plan.document["half"] = float("inf")
        raise RuntimeError("out of luck")

    def works(plan: gpu.Plan) -> None:
        """It works."""
        ran.append(plan.device)

    monkeypatch.setattr(gpu, "STEPS", {"breaks": breaks, "works": works})
    path = tmp_path / "deep" / "result.json"
    assert gpu.main(["--dry-run", "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["failures"] == ["breaks: RuntimeError: out of luck"]
    assert document["half"] == "inf"
    assert ran == ["meta"]
    assert [each.name for each in path.parent.iterdir()] == ["result.json"]


def test_wrong_results_are_failures(plan: gpu.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("tiny", "nchw", "fisher_diag", 2, 3, status="wrong", max_rel_error=0.1)
    monkeypatch.setattr(gpu, "measure_case", lambda *_: [row])
    plan.cases = [gpu.CASES["seq_mlp"]]
    gpu.step_models(plan)
    assert plan.failures == ["models: seq_mlp, contiguous: wrong:"]
    assert plan.document["models"][0]["max_rel_error"] == 0.1
    plan.failures.clear()

    def other_mask(*arguments: Any, **_: Any) -> list[topr.Row]:
        return [topr.Row("one", topr.OURS, "+1 scalars", 1, 1.0, 1.0, 1.0)]

    monkeypatch.setattr(topr, "one_tensor", other_mask)
    gpu.step_topr(plan)
    assert plan.failures[0] == f"topr: one: {topr.OURS}: +1 scalars"


def test_a_sanitizers_finding_is_a_failure(
    plan: gpu.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$2" = racecheck ] && { echo "RACECHECK SUMMARY: 1 hazard"; exit 9; }\n'
        'echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu.backends, "unavailable", lambda name: None if name == "cuda" else "no")
    gpu.step_sanitizers(plan)
    assert plan.failures == ["sanitizers: cuda: racecheck: exit code 9"]
    found = plan.document["sanitizers"]
    assert {name: each["exit"] for name, each in found.items()} == {
        f"cuda: {name}": 9 if name == "racecheck" else 0 for name in gpu.SANITIZERS
    }
