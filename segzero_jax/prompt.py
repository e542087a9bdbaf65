"""The text of questions for a policy, target objects as text, and a policy's answers as objects.

The wordings of Seg-Zero and VisionReasoner are verbatim those their released checkpoints were trained with
(upstream: ``verl/utils/rl_dataset.py`` and ``inference_scripts/``); there is no space between their sentences.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from segzero_jax import answers
from segzero_jax.config import QUESTION, check_wording
from segzero_jax.types import ObjectPrompt

_SEG_ZERO = (
    "Please find '{question}' with bbox and points."
    "Compare the difference between objects and find the most closely matched one."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the one bbox and points of two largest inscribed circles inside the interested object in JSON format."
    "i.e., <think> thinking process here </think>"
    "<answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}</answer>"
)
_VISION_REASONER = (
    'Please find "{question}" with bboxs and points.'
    "Compare the difference between object(s) and find the most closely matched object(s)."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
    "i.e., <think> thinking process here </think>"
    '<answer>[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, '
    '{"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]</answer>'
)
WORDINGS = {"toy": 'Find "{question}".', "seg_zero": _SEG_ZERO, "vision_reasoner": _VISION_REASONER}


@dataclass(frozen=True)
class Answer:
    """The content of a response, in the frame of the image the policy saw.

    Attributes:
      thinking: the reasoning, or None without a closed ``<think>`` block.
      objects: the objects to segment; empty both for a well formed "nothing here" and for no answer at all.
      readable: whether the whole answer was parsed, which tells those two apart.
    """

    thinking: str | None
    objects: tuple[ObjectPrompt, ...]
    readable: bool = True


def question_text(wording: str, question: str) -> str:
    """The text of the user turn that follows the image.

    Args:
      wording: "toy", "seg_zero", "vision_reasoner", or a custom text with "{question}" where that goes.
      question: as in the data set; it is lower-cased and stripped of "." at both ends.

    Raises:
      ConfigError: the wording is not one of these.
    """
    check_wording(wording)
    return WORDINGS.get(wording, wording).replace(QUESTION, question.lower().strip("."))


def solution_text(objects: Sequence[ObjectPrompt]) -> str:
    """Objects as VisionReasoner's JSON, spaced as in its prompt, each with its first point, in whole pixels.

    Raises:
      ValueError: an object has no point, or a coordinate is not a finite number.
    """
    items = []
    for obj in objects:
        if not obj.points:
            raise ValueError(f"solution text: expected a point for every object, got {obj}")
        items.append(f'{{"bbox_2d": {_pixels(obj.box)}, "point_2d": {_pixels(obj.points[0])}}}')
    return f"[{', '.join(items)}]"


def seg_zero_solution_text(obj: ObjectPrompt) -> str:
    """One object with two points in Seg-Zero's form, ``<box>(x1,y1),(x2,y2)</box><points>(x,y),(x,y)</points>``.

    Raises:
      ValueError: the object does not have two points, or a coordinate is negative (the form has no sign) or not finite.
    """
    if len(obj.points) != 2:
        raise ValueError(f"Seg-Zero solution text: expected two points, got {obj}")
    x1, y1, x2, y2, px, py, qx, qy = numbers = json.loads(_pixels([*obj.box, *obj.points[0], *obj.points[1]]))
    if min(numbers) < 0:
        raise ValueError(f"Seg-Zero solution text: expected no coordinate below 0, got {obj}")
    return f"<box>({x1},{y1}),({x2},{y2})</box><points>({px},{py}),({qx},{qy})</points>"


def parse_solution(solution: str) -> tuple[ObjectPrompt, ...]:
    """The target objects of a solution in Seg-Zero's form (two points) or VisionReasoner's (one each).

    Raises:
      ValueError: the solution is in neither form; the message shows it.
    """
    return tuple(ObjectPrompt(box=box, points=points) for box, points in answers.read_solution(solution))


def parse_answer(text: str) -> Answer:
    """The objects to segment, from any text; never raises. ``answers.read_answer`` has the rules.

    Strict JSON: an answer that copies the single quotes of Seg-Zero's prompt is malformed here too, as it is for the
    rewards.
    """
    located = answers.read_answer(text)
    objects = tuple(ObjectPrompt(box=box, points=points) for box, points in located or ())
    return Answer(thinking=answers.thinking(text), objects=objects, readable=located is not None)


def _pixels(values: Sequence[float]) -> str:
    try:
        return json.dumps([round(value) for value in values], separators=(",", ":"))
    except (ValueError, OverflowError):
        raise ValueError(f"solution text: expected finite coordinates, got {list(values)}") from None
