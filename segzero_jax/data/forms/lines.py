"""The user's own data: a folder with images, masks, and a ``SPLIT.jsonl`` for each split.

A line is one question, with paths relative to the folder:

    {"image": "images/a.jpg", "question": "the red mug", "mask": "masks/a.png"}
    {"image": "images/a.jpg", "question": "both mugs", "masks": ["masks/a-1.png", "masks/a-2.png"]}
    {"image": "images/b.jpg", "question": "the sofa", "objects": [{"bbox_2d": [10, 20, 90, 80], "point_2d": [50, 60]}]}
    {"image": "images/b.jpg", "question": "the chair", "objects": [{"bbox_2d": [10, 20, 90, 80]}]}
    {"image": "images/b.jpg", "question": "the mug", "masks": []}

A mask is an image of the same size, in a lossless format, 0 outside the object. No masks mean that nothing answers the
question. Objects are in pixels of the upright image, both corners of a box inclusive; for a box without a point, the
centre is used.
Optional: ``id``, ``instance`` (the same for several questions about the same thing), ``ignore`` (a mask of pixels that
do not count).
"""

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segzero_jax.data.forms.form import (
    Asked,
    Part,
    Shown,
    SourceError,
    Unreadable,
    centre,
    coco_id,
    coordinates,
    field,
    is_text,
    unique,
)
from segzero_jax.data.mask_files import read_mask
from segzero_jax.data.pictures import upright_size
from segzero_jax.data.unusable import Unusable, kind_of
from segzero_jax.decoding import UNDECODABLE, cause
from segzero_jax.types import Frame, ObjectPrompt

_TARGETS = ("mask", "masks", "objects")


@dataclass(frozen=True)
class Lines:
    """A folder with ``SPLIT.jsonl`` files, to which mask paths are relative.

    Attributes:
      images: the folder that image paths are relative to, if it differs.
    """

    name: str
    folder: Path
    images: Path | None = None

    @property
    def root(self) -> Path:
        return self.images or self.folder

    def files(self) -> list[Path]:
        """The JSONL files, and those of the mask files in them that exist."""
        tables = self._tables()
        named = {file for path in tables for row in _rows(path) for file in _mask_files(row)}
        return [*tables, *(path for file in sorted(named) if (path := self.folder / file).is_file())]

    def splits(self) -> dict[str, list[Part]]:
        return {path.stem: self._parts(path) for path in self._tables()}

    def _tables(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def _parts(self, path: Path) -> list[Part]:
        rows = _rows(path)
        given = [row.get("id") for row in rows]
        ids = iter(unique([f"{path.stem}-{n:06d}" if one is None else str(one) for n, one in enumerate(given)]))
        parts = []
        # Consecutive lines about the same image share it.
        for image, group in itertools.groupby(rows, key=lambda row: row["image"]):
            asked = list(group)
            centred = sum(_has_no_point(obj) for row in asked for obj in row.get("objects", ()))
            parts.append(Part(tuple(next(ids) for _ in asked), (image,), asked, centred))
        return parts

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        (file,) = part.pictures
        name = coco_id(file) or f"{self.name}:{file}"
        masked: list[Asked] = []
        boxed: list[Asked] = []
        for own, row in zip(part.ids, part.content, strict=True):
            try:
                question = self._question(own, row, name)
            except UNDECODABLE as error:
                yield Unreadable((own,), kind_of(error, "a mask cannot be read"), cause(error))
                continue
            (boxed if question.masks is None else masked).append(question)
        data = (self.root / file).read_bytes()
        # Two records, since all objects of a record have the same number of points: two from a mask, one from a box.
        if masked:
            yield Shown(data, name, file, _annotated(data, masked), tuple(masked))
        if boxed:
            yield Shown(data, name, file, None, tuple(boxed))

    def _question(self, own: str, row: dict[str, Any], picture: str) -> Asked:
        instance = f"{picture}:{own if row.get('instance') is None else row['instance']}"
        ignore = self._mask(row["ignore"]) if row.get("ignore") else None
        if "objects" in row:
            objects = tuple(_object(given, f"object {n}") for n, given in enumerate(row["objects"]))
            return Asked(own, row["question"], instance, objects=objects, ignore=ignore)
        files = row["masks"] if "masks" in row else [row["mask"]]
        masks = tuple(self._mask(file) for file in files)
        return Asked(own, row["question"], instance, masks, ignore=ignore)

    def _mask(self, file: str) -> np.ndarray:
        return read_mask((self.folder / file).read_bytes(), file)


def _annotated(data: bytes, asked: Sequence[Asked]) -> Frame | None:
    """The size of the unrotated image if masks have that size and none has the upright image's; else None.

    A mask of neither size is an error in its own question only.
    """
    sizes = {mask.shape for one in asked for mask in (*(one.masks or ()), one.ignore) if mask is not None}
    try:
        upright = upright_size(data)
        with Image.open(io.BytesIO(data)) as image:
            unturned = Frame(image.width, image.height)
    except UNDECODABLE:
        return None  # The error is reported when the image is decoded.
    found = (unturned.height, unturned.width) in sizes and (upright.height, upright.width) not in sizes
    return unturned if found else None


def _object(given: Any, where: str) -> ObjectPrompt:
    """An object's box and point. Raises Unusable, which names the missing or malformed value."""
    if not isinstance(given, dict) or "bbox_2d" not in given:
        found = ", ".join(given)[:80] if isinstance(given, dict) else _shown(given)
        raise Unusable("bbox_2d is missing", f"{where}: bbox_2d is missing, found {found or 'nothing'}")
    x1, y1, x2, y2 = coordinates(given["bbox_2d"], "[x1, y1, x2, y2]", "bbox_2d", f"{where}: ")
    box = (x1, y1, x2, y2)
    if _has_no_point(given):
        return ObjectPrompt(box=box, points=(centre(box),))
    x, y = coordinates(given["point_2d"], "[x, y]", "point_2d", f"{where}: ")
    return ObjectPrompt(box=box, points=((x, y),))


def _has_no_point(given: Any) -> bool:
    return isinstance(given, dict) and "bbox_2d" in given and given.get("point_2d") is None


def _check(row: Any, where: str) -> None:
    """Raises SourceError, which names the line, if a line is invalid."""
    for name in ("image", "question"):
        if not is_text(field(row, name, where)):
            raise SourceError(f"{where}: {name} {_shown(row[name])}, expected text")
    if sum(key in row for key in _TARGETS) != 1:
        raise SourceError(f"{where}: expected one of {', '.join(_TARGETS)}, found {', '.join(row)}")
    for name in ("mask", "ignore"):
        if row.get(name) is not None and not is_text(row[name]):
            raise SourceError(f"{where}: {name} {_shown(row[name])}, expected text")
    if "mask" in row and not row["mask"]:
        raise SourceError(f"{where}: mask {_shown(row['mask'])}, expected a file; where nothing answers: masks []")
    masks = row.get("masks", [])
    if not isinstance(masks, list) or not all(map(is_text, masks)):
        raise SourceError(f"{where}: masks {_shown(masks)}, expected a list of text")
    if not isinstance(row.get("objects", []), list):
        raise SourceError(f"{where}: objects {_shown(row['objects'])}, expected a list")


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def _mask_files(row: dict[str, Any]) -> list[str]:
    return [file for file in (row.get("mask"), *row.get("masks", ()), row.get("ignore")) if file]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The parsed lines, without empty ones. Raises SourceError for an invalid line."""
    located = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        if line.strip():
            try:
                located.append((where, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{where}: not JSON: {error}") from None
    for where, row in located:
        _check(row, where)
    return [row for _, row in located]
