"""Batches: every example once an epoch, the same order for the same seed, an exact resume, any number of processes."""

import json
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import question_sources as sources
from processes import outliving

from segzero_jax.config import Config
from segzero_jax.data import build
from segzero_jax.data.batches import Batches, training_batches
from segzero_jax.data.hub_sets import build_command
from segzero_jax.data.pipeline import DataError, open_split, open_splits, questions
from segzero_jax.patches import ImageError
from segzero_jax.types import Example, Frame

ROOT = Path(__file__).parents[1]


def examples(count: int) -> list[Example]:
    return [Example(f"e{n}", b"", Frame(1, 1), "q", (), None) for n in range(count)]


def ids(batches: list[list[Example]]) -> list[list[str]]:
    return [[example.id for example in batch] for batch in batches]


def take(count: int, size: int = 4, seed: int = 0, of: int = 10, rows: list[int] | None = None) -> list[list[str]]:
    return ids(list(islice(training_batches(examples(of), size, seed, rows), count)))


@pytest.mark.parametrize(
    ("name", "split", "command"),
    [
        ("refCOCOg_9k_840", "train", "build refCOCOg_9k_840 --data-dir FOLDER"),
        ("ReasonSeg", "val", "build ReasonSeg --data-dir FOLDER"),
        ("ReasonSeg", "train", "build ReasonSeg --source DIR --data-dir FOLDER"),
        ("mugs", "train", "build mugs --source DIR --data-dir FOLDER"),
    ],
)
def test_a_set_that_is_not_built_is_told_with_the_command_that_builds_it(
    name: str, split: str, command: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        open_split(name, split, tmp_path)
    assert str(caught.value) == (
        f"data set {name!r}: not in {tmp_path}, expected toy; "
        f"python -m segzero_jax.data.{command.replace('FOLDER', str(tmp_path))} makes one; "
        "one elsewhere is named by data.dir, or --data-dir"
    )


def test_a_set_that_is_built_anew_beneath_a_run_is_not_read_on(tmp_path: Path) -> None:
    """Files are opened when they are first read: some rows would be of one set, some of the other."""
    command = ["mugs", f"--data-dir={tmp_path}", "--workers=1", "--rebuild"]
    source = sources.lines(tmp_path / "source")
    assert build.main([*command, f"--source={source}"]) == 0
    split = open_split("mugs", "train", tmp_path)
    assert split[0].id
    assert build.main([*command, f"--source={source}"]) == 0
    with pytest.raises(DataError, match="mugs/train: was rebuilt or deleted while this command ran"):
        split[0]


def test_several_sets_are_one_and_keep_their_names(tmp_path: Path, data_dir: str) -> None:
    """ "val" is of the first; one that is named twice counts twice."""
    for name, source in {
        "mugs": sources.lines(tmp_path / "mugs-source"),
        "r": sources.solution_parquet(tmp_path / "r-source"),
    }.items():
        assert build.main([name, f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
    splits = open_splits(("mugs", "r", "mugs"), ["val", "r/train"], tmp_path)
    assert [split.name for split in splits.train] == ["mugs/train", "r/train", "mugs/train"]
    assert [split.name for split in splits.held_out] == ["mugs/val", "r/train"]
    assert splits.checksums().keys() == {"mugs/train", "r/train", "mugs/val"}
    assert [split.name for split in open_splits(("mugs", "r"), ["val"], tmp_path).held_out] == ["mugs/val"]
    mixed = pickle.loads(pickle.dumps(questions(splits)))
    mugs, r = splits.train[:2]
    assert len(mixed) == 2 * len(mugs) + len(r)
    expected = [
        [replace(one, id=f"{name}/{one.id}", data_set=name) for one in examples]
        for name, examples in (("mugs", mugs), ("r", r))
    ]
    assert list(mixed) == [*expected[0], *expected[1], *expected[0]]
    # A reward of one's own may go by it, in evaluations as in training, on one set as on several.
    for split in (*splits.train, *splits.held_out, questions(open_splits(("toy",), [], data_dir))):
        assert split[0].data_set == split.name.partition("/")[0]
    for outside in (-1, len(mixed)):
        with pytest.raises(IndexError, match="mugs/train and r/train and mugs/train: example"):
            mixed[outside]
    with closing(training_batches(mixed, len(mixed), seed=1)) as batches:
        assert Counter(one.id for one in next(batches)) == Counter(one.id for one in mixed)
    assert questions(open_splits(("r",), [], tmp_path)).checksum == r.checksum, "one set is itself"
    with pytest.raises(DataError, match=r"^data set 'mugs,': expected a name, or several with commas between them"):
        open_splits(("mugs", ""), [], tmp_path)


def test_the_folder_that_a_build_takes_by_itself_is_not_in_its_command() -> None:
    assert build_command("mugs", "val", Config().data.dir) == "python -m segzero_jax.data.build mugs --source DIR"


def test_the_first_questions_are_of_as_many_pictures_as_there_are(tmp_path: Path) -> None:
    """REFER's stand picture by picture, four about each; where a picture has one question, the order is the stored."""
    made = sources.refer(tmp_path / "refer", splits=("val",) * 3)
    for name, source in (("refcoco", made), ("mine", sources.lines(tmp_path / "lines"))):
        assert build.main([name, f"--source={source}", f"--data-dir={tmp_path / 'built'}", "--workers=1"]) == 0
    source = open_split("refcoco", "val", tmp_path / "built")
    assert len({example.image_id for example in source}) == 6
    source._rows = ()  # No picture is read from here on.
    by_picture = [place for n in range(4) for place in range(n, 24, 4)]
    assert [source.first(count) for count in (1, 6, 9, 23)] == [by_picture[:count] for count in (1, 6, 9, 23)]
    assert source.first(24) == source.first(99) == list(range(24)), "all of them, as they stand"
    assert open_split("mine", "train", tmp_path / "built").first(1) == [0]
    assert open_split("toy", "val", tmp_path).first(5) == [0, 1, 2, 3, 4]


def test_every_example_once_an_epoch_in_an_order_of_its_own() -> None:
    flat = [name for batch in take(15) for name in batch]
    epochs = [flat[n : n + 10] for n in range(0, 60, 10)]
    assert all(sorted(epoch) == sorted(f"e{n}" for n in range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_seed_decides_the_order() -> None:
    assert take(5) == take(5)
    assert take(5) != take(5, seed=1)


def test_a_source_smaller_than_a_batch() -> None:
    (batch,) = take(1, size=16, of=5)
    assert sorted(Counter(batch).values()) == [3, 3, 3, 3, 4]


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_resume_is_exact_through_json(taken: int) -> None:
    iterator = training_batches(examples(10), 4, 0)
    list(islice(iterator, taken))
    state = json.loads(json.dumps(iterator.get_state()))
    expected = ids(list(islice(iterator, 6)))
    fresh = training_batches(examples(10), 4, 0)
    fresh.set_state(state)
    assert ids(list(islice(fresh, 6))) == expected
    # Back again with an iterator that has already read ahead.
    fresh.set_state(state)
    assert ids(list(islice(fresh, 6))) == expected


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1, 3], [0]])
def test_a_process_reads_its_rows_of_each_batch_of_the_global_order(rows: list[int]) -> None:
    for batch, part in zip(take(8), take(8, rows=rows), strict=True):
        assert part == [batch[row] for row in rows]


def test_no_other_row_is_read() -> None:
    read: list[str] = []

    class Watched(list[Example]):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            read.append(f"e{index}")
            return super().__getitem__(index)

    taken = ids(list(islice(training_batches(Watched(examples(100)), 4, 0, [3]), 5)))
    # Some are read ahead, by two threads.
    last_rows = {batch[3] for batch in take(20, of=100)}
    assert {name for batch in taken for name in batch} <= set(read) <= last_rows


def test_position_holds_for_another_number_of_processes() -> None:
    iterator = training_batches(examples(10), 4, 0, [1, 2])
    list(islice(iterator, 3))
    alone = training_batches(examples(10), 4, 0)
    alone.set_state(iterator.get_state())
    assert ids([next(alone)]) == take(4)[3:]


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples to train on"):
        training_batches([], 4, 0)


def test_import_is_light_and_touches_no_device() -> None:
    code = (
        "import sys, segzero_jax.data.pipeline\n"
        "assert not {'torch', 'tensorflow', 'transformers'} & set(sys.modules)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def lengths(batch: Sequence[Example]) -> tuple[list[str], np.ndarray]:
    """What a batch becomes in another process: names, and an array that grain sends through shared memory."""
    return [example.id for example in batch], np.array([len(example.image) for example in batch])


def test_worker_processes_give_the_same_batches_and_positions(tmp_path: Path) -> None:
    """Over a built set, whose readers are opened anew in each process; the state fits any number of workers."""
    arguments = ["refcoco", f"--source={sources.refer(tmp_path / 's')}", f"--data-dir={tmp_path}", "--workers=1"]
    assert build.main(arguments) == 0
    source = open_split("refcoco", "train", tmp_path)
    alone = training_batches(source, 2, 0, (0, 1), lengths)
    expected = [(names, sizes.tolist()) for names, sizes in islice(alone, 9)]
    images = {example.id: len(example.image) for example in source}
    assert all(sizes == [images[name] for name in names] for names, sizes in expected)

    def taken(batches: Batches, count: int) -> list[tuple[list[str], list[int]]]:
        return [(names, sizes.tolist()) for names, sizes in islice(batches, count)]

    with closing(training_batches(source, 2, 0, (0, 1), lengths, workers=2)) as crowd:
        assert taken(crowd, 5) == expected[:5]
        state = json.loads(json.dumps(crowd.get_state()))
    with closing(training_batches(source, 2, 0, (0, 1), lengths, workers=1)) as fewer:
        fewer.set_state(state)
        assert taken(fewer, 4) == expected[5:]
    alone.set_state(state)
    assert taken(alone, 4) == expected[5:]


def test_a_trainer_that_is_killed_leaves_no_worker() -> None:
    code = (
        "import multiprocessing, os, sys, time\n"
        "from segzero_jax.data.batches import training_batches\n"
        "if __name__ == '__main__':\n"
        "    batches = training_batches(list(range(9)), 2, 0, (0, 1), workers=2)\n"
        "    next(batches)\n"
        "    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(workers) == 2
    left = outliving(workers, 60)
    assert not left, f"workers {left} outlived their trainer"


def test_batches_on_their_way_are_no_leak_at_the_end() -> None:
    code = (
        "import contextlib, numpy as np\n"
        "from segzero_jax.data.batches import training_batches\n"
        "if __name__ == '__main__':\n"
        "    collate = lambda rows: [np.ones((4, 1000)) for _ in range(8)]\n"
        "    with contextlib.closing(training_batches(list(range(9)), 2, 0, None, collate, workers=1)) as batches:\n"
        "        for _ in range(3):\n"
        "            last = next(batches)\n"
        "    del last\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stderr == ""


def broken(batch: Sequence[Example]) -> list[str]:
    raise ImageError(f"{batch[0].id}: image cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_ahead_of_time_is_raised_by_the_batch_that_it_is_in(workers: int) -> None:
    with (
        closing(training_batches(examples(10), 4, 0, (0, 1), broken, workers)) as batches,
        pytest.raises(ImageError) as error,
    ):
        next(batches)
    assert re.fullmatch(r"e\d: image cannot be read", str(error.value)), "the command prints it as it is"


def test_batches_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []
    batches = training_batches(examples(10), 4, 0, (0, 1), lambda batch: made.append(len(batch)) or list(batch))
    next(batches)
    deadline = time.monotonic() + 30
    while len(made) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    batches.close()
