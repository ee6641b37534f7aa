"""report.html says what was measured, in one file that needs nothing else."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from fastfisher.masking import Mask, random_mask_
from fastfisher.unlearning import Candidate, EpochRecord, Search, UnlearnResult
from fastfisher.unlearning.charts import Bar, Line, bar_chart, line_chart
from fastfisher.unlearning.report import accuracy_table, stages, training_page, unlearning_page


def record(stage: str, epoch: int, seconds: float, *accuracies: float | None) -> EpochRecord:
    train_forget, train_remain, test_forget, test_remain = accuracies
    learned = stage == "epoch"
    return EpochRecord(
        stage=stage,
        epoch=epoch,
        lr=0.0625 if learned else None,
        seconds=seconds,
        train_forget=train_forget,
        train_remain=train_remain,
        test_forget=test_forget,
        test_remain=test_remain,
        loss=0.03125 if learned else None,
    )


def masked_result(method: str = "fisher-mask", mask: Mask | None = None) -> UnlearnResult:
    history = [
        record("original", 0, 0.0, 0.991, 0.992, 0.973, 0.974),
        record("masked", 0, 1.5, 0.011, 0.012, 0.013, 0.904),
        record("epoch", 1, 2.0, 0.021, 0.022, 0.023, 0.945),
        record("epoch", 2, 2.0, 0.031, 0.032, 0.033, 0.956),
    ]
    return UnlearnResult(method, {}, history, None, mask)


def retrained() -> UnlearnResult:
    history = [
        record("original", 0, 0.0, 0.991, 0.992, 0.973, 0.974),
        *(record("epoch", e, 3.0, 0.0, 0.9, 0.0, 0.5 + e / 20) for e in range(1, 10)),
    ]
    return UnlearnResult("retrain", {}, history, None)


def page(*results: UnlearnResult, **facts: object) -> str:
    return unlearning_page(
        results, title="A title", subtitle="A subtitle", config=facts, environment={"cpu": "a CPU"}
    )


class Checker(HTMLParser):
    """Collects text, attributes and tables; fails where tags do not nest."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_the_headline_table_has_the_four_models() -> None:
    table = accuracy_table([masked_result(), retrained()])
    heads = ("model", "forget, test", "remain, test", "forget, train", "remain, train", "seconds")
    assert table.heads == heads
    assert table.rows == [
        ("original", "97.3%", "97.4%", "99.1%", "99.2%", "-"),
        ("masked", "1.3%", "90.4%", "1.1%", "1.2%", "1.5"),
        ("fine-tuned", "3.3%", "95.6%", "3.1%", "3.2%", "5.5"),
        ("retrained", "0.0%", "95.0%", "0.0%", "90.0%", "27.0"),
    ]
    assert Checker(page(masked_result(), retrained())).tables[0] == [
        list(heads),
        *map(list, table.rows),
    ]


def test_several_methods_are_told_apart() -> None:
    labels = [s.label for s in stages([masked_result(), masked_result("random-mask"), retrained()])]
    assert labels == [
        "original",
        "fisher-mask: masked",
        "fisher-mask: fine-tuned",
        "random-mask: masked",
        "random-mask: fine-tuned",
        "retrained",
    ]


def test_the_headline_says_what_happened() -> None:
    words = Checker(page(masked_result(), retrained())).words
    assert (
        "On test data, fisher-mask takes forget accuracy from 97.3% to 1.3% by masking alone and "
        "3.3% after fine-tuning, and remain accuracy from 97.4% to 90.4% by masking alone and "
        "95.6% after fine-tuning (retrained: 95.0%)." in words
    )


