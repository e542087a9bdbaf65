"""The sections of the page that show numbers over steps: rewards and training signals."""

from collections.abc import Sequence

from segzero_jax.report import charts
from segzero_jax.report.charts import Series, Size
from segzero_jax.report.markup import bound, label, show, text
from segzero_jax.report.run import Run, own_rewards, reward_maxima

_MASK_IOU = "mask_iou/mean"
# Metric, title, caption; metrics that cannot be negative are drawn from zero.
_SIGNALS = (
    ("kl", "KL to the reference", "How far the policy has moved from where it started, per token, in nats."),
    ("entropy", "Entropy", "How undecided the policy is per token, in nats."),
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("loss", "Loss", "Near zero by construction in on-policy GRPO: it gives a direction, not a score."),
    (
        "reward/zero_std_groups",
        "Groups without spread",
        "Fewer than two responses have a score, or all have the same: nothing is learned from them.",
    ),
    ("dynamic_sampling/batches", "Batches sampled", "For a step, until enough groups have a spread of rewards."),
    ("dynamic_sampling/groups", "Groups learnt from", "Those with a spread of rewards."),
    (_MASK_IOU, "Mask IoU of answers", "Mean IoU of SAM 2's masks with the target masks."),
    ("empty_thinking", "Without reasoning", "Share of responses in which nothing stands between the thinking tags."),
    ("finished", "Finished", "Share of responses that ended by themselves before the length limit."),
    ("kl_old", "KL within a step", "How far a step's updates move the policy that sampled, per token, in nats."),
    ("clip_fraction", "Clipped", "Share of tokens whose ratio to the policy that sampled was clipped."),
    ("lr", "Learning rate", "Of the step's last update."),
    ("sampler_gap", "Sampler gap", "Between the sampler's and the trainer's log-probabilities of the same tokens."),
)
_SHARES = (_MASK_IOU, "finished", "empty_thinking", "reward/zero_std_groups", "clip_fraction")
# Not drawn while constant.
_DRAWN_WHEN_THEY_CHANGE = ("clip_fraction", "lr")
_COMPONENTS = {
    "thinking_format": "Reasoning and answer stand in their tags.",
    "answer_format": "The answer stands in its tags, and nothing beside it.",
    "segmentation_format": "The answer is JSON with a box and points.",
    "accuracy": "Boxes and points near their targets.",
    "non_repeat": "No sentence comes again and again.",
    "box_iou": "The box overlaps the target's by more than half.",
    "box_l1": "The box's sides are near the target's.",
    "point_l1": "The points are in the box and near the target's.",
    "mask_iou": "SAM 2's mask for the answer against the target mask.",
}
# Captions of components of the same name in other recipes.
_OF_RECIPE = {
    "seg_zero_soft_accuracy": {
        "box_iou": "IoU of the box with the target's.",
        "box_l1": "1 less the mean distance of the box's sides from the target's over 840 px.",
        "point_l1": "1 less the mean distance of the points from the target's over 840 px; 0 where one is outside.",
    }
}
_LENGTHS = ("response_length/mean", "response_length/max", "response_length/min")
# Shown in other sections: the timeline of events, and the breakdown of time.
_ELSEWHERE = ("alarm/", "time/", "reward/", "data/", "update/skipped", "missing_scores", "checkpoint/failed")


def reward_section(run: Run) -> str:
    """Charts of the mean reward and of every component."""
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
    known = [key.removeprefix("reward/") for key in run.measured if key.startswith("reward/")]
    components = [key for key in known if key not in ("mean", "std", "zero_std_groups")]
    figures = [_component(run, name, maxima.components.get(name)) for name in components]
    figures += [_of_data_set(run, key) for key in run.measured if key.startswith("data/")]
    below = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return (
        '<section id="reward"><h2>Reward</h2>'
        f'<figure class="hero">{"".join(drawn)}<figcaption>{caption}</figcaption></figure>{below}</section>'
    )


def signal_section(run: Run) -> str:
    """Charts of optimizer and sampling metrics, and of all other metrics of the run."""
    figures = [
        figure(run, key, title, caption, maximum=1.0 if key in _SHARES else None)
        for key, title, caption in _SIGNALS
        if key in run.measured and _tells(run, key)
    ]
    if _LENGTHS[0] in run.measured:
        figures.insert(2, _lengths(run))
    named = {*(key for key, _, _ in _SIGNALS), *_LENGTHS, "tokens_per_second", "step"}
    others = [key for key in run.measured if key not in named and not key.startswith(_ELSEWHERE)]
    figures += [figure(run, key, key, "") for key in others]
    if not figures:
        return ""
    return f'<section id="signals"><h2>How it learned</h2><div class="charts">{"".join(figures)}</div></section>'


def _tells(run: Run, key: str) -> bool:
    """Whether a signal's chart adds information: the metric changes, and the reward charts do not show the same."""
    values = run.column(key)
    if key == _MASK_IOU:
        return values != run.column("reward/mask_iou")
    return key not in _DRAWN_WHEN_THEY_CHANGE or len(set(values) - {None}) > 1


def _steps(run: Run) -> list[int]:
    return [row["step"] for row in run.metrics]


def _component(run: Run, name: str, maximum: float | None) -> str:
    known = _COMPONENTS | _OF_RECIPE.get(run.setting("reward.recipe"), {})
    words = {} if name in own_rewards(run) else known
    parts = [words.get(name, "")] + ([] if maximum is None else [f"At most {bound(maximum)}."])
    if name == "mask_iou":
        parts.append(f"Weight {text(run.setting('reward.mask_iou_weight'))}.")
    return figure(run, f"reward/{name}", label(name), " ".join(parts), maximum=maximum)


def _of_data_set(run: Run, key: str) -> str:
    name = key.removeprefix("data/").removesuffix("/reward")
    return figure(run, key, f"Mean reward, {name}", "Of the questions from this data set.")


def _lengths(run: Run) -> str:
    limit = run.setting("rollout.max_response_tokens")
    caption = "Tokens per response." + (f" The limit is {text(limit)}." if limit is not None else "")
    steps, mean = _steps(run), run.column(_LENGTHS[0])
    window = charts.smoothing_window(len(steps))
    measured = [key for key in _LENGTHS if key in run.measured]
    series = [Series(key.removeprefix("response_length/"), charts.smooth(run.column(key), window)) for key in measured]
    drawing = charts.line_chart(steps, series, _describe("Response length", steps, mean), floor=0.0)
    return wrap("Response length", _now(mean), drawing, caption)


def figure(run: Run, key: str, title: str, caption: str, size: Size | None = None, maximum: float | None = None) -> str:
    """A chart of a metric over steps, smoothed if there are many, with its title."""
    steps, values = _steps(run), run.column(key)
    window = charts.smoothing_window(len(steps))
    series = Series(title, charts.smooth(values, window), values if window > 1 else ())
    floor = None if any(value is not None and value < 0 for value in values) else 0.0
    drawing = charts.line_chart(steps, [series], _describe(title, steps, values), size, floor, maximum)
    return wrap(title, _now(values), drawing, caption)


def wrap(title: str, now: str, drawing: str, caption: str) -> str:
    """A drawing with its title, its last value and a caption."""
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
