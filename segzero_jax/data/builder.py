"""A TensorFlow Datasets builder for question sets: plans, writes shards, checks for leaks, moves the set into place.

Shards are written next to the data set's final directory, by as many processes as there are cores. When all are done,
one rename moves them into place. A build that was interrupted is resumed from its finished shards.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from segzero_jax import jsonl
from segzero_jax.data import shards
from segzero_jax.data.end_with_parent import end_with_parent
from segzero_jax.data.forms.form import Form, Part, SourceError
from segzero_jax.data.held_out import TRAIN, check_leaks, refuse_or_drop
from segzero_jax.data.leaks import Leak
from segzero_jax.data.records import BUILT, FEATURES, VERSION, built_directory, index_path, read_index
from segzero_jax.data.shards import Shard, Written
from segzero_jax.file_lock import turn

# If more than this share of a source is unusable, it is probably not in the form it was taken for.
_MOST_LEFT_OUT = 0.1
_REPLACED = ".replaced"
# Increment whenever the same source is read into different rows: names, instances, targets.
_READING = 4
# Files that TensorFlow Datasets writes beside the records and needs to open them.
_OF_TFDS = ("dataset_info.json", "features.json")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """The input files and output shards of a build.

    Attributes:
      files: the files of the source: (path, size in bytes, SHA-256 of an annotation file or empty for an image).
      shards: all shards in order, split by split.
    """

    files: tuple[tuple[str, int, str], ...]
    shards: tuple[Shard, ...]

    @property
    def centred(self) -> int:
        """The number of target boxes that have neither a point nor a mask."""
        return sum(part.centred for shard in self.shards for part in shard.parts)

    @property
    def digest(self) -> str:
        """A hash of the source, of how it is read and of how it is cut into shards."""
        told: list[object] = [self.files, [(shard.name, shard.rows) for shard in self.shards], VERSION, _READING]
        if self.centred:  # Earlier versions left such boxes out, so only the rows of sets that have some changed.
            told.append(self.centred)
        if any(digest and Path(file).suffix.lower() in (".jpg", ".jpeg") for file, _, digest in self.files):
            told.append("masks in JPEG")  # Earlier versions accepted them, JPEG artefacts around the object included.
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class QuestionSet(tfds.core.dataset_builder.FileReaderBuilder):
    """The builder of all question sets that are not generated, with one configuration per data set, named like it."""

    name = BUILT
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, data_set: str, data_dir: Path, pieces: "Pieces"):
        self._pieces = pieces
        config = tfds.core.BuilderConfig(name=data_set, version=VERSION)
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        description = "Pictures with questions about them, and what answers each: see segzero_jax/data/records.py."
        return tfds.core.DatasetInfo(builder=self, description=description, features=FEATURES, disable_shuffling=True)

    def _download_and_prepare(self, dl_manager: object, download_config: object = None) -> None:
        """Links the shards into place; TFDS renames the folder when this returns."""
        infos, digests = [], dict(self._pieces.digests)
        for split, pieces in self._pieces.by_split.items():
            template = self._get_filename_template(split_name=split)
            for number, (name, _) in enumerate(pieces):
                target = template.sharded_filepath(shard_index=number, num_shards=len(pieces))
                _link(shards.data_file(self._pieces.directory, name), Path(target))
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[written.records for _, written in pieces],
                    num_bytes=sum(written.size for _, written in pieces),
                    filename_template=template,
                )
            )
            index = index_path(Path(self.data_dir), split)
            pq.write_table(self._pieces.indices[split], index)
            digests[index.name] = hashlib.sha256(index.read_bytes()).hexdigest()
        self.info.set_splits(tfds.core.splits.SplitDict(infos))
        jsonl.write(Path(self.data_dir) / "left_out.jsonl", self._pieces.left_out)
        jsonl.replace(
            Path(self.data_dir) / "build.json", json.dumps(self._pieces.summary | {"files": digests}, indent=1).encode()
        )


@dataclass(frozen=True)
class Pieces:
    """The parts that a data set is assembled from.

    Attributes:
      directory: the directory of the shards.
      by_split: (name, summary) of the shards that hold records, by split.
      indices: the index of each split, over all its shards.
      left_out: split, id, kind and reason of each question that is not in the set.
      digests: SHA-256 of each shard, by its file name in the set.
      summary: a summary of the set for ``build.json``.
    """

    directory: Path
    by_split: dict[str, list[tuple[str, Written]]]
    indices: dict[str, pa.Table]
    left_out: list[dict[str, str]]
    digests: dict[str, str]
    summary: dict[str, object]


@dataclass(frozen=True)
class Outcome:
    """A finished build.

    Attributes:
      rows: number of questions in each split.
      left_out: number of questions that are not in the set, by kind of reason.
    """

    directory: Path
    rows: dict[str, int]
    left_out: dict[str, int]


def make_plan(form: Form) -> Plan:
    """Reads the annotations. Raises SourceError for a missing image, an invalid split name, or no questions at all."""
    splits = {split: parts for split, parts in form.splits().items() if any(part.ids for part in parts)}
    if not splits:
        raise SourceError(f"{form.root}: no questions")
    for split in splits:
        if not split.isidentifier():
            raise SourceError(f"{form.root}: split {split!r}, expected letters, digits and _")
        if split == "all":
            raise SourceError(f"{form.root}: split 'all', expected another name: it would stand for all splits")
    files = []
    for path in form.files():
        with path.open("rb") as file:
            files.append((path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
    files += _picture_files(form.root, [part for parts in splits.values() for part in parts])
    return Plan(tuple(files), tuple(shard for split, parts in splits.items() for shard in shards.cut(split, parts)))


def build(
    name: str,
    form: Form,
    plan: Plan,
    data_dir: Path,
    against: Sequence[str] = (),
    drop_leaks: bool = False,
    workers: int = 1,
    progress: Progress = lambda rows: None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Builds a data set, or resumes an interrupted build.

    Args:
      against: further held-out splits, "NAME/SPLIT" of built sets.
      drop_leaks: leave out training questions whose image is held out, instead of raising.
      progress: called with the number of questions processed since the last call.
      say: called with each message for the user.

    Raises:
      LeakError: training images are in an evaluation split.
      SourceError: too much of the source is unusable.
      OSError: the source cannot be read, or ``data_dir`` cannot be written.
    """
    place, directory = data_dir / BUILT, built_directory(name, data_dir)
    place.mkdir(parents=True, exist_ok=True)
    before = built_from(name, data_dir)
    with turn(place / f".{name}.lock"):
        if before != plan.digest and built_from(name, data_dir) == plan.digest:
            say("another build has finished it meanwhile")
            check_leaks(name, data_dir, against)
            return _outcome(directory, plan)
        work = _work_directory(place / f".{name}.building", plan, say)
        _write_all(form, plan, work, workers, progress)
        written = [(shard, _finished(work, shard)) for shard in plan.shards]
        _check_usable(written)
        indices = {split: _merged(work, written, split) for split in dict.fromkeys(s.split for s in plan.shards)}
        dropped = refuse_or_drop(indices, data_dir, name, against, drop_leaks)
        pieces = _pieces(work, plan, written, indices, dropped)
        _move_away(directory)
        for leftover in directory.parent.glob("incomplete.*"):
            shutil.rmtree(leftover)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS would announce a download of unknown size.
            QuestionSet(name, data_dir, pieces).download_and_prepare()
        shutil.rmtree(work)
        for replaced in directory.parent.glob(f"*{_REPLACED}"):
            shutil.rmtree(replaced, ignore_errors=True)
    return _outcome(directory, plan)


