"""COCO annotations: polygons and run-length encodings, and data sets with one JSON file per split."""

import mmap
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco

from segzero_jax.data.forms.form import (
    FAR,
    Asked,
    Part,
    Shown,
    SourceError,
    Unreadable,
    centre,
    coco_id,
    coordinates,
    field,
    key,
    read_json,
    rows,
    text,
    unique,
)
from segzero_jax.data.targets import target_object
from segzero_jax.data.unusable import Unusable, kind_of
from segzero_jax.run_lengths import decode_counts
from segzero_jax.types import Frame, ObjectPrompt

# Files of other tasks on the same images, beside instances_train2017.json in COCO's archive.
OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
# The kind of every malformed segmentation.
NO_SEGMENTATION = "a segmentation that is none of COCO's"
_LISTS = re.compile(rb'"(images|annotations)"\s*:\s*\[')
_SPLIT = re.compile(r"(?:\w+_)?(train|val|test)\d{4}")


def annotation_mask(segmentation: Any, frame: Frame) -> np.ndarray:
    """The bool [H, W] mask of an annotation: one or several polygons, or run lengths as a list or compressed.

    Raises Unusable for another form, or for run lengths of another size.
    """
    if isinstance(segmentation, Mapping):
        return coco.decode(_run_lengths(segmentation, frame)).astype(bool)
    if not isinstance(segmentation, list):
        raise Unusable(NO_SEGMENTATION, f"segmentation {str(segmentation)[:80]}: expected polygons or run lengths")
    flat = any(isinstance(value, int | float) for value in segmentation)
    polygons = [_corners(polygon) for polygon in ([segmentation] if flat else segmentation)]
    drawn = [polygon for polygon in polygons if len(polygon) >= 6]
    if not drawn:
        return np.zeros((frame.height, frame.width), bool)
    return coco.decode(coco.merge(coco.frPyObjects(drawn, frame.height, frame.width))).astype(bool)


def _corners(polygon: Any) -> list[float]:
    """A validated polygon, with coordinates small enough to rasterise. Raises Unusable."""
    fine = isinstance(polygon, list) and all(isinstance(v, int | float) and abs(v) < FAR for v in polygon)
    if not fine or len(polygon) % 2:
        raise Unusable(NO_SEGMENTATION, f"polygon {str(polygon)[:80]}: expected [x, y, x, y, ...]")
    return [float(v) for v in polygon]


