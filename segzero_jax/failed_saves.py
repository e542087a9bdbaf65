"""What is left of a save that failed: files, and writers that go on.

Orbax reports the first error. Its writers of other arrays go on for a moment: they make their folders anew, and report
to an event loop that is closed by then.
"""

import contextlib
import sys
import time

import orbax.checkpoint as ocp
from etils import epath

# Writers that have made nothing for so long have ended.
_QUIET_S = 1.0
_LIMIT_S = 5.0
_PAUSE_S = 0.1


def remove_unfinished(directory: epath.Path, failures: tuple[type[Exception], ...] = (OSError,)) -> None:
    """Removes what failed saves left, until writers have made nothing for a second.

    Gives up after some seconds: the next save that fails removes the rest, or the next start.

    Args:
      failures: what a storage like this raises. Raises it if the directory itself cannot be read.
    """
    begun = found = time.monotonic()
    while (now := time.monotonic()) < min(begun + _LIMIT_S, found + _QUIET_S):
        for path in _unfinished(directory):
            found = now
            with contextlib.suppress(*failures):  # A writer came between; the next look tells.
                path.rmtree(missing_ok=True)
        time.sleep(_PAUSE_S)


def _unfinished(directory: epath.Path) -> list[epath.Path]:
    """The leftovers of failed saves: on a disk under another name, in a bucket uncommitted."""
    found = directory.iterdir() if directory.is_dir() else ()
    return [
        path
        for path in found
        if ocp.utils.TMP_DIR_SUFFIX in path.name
        or (path.name.isdigit() and not ocp.utils.is_checkpoint_finalized(path))
    ]


def ignore_late_reports() -> None:
    """Makes this process drop errors of writers that report to a closed event loop, a traceback for each array."""
    show = sys.unraisablehook

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = show_others
