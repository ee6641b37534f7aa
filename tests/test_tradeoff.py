"""The trade-off's page has what was measured, and a stopped measurement goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tradeoff
from benchmarks.tradeoff import Point, Row, main


def row(net: str, seed: int, forget_class: int) -> Row:
    return Row(
        "digits",
        net,
        seed,
        forget_class,
        original=Point(None, None, None, None, 1.0, 0.99, 0.97, 0.96),
        authors=Point(1.0, 0.001, "parameter", "global", 0.0, 0.5, 0.0, 0.46),
        paper=Point(9.0, 0.02, "parameter", "global", 0.2, 0.98, 0.25, 0.95),
        chosen=Point(2.5 + seed, 0.002, "kernel", "layer", 0.0, 0.98, 0.004, 0.965),
        masks=98,
        grid=260,
        train_seconds=3.0,
        fisher_seconds=2.0,
        search_seconds=1.0,
    )


def test_rows_are_saved_net_by_net_and_not_measured_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, int]] = []

    def rows_of_net(_: Any, net: str, seed: int, classes: list[int], __: Any) -> Iterator[Row]:
        if net == "broken":
            raise KeyboardInterrupt
        measured.append((net, seed))
        for forget_class in classes:
            yield row(net, seed, forget_class)

    monkeypatch.setattr(tradeoff, "rows_of_net", rows_of_net)
    stem = tmp_path / "new" / "page"
    command = ["--seeds", "0", "1", "--classes", "0", "3", "--save", str(stem), "--nets"]
    with pytest.raises(KeyboardInterrupt):
        main([*command, "convnet", "broken"])
    assert measured == [("convnet", 0), ("convnet", 1)]
    main([*command, "convnet", "resnet8"])
    assert measured[2:] == [("resnet8", 0), ("resnet8", 1)]
    assert len(json.loads(stem.with_suffix(".json").read_text())["rows"]) == 8
    lines = stem.with_suffix(".md").read_text().splitlines()
    assert (
        "| digits | resnet8 | 4 | 4 | 0.0 | -50.0 | 0 | 25.0 | -1.0 | 4 | 0.4 | +0.5 "
        "| 3 (2.5 to 3.5) |" in lines
    )
    assert (
        "| digits, resnet8, 1 | 3 | 100.0 / 99.0; 97.0 / 96.0 | 0.0 / 50.0; 0.0 / 46.0 (0.001) "
        "| 20.0 / 98.0; 25.0 / 95.0 (0.02) "
        "| 0.0 / 98.0; 0.4 / 96.5 (3.5, 0.002, kernel, layer) | 1 |" in lines
    )
    assert "A search evaluated 98 masks on average, of a grid of 260." in lines
    assert "\n".join(lines) in capsys.readouterr().out
    # Other settings are another measurement.
    main([*command, "convnet", "--epochs", "2"])
    assert measured[4:] == [("convnet", 0), ("convnet", 1)]
