"""The whole page: its head, the headline, the configuration, and the sections in order."""

import math
from collections.abc import Mapping
from typing import Any

from segzero_jax import __version__
from segzero_jax.progress import duration
from segzero_jax.report import cases, curves, evaluations, events, times
from segzero_jax.report.markup import NOTHING, bound, direction, fixed, show, signed, text
from segzero_jax.report.run import Run, ends, masked, number, reward_maxima
from segzero_jax.report.style import CSS

# Allows no scripts or external content, whatever a response may contain.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SUMMARY = (
    ("policy", "model.path"),
    ("LoRA rank", "model.lora_rank"),
    ("data", "data.name"),
    ("picture size", "data.image_size"),
    ("reward recipe", "reward.recipe"),
    ("mask IoU weight", "reward.mask_iou_weight"),
    ("reward server", "reward.server"),
    ("prompts a step", "train.batch_size"),
    ("responses a prompt", "rollout.group_size"),
    ("temperature", "rollout.temperature"),
    ("learning rate", "train.lr"),
    ("KL coefficient", "grpo.kl_coef"),
    ("mesh", "mesh"),
    ("seed", "seed"),
)


def build(run: Run) -> str:
    """The page as HTML text."""
    sections = {
        "Alarms": events.event_section(run),
        "Reward": curves.reward_section(run) if run.metrics else "",
        "Answers": cases.gallery(run),
        "Rollouts": cases.rollouts_section(run),
        "Held-out evaluations": evaluations.section(run),
        "How it learned": curves.signal_section(run),
        "Time": times.time_section(run),
    }
    links = "".join(f'<a href="#{_anchor(part)}">{name}</a>' for name, part in sections.items() if part)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(run.name)} · segzero-jax</title><style>{CSS}</style></head><body>"
        f"<header>{_title(run)}<nav>{links}</nav></header><main>{_headline(run)}{evaluations.gains(run)}{_config(run)}"
        f"{''.join(sections.values())}</main>{_footer(run)}</body></html>\n"
    )


def _anchor(section: str) -> str:
    return section.partition('id="')[2].partition('"')[0]


def _title(run: Run) -> str:
    done, planned = _progress(run)
    state = f"{done} step{'s' if done != 1 else ''}"
    if planned is not None and done < planned:
        state = f"{done} of {planned} steps, still running or stopped early"
    if not run.metrics:
        state = "no step yet"
    spent = sum(value or 0.0 for value in run.column("time/total")) + sum(run.after_last_line.values())
    spoken = f", {duration(spent)} in all" if spent else ""
    scored = "points and is scored by SAM 2's masks" if masked(run) else "points and is scored by what it writes"
    return (
        f'<h1>{text(run.name)}</h1><p class="lead">A policy that thinks, {scored}, trained by GRPO. '
        f"{state[0].upper()}{state[1:]}{spoken}.</p>"
    )


def _progress(run: Run) -> tuple[int, int | None]:
    planned = number(run.setting("train.steps"))
    done = run.metrics[-1]["step"] if run.metrics else 0
    return done, None if planned is None else int(planned)


def _headline(run: Run) -> str:
    tiles = [_reward_tile(run), *_evaluation_tiles(run)]
    tiles = [tile for tile in tiles if tile]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _reward_tile(run: Run) -> str:
    reward = ends(run.column("reward/mean"))
    if reward is None:
        return ""
    most = reward_maxima(run).total
    limit = "" if most is None else f" (of {bound(most)} at most)"
    scored = [row["step"] for row in run.metrics if number(row.get("reward/mean")) is not None]
    if len(scored) == 1:
        alone = "one step" if len(run.metrics) == 1 else f"step {scored[0]}, the only one with scores"
        return _tile(f"Mean reward{limit}", show(reward.last), alone)
    span = "step" if reward.window == 1 else f"{reward.window} steps"
    more = f"first {span} → last {span}"
    if reward.first_error is not None and reward.last_error is not None:
        more = f"first {span} ±{show(reward.first_error, 2)} → last {span} ±{show(reward.last_error, 2)}"
        error = math.hypot(reward.first_error, reward.last_error)
        change = reward.last - reward.first
        ratio = f", {show(abs(change) / error, 2)} standard errors" if error else ""
        more += f'<br><span class="{direction(change, 2 * error)}">{signed(change, 2)}{ratio}</span>'
    value = f'<span class="before">{show(reward.first)} →</span> {show(reward.last)}'
    return _tile(f"Mean reward{limit}", value, more)


def _evaluation_tiles(run: Run) -> list[str]:
    """Greedy and sampled results on the first split, which is the in-domain one."""
    key, name = evaluations.measure(run.evaluations)
    rows = evaluations.pairs(run)
    tiles = []
    for before, after in rows:
        if after.get("split") != rows[0][1].get("split") or number(after.get(key)) is None:
            continue
        what = f"{name}, {text(after.get('mode'))}, {text(after.get('split'))}"
        if before is after or number(before.get(key)) is None:
            tiles.append(_tile(what, fixed(after[key]), f"step {after['step']}{_interval(after, key)}"))
            continue
        value = f'<span class="before">{fixed(before[key])} →</span> {fixed(after[key])}'
        intervals = f"step {before['step']}{_interval(before, key)}<br>step {after['step']}{_interval(after, key)}"
        tiles.append(_tile(what, value, intervals))
    return tiles


def _interval(row: Mapping[str, Any], key: str) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if number(low) is None or number(high) is None:
        return ""
    return f", interval {fixed(low)}{NOTHING}{fixed(high)}"


def _tile(what: str, value: str, more: str) -> str:
    parts = {"what": what, "value": value, "more": more}
    return '<div class="tile">' + "".join(f'<div class="{k}">{part}</div>' for k, part in parts.items()) + "</div>"


def _config(run: Run) -> str:
    untold = set() if masked(run) else {"reward.mask_iou_weight"}
    # Rank 0 means no adapters.
    untold |= set() if run.setting("model.lora_rank") else {"model.lora_rank"}
    items = []
    for label, key in _SUMMARY:
        value = run.setting(key)
        if value is not None and key not in untold:
            items.append(f"<div><dt>{label}</dt><dd>{text(value)}</dd></div>")
    return (
        f'<dl class="config">{"".join(items)}</dl><details><summary>The whole configuration</summary>'
        f"<pre>{text(run.config_text)}</pre></details>"
    )


def _footer(run: Run) -> str:
    missing = []
    if not run.metrics:
        missing.append("no step has been trained yet")
    if not run.evaluations:
        missing.append("nothing was evaluated on held-out data yet")
    note = f"In this run {' and '.join(missing)}. " if missing else ""
    return (
        f"<footer><p>{note}Made by segzero-jax {text(__version__)} from the files of the run directory; "
        "run <code>python -m segzero_jax.report</code> again to renew it. gIoU: mean of the IoUs of single questions. "
        "cIoU: all intersections together over all unions together.</p></footer>"
    )
