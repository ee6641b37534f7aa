"""``report.html``: one self-contained page on a run, readable without a server or a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .charts import COLOURS, SERIES_STYLES, Bar, Line, bar_chart, legend_key, line_chart, percent

if TYPE_CHECKING:
    from markupsafe import Markup

    from .result import EpochRecord, UnlearnResult

NONE = "-"
ACCURACIES = (
    ("test_forget", "Forget, test"),
    ("test_remain", "Remain, test"),
    ("train_forget", "Forget, train"),
    ("train_remain", "Remain, train"),
)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        heads: the header cells.
        rows: the other cells.
        marks: (row, column) of a cell to set off, and the style class that does it.
        prose: columns that hold sentences; their lines wrap.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)
    prose: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """One block of the page.

    Attributes:
        title: its heading.
        text: a sentence under the heading.
        table: below the charts.
        legend: ``(symbol, label)`` pairs.
        charts: ``(heading, svg)`` pairs.
        folded: a line to click on that shows charts and table; empty shows them at once.
        small: the charts are small, more of them fit beside each other.
    """

    title: str
    text: str = ""
    table: Table | None = None
    legend: Sequence[tuple[Markup, str]] = ()
    charts: Sequence[tuple[str, Markup]] = ()
    folded: str = ""
    small: bool = False


@dataclass(frozen=True)
class Stage:
    """One model of the headline table.

    Attributes:
        label: what it is called there.
        record: what was measured.
        seconds: from the original model (for "retrained", from nothing) to this one; ``None`` for
            the original.
    """

    label: str
    record: EpochRecord
    seconds: float | None


def stages(results: Sequence[UnlearnResult]) -> list[Stage]:
    """The models that a run compares, the original first.

    Each method adds its model right after masking, where it masks, and that of its last epoch. With
    a single method beside "retrain" the labels are the plain "masked" and "fine-tuned".
    """
    several = sum(result.method != "retrain" for result in results) > 1
    found = [Stage("original", results[0].history[0], None)]
    for result in results:
        prefix = f"{result.method}: " if several else ""
        seconds = 0.0
        last = None
        for record in result.history:
            seconds += record.seconds
            if record.stage == "masked":
                found.append(Stage(f"{prefix}masked", record, seconds))
            elif record.stage == "epoch":
                name = "retrained" if result.method == "retrain" else f"{prefix}fine-tuned"
                last = Stage(name, record, seconds)
        if last is not None:
            found.append(last)
    return found


def accuracy_table(results: Sequence[UnlearnResult]) -> Table:
    """The headline table: accuracies and time of each model that a run compares."""
    rows = stages(results)
    shown = [
        (key, head)
        for key, head in ACCURACIES
        if any(getattr(row.record, key) is not None for row in rows)
    ]
    return Table(
        ("model", *(head.lower() for _, head in shown), "seconds"),
        [
            (
                row.label,
                *(_share(getattr(row.record, key)) for key, _ in shown),
                NONE if row.seconds is None else f"{row.seconds:.1f}",
            )
            for row in rows
        ],
    )


def unlearning_page(
    results: Sequence[UnlearnResult],
    *,
    title: str,
    subtitle: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    """The page on one or more unlearning methods run on the same model.

    Args:
        results: one per method; the one of method "retrain", where there is one, is the reference
            that the curves of the others are drawn against.
        title: the page's heading.
        subtitle: one line on what was unlearned from what.
        config: shown as it is under "Configuration".
        environment: shown as it is under "Environment".

    Returns:
        The HTML document.
    """
    sections = [
        Section(
            "Accuracy",
            "Forget: the samples to unlearn, lower is better. Remain: all others, higher is "
            "better. A model retrained without the forget samples is the reference for both. "
            "Seconds: scoring, masking and training up to there, without the evaluations.",
            accuracy_table(results),
        ),
        _curves(results),
        *(_masked(r, first=r is results[0]) for r in results if r.mask is not None),
        *(part for result in results if result.search for part in _search(result)),
        _every_epoch(results),
    ]
    return render(title, subtitle, _headline(results), sections, config, environment)


def training_page(
    history: Sequence[Mapping[str, Any]],
    *,
    title: str,
    subtitle: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    """The page on a training run.

    Args:
        history: at least one epoch; of each "epoch", "lr", "loss", "seconds" and "test", the
            accuracy in [0, 1].
        title: the page's heading.
        subtitle: one line on what was trained on what.
        config: shown as it is under "Configuration".
        environment: shown as it is under "Environment".

    Returns:
        The HTML document.
    """
    lines = [Line("test", 0, [(row["epoch"], row["test"]) for row in history])]
    chart = line_chart(
        lines,
        title="Test accuracy per epoch",
        x_ticks=epoch_ticks(len(history)),
        x_label="epoch",
        y_label="accuracy",
    )
    rows = [
        (
            str(row["epoch"]),
            number(row["lr"]),
            number(row["loss"]),
            _share(row["test"], 2),
            number(row["seconds"], 3),
        )
        for row in history
    ]
    heads = ("epoch", "learning rate", "loss", "test accuracy", "seconds")
    sections = [
        Section("Test accuracy per epoch", charts=[("", chart)]),
        Section("Every epoch", table=Table(heads, rows)),
    ]
    headline = f"Test accuracy {_share(history[-1]['test'])} after {len(history)} epochs."
    return render(title, subtitle, headline, sections, config, environment)


def render(
    title: str,
    subtitle: str,
    headline: str,
    sections: Sequence[Section],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    """A page from its parts; see :func:`unlearning_page` for what they are."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return pages.get_template("report.html.jinja").render(
        title=title,
        subtitle=subtitle,
        headline=headline,
        sections=sections,
        fact_sheets=[
            (name, [(_name(key), cell(value)) for key, value in facts.items()])
            for name, facts in (("Configuration", config), ("Environment", environment))
        ],
        styles=SERIES_STYLES,
        colours=COLOURS,
    )


