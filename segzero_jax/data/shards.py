"""Writes parts of a source as shards: ArrayRecord files of records, each with its piece of the index.

A shard is complete or absent: its summary, ``NAME.json``, is written last. Shards are independent, so any number of
processes can write them, and an interrupted build resumes with the missing ones.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from segzero_jax import jsonl
from segzero_jax.data.forms.form import Asked, Form, Part, Shown, Unreadable
from segzero_jax.data.pictures import Picture, PictureError, fit_mask, read_picture
from segzero_jax.data.records import FEATURES, INDEX, Question, to_record
from segzero_jax.data.targets import encode_counts, target_object, union
from segzero_jax.data.unusable import Unusable, kind_of
from segzero_jax.frames import rescale_object
from segzero_jax.types import Frame, ObjectPrompt

# Questions in a shard, unless a single part has more.
ROWS = 512


@dataclass(frozen=True)
class Shard:
    """A shard to be written.

    Attributes:
      name: its name, such as "train-00003".
      parts: the parts of the source in it, in order.
    """

    name: str
    split: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """The number of questions in the source."""
        return sum(len(part.ids) for part in self.parts)


class LeftOut(NamedTuple):
    """A question that could not be used, and the reason: see ``Unusable``."""

    id: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Written:
    """The summary of a finished shard.

    Attributes:
      records: number of images in it.
      rows: number of questions in it.
      size: size of the file in bytes.
      sha256: SHA-256 of the file.
      left_out: the questions that could not be used.
    """

    records: int
    rows: int
    size: int
    sha256: str
    left_out: tuple[LeftOut, ...]


def cut(split: str, parts: Sequence[Part]) -> list[Shard]:
    """Divides the parts of a split into shards."""
    shards: list[Shard] = []
    group: list[Part] = []
    for part in parts:
        group.append(part)
        if sum(len(p.ids) for p in group) >= ROWS:
            shards.append(Shard(f"{split}-{len(shards):05d}", split, tuple(group)))
            group = []
    if group:
        shards.append(Shard(f"{split}-{len(shards):05d}", split, tuple(group)))
    return shards


def finished(directory: Path, name: str) -> Written | None:
    """The summary of a finished shard; None if there is none, or if an older version wrote it without ``kind``."""
    path = directory / f"{name}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if any(len(row) != len(LeftOut._fields) for row in found["left_out"]):
        return None
    return Written(**{**found, "left_out": tuple(LeftOut(*row) for row in found["left_out"])})


def data_file(directory: Path, name: str) -> Path:
    """Path of a shard's records."""
    return directory / f"{name}.array_record"


def index_file(directory: Path, name: str) -> Path:
    """Path of a shard's index, whose ``record`` counts from the start of the shard."""
    return directory / f"{name}.parquet"


def write_shard(form: Form, shard: Shard, directory: Path) -> Written:
    """Reads a shard's parts and writes its files."""
    # The file name is unique to this process: a worker left by a killed build may go on writing for a moment.
    partial = directory / f"{shard.name}.{os.getpid()}.partial"
    serializer = ExampleSerializer(FEATURES.get_serialized_info())
    index: list[tuple[object, ...]] = []
    left_out: list[LeftOut] = []
    records = 0
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    for part in shard.parts:
        for shown in form.read(part):
            stored = _store(shown, left_out)
            if stored is None:
                continue
            record, lines = stored
            with disk_errors():
                writer.write(serializer.serialize_example(FEATURES.encode_example(record)))
            index += [(name, text, records, place, *rest) for place, (name, text, *rest) in enumerate(lines)]
            records += 1
    with disk_errors():
        writer.close()
    columns = zip(*index, strict=True) if index else [()] * len(INDEX)
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, INDEX, strict=True)], INDEX)
    pq.write_table(table, index_file(directory, shard.name))
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    written = Written(records, len(index), partial.stat().st_size, digest, tuple(left_out))
    os.replace(partial, data_file(directory, shard.name))
    jsonl.replace(directory / f"{shard.name}.json", json.dumps(asdict(written)).encode())
    return written


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raises OSError if ArrayRecord's writer cannot write: its own error is a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        # As in "write() failed: No space left on device; writing PATH".
        if not re.search(r"\b\w+\(\) failed: ", str(error)):
            raise
        raise OSError(str(error)) from None


