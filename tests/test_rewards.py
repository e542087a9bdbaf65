"""Every row of the reward tables by hand, and properties that hold for any text."""

import itertools
import json
import math
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax import answers, rewards
from segzero_jax.prompt import seg_zero_solution_text, solution_text
from segzero_jax.types import ObjectPrompt

SEG_ZERO = ("seg_zero_soft", "seg_zero_strict")
BOX = [100, 100, 199, 199]  # inclusive: 100 x 100
TARGET = "<box>(100,100),(199,199)</box><points>(120,120),(180,180)</points>"


def respond(answer: object, thinking: str = "look") -> str:
    content = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>{thinking}</think>\n<answer>{content}</answer>"


def components(recipe: str, answer: object, solution: str = TARGET) -> dict[str, float]:
    return rewards.score(recipe, respond(answer), solution).components


def seg_zero(box: object = None, first: object = None, second: object = None, **more: object) -> dict[str, object]:
    return {"bbox": box or BOX, "points_1": first or [120, 120], "points_2": second or [180, 180], **more}


def item(box: object, point: object) -> dict[str, object]:
    return {"bbox_2d": box, "point_2d": point}


# thinking_format


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a\nb</think> \n\u2003<answer>\n</answer>", 1),
        ("<think>a</think>x</think><answer>b</answer></answer>", 1),
        ("<think>a</think>x<answer></answer></think><answer>b</answer>", 1),
        ("<think>a</think>x<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>\n", 0),
        (" <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think></answer>", 0),
        ("</think><answer>", 0),
        ("<think></think><answer></answe</answer", 0),
        ("", 0),
    ],
)
def test_thinking_format(text: str, value: float) -> None:
    assert rewards.thinking_format(text) == value
    for recipe in set(rewards.RECIPES) - {"seg_zero_no_thinking"}:
        score = rewards.score(recipe, text, TARGET, mask_iou=0.0)
        assert score.components["thinking_format"] == value
        assert rewards.thinks(recipe)
        assert rewards.in_tags(recipe, text) == value


# seg_zero_no_thinking


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>b</answer>", 1),
        ("<answer></answer>", 1),
        ("<answer>a\nb\u2003</answer>", 1),
        ("<answer><think>a</think>b</answer>", 1),
        ("<answer>a</answer>x<answer>b</answer>", 1),  # the expression runs on to the last tag
        ("<think>a</think><answer>b</answer>", 0),
        ("<think></think><answer></answer>", 0),
        ("so <answer>b</answer>", 0),
        ("<answer>b</answer>\n", 0),
        (" <answer>b</answer>", 0),
        ("<answer>b", 0),
        ("b</answer>", 0),
        ("<answer>", 0),
        ("</answer>", 0),
        ("", 0),
    ],
)
def test_answer_format(text: str, value: float) -> None:
    assert rewards.answer_format(text) == value
    assert rewards.score("seg_zero_no_thinking", text, TARGET).components["answer_format"] == value
    assert not rewards.thinks("seg_zero_no_thinking")
    assert rewards.in_tags("seg_zero_no_thinking", text) == value


def test_a_perfect_answer_without_reasoning_earns_all_and_with_it_all_but_the_format() -> None:
    answer = f"<answer>{json.dumps(seg_zero())}</answer>"
    assert rewards.score("seg_zero_no_thinking", answer, TARGET).total == 5
    assert rewards.score("seg_zero_no_thinking", f"<think>a</think>{answer}", TARGET).total == 4


# Seg-Zero: the answer


@pytest.mark.parametrize("recipe", SEG_ZERO)
def test_the_first_braces_anywhere_are_the_answer(recipe: str) -> None:
    good = json.dumps(seg_zero())
    assert rewards.score(recipe, f"so {good} it is {{1}}", TARGET).total == 4  # all but the thinking format
    assert rewards.score(recipe, f"{{}} so {good}", TARGET).total == 4  # the expression asks for something inside
    assert rewards.score(recipe, f"{{1}} so {good}", TARGET).total == 0
    assert rewards.score(recipe, "{" + good, TARGET).total == 0
    assert rewards.score(recipe, good[:-1], TARGET).total == 0


@pytest.mark.parametrize("recipe", SEG_ZERO)
def test_the_single_quotes_of_the_prompts_own_example_earn_the_thinking_format_alone(recipe: str) -> None:
    score = rewards.score(recipe, respond(str(seg_zero())), TARGET)
    assert score.components == dict.fromkeys(rewards.component_names(recipe), 0.0) | {"thinking_format": 1.0}


