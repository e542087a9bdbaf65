"""The page of an evaluation: metrics with their intervals, policy and segmenter errors, failures, and example cases."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from segzero_jax import __version__, rewards
from segzero_jax.report import cards
from segzero_jax.report.markup import NOTHING, fixed, label, show, text
from segzero_jax.report.run import number
from segzero_jax.report.style import CSS

_EACH = 4  # cases per kind
_MOST_FAILURES = 40
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MORE_CSS = """
.bins { display: flex; align-items: flex-end; gap: 2px; height: 90px; margin: 18px 0 2px; max-width: 640px; }
.bins i { flex: 1; background: var(--c0); min-height: 1px; }
.bins i.none { background: var(--rule); }
.scale { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft); max-width: 640px; }
.answers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 34px 40px; margin-top: 22px; }
.answers .case { margin-top: 0; } .answers .case > .question { font-size: 19px; margin-bottom: 14px; }
.answers .side img { max-width: none; }
td.name { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 760px) { .answers { grid-template-columns: minmax(0, 1fr); } }
"""
_NUMBERS = (
    ("giou", "gIoU"),
    ("ciou", "cIoU"),
    ("box_accuracy", "box accuracy"),
    ("format_rate", "well formed"),
    ("reward", "reward"),
    ("n_acc", "N-acc."),
    ("t_acc", "T-acc."),
)
_CAUSES = {
    "not_asked": "the question could not be asked",
    "cut_off": "cut off at the limit of tokens",
    "no_answer": "no answer block",
    "not_json": "the answer is not JSON",
    "not_objects": "JSON, but no boxes and points",
    "refused": "SAM 2 refused the answer",
}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """One evaluation on the page.

    Attributes:
      result: its entry in ``results.json``.
      rows: rows of ``samples.jsonl``; the first answer to each question is shown.
      ceiling: the oracle's rows on the same questions, if requested.
      picture: returns the image of a question, by its ``index`` in the rows.
      recipe: the reward recipe, which gives the components' maxima and whether reasoning was asked for.
    """

    result: Mapping[str, Any]
    rows: Sequence[Row]
    ceiling: Sequence[Row]
    picture: Callable[[int], Image.Image | None]
    recipe: str


def build_gallery(title: str, shown: Sequence[Shown], results: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Args:
      title: title of the page.
      shown: evaluations with cases, one section each.
      results: all of ``results.json``.
    """
    sections = "".join(_section(one, index) for index, one in enumerate(shown))
    links = "".join(f'<a href="#e{index}">{_name(one.result)}</a>' for index, one in enumerate(shown))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)} · segzero-jax</title><style>{CSS}{_MORE_CSS}</style></head><body>"
        f'<header><h1>{text(title)}</h1><p class="lead">Every question counts: a broken answer is IoU 0.</p>'
        f"<nav>{links}</nav></header><main>{_table(results)}{sections}</main>"
        f"<footer><p>Made by segzero-jax {text(__version__)}. gIoU: mean of the IoUs of single questions. cIoU: all "
        "intersections together over all unions together. N-acc.: questions without a target that were answered so. "
        "T-acc.: questions with a target for which something was pointed out. Intervals: bootstrap over pictures, "
        "95%.</p></footer></body></html>\n"
    )


