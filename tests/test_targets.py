"""Boxes and points from masks: by hand, and against a search over all pixels."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco
from question_sources import rectangle

from segzero_jax.data.targets import encode_counts, target_object, union


def test_two_squares_give_their_centres() -> None:
    mask = rectangle(10, 10, 50, 50) | rectangle(80, 20, 110, 50)
    target = target_object(mask)
    assert target.box == (10, 10, 110, 50)
    assert target.points == ((30, 30), (95, 35))


def test_a_bar_has_room_for_two_circles_beside_one_another() -> None:
    target = target_object(rectangle(0, 40, 127, 60))
    first, second = target.points
    assert first[1] == second[1] == 50
    # Both touch the long sides: radius 11, the distance from the middle row to the first row outside.
    assert abs(first[0] - second[0]) >= 22


def test_a_disc_has_room_for_one_circle_and_its_second_point_is_well_inside() -> None:
    rows, columns = np.ogrid[:96, :128]
    target = target_object((rows - 48) ** 2 + (columns - 60) ** 2 <= 30**2)
    (x, y), (u, v) = target.points
    assert (x, y) == (60, 48)
    # Fifteen pixels from the first centre, as many from the edge.
    assert 15 <= np.hypot(u - x, v - y) < 17
    assert 30 - np.hypot(u - 60, v - 48) > 13


@pytest.mark.parametrize(
    ("bounds", "box"),
    [((5, 7, 5, 7), (5, 7, 6, 8)), ((127, 95, 127, 95), (126, 94, 127, 95)), ((3, 4, 3, 90), (3, 4, 4, 90))],
)
def test_one_pixel_or_one_column_still_has_an_area(bounds: tuple[int, ...], box: tuple[int, ...]) -> None:
    target = target_object(rectangle(*bounds))
    assert target.box == box
    assert all(bounds[0] <= x <= bounds[2] and bounds[1] <= y <= bounds[3] for x, y in target.points)


def test_no_pixels_no_target() -> None:
    assert target_object(np.zeros((4, 5), bool)) is None


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest one that is not the object's, by looking at all of them."""
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    apart = [[np.hypot(*(outside - (y, x)).T).min() if mask[y, x] else 0 for x in range(mask.shape[1])] for y in
             range(mask.shape[0])]  # fmt: skip
    return np.array(apart)


def square_with_a_hole(row: int, column: int) -> np.ndarray:
    mask = np.ones((11, 11), bool)
    mask[row, column] = False
    return mask


@settings(max_examples=150)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@example(square_with_a_hole(6, 5))  # pixels at exactly the first circle's radius, the root of 18
def test_any_mask(mask: np.ndarray) -> None:
    target = target_object(mask)
    if not mask.any():
        assert target is None
        return
    rows, columns = np.nonzero(mask)
    x1, y1, x2, y2 = target.box
    assert x1 <= columns.min() <= columns.max() <= x2 <= max(mask.shape[1] - 1, 0)
    assert y1 <= rows.min() <= rows.max() <= y2 <= max(mask.shape[0] - 1, 0)
    (x, y), (u, v) = [(int(x), int(y)) for x, y in target.points]
    assert mask[y, x]
    assert mask[v, u]
    inside = depth(mask)
    assert inside[y, x] == inside.max(), "the first circle is the largest there is"
    grid = np.indices(mask.shape)
    beside = depth(mask & (np.hypot(grid[0] - y, grid[1] - x) > inside[y, x]))
    if beside.max() >= inside.max() / 4:
        assert beside[v, u] == beside.max(), "the second is the largest that does not overlap the first"


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_and_unions(mask: np.ndarray) -> None:
    runs = {"size": list(mask.shape), "counts": encode_counts(mask)}
    np.testing.assert_array_equal(coco.decode(runs), mask)
    np.testing.assert_array_equal(union([mask, ~mask], *mask.shape), np.ones_like(mask))
    assert not union([], *mask.shape).any()
