"""The toy data set on disk: what is stored is what was drawn, and a build is whole or absent."""

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from full_disk import no_file_above
from PIL import Image
from pycocotools import mask as coco_mask

from segzero_jax.config import ConfigError
from segzero_jax.data import toy
from segzero_jax.data.pipeline import DataError, open_split
from segzero_jax.data.scenes import SPLITS, make_example_scene
from segzero_jax.types import Frame

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
from segzero_jax.data import toy
toy.SIZES = dict.fromkeys(toy.SIZES, int(sys.argv[2]))
toy.prepared_builder(sys.argv[1])
"""


def start_build(directory: Path, size: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(directory), str(size)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SIZES", dict.fromkeys(SPLITS, 12))
        toy.prepared_builder(directory)
    return directory


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_the_scenes(data_dir: Path, split: str) -> None:
    source = open_split("toy", split, data_dir)
    assert len(source) == 12
    assert [example.id for example in source] == [f"toy-{split}-{index:05d}" for index in range(12)]
    with pytest.raises(IndexError, match=f"toy/{split}: example 12, expected 0 to 11"):
        source[12]
    for index in (0, 11):
        scene, question = make_example_scene(split, index)
        answer = scene.objects[question.answer]
        example = source[index]
        assert example.question == question.text
        assert example.frame == Frame(scene.image.shape[1], scene.image.shape[0])
        (target,) = example.objects
        assert (target.box, target.points) == (tuple(map(float, answer.box)), (tuple(map(float, answer.point)),))
        assert (example.mask.height, example.mask.width) == answer.mask.shape
        rle = {"size": answer.mask.shape, "counts": example.mask.counts}
        np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), answer.mask)
        stored = Image.open(io.BytesIO(example.image))
        assert stored.format == "JPEG"
        assert np.abs(np.asarray(stored, int) - scene.image).mean() < 6


def test_sizes_and_unknown_names() -> None:
    assert [toy.SIZES[name] for name in SPLITS] == [2048, 256, 256, 256, 256]
    with pytest.raises(ValueError, match="data set 'coco': not in unused, expected toy;"):
        open_split("coco", "train", "unused")
    with pytest.raises(ValueError, match="split 'test' of data set toy: expected one of train, val"):
        open_split("toy", "test", "unused")


def test_it_is_made_on_this_machines_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^data\.dir=gs://bucket/data: expected a folder on this machine's disk, got"
    ):
        open_split("toy", "val", "gs://bucket/data")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line_and_the_next_build_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "SIZES", dict.fromkeys(SPLITS, 40))
    with (
        no_file_above(20_000),
        pytest.raises(DataError, match=r"^data set 'toy': cannot be built in .*: File too large.*$"),
    ):
        open_split("toy", "train", tmp_path)
    assert not list(tmp_path.glob("toy_shapes/[0-9]*"))
    assert len(open_split("toy", "train", tmp_path)) == 40


def test_a_defect_in_the_scenes_is_not_blamed_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(toy, "make_example_scene", broken)
    with pytest.raises(RecursionError):
        open_split("toy", "train", tmp_path)


def test_two_processes_build_once(tmp_path: Path) -> None:
    both = [start_build(tmp_path, 40) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum(err.count("building the toy data set") for _, err in outputs) == 1
    assert all(out == "" for out, _ in outputs)
    assert len(open_split("toy", "val", tmp_path)) == 40


def test_a_killed_build_leaves_nothing_that_passes_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_build(tmp_path, 100_000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("toy_shapes/incomplete.*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert list(tmp_path.glob("toy_shapes/incomplete.*"))
    assert not list(tmp_path.glob("toy_shapes/[0-9]*"))
    monkeypatch.setattr(toy, "SIZES", dict.fromkeys(SPLITS, 3))
    assert len(open_split("toy", "train", tmp_path)) == 3
    assert not list(tmp_path.glob("toy_shapes/incomplete.*"))