def test_each_chart_has_a_line_a_method_and_the_level_to_reach() -> None:
    text = page(masked_result(), masked_result("random-mask"), retrained())
    charts = re.findall(r'<svg class="chart lines".*?</svg>', text, re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        assert [len(line) for line in spots(chart)] == [4, 4]
        assert chart.count("line level s2") == 1
        labels = re.findall(r'text-anchor="middle">([^<]*)</text>', chart)
        assert labels == ["original", "masked", "1", "2", "epoch", "accuracy"]
    legend = re.findall(r"</svg>([^<]*)</li>", text)
    assert legend == ["fisher-mask", "random-mask", "retrain (its last epoch)"]


def test_what_was_not_measured_is_left_out() -> None:
    history = [record("original", 0, 0.0, 0.9, 0.8, None, 0.7)]
    text = page(UnlearnResult("fisher-mask", {}, history, None))
    checked = Checker(text)
    assert checked.tables[0][0] == [
        "model", "remain, test", "forget, train", "remain, train", "seconds",
    ]  # fmt: skip
    assert text.count("<figure>") == 3
    assert "Forget, test" not in re.findall(r"<h3>(.*?)</h3>", text)


def test_the_page_needs_nothing_from_outside() -> None:
    model = nn.Linear(4, 4)
    text = page(masked_result(mask=random_mask_(model, ratio=0.5)), retrained(), a=1)
    checked = Checker(text)
    tags = {tag for tag, _, _ in checked.attributes} | set(re.findall(r"<(\w+)", text))
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    assert not {name for _, name, _ in checked.attributes} & {"src", "href", "srcset", "style"}
    assert not re.search(r"https?:|//|url\(|@import", text)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a & b", '"quoted"', "</style>"])
def test_all_text_is_escaped(text: str) -> None:
    result = masked_result(text, mask=random_mask_(nn.Linear(4, 4), ratio=0.5))
    rendered = unlearning_page(
        [result, retrained()],
        title=text,
        subtitle=text,
        config={"model": text, "nested": {"key": [text]}},
        environment={"cpu": text},
    )
    checked = Checker(rendered)
    assert checked.words.count(text) >= 8
    assert "script" not in checked.open
    if text.startswith("<"):
        assert rendered.count(text) == (1 if text == "</style>" else 0)
    charts = re.findall(r'<svg class="chart.*?</svg>', rendered, re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        ElementTree.fromstring(chart)


def test_the_masked_share_counts_scalars() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False))
    mask = random_mask_(
        model, ratio=0.5, granularity="kernel", exclude=["2.*"], generator=torch.Generator()
    )
    words = Checker(page(masked_result(mask=mask))).words
    assert "36 of 72 eligible scalars zeroed (50.00%)." in words
    assert "50.00% (36 of 72)" in words
    assert "2.weight" not in words


def test_the_search_is_a_grid_with_the_choice_in_a_frame() -> None:
    result = masked_result()
    measured = {
        (1, 0.01): (0.5, 0.9),
        (2, 0.01): (0.004, 0.987),
        (1, 0.1): (0.0, 0.4),
    }
    made = {
        pair: Candidate(*pair, "parameter", "layer", 1, *found, 0.5)
        for pair, found in measured.items()
    }
    other = Candidate(3, 0.2, "kernel", "layer", 1, 0.25, 0.99, 0.1)
    found = Search((*made.values(), other), (made[2, 0.01], other), made[2, 0.01], 60, 300, 1000)
    result.search = found.to_dict()
    text = page(result)
    grid, curve = (table for table in Checker(text).tables if table and table[0][0] == "w")
    assert grid == [
        ["w", "R = 0.01", "R = 0.1"],
        ["1", "50.0% / 90.0%", "0.0% / 40.0%"],
        ["2", "0.4% / 98.7%", "-"],
    ]
    assert curve == [
        ["w", "R", "unit", "scope", "forget", "remain"],
        ["2", "0.01", "parameter", "layer", "0.4%", "98.7%"],
        ["3", "0.2", "kernel", "layer", "25.0%", "99.0%"],
    ]
    assert "(300 and 1,000). 4 masks were tried, on a grid of 60" in text
    assert re.findall(r'<td class="chosen">(.*?)</td>', text) == ["0.4% / 98.7%"]


def test_every_epoch_is_in_the_page() -> None:
    table = next(t for t in Checker(page(masked_result())).tables if t[0][0] == "method")
    assert len(table) == 1 + 4
    assert table[4] == [
        "fisher-mask", "2", "0.0625", "0.03125", "3.30%", "95.60%", "3.10%", "3.20%", "2",
    ]  # fmt: skip


def test_configuration_and_environment_are_shown() -> None:
    text = page(masked_result(), data={"dataset": "digits", "data_root": None}, flag=True)
    sheets = Checker(text).tables[-2:]
    assert sheets == [
        [["data", "dataset digits, data root -"], ["flag", "yes"]],
        [["cpu", "a CPU"]],
    ]


def test_dark_mode_has_colours_for_every_series() -> None:
    text = page(masked_result())
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = re.compile(r"--\w+(?=:)")
    assert set(names.findall(light)) == set(names.findall(dark))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(names.findall(light))


