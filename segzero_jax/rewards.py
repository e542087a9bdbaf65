"""Rewards: pure functions of a response's text, the target, and SAM 2's mask IoU. ``docs/rewards.md`` is the manual.

No response text raises: it gets what the published rewards give it after their own ``except``. An unusable solution or
mask score is the caller's error and raises ValueError.

Sources: Seg-Zero, arXiv 2503.06520 (upstream ``verl/utils/reward_score/seg.py``, ``seg_strict.py``); VisionReasoner,
arXiv 2505.12081 (``vision_reasoner.py``); SAM-R1, arXiv 2505.22596.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from segzero_jax import answers
from segzero_jax.answers import MAX_OBJECTS, Located

_JOINT = re.compile(r"</think>\s*<answer>")
_TIERS = ((0.8, 4.0), (0.7, 3.0), (0.5, 2.0))
_MASK_MAXIMA = {"raw": 1.0, "threshold": 1.0, "tiered": 4.0}
# The "max{image size}" of Seg-Zero's soft rewards: its frame's side in pixels. Like the thresholds, it is not scaled.
_SIDE = 840


@dataclass(frozen=True)
class Score:
    """A response's reward.

    Attributes:
      total: the weighted sum of the components.
      components: each component's own value, before its weight.
    """

    total: float
    components: dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """One published reward.

    Attributes:
      maxima: the components in order, and the maximum of each.
      measure: computes a text's components against target objects.
      tiers: whether SAM-R1's tiered mask IoU is one of its components.
      single: whether it compares with exactly one object.
    """

    maxima: Mapping[str, float]
    measure: Callable[[str, Sequence[Located]], dict[str, float]]
    tiers: bool = False
    single: bool = False


def score(
    recipe: str,
    text: str,
    solution: str,
    mask_iou: float | None = None,
    mask_iou_weight: float = 0.0,
    mask_iou_mode: str = "raw",
) -> Score:
    """The reward of one response.

    Args:
      recipe: a key of ``RECIPES``.
      text: the response, without special tokens.
      solution: the target in either published form, in the frame of the image the policy saw.
      mask_iou: IoU of SAM 2's mask for the response with the target mask, in [0, 1]; None is a missing score.
      mask_iou_weight: weight of the mask IoU as a further component; 0 leaves it out.
      mask_iou_mode: its form: "raw", "threshold" (1 above 0.5) or "tiered" (see ``mask_component``).

    ``sam_r1`` has its own mask IoU, tiered and with weight 1, which weight and mode do not change.

    Raises:
      ValueError: the recipe or mode is unknown, the weight is negative or not finite, the solution is malformed or
        not one that the recipe can compare with, or the recipe weighs a mask IoU that is missing or not in [0, 1].
        A missing score is never a zero: drop the row.
    """
    spec, weight, mode = _lookup(recipe, mask_iou_weight, mask_iou_mode)
    components = spec.measure(text, answers.read_solution(solution))
    total = sum(components.values())
    if weight > 0:
        if mask_iou is None:
            raise ValueError(f"mask_iou is missing and recipe {recipe} weighs it by {weight:g}: drop the row")
        components["mask_iou"] = mask_component(mask_iou, mode)
        total += weight * components["mask_iou"]
    return Score(total=total, components=components)


def maximum(recipe: str, mask_iou_weight: float = 0.0, mask_iou_mode: str = "raw") -> float:
    """The highest total ``score`` gives with these arguments. Raises ValueError if they are invalid."""
    spec, weight, mode = _lookup(recipe, mask_iou_weight, mask_iou_mode)
    return sum(spec.maxima.values()) + weight * _MASK_MAXIMA[mode]


def component_names(recipe: str, with_mask_iou: bool = False) -> tuple[str, ...]:
    """Names of the components that ``score`` returns, in order; ``with_mask_iou`` when its weight is above 0.

    Raises:
      ValueError: the recipe is unknown.
    """
    spec, weight, _ = _lookup(recipe, float(with_mask_iou), "raw")
    return (*spec.maxima, "mask_iou") if weight else tuple(spec.maxima)


def can_compare(recipe: str, objects: int) -> bool:
    """Whether ``score`` can compare with a solution of this many objects. Raises ValueError for an unknown recipe."""
    return not _lookup(recipe, 0.0, "raw")[0].single or objects == 1


def thinks(recipe: str) -> bool:
    """Whether the recipe asks for reasoning before the answer. Raises ValueError for an unknown recipe."""
    return "thinking_format" in component_names(recipe)


def in_tags(recipe: str, text: str) -> bool:
    """Whether the text has the tags that the recipe asks for. Raises ValueError for an unknown recipe."""
    return (thinking_format if thinks(recipe) else answer_format)(text) > 0


def mask_component(mask_iou: float, mode: str) -> float:
    """The mask IoU as a reward: itself, 1 above 0.5, or SAM-R1's 4 above 0.8, 3 above 0.7, 2 above 0.5, else 0.

    Raises:
      ValueError: the IoU is not in [0, 1], or the mode is unknown.
    """
    if not 0.0 <= mask_iou <= 1.0:
        raise ValueError(f"mask_iou={mask_iou}: expected a number from 0 to 1")
    if mode == "raw":
        return float(mask_iou)
    if mode == "threshold":
        return float(mask_iou > 0.5)
    if mode == "tiered":
        return next((value for above, value in _TIERS if mask_iou > above), 0.0)
    raise ValueError(f"mask_iou_mode={mode!r}: expected one of {', '.join(_MASK_MAXIMA)}")


def thinking_format(text: str) -> float:
    """1 when the whole text is ``<think>…</think>``, white space, ``<answer>…</answer>``.

    Equal to a full match of ``<think>.*?</think>\\s*<answer>.*?</answer>`` (dot matches newline), without its
    backtracking.
    """
    # No two of the four tags can share a character, so a match anywhere is between the outer two.
    return float(text.startswith("<think>") and text.endswith("</answer>") and _JOINT.search(text) is not None)


def answer_format(text: str) -> float:
    """1 when the whole text is ``<answer>…</answer>``: fully matches ``<answer>.*?</answer>`` (dot matches newline)."""
    # The two tags cannot share a character.
    return float(text.startswith("<answer>") and text.endswith("</answer>"))


def non_repeat(text: str) -> float:
    """0 when two or more sentences repeat earlier ones, else 1. Sentences are split at full stops."""
    sentences = [stripped for part in text.split(".") if (stripped := part.strip())]
    return float(len(sentences) - len(set(sentences)) < 2)


def soft_segmentation_format(answer: dict[str, Any]) -> float:
    """1 when a key with "bbox" holds four items and the first two of at least two others with "point" hold two each.

    Upstream only checks lengths: it takes a string of four characters for a box.
    """
    box_key, point_keys = answers.seg_zero_keys(answer)
    if box_key is None or len(point_keys) < 2:
        return 0.0
    wanted = [(answer[box_key], 4), *((answer[key], 2) for key in point_keys[:2])]
    return float(all(isinstance(value, list | str) and len(value) == count for value, count in wanted))


def strict_segmentation_format(answer: dict[str, Any]) -> float:
    """1 when the keys bbox, points_1 and points_2 hold lists of 4, 2 and 2; further keys are allowed."""
    wanted = (("bbox", 4), ("points_1", 2), ("points_2", 2))
    return float(all(isinstance(v := answer.get(key), list) and len(v) == count for key, count in wanted))


def seg_zero_box_iou(box: Any, target: Sequence[float]) -> float:
    """IoU of boxes with inclusive areas, 0 unless they overlap strictly, and for anything but four numbers."""
    numbers = _floats(box)
    if numbers is None:
        return 0.0
    x1, y1 = max(numbers[0], target[0]), max(numbers[1], target[1])
    x2, y2 = min(numbers[2], target[2]), min(numbers[3], target[3])
    inter = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0.0
    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (numbers, target)]
    union = areas[0] + areas[1] - inter
    return inter / union if union else 0.0


def seg_zero_box_l1(box: Any, target: Sequence[float]) -> float:
    """Mean absolute difference of the four numbers, in pixels; infinite for anything but four numbers."""
    numbers = _floats(box)
    return sum(abs(a - b) for a, b in zip(numbers, target, strict=True)) / 4 if numbers else math.inf


def seg_zero_point_l1(points: Sequence[Any], box: Any, targets: Sequence[Sequence[float]]) -> float:
    """Mean Euclidean distance of two points to the targets in the better pairing, in pixels.

    Infinite unless both points, cast to int, are inside the predicted ``box``, edges included. Upstream's cast also
    reads text ("30" is 30) and ignores entries after the first two.
    """
    first, second = (_whole(point) for point in points)
    if first is None or second is None or not _is_numbers(box, 4):
        return math.inf
    if not all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in (first, second)):
        return math.inf
    straight = _distance(first, targets[0]) + _distance(second, targets[1])
    crossed = _distance(first, targets[1]) + _distance(second, targets[0])
    return min(straight, crossed) / 2


def list_segmentation_format(answer: Any) -> float:
    """VisionReasoner's format: mean over items of [bbox_2d is a list of 4] + [point_2d is a list of 2], up to 2.

    Upstream stops at the first item that raises; the items before it still count towards the mean over all.
    """
    if not isinstance(answer, list) or not answer:
        return 0.0
    found = 0
    for item in answer:
        if isinstance(item, dict):
            for key, count in (("bbox_2d", 4), ("point_2d", 2)):
                found += isinstance(value := item.get(key), list) and len(value) == count
        elif not isinstance(item, list | str) or "bbox_2d" in item or "point_2d" in item:
            break
    return found / len(answer)


def accuracy(answer: Any, targets: Sequence[Located]) -> float:
    """VisionReasoner's accuracy: up to 3 points per object under the best matching, over the larger number of objects.

    A pair earns [IoU > 0.5] + [mean absolute box difference < 10 px] + [point distance < 30 px, the predicted point
    inside its own predicted box]. Each side is truncated to 120 objects. 0 when either side has none (also when both
    have none: upstream's empty arrays raise), and when any item lacks a box or a point of numbers.
    """
    predicted = _arrays(answer)
    if predicted is None or not targets:
        return 0.0
    boxes_m4, points_m2 = predicted
    boxes_n4 = np.array([target.box for target in targets[:MAX_OBJECTS]])
    points_n2 = np.array([target.points[0] for target in targets[:MAX_OBJECTS]])
    with np.errstate(all="ignore"):  # NaN, infinite and overflowing coordinates compare false
        near_mn = np.abs(boxes_m4[:, None] - boxes_n4[None]).mean(axis=2) < 10
        distance_mn = np.sqrt(((points_m2[:, None] - points_n2[None]) ** 2).sum(axis=2))
        inside_m2 = (points_m2 >= boxes_m4[:, :2]) & (points_m2 <= boxes_m4[:, 2:])
        point_mn = (distance_mn < 30) & inside_m2.all(axis=1, keepdims=True)
        earned_mn = (_iou(boxes_m4, boxes_n4) > 0.5).astype(float) + near_mn + point_mn
    # Imported here: it takes a second, which pages and code that only reads answers need not wait for.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(earned_mn, maximize=True)
    return float(earned_mn[rows, columns].sum()) / max(earned_mn.shape)


def _iou(boxes_m4: np.ndarray, boxes_n4: np.ndarray) -> np.ndarray:
    low_mn2 = np.maximum(boxes_m4[:, None, :2], boxes_n4[None, :, :2])
    high_mn2 = np.minimum(boxes_m4[:, None, 2:], boxes_n4[None, :, 2:])
    inter_mn = np.maximum(0, high_mn2 - low_mn2 + 1).prod(axis=2)
    area_m, area_n = ((boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1) for boxes in (boxes_m4, boxes_n4))
    return inter_mn / (area_m[:, None] + area_n[None] - inter_mn)


def _arrays(answer: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Predicted boxes [m, 4] and points [m, 2] as float64, or None where upstream's arithmetic would raise."""
    if not isinstance(answer, list) or not answer:
        return None
    if not all(isinstance(item, dict) and "bbox_2d" in item and "point_2d" in item for item in answer):
        return None
    boxes = [item["bbox_2d"] for item in answer[:MAX_OBJECTS]]
    points = [item["point_2d"] for item in answer[:MAX_OBJECTS]]
    if not all(_is_numbers(box, 4) for box in boxes) or not all(_is_numbers(point, 2) for point in points):
        return None
    # numpy cannot subtract booleans from each other, nor take the root of integers beyond 64 bits.
    if np.array(boxes).dtype.kind == "b" or np.array(points).dtype.kind == "O":
        return None
    try:
        return np.array(boxes, dtype=np.float64), np.array(points, dtype=np.float64)
    except OverflowError:  # an integer beyond the largest float
        return None


def _is_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(v, int | float) for v in value)


