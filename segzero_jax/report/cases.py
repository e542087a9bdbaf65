"""Single questions: chosen before-and-after cases, and one group of training rollouts, as pictures and text."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segzero_jax import overlay
from segzero_jax.report.markup import NOTHING, bound, fixed, label, places, show, signed, text
from segzero_jax.report.run import Run, marks, number, reward_maxima

_EACH = 3  # cases of a kind
_WIDTH = 440  # pixels of a picture, twice what a laptop shows
_MOST_RESPONSES = 16
_LONG = 420  # characters of text that are shown at once
_CHANGE = 0.02  # less is no change

Row = Mapping[str, Any]

_SWATCH = '<svg viewBox="0 0 30 18" aria-hidden="true">'
_FRAME = '<rect x="2" y="2" width="26" height="14"'
LEGEND = (
    f'<div class="legend"><span>{_SWATCH}{_FRAME} fill="#2678dc" fill-opacity=".42" stroke="#2678dc" '
    'stroke-width="2.5"/>'
    '<path d="M8 15L19 3M14 15L25 3M3 13L12 3" stroke="#fff"/></svg>predicted mask and box</span>'
    f'<span>{_SWATCH}<circle cx="15" cy="9" r="6.5" fill="#101216"/><circle cx="15" cy="9" r="5.4" fill="#fff"/>'
    '<circle cx="15" cy="9" r="3.4" fill="#2678dc"/></svg>predicted point</span>'
    f'<span>{_SWATCH}{_FRAME} fill="none" stroke="#101216" stroke-width="4"/>'
    f'{_FRAME} fill="none" stroke="#ff961e" stroke-width="2.2" stroke-dasharray="6 4"/></svg>target</span></div>'
)


@dataclass(frozen=True)
class Case:
    """A question at the first and at the last evaluation (``before`` is None when there is one only)."""

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
    what, _ = _quality(found)
    title = "Before and after" if first != last else f"Answers at step {last}"
    shown = "".join(_case(run, case, first, last) for case in chosen)
    return f'<section id="cases"><h2>{title}</h2><p>{_summary(found, what, first, last)}</p>{LEGEND}{shown}</section>'


def choose(found: Sequence[Case]) -> list[Case]:
    """Three each of the most improved, the typical and the worst cases; no case twice, fewer when there are few.

    Typical is nearest to the median after training; worst is lowest after training. With one evaluation only, the
    best take the place of the most improved.
    """
    _, quality = _quality(found)
    each = max(1, min(_EACH, len(found) // 3))
    after = {id(case): quality(case.after) for case in found}
    middle = statistics.median(after.values())
    paired = found[0].before is not None
    left = list(found)
    chosen: list[Case] = []

    def take(kind: str, rank: Any) -> None:
        for case in sorted(left, key=rank)[:each]:
            left.remove(case)
            chosen.append(Case(kind, case.split, case.before, case.after))

    if paired:
        take("Most improved", lambda case: quality(case.before) - after[id(case)])
    else:
        take("Best", lambda case: -after[id(case)])
    worst = sorted(left, key=lambda case: after[id(case)])[:each]
    for case in worst:
        left.remove(case)
    take("Typical", lambda case: abs(after[id(case)] - middle))
    return chosen + [Case("Worst", case.split, case.before, case.after) for case in worst]


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
        f'reward.{some}</p>{LEGEND}<div class="case"><div class="kind">{text(group[0].get("id"))}</div>'
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
    """What cases are ranked by: IoU, or the reward where some answer has no IoU."""
    rows = [row for case in found for row in (case.before, case.after) if row is not None]
    key = "iou" if all(number(row.get("iou")) is not None for row in rows) else "reward"
    return ("IoU" if key == "iou" else "reward"), lambda row: number(row.get(key)) or 0.0


def _summary(found: Sequence[Case], what: str, first: int, last: int) -> str:
    _, quality = _quality(found)
    splits = len({case.split for case in found})
    asked = f"{len(found)} held-out questions of {splits} split{'s' if splits > 1 else ''}, answered greedily"
    typical = f"the typical (nearest to the median {what}) and the worst (lowest {what})"
    change = [quality(case.after) - quality(case.before) for case in found if case.before is not None]
    if not change:
        return f"{asked} at step {last}. Shown are the best, {typical}."
    better, worse = sum(c > _CHANGE for c in change), sum(c < -_CHANGE for c in change)
    return (
        f"{asked} at step {first} and at step {last}: {better} improved in {what} by more than {_CHANGE}, "
        f"{worse} got worse, {len(found) - better - worse} stayed. Shown are the most improved, {typical} afterwards."
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
        f'<div class="score">{best}</div>{_components(run, row)}{_words(row)}</div></div>'
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
        f'<p class="note">{" · ".join(facts)}</p>{_components(run, row)}{_words(row)}</article>'
    )


def _picture(run: Run, row: Row, asked: Row, what: str) -> str:
    """The picture of ``asked`` with the marks of ``row``, or a note where it cannot be shown."""
    picture = run.picture(asked.get("image"))
    if picture is None:
        return f'<div class="missing">picture missing: {text(asked.get("image"))}</div>'
    prediction, target = (
        _fitting(marks(side.get(objects), side.get(mask)), picture)
        for side, objects, mask in ((row, "objects", "mask"), (asked, "target_objects", "target_mask"))
    )
    drawn = overlay.draw(picture, prediction, target, _WIDTH)
    return f'<img src="{overlay.data_uri(drawn)}" width="{drawn.width}" height="{drawn.height}" alt="{text(what)}">'


def _fitting(side: overlay.Marks, picture: Any) -> overlay.Marks:
    """Without its mask when that is of another size than the picture."""
    fits = side.mask is None or side.mask.shape == (picture.height, picture.width)
    return side if fits else overlay.Marks(side.boxes, side.points)


def _of(maximum: float | None) -> str:
    return "" if maximum is None else f" <small>/ {bound(maximum)}</small>"


def _components(run: Run, row: Row) -> str:
    components = row.get("components")
    if not isinstance(components, dict) or not components:
        return ""
    maxima = reward_maxima(run).components
    items = "".join(
        f"<dt>{label(name)}</dt><dd>{places(value)}{_of(maxima.get(name))}</dd>" for name, value in components.items()
    )
    return f'<dl class="parts">{items}</dl>'


def _words(row: Row) -> str:
    """Reasoning and answer of a response; one that has another form is shown as it is."""
    response = str(row.get("text", ""))
    before, think, rest = response.partition("<think>")
    thought, closed, answer = rest.partition("</think>")
    if before.strip() or not think or not closed:
        return f'<p class="note">Not in the form asked for:</p>{_long(response, "answer")}'
    answer = answer.strip().removeprefix("<answer>").removesuffix("</answer>")
    return _long(thought.strip(), "thought") + _long(answer.strip(), "answer")


def _long(words: str, kind: str) -> str:
    if len(words) <= _LONG:
        return f'<p class="{kind}">{text(words)}</p>'
    return (
        f'<p class="{kind}">{text(words[:_LONG])}…</p><details><summary>all {len(words)} characters</summary>'
        f'<p class="{kind}">{text(words)}</p></details>'
    )


def _late_group(run: Run) -> list[dict[str, Any]]:
    """The pictured group of the last step, or of the latest of five whose responses differ in reward."""
    groups = []
    for step in reversed(run.rollout_steps[-5:]):
        rows = run.rollouts(step)
        pictured = next((row.get("id") for row in rows if row.get("image")), None)
        group = [row for row in rows if row.get("id") == pictured]
        if pictured is not None:
            groups.append(group)
    differing = [group for group in groups if len({row.get("reward") for row in group}) > 1]
    return next(iter(differing or groups), [])
