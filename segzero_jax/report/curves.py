"""The sections of the page that show numbers over steps: rewards, training signals, time."""

from collections.abc import Mapping, Sequence

import numpy as np

from segzero_jax.metrics import duration
from segzero_jax.report import charts
from segzero_jax.report.charts import Series, Size
from segzero_jax.report.markup import bound, label, show, text
from segzero_jax.report.run import Run, reward_maxima

# Metric, title, caption; every one is drawn from zero when it cannot be negative.
_SIGNALS = (
    ("kl", "KL to the reference", "How far the policy has moved from where it started, per token, in nats."),
    ("entropy", "Entropy", "How undecided the policy is per token, in nats."),
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("loss", "Loss", "Near zero by construction in on-policy GRPO: it gives a direction, not a score."),
    ("reward/zero_std_groups", "Groups without spread", "All responses scored alike, so nothing is learned from them."),
    ("finished", "Finished", "Share of responses that ended by themselves before the length limit."),
    ("sampler_gap", "Sampler gap", "Between the sampler's and the trainer's log-probabilities of the same tokens."),
)
_COMPONENTS = {
    "thinking_format": "Reasoning and answer stand in their tags.",
    "segmentation_format": "The answer is JSON with a box and points.",
    "accuracy": "Boxes and points near their targets.",
    "non_repeat": "No sentence comes again and again.",
    "box_iou": "The box overlaps the target's by more than half.",
    "box_l1": "The box's sides are near the target's.",
    "point_l1": "The points are in the box and near the target's.",
    "mask_iou": "SAM 2's mask for the answer against the target mask.",
}
_NAMED_SHARE = 0.1  # of the bar: less has no room for a name
_LENGTHS = ("response_length/mean", "response_length/max")
_SUMS = ("time/step", "time/total", "time/goodput")
_PHASES = ("data", "rollout", "reward_wait", "reference", "update")
_PHASE_NAMES = {"reward_wait": "waiting for rewards", "rest": "everything else"}


def reward_section(run: Run) -> str:
    """Mean reward, and every component."""
    steps = _steps(run)
    mean, std = run.column("reward/mean"), run.column("reward/std")
    maxima = reward_maxima(run)
    window = charts.smoothing_window(len(steps))
    pairs = list(zip(mean, std, strict=True))
    low = [None if m is None or s is None else m - s for m, s in pairs]
    high = [None if m is None or s is None else m + s for m, s in pairs]
    series = [Series("reward", charts.smooth(mean, window), mean if window > 1 else (), low, high)]
    drawn = [
        f'<div class="{kind}">'
        + charts.line_chart(steps, series, _describe("Mean reward", steps, mean), size)
        + "</div>"
        for kind, size in (("wide", Size(1120, 340, 120)), ("narrow", Size(350, 260)))
    ]
    most = "" if maxima.total is None else f" At most {bound(maxima.total)}."
    point = charts.steps_per_point(len(steps))
    thin = "each step" if point == 1 else f"means of {point} steps"
    smoothed = f"Thin: {thin}. Bold: mean of {window} steps around it. " if window > 1 else ""
    caption = f"{smoothed}Shaded: one standard deviation of the step's responses to either side.{most}"
    known = [key.removeprefix("reward/") for key in _keys(run) if key.startswith("reward/")]
    components = [key for key in known if key not in ("mean", "std", "zero_std_groups")]
    figures = [_component(run, name, maxima.components.get(name)) for name in components]
    below = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return (
        '<section id="reward"><h2>Reward</h2>'
        f'<figure class="hero">{"".join(drawn)}<figcaption>{caption}</figcaption></figure>{below}</section>'
    )


def signal_section(run: Run) -> str:
    """What the optimizer and the sampler did, and every further metric that the run wrote."""
    figures = [
        _figure(run, key, title, caption, maximum=1.0 if key == "finished" else None)
        for key, title, caption in _SIGNALS
        if key in _keys(run)
    ]
    if _LENGTHS[0] in _keys(run):
        figures.insert(2, _lengths(run))
    named = {*(key for key, _, _ in _SIGNALS), *_LENGTHS, "tokens_per_second", "step"}
    others = [key for key in _keys(run) if key not in named and not key.startswith(("reward/", "time/"))]
    figures += [_figure(run, key, key, "") for key in others]
    if not figures:
        return ""
    return f'<section id="signals"><h2>How it learned</h2><div class="charts">{"".join(figures)}</div></section>'


