"""RefCOCO, RefCOCO+ and RefCOCOg in the REFER toolkit's form: ``refs(unc).p`` or ``refs(umd).p``, ``instances.json``.

Source: lichengunc/refer, ``refer.py``. The images are COCO's train2014. A reference is one annotated object with
several sentences, each of which is a question.
"""

import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segzero_jax.data.forms.coco import NO_SEGMENTATION, annotated_size, annotation_mask, by_id
from segzero_jax.data.forms.form import (
    Asked,
    Part,
    Shown,
    SourceError,
    Unreadable,
    key,
    read_json,
    rows,
    text,
    unique,
)
from segzero_jax.data.unusable import kind_of

# The splits that papers report come before those by Google.
_PREFERRED = ("refs(unc).p", "refs(umd).p", "refs(google).p")
_PICTURES = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")


class _PlainUnpickler(pickle.Unpickler):
    """Reads only lists, dicts, numbers and text; any other pickle could run arbitrary code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


@dataclass(frozen=True)
class Refer:
    """A folder with references, one for each of "refcoco", "refcoco+" and "refcocog".

    Attributes:
      root: the folder of the images.
    """

    name: str
    root: Path
    references: Path

    @staticmethod
    def find(name: str, source: Path, images: Path | None) -> "Refer | None":
        """The references in ``source`` or in its folder ``name``; None if there are none.

        Raises SourceError for references without images.
        """
        references = find_references(name, source)
        if references is None:
            return None
        return Refer(name, images or _find_pictures(references.parent, source), references)

    def files(self) -> list[Path]:
        return [self.references, self._instances]

    @property
    def _instances(self) -> Path:
        return self.references.with_name("instances.json")

    def splits(self) -> dict[str, list[Part]]:
        instances = read_json(self._instances)
        images = by_id(instances, "images", self._instances)
        annotations = by_id(instances, "annotations", self._instances)
        by_split: dict[str, dict[Any, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for reference in self._read_references():
            where = f"{self.references}: reference {key(reference, 'ref_id', str(self.references))}"
            image_id = key(reference, "image_id", where)
            if image_id not in images:
                raise SourceError(f"{where}: image {image_id} is not in {self._instances.name}")
            by_split[text(reference, "split", where)][image_id].append(reference)
        return {split: self._parts(by_image, images, annotations) for split, by_image in by_split.items()}

    def _read_references(self) -> list[dict[str, Any]]:
        try:
            with self.references.open("rb") as file:
                # Written by Python 2.
                references = _PlainUnpickler(file, encoding="latin1").load()
        # Errors that the unpickler raises on a file that is not a pickle.
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise SourceError(f"{self.references}: not a pickle of plain values: {error}") from None
        if not isinstance(references, list):
            raise SourceError(f"{self.references}: expected a list of references, got {type(references).__name__}")
        return references

    def _parts(self, by_image: dict[Any, list[dict[str, Any]]], images: Any, annotations: Any) -> list[Part]:
        asked = [
            (image_id, reference, sentence)
            for image_id, references in by_image.items()
            for reference in references
            for sentence in rows(reference, "sentences", f"{self.references}: reference {reference['ref_id']}")
        ]
        where = f"{self.references}: sentences"
        ids = unique([f"{self.name}-{key(sentence, 'sent_id', where)}" for _, _, sentence in asked])
        content: dict[Any, list[Any]] = defaultdict(list)
        own: dict[Any, list[str]] = defaultdict(list)
        for name, (image_id, reference, sentence) in zip(ids, asked, strict=True):
            question = str(sentence.get("sent") or sentence.get("raw") or "")
            meant = key(reference, "ann_id", f"{self.references}: reference {reference['ref_id']}")
            outline = annotations.get(meant, {}).get("segmentation")
            content[image_id].append((question, reference["ref_id"], outline))
            own[image_id].append(name)
        parts = []
        for image_id, questions in content.items():
            image, where = images[image_id], f"{self._instances}: image {image_id}"
            read = f"coco:{image_id}", annotated_size(image, where), questions
            parts.append(Part(tuple(own[image_id]), (_file_name(image),), read))
        return parts

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        name, frame, questions = part.content
        asked: list[Asked] = []
        masks: dict[int, Any] = {}
        for own, (question, reference, segmentation) in zip(part.ids, questions, strict=True):
            try:
                if reference not in masks:
                    masks[reference] = annotation_mask(segmentation, frame)
            except ValueError as error:
                yield Unreadable((own,), kind_of(error, NO_SEGMENTATION), f"reference {reference}: {error}")
                continue
            asked.append(Asked(own, question, f"{self.name}:ref-{reference}", (masks[reference],)))
        file = part.pictures[0]
        yield Shown((self.root / file).read_bytes(), name, file, frame, tuple(asked), as_in_file=True)


def find_references(name: str, source: Path) -> Path | None:
    """The references file in a folder or in its subfolder ``name``; None if there is none."""
    places = (folder / file for folder in (source, source / name) for file in _PREFERRED)
    return next((path for path in places if path.is_file()), None)


def first_below(source: Path) -> Path | None:
    """The first references file of any data set in the subfolders of a folder."""
    return min((path for file in _PREFERRED for path in source.glob(f"*/{file}")), default=None)


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
