"""The stored form of a question set: one record per image, with all questions about it.

Data sets ask several questions about an image, and images take most of the space, so each is stored once. Beside the
records of a split is its *index*, a parquet file with one row per question: its position, and metadata of the question
and its image that can be read without the record.

Coordinates are whole pixels of the stored image, boxes inclusive.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask

# For TFDS: the folder of all built sets, and the version of this form.
BUILT = "question_set"
VERSION = "1.0.0"
_BLOCK = 4096

FEATURES = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(shape=(None, None, 3), doc="PNG, JPEG or WebP: upright, 8 bits, no transparency"),
        "image_id": tfds.features.Text(doc="the picture's name in its source"),
        "image_sha256": tfds.features.Text(doc="of the file in the source"),
        "source": tfds.features.Text(doc="the file in the source, and the row where it holds several"),
        "img_height": tfds.features.Scalar(dtype=np.int32),
        "img_width": tfds.features.Scalar(dtype=np.int32),
        "questions": tfds.features.Sequence(
            {
                "id": tfds.features.Text(),
                "text": tfds.features.Text(),
                "instance_id": tfds.features.Text(doc="the same for all expressions of the same thing"),
                "mask": tfds.features.Text(doc="COCO compressed run lengths, empty where there is no mask"),
                "ignore": tfds.features.Text(doc="the same, of pixels that do not count"),
                "objects": tfds.features.Scalar(dtype=np.int32, doc="how many of the boxes are its own"),
            }
        ),
        "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.int32, doc="x1, y1, x2, y2, inclusive"),
        "points": tfds.features.Tensor(shape=(None, 2), dtype=np.int32, doc="x, y; as many for every box"),
    }
)
INDEX = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("record", pa.int32()),  # index in the split
        ("place", pa.int32()),  # index in the record
        ("image_id", pa.string()),
        ("image_sha256", pa.string()),
        ("fingerprint", pa.binary(32)),  # see pictures.py
        ("instance_id", pa.string()),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True)
class Question:
    """One question about an image, ready to be stored.

    Attributes:
      mask, ignore: COCO compressed run lengths at the size of the image; empty for none.
    """

    id: str
    text: str
    objects: tuple[ObjectPrompt, ...]
    mask: str = ""
    ignore: str = ""
    instance_id: str = ""


def to_record(
    image: bytes, frame: Frame, image_id: str, image_sha256: str, source: str, questions: Sequence[Question]
) -> dict[str, Any]:
    """A record for ``FEATURES.encode_example``. Raises ValueError for objects with different numbers of points."""
    objects = [obj for question in questions for obj in question.objects]
    if len({len(obj.points) for obj in objects}) > 1:
        raise ValueError(f"{source}: objects with different numbers of points")
    return {
        "image": io.BytesIO(image),
        "image_id": image_id,
        "image_sha256": image_sha256,
        "source": source,
        "img_height": frame.height,
        "img_width": frame.width,
        "questions": [
            {
                "id": question.id,
                "text": question.text,
                "instance_id": question.instance_id,
                "mask": question.mask,
                "ignore": question.ignore,
                "objects": len(question.objects),
            }
            for question in questions
        ],
        "boxes": np.array([obj.box for obj in objects], np.int32).reshape(-1, 4),
        "points": np.array([point for obj in objects for point in obj.points], np.int32).reshape(-1, 2),
    }


def to_example(record: dict[str, Any], place: int) -> Example:
    """Question ``place`` of a record; the image stays encoded."""
    frame = Frame(int(record["img_width"]), int(record["img_height"]))
    asked = {name: values[place] for name, values in record["questions"].items()}
    start = int(sum(record["questions"]["objects"][:place]))
    stop = start + int(asked["objects"])
    boxes = record["boxes"][start:stop].astype(float).tolist()
    each = len(record["points"]) // max(len(record["boxes"]), 1)
    points = record["points"][start * each : stop * each].astype(float).reshape(len(boxes), each, 2).tolist()
    return Example(
        id=asked["id"].decode(),
        image=record["image"],
        frame=frame,
        question=asked["text"].decode(),
        objects=tuple(
            ObjectPrompt(box=(x1, y1, x2, y2), points=tuple((x, y) for x, y in near))
            for (x1, y1, x2, y2), near in zip(boxes, points, strict=True)
        ),
        mask=_mask(asked["mask"], frame),
        ignore=_mask(asked["ignore"], frame),
        image_id=record["image_id"].decode(),
        instance_id=asked["instance_id"].decode(),
    )


def _mask(counts: bytes, frame: Frame) -> RleMask | None:
    return RleMask(frame.height, frame.width, counts.decode()) if counts else None


def build_time(directory: Path) -> int | None:
    """The time at which a set was built, in nanoseconds; None if it does not exist."""
    try:
        return (directory / "build.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def read_index(directory: Path, split: str) -> pa.Table:
    """The index of a split of a built set. Raises OSError."""
    return pq.read_table(index_path(directory, split), schema=INDEX)


def index_path(directory: Path, split: str) -> Path:
    """Path of a split's index in the directory of a built set."""
    return directory / f"index-{split}.parquet"


def checksum(directory: Path, index: pa.Table) -> str:
    """A checksum of a built split's content: of its source, and of the questions and their positions.

    It is the same for all builds of a source, with any library versions. Record bytes differ between builds and are not
    read; their content follows from the source.
    """
    digest = hashlib.sha256(json.loads((directory / "build.json").read_text())["digest"].encode())
    told = index.drop_columns(["fingerprint"])  # the image's SHA-256 is enough
    for start in range(0, len(told), _BLOCK):
        digest.update(json.dumps(told.slice(start, _BLOCK).to_pydict()).encode())
    return digest.hexdigest()


def built_directory(name: str, data_dir: Path) -> Path:
    """Path of a built set."""
    return data_dir / BUILT / name / VERSION
