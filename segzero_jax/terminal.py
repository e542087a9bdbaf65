"""Lines for whoever watches a run, as long as somebody does."""

import os
from typing import TextIO


def write_line(stream: TextIO, text: str) -> None:
    """Writes a line at once; once nobody reads the stream any more, it goes nowhere.

    The signal that tells a run to save and stop ends a ``| tee`` beside it, too, and the run must not die of that.
    """
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again as the interpreter ends, and change its exit code.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
