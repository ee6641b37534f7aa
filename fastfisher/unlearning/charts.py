"""Small inline SVG charts for reports: lines over epochs, bars over layers, maps of classes.

The drawings carry class names instead of colours, so that the page's style sheet serves light and
dark mode, and every series has a marker of its own beside its colour. The last colour of each round
is the grey of references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46
COLOURS = 10
SERIES_STYLES = 3 * COLOURS

_Place = Callable[[float, float], tuple[float, float]]

_MARKERS = (
    Markup('<circle r="4"/>'),
    Markup('<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>'),
    Markup('<path d="M0-4.8 4.4 3.4-4.4 3.4Z"/>'),
    Markup('<path d="M0-5 5 0 0 5-5 0Z"/>'),
    Markup('<path d="M0 4.8 4.4-3.4-4.4-3.4Z"/>'),
    Markup('<path d="M-4-1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4Z"/>'),
    Markup(
        '<path d="M-4-2.2-2.2-4 0-1.8 2.2-4 4-2.2 1.8 0 4 2.2 2.2 4 0 1.8-2.2 4-4 2.2-1.8 0Z"/>'
    ),
    Markup('<path d="M-5-2H5V2H-5Z"/>'),
)
_STAR = Markup(
    '<path d="M0-9 2.2-3 8.6-2.8 3.5 1.1 5.3 7.3 0 3.6-5.3 7.3-3.5 1.1-8.6-2.8-2.2-3Z"/>'
)


def _marker(style: int) -> Markup:
    """Series of the same colour differ in their marker."""
    return _MARKERS[(style + style // COLOURS) % len(_MARKERS)]


@dataclass(frozen=True)
class Line:
    """One series: its label, its style (colour and marker), its points.

    Attributes:
        label: shown in the legend and when the pointer rests on a point.
        style: 0 .. SERIES_STYLES - 1; a method keeps its style across the charts of a page.
        points: ``(x, y)``, y a share in [0, 1].
        level: a reference to reach: the last y as a dashed line over the whole width.
        dashed: the second quantity of a chart that shows two for each series.
        star: points that stand for themselves, drawn large and without a line.
    """

    label: str
    style: int
    points: Sequence[tuple[float, float]]
    level: bool = False
    dashed: bool = False
    star: bool = False

    @property
    def drawn(self) -> Sequence[tuple[float, float]]:
        """The points that show."""
        return self.points[-1:] if self.level else self.points


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: label at its left, value in [0, 1], text at its right end."""

    label: str
    value: float
    text: str


