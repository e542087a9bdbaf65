"""What all forms have in common: pictures with questions about them, read part by part in any process."""

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

# No corner is so far from its picture, in pixels: what draws one takes memory for each pixel between two corners.
FAR = 1e5
_COCO_FILE = re.compile(r"(COCO_(?:train|val|test)\d{4}_)?(\d{12})(?:_\d+)?(?:\.\w+)?")


class SourceError(ValueError):
    """A source that is not in the form it should be in; one line."""


@dataclass(frozen=True)
class Asked:
    """A question as its source has it.

    Attributes:
      masks: bool [H, W], one for each object that is meant; empty for a question without a target; None where the
        source has ``objects`` instead of masks.
      objects: the target boxes and points, where there are no masks.
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
    """A picture as its source has it, with the questions about it.

    Attributes:
      image: the encoded picture.
      image_id: its name, in no other split that of another picture; "coco:391895" for a picture of COCO.
      source: its file in the source, and the row where that holds several.
      annotated: the size that masks and objects speak of; None where they are in pixels of the upright picture.
      as_in_file: whether what speaks of the file's size speaks of its pixels as they lie in it, whatever EXIF says:
        COCO's tools do not look at EXIF.
    """

    image: bytes
    image_id: str
    source: str
    annotated: Frame | None
    questions: tuple[Asked, ...]
    as_in_file: bool = False


@dataclass(frozen=True)
class Unreadable:
    """Questions that could not be read, and why: see ``Unusable``."""

    ids: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Part:
    """What is read in one go: plain values that are sent to another process.

    Attributes:
      ids: of its questions, in order.
      pictures: the files of its pictures, relative to the form's ``root``; empty where they lie in other files.
      content: what the form needs to read it.
      centred: how many target boxes have neither a point nor a mask, so that their centres are taken for points.
    """

    ids: tuple[str, ...]
    pictures: tuple[str, ...]
    content: Any
    centred: int = 0


class Form(Protocol):
    """A source in a form. Made in one process, it reads parts in others."""

    @property
    def root(self) -> Path:
        """The folder that pictures are relative to."""

    def files(self) -> list[Path]:
        """The files with annotations; their content is the source's identity."""

    def splits(self) -> dict[str, list[Part]]:
        """All there is to read. Raises SourceError for annotations that are not in this form."""

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        """The pictures of a part. What is wrong with one of them is yielded; it does not raise."""


def coco_id(name: str, from_coco: bool = False) -> str | None:
    """ "coco:391895" for a file name of COCO's, such as ``COCO_train2014_000000391895.jpg``, else None.

    Args:
      from_coco: whether the set is known to have COCO's pictures. Then ``000000391895.jpg`` is one too; elsewhere it
        may be anybody's, and another picture in each split.
    """
    match = _COCO_FILE.fullmatch(Path(name).name)
    return f"coco:{int(match[2])}" if match and (match[1] or from_coco) else None


def unique(ids: Sequence[str]) -> list[str]:
    """The ids in order; one that has come before gets "-2", "-3" and so on."""
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
    """A JSON file in UTF-8 or, as some of LISA's are, in Windows' code page. Raises SourceError."""
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
    """A value that must be there. Raises SourceError, which names what is there instead."""
    if not isinstance(row, Mapping) or name not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise SourceError(f"{where}: no {name!r}, found {has[:200]}")
    return row[name]


def rows(content: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """A list that must be there. Raises SourceError."""
    return _of_kind(field(content, name, where), list, f"{where}: {name}: expected a list")


def key(row: Mapping[str, Any], name: str, where: str) -> int | str:
    """An id that must be there. Raises SourceError."""
    return _of_kind(field(row, name, where), (int, str), f"{where}: {name}: expected a number or text")


def text(row: Mapping[str, Any], name: str, where: str) -> str:
    """Text that must be there. Raises SourceError."""
    value = _of_kind(field(row, name, where), str, f"{where}: {name}: expected text")
    if not is_text(value):
        raise SourceError(f"{where}: {name}: expected text, found halves of characters in {json.dumps(value)[:80]}")
    return value


def is_text(value: Any) -> bool:
    """Whether it is text that can be stored: JSON can spell halves of characters, which UTF-8 has not."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def coordinates(value: Any, form: str, name: str, where: str = "") -> tuple[float, ...]:
    """As many numbers as ``form`` names, such as "[x, y]". Raises Unusable, which shows what is there instead."""
    count = form.count(",") + 1
    plain = isinstance(value, list) and all(type(v) in (int, float) and abs(v) < FAR for v in value)
    if not plain or len(value) != count:
        raise Unusable(f"{name} not like {form}", f"{where}{name} {json.dumps(value)[:80]}, expected {form}")
    return tuple(float(v) for v in value)


def centre(box: Box) -> Point:
    """What stands in for a point where a box has none."""
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, (y1 + y2) / 2


def _of_kind(value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    if not isinstance(value, kind):
        raise SourceError(f"{expected}, found {str(value)[:80]}")
    return value
