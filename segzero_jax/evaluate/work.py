"""One policy on one split: writes ``samples.jsonl`` batch by batch, resuming where an earlier run was interrupted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segzero_jax import jsonl
from segzero_jax.evaluate.judging import Judge, Pending
from segzero_jax.file_lock import hold
from segzero_jax.metrics import safe_name
from segzero_jax.types import Example

ORACLE = "oracle"


class EvaluateError(ValueError):
    """An evaluation that cannot be made; the message is one line."""


@dataclass(frozen=True)
class Task:
    """The inputs of an evaluation. Two runs with equal tasks give equal results.

    Attributes:
      dataset, split: the questions; ``checksum`` identifies their content.
      count: number of questions.
      checkpoint: the policy, or "oracle" for the targets themselves.
      samples: drawn answers per question; 0 for one greedy answer.
      options: everything else the answers depend on.
    """

    dataset: str
    split: str
    checksum: str
    count: int
    checkpoint: str
    samples: int
    options: dict[str, Any]

    @property
    def answers(self) -> int:
        """Answers per question."""
        return max(1, self.samples)

    @property
    def name(self) -> str:
        """A description for people."""
        drawn = f", {self.samples} drawn answers each" if self.samples else ""
        return f"{self.checkpoint} on {self.dataset}/{self.split}, {self.count} questions{drawn}"

    def folder(self, out: Path) -> Path:
        """The folder of its files."""
        return out / safe_name(f"{self.dataset}-{self.split}") / safe_name(self.checkpoint)


def open_task(task: Task, out: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same task, whole batches only; deletes what comes after them.

    Rows count up to the first that is out of order, as when two commands have written at once.

    Raises:
      EvaluateError: the folder holds another evaluation, or invalid rows.
    """
    folder = task.folder(out)
    settings, samples = folder / "task.json", folder / "samples.jsonl"
    ours = json.loads(json.dumps(asdict(task)))
    if not settings.exists():
        samples.unlink(missing_ok=True)
        jsonl.replace(settings, (json.dumps(ours, indent=1) + "\n").encode())
        return []
    try:
        theirs = json.loads(settings.read_text())
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise EvaluateError(f"{settings}: not what an evaluation says of itself; delete {folder} to evaluate anew")
    flat = lambda tree: {k: v for k, v in tree.items() if k != "options"} | tree.get("options", {})  # noqa: E731
    old, new = flat(theirs), flat(ours)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        raise EvaluateError(
            f"{folder}: holds another evaluation ({', '.join(f'{k} {old.get(k)!r}' for k in differing)}; now "
            f"{', '.join(f'{new.get(k)!r}' for k in differing)}): choose another --out, or delete the folder"
        )
    try:
        rows = jsonl.read(samples) if samples.exists() else []
    except jsonl.JsonLinesError as error:
        raise EvaluateError(f"{error}; delete the file to evaluate anew") from None
    whole, wanted = task.options["batch"] * task.answers, task.count * task.answers
    fine = 0
    while fine < min(len(rows), wanted) and _place(rows[fine]) == divmod(fine, task.answers):
        fine += 1
    kept = rows[: fine if fine == wanted else fine // whole * whole]
    if samples.exists():
        jsonl.write(samples, kept)
    return kept


def _place(row: dict[str, Any]) -> tuple[Any, Any]:
    """A row's question index and answer index."""
    return row.get("index"), row.get("sample")


def work(
    task: Task, out: Path, source: Sequence[Example], judge: Judge, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Evaluates what is not yet done; returns all rows.

    One batch is scored by SAM 2 while the policy answers the next one. A batch's rows are written together.

    Args:
      task: the task; its rows from ``open_task`` are kept as they are.
      say: is told the progress now and then.

    Raises:
      EvaluateError: see ``open_task``.
      FolderHeld: another process is working on the same task.
    """
    with hold(task.folder(out), "evaluation"):
        return _work(task, out, source, judge, say)


def _work(
    task: Task, out: Path, source: Sequence[Example], judge: Judge, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = open_task(task, out)
    batch, path = task.options["batch"], task.folder(out) / "samples.jsonl"
    scoring: Pending | None = None
    for start in range(len(rows) // task.answers, task.count, batch):
        examples = [source[i] for i in range(start, min(start + batch, task.count))]
        answered = judge(examples, start)
        if scoring is not None:
            rows += _keep(path, scoring())
            say(f"{len(rows) // task.answers} of {task.count} questions")
        scoring = answered
    if scoring is not None:
        rows += _keep(path, scoring())
        say(f"{task.count} of {task.count} questions")
    return rows


def _keep(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds a batch to the file; returns it as read from JSON, so that a resumed run computes with the same numbers."""
    lines = [jsonl.dump(row) for row in rows]
    jsonl.append_lines(path, lines)
    return [json.loads(line) for line in lines]
