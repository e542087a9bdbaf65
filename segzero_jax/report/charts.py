"""Charts as inline SVG, without libraries or scripts. Series differ by dash and label as well as by colour.

Colours come from the page's style sheet (``style.py``), so a chart follows light and dark mode.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from segzero_jax.report.markup import MINUS, show

Values = Sequence[float | None]
_MOST_POINTS = 240
_LABEL = 12  # height of a line of text
# Sizes beyond which float64 has no room for sums, differences and quotients. Larger values are drawn at the limit, and
# differences below the smaller one as none.
_HUGE, _TINY = 1e300, 1e-300


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
      label: its name, shown in the read-out and, if there are several series, at the end of the line.
      values: one per step, None for a missing one.
      faint: unsmoothed values, drawn thin behind the line.
      low, high: a band around the line.
    """

    label: str
    values: Values
    faint: Values = ()
    low: Values = ()
    high: Values = ()


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, and the maximum number of places with a read-out under the pointer."""

    width: int = 350
    height: int = 190
    places: int = 60


def line_chart(
    steps: Sequence[int],
    series: Sequence[Series],
    description: str,
    size: Size | None = None,
    floor: float | None = None,
    maximum: float | None = None,
) -> str:
    """Lines over steps.

    Args:
      steps: the step of every value.
      series: one or more.
      description: text for screen readers.
      size: size of the drawing; it scales with the page.
      floor: the lowest value on the axis; by default it follows from the values.
      maximum: the highest possible value; it gets its own line and tick.
    """
    size = size or Size()
    thin = [_thin(steps, line) for line in series]
    shown_steps = _bins(steps, steps)
    plot = _Plot.around(size, shown_steps, (steps[0], steps[-1]), thin, floor, maximum, several=len(series) > 1)
    parts = [*plot.axes(maximum)]
    for index, line in enumerate(thin):
        if line.low:
            parts.append(f'<path class="band s{index}" d="{plot.area(line.low, line.high)}"/>')
        if line.faint:
            parts.append(f'<path class="faint s{index}" d="{plot.path(line.faint)}"/>')
    for index, line in enumerate(thin):
        parts.append(f'<path class="line s{index}" d="{plot.path(line.values)}"/>')
        parts += plot.dots_alone(line.values, f"point s{index}")
    if len(series) > 1:
        parts += plot.end_labels(thin)
    parts += plot.read_outs(thin, size.places)
    return svg(size, description, parts)


def stacked_chart(steps: Sequence[int], layers: Sequence[Series], description: str, size: Size | None = None) -> str:
    """Layers stacked over steps, the first at the bottom. Peaks far above the rest are cut."""
    size = size or Size()
    shown_steps = _bins(steps, steps)
    binned = [np.array([_within(value or 0.0) for value in _bins(steps, layer.values)], float) for layer in layers]
    heights = np.cumsum(binned, axis=0)
    ceiling = min(float(heights[-1].max()), 3 * float(np.median(heights[-1]))) or 1.0
    clipped = np.minimum(heights, ceiling).tolist()
    top = Series("all", clipped[-1])
    plot = _Plot.around(size, shown_steps, (steps[0], steps[-1]), [top], 0.0, None, several=False)
    parts = [*plot.axes(None)]
    below = [0.0] * len(shown_steps)
    for index, line in enumerate(clipped):
        parts.append(f'<path class="layer l{index}" d="{plot.area(below, line)}"/>')
        below = line
    values = [Series(layer.label, part.tolist()) for layer, part in zip(layers, binned, strict=True)]
    parts += plot.read_outs([Series("in all", heights[-1].tolist()), *values], size.places, dots=False)
    return svg(size, description, parts)


# The least width of a visible bar, in pixels.
_SEEN = 3.0


def span_chart(
    steps: Sequence[int], rows: Sequence[tuple[str, Sequence[tuple[int, int]]]], description: str, size: Size
) -> str:
    """Spans of steps as bars in named rows; a span of one step is still wide enough to be seen."""
    left = 12 + 6.6 * max(len(name) for name, _ in rows)
    plot = _Plot(left, size.width - 10, 8, size.height - 24, steps, (steps[0], steps[-1]), 0.0, 1.0, [])
    height = (plot.bottom - plot.top) / len(rows)
    each = (plot.right - plot.left) / max(1, steps[-1] - steps[0])
    near = max(1.0, _SEEN / each)
    parts = [*plot.axes(None)]
    for index, (name, spans) in enumerate(rows):
        middle = plot.top + (index + 0.5) * height
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{plot.right}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<text class="tick" x="{left - 10:.1f}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>')
        for stretches in _run_together(spans, near):
            first, last = stretches[0][0], stretches[-1][1]
            width = max(_SEEN, (last - first + 1) * each)
            x = min(plot.right - width, plot.left + (first - steps[0] - 0.5) * each)
            # Paler, but still visible, if the bar covers steps that are in none of its spans.
            share = sum(end - begin + 1 for begin, end in stretches) / max(near, last - first + 1)
            pale = "" if share > 0.99 else f' fill-opacity="{0.25 + 0.75 * share:.2f}"'
            when = str(first) if first == last else f"{first} to {last}"
            often = "" if len(stretches) == 1 else f", {len(stretches)} times"
            box = f'x="{max(plot.left, x):.1f}" y="{middle - 7}" width="{width:.1f}" height="14"'
            parts.append(f'<rect class="span" {box}{pale}><title>{escape(name)}: {when}{often}</title></rect>')
    return svg(size, description, parts)


def _run_together(spans: Sequence[tuple[int, int]], near: float) -> list[list[tuple[int, int]]]:
    """Groups neighbouring spans into runs of at most ``near`` steps; longer spans, or all if near is 1, stay alone."""
    runs: list[list[tuple[int, int]]] = []
    for span in spans:
        if near > 1 and runs and span[1] - runs[-1][0][0] < near:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def svg(size: Size, description: str, parts: Sequence[str]) -> str:
    """Wraps drawing parts in an ``svg`` element."""
    return (
        f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{escape(description)}">'
        + "".join(parts)
        + "</svg>"
    )


def smooth(values: Values, window: int) -> list[float | None]:
    """The mean over ``window`` steps around each step, or over those that exist at the ends. None stays None."""
    half, count = window // 2, len(values)
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    scale = 2.0 ** min(max(math.frexp(largest)[1], 0), 1000)  # Dividing by it is exact, and no sum overflows.
    sums = np.concatenate([[0.0], np.cumsum([0.0 if value is None else value / scale for value in values])])
    counts = np.concatenate([[0], np.cumsum([value is not None for value in values])])
    begin = np.maximum(np.arange(count) - half, 0)
    end = np.minimum(np.arange(count) + half + 1, count)
    means = (sums[end] - sums[begin]) / np.maximum(counts[end] - counts[begin], 1)
    means = np.clip(means, -largest / scale, largest / scale) * scale
    return [None if value is None else float(mean) for value, mean in zip(values, means, strict=True)]


def smoothing_window(count: int) -> int:
    """An odd number of steps, about a tenth of the run."""
    return count // 20 * 2 + 1


def steps_per_point(count: int) -> int:
    """The number of steps per point of a chart: 1 except in long runs."""
    return max(1, math.ceil(count / _MOST_POINTS))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count``."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Plot:
    """The mapping of steps and values to the drawing.

    Attributes:
      steps: the steps of the points, within ``ends``; in a long run each is the mean of several steps.
      ends: the first and the last step.
    """

    left: float
    right: float
    top: float
    bottom: float
    steps: Sequence[float]
    ends: tuple[int, int]
    low: float
    high: float
    y_ticks: Sequence[float]

    @classmethod
    def around(
        cls,
        size: Size,
        steps: Sequence[float],
        ends: tuple[int, int],
        series: Sequence[Series],
        floor: float | None,
        maximum: float | None,
        several: bool,
    ) -> "_Plot":
        everything = [v for line in series for part in (line.values, line.faint, line.low, line.high) for v in part]
        known = [_within(value) for value in everything if value is not None] or [0.0]
        low = min(known) if floor is None else min(floor, *known)
        high = max(known) if maximum is None else max(maximum, *known)
        if high - low <= max(1e-6 * max(abs(low), abs(high)), _TINY):  # constant except for rounding
            margin = abs(low) * 0.1 if abs(low) > 100 * _TINY else 1.0
            low, high = (low, high + margin) if floor is not None else (low - margin, high + margin)
        elif maximum is None:
            high += (high - low) * 0.06
            low -= 0.0 if floor is not None else (high - low) * 0.06
        if min(known) >= 0.0:
            low = max(low, 0.0)  # no room below zero: the values may be shares or IoUs
        marks = ticks(low, high)
        widest = max(len(_tick(mark, marks)) for mark in marks)
        right = size.width - (9 + 6.6 * max(len(line.label) for line in series) if several else 10)
        return cls(12 + 6.8 * widest, right, 20, size.height - 24, steps, ends, low, high, marks)

    def x(self, index: int) -> float:
        first, last = self.ends
        share = (self.steps[index] - first) / (last - first) if last > first else 0.5
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        share = (_within(value) - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def axes(self, maximum: float | None) -> Iterator[str]:
        for mark in self.y_ticks:
            y = self.y(mark)
            kind = "max" if maximum is not None and math.isclose(mark, maximum) else "grid"
            yield f'<line class="{kind}" x1="{self.left}" x2="{self.right}" y1="{y}" y2="{y}"/>'
            words = _tick(mark, self.y_ticks)
            yield f'<text class="tick" x="{self.left - 7}" y="{y + 4}" text-anchor="end">{words}</text>'
        first, last = self.ends
        wanted = max(2, int((self.right - self.left) / 75))
        inner = [mark for mark in ticks(first, last, wanted) if mark == int(mark)] if last > first else []
        reach = (last - first) * 42 / (self.right - self.left)
        marks = [
            first,
            *(mark for mark in inner if first + reach < mark < last - reach),
            *([last] if last > first else []),
        ]
        for mark in marks:
            share = (mark - first) / (last - first) if last > first else 0.5
            x = round(self.left + share * (self.right - self.left), 1)
            anchor = "end" if mark == last and last > first else "middle"
            word = "step " if mark == first else ""
            yield f'<text class="tick" x="{x}" y="{self.bottom + 18}" text-anchor="{anchor}">{word}{mark:.0f}</text>'

    def path(self, values: Values) -> str:
        commands, pen_down = [], False
        for index, value in enumerate(values):
            if value is None:
                pen_down = False
                continue
            commands.append(f"{'L' if pen_down else 'M'}{self.x(index)} {self.y(value)}")
            pen_down = True
        return "".join(commands)

    def area(self, low: Values, high: Values) -> str:
        """A closed outline for each run of steps that has both edges."""
        runs: list[list[tuple[int, float, float]]] = [[]]
        for index, (bottom, top) in enumerate(zip(low, high, strict=True)):
            if bottom is None or top is None:
                runs.append([])
            else:
                runs[-1].append((index, bottom, top))
        commands = []
        for run in runs:
            upper = [f"{self.x(index)} {self.y(top)}" for index, _, top in run]
            lower = [f"{self.x(index)} {self.y(bottom)}" for index, bottom, _ in reversed(run)]
            if run:
                commands.append("M" + "L".join(upper + lower) + "Z")
        return "".join(commands)

    def dots_alone(self, values: Values, kind: str) -> list[str]:
        """Dots for values without a known neighbour, where a line would have no length."""
        around = [None, *values, None]
        return [
            self.dot(index, value, kind)
            for index, value in enumerate(values)
            if around[index] is None and around[index + 2] is None
        ]

    def dot(self, index: int, value: float | None, kind: str) -> str:
        return "" if value is None else f'<circle class="{kind}" cx="{self.x(index)}" cy="{self.y(value)}" r="3"/>'

    def end_labels(self, series: Sequence[Series]) -> list[str]:
        """Labels at the right end of the lines, moved apart where they would overlap."""
        wanted = []
        for index, line in enumerate(series):
            last = next((value for value in reversed(line.values) if value is not None), None)
            if last is not None:
                wanted.append([self.y(last), index])
        wanted.sort()
        for above, below in pairwise(wanted):
            below[0] = max(below[0], above[0] + _LABEL + 2)
        return [
            f'<text class="name s{index}" x="{self.right + 7}" y="{y + 4}">{escape(series[int(index)].label)}</text>'
            for y, index in wanted
        ]

    def read_outs(self, series: Sequence[Series], places: int, dots: bool = True) -> list[str]:
        """Invisible strips that show step and values under the pointer."""
        count = len(self.steps)
        chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(places, count))})
        edges = [(self.x(a) + self.x(b)) / 2 for a, b in pairwise(chosen)]
        lefts, rights = [self.left - 4, *edges], [*edges, self.right + 4]
        parts = []
        for index, begin, end in zip(chosen, lefts, rights, strict=True):
            words = [f"step {self.steps[index]:.0f}"]
            for line in series:
                name = f"{line.label} " if len(series) > 1 else ""
                value = show(line.values[index])
                words.append(f"{name}{show(line.faint[index])}, smoothed {value}" if line.faint else f"{name}{value}")
            x = self.x(index)
            dotted = (
                [self.dot(index, line.values[index], f"point s{i}") for i, line in enumerate(series)] if dots else []
            )
            parts.append(
                f'<g class="at"><rect x="{begin:.1f}" y="{self.top}" width="{end - begin:.1f}" '
                f'height="{self.bottom - self.top}"/><line x1="{x}" x2="{x}" y1="{self.top}" y2="{self.bottom}"/>'
                + "".join(dotted)
                + f'<text x="{self.right}" y="{self.top - 8}" text-anchor="end">{escape("  ".join(words))}</text></g>'
            )
        return parts


def _tick(value: float, marks: Sequence[float]) -> str:
    spacing = min((b - a for a, b in pairwise(marks)), default=abs(value) or 1.0)
    if max(abs(mark) for mark in marks) < 1e-3 or max(abs(mark) for mark in marks) >= 1e6:
        return show(value)
    places = max(0, -math.floor(math.log10(spacing * 1.0001)))
    if spacing * 10**places % 1 > 1e-6:  # 0.25 needs one more place than 0.2
        places += 1
    return f"{value:,.{places}f}".replace("-", MINUS)


def _bins(steps: Sequence[int], values: Values) -> list:
    """At most ``_MOST_POINTS`` values: means of equal runs of steps."""
    factor = steps_per_point(len(steps))
    if factor == 1:
        return list(values)
    result: list[float | None] = []
    for start in range(0, len(values), factor):
        known = [value for value in values[start : start + factor] if value is not None]
        result.append(_mean(known) if known else None)
    return result


def _mean(values: Sequence[float]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(np.mean(values))
    return mean if math.isfinite(mean) else float(np.sum(np.array(values) / len(values)))  # The sum was too large.


def _within(value: float) -> float:
    return min(max(value, -_HUGE), _HUGE)


def _thin(steps: Sequence[int], line: Series) -> Series:
    parts = (line.values, line.faint, line.low, line.high)
    return Series(line.label, *(_bins(steps, part) if len(part) else () for part in parts))
