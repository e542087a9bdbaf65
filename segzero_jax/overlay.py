"""Draws boxes, points and masks on an image, so that prediction and target can be told apart even without colour.

The prediction is filled and hatched with solid lines, the target is a dashed outline. All coordinates are pixels of
the given image; the drawing scales with it.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from segzero_jax.run_lengths import decode_counts

PREDICTION = (38, 120, 220)
TARGET = (255, 150, 30)
_CASING = (255, 255, 255)
_DARK = (16, 18, 22)
_MAX_PIXELS = 4_000_000  # drawn at twice the size and downscaled while that stays below this


@dataclass(frozen=True)
class Marks:
    """The marks of one side, prediction or target.

    Attributes:
      boxes: (x1, y1, x2, y2) each, any corner order, inside the image or not.
      points: (x, y) each.
      mask: bool ``[height, width]`` of the image, or None.
    """

    boxes: Sequence[Sequence[float]] = ()
    points: Sequence[Sequence[float]] = ()
    mask: np.ndarray | None = None


def draw(
    picture: Image.Image, prediction: Marks | None = None, target: Marks | None = None, width: int | None = None
) -> Image.Image:
    """Draws both sides on a copy of an image.

    Args:
      picture: an image of any mode.
      prediction: mask filled, hatched and outlined; boxes as solid lines; points as dots.
      target: mask as a dashed outline; without a mask, boxes as dashed lines. Points are not drawn.
      width: width of the result in pixels; its height follows. Default: that of ``picture``.

    Returns:
      An RGB image.

    Raises:
      ValueError: a mask's shape is not the image's.
    """
    out_width = width or picture.width
    out_height = max(1, round(picture.height * out_width / picture.width))
    fine = 2 if 4 * out_width * out_height <= _MAX_PIXELS else 1
    canvas = _Canvas(picture, (out_width * fine, out_height * fine))
    if prediction and prediction.mask is not None:
        canvas.fill(prediction.mask)
        canvas.outline(prediction.mask, PREDICTION, dashed=False)
    if target and target.mask is not None:
        canvas.outline(target.mask, TARGET, dashed=True)
    elif target:
        for box in target.boxes:
            canvas.box(box, TARGET, dashed=True)
    if prediction:
        for box in prediction.boxes:
            canvas.box(box, PREDICTION, dashed=False)
        for point in prediction.points:
            canvas.point(point)
    return canvas.image.resize((out_width, out_height), Image.Resampling.BOX) if fine > 1 else canvas.image


def decode_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """A mask from COCO's compressed run-length encoding, as ``pycocotools.mask.decode`` gives it, but checked.

    If the string is too short, ``pycocotools`` leaves the rest as uninitialised memory; here that is an error.

    Args:
      rle: ``height``, ``width`` and ``counts`` (text), as in run files.

    Returns:
      bool ``[height, width]``.

    Raises:
      ValueError: the runs do not add up to the size, or the text is not in that encoding.
    """
    height, width, counts = int(rle["height"]), int(rle["width"]), rle["counts"]
    runs = decode_counts(counts)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"mask of {height}x{width}: expected runs of {height * width} pixels, got {sum(runs)}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask along pixel edges.

    Args:
      mask: bool ``[height, width]``.

    Returns:
      Closed paths, each float ``[n, 2]`` of (x, y) pixel corners without the repeated first one; the inside is to the
      right of the direction of travel as seen on screen (y downwards), also around holes.
    """
    inside = np.pad(mask.astype(bool), 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for dy, dx, start, step in _EDGES:
        other = np.roll(inside, (-dy, -dx), (0, 1))
        for y, x in np.argwhere(inside & ~other) - 1:
            begin = (int(x) + start[0], int(y) + start[1])
            following.setdefault(begin, []).append((begin[0] + step[0], begin[1] + step[1]))
    paths = []
    while following:
        first = next(iter(following))
        corner, heading = _advance(following, first, (0, 0))
        path = [first]
        while corner != first or _right_of(corner, heading) in following.get(first, ()):
            path.append(corner)
            corner, heading = _advance(following, corner, heading)
        paths.append(np.array(path, float))
    return paths


def data_uri(picture: Image.Image, quality: int = 82) -> str:
    """The image as a JPEG ``data:`` URI for an HTML page."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# Neighbour (dy, dx) outside the mask, start of the shared edge relative to the pixel's corner, and its direction.
_EDGES = (
    (-1, 0, (0, 0), (1, 0)),
    (0, 1, (1, 0), (0, 1)),
    (1, 0, (1, 1), (-1, 0)),
    (0, -1, (0, 1), (0, -1)),
)


def _advance(
    following: dict[tuple[int, int], list[tuple[int, int]]], corner: tuple[int, int], heading: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Takes the next edge; where two pixels touch only at a corner, the one that turns towards the inside."""
    ends = following[corner]
    right = _right_of(corner, heading)
    end = right if right in ends else ends[0]
    ends.remove(end)
    if not ends:
        del following[corner]
    return end, (end[0] - corner[0], end[1] - corner[1])


def _right_of(corner: tuple[int, int], heading: tuple[int, int]) -> tuple[int, int]:
    return corner[0] - heading[1], corner[1] + heading[0]


class _Canvas:
    """An image at the size it is drawn in, with marks in coordinates of the original."""

    def __init__(self, picture: Image.Image, size: tuple[int, int]) -> None:
        self._original = picture.size
        self._size = size
        self._scale = (size[0] / picture.width, size[1] / picture.height)
        self._unit = max(1.0, math.hypot(*size) / 480)  # line widths follow the size
        self.image = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)

    def fill(self, mask: np.ndarray) -> None:
        """A veil of the prediction's colour with diagonal hatching."""
        shape = self._enlarge(mask)
        veil = Image.new("RGB", self._size, PREDICTION)
        self.image.paste(veil, mask=shape.point(lambda value: value * 0.42))
        hatch = Image.new("L", self._size)
        pen = ImageDraw.Draw(hatch)
        gap = 7 * self._unit
        for index in range(int((self._size[0] + self._size[1]) / gap) + 1):
            pen.line([(index * gap, 0), (index * gap - self._size[1], self._size[1])], 130, round(1.2 * self._unit))
        self.image.paste(Image.new("RGB", self._size, _CASING), mask=ImageChops.multiply(hatch, shape))

    def outline(self, mask: np.ndarray, colour: tuple[int, int, int], dashed: bool) -> None:
        """The border of a mask, smoothed at this size."""
        for path in outlines(np.asarray(self._enlarge(mask)) > 127):
            self._line([tuple(corner) for corner in path], colour, dashed)

    def box(self, box: Sequence[float], colour: tuple[int, int, int], dashed: bool) -> None:
        """A rectangle; sides outside the image are not visible, since the box is drawn where it is."""
        (x1, y1), (x2, y2) = self._place(box[:2]), self._place(box[2:4])
        self._line([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], colour, dashed)

    def point(self, point: Sequence[float]) -> None:
        """A ringed dot."""
        x, y = self._place(point)
        pen = ImageDraw.Draw(self.image)
        for radius, colour in ((6.0, _DARK), (5.0, _CASING), (3.2, PREDICTION)):
            reach = radius * self._unit
            pen.ellipse([x - reach, y - reach, x + reach, y + reach], fill=colour)

    def _place(self, point: Sequence[float]) -> tuple[float, float]:
        """Scales a point; one far outside the image is moved closer, since drawing slows down with distance."""
        near = [
            min(max(float(value) * scale, -0.5 * size), 1.5 * size)
            for value, scale, size in zip(point, self._scale, self._size, strict=True)
        ]
        return near[0], near[1]

    def _enlarge(self, mask: np.ndarray) -> Image.Image:
        if mask.shape != (self._original[1], self._original[0]):
            raise ValueError(
                f"mask of {mask.shape[0]}x{mask.shape[1]} (height x width) for a picture of "
                f"{self._original[1]}x{self._original[0]}: expected the same size"
            )
        enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(self._size, Image.Resampling.BICUBIC)
        smooth = enlarged.filter(ImageFilter.GaussianBlur(max(0.0, min(self._scale) / 2)))
        return smooth.point(lambda value: 255 if value > 127 else 0)

    def _line(self, corners: Sequence[tuple[float, float]], colour: tuple[int, int, int], dashed: bool) -> None:
        """A closed line with a casing, light around dark or dark around light, visible on any background."""
        pieces = _dashes(corners, 9 * self._unit, 5 * self._unit) if dashed else [[*corners, *corners[:2]]]
        pen = ImageDraw.Draw(self.image)
        casing = _DARK if dashed else _CASING
        for piece in pieces:
            pen.line(piece, casing, round(4.4 * self._unit), joint="curve")
        for piece in pieces:
            pen.line(piece, colour, round(2.2 * self._unit), joint="curve")


def _dashes(corners: Sequence[tuple[float, float]], dash: float, gap: float) -> list[list[tuple[float, float]]]:
    """Equal dashes of a closed path, about ``dash`` long and about ``gap`` apart."""
    path = np.array([*corners, corners[0]], float)
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    total = float(lengths[-1])
    count = max(1, round(total / (dash + gap)))
    pieces = []
    for index in range(count):
        begin = total * index / count
        end = begin + total / count * dash / (dash + gap)
        between = (lengths > begin) & (lengths < end)
        places = np.concatenate([[begin], lengths[between], [end]])
        pieces.append(list(zip(*(np.interp(places, lengths, path[:, axis]).tolist() for axis in (0, 1)), strict=True)))
    return pieces
