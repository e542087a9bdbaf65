"""RefCOCO, RefCOCO+ and RefCOCOg as the REFER toolkit has them: ``refs(unc).p`` or ``refs(umd).p``, ``instances.json``.

Source: lichengunc/refer, ``refer.py``. The pictures are COCO's train2014. A reference is one annotated object with
several sentences, each of which is a question.
"""

import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segzero_jax.data.forms.coco import annotation_mask
from segzero_jax.data.forms.form import Asked, Part, Shown, SourceError, Unreadable, field, read_json, unique
from segzero_jax.types import Frame

# The splits that papers report, before those by Google.
_PREFERRED = ("refs(unc).p", "refs(umd).p", "refs(google).p")
_PICTURES = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers and text; a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


@dataclass(frozen=True)
class Refer:
    """A folder with references, one for each of "refcoco", "refcoco+" and "refcocog".

    Attributes:
      root: where the pictures lie.
    """

    name: str
    root: Path
    references: Path

    @staticmethod
    def find(name: str, source: Path, images: Path | None) -> "Refer | None":
        """The references in ``source`` or in its folder ``name``; None where there are none.

        Raises SourceError where there are references without pictures.
        """
        for folder in (source, source / name):
            for file in _PREFERRED:
                if (folder / file).is_file():
                    return Refer(name, images or _find_pictures(folder, source), folder / file)
        return None

    def files(self) -> list[Path]:
        return [self.references, self._instances]

    @property
    def _instances(self) -> Path:
        return self.references.with_name("instances.json")

    def splits(self) -> dict[str, list[Part]]:
        instances = read_json(self._instances)
        images = {image["id"]: image for image in field(instances, "images", str(self._instances))}
        annotations = {a["id"]: a["segmentation"] for a in field(instances, "annotations", str(self._instances))}
        by_split: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for reference in self._read_references():
            where = f"{self.references}: reference {reference.get('ref_id')}"
            image_id = field(reference, "image_id", where)
            if image_id not in images:
                raise SourceError(f"{where}: image {image_id} is not in {self._instances.name}")
            by_split[field(reference, "split", where)][image_id].append(reference)
        return {split: self._parts(by_image, images, annotations) for split, by_image in by_split.items()}

    def _read_references(self) -> list[dict[str, Any]]:
        try:
            with self.references.open("rb") as file:
                # Written by Python 2.
                references = _PlainUnpickler(file, encoding="latin1").load()
        # What the unpickler raises on a file that is none.
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise SourceError(f"{self.references}: not a pickle of plain values: {error}") from None
        if not isinstance(references, list):
            raise SourceError(f"{self.references}: expected a list of references, got {type(references).__name__}")
        return references

    def _parts(self, by_image: dict[int, list[dict[str, Any]]], images: Any, annotations: Any) -> list[Part]:
        asked = [
            (image_id, reference, sentence)
            for image_id, references in by_image.items()
            for reference in references
            for sentence in field(reference, "sentences", f"{self.references}: reference {reference.get('ref_id')}")
        ]
        ids = unique([f"{self.name}-{sentence['sent_id']}" for _, _, sentence in asked])
        content: dict[int, list[Any]] = defaultdict(list)
        own: dict[int, list[str]] = defaultdict(list)
        for name, (image_id, reference, sentence) in zip(ids, asked, strict=True):
            text = sentence.get("sent") or sentence.get("raw") or ""
            content[image_id].append((text, reference["ref_id"], annotations.get(reference["ann_id"])))
            own[image_id].append(name)
        return [
            Part(tuple(own[image_id]), (_file_name(images[image_id]),), (images[image_id], rows))
            for image_id, rows in content.items()
        ]

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        image, rows = part.content
        frame = Frame(int(image["width"]), int(image["height"]))
        asked: list[Asked] = []
        masks: dict[int, Any] = {}
        for own, (text, reference, segmentation) in zip(part.ids, rows, strict=True):
            try:
                if reference not in masks:
                    masks[reference] = annotation_mask(segmentation, frame)
            except ValueError as error:
                yield Unreadable((own,), f"reference {reference}: {error}")
                continue
            asked.append(Asked(own, text, f"{self.name}:ref-{reference}", (masks[reference],)))
        file = part.pictures[0]
        yield Shown((self.root / file).read_bytes(), f"coco:{image['id']}", file, frame, tuple(asked))


def _find_pictures(folder: Path, source: Path) -> Path:
    bases = dict.fromkeys((folder, source, folder.parent, source.parent))
    for base in bases:
        for place in _PICTURES:
            if (base / place).is_dir():
                return base / place
    raise SourceError(
        f"{folder}: references without pictures, expected COCO's train2014 in {source / 'train2014'} or --images DIR"
    )


def _file_name(image: dict[str, Any]) -> str:
    return image.get("file_name") or f"COCO_train2014_{image['id']:012d}.jpg"
