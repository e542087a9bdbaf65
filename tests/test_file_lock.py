"""Folders that one process keeps for itself."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from segzero_jax.file_lock import FolderHeld, hold, turn

# Holds the folder of its argument until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
from segzero_jax.file_lock import hold
with hold(Path(sys.argv[1]), "training run"):
    print("holds", flush=True)
    time.sleep(600)
"""

# Does so too, beside a process that it has forked, whose number it prints.
FORKER = """
import os, sys, time
from pathlib import Path
from segzero_jax.file_lock import hold
with hold(Path(sys.argv[1]), "run"):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "toy"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "holds\n"
            for _ in range(2):  # being refused takes nothing from the one who holds it
                with pytest.raises(FolderHeld) as refused, hold(folder, "training run"):
                    pass
                assert str(refused.value).startswith(f"{folder}: process {holder.pid} on ")
                assert str(refused.value).endswith(
                    " works on this training run; wait until it ends, or choose another folder"
                )
        finally:
            holder.kill()
    with hold(folder, "training run"):
        pass


def test_a_folder_is_held_once_in_a_process_too_and_free_afterwards(tmp_path: Path) -> None:
    again = pytest.raises(FolderHeld, match=f"process {os.getpid()} on")
    with hold(tmp_path, "evaluation"), again, hold(tmp_path, "evaluation"):
        pass
    with pytest.raises(KeyError), hold(tmp_path, "evaluation"):
        raise KeyError
    with hold(tmp_path, "evaluation"), hold(tmp_path / "other", "evaluation"):
        pass


def test_what_a_killed_process_has_forked_does_not_keep_its_folder(tmp_path: Path) -> None:
    """Such as a pool of a reward function's own, which outlives the run."""
    with subprocess.Popen([sys.executable, "-c", FORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        forked = int(holder.stdout.readline())
        try:
            with pytest.raises(FolderHeld, match=f"process {holder.pid} on"), hold(tmp_path, "run"):
                pass
            holder.kill()
            holder.wait()
            os.kill(forked, 0)  # is alive
            with hold(tmp_path, "run"):
                pass
        finally:
            os.kill(forked, signal.SIGKILL)


def test_a_disk_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def no_locks(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with hold(tmp_path, "evaluation"), hold(tmp_path, "evaluation"), turn(tmp_path / "built"):
        pass
    raised = OSError(errno.EIO, os.strerror(errno.EIO))
    for one in (hold(tmp_path, "evaluation"), turn(tmp_path / "built")):
        with pytest.raises(OSError, match="Input/output"), one:
            pass
