"""The section of the page that breaks down the time."""

from collections.abc import Mapping, Sequence

import numpy as np

from segzero_jax.progress import duration
from segzero_jax.report import charts
from segzero_jax.report.charts import Series, Size
from segzero_jax.report.curves import figure, wrap
from segzero_jax.report.markup import label, show, text
from segzero_jax.report.run import Run
from segzero_jax.step_phases import BESIDE, PRODUCTIVE

# Phases in which a step waits, in the order of the bar, between PRODUCTIVE and BESIDE.
_WAITING = ("reward_wait", "data", "other")
_SUMS = ("step", "total", "goodput", "data_share")
_NAMES = {
    "reward_wait": "waiting for rewards",
    "other": "everything else",
    "startup": "start-up",
    "compile": "compilation",
    "lost": "lost to restarts",
}
_NAMED_SHARE = 0.1  # smallest share of the bar with room for a name


def time_section(run: Run) -> str:
    """The run's wall time by phase, over all its restarts, and the duration of steps."""
    spent = _spent(run)
    total = sum(spent.values())
    if not total:
        return ""
    count = len(run.metrics)
    bar, rows = [], []
    for index, (name, seconds) in enumerate(spent.items()):
        share, kind = seconds / total, _kind(name, index)
        inside = f"{_name(name)} {share:.0%}" if share >= _NAMED_SHARE else ""
        bar.append(f'<i class="{kind}" style="flex:{share:.4f}" title="{_name(name)} {share:.1%}">{inside}</i>')
        each = "" if name in BESIDE else f"{seconds / count:.2f} s"
        rows.append(
            f'<tr><td><i class="swatch {kind}"></i>{_name(name)}</td>'
            f"<td>{duration(seconds)}</td><td>{share:.1%}</td><td>{each}</td></tr>"
        )
    steps = {name: seconds for name, seconds in spent.items() if name not in BESIDE}
    table = (
        '<table><tr><th class="text">phase</th><th>in all</th><th>share</th><th>a step</th></tr>'
        f"{''.join(rows)}<tr><td>in all</td><td>{duration(total)}</td><td></td>"
        f"<td>{sum(steps.values()) / count:.2f} s</td></tr></table>"
    )
    figures = [_step_chart(run, list(steps))]
    if any("tokens_per_second" in row for row in run.metrics):
        caption = "Prompt and response tokens, over the step without what is beside it."
        figures.append(figure(run, "tokens_per_second", "Tokens a second", caption, Size(540, 200)))
    return (
        f'<section id="time"><h2>Where the time went</h2><p class="note">{_note(spent, steps, total)}</p>'
        f'<div class="shares">{"".join(bar)}</div>'
        f'<div class="two"><div class="scroll">{table}</div><div>{"".join(figures)}</div></div></section>'
    )


def _spent(run: Run) -> dict[str, float]:
    """Seconds by phase over the whole run, including those after its last metrics line; without phases of zero."""
    found: dict[str, float] = {}
    for row in run.metrics:
        for key, value in row.items():
            name = key.removeprefix("time/")
            if key.startswith("time/") and name not in _SUMS and isinstance(value, int | float):
                found[name] = found.get(name, 0.0) + value
    for name, seconds in run.after_last_line.items():
        found[name] = found.get(name, 0.0) + seconds
    first, last = [*PRODUCTIVE, *_WAITING], list(BESIDE)
    order = [*first, *(name for name in found if name not in first + last), *last]
    return {name: found[name] for name in order if found.get(name)}


def _note(spent: Mapping[str, float], steps: Mapping[str, float], total: float) -> str:
    productive = sum(spent.get(name, 0.0) for name in PRODUCTIVE)
    data = spent.get("data", 0.0) / sum(steps.values()) if steps else 0.0
    lost = f" Restarts cost {duration(spent['lost'])} of work that had to be done again." if "lost" in spent else ""
    return (
        f"Of {duration(total)} in all, {productive / total:.0%} went into rollout, reference and update: the run's "
        f"goodput. Its steps waited for data for {data:.1%} of their time.{lost} Hatched: beside the steps."
    )


def _step_chart(run: Run, names: Sequence[str]) -> str:
    steps = [row["step"] for row in run.metrics]
    columns = {name: [row.get(f"time/{name}") or 0.0 for row in run.metrics] for name in names}
    mean = float(np.sum(list(columns.values()))) / len(steps)
    layers = [Series(_name(name), seconds) for name, seconds in columns.items()]
    drawing = charts.stacked_chart(steps, layers, f"Seconds a step by phase, {show(mean)} on average", Size(540, 260))
    caption = "In the order of the table, first at the bottom; without what is beside the steps."
    return wrap("Seconds a step", f"{show(mean)} s on average", drawing, caption)


def _kind(name: str, index: int) -> str:
    return f"beside b{BESIDE.index(name)}" if name in BESIDE else f"l{index}"


def _name(name: str) -> str:
    return text(_NAMES[name]) if name in _NAMES else label(name)