@pytest.mark.parametrize(
    ("answer", "soft", "strict"),
    [
        ({"bbox": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4]}, 1, 1),
        ({"bbox": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4], "label": 1}, 1, 1),
        ({"points_2": [3, 4], "bbox": [1, 2, 3, 4], "points_1": [1, 2]}, 1, 1),
        ({"bbox": ["a", None, 3, 4], "points_1": [[], "b"], "points_2": [3, 4]}, 1, 1),
        ({"bbox": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4], "more": {}}, 0, 0),
        ({"My BBox": [1, 2, 3, 4], "PointA": [1, 2], "a point": [3, 4]}, 1, 0),
        ({"bbox_points": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4]}, 1, 0),
        ({"bbox_points": [1, 2, 3, 4], "points_1": [1, 2]}, 0, 0),
        ({"bbox": [1, 2, 3, 4], "bbox_point": [1, 2], "points_1": [3, 4]}, 1, 0),
        ({"bbox_a": [1, 2], "bbox": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4]}, 0, 1),
        ({"bbox": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4], "points_3": [1]}, 1, 1),
        ({"bbox": [1, 2, 3, 4], "points_0": [1], "points_1": [1, 2], "points_2": [3, 4]}, 0, 1),
        ({"bbox": "abcd", "points_1": "ab", "points_2": "cd"}, 1, 0),
        ({"bbox": [1, 2, 3], "points_1": [1, 2], "points_2": [3, 4]}, 0, 0),
        ({"bbox": 1234, "points_1": [1, 2], "points_2": [3, 4]}, 0, 0),
        ({"bbox": [1, 2, 3, 4], "points_1": [1, 2, 3], "points_2": [3, 4]}, 0, 0),
        ({"bbox": [1, 2, 3, 4], "points_1": [1, 2]}, 0, 0),
        ({"points_1": [1, 2], "points_2": [3, 4]}, 0, 0),
    ],
)
def test_seg_zero_segmentation_format(answer: dict, soft: float, strict: float) -> None:
    for recipe in ("seg_zero_soft", "seg_zero_soft_accuracy", "seg_zero_no_thinking"):
        assert components(recipe, answer)["segmentation_format"] == soft
    assert components("seg_zero_strict", answer)["segmentation_format"] == strict


def test_of_duplicate_keys_the_last_counts() -> None:
    answer = '{"bbox": [1], "points_1": [1,2], "points_2": [3,4], "bbox": [1,2,3,4]}'
    assert components("seg_zero_strict", answer)["segmentation_format"] == 1


# Seg-Zero: the box


@pytest.mark.parametrize("recipe", SEG_ZERO)
@pytest.mark.parametrize(
    ("box", "iou"),
    [
        (BOX, 1),
        ([100, 100, 199, 149], 0),  # 5000 / 10000: not above a half
        ([100, 100, 199, 150], 1),  # 5100 / 10000
        ([100, 100, 199, 149.5], 1),
        ([0, 100, 299, 199], 0),  # 10000 / 30000
        ([199, 199, 100, 100], 0),
        ([201, 100, 100, 199], 0),  # an area of -10000: the union is empty
        ([100, 100, 199, "199"], 0),
        ([100, 100, 199, None], 0),
        ([100, 100, 199], 0),
        ([100, 100, 199, 199, 0], 0),
        ([100, 100, 199, math.nan], 0),
        ([100, 100, math.inf, math.inf], 0),
        ([100, 100, 199, 10**400], 0),
        ("1234", 0),
        ({"0": 100, "1": 100, "2": 199, "3": 199}, 0),
    ],
)
def test_seg_zero_box_iou(recipe: str, box: object, iou: float) -> None:
    assert components(recipe, seg_zero(box))["box_iou"] == iou


def test_seg_zero_boxes_without_strict_overlap_share_nothing() -> None:
    flat = (10.0, 10.0, 10.0, 20.0)
    assert rewards.seg_zero_box_iou([10, 10, 10, 20], flat) == 0
    assert rewards.seg_zero_box_iou([9, 10, 11, 20], flat) == 0
    assert rewards.seg_zero_box_iou([0, 0, 10, 10], (10.0, 0.0, 20.0, 10.0)) == 0  # a shared edge column
    assert rewards.seg_zero_box_iou([0, 0, 11, 10], (10.0, 0.0, 20.0, 10.0)) == 22 / (132 + 121 - 22)


@pytest.mark.parametrize("recipe", SEG_ZERO)
@pytest.mark.parametrize(
    ("box", "near"),
    [
        ([109, 90, 209, 189], 1),  # 9 + 10 + 10 + 10 = 39: mean 9.75
        ([110, 90, 209, 189], 0),  # 40: mean 10
        ([139.9, 100, 199, 199], 1),
        ([100, 100, 199, 238], 1),
        ([100, 100, 199, True], 0),
        ([100, 100, 199, math.nan], 0),
        ([100, 100, 199, "199"], 0),
        ([100, 100, 199, -(10**400)], 0),
        ("abcd", 0),
    ],
)
def test_seg_zero_box_l1(recipe: str, box: object, near: float) -> None:
    assert components(recipe, seg_zero(box))["box_l1"] == near


def test_a_boolean_is_a_number_to_python() -> None:
    solution = "<box>(0,0),(1,1)</box><points>(0,0),(1,1)</points>"
    answer = seg_zero([False, False, True, True], [False, False], [True, True])
    assert rewards.score("seg_zero_strict", respond(answer), solution).total == 5


def test_soft_takes_the_first_bbox_key_and_strict_the_key_bbox() -> None:
    answer = {"bbox_2d": BOX, "bbox": [0, 0, 1, 1], "points_1": [120, 120], "points_2": [180, 180]}
    soft, strict = components("seg_zero_soft", answer), components("seg_zero_strict", answer)
    assert (soft["box_iou"], soft["box_l1"], soft["point_l1"]) == (1, 1, 1)
    assert (strict["box_iou"], strict["box_l1"], strict["point_l1"]) == (0, 0, 0)


# Seg-Zero: the points

FAR = "<box>(0,0),(800,800)</box><points>(100,400),(700,400)</points>"