def _headline(results: Sequence[UnlearnResult]) -> str:
    """The outcome of the first method in a sentence."""
    first = results[0]
    data = "test" if first.history[0].test_remain is not None else "train"
    # The last record of each stage, so of all epochs the last one.
    last = {record.stage: record for record in first.history}
    words = {"masked": "by masking alone", "epoch": "after fine-tuning"}
    if first.method == "retrain":
        words = {"epoch": "by training anew"}
    reached = [(last[stage], text) for stage, text in words.items() if stage in last]

    def story(part: str) -> str:
        values = [f"{_share(getattr(record, part))} {text}" for record, text in reached]
        return f"{_share(getattr(first.history[0], part))} to {' and '.join(values)}"

    kind = "test" if data == "test" else "training"
    told = []
    if getattr(first.history[0], f"{data}_forget") is not None:
        told.append(f"forget accuracy from {story(f'{data}_forget')}")
    told.append(f"remain accuracy from {story(f'{data}_remain')}")
    text = f"On {kind} data, {first.method} takes {', and '.join(told)}"
    reference = next((r for r in results[1:] if r.method == "retrain"), None)
    if reference is not None:
        text += f" (retrained: {_share(getattr(reference.history[-1], f'{data}_remain'))})"
    return f"{text}."


def _curves(results: Sequence[UnlearnResult]) -> Section:
    """Forget and remain accuracy per epoch: one chart for each kind of data, one line a method."""
    masks = any(record.stage == "masked" for result in results for record in result.history)
    epochs = max(
        (r.epoch for result in results if result.method != "retrain" for r in result.history),
        default=0,
    )
    offset = 1 if masks else 0
    ticks = [(0.0, "original"), *([(1.0, "masked")] if masks else [])]
    ticks += [(x + offset, label) for x, label in epoch_ticks(epochs)]
    charts = []
    for name, heading in ACCURACIES:
        lines = []
        for style, result in enumerate(results):
            points = [
                (0.0 if r.stage == "original" else float(r.epoch + offset), value)
                for r in result.history
                if (value := getattr(r, name)) is not None
            ]
            if points:
                level = result.method == "retrain"
                lines.append(Line(_label(result), style % SERIES_STYLES, points, level))
        if lines:
            chart = line_chart(
                lines, title=heading, x_ticks=ticks, x_label="epoch", y_label="accuracy"
            )
            charts.append((heading, chart))
    return Section(
        "Accuracy per epoch",
        "The vertical axes differ: each spans the values it shows.",
        legend=[
            (legend_key(i % SERIES_STYLES, level=r.method == "retrain"), _label(r))
            for i, r in enumerate(results)
        ],
        charts=charts,
    )


def _label(result: UnlearnResult) -> str:
    return "retrain (its last epoch)" if result.method == "retrain" else result.method


