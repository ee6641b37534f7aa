"""A reproduction as one self-contained HTML page, readable without a server or a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..unlearning.charts import (
    COLOURS,
    SERIES_STYLES,
    Line,
    heat_map,
    legend_key,
    line_chart,
)
from ..unlearning.report import Section, epoch_ticks, render
from .aggregate import (
    REMOVE_CLASS,
    Row,
    Summary,
    check_format,
    labels,
    mean_history,
    reference,
    rows,
    settings,
    stat,
    value,
)
from .tables import RETRAIN, headline, tables

if TYPE_CHECKING:
    from markupsafe import Markup

_PARTS = (("test_forget", "Forget, test"), ("test_remain", "Remain, test"))
# The grey of each round of colours is kept for the retrained models.
_STYLES = [i for i in range(SERIES_STYLES) if i % COLOURS != COLOURS - 1]
_REFERENCE = COLOURS - 1
_MAP_CLASSES = 12


def reproduction_page(summary: Summary) -> str:
    """The page on a reproduction: curves, tables, class maps and claims.

    Args:
        summary: what ``fastfisher reproduce`` wrote; experiments that did not run are left out.

    Returns:
        The HTML document.

    Raises:
        ValueError: ``summary`` is of another format.
    """
    check_format(summary)
    found = tables(summary)
    charts = {
        "limited": _limited(summary),
        "ratios": _ratios(summary),
        "schedules": _schedules(summary),
    }
    for name, (legend, drawn) in charts.items():
        if name in found and drawn:
            found[name] = dataclasses.replace(found[name], legend=legend, charts=drawn)
    sections: list[Section] = []
    for name, section in found.items():
        if name == "times":
            sections += _confusion(summary)
        sections.append(section)
        if name == "masked":
            sections += _curves(summary)
    recipe = summary["recipe"]
    config = {
        "command": summary["command"],
        "budget": summary["budget"],
        "data": {key: v for key, v in summary["data"].items() if key != "classes"},
        **{key: v for key, v in recipe.items() if key not in ("title", "text")},
        "tasks": summary.get("tasks"),
    }
    return render(
        recipe.get("title") or recipe["name"],
        recipe.get("text") or "",
        headline(summary),
        sections,
        config,
        {"fastfisher": summary["fastfisher"], **summary["environment"]},
    )


_Charts = Sequence[tuple[str, "Markup"]]
_Legend = Sequence[tuple["Markup", str]]


def _styles(summary: Summary) -> dict[str, int]:
    """A method keeps its style across the charts of the page."""
    known = dict.fromkeys(entry["label"] for entry in summary["methods"])
    found = [row["method"] for name in summary["experiments"] for row in rows(summary, name)]
    return {
        label: _STYLES[i % len(_STYLES)]
        for i, label in enumerate({**known, **dict.fromkeys(found)})
    }


def _points(group: Sequence[Row], metric: str) -> list[tuple[float, float]]:
    """Original at 0, after masking at 1, epoch e at e + 1."""
    places = {"original": 0, "masked": 1}
    return [
        (float(places.get(stage, epoch + 1)), found.mean)
        for stage, epoch, found in mean_history(group, metric)
    ]


def _ticks(groups: Sequence[Sequence[Row]]) -> list[tuple[float, str]]:
    epochs = max(
        (record["epoch"] for group in groups for row in group for record in row["history"]),
        default=0,
    )
    return [
        (0.0, "original"),
        (1.0, "masked"),
        *((x + 1, label) for x, label in epoch_ticks(epochs)),
    ]


def _epoch_chart(
    lines: Sequence[Line], heading: str, groups: Sequence[Sequence[Row]]
) -> list[tuple[str, Markup]]:
    """One chart, or none where there is nothing to draw."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return []
    chart = line_chart(
        drawn, title=heading, x_ticks=_ticks(groups), x_label="epoch", y_label="accuracy"
    )
    return [(heading, chart)]


def _level(summary: Summary, experiment: str, metric: str) -> list[Line]:
    retrained = reference(summary, experiment, metric)
    if retrained is None:
        return []
    return [Line(RETRAIN, _REFERENCE, [(0.0, retrained.mean)], level=True)]


def _curves(summary: Summary) -> list[Section]:
    """Figure 2, once for the paper's methods and once for the others; and Figure 1."""
    others = {e["label"] for e in summary["methods"] if e["control"] or e["beyond_paper"]}
    present = labels(summary, REMOVE_CLASS)
    influence = [e["label"] for e in summary["methods"] if "influence" in e["method"]]
    first = [
        e["label"]
        for e in summary["methods"]
        if e["method"] in ("finetune", "fisher-mask") and e["label"] not in others
    ]
    sets = [
        (
            "Accuracy per epoch (as Figure 2)",
            "Mean over the seeds: of the original model, right after masking, and after each "
            "epoch. The vertical axes differ: each spans the values it shows.",
            [name for name in present if name not in others],
            _PARTS,
        ),
        (
            "Accuracy per epoch: beyond the paper, and controls",
            "",
            [name for name in present if name in others],
            _PARTS,
        ),
        (
            "Fine-tuning, influence functions and FisherMask (as Figure 1)",
            "Accuracy on the removed class; forgotten is 0%.",
            [n for n in present if n in {*first, *influence}] if influence else [],
            _PARTS[:1],
        ),
    ]
    return [
        _curve_section(summary, title, text, names, parts)
        for title, text, names, parts in sets
        if names
    ]