def _move_away(directory: Path) -> None:
    """Renames an existing set as a whole: a network disk may fail to delete files that are being read."""
    if directory.exists():
        # In the same parent directory, since that may be a link to another disk.
        directory.rename(directory.with_name(f".{secrets.token_hex(4)}{_REPLACED}"))


def _outcome(directory: Path, plan: Plan) -> Outcome:
    """The outcome of a finished build."""
    left_out = Counter(row["kind"] for row in jsonl.read(directory / "left_out.jsonl"))
    splits = dict.fromkeys(shard.split for shard in plan.shards)
    return Outcome(directory, {split: len(read_index(directory, split)) for split in splits}, dict(left_out))


def built_from(name: str, data_dir: Path) -> str | None:
    """The digest of the plan of a built set; None if there is no such set."""
    path = built_directory(name, data_dir) / "build.json"
    return json.loads(path.read_text())["digest"] if path.is_file() else None


def damaged_files(name: str, data_dir: Path) -> list[str]:
    """One message for each file of a built set that has changed since it was written or is missing."""
    directory = built_directory(name, data_dir)
    found = [f"{file} is missing" for file in _OF_TFDS if not (directory / file).is_file()]
    for file, expected in json.loads((directory / "build.json").read_text())["files"].items():
        path = directory / file
        if not path.is_file():
            found.append(f"{file} is missing")
            continue
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected:
                found.append(f"{file} has changed")
    return found


