"""COCO's annotations: polygons and run lengths, and data sets in one JSON file a split."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from segzero_jax.data.forms.form import Asked, Part, Shown, SourceError, Unreadable, coco_id, field, read_json, unique
from segzero_jax.types import Frame

# Beside instances_train2017.json in COCO's archive: other tasks on the same pictures.
_OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
_SPLIT = re.compile(r"(?:\w+_)?(train|val|test)\d{4}")


def annotation_mask(segmentation: Any, frame: Frame) -> np.ndarray:
    """The bool [H, W] mask of an annotation: polygons, run lengths as a list, or compressed ones.

    Raises ValueError for another form, or run lengths of another size.
    """
    if isinstance(segmentation, Mapping):
        size = list(segmentation.get("size", []))
        if size != [frame.height, frame.width]:
            raise ValueError(f"mask of size {size}, expected [{frame.height}, {frame.width}]")
        if isinstance(segmentation.get("counts"), list):
            if sum(segmentation["counts"]) != frame.height * frame.width:
                raise ValueError(f"run lengths for {sum(segmentation['counts'])} pixels, expected the picture's")
            runs = coco.frPyObjects(dict(segmentation), frame.height, frame.width)
        else:
            counts = segmentation["counts"]
            runs = {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}
        return coco.decode(runs).astype(bool)
    if not isinstance(segmentation, list):
        raise ValueError(f"segmentation {str(segmentation)[:80]}: expected polygons or run lengths")
    polygons = [[float(v) for v in polygon] for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return np.zeros((frame.height, frame.width), bool)
    return coco.decode(coco.merge(coco.frPyObjects(polygons, frame.height, frame.width))).astype(bool)


@dataclass(frozen=True)
class CocoJson:
    """``SPLIT.json`` files with ``images``, ``annotations`` and ``questions``, beside the pictures.

    A question is ``{"image_id": …, "text": …, "annotation_ids": […]}``; no annotations mean that nothing in the picture
    answers it. A file without ``questions``, such as COCO's own, asks for every category that is in a picture, with all
    its instances as targets; crowds are pixels that do not count.
    """

    name: str
    root: Path
    annotations: tuple[Path, ...]

    @staticmethod
    def find(name: str, source: Path, images: Path | None) -> "CocoJson | None":
        """The JSON files in ``source`` and in its folder ``annotations``; None where there are none."""
        found = sorted([*source.glob("*.json"), *source.glob("annotations/*.json")])
        if any(path.name.startswith("instances_") for path in found):
            found = [path for path in found if not path.name.startswith(_OTHER_TASKS)]
        return CocoJson(name, images or source, tuple(found)) if found else None

    def files(self) -> list[Path]:
        return list(self.annotations)

    def splits(self) -> dict[str, list[Part]]:
        of_split: dict[str, Path] = {}
        for path in self.annotations:
            match = _SPLIT.fullmatch(path.stem)
            split = match[1] if match else path.stem
            if split in of_split:
                raise SourceError(f"{path}: split {split}, which {of_split[split]} is too; expected one file a split")
            of_split[split] = path
        return {split: self._parts(path, read_json(path)) for split, path in of_split.items()}

    def _parts(self, path: Path, content: Any) -> list[Part]:
        images = {field(image, "id", f"{path}: images"): image for image in field(content, "images", str(path))}
        annotations = {a["id"]: a for a in field(content, "annotations", str(path))}
        asked = content["questions"] if "questions" in content else _by_category(content)
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for question in asked:
            by_image[field(question, "image_id", f"{path}: questions")].append(question)
        unknown = [image for image in by_image if image not in images]
        if unknown:
            raise SourceError(f"{path}: questions about image_id {unknown[0]!r}, which is not among its images")
        ids = iter(unique([str(q.get("id", f"{path.stem}-{i}")) for i in by_image for q in by_image[i]]))
        parts = []
        for image_id, questions in by_image.items():
            rows = [
                (
                    field(question, "text", f"{path}: questions"),
                    [_annotation(annotations, a, path) for a in question.get("annotation_ids", [])],
                    [_annotation(annotations, a, path) for a in question.get("ignored_ids", [])],
                    str(question.get("annotation_ids", [])),
                )
                for question in questions
            ]
            file = self._picture(images[image_id]["file_name"], path)
            own = tuple(next(ids) for _ in questions)
            parts.append(Part(own, (file,), (images[image_id], rows)))
        return parts

    def _picture(self, file_name: str, path: Path) -> str:
        """Relative to ``root``; where it is nowhere, the first place that was looked at."""
        places = [f"{folder}{file_name}" for folder in ("images/", "", f"{path.stem}/", f"{path.stem.split('_')[-1]}/")]
        return next((place for place in places if (self.root / place).is_file()), places[0])

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        image, rows = part.content
        frame = Frame(int(image["width"]), int(image["height"]))
        # COCO's own files say where each picture is on its site. Ids are another picture's in another file.
        known = coco_id(image["file_name"], from_coco=bool(image.get("coco_url")))
        name = known or f"{self.name}:{part.pictures[0]}"
        asked = []
        for own, (text, meant, ignored, instance) in zip(part.ids, rows, strict=True):
            try:
                masks = tuple(annotation_mask(segmentation, frame) for segmentation in meant)
                crowd = [annotation_mask(segmentation, frame) for segmentation in ignored]
            except ValueError as error:
                yield Unreadable((own,), str(error))
                continue
            ignore = np.logical_or.reduce(crowd) if crowd else None
            asked.append(Asked(own, text, f"{name}:{instance}", masks, ignore=ignore))
        data = (self.root / part.pictures[0]).read_bytes()
        yield Shown(data, name, part.pictures[0], frame, tuple(asked))


def _annotation(annotations: Mapping[Any, Any], wanted: Any, path: Path) -> Any:
    if wanted not in annotations:
        raise SourceError(f"{path}: a question means annotation {wanted!r}, which is not there")
    return annotations[wanted]["segmentation"]


def _by_category(content: Any) -> list[dict[str, Any]]:
    """One question for every category in a picture."""
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    grouped: dict[tuple[Any, Any], dict[str, list[Any]]] = {}
    for annotation in content["annotations"]:
        key = (annotation["image_id"], annotation["category_id"])
        group = grouped.setdefault(key, {"annotation_ids": [], "ignored_ids": []})
        group["ignored_ids" if annotation.get("iscrowd") else "annotation_ids"].append(annotation["id"])
    return [
        {"id": f"{image}-{category}", "image_id": image, "text": str(names.get(category, category)), **group}
        for (image, category), group in grouped.items()
        if group["annotation_ids"]
    ]