def _curve_section(
    summary: Summary,
    title: str,
    text: str,
    names: Sequence[str],
    parts: Sequence[tuple[str, str]],
) -> Section:
    styles = _styles(summary)
    groups = [rows(summary, REMOVE_CLASS, name) for name in names]
    charts: list[tuple[str, Markup]] = []
    levels: list[Line] = []
    for metric, heading in parts:
        levels = _level(summary, REMOVE_CLASS, metric)
        lines = [
            Line(name, styles[name], _points(group, metric))
            for name, group in zip(names, groups, strict=True)
        ]
        charts += _epoch_chart([*lines, *levels], heading, groups)
    legend = [(legend_key(styles[name]), name) for name in names]
    legend += [(legend_key(_REFERENCE, level=True), f"{RETRAIN} (its end)") for _ in levels]
    return Section(title, text, legend=legend, charts=charts)


def _limited(summary: Summary) -> tuple[_Legend, _Charts]:
    """Curves with few remain samples; stars with none, where they would be after masking."""
    styles = _styles(summary)
    few = [s for s in settings(summary, "limited") if s["remain_samples"]]
    none = [s for s in settings(summary, "limited") if not s["remain_samples"]]
    names = labels(summary, "limited")
    groups = [
        (name, s, group)
        for name in names
        for s in few
        if (group := rows(summary, "limited", name, s))
    ]
    charts: list[tuple[str, Markup]] = []
    stars: dict[str, Markup] = {}
    for metric, heading in _PARTS:
        lines = [Line(name, styles[name], _points(group, metric)) for name, _, group in groups]
        for name in names:
            for setting in none:
                group = rows(summary, "limited", name, setting)
                if (found := stat(value(row, metric, "start") for row in group)) is not None:
                    label = f"{name}, no remain data"
                    lines.append(Line(label, styles[name], [(1.0, found.mean)], star=True))
                    stars[label] = legend_key(styles[name], star=True)
        lines += _level(summary, "limited", metric)
        charts += _epoch_chart(lines, heading, [group for *_, group in groups])
    legend = [
        (legend_key(styles[name]), f"{name}, {s['remain_samples']} remain samples")
        for name, s, _ in groups
    ]
    return [*legend, *((key, label) for label, key in stars.items())], charts


def _ratios(summary: Summary) -> tuple[_Legend, _Charts]:
    """Per method, the remain curves of each ratio; and both accuracies over the ratio."""
    found = sorted(settings(summary, "ratios"), key=lambda setting: setting["ratio"])
    charts: list[tuple[str, Markup]] = []
    names = labels(summary, "ratios")
    for name in names:
        groups = [rows(summary, "ratios", name, s) for s in found]
        for metric, heading in _PARTS:
            lines = [
                Line(f"R = {s['ratio']:g}", _STYLES[i % len(_STYLES)], _points(group, metric))
                for i, (s, group) in enumerate(zip(found, groups, strict=True))
            ]
            charts += _epoch_chart(
                [*lines, *_level(summary, "ratios", metric)], f"{name}: {heading.lower()}", groups
            )
    legend = [
        (legend_key(_STYLES[i % len(_STYLES)]), f"R = {s['ratio']:g}") for i, s in enumerate(found)
    ]
    return legend, charts


def _schedules(summary: Summary) -> tuple[_Legend, _Charts]:
    """Per method, remain and forget curves under each schedule."""
    found = settings(summary, "schedules")
    charts: list[tuple[str, Markup]] = []
    for name in labels(summary, "schedules"):
        groups = [(i, s, rows(summary, "schedules", name, s)) for i, s in enumerate(found)]
        lines = [
            Line(
                f"{s['schedule']}, {metric.removeprefix('test_')}",
                _STYLES[i % len(_STYLES)],
                _points(group, metric),
                dashed=metric == "test_forget",
            )
            for i, s, group in groups
            for metric, _ in _PARTS
        ]
        heading = f"{name}: remain (solid) and forget (dashed), test"
        charts += _epoch_chart(lines, heading, [group for *_, group in groups])
    legend = [
        (legend_key(_STYLES[i % len(_STYLES)]), str(s["schedule"])) for i, s in enumerate(found)
    ]
    return legend, charts


def _confusion(summary: Summary) -> list[Section]:
    """How predictions moved, class by class, from those of the retrained models."""
    classes = [str(name) for name in summary["data"]["classes"]]
    shifts = {
        name: shift
        for name in labels(summary, REMOVE_CLASS)
        if (shift := _mean_shift(rows(summary, REMOVE_CLASS, name)))
    }
    if not shifts:
        return []
    changes = [
        sum(abs(v) for shift in shifts.values() for v in shift[i]) for i in range(len(classes))
    ]
    shown = sorted(sorted(range(len(classes)), key=lambda i: -changes[i])[:_MAP_CLASSES])
    kept = {name: [[shift[i][j] for j in shown] for i in shown] for name, shift in shifts.items()}
    scale = max(abs(v) for shift in kept.values() for row in shift for v in row) or 1.0
    names = [classes[i] for i in shown]
    text = (
        "Rows: the true class of test images. Columns: what is predicted. Orange: more often than "
        f"by the retrained models; blue: less often. The full colour is {100 * scale:.1f} points."
    )
    if len(shown) < len(classes):
        text += f" Shown: the {len(shown)} of {len(classes)} classes that moved most."
    charts = [
        (
            name,
            heat_map(shift, title=f"{name}: shift of predictions", rows=names, columns=names,
                     scale=scale),
        )
        for name, shift in kept.items()
    ]  # fmt: skip
    return [
        Section("Shift of predictions from the retrained models", text, charts=charts, small=True)
    ]


def _mean_shift(group: Sequence[Row]) -> list[list[float]]:
    """Mean over the seeds that have one; empty where none has."""
    found = [row["confusion_shift"] for row in group if row.get("confusion_shift")]
    if not found:
        return []
    return [
        [sum(cells) / len(found) for cells in zip(*lines, strict=True)]
        for lines in zip(*found, strict=True)
    ]