def _picture_files(root: Path, parts: Sequence[Part]) -> Iterator[tuple[str, int, str]]:
    missing = []
    pictures = dict.fromkeys(picture for part in parts for picture in part.pictures)
    for picture in pictures:
        try:
            yield picture, (root / picture).stat().st_size, ""
        except (FileNotFoundError, ValueError):  # ValueError: the name contains a zero byte.
            missing.append(picture)
    if missing:
        raise SourceError(f"{len(missing)} of {len(pictures)} pictures are missing, the first is {root / missing[0]}")


def _work_directory(work: Path, plan: Plan, say: Callable[[str], None]) -> Path:
    """The directory of the shards, with those that an unfinished build of the same source has left."""
    mark = work / "plan"
    before = mark.read_text() if mark.is_file() else None
    if before is not None and before != plan.digest:
        say("an unfinished build of another source or version is there: starting over")
    if work.is_dir() and before != plan.digest:
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    for unfinished in work.glob("*.partial"):
        unfinished.unlink()
    jsonl.replace(mark, plan.digest.encode())
    done = sum(shards.finished(work, shard.name) is not None for shard in plan.shards)
    if done:
        say(f"going on: {done} of {len(plan.shards)} shards are written already")
    return work


def _write_all(form: Form, plan: Plan, work: Path, workers: int, progress: Progress) -> None:
    missing = []
    for shard in plan.shards:
        if shards.finished(work, shard.name) is None:
            missing.append(shard)
        else:
            progress(shard.rows)
    if workers == 1 or len(missing) == 1:
        for shard in missing:
            shards.write_shard(form, shard, work)
            progress(shard.rows)
        return
    with _pool(min(workers, len(missing) or 1)) as pool:
        running: dict[Future[Written], Shard] = {
            pool.submit(shards.write_shard, form, shard, work): shard for shard in missing
        }
        for future in as_completed(running):
            future.result()
            progress(running[future].rows)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that finish their current shards when this process is interrupted, and start no others."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise SourceError(
            "a process of the build was killed, perhaps out of memory; the same command goes on, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Makes a worker ignore Ctrl-C and end with the build, since the next build writes the same files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _finished(work: Path, shard: Shard) -> Written:
    written = shards.finished(work, shard.name)
    if written is None:
        raise FileNotFoundError(f"{work / shard.name}.json: gone while the set was built")
    return written


def _check_usable(written: Sequence[tuple[Shard, Written]]) -> None:
    for split in dict.fromkeys(shard.split for shard, _ in written):
        left_out = [row for shard, found in written if shard.split == split for row in found.left_out]
        rows = sum(shard.rows for shard, _ in written if shard.split == split)
        kept = sum(found.rows for shard, found in written if shard.split == split)
        if not kept or len(left_out) > max(1, _MOST_LEFT_OUT * rows):
            raise SourceError(
                f"split {split}: {len(left_out)} of {rows} questions cannot be used, expected at most "
                f"{_MOST_LEFT_OUT:.0%}; the first is {left_out[0].id}: {left_out[0].reason}"
            )


def _merged(work: Path, written: Sequence[tuple[Shard, Written]], split: str) -> pa.Table:
    tables = []
    records = 0
    for shard, found in written:
        if shard.split == split:
            table = pq.read_table(shards.index_file(work, shard.name))
            place = table.schema.get_field_index("record")
            moved = pa.array(table["record"].to_numpy() + np.int32(records), pa.int32())
            tables.append(table.set_column(place, table.schema.field(place), moved))
            records += found.records
    return pa.concat_tables(tables)


def _pieces(
    work: Path, plan: Plan, written: Sequence[tuple[Shard, Written]], indices: dict[str, pa.Table], leaks: list[Leak]
) -> Pieces:
    by_split: dict[str, list[tuple[str, Written]]] = {split: [] for split in indices}
    left_out = [
        {"split": TRAIN, "id": leak.id, "kind": f"held out: {leak.how}", "reason": f"held out: {leak.why}"}
        for leak in leaks
    ]
    for shard, found in written:
        left_out += [{"split": shard.split, **row._asdict()} for row in found.left_out]
        if found.records:
            by_split[shard.split].append((shard.name, found))
    digests = {
        f"{BUILT}-{split}.array_record-{number:05d}-of-{len(pieces):05d}": found.sha256
        for split, pieces in by_split.items()
        for number, (_, found) in enumerate(pieces)
    }
    annotations = {path: digest for path, _, digest in plan.files if digest}
    summary = {"digest": plan.digest, "source": annotations, "left_out": len(left_out), "centred": plan.centred}
    return Pieces(work, by_split, indices, left_out, digests, summary)


def _link(source: Path, target: Path) -> None:
    """Makes a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
