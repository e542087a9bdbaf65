"""Builds that are interrupted, repeated, changed or leaking; and what the command says."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import question_sources as sources
from PIL import Image
from processes import outliving
from question_sources import encoded, picture

from segzero_jax.data import build, builder, leaks, shards
from segzero_jax.data.forms.form import Form
from segzero_jax.data.held_out import refuse_or_drop
from segzero_jax.data.pipeline import open_split
from segzero_jax.data.records import INDEX, built_directory, checksum, index_path, read_index

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, name: str, source: Path, *options: str) -> int:
    return build.main([name, "--source", str(source), "--data-dir", str(tmp_path / "built"), "--workers=1", *options])


def work(tmp_path: Path, name: str) -> Path:
    return tmp_path / f"built/question_set/.{name}.building"


def files(tmp_path: Path, name: str) -> dict[str, bytes]:
    directory = built_directory(name, tmp_path / "built")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS", 2)


class Interrupted(BaseException):
    """What stops a build in the middle, as a kill would."""


def test_an_interrupted_build_goes_on_and_is_the_same(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.refer(tmp_path / "s")
    assert run(tmp_path, "refcoco", source) == 0
    whole = files(tmp_path, "refcoco")
    assert sum("array_record" in name for name in whole) == 8
    written: list[str] = []
    real = shards.write_shard

    def until_the_fourth(form, shard, directory):
        if len(written) == 3:
            (directory / f"{shard.name}.partial").write_bytes(b"half a shard")
            raise Interrupted
        written.append(shard.name)
        return real(form, shard, directory)

    monkeypatch.setattr(shards, "write_shard", until_the_fourth)
    with pytest.raises(Interrupted):
        run(tmp_path, "refcoco", source, "--rebuild")
    assert len(open_split("refcoco", "train", tmp_path / "built")) == 8, "the set that is there stays until the end"
    written.clear()
    half_moved = built_directory("refcoco", tmp_path / "built").parent / "incomplete.5UM6A_1.0.0"
    (half_moved / "part").mkdir(parents=True)
    monkeypatch.setattr(shards, "write_shard", lambda *given: written.append(given[1].name) or real(*given))
    assert run(tmp_path, "refcoco", source, "--rebuild") == 0
    assert not half_moved.exists()
    assert written == ["val-00001", "testA-00000", "testA-00001", "testB-00000", "testB-00001"]
    assert "going on: 3 of 8 shards are written already" in capsys.readouterr().err
    assert files(tmp_path, "refcoco") == whole
    assert not work(tmp_path, "refcoco").exists()


def test_rows_are_the_same_in_one_shard_and_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = sources.refer(tmp_path / "s"), []
    for rows in (shards.ROWS, 3):
        monkeypatch.setattr(shards, "ROWS", rows)
        assert run(tmp_path, "refcoco", source, "--rebuild") == 0
        read.append([list(open_split("refcoco", split, tmp_path / "built")) for split in ("train", "val", "testA")])
    assert len(read[0][0]) > 3
    assert read[0] == read[1]


def test_a_source_that_changes_during_an_interruption_is_noticed(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.lines(tmp_path / "s")
    real = shards.write_shard

    def only_one(form, shard, directory):
        real(form, shard, directory)
        raise Interrupted

    monkeypatch.setattr(shards, "write_shard", only_one)
    with pytest.raises(Interrupted):
        run(tmp_path, "mine", source)
    assert list(work(tmp_path, "mine").glob("*.array_record"))
    monkeypatch.setattr(shards, "write_shard", real)
    path = source / "train.jsonl"
    path.write_text(path.read_text().replace("the red mug", "the green mug"))
    assert run(tmp_path, "mine", source) == 0
    assert "an unfinished build of another source or version is there: starting over\n" in capsys.readouterr().err
    assert open_split("mine", "train", tmp_path / "built")[0].question == "the green mug"


def test_after_a_build_that_failed_nothing_is_said_of_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.lines(tmp_path / "s")
    text = (source / "train.jsonl").read_text()
    (source / "train.jsonl").write_text(text.replace("the red mug", "").replace("both mugs", ""))
    assert run(tmp_path, "mine", source) == 2
    (source / "train.jsonl").write_text(text)
    capsys.readouterr()
    assert run(tmp_path, "mine", source) == 0
    said = capsys.readouterr().err
    assert "an unfinished build of another source or version is there: starting over\n" in said
    assert "interrupted" not in said


def test_shards_without_a_plan_are_not_taken(tmp_path: Path) -> None:
    """What is left where a folder was being deleted when its process was killed."""
    source = sources.lines(tmp_path / "s")
    rest = work(tmp_path, "mine")
    rest.mkdir(parents=True)
    (rest / "train-00000.json").write_text('{"records": 9, "rows": 9, "size": 9, "sha256": "", "left_out": []}')
    assert run(tmp_path, "mine", source) == 0
    assert len(open_split("mine", "train", tmp_path / "built")) == 2


def test_a_shard_of_a_version_that_knew_no_kinds_is_written_again(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an interrupted build: what was left out has its reason alone there."""
    source = sources.lines(tmp_path / "s")
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()] * 10
    rows[1] = rows[1] | {"question": "."}
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real = shards.write_shard

    def older(form, shard, directory):
        if shard.split == "val":
            raise Interrupted
        real(form, shard, directory)
        path = directory / f"{shard.name}.json"
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"left_out": [row[::2] for row in summary["left_out"]]}))

    monkeypatch.setattr(shards, "write_shard", older)
    with pytest.raises(Interrupted):
        run(tmp_path, "mine", source)
    monkeypatch.setattr(shards, "write_shard", real)
    capsys.readouterr()
    assert run(tmp_path, "mine", source) == 0
    said = capsys.readouterr()
    assert "going on: 9 of 11 shards are written already" in said.err
    assert "left out: 1 (an empty question)" in said.out
    assert len(open_split("mine", "train", tmp_path / "built")) == 19


