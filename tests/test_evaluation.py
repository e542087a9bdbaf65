"""Evaluation numbers against independent computations; every question counts."""

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from segzero_jax import jsonl, rewards
from segzero_jax.config import RewardConfig
from segzero_jax.evaluation import (
    Judged,
    Measured,
    Response,
    box_hits,
    box_iou,
    evaluate_split,
    failure,
    has_target,
    judge_rows,
    measure,
    per_instance,
    read_response,
    sample_row,
    summary,
    summary_names,
)
from segzero_jax.intervals import bootstrap_interval, with_interval
from segzero_jax.own_rewards import Answer
from segzero_jax.patience import Patience
from segzero_jax.reward_messages import CandidateScore, ScoreRequest
from segzero_jax.scoring import Scorer
from segzero_jax.types import Example, Frame, Lengths, ObjectPrompt, RleMask

FRAME = Frame(10, 10)


def rle(pixels: np.ndarray) -> RleMask:
    encoded = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return RleMask(*encoded["size"], encoded["counts"].decode())


def pixels(box: tuple[float, float, float, float]) -> np.ndarray:
    x1, y1, x2, y2 = map(int, box)
    mask = np.zeros((10, 10), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def decoded(mask: RleMask) -> np.ndarray:
    return coco.decode({"size": [mask.height, mask.width], "counts": mask.counts.encode()}).astype(bool)


class BoxSegmenter:
    """Segments a box as all of its pixels; refuses a box that starts in the corner. Masks come for the first groups."""

    def score(self, groups: list[ScoreRequest], masks: int = 0) -> "BoxSegmenter":
        self.groups, self.masks = groups, masks
        return self

    def result(self, patience: object = None, drop: bool = False) -> list[list[CandidateScore]]:
        self.waited, self.dropped = patience, drop
        scores = [[self._one(group, candidate) for candidate in group.candidates] for group in self.groups]
        bare = [[replace(score, mask=None) for score in group] for group in scores]
        return scores[: self.masks] + bare[self.masks :]

    def _one(self, group: ScoreRequest, candidate: tuple[ObjectPrompt, ...]) -> CandidateScore:
        if candidate and candidate[0].box[:2] == (0, 0):
            return CandidateScore(None, 0, 0, 0.0, None, "refused")
        assert isinstance(group.target, RleMask)
        target = decoded(group.target)
        counted = ~decoded(group.ignore) if group.ignore is not None else np.ones_like(target)
        mask = np.zeros_like(target)
        for item in candidate:
            mask |= pixels(item.box)
        inside, union = int((mask & target & counted).sum()), int(((mask | target) & counted).sum())
        return CandidateScore(inside / union, inside, union, 1.0, rle(mask), "")


def answer(box: tuple[int, int, int, int]) -> str:
    return f'<think> here </think>\n<answer>[{{"bbox_2d": {list(box)}, "point_2d": {list(box[:2])}}}]</answer>'


BOXES = [(2, 2, 5, 5), (4, 1, 9, 3), (1, 6, 3, 9), (5, 5, 8, 8)]
GREEDY = [answer((2, 2, 5, 5)), answer((4, 1, 6, 3)), "no answer at all", answer((0, 0, 3, 3))]


def read(text: str, example: Example, **more: Any) -> Response:
    return read_response(text, example, FRAME, "vision_reasoner", **more)


def with_lengths(texts: list[list[str]]) -> tuple[list[list[str]], Lengths]:
    """As a policy answers, of which each character is a token."""
    tokens = np.array([[len(text) for text in group] for group in texts])
    return texts, Lengths(tokens, tokens < 100)


def evaluate(greedy: list[str], recipe: str = "vision_reasoner") -> tuple[dict, list]:
    examples = [
        Example(f"q{i}", b"", FRAME, "?", (ObjectPrompt(box, (box[:2],)),), rle(pixels(box)))
        for i, box in enumerate(BOXES)
    ]
    scorer = Scorer(RewardConfig(recipe=recipe), FRAME, BoxSegmenter())

    def texts(asked: list[Example], is_greedy: bool) -> tuple[list[list[str]], Lengths]:
        return with_lengths([[text] if is_greedy else [text, answer(BOXES[i])] for i, text in enumerate(greedy)])

    return evaluate_split(examples, texts, scorer, FRAME, recipe, lambda example: f"images/{example.id}.jpg")


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


@pytest.mark.parametrize("recipe", rewards.RECIPES)
def test_well_formed_is_what_the_recipe_asks_for(recipe: str) -> None:
    """Reasoning and answer or, where none is asked for, the answer alone; everything else is as under any recipe."""
    reasoned = [answer(box) for box in BOXES]
    bare = [text.partition("\n")[2] for text in reasoned]
    # Two in one form, one in the other, and one that nobody can read.
    for texts, rate in ((reasoned[:2] + bare[2:3], 0.5), (bare[:2] + reasoned[2:3], 0.25)):
        numbers, rows = evaluate([*texts, "<answer>[[]]</answer>"], recipe)
        rate = rate if recipe != "seg_zero_no_thinking" else 0.75 - rate
        assert numbers["greedy"]["format_rate"] == rate
        assert [row["well_formed"] for row in rows].count(True) == 4 * rate
        assert (numbers["greedy"]["giou"], numbers["greedy"]["box_accuracy"]) == (0.75, 0.75)
        assert [row["failure"] for row in rows] == ["", "", "", "not_objects"]


def draw_judged(seed: int, questions: int = 40, answers: int = 3) -> tuple[Judged, list[list[tuple[set, set]]]]:
    """Judged random masks, and the same masks as sets of pixels; every fifth question has no target."""
    rng = np.random.default_rng(seed)
    groups, measured, targets = [], [], []
    for q in range(questions):
        target = rng.random((9, 11)) < (0.0 if q % 5 == 0 else rng.uniform(0.1, 0.8))
        example = Example(f"q{q}", b"", Frame(11, 9), "?", (), rle(target))
        group = [rng.random((9, 11)) < rng.choice([0.0, 0.3, 0.7]) for _ in range(answers)]
        scores = []
        for mask in group:
            inside, union = int((mask & target).sum()), int((mask | target).sum())
            scores.append(CandidateScore(inside / union if union else 1.0, inside, union, 1.0, rle(mask), ""))
        measured.append([measure(example, Response("", ()), score) for score in scores])
        targets.append(has_target(example))
        places = lambda m: {tuple(p) for p in np.argwhere(m).tolist()}  # noqa: E731
        groups.append([(places(mask), places(target)) for mask in group])
    return Judged.of(measured, targets), groups


def plain_numbers(groups: list[list[tuple[set, set]]]) -> dict[str, float]:
    """The metrics as their definitions read, on sets of pixels."""
    ious = [[len(m & t) / len(m | t) if m | t else 1.0 for m, t in group] for group in groups]
    nothing = [group for group in groups if not group[0][1]]
    something = [group for group in groups if group[0][1]]
    return {
        "giou": sum(sum(row) / len(row) for row in ious) / len(ious),
        "ciou": sum(len(m & t) for g in groups for m, t in g) / sum(len(m | t) for g in groups for m, t in g),
        "n_acc": sum(not m for g in nothing for m, _ in g) / sum(len(g) for g in nothing),
        "t_acc": sum(bool(m) for g in something for m, _ in g) / sum(len(g) for g in something),
    }


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_an_independent_computation(seed: int) -> None:
    """On random masks, with intervals: the same questions drawn again, every metric computed anew from pixels."""
    judged, groups = draw_judged(seed)
    numbers = summary(judged)
    expected = plain_numbers(groups)
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, abs=1e-9)
    rng = np.random.default_rng(0)
    drawn: list[dict[str, float]] = []
    for _ in range(1000):
        drawn.append(plain_numbers([groups[i] for i in rng.integers(0, len(groups), len(groups))]))
    for name in expected:
        low, high = np.quantile([one[name] for one in drawn], [0.025, 0.975])
        assert numbers[f"{name}_low"] == pytest.approx(low, abs=1e-9)
        assert numbers[f"{name}_high"] == pytest.approx(high, abs=1e-9)
    assert (numbers["count"], numbers["no_target"]) == (40, 8)


