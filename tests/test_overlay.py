import base64
import io

import numpy as np
import pytest
from fake_run import encode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from segzero_jax import overlay
from segzero_jax.overlay import Marks

masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1)).map(
    lambda t: np.random.default_rng(t[2]).random((t[0], t[1])) < t[3]
)


def grey(width=120, height=80, level=90):
    return Image.new("RGB", (width, height), (level, level, level))


def square(width=120, height=80):
    mask = np.zeros((height, width), bool)
    mask[20:60, 30:80] = True
    return mask


def changed(image, width=120, height=80, level=90):
    """bool [height, width]: where a drawing on ``grey`` shows."""
    return np.abs(np.asarray(image, int) - level).max(-1) > 40


@given(mask=masks)
def test_masks_are_read_as_pycocotools_writes_them(mask):
    np.testing.assert_array_equal(overlay.decode_mask(encode(mask)), mask)


@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 300)), seed=st.integers(0, 99))
def test_large_masks_too(shape, seed):
    corner = np.random.default_rng(seed).integers(0, shape)
    mask = np.zeros(shape, bool)
    mask[: corner[0], corner[1] :] = True
    np.testing.assert_array_equal(overlay.decode_mask(encode(mask)), mask)


@given(counts=st.text(max_size=12) | st.text(alphabet="0123456789PQRo`", max_size=12))
def test_any_other_text_is_refused_or_has_the_right_size(counts):
    try:
        mask = overlay.decode_mask({"height": 5, "width": 7, "counts": counts})
    except ValueError:
        return
    assert (mask.shape, mask.dtype) == ((5, 7), bool)
    np.testing.assert_array_equal(coco.decode([{"size": [5, 7], "counts": counts.encode()}])[:, :, 0] == 1, mask)


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        ("01", "expected runs of 35 pixels, got 1"),
        ("zz", "COCO's compressed run lengths"),
        ("P", "cut off in the middle"),
    ],
)
def test_a_damaged_mask_is_explained(counts, complaint):
    with pytest.raises(ValueError, match=f"^mask.*{complaint}"):
        overlay.decode_mask({"height": 5, "width": 7, "counts": counts})


@given(mask=masks)
def test_outlines_close_along_pixel_edges_and_enclose_the_mask(mask):
    area = 0.0
    for path in overlay.outlines(mask):
        steps = np.roll(path, -1, 0) - path
        assert (np.abs(steps).sum(1) == 1).all()
        assert len({(*a, *b) for a, b in zip(path, path + steps, strict=True)}) == len(path), "an edge comes twice"
        x, y = path.T
        area += (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2  # holes count negative
    assert area == mask.sum()


def test_pixels_that_touch_at_a_corner_have_an_outline_each():
    assert sorted(len(path) for path in overlay.outlines(np.eye(3, dtype=bool))) == [4, 4, 4]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert sorted(len(path) for path in overlay.outlines(ring)) == [4, 12]


def test_the_predicted_mask_is_filled_where_it_is():
    seen = changed(overlay.draw(grey(), Marks(mask=square())))
    inner, outer = square(), square()
    inner[:] = False
    inner[26:54, 36:74] = True
    outer[15:65, 25:85] = True
    assert seen[inner].mean() > 0.95
    assert not seen[~outer].any()


def test_the_target_mask_is_a_dashed_outline():
    seen = changed(overlay.draw(grey(), target=Marks(mask=square())))
    assert not seen[26:54, 36:74].any()
    top = seen[17:24, 34:76].any(0)
    assert 0.3 < top.mean() < 0.95, "neither missing nor solid"
    solid = changed(overlay.draw(grey(), Marks(mask=square())))[17:24, 34:76].any(0)
    assert solid.all()


def test_prediction_and_target_differ_in_grey():
    predicted = np.asarray(overlay.draw(grey(), Marks(mask=square())).convert("L"), int)
    target = np.asarray(overlay.draw(grey(), None, Marks(mask=square())).convert("L"), int)
    assert np.abs(predicted - target)[26:54, 36:74].mean() > 10


@pytest.mark.parametrize("marks", [Marks([(30, 20, 90, 60)]), Marks(mask=square())], ids=["box", "mask"])
def test_each_side_has_its_colour(marks):
    def pixels(image, colour):
        return (np.abs(np.asarray(image, int) - colour).max(-1) < 60).sum()

    for side, own, other in (
        ("prediction", overlay.PREDICTION, overlay.TARGET),
        ("target", overlay.TARGET, overlay.PREDICTION),
    ):
        image = overlay.draw(grey(), **{side: marks})
        assert pixels(image, own) > 30 > 0 == pixels(image, other)


def test_boxes_and_points_lie_where_they_say_at_any_size():
    for width in (120, 240, 60):
        scale = width / 120
        image = overlay.draw(grey(), Marks([(30, 20, 90, 60)], [(100, 10), (10, 70)]), width=width)
        assert image.size == (width, round(80 * scale))
        seen = changed(image)
        reach = int(4 * scale) + 3
        for x, y in ((30, 40), (90, 40), (60, 20), (60, 60), (100, 10), (10, 70)):
            column, row = int(x * scale), int(y * scale)
            assert seen[max(0, row - reach) : row + reach, column - reach : column + reach].any(), (width, x, y)
        assert not seen[int(32 * scale) : int(48 * scale), int(45 * scale) : int(75 * scale)].any()


def test_a_target_without_mask_is_its_box_and_with_mask_is_not():
    box = [(30, 20, 90, 60)]
    assert changed(overlay.draw(grey(), target=Marks(box)))[15:25, 40:80].any()
    empty = np.zeros((80, 120), bool)
    assert not changed(overlay.draw(grey(), target=Marks(box, (), empty))).any()


@pytest.mark.parametrize(
    "box", [(90, 60, 30, 20), (-1e9, -5, 1e12, 30), (5, 5, 5, 5), (200, 200, 300, 300), (1e300, 0, -1e300, 0)]
)
def test_odd_boxes_are_drawn_without_fuss(box):
    marks = Marks([box], [(box[0], box[1])])
    assert overlay.draw(grey(), marks, marks).size == (120, 80)


@given(mask=masks, width=st.integers(1, 60))
def test_any_mask_can_be_drawn_at_any_size(mask, width):
    picture = grey(mask.shape[1], mask.shape[0])
    assert overlay.draw(picture, Marks(mask=mask), Marks(mask=mask), width).width == width


def test_the_picture_itself_is_left_alone_and_of_any_mode():
    for mode in ("RGB", "L", "RGBA", "P"):
        picture = grey().convert(mode)
        before = picture.tobytes()
        assert overlay.draw(picture, Marks([(1, 1, 50, 50)], [(9, 9)], square())).mode == "RGB"
        assert picture.tobytes() == before
    plain = overlay.draw(grey())
    assert not changed(plain).any()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"mask of 80x120 .* for a picture of 60x120: expected the same size"):
        overlay.draw(grey(120, 60), Marks(mask=square()))


def test_a_data_uri_holds_the_picture():
    prefix, _, content = overlay.data_uri(grey()).partition(",")
    assert prefix == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (120, 80))
        assert not changed(picture).any()
