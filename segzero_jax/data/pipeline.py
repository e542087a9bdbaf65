"""Random access to stored splits: opens and checks them, and combines several into one."""

import bisect
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds

from segzero_jax.data import records, toy
from segzero_jax.data.hub_sets import build_command
from segzero_jax.data.scenes import SPLITS
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask


class DataError(ValueError):
    """The data set or split does not exist or cannot be used; the message is one line."""


class Source(Sequence[Example]):
    """Random access to a stored split, decoded row by row.

    Attributes:
      name: data set and split, for logs.
      checksum: a checksum of the stored content.
    """

    def __init__(
        self,
        name: str,
        checksum: str,
        rows: Sequence[dict[str, Any]],
        decode: Callable[[dict[str, Any], int], Example],
        places: np.ndarray | None = None,
        index: Callable[[], pa.Table] | None = None,
        stamp: Callable[[], object] = lambda: None,
    ) -> None:
        """``stamp`` returns a different value once the stored content is no longer what was opened."""
        self.name = name
        self.checksum = checksum
        self._rows = rows
        self._decode = decode
        self._places = places
        self._index = index
        self._stamp = stamp
        self._opened = stamp()

    def __len__(self) -> int:
        return len(self._rows) if self._places is None else len(self._places)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not 0 <= index < len(self):  # Iteration ends at an IndexError, which array_record does not raise.
            raise IndexError(f"{self.name}: example {index}, expected 0 to {len(self) - 1}")
        record, place = (index, 0) if self._places is None else self._places[index]
        example = self._decode(self._rows[int(record)], int(place))
        # Checked after the read, since files are opened only when they are first read.
        if self._stamp() != self._opened:
            raise DataError(
                f"{self.name}: was rebuilt or deleted while this command ran; expected one set from beginning to end"
            )
        return replace(example, data_set=self.data_set)

    @property
    def data_set(self) -> str:
        """The name of its data set."""
        return self.name.rpartition("/")[0]

    def contents(self) -> pa.Table | None:
        """The index of a built set (``records.INDEX``); None for a generated one."""
        return None if self._index is None else self._index()

    def texts(self) -> list[tuple[str, str]]:
        """Id and question of every example, in order; reads images only if there is no index."""
        index = self.contents()
        if index is None:
            return [(example.id, example.question) for example in self]
        return list(zip(index["id"].to_pylist(), index["text"].to_pylist(), strict=True))

    def first(self, count: int) -> list[int]:
        """The indices of ``count`` examples, one of every image before a second of any; reads no image.

        Otherwise the order is that of storage: if each example has its own image, these are the first ``count``.
        """
        index = self.contents()
        if index is None or count >= len(self):
            return list(range(min(count, len(self))))
        before: Counter[str] = Counter()
        rounds = []
        for picture in index["image_id"].to_pylist():
            rounds.append(before[picture])
            before[picture] += 1
        return np.argsort(rounds, kind="stable")[:count].tolist()

    def object_counts(self) -> np.ndarray:
        """The number of objects of every example, int32, in order; reads consecutive examples of a record once."""
        counts = np.zeros(len(self), np.int32)
        read, row = -1, {}
        for index in range(len(self)):
            record, place = (index, 0) if self._places is None else map(int, self._places[index])
            if record != read:
                read, row = record, self._rows[record]
            counts[index] = len(self._decode(row, place).objects)
        return counts


def open_split(name: str, split: str, data_dir: str | Path) -> Source:
    """Opens a split of "toy" or of a data set made by ``python -m segzero_jax.data.build``.

    The toy set is built now if it does not exist.

    Raises:
      DataError: the data set or split is unknown or not built, or the toy set cannot be written to ``data_dir``.
      OSError: the data set's files cannot be read.
    """
    if name == "toy":
        return _open_toy(split, data_dir)
    directory = records.built_directory(name, Path(data_dir).expanduser())
    if not directory.is_dir():
        raise DataError(
            f"data set {name!r}: not in {Path(data_dir).expanduser()}, expected {_known(data_dir)}; "
            f"{build_command(name, split, data_dir)} makes one; one elsewhere is named by data.dir, or --data-dir"
        )
    builder = tfds.builder_from_directory(directory)
    _check_split(name, split, sorted(builder.info.splits))
    index = records.read_index(directory, split)
    places = np.stack([index["record"].to_numpy(), index["place"].to_numpy()], axis=1)
    rows = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return Source(
        f"{name}/{split}",
        records.checksum(directory, index),
        rows,
        records.to_example,
        places,
        functools.partial(records.read_index, directory, split),
        functools.partial(records.build_time, directory),
    )


