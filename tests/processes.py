"""Whether processes have ended, also those that others have started."""

import time
from collections.abc import Collection
from pathlib import Path


def has_ended(pid: int) -> bool:
    """Whether or not anybody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def outliving(pids: Collection[int], seconds: float) -> list[int]:
    """Those that have not ended after so many seconds; returns as soon as all have."""
    until = time.monotonic() + seconds
    while (left := [pid for pid in pids if not has_ended(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    return left