def test_an_interval_covers_what_it_should() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values)
    spread = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - spread, abs=0.15 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.15 * spread)
    assert bootstrap_interval(np.ones(5), np.ones(5) * 4) == (0.25, 0.25)
    assert bootstrap_interval(np.ones(1)) is None
    assert bootstrap_interval(np.ones(3), np.array([0.0, 2.0, 0.0])) is None, "what counts is of one picture"


def test_a_number_of_one_picture_is_worded_without_an_interval() -> None:
    numbers = {"giou": 0.5, "giou_low": 0.25, "giou_high": 0.625, "ciou": 0.5, "ciou_low": None, "ciou_high": None}
    assert with_interval(numbers, "giou") == "0.500 [0.250, 0.625]"
    assert with_interval(numbers, "ciou") == "0.500"


def joined(parts: list[Judged]) -> Judged:
    names = [field.name for field in fields(Judged) if field.name != "pictures_q"]
    return Judged(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def test_questions_about_one_picture_are_drawn_together() -> None:
    """Seven times the same question about each picture tell no more than one, whatever order they stand in."""
    judged, _ = draw_judged(3)
    one_each = [f"picture {9 * q % 40:02d}" for q in range(40)]
    expected = summary(judged)
    assert summary(replace(judged, pictures_q=np.array(one_each))) == expected, "to the last bit"
    for times in ([7] * 40, [1 + q % 7 for q in range(40)]):
        rows = np.repeat(np.arange(40), times)
        columns = {name: value[rows] for name, value in vars(judged).items() if value is not None}
        repeated = Judged(**columns, pictures_q=np.array(one_each)[rows])
        numbers = summary(repeated)
        assert numbers["giou_high"] - numbers["giou_low"] > 0.8 * (expected["giou_high"] - expected["giou_low"])
        by_instance = summary(per_instance(repeated, [f"thing {row:02d}" for row in rows]))
        for name in ("giou", "t_acc", "giou_low", "giou_high", "t_acc_low", "t_acc_high"):
            assert by_instance[name] == pytest.approx(expected[name], abs=1e-12), name
    interleaved = summary(replace(joined([judged] * 7), pictures_q=np.array(one_each * 7)))
    for name in summary_names(scored=True):
        if not name.startswith("reward"):  # these answers have none
            assert interleaved[name] == pytest.approx(expected[name], abs=1e-12), name
    assert interleaved["count"] == 280


def test_things_in_one_picture_are_drawn_together_by_instance_too() -> None:
    judged, _ = draw_judged(4)
    twice = replace(joined([judged] * 2), pictures_q=np.array([f"picture {q:02d}" for q in range(40)] * 2))
    numbers = summary(per_instance(twice, [f"thing {q:02d}" for q in range(80)]))
    expected = summary(judged)
    assert numbers["count"] == 80
    for name in ("giou_low", "giou_high", "ciou_low", "ciou_high"):
        assert numbers[name] == pytest.approx(expected[name], abs=1e-12), name


def test_rows_name_the_picture_and_older_ones_count_each_for_itself() -> None:
    _, rows = evaluate(GREEDY)
    assert [row["image_id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    together = [row | {"image_id": "one"} for row in rows]
    assert summary(judge_rows(together, 1))["giou"] == summary(judge_rows(rows, 1))["giou"]
    assert summary(judge_rows(together, 1))["giou_low"] is None, "one picture, one draw"
    older = [{name: value for name, value in row.items() if name != "image_id"} for row in rows]
    assert summary(judge_rows(older, 1)) == summary(judge_rows(rows, 1))
    assert summary(judge_rows([*older[:2], *together[2:]], 1)) == summary(judge_rows(rows, 1)), "a run that went on"


def test_rewards_of_ones_own_know_how_long_an_answer_is() -> None:
    example = Example("q", b"", FRAME, "?", (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),), None)
    examples, seen = [example, replace(example, id="p")], []

    def look(given: Answer) -> float:
        seen.append((given.example.id, given.text, given.tokens, given.finished))
        return 0.0

    texts = {True: [["a"], ["b" * 100]], False: [["c" * 3, "d" * 200], ["e" * 5, "f"]]}
    scorer = Scorer(RewardConfig(server="none"), FRAME, None, functions={"look": look})
    policy = lambda _, greedy: with_lengths(texts[greedy])  # noqa: E731
    evaluate_split(examples, policy, scorer, FRAME, "vision_reasoner", lambda _: "")
    expected = {"q": [*texts[True][0], *texts[False][0]], "p": [*texts[True][1], *texts[False][1]]}
    assert seen == [(id, text, len(text), len(text) < 100) for id, group in expected.items() for text in group]


def test_a_service_that_is_away_is_waited_for_and_no_question_is_dropped() -> None:
    patience, segmenter = Patience(RewardConfig(), print, lambda: True), BoxSegmenter()
    example = Example("q", b"", FRAME, "?", (), rle(pixels(BOXES[0])))
    policy = lambda *_: with_lengths([GREEDY[:1]])  # noqa: E731
    scorer = Scorer(RewardConfig(), FRAME, segmenter)
    evaluate_split([example], policy, scorer, FRAME, "vision_reasoner", lambda _: "", patience)
    assert (segmenter.waited, segmenter.dropped) == (patience, False)


def test_training_s_evaluation_draws_pictures_as_well() -> None:
    example = Example("q", b"", FRAME, "?", (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),), rle(pixels(BOXES[0])))
    examples = [replace(example, id=f"q{i}", image_id="one") for i in range(4)]
    right = [[GREEDY[0]], [GREEDY[2]]] * 2
    scorer = Scorer(RewardConfig(), FRAME, BoxSegmenter())
    policy = lambda *_: with_lengths(right)  # noqa: E731
    numbers, _ = evaluate_split(examples, policy, scorer, FRAME, "vision_reasoner", lambda _: "")
    assert [numbers["greedy"][name] for name in ("giou", "giou_low", "giou_high")] == [0.5, None, None]


def test_training_s_evaluation_tells_an_answer_that_was_cut_off() -> None:
    example = Example("q", b"", FRAME, "?", (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),), None)
    scorer = Scorer(RewardConfig(server="none"), FRAME, None)
    # ``with_lengths`` takes the limit to be 100 characters.
    policy = lambda _, greedy: with_lengths([["<think>" + "a" * 100] if greedy else ["<think>"]])  # noqa: E731
    _, (row,) = evaluate_split([example], policy, scorer, FRAME, "vision_reasoner", lambda _: "")
    assert row["failure"] == "cut_off"