@pytest.mark.parametrize("recipe", SEG_ZERO)
@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([100, 400], [700, 400], 1),
        ([700, 400], [100, 400], 1),  # the other pairing
        ([160, 480], [640, 480], 0),  # 100 and 100
        ([160, 480], [640, 479], 1),  # 100 and 99.2
        ([640, 479], [160, 480], 1),
        ([100, 400], [500, 400], 0),  # 0 and 200
        ([100, 400], [501, 400], 1),
        ([100, 400], [100, 400], 0),  # 0 and 600
        ([100.9, 400.9], [700, 400], 1),
        (["100", " 400 "], [700, 400, "further"], 1),  # int() reads text, and nobody looks past the second
        ([100, 400], ["700", "4e2"], 0),
        ([100, 400], [700, "4" * 5000], 0),
        ([100, 400], [700, None], 0),
        ([100, 400], [700, [400]], 0),
        ([100, 400], [700, math.nan], 0),
        ([100, 400], [700, math.inf], 0),
        ([100, 400], [700], 0),
        ([100, 400], {"0": 700, "1": 400}, 0),
        ([100, 400], 700, 0),
        ([100, 400], [10**400, 400], 0),
    ],
)
def test_seg_zero_point_l1(recipe: str, first: object, second: object, value: float) -> None:
    assert components(recipe, seg_zero([0, 0, 800, 800], first, second), FAR)["point_l1"] == value


@pytest.mark.parametrize("recipe", SEG_ZERO)
@pytest.mark.parametrize(
    ("box", "first", "value"),
    [
        ([100, 100, 180, 180], [100, 120], 1),  # edges included
        ([100, 100, 180, 180], [99, 120], 0),
        ([100, 100, 180, 180], [99.9, 120], 0),  # cast to 99
        ([100, 100, 180, 180], [180.9, 120], 1),  # cast to 180
        ([100, 100, 180, 179], [120, 120], 0),  # the other point is outside
        ([100, 100, 180.5, 10**400], [120, 120], 1),
        ([100, 100, 10**400, 10**400], [10**400, 10**400], 0),  # a distance that no float holds
        ([-math.inf, -math.inf, math.inf, math.inf], [120, 120], 1),
        ([100, 100, 180, math.nan], [120, 120], 0),
        ([100, 100, 180, "180"], [120, 120], 0),
        ([100, 100, 180], [120, 120], 0),
        ("abcd", [120, 120], 0),
    ],
)
def test_seg_zero_points_must_lie_in_the_predicted_box(recipe: str, box: object, first: object, value: float) -> None:
    assert components(recipe, seg_zero(box, first))["point_l1"] == value


def test_text_of_two_digits_is_a_point_of_two_digits() -> None:
    solution = "<box>(0,0),(9,9)</box><points>(3,5),(7,8)</points>"
    assert components("seg_zero_soft", seg_zero([0, 0, 9, 9], "35", "78"), solution)["point_l1"] == 1


def test_soft_point_keys_hold_points_and_may_be_the_box_itself() -> None:
    named_point = {"bbox": BOX, "point_1": [120, 120], "point_2": [180, 180]}
    found = components("seg_zero_soft", named_point)
    assert (found["segmentation_format"], found["point_l1"]) == (1, 0)
    # The box's own corner is taken for the first point: 28.3 px from its target, while the last point is not read.
    boxed = {"bbox_points": BOX, "points_1": [180, 180], "points_2": [0, 0]}
    found = components("seg_zero_soft", boxed)
    assert (found["segmentation_format"], found["point_l1"]) == (1, 1)


# seg_zero_soft_accuracy


@pytest.mark.parametrize(
    ("box", "iou", "l1"),
    [
        (BOX, 1, 1),
        ([100, 100, 199, 149], 5000 / 10000, 1 - 12.5 / 840),
        ([0, 100, 299, 199], 10000 / 30000, 1 - 50 / 840),
        ([100, 100, 199, 103], 400 / 10000, 1 - 24 / 840),
        ([199, 199, 100, 100], 0, 1 - 99 / 840),  # turned inside out
        ([201, 100, 100, 199], 0, 1 - 50 / 840),  # an area of -10000: the union is empty
        ([201, 100, 99, 299], 0, 1 - 75.25 / 840),  # a union below 0
        ([1000, 1000, 1100, 1100], 0, 0),  # 900, 900, 901 and 901 px
        ([940, 940, 1039, 1039], 0, 0),  # 840 px
        ([939, 940, 1039, 1039], 0, 0.25 / 840),
        ([100, 100, 199, math.nan], 0, 0),
        ([100, 100, math.inf, math.inf], 0, 0),
        ([100, 100, math.inf, 99], 0, 0),  # an area of infinity times 0
        ([-math.inf, -math.inf, math.inf, math.inf], 0, 0),
        ([100, 100, 199, 10**400], 0, 0),
        ([100, 100, 199, 1e308], 1e4 / 1e310, 0),
        ([100, 100, 199, "199"], 0, 0),
        ([100, 100, 199], 0, 0),
        ("1234", 0, 0),
    ],
)
def test_soft_accuracy_of_a_box_is_its_iou_and_its_nearness(box: object, iou: float, l1: float) -> None:
    found = components("seg_zero_soft_accuracy", seg_zero(box))
    assert found["box_iou"] == pytest.approx(iou, abs=1e-12)
    assert found["box_l1"] == pytest.approx(l1, abs=1e-12)
    # Minus zero is written down with its sign.
    assert all(math.copysign(1, value) == 1 for value in found.values())


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([100, 400], [700, 400], 1),
        ([700, 400], [100, 400], 1),  # the other pairing
        ([160, 480], [640, 480], 1 - 100 / 840),
        ([100, 400], [500, 400], 1 - 100 / 840),  # 0 and 200
        ([100, 400], [100, 400], 1 - 300 / 840),  # 0 and 600
        ([100.9, 400.9], [700, 400], 1),  # cast to int
        ([100, 400], [801, 400], 0),  # outside the predicted box
        ([100, 400], [800, 400], 1 - 50 / 840),  # edges included
        ([100, 400], [700, math.nan], 0),
        ([100, 400], [700, math.inf], 0),
        ([100, 400], [10**400, 400], 0),
        ([100, 400], [700], 0),
        ([100, 400], 700, 0),
    ],
)
def test_soft_accuracy_of_points_is_their_nearness_inside_the_predicted_box(
    first: object, second: object, value: float
) -> None:
    found = components("seg_zero_soft_accuracy", seg_zero([0, 0, 800, 800], first, second), FAR)
    assert found["point_l1"] == pytest.approx(value, abs=1e-12)


