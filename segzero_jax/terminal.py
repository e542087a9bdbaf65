"""Lines for whoever watches a run, as long as somebody does."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO, cast


def write_line(stream: TextIO | None, text: str) -> None:
    """Writes a line at once, as ``lasting`` does."""
    stream = lasting(stream)
    stream.write(text + "\n")
    stream.flush()


def end_process(code: int) -> NoReturn:
    """Ends the process at once, without what Python does at its end, but for what is written to its streams."""
    for stream in (sys.stdout, sys.stderr):
        lasting(stream).flush()
    os._exit(code)


def lasting(stream: TextIO | None) -> TextIO:
    """The stream, for writing alone: once that fails, what is written goes nowhere and raises nothing.

    The signal that tells a run to save and stop ends a ``| tee`` beside it, too; a connection with its terminal breaks;
    the disk of its log fills up. The run must not die of that. Characters that the stream has no bytes for become "?".

    Args:
      stream: None where the process began without it.
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
            # What is left in the buffer would fail again as the interpreter ends, and change its exit code.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
