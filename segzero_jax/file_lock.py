"""Locks between processes. They end with their process, however that ends; their files remain and mean nothing."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_HELD = ".lock"
# flock's errors on file systems without locks, such as Lustre mounted without them.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# The lock files that this process has open.
_open_locks: set[IO[str]] = set()


class FolderHeld(OSError):
    """Another process works in the folder; the message is one line."""


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Holds a folder for this process; another process that requests it is refused at once. Makes the folder.

    On a file system without locks no process is refused.

    Args:
      what: what is made in the folder, for the message: "evaluation".

    Raises:
      FolderHeld: another process holds it, or this one already does.
      OSError: it cannot be made or written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    # Not "w", which would truncate the holder's file.
    with (path / _HELD).open("a+") as lock:
        try:
            _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderHeld(
                f"{path}: {_holder(lock)} works on this {what}; wait until it ends, or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        _open_locks.add(lock)
        try:
            yield
        finally:
            if lock in _open_locks:  # False in a forked process.
                _open_locks.remove(lock)
                # On a disk that is gone the lock is, too; the error that ends the holder is the one to report.
                with suppress(OSError):
                    lock.truncate(0)


def _let_go() -> None:
    """Closes the locks in a forked process, which shares them and would hold them after its parent has ended."""
    while _open_locks:
        _open_locks.pop().close()


os.register_at_fork(after_in_child=_let_go)


def _holder(lock: IO[str]) -> str:
    """The process that holds the lock, and its host: hosts may share the disk."""
    lock.seek(0)
    return lock.readline(200).strip() or "another process"


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Holds a file's lock for the block, waiting for other processes first; not on a file system without locks."""
    with path.open("w") as lock:
        _lock(lock, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
