"""Training questions whose images are held out for evaluation: a build refuses them, or leaves them out."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from segzero_jax.data.leaks import Leak, find_leaks
from segzero_jax.data.records import built_directory, index_path, read_index

TRAIN = "train"  # The name of the training split in every set.


class LeakError(ValueError):
    """Training images are in an evaluation split; the message is one line."""


def check_leaks(name: str, data_dir: Path, against: Sequence[str] = ()) -> None:
    """Raises LeakError if training images of a built set are in one of its evaluation splits or in ``against``."""
    directory = built_directory(name, data_dir)
    splits = [path.stem.removeprefix("index-") for path in sorted(directory.glob(index_path(directory, "*").name))]
    indices = {split: read_index(directory, split) for split in splits}
    for other, found in _leaks(indices, data_dir, name, against):
        raise LeakError(
            f"{_first(found, len(indices[TRAIN]), other)}; {name} is built already, "
            "so --drop-leaks needs --rebuild to leave them out"
        )


def refuse_or_drop(
    indices: dict[str, pa.Table], data_dir: Path, name: str, against: Sequence[str], drop: bool
) -> list[Leak]:
    """Finds leaks; if ``drop``, removes them from ``indices`` and returns them, else raises LeakError."""
    leaks: dict[int, Leak] = {}
    for other, found in _leaks(indices, data_dir, name, against):
        if not drop:
            raise LeakError(f"{_first(found, len(indices[TRAIN]), other)}; --drop-leaks leaves them out")
        leaks |= {leak.row: leak for leak in found}
    if leaks:
        kept = np.setdiff1d(np.arange(len(indices[TRAIN])), list(leaks))
        if not len(kept):
            raise LeakError(f"all {len(leaks)} training questions are about pictures that are held out; none is left")
        indices[TRAIN] = indices[TRAIN].take(pa.array(kept))
    return list(leaks.values())


def _leaks(
    indices: Mapping[str, pa.Table], data_dir: Path, name: str, against: Sequence[str]
) -> Iterator[tuple[str, list[Leak]]]:
    """Yields each held-out split with the training questions about its images, if there are any."""
    if TRAIN not in indices:
        return
    for split, index in indices.items():
        if split != TRAIN and (found := find_leaks(indices[TRAIN], index, one_set=True)):
            yield f"{name}/{split}", found
    for other in against:
        data_set, _, split = other.rpartition("/")
        if data_set != name:
            index = read_index(built_directory(data_set, data_dir), split)
            if found := find_leaks(indices[TRAIN], index, one_set=False):
                yield other, found


def _first(found: Sequence[Leak], rows: int, other: str) -> str:
    first = found[0]
    return (
        f"{len(found)} of {rows} training questions are about pictures of {other}, "
        f"the first is {first.id}: {first.held_out} ({first.why})"
    )
