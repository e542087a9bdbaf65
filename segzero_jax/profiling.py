"""``--profile``: a trace of a few steps that XProf and Perfetto open."""

from collections.abc import Callable
from pathlib import Path

import jax

from segzero_jax.config import ConfigError
from segzero_jax.time_account import PhaseTimer

# The first two steps compile their programs and settle.
_SETTLED, _STEPS = 2, 2


def parse_steps(text: str, first: int, last: int) -> range:
    """The steps that ``--profile`` selects, among those that this process runs.

    A restarted command, for example after a preemption, only runs the remaining steps: steps that an earlier process
    ran are left out, even if that is all of them.

    Args:
      text: "FIRST-LAST", one step, or empty for the third and fourth that this process runs, or the last of fewer.
      first, last: the steps that this process runs.

    Raises:
      ConfigError: another form, or the run has no such steps.
    """
    if not text:
        begin = min(first + _SETTLED, last)
        return range(begin, min(begin + _STEPS, last + 1))
    given, _, end = text.partition("-")
    end = end or given
    if not (given.isascii() and given.isdigit() and end.isascii() and end.isdigit()) or int(given) > int(end):
        raise ConfigError(f"--profile={text}: expected FIRST-LAST, such as --profile=3-4")
    if int(given) < 1 or int(end) > last:
        raise ConfigError(f"--profile={text}: expected some of steps 1-{last}, which this run makes")
    return range(max(int(given), first), int(end) + 1)


class Profiler:
    """Traces the given steps; every step has its number, every phase its name (``PhaseTimer``).

    Args:
      directory: gets ``plugins/profile/TIME/`` with ``*.xplane.pb`` for XProf and TensorBoard, and
        ``perfetto_trace.json.gz`` for Perfetto.
      steps: the steps to trace; empty for none.
      timer: counts the time of tracing itself as the phase ``profile``.
      say: prints a line.
    """

    def __init__(self, directory: Path, steps: range, timer: PhaseTimer, say: Callable[[str], None]) -> None:
        self._directory, self._steps, self._timer, self._say = directory, steps, timer, say
        self._step: jax.profiler.StepTraceAnnotation | None = None
        self._tracing = False

    def begin(self, step: int) -> None:
        """To be called at the beginning of every step."""
        self._end_step()
        if self._tracing and step not in self._steps:
            self.close()
        if not self._tracing and step in self._steps:
            options = jax.profiler.ProfileOptions()
            # Each Python call as an event would drown the phases, and slow down what is measured.
            options.python_tracer_level = 0
            with self._timer.phase("profile"):
                jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
            self._tracing = True
        self._step = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._step.__enter__()

    def close(self) -> None:
        """Ends the trace if one is running."""
        self._end_step()
        if self._tracing:
            self._tracing = False
            with self._timer.phase("profile"):
                jax.profiler.stop_trace()
            self._say(f"profile of steps {self._steps[0]}-{self._steps[-1]}: {self._directory}")

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
