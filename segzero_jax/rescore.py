"""``python -m segzero_jax.rescore``: scores stored responses again under any recipe, without a model.

Each line of the input has ``text`` and ``solution``, and ``mask_iou`` if the recipe weighs it: a run's
``rollouts/STEP.jsonl`` is such a file. The output has the same rows with ``reward`` (the total) and ``components``.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segzero_jax import jsonl, rewards
from segzero_jax.config import OneLineParser
from segzero_jax.local_path import home_path
from segzero_jax.terminal import write_line


class RescoreError(ValueError):
    """Input that cannot be scored; the message is one line that names file and line."""


def rescore(lines: Sequence[bytes], name: str, recipe: str, weight: float, mode: str) -> list[dict[str, Any]]:
    """The rows of JSON lines, each with ``reward`` and ``components`` of the recipe.

    Args:
      lines: one JSON object each; empty ones, as between concatenated files, are skipped.
      name: name of the file, for messages.
      recipe, weight, mode: as in ``rewards.score``.

    Raises:
      RescoreError: a line is not strict JSON, or lacks what the recipe needs; or there are no rows.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            score = rewards.score(recipe, row["text"], row["solution"], row.get("mask_iou"), weight, mode)
        except (ValueError, RecursionError) as error:
            raise RescoreError(f"{name}:{number}: {error}") from None
        rows.append({**row, "reward": score.total, "components": score.components})
    if not rows:
        raise RescoreError(f"{name}: no rows, expected a JSON object on each line")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command. On bad input: one line, exit code 2, nothing written."""
    parser = OneLineParser(prog="python -m segzero_jax.rescore", description="Scores stored responses again.")
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(rewards.RECIPES)}")
    parser.add_argument("--input", required=True, type=home_path, metavar="F.jsonl", help="rows with text and solution")
    parser.add_argument("--output", required=True, type=home_path, metavar="F.jsonl", help="may be the input")
    parser.add_argument("--mask-iou-weight", type=float, default=0.0, metavar="W", help="of each row's mask_iou [0]")
    parser.add_argument("--mask-iou-mode", metavar="MODE", help="raw, threshold or tiered [raw]")
    args = parser.parse_args(argv)
    weight, mode = args.mask_iou_weight, args.mask_iou_mode or "raw"
    try:
        most = rewards.maximum(args.recipe, weight, mode)
        if rewards.RECIPES[args.recipe].tiers and (weight or args.mask_iou_mode):
            given = f"--mask-iou-weight={weight:g}" if weight else f"--mask-iou-mode={mode}"
            raise RescoreError(f"{given}: recipe {args.recipe} weighs its mask IoU itself, leave it out")
        if args.mask_iou_mode and not weight:
            raise RescoreError(f"--mask-iou-mode={mode}: expected --mask-iou-weight above 0 beside it")
        # A pipe or a device would be replaced by a file. A link is followed to its file.
        output = args.output.resolve()
        if (output.exists() and not output.is_file()) or not output.parent.is_dir():
            raise RescoreError(f"--output={args.output}: expected a file in a folder that exists")
        rows = rescore(_lines(args.input), str(args.input), args.recipe, weight, mode)
        jsonl.write(output, rows)
    except (ValueError, OSError, RecursionError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    mean = sum(row["reward"] for row in rows) / len(rows)
    said = f"wrote {len(rows)} rows to {args.output}: {args.recipe}, mean reward {mean:.4g} of at most {most:.4g}"
    write_line(sys.stdout, said)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().rstrip(b"\r\n").split(b"\n")
    except OSError as error:
        raise RescoreError(f"--input={path}: {error.strerror}, expected a file of JSON lines") from None


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise ValueError(f"expected a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for key in ("text", "solution"):
        if key not in row:
            raise ValueError(f"{key} is missing")
        if not isinstance(row[key], str):
            raise ValueError(f"{key}: expected a string, got {type(row[key]).__name__}")
    iou = row.get("mask_iou")
    if iou is not None and (isinstance(iou, bool) or not isinstance(iou, int | float)):
        raise ValueError(f"mask_iou: expected a number or null, got {type(iou).__name__}")
    return row


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


if __name__ == "__main__":
    main()
