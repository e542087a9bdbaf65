"""Evaluation metrics: gIoU, cIoU, box accuracy, format and no-target rates, with bootstrap confidence intervals.

Every question counts: a broken answer, one without objects, and one that the service refuses to segment have IoU 0.
gIoU is the mean of the IoUs, cIoU the summed intersections over the summed unions (as ReasonSeg's authors define them,
arXiv 2308.00692, section 4.1). No-target questions follow GRES (arXiv 2306.00968, section 4): IoU 1 for an empty mask
and 0 for any other. ``docs/evaluation.md`` has the details.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco

from segzero_jax.answers import tagged_json
from segzero_jax.intervals import bootstrap_interval, by_picture
from segzero_jax.patience import Patience
from segzero_jax.prompt import parse_answer
from segzero_jax.reward_messages import CandidateScore
from segzero_jax.rewards import in_tags
from segzero_jax.scoring import Scored, Scorer, answered_objects, solution
from segzero_jax.types import Box, Example, Frame, Lengths, ObjectPrompt, RleMask

# Answering modes of a split, and its metrics; the first two metrics need SAM 2.
MODES = ("greedy", "sampled")
_MASK_NUMBERS = ("giou", "ciou")
_NUMBERS = (*_MASK_NUMBERS, "box_accuracy", "format_rate", "reward", "n_acc", "t_acc")

Answers = Callable[[Sequence[Example], bool], tuple[list[list[str]], Lengths]]


@dataclass(frozen=True)
class Measured:
    """Measurements of one answer.

    Attributes:
      iou: mask IoU; None without a reward server.
      intersection, union: in pixels, without ignored ones.
      box_accuracy: share of the boxes that match a target box at IoU above 0.5, see ``box_hits``.
      well_formed: see ``Response.in_form``.
      found: whether the answer points something out: a mask with pixels or, without masks, an object.
    """

    iou: float | None
    intersection: int
    union: int
    box_accuracy: float
    well_formed: bool
    found: bool


@dataclass(frozen=True)
class Judged:
    """Measurements of the answers to ``q`` questions, ``a`` each.

    Attributes:
      ious_qa: mask IoU; None without a reward server.
      intersections_qa, unions_qa: in pixels.
      box_hits_qa: see ``Measured.box_accuracy``.
      format_qa: whether the answer is well formed.
      found_qa: whether the answer points something out.
      rewards_qa: the reward of the answer; 0 if it has none.
      rewarded_qa: whether the answer has a reward.
      has_target_q: whether there is anything to find.
      pictures_q: an identifier of the image that each question is about; None if each question has its own.
    """

    ious_qa: np.ndarray | None
    intersections_qa: np.ndarray
    unions_qa: np.ndarray
    box_hits_qa: np.ndarray
    format_qa: np.ndarray
    found_qa: np.ndarray
    rewards_qa: np.ndarray
    rewarded_qa: np.ndarray
    has_target_q: np.ndarray
    pictures_q: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        measured: Sequence[Sequence[Measured]],
        has_target: Sequence[bool],
        rewards_qa: np.ndarray | None = None,
        pictures: Sequence[str] | None = None,
    ) -> "Judged":
        """Collects single answers, ``[q][a]``; ``rewards_qa`` is NaN for answers without a reward, None if all are."""

        def column(name: str) -> np.ndarray:
            return np.array([[getattr(one, name) for one in group] for group in measured], np.float64)

        scored = measured[0][0].iou is not None
        given = np.full((len(measured), len(measured[0])), np.nan) if rewards_qa is None else rewards_qa
        return cls(
            ious_qa=column("iou") if scored else None,
            intersections_qa=column("intersection"),
            unions_qa=column("union"),
            box_hits_qa=column("box_accuracy"),
            format_qa=column("well_formed"),
            found_qa=column("found"),
            rewards_qa=np.nan_to_num(given, nan=0.0),
            rewarded_qa=np.isfinite(given),
            has_target_q=np.array(has_target, bool),
            pictures_q=None if pictures is None else np.array(pictures),
        )


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, as areas of the plane; 0 for inverted boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inside = width * height
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def box_hits(answer: Sequence[ObjectPrompt], target: Sequence[ObjectPrompt]) -> float:
    """Pairs with IoU above 0.5 in the best one-to-one matching, over the larger box count; 1 if both have none."""
    if not answer or not target:
        return float(not answer and not target)
    ious = np.array([[box_iou(a.box, t.box) for t in target] for a in answer])
    # Imported here: it takes a second, which pages and other code that only reads answers need not wait for.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-(ious > 0.5).astype(float))
    return float((ious[rows, columns] > 0.5).sum() / max(len(answer), len(target)))


def has_target(example: Example) -> bool:
    """Whether there is anything to find: mask pixels or, without a mask, objects."""
    return bool(example.objects) if example.mask is None else _area(example.mask) > 0


def picture_of(example: Example) -> str:
    """The identifier of a question's image: the question's own if its source names no image."""
    return example.image_id or example.id


@dataclass(frozen=True)
class Response:
    """A response and what could be parsed from it.

    Attributes:
      objects: the objects it points out, in pixels of the stored image.
      readable: whether the answer could be parsed; an unreadable answer is wrong even if there is nothing to find.
      in_form: whether the reasoning (if the recipe asks for it) and the answer are in their tags and the answer can be
        parsed.
      finished: whether it ended by itself rather than at the token limit.
      problem: why the question could not even be asked; empty if it could.
    """

    text: str
    objects: tuple[ObjectPrompt, ...]
    readable: bool = True
    in_form: bool = True
    finished: bool = True
    problem: str = ""


def read_response(
    text: str, example: Example, frame: Frame, recipe: str, finished: bool = True, problem: str = ""
) -> Response:
    """Parses a response whose coordinates are in ``frame``; ``recipe`` is the reward recipe."""
    readable = parse_answer(text).readable
    in_form = readable and in_tags(recipe, text)
    return Response(text, answered_objects(text, example, frame), readable, in_form, finished, problem)


def measure(example: Example, response: Response, score: CandidateScore | None) -> Measured:
    """Measures one response.

    Args:
      example: the question.
      score: SAM 2's result for it; None without a server.
    """
    objects, readable = response.objects, response.readable
    hits = box_hits(objects, example.objects) if readable else 0.0
    if score is None:
        return Measured(None, 0, 0, hits, response.in_form, bool(objects))
    if score.iou is None or score.error:
        # For a request that it refused as a whole, SAM 2 does not report the size of the target.
        return Measured(0.0, 0, score.union or _target_area(example), hits, response.in_form, False)
    iou, inside = (score.iou, score.intersection) if readable else (0.0, 0)
    found = bool(objects) if score.mask is None else _area(score.mask) > 0
    return Measured(iou, inside, score.union, hits, response.in_form, found)


def failure(response: Response, score: CandidateScore | None) -> str:
    """Why a response could not be judged by its mask; empty if it could.

    Returns:
      ``not_asked`` (the image cannot be read, or the prompt is too long), ``cut_off`` (at the token limit),
      ``no_answer`` (no ``<answer>`` block), ``not_json``, ``not_objects`` (JSON of another form), or ``refused`` (by
      SAM 2).
    """
    if response.problem:
        return "not_asked"
    if response.readable:
        return "refused" if score is not None and (score.iou is None or score.error) else ""
    if not response.finished:
        return "cut_off"
    if "</answer>" not in response.text.partition("<answer>")[2]:
        return "no_answer"
    return "not_json" if tagged_json(response.text) is None else "not_objects"


def summary(judged: Judged) -> dict[str, float | int | None]:
    """The metrics of a mode; None for those that were not measured.

    Returns:
      ``giou``, ``ciou``, ``box_accuracy`` and ``format_rate``; ``reward``, the mean over answers that have one;
      ``n_acc``, the share of no-target questions for which nothing was pointed out, and ``t_acc``, the share of
      questions with a target for which something was; each with its interval over images in ``*_low`` and ``*_high``,
      which are None if a metric rests on one image. ``count`` is the number of questions, ``no_target`` how many of
      them have no target.
    """
    scored = judged.ious_qa is not None
    ones = np.ones(len(judged.format_qa))
    nothing, something = (~judged.has_target_q).astype(float), judged.has_target_q.astype(float)
    # If there is nothing to find, an answer's IoU is 1 for an empty mask and 0 for any other.
    right_qa = judged.box_hits_qa if judged.ious_qa is None else judged.ious_qa
    ratios: dict[str, tuple[np.ndarray, np.ndarray] | None] = {
        "giou": (judged.ious_qa.mean(1), ones) if judged.ious_qa is not None else None,
        "ciou": (judged.intersections_qa.sum(1), judged.unions_qa.sum(1)) if scored else None,
        "box_accuracy": (judged.box_hits_qa.mean(1), ones),
        "format_rate": (judged.format_qa.mean(1), ones),
        "reward": (judged.rewards_qa.sum(1), judged.rewarded_qa.sum(1)),
        "n_acc": (nothing * right_qa.mean(1), nothing),
        "t_acc": (something * judged.found_qa.mean(1), something),
    }
    numbers: dict[str, float | int | None] = {}
    for name, parts in ratios.items():
        value, low, high = None, None, None
        if parts is not None and parts[1].sum() > 0:
            value = float(parts[0].sum() / parts[1].sum())
            above, below = (by_picture(part, judged.pictures_q) for part in parts)
            low, high = bootstrap_interval(above, below) or (None, None)
        numbers |= {name: value, f"{name}_low": low, f"{name}_high": high}
    numbers["count"] = len(judged.format_qa)
    numbers["no_target"] = int(nothing.sum())
    return numbers


def summary_names(scored: bool) -> list[str]:
    """Names of ``summary``'s metrics, intervals included; those of masks only if ``scored``."""
    names = [name for name in _NUMBERS if scored or name not in _MASK_NUMBERS]
    return [f"{name}{end}" for end in ("", "_low", "_high") for name in names]


