"""Held-out results: before and after per split, curves over steps, and a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segzero_jax.report import charts
from segzero_jax.report.charts import Series
from segzero_jax.report.markup import NOTHING, direction, fixed, signed, text
from segzero_jax.report.run import Run, number

_MODES = ("greedy", "sampled")
_MOST_STEPS = 40
_COLUMNS = (("ciou", "cIoU"), ("box_accuracy", "box accuracy"), ("format_rate", "well formed"), ("reward", "reward"))

Row = Mapping[str, Any]


def measure(evaluations: Sequence[Row]) -> tuple[str, str]:
    """Key and name of an evaluation's headline metric: gIoU, or box accuracy in a run without masks."""
    if any(number(row.get("giou")) is not None for row in evaluations):
        return "giou", "gIoU"
    return "box_accuracy", "box accuracy"


def pairs(run: Run) -> list[tuple[Row, Row]]:
    """First and last evaluation of every split and mode, of equally many questions; the same row twice if it is one."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in run.evaluations:
        found.setdefault((str(row.get("split")), str(row.get("mode"))), []).append(row)
    splits = list(dict.fromkeys(split for split, _ in found))
    modes = [*_MODES, *sorted({mode for _, mode in found} - {*_MODES})]
    chosen = [rows for s in splits for m in modes if (rows := found.get((s, m)))]
    # A resume may have changed ``eval.examples``: numbers over other questions are no "before".
    return [(next(r for r in rows if r.get("count") == rows[-1].get("count")), rows[-1]) for rows in chosen]


def gains(run: Run) -> str:
    """Every split and mode on one scale: first value, last value, and intervals."""
    key, name = measure(run.evaluations)
    rows = [(a, b) for a, b in pairs(run) if number(a.get(key)) is not None and number(b.get(key)) is not None]
    if not rows:
        return ""
    everything = [number(row.get(k)) for pair in rows for row in pair for k in (key, f"{key}_low", f"{key}_high")]
    known = [value for value in everything if value is not None]
    margin = (max(known) - min(known)) * 0.06 or 0.05
    low, high = max(0.0, min(known) - margin), max(known) + margin  # neither metric can be negative

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    def width(begin: float, end: float) -> str:
        return f"left:{place(min(begin, end))};width:{100 * abs(end - begin) / (high - low):.2f}%"

    first, last = min(before["step"] for before, _ in rows), max(after["step"] for _, after in rows)
    lines = []
    for before, after in rows:
        old, new = float(before[key]), float(after[key])
        marks = [] if before is after else [_mark(before, key, "old", place, width)]
        # During an evaluation, some splits have their last value from the previous one.
        at = "" if after["step"] == last else f' <span class="mode">(step {after["step"]})</span>'
        marks.append(_mark(after, key, "old" if at and before is after else "new", place, width))
        change = "" if before is after else f"{fixed(old)} → "
        colour = direction(new - old, math.hypot(_uncertainty(before, key), _uncertainty(after, key)))
        moved = f'&ensp;<span class="{colour}">{signed(new - old)}</span>' if change else ""
        lines.append(
            f'<div class="gain"><span class="of">{text(after.get("split"))} '
            f'<span class="mode">{text(after.get("mode"))}</span></span><span class="track">{"".join(marks)}</span>'
            f'<span class="numbers">{change}<b>{fixed(new)}</b>{moved}{at}</span></div>'
        )
    scale = "".join(f'<b style="left:{place(mark)}">{mark:g}</b>' for mark in charts.ticks(low, high, 6))
    when = f"at step {last}" if first == last else f"before (ring, step {first}) and after (dot, step {last})"
    return (
        f'<h3 style="margin-top:44px">Held-out {name}, {when}</h3><div class="gains">{"".join(lines)}'
        f'<div class="gain scale"><span></span><span class="track">{scale}</span><span></span></div></div>'
        '<p class="note">Lines are confidence intervals; a change has a colour where it is more than both leave open. '
        "Greedy: the most likely answer. Sampled: answers drawn at the training temperature.</p>"
    )


def _uncertainty(row: Row, key: str) -> float:
    """Half the width of a metric's interval; infinite if it has none."""
    interval = _interval(row, key)
    return math.inf if interval is None else (interval[1] - interval[0]) / 2