def test_soft_accuracy_of_points_farther_than_the_frame_is_zero_in_a_box_of_any_size() -> None:
    for far in (940, 941, 10**6, 10**12, 10**400):
        answer = seg_zero([0, 0, 10**500, 10**500], [100, 400 + far], [700, 400 + far])
        assert components("seg_zero_soft_accuracy", answer, FAR)["point_l1"] == 0
    answer = seg_zero([-math.inf, -math.inf, math.inf, math.inf], [100, 820], [700, 820])
    assert components("seg_zero_soft_accuracy", answer, FAR)["point_l1"] == pytest.approx(1 - 420 / 840)


# VisionReasoner: format

LISTED = '[{"bbox_2d": [100,100,199,199], "point_2d": [150,150]}]'


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ([item(BOX, [1, 2])], 2),
        ([item(BOX, [1, 2]), item(BOX, [1])], 1.5),
        ([item(BOX, [1, 2]), {}], 1),
        ([item("abcd", "ab")], 0),
        ([item([None] * 4, ["a", {}])], 2),
        ([{"bbox_2d": BOX}, {"point_2d": [1, 2]}], 1),
        ([{"bbox": BOX, "point": [1, 2]}], 0),
        ([item(BOX, [1, 2]), 7, item(BOX, [1, 2])], 2 / 3),  # the 7 raises: what came before keeps its share
        ([item(BOX, [1, 2]), None, item(BOX, [1, 2]), item(BOX, [1, 2])], 0.5),
        ([item(BOX, [1, 2]), "a bbox_2d", item(BOX, [1, 2])], 2 / 3),
        ([item(BOX, [1, 2]), ["point_2d"], item(BOX, [1, 2])], 2 / 3),
        ([item(BOX, [1, 2]), "a box", ["x"], item(BOX, [1, 2])], 1),  # these only count nothing
        ([7, item(BOX, [1, 2])], 0),
        ([], 0),
        (item(BOX, [1, 2]), 0),
        ("7", 0),
        ("null", 0),
        ('"bbox_2d"', 0),
        ("[{'bbox_2d': [1,2,3,4], 'point_2d': [1,2]}]", 0),
        ("", 0),
    ],
)
def test_list_segmentation_format(answer: object, value: float) -> None:
    found = components("vision_reasoner", answer, LISTED)["segmentation_format"]
    assert found == pytest.approx(value, abs=1e-12)
    assert found <= 2


def test_the_first_tags_hold_the_answer() -> None:
    def total(text: str) -> float:
        found = rewards.score("vision_reasoner", text, LISTED).components
        return found["segmentation_format"] + found["accuracy"]

    assert total(f"<answer>{LISTED}</answer>") == 5
    assert total(f"<answer>\n\u2003\x1c{LISTED} \n</answer>") == 5
    assert total(f"<answer>{LISTED}</answer><answer>?</answer>") == 5
    assert total(f"<answer>?</answer><answer>{LISTED}</answer>") == 0
    assert total(f"</answer><answer>{LISTED}</answer>") == 5
    assert total(f"<answer>{LISTED}") == 0
    assert total(LISTED) == 0
    assert total(f"<answer>\ufeff{LISTED}</answer>") == 0


# VisionReasoner: accuracy