@pytest.mark.parametrize("changed", ["annotations", "picture"])
def test_a_built_set_is_not_replaced_unasked(tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.lines(tmp_path / "s")
    assert run(tmp_path, "mine", source) == 0
    assert run(tmp_path, "mine", source) == 0
    assert "built already, from the same source" in capsys.readouterr().out
    if changed == "annotations":
        (source / "train.jsonl").write_text((source / "train.jsonl").read_text().replace("red", "green"))
    else:
        (source / "images/0.jpg").write_bytes(encoded(picture(77), quality=60))
    assert run(tmp_path, "mine", source) == 2
    assert "built already, from another source or by an older version; --rebuild replaces it" in capsys.readouterr().err
    before = open_split("mine", "train", tmp_path / "built")[0]
    assert run(tmp_path, "mine", source, "--rebuild") == 0
    after = open_split("mine", "train", tmp_path / "built")[0]
    assert (before.question, before.image) != (after.question, after.image)


def test_a_damaged_set_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.lines(tmp_path / "s")
    assert run(tmp_path, "mine", source) == 0
    assert run(tmp_path, "mine", source, "--check") == 0
    index = index_path(built_directory("mine", tmp_path / "built"), "val")
    told = index.read_bytes()
    index.write_bytes(told + b"0")
    assert run(tmp_path, "mine", source, "--check") == 2
    assert "index-val.parquet has changed" in capsys.readouterr().err
    index.write_bytes(told)
    (shard,) = built_directory("mine", tmp_path / "built").glob("*train*array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run(tmp_path, "mine", source, "--check") == 2
    assert f"{shard.name} has changed" in capsys.readouterr().err
    shard.unlink()
    assert run(tmp_path, "mine", source, "--check") == 2
    assert f"{shard.name} is missing" in capsys.readouterr().err
    for name in ("features.json", "dataset_info.json", "build.json"):
        (shard.parent / name).unlink()
        assert run(tmp_path, "mine", source, "--check") == 2
        assert name in (complaint := capsys.readouterr().err)
        assert len(complaint.splitlines()) == 1


def test_several_processes_give_the_same_rows(tmp_path: Path, small_shards: None) -> None:
    source = sources.lines(tmp_path / "s")
    assert run(tmp_path, "one", source) == 0
    again = ["one", "--source", str(source), "--data-dir", str(tmp_path / "many"), "--workers=2"]
    assert build.main(again) == 0
    for split in ("train", "val"):
        one, many = (open_split("one", split, tmp_path / place) for place in ("built", "many"))
        assert list(one) == list(many)
        assert one.checksum == many.checksum


def test_the_checksum_sees_what_a_build_takes_from_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets too, which the index does not hold: that is the same where words and pictures are."""

    def made(folder: str, **changed: object) -> str:
        source = sources.lines(tmp_path / folder)
        rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
        rows[0] |= changed
        (source / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        data_dir = tmp_path / f"{folder}-built"
        assert build.main(["mine", f"--source={source}", f"--data-dir={data_dir}", "--workers=1"]) == 0
        return open_split("mine", "train", data_dir).checksum

    first = made("one")
    with monkeypatch.context() as patch:
        # As another version of the library may.
        real = pq.write_table
        patch.setattr(pq, "write_table", lambda table, path: real(table, path, compression="none", row_group_size=1))
        assert made("again") == first
    assert made("other target", mask="masks/left.png") != first
    assert made("other words", question="another") != first
    places = [built_directory("mine", tmp_path / f"{name}-built") for name in ("one", "other target")]
    one, other = (read_index(place, "train") for place in places)
    assert one.equals(other)
    assert checksum(places[0], one) == first != checksum(places[0], one.slice(1)), "as --drop-leaks leaves it"


def test_ctrl_c_stops_in_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.lines(tmp_path / "s")
    # Neighbours are about different pictures, so each line is read by itself.
    rows = [{"image": f"images/{n % 2}.jpg", "question": f"mug {n}", "mask": "masks/one.png"} for n in range(600)]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = (
        "import sys; from segzero_jax.data import build, shards; shards.ROWS = 10; sys.exit(build.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "mine", "--source", str(source), "--workers=1"]
    command += [f"--data-dir={tmp_path / 'built'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(work(tmp_path, "mine").glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "stopped; the same command goes on" in error
    assert "Traceback" not in error + out
    monkeypatch.setattr(shards, "ROWS", 10)
    assert run(tmp_path, "mine", source) == 0
    assert "going on: " in capsys.readouterr().err
    assert len(open_split("mine", "train", tmp_path / "built")) == 600


def squashed(seed: int) -> dict[str, object]:
    """A picture of the REFER fixture as Seg-Zero's training sets have it: recompressed and squashed."""
    original = Image.open(sources.io.BytesIO(encoded(picture(3000 + seed))))
    return {"bytes": encoded(original.resize((84, 84), Image.Resampling.BICUBIC), "PNG"), "path": None}


def test_a_training_picture_that_is_held_out_elsewhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """refCOCOg_9k_840 beside RefCOCO: other ids, other files, other sizes; the pictures are the same."""
    assert run(tmp_path, "refcoco", sources.refer(tmp_path / "refer")) == 0
    images = [squashed(seed) for seed in (0, 1, 2, 5)] + [
        {"bytes": encoded(picture(n).resize((84, 84)), "PNG"), "path": None} for n in (1, 2)
    ]
    source = sources.solution_parquet(tmp_path / "s", image=images)
    against = ["--against", "refcoco/val", "refcoco/testA", "refcoco/testB"]
    assert run(tmp_path, "r", source, *against) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    # Pictures 2 and 3 are in val, 4 and 5 in testA.
    assert "1 of 6 training questions are about pictures of refcoco/val" in complaint
    assert "refcocog_16002" in complaint
    assert "looks the same" in complaint
    assert not built_directory("r", tmp_path / "built").exists()
    assert run(tmp_path, "r", source, *against, "--drop-leaks") == 0
    kept = [example.id for example in open_split("r", "train", tmp_path / "built")]
    assert kept == [f"refcocog_{16000 + n}" for n in (0, 1, 4, 5)]
    lines = (built_directory("r", tmp_path / "built") / "left_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["refcocog_16002", "refcocog_16003"]


@pytest.mark.parametrize("options", [[], ["--drop-leaks"]])
def test_a_set_that_is_built_already_is_held_against_others_too(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "refcoco", sources.refer(tmp_path / "refer")) == 0
    images = [squashed(seed) for seed in (0, 1, 2, 3, 4, 5)]
    source = sources.solution_parquet(tmp_path / "s", image=images)
    assert run(tmp_path, "r", source) == 0
    before = files(tmp_path, "r")
    capsys.readouterr()
    assert run(tmp_path, "r", source, *options, "--against", "refcoco/val") == 2
    said = capsys.readouterr()
    (complaint,) = said.err.strip().splitlines()
    assert "2 of 6 training questions are about pictures of refcoco/val, the first is refcocog_16002" in complaint
    assert complaint.endswith("; r is built already, so --drop-leaks needs --rebuild to leave them out")
    assert "built already, from the same source" not in said.out
    assert files(tmp_path, "r") == before
    assert run(tmp_path, "r", source, "--drop-leaks", "--rebuild", "--against", "refcoco/val") == 0
    assert len(open_split("r", "train", tmp_path / "built")) == 4
    assert run(tmp_path, "r", source, *options, "--against", "refcoco/val") == 0, "no leak is left"


def test_a_picture_in_two_splits_of_one_set_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As between train and val of RefCOCOg's first split."""
    folder = sources.lines(tmp_path / "s")
    row = {"image": "images/2.jpg", "question": "the sofa again", "mask": "masks/one.png"}
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    assert run(tmp_path, "mine", folder) == 2
    assert "1 of 3 training questions are about pictures of mine/val" in capsys.readouterr().err
    assert run(tmp_path, "mine", folder, "--drop-leaks") == 0
    assert len(open_split("mine", "train", tmp_path / "built")) == 2
    assert len(open_split("mine", "val", tmp_path / "built")) == 2
    (folder / "train.jsonl").write_text(json.dumps(row))
    assert run(tmp_path, "mine", folder, "--drop-leaks", "--rebuild") == 2
    assert "all 1 training questions are about pictures that are held out; none is left" in capsys.readouterr().err
    assert len(open_split("mine", "train", tmp_path / "built")) == 2, "the set stays as it was"


def own_coco(folder: Path, seeds: tuple[int, int], file_name: str) -> Path:
    """train.json and val.json, in each of which the first picture has the id 1 and the same file name."""
    for split, seed in zip(("train", "val"), seeds, strict=True):
        (folder / split).mkdir(parents=True)
        (folder / split / file_name).write_bytes(encoded(picture(seed)))
        outline = sources.polygon(8, 8, 40, 40)
        content = {
            "images": [{"id": 1, "file_name": file_name, "width": sources.WIDTH, "height": sources.HEIGHT}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [outline]}],
            "categories": [{"id": 1, "name": "mug"}],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def own_lines(folder: Path, seeds: tuple[int, int], file_name: str) -> Path:
    """train.jsonl and val.jsonl with a picture of the same file name each."""
    for split, seed in zip(("train", "val"), seeds, strict=True):
        (folder / split).mkdir(parents=True)
        (folder / split / file_name).write_bytes(encoded(picture(seed)))
        row = {"image": f"{split}/{file_name}", "question": "the mug", "masks": []}
        (folder / f"{split}.jsonl").write_text(json.dumps(row))
    return folder


def own_parquet(folder: Path, seeds: tuple[int, int], image_id: str, **named: list[str]) -> Path:
    """train and val in parquet with the same ids."""
    for split, seed in zip(("train", "val"), seeds, strict=True):
        image = [{"bytes": encoded(picture(seed)), "path": image_id}]
        sources.mask_parquet(folder, rows=1, split=split, image=image, image_id=[image_id], **named)
    return folder


def numbered_parquet(folder: Path, seeds: tuple[int, int], first: str) -> Path:
    """train and val in parquet whose rows are counted from 0 in each, without a name for the picture."""
    for split, seed in zip(("train", "val"), seeds, strict=True):
        columns = {
            "id": [first],
            "problem": ["the mug"],
            "solution": ["<box>(4,10),(40,60)</box><points>(20,30),(30,44)</points>"],
            "image": [{"bytes": encoded(picture(seed)), "path": None}],
        }
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("name", ["1.jpg", "000000000001.jpg"])
@pytest.mark.parametrize("make", [own_coco, own_lines, own_parquet, numbered_parquet])
def test_a_name_in_two_splits_is_two_pictures(
    tmp_path: Path, make: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids from 1 and file names by number in each split; the pictures are others."""
    assert run(tmp_path, "r", make(tmp_path / "two", (1, 2), name)) == 0
    train, val = (open_split("r", split, tmp_path / "built") for split in ("train", "val"))
    assert (len(train), len(val)) == (1, 1)
    assert train[0].image_id != val[0].image_id
    assert not train[0].image_id.startswith("coco:")
    assert run(tmp_path, "s", make(tmp_path / "one", (1, 1), name)) == 2
    assert "1 of 1 training questions are about pictures of s/val" in capsys.readouterr().err


@pytest.mark.parametrize("make", [own_coco, own_lines, own_parquet])
def test_a_picture_that_is_named_as_cocos_is_known_by_it(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "s", (1, 2), "COCO_train2014_000000390002.jpg")
    assert run(tmp_path, "r", source) == 2
    assert "(same name, coco:390002)" in capsys.readouterr().err


def test_cocos_own_pictures_are_known_by_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO 2017 beside RefCOCO, made of COCO 2014: other names of files, the same numbers."""
    assert run(tmp_path, "refcoco", sources.refer(tmp_path / "refer")) == 0
    source = own_coco(tmp_path / "s", (1, 2), "000000390002.jpg")
    (source / "val.json").unlink()
    assert run(tmp_path, "own", source, "--against", "refcoco/val") == 0
    content = json.loads((source / "train.json").read_text())
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/000000390002.jpg"
    (source / "train.json").write_text(json.dumps(content))
    assert run(tmp_path, "coco", source, "--against", "refcoco/val") == 2
    assert "(same name, coco:390002)" in capsys.readouterr().err


def test_a_set_of_an_older_version_is_built_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.lines(tmp_path / "s")
    monkeypatch.setattr(builder, "_READING", builder._READING - 1)
    assert run(tmp_path, "mine", source) == 0
    monkeypatch.undo()
    assert run(tmp_path, "mine", source) == 2
    assert run(tmp_path, "mine", source, "--rebuild") == 0
    assert run(tmp_path, "mine", source) == 0


def index(rows: list[tuple[str, str, bytes]]) -> pa.Table:
    columns = list(zip(*[(f"q{n}", "", 0, 0, *row, "", "") for n, row in enumerate(rows)], strict=True))
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, INDEX, strict=True)], INDEX)


def test_what_counts_as_the_same_picture() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (4, 256), dtype=np.uint8)
    near, far = bits[0].copy(), bits[1].copy()
    near[:20] ^= 1
    far[:21] ^= 1
    flat = [np.arange(256) < count for count in (0, 10, 240)]
    prints = [np.packbits(row).tobytes() for row in (*bits, near, far, *flat)]
    held_out = [("coco:1", "s1", prints[0]), ("coco:2", "s2", prints[1])]
    held_out += [(f"x:{n}", f"s{n}", prints[n]) for n in (6, 7, 8)]
    train = [
        ("coco:2", "t0", prints[2]),
        ("y", "s1", prints[3]),
        ("y", "t2", prints[4]),
        ("y", "t3", prints[5]),
        *(("y", f"t{n}", prints[n]) for n in (6, 7, 8)),
    ]
    named = [(0, "q1", "same name, coco:2"), (1, "q0", "same file")]
    looking = [(2, "q0", "looks the same, 20 of 256 bits differ")]
    for one_set, expected in ((False, named + looking), (True, named)):
        found = leaks.find_leaks(index(train), index(held_out), one_set)
        assert [(leak.row, leak.held_out, leak.why) for leak in found] == expected


