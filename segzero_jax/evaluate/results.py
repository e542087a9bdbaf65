"""``results.json``: the numbers of every evaluation, what failed and why, and which checkpoint was chosen."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segzero_jax import jsonl
from segzero_jax.evaluate.work import ORACLE, Task
from segzero_jax.evaluation import judge_rows, per_instance, summary


def is_validation(split: str) -> bool:
    """Whether a split may choose a checkpoint: "val", "validation", or one that begins with either and "_"."""
    return split.split("_")[0] in ("val", "validation")


def result(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One evaluation as JSON.

    Returns:
      The task; ``expression``, the numbers with one row per question (``evaluation.summary``); ``instance``, the same
      with one row for all expressions of the same thing; ``failures``, their count by cause; ``failed``, a list.
    """
    judged = judge_rows(rows, task.answers)
    failed = [row for row in rows if row["failure"]]
    causes = sorted({row["failure"] for row in failed})
    return {
        **asdict(task),
        "expression": summary(judged),
        "instance": summary(per_instance(judged, [row["instance"] for row in rows[:: task.answers]])),
        "failures": {cause: sum(row["failure"] == cause for row in failed) for cause in causes},
        "failed": [
            {"id": row["id"], "sample": row["sample"], "cause": row["failure"], "error": row["error"]} for row in failed
        ],
    }


def measure_of(numbers: Mapping[str, Any]) -> str:
    """The main number of an evaluation: gIoU, or box accuracy if no masks were made."""
    return "box_accuracy" if numbers["giou"] is None else "giou"


def choose(results: Sequence[Mapping[str, Any]], checkpoints: Sequence[str]) -> dict[str, Any]:
    """The checkpoint with the highest mean gIoU over the validation splits; the first in a tie.

    Without SAM 2, box accuracy replaces gIoU.

    Args:
      results: results of all checkpoints; only validation splits are used.
    """
    scores = {}
    for checkpoint in checkpoints:
        ours = [r for r in results if r["checkpoint"] == checkpoint and is_validation(r["split"])]
        values = [one["expression"][measure_of(one["expression"])] for one in ours]
        scores[checkpoint] = sum(values) / len(values)
    looked_at = [r for r in results if r["checkpoint"] != ORACLE and is_validation(r["split"])]
    return {
        "checkpoint": max(checkpoints, key=lambda checkpoint: scores[checkpoint]),
        "by": measure_of(looked_at[0]["expression"]),
        "on": sorted({f"{r['dataset']}/{r['split']}" for r in looked_at}),
        "scores": scores,
    }


def write_results(out: Path, results: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> Path:
    """Writes ``results.json`` atomically; returns its path.

    Evaluations from earlier commands are kept, and so is their choice if none is made now.
    """
    path = out / "results.json"
    there, choice = {}, None
    # If the file was overwritten, nothing of it can be kept, and hours of answers should not be lost to that.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads(path.read_text())
        there, choice = _by_name(earlier["evaluations"]), earlier["chosen"]
    found = {"chosen": chosen or choice, "evaluations": list((there | _by_name(results)).values())}
    content = json.dumps(found, indent=1, allow_nan=False)
    jsonl.replace(path, (content + "\n").encode())
    return path


def _by_name(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(one["dataset"], one["split"], one["checkpoint"]): one for one in results}
