"""Wall-clock time by phase, and its productive share, over all restarts of a run."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from segzero_jax import jsonl
from segzero_jax.step_phases import BESIDE, PRODUCTIVE

_COMPILING = "/jax/core/compile/"


class PhaseTimer:
    """Wall-clock seconds of the phases of a step, for ``time/<phase>``; in a profile, phases appear by name.

    JAX returns before a computation is done: wait for its result inside the phase that it belongs to. One thread
    times; any thread may call ``running`` and ``peek``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None
        self._idle_since = self._start
        self._carried = 0.0

    def now(self) -> float:
        """Seconds on the timer's clock."""
        return self._clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``name``. Phases do not nest: shares of a step must add up."""
        if self._running is not None:
            raise RuntimeError(f"phase {name!r} inside phase {self._running[0]!r}: expected one after the other")
        self._running = name, self._clock()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            now = self._clock()
            self._add(name, now - self._running[1])
            self._running, self._idle_since = None, now

    def move(self, seconds: float, name: str) -> None:
        """Counts seconds that just passed as ``name`` instead of as the phase in progress."""
        self._add(name, seconds)
        if self._running is not None:
            self._running = self._running[0], self._running[1] + seconds

    def carry(self, name: str, seconds: float) -> None:
        """Adds seconds that passed before this timer was made."""
        self._add(name, seconds)
        self._carried += seconds

    def name_rest(self, name: str) -> None:
        """Counts all time so far that is in no phase as ``name``."""
        self._add(name, self._clock() - self._start + self._carried - sum(self._seconds.values()))

    def running(self) -> tuple[str, float]:
        """The phase in progress, "other" between phases, and its seconds so far."""
        name, since = self._running or ("other", self._idle_since)
        return name, self._clock() - since

    def peek(self) -> dict[str, float]:
        """Seconds by phase since the last ``take``, the phase in progress and "other" included."""
        seconds = dict(self._seconds)
        if self._running is not None:
            name, so_far = self.running()
            seconds[name] = seconds.get(name, 0.0) + so_far
        total = self._clock() - self._start + self._carried
        return {**seconds, "other": max(0.0, total - sum(seconds.values()))}

    def take(self) -> dict[str, float]:
        """Returns what ``peek`` does, and resets the timer."""
        seconds = self.peek()
        now = self._clock()
        self._start = self._idle_since = now
        self._seconds, self._carried = {}, 0.0
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class CompileClock:
    """Moves the time in which this thread traces, lowers or compiles a program to the phase ``compile``."""

    def __init__(self, timer: PhaseTimer) -> None:
        self._timer = timer
        self._thread = threading.get_ident()
        self._depth = 0
        self._since = 0.0

    @property
    def compiling(self) -> bool:
        """Whether a program is being compiled now."""
        return self._depth > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Counts inside this context."""
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_time_span_listener(self._end)
        try:
            yield
        finally:
            jax.monitoring.unregister_scalar_listener(self._begin)
            jax.monitoring.unregister_event_time_span_listener(self._end)

    def _begin(self, event: str, value: float | int, **kwargs: str | int) -> None:
        if event.startswith(_COMPILING) and threading.get_ident() == self._thread:
            self._depth += 1
            # JAX reports the start by the wall clock, which may be set meanwhile.
            if self._depth == 1:
                self._since = self._timer.now()

    def _end(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILING) and threading.get_ident() == self._thread:
            self._depth = max(0, self._depth - 1)
            # A function traced inside another's trace is part of it.
            if self._depth == 0:
                self._timer.move(self._timer.now() - self._since, "compile")


class TimeAccount:
    """The ``time/*`` of every line of ``metrics.jsonl``, and ``clock.json`` for seconds that are in no line yet.

    A line's seconds are those since the previous line. After a restart, the first line also has those of start-up and,
    as ``lost``, those spent past the checkpoint that the run resumed from. Time between processes is not counted.

    Args:
      run_dir: its ``clock.json`` has the seconds of an earlier process after its last line. None reads and writes
        nothing, for all processes of a run but process 0.
      timer: this process's timer.
      kept: rows of ``metrics.jsonl`` that this process resumes from.
      removed: rows past those, whose steps are repeated.

    Raises:
      JsonLinesError: ``clock.json`` is not JSON.
    """

    def __init__(
        self,
        run_dir: Path | None,
        timer: PhaseTimer,
        kept: Sequence[Mapping[str, Any]],
        removed: Sequence[Mapping[str, Any]],
    ) -> None:
        self._file = run_dir / "clock.json" if run_dir is not None else None
        self._timer = timer
        self._lock = threading.Lock()
        self._step = kept[-1]["step"] if kept else 0
        self._total = sum((row.get("time/total") or 0.0 for row in kept), 0.0)
        self._productive = sum(row.get(f"time/{name}") or 0.0 for row in kept for name in PRODUCTIVE)
        lost = sum(row.get("time/total") or 0.0 for row in removed)
        left = _read(self._file)
        # A file from before the last line repeats what is in that line.
        if left["after_step"] >= (removed[-1]["step"] if removed else self._step):
            if left["ended"] and not removed:
                for name, seconds in left["seconds"].items():
                    timer.carry(name, seconds)
            else:
                lost += sum(left["seconds"].values())
        if lost:
            timer.carry("lost", lost)
        self.note()

    def line(self, step: int) -> dict[str, float]:
        """``time/*`` of a step: seconds by phase, ``time/total``, ``time/step`` (without phases outside the steps),
        ``time/data_share`` (of the step), and ``time/goodput``, the productive share of the run's total time so far."""
        with self._lock:
            seconds = self._timer.take()
            self._step = step
        total = sum(seconds.values())
        in_step = total - sum(seconds.get(name, 0.0) for name in BESIDE)
        self._total += total
        self._productive += sum(seconds.get(name, 0.0) for name in PRODUCTIVE)
        return {
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/step": in_step,
            "time/total": total,
            "time/data_share": seconds.get("data", 0.0) / in_step if in_step else 0.0,
            "time/goodput": self._productive / self._total if self._total else 0.0,
        }

    def note(self, ended: bool = False) -> None:
        """Writes ``clock.json``, from any thread. ``ended``: the run is done, nothing after its last line is lost."""
        if self._file is None:
            return
        with self._lock:
            content = {"after_step": self._step, "ended": ended, "seconds": self._timer.peek()}
            jsonl.replace(self._file, json.dumps(content).encode())


def _read(file: Path | None) -> dict[str, Any]:
    if file is None or not file.exists():
        return {"after_step": -1, "ended": False, "seconds": {}}
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise jsonl.JsonLinesError(f"{file}: expected JSON: {error}; delete it, only seconds are lost") from None
    return content
