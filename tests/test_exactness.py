"""The page of exactness is what was measured, and what was measured still holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import exactness
from benchmarks.contender import Call, Options, Rival
from benchmarks.exactness import SINGLE, TARGET, Cell, compare, ours, page, raised, theirs
from benchmarks.losses import CLASSIFICATION, LOSSES, Loss, all_bits, all_classes
from benchmarks.registry import Problem
from benchmarks.single_layers import LAYERS, Layer
from fastfisher.losses import KINDS
from fastfisher.reference import sum_grad_squared_loop

DOCUMENT = json.loads(exactness.NUMBERS.read_text(encoding="utf-8"))


# What is committed


def test_page_is_the_one_of_the_numbers() -> None:
    assert exactness.PAGE.read_text(encoding="utf-8") == page(DOCUMENT)


def test_every_row_was_measured_and_ours_is_exact() -> None:
    assert [row["name"] for row in DOCUMENT["layers"]] == [layer.name for layer in LAYERS]
    assert [row["name"] for row in DOCUMENT["losses"]] == [loss.name for loss in LOSSES]
    for row in DOCUMENT["layers"]:
        assert list(row["ours"]) == list(KINDS)
        for cell in row["ours"].values():
            assert cell["status"] == "exact" and cell["error"] <= TARGET, row["name"]
        assert list(row["rivals"]) == list(DOCUMENT["rivals"])
    for row in DOCUMENT["losses"]:
        assert row["ours"]["empirical"]["status"] == "exact"
        assert {cell["status"] for cell in row["ours"].values()} <= {"exact", "error"}
    assert not DOCUMENT["environment"]["commit"].endswith("-dirty")
    assert DOCUMENT["environment"]["kernels"] != "plain torch"


# What is true now


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.filterwarnings("ignore")
def test_layer_is_exact_with_every_kind(layer: Layer) -> None:
    problem = layer.problem()
    for kind in KINDS:
        cell = ours(problem, CLASSIFICATION, kind)
        assert cell.status == "exact", (kind, cell)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_loss_is_exact_or_refused_as_the_page_says(loss: Loss) -> None:
    (row,) = [row for row in DOCUMENT["losses"] if row["name"] == loss.name]
    problem = loss.problem()
    for kind in KINDS:
        cell = ours(problem, loss, kind)
        assert (cell.status, cell.note) == (row["ours"][kind]["status"], row["ours"][kind]["note"])


# Definitions


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_outcomes_are_a_distribution(loss: Loss) -> None:
    if loss.outcomes in (all_classes, all_bits):
        weights = torch.stack([part.weights for part in loss.outcomes(loss.problem())])
        assert len(weights) > 1 and bool((weights > 0).all())
        torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))


def test_models_have_no_parameter_without_a_gradient() -> None:
    for layer in LAYERS:
        problem = layer.problem()
        values = CLASSIFICATION.values(problem, "empirical")
        assert list(values) == problem.names
        assert all(bool(value.norm() > 0) for value in values.values()), layer.name


# Verdicts

RIGHT = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([1.0]).double()}


@pytest.mark.parametrize(
    "change, status, error, note",
    [
        ({}, "exact", 0.0, ""),
        ({"a": RIGHT["a"] * (1 + 1e-7)}, "single", 1e-7, ""),
        ({"a": RIGHT["a"] * 1.5}, "wrong", 0.5, ""),
        ({"a": RIGHT["a"] * math.nan}, "wrong", None, "a is not finite"),
        ({"b": RIGHT["a"]}, "wrong", None, "another shape: [2] for [1]"),
        ({"b": None}, "missing", 0.0, "no value for b"),
        ({"a": None, "b": 3 * RIGHT["b"]}, "missing", 2.0, "no value for a"),
        ({"a": None, "b": None}, "missing", None, "no value for a, b"),
    ],
)
def test_compare(
    change: Mapping[str, Tensor | None], status: str, error: float | None, note: str
) -> None:
    got = {name: value for name, value in {**RIGHT, **change}.items() if value is not None}
    cell = compare(got, RIGHT, allowed=SINGLE)
    assert cell.status == status and note in cell.note
    assert cell.error == (error if error is None else pytest.approx(error, abs=1e-12))


def test_ours_is_never_excused_by_single_precision() -> None:
    assert compare({**RIGHT, "a": RIGHT["a"] * (1 + 1e-7)}, RIGHT).status == "wrong"


def test_message_has_nothing_of_this_machine() -> None:
    cell = raised(RuntimeError("in /home/me/lib/file.py: <Foo at 0x7f12ab>\nmore"))
    assert cell == Cell("error", note="RuntimeError: in ...file.py: <Foo at ...>")
    assert raised(KeyError()).note == "KeyError"
    assert len(raised(ValueError("x" * 999)).note) == 160


def forged(change: Any) -> Rival:
    """A rival with options 0 and 1: right, then changed."""

    def prepare(problem: Problem, options: Options) -> Call:
        def run() -> dict[str, Tensor]:
            values = sum_grad_squared_loop(
                problem.model,
                problem.inputs,
                problem.targets,
                problem.loss.per_sample,
                problem.names,
            )
            return change(options["number"], problem, values)

        return Call(run)

    return Rival(
        "forged",
        "spoils the right values",
        prepare,
        candidates=lambda _problem: [{"number": 0}, {"number": 1}],
        install="pip install forged",
    )


@pytest.fixture
def linear() -> Iterator[tuple[Problem, Mapping[str, Tensor]]]:
    problem = LAYERS[0].problem()
    yield problem, CLASSIFICATION.values(problem, "empirical")


def test_rival_gets_the_option_and_the_precision_that_are_right(linear: Any) -> None:
    def second_only(number: int, _problem: Problem, values: dict[str, Tensor]) -> Any:
        return values if number else {name: 2 * value for name, value in values.items()}

    assert theirs(forged(second_only), *linear).status == "exact"

    def float32_only(_number: int, problem: Problem, values: dict[str, Tensor]) -> Any:
        if problem.inputs.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return values

    assert theirs(forged(float32_only), *linear).status == "single"


def test_rival_that_has_no_value_or_is_not_there(linear: Any) -> None:
    def silent(_number: int, _problem: Problem, values: dict[str, Tensor]) -> Any:
        return {name: value for name, value in values.items() if name != "layer.bias"}

    assert theirs(forged(silent), *linear) == Cell(
        "missing", pytest.approx(0), "no value for layer.bias"
    )

    def absent(*_: object) -> Any:
        raise ModuleNotFoundError("No module named 'forged'")

    cell = theirs(forged(absent), *linear)
    assert cell.status == "absent" and "pip install forged" in cell.note


# The page


def test_page_shows_every_verdict() -> None:
    cells = {
        "exact": Cell("exact", 1e-16),
        "float32": Cell("single", 1e-7),
        "off": Cell("wrong", 0.84),
        "shape": Cell("wrong", None, "a has another shape"),
        "gap": Cell("missing", 0.0, "no value for a"),
        "both": Cell("missing", 0.5, "no value for a"),
        "raises": Cell("error", None, "ValueError: `no`"),
        "gone": Cell("absent", None, "pip install gone"),
    }
    row = {
        "name": "a layer",
        "ours": {
            "empirical": vars(Cell("exact", 2e-16)),
            "mc": vars(Cell("exact", 3e-16, "fallback: a")),
            "exact": vars(Cell("wrong", 0.25)),
        },
        "rivals": {name: vars(cell) for name, cell in cells.items()},
    }
    text = page(
        {
            "target": TARGET,
            "environment": DOCUMENT["environment"],
            "rivals": {name: f"{name} 1.0" for name in cells},
            "layers": [row],
            "losses": [],
        }
    )
    assert (
        "| a layer | 2e-16 | 3e-16 † | **wrong** 0.25 | exact | exact in float32 "
        "| **wrong** 0.84 | **wrong** [1] | missing [2] | missing [2], **wrong** 0.5 "
        "| error [3] | – |"
    ) in text
    assert "1. `a has another shape`\n2. `no value for a`\n3. `ValueError: 'no'`\n" in text
    total = " | ".join(f"**{n} of 1**" for n in (1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0))
    assert f"| **exact** | {total} |" in text


def test_page_is_written_from_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "PAGE", tmp_path / "page.md")
    assert exactness.main(["--from-json"]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page(DOCUMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_wrong_number_of_ours_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    document["layers"][3]["ours"]["mc"]["status"] = "wrong"
    monkeypatch.setattr(exactness, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(exactness, "NUMBERS", tmp_path / "numbers.json")
    exactness.NUMBERS.write_text(json.dumps(document), encoding="utf-8")
    assert exactness.main(["--from-json"]) == 1
