"""Means, spreads and gaps of what a reproduction measured.

Everything here reads the summary, the JSON document of format ``fastfisher.reproduce/1``. A *row*
is one run of one method with one seed; a *setting* is what an experiment varies ({} for
"remove-class").
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
Setting = Mapping[str, Any]
Stage = Literal["original", "edited", "start", "final"]

FORMAT = "fastfisher.reproduce/1"
REMOVE_CLASS = "remove-class"


@dataclass(frozen=True)
class Stat:
    """One quantity over the seeds.

    Attributes:
        mean: over the rows that have it.
        spread: standard deviation over them (ddof = 1); ``None`` for a single one.
        count: how many have it.
        rows: how many there are; more than ``count`` where some lack it.
    """

    mean: float
    spread: float | None
    count: int
    rows: int


@dataclass(frozen=True)
class Gap:
    """How far a method's mean is from that of the retrained models.

    Attributes:
        difference: the method's mean minus the retrained mean.
        spread: of the retrained models; ``None`` for a single one.
        inside: whether the difference is no larger than that spread; ``None`` without one.
    """

    difference: float
    spread: float | None
    inside: bool | None


def check_format(summary: Summary) -> None:
    """Refuse what is no summary.

    Raises:
        ValueError: ``summary`` is not of the format that is read here.
    """
    found = summary.get("format")
    if found != FORMAT:
        raise ValueError(f"summary: expected one of format {FORMAT!r}, got {found!r}")


def stat(values: Iterable[float | None]) -> Stat | None:
    """Mean and spread of the values that are there; ``None`` where none is."""
    everything = list(values)
    there = [v for v in everything if v is not None and math.isfinite(v)]
    if not there:
        return None
    spread = statistics.stdev(there) if len(there) > 1 else None
    return Stat(statistics.fmean(there), spread, len(there), len(everything))


def rows(
    summary: Summary, experiment: str, method: str | None = None, setting: Setting | None = None
) -> list[Row]:
    """Rows of an experiment; of one method and one setting where these are given."""
    return [
        row
        for row in summary["experiments"].get(experiment, ())
        if method in (None, row["method"]) and (setting is None or row["setting"] == setting)
    ]


def reference_rows(summary: Summary, experiment: str, setting: Setting | None = None) -> list[Row]:
    """Retrained models to compare an experiment with.

    Outliers have retrained models of their own for each share; all other experiments remove the
    same class and share those of "remove-class".
    """
    if experiment != "outliers":
        experiment, setting = REMOVE_CLASS, None
    found = (summary.get("references") or {}).get(experiment, ())
    return [row for row in found if setting is None or row["setting"] == setting]


def labels(summary: Summary, experiment: str) -> list[str]:
    """Methods with rows in an experiment, in the order of ``summary["methods"]``."""
    present = {row["method"]: None for row in rows(summary, experiment)}
    known = [entry["label"] for entry in summary["methods"] if entry["label"] in present]
    return known + [label for label in present if label not in known]


def settings(summary: Summary, experiment: str) -> list[Setting]:
    """Settings of an experiment, each once, in order of appearance."""
    found: list[Setting] = []
    for row in rows(summary, experiment):
        if row["setting"] not in found:
            found.append(row["setting"])
    return found


def value(row: Row, metric: str, stage: Stage = "final") -> float | None:
    """One metric of one row; stage "start" is the model that fine-tuning starts from."""
    if stage == "start":
        stage = "edited" if row["edited"] is not None else "original"
    measured = row[stage]
    return None if measured is None else measured.get(metric)


def measure(
    summary: Summary,
    experiment: str,
    method: str,
    metric: str,
    *,
    stage: Stage = "final",
    setting: Setting | None = None,
) -> Stat | None:
    """A metric over the seeds; ``None`` where no row has it."""
    found = rows(summary, experiment, method, setting)
    return stat(value(row, metric, stage) for row in found)


def reference(
    summary: Summary, experiment: str, metric: str, setting: Setting | None = None
) -> Stat | None:
    """A metric over the retrained models; ``None`` where none has it."""
    return stat(value(row, metric) for row in reference_rows(summary, experiment, setting))


def gap(measured: Stat | None, retrained: Stat | None) -> Gap | None:
    """Distance of a method from the retrained models; ``None`` where one of them is missing."""
    if measured is None or retrained is None:
        return None
    difference = measured.mean - retrained.mean
    inside = None if retrained.spread is None else abs(difference) <= retrained.spread
    return Gap(difference, retrained.spread, inside)


def curve(row: Row, metric: str) -> list[float | None]:
    """An accuracy from the start of fine-tuning on: after masking, then after each epoch.

    A method that edits nothing before it trains starts from the original model.
    """
    history = row["history"]
    first = "masked" if any(record["stage"] == "masked" for record in history) else "original"
    return [record[metric] for record in history if record["stage"] in (first, "epoch")]


def mean_history(found: Sequence[Row], metric: str) -> list[tuple[str, int, Stat]]:
    """Stage, epoch and mean accuracy over the seeds, in order of time."""
    points: dict[tuple[str, int], list[float | None]] = {}
    for row in found:
        for record in row["history"]:
            points.setdefault((record["stage"], record["epoch"]), []).append(record[metric])
    means = [(stage, epoch, stat(values)) for (stage, epoch), values in points.items()]
    return [(stage, epoch, mean) for stage, epoch, mean in means if mean is not None]


def volatility(values: Sequence[float | None]) -> float | None:
    """Mean absolute change from one epoch to the next.

    This measures what the name says. The paper's own formula does not: see
    :func:`paper_volatility`.

    Returns:
        ``None`` for fewer than two values, or where one is missing.
    """
    there = [v for v in values if v is not None]
    if len(there) < 2 or len(there) < len(values):
        return None
    return statistics.fmean(abs(b - a) for a, b in pairwise(there))


def paper_volatility(values: Sequence[float | None], *, forget: bool) -> float | None:
    """The formula printed in the paper, section 4.1.

    With T epochs it is ``1 / (T - 1)`` times the sum of the signed changes, counted upwards on the
    remain data and downwards on the forget data. The sum telescopes: only the first and the last
    value count, and a curve that swings widely and comes back scores 0.

    Args:
        values: accuracies after 0, 1, .. T epochs.
        forget: which of the two signs.

    Returns:
        ``None`` for fewer than two epochs, or where a value is missing.
    """
    epochs = len(values) - 1
    if epochs < 2 or any(v is None for v in values):
        return None
    first, last = values[0], values[-1]
    assert first is not None and last is not None
    return (first - last if forget else last - first) / (epochs - 1)


def over_rows(found: Iterable[Row], quantity: Callable[[Row], float | None]) -> Stat | None:
    """Any quantity of a row over the seeds."""
    return stat(quantity(row) for row in found)


def seconds(row: Row) -> float:
    """Run time of a row: scoring, editing and training, without the evaluations."""
    return float((row["seconds"].get("edit") or 0.0) + (row["seconds"].get("fit") or 0.0))


@dataclass(frozen=True)
class MaskedRow:
    """One line of the paper's Table 1: after masking, before fine-tuning.

    Attributes:
        label: the method.
        remain: test accuracy on the remaining data.
        remain_volatility: of its curve during fine-tuning, mean absolute change.
        remain_formula: the same by the paper's formula.
        forget: test accuracy on the forget data.
        forget_volatility: of its curve.
        forget_formula: the same by the paper's formula.
    """

    label: str
    remain: Stat | None
    remain_volatility: Stat | None
    remain_formula: Stat | None
    forget: Stat | None
    forget_volatility: Stat | None
    forget_formula: Stat | None


def masked_rows(summary: Summary) -> list[MaskedRow]:
    """Table 1 of the paper for this recipe; accuracies and volatilities are shares, not percent."""
    found = []
    for label in labels(summary, REMOVE_CLASS):
        group = rows(summary, REMOVE_CLASS, label)
        measured: list[Stat | None] = []
        for metric, forget in (("test_remain", False), ("test_forget", True)):
            curves = [curve(row, metric) for row in group]
            measured += [
                stat(value(row, metric, "start") for row in group),
                stat(volatility(c) for c in curves),
                stat(paper_volatility(c, forget=forget) for c in curves),
            ]
        found.append(MaskedRow(label, *measured))
    return found
