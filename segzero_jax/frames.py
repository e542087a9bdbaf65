"""Coordinates from one image size to another: stored image <-> policy frame <-> segmenter.

Images are squashed, so x and y have separate factors. As in Seg-Zero's rescaling of its answers (upstream:
``inference_scripts/infer.py``, which then rounds), a coordinate is a distance from the left or top edge, not a pixel
index. Integer pixels come back exactly from a round trip, any other coordinate within 1e-9 pixels of the smaller frame.
"""

from segzero_jax.types import Box, Frame, ObjectPrompt, Point

# After a round trip through another frame, an integer pixel is off by a few units in the last place. A true fraction
# cannot be this near an integer: it is at least 1 / frame size away.
_SNAP = 1e-9


def rescale_point(point: Point, src: Frame, dst: Frame) -> Point:
    """A point (x, y) from pixels of ``src`` to pixels of ``dst``. Raises ValueError for a frame without area."""
    _check(src, dst)
    return _rescale(point[0], src.width, dst.width), _rescale(point[1], src.height, dst.height)


def rescale_box(box: Box, src: Frame, dst: Frame) -> Box:
    """A box (x1, y1, x2, y2) from pixels of ``src`` to those of ``dst``. Raises ValueError for a frame without area."""
    x1, y1 = rescale_point((box[0], box[1]), src, dst)
    x2, y2 = rescale_point((box[2], box[3]), src, dst)
    return x1, y1, x2, y2


def rescale_object(obj: ObjectPrompt, src: Frame, dst: Frame) -> ObjectPrompt:
    """An object's box and points, from ``src`` to ``dst``. Raises ValueError for a frame without area."""
    points = tuple(rescale_point(point, src, dst) for point in obj.points)
    return ObjectPrompt(box=rescale_box(obj.box, src, dst), points=points)


def _check(src: Frame, dst: Frame) -> None:
    for frame in (src, dst):
        if frame.width <= 0 or frame.height <= 0:
            raise ValueError(f"{frame}: expected a width and a height above 0")


def _rescale(value: float, src: int, dst: int) -> float:
    if src == dst:
        return float(value)
    scaled = value * dst / src
    whole = float(round(scaled))
    return whole if abs(scaled - whole) < _SNAP else scaled
