"""Parquet files of the Hugging Face hub, in the two schemas of Seg-Zero's authors.

Training sets (refCOCOg_9k_840, VisionReasoner_multi_object_7k_840) have ``id``, ``problem``, ``solution``, ``image``,
``img_height``, ``img_width``; the image is already squashed to 840 x 840, the solution is in its pixels, and height and
width are the original ones. Evaluation sets (ReasonSeg_val, refcoco_testA) have ``text``, ``image``, ``image_id``,
``ann_id`` and a ``mask`` of nested lists of bool at the size of the image. Masks may also be encoded images, like
``image``.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from segzero_jax.data.forms.form import Asked, Part, Shown, SourceError, Unreadable, coco_id, unique
from segzero_jax.data.mask_files import read_mask
from segzero_jax.data.unusable import Unusable, kind_of
from segzero_jax.prompt import parse_solution
from segzero_jax.types import Frame

_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
# Rows held in memory at once.
_ROWS = 16
_SOLUTION = ("id", "problem", "solution", "image")
_MASK = ("text", "mask", "image")


@dataclass(frozen=True)
class HubParquet:
    """Parquet files; each row is an image with one question.

    Attributes:
      root: the folder of the first source.
      tables: split and path of each file.
    """

    name: str
    root: Path
    tables: tuple[tuple[str, Path], ...]

    def files(self) -> list[Path]:
        return [path for _, path in self.tables]

    def splits(self) -> dict[str, list[Part]]:
        groups: dict[str, list[tuple[Path, int, int]]] = defaultdict(list)
        names: dict[str, list[str]] = defaultdict(list)
        for split, path in self.tables:
            with _open(path) as file:
                columns = _columns(path, file.schema_arrow)
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group, columns=columns)
                    groups[split].append((path, group, rows.num_rows))
                    names[split] += _names(split, rows, len(names[split]))
        parts: dict[str, list[Part]] = {}
        for split, found in groups.items():
            ids = iter(unique(names[split]))
            parts[split] = [
                Part(tuple(next(ids) for _ in range(count)), (), (split, path, group)) for path, group, count in found
            ]
        return parts

    def read(self, part: Part) -> Iterator[Shown | Unreadable]:
        split, path, group = part.content
        with _open(path) as file:
            ids = iter(part.ids)
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group]):
                for row in range(batch.num_rows):
                    yield self._row(split, path, batch, row, next(ids))

    def _row(self, split: str, path: Path, batch: pa.RecordBatch, row: int, name: str) -> Shown | Unreadable:
        at = f"{path.name}: {name}"
        image = batch["image"][row].as_py()
        try:
            data = _encoded(image, "picture")
            if _has_solutions(batch.schema):
                objects = parse_solution(batch["solution"][row].as_py())
                asked = Asked(name, _text(batch["problem"][row].as_py()), f"{self.name}:{name}", objects=objects)
                return Shown(data, self._picture(split, batch, row, image, name), at, None, (asked,))
            mask = _mask(batch["mask"][row])
        except ValueError as error:
            return Unreadable((name,), kind_of(error, "a solution in neither form"), str(error))
        picture = self._picture(split, batch, row, image, name)
        annotation = _value(batch, "ann_id", row)
        instance = f"{picture}:{name if annotation is None else annotation}"
        masks = (mask,) if mask.any() else ()
        asked = Asked(name, _text(batch["text"][row].as_py()), instance, masks)
        return Shown(data, picture, at, Frame(mask.shape[1], mask.shape[0]), (asked,))

    def _picture(self, split: str, batch: pa.RecordBatch, row: int, image: Any, name: str) -> str:
        """The image's id; in sets made from RefCOCO a plain number is a COCO id."""
        given = _value(batch, "image_id", row)
        path = image.get("path") if isinstance(image, dict) else None
        from_coco = self.name.lower().startswith("refcoco")
        named = [coco for text in (given, path) if text and (coco := coco_id(str(text), from_coco))]
        if named:
            return named[0]
        if given is not None and str(given).isdigit() and from_coco:
            return f"coco:{int(given)}"
        return f"{self.name}:{split}/{name if given is None else given}"


def find(name: str, sources: list[Path], splits: Mapping[Path, str]) -> HubParquet | None:
    """The parquet files under the sources; None if there are none.

    Args:
      splits: the split of each source that is a single split, which overrides the names of its files.

    Raises:
      SourceError: a file has another schema, or two sources have the same evaluation split.
    """
    tables: dict[Path, str] = {}
    held: dict[str, Path] = {}
    for source in sources:
        # rglob does not follow a folder ``data`` that is a symbolic link.
        found = {path: _split(path) for path in (*source.rglob("*.parquet"), *source.glob("data/*.parquet"))}
        if source in splits and len(set(found.values())) == 1:
            found = dict.fromkeys(found, splits[source])
        for split in set(found.values()) - {"train"}:
            if held.setdefault(split, source) != source:
                raise SourceError(f"split {split}: in {held[split]} and in {source}; build two data sets of them")
        tables |= found
    _check_whole(tables)
    for path in sorted(tables):
        with _open(path) as file:
            _columns(path, file.schema_arrow)
    return HubParquet(name, sources[0], tuple((tables[path], path) for path in sorted(tables))) if tables else None