def _store(shown: Shown | Unreadable, left_out: list[LeftOut]) -> tuple[dict, list[tuple]] | None:
    """An image's record and its index rows, without their position; None if none of its questions is usable."""
    if isinstance(shown, Unreadable):
        left_out += [LeftOut(name, shown.kind, shown.reason) for name in shown.ids]
        return None
    try:
        picture = read_picture(shown.image, shown.annotated, shown.as_in_file)
    except PictureError as error:
        reason = f"{error}, in {shown.source}"
        left_out += [LeftOut(asked.id, error.kind, reason) for asked in shown.questions]
        return None
    targets: dict[int, tuple[ObjectPrompt, ...]] = {}
    questions = []
    for asked in shown.questions:
        try:
            questions.append(_question(asked, picture, targets))
        except ValueError as error:
            left_out.append(LeftOut(asked.id, kind_of(error), str(error)))
    if not questions:
        return None
    about = shown.image_id, picture.sha256
    record = to_record(picture.data, picture.frame, *about, shown.source, questions)
    return record, [(q.id, q.text, *about, picture.fingerprint, q.instance_id, shown.source) for q in questions]


def _question(asked: Asked, picture: Picture, targets: dict[int, tuple[ObjectPrompt, ...]]) -> Question:
    """A question in stored form. Raises Unusable for one that cannot be asked or has no possible answer."""
    if not asked.text.strip(".?! \n\t"):
        raise Unusable("an empty question")
    frame = picture.frame
    for mask in (*(asked.masks or ()), *([] if asked.ignore is None else [asked.ignore])):
        if mask.shape != (picture.original.height, picture.original.width):
            size = f"{picture.original.width}x{picture.original.height}"
            kind = "a mask of another size than its picture"
            raise Unusable(kind, f"a mask of {mask.shape[1]}x{mask.shape[0]} pixels, expected the picture's {size}")
    ignored = None if asked.ignore is None else fit_mask(asked.ignore, frame)
    ignore = "" if ignored is None else encode_counts(ignored)
    if asked.masks is None:
        objects = tuple(_inside(rescale_object(obj, picture.original, frame), frame) for obj in asked.objects)
        nothing = encode_counts(union((), frame.height, frame.width))
        return Question(asked.id, asked.text, objects, "" if objects else nothing, ignore, asked.instance_id)
    masks = [fit_mask(mask, frame) for mask in asked.masks]
    found: list[ObjectPrompt] = []
    for given, mask in zip(asked.masks, masks, strict=True):
        # Expressions for the same object share its mask, and so its computed target.
        if id(given) not in targets:
            obj = target_object(mask)
            targets[id(given)] = () if obj is None else (obj,)
        if not targets[id(given)]:  # Even if only one of several is empty: the target would miss an object.
            raise Unusable("a target mask without pixels")
        found += targets[id(given)]
    target = union(masks, frame.height, frame.width)
    if masks and ignored is not None and not (target & ~ignored).any():
        raise Unusable("a target mask that is ignored as a whole")
    return Question(asked.id, asked.text, tuple(found), encode_counts(target), ignore, asked.instance_id)


def _inside(obj: ObjectPrompt, frame: Frame) -> ObjectPrompt:
    """A target in whole pixels. Raises Unusable if it has no area within the image."""
    x1, y1, x2, y2 = (round(v) for v in obj.box)
    if x1 >= x2 or y1 >= y2:
        raise Unusable("a target box without area", f"a target box without area, {[x1, y1, x2, y2]}")
    if x1 < 0 or y1 < 0 or x2 > frame.width or y2 > frame.height:
        reason = f"a target box {[x1, y1, x2, y2]} outside the {frame.width}x{frame.height} picture"
        raise Unusable("a target box outside its picture", reason)
    points = tuple((float(round(x)), float(round(y))) for x, y in obj.points)
    if any(not (0 <= x <= frame.width and 0 <= y <= frame.height) for x, y in points):
        reason = f"a target point outside the {frame.width}x{frame.height} picture, {points}"
        raise Unusable("a target point outside its picture", reason)
    return ObjectPrompt(box=(float(x1), float(y1), float(x2), float(y2)), points=points)
