"""Watches over a run: updates that are not finite, policies that collapse, and steps that hang."""

import faulthandler
import os
import statistics
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import WatchConfig
from segzero_jax.metrics import MetricsWriter
from segzero_jax.profiling import Profiler
from segzero_jax.progress import duration
from segzero_jax.step_phases import BESIDE
from segzero_jax.terminal import write_line
from segzero_jax.time_account import CompileClock, PhaseTimer, TimeAccount

# Exit codes: too many steps in a row without a finite update; a phase that took longer than watch.kill_after_s.
DIVERGED, HUNG = 5, 6
_TIMES_USUAL = 10
_ENOUGH_STEPS = 3
_LEAST_S = 5.0
_LOOK_S = 1.0
_NOTE_S = 10.0
# The phase with its own messages and time limit, see Patience.
_PATIENT = "reward_wait"

Row = Mapping[str, Any]


class Diverged(RuntimeError):
    """Too many steps in a row had no finite update; the message names the last good checkpoint."""


class FiniteWatch:
    """Counts steps whose updates were all skipped because loss or gradient was not finite."""

    def __init__(self, most: int) -> None:
        """``most`` such steps in a row end the run. Every process counts from zero."""
        self._most = most
        self._first = 0
        self._count = 0

    def look(self, step: int, row: Row, checkpoints: Iterable[int], directory: str) -> str:
        """A line to print if updates of the step were skipped, else empty.

        Args:
          row: the step's metrics; the step counts as skipped when no update was finite, so that ``loss`` is None.
          checkpoints: steps of the saved checkpoints.
          directory: where the checkpoints are.

        Raises:
          Diverged: it was one skipped step too many.
        """
        skipped = row.get("update/skipped")
        if skipped is None:
            # A step without an update does not count either way.
            return ""
        if row["loss"] is not None:
            self._count = 0
            return f"step {step}: loss or gradient not finite in {skipped:g} of its updates, skipped" if skipped else ""
        self._first = step if self._count == 0 else self._first
        self._count += 1
        if self._count >= self._most:
            saved = sorted(checkpoints)
            # Checkpoints of skipped steps hold the same weights.
            good = [number for number in saved if number < self._first] or saved
            where = f"last good checkpoint: {directory}/{good[-1]}" if good else "there is no checkpoint yet"
            raise Diverged(
                f"step {step}: loss or gradient not finite in {self._count} steps in a row, from step {self._first} "
                f"on; {where}; start a new run with another configuration, such as a lower train.lr"
            )
        return (
            f"step {step}: loss or gradient not finite, update skipped ({self._count} in a row; "
            f"{self._most} end the run)"
        )