@pytest.mark.parametrize(
    ("box", "point", "value"),
    [
        (BOX, [150, 150], 3),
        (BOX, [179, 150], 3),  # 29 px away
        (BOX, [180, 150], 2),  # 30 px
        (BOX, [168, 174], 2),  # 18, 24: 30 px
        (BOX, [168, 173.9], 3),
        ([100, 100, 199, 149], [150, 149], 1),  # IoU 0.5, mean difference 12.5
        ([100, 100, 199, 150], [150, 150], 2),  # IoU 0.51
        ([100, 100, 199, 160], [150, 150], 3),  # mean difference 9.75
        ([100, 100, 199, 149], [150, 150], 0),  # one below its own box
        ([100, 100, 199, 150], [150, 151], 1),
        ([140, 140, 160, 160], [150, 150], 1),
        ([140, 140, 160, 160], [139, 150], 0),
        ([140, 140, 160, 160], [140, 160], 1),  # edges included
        ([199, 199, 100, 100], [150, 150], 0),
        ([201, 100, 100, 199], [150, 150], 0),  # an area of -10000: the union is empty
        ([100, 100, math.inf, math.inf], [150, 150], 1),
        ([100, 100, math.nan, 199], [150, 150], 0),
        ([100, 100, 199, 199], [150, math.nan], 2),
        ([100, 100, 199, 2**63], [150, 150], 1),
        ([100, 100, 199, 10**300], [150, 150], 1),
        ([100, 100, 199, 199], [150, 2**63], 2),
        ([100, 100, 199, 199], [150, 2**64], 0),  # no root of an integer beyond 64 bits: all is lost
        ([100, 100, 199, 10**400], [150, 150], 0),
        ([100, 100, 199, "199"], [150, 150], 0),
        ([100, 100, 199, None], [150, 150], 0),
        ([100, 100, 199, [199]], [150, 150], 0),
        ([100, 100, 199, 199], [150, 150, 150], 0),
        ([100, 100, 199], [150, 150], 0),
        ([], [], 0),
        ("1234", [150, 150], 0),
    ],
)
def test_accuracy_of_one_object(box: object, point: object, value: float) -> None:
    assert components("vision_reasoner", [item(box, point)], LISTED)["accuracy"] == value


def test_vision_reasoner_areas_are_inclusive_throughout() -> None:
    flat = '[{"bbox_2d": [10,10,10,20], "point_2d": [10,15]}]'
    # No strict overlap, yet the same 1 x 11 pixels: IoU 1 here, where Seg-Zero's is 0.
    assert components("vision_reasoner", [item([10, 10, 10, 20], [10, 15])], flat)["accuracy"] == 3
    # 2 x 11 of 3 x 11 pixels and a mean difference of 0.25: IoU 2/3.
    wide = '[{"bbox_2d": [10,10,12,20], "point_2d": [90,90]}]'
    assert components("vision_reasoner", [item([10, 10, 11, 20], [10, 15])], wide)["accuracy"] == 2


def test_booleans_are_points_but_not_boxes() -> None:
    unit = '[{"bbox_2d": [0,0,1,1], "point_2d": [0,1]}]'
    assert components("vision_reasoner", [item([0, 0, 1, 1], [False, True])], unit)["accuracy"] == 3
    assert components("vision_reasoner", [item([0, False, True, 1], [0, 1])], unit)["accuracy"] == 3
    # An array of booleans alone cannot be subtracted.
    assert components("vision_reasoner", [item([False, False, True, True], [0, 1])], unit)["accuracy"] == 0


A, B, C = ([100, 100, 199, 199], [150, 150]), ([300, 300, 399, 399], [350, 350]), ([600, 0, 699, 99], [650, 50])


@pytest.mark.parametrize(
    ("predicted", "targets", "value"),
    [
        ([A, B], [A, B], 3),
        ([B, A], [A, B], 3),
        ([A], [A, B], 1.5),
        ([A, B, C], [A], 1),
        ([A, A, A], [A], 1),
        ([A, A], [A, B], 1.5),
        ([C], [A, B], 0),
        ([A, (B[0], C[1])], [A, B], 2.5),  # the wrong point costs one of six
        ([], [A], 0),
        ([A], [], 0),
        ([], [], 0),  # upstream's empty arrays raise
    ],
)
def test_accuracy_is_shared_over_the_larger_side(predicted: list, targets: list, value: float) -> None:
    answer, solution = ([item(*o) for o in side] for side in (predicted, targets))
    assert components("vision_reasoner", answer, json.dumps(solution))["accuracy"] == value


def test_the_matching_is_the_best_one_not_the_first() -> None:
    # The first prediction earns 3 with either target, the second only with the first target.
    near = ([102, 100, 201, 199], [152, 150])
    targets = json.dumps([item(*A), item(*near)])
    only_a = ([60, 100, 199, 199], [135, 150])  # IoU with A 0.71, mean difference 10; point 15 from A, 17 from near
    answer = [item(*A), item(*only_a)]
    assert components("vision_reasoner", answer, targets)["accuracy"] == (3 + 2) / 2


def test_one_bad_item_loses_the_accuracy_of_all() -> None:
    for bad in ({"bbox_2d": BOX}, {"point_2d": [1, 2]}, 7, None, "a", [], item(BOX, 5)):
        found = components("vision_reasoner", [item(*A), bad], json.dumps([item(*A)]))
        assert found["accuracy"] == 0


def test_each_side_is_cut_to_120_objects() -> None:
    grid = [item([x, y, x + 9, y + 9], [x + 5, y + 5]) for x in range(0, 480, 40) for y in range(0, 480, 40)]
    first, rest = grid[:120], grid[120:]
    solution = json.dumps(first)
    assert components("vision_reasoner", first, solution)["accuracy"] == 3
    assert components("vision_reasoner", first + rest, solution)["accuracy"] == 3
    assert components("vision_reasoner", first, json.dumps(first + rest))["accuracy"] == 3
    assert components("vision_reasoner", rest + first, solution)["accuracy"] == pytest.approx(3 * (120 - 24) / 120)
    assert components("vision_reasoner", [*first, item("cut", "off")], solution)["accuracy"] == 3
    assert components("vision_reasoner", [*first, {}], solution)["accuracy"] == 0  # keys are read before the cut