def test_every_picture_is_compared_with_every_held_out_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several blocks of both."""
    monkeypatch.setattr(leaks, "_BLOCK", 2)
    bits = np.random.default_rng(0).integers(0, 2, (7, 256), dtype=np.uint8)
    held_out = index([(f"x:{n}", f"s{n}", np.packbits(row).tobytes()) for n, row in enumerate(bits)])
    bits[:, :5] ^= 1
    train = index([("y", f"t{n}", np.packbits(row).tobytes()) for n, row in enumerate(bits[::-1])])
    found = leaks.find_leaks(train, held_out, one_set=False)
    assert [(leak.row, leak.held_out) for leak in found] == [(n, f"q{6 - n}") for n in range(7)]


def test_splits_of_one_set_may_have_pictures_that_look_the_same(tmp_path: Path) -> None:
    """Of one camera, say; nor are they compared twice if one of them is named among those of other sets."""
    print_ = np.random.default_rng(0).bytes(32)
    indices = {"train": index([("x:1", "s1", print_)]), "val": index([("x:2", "s2", print_)])}
    assert refuse_or_drop(indices, tmp_path, "mine", ["mine/val"], drop=False) == []
    del indices["train"]
    assert refuse_or_drop(indices, tmp_path, "mine", ["other/val"], drop=False) == [], "nothing is trained on"


def test_a_source_that_is_mostly_unusable_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.solution_parquet(tmp_path / "s", problem=["", "a", " ", "b", "c", "d"])
    assert run(tmp_path, "r", source) == 2
    complaint = capsys.readouterr().err
    assert "split train: 2 of 6 questions cannot be used, expected at most 10%" in complaint
    assert "refcocog_16000: an empty question" in complaint


def test_what_is_left_out_is_counted_by_kind_and_kept_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where numbers differ from row to row, commas and brackets included."""
    source = sources.lines(tmp_path / "s")
    box = {"bbox_2d": [1, 2, 30, 40], "point_2d": [5, 6]}
    objects = [box] * 200
    objects += [box | {"bbox_2d": [100 + n, 2, 200 + n, 40]} for n in range(12)]
    objects += [box | {"point_2d": [str(n), 3]} for n in range(4)]
    objects += [box | {"bbox_2d": [9, n, 9, 40]} for n in range(2)]
    rows = [{"image": "images/0.jpg", "question": "the mug", "objects": [one]} for one in objects]
    rows += [{"image": "images/0.jpg", "question": "the mug", "mask": f"masks/none-{n}.png"} for n in range(2)]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path, "mine", source) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert sorted(told) == [
        "left out: 12 (a target box outside its picture)",
        "left out: 2 (a mask cannot be read)",
        "left out: 2 (a target box without area)",
        "left out: 4 (point_2d not like [x, y])",
    ]
    lines = (built_directory("mine", tmp_path / "built") / "left_out.jsonl").read_text().splitlines()
    reasons = {row["id"]: (row["kind"], row["reason"]) for row in map(json.loads, lines)}
    assert reasons["train-000201"] == (
        "a target box outside its picture",
        "a target box [101, 2, 201, 40] outside the 128x96 picture",
    )
    assert reasons["train-000213"] == ("point_2d not like [x, y]", 'object 0: point_2d ["1", 3], expected [x, y]')