class CollapseWatch:
    """Alarms for states that a healthy policy does not stay in, computed from a step's metrics alone."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._held = dict.fromkeys(_COLLAPSES, 0)
        self._measured: set[str] = set()

    def look(self, row: Row) -> dict[str, int]:
        """``alarm/<state>``: 1 where the state has held for ``watch.alarm_after`` steps, this one included, else 0.

        Call it for every step in order, including those before a restart.
        """
        # A metric that a step could not measure neither prolongs a state nor ends it.
        scored = row.get("reward/mean") is not None
        self._measured = {name for name, (key, *_) in _COLLAPSES.items() if scored and row.get(key) is not None}
        for name in self._measured:
            self._held[name] = self._held[name] + 1 if _COLLAPSES[name][1](row, self._config) else 0
        return {f"alarm/{name}": int(held >= self._config.alarm_after) for name, held in self._held.items()}

    def onsets(self, step: int) -> list[str]:
        """One line for every alarm that the last step raised."""
        after = self._config.alarm_after
        return [
            f"step {step}: alarm: {words.format(floor=self._config.entropy_floor)}, for {after} steps now"
            for name, (_, _, words) in _COLLAPSES.items()
            if name in self._measured and self._held[name] == after
        ]


# State: the metric it needs, whether it holds, its message.
_COLLAPSES: Mapping[str, tuple[str, Callable[[Row, WatchConfig], bool], str]] = {
    "empty_thinking": (
        "empty_thinking",
        lambda row, _: row["empty_thinking"] > 0.5,
        "most responses hold no reasoning (empty_thinking above 0.5)",
    ),
    "one_length": (
        "response_length/min",
        lambda row, _: row["response_length/min"] == row["response_length/max"],
        "all responses have one length (response_length/min equals /max)",
    ),
    "no_spread": (
        "reward/zero_std_groups",
        lambda row, _: row["reward/zero_std_groups"] == 1,
        "no group has any spread of rewards, so no update is made (reward/zero_std_groups is 1)",
    ),
    "low_entropy": (
        "entropy",
        lambda row, config: row["entropy"] < config.entropy_floor,
        "the policy hardly varies its answers any more (entropy below watch.entropy_floor={floor})",
    ),
}

ALARMS = tuple(f"alarm/{name}" for name in _COLLAPSES)


class HangWatch:
    """A thread that reports a hanging phase, while it hangs, and dumps the stacks of all threads.

    A phase hangs if it takes ten times as long as a whole step usually does; an evaluation or a checkpoint, ten times
    as long as those usually do. The usual time is the median of this process; compilation does not count, and
    ``Patience`` handles the wait for rewards.

    Args:
      timer: tracks the phase in progress.
      compiling: whether a program is being compiled now.
      stacks: a file that Python stacks are appended to.
      say: prints a line; called from the thread.
      kill_after_s: a phase that takes longer ends the process with exit code 6; 0 never does.
      note: called every ten seconds.
      end: ends the process.
      step: the last finished step.
    """

    def __init__(
        self,
        timer: PhaseTimer,
        compiling: Callable[[], bool],
        stacks: Path,
        say: Callable[[str], None],
        kill_after_s: float,
        note: Callable[[], None] = lambda: None,
        end: Callable[[int], object] = os._exit,
        step: int = 0,
    ) -> None:
        self._timer, self._compiling, self._stacks = timer, compiling, stacks
        self._say, self._kill_after_s, self._note, self._end = say, kill_after_s, note, end
        self._usual: dict[str, deque[float]] = {}
        self._step = step
        self._told: tuple[int, str, float] | None = None
        self._paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)

    def __enter__(self) -> "HangWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finished(self, step: int, times: Mapping[str, float]) -> None:
        """Updates the usual times with a step's ``time/*``."""
        self._step = step
        for name in ("step", "checkpoint", "evaluation"):
            if f"time/{name}" in times:
                self._usual.setdefault(name, deque(maxlen=50)).append(times[f"time/{name}"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reports nothing and ends nothing inside this context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def look(self) -> None:
        """Reports a phase that has taken too long, again whenever that time has doubled, or ends the process."""
        phase, seconds = self._timer.running()
        if phase == _PATIENT or self._paused or self._compiling():
            return
        if self._kill_after_s and seconds > self._kill_after_s:
            self._report(phase, seconds, f"longer than watch.kill_after_s={self._kill_after_s:g}: this ends it")
            self._end(HUNG)
        usual = self._usual_s(phase)
        if usual is None or seconds < max(_LEAST_S, _TIMES_USUAL * usual):
            return
        told = self._told
        if told is None or told[:2] != (self._step, phase) or seconds >= 2 * told[2]:
            self._told = self._step, phase, seconds
            whole = f"{phase}s take" if phase in BESIDE else "whole steps take"
            self._report(phase, seconds, f"where {whole} {usual:.1f} s")

    def _usual_s(self, phase: str) -> float | None:
        found = self._usual.get(phase if phase in BESIDE else "step", ())
        return statistics.median(found) if len(found) >= (1 if phase in BESIDE else _ENOUGH_STEPS) else None

    def _report(self, phase: str, seconds: float, why: str) -> None:
        head = f"step {self._step + 1}: {phase} has taken {duration(seconds)}, {why}"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(f"\n{datetime.now():%Y-%m-%d %H:%M:%S} {head}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"the stacks of all threads are in {self._stacks}"
        except OSError as error:  # A full disk: the hang is reported all the same.
            where = f"where each thread is could not be written: {error}"
        self._say(f"{head}; {where}")

    def _run(self) -> None:
        since_note = 0.0
        while not self._stop.wait(_LOOK_S):
            since_note += _LOOK_S
            try:
                self.look()
                if since_note >= _NOTE_S:
                    since_note = 0.0
                    self._note()
            except OSError as error:
                # A full disk is reported where the run writes what matters.
                write_line(sys.stderr, f"hang watch: {error}")


class Watch:
    """All watches over one run, as the train loop uses them. Use it as a context manager.

    Args:
      config: thresholds of the watches.
      run_dir: gets ``clock.json`` from process 0, ``stacks-PROCESS.txt`` from each process that hangs.
      timer: started with the run; all time that it has counted so far is start-up.
      writer: has the steps that the run resumes from, and prints messages.
      removed: rows of ``metrics.jsonl`` past those steps.
      checkpoints: the run's; the last good one is named when updates fail.
      profiler: traces some steps.
    """

    def __init__(
        self,
        config: WatchConfig,
        run_dir: Path,
        timer: PhaseTimer,
        writer: MetricsWriter,
        removed: Sequence[Row],
        checkpoints: Checkpoints,
        profiler: Profiler,
    ) -> None:
        timer.name_rest("startup")
        self._timer, self._profiler, self._say = timer, profiler, writer.message
        self._checkpoints = checkpoints
        kept = writer.steps()
        self._account = TimeAccount(run_dir if jax.process_index() == 0 else None, timer, kept, removed)
        self._finite = FiniteWatch(config.max_skipped)
        self._collapse = CollapseWatch(config)
        for row in kept:
            self._collapse.look(row)
        compilation = CompileClock(timer)
        self._hang = HangWatch(
            timer,
            lambda: compilation.compiling,
            run_dir / f"stacks-{jax.process_index()}.txt",
            self._say_here,
            config.kill_after_s,
            note=self._account.note,
            step=kept[-1]["step"] if kept else 0,
        )
        self._listening = compilation.listening()
        self._done = False

    def __enter__(self) -> "Watch":
        self._listening.__enter__()
        self._hang.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profiler.close()
        self._hang.__exit__()
        self._listening.__exit__(None, None, None)
        # On a full disk, the error that ends the run is the one to report.
        with suppress(OSError):
            self._account.note(ended=self._done)

    def _say_here(self, line: str) -> None:
        """Prints a line about this process alone: when one of a job hangs, all wait, and only it knows where."""
        if jax.process_count() == 1:
            self._say(line)
        else:
            write_line(sys.stderr, f"process {jax.process_index()}: {line}")

    def begin(self, step: int) -> None:
        """Marks the beginning of a step."""
        self._profiler.begin(step)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a phase of a step, or one outside the steps."""
        return self._timer.phase(name)

    @contextmanager
    def last_save(self) -> Iterator[None]:
        """The phase of a run's last save, which waits for the disk, as no save before it does.

        The hang watch pauses: how long this takes is unknown, and ending it would lose the save; the next start would
        only wait again.
        """
        with self._hang.paused(), self.phase("checkpoint"):
            yield

    def done(self) -> None:
        """Marks that the run has finished all its steps, saves and evaluations."""
        self._done = True

    def line(self, step: int, row: Row, tokens: int) -> dict[str, float]:
        """The rest of a step's line: ``alarm/*``, ``time/*`` and ``tokens_per_second``. Prints new alarms.

        Args:
          row: the step's other metrics.
          tokens: tokens that the step processed.
        """
        alarms = self._collapse.look(row)
        for line in self._collapse.onsets(step):
            self._say(line)
        times = self._account.line(step)
        self._hang.finished(step, times)
        return {**alarms, **times, "tokens_per_second": tokens / times["time/step"]}

    def check(self, step: int, row: Row) -> None:
        """Reports a skipped update. Raises Diverged if it was one too many."""
        line = self._finite.look(step, row, self._checkpoints.steps, str(self._checkpoints.directory))
        if line:
            self._say(line)