# VisionReasoner: non_repeat


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 1),
        ("a. b. c.", 1),
        ("a. a. b.", 1),  # seen once again
        ("a. a. a", 0),
        ("a. b. a. c. b", 0),
        ("a.a . a", 0),  # white space around a sentence does not count
        ("a. A. a", 1),
        ("... . .  .", 1),  # empty sentences do not count
        ("0.5, 0.5, 0.5", 1),  # "0", "5, 0", "5, 0", "5"
        ("a! a! a! a!", 1),
    ],
)
def test_non_repeat(text: str, value: float) -> None:
    assert rewards.score("vision_reasoner", text, LISTED).components["non_repeat"] == value


# The mask IoU


@pytest.mark.parametrize(
    ("iou", "threshold", "tiered"),
    [(0.0, 0, 0), (0.5, 0, 0), (0.51, 1, 2), (0.7, 1, 2), (0.71, 1, 3), (0.8, 1, 3), (0.81, 1, 4), (1.0, 1, 4)],
)
def test_mask_iou_forms(iou: float, threshold: float, tiered: float) -> None:
    assert rewards.mask_component(iou, "raw") == iou
    assert rewards.mask_component(iou, "threshold") == threshold
    assert rewards.mask_component(iou, "tiered") == tiered
    assert rewards.score("sam_r1", respond(LISTED), LISTED, iou).components["mask_iou"] == tiered
    weighted = rewards.score("vision_reasoner", respond(LISTED), LISTED, iou, 2.5, "tiered")
    assert weighted.components["mask_iou"] == tiered
    assert weighted.total == 7 + 2.5 * tiered


@pytest.mark.parametrize("weight_and_mode", [(0.0, "raw"), (3.0, "raw"), (3.0, "threshold")])
def test_sam_r1_keeps_its_own_mask_iou(weight_and_mode: tuple[float, str]) -> None:
    weight, mode = weight_and_mode
    score = rewards.score("sam_r1", respond(LISTED), LISTED, 0.75, weight, mode)
    assert score.components == {"thinking_format": 1, "segmentation_format": 1, "mask_iou": 3}
    assert score.total == 5
    assert rewards.maximum("sam_r1", weight, mode) == 6


@pytest.mark.parametrize(
    ("answer", "value"),
    [(LISTED, 1), (json.dumps(seg_zero()), 1), ("[]", 1), ("?", 0), (str(seg_zero()), 0), ('[{"bbox_2d": [1]}]', 0)],
)
def test_sam_r1_format_is_an_answer_the_segmenter_understands(answer: str, value: float) -> None:
    assert rewards.score("sam_r1", respond(answer), LISTED, 0.0).components["segmentation_format"] == value


def test_a_missing_mask_score_is_never_a_zero() -> None:
    for recipe, weight in (("sam_r1", 0.0), ("vision_reasoner", 0.5), ("seg_zero_soft", 1e-9)):
        with pytest.raises(ValueError, match="mask_iou is missing"):
            rewards.score(recipe, respond(LISTED), LISTED, None, weight)


def test_an_unweighted_mask_iou_is_left_out() -> None:
    assert "mask_iou" not in rewards.score("vision_reasoner", respond(LISTED), LISTED, 0.9).components