def _floats(value: Any) -> list[float] | None:
    """A list of four numbers as floats; None for anything else, integers beyond the largest float included."""
    try:
        return [float(v) for v in value] if _is_numbers(value, 4) else None
    except OverflowError:
        return None


def _whole(point: Any) -> tuple[int, int] | None:
    if not isinstance(point, list | str) or len(point) < 2:
        return None
    try:
        return int(point[0]), int(point[1])
    except (TypeError, ValueError, OverflowError):
        return None


def _distance(point: tuple[int, int], target: Sequence[float]) -> float:
    # Far outside any image, and some such integers overflow a float.
    if not all(-1e9 < v < 1e9 for v in point):
        return math.inf
    dx, dy = point[0] - target[0], point[1] - target[1]
    return math.sqrt(dx * dx + dy * dy)


def _measure_seg_zero(
    text: str, targets: Sequence[Located], *, strict: bool = False, graded: bool = False, thinking: bool = True
) -> dict[str, float]:
    """``graded`` is the paper's soft accuracy, which has no released code: values instead of thresholds."""
    target_box, target_points = _single(targets)
    answer = answers.first_braces(text) or {}
    if strict:
        found = strict_segmentation_format(answer)
        box, points = answer.get("bbox"), [answer.get("points_1"), answer.get("points_2")]
    else:
        found = soft_segmentation_format(answer)
        box_key, _ = answers.seg_zero_keys(answer)
        box = None if box_key is None else answer[box_key]
        # Unlike in the format check, the key must contain "points" here, and it may be the box's own key.
        points = [value for key, value in answer.items() if "points" in key.lower()][:2]
    iou, box_l1 = seg_zero_box_iou(box, target_box), seg_zero_box_l1(box, target_box)
    point_l1 = seg_zero_point_l1(points, box, target_points) if len(points) == 2 else math.inf
    if graded:
        earned = _share(iou), _share(1 - box_l1 / _SIDE), _share(1 - point_l1 / _SIDE)
    else:
        earned = float(iou > 0.5), float(box_l1 < 10), float(point_l1 < 100)
    tags = {"thinking_format": thinking_format(text)} if thinking else {"answer_format": answer_format(text)}
    return tags | dict(zip(_SEG_ZERO_MAXIMA, (found, *earned), strict=True))