def test_an_instance_is_the_mean_of_its_expressions() -> None:
    judged = Judged(
        ious_qa=np.array([[1.0], [0.0], [0.4]]),
        intersections_qa=np.array([[10.0], [0.0], [4.0]]),
        unions_qa=np.array([[10.0], [30.0], [10.0]]),
        box_hits_qa=np.array([[1.0], [0.0], [1.0]]),
        format_qa=np.ones((3, 1)),
        found_qa=np.ones((3, 1)),
        rewards_qa=np.array([[3.0], [1.0], [0.0]]),
        rewarded_qa=np.array([[True], [True], [False]]),
        has_target_q=np.array([True, True, True]),
    )
    numbers = summary(per_instance(judged, ["cat", "cat", "dog"]))
    assert numbers["giou"] == pytest.approx((0.5 + 0.4) / 2)
    assert numbers["reward"] == pytest.approx(2.0), "of those that have one"
    assert numbers["ciou"] == pytest.approx((5 + 4) / (20 + 10))
    assert numbers["box_accuracy"] == pytest.approx(0.75)
    assert numbers["count"] == 2


def test_questions_without_a_target() -> None:
    """An empty answer is right, another is wrong, and so is one that cannot be read, though its mask is empty too."""
    empty, some = rle(np.zeros((10, 10))), rle(pixels((1, 1, 2, 2)))
    example = Example("none", b"", FRAME, "?", (), empty)
    blank = CandidateScore(1.0, 0, 0, 0.0, empty, "")
    nothing = measure(example, read("<think>none</think><answer>[]</answer>", example), blank)
    broken = measure(example, read("hm", example), blank)
    wrong = measure(
        example,
        read(answer((1, 1, 2, 2)), example),
        CandidateScore(0.0, 0, 4, 0.9, some, ""),
    )
    assert [one.iou for one in (nothing, broken, wrong)] == [1.0, 0.0, 0.0]
    assert [one.box_accuracy for one in (nothing, broken, wrong)] == [1.0, 0.0, 0.0]
    numbers = summary(Judged.of([[nothing], [broken], [wrong]], [False] * 3))
    assert (numbers["n_acc"], numbers["t_acc"], numbers["ciou"]) == (pytest.approx(1 / 3), None, 0.0)