@pytest.mark.parametrize("iou", [-0.01, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("mode", ["raw", "threshold", "tiered"])
def test_a_mask_iou_outside_its_range_is_an_error(iou: float, mode: str) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        rewards.score("seg_zero_soft", "", TARGET, iou, 1.0, mode)


# Totals, names, and what the caller got wrong

MAXIMA = {
    **dict.fromkeys(("seg_zero_soft", "seg_zero_strict", "seg_zero_soft_accuracy", "seg_zero_no_thinking"), 5),
    **{"vision_reasoner": 7, "sam_r1": 6},
}


def test_maxima_and_names() -> None:
    assert {recipe: rewards.maximum(recipe) for recipe in rewards.RECIPES} == MAXIMA
    assert rewards.maximum("vision_reasoner", 0.5, "tiered") == 9
    assert rewards.maximum("seg_zero_soft", 0.5, "threshold") == 5.5
    assert rewards.component_names("vision_reasoner") == (
        "thinking_format",
        "segmentation_format",
        "accuracy",
        "non_repeat",
    )
    assert rewards.component_names("sam_r1") == ("thinking_format", "segmentation_format", "mask_iou")
    for recipe, weight in itertools.product(rewards.RECIPES, (0.0, 1.0)):
        found = rewards.score(recipe, "", TARGET, 0.5, weight).components
        assert tuple(found) == rewards.component_names(recipe, weight > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("grpo", "", TARGET),
            "recipe 'grpo': expected one of seg_zero_soft, seg_zero_strict, seg_zero_soft_accuracy, "
            "seg_zero_no_thinking, vision_reasoner, sam_r1",
        ),
        (("sam_r1", "", TARGET, 0.5, 0.0, "soft"), "mask_iou_mode='soft': expected one of raw, threshold, tiered"),
        (("seg_zero_soft", "", TARGET, 0.5, -1.0), "mask_iou_weight=-1.0: expected"),
        (("seg_zero_soft", "", TARGET, 0.5, math.nan), "mask_iou_weight=nan: expected"),
        (("seg_zero_soft", "", TARGET, 0.5, math.inf), "mask_iou_weight=inf: expected"),
        (("seg_zero_soft", "", "[]"), "exactly one object, got 0"),
        (("seg_zero_strict", "", json.dumps([item(*A), item(*B)])), "exactly one object, got 2"),
        (("seg_zero_soft_accuracy", "", "[]"), "exactly one object, got 0"),
        (("seg_zero_no_thinking", "", "[]"), "exactly one object, got 0"),
    ],
)
def test_the_callers_mistakes_raise(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.score(*arguments)


@pytest.mark.parametrize("recipe", list(rewards.RECIPES))
@pytest.mark.parametrize("solution", ["", "{}", "[1]", '[{"bbox_2d": [1,2,3,4]}]', "<box>(1,2),(3,4)</box>"])
def test_a_malformed_solution_is_not_a_zero(recipe: str, solution: str) -> None:
    with pytest.raises(ValueError, match=r"^solution: "):
        rewards.score(recipe, respond(LISTED), solution, 0.5)


def test_recipes_take_the_other_form_of_solution() -> None:
    # One target point stands for both of Seg-Zero's; the first of two is VisionReasoner's.
    answer = seg_zero(BOX, [150, 150], [150, 150])
    assert rewards.score("seg_zero_strict", respond(answer), LISTED).total == 5
    assert components("seg_zero_strict", seg_zero(BOX, [100, 100], [199, 199]), LISTED)["point_l1"] == 1
    listed = [item(BOX, [120, 120])]
    assert rewards.score("vision_reasoner", respond(listed), TARGET).total == 7


# Properties

coordinates = st.integers(0, 840)


@st.composite
def perfect_objects(draw: st.DrawFn, points: int) -> ObjectPrompt:
    x1, y1 = draw(coordinates), draw(coordinates)
    x2, y2 = draw(st.integers(x1 + 1, x1 + 400)), draw(st.integers(y1 + 1, y1 + 400))
    inside = st.tuples(st.integers(x1, x2), st.integers(y1, y2))
    return ObjectPrompt(box=(x1, y1, x2, y2), points=tuple(draw(inside) for _ in range(points)))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 300)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["12", "bbox_2d", "point_2d"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.sampled_from(["bbox_2d", "point_2d", "bbox", "points_1", "points_2", "x"]), inner)
    ),
    max_leaves=25,
)
numbers = st.integers(0, 400) | st.floats(0, 400) | st.sampled_from([math.nan, math.inf, -math.inf, 2**64, True, "5"])
near_objects = st.lists(
    st.fixed_dictionaries(
        {"bbox_2d": st.lists(numbers, min_size=4, max_size=4), "point_2d": st.lists(numbers, min_size=2, max_size=2)}
    ),
    max_size=4,
)
near_seg_zero = st.fixed_dictionaries(
    {
        "bbox": st.lists(numbers, min_size=4, max_size=4),
        "points_1": st.lists(numbers, min_size=2, max_size=2),
        "points_2": st.lists(numbers, min_size=2, max_size=2),
    }
)
fragments = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "{", "}", "[", "]", '"bbox"', ":", "1", ".", " "])
    | st.text(max_size=5)
).map("".join)
texts = st.text() | fragments | st.builds(respond, json_values | near_objects | near_seg_zero, fragments)


@pytest.mark.parametrize("recipe", list(rewards.RECIPES))
@given(text=texts, iou=st.floats(0, 1), weight=st.floats(0, 10), mode=st.sampled_from(["raw", "threshold", "tiered"]))
def test_any_text_scores_between_zero_and_the_maximum(
    recipe: str, text: str, iou: float, weight: float, mode: str
) -> None:
    for solution in (TARGET, LISTED):
        score = rewards.score(recipe, text, solution, iou, weight, mode)
        assert 0 <= score.total <= rewards.maximum(recipe, weight, mode)
        caps = dict(rewards.RECIPES[recipe].maxima) | {"mask_iou": 4.0}
        assert all(type(value) is float and 0 <= value <= caps[name] for name, value in score.components.items())
        assert rewards.score(recipe, text, solution, iou, weight, mode) == score


@pytest.mark.parametrize("recipe", list(rewards.RECIPES))
@pytest.mark.parametrize(
    "text",
    [
        "{" * 10_000 + "}",
        '{"bbox":' + "[" * 100_000 + "}",
        f"<answer>{'[' * 100_000}</answer>",
        f'<answer>[{{"bbox_2d": {"[" * 900}{"]" * 900}}}]</answer>',
        f"<answer>{'9' * 5000}</answer>",
        '{"bbox": ' + "9" * 5000 + "}",
        "<answer>\ud800</answer>",
        '<answer>[{"bbox_2d": [1,2,3,4], "point_2d": [1,2], "\ud800": "\\ud800"}]</answer>\x00',
    ],
)
def test_what_json_refuses_or_barely_takes_does_not_raise(recipe: str, text: str) -> None:
    assert 0 <= rewards.score(recipe, text, TARGET, 1.0, 1.0).total <= rewards.maximum(recipe, 1.0)


@pytest.mark.parametrize("recipe", [*SEG_ZERO, "seg_zero_soft_accuracy"])
@given(target=perfect_objects(points=2))
def test_a_perfect_seg_zero_answer_scores_the_maximum(recipe: str, target: ObjectPrompt) -> None:
    answer = {"bbox": target.box, "points_1": target.points[1], "points_2": target.points[0]}
    assert rewards.score(recipe, respond(answer), seg_zero_solution_text(target)).total == rewards.maximum(recipe)


