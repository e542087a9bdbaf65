"""The interface of all source forms: images with questions about them, read part by part in any process."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segzero_jax.data.unusable import Unusable
from segzero_jax.types import Box, Frame, ObjectPrompt, Point

# Limit in pixels on a corner's coordinates: rasterising takes memory for each pixel between two corners.
FAR = 1e5
_COCO_FILE = re.compile(r"(COCO_(?:train|val|test)\d{4}_)?(\d{12})(?:_\d+)?(?:\.\w+)?")


class SourceError(ValueError):
    """The source is not in the expected form; the message is one line."""


@dataclass(frozen=True)
class Asked:
    """A question as the source stores it.

    Attributes:
      masks: bool [H, W], one per target object; empty for a question without a target; None if the source has
        ``objects`` instead of masks.
      objects: the target boxes and points, if there are no masks.
      ignore: bool [H, W], pixels that do not count.
    """

    id: str
    text: str
    instance_id: str
    masks: tuple[np.ndarray, ...] | None = None
    objects: tuple[ObjectPrompt, ...] = ()
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class Shown:
    """An image as the source stores it, with the questions about it.

    Attributes:
      image: the encoded image.
      image_id: the image's id, unique across splits; "coco:391895" for a COCO image.
      source: the image's file in the source, and the row if the file holds several.
      annotated: the image size that masks and objects refer to; None if they are in pixels of the upright image.
      as_in_file: whether annotations that match the file's size are in its stored pixel order, ignoring EXIF
        orientation: COCO's tools ignore EXIF.
    """

    image: bytes
    image_id: str
    source: str
    annotated: Frame | None
    questions: tuple[Asked, ...]
    as_in_file: bool = False


@dataclass(frozen=True)
class Unreadable:
    """Questions that could not be read, and the reason: see ``Unusable``."""

    ids: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Part:
    """A unit of reading: plain values that can be sent to another process.

    Attributes:
      ids: ids of its questions, in order.
      pictures: its image files, relative to the form's ``root``; empty if the images are stored inside other files.
      content: data that the form needs to read the part.
      centred: number of target boxes that have neither a point nor a mask, so that their centres are used as points.
    """

    ids: tuple[str, ...]
    pictures: tuple[str, ...]
    content: Any
    centred: int = 0


class Form(Protocol):
    """A source in some form. It is created in one process and reads parts in others."""

    @property
    def root(self) -> Path:
        """The folder that image paths are relative to."""

    def files(self) -> list[Path]:
        """The annotation files; their content identifies the source."""

    def splits(self) -> dict[str, list[Part]]:
        """All parts, by split. Raises SourceError for annotations that are not in this form."""

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        """Yields the images of a part; an image that cannot be read is yielded as ``Unreadable``, not raised."""


def coco_id(name: str, from_coco: bool = False) -> str | None:
    """ "coco:391895" for a COCO file name such as ``COCO_train2014_000000391895.jpg``, else None.

    Args:
      from_coco: whether the set is known to have COCO's images. Then ``000000391895.jpg`` counts as one too; in other
        sets that name may be any image, and a different one in each split.
    """
    match = _COCO_FILE.fullmatch(Path(name).name)
    return f"coco:{int(match[2])}" if match and (match[1] or from_coco) else None


def unique(ids: Sequence[str]) -> list[str]:
    """The ids in order; repeated ones get "-2", "-3" and so on."""
    taken: set[str] = set(ids)
    seen: Counter[str] = Counter()
    found = []
    for name in ids:
        seen[name] += 1
        if seen[name] > 1:
            fresh = f"{name}-{seen[name]}"
            while fresh in taken:
                seen[name] += 1
                fresh = f"{name}-{seen[name]}"
            name = fresh
            taken.add(name)
        found.append(name)
    return found


def read_json(path: Path) -> Any:
    """Reads a JSON file in UTF-8 or, like some of LISA's, in Windows' code page. Raises SourceError."""
    data = path.read_bytes()
    try:
        return json.loads(_decoded(data))
    except ValueError as error:
        raise SourceError(f"{path}: not JSON: {error}") from None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252")


def field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A required value. Raises SourceError, which names the keys that are there instead."""
    if not isinstance(row, Mapping) or name not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise SourceError(f"{where}: no {name!r}, found {has[:200]}")
    return row[name]


def rows(content: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """A required list. Raises SourceError."""
    return _of_kind(field(content, name, where), list, f"{where}: {name}: expected a list")


def key(row: Mapping[str, Any], name: str, where: str) -> int | str:
    """A required id. Raises SourceError."""
    return _of_kind(field(row, name, where), (int, str), f"{where}: {name}: expected a number or text")


def text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A required text. Raises SourceError."""
    value = _of_kind(field(row, name, where), str, f"{where}: {name}: expected text")
    if not is_text(value):
        raise SourceError(f"{where}: {name}: expected text, found halves of characters in {json.dumps(value)[:80]}")
    return value


def is_text(value: Any) -> bool:
    """Whether a value is text that can be stored: JSON can spell lone surrogates, which UTF-8 cannot encode."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def coordinates(value: Any, form: str, name: str, where: str = "") -> tuple[float, ...]:
    """As many numbers as ``form`` names, such as "[x, y]". Raises Unusable, which shows the value that is there."""
    count = form.count(",") + 1
    plain = isinstance(value, list) and all(type(v) in (int, float) and abs(v) < FAR for v in value)
    if not plain or len(value) != count:
        raise Unusable(f"{name} not like {form}", f"{where}{name} {json.dumps(value)[:80]}, expected {form}")
    return tuple(float(v) for v in value)


def centre(box: Box) -> Point:
    """The centre of a box, used as the point of a box without one."""
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, (y1 + y2) / 2


def _of_kind(value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    if not isinstance(value, kind):
        raise SourceError(f"{expected}, found {str(value)[:80]}")
    return value