def _interval(row: Row, key: str) -> tuple[float, float] | None:
    low, high = number(row.get(f"{key}_low")), number(row.get(f"{key}_high"))
    return None if low is None or high is None else (low, high)


def _mark(row: Row, key: str, kind: str, place: Any, width: Any) -> str:
    interval = _interval(row, key)
    span = "" if interval is None else f'<i class="span {kind}" style="{width(*interval)}"></i>'
    return f'{span}<i class="dot {kind}" style="left:{place(float(row[key]))}"></i>'


def section(run: Run) -> str:
    """The table and, with more than two evaluations, the curves."""
    if not run.evaluations:
        return ""
    steps = sorted({row["step"] for row in run.evaluations})
    key, name = measure(run.evaluations)
    curves = f'<div class="charts">{"".join(_curves(run, key, name))}</div>' if len(steps) > 2 else ""
    ends = [row for row in run.evaluations if row["step"] in (steps[0], steps[-1])]
    parts = [f'<section id="held-out"><h2>Held-out evaluations</h2>{curves}', _table(ends)]
    if len(steps) > 2:
        chosen = {steps[round(index)] for index in np.linspace(0, len(steps) - 1, min(len(steps), _MOST_STEPS))}
        many = f"All {len(steps)}" if len(chosen) == len(steps) else f"{len(chosen)} of {len(steps)}"
        rows = [row for row in run.evaluations if row["step"] in chosen]
        parts.append(f"<details><summary>{many} evaluations</summary>{_table(rows)}</details>")
    return "".join(parts) + "</section>"


def _curves(run: Run, key: str, name: str) -> list[str]:
    figures = []
    for split in dict.fromkeys(row.get("split") for row in run.evaluations):
        rows = [row for row in run.evaluations if row.get("split") == split]
        steps = sorted({row["step"] for row in rows})
        series = []
        for mode in _MODES:
            by_step = {row["step"]: row for row in rows if row.get("mode") == mode}
            columns = [[number(by_step.get(s, {}).get(k)) for s in steps] for k in (key, f"{key}_low", f"{key}_high")]
            if any(value is not None for value in columns[0]):
                series.append(Series(mode, columns[0], (), columns[1], columns[2]))
        if series:
            drawing = charts.line_chart(steps, series, f"{name} on {split} over {len(steps)} evaluations")
            figures.append(
                f'<figure><div class="chart-head"><h3>{text(split)}</h3><span class="now">{name}</span></div>'
                f"{drawing}<figcaption>Shaded: confidence interval.</figcaption></figure>"
            )
    return figures


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for _, name in _COLUMNS)
    lines = []
    order = list(dict.fromkeys(str(row.get("split")) for row in rows))
    for row in sorted(rows, key=lambda r: (order.index(str(r.get("split"))), str(r.get("mode")), r["step"])):
        low, high = row.get("giou_low"), row.get("giou_high")
        span = "" if number(low) is None else f' <span class="range">{fixed(low)}{NOTHING}{fixed(high)}</span>'
        cells = "".join(f"<td>{fixed(row.get(key))}</td>" for key, _ in _COLUMNS)
        lines.append(
            f'<tr><td>{text(row.get("split"))}</td><td class="text">{text(row.get("mode"))}</td>'
            f"<td>{row['step']}</td><td>{fixed(row.get('giou'))}{span}</td>{cells}<td>{text(row.get('count'))}</td></tr>"
        )
    return (
        '<div class="scroll" style="margin:26px 0 18px"><table class="evaluations"><tr><th class="text">split</th>'
        f'<th class="text">answers</th><th>step</th><th>gIoU and interval</th>{head}<th>questions</th></tr>'
        f"{''.join(lines)}</table></div>"
    )