def time_section(run: Run) -> str:
    """Where the seconds of a step go."""
    steps, phases = _phase_seconds(run)
    if not phases:
        return ""
    first = run.column("time/total")[0]
    means = {name: float(np.mean(seconds)) for name, seconds in phases.items()}
    total = sum(means.values())
    note = "Means over all steps"
    if len(run.metrics) > 1:
        note += " but the first, which also compiles"
        note += f" and took {duration(first)}" if first is not None else ""
    bar, rows = [], []
    for index, (name, seconds) in enumerate(means.items()):
        share = seconds / total if total else 0.0
        inside = f"{_phase(name)} {share:.0%}" if share >= _NAMED_SHARE else ""
        bar.append(f'<i class="l{index}" style="flex:{share:.4f}" title="{_phase(name)} {share:.1%}">{inside}</i>')
        rows.append(
            f'<tr><td><i class="swatch l{index}"></i>{_phase(name)}</td>'
            f"<td>{seconds:.2f} s</td><td>{share:.1%}</td></tr>"
        )
    table = (
        '<table><tr><th class="text">phase</th><th>a step</th><th>share</th></tr>'
        f"{''.join(rows)}<tr><td>in all</td><td>{total:.2f} s</td><td></td></tr></table>"
    )
    layers = [Series(_phase(name), seconds) for name, seconds in phases.items()]
    stacked = charts.stacked_chart(steps, layers, f"Seconds a step by phase, {show(total)} on average", Size(540, 260))
    figures = [
        _wrap(
            "Seconds a step", f"{show(total)} s on average", stacked, "In the order of the table, first at the bottom."
        )
    ]
    if "tokens_per_second" in _keys(run):
        figures.append(
            _figure(
                run, "tokens_per_second", "Tokens a second", "Response tokens, over the whole step.", Size(540, 200)
            )
        )
    return (
        f'<section id="time"><h2>Where the time went</h2><p class="note">{note}.</p>'
        f'<div class="shares">{"".join(bar)}</div>'
        f'<div class="two"><div class="scroll">{table}</div><div>{"".join(figures)}</div></div></section>'
    )


def _steps(run: Run) -> list[int]:
    return [row["step"] for row in run.metrics]


def _keys(run: Run) -> dict[str, None]:
    """Every metric that some step measured, in the order of the file."""
    return {key: None for row in run.metrics for key, value in row.items() if isinstance(value, int | float)}


def _phase(name: str) -> str:
    return _PHASE_NAMES.get(name) or label(name)


def _phase_seconds(run: Run) -> tuple[list[int], Mapping[str, Sequence[float]]]:
    """Seconds by phase over the steps after the first, and what is left of the total as "rest"."""
    rows = run.metrics[1:] or run.metrics
    found = [key.removeprefix("time/") for key in _keys(run) if key.startswith("time/") and key not in _SUMS]
    order = [name for name in _PHASES if name in found] + [name for name in found if name not in _PHASES]
    steps = [row["step"] for row in rows]
    phases: dict[str, list[float]] = {name: [row.get(f"time/{name}") or 0.0 for row in rows] for name in order}
    totals = [row.get("time/total") or 0.0 for row in rows]
    if phases and any(totals):
        spent = [sum(seconds) for seconds in zip(*phases.values(), strict=True)]
        phases["rest"] = [max(0.0, total - used) for total, used in zip(totals, spent, strict=True)]
    return steps, phases


def _component(run: Run, name: str, maximum: float | None) -> str:
    parts = [_COMPONENTS.get(name, "")] + ([] if maximum is None else [f"At most {bound(maximum)}."])
    if name == "mask_iou":
        parts.append(f"Weight {text(run.setting('reward.mask_iou_weight'))}.")
    return _figure(run, f"reward/{name}", label(name), " ".join(parts), maximum=maximum)


def _lengths(run: Run) -> str:
    limit = run.setting("rollout.max_response_tokens")
    caption = "Tokens per response." + (f" The limit is {text(limit)}." if limit is not None else "")
    steps, mean, most = _steps(run), *(run.column(key) for key in _LENGTHS)
    window = charts.smoothing_window(len(steps))
    named = {"mean": mean, "max": most} if any(value is not None for value in most) else {"mean": mean}
    series = [Series(name, charts.smooth(values, window)) for name, values in named.items()]
    drawing = charts.line_chart(steps, series, _describe("Response length", steps, mean), floor=0.0)
    return _wrap("Response length", _now(mean), drawing, caption)


def _figure(
    run: Run, key: str, title: str, caption: str, size: Size | None = None, maximum: float | None = None
) -> str:
    steps, values = _steps(run), run.column(key)
    window = charts.smoothing_window(len(steps))
    series = Series(title, charts.smooth(values, window), values if window > 1 else ())
    floor = None if any(value is not None and value < 0 for value in values) else 0.0
    drawing = charts.line_chart(steps, [series], _describe(title, steps, values), size, floor, maximum)
    return _wrap(title, _now(values), drawing, caption)


def _wrap(title: str, now: str, drawing: str, caption: str) -> str:
    return (
        f'<figure><div class="chart-head"><h3>{text(title)}</h3><span class="now">{text(now)}</span></div>'
        f"{drawing}<figcaption>{caption}</figcaption></figure>"
    )


def _now(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"last {show(known[-1])}" if known else "not measured"


def _describe(title: str, steps: Sequence[int], values: Sequence[float | None]) -> str:
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return f"{title}: not measured"
    (first_step, first), (last_step, last) = known[0], known[-1]
    return f"{title}: {show(first)} at step {first_step}, {show(last)} at step {last_step}"