def test_leaks_are_counted_by_how_they_were_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sources.lines(tmp_path / "s")
    rows = [{"image": f"images/{n}.jpg", "question": "the sofa", "mask": "masks/one.png"} for n in (0, 2, 3)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path, "mine", folder, "--drop-leaks") == 0
    assert "left out: 2 (held out: same name)\n" in capsys.readouterr().out


BAD = {
    "no source": (["r"], "r: expected --source DIR"),
    "no directory": (["r", "--source", "nowhere"], "--source nowhere: no such directory"),
    "two directories": (["r", "--source", "segzero_jax", "docs"], "2 directories, expected one"),
    "toy": (["toy", "--source", "docs"], "toy: a name of its own is expected"),
    "two": (["mugs,cups", "--source", "docs"], "mugs,cups: a name of its own is expected, without / and commas"),
    "the folder itself": ([".", "--source", "docs"], ".: a name of its own is expected"),
    "the folder above": (["..", "--source", "docs"], "..: a name of its own is expected"),
    "no name": (["", "--source", "docs"], "'': a name of its own is expected"),
    "nothing built": (["r", "--check"], "data set r: not in"),
    "unknown against": (["r", "--source", "docs", "--against", "x/val"], "--against x/val: expected NAME/SPLIT"),
    "no such hub set": (
        ["r", "--source", "someone/nothing"],
        "someone/nothing: no such directory, and the Hugging Face",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_command_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = BAD[case]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(builder, "_pool", None)

    def offline(*args: object, **options: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr("segzero_jax.hub.snapshot_download", offline)
    assert build.main([*arguments, "--data-dir", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err.strip()
    assert expected in complaint
    assert len(complaint.splitlines()) == 1


def test_a_build_that_is_killed_leaves_no_worker() -> None:
    """It would write the same files as the build that goes on."""
    code = (
        "import time\n"
        "from segzero_jax.data import builder\n"
        "if __name__ == '__main__':\n"
        "    with builder._pool(2) as pool:\n"
        "        list(pool.map(time.sleep, (3, 3)))\n"
        "        asleep = [pool.submit(time.sleep, 600) for _ in range(2)]\n"
        "        print(*pool._processes, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.terminate()
    assert len(workers) == 2
    left = outliving(workers, 60)
    assert not left, f"workers {left} outlived their build"


def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(builder.SourceError, match="was killed, perhaps out of memory"), builder._pool(1) as pool:
        pool.submit(os._exit, 1).result()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.lines(tmp_path / "s")
    with monkeypatch.context() as patch:

        class Full:
            def __init__(self, *_: object) -> None:
                pass

            def write(self, record: bytes) -> None:
                raise RuntimeError("write() failed: No space left on device; writing train-00000")

        patch.setattr(shards.array_record_module, "ArrayRecordWriter", Full)
        assert run(tmp_path, "mine", source) == 2
    (complaint,) = (line for line in capsys.readouterr().err.splitlines() if "No space" in line)
    assert complaint.startswith("segzero_jax.data.build: write() failed: No space left on device")
    assert run(tmp_path, "mine", source) == 0
    assert not list(work(tmp_path, "mine").parent.glob(".mine.building*"))


def test_of_two_builds_at_once_the_second_takes_what_the_first_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, places = sources.lines(tmp_path / "s"), []
    real = builder.turn

    @contextmanager
    def busy(path: Path) -> Iterator[None]:
        monkeypatch.setattr(builder, "turn", real)
        assert run(tmp_path, "mine", source) == 0
        places.append(built_directory("mine", tmp_path / "built").stat().st_ino)
        yield

    monkeypatch.setattr(builder, "turn", busy)
    assert run(tmp_path, "mine", source) == 0
    out, error = capsys.readouterr()
    assert "another build has finished it meanwhile" in error
    first, second = (out[: len(out) // 2], out[len(out) // 2 :])
    assert first == second
    assert "mine/train: " in first
    assert built_directory("mine", tmp_path / "built").stat().st_ino == places[0]


def test_what_another_build_has_finished_is_held_against_others_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "refcoco", sources.refer(tmp_path / "refer")) == 0
    source = sources.solution_parquet(tmp_path / "s", image=[squashed(seed) for seed in range(6)])
    real = builder.turn

    @contextmanager
    def busy(path: Path) -> Iterator[None]:
        monkeypatch.setattr(builder, "turn", real)
        assert run(tmp_path, "r", source) == 0
        yield

    monkeypatch.setattr(builder, "turn", busy)
    assert run(tmp_path, "r", source, "--against", "refcoco/val") == 2
    assert "2 of 6 training questions are about pictures of refcoco/val" in capsys.readouterr().err


def test_an_error_of_one_process_is_the_commands(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plan = sources.lines(tmp_path / "s"), builder.make_plan

    def and_lose_a_picture(form: Form) -> builder.Plan:
        made = plan(form)
        assert len(made.shards) > 1
        next((source / "images").iterdir()).unlink()
        return made

    monkeypatch.setattr(builder, "make_plan", and_lose_a_picture)
    assert run(tmp_path, "mine", source, "--workers=2") == 2
    (complaint,) = (line for line in capsys.readouterr().err.splitlines() if "segzero_jax.data.build: " in line)
    assert "No such file" in complaint
    assert f"{source / 'images'}" in complaint


def test_a_set_on_another_disk_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is a link; what lies in it cannot be renamed to beside the link."""
    assert run(tmp_path, "mine", sources.lines(tmp_path / "s")) == 0
    place, real = tmp_path / "built/question_set", os.rename
    (place / "mine").rename(tmp_path / "other disk")
    (place / "mine").symlink_to(tmp_path / "other disk")

    def within_a_disk(source: Any, target: Any, **options: Any) -> None:
        here = [Path(path).resolve().is_relative_to(tmp_path / "other disk") for path in (source, target)]
        if here[0] != here[1]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", within_a_disk)
    assert run(tmp_path, "mine", sources.solution_parquet(tmp_path / "other"), "--rebuild") == 0
    assert len(open_split("mine", "train", tmp_path / "built")) == 6


def test_a_set_that_cannot_be_deleted_is_replaced_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk keeps the files that a run reads."""
    assert run(tmp_path, "mine", sources.lines(tmp_path / "s")) == 0
    other = sources.solution_parquet(tmp_path / "other")
    with monkeypatch.context() as patch:
        real = shutil.rmtree
        kept = lambda path, **options: None if "file" in {p.name for p in Path(path).iterdir()} else real(path)  # noqa: E731
        (built_directory("mine", tmp_path / "built") / "file").touch()
        patch.setattr(shutil, "rmtree", kept)
        assert run(tmp_path, "mine", other, "--rebuild") == 0
    assert len(open_split("mine", "train", tmp_path / "built")) == 6
    assert list((tmp_path / "built/question_set/mine").glob(".*.replaced"))
    assert run(tmp_path, "mine", other, "--rebuild") == 0
    assert not list((tmp_path / "built/question_set/mine").glob(".*.replaced"))


@pytest.mark.parametrize("command", [["--source=s"], ["--check"]])
def test_a_set_is_built_on_this_machines_disk(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.lines(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    assert build.main(["mine", *command, "--data-dir=gs://bucket/data", "--workers=1"]) == 2
    assert capsys.readouterr().err == (
        "segzero_jax.data.build: --data-dir=gs://bucket/data: expected a folder on this machine's disk, got a URL; "
        "build it on a disk and copy it from there\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("place", ["file", "file/z", "file/z/deeper"])
def test_a_data_dir_in_a_file_is_told_before_the_source_is_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder, "make_plan", None)
    (tmp_path / "file").touch()
    source = sources.lines(tmp_path / "s")
    assert build.main(["mine", f"--source={source}", f"--data-dir={tmp_path / place}", "--workers=1"]) == 2
    assert capsys.readouterr().err == (
        f"segzero_jax.data.build: --data-dir={tmp_path / place}: {tmp_path / 'file'} is a file, expected a folder\n"
    )


def reason_seg_of_the_hub(folder: Path) -> dict[str, Path]:
    """Its two repositories; the files of both say that they are "test"."""
    pictures = [{"bytes": encoded(picture(n)), "path": None} for n in range(3)]
    rows = {name: [f"{name}{n}" for n in range(3)] for name in ("image_id", "ann_id", "text")}
    return {
        "Ricky06662/ReasonSeg_val": sources.mask_parquet(folder / "ReasonSeg_val"),
        "Ricky06662/ReasonSeg_test": sources.mask_parquet(folder / "ReasonSeg_test", rows=3, image=pictures, **rows),
    }


def test_the_hubs_sets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reason_seg_of_the_hub(tmp_path)
    # Another program's, in the same cache.
    sources.lines(made["Ricky06662/ReasonSeg_val"])
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append(options)
        return str(made[repo])

    monkeypatch.setattr("segzero_jax.hub.snapshot_download", download)
    assert build.main(["ReasonSeg", "--data-dir", str(tmp_path / "built"), "--workers=1"]) == 0
    val, test = (open_split("ReasonSeg", split, tmp_path / "built") for split in ("val", "test"))
    assert [example.id for example in val] == [f"val-picture_{n}-{n}" for n in range(4)]
    assert [example.id for example in test] == [f"test-image_id{n}-ann_id{n}" for n in range(3)]
    assert all(options["repo_type"] == "dataset" and options["allow_patterns"] == ["*.parquet"] for options in asked)


@pytest.mark.parametrize("first", [0, 1])
def test_a_repository_of_the_hub_is_its_split_in_a_local_copy_too(tmp_path: Path, first: int) -> None:
    copies = list(reason_seg_of_the_hub(tmp_path).values())
    both = [str(copies[first]), str(copies[1 - first])]
    assert build.main(["r", "--source", *both, "--data-dir", str(tmp_path / "built"), "--workers=1"]) == 0
    assert [len(open_split("r", split, tmp_path / "built")) for split in ("val", "test")] == [4, 3]
    assert run(tmp_path, "one", copies[0]) == 0
    assert len(open_split("one", "val", tmp_path / "built")) == 4


def test_one_evaluation_split_of_two_sources_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [sources.mask_parquet(tmp_path / name) for name in ("a", "b")]
    assert run(tmp_path, "r", made[0], "--source", *map(str, made)) == 2
    complaint = capsys.readouterr().err.strip()
    assert f"split test: in {made[0]} and in {made[1]}; build two data sets of them" in complaint
    assert len(complaint.splitlines()) == 1
    training = [sources.solution_parquet(tmp_path / name) for name in ("c", "d")]
    assert run(tmp_path, "t", training[0], "--source", *map(str, training)) == 0
    assert len(open_split("t", "train", tmp_path / "built")) == 12
