"""A failed save leaves no files, and its writers no tracebacks."""

import errno
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath

from segzero_jax import train
from segzero_jax.failed_saves import ignore_late_reports, remove_unfinished


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only sleeping moves."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("comes", ["between files", "beside the removal", "later"])
def test_what_a_failed_save_left_is_removed_though_another_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[float], comes: str
) -> None:
    """After the first error of a save, Orbax's writers of other arrays make their folders anew."""
    (tmp_path / "1/manifest").mkdir(parents=True)
    left = tmp_path / "2.orbax-checkpoint-tmp/optimizer"
    left.mkdir(parents=True)
    remove, sleep, writes = shutil.rmtree, time.sleep, iter(["a", "b"])

    def write() -> None:
        if part := next(writes, None):
            left.mkdir(parents=True)
            (left / part).touch()

    def remove_and_write(path: Path) -> None:
        remove(path)
        write()
        if comes == "between files":
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    def sleep_and_write(seconds: float) -> None:
        sleep(seconds)
        if round(now[0], 3) in (0.6, 1.4):
            write()

    if comes == "later":
        monkeypatch.setattr(time, "sleep", sleep_and_write)
    else:
        monkeypatch.setattr(shutil, "rmtree", remove_and_write)
    remove_unfinished(epath.Path(tmp_path))
    assert next(writes, None) is None
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_failure_of_a_bucket_is_one_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    remove, errors = shutil.rmtree, iter([LookupError("404")])

    def refuse_once(path: Path) -> None:
        for error in errors:
            raise error
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", refuse_once)
    remove_unfinished(epath.Path(tmp_path), (Exception,))
    assert not list(tmp_path.iterdir())


def test_a_leftover_that_cannot_be_removed_does_not_hold_the_run_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    remove_unfinished(epath.Path(tmp_path))
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()
    assert now[0] < 10


def test_a_training_drops_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    monkeypatch.setattr(train, "run", lambda *_: None)
    assert train.main([f"--run.dir={tmp_path}"]) == 0
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    assert shown == []


def test_only_reports_to_a_closed_loop_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))
    ignore_late_reports()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else"), ValueError("a number")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert shown == ["something else", "a number"]
