"""A chart as SVG. Its colours are the page's, so that it is right in the dark as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from raygym.report.curves import Chart
from raygym.report.odd_values import LARGEST

_WIDTH, _HEIGHT = 360, 172
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 22
_TICKS = 4
_MOST_MARKS = 30
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_SMALLEST = 1e-290
"""What is closer to 0 is drawn as 0."""
_DIGITS, _MOST_DIGITS = 3, 6
_SAME = 1e-9
"""Values that differ by this share of themselves are drawn as one: floats between them would be too few."""


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    at_low: float
    at_high: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.at_low + share * (self.at_high - self.at_low), 2)


def svg(chart: Chart) -> Markup:
    """The chart, 360 x 172, that scales with the page. Points tell their step and value when they are few."""
    steps = [step for series in chart.series for step, _ in series.points]
    values = [value for series in chart.series for _, value in series.points]
    y_ticks = ticks(min(values), max(values))
    last = max(*steps, 1)
    x_ticks = [tick for tick in ticks(0, last) if tick == int(tick) and tick <= last]
    x = _Axis(0, last, _LEFT, _WIDTH - _RIGHT)
    y = _Axis(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, _said(chart))]
    for tick, label in zip(y_ticks, labels(y_ticks), strict=True):
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, y.place(tick), _WIDTH - _RIGHT))
        parts.append(_text(_LEFT - 6, y.place(tick) + 4, "end", label))
    for tick in x_ticks:
        parts.append(_text(x.place(tick), _HEIGHT - 5, "middle", f"{tick:g}"))
    for index, series in enumerate(chart.series):
        placed = [(x.place(step), y.place(value)) for step, value in series.points]
        line = "L".join(f"{left} {top}" for left, top in placed)
        parts.append(Markup('<path class="line s{}" d="M{}"/>').format(index, line))
        if len(placed) <= _MOST_MARKS:
            for (left, top), (step, value) in zip(placed, series.points, strict=True):
                mark = Markup('<circle class="mark s{}" cx="{}" cy="{}" r="2.5"><title>{}</title></circle>')
                parts.append(mark.format(index, left, top, f"{series.label}, step {step}: {number(value)}"))
    return Markup("").join([*parts, Markup("</svg>")])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to six of them, the first at most `low`, the last at least `high`.

    But for what is beyond 1e300, and for what is as good as 0.
    """
    low, high = (0.0 if abs(end) < _SMALLEST else max(-LARGEST, min(LARGEST, end)) for end in (low, high))
    if high - low <= _SAME * max(abs(low), abs(high)):
        low, high = (0.0, high) if high > 0 else (low, 0.0) if low < 0 else (0.0, 1.0)
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in _STEPS if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12 - math.floor(math.log10(step))) for count in range(first, last + 1)]


def labels(found: Sequence[float]) -> list[str]:
    """Of ticks: with so many digits that rounding does not move them, six at most."""
    off = 0.01 * (found[1] - found[0])
    exact = (
        n for n in range(_DIGITS, _MOST_DIGITS) if all(abs(float(f"{tick:.{n}g}") - tick) <= off for tick in found)
    )
    digits = next(exact, _MOST_DIGITS)
    return [number(tick, digits) for tick in found]


def number(value: float | None, digits: int = _DIGITS) -> str:
    """As people write it: so many digits that say something; `-` where there is none."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else f"{value:.1e}".replace("e-0", "e-")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _said(chart: Chart) -> str:
    """The chart for who cannot see it."""
    told = [f"{s.label} from {number(s.first)} to {number(s.last)}" for s in chart.series]
    return f"{chart.title}: {'; '.join(told)}"


def _text(left: float, top: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(left, top, anchor, text)