def spots(chart: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline class="line s\d" points="(.*?)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def draw(*lines: Line, ticks: int = 4) -> str:
    labels = [(float(i), str(i)) for i in range(ticks)]
    return line_chart(lines, title="t", x_ticks=labels, x_label="x", y_label="y")


def axis(chart: str) -> list[int]:
    return [int(text) for text in re.findall(r">(\d+)%</text>", chart)]


def test_a_curve_is_drawn_to_scale() -> None:
    chart = draw(Line("a", 0, [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.25)]))
    assert axis(chart) == [0, 20, 40, 60, 80, 100]
    ((x0, y0), (x1, y1), (x2, y2), (x3, y3)) = spots(chart)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) == pytest.approx(x3 - x2, abs=0.2)
    assert y0 - y1 == pytest.approx((y0 - y2) / 2, abs=0.2)
    assert y0 - y3 == pytest.approx((y0 - y2) / 4, abs=0.2)
    grid = dict(
        zip(axis(chart), map(float, re.findall(r'class="grid".*?y1="(.*?)"', chart)), strict=True)
    )
    assert (y0, y2) == (grid[0], grid[100])
    assert y2 < y0  # more is further up


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.0], [98, 99, 100]),
        ([0.0], [0, 1, 2]),
        ([0.951, 0.996], [95, 96, 97, 98, 99, 100]),
        ([0.5, 0.5], [49, 50, 51]),
        ([0.0, 1.0], [0, 20, 40, 60, 80, 100]),
        ([0.12, 0.73], [0, 20, 40, 60, 80]),
    ],
)
def test_the_axis_encloses_the_values(values: list[float], expected: list[int]) -> None:
    chart = draw(Line("a", 0, [(float(i), value) for i, value in enumerate(values)]))
    found = axis(chart)
    assert found[0] <= 100 * min(values) + 1e-9 and 100 * max(values) <= found[-1] + 1e-9
    assert found == expected


def test_a_reference_is_a_level_at_its_last_value() -> None:
    chart = draw(Line("a", 0, [(0, 0.90), (1, 0.92)]), Line("ref", 1, [(0, 0.0), (9, 0.91)], True))
    assert axis(chart) == [90, 91, 92]
    assert len(spots(chart)) == 1
    level = re.findall(r'class="line level s1".*?y1="(.*?)" y2="(.*?)"', chart)
    (_, y0), (_, y1) = spots(chart)[0]
    assert [float(y) for y in level[0]] == [pytest.approx((y0 + y1) / 2, abs=0.1)] * 2
    assert "ref: 91.00%" in chart


def test_bars_are_drawn_to_scale_and_stay_inside() -> None:
    names = ["a" * 80, "b", "c"]
    bars = [Bar(name, value, "text") for name, value in zip(names, (0.4, 0.2, 0.0), strict=True)]
    chart = bar_chart(bars, title="t", x_label="x")
    width = float(re.search(r'viewBox="0 0 (\d+)', chart)[1])
    found = [
        (float(x), float(w)) for x, w in re.findall(r'class="bar" x="(.*?)".*?width="(.*?)"', chart)
    ]
    assert found[0][1] == pytest.approx(2 * found[1][1], abs=0.2)
    assert found[2][1] == 1.0  # still to be seen
    assert found[0][1] > width / 5  # the longest bar spans the axis, whatever its value
    assert all(x > 0 and x + w < width for x, w in found)


def test_the_training_page() -> None:
    history = [
        {"epoch": e, "lr": 0.1, "loss": 1 / e, "test": 0.9 + e / 100, "seconds": 1.0}
        for e in range(1, 26)
    ]
    for row in history:
        row["test"] = min(row["test"], 0.987)
    text = training_page(history, title="T", subtitle="S", config={"a": 1}, environment={"b": None})
    checked = Checker(text)
    assert "Test accuracy 98.7% after 25 epochs." in checked.words
    assert checked.tables[0][1] == ["1", "0.1", "1", "91.00%", "1"]
    assert len(checked.tables[0]) == 26
    labels = re.findall(r'text-anchor="middle">(\d+)</text>', text)
    assert labels == ["1", "3", "6", "9", "12", "15", "18", "21", "25"]
    assert html.unescape(checked.tables[1][0][0]) == "a"


def test_one_epoch_is_enough_for_a_page() -> None:
    history = [{"epoch": 1, "lr": 0.1, "loss": 0.5, "test": 0.5, "seconds": 1.0}]
    text = training_page(history, title="T", subtitle="S", config={}, environment={})
    assert len(spots(text)[0]) == 1
