"""From stored data sets to batches of examples: random access, a seeded shuffle, an exactly resumable position."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import tensorflow_datasets as tfds

from segzero_jax.data.scenes import SPLITS
from segzero_jax.data.toy import prepared_builder
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask


class DataError(ValueError):
    """A data set or split that there is none of; one line."""


class Source(Sequence[Example]):
    """Random access to a stored split, decoded row by row.

    Attributes:
      name: data set and split, for logs.
    """

    def __init__(self, name: str, rows: Sequence[dict[str, Any]], decode: Callable[[dict[str, Any]], Example]) -> None:
        self.name = name
        self._rows = rows
        self._decode = decode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not 0 <= index < len(self):  # Iteration ends at an IndexError, which array_record does not raise.
            raise IndexError(f"{self.name}: example {index}, expected 0 to {len(self) - 1}")
        return self._decode(self._rows[index])


def open_split(name: str, split: str, data_dir: str | Path) -> Source:
    """Opens a split, building the data set under ``data_dir`` first when it is not there.

    Raises:
      DataError: an unknown data set or split.
      OSError: ``data_dir`` cannot be written or its files cannot be read.
    """
    if name != "toy":
        raise DataError(f"data set {name!r}: expected toy")
    if split not in SPLITS:
        raise DataError(f"split {split!r} of data set toy: expected one of {', '.join(SPLITS)}")
    builder = prepared_builder(data_dir)
    rows = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return Source(f"{name}/{split}", rows, _toy_example)


def training_batches(
    source: Sequence[Example], batch_size: int, seed: int, process: tuple[int, int] | None = None
) -> grain.DatasetIterator[list[Example]]:
    """An endless iterator over shuffled batches; every epoch has its own order and uses every example once.

    All processes walk one global order: batch k is its examples [k * batch_size, (k + 1) * batch_size), of which each
    process receives an equal share. ``get_state()`` is a small dict fit for JSON that stands between two batches;
    ``set_state`` continues there, also with another number of processes.

    Args:
      source: what is sampled from; may be shorter than a batch.
      batch_size: examples per batch over all processes.
      seed: of the order.
      process: (index, count), by default this JAX process.

    Raises:
      ValueError: no examples, or ``batch_size`` does not divide among the processes.
    """
    index, count = process if process is not None else (jax.process_index(), jax.process_count())
    if len(source) == 0:
        raise ValueError(f"{getattr(source, 'name', 'source')}: no examples to train on")
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size}: expected a multiple of the {count} processes")
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    batches = order[index::count].batch(batch_size // count, batch_fn=list)
    # Reading is quick: a small buffer hides it and keeps a resume cheap.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _toy_example(row: dict[str, Any]) -> Example:
    """A row of ``ToyShapes`` as an Example; the picture stays encoded."""
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
    )
