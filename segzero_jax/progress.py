"""Progress of a run: a bar on a terminal, an occasional line in a log file."""

from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from segzero_jax.terminal import write_line

_PLAIN_LINES = 40  # about how many progress lines a whole run leaves in a log file
_SHOWN = (("reward/mean", "reward", ".2f"), ("kl", "KL", ".4f"), ("reward/mask_iou", "mask IoU", ".3f"))


def display(stream: TextIO, total: int) -> "Display":
    """The progress display of a run of ``total`` steps on ``stream``."""
    return _Bar(stream, total) if stream.isatty() else _Lines(stream, total)


class Display(Protocol):
    def step(self, step: int, row: Mapping[str, Any]) -> None: ...
    def restart(self, step: int) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """Progress for a log file: an occasional line that can be read alone."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._total = stream, total
        self._first = True

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        due = self._first or step == self._total or step % max(1, self._total // _PLAIN_LINES) == 0
        self._first = False
        if due:
            self.message(" | ".join([f"step {step}/{self._total}", *_readings(row), *self._left(step, row)]))

    def _left(self, step: int, row: Mapping[str, Any]) -> list[str]:
        seconds = row.get("time/step")
        if seconds is None or step >= self._total:
            return []
        return [f"about {duration(seconds * (self._total - step))} left"]

    def restart(self, step: int) -> None:
        self._first = True

    def message(self, text: str) -> None:
        write_line(self._stream, text)

    def close(self) -> None:
        pass


class _Bar:
    """Progress for a terminal."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[readings]}", markup=False),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task = self._progress.add_task("", total=total, readings="")
        self._progress.start()

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=step, readings="  ".join(_readings(row)))

    def restart(self, step: int) -> None:
        self._progress.reset(self._task, completed=step)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _readings(row: Mapping[str, Any]) -> list[str]:
    readings = [f"{label} {row[key]:{form}}" for key, label, form in _SHOWN if row.get(key) is not None]
    if row.get("time/step") is not None:
        readings.append(f"{row['time/step']:.1f} s/step")
    return readings


def duration(seconds: float) -> str:
    """Seconds in readable form: ``42 s``, ``8 min 05 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