@pytest.mark.parametrize("recipe", ["vision_reasoner", "sam_r1"])
@given(targets=st.lists(perfect_objects(points=1), min_size=1, max_size=8), order=st.randoms(use_true_random=False))
def test_a_perfect_list_answer_scores_the_maximum(
    recipe: str, targets: list[ObjectPrompt], order: random.Random
) -> None:
    shuffled = order.sample(targets, len(targets))
    score = rewards.score(recipe, respond(solution_text(shuffled)), solution_text(targets), 1.0, 0.5, "raw")
    assert score.total == rewards.maximum(recipe, 0.5, "raw")


def pair_reward(predicted: dict, target: dict) -> int:
    """The table's words for one pair, number by number."""
    p, t, (px, py), (tx, ty) = predicted["bbox_2d"], target["bbox_2d"], predicted["point_2d"], target["point_2d"]
    width = max(0, min(p[2], t[2]) - max(p[0], t[0]) + 1)
    height = max(0, min(p[3], t[3]) - max(p[1], t[1]) + 1)
    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (p, t)]
    union = sum(areas) - width * height
    overlap = union != 0 and width * height / union > 0.5
    near = sum(abs(a - b) for a, b in zip(p, t, strict=True)) / 4 < 10
    inside = p[0] <= px <= p[2] and p[1] <= py <= p[3]
    return overlap + near + (inside and math.dist((px, py), (tx, ty)) < 30)


small = st.sampled_from([10, 12, 20, 25, 30, 45, 60, 90])
small_objects = st.lists(
    st.builds(item, st.lists(small, min_size=4, max_size=4), st.lists(small, min_size=2, max_size=2)),
    min_size=1,
    max_size=4,
)


@given(predicted=small_objects, targets=small_objects, order=st.randoms(use_true_random=False))
def test_accuracy_is_the_best_of_all_pairings_in_any_order(
    predicted: list[dict], targets: list[dict], order: random.Random
) -> None:
    few, many = sorted((predicted, targets), key=len)
    best = max(
        sum(pair_reward(a, b) if few is predicted else pair_reward(b, a) for a, b in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(many, len(few))
    )
    found = components("vision_reasoner", predicted, json.dumps(targets))["accuracy"]
    assert found == pytest.approx(best / len(many))
    shuffled = order.sample(predicted, len(predicted)), order.sample(targets, len(targets))
    assert components("vision_reasoner", shuffled[0], json.dumps(shuffled[1]))["accuracy"] == found


@given(answer=near_seg_zero)
def test_seg_zero_does_not_mind_the_order_of_the_two_points(answer: dict) -> None:
    swapped = answer | {"points_1": answer["points_2"], "points_2": answer["points_1"]}
    for recipe in SEG_ZERO:
        assert components(recipe, answer) == components(recipe, swapped)


@given(text=texts)
def test_answer_format_is_the_expression(text: str) -> None:
    for given_text in (text, f"<answer>{text}</answer>"):
        found = re.fullmatch(r"<answer>.*?</answer>", given_text, re.DOTALL) is not None
        assert rewards.answer_format(given_text) == found


@given(answer=near_seg_zero | json_values)
def test_without_reasoning_all_else_is_the_soft_recipes(answer: object) -> None:
    text = f"<answer>{json.dumps(answer)}</answer>"
    bare, soft = (rewards.score(name, text, TARGET).components for name in ("seg_zero_no_thinking", "seg_zero_soft"))
    assert bare.pop("answer_format") == 1
    assert soft.pop("thinking_format") == 0
    assert bare == soft


@given(answer=near_seg_zero)
def test_what_hard_accuracy_takes_soft_accuracy_grades(answer: dict) -> None:
    hard, soft = components("seg_zero_soft", answer), components("seg_zero_soft_accuracy", answer)
    least = {"box_iou": 0.5, "box_l1": 1 - 10 / 840, "point_l1": 1 - 100 / 840}
    for name, bound in least.items():
        assert hard[name] == (soft[name] > bound) or soft[name] == pytest.approx(bound, abs=1e-12)
    for name in ("thinking_format", "segmentation_format"):
        assert hard[name] == soft[name]


# Speed


def test_scoring_takes_linear_time() -> None:
    # The published expressions take minutes for some of these.
    started = time.perf_counter()
    for text in (
        "{" * 100_000,
        "<answer>" + " " * 100_000 + "x",
        "<think>" + "</think> <answer></answer>" * 10_000 + "x</answer>",
        "<think>" + "</think>" + " " * 100_000 + "</answer>",
    ):
        for recipe in rewards.RECIPES:
            rewards.score(recipe, text, TARGET, 0.5)
    assert time.perf_counter() - started < 5


def test_thirty_objects_take_about_a_millisecond() -> None:
    objects = [item([20 * i, 10 * i, 20 * i + 60, 10 * i + 50], [20 * i + 30, 10 * i + 20]) for i in range(30)]
    text, solution = respond(objects), json.dumps(objects[::-1])
    assert answers.read_answer(text)
    durations = []
    for _ in range(50):
        started = time.perf_counter()
        rewards.score("vision_reasoner", text, solution)
        durations.append(time.perf_counter() - started)
    assert min(durations) < 3e-3
