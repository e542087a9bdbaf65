"""ReasonSeg as LISA's authors publish it: in ``train``, ``val`` and ``test`` a JSON file beside each image.

Source: dvlab-research/LISA, ``utils/data_processing.py``. Polygons are painted from the largest to the smallest, so
that a small one labelled "ignore" cuts a hole into a large target. Edges belong to the polygon; polygons labelled
"flag" are skipped. Coordinates are pixels of the upright image, as OpenCV reads it for LISA. If an image has several
sentences, LISA's evaluation asks the first; for training each one is a question.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from segzero_jax.data.forms.form import (
    Asked,
    Part,
    Shown,
    SourceError,
    Unreadable,
    coordinates,
    field,
    read_json,
    rows,
    text,
)
from segzero_jax.data.pictures import PictureError, upright_size
from segzero_jax.data.unusable import Unusable
from segzero_jax.types import Frame

_SPLITS = ("train", "val", "test")
# Image suffixes; LISA's is the first.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP")


@dataclass(frozen=True)
class ReasonSeg:
    """A folder with ``train``, ``val`` and ``test``; one of them is enough."""

    name: str
    root: Path

    @staticmethod
    def find(name: str, source: Path) -> "ReasonSeg | None":
        """The source, if it has a split with a JSON file that has shapes; else None."""
        example = ReasonSeg.example(source)
        return ReasonSeg(name, source) if example is not None and "shapes" in example[1] else None

    @staticmethod
    def example(source: Path) -> "tuple[Path, dict[str, Any]] | None":
        """A JSON file of the first split that has any, and its object; else None. Raises SourceError."""
        first = next((path for split in _SPLITS for path in (source / split).glob("*.json")), None)
        content = None if first is None else read_json(first)
        return (first, content) if first is not None and isinstance(content, dict) else None

    def files(self) -> list[Path]:
        return [path for split in _SPLITS for path in sorted((self.root / split).glob("*.json"))]

    def splits(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for path in self.files():
            content = read_json(path)
            split = path.parent.name
            texts = _texts(content, path)
            texts = texts if split == "train" else texts[:1]
            name = f"{split}-{path.stem}"
            ids = tuple(name if n == 0 else f"{name}-sentence-{n + 1}" for n in range(len(texts)))
            shapes = [_shape(shape, f"{path}: shape {n}") for n, shape in enumerate(rows(content, "shapes", str(path)))]
            picture = str(_picture(path).relative_to(self.root))
            found.setdefault(split, []).append(Part(ids, (picture,), (texts, shapes)))
        return found

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        texts, outlined = part.content
        data = (self.root / part.pictures[0]).read_bytes()
        name = f"{self.name}:{Path(part.pictures[0]).with_suffix('')}"
        try:
            frame = upright_size(data)
            shapes = [
                (label, _outline(kind, _corners(points, f"shape {n}: "), f"shape {n}: "))
                for n, (label, kind, points) in enumerate(outlined)
                if _kind(label) != "flag"
            ]
        except PictureError as error:
            yield Unreadable(part.ids, error.kind, f"{error}, in {part.pictures[0]}")
            return
        except Unusable as error:
            yield Unreadable(part.ids, error.kind, error.reason)
            return
        target, ignore = paint(shapes, frame)
        # With only "ignore" and "flag" shapes, it is a question without a target.
        masks = (target,) if any(_kind(label) == "target" for label, _ in shapes) else ()
        asked = [
            Asked(own, question, name, masks, ignore=ignore if ignore.any() else None)
            for own, question in zip(part.ids, texts, strict=True)
        ]
        yield Shown(data, name, part.pictures[0], None, tuple(asked))


def _texts(content: Any, path: Path) -> list[str]:
    """The sentences, each of which is a question. Raises SourceError."""
    found = field(content, "text", str(path))
    sentences = found if isinstance(found, list) else [found]
    if not sentences:
        raise SourceError(f"{path}: no text, expected a question")
    return [text({"text": sentence}, "text", str(path)) for sentence in sentences]


def _shape(shape: Any, where: str) -> tuple[str, str, Any]:
    """Label, kind and points of a shape; the points are not checked. Raises SourceError."""
    return text(shape, "label", where), str(shape.get("shape_type") or "polygon"), field(shape, "points", where)


def _picture(path: Path) -> Path:
    """The image beside a JSON file; if there is none, the path that LISA would expect."""
    places = [path.with_suffix(suffix) for suffix in _SUFFIXES]
    return next((place for place in places if place.is_file()), places[0])


def _corners(points: Any, where: str) -> list[tuple[float, ...]]:
    """A shape's corners. Raises Unusable, which shows the invalid value."""
    if not isinstance(points, list):
        form = "[[x, y], [x, y], ...]"
        raise Unusable(f"points not like {form}", f"{where}points {json.dumps(points)[:80]}, expected {form}")
    return [coordinates(point, "[x, y]", "points", where) for point in points]


def _outline(kind: str, corners: list[tuple[float, ...]], where: str) -> list[tuple[float, ...]]:
    """The corners of a LabelMe shape, which need not be a polygon. Raises Unusable for a shape without corners."""
    if kind == "rectangle" and len(corners) == 2:
        (x1, y1), (x2, y2) = corners
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if kind in ("circle", "mask"):
        raise Unusable(f"a {kind} of LabelMe's", f"{where}a {kind} of LabelMe's, expected a polygon or a rectangle")
    return corners


def paint(shapes: list[tuple[str, Any]], frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Paints polygons as two bool [H, W] masks: of the target and of the ignored pixels."""
    layers = []
    for label, points in shapes:
        corners = [(int(x), int(y)) for x, y in points]
        if _kind(label) == "flag" or not corners:
            continue
        layer = Image.new("1", (frame.width, frame.height))
        draw = ImageDraw.Draw(layer)
        if len(corners) > 2:
            draw.polygon(corners, fill=1)
            # Pillow does not draw an outline in the fill colour.
            draw.line([*corners, corners[0]], fill=1)
        else:
            draw.line(corners, fill=1) if len(corners) == 2 else draw.point(corners, fill=1)
        mask = np.asarray(layer)
        layers.append((int(mask.sum()), _kind(label) == "ignore", mask))
    painted = np.zeros((frame.height, frame.width), np.uint8)
    for _, ignored, mask in sorted(layers, key=lambda layer: -layer[0]):
        painted[mask] = 2 if ignored else 1
    return painted == 1, painted == 2


def _kind(label: str) -> str:
    lower = label.lower()
    return "flag" if lower == "flag" else "ignore" if "ignore" in lower else "target"
