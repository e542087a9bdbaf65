"""Stopping a run on request: SIGTERM when the machine is reclaimed, or Ctrl-C.

A signal only sets a flag. The run checks it between the phases of a step, saves the last finished step and ends: no
computation is interrupted, and an unfinished step is repeated from the same random numbers. Before training begins
there is nothing to save, and a signal ends the run wherever it is.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run is to stop. No library that catches errors should take it for one of its own.

    Attributes:
      interrupted: whether it was Ctrl-C.
    """

    def __init__(self, interrupted: bool) -> None:
        super().__init__("Ctrl-C" if interrupted else "SIGTERM")
        self.interrupted = interrupted


class Preemption:
    """Listens for signals while it is entered, and is polled between phases once training has begun.

    If processes work together, JAX's preemption service listens for SIGTERM from the moment they have joined: one sent
    to any of them makes all of them stop at the same call of ``check``. Ctrl-C is passed on to it as SIGTERM. The
    service also listens in a process that is alone, as on a TPU VM, but there are no others to agree with.
    """

    def __init__(self, alone: bool = True) -> None:
        """Does not listen yet; ``alone`` if no other process works on the run."""
        self._alone = alone
        self._say: Callable[[str], None] | None = None
        self._received: int | None = None
        self._calls = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # Python lets only the main thread listen.
        if threading.current_thread() is threading.main_thread():
            own = _SIGNALS if self._alone else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._note) for number in own}
        # The parent process may block signals, and a process inherits that: it would never receive them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # JAX's handler, if it has joined, is not one that Python knows.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def begin(self, say: Callable[[str], None]) -> None:
        """From now on there is something to save: a signal only sets a flag for ``check``.

        Args:
          say: prints a line.
        """
        self._say = say

    def check(self) -> None:
        """To be called between phases by every process. Raises Stopped if any of them was told to stop."""
        self._calls += 1
        stops = (
            self._received is not None if self._alone else multihost_utils.reached_preemption_sync_point(self._calls)
        )
        if stops:
            raise Stopped(self._received == signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before, self._received = self._received, self._received or number
        if number == signal.SIGINT and (self._say is None or before == number):
            raise KeyboardInterrupt  # Nothing to save yet, or the second Ctrl-C.
        if before is None:
            # If the exception is swallowed, as one raised in a JAX callback is, the flag is still set.
            if self._say is None:
                raise Stopped(interrupted=False)
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)
            again = "; again stops at once" if number == signal.SIGINT else ""
            # Python refuses to write if the signal interrupted a write; the flag counts, not its line.
            with contextlib.suppress(RuntimeError):
                self._say(
                    f"{signal.Signals(number).name}: stops after this phase and saves the last finished step{again}"
                )
