"""What a claim is judged by: the numbers of a summary, and comparisons that know their spread."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .aggregate import (
    REMOVE_CLASS,
    Row,
    Setting,
    Stage,
    Stat,
    Summary,
    curve,
    measure,
    reference_rows,
    rows,
    settings,
    stat,
    value,
    volatility,
)

Agrees = Literal["yes", "no", "partly", "not measured"]


class NotMeasured(Exception):
    """A number that the rule needs is not in the summary."""


def plain(name: str) -> str:
    """A name without what differs between spellings: case and punctuation."""
    return re.sub("[^a-z0-9]", "", name.lower())


def entries(summary: Summary, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Entries of the paper's methods whose name contains one of ``names``."""
    parts = tuple(map(plain, names))
    return [
        entry
        for entry in summary["methods"]
        if any(part in plain(entry["method"]) for part in parts)
        and not entry["control"]
        and not entry["beyond_paper"]
    ]


class View:
    """The numbers of one summary, each method in one definition; what is missing raises."""

    def __init__(self, summary: Summary, definition: str | None) -> None:
        self.summary, self.definition = summary, definition

    def label(self, name: str, experiment: str = REMOVE_CLASS) -> str:
        """The row label that stands for a method in this definition."""
        found = [
            entry
            for entry in entries(self.summary, (name,))
            if rows(self.summary, experiment, str(entry["label"]))
        ]
        if not found:
            raise NotMeasured(f'no row of {name} in "{experiment}"')
        same = [entry for entry in found if entry.get("definition") == self.definition]
        return str((same or found)[0]["label"])

    def present(self, names: Sequence[str], experiment: str = REMOVE_CLASS) -> list[str]:
        """Labels of those that ran."""
        found = []
        for name in names:
            try:
                found.append(self.label(name, experiment))
            except NotMeasured:
                continue
        return found

    def rows(
        self, label: str, experiment: str = REMOVE_CLASS, setting: Setting | None = None
    ) -> list[Row]:
        """Rows of one method."""
        return rows(self.summary, experiment, label, setting)

    def get(
        self,
        label: str,
        metric: str,
        stage: Stage = "final",
        experiment: str = REMOVE_CLASS,
        setting: Setting | None = None,
    ) -> Stat:
        """A metric over the seeds."""
        found = measure(self.summary, experiment, label, metric, stage=stage, setting=setting)
        return self._there(found, f'{metric} of {label} in "{experiment}"')

    def curves(
        self,
        label: str,
        metric: str,
        experiment: str = REMOVE_CLASS,
        setting: Setting | None = None,
    ) -> list[list[float]]:
        """Per seed, the accuracy from the start of fine-tuning on."""
        found = [curve(row, metric) for row in self.rows(label, experiment, setting)]
        whole = [[v for v in c if v is not None] for c in found if None not in c]
        if not whole or min(map(len, whole)) < 2:
            raise NotMeasured(f'no curve of {metric} of {label} in "{experiment}"')
        return whole

    def volatility(
        self,
        label: str,
        metric: str,
        experiment: str = REMOVE_CLASS,
        setting: Setting | None = None,
    ) -> Stat:
        """Mean absolute change per epoch, over the seeds."""
        found = stat(map(volatility, self.curves(label, metric, experiment, setting)))
        return self._there(found, f"volatility of {label}")

    def tuned(self, names: Sequence[str], experiment: str = REMOVE_CLASS) -> list[str]:
        """Labels of those that ran and trained for at least one epoch."""
        return [
            label
            for label in self.present(names, experiment)
            if any(
                record["stage"] == "epoch"
                for row in self.rows(label, experiment)
                for record in row["history"]
            )
        ]

    def retrained(self, metric: str) -> Stat:
        """A metric over the retrained models."""
        found = stat(value(row, metric) for row in self.retrained_rows())
        return self._there(found, f"{metric} of the retrained models")

    def retrained_rows(self) -> list[Row]:
        """The retrained models."""
        found = reference_rows(self.summary, REMOVE_CLASS)
        if not found:
            raise NotMeasured("no retrained model")
        return found

    def at(self, experiment: str, key: str) -> list[Setting]:
        """Settings of an experiment, sorted by the one thing it varies."""
        found = [s for s in settings(self.summary, experiment) if key in s]
        if not found:
            raise NotMeasured(f'"{experiment}" did not run')
        return sorted(found, key=lambda setting: setting[key])

    def data(self) -> str:
        """Name of the data set."""
        return str(self.summary["data"]["name"])

    @staticmethod
    def _there(found: Stat | None, what: str) -> Stat:
        if found is None:
            raise NotMeasured(f"no {what}")
        return found


def show(found: Stat, unit: str = "%") -> str:
    """A share as percent with its spread."""
    spread = "" if found.spread is None else f"\u00a0±\u00a0{100 * found.spread:.1f}"
    return f"{100 * found.mean:.1f}{unit}{spread}"


def listed(view: Iterable[tuple[str, Stat]], unit: str = "%") -> str:
    """Named shares in a row."""
    return ", ".join(f"{label} {show(found, unit)}" for label, found in view)


def all_of(parts: Iterable[Agrees]) -> Agrees:
    """Give "yes" or "no" where all parts say so, else "partly"."""
    found = set(parts)
    return found.pop() if len(found) == 1 else "partly"


def yes_if(holds: bool, partly: bool = False) -> Agrees:
    """A rule with a weaker form."""
    return "yes" if holds else "partly" if partly else "no"


def above(high: Stat, low: Stat) -> Agrees:
    """Whether one mean is above the other by more than the spread."""
    lead = high.mean - low.mean
    spread = max(high.spread or 0.0, low.spread or 0.0)
    return yes_if(lead > spread, lead > 0)


def below(low: Stat, high: Stat) -> Agrees:
    """:func:`above` the other way round."""
    return above(high, low)


def leads(winner: str, found: Mapping[str, Stat], *, lowest: bool = False) -> Agrees:
    """Whether one method leads all others."""
    sign = below if lowest else above
    others = [sign(found[winner], found[label]) for label in found if label != winner]
    if not others:
        raise NotMeasured("no other method to compare with")
    # One method ahead is enough to refute "the best".
    return "no" if "no" in others else all_of(others)


def balance(remain: Stat, forget: Stat) -> Stat:
    """Remain minus forget accuracy: the one number for "forgets, and keeps the rest"."""
    spreads = [s for s in (remain.spread, forget.spread) if s is not None]
    spread = sum(s * s for s in spreads) ** 0.5 if spreads else None
    return Stat(remain.mean - forget.mean, spread, remain.count, remain.rows)