def _check_whole(tables: Collection[Path]) -> None:
    """Raises SourceError if files are missing that the names of the others count: an incomplete download."""
    there: dict[tuple[Path, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in tables:
        if match := _SHARD.fullmatch(path.stem):
            there[path.parent, match["split"]][match["count"]].add(match["number"])
    for (folder, split), counts in there.items():
        if len(counts) > 1:
            named = " and ".join(f"-of-{count}" for count in sorted(counts))
            raise SourceError(f"{folder}: {split}-*{named}, expected the files of one version")
        for count, numbers in counts.items():
            if len(numbers) < int(count):
                raise SourceError(f"{folder}: {len(numbers)} of {int(count)} files {split}-*-of-{count}, expected all")


def first(folder: Path) -> Path | None:
    """The first parquet file in the hub's usual places: the folder itself or its subfolder ``data``."""
    return min((*folder.glob("*.parquet"), *folder.glob("data/*.parquet")), default=None)


def first_below(folder: Path) -> Path | None:
    """The first parquet file in or below a folder; None if there is none or the folder does not exist."""
    return min(folder.rglob("*.parquet"), default=None)


def _split(path: Path) -> str:
    match = _SHARD.fullmatch(path.stem)
    return match["split"] if match else path.stem


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Without read-ahead, so that a column of images is never in memory as a whole.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a parquet file ({' '.join(str(error).split())[:120]})") from None


def _columns(path: Path, schema: pa.Schema) -> list[str]:
    """The columns that identify a row. Raises SourceError if a required column is missing or of another type."""
    names = schema.names
    if not (_has_solutions(schema) or set(names) >= set(_MASK)):
        raise SourceError(
            f"{path}: columns {', '.join(names)}; expected {', '.join(_SOLUTION)} or {', '.join(_MASK)} among them"
        )
    for column in (name for name in (_SOLUTION if _has_solutions(schema) else _MASK) if name in _TYPES):
        expected, fits = _TYPES[column]
        if not fits(_plain(schema.field(column).type)):
            raise SourceError(f"{path}: column {column}: {str(schema.field(column).type)[:80]}, expected {expected}")
    return [name for name in ("id", "image_id", "ann_id") if name in names] or ["text"]


def _has_solutions(schema: pa.Schema) -> bool:
    return set(schema.names) >= set(_SOLUTION)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_question(kind: pa.DataType) -> bool:
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        # A column with paths only is written with a ``bytes`` field of type null.
        return at >= 0 and (pa.types.is_null(kind.field(at).type) or _is_encoded(kind.field(at).type))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_mask(kind: pa.DataType) -> bool:
    rows = kind.value_type if _is_list(kind) else kind
    pixels = rows.value_type if _is_list(kind) and _is_list(rows) else None
    return _is_encoded(kind) or (pixels is not None and (pa.types.is_boolean(pixels) or pa.types.is_integer(pixels)))


# The expected content of each column, and a check of its type.
_TYPES: Mapping[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "problem": ("text", _is_question),
    "text": ("text", _is_question),
    "solution": ("text", _is_text),
    "image": ("encoded pictures, binary or {bytes, path}", _is_encoded),
    "mask": ("rows of bool or of whole numbers, or encoded pictures, binary or {bytes, path}", _is_mask),
}


def _names(split: str, rows: pa.Table, start: int) -> list[str]:
    if "id" in rows.column_names:
        return [str(value) for value in rows["id"].to_pylist()]
    if "image_id" in rows.column_names:
        keys = [rows[key].to_pylist() for key in ("image_id", "ann_id") if key in rows.column_names]
        return [f"{split}-{'-'.join(str(part) for part in key)}" for key in zip(*keys, strict=True)]
    return [f"{split}-{start + n:06d}" for n in range(rows.num_rows)]


def _value(batch: pa.RecordBatch, column: str, row: int) -> Any:
    return batch[column][row].as_py() if column in batch.schema.names else None


def _text(value: Any) -> str:
    """A question; the first if there are several for the same target."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""


def _encoded(value: Any, what: str) -> bytes:
    """The bytes of an encoded image. Raises Unusable if there are none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data:
        return data
    path = value.get("path") if isinstance(value, dict) else None
    if path:
        raise Unusable(f"no {what} but its path", f"no {what} but its path, {path}: expected its bytes")
    raise Unusable(f"no {what}")


def _mask(scalar: Any) -> np.ndarray:
    """A mask as bool [H, W], from an encoded image or a list of rows, each a list of bool or of whole numbers.

    Raises Unusable for rows of different lengths, null pixels, or no rows.
    """
    if not _is_list(scalar.type):
        value = scalar.as_py()
        named = value.get("path") if isinstance(value, dict) else None
        return read_mask(_encoded(value, "mask"), named or "column mask")
    rows = scalar.values
    if rows is None or not len(rows):
        raise Unusable("no mask")
    if rows.null_count:
        raise Unusable("a mask with rows that are null")
    widths = pc.list_value_length(rows).to_numpy()
    if (widths != widths[0]).any() or not widths[0]:
        raise Unusable("a mask whose rows have different lengths")
    flat = rows.flatten()
    if flat.null_count:
        kind = "a mask with pixels that are null"
        raise Unusable(kind, f"{kind}, {flat.null_count} of {len(flat)}")
    return flat.to_numpy(zero_copy_only=False).astype(bool).reshape(len(rows), int(widths[0]))
