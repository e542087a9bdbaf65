"""A failed save leaves no files, and its writers no tracebacks."""

import errno
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath

from segzero_jax.failed_saves import ignore_late_reports, remove_unfinished


def test_what_a_failed_save_left_is_removed_though_another_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first error of a save, Orbax's writers of other arrays make their folders anew."""
    (tmp_path / "1/manifest").mkdir(parents=True)
    left = tmp_path / "2.orbax-checkpoint-tmp/optimizer"
    left.mkdir(parents=True)
    writes = iter("ab")

    def go_on(_: float) -> None:
        if part := next(writes, None):
            left.mkdir(parents=True)
            (left / part).touch()

    monkeypatch.setattr(time, "sleep", go_on)
    remove_unfinished(epath.Path(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_leftover_that_cannot_be_removed_does_not_hold_the_run_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    now = [0.0]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(shutil, "rmtree", refuse)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    remove_unfinished(epath.Path(tmp_path))
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()
    assert now[0] < 10


def test_only_reports_to_a_closed_loop_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))
    ignore_late_reports()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else"), ValueError("a number")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert shown == ["something else", "a number"]