def test_ignored_pixels_count_on_neither_side_and_in_no_reward() -> None:
    target, ignored = pixels((1, 0, 4, 0)), pixels((4, 0, 6, 0))
    example = Example("i", b"", FRAME, "?", (ObjectPrompt((1, 0, 4, 0), ((1, 0),)),), rle(target), ignore=rle(ignored))
    texts = [answer((1, 0, 8, 0)), answer((0, 0, 3, 0)), "hm"]  # the second is refused
    summaries, (row,) = evaluate_split(
        [example],
        lambda _, greedy: with_lengths([texts[:1]] if greedy else [texts[1:]]),
        Scorer(RewardConfig(), FRAME, BoxSegmenter()),
        FRAME,
        "vision_reasoner",
        lambda _: "",
    )
    assert (row["intersection"], row["union"], row["iou"], row["components"]["mask_iou"]) == (3, 5, 0.6, 0.6)
    assert summaries["sampled"]["ciou"] == 0.0
    refused = measure(example, Response("", example.objects), CandidateScore(None, 0, 0, 0.0, None, "no"))
    assert (refused.intersection, refused.union) == (0, 3)


def test_a_refused_answer_is_a_failure_whatever_it_earns() -> None:
    """With a score of zero, for a point outside the picture, or without one; with and without a mask of the target."""
    objects = (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),)
    for mask in (rle(pixels(BOXES[0])), None):
        example = Example("q", b"", FRAME, "?", objects, mask)
        response = read(answer((2, 2, 5, 5)), example)
        for iou in (0.0, None):
            score = CandidateScore(iou, 0, 16, 0.0, None, "objects[0]: point (99, 2) lies outside")
            row = sample_row(example, response, score, "")
            assert (row["failure"], row["error"]) == ("refused", score.error)
            assert (row["iou"], row["intersection"], row["union"], row["found"]) == (0.0, 0, 16, False)
            assert summary(judge_rows([row], 1))["t_acc"] == 0.0