def _share(value: float) -> float:
    """The value clipped to [0, 1]; 0 for NaN, which boxes with NaN or infinite sides give."""
    return 0.0 if math.isnan(value) else min(max(0.0, value), 1.0)


def _measure_vision_reasoner(text: str, targets: Sequence[Located]) -> dict[str, float]:
    answer = answers.tagged_json(text)
    return {
        "thinking_format": thinking_format(text),
        "segmentation_format": list_segmentation_format(answer),
        "accuracy": accuracy(answer, targets),
        "non_repeat": non_repeat(text),
    }


def _measure_sam_r1(text: str, targets: Sequence[Located]) -> dict[str, float]:
    return {
        "thinking_format": thinking_format(text),
        "segmentation_format": float(answers.read_answer(text) is not None),
    }


def _single(targets: Sequence[Located]) -> Located:
    """The one target of Seg-Zero's rewards; a single target point is used twice."""
    if len(targets) != 1:
        raise ValueError(f"solution: Seg-Zero's recipes compare with exactly one object, got {len(targets)}")
    box, points = targets[0]
    return Located(box=box, points=points if len(points) == 2 else points * 2)


_SEG_ZERO_MAXIMA = {"segmentation_format": 1.0, "box_iou": 1.0, "box_l1": 1.0, "point_l1": 1.0}
_THINKING, _BARE = {"thinking_format": 1.0} | _SEG_ZERO_MAXIMA, {"answer_format": 1.0} | _SEG_ZERO_MAXIMA
RECIPES = {
    "seg_zero_soft": Recipe(_THINKING, _measure_seg_zero, single=True),
    "seg_zero_strict": Recipe(_THINKING, partial(_measure_seg_zero, strict=True), single=True),
    "seg_zero_soft_accuracy": Recipe(_THINKING, partial(_measure_seg_zero, graded=True), single=True),
    "seg_zero_no_thinking": Recipe(_BARE, partial(_measure_seg_zero, thinking=False), single=True),
    "vision_reasoner": Recipe(
        {"thinking_format": 1.0, "segmentation_format": 2.0, "accuracy": 3.0, "non_repeat": 1.0},
        _measure_vision_reasoner,
    ),
    "sam_r1": Recipe({"thinking_format": 1.0, "segmentation_format": 1.0}, _measure_sam_r1, tiers=True),
}


def _lookup(recipe: str, mask_iou_weight: float, mask_iou_mode: str) -> tuple[Recipe, float, str]:
    """The recipe, and the weight and mode of its mask IoU."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    if mask_iou_mode not in _MASK_MAXIMA:
        raise ValueError(f"mask_iou_mode={mask_iou_mode!r}: expected one of {', '.join(_MASK_MAXIMA)}")
    if not 0.0 <= mask_iou_weight < math.inf:
        raise ValueError(f"mask_iou_weight={mask_iou_weight}: expected a finite number from 0")
    spec = RECIPES[recipe]
    return (spec, 1.0, "tiered") if spec.tiers else (spec, mask_iou_weight, mask_iou_mode)
