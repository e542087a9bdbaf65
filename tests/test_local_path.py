"""What is taken for a path on this machine's disk, and what for a URL."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import question_sources

from segzero_jax import infer, rescore
from segzero_jax.config import ConfigError
from segzero_jax.data import build
from segzero_jax.evaluate import __main__ as evaluate
from segzero_jax.local_path import is_url, local_path


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "gs:/bucket/run", Path("gs://bucket/run"), "s3://b", "file:///run"]
)
def test_a_url_is_none_also_when_pathlib_has_had_it(path: str | Path) -> None:
    assert is_url(path)
    with pytest.raises(ConfigError) as error:
        local_path(path, "--out", "copy it")
    assert str(error.value) == f"--out={path}: expected a folder on this machine's disk, got a URL; copy it"


@pytest.mark.parametrize(
    ("command", "options"),
    [(infer, ["--image=a.png", "--query=mug"]), (evaluate, ["--dataset=toy/val"])],
    ids=["infer", "evaluate"],
)
def test_answers_are_written_to_this_machines_disk(
    command: ModuleType,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main([*options, "--out=gs://bucket/out"]) == 2
    said = capsys.readouterr().err
    assert "--out=gs://bucket/out: expected a folder on this machine's disk, got a URL; write to a disk" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["runs/toy", "/runs/a:b/c", "./gs:/bucket", "C:/runs", "a:b", "~/runs", ""])
def test_a_path_is_one(path: str) -> None:
    assert local_path(path, "--out", "copy it") == Path(path).expanduser()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, which is not the one that commands are called in."""
    folder = tmp_path / "home"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_the_home_folder_is_meant_where_no_shell_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--image=~/a.jpg`` comes as it is: a shell expands what begins with ``~``, and this begins with a dash."""
    source = question_sources.lines(home / "mugs")
    (home / "pictures").mkdir()
    (source / "images").rename(home / "pictures" / "images")
    assert build.main(["mugs", "--source=~/mugs", "--images=~/pictures", "--data-dir=~/built", "--workers=1"]) == 0
    assert (home / "built/question_set/mugs").is_dir()

    (home / "in.jsonl").write_text(json.dumps({"text": "", "solution": '[{"bbox_2d": [1,2,3,4], "point_2d": [2,3]}]'}))
    rescore.main(["--recipe=vision_reasoner", "--input=~/in.jsonl", "--output=~/out.jsonl"])
    assert f"wrote 1 rows to {home / 'out.jsonl'}" in capsys.readouterr().out
    assert (home / "out.jsonl").is_file()

    (home / "questions.txt").write_text(" . ")
    assert infer.main(["--image=~/pictures/images", "--queries=~/questions.txt", "--server=none"]) == 2
    assert f"--queries={home / 'questions.txt'}: no question in it" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
