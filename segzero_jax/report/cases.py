"""Single questions: selected before-and-after cases, and one group of training rollouts, as images and text."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segzero_jax.report.cards import components, legend, picture, words
from segzero_jax.report.markup import NOTHING, fixed, show, signed, text
from segzero_jax.report.run import Run, masked, number, reward_maxima, thinks

_EACH = 3  # cases per kind
_MOST_RESPONSES = 16
_CHANGE = 0.02  # a smaller difference does not count as a change

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A question at the first and at the last evaluation (``before`` is None if there is only one)."""

    kind: str
    split: str
    before: Row | None
    after: Row


def gallery(run: Run) -> str:
    """The before-and-after section; empty without evaluated answers."""
    steps = sorted({step for found in run.sample_steps.values() for step in found})
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    found = _pairs(run, first, last)
    if not found:
        return ""
    chosen = choose(found)
    title = "Before and after" if first != last else f"Answers at step {last}"
    shown = "".join(_case(run, case, first, last) for case in chosen)
    return (
        f'<section id="cases"><h2>{title}</h2><p>{_summary(found, chosen, first, last)}</p>{legend(masked(run))}{shown}'
        "</section>"
    )


def choose(found: Sequence[Case]) -> list[Case]:
    """Three each of the most improved, the typical and the worst cases; no case twice, fewer if there are few.

    Improved means by more than _CHANGE. Typical means nearest to the median after training. Worst means lowest after
    training, and never better than a case shown as improved. With only one evaluation, the best cases replace the most
    improved.
    """
    _, quality = _quality(found)
    each = max(1, min(_EACH, len(found) // 3))
    after = {id(case): quality(case.after) for case in found}
    middle = statistics.median(after.values())
    paired = found[0].before is not None
    left = list(found)

    def take(kind: str, rank: Any, fits: Any = lambda _: True) -> list[Case]:
        taken = sorted(filter(fits, left), key=rank)[:each]
        for case in taken:
            left.remove(case)
        return [Case(kind, case.split, case.before, case.after) for case in taken]

    if paired:
        top = take("Most improved", lambda case: -_gain(case, quality), lambda case: _gain(case, quality) > _CHANGE)
    else:
        top = take("Best", lambda case: -after[id(case)])
    least = min((quality(case.after) for case in top), default=math.inf)
    worst = take("Worst", lambda case: after[id(case)], lambda case: after[id(case)] <= least)
    return top + take("Typical", lambda case: abs(after[id(case)] - middle)) + worst


def rollouts_section(run: Run) -> str:
    """One late group of training responses, best first; empty without rollouts."""
    group = _late_group(run)
    if not group:
        return ""
    ranked = sorted(group, key=lambda row: -(number(row.get("advantage")) or 0.0))
    keep = [round(i * (len(ranked) - 1) / (_MOST_RESPONSES - 1)) for i in range(_MOST_RESPONSES)]
    shown = ranked if len(ranked) <= _MOST_RESPONSES else [ranked[index] for index in keep]
    rewards = [reward for row in group if (reward := number(row.get("reward"))) is not None]
    largest = max((abs(number(row.get("advantage")) or 0.0) for row in group), default=0.0) or 1.0
    some = "" if len(shown) == len(group) else f" {len(shown)} of {len(group)} are shown."
    mean = show(statistics.fmean(rewards)) if rewards else NOTHING
    spread = f", standard deviation {show(statistics.stdev(rewards))}" if len(rewards) > 1 else ""
    cards = "".join(_response(run, row, group[0], largest) for row in shown)
    return (
        f'<section id="rollouts"><h2>One group of step {text(group[0].get("step"))}</h2>'
        f"<p>{len(group)} responses to one training question, best first. The policy learns to prefer what is above "
        f"the group's mean reward ({mean}{spread}) over what is below it: that is the advantage, the bar under each "
        f'reward.{some}</p>{legend(masked(run))}<div class="case"><div class="kind">{text(group[0].get("id"))}</div>'
        f'<div class="question">{text(group[0].get("question"))}</div><div class="responses">{cards}</div></div>'
        "</section>"
    )


def _pairs(run: Run, first: int, last: int) -> list[Case]:
    found = []
    for split in run.sample_steps:
        before = {row.get("id"): row for row in run.samples(first, split)} if first != last else {}
        for row in run.samples(last, split):
            earlier = before.get(row.get("id"))
            if first == last or earlier is not None:
                found.append(Case("", split, earlier, row))
    return found


def _quality(found: Sequence[Case]) -> tuple[str, Any]:
    """The name and key that cases are ranked by: IoU, or the reward if some answer has no IoU."""
    rows = [row for case in found for row in (case.before, case.after) if row is not None]
    key = "iou" if all(number(row.get("iou")) is not None for row in rows) else "reward"
    return ("IoU" if key == "iou" else "reward"), lambda row: number(row.get(key)) or 0.0


def _gain(case: Case, quality: Any) -> float:
    return float(quality(case.after) - quality(case.before))


def _summary(found: Sequence[Case], chosen: Sequence[Case], first: int, last: int) -> str:
    what, quality = _quality(found)
    splits = len({case.split for case in found})
    asked = f"{len(found)} held-out questions of {splits} split{'s' if splits > 1 else ''}, answered greedily"
    names = {"Typical": f"the typical (nearest to the median {what})", "Worst": f"the worst (lowest {what})"}
    kinds = [names.get(kind, f"the {kind.lower()}") for kind in dict.fromkeys(case.kind for case in chosen)]
    listed = " and ".join(part for part in (", ".join(kinds[:-1]), kinds[-1]) if part)
    change = [_gain(case, quality) for case in found if case.before is not None]
    if not change:
        return f"{asked} at step {last}. Shown are {listed}."
    afterwards = " afterwards" if chosen[-1].kind in names else ""
    better, worse = sum(c > _CHANGE for c in change), sum(c < -_CHANGE for c in change)
    return (
        f"{asked} at step {first} and at step {last}: {better} improved in {what} by more than {_CHANGE}, "
        f"{worse} got worse, {len(found) - better - worse} stayed. Shown are {listed}{afterwards}."
    )


def _case(run: Run, case: Case, first: int, last: int) -> str:
    sides = [] if case.before is None else [_side(run, case.before, first)]
    sides.append(_side(run, case.after, last))
    return (
        f'<article class="case"><div class="kind"><b>{case.kind}</b> · {text(case.split)} · '
        f'{text(case.after.get("id"))}</div><div class="question">{text(case.after.get("question"))}</div>'
        f'<div class="sides">{"".join(sides)}</div></article>'
    )


def _side(run: Run, row: Row, step: int) -> str:
    iou = number(row.get("iou"))
    reward = show(row.get("reward"))
    best = f"IoU {fixed(iou)} <small>reward {reward}</small>" if iou is not None else f"reward {reward}"
    return (
        f'<div class="side"><div>{_picture(run, row, row, f"answer at step {step}, reward {reward}")}</div><div>'
        f'<div class="when">step {step}</div>'
        f'<div class="score">{best}</div>{_components(run, row)}{words(row, thinks(run))}</div></div>'
    )


def _response(run: Run, row: Row, asked: Row, largest: float) -> str:
    known = number(row.get("advantage"))
    advantage = known or 0.0
    bar = f"{'left' if advantage >= 0 else 'right'}:50%;width:{50 * abs(advantage) / largest:.1f}%"
    iou = number(row.get("mask_iou"))
    facts = [] if iou is None else [f"IoU {fixed(iou)}"]
    facts.append(f"{text(row.get('length'))} tokens")
    if row.get("finished") is False:
        facts.append("cut off at the limit")
    what = f"response {row.get('sample')}, reward {show(row.get('reward'))}"
    return (
        f'<article class="response">{_picture(run, row, asked, what)}'
        f'<div class="score">{show(row.get("reward"))} '
        f"<small>advantage {NOTHING if known is None else signed(known, 2)}</small></div>"
        f'<div class="lean"><i class="{"minus" if advantage < 0 else "plus"}" style="{bar}"></i></div>'
        f'<p class="note">{" · ".join(facts)}</p>{_components(run, row)}{words(row, thinks(run))}</article>'
    )


def _picture(run: Run, row: Row, asked: Row, what: str) -> str:
    return picture(run.picture(asked.get("image")), row, asked, what)


def _components(run: Run, row: Row) -> str:
    return components(row, reward_maxima(run).components)


def _late_group(run: Run) -> list[dict[str, Any]]:
    """A group with an image: of the latest of the last five steps where rewards differ, else of the last step."""
    groups = []
    for step in reversed(run.rollout_steps[-5:]):
        rows = run.rollouts(step)
        pictured = next((place for place, row in enumerate(rows) if row.get("image")), None)
        if pictured is not None:
            groups.append(_group_at(rows, pictured))
    differing = [group for group in groups if len({row.get("reward") for row in group}) > 1]
    return next(iter(differing or groups), [])


def _group_at(rows: Sequence[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """The responses of one group, from ``start`` on.

    A step with more questions than the set has asks a question again, with sample numbers starting over.
    """
    group: list[dict[str, Any]] = []
    for row in rows[start:]:
        if row.get("id") != rows[start].get("id"):
            continue
        if row.get("sample") is not None and row["sample"] in [earlier.get("sample") for earlier in group]:
            break
        group.append(row)
    return group