def choose_cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """First answers by kind: best and worst by IoU (box accuracy without masks), and as many at random; none twice."""
    first = [row for row in rows if row["sample"] == 0]
    each = min(_EACH, max(1, len(first) // 3))
    ranked = sorted(first, key=_quality)
    worst, best = ranked[:each], ranked[each:][-each:][::-1]
    taken = {row["index"] for row in (*worst, *best)}
    rest = [row for row in first if row["index"] not in taken]
    drawn = random.Random(0).sample(rest, min(each, len(rest)))
    return {"Best": best, "Worst": worst, "At random": drawn}


def _quality(row: Row) -> float:
    known = number(row["iou"])
    return float(row["box_accuracy"]) if known is None else known


def _name(result: Row) -> str:
    return f"{text(result['dataset'])}/{text(result['split'])}"


def _table(results: Mapping[str, Any]) -> str:
    evaluations = results["evaluations"]
    known = [(key, name) for key, name in _NUMBERS if any(one["expression"][key] is not None for one in evaluations)]
    lines = []
    for one in evaluations:
        views = [("expression", one["expression"])]
        if one["instance"]["count"] != one["expression"]["count"]:
            views.append(("instance", one["instance"]))
        for view, numbers in views:
            by = " by instance" if view == "instance" else ""
            cells = "".join(f"<td>{fixed(numbers[key])}{_range(numbers, key)}</td>" for key, _ in known)
            drawn = f", {one['samples']} drawn" if one["samples"] else ""
            lines.append(
                f'<tr><td class="name">{text(one["checkpoint"])}{drawn}</td><td class="text">{_name(one)}{by}</td>'
                f"{cells}<td>{numbers['count']}</td></tr>"
            )
    head = "".join(f"<th>{name}</th>" for _, name in known)
    return (
        '<section id="numbers"><h2>Numbers</h2><div class="scroll"><table class="evaluations"><tr>'
        f'<th class="text">answers of</th><th class="text">questions</th>{head}<th>count</th></tr>{"".join(lines)}'
        f"</table></div>{_chosen(results.get('chosen'))}</section>"
    )


def _range(numbers: Row, key: str) -> str:
    low, high = numbers[f"{key}_low"], numbers[f"{key}_high"]
    return "" if low is None else f'<br><span class="range">{fixed(low)}{NOTHING}{fixed(high)}</span>'


def _chosen(chosen: Row | None) -> str:
    if chosen is None:
        return ""
    return (
        f'<p class="note" style="margin-top:14px">Chosen by {label(chosen["by"])} on {text(", ".join(chosen["on"]))}, '
        f"and alone evaluated on the other splits: {text(chosen['checkpoint'])}.</p>"
    )


def _section(one: Shown, index: int) -> str:
    numbers = one.result["expression"]
    scored = numbers["giou"] is not None
    spread = _histogram([_quality(row) for row in one.rows], "IoU" if scored else "box accuracy")
    cases = "".join(_kind(one, kind, rows) for kind, rows in choose_cases(one.rows).items())
    return (
        f'<section id="e{index}"><h2>{_name(one.result)}</h2><p class="note">{text(one.result["checkpoint"])}</p>'
        f"{spread}{_blame(one)}{_failures(one)}{cards.legend(scored)}{cases}</section>"
    )


def _histogram(values: Sequence[float], what: str) -> str:
    counts = [0] * 20
    for value in values:
        counts[min(19, int(value * 20))] += 1
    most = max(counts) or 1
    bars = "".join(
        f'<i style="height:{100 * count / most:.1f}%" title="{count} answers of {bin / 20:.2f} to '
        f'{(bin + 1) / 20:.2f}"{"" if count else " class=none"}></i>'
        for bin, count in enumerate(counts)
    )
    return (
        f'<div class="bins" role="img" aria-label="answers by {what}">{bars}</div>'
        f'<div class="scale"><span>{what} 0</span><span>{len(values)} answers, at most {most} in a column</span>'
        "<span>1</span></div>"
    )


def _blame(one: Shown) -> str:
    """Separates policy errors from segmenter errors by the oracle's IoU."""
    if not one.ceiling:
        return ""
    ceiling = {row["id"]: _quality(row) for row in one.ceiling}
    answers: dict[str, list[float]] = {}
    for row in one.rows:
        answers.setdefault(row["id"], []).append(_quality(row))
    # The mean over several sampled answers, as in the table. A question without a mask has no ceiling.
    pairs = [(sum(got) / len(got), ceiling[name]) for name, got in answers.items() if name in ceiling]
    of = "" if len(pairs) == len(answers) else f" of the {len(pairs)} questions that have a mask"
    ours, theirs = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    segmenter = sum(best < 0.5 for _, best in pairs)
    policy = sum(got < 0.5 <= best for got, best in pairs)
    return (
        f'<p style="margin-top:18px">With the target boxes and points{of}, the same SAM 2 reaches gIoU '
        f"{fixed(theirs)}: of what is missing to 1, {fixed(1 - theirs)} is the segmenter's and "
        f"{fixed(theirs - ours)} the policy's. Questions below IoU 0.5: {policy} that the oracle gets right, "
        f"{segmenter} that it gets wrong too.</p>"
    )


def _failures(one: Shown) -> str:
    counts, failed = one.result["failures"], one.result["failed"]
    if not failed:
        return '<p class="note">No answer failed.</p>'
    causes = ", ".join(f"{count} {_CAUSES[cause]}" for cause, count in counts.items())
    lines = "".join(
        f'<tr><td>{text(item["id"])}</td><td class="text">{_CAUSES[item["cause"]]}</td>'
        f'<td class="text name">{text(item["error"])}</td></tr>'
        for item in failed[:_MOST_FAILURES]
    )
    more = "" if len(failed) <= _MOST_FAILURES else f" The first {_MOST_FAILURES}:"
    said = "1 answer failed and counts" if len(failed) == 1 else f"{len(failed)} answers failed and count"
    return (
        f'<p style="margin-top:12px">{said} as 0: {causes}.</p><details><summary>which'
        f'{more}</summary><div class="scroll"><table><tr><th class="text">question</th><th class="text">cause</th>'
        f'<th class="text">in words</th></tr>{lines}</table></div></details>'
    )


def _kind(one: Shown, kind: str, rows: Sequence[Row]) -> str:
    shown = "".join(_case(one, row) for row in rows)
    return f'<h3 style="margin-top:40px">{kind}</h3><div class="answers">{shown}</div>' if rows else ""


def _case(one: Shown, row: Row) -> str:
    maxima = rewards.RECIPES[one.recipe].maxima
    iou = number(row["iou"])
    best = f"IoU {fixed(iou)}" if iou is not None else f"box accuracy {fixed(row['box_accuracy'])}"
    reward = "" if row.get("reward") is None else f" <small>reward {show(row['reward'])}</small>"
    cause = f'<p class="note">{_CAUSES[row["failure"]]} {text(row["error"])}</p>' if row["failure"] else ""
    nothing = "" if row["has_target"] else '<p class="note">Nothing in the picture is meant.</p>'
    image = cards.picture(one.picture(row["index"]), row, row, f"answer to {row['question']}")
    return (
        f'<article class="case"><div class="kind">{text(row["id"])}</div><div class="question">{text(row["question"])}'
        f'</div><div class="side"><div>{image}</div><div><div class="score">{best}{reward}</div>{cause}{nothing}'
        f"{cards.components(row, maxima)}{cards.words(row, rewards.thinks(one.recipe))}</div></div></article>"
    )