def test_the_mean_reward_is_of_answers_that_have_one() -> None:
    numbers, rows = evaluate(GREEDY)
    found = [row["reward"] for row in rows]
    assert found[3] is None
    assert numbers["greedy"]["reward"] == pytest.approx(sum(found[:3]) / 3)
    assert numbers["greedy"]["reward_low"] <= numbers["greedy"]["reward"] <= numbers["greedy"]["reward_high"]
    # Of the drawn ones, the second of each question is right.
    assert numbers["sampled"]["reward"] == pytest.approx((sum(found[:3]) + 4 * found[0]) / 7)
    assert summary(judge_rows(rows, 1)) == numbers["greedy"]
    unknown = [row | {"reward": None} for row in rows]
    assert summary(judge_rows(unknown, 1))["reward"] is None


@pytest.mark.parametrize(
    ("text", "finished", "cause"),
    [
        (answer((2, 2, 5, 5)), True, ""),
        ("<think>still thinking", False, "cut_off"),
        ("<think>done</think>", True, "no_answer"),
        ("<answer>[{'bbox_2d': 1}]</answer>", True, "not_json"),
        ('<answer>[{"bbox_2d": [1]}]</answer>', True, "not_objects"),
    ],
)
def test_failures_have_a_cause(text: str, finished: bool, cause: str) -> None:
    example = Example("q", b"", FRAME, "?", (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),), rle(pixels(BOXES[0])))
    response = read(text, example, finished=finished)
    assert failure(response, CandidateScore(1.0, 1, 1, 1.0, None, "")) == cause
    if not cause:
        assert failure(response, CandidateScore(None, 0, 0, 0.0, None, "no")) == "refused"
    assert failure(read("", example, problem="too long"), None) == "not_asked"


