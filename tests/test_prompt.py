"""Questions to the letter, solutions both ways, and a parser of answers that is strict and never raises."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax.config import ConfigError
from segzero_jax.prompt import (
    Answer,
    parse_answer,
    parse_solution,
    question_text,
    seg_zero_solution_text,
    solution_text,
)
from segzero_jax.types import ObjectPrompt

pixels = st.integers(0, 840)
pairs = st.tuples(pixels, pixels)
boxes = st.tuples(pixels, pixels, pixels, pixels)


def objects_with(points: int) -> st.SearchStrategy[ObjectPrompt]:
    return st.builds(ObjectPrompt, box=boxes, points=st.tuples(*[pairs] * points))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["bbox_2d", "point_2d", "bbox", "points_1", "points_2"]), inner)
    ),
    max_leaves=15,
)


def test_seg_zero_question_is_the_one_its_checkpoint_knows() -> None:
    assert question_text("seg_zero", "The Red Cup.") == (
        "Please find 'the red cup' with bbox and points.Compare the difference between objects and find the most "
        "closely matched one.Output the thinking process in <think> </think> and final answer in <answer> </answer> "
        "tags.Output the one bbox and points of two largest inscribed circles inside the interested object in JSON "
        "format.i.e., <think> thinking process here </think><answer>{'bbox': [10,100,200,210], 'points_1': [30,110], "
        "'points_2': [35,180]}</answer>"
    )


def test_vision_reasoner_question_is_the_one_its_checkpoint_knows() -> None:
    assert question_text("vision_reasoner", "The Red Cup.") == (
        'Please find "the red cup" with bboxs and points.Compare the difference between object(s) and find the most '
        "closely matched object(s).Output the thinking process in <think> </think> and final answer in <answer> "
        "</answer> tags.Output the bbox(es) and point(s) inside the interested object(s) in JSON format.i.e., <think> "
        'thinking process here </think><answer>[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": '
        '[225,296,706,786], "point_2d": [302,410]}]</answer>'
    )


@pytest.mark.parametrize(
    ("question", "asked"),
    [("A.", "a"), ("..What? .", "what? "), ("e.g. {x} {question}", "e.g. {x} {question}"), ("", "")],
)
def test_a_question_is_lower_cased_and_loses_outer_full_stops_only(question: str, asked: str) -> None:
    assert question_text("toy", question) == f'Find "{asked}".'


def test_an_unknown_wording_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^sam: expected toy, seg_zero, vision_reasoner or a text with"):
        question_text("sam", "x")


def test_a_wording_of_ones_own_is_asked_to_the_letter() -> None:
    wording = 'Wo ist "{question}"?\nJSON: {"bbox_2d": [1,2,3,4]} {question}'
    assert question_text(wording, "The {question}.") == (
        'Wo ist "the {question}"?\nJSON: {"bbox_2d": [1,2,3,4]} the {question}'
    )


def test_solution_text_is_spaced_as_in_the_prompt() -> None:
    first = ObjectPrompt(box=(9.6, 100.2, 200, 210), points=((30, 110), (1, 1)))
    second = ObjectPrompt(box=(225, 296, 706, 786), points=((302, 410),))
    assert solution_text([first, second]) == (
        '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]'
    )
    assert solution_text([]) == "[]"


def test_seg_zero_solution_text_is_the_data_set_form() -> None:
    target = ObjectPrompt(box=(10, 100, 200, 210), points=((30, 110), (35.4, 180)))
    assert seg_zero_solution_text(target) == "<box>(10,100),(200,210)</box><points>(30,110),(35,180)</points>"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ObjectPrompt(box=(1, 2, 3, 4), points=()), "a point for every object"),
        (ObjectPrompt(box=(1, 2, 3, float("nan")), points=((1, 1),)), "finite"),
        (ObjectPrompt(box=(1, 2, 3, float("inf")), points=((1, 1),)), "finite"),
    ],
)
def test_solution_text_refuses_what_it_cannot_write(target: ObjectPrompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solution_text([target])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ObjectPrompt(box=(1, 2, 3, 4), points=((1, 1),)), "two points"),
        (ObjectPrompt(box=(-1, 2, 3, 4), points=((1, 1), (2, 2))), "below 0"),
        (ObjectPrompt(box=(1, 2, 3, 4), points=((1, 1), (2, -2))), "below 0"),
    ],
)
def test_seg_zero_solution_text_refuses_what_its_form_cannot_say(target: ObjectPrompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seg_zero_solution_text(target)


@given(st.lists(objects_with(1), max_size=5))
def test_a_list_solution_reads_back(objects: list[ObjectPrompt]) -> None:
    assert parse_solution(solution_text(objects)) == tuple(objects)


@given(objects_with(2))
def test_a_seg_zero_solution_reads_back(target: ObjectPrompt) -> None:
    assert parse_solution(seg_zero_solution_text(target)) == (target,)


@given(st.lists(objects_with(1), max_size=5))
def test_a_response_with_a_solution_in_it_asks_for_its_objects(objects: list[ObjectPrompt]) -> None:
    text = f"<think>\nlook</think>\n<answer>\n{solution_text(objects)} </answer>"
    assert parse_answer(text) == Answer(thinking="\nlook", objects=tuple(objects), readable=True)


@pytest.mark.parametrize(
    "solution",
    [
        "",
        "a cat",
        "{}",
        "null",
        '{"bbox_2d": [1,2,3,4], "point_2d": [1,2]}',
        '[{"bbox_2d": [1,2,3,4]}]',
        '[{"bbox_2d": [1,2,3], "point_2d": [1,2]}]',
        '[{"bbox_2d": [1,2,3,NaN], "point_2d": [1,2]}]',
        '[{"bbox_2d": [1,2,3,true], "point_2d": [1,2]}]',
        '[{"bbox_2d": [1,2,3,4], "point_2d": [1,"2"]}]',
        "[[1,2,3,4]]",
        "[" * 100_000,
        "<box>(1,2),(3,4)</box>",
        "<box>(1,2),(3,4)</box><points>(1,2)</points>",
        "<box>(1,2),(3,4)</box><points>(1,2),(3,x)</points>",
        f"<box>(1,2),(3,{'9' * 5000})</box><points>(1,2),(3,4)</points>",
    ],
)
def test_a_malformed_solution_is_one_line_that_shows_it(solution: str) -> None:
    with pytest.raises(ValueError, match=r"^solution: ") as caught:
        parse_solution(solution)
    assert solution[:100] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_both_answer_forms_are_read() -> None:
    listed = 'x <answer>[{"bbox_2d": [1,2.5,3,4], "point_2d": [5,6], "label": "cup"}]</answer>'
    assert parse_answer(listed).objects == (ObjectPrompt(box=(1, 2.5, 3, 4), points=((5, 6),)),)
    single = '<answer>{"Points_1": [5,6], "BBox": [1,2,3,4], "point_b": [7,8], "points_3": [9,9]}</answer>'
    assert parse_answer(single).objects == (ObjectPrompt(box=(1, 2, 3, 4), points=((5, 6), (7, 8))),)


GOOD = '{"bbox_2d": [1,2,3,4], "point_2d": [5,6]}'


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "7",
        '"bbox_2d"',
        "nonsense",
        GOOD,  # a single object is Seg-Zero's form, which has two points
        "{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}",  # the quotes of Seg-Zero's prompt
        '{"bbox": [1,2,3,4], "points_1": [1,2]}',
        '{"bbox": [1,2,3,4], "points_1": [1,2], "points_2": [1,NaN]}',
        f"[{GOOD}, 3]",
        f"[{GOOD}, null]",
        f'[{GOOD}, {{"bbox_2d": [1,2,3,4]}}]',
        '[{"bbox_2d": [1,2,3,Infinity], "point_2d": [5,6]}]',
        '[{"bbox_2d": [1,2,3,1e999], "point_2d": [5,6]}]',
        '[{"bbox_2d": [1,2,3,-1e7], "point_2d": [5,6]}]',
        '[{"bbox_2d": [1,2,3,1000001], "point_2d": [5,6]}]',
        '[{"bbox_2d": [1,2,3,true], "point_2d": [5,6]}]',
        '[{"bbox_2d": "1234", "point_2d": [5,6]}]',
        f'[{{"bbox_2d": [1,2,3,1{"0" * 400}], "point_2d": [5,6]}}]',
        f'[{{"bbox_2d": [1,2,3,1{"0" * 5000}], "point_2d": [5,6]}}]',
        "[" * 100_000,
    ],
)
def test_a_malformed_answer_asks_for_nothing(answer: str) -> None:
    parsed = parse_answer(f"<think>a</think><answer>{answer}</answer>")
    assert parsed == Answer(thinking="a", objects=(), readable=False)


def test_nothing_here_differs_from_no_answer() -> None:
    assert parse_answer("<answer> [] </answer>") == Answer(thinking=None, objects=(), readable=True)
    assert parse_answer("<answer>[]") == Answer(thinking=None, objects=(), readable=False)
    assert parse_answer("[]") == Answer(thinking=None, objects=(), readable=False)


def test_the_first_answer_counts() -> None:
    assert not parse_answer(f"<answer>?</answer><answer>[{GOOD}]</answer>").readable
    assert parse_answer(f"<answer>[{GOOD}]</answer><answer>?</answer>").readable


def test_at_most_120_objects_are_asked_for() -> None:
    assert len(parse_answer(f"<answer>[{', '.join([GOOD] * 130)}]</answer>").objects) == 120


@pytest.mark.parametrize(
    ("text", "thinking"),
    [("<think>a\nb</think>", "a\nb"), ("<think></think>", None), ("<think>a<b</think>", None), ("<think>a", None)],
)
def test_thinking_is_what_a_closed_block_holds(text: str, thinking: str | None) -> None:
    assert parse_answer(text).thinking == thinking


@given(st.text() | st.builds(lambda v: f"<answer>{json.dumps(v)}</answer>", json_values))
def test_any_text_gives_finite_objects(text: str) -> None:
    parsed = parse_answer(text)
    assert parsed.readable or not parsed.objects
    for obj in parsed.objects:
        assert len(obj.box) == 4
        assert 1 <= len(obj.points) <= 2
        numbers = [*obj.box, *(n for point in obj.points for n in point)]
        assert all(type(n) is float and abs(n) <= 1e6 for n in numbers)


def test_many_braces_and_tags_take_linear_time() -> None:
    for text in ("<answer>" + " " * 500_000, "<think>" * 100_000, "<answer>" * 100_000 + "]"):
        assert parse_answer(text).objects == ()
