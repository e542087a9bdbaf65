"""The section of the page that shows problems and when they occurred."""

from collections.abc import Sequence

from segzero_jax.report import charts
from segzero_jax.report.charts import Size
from segzero_jax.report.markup import text
from segzero_jax.report.run import Run

_ALARM = "alarm/"
_NAMES = {
    "empty_thinking": ("no reasoning", "Most responses held no reasoning."),
    "one_length": ("one length", "All responses had the same length."),
    "no_spread": ("no spread", "No group's rewards differed, so nothing was learnt."),
    "low_entropy": ("low entropy", "The policy hardly varied its answers any more."),
}
_SKIPPED = "An update whose loss or gradient was not finite was skipped: it changed no weight."
_MISSING = "Responses had no score and were left out of the loss."
_UNSAVED = "A checkpoint could not be written."


def event_section(run: Run) -> str:
    """Alarms, skipped updates, missing scores and failed saves on one timeline; empty if there were none."""
    found = [(name, why, spans) for name, why, happened in _events(run) if (spans := _spans(run, happened))]
    if not found:
        return ""
    steps = [row["step"] for row in run.metrics]
    drawn = [(name, spans) for name, _, spans in found]
    words = f"Events over steps: {', '.join(name for name, _ in drawn)}"
    sizes = (("wide", Size(1120, 40 + 26 * len(drawn))), ("narrow", Size(350, 40 + 26 * len(drawn))))
    charted = "".join(
        f'<div class="{kind}">{charts.span_chart(steps, drawn, words, size)}</div>' for kind, size in sizes
    )
    items = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(why)} <span>{_when(spans)}</span></dd></div>"
        for name, why, spans in found
    )
    return (
        '<section id="events"><h2>What went wrong</h2>'
        f'<figure class="hero">{charted}</figure><dl class="events">{items}</dl></section>'
    )


def _events(run: Run) -> list[tuple[str, str, Sequence[bool]]]:
    """Name, meaning, and whether it happened in each step."""
    keys = {key: None for row in run.metrics for key in row}
    events: list[tuple[str, str, Sequence[bool]]] = []
    for key in keys:
        if key.startswith(_ALARM):
            name = key.removeprefix(_ALARM)
            title, why = _NAMES.get(name, (name.replace("_", " "), ""))
            events.append((f"alarm: {title}", why, [bool(value) for value in run.column(key)]))
    for key, title, why in (("update/skipped", "update skipped", _SKIPPED), ("missing_scores", "no score", _MISSING)):
        events.append((title, why, [bool(value) for value in run.column(key)]))
    failed = [value or 0.0 for value in run.column("checkpoint/failed")]
    # The metric counts since the process began.
    before = [0.0, *failed]
    events.append(("save failed", _UNSAVED, [now > then for now, then in zip(failed, before, strict=False)]))
    return events


def _spans(run: Run, happened: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last step of every contiguous span."""
    spans: list[tuple[int, int]] = []
    going = False
    for row, now in zip(run.metrics, happened, strict=True):
        if now:
            spans[len(spans) - going :] = [(spans[-1][0] if going else row["step"], row["step"])]
        going = now
    return spans


def _when(spans: Sequence[tuple[int, int]]) -> str:
    shown = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans[:8]]
    more = f" and {len(spans) - 8} more times" if len(spans) > 8 else ""
    return f"Step{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {', '.join(shown)}{more}."
