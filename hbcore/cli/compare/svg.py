"""Line charts as SVG text, coloured by the page's style sheet, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 28, 38  # margins, in the units of the view box
FEW = 6  # ticks of an axis, about
MARGIN = 0.04  # of the range, above and below the values


@dataclass(frozen=True)
class Line:
    """One line: ``index`` chooses its colour, ``sigmas`` are half the height of its band, ``points`` have marks."""

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float]
    sigmas: Sequence[float] = ()
    points: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its label, whether it is logarithmic, and its range; None for that of the values."""

    label: str = ""
    log: bool = False
    span: tuple[float, float] | None = None

    def shows(self, value: float) -> bool:
        """Whether the axis has a place for ``value``."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def range(self, values: Sequence[float]) -> tuple[float, float]:
        """The ends of the axis."""
        if self.span is not None:
            return self.span
        low, high = min(values), max(values)
        if self.log:
            margin = (high / low) ** MARGIN if high > low * 1.001 else 2.0
            return low / margin, high * margin
        margin = MARGIN * (high - low) or abs(high) * 0.1 or 1.0
        return low - margin, high + margin

    def ticks(self, low: float, high: float) -> list[float]:
        """Round numbers from ``low`` to ``high``."""
        return _log_ticks(low, high) if self.log else _linear_ticks(low, high)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / FEW
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(ticks) <= FEW:
            return ticks
    return ticks[:: math.ceil(len(ticks) / FEW)]


@dataclass(frozen=True)
class Chart:
    """A chart of some lines in one panel."""

    title: str
    lines: Sequence[Line]
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    width: int = 520
    height: int = 320

    def svg(self) -> str:
        """The chart as an ``<svg>`` element; a sentence where there is nothing to draw."""
        xs = [x for line in self.lines for x in (*line.x, *(p[0] for p in line.points)) if self.x.shows(x)]
        ys = [y for line in self.lines for y in (*line.y, *(p[1] for p in line.points)) if self.y.shows(y)]
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
        title = f'<text class="title" x="{LEFT}" y="16">{escape(self.title)}</text>'
        if not xs or not ys:
            return f'{head}{title}<text class="tick" x="{LEFT}" y="{self.height / 2:.0f}">nothing to show</text></svg>'
        across = _scale(self.x.range(xs), self.x.log, LEFT, self.width - RIGHT)
        up = _scale(self.y.range(ys), self.y.log, self.height - BOTTOM, TOP)
        drawn = [self._line(line, across, up) for line in self.lines]
        name = f"clip{abs(hash((self.title, self.width))) % 10**8}"
        box = f'x="{LEFT}" y="{TOP}" width="{self.width - LEFT - RIGHT}" height="{self.height - TOP - BOTTOM}"'
        clip = f'<clipPath id="{name}"><rect {box}/></clipPath>'
        axes = self._axes(self.x.range(xs), self.y.range(ys), across, up)
        return f'{head}{title}{clip}{axes}<g clip-path="url(#{name})">{"".join(drawn)}</g></svg>'

    def _axes(
        self, xs: tuple[float, float], ys: tuple[float, float], across: Callable[[float], float], up: Callable[[float], float]
    ) -> str:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for value in self.x.ticks(*xs):
            parts.append(f'<line class="grid" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{across(value):.1f}" y="{bottom + 14}" text-anchor="middle">{value:g}</text>')
        for value in self.y.ticks(*ys):
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
            shown = f"{value:.6g}"
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{up(value) + 4:.1f}" text-anchor="end">{shown}</text>')
        parts.append(f'<text class="axis" x="{right}" y="{self.height - 5}" text-anchor="end">{escape(self.x.label)}</text>')
        if self.y.label:
            parts.append(f'<text class="axis" x="{right}" y="16" text-anchor="end">{escape(self.y.label)}</text>')
        return "".join(parts)

    def _line(self, line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
        def place(x: float, y: float) -> str:
            return f"{across(x):.1f},{up(y):.1f}"

        kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if self.x.shows(x) and self.y.shows(y)]
        look = f"s{line.index % 7} d{line.index // 7 % 3}"
        parts = [f'<polyline class="line {look}" points="{" ".join(place(x, y) for x, y in kept)}"/>'] if kept else []
        if line.sigmas:
            band = [(x, y, s) for x, y, s in zip(line.x, line.y, line.sigmas, strict=True) if self.x.shows(x)]
            edge = [place(x, y + s) for x, y, s in band] + [place(x, y - s) for x, y, s in reversed(band)]
            parts.insert(0, f'<polygon class="band {look}" points="{" ".join(edge)}"/>')
        for x, y in line.points:
            if self.x.shows(x) and self.y.shows(y):
                tip = f"<title>{escape(line.label)}: {y:.4f} at {x:g}</title>"
                parts.append(f'<circle class="point {look}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5">{tip}</circle>')
        return "".join(parts)


def _scale(span: tuple[float, float], log: bool, start: float, end: float) -> Callable[[float], float]:
    """Value -> coordinate."""
    move: Callable[[float], float] = math.log10 if log else float
    low, high = map(move, span)
    return lambda value: start + (end - start) * (move(value) - low) / (high - low)
