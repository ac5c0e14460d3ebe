"""Small line and scatter charts as inline SVG, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from markupsafe import Markup

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 14, 46
COLOURS = 6  # --c0 … --c5 in report.css
CHARACTER, LINE = 6.6, 13  # of an 11-pixel label


@dataclass(frozen=True)
class Series:
    """Points of one colour; `labels` go beside them."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = field(default=())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, with room around them."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, margin: float) -> Scale:
        """A scale that shows `values` with `margin` of their range on either side."""
        low, high = min(values), max(values)
        room = (high - low) * margin or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def chart(series: Sequence[Series], x_label: str, y_label: str, *, lines: bool) -> Markup:
    """An SVG of the series, as lines or as labelled points; empty markup where there is no point."""
    points = [point for one in series for point in one.points if all(map(math.isfinite, point))]
    if not points:
        return Markup("")
    margin = 0.02 if lines else 0.12
    x = Scale.around([point[0] for point in points], LEFT, WIDTH - RIGHT, margin)
    y = Scale.around([point[1] for point in points], HEIGHT - BOTTOM, TOP, max(margin, 0.06))
    body = [*_axes(x, y, x_label, y_label), *(_lines(series, x, y) if lines else _points(series, x, y))]
    title = Markup("{} against {}").format(y_label, x_label)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(body)
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Iterator[Markup]:
    for value in ticks(y.low, y.high):
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, y(value), y(value)
        )
        yield _text("tick", LEFT - 8, y(value) + 4, f"{value:g}", "end")
    for value in ticks(x.low, x.high):
        yield _text("tick", x(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle")
    yield Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM
    )
    yield _text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield Markup('<text class="label" text-anchor="middle" transform="translate(13 {}) rotate(-90)">{}</text>').format(
        middle, y_label
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _lines(series: Sequence[Series], x: Scale, y: Scale) -> Iterator[Markup]:
    for place, one in enumerate(series):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.points if math.isfinite(a) and math.isfinite(b))
        colour = f"var(--c{place % COLOURS})"
        yield Markup('<polyline class="line" style="stroke:{}" points="{}"><title>{}</title></polyline>').format(
            colour, path, one.name
        )


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlaps(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _place(px: float, py: float, text: str, taken: list[Box]) -> tuple[float, float, str]:
    """Where a label fits beside its point: x, baseline and anchor of the first free of six places."""
    width = len(text) * CHARACTER
    places = list(product(("start", "end"), (4.0, -9.0, 17.0)))
    boxes: list[Box] = []
    for anchor, shift in places:
        left = px + 9 if anchor == "start" else px - 9 - width
        boxes.append((left, py + shift - LINE + 2, left + width, py + shift + 2))
    free = [
        at
        for at, box in enumerate(boxes)
        if box[0] >= LEFT and box[2] <= WIDTH and not any(_overlaps(box, other) for other in taken)
    ]
    chosen = free[0] if free else 0
    taken.append(boxes[chosen])
    anchor, shift = places[chosen]
    return (px + 9 if anchor == "start" else px - 9), py + shift, anchor


def _points(series: Sequence[Series], x: Scale, y: Scale) -> Iterator[Markup]:
    taken: list[Box] = [(x(a) - 5, y(b) - 5, x(a) + 5, y(b) + 5) for one in series for a, b in one.points]
    for place, one in enumerate(series):
        colour = f"var(--c{place % COLOURS})"
        for (a, b), label in zip(one.points, one.labels, strict=True):
            yield Markup('<circle r="5" cx="{:.1f}" cy="{:.1f}" style="fill:{}"><title>{} {}</title></circle>').format(
                x(a), y(b), colour, one.name, label
            )
            lx, ly, anchor = _place(x(a), y(b), label, taken)
            yield _text("point", lx, ly, label, anchor)
