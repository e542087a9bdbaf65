"""What is taken for a path on this machine's disk, and what for a URL."""

from pathlib import Path
from types import ModuleType

import pytest

from segzero_jax import infer
from segzero_jax.config import ConfigError
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
