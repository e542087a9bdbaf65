"""ReasonSeg as LISA's authors publish it: in ``train``, ``val`` and ``test`` a JSON file beside each picture.

Source: dvlab-research/LISA, ``utils/data_processing.py``. Polygons are painted from the largest to the smallest, so
that a small one labelled "ignore" cuts a hole into a large target; edges belong to the polygon; those labelled "flag"
mean nothing. They are in pixels of the upright picture, as OpenCV reads it for LISA. Where a picture has several
sentences, LISA's evaluation asks the first; for training there is each.
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
# Of pictures; LISA's are the first.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP")


@dataclass(frozen=True)
class ReasonSeg:
    """The folder that holds ``train``, ``val`` and ``test``; one of them is enough."""

    name: str
    root: Path

    @staticmethod
    def find(name: str, source: Path) -> "ReasonSeg | None":
        """The source, when it holds a split with a JSON file that has shapes."""
        example = ReasonSeg.example(source)
        return ReasonSeg(name, source) if example is not None and "shapes" in example[1] else None

    @staticmethod
    def example(source: Path) -> "tuple[Path, dict[str, Any]] | None":
        """A JSON file of the first split that has any, and the object in it. Raises SourceError."""
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
        # Nothing but "ignore" or "flag" is a question without a target.
        masks = (target,) if any(_kind(label) == "target" for label, _ in shapes) else ()
        asked = [
            Asked(own, question, name, masks, ignore=ignore if ignore.any() else None)
            for own, question in zip(part.ids, texts, strict=True)
        ]
        yield Shown(data, name, part.pictures[0], None, tuple(asked))


def _texts(content: Any, path: Path) -> list[str]:
    """The sentences, of which each is a question. Raises SourceError."""
    found = field(content, "text", str(path))
    sentences = found if isinstance(found, list) else [found]
    if not sentences:
        raise SourceError(f"{path}: no text, expected a question")
    return [text({"text": sentence}, "text", str(path)) for sentence in sentences]


def _shape(shape: Any, where: str) -> tuple[str, str, Any]:
    """Label, kind and points, the latter as they stand there. Raises SourceError."""
    return text(shape, "label", where), str(shape.get("shape_type") or "polygon"), field(shape, "points", where)


def _picture(path: Path) -> Path:
    """The picture beside a JSON file; where there is none, what LISA would call it."""
    places = [path.with_suffix(suffix) for suffix in _SUFFIXES]
    return next((place for place in places if place.is_file()), places[0])


def _corners(points: Any, where: str) -> list[tuple[float, ...]]:
    """Raises Unusable, which shows what is there instead of corners."""
    if not isinstance(points, list):
        form = "[[x, y], [x, y], ...]"
        raise Unusable(f"points not like {form}", f"{where}points {json.dumps(points)[:80]}, expected {form}")
    return [coordinates(point, "[x, y]", "points", where) for point in points]


def _outline(kind: str, corners: list[tuple[float, ...]], where: str) -> list[tuple[float, ...]]:
    """The corners of a shape of LabelMe's, which draws more than polygons. Raises Unusable for what has none."""
    if kind == "rectangle" and len(corners) == 2:
        (x1, y1), (x2, y2) = corners
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if kind in ("circle", "mask"):
        raise Unusable(f"a {kind} of LabelMe's", f"{where}a {kind} of LabelMe's, expected a polygon or a rectangle")
    return corners


def paint(shapes: list[tuple[str, Any]], frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Polygons as the bool [H, W] masks of what is meant and of what does not count."""
    layers = []
    for label, points in shapes:
        corners = [(int(x), int(y)) for x, y in points]
        if _kind(label) == "flag" or not corners:
            continue
        layer = Image.new("1", (frame.width, frame.height))
        draw = ImageDraw.Draw(layer)
        if len(corners) > 2:
            draw.polygon(corners, fill=1)
            # Pillow draws no outline in the colour that it fills with.
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