def _run_lengths(segmentation: Mapping[str, Any], frame: Frame) -> Any:
    """Run lengths for pycocotools, checked to cover every pixel: it would make up missing ones. Raises Unusable."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [frame.height, frame.width]:
        kind = "run lengths of another size than the picture"
        raise Unusable(kind, f"mask of size {size}, expected [{frame.height}, {frame.width}]")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts):
            raise Unusable(NO_SEGMENTATION, f"run lengths {str(counts)[:80]}: expected whole numbers from 0")
        total = sum(counts)
        compressed = {"size": size, "counts": counts}
    elif isinstance(counts, str | bytes):
        encoded = counts.encode() if isinstance(counts, str) else counts
        try:
            runs = decode_counts(encoded.decode("latin-1"))
        except ValueError as error:
            raise Unusable(NO_SEGMENTATION, str(error)) from None
        if min(runs, default=0) < 0:
            raise Unusable(NO_SEGMENTATION, f"run lengths {encoded[:80]!r}: expected none below 0")
        total = sum(runs)
        compressed = {"size": size, "counts": encoded}
    else:
        raise Unusable(NO_SEGMENTATION, f"counts {str(counts)[:80]}: expected run lengths")
    if total != frame.height * frame.width:
        kind = "run lengths of another size than the picture"
        raise Unusable(kind, f"run lengths for {total} pixels, expected the picture's {frame.height * frame.width}")
    return coco.frPyObjects(compressed, frame.height, frame.width) if isinstance(counts, list) else compressed


class _Boxed(NamedTuple):
    """A box that stands in for a missing segmentation."""

    bbox: Any


@dataclass(frozen=True)
class CocoJson:
    """``SPLIT.json`` files with ``images``, ``annotations`` and ``questions``, beside the images.

    A question is ``{"image_id": …, "text": …, "annotation_ids": […]}``; no annotations mean that nothing in the image
    answers it. A file without ``questions``, such as COCO's own, asks for every category in an image, with all its
    instances as targets; crowds are ignored pixels. For an annotation without a segmentation, its ``bbox`` is used.
    """

    name: str
    root: Path
    annotations: tuple[Path, ...]

    @staticmethod
    def find(name: str, source: Path, images: Path | None) -> "CocoJson | None":
        """The JSON files in ``source`` and in its folder ``annotations``; None if there are none."""
        found = annotation_files(source)
        found = [path for path in found if is_cocos(path)] or found
        return CocoJson(name, images or source, tuple(found)) if found else None

    def files(self) -> list[Path]:
        return list(self.annotations)

    def splits(self) -> dict[str, list[Part]]:
        of_split: dict[str, Path] = {}
        for path in self.annotations:
            split = _split(path)
            if split in of_split:
                raise SourceError(f"{path}: split {split}, which {of_split[split]} is too; expected one file a split")
            of_split[split] = path
        return {split: self._parts(path, read_json(path)) for split, path in of_split.items()}

    def _parts(self, path: Path, content: Any) -> list[Part]:
        images = by_id(content, "images", path)
        annotations = by_id(content, "annotations", path)
        where = f"{path}: questions"
        asked = rows(content, "questions", str(path)) if "questions" in content else _by_category(content, path)
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for question in asked:
            by_image[key(question, "image_id", where)].append(question)
        unknown = [image for image in by_image if image not in images]
        if unknown:
            raise SourceError(f"{path}: questions about image_id {unknown[0]!r}, which is not among its images")
        named = [(image, question.get("id")) for image in by_image for question in by_image[image]]
        ids = iter(unique([f"{path.stem}-{image}" if own is None else str(own) for image, own in named]))
        parts = []
        for image_id, questions in by_image.items():
            read = [
                (
                    text(question, "text", where),
                    [_outline(*one) for one in _named(question, "annotation_ids", annotations, path)],
                    [row.get("segmentation") or [] for row, _ in _named(question, "ignored_ids", annotations, path)],
                    # Questions without a target do not share an instance.
                    str(question["annotation_ids"]) if question.get("annotation_ids") else None,
                )
                for question in questions
            ]
            image, about = images[image_id], f"{path}: image {image_id}"
            file = self._picture(text(image, "file_name", about), path)
            own = tuple(next(ids) for _ in questions)
            centred = sum(isinstance(one, _Boxed) for _, meant, *_ in read for one in meant)
            parts.append(Part(own, (file,), (self._name(image, file), annotated_size(image, about), read), centred))
        return parts

    def _name(self, image: Mapping[str, Any], file: str) -> str:
        # COCO's own files have a coco_url for each image. Ids are not unique across files.
        return coco_id(image["file_name"], from_coco=bool(image.get("coco_url"))) or f"{self.name}:{file}"

    def _picture(self, file_name: str, path: Path) -> str:
        """The image's path relative to ``root``; if it is not found, the first path tried."""
        folders = ("images/", "", f"{path.stem}/", f"{path.stem.split('_')[-1]}/", f"{_split(path)}/")
        places = [f"{folder}{file_name}" for folder in folders]
        return next((place for place in places if (self.root / place).is_file()), places[0])

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        name, frame, questions = part.content
        masked: list[Asked] = []
        boxed: list[Asked] = []
        for own, (question, meant, ignored, instance) in zip(part.ids, questions, strict=True):
            about = f"{name}:{instance or own}"
            try:
                crowd = [annotation_mask(segmentation, frame) for segmentation in ignored]
                ignore = np.logical_or.reduce(crowd) if crowd else None
                if any(isinstance(one, _Boxed) for one in meant):
                    boxed.append(Asked(own, question, about, objects=_objects(meant, frame), ignore=ignore))
                else:
                    masks = tuple(annotation_mask(segmentation, frame) for segmentation in meant)
                    masked.append(Asked(own, question, about, masks, ignore=ignore))
            except ValueError as error:
                yield Unreadable((own,), kind_of(error, NO_SEGMENTATION), str(error))
        data = (self.root / part.pictures[0]).read_bytes()
        # Two records, since all objects of a record have the same number of points: two from a mask, one from a box.
        for asked in (masked, boxed):
            if asked:
                yield Shown(data, name, part.pictures[0], frame, tuple(asked), as_in_file=True)


def _split(path: Path) -> str:
    match = _SPLIT.fullmatch(path.stem)
    return match[1] if match else path.stem


