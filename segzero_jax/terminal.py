"""Terminal output that never ends a run, even when nobody reads it any more."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO, cast


def write_line(stream: TextIO | None, text: str) -> None:
    """Writes and flushes a line, without raising, see ``lasting``."""
    stream = lasting(stream)
    stream.write(text + "\n")
    stream.flush()


def end_process(code: int) -> NoReturn:
    """Ends the process at once, without Python's own cleanup, except that its streams are flushed."""
    for stream in (sys.stdout, sys.stderr):
        lasting(stream).flush()
    os._exit(code)


def lasting(stream: TextIO | None) -> TextIO:
    """Wraps a stream for writing only: once a write fails, further output is dropped and nothing is raised.

    The signal that tells a run to save and stop also ends a ``| tee`` beside it; a connection with its terminal breaks;
    the disk of its log fills up. The run must not die of that. Characters that the stream cannot encode become "?".

    Args:
      stream: None if the process began without it.
    """
    return cast(TextIO, _Lasting(stream))


class _Lasting:
    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        if self._stream is not None:
            with self._lost_quietly(self._stream):
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    known = self._stream.encoding
                    self._stream.write(text.encode(known, "replace").decode(known))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._lost_quietly(self._stream):
                self._stream.flush()

    @contextlib.contextmanager
    def _lost_quietly(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: it has been closed.
            # What is left in the buffer would fail again when the interpreter exits, and change its exit code.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