def per_instance(judged: Judged, instances: Sequence[str]) -> Judged:
    """The same with one row per instance, the mean over its expressions; ``instances`` has each question's instance.

    An instance takes the image of its first expression.
    """
    _, first, index = np.unique(np.array(instances), return_index=True, return_inverse=True)
    counts = np.bincount(index)

    def mean(values_qa: np.ndarray) -> np.ndarray:
        total = np.zeros((len(counts), values_qa.shape[1]))
        np.add.at(total, index, values_qa.astype(np.float64))
        return total / counts[:, None]

    columns = {name: value for name, value in vars(judged).items() if name.endswith("_qa") and value is not None}
    target = mean(judged.has_target_q[:, None])[:, 0] > 0
    pictures = None if judged.pictures_q is None else judged.pictures_q[first]
    means = {name: mean(value) for name, value in columns.items()}
    return replace(judged, **means, has_target_q=target, pictures_q=pictures)


def sample_row(
    example: Example, response: Response, score: CandidateScore | None, target: str, image: str = ""
) -> dict[str, Any]:
    """A response, its measurements and the data that a report shows of it, as JSON.

    Args:
      target: the solution in the form that the reward recipe takes.
      image: where the image is kept.
    """
    return {
        "id": example.id,
        "instance": example.instance_id or example.id,
        "image_id": picture_of(example),
        "question": example.question,
        "text": response.text,
        "solution": target,
        "image": image,
        "frame": [example.frame.width, example.frame.height],
        "objects": object_rows(response.objects),
        "target_objects": object_rows(example.objects),
        "has_target": has_target(example),
        **vars(measure(example, response, score)),
        "failure": failure(response, score),
        "error": response.problem or (score.error if score else ""),
        "mask_iou": score.iou if score else None,
        "model_score": score.model_score if score else None,
        "mask": mask_row(score.mask if score else None),
        "target_mask": mask_row(example.mask),
    }


