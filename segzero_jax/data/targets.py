"""Target boxes and points from masks, as in Seg-Zero's data: the centres of the two largest inscribed circles."""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco
from scipy.ndimage import distance_transform_edt

from segzero_jax.types import ObjectPrompt

# If the second radius is below this share of the first, there was no room for a second circle.
_ROOM = 0.25


def target_object(mask: np.ndarray) -> ObjectPrompt | None:
    """The box and the two points of a bool [H, W] mask, or None for one without pixels.

    The box is the inclusive bounds (x1, y1, x2, y2), widened by one pixel where they would enclose no area.
    """
    bounds = _bounds(mask)
    if bounds is None:
        return None
    x1, y1, x2, y2 = bounds
    first, second = _circle_centres(mask[y1 : y2 + 1, x1 : x2 + 1])
    (x1, x2), (y1, y2) = _with_area(x1, x2, mask.shape[1]), _with_area(y1, y2, mask.shape[0])
    left, top = bounds[:2]
    points = tuple((float(left + x), float(top + y)) for x, y in (first, second))
    return ObjectPrompt(box=(float(x1), float(y1), float(x2), float(y2)), points=points)


def union(masks: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The union of bool [H, W] masks; all False for none."""
    total = np.zeros((height, width), bool)
    for mask in masks:
        total |= mask
    return total


def encode_counts(mask: np.ndarray) -> str:
    """A bool [H, W] mask in COCO's compressed run-length encoding."""
    return coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _with_area(low: int, high: int, size: int) -> tuple[int, int]:
    if high > low:
        return low, high
    return (low, low + 1) if low + 1 < size else (max(low - 1, 0), low)


def _circle_centres(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Centres (x, y) of the largest inscribed circle and of the largest that does not overlap it.

    If there is no room for the second, as in a round object, its centre is the deepest pixel half a radius or more from
    the first centre; in a mask of one pixel, both are that pixel. Pixels outside ``mask`` count as background.
    """
    depth = _depth(mask)
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    # Squared distances between pixels are integers: without rounding, the square of the root would miss ties.
    squared_radius = round(depth[y, x] ** 2)
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    apart = (rows - y) ** 2 + (columns - x) ** 2
    beside = _depth(mask & (apart > squared_radius))
    if beside.max() < _ROOM * depth[y, x]:
        beside = np.where(4 * apart >= squared_radius, depth, 0)
    if beside.max() == 0:
        return (int(x), int(y)), (int(x), int(y))
    v, u = np.unravel_index(np.argmax(beside), beside.shape)
    return (int(x), int(y)), (int(u), int(v))


def _depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest one outside the object, float64 [H, W]."""
    return distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