def test_numbers_from_rows_are_the_numbers() -> None:
    """What is kept as JSON gives the same numbers, to the last bit."""
    example = Example("q", b"", FRAME, "?", (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),), rle(pixels(BOXES[0])))
    rows, measured = [], []
    texts = ((answer((2, 2, 5, 5)), 1 / 3), ("hm", 0.1), (answer((1, 1, 2, 2)), 0.7), ("<answer>", 0.2))
    for n, (text, iou) in enumerate(texts):
        response = read(text, example)
        score = CandidateScore(iou, 1, 3, 0.5, rle(pixels(BOXES[0])), "")
        rows.append(json.loads(jsonl.dump(sample_row(replace(example, id=f"q{n // 2}"), response, score, ""))))
        measured.append(measure(example, response, score))
    assert summary(judge_rows(rows, 2)) == summary(Judged.of([measured[:2], measured[2:]], [True, True]))


def test_without_a_server_there_is_no_giou_but_box_accuracy() -> None:
    hit, miss = Measured(None, 0, 0, 1.0, True, True), Measured(None, 0, 0, 0.0, True, False)
    numbers = summary(Judged.of([[hit], [miss], [hit]], [True, True, False]))
    assert (numbers["giou"], numbers["ciou"]) == (None, None)
    assert numbers["box_accuracy"] == pytest.approx(2 / 3)
    assert (numbers["t_acc"], numbers["n_acc"]) == (0.5, 1.0)
    example = Example("q", b"", FRAME, "?", (ObjectPrompt(BOXES[0], (BOXES[0][:2],)),), None)
    for text, found in ((GREEDY[0], True), ("<think>none</think><answer>[]</answer>", False)):
        assert measure(example, read(text, example), None).found == found, "what is pointed out, not what is there"


def test_boxes_match_one_to_one() -> None:
    one, other = ObjectPrompt((0, 0, 4, 4), ()), ObjectPrompt((10, 10, 14, 14), ())
    assert box_iou(one.box, (0, 0, 4, 2)) == 0.5
    assert box_iou(one.box, (4, 4, 0, 0)) == 0.0
    assert box_hits([one, other], [other, one]) == 1.0
    assert box_hits([one, one], [one, other]) == 0.5
    assert box_hits([one, other], [one]) == box_hits([one], [one, other]) == 0.5, "one too many, one too few"
    assert box_hits([one], [ObjectPrompt((0, 0, 4, 2), ())]) == 0.0, "half is not above half"
    # The best matching has the most hits, not the largest IoUs: 0.52 twice rather than 1 and 0.13.
    bars = [ObjectPrompt((x1, 0, x2, 1), ()) for x1, x2 in ((0, 100), (0, 52), (40, 92))]
    assert box_hits(bars[:2], [bars[0], bars[2]]) == 1.0
    assert box_hits([one], []) == 0.0
    assert box_hits([], []) == 1.0


@pytest.mark.parametrize("iou", [0.5, None])
def test_the_names_of_a_summary_are_what_it_measures(iou: float | None) -> None:
    """With and without a server, on questions with and without a target."""
    rewards = np.array([[3.0], [np.nan]] * 2)
    numbers = summary(Judged.of([[Measured(iou, 1, 2, 1.0, True, True)]] * 4, [True, False] * 2, rewards))
    measured = {name for name, value in numbers.items() if value is not None} - {"count", "no_target"}
    assert measured == set(summary_names(scored=iou is not None))
