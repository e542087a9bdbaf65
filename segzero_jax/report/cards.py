"""One answer as a card: the image with the predicted objects, rewards, reasoning and answer."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from segzero_jax import overlay
from segzero_jax.report.markup import bound, label, places, text
from segzero_jax.report.run import marks

_WIDTH = 440  # pixels of an image, twice its width on a laptop's page
_THINNEST = 6  # largest aspect ratio; a thinner image is stretched
_LONG = 420  # characters of text shown before it is folded

Row = Mapping[str, Any]

_SWATCH = '<svg viewBox="0 0 30 18" aria-hidden="true">'
_FRAME = '<rect x="2" y="2" width="26" height="14"'
_MASK_AND_BOX = (
    f'{_SWATCH}{_FRAME} fill="#2678dc" fill-opacity=".42" stroke="#2678dc" stroke-width="2.5"/>'
    '<path d="M8 15L19 3M14 15L25 3M3 13L12 3" stroke="#fff"/></svg>predicted mask and box'
)
_BOX = f'{_SWATCH}{_FRAME} fill="none" stroke="#2678dc" stroke-width="2.5"/></svg>predicted box'
_POINT_AND_TARGET = (
    f'<span>{_SWATCH}<circle cx="15" cy="9" r="6.5" fill="#101216"/><circle cx="15" cy="9" r="5.4" fill="#fff"/>'
    '<circle cx="15" cy="9" r="3.4" fill="#2678dc"/></svg>predicted point</span>'
    f'<span>{_SWATCH}{_FRAME} fill="none" stroke="#101216" stroke-width="4"/>'
    f'{_FRAME} fill="none" stroke="#ff961e" stroke-width="2.2" stroke-dasharray="6 4"/></svg>target</span>'
)


def legend(masks: bool) -> str:
    """The legend of the marks in images; ``masks``: whether answers have masks beside their boxes."""
    return f'<div class="legend"><span>{_MASK_AND_BOX if masks else _BOX}</span>{_POINT_AND_TARGET}</div>'


def picture(image: Image.Image | None, row: Row, asked: Row, what: str) -> str:
    """The image of a question with the marks of an answer, or a note if it cannot be shown.

    Args:
      row: has the answer's ``objects`` and ``mask``.
      asked: has the question's ``image``, ``target_objects`` and ``target_mask``; often the same row.
      what: text for screen readers.
    """
    if image is None:
        return f'<div class="missing">picture missing: {text(asked.get("image") or asked.get("id"))}</div>'
    prediction, target = (
        _fitting(marks(side.get(objects), side.get(mask)), image)
        for side, objects, mask in ((row, "objects", "mask"), (asked, "target_objects", "target_mask"))
    )
    by = _stretch(image)
    stretched = image.resize((image.width * by[0], image.height * by[1]), Image.Resampling.NEAREST)
    drawn = overlay.draw(stretched, _stretched(prediction, by), _stretched(target, by), _WIDTH)
    note = "" if by == (1, 1) else f'<p class="note">Drawn {max(by)} times as {"wide" if by[0] > 1 else "high"}.</p>'
    shown = f'<img src="{overlay.data_uri(drawn)}" width="{drawn.width}" height="{drawn.height}" alt="{text(what)}">'
    return shown + note


def _stretch(image: Image.Image) -> tuple[int, int]:
    """Integer horizontal and vertical factors that bring an image's aspect ratio to at most _THINNEST."""
    longest = _THINNEST * min(image.size)
    return math.ceil(image.height / longest), math.ceil(image.width / longest)


def _stretched(side: overlay.Marks, by: tuple[int, int]) -> overlay.Marks:
    across, down = by
    return overlay.Marks(
        [[x1 * across, y1 * down, x2 * across, y2 * down] for x1, y1, x2, y2 in side.boxes],
        [[x * across, y * down] for x, y in side.points],
        None if side.mask is None else np.repeat(np.repeat(side.mask, down, 0), across, 1),
    )


def _fitting(side: overlay.Marks, picture: Any) -> overlay.Marks:
    """The marks, without the mask if its size differs from the image's."""
    fits = side.mask is None or side.mask.shape == (picture.height, picture.width)
    return side if fits else overlay.Marks(side.boxes, side.points)


def components(row: Row, maxima: Mapping[str, float]) -> str:
    """The reward components of an answer, each with its maximum if that is known."""
    found = row.get("components")
    if not isinstance(found, dict) or not found:
        return ""
    items = "".join(
        f"<dt>{label(name)}</dt><dd>{places(value)}{_of(maxima.get(name))}</dd>" for name, value in found.items()
    )
    return f'<dl class="parts">{items}</dl>'


def _of(maximum: float | None) -> str:
    return "" if maximum is None else f" <small>/ {bound(maximum)}</small>"


def words(row: Row, thinks: bool) -> str:
    """Reasoning (if ``thinks``) and answer of a response; a response in another form is shown as it is."""
    response = str(row.get("text", ""))
    before, opened, rest = response.partition("<think>" if thinks else "<answer>")
    thought, closed, answer = rest.partition("</think>") if thinks else ("", opened, rest)
    if before.strip() or not opened or not closed:
        return f'<p class="note">Not in the form asked for:</p>{_long(response, "answer")}'
    answer = answer.strip().removeprefix("<answer>").removesuffix("</answer>")
    return (_long(thought.strip(), "thought") if thinks else "") + _long(answer.strip(), "answer")


def _long(words: str, kind: str) -> str:
    if len(words) <= _LONG:
        return f'<p class="{kind}">{text(words)}</p>'
    return (
        f'<p class="{kind}">{text(words[:_LONG])}…</p><details><summary>all {len(words)} characters</summary>'
        f'<p class="{kind}">{text(words)}</p></details>'
    )
