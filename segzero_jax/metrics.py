"""The output of a run while it trains: metrics, evaluations, rollouts, images, and a progress display.

Everything goes into the run directory (README, "A run directory") so that a run interrupted at any moment can be read
and resumed: metrics are written line by line, other files atomically.
"""

import hashlib
import io
import re
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from PIL import Image

from segzero_jax import jsonl
from segzero_jax.progress import Display, display
from segzero_jax.tensorboard import EventFile
from segzero_jax.terminal import lasting

# Lines stored in each checkpoint: more than a run writes between two copies of its directory to a bucket.
_RECENT = 200


class MetricsError(ValueError):
    """A step written twice, or a number that is not finite; the message names the step, the key and the value."""


class MetricsWriter:
    """Writes a run directory. Use it as a context manager, or call ``close``.

    Args:
      run_dir: the run directory; created if missing.
      total_steps: steps of the whole run, for the progress display.
      show_progress: whether to report progress at all; false on all hosts but one.
      stream: where progress goes, standard error by default. A terminal gets a bar, a file an occasional line.
    """

    def __init__(
        self, run_dir: str | Path, total_steps: int, show_progress: bool, stream: TextIO | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = self.run_dir / "metrics.jsonl"
        self._evaluations = self.run_dir / "evaluations.jsonl"
        self._events: EventFile | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._evaluated: list[dict[str, Any]] = []  # The rows of evaluations.jsonl, also when that is gone.
        self._last_step = self._repair()
        stream = lasting(sys.stderr if stream is None else stream)
        self._display: Display | None = display(stream, total_steps) if show_progress else None

    @property
    def last_step(self) -> int | None:
        """The last step in ``metrics.jsonl``, None before the first."""
        return self._last_step

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the line of a step; it is on disk when this returns.

        Args:
          step: from 1 upwards, above every step written so far.
          metrics: numbers (Python, numpy or 0-d arrays), None for what could not be measured.

        Raises:
          MetricsError: the step was written before, or a number is not finite. Nothing is written then.
        """
        if self._last_step is not None and step <= self._last_step:
            raise MetricsError(
                f"step {step}: {self._metrics} already goes up to step {self._last_step}; "
                "resume the run or choose another run.dir"
            )
        row = {key: _number(value, f"step {step}: {key}") for key, value in metrics.items()}
        self._recent.append({"step": step, **row})  # First: if the disk is full, the checkpoint still has it.
        jsonl.append(self._metrics, {"step": step, **row})
        self._last_step = step
        self._write_events(step, row)
        if self._display:
            self._display.step(step, row)

    def write_evaluation(
        self,
        step: int,
        split: str,
        summaries: Mapping[str, Mapping[str, Any]],
        samples: Iterable[Mapping[str, Any]],
    ) -> None:
        """Writes the evaluation of a split: its numbers by mode, and its greedy answers one by one.

        Writing the same evaluation again replaces it, since a run interrupted during an evaluation repeats it.

        Args:
          step: steps done before it; 0 before training.
          split: name of the held-out split.
          summaries: maps "greedy" and "sampled" to their ``giou``, ``giou_low``, ``giou_high``, ``ciou``, ...
          samples: rows of ``evaluations/STEP_SPLIT.jsonl``.

        Raises:
          MetricsError: a number is not finite.
          JsonLinesError: a sample has no strict JSON form. Nothing is written in either case.
        """
        where = f"evaluation of {split} at step {step}: "
        clean = {
            mode: {key: _number(value, f"{where}{mode} {key}") for key, value in numbers.items()}
            for mode, numbers in summaries.items()
        }
        rows = [{"step": step, "split": split, "mode": mode, **numbers} for mode, numbers in clean.items()]
        folder = self.run_dir / "evaluations"
        folder.mkdir(exist_ok=True)
        jsonl.write(folder / f"{step}_{split}.jsonl", samples)
        again = [
            row for row in self._evaluated if (row["step"], row["split"]) == (step, split) and row["mode"] in clean
        ]
        self._evaluated = [row for row in self._evaluated if row not in again] + rows
        jsonl.write(self._evaluations, self._evaluated)
        self._write_events(
            step, {f"eval/{split}/{mode}/{key}": n for mode, numbers in clean.items() for key, n in numbers.items()}
        )

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes ``rollouts/STEP.jsonl``, one row per sampled response. Raises as ``jsonl.dump`` does."""
        folder = self.run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        jsonl.write(folder / f"{step}.jsonl", rows)

    def write_image(self, example_id: str, image: bytes) -> str:
        """Stores an image once as JPEG and returns its path in the run directory, ``images/NAME-DIGEST.jpg``.

        Args:
          example_id: any text; it names the file as far as file names allow. Another split may have the same id.
          image: an encoded image in any format that Pillow reads; the digest is computed from it.

        Raises:
          OSError: it is not such an image.
        """
        relative = f"images/{safe_name(example_id)}-{hashlib.sha256(image).hexdigest()[:8]}.jpg"
        path = self.run_dir / relative
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            jsonl.replace(path, _as_jpeg(image))
        return relative

    def steps(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return jsonl.read(self._metrics) if self._metrics.exists() else []

    def recent(self, kept: Collection[int] = ()) -> dict[str, list[dict[str, Any]]]:
        """The newest lines, to store in a checkpoint: a machine that vanishes may not have copied them elsewhere.

        Also if the run directory itself is gone, except for lines of ``metrics.jsonl`` older than the newest 200.

        Args:
          kept: steps whose lines are included, however old: they tell which checkpoint is best.
        """
        metrics = list(self._recent)
        if metrics and min(kept, default=metrics[0]["step"]) < metrics[0]["step"]:
            first = metrics[0]["step"]
            with suppress(OSError):
                metrics = [row for row in self.steps() if row["step"] in kept and row["step"] < first] + metrics
        old = [row for row in self._evaluated[:-_RECENT] if row["step"] in kept]
        return {"metrics": metrics, "evaluations": old + self._evaluated[-_RECENT:]}

    def add_missing(self, recent: Mapping[str, Iterable[Mapping[str, Any]]]) -> bool:
        """Adds lines from ``recent`` that these files, an older copy, lack. Returns whether there were any."""
        steps = self.steps()
        written = {row["step"] for row in steps}
        lines = [row for row in recent.get("metrics", ()) if row["step"] not in written]
        if lines:
            jsonl.write(self._metrics, sorted([*steps, *lines], key=itemgetter("step")))
        named = lambda row: (row["step"], row["split"], row["mode"])  # noqa: E731
        known = set(map(named, self._evaluated))
        missing = [row for row in recent.get("evaluations", ()) if named(row) not in known]
        if missing:
            jsonl.write(self._evaluations, [*self._evaluated, *missing])
        self._last_step = self._repair()
        return bool(lines or missing)

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """Deletes everything past ``step``, the step a run resumes from, so that no step appears twice.

        Returns:
          The deleted rows of ``metrics.jsonl``.
        """
        forgotten = [row for row in self.steps() if row["step"] > step]
        for path in (self._metrics, self._evaluations):
            if path.exists():
                jsonl.write(path, [row for row in jsonl.read(path) if row["step"] <= step])
        for path in [*self.run_dir.glob("rollouts/*.jsonl"), *self.run_dir.glob("evaluations/*.jsonl")]:
            number = path.name.partition("_")[0].partition(".")[0]
            if number.isdecimal() and int(number) > step:
                path.unlink()
        self._last_step = self._repair()
        self._rewrite_events()
        if self._display:
            self._display.restart(self._last_step or 0)
        return forgotten

    def message(self, text: str) -> None:
        """Prints a message without disturbing the progress display."""
        if self._display:
            self._display.message(text)

    def close(self) -> None:
        """Ends the progress display and closes the files."""
        if self._display:
            self._display.close()
            self._display = None
        if self._events:
            self._events.close()
            self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _repair(self) -> int | None:
        """Cuts off a line that a crash left unfinished; returns the last step."""
        self._recent.clear()
        self._evaluated = jsonl.read(self._evaluations) if self._evaluations.exists() else []
        if not self._metrics.exists():
            return None
        rows = jsonl.read(self._metrics)
        self._recent.extend(rows)
        if not self._metrics.read_bytes().endswith(b"\n"):
            jsonl.write(self._metrics, rows)
        return max((row["step"] for row in rows), default=None)

    def _rewrite_events(self) -> None:
        """Rebuilds TensorBoard's files, which hold nothing of their own, from what is left of the others."""
        for path in self.run_dir.glob("tensorboard/events.out.tfevents.*"):
            path.unlink()
        # Elsewhere, copies of the old files may be next to the new one, which replaces them all.
        if self._metrics.exists() or self._evaluations.exists():
            self._events = EventFile(self.run_dir / "tensorboard", first_step=0)
        rows = jsonl.read(self._metrics) if self._metrics.exists() else []
        # Lines have no wall-clock time. Counting back from now keeps the steps' spacing on TensorBoard's time axis.
        wall, walls = time.time(), {}
        for row in reversed(rows):
            walls[row["step"]] = wall
            wall -= row.get("time/total") or 0.0
        for row in rows:
            numbers = {key: value for key, value in row.items() if key != "step"}
            self._write_events(row["step"], numbers, walls[row["step"]])
        for row in self._evaluated:
            numbers = {key: value for key, value in row.items() if key not in ("step", "split", "mode")}
            self._write_events(
                row["step"],
                {f"eval/{row['split']}/{row['mode']}/{key}": value for key, value in numbers.items()},
                walls.get(row["step"], min(walls.values(), default=None)),
            )

    def _write_events(self, step: int, numbers: Mapping[str, float | None], wall_s: float | None = None) -> None:
        if self._events is None:
            folder = self.run_dir / "tensorboard"
            resumed = any(folder.glob("events.out.tfevents.*"))
            self._events = EventFile(folder, first_step=step if resumed else None)
        self._events.write(step, {key: value for key, value in numbers.items() if value is not None}, wall_s)


class SilentWriter(MetricsWriter):
    """Stands in for the writer on every host but host 0, which writes for all."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def steps(self) -> list[dict[str, Any]]:
        return []

    @property
    def last_step(self) -> None:
        return None

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def write_evaluation(
        self,
        step: int,
        split: str,
        summaries: Mapping[str, Mapping[str, Any]],
        samples: Iterable[Mapping[str, Any]],
    ) -> None:
        pass

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def write_image(self, example_id: str, image: bytes) -> str:
        return ""

    def recent(self, kept: Collection[int] = ()) -> dict[str, list[dict[str, Any]]]:
        return {}

    def add_missing(self, recent: Mapping[str, Iterable[Mapping[str, Any]]]) -> bool:
        return False

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        return []

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def safe_name(text: str) -> str:
    """A file name for any text: short plain lower-case text as it is, other text cleaned and with a digest added."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", text):
        return text
    cleaned = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{cleaned}-{digest}" if cleaned else digest


def _as_jpeg(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image)) as picture:
        if picture.format == "JPEG":
            return image
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=92)
        return buffer.getvalue()


def _number(value: Any, what: str) -> float | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    number = float(value)
    if number - number != 0:  # true for NaN and both infinities
        raise MetricsError(f"{what}={number}: expected a finite number, or None where nothing was measured")
    return number
