"""Evaluation numbers against independent computations; every question counts."""

import numpy as np
import pytest
from pycocotools import mask as coco

from segzero_jax.config import RewardConfig
from segzero_jax.evaluation import Judged, bootstrap_interval, box_hits, box_iou, evaluate_split, summary
from segzero_jax.reward_messages import CandidateScore, ScoreRequest
from segzero_jax.scoring import Scorer
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask

FRAME = Frame(10, 10)


def rle(pixels: np.ndarray) -> RleMask:
    encoded = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return RleMask(*encoded["size"], encoded["counts"].decode())


def pixels(box: tuple[float, float, float, float]) -> np.ndarray:
    x1, y1, x2, y2 = map(int, box)
    mask = np.zeros((10, 10), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


class BoxSegmenter:
    """Segments a box as all of its pixels; refuses a box that starts in the corner."""

    def score(self, groups: list[ScoreRequest], masks: int = 0) -> "BoxSegmenter":
        self.groups = groups
        return self

    def result(self, *patience: object) -> list[list[CandidateScore]]:
        return [[self._one(group, candidate) for candidate in group.candidates] for group in self.groups]

    def _one(self, group: ScoreRequest, candidate: tuple[ObjectPrompt, ...]) -> CandidateScore:
        if candidate and candidate[0].box[:2] == (0, 0):
            return CandidateScore(None, 0, 0, 0.0, None, "refused")
        assert isinstance(group.target, RleMask)
        target = coco.decode({"size": [10, 10], "counts": group.target.counts.encode()}).astype(bool)
        mask = np.zeros_like(target)
        for item in candidate:
            mask |= pixels(item.box)
        inside, outside = int((mask & target).sum()), int((mask | target).sum())
        return CandidateScore(inside / outside, inside, outside, 1.0, rle(mask), "")


def answer(box: tuple[int, int, int, int]) -> str:
    return f'<think> here </think>\n<answer>[{{"bbox_2d": {list(box)}, "point_2d": {list(box[:2])}}}]</answer>'


BOXES = [(2, 2, 5, 5), (4, 1, 9, 3), (1, 6, 3, 9), (5, 5, 8, 8)]
GREEDY = [answer((2, 2, 5, 5)), answer((4, 1, 6, 3)), "no answer at all", answer((0, 0, 3, 3))]


def evaluate(greedy: list[str]) -> tuple[dict, list]:
    examples = [
        Example(f"q{i}", b"", FRAME, "?", (ObjectPrompt(box, (box[:2],)),), rle(pixels(box)))
        for i, box in enumerate(BOXES)
    ]
    scorer = Scorer(RewardConfig(), FRAME, BoxSegmenter())

    def texts(asked: list[Example], is_greedy: bool) -> list[list[str]]:
        return [[text] if is_greedy else [text, answer(BOXES[i])] for i, text in enumerate(greedy)]

    return evaluate_split(examples, texts, scorer, FRAME, "vision_reasoner", lambda example: f"images/{example.id}.jpg")


def test_every_question_counts() -> None:
    numbers, rows = evaluate(GREEDY)
    # Right; 9 of 18 pixels; nothing of 12; refused, whose target has 16.
    assert numbers["greedy"]["giou"] == pytest.approx((1 + 9 / 18 + 0 + 0) / 4, abs=1e-12)
    assert numbers["greedy"]["ciou"] == pytest.approx((16 + 9) / (16 + 18 + 12 + 16), abs=1e-12)
    assert numbers["greedy"]["format_rate"] == 0.75
    assert numbers["greedy"]["count"] == 4
    assert numbers["sampled"]["giou"] == pytest.approx((1 + 0.75 + 0.5 + 0.5) / 4, abs=1e-12)
    assert [row["iou"] for row in rows] == [1.0, 0.5, 0.0, 0.0]
    assert rows[3]["reward"] is None
    assert rows[2]["mask"] is not None


def test_a_broken_answer_lowers_giou() -> None:
    whole, _ = evaluate([answer(box) for box in BOXES])
    broken, _ = evaluate([answer(box) for box in BOXES[:3]] + ["<think> hm </think>"])
    assert whole["greedy"]["giou"] == 1.0
    assert broken["greedy"]["giou"] == 0.75


def test_numbers_equal_an_independent_computation() -> None:
    rng = np.random.default_rng(0)
    unions = rng.integers(50, 100, (40, 3))
    inside = (unions * rng.random((40, 3))).astype(int)
    judged = Judged(inside / unions, inside, unions, rng.random((40, 3)), rng.random((40, 3)) > 0.5)
    numbers = summary(judged)
    assert numbers["giou"] == pytest.approx(
        sum(i / u for i, u in zip(inside.flat, unions.flat, strict=True)) / 120, abs=1e-9
    )
    assert numbers["ciou"] == pytest.approx(sum(inside.flat) / sum(unions.flat), abs=1e-9)
    per_question = (inside / unions).mean(axis=1)
    spread = 1.96 * per_question.std() / np.sqrt(40)
    assert numbers["giou_low"] == pytest.approx(numbers["giou"] - spread, abs=0.25 * spread)
    assert numbers["giou_high"] == pytest.approx(numbers["giou"] + spread, abs=0.25 * spread)
    assert bootstrap_interval(per_question) == bootstrap_interval(per_question)


def test_without_a_server_there_is_no_giou_but_box_accuracy() -> None:
    numbers = summary(Judged(None, np.zeros((2, 1)), np.zeros((2, 1)), np.array([[1.0], [0.0]]), np.ones((2, 1))))
    assert (numbers["giou"], numbers["ciou"], numbers["box_accuracy"]) == (None, None, 0.5)


def test_boxes_match_one_to_one() -> None:
    one, other = ObjectPrompt((0, 0, 4, 4), ()), ObjectPrompt((10, 10, 14, 14), ())
    assert box_iou(one.box, (0, 0, 4, 2)) == 0.5
    assert box_iou(one.box, (4, 4, 0, 0)) == 0.0
    assert box_hits([one, other], [other, one]) == 1.0
    assert box_hits([one, one], [one, other]) == 0.5
    assert box_hits([one], []) == 0.0
    assert box_hits([], []) == 1.0
