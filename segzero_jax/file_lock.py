"""Locks between processes. They go with their process, however that ends; their files stay, and mean nothing."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_HELD = ".lock"
# What flock raises on file systems without locks, such as Lustre mounted without them.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# The lock files that this process has open.
_open_locks: set[IO[str]] = set()


class FolderHeld(OSError):
    """Another process works in a folder; one line."""


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Keeps a folder for this process; another one that asks for it is refused at once. Makes the folder.

    On a file system without locks nobody is refused.

    Args:
      what: is made in it, for the message: "evaluation".

    Raises:
      FolderHeld: it is another's, or held in this process already.
      OSError: it cannot be made or written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    # Not "w": it would empty the file of the one who holds it.
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
            if lock in _open_locks:  # Of a forked process they are not.
                _open_locks.remove(lock)
                lock.truncate(0)


def _let_go() -> None:
    """In a forked process: it shares the lock, and would keep it from whoever comes after this one's parent."""
    while _open_locks:
        _open_locks.pop().close()


os.register_at_fork(after_in_child=_let_go)


def _holder(lock: IO[str]) -> str:
    """Who has the lock: a host's processes share a disk with those of others."""
    lock.seek(0)
    return lock.readline(200).strip() or "another process"


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Waits until no other process is between this file's lock and its end; not on a file system without locks."""
    with path.open("w") as lock:
        _lock(lock, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