def annotation_files(source: Path) -> list[Path]:
    """The JSON files in a folder and in its folder ``annotations``; of COCO's archive, only those with instances."""
    found = sorted([*source.glob("*.json"), *source.glob("annotations/*.json")])
    if any(path.name.startswith("instances_") for path in found):
        found = [path for path in found if not path.name.startswith(OTHER_TASKS)]
    return found


def is_cocos(path: Path) -> bool:
    """Whether a JSON file has COCO's lists; truncated files count too, so that they are reported."""
    if path.name.startswith(OTHER_TASKS) or not path.stat().st_size:  # An empty file cannot be mapped.
        return False
    # COCO's own file has half a gigabyte, with its lists near the start.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _LISTS.search(content) is not None


def by_id(content: Any, name: str, path: Path) -> dict[Any, Any]:
    """The rows of a list in COCO's JSON, by id. Raises SourceError."""
    where = f"{path}: {name}"
    found: dict[Any, Any] = {}
    for row in rows(content, name, str(path)):
        number = key(row, "id", where)
        # Happens in files that were merged without renumbering; rows would be mixed up.
        if found.setdefault(number, row) != row:
            raise SourceError(f"{where}: two with id {number!r}, expected one")
    return found


def annotated_size(image: Any, where: str) -> Frame:
    """The image size that annotations refer to. Raises SourceError."""
    width, height = (field(image, side, where) for side in ("width", "height"))
    if not all(isinstance(side, int | float) and side >= 1 and side % 1 == 0 for side in (width, height)):
        raise SourceError(f"{where}: size {width} x {height}, expected whole numbers from 1")
    return Frame(int(width), int(height))


def _named(
    question: Mapping[str, Any], name: str, annotations: Mapping[Any, Any], path: Path
) -> list[tuple[Mapping[str, Any], str]]:
    """The annotations that a question names, each with its name for error messages."""
    found = []
    # ``ignored_ids`` is optional, ``annotation_ids`` is required.
    asked = question if name == "annotation_ids" else {name: [], **question}
    for wanted in rows(asked, name, f"{path}: questions"):
        if not isinstance(wanted, int | str) or wanted not in annotations:
            raise SourceError(f"{path}: a question refers to annotation {wanted!r}, which does not exist")
        image = annotations[wanted].get("image_id", question["image_id"])
        if image != question["image_id"]:
            raise SourceError(
                f"{path}: a question about image {question['image_id']!r} means annotation {wanted!r}, "
                f"which is in image {image!r}"
            )
        found.append((annotations[wanted], f"{path}: annotation {wanted}"))
    return found


def _outline(annotation: Mapping[str, Any], where: str) -> Any:
    """The segmentation of an annotation or, if it has none, its box. Raises SourceError if it has neither."""
    if annotation.get("segmentation") in (None, [], [[]]) and "bbox" in annotation:
        return _Boxed(annotation["bbox"])
    return field(annotation, "segmentation", where)


def _objects(meant: list[Any], frame: Frame) -> tuple[ObjectPrompt, ...]:
    """Targets, at least one of which has no mask: each with one point, from its mask or at the centre of its box."""
    found = []
    for one in meant:
        if isinstance(one, _Boxed):
            x, y, width, height = coordinates(one.bbox, "[x, y, width, height]", "bbox")
            box = (x, y, x + width - 1, y + height - 1)  # Both corners belong to a target.
            found.append(ObjectPrompt(box=box, points=(centre(box),)))
        elif (target := target_object(annotation_mask(one, frame))) is not None:
            found.append(ObjectPrompt(box=target.box, points=target.points[:1]))
        else:
            raise Unusable("a target mask without pixels")
    return tuple(found)


def _by_category(content: Any, path: Path) -> list[dict[str, Any]]:
    """One question for every category in an image."""
    categories = by_id({"categories": [], **content}, "categories", path)
    names = {number: field(category, "name", f"{path}: categories") for number, category in categories.items()}
    grouped: dict[tuple[Any, Any], dict[str, list[Any]]] = {}
    for annotation in content["annotations"]:
        where = f"{path}: annotation {annotation['id']}"
        pair = (key(annotation, "image_id", where), key(annotation, "category_id", where))
        group = grouped.setdefault(pair, {"annotation_ids": [], "ignored_ids": []})
        group["ignored_ids" if annotation.get("iscrowd") else "annotation_ids"].append(annotation["id"])
    return [
        {"id": f"{image}-{category}", "image_id": image, "text": str(names.get(category, category)), **group}
        for (image, category), group in grouped.items()
        if group["annotation_ids"]
    ]
