"""Answers and solutions as plain numbers: finding the JSON in a text, and the parts of it that locate objects.

Reading a model's output is total: no text makes a function here raise. A solution is data, so a malformed one is an
error. Nothing here needs JAX, so stored text can be scored without loading JAX.

Sources: Seg-Zero, arXiv 2503.06520 and VisionReasoner, arXiv 2505.12081; where in a text each looks for its answer is
as in upstream ``verl/utils/reward_score``.
"""

import json
import re
from typing import Any, NamedTuple

# The maximum number of objects on either side of a comparison (upstream: ``vision_reasoner.py``).
MAX_OBJECTS = 120

# No image is wider. A segmenter's float32 represents such pixels; a larger number is noise, not a location.
_MAX_COORDINATE = 1e6

_THINKING = re.compile(r"<think>([^<]+)</think>")
_BRACES = re.compile(r"{[^}]+}")
_SEG_ZERO_BOX = re.compile(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
_SEG_ZERO_POINTS = re.compile(r"<points>\((\d+),(\d+)\),\((\d+),(\d+)\)</points>")
_FORMS = '[{"bbox_2d": [x1,y1,x2,y2], "point_2d": [x,y]}, …] or <box>(x1,y1),(x2,y2)</box><points>(x,y),(x,y)</points>'


class Located(NamedTuple):
    """One object: a box (x1, y1, x2, y2) and its points (x, y), in pixels of the frame that the text refers to."""

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...]


def load_json(text: str) -> Any:
    """The value of a JSON text as ``json.loads`` reads it, or None (as for ``null``) if that raises.

    It rejects integers of more than 4300 digits (ValueError) and nesting deeper than the stack (RecursionError); it
    accepts NaN, Infinity and duplicate keys, of which the last wins.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def first_braces(text: str) -> dict[str, Any] | None:
    """Seg-Zero's answer: the JSON object of the first ``{[^}]+}`` anywhere in the text, or None.

    Only the first match counts, even if it is not JSON (the single quotes of Seg-Zero's own prompt are not).
    """
    # Without a closing brace ahead, the expression would scan to the end from every opening brace.
    match = _BRACES.search(text, 0, text.rfind("}") + 1)
    value = load_json(match.group()) if match else None
    return value if isinstance(value, dict) else None


def tagged_json(text: str) -> Any:
    """VisionReasoner's answer: the JSON between the first ``<answer>`` and the next ``</answer>``, or None."""
    _, opened, rest = text.partition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    return load_json(content.strip()) if opened and closed else None


def thinking(text: str) -> str | None:
    """The reasoning to show, or None: the first ``<think>…</think>`` that holds no ``<``."""
    match = _THINKING.search(text)
    return match.group(1) if match else None


def read_answer(text: str) -> tuple[Located, ...] | None:
    """The objects to ask a segmenter for, or None if the answer is malformed.

    Strict: the answer is between the first ``<answer>`` and ``</answer>`` and is JSON, either VisionReasoner's list of
    objects with ``bbox_2d`` and ``point_2d``, or one Seg-Zero object (the first key with "bbox" in it, and the first
    two others with "point" in them). Every number is an actual number (no bool, NaN or text) of magnitude at most a
    million. One bad item invalidates the answer; an empty list is a well-formed "nothing". Only the first 120 objects
    are returned.
    """
    value = tagged_json(text)
    if isinstance(value, dict):
        box_key, point_keys = seg_zero_keys(value)
        if box_key is None or len(point_keys) < 2:
            return None
        located = _located(value[box_key], [value[key] for key in point_keys[:2]])
        return None if located is None else (located,)
    if not isinstance(value, list):
        return None
    objects = []
    for item in value:
        located = _located(item.get("bbox_2d"), [item.get("point_2d")]) if isinstance(item, dict) else None
        if located is None:
            return None
        objects.append(located)
    return tuple(objects[:MAX_OBJECTS])


def seg_zero_keys(answer: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The first key that contains "bbox", and all other keys that contain "point" (any case), in order."""
    box_key = next((key for key in answer if "bbox" in key.lower()), None)
    return box_key, [key for key in answer if key != box_key and "point" in key.lower()]


def read_solution(solution: str) -> tuple[Located, ...]:
    """The target objects of a solution in either published form; an empty JSON list is "no target".

    Raises:
      ValueError: the solution is in neither form; the message shows it.
    """
    if not isinstance(solution, str):
        raise ValueError(f"solution: expected {_FORMS}, got {solution!r:.200}")
    box, points = _SEG_ZERO_BOX.search(solution), _SEG_ZERO_POINTS.search(solution)
    if box and points:
        x1, y1, x2, y2 = box.groups()
        px, py, qx, qy = points.groups()
        items: Any = [(_digits(x1, y1, x2, y2), [_digits(px, py), _digits(qx, qy)])]
    else:
        value = load_json(solution)
        if not isinstance(value, list):
            raise ValueError(f"solution: expected {_FORMS}, got {solution!r:.200}")
        items = [(i.get("bbox_2d"), [i.get("point_2d")]) if isinstance(i, dict) else (None, []) for i in value]
    objects = []
    for index, (target_box, target_points) in enumerate(items):
        located = _located(target_box, target_points)
        if located is None:
            raise ValueError(f"solution: object {index} is not like {_FORMS}, got {solution!r:.200}")
        objects.append(located)
    return tuple(objects)


def _located(box: Any, points: list[Any]) -> Located | None:
    numbers = [_coordinates(box, 4), *(_coordinates(point, 2) for point in points)]
    if any(n is None for n in numbers):
        return None
    head, *tail = numbers
    return Located(box=head, points=tuple(tail))  # type: ignore[arg-type]


def _coordinates(value: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    # Comparing first rejects integers too large for float(), and NaN, which fails every comparison.
    if not all(type(v) in (int, float) and -_MAX_COORDINATE <= v <= _MAX_COORDINATE for v in value):
        return None
    return tuple(float(v) for v in value)


def _digits(*texts: str) -> list[int | None]:
    # A number too long for a coordinate may also be too long for int().
    return [int(text) if len(text) <= 12 else None for text in texts]
