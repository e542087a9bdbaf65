"""Evaluation on held-out questions: gIoU, cIoU, box accuracy and format, greedy and sampled, with confidence intervals.

Every question counts: a broken answer, one without objects, and one that the service refuses to segment are IoU 0.
gIoU is the mean of the IoUs, cIoU the summed intersections over the summed unions (as ReasonSeg's authors define
them, arXiv 2308.00692, section 4.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

from segzero_jax.patience import Patience
from segzero_jax.prompt import parse_answer
from segzero_jax.reward_messages import CandidateScore
from segzero_jax.rewards import thinking_format
from segzero_jax.scoring import Scored, Scorer, answered_objects, solution
from segzero_jax.types import Box, Example, Frame, ObjectPrompt, RleMask

_RESAMPLES = 1000
_CONFIDENCE = 0.95

Answers = Callable[[Sequence[Example], bool], list[list[str]]]


@dataclass(frozen=True)
class Judged:
    """One mode of a split, ``q`` questions with ``a`` answers each.

    Attributes:
      ious_qa: mask IoU; None without a reward server.
      intersections_qa, unions_qa: pixels.
      box_hits_qa: share of an answer's boxes that match a target's at IoU above 0.5.
      format_qa: whether an answer is well formed.
    """

    ious_qa: np.ndarray | None
    intersections_qa: np.ndarray
    unions_qa: np.ndarray
    box_hits_qa: np.ndarray
    format_qa: np.ndarray


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes as areas of the plane; 0 for boxes turned inside out."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inside = width * height
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def box_hits(answer: Sequence[ObjectPrompt], target: Sequence[ObjectPrompt]) -> float:
    """Pairs with IoU above 0.5 in the best one-to-one matching, over the larger number of boxes; 1 for none at all."""
    if not answer or not target:
        return float(not answer and not target)
    ious = np.array([[box_iou(a.box, t.box) for t in target] for a in answer])
    rows, columns = linear_sum_assignment(-(ious > 0.5).astype(float))
    return float((ious[rows, columns] > 0.5).sum() / max(len(answer), len(target)))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval (95%) of the mean over questions, from a fixed seed."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def summary(judged: Judged) -> dict[str, float | int | None]:
    """The numbers of a mode: ``giou`` with its interval, ``ciou``, ``box_accuracy``, ``format_rate``, ``count``."""
    numbers: dict[str, float | int | None] = {"giou": None, "giou_low": None, "giou_high": None, "ciou": None}
    if judged.ious_qa is not None:
        per_question = judged.ious_qa.mean(axis=1)
        numbers["giou"] = float(per_question.mean())
        numbers["giou_low"], numbers["giou_high"] = bootstrap_interval(per_question)
        numbers["ciou"] = float(judged.intersections_qa.sum() / max(judged.unions_qa.sum(), 1))
    numbers["box_accuracy"] = float(judged.box_hits_qa.mean())
    numbers["format_rate"] = float(judged.format_qa.mean())
    numbers["count"] = len(judged.format_qa)
    return numbers


def _area(mask: RleMask | None) -> int:
    if mask is None:
        return 0
    return int(coco.area({"size": [mask.height, mask.width], "counts": mask.counts.encode()}))


def _overlap(score: CandidateScore, example: Example) -> tuple[float, int, int]:
    if score.iou is None:
        return 0.0, 0, _area(example.mask)
    return score.iou, score.intersection, score.union


def judge(examples: Sequence[Example], texts: list[list[str]], scored: Scored, frame: Frame) -> Judged:
    """Measures answers ``[q][a]`` that have been scored."""
    overlaps = None
    if scored.masks is not None:
        groups = zip(examples, scored.masks, strict=True)
        overlaps = np.array([[_overlap(score, example) for score in group] for example, group in groups], np.float64)
    hits = [
        [box_hits(answered_objects(text, example, frame), example.objects) for text in group]
        for example, group in zip(examples, texts, strict=True)
    ]
    well = [[thinking_format(text) > 0 and parse_answer(text).well_formed for text in group] for group in texts]
    zeros = np.zeros((len(texts), len(texts[0])))
    return Judged(
        ious_qa=None if overlaps is None else overlaps[..., 0],
        intersections_qa=zeros if overlaps is None else overlaps[..., 1],
        unions_qa=zeros if overlaps is None else overlaps[..., 2],
        box_hits_qa=np.array(hits),
        format_qa=np.array(well),
    )


def sample_row(
    example: Example, text: str, scored: Scored, index: int, frame: Frame, recipe: str, image: str
) -> dict[str, Any]:
    """A line of ``evaluations/STEP_SPLIT.jsonl``: the first answer to question ``index``, and what shows it."""
    score = scored.masks[index][0] if scored.masks is not None else None
    reward = scored.rewards_bg[index, 0]
    return {
        "id": example.id,
        "question": example.question,
        "text": text,
        "solution": solution(example, frame, recipe),
        "image": image,
        "frame": [example.frame.width, example.frame.height],
        "objects": object_rows(answered_objects(text, example, frame)),
        "target_objects": object_rows(example.objects),
        "iou": None if score is None else (score.iou or 0.0),
        "mask": mask_row(score.mask if score is not None else None),
        "target_mask": mask_row(example.mask),
        "reward": float(reward) if np.isfinite(reward) else None,
        "components": scored.components[index][0],
    }


def object_rows(objects: Sequence[ObjectPrompt]) -> list[dict[str, Any]]:
    """Objects as JSON."""
    return [{"box": list(obj.box), "points": [list(point) for point in obj.points]} for obj in objects]


def mask_row(mask: RleMask | None) -> dict[str, Any] | None:
    """A mask as JSON."""
    return None if mask is None else {"height": mask.height, "width": mask.width, "counts": mask.counts}


def evaluate_split(
    examples: Sequence[Example],
    answer: Answers,
    scorer: Scorer,
    frame: Frame,
    recipe: str,
    store_image: Callable[[Example], str],
    patience: Patience | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Evaluates one split.

    Args:
      examples: its questions.
      answer: ``(examples, greedy) -> texts [q][a]``: the policy.
      store_image: keeps a picture for the report, returns where.
      patience: how long a service that is away is waited for; no question is dropped.

    Returns:
      The numbers by mode, "greedy" and "sampled", and a row per question with its greedy answer.
    """
    greedy, sampled = answer(examples, True), answer(examples, False)
    together = [first + more for first, more in zip(greedy, sampled, strict=True)]
    scored = scorer.send(examples, together, masks=len(examples)).result(patience)
    judged = judge(examples, together, scored, frame)
    summaries = {"greedy": summary(_answers(judged, slice(0, 1))), "sampled": summary(_answers(judged, slice(1, None)))}
    rows = [
        sample_row(example, greedy[i][0], scored, i, frame, recipe, store_image(example))
        for i, example in enumerate(examples)
    ]
    return summaries, rows


def _answers(judged: Judged, which: slice) -> Judged:
    return Judged(
        ious_qa=None if judged.ious_qa is None else judged.ious_qa[:, which],
        intersections_qa=judged.intersections_qa[:, which],
        unions_qa=judged.unions_qa[:, which],
        box_hits_qa=judged.box_hits_qa[:, which],
        format_qa=judged.format_qa[:, which],
    )