def legend_key(style: int, *, level: bool = False, star: bool = False) -> Markup:
    """The symbol of a series for a legend: its marker, or a piece of its dashed line."""
    shape = Markup('<g transform="scale(.75)">{}</g>').format(_STAR) if star else _marker(style)
    symbol = Markup('<g class="mark s{}">{}</g>').format(style, shape)
    if level:
        symbol = Markup('<line class="line level s{}" x1="-12" x2="12"/>').format(style)
    width = 24 if level else 14
    return Markup(
        '<svg class="key" viewBox="{} -7 {width} 14" width="{width}" height="14" '
        'aria-hidden="true">{}</svg>'
    ).format(-width // 2, symbol, width=width)


def percent(value: float, digits: int = 1) -> str:
    """A share as a person reads it: 0.1234 is 12.3%."""
    return f"{100 * value:.{digits}f}%"


def _axis(values: Sequence[float]) -> list[float]:
    """Ticks in [0, 1] that enclose the values, at a step a person can read."""
    low, high = min(values), max(values)
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        top = round(1 / step)
        first, last = math.floor(low / step + 1e-9), min(math.ceil(high / step - 1e-9), top)
        if last - first < 2:
            first = min(max(first - 1, 0), top - 2)
            last = first + 2
        if last - first <= 6:
            break
    return [round(i * step, 4) for i in range(first, last + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
) -> Markup:
    """Shares over a common x axis.

    Args:
        lines: at least one point in all.
        title: for screen readers; the page prints its own heading.
        x_ticks: ``(x, label)``; the first and the last span the axis.
        x_label: text under the x axis.
        y_label: text beside the y axis.

    Returns:
        One ``<svg>`` element.
    """
    ticks = _axis([y for line in lines for _, y in line.drawn])
    x_low, x_high = x_ticks[0][0], x_ticks[-1][0]
    inner_width, inner_height = WIDTH - LEFT - RIGHT - 16, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return LEFT + 8 + across * inner_width, TOP + (1 - up) * inner_height

    parts: list[Markup] = []
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 7, y + 4, percent(tick, 0), y=y)
        )
    for x, label in x_ticks:
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                place(x, 0)[0], HEIGHT - BOTTOM + 18, label
            )
        )
    parts.append(
        Markup(
            '<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>'
            '<text class="axis" transform="translate(12 {}) rotate(-90)" text-anchor="middle">'
            "{}</text>"
        ).format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, TOP + inner_height / 2, y_label)
    )
    # Levels first: the measured curves stay on top of the reference that they are read against.
    for line in sorted(lines, key=lambda line: not line.level):
        parts.append(_level(line, place) if line.level else _curve(line, place))
    return Markup(
        '<svg class="chart lines" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, title, Markup("").join(parts))


def _curve(line: Line, place: _Place) -> Markup:
    spots = [(*place(x, y), y) for x, y in line.drawn]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
    shape = _STAR if line.star else _marker(line.style)
    marks = [
        Markup(
            '<g class="mark s{}" transform="translate({:.1f} {:.1f})">{}<title>{}: {}</title></g>'
        ).format(line.style, x, y, shape, line.label, percent(value, 2))
        for x, y, value in spots
    ]
    if line.star:
        return Markup("").join(marks)
    kind = "line dashed" if line.dashed else "line"
    curve = Markup('<polyline class="{} s{}" points="{}"/>').format(kind, line.style, path)
    return curve + Markup("").join(marks)


def _level(line: Line, place: _Place) -> Markup:
    ((x, value),) = line.drawn
    _, y = place(x, value)
    return Markup(
        '<line class="line level s{}" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}">'
        "<title>{}: {}</title></line>"
    ).format(line.style, LEFT, WIDTH - RIGHT, line.label, percent(value, 2), y=y)


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str) -> Markup:
    """Horizontal bars, one a row, on an axis from 0 to the longest bar.

    Args:
        bars: in the order to draw them, top first; at least one.
        title: for screen readers.
        x_label: what the length of a bar means.

    Returns:
        One ``<svg>`` element.
    """
    row, width = 22, 2 * WIDTH
    # 6.7 px is the widest a character of a parameter name gets at this font size.
    left = min(0.45 * width, 16 + 6.7 * max(len(bar.label) for bar in bars))
    span = width - left - 230
    longest = max(bar.value for bar in bars) or 1.0
    parts = [
        Markup(
            '<text x="{:.1f}" y="{}" text-anchor="end">{}</text>'
            '<rect class="bar" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/>'
            '<text x="{:.1f}" y="{}">{}</text>'
        ).format(
            left - 8,
            row * i + 15,
            bar.label,
            left,
            row * i + 4,
            max(span * bar.value / longest, 1.0),
            row - 8,
            left + max(span * bar.value / longest, 1.0) + 7,
            row * i + 15,
            bar.text,
        )
        for i, bar in enumerate(bars)
    ]
    height = row * len(bars) + 24
    parts.append(
        Markup('<text class="axis" x="{:.1f}" y="{}">{}</text>').format(left, height - 4, x_label)
    )
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, title, Markup("").join(parts))


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    scale: float,
) -> Markup:
    """Signed values as a grid of cells: more in one colour, less in another, stronger for larger.

    Args:
        values: one row of cells a row.
        title: for screen readers.
        rows: label of each row, at its left.
        columns: label of each column, below it.
        scale: the absolute value with the full colour; above 0.

    Returns:
        One ``<svg>`` element.
    """
    side = 22
    left, below = 92, 74
    width, height = left + side * len(columns) + 20, side * len(rows) + below
    parts = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
                left - 6, side * i + 15, name
            )
        )
        for j, (other, value) in enumerate(zip(columns, row, strict=True)):
            parts.append(
                Markup(
                    '<g transform="translate({} {})"><rect class="{}" width="{side}" '
                    'height="{side}" fill-opacity="{:.2f}"/><rect class="cell" width="{side}" '
                    'height="{side}"/><title>{} as {}: {:+.1f} points</title></g>'
                ).format(
                    left + side * j,
                    side * i,
                    "more" if value > 0 else "less",
                    min(abs(value) / scale, 1.0),
                    name,
                    other,
                    100 * value,
                    side=side,
                )
            )
    for j, other in enumerate(columns):
        parts.append(
            Markup(
                '<text transform="translate({} {}) rotate(-50)" text-anchor="end">{}</text>'
            ).format(left + side * j + 14, side * len(rows) + 14, other)
        )
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, title, Markup("").join(parts))