def rewarded(scored: Scored, q: int, a: int) -> dict[str, Any]:
    """The reward of an answer as JSON."""
    reward = float(scored.rewards_bg[q, a])
    return {"reward": reward if np.isfinite(reward) else None, "components": scored.components[q][a]}


def judge_rows(rows: Sequence[Mapping[str, Any]], answers: int) -> Judged:
    """The measurements in rows of ``sample_row``, where each question has ``answers`` consecutive rows.

    Rows merged with ``rewarded`` have a reward. If a row does not name its image, as in early versions, each question
    counts as having its own.
    """
    measured = [Measured(**{name: row[name] for name in Measured.__dataclass_fields__}) for row in rows]
    groups = [measured[start : start + answers] for start in range(0, len(measured), answers)]
    rewards_qa = np.array([row.get("reward") for row in rows], np.float64).reshape(-1, answers)  # None becomes NaN
    asked = rows[::answers]
    named = all(row.get("image_id") for row in asked)
    pictures = [row["image_id"] for row in asked] if named else None
    return Judged.of(groups, [row["has_target"] for row in asked], rewards_qa, pictures)


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
      answer: the policy: ``(examples, greedy)`` to texts ``[q][a]`` and their lengths.
      store_image: stores an image for the report and returns its location.
      patience: how long to wait for a service that does not answer; no question is dropped.

    Returns:
      The metrics by mode, "greedy" and "sampled", and one row per question with its greedy answer.
    """
    (greedy, of_greedy), (sampled, of_sampled) = answer(examples, True), answer(examples, False)
    together = [first + more for first, more in zip(greedy, sampled, strict=True)]
    lengths = Lengths(*(np.concatenate(each, axis=1) for each in zip(of_greedy, of_sampled, strict=True)))
    scored = scorer.send(examples, together, masks=len(examples), lengths=lengths).result(patience)
    groups = [
        [
            (
                read_response(text, example, frame, recipe, finished=bool(lengths.finished_bg[q, a])),
                scored.masks[q][a] if scored.masks is not None else None,
            )
            for a, text in enumerate(group)
        ]
        for q, (example, group) in enumerate(zip(examples, together, strict=True))
    ]
    measured = [
        [measure(example, *answered) for answered in group] for example, group in zip(examples, groups, strict=True)
    ]
    targets, pictures = [has_target(example) for example in examples], [picture_of(example) for example in examples]
    summaries = {
        mode: summary(Judged.of([group[which] for group in measured], targets, scored.rewards_bg[:, which], pictures))
        for mode, which in zip(MODES, (slice(0, 1), slice(1, None)), strict=True)
    }
    rows = [
        sample_row(example, *groups[q][0], solution(example, frame, recipe), store_image(example))
        | rewarded(scored, q, 0)
        for q, example in enumerate(examples)
    ]
    return summaries, rows


def _coco(mask: RleMask) -> dict[str, Any]:
    return {"size": [mask.height, mask.width], "counts": mask.counts.encode()}


def _area(mask: RleMask | None) -> int:
    return 0 if mask is None else int(coco.area(_coco(mask)))


def _target_area(example: Example) -> int:
    """Pixels of the target mask that count; 0 if the data set has none."""
    if example.mask is None or example.ignore is None:
        return _area(example.mask)
    target, ignored = (coco.decode(_coco(mask)).astype(bool) for mask in (example.mask, example.ignore))
    return int((target & ~ignored).sum())
