"""Coordinates survive the way to another frame and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax.frames import rescale_box, rescale_object, rescale_point
from segzero_jax.types import Frame, ObjectPrompt

sides = st.integers(1, 20_000)
frames = st.builds(Frame, width=sides, height=sides)
POLICY = Frame(840, 840)


def test_each_axis_has_its_own_factor() -> None:
    photo = Frame(640, 480)
    assert rescale_point((320, 120), photo, POLICY) == (420.0, 210.0)
    assert rescale_box((64, 48, 640, 480), photo, POLICY) == (84.0, 84.0, 840.0, 840.0)
    target = ObjectPrompt(box=(64, 48, 640, 480), points=((320, 120), (0, 240)))
    expected = ObjectPrompt(box=(84.0, 84.0, 840.0, 840.0), points=((420.0, 210.0), (0.0, 420.0)))
    assert rescale_object(target, photo, POLICY) == expected


@given(frames, frames, st.integers(-100_000, 100_000), st.integers(-100_000, 100_000))
def test_integer_pixels_come_back_exactly(src: Frame, dst: Frame, x: int, y: int) -> None:
    assert rescale_point(rescale_point((x, y), src, dst), dst, src) == (float(x), float(y))


def test_an_integer_that_plain_division_loses_comes_back() -> None:
    src, dst = Frame(49, 49), Frame(1, 1)
    assert 1 * 1 / 49 * 49 != 1
    assert rescale_point(rescale_point((1, 1), src, dst), dst, src) == (1.0, 1.0)


@given(frames, frames, st.floats(0, 20_000), st.floats(0, 20_000))
def test_any_coordinate_comes_back_closely(src: Frame, dst: Frame, x: float, y: float) -> None:
    there = rescale_point((x, y), src, dst)
    assert rescale_point(there, dst, src) == pytest.approx((x, y), abs=3e-5)


@given(
    frames, frames, st.tuples(*[st.floats(0, 5000)] * 4), st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 5000)))
)
def test_an_object_is_its_box_and_its_points(src: Frame, dst: Frame, box: tuple, points: list) -> None:
    moved = rescale_object(ObjectPrompt(box=box, points=tuple(points)), src, dst)
    assert moved.box == rescale_box(box, src, dst)
    assert moved.points == tuple(rescale_point(point, src, dst) for point in points)


@given(frames, st.floats(0, 5000), st.floats(0, 5000))
def test_the_same_frame_changes_nothing(frame: Frame, x: float, y: float) -> None:
    assert rescale_point((x, y), frame, frame) == (x, y)


@given(frames, frames)
def test_a_picture_fills_its_frame(src: Frame, dst: Frame) -> None:
    assert rescale_box((0, 0, src.width, src.height), src, dst) == (0.0, 0.0, dst.width, dst.height)


@pytest.mark.parametrize(("src", "dst"), [(Frame(0, 5), POLICY), (POLICY, Frame(5, -1))])
def test_a_frame_without_area_is_an_error(src: Frame, dst: Frame) -> None:
    with pytest.raises(ValueError, match="above 0"):
        rescale_point((1, 1), src, dst)