def _masked(result: UnlearnResult, *, first: bool) -> Section:
    """The share of each parameter that the mask zeroed; those with none are left out."""
    assert result.mask is not None
    masks = result.mask.as_dict()
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    bars = [
        Bar(
            name,
            count / masks[name].numel(),
            f"{percent(count / masks[name].numel(), 2)} ({count:,} of {masks[name].numel():,})",
        )
        for name, count in counts.items()
        if count
    ]
    eligible, zeroed = sum(mask.numel() for mask in masks.values()), sum(counts.values())
    text = f"{zeroed:,} of {eligible:,} eligible scalars zeroed ({percent(zeroed / eligible, 2)})"
    if untouched := len(masks) - len(bars):
        text += f"; in {untouched} of {len(masks)} eligible parameters none"
    title = f"Masked share of each parameter: {result.method}"
    label = "share of the parameter's scalars"
    charts = [("", bar_chart(bars, title=title, x_label=label))] if bars else []
    return Section(title, f"{text}.", charts=charts, folded="" if first else "Show the shares")


def _search(result: UnlearnResult) -> list[Section]:
    """The search: all weights and ratios of the unit and scope that it chose, and the best of all.

    One row a weight and one column a ratio; then the Pareto curve over every unit and scope.
    """
    search = result.search
    assert search
    chosen = search["chosen"]
    by_place = {
        (c["remain_weight"], c["ratio"]): c
        for c in search["candidates"]
        if (c["granularity"], c["scope"]) == (chosen["granularity"], chosen["scope"])
    }
    weights = sorted({weight for weight, _ in by_place})
    ratios = sorted({ratio for _, ratio in by_place})
    rows = [
        [number(weight), *(_pair(by_place.get((weight, ratio))) for ratio in ratios)]
        for weight in weights
    ]
    place = weights.index(chosen["remain_weight"]), 1 + ratios.index(chosen["ratio"])
    curve = [
        [
            *(number(c[key]) for key in ("remain_weight", "ratio")),
            *(c[key] for key in ("granularity", "scope")),
            *(_share(c[key]) for key in ("forget", "remain")),
        ]
        for c in search["pareto"]
    ]
    return [
        Section(
            f"Search for the remain weight w and the ratio R: {result.method}",
            "Forget / remain accuracy right after masking, on training samples that the Fishers "
            f"have not seen ({search['held_forget']:,} and {search['held_remain']:,}). "
            f"{len(search['candidates']):,} masks were tried, on a grid of {search['grid']:,} and "
            "between its weights; shown are those of the unit and the scope that were chosen: "
            f"{chosen['granularity']}, {chosen['scope']}. The pair in the frame was chosen. Test "
            "samples take no part.",
            Table(["w", *(f"R = {number(ratio)}" for ratio in ratios)], rows, {place: "chosen"}),
        ),
        Section(
            f"What can be had by masking alone: {result.method}",
            "The masks that no other one beats in both accuracies, on the same samples.",
            Table(["w", "R", "unit", "scope", "forget", "remain"], curve),
        ),
    ]


def _pair(candidate: Mapping[str, Any] | None) -> str:
    if candidate is None:
        return NONE
    return f"{_share(candidate['forget'])} / {_share(candidate['remain'])}"


def _every_epoch(results: Sequence[UnlearnResult]) -> Section:
    rows = [
        (
            result.method,
            record.stage if record.stage != "epoch" else str(record.epoch),
            number(record.lr),
            number(record.loss),
            *(_share(getattr(record, key), 2) for key, _ in ACCURACIES),
            number(record.seconds, 3),
        )
        for result in results
        for record in result.history
    ]
    heads = ("method", "epoch", "learning rate", "loss", *(h.lower() for _, h in ACCURACIES))
    return Section("Every epoch", table=Table((*heads, "seconds"), rows), folded="Show the numbers")


def epoch_ticks(epochs: int) -> list[tuple[float, str]]:
    """Epochs 1 .. ``epochs``, thinned out to at most ten labels, the last one always there."""
    step = -(-epochs // 10) or 1
    # A label less than half a step before the last one would run into it.
    shown = {1, *range(step, epochs - step // 2, step), epochs}
    return [(float(epoch), str(epoch)) for epoch in sorted(shown) if epochs]


def cell(value: object) -> str:
    """Any JSON-able value in one line of text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(key)} {cell(item)}" for key, item in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value) or NONE
    return str(value)


def _name(key: str) -> str:
    return key.replace("_", " ")


def _share(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else percent(value, digits)


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits."""
    return NONE if value is None else f"{value:.{digits}g}"