class Splits(NamedTuple):
    """The splits of a run.

    Attributes:
      train: the training splits.
      held_out: the evaluation splits, in the order of ``data.eval_splits``.
    """

    train: list[Source]
    held_out: list[Source]

    def checksums(self) -> dict[str, str]:
        """The checksum of each split, by its name."""
        return {split.name: split.checksum for split in (*self.train, *self.held_out)}


def open_splits(names: Sequence[str], eval_splits: Iterable[str], data_dir: str | Path) -> Splits:
    """Opens the splits of a run with ``open_split``.

    Args:
      names: the training data sets.
      eval_splits: "val" is a split of the first training data set, "ReasonSeg/val" a split of another data set.
      data_dir: the directory of built data sets.
    """
    if not all(names):
        name = ",".join(names)
        raise DataError(f"data set {name!r}: expected a name, or several with commas between them, such as mugs,toy")
    held_out = []
    for text in eval_splits:
        other, _, split = text.rpartition("/")
        held_out.append(open_split(other or names[0], split, data_dir))
    return Splits([open_split(one, "train", data_dir) for one in names], held_out)


class Mixture(Sequence[Example]):
    """The concatenated examples of several splits. Ids are prefixed with the data set, since they may be equal."""

    def __init__(self, splits: Sequence[Source]) -> None:
        self.name = " and ".join(split.name for split in splits)
        self._splits = splits
        self._ends = list(itertools.accumulate(map(len, splits)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: example {index}, expected 0 to {len(self) - 1}")
        number = bisect.bisect_right(self._ends, index)
        split = self._splits[number]
        example = split[index - self._ends[number] + len(split)]
        return replace(example, id=f"{split.data_set}/{example.id}")


def questions(splits: Splits) -> Sequence[Example]:
    """All training examples of a run."""
    return splits.train[0] if len(splits.train) == 1 else Mixture(splits.train)


def _open_toy(split: str, data_dir: str | Path) -> Source:
    _check_split("toy", split, SPLITS)
    try:
        builder = toy.prepared_builder(data_dir)
    except OSError as error:
        raise DataError(f"data set 'toy': cannot be built in {Path(data_dir).expanduser()}: {error}") from None
    rows = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    told = f"{builder.info.full_name} {builder.info.splits[split].shard_lengths}"
    return Source(f"toy/{split}", hashlib.sha256(told.encode()).hexdigest(), rows, _toy_example)


def _known(data_dir: str | Path) -> str:
    built = sorted(
        path.parent.name for path in (Path(data_dir).expanduser() / records.BUILT).glob(f"*/{records.VERSION}")
    )
    return " or ".join(["toy", *built])


def _check_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise DataError(f"split {split!r} of data set {name}: expected one of {', '.join(splits)}")


def _toy_example(row: dict[str, Any], place: int) -> Example:
    """A row of ``ToyShapes`` as an Example; the image stays encoded."""
    width, height = int(row["img_width"]), int(row["img_height"])
    places = zip(row["objects"]["box"], row["objects"]["point"], strict=True)
    objects = tuple(
        ObjectPrompt(box=(float(x1), float(y1), float(x2), float(y2)), points=((float(x), float(y)),))
        for (x1, y1, x2, y2), (x, y) in places
    )
    return Example(
        id=row["id"].decode(),
        image=row["image"],
        frame=Frame(width, height),
        question=row["question"].decode(),
        objects=objects,
        mask=RleMask(height, width, row["mask"].decode()),
        image_id=row["id"].decode(),
        instance_id=row["id"].decode(),
    )
